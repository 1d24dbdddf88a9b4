"""Open a page of this machine to try base and fine-tuned UNet side by side.

`python -m stages.try_it [--port N] [--no-browser]`

Reads  data/base, data/unet, data/snapshots, data/latents.zarr, data/captions.zarr
Writes pictures that are shown, in the work directory
Params evaluate (what the fields begin with)
"""

from __future__ import annotations

import argparse

from stages.lib.frame.params import read_params
from stages.lib.frame.run import run_command
from stages.lib.frame.work_directory import work_root
from stages.lib.trial.page import build_page, serve
from stages.lib.trial.studio import open_studio


def main(port: int | None, open_browser: bool) -> None:
    options = read_params().evaluate
    studio = open_studio(options)
    page = build_page(studio.pictures, list(studio.choices), options, work_root() / "try_it")
    serve(page, port, open_browser)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.try_it", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, help="default: a free one from 7860")
    parser.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    arguments = parser.parse_args()
    run_command("try_it", lambda: main(arguments.port, not arguments.no_browser))
