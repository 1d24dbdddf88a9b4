"""A run goes on wherever its weights would be the same: what names it, what it passes through and keeps."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from stages.lib.data.pairs import read_captions
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.frame.sections.train import ModuleRank
from stages.lib.training import loop
from stages.lib.training.lineage import (
    determining_params,
    environment_of,
    lineage_of,
    passed_through,
    run_identity,
)
from tests.conftest import REPOSITORY, content_fingerprint, read_lineage, run_train, write_params

WEIGHTS = Path("data/unet/diffusion_pytorch_model.safetensors")
KILLED_AFTER = 10  # steps; the last checkpoint is of step 8
RUN = """
import os, runpy, signal
from stages.lib.training import loop
steps, train_step = [], loop.train_step

def counted(*arguments):
    if len(steps) == %d:
        os.kill(os.getpid(), signal.SIGKILL)
    steps.append(None)
    return train_step(*arguments)

loop.train_step = counted
runpy.run_module("stages.train", run_name="__main__", alter_sys=True)
"""


ONLY_LOOKED_AT = {
    "checkpoint_every_steps", "export", "export_ema", "log_every_steps", "max_resident_bytes",
    "num_previews", "preview_every_steps", "preview_guidance_scale", "snapshot_every_steps",
    "validate_ema", "validation_every_steps",
}  # fmt: skip
ONLY_ROUNDED = {"channels_last", "gradient_accumulation_steps", "gradient_checkpointing", "torch_compile"}
ONLY_WITH_ADAPTERS = {"adapter", "lora_by_module"}


# --- what names a run


def identity(params: object, **made_of: object) -> str:
    facts = {
        "samples": [],
        "latents": SimpleNamespace(fingerprint="latents"),
        "conditioning": SimpleNamespace(fingerprint="captions"),
        "code": "code",
        **made_of,
    }
    return run_identity(lineage_of(params, Path("data/base"), "epsilon", **facts))


def with_value(section: str, name: str, value: object, **others: object) -> SimpleNamespace:
    """The parameters with one value changed, whatever it is."""
    params = read_params()
    sections = {each: dict(vars(getattr(params, each))) for each in ("train", "validation")}
    sections["train"] |= others
    sections[section][name] = value
    return SimpleNamespace(**{each: SimpleNamespace(**values) for each, values in sections.items()})


def test_the_parameters_that_matter_name_the_run_and_no_others(encoded):
    params = read_params()
    for patience, counting in ((None, set()), (2, {"validation_every_steps", "validate_ema", "export_ema"})):
        stopping = {"early_stopping_patience": patience}
        plain = identity(with_value("train", "seed", params.train.seed, **stopping))
        same = {
            name
            for name in vars(params.train)
            if identity(with_value("train", name, "another", **({} if name in stopping else stopping)))
            == plain
        }
        assert same == (ONLY_LOOKED_AT | ONLY_ROUNDED | ONLY_WITH_ADAPTERS) - counting
        kept = {
            identity(with_value("validation", name, "another", **stopping)) == plain
            for name in vars(params.validation)
        }
        assert kept == {patience is None}


def test_kind_and_ranks_of_adapters_name_a_run_that_has_them(encoded):
    def named(name: str, value: object) -> str:
        return identity(with_value("train", name, value, lora_rank=4))

    ranks = (ModuleRank(modules="mid_block.*", rank=2),)
    names = [named("adapter", "lora"), named("adapter", "loha"), named("lora_by_module", ranks)]
    assert len({*names, named("lora_alpha", 2.5), identity(read_params())}) == 5
    assert named("lora_alpha", 4.0) == named("lora_alpha", 4) == names[0]
    kept = json.loads(json.dumps(determining_params(with_value("train", "lora_rank", 4))))["train"]
    assert not ONLY_WITH_ADAPTERS & kept.keys()  # a plain LoRA run has the name that it had before these
    assert json.dumps(kept["lora_alpha"]) == "4"


def test_whatever_a_run_is_made_of_names_it(encoded):
    params = read_params()
    latents, conditioning = read_latents(), read_conditioning()
    first, *rest = read_captions(Path("data/pairs/captions.parquet"))
    another = {"train": "validation", "validation": "train"}[first.split]
    runs = [
        identity(params, samples=[first, *rest]),
        identity(params, samples=[dataclasses.replace(first, captions=("another caption",)), *rest]),
        identity(params, samples=[dataclasses.replace(first, split=another), *rest]),
        identity(params, samples=[dataclasses.replace(first, sample_id="another.png"), *rest]),
        identity(params, samples=[first, *rest], latents=latents),
        identity(params, samples=[first, *rest], conditioning=conditioning),
        identity(params, samples=[first, *rest], code="another"),
    ]
    path = Path("data/base/unet/diffusion_pytorch_model.safetensors")
    changed = load_file(path)
    changed["conv_out.bias"][0] += 1e-3
    save_file(changed, path, {"format": "pt"})
    runs.append(identity(params, samples=[first, *rest]))
    assert len(set(runs)) == len(runs) == 8


def test_the_environment_is_what_moves_bits(monkeypatch):
    options = read_params(REPOSITORY / "params.yaml").train
    accelerator = Accelerator(cpu=True)
    facts = {name: getattr(accelerator, name) for name in ("device", "num_processes", "distributed_type")}
    plain = environment_of(accelerator, options)
    assert {"torch", "diffusers", "machine", "capability", "num_threads"} <= plain.keys()
    assert plain == environment_of(SimpleNamespace(**facts), options)
    for changed in ({"num_processes": 2}, {"device": torch.device("cuda")}):
        assert environment_of(SimpleNamespace(**facts | changed), options) != plain
    for name in ONLY_ROUNDED:
        changed = SimpleNamespace(**vars(options) | {name: "another"})
        assert environment_of(accelerator, changed) == plain | {name: "another"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert environment_of(accelerator, options) == plain | {"num_threads": "77"}


def test_an_environment_that_differs_is_listed_named_once_and_refused_if_asked(monkeypatch, caplog):
    first, second = {"torch": "1", "num_threads": "2"}, {"torch": "1", "num_threads": "4", "cuda": "GPU"}
    assert passed_through([], first) == [first]
    assert passed_through([first], first) == [first]
    assert not caplog.records
    assert passed_through([second, first], second) == [second, first, second]
    (warning,) = caplog.messages
    assert "(cuda absent -> GPU, num_threads 2 -> 4): equal but for rounding" in warning
    monkeypatch.setenv("SD_EXACT_RESUME", "1")
    assert passed_through([second, first], first) == [second, first]
    with pytest.raises(StageError, match=r"cuda absent -> GPU, num_threads 2 -> 4.*unset SD_EXACT_RESUME"):
        passed_through([first], second)


# --- killed and gone on with


@pytest.fixture(scope="module")
def killed(made_encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project whose training was killed after 10 of 12 steps, and the bytes that it gives undisturbed."""
    root = shutil.copytree(made_encoded, tmp_path_factory.mktemp("killed"), dirs_exist_ok=True)
    shutil.copytree(REPOSITORY / "stages", root / "code/stages", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        every = {"validation_every_steps": 6, "checkpoint_every_steps": 4, "preview_every_steps": 6}
        write_params(train={"max_train_steps": 12, **every})
    done = run(root)
    assert done.returncode == 0, done.stderr
    whole = outputs(root)
    for made in (".work/train", "data/unet", "data/training"):
        shutil.rmtree(root / made)
    done = run(root, "-c", RUN % KILLED_AFTER)
    assert done.returncode == -9, done.stderr
    assert [path.stem for path in sorted((root / ".work/train").rglob("step-*.safetensors"))][
        -1
    ] == "step-00000008"
    return root, whole


@pytest.fixture
def project(killed: tuple[Path, str], tmp_path: Path) -> Path:
    return shutil.copytree(killed[0], tmp_path, dirs_exist_ok=True)


def run(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m stages.train` with the project's own copy of the code and one thread."""
    environment = {
        **os.environ, "PYTHONPATH": str(root / "code"), "SD_WORK": str(root / ".work"),
        "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    command = [sys.executable, *(arguments or ("-m", "stages.train"))]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def outputs(root: Path) -> str:
    return content_fingerprint(root / "data/unet") + content_fingerprint(root / "data/training")


def edit_params(root: Path, **train: object) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        every = {"validation_every_steps": 6, "checkpoint_every_steps": 4, "preview_every_steps": 6}
        write_params(train={"max_train_steps": 12, **every, **train})


def remark_everywhere(root: Path) -> None:
    for path in (root / "code/stages").rglob("*.py"):
        path.write_text("# a remark\n" + path.read_text() + "\n\n# another\n")


def reword(root: Path) -> None:
    for name in ("frame/errors.py", "training/history.py"):
        path = root / "code/stages/lib" / name
        path.write_text(path.read_text().replace('"""', '"""In other words. ', 1) + "\nUNUSED = 1\n")


@pytest.mark.parametrize(
    "change",
    [remark_everywhere, reword, lambda root: edit_params(root, checkpoint_every_steps=2), lambda root: None],
    ids=["remarks", "docstrings", "checkpoints", "nothing"],
)
def test_in_the_same_environment_the_bytes_are_those_of_an_undisturbed_run(killed, project, change):
    change(project)
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 8 from" in done.stderr
    assert "another environment" not in done.stderr
    assert outputs(project) == killed[1]


@pytest.mark.parametrize(
    ("environment", "changed", "named"),
    [
        ({"OMP_NUM_THREADS": "2"}, {}, "num_threads 1 -> 2"),
        ({"SD_LAUNCH": "torchrun --standalone --nproc-per-node 2"}, {}, "num_processes 1 -> 2"),
        ({}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
    ],
)
@pytest.mark.slow
def test_in_another_environment_a_run_goes_on_says_so_and_lists_both(
    killed, project, environment, changed, named
):
    edit_params(project, **changed)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    refused = run(project, PATH=path, SD_EXACT_RESUME="1", **environment)
    assert refused.returncode == 1
    assert f"made in another environment ({named})" in refused.stderr
    done = run(project, PATH=path, **environment)
    assert done.returncode == 0, done.stderr
    assert "resuming at step 8 from" in done.stderr
    assert done.stderr.count(f"the run goes on in another environment ({named})") >= 1
    first, second = json.loads(read_lineage(project / "data/unet")["environments"])
    assert {name for name in first if first[name] != second[name]} == {named.split()[0]}
    shutil.rmtree(project / ".work/train")
    undisturbed = load_file(project / WEIGHTS)
    edit_params(project)
    done = run(project)
    assert done.returncode == 0, done.stderr
    for name, value in load_file(project / WEIGHTS).items():
        torch.testing.assert_close(undisturbed[name], value, rtol=1e-4, atol=1e-5)


def test_a_changed_computation_begins_anew(killed, project):
    path = project / "code/stages/lib/diffusion/noise.py"
    path.write_text(path.read_text().replace("0.5 * logvar", "0.4 * logvar"))
    done = run(project)
    assert done.returncode == 0, done.stderr
    assert "resuming" not in done.stderr
    assert outputs(project) != killed[1]
    assert len(list((project / ".work/train").iterdir())) == 2


# --- what a run keeps of what was looked at


def losses() -> dict[int, float]:
    lines = Path("data/training/plots/metrics/validation_loss.tsv").read_text().splitlines()[1:]
    return {int(step): float(value) for step, value in (line.split("\t") for line in lines)}


def test_losses_measured_otherwise_are_left_out_and_the_last_is_measured_anew(encoded, monkeypatch):
    run_train()
    first = losses()
    write_params(validation={"num_timesteps": 3})
    shutil.rmtree("data/training")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", None)  # nothing is trained
        run_train()
    measured = losses()
    assert first.keys() == {3, 6} and measured.keys() == {6}
    assert measured[6] != first[6]
    shutil.rmtree(".work/train")
    run_train()
    assert losses()[6] == measured[6]


def test_the_best_is_told_by_losses_measured_alike_or_the_run_begins_anew(encoded, caplog):
    run_train(validation_every_steps=2)
    write_params(validation={"seed": 5})
    run_train(validation_every_steps=2, export="best")
    assert "the run begins anew" in caplog.text
    kept = content_fingerprint(Path("data/unet"))
    assert len(list(Path(".work/train").iterdir())) == 1
    shutil.rmtree(".work/train")
    run_train(validation_every_steps=2, export="best")
    assert content_fingerprint(Path("data/unet")) == kept
    run_train(validation_every_steps=2, export="last")  # measured alike, whichever is exported
    assert len(list(Path(".work/train").rglob("step-*.safetensors"))) == 2


def test_previews_made_otherwise_are_left_out_and_the_last_is_made_anew(encoded, monkeypatch):
    run_train()
    assert len(list(Path("data/training/previews").glob("step-*"))) == 3
    monkeypatch.setattr(loop, "train_step", None)
    run_train(preview_guidance_scale=5.0)
    assert [path.stem for path in Path("data/training/previews").glob("step-*")] == ["step-00000006"]
    run_train(preview_every_steps=None)
    assert not list(Path("data/training/previews").glob("step-*"))
