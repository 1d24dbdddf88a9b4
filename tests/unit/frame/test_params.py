"""params.yaml is read once, typed, and every problem of it is reported together."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, read_params
from tests.conftest import REPOSITORY

SHIPPED = REPOSITORY / "params.yaml"


def write(path: Path, **changes: object) -> Path:
    document = yaml.safe_load(SHIPPED.read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        document[section][name] = value
    path.write_text(yaml.safe_dump(document))
    return path


def test_the_shipped_file_is_valid_and_every_value_has_a_comment():
    params = read_params(SHIPPED)
    assert params.train.learning_rate == 1e-4
    for line in SHIPPED.read_text().splitlines():
        if line.startswith("  ") and not line.strip().startswith(("-", "#")):
            assert "#" in line, line


def test_sections_are_frozen():
    params = read_params(SHIPPED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.train.seed = 1


@pytest.mark.parametrize("text", ["1e-05", "1e5", 3])
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path, text):
    params = read_params(write(tmp_path / "p.yaml", train__learning_rate=text))
    assert params.train.learning_rate == float(text)


def test_no_without_quotes_is_the_choice_no(tmp_path):
    assert read_params(write(tmp_path / "p.yaml", train__mixed_precision=False)).train.mixed_precision == "no"
    with pytest.raises(StageError, match=r"train\.mixed_precision: expected text, got True"):
        read_params(write(tmp_path / "p.yaml", train__mixed_precision=True))
    with pytest.raises(StageError, match=r"train\.lr_scheduler: expected text, got False"):
        read_params(write(tmp_path / "p.yaml", train__lr_scheduler=False))


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(
        tmp_path / "p.yaml",
        train__learning_rate="fast",
        train__seed=-1,
        train__lr_scheduler="cosin",
        train__use_ema="yes",
        train__surprise=1,
        evaluate__seeds=[],
        encode_images__resolution=64.5,
        prepare__max_rejected_fraction=1.5,
        train__adam_beta1=1,
    )
    with pytest.raises(StageError) as caught:
        read_params(path)
    message = str(caught.value)
    for expected in (
        "9 problem(s)",
        "train.learning_rate: expected a number, got 'fast'",
        "train.seed: expected a number of 0 or more, got -1",
        "train.lr_scheduler: expected one of constant, cosine, cosine_with_restarts, linear, polynomial, "
        "got 'cosin'",
        "train.use_ema: expected true or false, got 'yes'",
        "train.surprise: unknown key",
        "evaluate.seeds: expected a list of one or more values, got []",
        "encode_images.resolution: expected a whole number, got 64.5",
        "prepare.max_rejected_fraction: expected a number from 0 to 1, got 1.5",
        "train.adam_beta1: expected a number from 0 to 1, not 1, got 1",
    ):
        assert expected in message


def test_missing_keys_and_sections(tmp_path):
    document = yaml.safe_load(SHIPPED.read_text())
    del document["train"]["seed"], document["evaluate"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(StageError, match=r"(?s)evaluate: missing.*train\.seed: missing"):
        read_params(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__gradient_accumulation_steps": 3}, "a divisor of train_batch_size 16"),
        ({"train__lr_warmup_steps": 5000}, "at most max_train_steps 512"),
        ({"fetch_base__source": "hub"}, "fetch_base.hub_id"),
        (
            {"fetch_base__source": "hub", "fetch_base__hub_id": "a/b", "fetch_base__revision": "main"},
            "a full commit of 40 hexadecimal digits",
        ),
    ],
)
def test_impossible_combinations(tmp_path, changes, message):
    with pytest.raises(StageError, match=message):
        read_params(write(tmp_path / "p.yaml", **changes))


def test_seed_zero_and_null_are_values(tmp_path):
    params: Params = read_params(write(tmp_path / "p.yaml", train__seed=0, train__snr_gamma=None))
    assert params.train.seed == 0
    assert params.train.snr_gamma is None
