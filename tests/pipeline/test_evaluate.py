"""Pictures equal a stock pipeline's, numbers equal a hand computation, and both formats run through."""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from stages import baseline, evaluate, fetch_base, report
from stages.lib.core.draws import generator
from stages.lib.core.sums import write_sums
from stages.lib.core.tensors import write_checked
from stages.lib.data.pairs import SampleCaptions, read_captions
from stages.lib.drawing.grids import GridRow, draw_grid
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents
from stages.lib.evaluation.measuring import pictures as evaluation_pictures
from stages.lib.evaluation.measuring.clip_features import image_features, load_clip, text_features
from stages.lib.evaluation.measuring.measure import square
from stages.lib.evaluation.measuring.measurements import read_measurements
from stages.lib.evaluation.measuring.nearest import Nearest
from stages.lib.evaluation.measuring.pictures import (
    MadePicture,
    learning,
    nearest_pairs,
    sample_path,
    save_metric_pictures,
    save_samples,
    side_by_side,
    sweep,
)
from stages.lib.evaluation.measuring.rendering import Rendered, load_renderer, settings
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from tests.checkpoints import edit_json, sd15_like, sd21_like
from tests.clips import bundled_clip
from tests.conftest import (
    REPOSITORY,
    changed,
    content_fingerprint,
    draw_image,
    make_project,
    read_lineage,
    reseal,
    run_encoders,
    run_train,
    write_params,
)

TWO_SETTINGS = {"guidance_scale": [3.0, 1.0], "denoising_every_steps": 1, "bootstrap_resamples": 100}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project with the bundled CLIP, two settings and a strip of every step, evaluated."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        root = make_project(tmp_path_factory.mktemp("finished"), monkeypatch)
        bundled_clip(root / "data/tiny/clip")
        params = write_params(evaluate=TWO_SETTINGS)
        fetch_base.main(params)
        run_encoders(params)
        run_train(learning_rate=1e-2)
        baseline.main(params)
        evaluate.main(params)
        report.main(params)
    return root


@pytest.fixture
def evaluated(finished, tmp_path, monkeypatch):
    """A copy of its own for each test."""
    root = tmp_path / "evaluated"
    shutil.copytree(finished, root, ignore=shutil.ignore_patterns(".work"))
    monkeypatch.chdir(root)
    monkeypatch.setenv("SD_WORK", str(root / ".work"))
    return root


def read_json(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_a_stock_pipeline_reproduces_the_pictures(evaluated):
    stock = StableDiffusionPipeline.from_pretrained(
        "data/base", safety_checker=None, torch_dtype=torch.float32
    )
    stock.unet = UNet2DConditionModel.from_pretrained("data/unet")
    for index, prompt in enumerate(read_params().evaluate.prompts):
        for seed in (0, 1):
            start = torch.Generator().manual_seed(seed)
            picture = stock(
                prompt, generator=start, guidance_scale=3.0, num_inference_steps=2, height=64, width=64
            ).images[0]
            ours = Image.open(
                f"data/evaluation/samples/base_guidance3_steps2/prompt{index:02d}_seed{seed}.png"
            )
            difference = np.abs(np.asarray(picture, int) - np.asarray(ours, int))
            assert difference.max() <= 1, (prompt, seed)


def test_base_and_tuned_differ_and_a_second_run_is_identical(evaluated):
    name = "samples/base_guidance3_steps2/prompt00_seed0.png"
    assert Path("data/baseline", name).read_bytes() != Path("data/evaluation", name).read_bytes()
    first = content_fingerprint(Path("data/evaluation")), content_fingerprint(Path("data/baseline"))
    baseline.main(read_params())
    evaluate.main(read_params())
    report.main(read_params())
    assert (content_fingerprint(Path("data/evaluation")), content_fingerprint(Path("data/baseline"))) == first


def held_out_loss(unet_directory: str, shift_factor: float = 0.0) -> float:
    """Mean over the held-out samples at two timesteps, sample by sample."""
    unet = UNet2DConditionModel.from_pretrained(unet_directory).eval()
    scheduler = DDPMScheduler.from_pretrained("data/base/scheduler")
    latents, conditioning = read_latents(), read_conditioning()
    losses = []
    for sample in read_captions(Path("data/pairs/captions.parquet")):
        if sample.split != "validation":
            continue
        row = latents.buckets[0].sample_ids.index(sample.sample_id)
        scaled = (latents.buckets[0].mean[row, 0].float()[None] - shift_factor) * 0.5
        hidden = conditioning.encoder_hidden_states[conditioning.row_of[sample.captions[0]]].float()[None]
        for timestep in (250, 750):
            noise = torch.randn(
                (4, 16, 16), generator=generator(0, "validation", sample.sample_id, timestep)
            )[None]
            noisy = scheduler.add_noise(scaled, noise, torch.tensor([timestep]))
            with torch.no_grad():
                prediction = unet(noisy, timestep, hidden).sample
            losses.append(float(F.mse_loss(prediction.double(), noise.double())))
    return float(np.mean(losses))


def test_validation_loss_equals_a_hand_computation(evaluated):
    metrics = read_json("data/evaluation/metrics.json")
    assert metrics["tuned_validation_loss"] == pytest.approx(held_out_loss("data/unet"), rel=1e-5)
    assert metrics["base_validation_loss"] == read_json("data/baseline/metrics.json")["base_validation_loss"]
    change = metrics["tuned_validation_loss"] / metrics["base_validation_loss"] - 1
    assert metrics["validation_loss_change"] == pytest.approx(change)
    training = read_json("data/training/metrics.json")
    assert training["validation_loss"] == pytest.approx(metrics["tuned_validation_loss"], rel=1e-5)


def test_the_grid_places_example_base_and_tuned_side_by_side(evaluated):
    grid = np.asarray(Image.open("data/evaluation/grids/base_guidance3_steps2.png"))

    def cell(row: int, column: int) -> np.ndarray:
        side, margin, left = 128, 6, 150
        bottom = grid.shape[0] - (2 - row) * (side + margin)
        return grid[bottom : bottom + side, left + column * (side + margin) :][:, :side]

    def enlarged(path: str) -> np.ndarray:
        return np.asarray(Image.open(path)).repeat(2, axis=0).repeat(2, axis=1)

    for row in (0, 1):
        for seed in (0, 1):
            name = f"samples/base_guidance3_steps2/prompt{row:02d}_seed{seed}.png"
            assert np.array_equal(cell(row, 1 + seed), enlarged(f"data/baseline/{name}"))
            assert np.array_equal(cell(row, 3 + seed), enlarged(f"data/evaluation/{name}"))
    assert len(np.unique(cell(0, 0).reshape(-1, 3), axis=0)) > 1  # "red cat" is a training caption
    assert (cell(1, 0) == 0xE6).all()  # the other prompt is not
    assert (grid[:, :150] < 128).any()  # labels are drawn


def cells_of(path: str, num_rows: int, num_columns: int, half: int | None = None) -> np.ndarray:
    """The pictures of a drawn table, or of one of two beside each other, (rows, columns, 128, 128, 3)."""
    grid, pitch = np.asarray(Image.open(path)), 134
    if half is not None:
        width = grid.shape[1] // 2
        grid = grid[:, half * width : (half + 1) * width]
    assert grid.shape[1] == 150 + num_columns * pitch + 6
    top = grid.shape[0] - num_rows * pitch
    assert 20 < top < 100
    rows = [
        [grid[top + row * pitch :, 150 + column * pitch :][:128, :128] for column in range(num_columns)]
        for row in range(num_rows)
    ]
    return np.array(rows)


def enlarged(picture: str | Path | Image.Image) -> np.ndarray:
    opened = picture if isinstance(picture, Image.Image) else Image.open(picture)
    return np.asarray(opened).repeat(2, axis=0).repeat(2, axis=1)


@pytest.fixture
def tables(monkeypatch) -> list[tuple[str, list[str], list[GridRow]]]:
    """Title, headings and rows of what is drawn."""
    drawn = []

    def record(title, columns, rows):
        drawn.append((title, list(columns), list(rows)))
        return draw_grid(title, columns, [GridRow(row.label, [None]) for row in rows])

    monkeypatch.setattr(evaluation_pictures, "draw_grid", record)
    return drawn


def test_each_picture_of_grid_and_sweep_is_what_its_labels_say(tmp_path, tables):
    options = changed(
        read_params(REPOSITORY / "params.yaml").evaluate,
        prompts=("cat", "dog"),
        seeds=(3, 5),
        scheduler=("base", "euler"),
        guidance_scale=(1.0, 7.5),
        num_inference_steps=(5, 25),
    )
    folders = {"base": tmp_path / "baseline", "fine-tuned": tmp_path / "evaluation"}
    cells = itertools.product(folders, settings(options), options.prompts, options.seeds)
    colour_of = {cell: (40 + number, 0, 0) for number, cell in enumerate(cells)}
    for (unet, setting, prompt, seed), colour in colour_of.items():
        path = sample_path(folders[unet], setting, options.prompts.index(prompt), seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path)
    example = Image.new("RGB", (8, 8), "white")

    for setting in settings(options):
        side_by_side(options, setting, *folders.values(), {"dog": example})
        title, columns, rows = tables.pop()
        assert setting.description in title and columns[0] == "training example"
        assert [row.label for row in rows] == ["cat", "dog"]
        assert [row.pictures[0] for row in rows] == [None, example]
        for row in rows:
            found = {
                heading: picture.getpixel((0, 0))
                for heading, picture in zip(columns[1:], row.pictures[1:], strict=True)
            }
            assert found == {
                f"{unet}, seed {seed}": colour_of[unet, setting, row.label, seed]
                for unet in folders
                for seed in options.seeds
            }

    sweep(options, *folders.values())
    title, columns, rows = tables.pop()
    assert title == "cat, seed 3"
    shown = {
        (row.label, heading): picture.getpixel((0, 0))
        for row in rows
        for heading, picture in zip(columns, row.pictures, strict=True)
    }
    sampler_of = {"base": "base's sampler", "euler": "euler"}
    assert shown == {
        (
            f"{unet}, {sampler_of[setting.scheduler]}, {setting.num_inference_steps} steps",
            f"guidance {setting.guidance_scale:g}",
        ): colour_of[unet, setting, "cat", 3]
        for unet in folders
        for setting in settings(options)
    }
    assert len(shown) == 16 and len(rows) == 8


def test_the_sweep_has_a_column_for_each_guidance_tuned_above_base(evaluated):
    cells = cells_of("data/evaluation/sweep.png", 2, 2)
    for row, folder in enumerate(("evaluation", "baseline")):
        for column, guidance in enumerate((3, 1)):
            name = f"data/{folder}/samples/base_guidance{guidance}_steps2/prompt00_seed0.png"
            assert np.array_equal(cells[row, column], enlarged(name))


@pytest.mark.parametrize("folder", ["baseline", "evaluation"])
def test_the_denoising_strip_ends_in_the_pictures(evaluated, folder):
    cells = cells_of(f"data/{folder}/denoising.png", 2, 2)  # prompts, steps
    for row in (0, 1):
        name = f"data/{folder}/samples/base_guidance3_steps2/prompt{row:02d}_seed0.png"
        assert np.array_equal(cells[row, 1], enlarged(name))
        assert (cells[row, 0] != cells[row, 1]).any()


def test_learning_shows_the_previews_of_training_decoded(evaluated):
    files = sorted(Path("data/training/previews").glob("step-*"))
    vae = AutoencoderKL.from_pretrained("data/base/vae")
    cells = cells_of("data/evaluation/learning.png", 2, len(files))
    assert len(files) > 1
    for column, file in enumerate(files):
        for row, latents in enumerate(load_file(file)["latents"]):
            with torch.no_grad():
                decoded = vae.decode(latents[None] / vae.config.scaling_factor).sample[0]
            pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
            assert np.abs(cells[row, column] - pixels.repeat(2, 0).repeat(2, 1)).max() <= 1


def test_learning_is_labelled_with_steps_and_captions(tmp_path, monkeypatch, tables):
    monkeypatch.setattr(evaluation_pictures, "decode", lambda renderer, latents: latents)
    steps, captions = (0, 500, 10_000), ["cat", "a dog"]
    for step in steps:
        latents = torch.tensor([[step, 1.0], [step, 2.0]])
        metadata = {"captions": json.dumps(captions), "global_step": str(step)}
        write_checked(tmp_path / f"step-{step:08d}.safetensors", {"latents": latents}, metadata)
    learning(None, tmp_path)
    ((title, columns, rows),) = tables
    assert title == "Learning over time" and columns == [f"step {step}" for step in steps]
    assert [row.label for row in rows] == captions
    for number, row in enumerate(rows):
        assert [cell.tolist() for cell in row.pictures] == [[step, number + 1] for step in steps]


def test_a_strip_of_a_sampler_with_a_step_more_ends_in_the_picture(project, tables):
    edit_json(
        Path("data/base/scheduler/scheduler_config.json"), _class_name="PNDMScheduler", skip_prk_steps=True
    )
    options = changed(read_params().evaluate, num_inference_steps=(4,), denoising_every_steps=2, seeds=(7, 1))
    base = Path("data/base")
    renderer = load_renderer(base, base / "unet", options, options.prompts, 64, None, 1)
    save_samples(renderer, options, Path("drawn"))
    assert type(renderer.pipeline.scheduler).__name__ == "PNDMScheduler"
    assert renderer.pipeline.num_timesteps == 5
    ((_, columns, rows),) = tables
    assert columns == ["step 2", "step 4", "picture"]
    assert [row.label for row in rows] == list(options.prompts)
    for index, row in enumerate(rows):
        picture = Image.open(sample_path(Path("drawn"), settings(options)[0], index, 7))
        found = [np.array_equal(np.asarray(each), np.asarray(picture)) for each in row.pictures]
        assert found == [False, False, True]


def test_each_metric_picture_starts_from_noise_of_its_own(tmp_path, monkeypatch):
    """Also where captions are equal, and whatever else is measured."""
    requests = []

    def render(renderer, setting, asked, description):
        requests.append(asked)
        return [Rendered(Image.new("RGB", (8, 8)), []) for _ in asked]

    monkeypatch.setattr(evaluation_pictures, "render", render)
    options = read_params(REPOSITORY / "params.yaml").evaluate
    samples = [SampleCaptions(f"{number}.png", ("cat",), "validation") for number in range(5)]
    other_seed = changed(options, seeds=(8,))
    for some, how in ((samples, options), (samples[3:], options), (samples, other_seed)):
        save_metric_pictures(None, how, some, tmp_path / "pictures")
    all_of_them, few, reseeded = requests
    assert len({request.seed for request in all_of_them}) == 5
    assert few == all_of_them[3:]
    assert not {request.seed for request in reseeded} & {request.seed for request in all_of_them}


def test_what_is_switched_off_says_so_in_its_place(evaluated):
    for preview in Path("data/training/previews").glob("step-*"):
        preview.unlink()
    params = write_params(evaluate={"denoising_every_steps": None, "bootstrap_resamples": 100})
    shutil.rmtree("data/base/clip")
    reseal()
    baseline.main(params)
    evaluate.main(params)
    report.main(params)
    for name in ("evaluation/learning.png", "evaluation/nearest.png", "baseline/denoising.png"):
        message = np.asarray(Image.open(f"data/{name}"))
        assert message.shape[0] < 60 and (message < 128).any()
    metrics = read_json("data/evaluation/metrics.json")
    assert metrics["tuned_validation_loss"] > 0 and metrics["tuned_kid"] is None
    assert "real_clip_score" not in metrics
    assert read_json("data/evaluation/report.json")["memorised"] == []
    assert not list(Path("data/evaluation/metric_samples").iterdir())


def test_metrics_on_clip_features_have_intervals_and_agree_with_the_report(evaluated):
    metrics, report = read_json("data/evaluation/metrics.json"), read_json("data/evaluation/report.json")
    baseline = read_json("data/baseline/metrics.json")
    assert baseline == {name: value for name, value in metrics.items() if name.startswith("base_")}
    for entry in report["metrics"]:
        for unet in ("base", "tuned"):
            name = f"{unet}_{entry['name']}"
            assert entry[unet] == {
                "value": metrics[name],
                "low": metrics[f"{name}_low"],
                "high": metrics[f"{name}_high"],
            }
    known = {entry["name"] for entry in report["metrics"] if entry["difference"]["value"] is not None}
    assert {
        "validation_loss",
        "clip_score",
        "clip_image_similarity",
        "kid",
        "cmmd",
        "memorised_share",
    } <= known
    assert report["prompts"] == ["red cat", "a dog of a rocket"] and report["seeds"] == [0, 1]
    assert [setting["name"] for setting in report["settings"]] == [
        "base_guidance3_steps2",
        "base_guidance1_steps2",
    ]
    assert set(report["settings"][0]) == {"name", "scheduler", "guidance_scale", "num_inference_steps"}


def test_the_clip_score_is_that_of_the_metric_pictures(evaluated):
    samples = [
        each for each in read_captions(Path("data/pairs/captions.parquet")) if each.split == "validation"
    ]
    pictures = sorted(Path("data/evaluation/metric_samples").iterdir())
    assert len(pictures) == len(samples) > 1
    clip = load_clip(Path("data/base/clip"))
    features = image_features(clip, map(Image.open, pictures))
    texts = text_features(clip, [sample.captions[0] for sample in samples])
    expected = 100 * F.cosine_similarity(features, texts).clamp(min=0).mean()
    metrics = read_json("data/evaluation/metrics.json")
    assert metrics["tuned_clip_score"] == pytest.approx(float(expected), rel=1e-6)


def test_nearest_shows_each_picture_beside_the_training_image_it_resembles(evaluated):
    pairs = read_json("data/evaluation/report.json")["memorised"]
    split_of = {each.sample_id: each.split for each in read_captions(Path("data/pairs/captions.parquet"))}
    assert len(pairs) == 8 and {split_of[pair["sample_id"]] for pair in pairs} == {"train"}
    similarity = [pair["similarity"] for pair in pairs]
    assert similarity == sorted(similarity, reverse=True)
    training = [name for name, split in split_of.items() if split == "train"]
    clip = load_clip(Path("data/base/clip"))
    squares = [square(Path("images", name).read_bytes(), 64) for name in training]
    features = image_features(clip, (Image.open(pair["picture"]) for pair in pairs))
    cosines = F.normalize(features) @ F.normalize(image_features(clip, squares)).T
    for row, pair in enumerate(pairs):
        named = float(cosines[row, training.index(pair["sample_id"])])
        assert named == pytest.approx(pair["similarity"], abs=2e-6)
        assert named == pytest.approx(float(cosines[row].max()), abs=2e-6)
    cells = [cells_of("data/evaluation/nearest.png", 4, 2, half)[row] for half in (0, 1) for row in range(4)]
    for (generated, trained), pair in zip(cells, pairs, strict=True):
        assert np.array_equal(generated, enlarged(pair["picture"]))
        resized = Image.open(Path("images", pair["sample_id"])).resize((128, 115), Image.Resampling.LANCZOS)
        assert np.array_equal(trained[6:121], np.asarray(resized))


def test_nearest_pairs_are_drawn_the_nearest_first_each_with_the_image_it_names(encoded, tables):
    samples = read_captions(Path("data/pairs/captions.parquet"))
    training = [sample.sample_id for sample in samples if sample.split == "train"]
    pictures = [MadePicture(Path(f"{number}.png"), f"caption {number}") for number in range(3)]
    for number, made in enumerate(pictures):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(made.path)
    nearest = Nearest(torch.tensor([0.5, 0.9, 0.7]), torch.tensor([2, 0, 1]))
    _, entries = nearest_pairs(pictures, nearest, training, Path("data/pairs/images"), 3)
    expected = [(1, training[0], 0.9), (2, training[1], 0.7), (0, training[2], 0.5)]
    assert entries == [
        {"picture": f"{number}.png", "sample_id": name, "similarity": pytest.approx(cosine)}
        for number, name, cosine in expected
    ]
    rows = [row for _, _, part in tables for row in part]
    for row, (number, name, cosine) in zip(rows, expected, strict=True):
        assert row.label == f"cosine {cosine:.3f}, {name}: caption {number}"
        generated, trained = map(np.asarray, row.pictures)
        assert (generated == (number, 0, 0)).all()
        assert np.array_equal(trained, np.asarray(Image.open(Path("images", name))))


def test_another_batch_size_gives_the_same_numbers(evaluated):
    before = {name: value or 0.0 for name, value in read_json("data/baseline/metrics.json").items()}
    params = write_params(evaluate=TWO_SETTINGS | {"batch_size": 5})
    baseline.main(params)
    evaluate.main(params)
    report.main(params)
    after = {name: value or 0.0 for name, value in read_json("data/baseline/metrics.json").items()}
    assert after == pytest.approx(before, rel=1e-3, abs=1e-4)


def test_another_prediction_is_sampled_with_its_scheduler_and_not_compared(evaluated):
    edit_json(Path("data/unet/scheduler_config.json"), prediction_type="v_prediction")
    reseal()
    before = Path("data/evaluation/samples/base_guidance3_steps2/prompt00_seed0.png").read_bytes()
    evaluate.main(read_params())
    report.main(read_params())
    assert Path("data/evaluation/samples/base_guidance3_steps2/prompt00_seed0.png").read_bytes() != before
    metrics = read_json("data/evaluation/metrics.json")
    assert metrics["validation_loss_change"] is None and metrics["tuned_validation_loss"] > 0


def test_contact_sheet_shows_images_and_reconstructions(evaluated):
    check_contact_sheet()


def check_contact_sheet() -> None:
    """Four evenly spaced training images, each beside what the VAE itself makes of its latents' mean."""
    samples = read_captions(Path("data/pairs/captions.parquet"))
    training = [sample.sample_id for sample in samples if sample.split == "train"]
    chosen = training[:: len(training) // 4][:4]
    vae, bucket = AutoencoderKL.from_pretrained("data/base/vae"), read_latents().buckets[0]
    halves = [cells_of("data/baseline/contact_sheet.png", 2, 2, half) for half in (0, 1)]
    for name, (image, reconstruction) in zip(chosen, np.concatenate(halves), strict=True):
        resized = Image.open(Path("images", name)).resize((128, 115), Image.Resampling.LANCZOS)
        assert np.array_equal(image[6:121], np.asarray(resized))
        mean = bucket.mean[bucket.sample_ids.index(name), 0].float()
        with torch.no_grad():
            decoded = vae.decode(mean[None]).sample[0]
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert np.abs(reconstruction - pixels.repeat(2, 0).repeat(2, 1)).max() <= 1


def test_a_vae_with_a_shift_is_measured_and_drawn_with_it(project):
    edit_json(Path("data/tiny/vae/config.json"), shift_factor=0.25)
    params = read_params()
    fetch_base.main(params)
    run_encoders(params)
    baseline.main(params)
    measured, _ = read_measurements(Path("data/baseline/measurements.safetensors"), "baseline")
    loss = measured.losses.summary()["validation_loss"]
    assert loss == pytest.approx(held_out_loss("data/base/unet", 0.25), rel=1e-5)
    assert loss != pytest.approx(held_out_loss("data/base/unet"), rel=1e-4)
    check_contact_sheet()


def test_pictures_do_not_depend_on_the_other_prompts(evaluated):
    before = Path("data/baseline/samples/base_guidance3_steps2/prompt01_seed1.png").read_bytes()
    baseline.main(write_params(evaluate={"prompts": ["rocket", "a dog of a rocket", "heart"]}))
    assert Path("data/baseline/samples/base_guidance3_steps2/prompt01_seed1.png").read_bytes() == before


def test_long_labels_are_wrapped_inside_their_cell():
    picture = Image.new("RGB", (64, 64))
    grid = draw_grid("t", ["a" * 60], [GridRow("word " * 30, [picture]), GridRow("x" * 90, [None])])
    assert grid.size[0] == 150 + 134 + 6
    assert (np.asarray(grid)[-130:-2, 145:149] == 255).all()


@pytest.mark.parametrize("form", ["tutorial", "imagefolder"])
def test_both_common_formats_run_through_to_a_grid(project, form):
    captions = {f"{index}.png": f"a photo of a {'cat' if index % 2 else 'dog'}" for index in range(10)}
    source = Path("mine")
    if form == "tutorial":
        (source / "images").mkdir(parents=True)
        with open(source / "data.csv", "w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["image_path", "caption"])
            for index, (name, caption) in enumerate(captions.items()):
                draw_image(index).save(source / "images" / name)
                writer.writerow([f"images/{name}", caption])
        with tarfile.open("mine.tar.gz", "w:gz") as archive:
            archive.add(source, "mine")
        source = Path("mine.tar.gz")
    else:
        import datasets

        images = [draw_image(index) for index in range(10)]
        table = datasets.Dataset.from_dict({"image": images, "text": list(captions.values())})
        table = table.cast_column("image", datasets.Image())
        (source / "train").mkdir(parents=True)
        rows = []
        for index, example in enumerate(table):
            example["image"].save(source / "train" / f"{index}.png")
            rows.append({"file_name": f"{index}.png", "text": example["text"]})
        datasets.Dataset.from_list(rows).to_json(source / "train" / "metadata.jsonl")
    params = write_params(prepare={"source": str(source)})
    run_encoders(params)
    run_train()
    baseline.main(params)
    evaluate.main(params)
    report.main(params)
    assert read_json("data/prepare_metrics.json")["num_samples"] == 10
    assert Image.open("data/evaluation/grids/base_guidance3_steps2.png").width > 600
    assert read_json("data/evaluation/metrics.json")["tuned_validation_loss"] > 0


@pytest.mark.parametrize(("build", "prediction_type"), [(sd15_like, "epsilon"), (sd21_like, "v_prediction")])
def test_stable_diffusion_checkpoints_run_through(project, build, prediction_type):
    """The true configs of SD 1.5 and 2.1, narrower: tokenizer to grid, and a stock pipeline agrees."""
    build(project / "sd", width_divisor=8)
    params = write_params(
        fetch_base={"directory": "sd"},
        train={"max_train_steps": 2, "lr_warmup_steps": 0},
        evaluate={"prompts": ["a dog"], "seeds": [3], "batch_size": 1},
    )
    fetch_base.main(params)
    run_encoders(params)
    run_train()
    baseline.main(params)
    evaluate.main(params)
    report.main(params)
    assert read_latents().buckets[0].mean.shape == (12, 1, 4, 8, 8)
    assert read_latents().scaling_factor == pytest.approx(0.18215)
    assert read_lineage(Path("data/unet"))["prediction_type"] == prediction_type

    stock = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    stock.unet = UNet2DConditionModel.from_pretrained("data/unet")
    start = torch.Generator().manual_seed(3)
    picture = stock(
        "a dog", generator=start, guidance_scale=3.0, num_inference_steps=2, height=64, width=64
    ).images[0]
    ours = Image.open("data/evaluation/samples/base_guidance3_steps2/prompt00_seed3.png")
    assert np.abs(np.asarray(picture, int) - np.asarray(ours, int)).max() <= 1


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_a_run_with_adapters_is_judged_by_the_base_with_them(encoded, kind):
    """In a process of its own, where diffusers has been kept from importing peft."""
    evaluation = {"prompts": ["red heart"], "seeds": [3], "batch_size": 1}
    write_params(evaluate=evaluation, train={"adapter": kind, "lora_rank": 2, "lora_alpha": 40})
    run_train(adapter=kind, lora_rank=2, lora_alpha=40, learning_rate=0.05, use_ema=False)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for stage in ("baseline", "evaluate"):
        command = [sys.executable, "-m", f"stages.{stage}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    stock = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    if kind == "lora":
        stock.load_lora_weights("data/unet")
    else:
        stock.unet = PeftModel.from_pretrained(stock.unet, "data/unet").merge_and_unload()
    start = torch.Generator().manual_seed(3)
    side = read_latents().resolution
    picture = stock(
        "red heart", generator=start, guidance_scale=3.0, num_inference_steps=2, height=side, width=side
    ).images[0]
    folder = "samples/base_guidance3_steps2/prompt00_seed3.png"
    ours, base = (np.asarray(Image.open(f"data/{name}/{folder}"), int) for name in ("evaluation", "baseline"))
    assert np.abs(np.asarray(picture, int) - ours).max() <= 1
    assert np.abs(base - ours).max() > 4


def test_what_train_or_baseline_left_of_another_run_is_refused(evaluated, tmp_path):
    preview = next(Path("data/training/previews").glob("step-*"))
    whole = preview.read_bytes()
    preview.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match=r"data/training/previews: damaged, changed step-"):
        evaluate.main(read_params())
    preview.write_bytes(whole)
    sample = next(Path("data/baseline/samples").rglob("*.png"))
    picture = sample.read_bytes()
    sample.write_bytes(picture[:-20])
    with pytest.raises(StageError, match=r"data/baseline: damaged, changed samples/.*-s baseline"):
        evaluate.main(read_params())
    sample.write_bytes(picture)
    shutil.copytree("data/unet", tmp_path / "other")
    edit_json(Path("data/unet/scheduler_config.json"), clip_sample=True)
    write_sums(Path("data/unet"))
    with pytest.raises(StageError, match=r"expected the previews of data/unet, got those of another run"):
        evaluate.main(read_params())
    shutil.rmtree("data/unet")
    (tmp_path / "other").rename("data/unet")
    params = write_params(evaluate=TWO_SETTINGS | {"negative_prompt": "blur"})
    with pytest.raises(StageError, match=r"got it measured with other params; run `dvc repro baseline`"):
        evaluate.main(params)
