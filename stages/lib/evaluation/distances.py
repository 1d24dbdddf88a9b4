"""Metrics on features: fidelity to the prompt, distance to real images, copies of training images.

Features are rows of `clip_features`, for FID of `inception_features`: (N, D) float32, not normalised; each
metric normalises as its source does. Sums run in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stages.lib.core.draws import generator
from stages.lib.frame.errors import StageError

NUM_SIZES = 15  # of the sets that a Fréchet distance is extrapolated from
# Numbers of the rows of both sides, equal where pictures belong together.
Labels = tuple[Sequence[int], Sequence[int]]
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def clip_scores(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """CLIP score of each picture and its text, 0 to 100, higher is better.

    ``max(100 * cos, 0)``, the scale of torchmetrics and diffusers' documentation; that of Hessel et al.
    2021 (CLIPScore, section 3) is ``max(2.5 * cos, 0)``, 40 times smaller. As there and in the authors'
    program each picture's score is clamped, then they are averaged; torchmetrics clamps the average, which
    is smaller where some picture's cosine is negative.

    Args:
        image_features: (N, D).
        text_features: (N, D), row by row the texts of the pictures.

    Returns:
        (N,) float64.
    """
    return 100.0 * F.cosine_similarity(image_features.double(), text_features.double()).clamp(min=0.0)


def clip_image_similarity(generated: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean cosine of each generated picture to all reference images, -1 to 1; (G,) float64.

    Its mean over the pictures is CLIP-I (Ruiz et al. 2023, DreamBooth, section 4.1): higher is closer
    to the set's common look; a set of varied images does not reach 1 with itself.
    """
    return _normalised(generated) @ _normalised(reference).mean(dim=0)


@dataclass(frozen=True)
class SquaredMMD:
    """Unbiased squared maximum mean discrepancy of two samples, a function of weights.

    Gretton et al. 2012, equation 3, over pairs of pictures that no caption joins. Pictures are made from the
    captions of held-out images, the reference: a picture is nearer to the image of its own caption than to
    another, which counted would make the distance too small, below 0 on average where the distributions are
    equal. So pairs with one label stand in none of the three means, nor does a picture's pair with itself.
    Then the mean over equal distributions is 0, and half of the values or more are negative. Needs a kernel
    value for every pair: for up to a few thousand pictures a side.
    """

    generated_kernel: torch.Tensor  # (G, G) float64, 0 where a label is shared
    reference_kernel: torch.Tensor  # (R, R)
    cross_kernel: torch.Tensor  # (G, R)
    labels: tuple[torch.Tensor, torch.Tensor]  # (G,) and (R,), equal where a caption is

    def __call__(self, generated_weights: torch.Tensor, reference_weights: torch.Tensor) -> torch.Tensor:
        """(B, G) and (B, R) float64 weights to (B,)."""
        generated, reference = (generated_weights, self.labels[0]), (reference_weights, self.labels[1])
        return (
            _mean_of_pairs(self.generated_kernel, generated, generated)
            + _mean_of_pairs(self.reference_kernel, reference, reference)
            - 2.0 * _mean_of_pairs(self.cross_kernel, generated, reference)
        )


def kid(generated: torch.Tensor, reference: torch.Tensor, labels: Labels | None = None) -> SquaredMMD:
    """KID (Binkowski et al. 2018, Demystifying MMD GANs) on CLIP's features: lower is better.

    The squared MMD with the kernel ``(a . b / D + 1) ** 3``, of the features as they are: on features of
    length 1 the kernel is all but linear, and the KID a multiple of the CMMD. Its values do not compare
    with those on Inception's features.

    Args:
        generated, reference: (G, D) and (R, D).
        labels: of both, equal where the caption is; None where no picture belongs to another.

    Raises:
        StageError: if a side has fewer than two pictures.
    """
    generated, reference = generated.double(), reference.double()
    return _squared_mmd([_polynomial(*pair) for pair in _pairs(generated, reference)], labels)


def cmmd(generated: torch.Tensor, reference: torch.Tensor, labels: Labels | None = None) -> SquaredMMD:
    """CMMD (Jayasumana et al. 2024, Rethinking FID, section 4): lower is better.

    1000 times the squared MMD with the kernel ``exp(-|a - b|^2 / (2 * 10^2))``, of features of length 1.
    Unbiased, as in the paper. The authors' program also counts each picture's pair with itself, which
    with N pictures a side adds up to ``20 / N``: nothing at the paper's 30,000, but at 64 it would favour
    the model whose pictures vary less.

    Args:
        generated, reference, labels: as of `kid`.

    Raises:
        StageError: if a side has fewer than two pictures.
    """
    generated, reference = _normalised(generated), _normalised(reference)
    return _squared_mmd([CMMD_SCALE * _gaussian(*pair) for pair in _pairs(generated, reference)], labels)


@dataclass(frozen=True)
class FrechetDistance:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of means and covariances, a function of weights.

    Few pictures bias it upwards by about 1 / N, see `extrapolated_frechet`. It has no interval: that of a
    jackknife, centred on the biased value, held the true distance in 0 of 150 trials.
    """

    generated: torch.Tensor  # (G, D) float64
    reference: torch.Tensor  # (R, D) float64

    def __call__(self, generated_weights: torch.Tensor, reference_weights: torch.Tensor) -> torch.Tensor:
        """(B, G) and (B, R) float64 weights to (B,)."""
        pairs = zip(generated_weights, reference_weights, strict=True)
        return torch.stack([self._of(*weights) for weights in pairs])

    def _of(self, generated_weights: torch.Tensor, reference_weights: torch.Tensor) -> torch.Tensor:
        mean, root = _mean_and_root(self.generated, generated_weights)
        other_mean, other_root = _mean_and_root(self.reference, reference_weights)
        # (R^T R S^T S)^(1/2) has the trace of ((R S^T)^T R S^T)^(1/2), which the singular values add up to.
        trace = torch.linalg.svdvals(root @ other_root.T).sum()
        shift = (mean - other_mean).square().sum()
        return shift + root.square().sum() + other_root.square().sum() - 2.0 * trace


def frechet_distance(generated: torch.Tensor, reference: torch.Tensor) -> FrechetDistance:
    """FID (Heusel et al. 2017, equation 6) on whatever features: lower is better.

    Biased upwards by few pictures: for many more than D a side.

    Raises:
        StageError: if a side has fewer than two pictures.
    """
    _require_pairs(generated, reference)
    return FrechetDistance(generated.double(), reference.double())


def extrapolated_frechet(
    generated: torch.Tensor, reference: torch.Tensor, labels: Labels | None = None
) -> torch.Tensor:
    """The Fréchet distance that endlessly many pictures would have, (1,) float64: may be negative.

    Its bias falls with 1 / N. As Chong and Forsyth 2020 (Effectively Unbiased FID, section 3.2): distances
    of random sets of growing size, the least half of all, a line through them over 1 / N, its value at 0.
    Both sides are few here, so both shrink alike, pictures with the images of their captions: what these
    share falls with 1 / N too.

    Args:
        generated, reference, labels: as of `kid`.

    Raises:
        StageError: if a side has fewer than two pictures.
    """
    distance = frechet_distance(generated, reference)
    if labels is None:
        labels = range(len(generated)), range(len(generated), len(generated) + len(reference))
    sides = [torch.as_tensor(list(side)) for side in labels]
    known, rows = torch.cat(sides).unique(return_inverse=True)
    shares, found = [], []
    for number, share in enumerate(torch.linspace(0.5, 1.0, NUM_SIZES, dtype=torch.float64).tolist()):
        order = torch.randperm(len(known), generator=generator(0, "frechet", number)).argsort()
        kept = [_first(order[side], share) for side in rows.split([len(side) for side in sides])]
        found.append(distance(*kept))
        shares.append(sum(len(side) / float(each.sum()) for side, each in zip(sides, kept, strict=True)) / 2)
    inverse = torch.tensor(shares, dtype=torch.float64) - sum(shares) / NUM_SIZES
    values = torch.cat(found)
    slope = (inverse @ values) / inverse.square().sum()
    return (values.mean() - slope * sum(shares) / NUM_SIZES)[None]


def _first(places: torch.Tensor, share: float) -> torch.Tensor:
    """1 for a share of the rows, those that come first, 0 for the others: (N,) to (1, N) float64."""
    count = max(2, round(share * len(places)))
    weights = torch.zeros(1, len(places), dtype=torch.float64)
    weights[0, places.argsort(stable=True)[:count]] = 1.0
    return weights


def _normalised(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.double())


def _pairs(generated: torch.Tensor, reference: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    _require_pairs(generated, reference)
    return (generated, generated), (reference, reference), (generated, reference)


def _require_pairs(generated: torch.Tensor, reference: torch.Tensor) -> None:
    if min(len(generated), len(reference)) < 2:
        raise StageError(
            "distance of two sets of pictures: expected at least 2 on either side, got "
            f"{len(generated)} generated and {len(reference)} reference; evaluate on more"
        )


def _polynomial(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left @ right.T / left.shape[1] + 1.0) ** 3


def _gaussian(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    squared_distance = 2.0 - 2.0 * left @ right.T  # of unit vectors
    return torch.exp(-squared_distance / (2.0 * CMMD_SIGMA**2))


def _squared_mmd(kernels: list[torch.Tensor], labels: Labels | None) -> SquaredMMD:
    cross = kernels[2]
    if labels is None:
        labels = range(len(cross)), range(len(cross), len(cross) + cross.shape[1])
    generated, reference = (torch.as_tensor(list(side)) for side in labels)
    for kernel, left, right in (
        (kernels[0], generated, generated),
        (kernels[1], reference, reference),
        (cross, generated, reference),
    ):
        kernel[left[:, None] == right] = 0.0
    return SquaredMMD(kernels[0], kernels[1], cross, (generated, reference))


def _mean_of_pairs(
    kernel: torch.Tensor, left: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Weighted mean over pairs of two labels: (N, M), and (B, N) weights with (N,) labels, to (B,)."""
    size = int(max(left[1].max(), right[1].max())) + 1
    by_label = [
        torch.zeros(len(weights), size, dtype=torch.float64).index_add_(1, labels, weights)
        for weights, labels in (left, right)
    ]
    num_pairs = left[0].sum(dim=1) * right[0].sum(dim=1) - (by_label[0] * by_label[1]).sum(dim=1)
    return ((left[0] @ kernel) * right[0]).sum(dim=1) / num_pairs


def _mean_and_root(features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) of (N, D) under (N,) weights, and a root R (min(N, D), D) of the covariance, ``R^T R``."""
    mean = weights @ features / weights.sum()
    centred = (weights / (weights.sum() - 1.0)).sqrt()[:, None] * (features - mean)
    return mean, torch.linalg.qr(centred, mode="r").R
