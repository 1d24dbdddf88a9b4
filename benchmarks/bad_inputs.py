"""What bad inputs lead to: each is rejected with a reason, or refused with one error.

    python benchmarks/bad_inputs.py [--only WORD] [--output benchmarks/results/bad_inputs.json]

The inputs are made by tests/bad_inputs: damaged archives and images, odd tables, names, captions and forms,
with good rows beside them, and some that only look bad. On each the stage prepare runs in its own process,
for a minute at most, and ends as one of

    refused    one error, and none of its rows is taken
    rejected   what is bad is listed with a reason, and the good rows beside it are taken
    taken      it only looked bad: pixels and captions are the right ones
    TRACEBACK, HANG, SILENT CHANGE, or another end than was expected of it

Writes the outcome of each and the line that the user sees. Any of the last makes the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.bad_inputs.every import all_cases  # noqa: E402
from tests.bad_inputs.running import run_forked  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "bad_inputs.json"
LIMIT = 60  # seconds
COLUMNS = ("refused", "rejected", "taken", "traceback", "hang", "silent change", "unexpected")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="of the kinds and names that hold this word")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of what makes the inputs
    found, counts = [], collections.Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as directory:
        for number, case in enumerate(all_cases()):
            if options.only not in f"{case.kind} {case.name}":
                continue
            root = Path(directory, str(number))
            judged = run_forked(case, root, LIMIT)
            shutil.rmtree(root, ignore_errors=True)
            outcome = "unexpected" if judged.problem and judged.outcome in case.may else judged.outcome
            counts[case.kind, outcome] += 1
            line = judged.line.replace(str(root), "...").replace(directory, "...")[:300]
            row = {
                "kind": case.kind,
                "name": case.name,
                "may": case.may,
                "outcome": judged.outcome,
                "line": line,
            }
            found.append(row | ({"problem": judged.problem} if judged.problem else {}))
            if judged.problem:
                print(f"{case.kind}, {case.name}: {judged.outcome}: {judged.problem}\n    {line}", flush=True)
    kinds = sorted({kind for kind, _ in counts})
    for row in (("", *COLUMNS), *((kind, *(counts[kind, column] for column in COLUMNS)) for kind in kinds)):
        print("  ".join(f"{cell!s:>13}" for cell in row))
    problems = sum("problem" in row for row in found)
    print(f"{len(found)} inputs, {problems} that ended otherwise than they should")
    if not options.only:
        options.output.write_text(json.dumps(found, indent=0, ensure_ascii=True) + "\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
