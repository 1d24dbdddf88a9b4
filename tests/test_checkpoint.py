"""Checkpoints on disk: streamed, whole or absent, in the work directory that others trim."""

import pickle
import tracemalloc

import pytest
import torch

from stages.lib.checkpoint import Checkpoints


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
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save(2, {"value": lambda: None})
    assert {path.name for path in checkpoints.directory.iterdir()} == {"lock", "step-00000001.pt"}
    assert checkpoints.load_latest()["global_step"] == 1


def test_two_equal_runs_may_save_beside_each_other(tmp_path):
    ahead, behind = (Checkpoints(tmp_path, "f" * 64) for _ in range(2))
    for step in range(1, 6):
        ahead.save(step, {"value": torch.zeros(3)})
        behind.save(max(1, step - 3), {"value": torch.zeros(3)})
    assert [path.name for path in behind.paths()] == ["step-00000004.pt", "step-00000005.pt"]
