"""Write the trained model for other tools, and a model card; with export.formats: [] the card alone.

Reads  data/unet, data/base, data/evaluation (report.json, grids, samples), data/prepare_metrics.json; of
       dvc.lock the stages upstream of report
Writes data/export: README.md, grid.png, and what export.formats lists: pipeline/, one .safetensors in the
       original layout, adapters
Params fetch_base, prepare, encode_captions, encode_images, export
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from PIL import Image

from stages.lib.core.files import fresh_directory, write_text
from stages.lib.core.paths import BASE, EXPORT, EXPORTED_PIPELINE, MODEL_CARD, TRAINED_UNET
from stages.lib.core.sums import check_sums, write_sums
from stages.lib.export.components import DTYPES
from stages.lib.export.facts import Facts, read_facts
from stages.lib.export.model_card import GRID, Files, file_stem, model_card
from stages.lib.export.modelspec import data_url, modelspec
from stages.lib.export.single_file import check_prediction, kind_of, write_single_file
from stages.lib.export.whole_pipeline import sampling_scheduler, write_pipeline
from stages.lib.frame.inputs import remove
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage
from stages.lib.models.layout import LORA_WEIGHTS, check_base


def main(params: Params) -> None:
    check_sums(TRAINED_UNET, "train")
    check_formats(params.export.formats)
    facts = read_facts(params)
    partial = fresh_directory(EXPORT.with_name(f"{EXPORT.name}.partial"))
    try:
        files = write_models(params, facts, partial) if params.export.formats else Files()
        shutil.copyfile(facts.grid, partial / GRID)
        write_text(partial / MODEL_CARD.name, model_card(facts, params.export, files))
        write_sums(partial)
        remove(EXPORT)
        partial.rename(EXPORT)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_formats(formats: tuple[str, ...]) -> None:
    """Raise StageError before anything is written if this run has not what a format needs."""
    for name in formats:
        if name.startswith("lora_"):
            from stages.lib.export.adapters import check_adapters  # loads torch, which a card does without

            check_adapters(TRAINED_UNET, name)
    if "single_file" in formats:
        check_prediction(sampling_scheduler(TRAINED_UNET))


def write_models(params: Params, facts: Facts, directory: Path) -> Files:
    """Write each format into ``directory``; the names of what was written."""
    import torch

    from stages.lib.export.adapters import write_lora_diffusers, write_lora_kohya

    options = params.export
    dtype = getattr(torch, options.dtype)
    check_base(BASE)
    stem = f"{file_stem(options.title)}_{DTYPES[options.dtype]}"
    side = max(params.encode_images.resolution)
    kind = kind_of(BASE, TRAINED_UNET, (side, side))
    with Image.open(facts.sample) as sample:
        metadata = functools.partial(modelspec, options, kind, data_url(sample))
    files = Files()
    if "pipeline" in options.formats:
        files = files._replace(pipeline=EXPORTED_PIPELINE.name)
        write_pipeline(directory / EXPORTED_PIPELINE.name, BASE, TRAINED_UNET, dtype)
    if "single_file" in options.formats:
        path = directory / f"{stem}.safetensors"
        write_single_file(path, BASE, TRAINED_UNET, kind, dtype, metadata)
        config = path.with_suffix(".yaml")
        files = files._replace(single_file=path.name, config=config.name if config.exists() else None)
    if "lora_diffusers" in options.formats:
        write_lora_diffusers(directory / LORA_WEIGHTS, TRAINED_UNET, dtype)
        files = files._replace(lora_diffusers=LORA_WEIGHTS)
    if "lora_kohya" in options.formats:
        path = directory / f"{stem}_lora.safetensors"
        write_lora_kohya(path, BASE, TRAINED_UNET, dtype, metadata)
        files = files._replace(lora_kohya=path.name)
    return files


if __name__ == "__main__":
    run_stage(
        "export",
        ("fetch_base", "prepare", "encode_captions", "encode_images", "export"),
        main,
    )
