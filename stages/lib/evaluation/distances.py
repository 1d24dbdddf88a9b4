"""Metrics on features: fidelity to the prompt, distance to real images, copies of training images.

Features are rows of `clip_features`, for FID of `inception_features`: (N, D) float32, not normalised; each
metric normalises as its source does. Sums run in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stages.lib.frame.errors import StageError

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def clip_scores(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """CLIP score of each picture and its text, 0 to 100, higher is better.

    ``max(100 * cos, 0)``, the scale of torchmetrics and diffusers' documentation; that of Hessel et al.
    2021 (CLIPScore, section 3) is ``max(2.5 * cos, 0)``, 40 times smaller.

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
    """Unbiased squared maximum mean discrepancy of two samples, a function of bootstrap weights.

    Gretton et al. 2012, equation 3. A pair is two different pictures, also where a resample holds one
    twice: counted, those pairs would raise every replicate. On equal distributions the mean is 0 and half
    of the values or more are negative. Needs a kernel value for every pair: for up to a few thousand
    pictures a side.

    Few pictures make it noisy, not biased. CMMD of the bundled CLIP, N pictures a side: between two samples
    of OpenMoji its standard deviation is 1.0 with N = 8, 0.34 with 16, 0.18 with 32, 0.06 with 64; to
    another emoji style it is 3.7 with standard deviations of 2.0, 1.5, 0.7 and 0.6. Percentile intervals
    of 95 % held the true distance in 95 to 96 % of trials with N from 16 to 64, and a true 0 in over 99 %.
    """

    generated_kernel: torch.Tensor  # (G, G) float64, diagonal 0
    reference_kernel: torch.Tensor  # (R, R) float64, diagonal 0
    cross_kernel: torch.Tensor  # (G, R) float64

    def __call__(self, generated_weights: torch.Tensor, reference_weights: torch.Tensor) -> torch.Tensor:
        """(B, G) and (B, R) float64 weights to (B,)."""
        cross = ((generated_weights @ self.cross_kernel) * reference_weights).sum(dim=1)
        cross = cross / (generated_weights.sum(dim=1) * reference_weights.sum(dim=1))
        return (
            _mean_of_pairs(self.generated_kernel, generated_weights)
            + _mean_of_pairs(self.reference_kernel, reference_weights)
            - 2.0 * cross
        )


def kid(generated: torch.Tensor, reference: torch.Tensor) -> SquaredMMD:
    """KID (Binkowski et al. 2018, Demystifying MMD GANs) on CLIP's features: lower is better.

    The squared MMD with the kernel ``(a . b / D + 1) ** 3``, of the features as they are: on features of
    length 1 the kernel is all but linear, and the KID a multiple of the CMMD. Its values do not compare
    with those on Inception's features.

    Raises:
        StageError: if a side has fewer than two pictures.
    """
    generated, reference = generated.double(), reference.double()
    return _squared_mmd(*(_polynomial(*pair) for pair in _pairs(generated, reference)))


def cmmd(generated: torch.Tensor, reference: torch.Tensor) -> SquaredMMD:
    """CMMD (Jayasumana et al. 2024, Rethinking FID, section 4): lower is better.

    1000 times the squared MMD with the kernel ``exp(-|a - b|^2 / (2 * 10^2))``, of features of length 1.
    Unbiased, as in the paper. The authors' program also counts each picture's pair with itself, which
    with N pictures a side adds up to ``20 / N``: nothing at the paper's 30,000, but at 64 it would favour
    the model whose pictures vary less.

    Raises:
        StageError: if a side has fewer than two pictures.
    """
    generated, reference = _normalised(generated), _normalised(reference)
    return _squared_mmd(*(CMMD_SCALE * _gaussian(*pair) for pair in _pairs(generated, reference)))


@dataclass(frozen=True)
class FrechetDistance:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of means and covariances, a function of weights.

    A bootstrap would bias it upwards: pictures drawn twice lower the rank of their covariance.
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


def _squared_mmd(
    generated_kernel: torch.Tensor, reference_kernel: torch.Tensor, cross_kernel: torch.Tensor
) -> SquaredMMD:
    return SquaredMMD(
        generated_kernel.fill_diagonal_(0.0), reference_kernel.fill_diagonal_(0.0), cross_kernel
    )


def _mean_of_pairs(kernel: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean off the diagonal: (N, N) and (B, N) to (B,)."""
    num_pairs = weights.sum(dim=1).square() - weights.square().sum(dim=1)
    return ((weights @ kernel) * weights).sum(dim=1) / num_pairs


def _mean_and_root(features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) of (N, D) under (N,) weights, and a root R (min(N, D), D) of the covariance, ``R^T R``."""
    mean = weights @ features / weights.sum()
    centred = (weights / (weights.sum() - 1.0)).sqrt()[:, None] * (features - mean)
    return mean, torch.linalg.qr(centred, mode="r").R
