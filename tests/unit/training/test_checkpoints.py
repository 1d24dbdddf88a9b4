"""Checkpoints on disk: streamed, whole or absent, in the work directory that others trim."""

import dataclasses
import errno
import os
import shutil
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.lib.core.trees import read_tree
from stages.lib.frame.errors import StageError
from stages.lib.training import checkpoints as training_checkpoints
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


def saved(directory: Path) -> Checkpoints:
    """A run with checkpoints at 1 and 2, and the best weights of both."""
    checkpoints = Checkpoints(directory, "f" * 64)
    for step in (1, 2):
        weights = [torch.nn.Parameter(torch.full((50,), float(step)))]
        checkpoints.save_best(step, weights)
        state = {"weights": [torch.full((500,), float(step))], "yardstick": "y", "best_step": step}
        checkpoints.save(step, {**state, "groups": [{"betas": (0.9, 0.99), "lr": 1e-4, 3: None}]})
    return checkpoints


def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    """Header, padding, numbers in JSON, tensors: the one before is taken, and the damaged one set aside."""
    newest = saved(tmp_path).paths()[-1]
    whole = newest.read_bytes()
    for position in [*range(0, 2000, 3), *range(2000, len(whole), 29), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        newest.write_bytes(damaged)
        with pytest.raises(ValueError):
            read_tree(newest)
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    assert checkpoints.load_latest("y")["global_step"] == 1
    assert (newest.with_name(f"{newest.name}.damaged")).read_bytes() == bytes(damaged)
    assert checkpoints.kept().endswith("step-00000001.safetensors")
    checkpoints.save(2, {"best_step": 2})
    assert not list(checkpoints.directory.glob("*.damaged"))


@pytest.mark.parametrize("content", [b"", b"x" * 7, b"\xff" * 4000])
def test_what_is_no_checkpoint_is_set_aside(tmp_path, content):
    saved(tmp_path).paths()[-1].write_bytes(content)
    assert Checkpoints(tmp_path, "f" * 64).load_latest()["global_step"] == 1


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path):
    other = Checkpoints(tmp_path, "e" * 64)
    other.save(2, {"value": torch.zeros(1)})
    newest = saved(tmp_path).paths()[-1]
    newest.write_bytes(other.paths()[0].read_bytes())
    assert Checkpoints(tmp_path, "f" * 64).load_latest()["global_step"] == 1


def test_best_weights_stay_for_every_checkpoint_that_knows_of_them(tmp_path, caplog):
    checkpoints = saved(tmp_path)
    best = sorted(path.name for path in checkpoints.directory.glob("best-*"))
    assert best == ["best-00000001.safetensors", "best-00000002.safetensors"]
    (checkpoints.directory / best[1]).write_bytes(b"")
    again = Checkpoints(tmp_path, "f" * 64)
    assert again.load_latest("y")["best_step"] == 1
    assert again.load_best(1)[0].eq(1).all()
    assert again.load_latest()["global_step"] == 2  # where they are not asked for
    with pytest.raises(
        StageError, match=r"best-00000002\.safetensors: expected the best weights of this run"
    ):
        again.load_best(2)


def test_a_second_run_of_the_same_training_waits_for_the_first(tmp_path, caplog):
    first, second = (Checkpoints(tmp_path, "f" * 64) for _ in range(2))
    first.own()
    waiting = threading.Thread(target=second.own)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert f"this very training is being run by process {os.getpid()} since" in caplog.text
    first._owner.close()  # as the kernel does when its process ends
    waiting.join(10)
    assert not waiting.is_alive()


def test_the_disk_that_a_run_needs_is_asked_for_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 1000 + 3 * 100))
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    checkpoints.check_room(1000, 100, 50, has_best=True)
    checkpoints.check_room(1100, 100, 2, has_best=False)  # two are all that the run writes
    with pytest.raises(StageError, match=r"3 training state\(s\) of 1001 bytes, 3 set\(s\) of best weights"):
        checkpoints.check_room(1001, 100, 50, has_best=True)
    saved(tmp_path)
    checkpoints.check_room(3200, 100, 50, has_best=True)  # two are there


def test_on_a_full_disk_the_oldest_of_two_checkpoints_makes_room(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path)
    write, tried = training_checkpoints.write_tree, []

    def full_once(path, tree):
        tried.append(len(checkpoints.paths()))
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, tree)

    monkeypatch.setattr(training_checkpoints, "write_tree", full_once)
    checkpoints.save(3, {"best_step": 2})
    assert tried == [2, 1]
    assert [path.stem for path in checkpoints.paths()] == ["step-00000002", "step-00000003"]


def test_the_moments_lie_in_memory_as_their_weights_do(tmp_path):
    """A fused optimizer takes both element by element as they lie, whatever their shapes say."""
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = TrainingState([weight], optimizer, schedule, None, None)
    weight.square().sum().backward()
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    checkpoints.save(1, {**dataclasses.asdict(Resumed(global_step=1)), **state.capture()})
    state.restore(checkpoints.load_latest())
    moment = optimizer.state[weight]["exp_avg"]
    assert moment.stride() == weight.stride()
