"""params.yaml is read once, typed, and every problem of it is reported together."""

import re
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import modify_yaml
from pydantic import ValidationError

from stages.lib.frame.errors import StageError
from stages.lib.frame.params import SECTIONS, Params, UndeclaredParameter, read_params
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
    with pytest.raises(ValidationError, match="frozen"):
        params.train.seed = 1


@pytest.mark.parametrize("text", ["1e-05", "1e5", 3])
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path, text):
    params = read_params(write(tmp_path / "p.yaml", train__learning_rate=text))
    assert params.train.learning_rate == float(text)


def test_no_without_quotes_is_the_choice_no(tmp_path):
    assert read_params(write(tmp_path / "p.yaml", train__mixed_precision=False)).train.mixed_precision == "no"
    with pytest.raises(StageError, match=r"train\.mixed_precision: expected one of no, bf16, fp16, got True"):
        read_params(write(tmp_path / "p.yaml", train__mixed_precision=True))
    with pytest.raises(StageError, match=r"train\.lr_scheduler: expected one of constant, .*, got False"):
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
        evaluate__guidance_scale=[2.0, 0.5, "much"],
        encode_images__bucket_sizes=[[64, 64], [64, 8]],
        encode_captions__clip_skip=0,
        encode_images__resolution=64.5,
        prepare__max_rejected_fraction=1.5,
        train__adam_beta1=1,
    )
    with pytest.raises(StageError) as caught:
        read_params(path)
    message = str(caught.value)
    for expected in (
        "13 problem(s)",
        "train.learning_rate: expected a number, got 'fast'",
        "train.seed: expected a number of 0 or more, got -1",
        "train.lr_scheduler: expected one of constant, cosine, cosine_with_restarts, linear, polynomial, "
        "got 'cosin'",
        "train.use_ema: expected true or false, got 'yes'",
        "train.surprise: unknown key",
        "evaluate.seeds: expected a list of one or more values, got []",
        "evaluate.guidance_scale[1]: expected a number of 1 or more, got 0.5",
        "evaluate.guidance_scale[2]: expected a number, got 'much'",
        "encode_images.bucket_sizes[1][1]: expected a number of 16 or more, got 8",
        "encode_captions.clip_skip: expected a number of 1 or more, or null, got 0",
        "encode_images.resolution: expected a whole number, or a list of such, got 64.5",
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
            {"fetch_base__source": "hub", "fetch_base__hub_id": "a/b"},
            "fetch_base.revision: expected a commit of 40 hexadecimal digits",
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


# --- several problems, near misses, files that are something else


def test_values_that_do_not_go_together_are_reported_beside_values_that_are_wrong(tmp_path):
    path = write(
        tmp_path / "p.yaml",
        train__use_ema="maybe",
        train__lr_warmup_steps=900,
        train__gradient_accumulation_steps=3,
        train__num_train_epochs=2,
    )
    with pytest.raises(StageError) as caught:
        read_params(path)
    assert str(caught.value).splitlines()[1:] == [
        "  train.use_ema: expected true or false, got 'maybe'",
        "  train.max_train_steps: expected a number here or in num_train_epochs, and null in the other, "
        "got 512",
        "  train.gradient_accumulation_steps: expected a divisor of train_batch_size 16, got 3",
        "  train.lr_warmup_steps: expected at most max_train_steps 512, got 900",
    ]


def test_a_check_of_a_value_that_is_wrong_itself_is_left_out(tmp_path):
    path = write(tmp_path / "p.yaml", train__max_train_steps="many", train__lr_warmup_steps=900)
    with pytest.raises(StageError) as caught:
        read_params(path)
    (problem,) = str(caught.value).splitlines()[1:]
    assert problem == "  train.max_train_steps: expected a whole number, or null, got 'many'"


def test_a_key_that_is_nearly_known_is_suggested(tmp_path):
    document = yaml.safe_load(SHIPPED.read_text())
    document["train"]["learning_rte"] = document["train"].pop("learning_rate")
    document["trains"], document["tokenize"]["colour"] = {}, 1
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(StageError) as caught:
        read_params(tmp_path / "p.yaml")
    for expected in (
        "train.learning_rte: unknown key; did you mean train.learning_rate?",
        "train.learning_rate: missing",
        "trains: unknown key; did you mean train?",
        "tokenize.colour: unknown key; known: num_chunks",
    ):
        assert expected in str(caught.value)


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_path_may_be_nothing_where_it_is_not_used(tmp_path, nothing):
    read_params(write(tmp_path / "p.yaml", fetch_base__vae_directory=nothing))
    needed = {
        "fetch_base__directory": "fetch_base.directory: expected a path, for source: directory, got",
        "prepare__source": "prepare.source: expected a folder, an archive or a table",
    }
    for key, message in needed.items():
        with pytest.raises(StageError, match=re.escape(message)):
            read_params(write(tmp_path / "p.yaml", **{key: nothing}))
    read_params(
        write(
            tmp_path / "p.yaml",
            fetch_base__source="hub",
            fetch_base__directory=nothing,
            fetch_base__hub_id="a/b",
            fetch_base__revision="0" * 40,
        )
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: \xff", "expected UTF-8"),
        (b"train: [", "not valid YAML"),
        (b"- train", "expected sections, got list"),
        (b"", "expected sections, got NoneType"),
        (b"train: 1", "train: expected a section of keys, got 1"),
        (b"train:\n  seed: 1\n  seed: 2\n", "'seed' stands here a second time"),
        (b"[" * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_is_something_else_is_one_error(tmp_path, content, message):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(StageError, match=re.escape(message)):
        read_params(tmp_path / "p.yaml")


# --- what a stage may read


def test_a_stage_reads_what_it_declares_and_nothing_else():
    params = read_params(SHIPPED).only(("validation", "evaluate.prompts", "evaluate.seeds"))
    assert params.validation.seed == 0
    assert params.evaluate.seeds == (0, 1)
    assert list(vars(params.evaluate)) == ["prompts", "seeds"]
    for section, key in (("evaluate", "bootstrap_level"), ("train", "seed")):
        with pytest.raises(UndeclaredParameter, match=rf"{section}\.{key}: dvc\.yaml does not list it"):
            getattr(getattr(params, section), key)


def test_sections_hold_their_keys_in_the_order_of_the_file():
    params, document = read_params(SHIPPED), yaml.safe_load(SHIPPED.read_text())
    assert list(document) == list(SECTIONS)
    for name, values in document.items():
        assert list(vars(getattr(params, name))) == list(values)


# --- the file as it is shipped


def comments() -> dict[str, str]:
    """Key with its section -> the comment beside it."""
    found, section = {}, ""
    for line in SHIPPED.read_text().splitlines():
        if match := re.fullmatch(r"(\w+):", line):
            section = match[1]
        elif match := re.fullmatch(r"  (\w+):.*?\s+# (.*)", line):
            found[f"{section}.{match[1]}"] = match[2]
    return found


def test_the_description_of_a_field_is_the_comment_beside_its_value():
    described = {
        f"{name}.{key}": field.description
        for name, kind in SECTIONS.items()
        for key, field in kind.model_fields.items()
    }
    assert described == comments()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "learning_rate", 3e-5),
        ("train", "snr_gamma", 5),
        ("train", "lora_rank", 8),
        ("train", "use_ema", False),
        ("prepare", "source", "data/mine"),
        ("fetch_base", "vae_directory", None),
        ("evaluate", "negative_prompt", "blurry"),
        ("evaluate", "guidance_scale", [7.5]),
    ],
)
def test_dvc_changes_one_line_of_the_file_for_one_value(tmp_path, section, key, value):
    path = tmp_path / "params.yaml"
    path.write_bytes(SHIPPED.read_bytes())
    with modify_yaml(path) as document:
        document[section][key] = document[section][key]
    assert path.read_bytes() == SHIPPED.read_bytes()
    with modify_yaml(path) as document:
        document[section][key] = value
    before, after = SHIPPED.read_text().splitlines(), path.read_text().splitlines()
    changed = {line.split(":")[0].strip() for line in set(before) ^ set(after)}
    assert changed == {key} or changed == {key, "- 7.5"}
    assert len(after) - len(before) <= 1
    read_params(path)


@pytest.mark.parametrize(
    "text",
    [
        "train:\n  seed: 2026-99-99\n",
        "a: !!int ''\n",
        "a: !!timestamp x\n",
        f"a: {'9' * 5000}\n",
        "a: !!binary é\n",
    ],
)
def test_what_yaml_itself_stumbles_over_is_one_error(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(StageError, match=r"params\.yaml: "):
        read_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfet\0", b"train: \xe9\n", b"a: \0\n", b"\x80" * 50])
def test_a_file_that_is_not_utf8_is_one_error(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(StageError, match=r"params\.yaml: (expected UTF-8|not valid YAML)"):
        read_params(tmp_path / "params.yaml")


# --- one value or several


@pytest.mark.parametrize(
    ("value", "read"), [(64, (64,)), ("64", (64,)), ([64], (64,)), ([96, "64"], (96, 64))]
)
def test_of_one_or_several_values_one_is_a_list_of_one(tmp_path, value, read):
    path = write(tmp_path / "p.yaml", encode_images__resolution=value)
    assert read_params(path).encode_images.resolution == read


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (8, "resolution: expected a number of 16 or more, or a list of such, got 8"),
        (None, "resolution: expected a whole number, or a list of such, got None"),
        ([64, 8], "resolution[1]: expected a number of 16 or more, got 8"),
        ([64, "much"], "resolution[1]: expected a whole number, got 'much'"),
        ([64, [96]], "resolution[1]: expected a whole number, got [96]"),
        ([], "resolution: expected a list of one or more values, got []"),
        ([64, 96, 64], "resolution: expected each of the list once, got (64, 96, 64)"),
        (72, "resolution: expected a multiple of bucket_step 16, for buckets: auto, got 72"),
        ([64, 72], "resolution: expected multiples of bucket_step 16, for buckets: auto, got (64, 72)"),
    ],
)
def test_problems_of_one_or_several_values(tmp_path, value, message):
    path = write(tmp_path / "p.yaml", encode_images__resolution=value, encode_images__buckets="auto")
    with pytest.raises(StageError) as caught:
        read_params(path)
    assert str(caught.value).splitlines()[1:] == [f"  encode_images.{message}"]
