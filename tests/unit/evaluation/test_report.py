"""The numbers equal computations by hand, intervals are paired, and known cases come out in their order."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from stages.lib.data.pairs import read_captions
from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.diffusion.noise import sample_latents
from stages.lib.diffusion.schedule import training_scheduler
from stages.lib.diffusion.validation import validation_losses
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents
from stages.lib.evaluation.distances import FrechetDistance, cmmd, extrapolated_frechet, kid
from stages.lib.evaluation.intervals import bootstrap_interval, difference, jackknife_interval, mean_of
from stages.lib.evaluation.measuring.clip_features import image_features, text_features
from stages.lib.evaluation.measuring.measure import measure_data
from stages.lib.evaluation.measuring.measurements import (
    Measurements,
    Reference,
    check_same_problems,
    read_measurements,
    write_measurements,
)
from stages.lib.evaluation.measuring.rendering import sampler_config
from stages.lib.evaluation.report import base_numbers, compared_numbers, report_entries
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from tests.clips import bundled_clip, emoji_features, value_of
from tests.conftest import REPOSITORY, changed, run_train

OPTIONS = changed(read_params(REPOSITORY / "params.yaml").evaluate, bootstrap_resamples=300)
NAMES = {
    "validation_loss",
    "validation_loss_t0_249",
    "validation_loss_t250_499",
    "validation_loss_t500_749",
    "validation_loss_t750_999",
    "clip_score",
    "clip_image_similarity",
    "kid",
    "cmmd",
    "frechet_distance",
    "precision",
    "recall",
    "retrieved_share",
    "memorised_share",
}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(
    losses: torch.Tensor,
    pictures: torch.Tensor | None = None,
    captions: torch.Tensor | None = None,
    prediction_type: str = "epsilon",
) -> Measurements:
    ids = [f"{row:03d}.png" for row in range(len(losses))]
    held_out = HeldOutLosses(ids, [125, 375, 625, 875], losses.double(), 1000)
    texts = [f"caption {index}" for index in range(0 if captions is None else len(captions))]
    alphas_cumprod = torch.linspace(0.999, 0.005, 1000)
    return Measurements(held_out, prediction_type, alphas_cumprod, texts, pictures, captions)


def report(base, tuned, reference, options=OPTIONS):
    return {entry["name"]: entry for entry in report_entries(base, tuned, reference, options)}


@pytest.fixture(scope="module")
def case():
    """40 held-out samples, 12 pictures of held-out captions and 6 of prompts; random features."""
    reference = Reference(randn(90, 8, seed=0), randn(40, 8, seed=1) + 0.2, randn(40, 8, seed=2))
    captions = randn(12, 8, seed=3)
    hardness = randn(40, 1, seed=4).exp()
    base = measured(hardness + 0.1 * randn(40, 4, seed=5).abs(), randn(18, 8, seed=6) + 1.0, captions)
    tuned = measured(0.95 * base.losses.losses, base.picture_features - 0.5, captions)
    return base, tuned, reference


@pytest.fixture(scope="module")
def with_inception(case):
    """The same with Inception's features of the 12 pictures and the held-out images."""
    base, tuned, reference = case
    unets = [
        changed(unet, inception_features=randn(12, 6, seed=seed) + shift)
        for unet, seed, shift in ((base, 8, 1.0), (tuned, 9, 0.5))
    ]
    return *unets, changed(reference, held_out_inception=randn(40, 6, seed=10))


def test_every_number_equals_a_computation_by_hand(case):
    base, tuned, reference = case
    threshold = 0.8
    entries = report(*case, changed(OPTIONS, memorisation_threshold=threshold))
    assert set(entries) == NAMES
    for unet, measurements in (("base", base), ("tuned", tuned)):
        losses, pictures = measurements.losses.losses, measurements.picture_features
        generated = pictures[:12]
        cosines = torch.nn.functional.cosine_similarity(generated, measurements.caption_features)
        unit, training = (torch.nn.functional.normalize(each) for each in (pictures, reference.training))
        expected = {
            "validation_loss": losses.mean(),
            "validation_loss_t250_499": losses[:, 1].mean(),
            "clip_score": (100 * cosines.clamp(min=0)).mean(),
            "clip_image_similarity": (unit[:12] @ training.T).mean(),
            "kid": value_of(kid, generated, reference.held_out),
            "cmmd": value_of(cmmd, generated, reference.held_out),
        }
        for name, value in expected.items():
            assert entries[name][unet]["value"] == pytest.approx(float(value), rel=1e-5, abs=1e-7), (
                name,
                unet,
            )
        is_near = ((unit @ training.T).amax(dim=1) > threshold).double()
        assert entries["memorised_share"][unet]["value"] == pytest.approx(float(is_near[:12].mean()))
        assert 0 < is_near[:12].mean() < 1 and is_near[:12].mean() != is_near.mean()
    for entry in entries.values():
        if entry["base"]["low"] is not None:
            change = entry["tuned"]["value"] - entry["base"]["value"]
            assert entry["difference"]["value"] == pytest.approx(change)
            for part in ("base", "tuned", "difference"):
                assert entry[part]["low"] <= entry[part]["value"] <= entry[part]["high"]


def test_what_a_mean_is_of_is_kept_by_name(case):
    base, tuned, _ = case
    entries = report(*case, changed(OPTIONS, memorisation_threshold=0.8))
    assert 0 < entries["memorised_share"]["tuned"]["value"] < 1
    means = {name for name in NAMES if name not in ("kid", "cmmd", "frechet_distance")}
    assert {name for name, entry in entries.items() if "values" in entry} == means
    for name in means:
        entry, values = entries[name], entries[name]["values"]
        for unet in ("base", "tuned"):
            assert sum(values[unet]) / len(values[unet]) == pytest.approx(entry[unet]["value"])
    assert entries["validation_loss"]["values"]["names"] == base.losses.sample_ids
    assert entries["clip_score"]["values"]["names"] == list(base.captions)
    row = tuned.losses.losses[7]
    assert entries["validation_loss"]["values"]["tuned"][7] == pytest.approx(row.mean().item())
    assert entries["validation_loss_t250_499"]["values"]["tuned"][7] == pytest.approx(row[1].item())


def test_fid_is_there_where_inceptions_features_are(case, with_inception):
    base, tuned, reference = with_inception
    entry = report(*with_inception)["fid"]
    for name, unet in (("base", base), ("tuned", tuned)):
        expected = extrapolated_frechet(unet.inception_features, reference.held_out_inception).item()
        assert entry[name] == {"value": pytest.approx(expected, rel=1e-9), "low": None, "high": None}
    change = entry["tuned"]["value"] - entry["base"]["value"]
    assert entry["difference"] == {"value": pytest.approx(change), "low": None, "high": None}
    assert "fid" not in report(*case)
    without = changed(base, inception_features=None)
    assert report(without, tuned, reference)["fid"]["base"]["value"] is None


def test_a_frechet_distance_is_computed_once_for_each_size_of_each_unet(with_inception, monkeypatch):
    calls, compute = [], FrechetDistance._of
    monkeypatch.setattr(FrechetDistance, "_of", lambda *given: calls.append(1) or compute(*given))
    report(*with_inception)
    assert len(calls) == 2 * 15


def test_intervals_take_level_seed_and_number_of_resamples_from_the_options(with_inception):
    base, tuned, reference = with_inception
    rows = [range(12), range(12, 52)]
    losses = mean_of(tuned.losses.losses.mean(dim=1))
    distances = [cmmd(unet.picture_features[:12], reference.held_out) for unet in (base, tuned)]
    seen = set()
    for drawn, level in (((0, 300), 0.95), ((0, 300), 0.5), ((9, 300), 0.95), ((0, 150), 0.95)):
        seed, num_resamples = drawn
        options = changed(
            OPTIONS, bootstrap_seed=seed, bootstrap_level=level, bootstrap_resamples=num_resamples
        )
        entries = report(*with_inception, options)
        for entry, expected in (
            (entries["validation_loss"]["tuned"], bootstrap_interval(losses, [range(40)], *drawn, level)),
            (entries["cmmd"]["base"], jackknife_interval(distances[0], rows, level)),
            (entries["cmmd"]["difference"], jackknife_interval(difference(*distances[::-1]), rows, level)),
        ):
            found = [entry["value"], entry["low"], entry["high"]]
            assert found == pytest.approx([expected.estimate, expected.low, expected.high], rel=1e-9)
        seen.add(entries["validation_loss"]["tuned"]["low"])
    assert len(seen) == 4


def test_the_difference_is_on_the_same_resamples(case):
    loss = report(*case)["validation_loss"]
    assert loss["base"]["low"] < loss["tuned"]["high"]  # apart, the intervals overlap
    assert loss["difference"]["high"] < 0
    width = loss["difference"]["high"] - loss["difference"]["low"]
    assert width < 0.1 * (loss["base"]["high"] - loss["base"]["low"])


def test_fewer_than_five_rows_have_no_interval(case):
    base, tuned, reference = case
    few, none = report(*case)["validation_loss"]["tuned"], {"low": None, "high": None}
    assert few["low"] < few["value"] < few["high"]
    short = [
        changed(
            unet,
            losses=changed(unet.losses, sample_ids=unet.losses.sample_ids[:4], losses=unet.losses.losses[:4]),
        )
        for unet in (base, tuned)
    ]
    entry = report(*short, reference)["validation_loss"]
    assert entry["tuned"] == {"value": entry["tuned"]["value"], **none}
    assert entry["difference"] == {"value": entry["difference"]["value"], **none}


def test_held_out_images_stand_beside(case):
    base, tuned, reference = case
    copied = changed(reference, held_out=torch.cat([reference.training[:10], reference.held_out[10:]]))
    share = report(base, tuned, copied)["memorised_share"]
    assert share["real"]["value"] == pytest.approx(0.25)
    assert "of held-out images 25%" in share["note"]


def test_flat_numbers_are_those_of_the_report(case):
    base, tuned, reference = case
    entries = list(report(*case).values())
    numbers = compared_numbers(entries)
    parts = {
        f"{unet}_{name}{end}" for unet in ("base", "tuned") for name in NAMES for end in ("", "_low", "_high")
    }
    real = {"real_clip_score", "real_clip_image_similarity", "real_memorised_share"}
    assert set(numbers) == parts | real | {"validation_loss_change"}
    for entry in entries:
        assert numbers[f"tuned_{entry['name']}_high"] == entry["tuned"]["high"]
    ratio = float(tuned.losses.losses.mean() / base.losses.losses.mean())
    assert numbers["validation_loss_change"] == pytest.approx(ratio - 1)
    baseline = base_numbers(base, reference, OPTIONS)
    assert baseline == {name: value for name, value in numbers.items() if name.startswith("base_")}
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("change", ["prediction_type", "alphas_cumprod"])
def test_losses_of_other_targets_or_schedules_are_not_compared(case, change):
    base, tuned, reference = case
    another = "v_prediction" if change == "prediction_type" else tuned.alphas_cumprod**2
    entries = report(base, changed(tuned, **{change: another}), reference)
    for name, entry in entries.items():
        if name.startswith("validation_loss"):
            assert entry["difference"] == {"value": None, "low": None, "high": None}
            assert "do not compare" in entry["note"] and entry["tuned"]["value"] is not None
    assert entries["kid"]["difference"]["value"] is not None
    assert compared_numbers(list(entries.values()))["validation_loss_change"] is None


def test_without_a_clip_its_metrics_are_null_and_say_why(case):
    base, tuned, *_ = case
    bare = [changed(unet, picture_features=None, caption_features=None) for unet in (base, tuned)]
    entries = report(*bare, None)
    assert set(entries) == NAMES
    assert entries["kid"]["base"]["value"] is entries["kid"]["difference"]["high"] is None
    assert "fetch_base.clip_source" in entries["memorised_share"]["note"]
    assert entries["validation_loss"]["base"]["value"] is not None


def test_too_few_held_out_samples_are_no_error(case):
    base, tuned, reference = case
    empty = changed(
        reference, held_out=reference.held_out[:0], held_out_captions=reference.held_out_captions[:0]
    )
    unets = [
        measured(unet.losses.losses[:0], unet.picture_features[12:], unet.caption_features[:0])
        for unet in (base, tuned)
    ]
    entries = report(*unets, empty)
    assert not [name for name, entry in entries.items() if entry["base"]["value"] is not None]
    assert "real" not in entries["memorised_share"]
    assert "no sample is held out" in entries["validation_loss"]["note"]


def test_the_frechet_distance_waits_for_enough_pictures(case):
    base, tuned, reference = case
    assert report(*case)["frechet_distance"]["base"]["value"] is None
    assert "needs 16 of both" in report(*case)["frechet_distance"]["note"]
    many = [
        measured(unet.losses.losses, randn(30, 8, seed=20 + index), randn(30, 8, seed=3))
        for index, unet in enumerate((base, tuned))
    ]
    entry = report(*many, reference)["frechet_distance"]
    labels = range(30), range(30, 70)
    expected = extrapolated_frechet(many[1].picture_features, reference.held_out, labels).item()
    assert entry["tuned"] == {"value": pytest.approx(expected), "low": None, "high": None}
    assert entry["difference"]["value"] == pytest.approx(expected - entry["base"]["value"])


def test_a_loss_that_is_not_finite_is_null(case):
    base, tuned, reference = case
    diverged = measured(torch.full((40, 4), float("nan")), tuned.picture_features, tuned.caption_features)
    entries = report(base, diverged, reference)
    json.dumps(entries, allow_nan=False)
    entry = entries["validation_loss"]
    assert entry["tuned"]["value"] is entry["difference"]["value"] is None
    assert entry["base"]["value"] is not None


def test_measurements_survive_their_file(case, tmp_path):
    base, _, reference = case
    path = tmp_path / "measurements.safetensors"
    base = measured(base.losses.losses.float(), base.picture_features, base.caption_features)
    write_measurements(path, base, reference)
    first = path.read_bytes()
    read, data = read_measurements(path, "baseline")
    assert read.losses.sample_ids == base.losses.sample_ids and read.compares_with(base)
    assert torch.equal(read.losses.losses, base.losses.losses)
    assert torch.equal(data.held_out_captions, reference.held_out_captions)
    assert report(read, base, data) == report(base, base, reference)
    write_measurements(path, read, data)
    assert path.read_bytes() == first
    write_measurements(path, changed(base, picture_features=None, caption_features=None), None)
    assert read_measurements(path, "baseline")[1] is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content.replace(b'"captions"', b'"captionz"'),
        lambda content: content.replace(b"alphas_cumprod", b"alphas_kumprod"),
    ],
)
def test_damaged_measurements_are_an_error_that_names_the_stage(case, tmp_path, damage):
    path = tmp_path / "measurements.safetensors"
    write_measurements(path, case[0], case[2])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StageError, match=r"measurements\.safetensors: .*run `dvc repro -f -s evaluate`"):
        read_measurements(path, "evaluate")
    path.unlink()
    with pytest.raises(StageError, match="not found; run `dvc repro evaluate`"):
        read_measurements(path, "evaluate")


def test_unets_measured_on_other_problems_are_not_compared(case):
    base, tuned, _ = case
    check_same_problems(base, tuned)
    others = [
        changed(tuned, captions=["another", *tuned.captions[1:]]),
        changed(tuned, losses=changed(tuned.losses, sample_ids=tuned.losses.sample_ids[::-1])),
        changed(tuned, losses=changed(tuned.losses, timesteps=[1, 2, 3, 4])),
    ]
    for other in others:
        with pytest.raises(StageError, match=r"measured on different .*run `dvc repro baseline evaluate`"):
            check_same_problems(base, other)


# --- known cases


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return emoji_features(bundled_clip(tmp_path_factory.mktemp("tiny") / "clip"))


def entries_of(emoji, base, tuned, captions=None):
    """As an evaluation on the second half of the emoji, with the first half held out."""
    features = text_features(emoji.clip, emoji.captions)
    reference = Reference(emoji.second, emoji.first, features)
    losses = torch.ones(4, 4)
    unets = [measured(losses, pictures, features) for pictures in (base, tuned)]
    return report(*unets, reference)


def test_shuffled_captions_lower_the_clip_score(emoji):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    score = entries_of(emoji, emoji.first, emoji.first[order])["clip_score"]
    assert score["difference"]["high"] < 0
    assert score["base"]["value"] == pytest.approx(score["real"]["value"])


def test_copies_of_the_training_set_are_flagged(emoji):
    share = entries_of(emoji, emoji.second, emoji.noise)["memorised_share"]
    assert share["base"]["value"] == 1.0 and share["tuned"]["value"] == 0.0
    assert 0 < share["real"]["value"] < 0.6
    assert share["difference"]["high"] < 0


@pytest.mark.parametrize("name", ["kid", "cmmd"])
def test_noise_is_furthest_from_the_held_out_images(emoji, name):
    distances = [
        entries_of(emoji, pictures, emoji.noise)[name] for pictures in (emoji.second, emoji.recoloured)
    ]
    unseen, recoloured = distances
    assert unseen["base"]["high"] < recoloured["base"]["low"] < recoloured["base"]["value"]
    assert recoloured["base"]["high"] < recoloured["tuned"]["low"]
    assert recoloured["difference"]["low"] > 0


def test_data_are_measured_at_the_resolution_of_the_pictures(emoji, encoded):
    samples = read_captions(Path("data/pairs/captions.parquet"))
    reference = measure_data(emoji.clip, None, samples, Path("data/pairs/images"), 48)
    for split, features in (("train", reference.training), ("validation", reference.held_out)):
        names = [sample.sample_id for sample in samples if sample.split == split]
        drawn = [Image.open(Path("images", name)) for name in names]  # 80 x 72
        squares = [image.resize((48, 48), Image.Resampling.LANCZOS, (4, 0, 76, 72)) for image in drawn]
        assert len(names) > 1 and torch.equal(features, image_features(emoji.clip, squares))
    captions = [sample.captions[0] for sample in samples if sample.split == "validation"]
    assert torch.equal(reference.held_out_captions, text_features(emoji.clip, captions))


def test_the_held_out_loss_orders_base_fine_tuned_and_overfitted(encoded):
    """A base that knows nothing, one trained on the training split, one on a single noisy image."""
    run_train(max_train_steps=30, learning_rate=5e-3, train_batch_size=4, preview_every_steps=None)
    params = read_params()
    latents, conditioning = read_latents(), read_conditioning()
    samples = read_captions(Path("data/pairs/captions.parquet"))
    scheduler = training_scheduler(sampler_config(Path("data/base"), Path("data/unet")))

    def losses(unet):
        return validation_losses(
            unet.forward, scheduler, latents, conditioning, samples, params.validation, torch.device("cpu")
        )

    def load(path):
        return UNet2DConditionModel.from_pretrained(path).eval()

    overfitted = load("data/unet")
    row = latents.rows([samples[0].sample_id])
    mean, logvar = latents.moments(row, 0, torch.device("cpu"))
    noise, timesteps = randn(1, 4, 16, 16, seed=0), torch.tensor([5])
    image = sample_latents(mean, logvar, torch.zeros_like(mean), latents.scaling_factor)
    noisy = scheduler.add_noise(image, noise, timesteps)
    states = conditioning.states(conditioning.rows([samples[0].captions[0]]), torch.device("cpu"))
    optimizer = torch.optim.Adam(overfitted.parameters(), lr=3e-3)

    def loss_of_the_noisy_image(unet):
        return (unet(noisy, timesteps, states).sample - noise).square().mean()

    for _ in range(150):
        optimizer.zero_grad()
        loss_of_the_noisy_image(overfitted).backward()
        optimizer.step()

    unets = load("data/base/unet"), load("data/unet"), overfitted.eval()
    with torch.no_grad():
        _, *seen = (float(loss_of_the_noisy_image(unet)) for unet in unets)
    assert seen[1] < 0.01 * seen[0]  # it does fit what it was trained on
    base, tuned, over = (
        Measurements(losses(unet), "epsilon", scheduler.alphas_cumprod, [], None, None) for unet in unets
    )
    assert report(base, tuned, None)["validation_loss"]["difference"]["value"] < 0
    assert report(over, tuned, None)["validation_loss"]["difference"]["value"] < 0
