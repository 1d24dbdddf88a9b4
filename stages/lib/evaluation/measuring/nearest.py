"""The training image nearest to each picture, by the features of CLIP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stages.lib.frame.errors import StageError

_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Nearest:
    """The training image nearest to each picture by cosine."""

    similarity: torch.Tensor  # (G,) float32
    rows: torch.Tensor  # (G,) int64, into the training images

    def above(self, threshold: float) -> torch.Tensor:
        """Which pictures have a training image nearer than ``threshold``, (G,) bool: its mean is the share.

        Near-duplicates within the data lift it for any model: read it beside that of held-out images.
        """
        return self.similarity > threshold

    def worst_pairs(self, num_pairs: int) -> list[tuple[int, int, float]]:
        """The nearest pairs first: row of the picture, row of the training image, cosine."""
        order = self.similarity.argsort(descending=True, stable=True)[:num_pairs]
        return [(row, int(self.rows[row]), float(self.similarity[row])) for row in order.tolist()]


def nearest_images(generated: torch.Tensor, training: torch.Tensor) -> Nearest:
    """For each generated picture the training image of the highest cosine, the first of equal ones.

    The training images are compared in parts of a few thousand: memory does not grow with their number.

    Raises:
        StageError: if there is no training image.
    """
    if not len(training):
        raise StageError("nearest training images: expected at least 1 training image, got 0")
    pictures = F.normalize(generated)
    similarity = torch.full((len(generated),), -torch.inf)
    rows = torch.zeros(len(generated), dtype=torch.int64)
    for start in range(0, len(training), _CHUNK_ROWS):
        cosines = pictures @ F.normalize(training[start : start + _CHUNK_ROWS]).T  # (G, chunk)
        best, row = cosines.max(dim=1)
        nearer = best > similarity
        similarity = torch.where(nearer, best, similarity)
        rows = torch.where(nearer, row + start, rows)
    return Nearest(similarity, rows)
