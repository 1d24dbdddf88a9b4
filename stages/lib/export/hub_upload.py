"""The exported files in a repository of the Hugging Face Hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.core.sums import SUMS, check_sums, parse_sums
from stages.lib.export.model_card import PIPELINE, for_hub
from stages.lib.frame.errors import StageError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARD = "README.md"
_MAIN = "main"


def push(directory: Path, hub_id: str, private: bool, revision: str | None) -> str:
    """Upload what stage export made; the address of the commit.

    The pipeline goes to the top of the repository, where ``from_pretrained("owner/name")`` looks for it, and
    the card's examples name the repository. Other files of the repository stay as they are.

    Args:
        directory: of the exported files.
        hub_id: owner/name; created where there is none.
        private: whether it is created so that others cannot see it.
        revision: branch, created where there is none; None is ``main``.

    Raises:
        StageError: if the files are not as they were written, there is no token, or the Hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    if not _HUB_ID.fullmatch(hub_id):
        raise StageError(f"--to: expected the id of a repository, owner/name, got {hub_id!r}")
    check_sums(directory, "export")
    token = get_token()
    if not token:
        raise StageError(
            f"{hub_id}: expected a token of the Hub, found none; set HF_TOKEN to one with write access, or "
            "run `hf auth login`"
        )
    api = HfApi(token=token)
    try:
        api.create_repo(hub_id, private=private or None, exist_ok=True)
        if revision is not None and revision != _MAIN:
            api.create_branch(hub_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            hub_id,
            list(operations(directory, hub_id)),
            commit_message="Upload the exported model",
            revision=revision,
        )
    except HFValidationError as error:
        raise StageError(
            f"--to: expected the id of a repository, owner/name, got {hub_id!r}: {error}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise StageError(f"{hub_id}: HF_HUB_OFFLINE is set; unset it where there is a network") from error
    except (HTTPError, OSError) as error:
        raise StageError(f"{hub_id}: {refusal(error, hub_id)}") from error
    return str(commit.commit_url)


def operations(directory: Path, hub_id: str) -> Iterator[CommitOperationAdd]:
    """Each exported file and where it goes to."""
    from huggingface_hub import CommitOperationAdd

    for name in parse_sums((directory / SUMS).read_text(), str(directory / SUMS), "export"):
        path = directory / name
        if name == _CARD:
            text = for_hub(path.read_text(encoding="utf-8"), hub_id)
            yield CommitOperationAdd(_CARD, text.encode())
        else:
            yield CommitOperationAdd(name.removeprefix(f"{PIPELINE}/"), path)


def refusal(error: Exception, hub_id: str) -> str:
    """Why the Hub did not take the files, and the remedy."""
    response = getattr(error, "response", None)
    match getattr(response, "status_code", None):
        case 401:
            return (
                "the Hub does not know the token (401); take one with write access from "
                "https://huggingface.co/settings/tokens, and set HF_TOKEN or run `hf auth login`"
            )
        case 403:
            return (
                f"the token may not write there (403); take one with write access to {hub_id.split('/')[0]}, "
                "or name a repository of your own"
            )
        case 404:
            return "the Hub has no such owner, repository or branch (404); check --to and --revision"
        case None:
            return (
                f"the Hub cannot be reached ({error}); check the network and run the same command again: "
                "what was uploaded is not uploaded twice"
            )
        case status:
            first_line = str(error).strip().split("\n")[0]
            return f"the Hub refused ({status}): {first_line}; mend that, and run the same command again"
