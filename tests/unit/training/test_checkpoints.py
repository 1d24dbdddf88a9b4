"""Checkpoints on disk: streamed, whole or absent, in the work directory that others trim."""

import dataclasses
import tracemalloc

import pytest
import torch

from stages.lib.training.checkpoints import Checkpoints, Resumed, TrainingState
from stages.lib.training.ema import MovingAverage


def test_saving_does_not_hold_the_state_twice(tmp_path):
    tensors = {f"weight{index}": torch.full((500_000,), float(index)) for index in range(8)}  # 16 MB
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    tracemalloc.start()
    checkpoints.save(1, tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000  # two of eight tensors
    loaded = checkpoints.load_latest()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_state_that_cannot_be_saved_leaves_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    checkpoints.save(1, {"value": torch.zeros(3)})
    with pytest.raises(TypeError, match="value: a checkpoint cannot hold a function"):
        checkpoints.save(2, {"value": lambda: None})
    assert {path.name for path in checkpoints.directory.iterdir()} == {"lock", "step-00000001.safetensors"}
    assert checkpoints.load_latest()["global_step"] == 1


def test_two_equal_runs_may_save_beside_each_other(tmp_path):
    ahead, behind = (Checkpoints(tmp_path, "f" * 64) for _ in range(2))
    for step in range(1, 6):
        ahead.save(step, {"value": torch.zeros(3)})
        behind.save(max(1, step - 3), {"value": torch.zeros(3)})
    assert [path.name for path in behind.paths()] == [
        "step-00000004.safetensors",
        "step-00000005.safetensors",
    ]


def test_the_newest_checkpoint_is_what_a_message_names(tmp_path):
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    assert checkpoints.kept() == "last good checkpoint: none yet"
    for step in (2, 10):
        checkpoints.save(step, {})
    assert (
        checkpoints.kept() == f"last good checkpoint: {checkpoints.directory / 'step-00000010.safetensors'}"
    )


def training_state(value: float) -> TrainingState:
    weight = torch.nn.Parameter(torch.full((3,), value))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0 * value, growth_interval=2)
    return TrainingState([weight], optimizer, schedule, MovingAverage([weight], 0.5), scaler)


def step(state: TrainingState) -> None:
    """One of training, as accelerate takes it with a loss scaler."""
    optimizer, schedule, ema, scaler = state.parts.values()
    scaler.scale(state.parameters[0].square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    schedule.step()
    ema.update()


def test_every_part_of_the_state_goes_on_as_if_it_had_not_been_stopped(tmp_path):
    whole, other = training_state(1.0), training_state(2.0)
    for _ in range(3):
        step(whole)
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    seen = dataclasses.asdict(Resumed(global_step=3))
    checkpoints.save(3, {**seen, **whole.capture()})
    assert other.restore(checkpoints.load_latest()).global_step == 3
    assert other.parts["scaler"].state_dict() == whole.parts["scaler"].state_dict()
    assert other.parts["scaler"].get_scale() == 16.0  # grown after two steps
    for _ in range(3):
        step(whole)
        step(other)
    states = [
        (state.capture()["weights"], state.parts["ema"].average, state.parts["scaler"].get_scale())
        for state in (whole, other)
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert other.parts["lr_scheduler"].get_last_lr() == whole.parts["lr_scheduler"].get_last_lr()
