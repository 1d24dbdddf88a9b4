"""Draws are functions of (seed, step): nothing else moves them."""

import itertools

import pytest
import torch

from stages.lib.core.draws import generator, unit_interval
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.training.batches import (
    TrainingSet,
    bucket_turn,
    draw_batch,
    num_train_steps,
    parts_of_process,
)
from tests.conftest import REPOSITORY, changed

OPTIONS = changed(read_params(REPOSITORY / "params.yaml").train, train_batch_size=8, caption_dropout=0.0)


def training_set(num_samples: int = 20, captions: int = 1) -> TrainingSet:
    return TrainingSet(
        sample_ids=[f"{index}.png" for index in range(num_samples)],
        latent_rows=torch.arange(num_samples) + 100,
        caption_rows=[[1 + index * captions + k for k in range(captions)] for index in range(num_samples)],
        empty_row=0,
        num_views=2,
        buckets=torch.zeros(num_samples, dtype=torch.int64),
        latent_shapes=[(4, 2, 2)],
        repeats=torch.ones(num_samples, dtype=torch.int64),
    )


def draw(step: int, **changes: object):
    return draw_batch(training_set(), changed(OPTIONS, **changes), step, 1000)


def test_the_same_step_is_the_same_batch_and_another_is_not():
    first, again, other = draw(3), draw(3), draw(4)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name)), name
    for name in ("samples", "timesteps", "noise", "posterior_noise"):
        assert not torch.equal(getattr(first, name), getattr(other, name)), name
        assert not torch.equal(getattr(first, name), getattr(draw(3, seed=1), name)), name


def test_every_draw_has_a_stream_of_its_own():
    """A batch rebuilt from the generators: step 3 of 8 of 20 samples begins at the second epoch's fifth."""
    options = changed(OPTIONS, seed=3, noise_offset=0.5, input_perturbation=0.2, caption_dropout=0.4)
    data = training_set(captions=3)
    batch = draw_batch(data, options, 3, 1000)

    def stream(purpose: str) -> torch.Generator:
        return generator(3, purpose, 3)

    shape = (8, 4, 2, 2)
    samples = torch.randperm(20, generator=generator(3, "order", 0, 1))[4:12]
    choice = (3 * torch.rand(8, generator=stream("caption")).double()).long().tolist()
    dropped = (torch.rand(8, generator=stream("caption dropout")) < 0.4).tolist()
    rows = [data.caption_rows[sample][k] for sample, k in zip(samples.tolist(), choice, strict=True)]
    channels = torch.randn(8, 4, 1, 1, generator=stream("noise offset")).double()
    noise = torch.randn(shape, generator=stream("noise")).double() + 0.5 * channels
    disturbed = noise + 0.2 * torch.randn(shape, generator=stream("input perturbation")).double()
    assert 0 < sum(dropped) < 8
    assert torch.equal(batch.samples, samples)
    assert torch.equal(batch.views, torch.randint(2, (8,), generator=stream("view")))
    assert torch.equal(batch.timesteps, torch.randint(1000, (8,), generator=stream("timestep")))
    assert torch.equal(batch.posterior_noise, torch.randn(shape, generator=stream("posterior")))
    assert batch.caption_rows.tolist() == [
        0 if empty else row for row, empty in zip(rows, dropped, strict=True)
    ]
    torch.testing.assert_close(batch.noise.double(), noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.input_noise.double(), disturbed, rtol=0, atol=1e-6)


def test_noise_and_posterior_noise_are_independent_standard_normals():
    noise = torch.cat([draw(step).noise.flatten() for step in range(200)])
    posterior = torch.cat([draw(step).posterior_noise.flatten() for step in range(200)])
    assert abs(noise.mean()) < 0.03
    assert noise.std() == pytest.approx(1.0, abs=0.03)
    assert abs((noise * posterior).mean()) < 0.03


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own():
    seen = torch.cat([draw(step).samples for step in range(5)]).tolist()  # two epochs of 20
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]


def test_rows_follow_the_sample():
    batch = draw(0)
    assert torch.equal(batch.latent_rows, batch.samples + 100)
    assert torch.equal(batch.caption_rows, batch.samples + 1)


def test_parts_are_the_whole_batch_in_order():
    batch = draw(2)
    parts = [batch.part(index, 4) for index in range(4)]
    for name, value in vars(batch).items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value), name


@pytest.mark.parametrize(("num_processes", "num_parts"), [(1, 1), (2, 1), (2, 4), (4, 2)])
def test_processes_share_the_parts_of_a_batch(num_processes, num_parts):
    options = changed(OPTIONS, gradient_accumulation_steps=num_parts)
    shares = [parts_of_process(options, index, num_processes) for index in range(num_processes)]
    assert {total for _, total in shares} == {num_processes * num_parts}
    assert {len(parts) for parts, _ in shares} == {num_parts}
    taken = [part for parts, _ in shares for part in parts]
    assert sorted(taken) == list(range(num_processes * num_parts))


def test_timesteps_and_views_cover_their_range():
    timesteps = torch.cat([draw(step).timesteps for step in range(500)])
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert timesteps.float().mean() == pytest.approx(499.5, abs=15)
    assert set(torch.cat([draw(step).views for step in range(20)]).tolist()) == {0, 1}


def test_caption_dropout_takes_the_empty_row_at_its_rate():
    rows = torch.cat([draw(step, caption_dropout=0.25).caption_rows for step in range(300)])
    assert (rows == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert (draw(0, caption_dropout=1.0).caption_rows == 0).all()


def test_each_of_several_captions_is_chosen():
    data = training_set(num_samples=2, captions=3)
    rows = {row for step in range(50) for row in draw_batch(data, OPTIONS, step, 1000).caption_rows.tolist()}
    assert rows == {1, 2, 3, 4, 5, 6}


def test_streams_differ_by_purpose_and_key():
    draws = [
        torch.rand((), generator=generator(*key)).item()
        for key in ((0, "noise", 1), (0, "noise", 2), (0, "order", 1), (1, "noise", 1), (0, "noise", "1"))
    ]
    assert len(set(draws)) == 5
    values = [unit_interval(0, "split", str(index)) for index in range(2000)]
    assert min(values) >= 0
    assert max(values) < 1
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)


SIZES = (13, 29, 3)  # samples of three buckets; less than a batch, more than one, several


def bucketed() -> TrainingSet:
    buckets = torch.tensor([number for number, size in enumerate(SIZES) for _ in range(size)])
    shuffled = torch.randperm(len(buckets), generator=generator(0, "test"))
    return changed(
        training_set(sum(SIZES)),
        buckets=buckets[shuffled],
        latent_shapes=[(4, 2, 2), (4, 2, 3), (4, 3, 2)],
    )


def test_a_batch_is_drawn_within_one_bucket():
    data = bucketed()
    for step in range(40):
        batch = draw_batch(data, OPTIONS, step, 1000)
        (bucket,) = set(data.buckets[batch.samples].tolist())
        assert batch.noise.shape == batch.posterior_noise.shape == (8, *data.latent_shapes[bucket])


def test_each_bucket_gets_its_share_and_each_sample_its_turn():
    data = bucketed()
    num_steps = 8 * sum(SIZES) // 8  # eight epochs are whole batches in every bucket
    seen = torch.cat([draw_batch(data, OPTIONS, step, 1000).samples for step in range(num_steps)])
    assert torch.bincount(seen).tolist() == [8] * sum(SIZES)
    partly = torch.cat([draw_batch(data, OPTIONS, step, 1000).samples for step in range(17)])
    for number, size in enumerate(SIZES):
        share = (data.buckets[partly] == number).sum().item() / len(partly)
        assert share == pytest.approx(size / sum(SIZES), abs=0.1)


def test_an_epoch_is_put_in_order_once(monkeypatch):
    drawn, randperm = [], torch.randperm

    def watched(num_samples: int, generator: torch.Generator) -> torch.Tensor:
        drawn.append(generator.initial_seed())
        return randperm(num_samples, generator=generator)

    monkeypatch.setattr(torch, "randperm", watched)
    data, options = bucketed(), changed(OPTIONS, seed=1234)
    for step in range(40):
        draw_batch(data, options, step, 1000)
    assert len(drawn) == len(set(drawn)) > 3 * 7


def test_an_epoch_of_many_buckets_is_put_in_order_once(monkeypatch):
    drawn, randperm = [], torch.randperm

    def watched(num_samples: int, generator: torch.Generator) -> torch.Tensor:
        drawn.append(generator.initial_seed())
        return randperm(num_samples, generator=generator)

    monkeypatch.setattr(torch, "randperm", watched)
    num_buckets = 150
    data = changed(
        training_set(16 * num_buckets),
        buckets=torch.arange(16 * num_buckets) % num_buckets,
        latent_shapes=[(4, 2, 2 + number) for number in range(num_buckets)],
    )
    for step in range(2 * num_buckets):
        draw_batch(data, changed(OPTIONS, seed=4321), step, 1000)
    assert len(drawn) == len(set(drawn)) == num_buckets + 1


def test_buckets_come_in_a_mixed_order_that_the_seed_decides():
    def order(seed: int) -> list[int]:
        return [bucket_turn((40, 40), 4, seed, step)[0] for step in range(40)]

    assert order(0) == order(0) != order(1)
    changes = sum(first != second for first, second in itertools.pairwise(order(0)))
    assert 10 < changes < 30


def test_turns_of_a_bucket_count_up_by_one():
    for sizes in [(5,), (13, 29, 3), (1, 1, 1), (100, 1)]:
        next_turn = [0] * len(sizes)
        for step in range(200):
            bucket, turn = bucket_turn(sizes, 8, 0, step)
            assert turn == next_turn[bucket]
            next_turn[bucket] += 1


def test_noise_offset_moves_each_channel_of_target_and_input():
    plain, offset = draw(0), draw(0, noise_offset=0.5)
    shift = offset.noise - plain.noise  # (B, 4, h, w)
    torch.testing.assert_close(shift, shift.mean(dim=(2, 3), keepdim=True).expand_as(shift))
    assert shift.std() > 0.1
    assert torch.equal(offset.input_noise, offset.noise)
    assert torch.equal(plain.input_noise, plain.noise)


def test_stratified_timesteps_fall_one_into_each_part_of_the_schedule():
    parts = (draw(0, timestep_sampling="stratified").timesteps * 8 // 1000).tolist()
    assert sorted(parts) == list(range(8))
    assert sorted((draw(0).timesteps * 8 // 1000).tolist()) != list(range(8))


# --- repeats


def repeated(repeats: list[int]) -> TrainingSet:
    return changed(training_set(len(repeats)), repeats=torch.tensor(repeats))


def test_an_epoch_is_one_permutation_of_all_repeats_together():
    repeats = [1, 3, 1, 2, 5]
    data, options = repeated(repeats), changed(OPTIONS, train_batch_size=4, seed=7)
    turns = [0, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4]
    assert data.num_draws == len(turns)
    for epoch in range(3):
        steps = range(3 * epoch, 3 * epoch + 3)
        seen = torch.cat([draw_batch(data, options, step, 1000).samples for step in steps]).tolist()
        order = torch.randperm(12, generator=generator(7, "order", 0, epoch)).tolist()
        assert seen == [turns[position] for position in order]
        assert [seen.count(sample) for sample in range(5)] == repeats


def test_without_repeats_the_order_is_that_of_the_samples_alone():
    """Of buckets too: held against permutations drawn here, and the buckets' own order beside them."""
    data, options, sizes = bucketed(), changed(OPTIONS, seed=5, train_batch_size=3), SIZES
    assert data.num_draws == sum(SIZES)
    left: dict[int, list[int]] = {number: [] for number in range(3)}
    for number, size in enumerate(sizes):
        members = [index for index, bucket in enumerate(data.buckets.tolist()) if bucket == number]
        for epoch in range(3):
            order = torch.randperm(size, generator=generator(5, "order", number, epoch)).tolist()
            left[number] += [members[position] for position in order]
    step = 0
    for epoch in range(3):
        turns = [(epoch + 1) * size // 3 - epoch * size // 3 for size in sizes]
        buckets = [number for number, count in enumerate(turns) for _ in range(count)]
        order = torch.randperm(len(buckets), generator=generator(5, "bucket order", epoch)).tolist()
        for bucket in [buckets[position] for position in order]:
            expected, left[bucket] = left[bucket][:3], left[bucket][3:]
            assert draw_batch(data, options, step, 1000).samples.tolist() == expected
            step += 1


def test_steps_of_epochs_count_repeats_and_buckets_their_share():
    data = changed(bucketed(), repeats=torch.arange(sum(SIZES)) % 3 + 1)
    drawn = int(data.repeats.sum())
    assert data.num_draws == drawn
    num_steps = data.num_steps(8, 8)
    assert num_steps == drawn
    seen = torch.cat([draw_batch(data, OPTIONS, step, 1000).samples for step in range(num_steps)])
    assert torch.bincount(seen).tolist() == (8 * data.repeats).tolist()
    assert num_train_steps(changed(OPTIONS, num_train_epochs=8, max_train_steps=None), data) == drawn
    short = changed(
        OPTIONS, num_train_epochs=1, max_train_steps=None, train_batch_size=200, lr_warmup_steps=0
    )
    with pytest.raises(StageError, match=f"of {drawn} samples make 0 steps of train_batch_size 200"):
        num_train_steps(short, data)
