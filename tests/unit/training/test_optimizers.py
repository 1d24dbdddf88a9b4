"""Optimizers against other implementations, schedules against their formulas, exact resume."""

import importlib.util
import math
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch

from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Train
from stages.lib.training.optimizers import (
    LR_SCHEDULES,
    OPTIMIZERS,
    build_lr_schedule,
    build_optimizer,
)
from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class Options:
    optimizer: str = "adamw"
    learning_rate: float = 1e-2
    adam_beta1: float = 0.8
    adam_beta2: float = 0.95
    adam_weight_decay: float = 0.1
    adam_epsilon: float = 1e-6
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    max_train_steps: int = 6


def has_8bit() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None


RUNNING = [
    "adamw",
    "adafactor",
    pytest.param(
        "adamw_8bit",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not has_8bit(), reason="needs a GPU and bitsandbytes"),
        ],
    ),
]


def network() -> torch.nn.Module:
    """A convolution, a matrix and biases: each is stored differently by factored and 8-bit optimizers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, 32, 3), torch.nn.Flatten(), torch.nn.Linear(32 * 36, 8)
        )
    return layers.to("cuda" if torch.cuda.is_available() else "cpu")


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    pixels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(number))
    model(pixels.to(next(model.parameters()).device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adamw_equals_the_plain_one_of_torch():
    mine, theirs = network(), network()
    optimizer = build_optimizer(mine.parameters(), Options())
    assert optimizer.defaults["fused"] is True
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, eps=1e-6, fused=False
    )
    for number in range(5):
        step(mine, optimizer, number)
        step(theirs, reference, number)
    for left, right in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_adafactor_takes_steps_of_the_learning_rate_and_equals_torch_otherwise():
    """torch's own scales each step by the size of the weight; dividing by it gives the schedule's step."""
    mine, theirs = network(), network()
    optimizer = build_optimizer(mine.parameters(), Options("adafactor", adam_weight_decay=0.0))
    weights = list(theirs.parameters())
    reference = torch.optim.Adafactor([{"params": [weight]} for weight in weights], eps=(1e-15, 1e-3))
    for number in range(5):
        for group, weight in zip(reference.param_groups, weights, strict=True):
            group["lr"] = 1e-2 / max(1e-3, float(weight.detach().square().mean().sqrt()))
        # torch's step is never longer than 1 / sqrt(t): beyond that the two differ by design.
        assert all(group["lr"] < 1 / math.sqrt(number + 1) for group in reference.param_groups)
        step(mine, optimizer, number)
        step(theirs, reference, number)
    for left, right in zip(mine.parameters(), weights, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_adafactor_decays_weights_by_the_learning_rate():
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = build_optimizer([weight], Options("adafactor"))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), 2.0 * (1 - 1e-2 * 0.1)))


@pytest.mark.parametrize("name", RUNNING)
def test_a_resumed_run_is_bit_identical(name, tmp_path: Path):
    options = Options(name, lr_scheduler="cosine", lr_warmup_steps=2)

    def start() -> tuple:
        model = network()
        optimizer = build_optimizer(model.parameters(), options)
        return model, optimizer, build_lr_schedule(optimizer, options, options.max_train_steps)

    def train(parts: tuple, numbers: range) -> None:
        for number in numbers:
            step(parts[0], parts[1], number)
            parts[2].step()

    whole, stopped, resumed = start(), start(), start()
    train(whole, range(6))
    train(stopped, range(3))
    torch.save([part.state_dict() for part in stopped], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(resumed, range(3, 6))

    first = network()
    for left, right, start_value in zip(
        whole[0].parameters(), resumed[0].parameters(), first.parameters(), strict=True
    ):
        assert torch.equal(left, right)
        assert not torch.equal(left, start_value)
    torch.testing.assert_close(whole[1].state_dict(), resumed[1].state_dict(), rtol=0, atol=0)
    assert whole[2].state_dict() == resumed[2].state_dict()


def test_8bit_without_a_gpu_or_the_package_names_what_is_missing(monkeypatch):
    weights = [torch.nn.Parameter(torch.zeros(1))]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"adamw_8bit: missing a GPU .* and the package bitsandbytes"):
        build_optimizer(weights, Options("adamw_8bit"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(StageError, match="adamw_8bit: missing the package bitsandbytes"):
        build_optimizer(weights, Options("adamw_8bit"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(StageError, match=r"adamw_8bit: missing a GPU \([^)]*\(\)[^)]*\); use"):
        build_optimizer(weights, Options("adamw_8bit"))


def test_8bit_has_the_hyper_parameters_of_the_params(monkeypatch):
    """In place of bitsandbytes, whose signature is torch's AdamW's."""
    module, package = types.ModuleType("bitsandbytes.optim"), types.ModuleType("bitsandbytes")
    module.AdamW8bit = torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (group,) = build_optimizer([torch.nn.Parameter(torch.zeros(1))], Options("adamw_8bit")).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-6)
    assert group["weight_decay"] == 0.1


def rates(**changes: object) -> list[float]:
    """The learning rate of steps 0 to 110, over its peak, with a warm-up of 10."""
    options = Options(lr_warmup_steps=10, max_train_steps=110, **changes)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], options)
    schedule = build_lr_schedule(optimizer, options, options.max_train_steps)
    found = []
    for _ in range(111):
        found.append(schedule.get_last_lr()[0] / options.learning_rate)
        optimizer.step()
        schedule.step()
    return found


def half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"lr_scheduler": "constant"}, lambda progress: 1.0),
        ({"lr_scheduler": "linear"}, lambda progress: 1 - progress),
        ({"lr_scheduler": "cosine"}, half_cosine),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 4},
            lambda progress: half_cosine(4 * progress % 1) if progress < 1 else 0.0,
        ),
        (
            {"lr_scheduler": "polynomial", "lr_power": 2.0},
            lambda progress: 1e-5 + (1 - 1e-5) * (1 - progress) ** 2,  # to 1e-7 from 1e-2
        ),
    ],
)
def test_schedules_warm_up_and_follow_their_formula(options, formula):
    expected = [step / 10 for step in range(10)] + [formula(step / 100) for step in range(101)]
    assert rates(**options) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_modules_load_no_model_and_no_bitsandbytes():
    script = """
import sys
import torch
import stages.lib.training.optimizers as optimizers

def loaded(*unwanted):
    return [name for name in sys.modules if name.startswith(unwanted)]

assert not loaded("transformers.models.", "diffusers.models.", "bitsandbytes"), loaded("transformers.models.")
class Options:
    optimizer, learning_rate, adam_weight_decay = "adafactor", 1e-3, 0.0
optimizers.build_optimizer([torch.nn.Parameter(torch.zeros(1))], Options)
assert "transformers.optimization" in sys.modules
assert not loaded("transformers.models.clip.modeling", "bitsandbytes", "torchvision")
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_tables_hold_the_choices_of_the_params():
    choices = {name: Train.model_fields[name].annotation for name in ("optimizer", "lr_scheduler")}
    assert list(OPTIMIZERS) == list(get_args(choices["optimizer"]))
    assert list(LR_SCHEDULES) == list(get_args(choices["lr_scheduler"]))


def test_each_optimizer_that_can_be_sharded_or_saves_memory_says_so():
    can = {name for name, kind in OPTIMIZERS.items() if kind.can_be_sharded}
    smaller = {name for name, kind in OPTIMIZERS.items() if kind.saves_memory}
    assert (can, smaller) == ({"adamw"}, {"adamw_8bit", "adafactor"})
