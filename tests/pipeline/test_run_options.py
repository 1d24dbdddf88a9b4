"""Options of a training run, end to end: each changes what it should and nothing else."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from stages import train
from stages.lib.core.draws import generator
from stages.lib.core.paths import ENCODED_CAPTIONS
from stages.lib.core.trees import read_tree
from stages.lib.data.pairs import read_captions
from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import LATENTS, read_latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.models.trained import load_trained_unet
from stages.lib.store.stored_rows import StoredRows
from stages.lib.store.zarr_store import store_bytes
from stages.lib.training import loop
from stages.lib.training.batches import draw_batch, training_set
from stages.lib.training.checkpoints import Checkpoints
from stages.lib.training.failures import memory_advice
from stages.lib.training.feed import NUM_AHEAD, Feed
from stages.lib.training.history import History
from stages.lib.training.learner import prepare
from stages.lib.training.unet import build_unet
from tests.conftest import (
    REPOSITORY,
    changed,
    content_fingerprint,
    read_lineage,
    reseal,
    run_encoders,
    run_train,
    write_params,
)

WEIGHTS = Path("data/unet/diffusion_pytorch_model.safetensors")


def outputs() -> str:
    return content_fingerprint(Path("data/unet")) + content_fingerprint(Path("data/training"))


def weights() -> dict[str, torch.Tensor]:
    return load_trained_unet(Path("data/base"), Path("data/unet")).state_dict()


def curve(name: str) -> dict[int, float]:
    lines = Path(f"data/training/plots/metrics/{name}.tsv").read_text().splitlines()[1:]
    return {int(step): float(value) for step, value in (line.split("\t") for line in lines)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, *arguments, "stages.train"]


def run_process(work: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORK": work}
    done = subprocess.run(
        command(*arguments, "-m"), env=environment, check=True, capture_output=True, text=True
    )
    return done.stderr


# --- feeding


def test_data_read_from_disk_gives_the_run_of_data_in_memory(encoded, monkeypatch):
    rows, row = [], StoredRows._row
    monkeypatch.setattr(StoredRows, "_row", lambda self, number: (rows.append(number), row(self, number))[1])
    needed = sum(store_bytes(path) for path in (LATENTS, ENCODED_CAPTIONS))
    run_train(max_resident_bytes=needed)
    assert not rows
    resident = weights()
    shutil.rmtree(".work/train")
    run_train(max_resident_bytes=needed - 1)
    assert rows
    assert all(torch.equal(value, resident[name]) for name, value in weights().items())
    assert curve("validation_loss")


def test_more_memory_is_no_other_run(encoded, monkeypatch):
    run_train()
    monkeypatch.setattr(loop, "train_step", None)
    run_train(max_resident_bytes=0)
    assert len(list(Path(".work/train").iterdir())) == 1


@pytest.mark.parametrize(("device", "num_ahead"), [("cpu", 0), ("cuda", NUM_AHEAD)])
def test_the_feed_is_in_order_ahead_and_passes_errors_on(device, num_ahead):
    made = []

    def parts_of(step: int) -> list[int]:
        if step == 4:
            raise StageError("no step 4")
        made.append(step)
        return [step * 10]

    seen = []
    feed = Feed(parts_of, range(1, 9), torch.device(device))
    with pytest.raises(StageError, match="no step 4"):
        for step, parts in feed:
            seen.append((step, parts))
    assert seen == [(1, [10]), (2, [20]), (3, [30])]
    assert made == [1, 2, 3, *range(5, 5 + num_ahead)]
    assert feed.wait_seconds > 0


# --- stopping and going on


def heed_interrupts() -> None:
    """Take Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_a_stopped_process_goes_on_to_the_same_bytes(encoded):
    write_params(train={"max_train_steps": 30, "checkpoint_every_steps": 5, "validation_every_steps": 10})
    run_process("undisturbed")
    undisturbed = outputs()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        work = f"stopped-by-{number}"
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORK": work}
        process = subprocess.Popen(
            command("-m"), env=environment, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts
        )
        while not list(Path(work).rglob("step-*.safetensors")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait() != 0
        shutil.rmtree("data/training")  # as DVC does when the stage starts again
        assert "resuming at step" in run_process(work)
        assert outputs() == undisturbed


def several_processes(work: str, num_processes: int) -> str:
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)
    return run_process(work, *launcher)


@pytest.mark.parametrize(
    "adapters",
    [
        {},
        {"lora_rank": 2, "learning_rate": 1e-2},
        {"adapter": "lokr", "lora_rank": 2, "learning_rate": 1e-2},
    ],
)
def test_two_processes_take_the_draws_of_one_and_agree_to_rounding(encoded, adapters):
    write_params(train={"checkpoint_every_steps": 6, "use_ema": False, **adapters})
    run_train()
    alone, losses = weights(), curve("train_loss")
    validation = curve("validation_loss")
    several_processes("two", 2)
    base = load_file("data/base/unet/diffusion_pytorch_model.safetensors")
    moved = max((alone[name] - base[name]).abs().max() for name in alone)
    apart = max((alone[name] - value).abs().max() for name, value in weights().items())
    assert apart < 0.02 * moved
    assert curve("train_loss") == pytest.approx(losses, rel=1e-4)
    assert curve("validation_loss") == pytest.approx(validation, rel=1e-4)


def test_two_processes_draw_disjoint_halves_of_the_batch_of_one(encoded):
    options = write_params().train
    latents, conditioning = read_latents(), read_conditioning()
    data = training_set(read_captions(Path("data/pairs/captions.parquet")), latents, conditioning)
    batch = draw_batch(data, options, 3, 1000)
    halves = [batch.part(index, 2) for index in range(2)]
    for name, whole in vars(batch).items():
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), whole), name


@pytest.mark.slow
def test_three_processes_resume_bit_for_bit(encoded):
    """Of two, sums are the same in any order; of three, gradients have to be grouped as before."""
    write_params(
        train={
            "train_batch_size": 6,
            "max_train_steps": 12,
            "checkpoint_every_steps": 4,
            "validation_every_steps": 6,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        }
    )
    several_processes("run", 3)
    undisturbed = outputs()
    (directory,) = Path("run/train").iterdir()
    (directory / "step-00000012.safetensors").unlink()
    assert "resuming at step 8" in several_processes("run", 3)
    assert outputs() == undisturbed


# --- length of the run


def test_epochs_are_counted_in_batches(encoded):
    run_train(max_train_steps=None, num_train_epochs=3, lr_warmup_steps=0)
    num_samples = sum(s.split == "train" for s in read_captions(Path("data/pairs/captions.parquet")))
    assert max(curve("lr")) == 3 * num_samples // 4


def test_epochs_that_make_no_step_or_end_in_the_warm_up_are_refused(encoded):
    with pytest.raises(StageError, match="make 0 steps of train_batch_size 100"):
        run_train(max_train_steps=None, num_train_epochs=1, train_batch_size=100, lr_warmup_steps=0)
    with pytest.raises(StageError, match="no fewer than lr_warmup_steps 50"):
        run_train(max_train_steps=None, num_train_epochs=3, lr_warmup_steps=50)


def points(*losses: float) -> list[tuple[int, dict[str, float]]]:
    return [(10 * (index + 1), {"validation_loss": loss}) for index, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "patience", "best", "stalled"),
    [
        ((), 1, None, False),
        ((3.0, 2.0, 1.0), 1, 30, False),
        ((3.0, 2.0, 2.0), 1, 20, True),
        ((3.0, 1.0, 2.0, 1.5), 2, 20, True),
        ((3.0, 1.0, 2.0, 1.5), 3, 20, False),
        ((3.0, 1.0, 2.0, 1.5), None, 20, False),
    ],
)
def test_best_step_and_stall(losses, patience, best, stalled, tmp_path):
    history = History(tmp_path, points(*losses), enabled=False)
    assert history.best_step == best
    assert history.has_stalled(patience) is stalled


def scripted_losses(monkeypatch, *losses: float) -> None:
    """Validation losses of a run, in turn."""
    script = iter(losses)

    class Scripted:
        def summary(self) -> dict[str, float]:
            return {"validation_loss": next(script)}

    monkeypatch.setattr(loop, "validation_losses", lambda *arguments: Scripted())


def test_early_stopping_ends_the_run_and_stays_ended(encoded, monkeypatch):
    scripted_losses(monkeypatch, 3.0, 2.0, 2.5, 2.2)
    changes = {"max_train_steps": 20, "validation_every_steps": 2, "checkpoint_every_steps": 100}
    run_train(**changes, early_stopping_patience=2)
    assert max(curve("train_loss")) == 8
    assert [path.name for path in Path(".work/train").rglob("step-*.safetensors")] == [
        "step-00000008.safetensors"
    ]
    stopped = outputs()
    run_train(**changes, early_stopping_patience=2)  # no loss is left
    assert outputs() == stopped


def test_the_best_weights_are_those_of_the_best_step(encoded, monkeypatch):
    write_params(train={"validation_every_steps": 2, "lr_scheduler": "constant"})
    scripted_losses(monkeypatch, 3.0, 1.0, 2.0)
    run_train()
    last = weights()
    monkeypatch.setattr(loop, "train_step", None)  # the best is kept beside the last: nothing is trained
    run_train(export="best")
    best = weights()
    assert any(not torch.equal(best[name], last[name]) for name in last)
    assert json.loads(read_lineage()["exported"]) == {"averaged": True, "step": 4, "weights": "best"}
    monkeypatch.undo()
    monkeypatch.chdir(encoded)
    monkeypatch.setenv("SD_WORK", str(encoded / ".work"))
    scripted_losses(monkeypatch, 3.0, 1.0)
    run_train(max_train_steps=4)
    assert all(torch.equal(value, best[name]) for name, value in weights().items())


def test_a_best_that_no_checkpoint_knows_of_replaces_none(encoded, monkeypatch):
    """A kill between the best weights and the next checkpoint, and a run that goes on differently."""
    scripted_losses(monkeypatch, 3.0, 1.0, 2.0)
    run_train(validation_every_steps=2)
    (directory,) = Path(".work/train").iterdir()
    assert [path.name for path in directory.glob("best-*")] == ["best-00000004.safetensors"]
    checkpoints = Checkpoints(Path(".work"), directory.name)
    checkpoints.save_best(5, [torch.nn.Parameter(torch.zeros(1))])
    assert len(list(directory.glob("best-*"))) == 2
    monkeypatch.setattr(loop, "train_step", None)
    run_train(validation_every_steps=2, export="best")


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_lost_best_weights_are_made_again(encoded, monkeypatch, caplog, damage):
    run_train(export="best")
    whole = outputs()
    newest = sorted(Path(".work/train").rglob("best-*.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    if damage == "gone":
        newest.unlink()
    elif damage == "cut":
        newest.write_bytes(content[:500])
    else:
        content[len(content) // 2] ^= 16
        newest.write_bytes(content)
    run_train(export="best")
    assert outputs() == whole
    assert f"{newest}: {'gone' if damage == 'gone' else 'damaged'}" in caplog.text
    assert "the run goes on before they were made" in caplog.text


def test_without_held_out_samples_there_is_no_best_and_no_stall(encoded):
    run_encoders(write_params(prepare={"source": "images", "validation_fraction": 0.0}))
    changes = {"export": "best", "early_stopping_patience": 2}
    for name, value in changes.items():
        with pytest.raises(StageError, match=rf"params\.yaml: train\.{name} need held-out samples"):
            run_train(**{name: value})
    with pytest.raises(StageError, match=r"train\.export and train\.early_stopping_patience need"):
        run_train(**changes)
    assert not Path(".work/train").exists()  # refused before anything is trained
    run_train()
    assert not Path("data/training/plots/metrics/validation_loss.tsv").exists()


# --- what is trained and exported


def test_live_weights_or_the_average_are_exported_validated_and_previewed(encoded):
    preview = Path("data/training/previews/step-00000003.safetensors")
    run_train(use_ema=False)
    live, live_losses, live_preview = weights(), curve("validation_loss"), preview.read_bytes()
    run_train(export_ema=False)
    assert all(torch.equal(value, live[name]) for name, value in weights().items())
    assert curve("validation_loss") != live_losses
    assert preview.read_bytes() != live_preview
    shutil.rmtree(".work/train")  # a run goes on under another validate_ema
    run_train(validate_ema=False)
    assert curve("validation_loss") == live_losses
    assert preview.read_bytes() == live_preview
    assert any(not torch.equal(value, live[name]) for name, value in weights().items())


def test_the_average_is_kept_as_asked_for_and_updated_once_a_step(encoded):
    changes = {"ema_decay": 0.9, "ema_power": 0.7, "ema_update_after_step": 3}
    options = changed(read_params().train, **changes)
    linear, accelerator = torch.nn.Linear(1, 1), Accelerator(cpu=True)
    ema = prepare(accelerator, linear, None, options, 6).ema
    assert (ema.max_decay, ema.power, ema.update_after_step) == (0.9, 0.7, 3)
    assert prepare(accelerator, linear, None, changed(options, use_ema=False), 6).ema is None
    run_train(**changes)
    (path,) = Path(".work/train").rglob("step-00000006.safetensors")
    assert read_tree(path)["ema"]["num_updates"] == 6


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_stored_alone_and_load_into_a_stock_pipeline(encoded, kind):
    base = load_file("data/base/unet/diffusion_pytorch_model.safetensors")
    run_train(adapter=kind, lora_rank=2, lora_alpha=3.5, learning_rate=1e-2, snapshot_every_steps=3)
    assert not WEIGHTS.exists()
    merged = load_trained_unet(Path("data/base"), Path("data/unet")).state_dict()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all(
        name.endswith(("to_k.weight", "to_q.weight", "to_v.weight", "to_out.0.weight")) for name in changed
    )
    with safe_open("data/unet/pytorch_lora_weights.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118 - no mapping
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    pipeline.load_lora_weights("data/unet")
    pipeline.fuse_lora()
    fused = pipeline.unet
    fused.unload_lora()
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)
    early = load_trained_unet(Path("data/base"), Path("data/snapshots/step-000003")).state_dict()
    assert not torch.equal(early[min(changed)], merged[min(changed)])


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_adapters_resume_bit_for_bit(encoded, kind):
    changes = {"adapter": kind, "lora_rank": 2, "learning_rate": 1e-2}
    run_train(**changes)
    whole = outputs()
    (directory,) = Path(".work/train").iterdir()
    (directory / "step-00000006.safetensors").unlink()
    base = Path("data/base/unet") / WEIGHTS.name
    kept = (directory / "step-00000004.safetensors").stat().st_size
    assert kept < base.stat().st_size / 2  # adapters alone
    run_train(**changes)
    assert outputs() == whole


def test_activations_are_computed_again_only_if_asked_for(encoded):
    options = read_params().train
    assert not build_unet(Path("data/base"), options).is_gradient_checkpointing
    options = changed(options, gradient_checkpointing=True)
    assert build_unet(Path("data/base"), options).is_gradient_checkpointing


def test_the_gradient_is_clipped_to_its_norm(encoded):
    """With a plain Adam step clipping hardly shows in the weights, so look at what is clipped."""
    seen = []
    clip = Accelerator.clip_grad_norm_

    def watched(self, parameters, max_norm):
        parameters = list(parameters)
        norm = clip(self, parameters, max_norm)
        seen.append(torch.stack([p.grad.norm() for p in parameters]).norm())
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "clip_grad_norm_", watched)
        run_train(max_grad_norm=1e-3, max_train_steps=2)
    assert torch.stack(seen).tolist() == pytest.approx([1e-3] * 2, rel=1e-3)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_kernels_and_compilation_are_as_asked_for(encoded, monkeypatch, channels_last):
    step, seen = loop.train_step, []

    def watched(accelerator, model, *arguments):
        weight = model.down_blocks[0].resnets[0].conv1.weight
        seen.append(weight.is_contiguous(memory_format=torch.channels_last))
        seen.append(torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32)
        return step(accelerator, model, *arguments)

    compiled = []
    monkeypatch.setattr(loop, "train_step", watched)
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: compiled.append(unet))
    changes = {"max_train_steps": 1, "lr_warmup_steps": 0, "channels_last": channels_last}
    run_train(**changes, allow_tf32=channels_last, torch_compile=channels_last)
    assert seen == [channels_last, channels_last]
    assert len(compiled) == channels_last


def test_a_compiled_unet_trains_to_the_same_weights(encoded, monkeypatch):
    changes = {"max_train_steps": 1, "lr_warmup_steps": 0, "preview_every_steps": None}
    run_train(**changes)
    plain, graphs = weights(), []
    shutil.rmtree(".work/train")  # a run goes on compiled

    def as_it_is(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        UNet2DConditionModel, "compile", lambda unet: torch.nn.Module.compile(unet, backend=as_it_is)
    )
    run_train(**changes, torch_compile=True)
    torch.compiler.reset()
    assert graphs
    assert all(torch.equal(value, plain[name]) for name, value in weights().items())


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"optimizer": "adafactor"}])
def test_other_ways_to_train(encoded, change):
    run_train()
    plain, loss = weights(), curve("train_loss")
    run_train(**change)
    assert curve("train_loss")[1] == pytest.approx(loss[1], rel=1e-6)
    difference = max((plain[name] - value).abs().max() for name, value in weights().items())
    assert difference < 1e-6 if "gradient_checkpointing" in change else difference > 1e-6


def test_the_scheduler_to_sample_with_is_exported(encoded):
    run_train(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = DDIMScheduler.from_pretrained("data/unet")
    config = json.loads(Path("data/unet/scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] == 0
    UNet2DConditionModel.from_pretrained("data/unet")  # the file beside it is no obstacle


def test_zero_terminal_snr_is_refused_for_noise_prediction(encoded):
    with pytest.raises(StageError, match="epsilon"):
        run_train(rescale_betas_zero_snr=True)


# --- what is shown


def test_validation_losses_of_the_quarters_average_to_the_whole(encoded):
    write_params(validation={"num_timesteps": 8})
    run_train()
    quarters = [curve(f"validation_loss_t{first}_{first + 249}") for first in (0, 250, 500, 750)]
    whole = curve("validation_loss")
    for step in whole:
        assert sum(quarter[step] for quarter in quarters) / 4 == pytest.approx(whole[step], rel=1e-6)
    assert len({quarter[6] for quarter in quarters}) == 4


def test_weighted_loss_is_what_min_snr_minimises(encoded):
    run_train()
    assert curve("weighted_loss") == curve("train_loss")
    run_train(snr_gamma=1.0)
    raw, weighted = curve("train_loss"), curve("weighted_loss")
    assert all(weighted[step] < raw[step] for step in raw)


def test_previews_start_at_the_base_and_survive_a_kill(encoded):
    run_train()
    directory = Path("data/training/previews")
    assert sorted(path.name for path in directory.glob("step-*")) == [
        f"step-{step:08d}.safetensors" for step in (0, 3, 6)
    ]
    with safe_open(directory / "step-00000003.safetensors", "pt") as file:
        assert len(json.loads(file.metadata()["captions"])) == 2
        assert file.metadata()["global_step"] == "3"
        first = file.get_tensor("latents")
    assert first.shape[:2] == (2, 4)
    assert not torch.equal(first, load_file(directory / "step-00000000.safetensors")["latents"])
    whole = outputs()
    (run,) = Path(".work/train").iterdir()
    (run / "step-00000006.safetensors").unlink()
    shutil.rmtree("data/training")
    run_train()
    assert outputs() == whole
    run_train(preview_every_steps=None)
    assert not list(directory.glob("step-*"))


def test_a_preview_is_what_a_stock_pipeline_draws(encoded):
    run_train(max_train_steps=1, lr_warmup_steps=0)
    latents = load_file("data/training/previews/step-00000000.safetensors")["latents"]
    with safe_open("data/training/previews/step-00000000.safetensors", "pt") as file:
        captions = json.loads(file.metadata()["captions"])
    conditioning, options = read_conditioning(), read_params().train
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)

    noise = [
        torch.randn(latents.shape[1:], generator=generator(options.seed, "preview", i)) for i in range(2)
    ]
    expected = pipeline(
        prompt_embeds=conditioning.states(conditioning.rows(captions), torch.device("cpu")),
        negative_prompt_embeds=conditioning.states(conditioning.rows(["", ""]), torch.device("cpu")),
        latents=torch.stack(noise),
        guidance_scale=options.preview_guidance_scale,
        num_inference_steps=25,
        output_type="latent",
        height=64,
        width=64,
    ).images
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


def test_speed_is_told_outside_the_outputs(encoded):
    run_train(max_train_steps=9)
    speed = json.loads(Path("data/training_speed.json").read_text())
    assert speed["images_per_second"] > 0
    assert 0 <= speed["data_wait_fraction"] < 1
    assert speed["peak_memory_bytes"] > 2**20


def test_a_timestep_belongs_to_the_quarter_it_lies_in():
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    summary = HeldOutLosses(["a"], [0, 249, 250, 499, 999], losses, 1000).summary()
    assert summary == {
        "validation_loss": 3.0,
        "validation_loss_t0_249": 1.5,
        "validation_loss_t250_499": 3.5,
        "validation_loss_t750_999": 5.0,
    }


# --- what goes wrong


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError("unable to allocate"),
    ],
)
def test_out_of_memory_ends_with_advice_and_keeps_the_checkpoint(encoded, monkeypatch, error):
    step, calls = loop.train_step, []

    def full(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise error
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", full)
    with pytest.raises(StageError) as found:
        run_train()
    message = str(found.value)
    assert "train.train_batch_size 4 in 1 part(s)" in message
    assert "gradient_accumulation_steps to 2" in message
    assert "gradient_checkpointing to true" in message
    assert "last good checkpoint: " in message
    assert "step-00000002.safetensors" in message


def test_a_non_finite_validation_loss_stops_before_a_checkpoint(encoded, monkeypatch):
    scripted_losses(monkeypatch, float("nan"))
    with pytest.raises(
        StageError, match=r"non-finite validation_loss after 3 steps; last good checkpoint: .*step-0"
    ):
        run_train()


def test_a_non_finite_gradient_between_two_looks_is_named(encoded, monkeypatch):
    step, calls = loop.train_step, []

    def spoilt(*arguments):
        losses, grad_norm = step(*arguments)
        calls.append(None)
        return losses, grad_norm * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(loop, "train_step", spoilt)
    with pytest.raises(StageError, match=r"non-finite gradient at step 2: (\S+ \(timestep \d+\)(, )?){4};"):
        every = {f"{name}_every_steps": 4 for name in ("log", "checkpoint", "validation", "preview")}
        run_train(**every, gradient_accumulation_steps=2)


def test_the_loss_scaler_is_kept_and_may_not_sink(encoded, monkeypatch):
    """With the scaler that fp16 brings on a GPU, in float32."""
    start = train.start_accelerator

    def scaled_by(init_scale: float) -> None:
        def started(options):
            accelerator = start(options)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
            return accelerator

        monkeypatch.setattr(train, "start_accelerator", started)
        run_train(max_train_steps=1, lr_warmup_steps=0, preview_every_steps=None)

    with pytest.raises(StageError, match=r"the loss scale of fp16 has sunk to 0\.5.*checkpoint: none yet"):
        scaled_by(0.5)
    scaled_by(8.0)
    (path,) = Path(".work/train").rglob("step-*.safetensors")
    assert read_tree(path)["scaler"]["scale"] == 8.0


def test_accelerates_own_accumulation_is_refused(encoded, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    with pytest.raises(StageError, match=r"ACCELERATE_GRADIENT_ACCUMULATION_STEPS: expected .* 1, got 3"):
        run_train()


def test_other_errors_are_no_matter_of_memory(tmp_path):
    options = read_params(REPOSITORY / "params.yaml").train
    with pytest.raises(RuntimeError, match="shape"), memory_advice(options, Checkpoints(tmp_path, "f" * 64)):
        raise RuntimeError("shape mismatch")


def test_a_base_that_predicts_samples_is_trained_as_such(encoded):
    path = Path("data/base/scheduler/scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    reseal()
    run_train(max_train_steps=1, lr_warmup_steps=0)
    assert read_lineage(Path("data/unet"))["prediction_type"] == "sample"


@pytest.mark.parametrize("use_ema", [True, False])
def test_snapshots_are_what_shorter_runs_export(encoded, use_ema):
    """After a kill too: those of the first half are of a process that is gone."""
    same = {"use_ema": use_ema, "lr_scheduler": "constant"}
    run_train(**same, snapshot_every_steps=2, checkpoint_every_steps=2)
    found = {path.name: content_fingerprint_of_weights(path) for path in Path("data/snapshots").iterdir()}
    assert sorted(found) == ["step-000002", "step-000004", "step-000006"]
    assert found["step-000006"] == content_fingerprint_of_weights(Path("data/unet"))
    for step in (2, 4):
        run_train(**same, max_train_steps=step)
        assert found[f"step-{step:06d}"] == content_fingerprint_of_weights(Path("data/unet"))
        assert json.loads(read_lineage()["exported"])["step"] == step


def test_snapshots_survive_a_restart_and_those_passed_by_are_told(encoded, caplog):
    run_train(snapshot_every_steps=2, checkpoint_every_steps=2)
    before = content_fingerprint(Path("data/snapshots"))
    [checkpoint] = Path(".work/train").glob("*/step-00000006.safetensors")
    checkpoint.unlink()
    run_train(snapshot_every_steps=2, checkpoint_every_steps=2)
    assert content_fingerprint(Path("data/snapshots")) == before
    run_train(snapshot_every_steps=3, checkpoint_every_steps=2)
    assert [path.name for path in Path("data/snapshots").iterdir()] == ["step-000006"]
    assert "data/snapshots has none of step 3" in caplog.text
    run_train(checkpoint_every_steps=2)
    assert list(Path("data/snapshots").iterdir()) == []


def content_fingerprint_of_weights(directory: Path) -> str:
    """Of the tensors, whatever their file says of the run."""
    tensors = load_file(directory / "diffusion_pytorch_model.safetensors")
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
