"""Intervals against scipy, by hand, and against what they promise: their coverage."""

import numpy as np
import pytest
import scipy.stats
import torch

from stages.lib.evaluation.distances import frechet_distance
from stages.lib.evaluation.intervals import (
    NUM_GROUPS,
    Interval,
    bootstrap_interval,
    difference,
    jackknife_interval,
    jackknife_weights,
    mean_of,
    remembered,
    resample_weights,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def interval_of_mean(values, labels=None, seed=0, num_resamples=400, level=0.95) -> Interval:
    labels = range(len(values)) if labels is None else labels
    return bootstrap_interval(mean_of(values), [labels], seed, num_resamples, level)


def test_ends_equal_scipys_percentile_interval():
    values = normal(40).exp()
    ours = interval_of_mean(values, num_resamples=20_000, level=0.9)
    reference = scipy.stats.bootstrap(
        (values.numpy(),),
        np.mean,
        n_resamples=20_000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = reference.high - reference.low
    assert ours.estimate == pytest.approx(float(values.mean()))
    assert ours.low == pytest.approx(reference.low, abs=0.02 * width)
    assert ours.high == pytest.approx(reference.high, abs=0.02 * width)


def test_two_samples_are_drawn_independently_as_scipy_does():
    left, right = normal(30).exp(), normal(50, seed=1).exp()

    def ratio(left_weights, right_weights):
        return mean_of(left)(left_weights) / mean_of(right)(right_weights)

    ours = bootstrap_interval(ratio, [range(30), range(50)], 0, 20_000, 0.95)
    reference = scipy.stats.bootstrap(
        (left.numpy(), right.numpy()),
        lambda first, second, axis: first.mean(axis) / second.mean(axis),
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = reference.high - reference.low
    assert ours.low == pytest.approx(reference.low, abs=0.03 * width)
    assert ours.high == pytest.approx(reference.high, abs=0.03 * width)


def test_coverage_of_a_normal_mean():
    intervals = [interval_of_mean(1.0 + normal(40, seed=trial), seed=trial) for trial in range(1500)]
    coverage = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    # With 40 rows a percentile interval falls a little short of 0.95: its variance divides by N.
    expected = 1 - 2 * scipy.stats.t.sf(scipy.stats.norm.ppf(0.975) * np.sqrt(39 / 40), 39)
    assert coverage == pytest.approx(expected, abs=0.015)


def test_coverage_with_several_pictures_a_prompt_needs_the_prompts_as_labels():
    prompts = [prompt for prompt in range(30) for _ in range(4)]
    grouped, single = [], []
    for trial in range(300):
        values = normal(30, seed=trial)[prompts] + 0.5 * normal(120, seed=1000 + trial)
        grouped.append(interval_of_mean(values, prompts, trial))
        single.append(interval_of_mean(values, None, trial))
    covered = [
        np.mean([found.low <= 0.0 <= found.high for found in intervals]) for intervals in (grouped, single)
    ]
    assert 0.91 <= covered[0] <= 0.97
    assert covered[1] < 0.8


def test_resamples_draw_as_many_labels_as_there_are_with_replacement():
    weights = resample_weights(["b", "a", "b", "c"], seed=3, position=0, num_resamples=2000)
    assert torch.equal(weights[:, 0], weights[:, 2])
    assert torch.equal(weights[:, [0, 1, 3]].sum(dim=1), torch.full((2000,), 3.0, dtype=torch.float64))
    counts = weights[:, [0, 1, 3]].flatten()
    expected = scipy.stats.binom.pmf(range(4), 3, 1 / 3)
    shares = [float((counts == count).double().mean()) for count in range(4)]
    np.testing.assert_allclose(shares, expected, atol=0.02)


def test_resamples_are_a_function_of_seed_position_and_labels():
    first = resample_weights(range(20), 1, 0, 50)
    assert torch.equal(first, resample_weights([f"row {row}" for row in range(20)], 1, 0, 50))
    torch.manual_seed(5)
    assert torch.equal(first, resample_weights(range(20), 1, 0, 50))
    assert not torch.equal(first, resample_weights(range(20), 2, 0, 50))
    assert not torch.equal(first, resample_weights(range(20), 1, 1, 50))
    values = normal(20)
    assert interval_of_mean(values) == interval_of_mean(values)
    assert interval_of_mean(values) != interval_of_mean(values, seed=1)


def test_a_paired_difference_cancels_what_both_share():
    shared = 10.0 * normal(60)
    base, tuned = shared + 0.1 * normal(60, seed=1), shared + 0.3 + 0.1 * normal(60, seed=2)
    paired = bootstrap_interval(difference(mean_of(tuned), mean_of(base)), [range(60)], 0, 1000, 0.95)
    by_row = interval_of_mean(tuned - base, num_resamples=1000)
    assert [paired.estimate, paired.low, paired.high] == pytest.approx(
        [by_row.estimate, by_row.low, by_row.high], abs=1e-9
    )
    assert 0.2 < paired.low < 0.3 < paired.high < 0.4
    reference = scipy.stats.bootstrap(
        (tuned.numpy(), base.numpy()),
        lambda first, second, axis: first.mean(axis) - second.mean(axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert paired.low == pytest.approx(reference.low, abs=0.01)
    assert paired.high == pytest.approx(reference.high, abs=0.01)


def test_a_higher_level_is_wider_and_holds_the_estimate():
    values = normal(25)
    narrow, wide = interval_of_mean(values, level=0.5), interval_of_mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_prompts_with_more_pictures_weigh_more_in_every_resample():
    weights = torch.tensor([[2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]).double()
    values = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert mean_of(values)(weights).tolist() == [1.0, 5.0, 2.0]


def test_shares_of_true_rows():
    interval = interval_of_mean(torch.tensor([True, False, False, True]))
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.0, 1.0)


def test_resamples_without_a_value_are_left_out():
    def spread(weights):  # of two rows; undefined where one of them fills the resample
        return torch.where((weights > 0).all(dim=1), 2.0, torch.nan).double()

    assert bootstrap_interval(spread, [range(2)], 0, 100, 0.9) == Interval(2.0, 2.0, 2.0)


# --- jackknife


def students_t(level: float, num_groups: int) -> float:
    z = scipy.stats.norm.ppf((1 + level) / 2)
    first_order = z + (z**3 + z) / (4 * (num_groups - 1))
    assert first_order == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, num_groups - 1), rel=0.03)
    return first_order


@pytest.mark.parametrize(("num_rows", "level"), [(8, 0.95), (10, 0.8)])
def test_leaving_out_single_rows_gives_the_standard_error_of_a_mean(num_rows, level):
    values = normal(num_rows).exp()
    found = jackknife_interval(mean_of(values), [range(num_rows)], 0, level)
    half = students_t(level, num_rows) * float(values.std()) / num_rows**0.5
    expected = [float(values.mean()) + sign * half for sign in (0, -1, 1)]
    assert [found.estimate, found.low, found.high] == pytest.approx(expected, rel=1e-12)


def test_every_row_is_left_out_once_in_groups_drawn_at_random():
    weights = jackknife_weights(range(25), seed=3, position=0, num_groups=10)
    assert weights.shape == (10, 25) and set(weights.flatten().tolist()) == {0.0, 1.0}
    assert (weights.sum(dim=0) == 9).all()
    assert sorted(weights.sum(dim=1).tolist()) == [22.0] * 5 + [23.0] * 5
    for seed, position in ((4, 0), (3, 1)):
        assert not torch.equal(weights, jackknife_weights(range(25), seed, position, 10))
    torch.manual_seed(5)
    assert torch.equal(weights, jackknife_weights([f"row {row}" for row in range(25)], 3, 0, 10))
    together = jackknife_weights(["b", "a", "b", "c"], 0, 0, 3)
    assert torch.equal(together[:, 0], together[:, 2]) and (together.sum(dim=0) == 2).all()


def test_a_jackknife_of_two_samples_equals_one_by_hand():
    left, right = normal(23).exp(), normal(41, seed=1).exp()
    labels = [range(23), range(41)]

    def ratio(left_weights, right_weights):
        return mean_of(left)(left_weights) / mean_of(right)(right_weights)

    found = jackknife_interval(ratio, labels, 7, 0.9)
    kept = [jackknife_weights(rows, 7, position, NUM_GROUPS).bool() for position, rows in enumerate(labels)]
    ratios = [float(left[some].mean() / right[others].mean()) for some, others in zip(*kept, strict=True)]
    variance = (NUM_GROUPS - 1) / NUM_GROUPS * sum((each - np.mean(ratios)) ** 2 for each in ratios)
    half = students_t(0.9, NUM_GROUPS) * variance**0.5
    estimate = float(left.mean() / right.mean())
    assert [found.estimate, found.low, found.high] == pytest.approx(
        [estimate, estimate - half, estimate + half], rel=1e-10
    )


def test_a_jackknife_covers_a_frechet_distance_and_a_bootstrap_does_not():
    """Of what such samples have on average: few pictures raise the distance, whichever the interval."""
    labels, found = [range(40), range(30)], {jackknife_interval: [], bootstrap_interval: []}
    for trial in range(200):
        distance = frechet_distance(normal(40, 8, seed=2 * trial) + 0.3, normal(30, 8, seed=2 * trial + 1))
        found[jackknife_interval].append(jackknife_interval(distance, labels, trial, 0.9))
        found[bootstrap_interval].append(bootstrap_interval(distance, labels, trial, 60, 0.9))
    mean = np.mean([interval.estimate for interval in found[jackknife_interval]])
    covered, biased = (
        np.mean([interval.low <= mean <= interval.high for interval in intervals])
        for intervals in found.values()
    )
    assert 0.85 <= covered <= 0.96
    assert biased < 0.6


def test_a_jackknifed_difference_cancels_what_both_share():
    shared = 10.0 * normal(60)
    base, tuned = shared + 0.1 * normal(60, seed=1), shared + 0.3 + 0.1 * normal(60, seed=2)
    paired = jackknife_interval(difference(mean_of(tuned), mean_of(base)), [range(60)], 0, 0.95)
    by_row = jackknife_interval(mean_of(tuned - base), [range(60)], 0, 0.95)
    assert [paired.estimate, paired.low, paired.high] == pytest.approx(
        [by_row.estimate, by_row.low, by_row.high], abs=1e-9
    )
    assert 0.2 < paired.low < 0.3 < paired.high < 0.4


def test_a_statistic_that_is_remembered_is_computed_once_for_equal_weights():
    calls = []

    def counted(weights):
        calls.append(len(weights))
        return mean_of(torch.arange(12.0))(weights)

    statistic = remembered(counted)
    plain = mean_of(torch.arange(12.0))
    for seed in (0, 0, 1):
        found = jackknife_interval(statistic, [range(12)], seed, 0.95)
        assert found == jackknife_interval(plain, [range(12)], seed, 0.95)
    assert calls == [1, NUM_GROUPS, NUM_GROUPS]
