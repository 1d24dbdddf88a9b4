"""Read images and captions from their source into data/pairs.

Reads  prepare.source: data/openmoji, a folder, an archive or a table, or several; or a data set of the Hub
Writes data/pairs/images/*.parquet, data/pairs/masks/*.parquet, data/pairs/captions.parquet,
       data/pairs/rejected.jsonl and its hash,
       data/prepare_metrics.json
Params prepare
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.lib.core.files import fresh_directory, write_json, write_json_lines
from stages.lib.core.paths import (
    PAIR_CAPTIONS,
    PAIR_IMAGES,
    PAIR_MASKS,
    PAIRS,
    PREPARE_METRICS,
    REJECTED_PAIRS,
)
from stages.lib.core.sums import write_sum
from stages.lib.core.workers import count_cores, map_in_order
from stages.lib.data.caption_text import tag_variants
from stages.lib.data.image_shards import (
    ImageEntry,
    StoredImage,
    bind_masks,
    fingerprint_of_images,
    write_images,
)
from stages.lib.data.near_duplicates import groups_alike
from stages.lib.data.pairs import TRAIN, VALIDATION, SampleCaptions, split_of, write_captions
from stages.lib.data.pictures.checking import Size, checked, checked_mask
from stages.lib.data.sources.listing import PairSource, RejectedRow, SourceRow
from stages.lib.data.sources.opening import Reading, open_hub_source, open_source, open_sources
from stages.lib.data.sources.splits import TEST
from stages.lib.frame.errors import StageError
from stages.lib.frame.inputs import declared, inputs_of
from stages.lib.frame.params import Params, Prepare
from stages.lib.frame.progress import progress_bar
from stages.lib.frame.run import run_stage

_IN_THREADS = 512  # so few images are decoded sooner than worker processes start
_AHEAD = 4  # images of each worker that wait in memory
logger = logging.getLogger(__name__)


def main(params: Params) -> None:
    prepare = params.prepare
    with source_of(params) as source:
        rows, rejected = first_rows(source, prepare.max_samples)
        rows, num_test = without_test(rows)
        clear_outputs()
        report_rejected(rejected, len(rows), prepare)
        masks, unmasked = store_masks(rows, source, prepare)
        rows = [row for row in rows if row.sample_id in masks or not row.has_mask]
        stored, broken, hashes, num_converted = store_images(rows, masks, source, prepare)
    rejected = sorted(rejected + unmasked + broken)
    report_rejected(rejected, len(stored), prepare)

    alike = images_alike(stored, hashes, prepare.near_duplicate_bits)
    samples = list(samples_of(stored, alike, {row.sample_id: row for row in rows}, prepare))
    num_train = sum(sample.split == TRAIN for sample in samples)
    check_splits(num_train, len(samples), prepare)
    write_captions(PAIR_CAPTIONS, samples, fingerprint_of_images(stored))
    bind_masks(PAIR_MASKS, fingerprint_of_images(stored))
    metrics = {
        "num_samples": len(samples),
        "num_train_samples": num_train,
        "num_validation_samples": len(samples) - num_train,
        "num_test_samples_left_out": num_test,
        "num_captions": sum(len(sample.captions) for sample in samples),
        "num_duplicate_images": len(stored) - len({image.image_sha256 for image in stored}),
        "num_near_duplicate_images": len(set(alike)) - len(set(alike.values())),
        "num_masks": sum(image.sample_id in masks for image in stored),
        "num_converted_to_srgb": num_converted,
        "num_rejected": len(rejected),
        "num_unlisted_files": source.num_unlisted_files,
    }
    write_json(PREPARE_METRICS, metrics)
    logger.info("%s: %s", PAIRS, ", ".join(f"{name} {value}" for name, value in metrics.items()))


def source_of(params: Params) -> contextlib.AbstractContextManager[PairSource]:
    """What the parameters name, opened."""
    prepare = params.prepare
    usual = Reading(prepare.caption_column, prepare.render_resolution)
    if prepare.hub_id is not None:
        hub = open_hub_source(prepare.hub_id, str(prepare.revision), prepare.subset, usual)
        return contextlib.nullcontext(hub)
    if prepare.sources is None:
        return open_source(Path(str(prepare.source)), usual)
    check_declared([source.path for source in prepare.sources], params)
    return open_sources(
        {
            source.path: Reading(
                source.caption_column or usual.caption_column,
                usual.render_resolution,
                source.caption_prefix,
                source.repeats,
            )
            for source in prepare.sources
        }
    )


def name_of(prepare: Prepare) -> str:
    """What messages call the source."""
    return str(prepare.source) if prepare.hub_id is None else f"{prepare.hub_id}@{prepare.revision}"


def check_declared(paths: Sequence[str], params: Params) -> None:
    """Raise StageError for a source whose changes DVC would not notice."""
    listed = [path.resolve() for path in inputs_of(declared("prepare"), params)]
    for index, path in enumerate(paths):
        if listed and not any(Path(path).resolve().is_relative_to(each) for each in listed):
            raise StageError(
                f"params.yaml: prepare.sources[{index}].path {path}: expected it below prepare.source "
                f"{params.prepare.source}, whose changes DVC notices; move it there, or list it "
                "among the deps of "
                "prepare in dvc.yaml"
            )


def first_rows(source: PairSource, max_samples: int | None) -> tuple[list[SourceRow], list[RejectedRow]]:
    """The first ``max_samples`` rows by sample_id, and the rejected ones among them."""
    if max_samples is None or max_samples >= len(source.rows):
        return source.rows, source.rejected
    rows = source.rows[:max_samples]
    return rows, [row for row in source.rejected if row.name <= rows[-1].sample_id]


def without_test(rows: list[SourceRow]) -> tuple[list[SourceRow], int]:
    """Rows without the test split of a source that has one, and how many are left out.

    A source without a validation split is validated on its test split instead. Splits of other names are
    left out.
    """
    found = {row.split for row in rows}
    used = {None, TRAIN, VALIDATION if VALIDATION in found else TEST}
    if others := sorted(str(split) for split in found - used - {TEST}):
        logger.warning("splits that are neither trained nor validated on: %s", ", ".join(others))
    kept = [row for row in rows if row.split in used]
    return kept, len(rows) - len(kept)


def clear_outputs() -> None:
    """Remove what an earlier run of this stage has written, and nothing that lies beside it."""
    fresh_directory(PAIR_IMAGES)
    fresh_directory(PAIR_MASKS)
    for path in (PAIR_CAPTIONS, REJECTED_PAIRS, PREPARE_METRICS):
        path.unlink(missing_ok=True)


def store_masks(
    rows: Sequence[SourceRow], source: PairSource, prepare: Prepare
) -> tuple[dict[str, Size], list[RejectedRow]]:
    """Store the masks: their sizes by sample_id, and the rows whose masks are broken."""
    broken: list[RejectedRow] = []
    masked = [row.sample_id for row in rows if row.has_mask]

    def load(sample_ids: list[str]) -> Iterator[StoredImage | None]:
        check = functools.partial(checked_mask, prepare.max_image_pixels)
        results = map_in_order(
            check, source.masks(sample_ids), count_cores(), _AHEAD, len(masked) > _IN_THREADS
        )
        for sample_id, (_, result) in zip(sample_ids, results, strict=True):
            if isinstance(result, str):
                broken.append(RejectedRow(sample_id, f"its mask: {result}"))
            yield None if isinstance(result, str) else result

    stored = write_images(PAIR_MASKS, masked, load)
    return {mask.sample_id: Size(mask.width, mask.height) for mask in stored}, broken


def store_images(
    rows: Sequence[SourceRow], masks: dict[str, Size], source: PairSource, prepare: Prepare
) -> tuple[list[ImageEntry], list[RejectedRow], dict[str, int], int]:
    """Check and store images on all cores.

    Returns:
        What is stored, what is broken, the difference hashes by image_sha256 where near duplicates are asked
        for, and how many images are converted to sRGB.
    """
    broken: list[RejectedRow] = []
    hashes: dict[str, int] = {}
    num_workers, num_converted = count_cores(), 0
    check = functools.partial(checked, prepare.max_image_pixels, prepare.near_duplicate_bits is not None)
    with progress_bar("images", "images", len(rows)) as progress:

        def load(sample_ids: list[str]) -> Iterator[StoredImage | None]:
            nonlocal num_converted
            results = map_in_order(
                check, source.images(sample_ids), num_workers, _AHEAD * num_workers, len(rows) > _IN_THREADS
            )
            for sample_id, (content, result) in zip(sample_ids, results, strict=True):
                progress.update()
                if not isinstance(result, str):
                    size = Size(result.image.width, result.image.height)
                    if (of_mask := masks.get(sample_id, size)) != size:
                        result = f"its mask is of {of_mask} pixels, it is of {size}"
                if isinstance(result, str):
                    broken.append(RejectedRow(sample_id, result))
                    yield None
                    continue
                image, is_converted, difference = result
                num_converted += is_converted
                if difference is not None:
                    hashes[str(image.image_sha256)] = difference
                yield image._replace(data=content) if isinstance(content, bytes) and not image.data else image

        stored = write_images(PAIR_IMAGES, [row.sample_id for row in rows], load)
    return stored, broken, hashes, num_converted


def images_alike(stored: Sequence[ImageEntry], hashes: dict[str, int], bits: int | None) -> dict[str, str]:
    """image_sha256 -> the smallest one of the images that look like it, of itself where none does."""
    digests = sorted({image.image_sha256 for image in stored})
    if bits is None:
        return dict(zip(digests, digests, strict=True))
    first = groups_alike([hashes[digest] for digest in digests], bits)
    return {digest: digests[position] for digest, position in zip(digests, first, strict=True)}


def samples_of(
    stored: Sequence[ImageEntry], alike: dict[str, str], row_of: dict[str, SourceRow], prepare: Prepare
) -> Iterator[SampleCaptions]:
    """The captions and the split of each image; training captions as variants, where these are asked for."""
    for image in stored:
        row = row_of[image.sample_id]
        split = split_of(alike[image.image_sha256], prepare.split_seed, prepare.validation_fraction)
        if row.split is not None:
            split = TRAIN if row.split == TRAIN else VALIDATION
        captions = row.captions
        if prepare.caption_variants and split == TRAIN:
            options = (prepare.caption_variants, prepare.keep_tags, prepare.tag_dropout, prepare.variant_seed)
            captions = tuple(variant for caption in captions for variant in tag_variants(caption, *options))
        yield SampleCaptions(image.sample_id, captions, split, row.repeats)


def report_rejected(rejected: list[RejectedRow], num_usable: int, prepare: Prepare) -> None:
    """Write rejected.jsonl; fail if nothing is usable or too much is not."""
    write_json_lines(REJECTED_PAIRS, [{"name": row.name, "reason": row.reason} for row in rejected])
    write_sum(REJECTED_PAIRS)
    num_rows = len(rejected) + num_usable
    fraction = len(rejected) / max(1, num_rows)
    if num_usable and fraction <= prepare.max_rejected_fraction:
        return
    first = [f"\n  {row.name}: {row.reason}" for row in rejected[:5]]
    more = f"\n  and {len(rejected) - 5} more" if len(rejected) > 5 else ""
    raise StageError(
        f"{name_of(prepare)}: {len(rejected)} of {num_rows} rows cannot be used ({fraction:.1%}), expected "
        f"one usable row or more and at most {prepare.max_rejected_fraction:.1%} rejected"
        f"{''.join(first)}{more}\n"
        f"{REJECTED_PAIRS} lists all until the stage runs again; mend them or raise "
        "prepare.max_rejected_fraction"
    )


def check_splits(num_train: int, num_samples: int, prepare: Prepare) -> None:
    """Fail without training samples; warn without validation samples that were asked for."""
    if not num_train:
        raise StageError(
            f"{name_of(prepare)}: all {num_samples} samples fall to validation, expected some to train on; "
            "add samples, or change prepare.validation_fraction or prepare.split_seed"
        )
    if num_train == num_samples and prepare.validation_fraction > 0:
        logger.warning(
            "%s: none of %d samples falls to %s with prepare.validation_fraction %g, so no "
            "validation loss can be measured; add samples, or raise it, or change prepare.split_seed",
            name_of(prepare),
            num_samples,
            VALIDATION,
            prepare.validation_fraction,
        )


if __name__ == "__main__":
    run_stage("prepare", ("prepare",), main)
