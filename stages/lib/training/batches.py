"""Which samples a training step sees, and every random number it uses.

Everything is a function of (seed, global_step): the batch of step 700 is the same after a resume,
and on four processes, each of which takes its slice of it. A batch is made of one bucket: of
latents of one shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stages.lib.core.draws import generator
from stages.lib.core.paths import PAIR_CAPTIONS
from stages.lib.data.pairs import SampleCaptions
from stages.lib.diffusion.noise import draw_timesteps, offset_noise, perturbed_noise
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Train


@dataclass(frozen=True)
class TrainingSet:
    """What may be drawn. An image in several resolutions is a sample in each of them.

    Attributes:
        sample_ids: S names.
        latent_rows: (S,) int64 rows of the latents store.
        caption_rows: for each sample the rows of its captions in the captions store.
        empty_row: row of "" in the captions store.
        num_views: views stored of each image.
        buckets: (S,) int64 number of each sample's bucket.
        latent_shapes: (4, h, w) of each bucket.
        repeats: (S,) int64, 1 or more: how often an epoch draws each sample.
    """

    sample_ids: list[str]
    latent_rows: torch.Tensor
    caption_rows: list[list[int]]
    empty_row: int
    num_views: int
    buckets: torch.Tensor
    latent_shapes: Sequence[Sequence[int]]
    repeats: torch.Tensor

    @functools.cached_property
    def members(self) -> list[list[int]]:
        """What an epoch draws of each bucket: positions of its samples, each as often as it is repeated."""
        return [
            torch.repeat_interleave(positions, self.repeats[positions]).tolist()
            for number in range(len(self.latent_shapes))
            for positions in [(self.buckets == number).nonzero().flatten()]
        ]

    @property
    def num_draws(self) -> int:
        """Samples drawn in an epoch, each as often as it is repeated."""
        return sum(map(len, self.members))

    def num_steps(self, num_epochs: int, batch_size: int) -> int:
        """Optimizer steps of some epochs; what fills no batch of one shape is left to the next."""
        return _first_step(tuple(map(len, self.members)), batch_size, num_epochs)


def training_set(samples: list[SampleCaptions], latents: Latents, conditioning: Conditioning) -> TrainingSet:
    """The samples of the training split, joined to their latents and captions by name.

    An image is drawn from each of the resolutions that it is there in.

    Raises:
        StageError: if there is none, or one was not encoded.
    """
    chosen = [sample for sample in samples if sample.split == "train"]
    if not chosen:
        raise StageError(f"{PAIR_CAPTIONS}: expected samples to train on, got none; run `dvc repro prepare`")
    rows_of_each = latents.rows_of_each([sample.sample_id for sample in chosen])
    rows = torch.tensor([row for rows in rows_of_each for row in rows])
    drawn = [sample for sample, rows in zip(chosen, rows_of_each, strict=True) for _ in rows]
    return TrainingSet(
        sample_ids=[sample.sample_id for sample in drawn],
        latent_rows=rows,
        caption_rows=[conditioning.rows(list(sample.captions)).tolist() for sample in drawn],
        empty_row=conditioning.empty_row,
        num_views=latents.num_views,
        buckets=latents.bucket_of(rows),
        latent_shapes=[bucket.mean.shape[2:] for bucket in latents.buckets],
        repeats=torch.tensor([sample.repeats for sample in drawn]),
    )


def num_train_steps(options: Train, data: TrainingSet) -> int:
    """Optimizer steps of the whole run, given in steps or in epochs.

    Raises:
        StageError: if the epochs fill no batch, or end before the warm-up does.
    """
    if options.num_train_epochs is None:
        assert options.max_train_steps is not None  # params are validated: one of the two is given
        return options.max_train_steps
    num_steps = data.num_steps(options.num_train_epochs, options.train_batch_size)
    if not num_steps or num_steps < options.lr_warmup_steps:
        raise StageError(
            f"params.yaml: train.num_train_epochs {options.num_train_epochs} of {data.num_draws} "
            f"samples make {num_steps} steps of train_batch_size {options.train_batch_size}: expected at "
            f"least one, and no fewer than lr_warmup_steps {options.lr_warmup_steps}; "
            "set more epochs or a shorter warm-up"
        )
    return num_steps


def parts_of_process(options: Train, process_index: int, num_processes: int) -> tuple[range, int]:
    """Which of the equal parts of a step's batch a process takes, and how many there are.

    Raises:
        StageError: if the batch cannot be split over processes and accumulation steps.
    """
    num_parts = num_processes * options.gradient_accumulation_steps
    if options.train_batch_size % num_parts:
        raise StageError(
            f"params.yaml: train.train_batch_size {options.train_batch_size} cannot be split over "
            f"{num_processes} processes x {options.gradient_accumulation_steps} accumulation steps; "
            f"use a multiple of {num_parts}"
        )
    return range(process_index, num_parts, num_processes), num_parts


@dataclass(frozen=True)
class Batch:
    """One optimizer step's samples and draws; B is the effective batch size.

    Attributes:
        samples: (B,) int64 positions in the training set.
        latent_rows, views, caption_rows, timesteps: (B,) int64.
        posterior_noise: (B, 4, h, w) float32, standard normal.
        noise: (B, 4, h, w) float32, what the target is made of.
        input_noise: (B, 4, h, w) float32, what the latents are mixed with.
    """

    samples: torch.Tensor
    latent_rows: torch.Tensor
    views: torch.Tensor
    caption_rows: torch.Tensor
    timesteps: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    input_noise: torch.Tensor

    def part(self, index: int, num_parts: int) -> Batch:
        """The ``index``-th of ``num_parts`` equal slices."""
        return Batch(*(value.chunk(num_parts)[index] for value in vars(self).values()))


def draw_batch(
    training_set: TrainingSet, options: Train, global_step: int, num_train_timesteps: int
) -> Batch:
    """Draw the batch of one optimizer step.

    Samples of a bucket follow one permutation an epoch, of all their repeats together, so that each has
    had its turns before any has more; buckets come in a random order, each as often as its share of
    the turns asks. Of several views and captions one of each is drawn; ``caption_dropout`` of the
    samples get the empty caption (Ho and Salimans 2022, algorithm 1).
    """
    seed, batch_size = options.seed, options.train_batch_size
    sizes = tuple(map(len, training_set.members))
    bucket, turn = bucket_turn(sizes, batch_size, seed, global_step)
    members, num_samples = training_set.members[bucket], sizes[bucket]
    order = _orders(num_samples, seed, bucket)
    positions = range(turn * batch_size, (turn + 1) * batch_size)
    samples = [members[order(p // num_samples)[p % num_samples]] for p in positions]
    shape = (batch_size, *training_set.latent_shapes[bucket])

    def stream(purpose: str) -> torch.Generator:
        return generator(seed, purpose, global_step)

    noise = torch.randn(shape, generator=stream("noise"))
    if options.noise_offset:
        channel_noise = torch.randn(*shape[:2], 1, 1, generator=stream("noise offset"))
        noise = offset_noise(noise, channel_noise, options.noise_offset)
    input_noise = noise
    if options.input_perturbation:
        perturbation = torch.randn(shape, generator=stream("input perturbation"))
        input_noise = perturbed_noise(noise, perturbation, options.input_perturbation)
    choice = torch.rand(batch_size, generator=stream("caption")).tolist()
    dropped = torch.rand(batch_size, generator=stream("caption dropout")) < options.caption_dropout
    caption_rows = torch.tensor(
        [_pick(training_set.caption_rows[sample], u) for sample, u in zip(samples, choice, strict=True)]
    )
    caption_rows[dropped] = training_set.empty_row
    index = torch.tensor(samples)
    return Batch(
        samples=index,
        latent_rows=training_set.latent_rows[index],
        views=torch.randint(training_set.num_views, (batch_size,), generator=stream("view")),
        caption_rows=caption_rows,
        timesteps=draw_timesteps(
            options.timestep_sampling, batch_size, num_train_timesteps, stream("timestep")
        ),
        posterior_noise=torch.randn(shape, generator=stream("posterior")),
        noise=noise,
        input_noise=input_noise,
    )


def bucket_turn(sizes: tuple[int, ...], batch_size: int, seed: int, global_step: int) -> tuple[int, int]:
    """Which bucket a step draws from, and how many steps drew from it before.

    After e epochs a bucket of n samples has had floor(e * n / batch_size) turns: what does not
    fill a batch is carried into the next epoch.
    """
    epoch = global_step * batch_size // sum(sizes)
    while _first_step(sizes, batch_size, epoch + 1) <= global_step:
        epoch += 1
    return _epoch_turns(sizes, batch_size, seed, epoch)[global_step - _first_step(sizes, batch_size, epoch)]


def _first_step(sizes: tuple[int, ...], batch_size: int, epoch: int) -> int:
    return sum(epoch * size // batch_size for size in sizes)


@functools.lru_cache(maxsize=2)
def _epoch_turns(sizes: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> Sequence[tuple[int, int]]:
    next_turn = [epoch * size // batch_size for size in sizes]
    turns = [(epoch + 1) * size // batch_size for size in sizes]
    buckets = [number for number in range(len(sizes)) for _ in range(next_turn[number], turns[number])]
    drawn = []
    for index in torch.randperm(len(buckets), generator=generator(seed, "bucket order", epoch)).tolist():
        bucket = buckets[index]
        drawn.append((bucket, next_turn[bucket]))
        next_turn[bucket] += 1
    return drawn


@functools.lru_cache(maxsize=4096)  # more than there are buckets
def _orders(num_samples: int, seed: int, bucket: int) -> Callable[[int], Sequence[int]]:
    """Epoch -> permutation of a bucket; epochs come in order, so two are kept."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Sequence[int]:
        return torch.randperm(num_samples, generator=generator(seed, "order", bucket, epoch)).tolist()

    return order


def _pick(rows: list[int], u: float) -> int:
    return rows[int(u * len(rows))]
