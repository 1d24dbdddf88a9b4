"""Write one page about several runs side by side.

`python -m stages.compare REV [REV ...] [--out PATH]`, where REV is a branch, a tag, a commit, the
name of a DVC experiment, or `workspace`. Nothing is checked out: outputs are read from DVC's cache,
or from the remote where one is set up.

Reads  what `python -m stages.gallery` reads, of each revision
Writes data/comparison.html and comparison_files/ beside it, or --out and its
Params none
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException, NotDvcRepoError
from dvc.repo import Repo
from dvc.scm import RevError
from dvc_data.index import DataIndexDirError

from stages.lib.core.files import write_text
from stages.lib.core.paths import COMPARISON_PAGE
from stages.lib.frame.errors import StageError
from stages.lib.frame.run import run_command
from stages.lib.page.comparison import changes_from_first
from stages.lib.page.pictures import PictureFiles
from stages.lib.page.render import render_page
from stages.lib.page.run import Run
from stages.lib.page.run_outputs import MissingOutput, read_run

WORKSPACE = "workspace"
LOST = (
    "dvc.lock lists it, but neither the cache nor a remote has it; run `dvc fetch --all-commits` where "
    "a remote has it, else the experiment again with `dvc exp run`"
)


def main(revisions: list[str], output: Path) -> None:
    """Read the runs in the order they were named, each once, and write their page.

    Raises:
        StageError: this is no DVC repository, a revision is unknown, or lacks an output.
    """
    root = find_repository()
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = PictureFiles(output)
    runs = [read_revision(root, revision, pictures) for revision in dict.fromkeys(revisions)]
    pictures.finish()
    write_text(output, render_page(runs, changes_from_first(runs)))


def find_repository() -> str:
    """Root of the DVC repository around the current directory."""
    try:
        return Repo.find_root()
    except NotDvcRepoError as error:
        raise StageError(
            f"{Path.cwd()}: not in a DVC repository; run from a clone of this project"
        ) from error


def read_revision(root: str, revision: str, pictures: PictureFiles) -> Run:
    """The run of one revision."""
    files = DVCFileSystem(root, rev=None if revision == WORKSPACE else revision)
    try:
        commit = "" if revision == WORKSPACE else files.repo.get_rev()
        return read_run(files, revision, pictures, commit)
    except RevError as error:
        raise StageError(f"{revision}: no such revision; {describe_known(root)}") from error
    except MissingOutput as error:
        reason = f"{error.path}: {LOST}" if files.isdvc(error.path) else error
        raise StageError(f"{revision}: {reason}") from error
    except DataIndexDirError as error:
        raise StageError(f"{revision}: {error}: {LOST}") from error
    except (DvcException, StageError) as error:
        raise StageError(f"{revision}: {error}") from error
    finally:
        files.close()


def describe_known(root: str) -> str:
    """Names that may be compared."""
    with Repo(root) as repo:
        found = repo.experiments.ls(all_commits=True)
        branches = sorted(repo.scm.list_branches())
    experiments = sorted({name for listed in found.values() for name, _ in listed})
    return f"experiments: {', '.join(experiments) or 'none'}; branches: {', '.join(branches)}; or {WORKSPACE}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.compare", description=__doc__.split("\n")[0])
    parser.add_argument(
        "revisions", metavar="REV", nargs="+", help="branch, commit, experiment, or workspace"
    )
    parser.add_argument("--out", type=Path, default=COMPARISON_PAGE, help="default: %(default)s")
    arguments = parser.parse_args()
    run_command("compare", functools.partial(main, arguments.revisions, arguments.out))
    print(arguments.out)
