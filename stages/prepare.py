"""Read images and captions from their source into data/pairs.

Reads  prepare.source: data/openmoji, a folder, an archive or a table, or several; or a data set of the Hub
Writes data/pairs/images/*.parquet, data/pairs/captions.parquet, data/pairs/rejected.jsonl and its hash,
       data/prepare_metrics.json
Params prepare
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.lib.core.files import fresh_directory, write_json, write_json_lines
from stages.lib.core.paths import PAIR_CAPTIONS, PAIR_IMAGES, PAIRS, PREPARE_METRICS, REJECTED_PAIRS
from stages.lib.core.sums import write_sum
from stages.lib.core.workers import count_cores, map_in_order
from stages.lib.data.caption_text import tag_variants
from stages.lib.data.image_shards import ImageEntry, StoredImage, fingerprint_of_images, write_images
from stages.lib.data.pairs import TRAIN, VALIDATION, SampleCaptions, split_of, write_captions
from stages.lib.data.pictures.formats import UnusableImageError
from stages.lib.data.pictures.storing import CheckedImage, stored_image
from stages.lib.data.sources.listing import PairSource, RejectedRow, SourceRow
from stages.lib.data.sources.opening import Reading, open_source, open_sources
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
        stored, broken, num_converted = store_images(rows, source, prepare)
    rejected = sorted(rejected + broken)
    report_rejected(rejected, len(stored), prepare)

    samples = list(samples_of(stored, {row.sample_id: row for row in rows}, prepare))
    num_train = sum(sample.split == TRAIN for sample in samples)
    check_splits(num_train, len(samples), prepare)
    write_captions(PAIR_CAPTIONS, samples, fingerprint_of_images(stored))
    metrics = {
        "num_samples": len(samples),
        "num_train_samples": num_train,
        "num_validation_samples": len(samples) - num_train,
        "num_test_samples_left_out": num_test,
        "num_captions": sum(len(sample.captions) for sample in samples),
        "num_duplicate_images": len(stored) - len({image.image_sha256 for image in stored}),
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
    """Rows without the test split of a source that has one, and how many that are.

    A source without a validation split is validated on its test split instead.
    """
    if not any(row.split == VALIDATION for row in rows):
        return rows, 0
    kept = [row for row in rows if row.split != TEST]
    return kept, len(rows) - len(kept)


def clear_outputs() -> None:
    """Remove what an earlier run of this stage has written, and nothing that lies beside it."""
    fresh_directory(PAIR_IMAGES)
    for path in (PAIR_CAPTIONS, REJECTED_PAIRS, PREPARE_METRICS):
        path.unlink(missing_ok=True)


def store_images(
    rows: Sequence[SourceRow], source: PairSource, prepare: Prepare
) -> tuple[list[ImageEntry], list[RejectedRow], int]:
    """Decode and store images, on all cores: what is stored, what is broken, how many become sRGB."""
    broken: list[RejectedRow] = []
    num_workers, num_converted = count_cores(), 0
    check = functools.partial(checked, prepare.max_image_pixels)
    with progress_bar("images", "images", len(rows)) as progress:

        def load(sample_ids: list[str]) -> Iterator[StoredImage | None]:
            nonlocal num_converted
            results = map_in_order(
                check, source.images(sample_ids), num_workers, _AHEAD * num_workers, len(rows) > _IN_THREADS
            )
            for sample_id, (content, result) in zip(sample_ids, results, strict=True):
                progress.update()
                if isinstance(result, str):
                    broken.append(RejectedRow(sample_id, result))
                    yield None
                    continue
                num_converted += result.is_converted
                image = result.image
                yield image._replace(data=content) if isinstance(content, bytes) and not image.data else image

        return write_images(PAIR_IMAGES, [row.sample_id for row in rows], load), broken, num_converted


def checked(max_pixels: int, content: bytes | OSError) -> CheckedImage | str:
    """An image as it is stored, without its bytes where they are ``content``, or why it cannot be."""
    if isinstance(content, OSError):
        return f"cannot be read: {content.strerror}"
    try:
        found = stored_image(content, max_pixels)
    except UnusableImageError as error:
        return str(error)
    image = found.image._replace(image_sha256=hashlib.sha256(found.image.data).hexdigest())
    if image.data is content:  # which need not travel back from a worker process
        image = image._replace(data=b"")
    return found._replace(image=image)


def samples_of(
    stored: Sequence[ImageEntry], row_of: dict[str, SourceRow], prepare: Prepare
) -> Iterator[SampleCaptions]:
    """The captions and the split of each image; training captions as variants, where these are asked for."""
    for image in stored:
        row = row_of[image.sample_id]
        split = split_of(image.image_sha256, prepare.split_seed, prepare.validation_fraction)
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
        f"{prepare.source}: {len(rejected)} of {num_rows} rows cannot be used ({fraction:.1%}), expected "
        f"one usable row or more and at most {prepare.max_rejected_fraction:.1%} rejected"
        f"{''.join(first)}{more}\n"
        f"{REJECTED_PAIRS} lists all until the stage runs again; mend them or raise "
        "prepare.max_rejected_fraction"
    )


def check_splits(num_train: int, num_samples: int, prepare: Prepare) -> None:
    """Fail without training samples; warn without validation samples that were asked for."""
    if not num_train:
        raise StageError(
            f"{prepare.source}: all {num_samples} samples fall to validation, expected some to train on; "
            "add samples, or change prepare.validation_fraction or prepare.split_seed"
        )
    if num_train == num_samples and prepare.validation_fraction > 0:
        logger.warning(
            "%s: none of %d samples falls to %s with prepare.validation_fraction %g, so no "
            "validation loss can be measured; add samples, or raise it, or change prepare.split_seed",
            prepare.source,
            num_samples,
            VALIDATION,
            prepare.validation_fraction,
        )


if __name__ == "__main__":
    run_stage("prepare", ("prepare",), main)
