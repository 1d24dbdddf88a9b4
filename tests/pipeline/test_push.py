"""What is pushed lies in the repository as it lies here, in one commit; refusals are told with a remedy."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from stages import push
from stages.lib.core.sums import write_sums
from stages.lib.core.tensors import write_safetensors
from stages.lib.frame.errors import StageError
from tests.upload_hub import LARGE, TOKEN, UploadHub, taking_uploads

CARD = """---
license: mit
---

pipeline = DiffusionPipeline.from_pretrained("pipeline")
pipeline = StableDiffusionPipeline.from_single_file(
    "one.safetensors", config="pipeline"
)
pipeline.load_lora_weights(".", weight_name="lora.safetensors")
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A Hub, a user with a token, and exported files of both sizes."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "data/export"
    (directory / "pipeline/unet").mkdir(parents=True)
    write_safetensors(directory / "pipeline/unet/weights.safetensors", {"a": torch.ones(LARGE)}, {})
    (directory / "pipeline/model_index.json").write_text("{}")
    (directory / "README.md").write_text(CARD)
    (directory / "grid.png").write_bytes(b"png")
    write_sums(directory)
    with taking_uploads(monkeypatch, tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_everything_lies_there_with_the_pipeline_at_the_top(
    hub: UploadHub, capsys: pytest.CaptureFixture[str]
) -> None:
    push.main("me/hearts", private=True, revision=None)
    files = hub.files["me/hearts", "main"]
    assert files.keys() == {"README.md", "grid.png", "model_index.json", "unet/weights.safetensors"}
    own = Path("data/export/pipeline/unet/weights.safetensors").read_bytes()
    assert files["unet/weights.safetensors"] == own
    assert [*hub.stored.values()] == [own]
    assert hub.private == {"me/hearts": True}
    card = files["README.md"].decode()
    assert 'from_pretrained("me/hearts")' in card
    assert '"https://huggingface.co/me/hearts/blob/main/one.safetensors", config="me/hearts"' in card
    assert 'load_lora_weights("me/hearts", weight_name="lora.safetensors")' in card
    assert Path("data/export/README.md").read_text() == CARD
    assert capsys.readouterr().out == f"{hub.endpoint}/me/hearts/commit/{1:040x}\n"


def test_a_second_push_replaces_files_and_leaves_others(hub: UploadHub) -> None:
    push.main("me/hearts", private=False, revision=None)
    hub.files["me/hearts", "main"]["NOTES.md"] = b"mine"
    Path("data/export/grid.png").write_bytes(b"another")
    write_sums(Path("data/export"))
    push.main("me/hearts", private=False, revision="main")
    files = hub.files["me/hearts", "main"]
    assert (files["grid.png"], files["NOTES.md"]) == (b"another", b"mine")
    assert hub.private == {"me/hearts": False}
    assert hub.num_commits == 2


def test_a_branch_is_created_and_main_stays(hub: UploadHub) -> None:
    for _ in range(2):
        push.main("me/hearts", private=False, revision="try")
    assert hub.files["me/hearts", "main"] == {}
    assert "model_index.json" in hub.files["me/hearts", "try"]


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("create", 401, r"me/hearts: the Hub does not know the token \(401\); take one with write access"),
        ("create", 403, r"the token may not write there \(403\); take one with write access to me,"),
        ("preupload", 404, r"no such owner, repository or branch \(404\); check --to"),
        ("commit", 403, r"the token may not write there \(403\)"),
        ("batch", 413, r"the Hub refused \(413\)"),
    ],
)
def test_a_refusal_is_told_with_its_remedy(hub: UploadHub, part: str, status: int, message: str) -> None:
    hub.refusals[part] = status
    with pytest.raises(StageError, match=message):
        push.main("me/hearts", private=False, revision=None)
    assert hub.num_commits == 0


def test_an_unknown_token_is_told(hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(StageError, match=r"does not know the token \(401\)") as caught:
        push.main("me/hearts", private=False, revision=None)
    assert "hf_another" not in str(caught.value)


def test_without_a_token_nothing_is_asked(hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StageError, match="expected a token of the Hub, found none; set HF_TOKEN"):
        push.main("me/hearts", private=False, revision=None)
    assert not hub.private


def test_without_a_network_the_remedy_is_told(hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        StageError, match=r"me/hearts: the Hub cannot be reached \(.*run the same command again"
    ):
        push.main("me/hearts", private=False, revision=None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StageError, match="HF_HUB_OFFLINE is set"):
        push.main("me/hearts", private=False, revision=None)


@pytest.mark.parametrize("hub_id", ["hearts", "me/", "a/b/c", "me/hea rts", "/x"])
def test_no_id_of_a_repository_is_refused(hub: UploadHub, hub_id: str) -> None:
    with pytest.raises(
        StageError, match=f"expected the id of a repository, owner/name, got {re.escape(repr(hub_id))}"
    ):
        push.main(hub_id, private=False, revision=None)


def test_damaged_or_missing_files_are_not_pushed(hub: UploadHub) -> None:
    Path("data/export/grid.png").write_bytes(b"cut")
    with pytest.raises(
        StageError, match=r"data/export: damaged, changed grid\.png; run `dvc repro -f -s export`"
    ):
        push.main("me/hearts", private=False, revision=None)
    assert not hub.private
