"""Whether pictures lie among real images, these among the pictures, and which caption a picture shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NUM_NEIGHBOURS = 3  # Kynkäänniemi et al. 2019 take 3


def precision(generated: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Which pictures lie nearer to some reference image than its third neighbour does; (G,) bool.

    Their share is the precision of Kynkäänniemi et al. 2019 (Improved Precision and Recall Metric, equations
    1 and 2), on features of length 1: what CLIP is read by is the angle. Given the reference images, each
    picture is in or out by itself: the share has a share's interval, which does not speak of other images.

    Args:
        generated, reference: (G, D) and (R, D), the latter more than `NUM_NEIGHBOURS`.
    """
    generated, reference = F.normalize(generated.double()), F.normalize(reference.double())
    own = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist")
    radii = own.sort(dim=1).values[:, NUM_NEIGHBOURS]  # the nearest is the image itself
    distances = torch.cdist(generated, reference, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances <= radii).any(dim=1)


def recall(generated: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Which reference images lie among the pictures, as of `precision` with the sides changed; (R,) bool."""
    return precision(reference, generated)


def retrieved(features: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Which pictures are nearer to their own caption than to each other one; (N,) bool.

    Their share is the CLIP R-precision of Park et al. 2021 (Benchmark for Compositional Text-to-Image
    Synthesis, section 4) with the other held-out captions to choose from. A caption equal to a picture's
    own is no other one. By chance it is 1 / N.

    Args:
        features, captions: (N, D) each, row by row.
    """
    cosines = F.normalize(features.double()) @ F.normalize(captions.double()).T
    # Equal captions have equal features, and so the same cosine but for rounding.
    return cosines.diagonal() >= cosines.amax(dim=1) - 1e-9
