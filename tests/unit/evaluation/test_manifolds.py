"""Precision, recall and retrieval against loops that follow the papers' definitions."""

import numpy as np
import torch
from scipy.spatial.distance import cdist

from stages.lib.evaluation.manifolds import precision, recall, retrieved


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inside(points, manifold):
    """Kynkäänniemi et al. 2019, equation 2, point by point."""
    unit = [
        rows.double().numpy() / rows.double().norm(dim=1, keepdim=True).numpy() for rows in (points, manifold)
    ]
    own, across = cdist(unit[1], unit[1]), cdist(*unit)
    radii = [sorted(np.delete(row, index))[2] for index, row in enumerate(own)]
    return [any(distance <= radius for distance, radius in zip(row, radii, strict=True)) for row in across]


def test_precision_and_recall_equal_loops_over_points():
    generated, reference = randn(40, 12), randn(30, 12, seed=1)
    generated[:, 0] += 1.5
    found = precision(generated, reference), recall(generated, reference)
    assert found[0].tolist() == inside(generated, reference)
    assert found[1].tolist() == inside(reference, generated)
    assert all(0 < each.double().mean() < 1 for each in found)


def test_pictures_of_one_kind_are_precise_and_recall_little():
    reference = randn(60, 4, seed=1)
    generated = reference[:1] + 0.01 * randn(60, 4)
    assert precision(generated, reference).all()
    assert recall(generated, reference).double().mean() < 0.2


def test_a_picture_retrieves_its_caption_among_others():
    captions = torch.eye(5)
    captions[4] = captions[3]
    pictures = captions + 0.1
    pictures[0] = captions[1]
    assert retrieved(pictures, captions).tolist() == [False, True, True, True, True]
