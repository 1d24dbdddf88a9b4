"""Write one page about the run: pictures side by side, metrics, curves, lineage.

Reads  data/evaluation, data/baseline, data/training/plots, data/unet, data/embeddings,
       data/encode_images_report, data/pairs/rejected.jsonl, params.yaml; of dvc.lock the stages upstream of
       evaluate
Writes data/evaluation/index.html, and index_files/ beside it
Params all sections, to print them
"""

from __future__ import annotations

from pathlib import Path

from fsspec.implementations.dirfs import DirFileSystem

from stages.lib.core.files import write_text
from stages.lib.core.paths import GALLERY_PAGE
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage
from stages.lib.page.pictures import PictureFiles
from stages.lib.page.render import render_page
from stages.lib.page.run_outputs import read_run


def main(params: Params) -> None:
    files = DirFileSystem(Path.cwd().as_posix(), target_protocol="file")
    pictures = PictureFiles(GALLERY_PAGE)
    page = render_page([read_run(files, "this run", pictures)])
    pictures.finish()
    write_text(GALLERY_PAGE, page)


if __name__ == "__main__":
    run_stage(
        "gallery",
        (
            "fetch_base",
            "prepare",
            "tokenize",
            "encode_captions",
            "encode_images",
            "train",
            "invert",
            "validation",
            "evaluate",
        ),
        main,
    )
