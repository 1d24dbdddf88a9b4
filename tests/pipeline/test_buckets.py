"""Images of several shapes, from the files to a training run."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from stages import baseline, encode_images, evaluate, prepare, report, tokenize_captions
from stages.lib.encoding.latents import read_latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.store.work_store import WorkStore
from tests.conftest import CAPTIONS, content_fingerprint, draw_image, run_encoders, run_train, write_params

SHAPES = [(80, 72), (150, 100), (100, 150), (64, 64)]
BUCKETS = {"buckets": "auto", "resolution": 64, "bucket_step": 16, "max_aspect": 2.0}


@pytest.fixture
def shapes(project: Path) -> Path:
    """16 images of four shapes."""
    shutil.rmtree("images")
    Path("images").mkdir()
    for number in range(16):
        draw_image(number, SHAPES[number % 4]).save(f"images/{number:02d}.png")
        Path(f"images/{number:02d}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return project


def read_json(path: str) -> dict:
    return json.loads(Path(path).read_text())


def reference_pixels(sample_id: str, width: int, height: int) -> torch.Tensor:
    """Resize to cover, crop the centre, scale to [-1, 1], written for this test."""
    image = Image.open(Path("images") / sample_id)
    scale = max(width / image.width, height / image.height)
    image = image.resize(
        (max(width, int(image.width * scale + 1e-9)), max(height, int(image.height * scale + 1e-9))),
        Image.Resampling.LANCZOS,
    )
    array = np.asarray(image, np.float64)
    top, left = round((array.shape[0] - height) / 2), round((array.shape[1] - width) / 2)
    array = array[top : top + height, left : left + width]
    return torch.from_numpy(array / 255 * 2 - 1).permute(2, 0, 1).float()


def check_latents(num_views: int) -> dict[str, tuple[int, int]]:
    """Hold the views, centre and perhaps mirrored, against diffusers; name -> its shape in pixels."""
    latents = read_latents()
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    found = {}
    for bucket in latents.buckets:
        height, width = (4 * side for side in bucket.mean.shape[-2:])
        assert bucket.mean.shape[1] == num_views
        assert bucket.sample_ids == sorted(bucket.sample_ids)
        for row, sample_id in enumerate(bucket.sample_ids):
            found[sample_id] = (width, height)
            pixels = reference_pixels(sample_id, width, height)
            for view, seen in enumerate((pixels, pixels.flip(-1))[:num_views]):
                with torch.no_grad():
                    mean = vae.encode(seen[None]).latent_dist.mean[0]
                torch.testing.assert_close(bucket.mean[row, view].float(), mean, rtol=2e-3, atol=2e-3)
    return found


def test_each_image_is_encoded_in_the_shape_nearest_to_it(shapes):
    run_encoders(write_params(encode_images={**BUCKETS, "horizontal_flip": True}))
    nearest = {(80, 72): (64, 64), (64, 64): (64, 64), (150, 100): (80, 48), (100, 150): (48, 80)}
    assert check_latents(2) == {f"{number:02d}.png": nearest[SHAPES[number % 4]] for number in range(16)}
    shapes_csv = Path("data/encode_images_report/shapes.csv").read_text()
    rows = list(csv.DictReader(shapes_csv.splitlines()))
    assert [(row["width"], row["height"], row["images"]) for row in rows] == [
        ("48", "80", "4"),
        ("64", "64", "8"),
        ("80", "48", "4"),
    ]
    assert float(rows[1]["most_cropped"]) == pytest.approx(1 - 64 / 71, abs=1e-4)
    assert float(rows[1]["most_upscaled"]) == pytest.approx(1.0)


def test_images_are_encoded_in_the_shapes_that_are_listed(shapes):
    prepare.main(read_params())
    sizes = {"buckets": "sizes", "bucket_sizes": [[96, 64], [64, 64], [48, 64]], "resolution": 32}
    encode_images.main(write_params(encode_images=sizes))
    nearest = {(80, 72): (64, 64), (64, 64): (64, 64), (150, 100): (96, 64), (100, 150): (48, 64)}
    assert check_latents(1) == {f"{number:02d}.png": nearest[SHAPES[number % 4]] for number in range(16)}
    assert read_latents().resolution == 64
    cropped = [1 - 64 * 64 / (71 * 64), 0.0, 1 - 48 * 64 / (48 * 72), 1 - 96 * 64 / (96 * 64)]
    metrics = read_json("data/encode_images_metrics.json")
    assert metrics["cropped_fraction"] == pytest.approx(np.mean(cropped), abs=1e-9)


def test_a_run_trains_and_evaluates_on_buckets(shapes):
    run_encoders(write_params(encode_images=BUCKETS))
    run_train()
    first = content_fingerprint(Path("data/unet"))
    shutil.rmtree(".work/train")
    run_train()
    assert content_fingerprint(Path("data/unet")) == first
    baseline.main(read_params())
    evaluate.main(read_params())
    report.main(read_params())
    metrics = read_json("data/evaluation/metrics.json")
    assert metrics["tuned_validation_loss"] != metrics["base_validation_loss"]
    sample = next(Path("data/evaluation/samples").rglob("*.png"))
    assert Image.open(sample).size == (64, 64)


def test_an_image_that_no_shape_fits_is_listed_and_left_out(shapes):
    run_encoders(write_params(encode_images={"resolution": 80, "max_upscale": 1.2}))
    lines = Path("data/encode_images_report/left_out.jsonl").read_text().splitlines()
    too_small = [f"{number:02d}.png" for number in range(3, 16, 4)]
    assert [json.loads(line)["sample_id"] for line in lines] == too_small
    reason = "64x64 pixels would be enlarged 1.25 times, encode_images.max_upscale is 1.2"
    assert json.loads(lines[0])["reason"] == reason
    assert read_json("data/encode_images_metrics.json")["num_left_out"] == 4
    assert read_json("data/encode_images_metrics.json")["num_encoded_images"] == 12
    assert read_latents().left_out == frozenset(too_small)
    run_train()
    with pytest.raises(StageError, match=r"all 16 images are too small, the first: 00\.png: 80x72 pixels"):
        encode_images.main(write_params(encode_images={"resolution": 160, "max_upscale": 1.0}))


def test_shapes_that_the_vae_cannot_halve_are_refused(shapes):
    prepare.main(read_params())
    sizes = {"buckets": "sizes", "bucket_sizes": [[64, 64], [66, 64]]}
    with pytest.raises(StageError, match=r"allows 66x64 pixels, expected multiples of 4"):
        encode_images.main(write_params(encode_images=sizes))


def test_crops_that_coincide_are_encoded_once_and_views_reuse_each_other(shapes, monkeypatch):
    written: list[str] = []
    put = WorkStore.put
    monkeypatch.setattr(
        WorkStore, "put", lambda self, keys, rows: (written.extend(keys), put(self, keys, rows))
    )

    def encoded(**changes: object) -> int:
        written.clear()
        encode_images.main(write_params(encode_images={"num_reconstructions": 1, **changes}))
        return len([key for key in written if "+" in key])

    params = read_params()
    prepare.main(params)
    tokenize_captions.main(params)
    assert encoded() == 16 + 1
    assert encoded(horizontal_flip=True) == 16
    with_crops = encoded(random_crops=2)
    assert 0 < with_crops <= 24  # twelve images have a side to spare, the square ones have none
    assert read_latents().num_views == 3
    assert encoded(**BUCKETS) == 8 + 1  # those in the square bucket are there already
    assert encoded(random_crops=2) == 0
    assert encoded() == 0


def test_scores_of_reconstructions_equal_scikit_image(shapes):
    prepare.main(read_params())
    encode_images.main(write_params(encode_images={**BUCKETS, "num_reconstructions": 16}))
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    psnr, ssim = [], []
    for bucket in read_latents().buckets:
        height, width = (4 * side for side in bucket.mean.shape[-2:])
        for sample_id in bucket.sample_ids:
            pixels = reference_pixels(sample_id, width, height)
            with torch.no_grad():
                decoded = vae.decode(vae.encode(pixels[None]).latent_dist.mean).sample.clamp(-1, 1)[0]
            pair = [picture.permute(1, 2, 0).double().numpy() for picture in (pixels, decoded)]
            psnr.append(peak_signal_noise_ratio(*pair, data_range=2.0))
            settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            ssim.append(structural_similarity(*pair, data_range=2.0, channel_axis=2, **settings))
    metrics = read_json("data/encode_images_metrics.json")
    assert metrics["reconstruction_psnr"] == pytest.approx(np.mean(psnr), abs=0.01)
    assert metrics["reconstruction_psnr_worst"] == pytest.approx(min(psnr), abs=0.01)
    assert metrics["reconstruction_ssim"] == pytest.approx(np.mean(ssim), abs=1e-3)
    assert metrics["reconstruction_ssim_worst"] == pytest.approx(min(ssim), abs=1e-3)
    picture = Image.open("data/encode_images_report/worst_reconstructions.png")
    assert picture.height > 8 * 128
