"""Upload what stage export made to the Hugging Face Hub.

`python -m stages.push --to owner/name [--private] [--revision BRANCH]`; the token is that of HF_TOKEN or of
`hf auth login`.

Reads  data/export
Writes the repository: the pipeline at its top, the card, and the other exported files
Params none
"""

from __future__ import annotations

import argparse
import functools

from stages.lib.core.paths import EXPORT
from stages.lib.export.hub_upload import push
from stages.lib.frame.run import run_command


def main(hub_id: str, private: bool, revision: str | None) -> None:
    print(push(EXPORT, hub_id, private, revision))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.push", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--to", metavar="OWNER/NAME", required=True, help="repository, created if there is none"
    )
    parser.add_argument("--private", action="store_true", help="create it so that others cannot see it")
    parser.add_argument("--revision", metavar="BRANCH", help="created if there is none; default: main")
    arguments = parser.parse_args()
    run_command("push", functools.partial(main, arguments.to, arguments.private, arguments.revision))
