"""Two runs on the same held-out samples: differences sample by sample, where they may be taken at all."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
from fsspec.implementations.dirfs import DirFileSystem

from stages.lib.evaluation.intervals import bootstrap_interval, mean_of
from stages.lib.page import comparison
from stages.lib.page.comparison import changes_from_first
from stages.lib.page.pictures import PictureFiles
from stages.lib.page.run import Estimate, Metric, Run, Values
from stages.lib.page.run_outputs import read_run
from tests.evaluations import write_run

LOSS = ("validation_loss", 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Run]:
    """Held-out losses of 0.08, 0.07 and 0.08 again; one CLIP score."""
    found = []
    for index, loss in enumerate((0.08, 0.07, 0.08)):
        root = tmp_path_factory.mktemp("run")
        write_run(root, tuned=index + 1, loss=loss)
        found.append(
            read_run(
                DirFileSystem(root.as_posix(), target_protocol="file"),
                f"run {index}",
                PictureFiles(root / "page.html"),
            )
        )
    return found


def with_loss(run: Run, **changes) -> Run:
    loss, *others = run.metrics
    assert loss.name == "validation_loss"
    return dataclasses.replace(run, metrics=(dataclasses.replace(loss, **changes), *others))


def test_the_change_is_of_each_sample_and_its_interval_scipys(runs):
    first, other = (run.metrics[0].values for run in runs[:2])
    noisy = [value + 0.004 * np.sin(7 * index) for index, value in enumerate(other.tuned)]
    second = with_loss(runs[1], values=other._replace(tuned=tuple(noisy)))
    change = changes_from_first([runs[0], second])[LOSS]
    differences = np.array(noisy) - np.array(first.tuned)
    assert change.value == pytest.approx(differences.mean(), rel=1e-12)
    expected = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    width = expected.high - expected.low
    assert change.low == pytest.approx(expected.low, abs=0.08 * width)
    assert change.high == pytest.approx(expected.high, abs=0.08 * width)
    assert change.high < 0  # settled, while the samples themselves vary ten times as much as the change
    assert np.std(first.tuned) > 5 * abs(change.value)


def test_the_first_run_says_how_intervals_are_drawn(runs):
    def drawing(run: Run, seed: int, num_resamples: int, level: float) -> Run:
        options = {"bootstrap_seed": seed, "bootstrap_resamples": num_resamples, "bootstrap_level": level}
        return dataclasses.replace(run, params=run.params | {"evaluate": options})

    values = runs[1].metrics[0].values
    noisy = tuple(value + 0.004 * np.sin(7 * index) for index, value in enumerate(values.tuned))
    second = drawing(with_loss(runs[1], values=values._replace(tuned=noisy)), 0, 500, 0.95)
    differences = torch.from_numpy(np.array(noisy) - np.array(runs[0].metrics[0].values.tuned))
    for drawn in ((3, 70, 0.95), (3, 70, 0.5), (4, 70, 0.95)):
        change = changes_from_first([drawing(runs[0], *drawn), second])[LOSS]
        expected = bootstrap_interval(mean_of(differences), [range(len(noisy))], *drawn)
        assert [change.low, change.high] == pytest.approx([expected.low, expected.high], rel=1e-9)


def test_equal_runs_differ_by_nothing(runs):
    change = changes_from_first(runs)["validation_loss", 2]
    assert change == Estimate(0.0, 0.0, 0.0)
    assert changes_from_first(runs)["clip_score", 1] == Estimate(0.0, 0.0, 0.0)


def test_only_means_of_the_same_samples_under_the_same_measure_are_paired(runs):
    changes = changes_from_first(runs)
    assert set(changes) == {(name, index) for name in ("validation_loss", "clip_score") for index in (1, 2)}
    values = runs[1].metrics[0].values
    other_samples = values._replace(names=("another.png", *values.names[1:]))
    other_measure = values._replace(base=(values.base[0] + 1e-6, *values.base[1:]))
    for changed in (
        with_loss(runs[1], values=other_samples),
        with_loss(runs[1], values=other_measure),
        with_loss(runs[1], values=None),
        with_loss(runs[1], difference=Estimate(None, None, None)),  # another prediction type
    ):
        assert LOSS not in changes_from_first([runs[0], changed])
        assert LOSS not in changes_from_first([changed, runs[0]])


def test_few_samples_have_no_interval(runs):
    few = [
        with_loss(run, values=run.metrics[0].values._make(column[:4] for column in run.metrics[0].values))
        for run in runs[:2]
    ]
    change = changes_from_first(few)[LOSS]
    assert change.value == pytest.approx(-0.01)
    assert change.low is change.high is None


def test_one_run_has_nothing_to_compare(runs):
    assert changes_from_first(runs[:1]) == {}
    assert changes_from_first([]) == {}


def test_shares_have_the_interval_of_a_difference_of_shares():
    """Where nothing differs the interval is no point: another hundred pictures might differ."""
    zeros = tuple(float(number == 0) for number in range(64))
    values = Values(tuple(map(str, range(64))), zeros, zeros)
    none = Estimate(None, None, None)
    share = Metric("memorised_share", "", "lower", none, none, Estimate(0.0, None, None), none, "", values)
    options = {"bootstrap_seed": 0, "bootstrap_resamples": 1000, "bootstrap_level": 0.95}
    found = comparison._change(share, share, options)
    assert found.value == 0.0
    assert found.low < -0.01 and found.high > 0.01
