"""What each training step takes; a thread makes it ready while a GPU computes the step before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.core.devices import to_device
from stages.lib.core.paths import ENCODED_CAPTIONS, LATENTS, PAIR_CAPTIONS
from stages.lib.data.pairs import SampleCaptions
from stages.lib.diffusion.validation import check_held_out
from stages.lib.encoding.conditioning import Conditioning, read_conditioning
from stages.lib.encoding.latents import Latents, read_latents, read_samples
from stages.lib.frame.params import Train
from stages.lib.store.zarr_store import store_bytes
from stages.lib.training.batches import Batch, TrainingSet, draw_batch, training_set

NUM_AHEAD = 2  # steps whose data wait in memory


@dataclass(frozen=True)
class Part:
    """What one forward pass takes, on its device.

    Attributes:
        batch: the samples and draws, on the CPU.
        mean, logvar: (B, 4, h, w) float16, unscaled.
        posterior_noise, noise, input_noise: (B, 4, h, w) float32; see `Batch`.
        timesteps: (B,) int64.
        conditions: keyword arguments of the UNet's forward, see `unet_inputs` of a family, float32.
        mask: (B, 1, h, w) float16 in [0, 1], None where images have no masks.
    """

    batch: Batch
    mean: torch.Tensor
    logvar: torch.Tensor
    posterior_noise: torch.Tensor
    noise: torch.Tensor
    input_noise: torch.Tensor
    timesteps: torch.Tensor
    conditions: dict[str, Any]
    mask: torch.Tensor | None


def load_part(batch: Batch, latents: Latents, conditioning: Conditioning, device: torch.device) -> Part:
    """Bring what ``batch`` names to ``device``."""
    mean, logvar = latents.moments(batch.latent_rows, batch.views, device)
    of_caption = conditioning.conditions(batch.caption_rows, device)
    of_view = latents.conditions(batch.latent_rows, batch.views, device)
    return Part(
        batch=batch,
        mean=mean,
        logvar=logvar,
        posterior_noise=to_device(batch.posterior_noise, device),
        noise=to_device(batch.noise, device),
        input_noise=to_device(batch.input_noise, device),
        timesteps=to_device(batch.timesteps, device),
        conditions=conditioning.family.unet_inputs({**of_caption, **of_view}),
        mask=latents.masks(batch.latent_rows, batch.views, device),
    )


@dataclass(frozen=True)
class TrainingData:
    """What is trained on and what is held out.

    Attributes:
        latents, conditioning: of all samples.
        samples: of both splits, those whose images were encoded.
        training_set: what may be drawn.
    """

    latents: Latents
    conditioning: Conditioning
    samples: list[SampleCaptions]
    training_set: TrainingSet

    @property
    def main_shape(self) -> tuple[int, ...]:
        """(4, h, w) that most images to train on have, each in its nominal resolution."""
        rows = self.latents.rows(list(dict.fromkeys(self.training_set.sample_ids)))
        most = int(self.latents.bucket_of(rows).bincount().argmax())  # of several the first
        return tuple(self.training_set.latent_shapes[most])

    def parts_of_step(
        self,
        options: Train,
        num_train_timesteps: int,
        indices: range,
        num_parts: int,
        device: torch.device,
        global_step: int,
    ) -> list[Part]:
        """The parts ``indices`` of the ``num_parts`` that a step's batch is split into, on ``device``."""
        batch = draw_batch(self.training_set, options, global_step, num_train_timesteps)
        parts = (batch.part(index, num_parts) for index in indices)
        return [load_part(part, self.latents, self.conditioning, device) for part in parts]


def read_training_data(options: Train) -> TrainingData:
    """Open what the encoders made; in memory as a whole where ``max_resident_bytes`` allows.

    Raises:
        StageError: if a store is missing or damaged, or lacks a sample or a caption.
    """
    resident = store_bytes(LATENTS) + store_bytes(ENCODED_CAPTIONS) <= options.max_resident_bytes
    latents, conditioning = read_latents(LATENTS, resident), read_conditioning(ENCODED_CAPTIONS, resident)
    samples = read_samples(latents, conditioning, PAIR_CAPTIONS)
    check_held_out(samples, options)
    return TrainingData(latents, conditioning, samples, training_set(samples, latents, conditioning))


class Feed:
    """Iterates over (global_step, its parts); `wait_seconds` is how long training stood still for them.

    Args:
        parts_of: makes the parts of a step; called in the order of the steps.
        steps: to run.
        device: that trains. A CPU makes its own parts: a second thread would only take its cores.
    """

    def __init__(self, parts_of: Callable[[int], list[Part]], steps: range, device: torch.device) -> None:
        self.wait_seconds = 0.0
        self._parts_of = parts_of
        self._steps = steps
        self._iterate = self._in_turn if device.type == "cpu" else self._ahead

    def __iter__(self) -> Iterator[tuple[int, list[Part]]]:
        return self._iterate()

    def _in_turn(self) -> Iterator[tuple[int, list[Part]]]:
        for global_step in self._steps:
            started = time.monotonic()
            parts = self._parts_of(global_step)
            self.wait_seconds += time.monotonic() - started
            yield global_step, parts

    def _ahead(self) -> Iterator[tuple[int, list[Part]]]:
        ahead: deque[Future[list[Part]]] = deque()
        upcoming = iter(self._steps)
        with ThreadPoolExecutor(max_workers=1) as thread:
            for global_step in self._steps:
                while len(ahead) <= NUM_AHEAD and (step := next(upcoming, None)) is not None:
                    ahead.append(thread.submit(self._parts_of, step))
                started = time.monotonic()
                parts = ahead.popleft().result()
                self.wait_seconds += time.monotonic() - started
                yield global_step, parts
