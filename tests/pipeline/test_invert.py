"""The stage invert: what a step computes, what stays as it is, resuming, and the files that others load."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from stages import baseline, evaluate, gallery, invert, report
from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.evaluation.measuring.measurements import read_measurements
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.inversion.learning import build_inverter, step_losses
from stages.lib.inversion.placeholder import read_placeholder
from stages.lib.models.layout import read_config
from tests.conftest import REPOSITORY, content_fingerprint, run_encoders, run_train, write_params

EMBEDDINGS = Path("data/embeddings")
SHORT = {
    "placeholder": "<emoji>", "num_vectors": 2, "initializer": "cat", "max_train_steps": 12,
    "learning_rate": 1e-2, "log_every_steps": 2, "validation_every_steps": 6, "checkpoint_every_steps": 4,
}  # fmt: skip
KILLED = """
import os, runpy, signal
from stages.lib.inversion import learning
steps, step_losses = [], learning.step_losses

def counted(*arguments):
    if len(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(None)
    return step_losses(*arguments)

learning.step_losses = counted
runpy.run_module("stages.invert", run_name="__main__", alter_sys=True)
"""


def config() -> dict:
    return read_config(Path("data/base/scheduler/scheduler_config.json"))


def validation_curve() -> list[float]:
    lines = (EMBEDDINGS / "plots/metrics/inversion_validation_loss.tsv").read_text().splitlines()[1:]
    return [float(line.split("\t")[1]) for line in lines]


def test_without_a_placeholder_nothing_is_learned(encoded):
    invert.main(read_params())
    assert [path.name for path in EMBEDDINGS.iterdir()] == ["SHA256SUMS"]
    assert read_placeholder() is None


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradient_of_a_step_are_those_of_diffusers_script(encoded, prediction_type):
    params = write_params(invert=SHORT)
    inverter = build_inverter(params.invert, config() | {"prediction_type": prediction_type})
    batch = inverter.draw(5)
    loss = step_losses(inverter, batch).mean()
    loss.backward()

    stock = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    stock.load_textual_inversion({"<emoji>": inverter.embedding.vectors.detach()}, token="<emoji>")
    scheduler = DDPMScheduler.from_config(stock.scheduler.config, prediction_type=prediction_type)
    mean, logvar = inverter.latents.moments(batch.latent_rows, batch.views, torch.device("cpu"))
    latents = mean.float() + (0.5 * logvar.float()).exp() * batch.posterior_noise
    latents = latents * stock.vae.config.scaling_factor
    prompts = [inverter.texts[row].replace("<emoji>", "<emoji> <emoji>_1") for row in batch.caption_rows]
    ids = stock.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = stock.text_encoder(ids)[0]
    noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
    is_v = prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, batch.noise, batch.timesteps) if is_v else batch.noise
    expected = F.mse_loss(stock.unet(noisy, batch.timesteps, states).sample, target)
    expected.backward()
    rows = stock.tokenizer.convert_tokens_to_ids(["<emoji>", "<emoji>_1"])
    assert torch.allclose(loss, expected, rtol=1e-5)
    gradient = stock.text_encoder.get_input_embeddings().weight.grad[rows]
    assert gradient.abs().sum() > 0
    assert torch.allclose(inverter.embedding.vectors.grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_held_out_loss_falls_and_the_base_stays(encoded):
    before = content_fingerprint(Path("data/base"))
    invert.main(write_params(invert=SHORT | {"max_train_steps": 30, "validation_every_steps": 30}))
    first, last = validation_curve()
    assert last < first - 0.01
    assert content_fingerprint(Path("data/base")) == before


def test_a_killed_run_goes_on_to_the_same_bytes(encoded):
    write_params(invert=SHORT)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run("-m", "stages.invert").returncode == 0
    whole = content_fingerprint(EMBEDDINGS)
    shutil.rmtree(EMBEDDINGS)
    shutil.rmtree(".work/train")
    assert run("-c", KILLED).returncode == -signal.SIGKILL
    assert [path.name for path in Path(".work/train").rglob("step-*")] == ["step-00000004.safetensors"]
    done = run("-m", "stages.invert")
    assert "resuming at step 4" in done.stderr
    assert content_fingerprint(EMBEDDINGS) == whole


def test_own_captions_are_judged_and_drawn_as_a_stock_pipeline_draws(project):
    for path in Path("images").glob("*.txt"):
        path.write_text(f"a photo of {'<emoji>' if int(path.stem) % 3 else 'a dog'}")
    params = write_params(
        invert=SHORT | {"captions": "own"},
        train={"max_train_steps": 0},
        evaluate={"prompts": ["a photo of <emoji>"], "seeds": [3], "batch_size": 1},
    )
    run_encoders(params)
    invert.main(params)
    run_train()
    unet = "unet/diffusion_pytorch_model.safetensors"
    base, exported = load_file(f"data/base/{unet}"), load_file(f"data/{unet}")
    assert all(torch.equal(exported[name], base[name]) for name in base)
    baseline.main(params)
    evaluate.main(params)
    report.main(params)
    gallery.main(params)
    page = Path("data/evaluation/index.html").read_text()
    assert "Held-out loss of the placeholder" in page

    losses = {place: held_out(place) for place in ("baseline", "evaluation")}
    names = losses["baseline"].sample_ids
    differs = (losses["baseline"].losses != losses["evaluation"].losses).any(dim=1).tolist()
    assert differs == [int(name.split(".")[0]) % 3 > 0 for name in names] and any(differs)

    learned = load_file(EMBEDDINGS / "learned_embeds.safetensors")["<emoji>"]
    assert torch.equal(load_file(EMBEDDINGS / "a1111.safetensors")["emb_params"], learned)
    for word in ({}, {"token": "<emoji>"}):
        stock = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
        stock.load_textual_inversion(str(EMBEDDINGS / "learned_embeds.safetensors"), **word)
        picture = stock(
            "a photo of <emoji>", generator=torch.Generator().manual_seed(3), guidance_scale=3.0,
            num_inference_steps=2, height=64, width=64,
        ).images[0]  # fmt: skip
        assert difference(picture, "evaluation") <= 2 < difference(picture, "baseline")


def held_out(place: str) -> HeldOutLosses:
    return read_measurements(Path("data", place, "measurements.safetensors"), place)[0].losses


def difference(picture, place: str) -> int:
    from PIL import Image

    ours = Image.open(f"data/{place}/samples/base_guidance3_steps2/prompt00_seed3.png")
    return int(np.abs(np.asarray(picture, int) - np.asarray(ours, int)).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placeholder": "cat"}, "expected a word that"),
        ({"captions": "own"}, "expected captions to train on that hold '<emoji>'"),
        ({"num_vectors": 90}, "that are cut before"),
    ],
)
def test_what_cannot_be_learned_is_refused(encoded, changes, message):
    with pytest.raises(StageError, match=message):
        invert.main(write_params(invert=SHORT | changes))


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"placeholder": "two words"}, "placeholder"), ({"captions": ["a photo"]}, "captions")],
)
def test_what_cannot_be_meant_is_refused_before(encoded, changes, key):
    with pytest.raises(StageError, match=rf"invert\.{key}: expected"):
        write_params(invert=SHORT | changes)
