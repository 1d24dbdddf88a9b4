"""Metrics equal torchmetrics, scipy and double loops, and put real pictures into the order they must have."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd
from transformers import CLIPModel, CLIPProcessor

from stages.lib.evaluation.distances import (
    clip_image_similarity,
    clip_scores,
    cmmd,
    extrapolated_frechet,
    frechet_distance,
    kid,
)
from stages.lib.evaluation.intervals import bootstrap_interval, difference, mean_of, resample_weights
from stages.lib.evaluation.measuring import nearest as nearest_module
from stages.lib.evaluation.measuring.clip_features import text_features
from stages.lib.evaluation.measuring.nearest import nearest_images
from stages.lib.frame.errors import StageError
from tests.clips import bundled_clip, emoji_features, value_of


def randn(*shape: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


def polynomial(left, right):
    return (float(left @ right) / len(left) + 1) ** 3


def gaussian(left, right):
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right)
    return 1000 * np.exp(-float((left - right) @ (left - right)) / 200)


def squared_mmd(kernel, generated, reference, generated_rows=None, reference_rows=None):
    """A double loop over pictures; rows that name one picture twice are no pair of it with itself."""
    generated, reference = generated.double().numpy(), reference.double().numpy()
    generated_rows = list(range(len(generated))) if generated_rows is None else generated_rows
    reference_rows = list(range(len(reference))) if reference_rows is None else reference_rows

    def within(features, rows):
        return np.mean([kernel(features[i], features[j]) for i in rows for j in rows if i != j])

    cross = np.mean([kernel(generated[i], reference[j]) for i in generated_rows for j in reference_rows])
    return within(generated, generated_rows) + within(reference, reference_rows) - 2 * cross


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
@pytest.mark.parametrize("num_pictures", [8, 64])
def test_kid_equals_torchmetrics(num_pictures):
    generated, reference = randn(num_pictures, 48), randn(num_pictures, 48, seed=1, shift=0.4)
    expected = poly_mmd(reference.double(), generated.double())
    assert value_of(kid, generated, reference) == pytest.approx(float(expected), rel=1e-9)
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=num_pictures)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    assert value_of(kid, generated, reference) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


@pytest.mark.parametrize(("metric", "kernel"), [(kid, polynomial), (cmmd, gaussian)])
def test_squared_mmd_equals_a_double_loop(metric, kernel):
    generated, reference = randn(7, 12), randn(11, 12, seed=1, shift=0.5)
    expected = squared_mmd(kernel, generated, reference)
    assert value_of(metric, generated, reference) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("metric", "kernel"), [(kid, polynomial), (cmmd, gaussian)])
def test_a_resample_counts_no_picture_as_its_own_pair(metric, kernel):
    generated, reference = randn(6, 12), randn(9, 12, seed=1, shift=0.5)
    weights = [resample_weights(range(len(rows)), 4, i, 5) for i, rows in enumerate((generated, reference))]
    values = metric(generated, reference)(*weights)
    for number in range(5):
        rows = [
            [row for row, times in enumerate(drawn[number].int().tolist()) for _ in range(times)]
            for drawn in weights
        ]
        assert float(values[number]) == pytest.approx(
            squared_mmd(kernel, generated, reference, *rows), rel=1e-7
        )


def test_cmmd_is_the_authors_without_the_pairs_of_a_picture_with_itself():
    generated, reference = F.normalize(randn(50, 32)).double(), F.normalize(randn(50, 32, seed=1)).double()

    def mean_kernel(left, right):
        return torch.exp(-torch.cdist(left, right).square() / (2 * 10**2)).mean()

    within = [mean_kernel(generated, generated), mean_kernel(reference, reference)]
    authors = 1000 * (sum(within) - 2 * mean_kernel(generated, reference))
    itself = 1000 * sum((1 - mean) / 49 for mean in within)
    assert float(itself) == pytest.approx(20 / 50, rel=0.05)
    assert value_of(cmmd, generated, reference) == pytest.approx(float(authors - itself), rel=1e-7)


@pytest.mark.parametrize("metric", [kid, cmmd])
@pytest.mark.parametrize("num_pictures", [8, 32])
def test_equal_distributions_are_zero_on_average_and_often_negative(metric, num_pictures):
    values = torch.tensor(
        [
            value_of(metric, *(randn(num_pictures, 16, seed=2 * trial + side) for side in (0, 1)))
            for trial in range(300)
        ]
    )
    assert abs(float(values.mean())) < 3 * float(values.std()) / 300**0.5
    assert 0.3 < float((values < 0).double().mean()) < 0.8


@pytest.mark.parametrize(("metric", "kernel"), [(kid, polynomial), (cmmd, gaussian)])
def test_pairs_of_one_caption_stand_in_no_mean(metric, kernel):
    generated, reference = randn(6, 12), randn(5, 12, seed=1, shift=0.5)
    labels = [0, 1, 1, 2, 3, 9], [1, 0, 3, 3, 4]
    sides = [
        list(zip(rows.double().numpy(), side, strict=True))
        for rows, side in zip((generated, reference), labels, strict=True)
    ]

    def mean(left, right):
        return np.mean([kernel(a, b) for a, one in left for b, other in right if one != other])

    expected = mean(sides[0], sides[0]) + mean(sides[1], sides[1]) - 2 * mean(*sides)
    found = metric(generated, reference, labels)(torch.ones(1, 6).double(), torch.ones(1, 5).double())
    assert float(found) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_equal_distributions_of_paired_captions_are_zero_on_average(metric):
    """And below it where the pairs are counted, as the published estimators do on paired sides."""
    labels, ones = (range(16), range(16)), [torch.ones(1, 16).double()] * 2
    values, counted = [], []
    for trial in range(200):
        captions = 2.0 * randn(16, 12, seed=3 * trial)
        sides = [captions + randn(16, 12, seed=3 * trial + side) for side in (1, 2)]
        values.append(float(metric(*sides, labels)(*ones)))
        counted.append(float(metric(*sides)(*ones)))
    error = np.std(values) / 200**0.5
    assert abs(np.mean(values)) < 3 * error
    assert np.mean(counted) < -10 * error


@pytest.mark.parametrize("num_pictures", [24, 48])
def test_an_extrapolated_frechet_distance_has_lost_its_bias(num_pictures):
    """Of normal distributions, whose distance is known."""
    labels, ones = (range(num_pictures), range(num_pictures)), [torch.ones(1, num_pictures).double()] * 2
    values, plain = [], []
    for trial in range(60):
        captions = randn(num_pictures, 8, seed=3 * trial)
        sides = [
            (captions + randn(num_pictures, 8, seed=3 * trial + side)) / 18**0.5 + 0.5 * (side - 1)
            for side in (1, 2)
        ]
        values.append(float(extrapolated_frechet(*sides, labels)))
        plain.append(float(frechet_distance(*sides)(*ones)))
    truth, error = 8 * 0.5**2, np.std(values) / 60**0.5
    assert abs(np.mean(values) - truth) < 3.5 * error + 0.02
    assert np.mean(plain) > truth + 0.5


def moments_of(*samples: torch.Tensor) -> list[torch.Tensor]:
    """Mean and covariance of each, in float64."""
    return [moment for rows in samples for moment in (rows.double().mean(0), torch.cov(rows.double().T))]


def test_frechet_distance_equals_scipy_and_torchmetrics():
    mixing = randn(16, 16, seed=2)
    generated, reference = randn(200, 16) @ mixing, randn(150, 16, seed=1, shift=0.3)
    mean, cov, other_mean, other_cov = moments_of(generated, reference)
    root = scipy.linalg.sqrtm(cov.numpy() @ other_cov.numpy()).real
    expected = float((mean - other_mean).square().sum() + cov.trace() + other_cov.trace()) - 2 * root.trace()
    assert value_of(frechet_distance, generated, reference) == pytest.approx(expected, rel=1e-7)
    fid = _compute_fid(mean, cov, other_mean, other_cov)
    assert value_of(frechet_distance, generated, reference) == pytest.approx(float(fid), rel=1e-7)
    assert value_of(frechet_distance, reference, reference) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_fewer_pictures_than_features_equals_torchmetrics():
    generated, reference = randn(9, 24), randn(13, 24, seed=1, shift=0.3)
    fid = float(_compute_fid(*moments_of(generated, reference)))
    assert value_of(frechet_distance, generated, reference) == pytest.approx(fid, rel=1e-5)


def test_weights_of_a_frechet_distance_are_how_often_a_picture_is_there():
    generated, reference = randn(9, 6), randn(12, 6, seed=1, shift=0.3)
    weights = [resample_weights(range(len(rows)), 4, i, 3) for i, rows in enumerate((generated, reference))]
    weights[0][2] = torch.tensor([0.0, 0.0, 1, 1, 1, 1, 1, 1, 1])
    found = frechet_distance(generated, reference)(*weights)
    for number in range(3):
        repeated = [
            rows.repeat_interleave(drawn[number].long(), dim=0)
            for rows, drawn in zip((generated, reference), weights, strict=True)
        ]
        assert float(found[number]) == pytest.approx(value_of(frechet_distance, *repeated), rel=1e-9)
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize("metric", [kid, cmmd, frechet_distance])
def test_a_distance_of_fewer_than_two_pictures_is_refused(metric):
    with pytest.raises(StageError, match="at least 2 on either side, got 4 generated and 1 reference"):
        metric(randn(4, 8), randn(1, 8))


def test_clip_image_similarity_is_the_mean_cosine_of_all_pairs():
    generated, reference = randn(5, 16, shift=1.0), randn(9, 16, seed=1, shift=1.0)
    expected = torch.stack(
        [torch.stack([F.cosine_similarity(left, right, dim=0) for right in reference]) for left in generated]
    )
    torch.testing.assert_close(
        clip_image_similarity(generated, reference), expected.mean(1).double(), rtol=1e-5, atol=1e-6
    )


def test_nearest_images_equal_a_search_of_all_pairs(monkeypatch):
    generated, training = randn(20, 16), randn(103, 16, seed=1)
    training[70], training[101] = 2 * generated[3], generated[5]
    cosines = F.normalize(generated.double()) @ F.normalize(training.double()).T
    whole = nearest_images(generated, training)
    monkeypatch.setattr(nearest_module, "_CHUNK_ROWS", 10)
    for nearest in (whole, nearest_images(generated, training)):
        assert torch.equal(nearest.rows, cosines.argmax(dim=1))
        torch.testing.assert_close(nearest.similarity.double(), cosines.amax(dim=1), rtol=0, atol=1e-6)
        assert nearest.above(0.999).nonzero().flatten().tolist() == [3, 5]
        worst = nearest.worst_pairs(4)
        assert {pair[:2] for pair in worst[:2]} == {(3, 70), (5, 101)}
        assert [pair[2] for pair in worst] == sorted(nearest.similarity.tolist(), reverse=True)[:4]


def test_of_equally_near_images_the_first_is_named(monkeypatch):
    monkeypatch.setattr(nearest_module, "_CHUNK_ROWS", 2)
    training = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    nearest = nearest_images(torch.tensor([[3.0, 0.0], [5.0, 0.0]]), training)
    assert nearest.rows.tolist() == [1, 1]
    assert nearest.worst_pairs(9) == [(0, 1, 1.0), (1, 1, 1.0)]
    with pytest.raises(StageError, match="at least 1 training image"):
        nearest_images(training, training[:0])


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    return bundled_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="module")
def emoji(clip_directory):
    return emoji_features(clip_directory)


@pytest.mark.parametrize("metric", [kid, cmmd, frechet_distance])
def test_distances_order_copies_unseen_recoloured_and_noise(emoji, metric):
    groups = (emoji.second, emoji.first, emoji.recoloured, emoji.noise)
    copies, unseen, recoloured, noise = (value_of(metric, group, emoji.second) for group in groups)
    assert copies < unseen < recoloured < noise
    assert abs(copies) < 0.1 * recoloured
    assert recoloured > 2 * unseen
    assert noise > 2 * recoloured


def test_the_interval_of_a_paired_difference_tells_which_is_better(emoji):
    for metric in (kid, cmmd):
        worse_by = difference(metric(emoji.recoloured, emoji.second), metric(emoji.first, emoji.second))
        interval = bootstrap_interval(worse_by, [range(64), range(64)], 0, 500, 0.95)
        assert 0 < interval.low < interval.estimate < interval.high


def test_copies_are_flagged_as_memorised_and_noise_is_not(emoji):
    copies = nearest_images(emoji.second[:10], torch.cat([emoji.first, emoji.second]))
    assert copies.above(0.999).all()
    assert nearest_images(emoji.first, emoji.second).above(0.999).double().mean() < 0.3
    assert not nearest_images(emoji.noise, emoji.second).above(0.95).any()
    mixed = torch.cat([emoji.noise[:5], emoji.second[:3]])
    assert {row for row, _, _ in nearest_images(mixed, emoji.second).worst_pairs(3)} == {5, 6, 7}


def test_image_similarity_is_highest_within_the_style(emoji):
    own, recoloured, noise = (
        float(clip_image_similarity(group, emoji.second).mean())
        for group in (emoji.first, emoji.recoloured, emoji.noise)
    )
    assert own > recoloured > noise


def test_shuffled_captions_lower_the_clip_score(emoji):
    texts = text_features(emoji.clip, emoji.captions)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    scores, shuffled = clip_scores(emoji.first, texts), clip_scores(emoji.first, texts[order])
    interval = bootstrap_interval(mean_of(scores - shuffled), [range(64)], 0, 500, 0.99)
    assert interval.low > 0


def test_clip_score_equals_torchmetrics(emoji, clip_directory):
    class TensorClip(torch.nn.Module):
        """What torchmetrics 1.9 expects of a CLIP: transformers 5 wraps features in an output object."""

        def __init__(self):
            super().__init__()
            self.clip = CLIPModel.from_pretrained(clip_directory, dtype=torch.float32)
            self.config = self.clip.config

        def get_image_features(self, pixel_values):
            return self.clip.get_image_features(pixel_values).pooler_output

        def get_text_features(self, input_ids, attention_mask):
            return self.clip.get_text_features(input_ids, attention_mask).pooler_output

    def model_and_processor():
        return TensorClip().eval(), CLIPProcessor.from_pretrained(clip_directory)

    texts = text_features(emoji.clip, emoji.captions)
    cosines = F.cosine_similarity(emoji.first, texts)
    positive = (cosines > 0).nonzero().flatten()[:12].tolist()
    images = [torch.from_numpy(np.array(emoji.first_pictures[row])).permute(2, 0, 1) for row in positive]
    expected = clip_score(images, [emoji.captions[row] for row in positive], model_and_processor)
    scores = clip_scores(emoji.first, texts)
    assert float(scores[positive].mean()) == pytest.approx(expected.item(), rel=1e-5)


def test_clip_score_clamps_each_picture_as_its_authors_do():
    """Hessel et al. 2021: the mean of w * max(cos, 0), here with w = 100."""
    images, texts = randn(50, 8), randn(50, 8, seed=1)
    cosines = np.array([float(a @ b / a.norm() / b.norm()) for a, b in zip(images, texts, strict=True)])
    assert (cosines < 0).any()
    expected = np.mean(100 * np.clip(cosines, 0, None))
    assert float(clip_scores(images, texts).mean()) == pytest.approx(expected, rel=1e-6)


def test_clip_score_is_100_for_equal_directions_and_0_for_opposite_ones():
    features = randn(3, 8)
    assert clip_scores(features, 5 * features).tolist() == pytest.approx([100.0] * 3)
    assert clip_scores(features, -features).tolist() == [0.0] * 3
