"""Read images and captions from their source into data/pairs.

Reads  prepare.source: data/openmoji, a folder, or an archive of one
Writes data/pairs/images/*.parquet, data/pairs/captions.parquet, data/pairs/rejected.jsonl and its hash,
       data/prepare_metrics.json
Params prepare
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.lib.core.files import fresh_directory, write_json, write_json_lines
from stages.lib.core.paths import PAIR_CAPTIONS, PAIR_IMAGES, PAIRS, PREPARE_METRICS, REJECTED_PAIRS
from stages.lib.core.sums import write_sum
from stages.lib.data.image_shards import ImageEntry, StoredImage, fingerprint_of_images, write_images
from stages.lib.data.images import UnusableImageError, stored_image
from stages.lib.data.listing import PairSource, RejectedRow, SourceRow
from stages.lib.data.pairs import TRAIN, VALIDATION, SampleCaptions, split_of, write_captions
from stages.lib.data.sources import open_source
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, Prepare
from stages.lib.frame.progress import progress_bar
from stages.lib.frame.run import run_stage

_DECODED_AHEAD = 64  # images in memory at a time
logger = logging.getLogger(__name__)


def main(params: Params) -> None:
    prepare = params.prepare
    fresh_directory(PAIRS)
    fresh_directory(PAIR_IMAGES)
    with open_source(Path(str(prepare.source)), prepare.caption_column, prepare.render_resolution) as source:
        rows, rejected = first_rows(source, prepare.max_samples)
        report_rejected(rejected, len(rows), prepare)
        captions_of = {row.sample_id: row.captions for row in rows}
        stored, broken = store_images(list(captions_of), source.read)
    rejected = sorted(rejected + broken)
    report_rejected(rejected, len(stored), prepare)

    samples = [
        SampleCaptions(
            image.sample_id,
            captions_of[image.sample_id],
            split_of(image.sample_id, prepare.split_seed, prepare.validation_fraction),
        )
        for image in stored
    ]
    num_train = sum(sample.split == TRAIN for sample in samples)
    check_splits(num_train, len(samples), prepare)
    write_captions(PAIR_CAPTIONS, samples, fingerprint_of_images(stored))
    metrics = {
        "num_samples": len(samples),
        "num_train_samples": num_train,
        "num_validation_samples": len(samples) - num_train,
        "num_captions": sum(len(sample.captions) for sample in samples),
        "num_rejected": len(rejected),
        "num_unlisted_files": source.num_unlisted_files,
    }
    write_json(PREPARE_METRICS, metrics)
    logger.info("%s: %s", PAIRS, ", ".join(f"{name} {value}" for name, value in metrics.items()))


def first_rows(source: PairSource, max_samples: int | None) -> tuple[list[SourceRow], list[RejectedRow]]:
    """The first ``max_samples`` rows by sample_id, and the rejected ones among them."""
    if max_samples is None or max_samples >= len(source.rows):
        return source.rows, source.rejected
    rows = source.rows[:max_samples]
    return rows, [row for row in source.rejected if row.name <= rows[-1].sample_id]


def store_images(
    sample_ids: list[str], read: Callable[[str], bytes]
) -> tuple[list[ImageEntry], list[RejectedRow]]:
    """Decode and store images, on all cores; what is stored, and what is broken."""
    broken: list[RejectedRow] = []

    def decoded(sample_id: str) -> StoredImage | RejectedRow:
        try:
            return stored_image(read(sample_id))
        except OSError as error:
            return RejectedRow(sample_id, f"cannot be read: {error.strerror}")
        except UnusableImageError as error:
            return RejectedRow(sample_id, str(error))

    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        progress_bar("images", "images", len(sample_ids)) as progress,
    ):

        def load(members: list[str]) -> Iterator[StoredImage | None]:
            for start in range(0, len(members), _DECODED_AHEAD):
                for result in pool.map(decoded, members[start : start + _DECODED_AHEAD]):
                    progress.update()
                    if isinstance(result, RejectedRow):
                        broken.append(result)
                        yield None
                    else:
                        yield result

        return write_images(PAIR_IMAGES, sample_ids, load), broken


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
