"""Parts of a training run by hand: what is joined, held out, called not finite, advised and timed."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler

from stages import train
from stages.lib.core.draws import generator
from stages.lib.data.pairs import SampleCaptions
from stages.lib.diffusion.validation import validation_losses
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Bucket, Latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.frame.speed import Speed
from stages.lib.training.batches import Batch, draw_batch, parts_of_process, training_set
from stages.lib.training.checkpoints import Checkpoints
from stages.lib.training.failures import (
    StepLosses,
    check_finite,
    check_loss_scale,
    mean_losses,
    memory_advice,
)
from stages.lib.training.feed import Feed, load_part
from stages.lib.training.processes import check_same_step, start_accelerator
from tests.conftest import REPOSITORY, changed

CPU = torch.device("cpu")
PARAMS = read_params(REPOSITORY / "params.yaml")
BUCKETS = {(4, 2, 2): ("b", "d", "g", "i"), (4, 2, 3): ("a", "c", "e", "f", "h", "j")}
HELD_OUT = ("c", "d", "e", "h")


def stores() -> tuple[Latents, Conditioning, list[SampleCaptions]]:
    """Images of two shapes in two views, each with two captions; no two rows are alike."""
    random = torch.Generator().manual_seed(0)
    buckets = []
    for shape, names in BUCKETS.items():
        mean, logvar = torch.randn(2, len(names), 2, *shape, generator=random).half()
        buckets.append(Bucket(list(names), mean, logvar))
    samples = [
        SampleCaptions(name, (f"{name} one", f"{name} two"), "validation" if name in HELD_OUT else "train")
        for name in "abcdefghij"
    ]
    captions = [caption for sample in reversed(samples) for caption in sample.captions]
    row_of = {caption: row for row, caption in enumerate(["", *captions])}
    states = torch.randn(len(row_of), 3, 2, generator=random).half()
    return (
        Latents(buckets, frozenset(), 64, 0.5, 0.1, "", "", ""),
        Conditioning(states, row_of, 0, 1, None, "", ""),
        samples,
    )


# --- samples, views and captions


def test_a_batch_brings_the_moments_and_captions_of_its_samples():
    latents, conditioning, samples = stores()
    data = training_set(samples, latents, conditioning)
    options = changed(PARAMS.train, train_batch_size=2, caption_dropout=0.0)
    moments = {
        name: (bucket.mean[row], bucket.logvar[row])
        for bucket in latents.buckets
        for row, name in enumerate(bucket.sample_ids)
    }
    states = {
        tuple(conditioning.encoder_hidden_states[row].float().flatten().tolist()): caption
        for caption, row in conditioning.row_of.items()
    }
    seen = set()
    for step in range(100):
        batch = draw_batch(data, options, step, 1000)
        part = load_part(batch, latents, conditioning, CPU)
        for index, (sample, view) in enumerate(
            zip(batch.samples.tolist(), batch.views.tolist(), strict=True)
        ):
            name = data.sample_ids[sample]
            assert torch.equal(part.mean[index], moments[name][0][view])
            assert torch.equal(part.logvar[index], moments[name][1][view])
            seen.add(
                (
                    name,
                    view,
                    states[tuple(part.conditions["encoder_hidden_states"][index].flatten().tolist())],
                )
            )
    assert seen == {
        (sample.sample_id, view, caption)
        for sample in samples
        if sample.split == "train"
        for view in (0, 1)
        for caption in sample.captions
    }


def test_held_out_losses_are_of_the_mode_the_first_caption_and_noise_of_each_sample_and_timestep():
    latents, conditioning, samples = stores()
    options = changed(PARAMS.validation, num_timesteps=3, max_samples=3, batch_size=2, seed=4)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def forward(noisy_latents, timesteps, encoder_hidden_states):
        shift = encoder_hidden_states.mean(dim=(1, 2)) + timesteps / 1000
        return SimpleNamespace(sample=noisy_latents + shift[:, None, None, None])

    found = validation_losses(forward, scheduler, latents, conditioning, samples, options, CPU)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for row, name in enumerate(("c", "d", "e")):
        bucket = next(bucket for bucket in latents.buckets if name in bucket.sample_ids)
        mode = (bucket.mean[bucket.sample_ids.index(name), 0].double() - 0.1) * 0.5
        state = conditioning.encoder_hidden_states[conditioning.row_of[f"{name} one"]].double()
        for column, timestep in enumerate((166, 500, 833)):
            abar = scheduler.alphas_cumprod[timestep].double()
            noise = torch.randn(mode.shape, generator=generator(4, "validation", name, timestep)).double()
            noisy_latents = abar.sqrt() * mode + (1 - abar).sqrt() * noise
            error = noisy_latents + state.mean() + timestep / 1000 - noise
            expected[row, column] = error.square().mean()
    assert found.sample_ids == ["c", "d", "e"]
    assert found.timesteps == [166, 500, 833]
    torch.testing.assert_close(found.losses, expected, rtol=1e-5, atol=0)


# --- what is not finite


def step_losses(
    global_step: int, samples: list[int], losses: list[float], grad_norm: float = 1.0
) -> StepLosses:
    """Of a forward pass whose timesteps are ten times the sample, plus the step."""
    index, unused = torch.tensor(samples), torch.zeros(len(samples))
    timesteps = 10 * index + global_step
    batch = Batch(index, unused, unused, unused, timesteps, unused, unused, unused)
    weights = torch.linspace(1.0, 0.5, len(samples))
    return StepLosses(global_step, batch, torch.tensor(losses), weights, torch.tensor(grad_norm))


def message_of(tmp_path, steps: list[StepLosses], mixed_precision: str = "no") -> str | None:
    """What `check_finite` says of the samples a.png to f.png."""
    options = changed(PARAMS.train, mixed_precision=mixed_precision)
    names = [f"{letter}.png" for letter in "abcdef"]
    try:
        check_finite(steps, names, Checkpoints(tmp_path, "f" * 64), options)
    except StageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_of_a_batch_only_the_sample_whose_loss_is_not_finite_is_named(tmp_path, value):
    steps = [
        step_losses(6, [0, 1], [1.0, 2.0]),
        step_losses(7, [2, 3], [1.0, 2.0], math.nan),
        step_losses(7, [5, 4], [1.0, value], math.nan),
        step_losses(8, [0, 1], [math.nan] * 2),
    ]
    remedy = "last good checkpoint: none yet; lower train.learning_rate"
    assert message_of(tmp_path, steps) == f"non-finite loss at step 8: e.png (timestep 47); {remedy}"
    assert message_of(tmp_path, steps[:1]) is None
    assert "set train.mixed_precision to bf16" in message_of(tmp_path, steps, "fp16")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_all_samples_of_its_step(tmp_path, value):
    steps = [
        step_losses(6, [0], [1.0]),
        step_losses(7, [2, 3], [1.0, 2.0], value),
        step_losses(7, [5], [1.0], value),
        step_losses(8, [1], [1.0], value),
    ]
    named = "c.png (timestep 27), d.png (timestep 37), f.png (timestep 57)"
    assert message_of(tmp_path, steps).startswith(f"non-finite gradient at step 8: {named}; last good")
    assert message_of(tmp_path, steps, "fp16") is None  # the loss scaler skips such a step


def test_logged_losses_are_means_over_all_parts_and_steps():
    steps = [step_losses(6, [0, 1], [1.0, 2.0]), step_losses(7, [2, 3], [3.0, 6.0])]
    expected = {"train_loss": 12 / 4, "weighted_loss": (1 + 2 / 2 + 3 + 6 / 2) / 4}
    assert mean_losses(Accelerator(cpu=True), steps) == pytest.approx(expected, rel=1e-6)


def test_a_loss_scale_below_one_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    check_loss_scale(None, checkpoints)
    check_loss_scale(torch.amp.GradScaler("cpu", init_scale=1.0), checkpoints)
    with pytest.raises(StageError, match=r"fp16 has sunk to 0\.5: .*checkpoint: none yet; set train\.mixed"):
        check_loss_scale(torch.amp.GradScaler("cpu", init_scale=0.5), checkpoints)


# --- out of memory


@pytest.mark.parametrize(
    ("batch_size", "num_parts", "num_processes", "expected"),
    [(9, 1, 1, 3), (12, 2, 1, 3), (12, 1, 4, 3), (16, 2, 2, 4), (6, 3, 2, None), (4, 1, 4, None)],
)
def test_smaller_parts_are_advised_where_the_batch_can_be_split_so(
    monkeypatch, batch_size, num_parts, num_processes, expected
):
    state = SimpleNamespace(num_processes=num_processes)
    monkeypatch.setattr("stages.lib.training.failures.PartialState", lambda: state)
    options = changed(PARAMS.train, train_batch_size=batch_size, gradient_accumulation_steps=num_parts)
    with pytest.raises(StageError) as found, memory_advice(options):
        raise MemoryError("unable to allocate")
    advised = re.search(r"gradient_accumulation_steps to (\d+)", str(found.value))
    assert (int(advised[1]) if advised else None) == expected
    if advised:
        options = changed(options, gradient_accumulation_steps=int(advised[1]))
        parts_of_process(options, 0, num_processes)


def test_a_run_that_does_not_even_begin_for_want_of_memory_is_advised_too(monkeypatch):
    def full(params):
        raise torch.OutOfMemoryError("CUDA out of memory")

    options = changed(PARAMS.train, train_batch_size=6)
    monkeypatch.setattr("stages.lib.training.failures.PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(train, "main", full)
    monkeypatch.setattr(train, "leave_out", lambda *names: None)
    with pytest.raises(StageError, match=r"out of memory .*set train\.gradient_accumulation_steps to 3"):
        train.lean_main(changed(PARAMS, train=options))


# --- time


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that goes on when ``now`` is added to."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("stages.lib.frame.speed.time", clock)
    monkeypatch.setattr("stages.lib.training.feed.time", clock)
    return clock


def test_speed_counts_neither_the_warm_up_nor_pauses(clock):
    speed, waited = Speed(6, CPU), 0.0
    for _ in range(Speed.WARM_UP_STEPS):
        clock.now += 60.0
        waited += 50.0
        speed.step(waited)
    assert speed.summary()["images_per_second"] is None
    for _ in range(4):
        clock.now += 2.0
        waited += 0.5
        speed.step(waited)
        clock.now += 0.25
        with speed.paused():
            clock.now += 1000.0
    summary = speed.summary()
    assert summary["images_per_second"] == pytest.approx(4 * 6 / 9)
    assert summary["data_wait_fraction"] == pytest.approx(4 * 0.5 / 9)
    assert summary["num_steps"] == Speed.WARM_UP_STEPS + 4


def test_the_feed_counts_the_time_until_its_parts_are_there(clock):
    def parts_of(global_step: int) -> list:
        clock.now += 3.0
        return []

    feed = Feed(parts_of, range(4), CPU)
    for _ in feed:
        clock.now += 100.0
    assert feed.wait_seconds == 12.0


# --- processes


def test_processes_that_would_resume_at_different_steps_are_refused(monkeypatch):
    monkeypatch.setattr("stages.lib.training.processes.gather_object", lambda steps: [*steps, 4])
    check_same_step(4)
    with pytest.raises(StageError, match=r"different steps, \[6, 4\]; let SD_WORK name one directory"):
        check_same_step(6)


def test_compilation_is_asked_for_in_the_params_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(StageError, match=r"no dynamo backend, got eager; .* set train\.torch_compile"):
            start_accelerator(PARAMS.train)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
