"""Turn what was measured into numbers with intervals. No model is loaded, no picture is made.

Reads  data/baseline/measurements.safetensors, data/evaluation/measurements.safetensors,
       data/evaluation/pictures.json
Writes data/baseline/metrics.json; data/evaluation: metrics.json, summary.json, report.json
Params evaluate.memorisation_threshold, evaluate.bootstrap_*
"""

from __future__ import annotations

from stages.lib.core.files import write_json
from stages.lib.core.paths import (
    BASELINE_MEASUREMENTS,
    BASELINE_METRICS,
    EVALUATION_MEASUREMENTS,
    EVALUATION_METRICS,
    EVALUATION_PICTURES,
    EVALUATION_REPORT,
    EVALUATION_SUMMARY,
)
from stages.lib.core.sums import hash_file, read_sealed_json, remedy, write_sealed_json
from stages.lib.evaluation.measuring.measurements import check_same_problems, read_measurements
from stages.lib.evaluation.report import base_numbers, compared_numbers, report_entries, summary_of
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage


def main(params: Params) -> None:
    options = params.evaluate
    base, reference = read_measurements(BASELINE_MEASUREMENTS, "baseline")
    tuned, _ = read_measurements(EVALUATION_MEASUREMENTS, "evaluate")
    check_same_problems(base, tuned)
    pictures = read_sealed_json(EVALUATION_PICTURES, "evaluate")
    if pictures["measurements_sha256"] != hash_file(EVALUATION_MEASUREMENTS):
        raise StageError(
            f"{EVALUATION_PICTURES}: expected what was made with {EVALUATION_MEASUREMENTS}, got that of "
            f"another run; {remedy('evaluate')}"
        )

    entries = report_entries(base, tuned, reference, options)
    numbers = compared_numbers(entries)
    write_json(BASELINE_METRICS, base_numbers(base, reference, options))
    write_json(EVALUATION_METRICS, numbers)
    write_json(EVALUATION_SUMMARY, summary_of(numbers))
    write_sealed_json(EVALUATION_REPORT, {**pictures, "metrics": entries})


if __name__ == "__main__":
    run_stage(
        "report",
        (
            "evaluate.memorisation_threshold",
            "evaluate.bootstrap_resamples",
            "evaluate.bootstrap_level",
            "evaluate.bootstrap_seed",
        ),
        main,
    )
