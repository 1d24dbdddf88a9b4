"""Which samples a training step sees, and every random number it uses.

Everything is a function of (seed, global_step): the batch of step 700 is the same after a resume,
and on four processes, each of which takes its slice of it. A batch is made of one bucket: of
latents of one shape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.lib.draws import generator
from stages.lib.params import Train


@dataclass(frozen=True)
class TrainingSet:
    """What may be drawn.

    Attributes:
        sample_ids: S names.
        latent_rows: (S,) int64 rows of the latents store.
        caption_rows: for each sample the rows of its captions in the captions store.
        empty_row: row of "" in the captions store.
        num_views: views stored of each image.
        buckets: (S,) int64 number of each sample's bucket.
        latent_shapes: (4, h, w) of each bucket.
    """

    sample_ids: list[str]
    latent_rows: torch.Tensor
    caption_rows: list[list[int]]
    empty_row: int
    num_views: int
    buckets: torch.Tensor
    latent_shapes: Sequence[Sequence[int]]

    @functools.cached_property
    def members(self) -> list[list[int]]:
        """Positions of the samples of each bucket."""
        return [
            (self.buckets == number).nonzero().flatten().tolist() for number in range(len(self.latent_shapes))
        ]


@dataclass(frozen=True)
class Batch:
    """One optimizer step's samples and draws; B is the effective batch size.

    Attributes:
        samples: (B,) int64 positions in the training set.
        latent_rows, views, caption_rows, timesteps: (B,) int64.
        posterior_noise, noise: (B, 4, h, w) float32, standard normal.
    """

    samples: torch.Tensor
    latent_rows: torch.Tensor
    views: torch.Tensor
    caption_rows: torch.Tensor
    timesteps: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor

    def part(self, index: int, num_parts: int) -> Batch:
        """The ``index``-th of ``num_parts`` equal slices."""
        return Batch(*(value.chunk(num_parts)[index] for value in vars(self).values()))

    def draws(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """posterior_noise, noise and timesteps on ``device``."""
        return self.posterior_noise.to(device), self.noise.to(device), self.timesteps.to(device)


def draw_batch(
    training_set: TrainingSet, options: Train, global_step: int, num_train_timesteps: int
) -> Batch:
    """Draw the batch of one optimizer step.

    Samples of a bucket follow one permutation an epoch, so that each is seen once before any is seen
    twice; buckets come in a random order, each as often as its share of the samples asks;
    timesteps are uniform (Ho et al. 2020, algorithm 1); ``caption_dropout`` of the samples get the
    empty caption (Ho and Salimans 2022, algorithm 1).
    """
    seed, batch_size = options.seed, options.train_batch_size
    sizes = tuple(map(len, training_set.members))
    bucket, turn = bucket_turn(sizes, batch_size, seed, global_step)
    members, num_samples = training_set.members[bucket], sizes[bucket]
    positions = range(turn * batch_size, (turn + 1) * batch_size)
    samples = [
        members[_permutation(num_samples, seed, bucket, p // num_samples)[p % num_samples]] for p in positions
    ]
    shape = (batch_size, *training_set.latent_shapes[bucket])

    def stream(purpose: str) -> torch.Generator:
        return generator(seed, purpose, global_step)

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
        timesteps=torch.randint(num_train_timesteps, (batch_size,), generator=stream("timestep")),
        posterior_noise=torch.randn(shape, generator=stream("posterior")),
        noise=torch.randn(shape, generator=stream("noise")),
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


@functools.lru_cache(maxsize=64)
def _permutation(num_samples: int, seed: int, bucket: int, epoch: int) -> Sequence[int]:
    return torch.randperm(num_samples, generator=generator(seed, "order", bucket, epoch)).tolist()


def _pick(rows: list[int], u: float) -> int:
    return rows[int(u * len(rows))]
