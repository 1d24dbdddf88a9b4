"""Intervals against scipy, by hand, and against what they promise: their coverage."""

import numpy as np
import pytest
import scipy.stats
import torch

from stages.lib.evaluation.distances import cmmd
from stages.lib.evaluation.intervals import (
    Interval,
    ShareChange,
    bootstrap_interval,
    difference,
    jackknife_interval,
    mean_of,
    remembered,
    resample_weights,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def interval_of_mean(values, labels=None, seed=0, num_resamples=400, level=0.95) -> Interval:
    labels = range(len(values)) if labels is None else labels
    return bootstrap_interval(mean_of(values), [labels], seed, num_resamples, level)


@pytest.mark.parametrize("num_rows", [5, 8, 16])
@pytest.mark.parametrize(("draw", "mean"), [(lambda z: z, 0.0), (lambda z: (0.5 * z).exp(), np.exp(0.125))])
def test_intervals_of_means_hold_them_down_to_five_rows(num_rows, draw, mean):
    samples = draw(normal(1000, num_rows, seed=num_rows))
    intervals = [interval_of_mean(sample, seed=trial) for trial, sample in enumerate(samples)]
    covered = np.mean([interval.low <= mean <= interval.high for interval in intervals])
    assert 0.91 <= covered <= 0.975


def test_a_bootstrap_t_equals_one_by_hand():
    values = normal(12).exp()
    weights = resample_weights(range(12), 3, 0, 400)
    t = []
    for counts in weights.long():
        drawn = values.repeat_interleave(counts)
        t.append(float((drawn.mean() - values.mean()) / (drawn.std() / 12**0.5)))
    low, high = np.quantile(t, [0.05, 0.95])
    # repeat_interleave's variance divides by N - 1, as that of the values does.
    se = float(values.std()) / 12**0.5
    found = interval_of_mean(values, seed=3, level=0.9)
    expected = [float(values.mean()) - quantile * se for quantile in (high, low)]
    assert [found.low, found.high] == pytest.approx(expected, rel=1e-9)


def test_values_that_are_all_one_have_an_interval_of_no_width():
    assert interval_of_mean(torch.full((9,), 0.25)) == Interval(0.25, 0.25, 0.25)


@pytest.mark.parametrize(("true", "count"), [(9, 20), (5, 64), (60, 64), (200, 1000), (4, 8)])
def test_a_share_equals_wilsons_of_scipy(true, count):
    found = interval_of_mean(torch.arange(count) < true)
    expected = scipy.stats.binomtest(true, count).proportion_ci(method="wilson")
    ours = [found.low, found.high]
    near_one = count - true <= 3 or true <= 3
    assert not near_one or true in (60, 4)
    if count - true > 3 and true > 3:
        assert ours == pytest.approx([expected.low, expected.high], rel=1e-9)
    assert found.estimate == true / count


@pytest.mark.parametrize("count", [5, 16, 64, 300])
def test_shares_near_none_and_all_are_held_too(count):
    """The probability is summed over all outcomes, nothing is drawn; Wilson's alone falls to 0.84."""
    found = [interval_of_mean(torch.arange(count) < true) for true in range(count + 1)]
    assert found[0].low == 0.0 < found[0].high and found[-1].low < found[-1].high == 1.0
    shares = np.linspace(0.0005, 0.9995, 1500)
    mass = scipy.stats.binom.pmf(np.arange(count + 1)[:, None], count, shares)
    is_held = np.array([[each.low <= share <= each.high for share in shares] for each in found])
    covered = (mass * is_held).sum(axis=0)
    assert covered.min() > 0.89
    assert 0.94 < covered.mean() < 0.985
    poisson = [float(scipy.stats.chi2.ppf(0.05, 2 * true)) / 2 / count for true in (1, 2, 3)]
    if count == 300:
        assert [each.low for each in found[1:4]] == pytest.approx(poisson, rel=1e-6)


def test_none_of_64_may_be_one_in_a_hundred():
    found = interval_of_mean(torch.zeros(64, dtype=torch.bool))
    expected = scipy.stats.binomtest(0, 64).proportion_ci(method="wilson")
    assert (found.estimate, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(expected.high)


@pytest.mark.parametrize("count", [16, 64])
def test_differences_of_paired_shares_are_held(count):
    random, covered = np.random.default_rng(0), []
    base = random.random((1000, count)) < 0.3
    tuned = np.where(random.random((1000, count)) < 0.4, random.random((1000, count)) < 0.6, base)
    for left, right in zip(torch.from_numpy(tuned), torch.from_numpy(base), strict=True):
        change = difference(mean_of(left), mean_of(right))
        assert isinstance(change, ShareChange)
        found = bootstrap_interval(change, [range(count)], 0, 100, 0.95)
        covered.append(found.low <= 0.4 * 0.3 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.995


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


def test_a_higher_level_is_wider_and_holds_the_estimate():
    values = normal(25)
    narrow, wide = interval_of_mean(values, level=0.5), interval_of_mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_prompts_with_more_pictures_weigh_more_in_every_resample():
    weights = torch.tensor([[2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]]).double()
    values = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert mean_of(values)(weights).tolist() == [1.0, 5.0, 2.0]


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


def test_a_paired_difference_cancels_what_both_share():
    shared = 10.0 * normal(60)
    base, tuned = shared + 0.1 * normal(60, seed=1), shared + 0.3 + 0.1 * normal(60, seed=2)
    paired = bootstrap_interval(difference(mean_of(tuned), mean_of(base)), [range(60)], 0, 1000, 0.95)
    by_row = interval_of_mean(tuned - base, num_resamples=1000)
    assert paired == by_row
    assert 0.2 < paired.low < 0.3 < paired.high < 0.4


# --- jackknife


@pytest.mark.parametrize(("num_rows", "level"), [(5, 0.95), (8, 0.95), (10, 0.8)])
def test_leaving_out_single_rows_gives_students_interval_of_a_mean(num_rows, level):
    values = normal(num_rows).exp()
    found = jackknife_interval(mean_of(values), [range(num_rows)], level)
    half = scipy.stats.t.ppf((1 + level) / 2, num_rows - 1) * float(values.std()) / num_rows**0.5
    expected = [float(values.mean()) + sign * half for sign in (0, -1, 1)]
    assert [found.estimate, found.low, found.high] == pytest.approx(expected, rel=1e-2)


def test_rows_of_two_samples_with_one_label_are_left_out_together():
    left, right = normal(20).exp(), normal(20).exp() + 0.01 * normal(20, seed=1)

    def change(left_weights, right_weights):
        return mean_of(left)(left_weights) - mean_of(right)(right_weights)

    together = jackknife_interval(change, [range(20), range(20)], 0.95)
    apart = jackknife_interval(change, [range(20), range(20, 40)], 0.95)
    by_row = jackknife_interval(mean_of(left - right), [range(20)], 0.95)
    assert [together.low, together.high] == pytest.approx([by_row.low, by_row.high], abs=1e-12)
    assert apart.high - apart.low > 20 * (together.high - together.low)
    variance = sum(float(side.var()) / 20 for side in (left, right))
    half = scipy.stats.t.ppf(0.975, 19) * variance**0.5
    assert (apart.high - apart.low) / 2 == pytest.approx(half, rel=1e-3)


def test_a_jackknife_covers_the_distance_of_paired_pictures():
    found, labels = [], (range(24), range(24))
    for trial in range(300):
        captions = normal(24, 12, seed=3 * trial) + 0.5
        sides = [captions + 0.7 * normal(24, 12, seed=3 * trial + side) for side in (1, 2)]
        found.append(jackknife_interval(cmmd(sides[0] + 0.4, sides[1], labels), labels, 0.95))
    mean = np.mean([interval.estimate for interval in found])
    assert 0.92 <= np.mean([interval.low <= mean <= interval.high for interval in found]) <= 0.99


def test_a_statistic_that_is_remembered_is_computed_once_for_equal_weights():
    calls = []

    def counted(weights):
        calls.append(len(weights))
        return mean_of(torch.arange(12.0))(weights)

    statistic = remembered(counted)
    for _ in range(3):
        found = jackknife_interval(statistic, [range(12)], 0.95)
        assert found == jackknife_interval(mean_of(torch.arange(12.0)), [range(12)], 0.95)
    assert calls == [1, 12]
