"""A tenth of the bad inputs that benchmarks/bad_inputs.py tries: rejected with a reason, or refused whole."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.bad_inputs.cases import Case
from tests.bad_inputs.every import all_cases, tenth
from tests.bad_inputs.running import run_forked

LIMIT = 60  # seconds, for any machine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what makes the inputs
    CASES = tenth()


@pytest.mark.parametrize("case", CASES, ids=[f"{case.kind}, {case.name}" for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_a_bad_input_does_no_harm(case: Case, tmp_path: Path) -> None:
    judged = run_forked(case, tmp_path / "project", LIMIT)
    assert not judged.problem, f"{judged.outcome}: {judged.problem}\n{judged.line}"


@pytest.mark.filterwarnings("ignore")
def test_there_are_cases_of_every_kind() -> None:
    cases = all_cases()
    assert len(cases) > 1000
    assert {case.kind for case in cases} == {case.kind for case in CASES}
