"""Images with transparency: what is stored of it, and what training weighs by it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from stages import encode_images
from stages.lib.core import paths
from stages.lib.encoding.latents import read_latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.store.work_store import WorkStore
from stages.lib.training.batches import draw_batch
from stages.lib.training.feed import read_training_data
from tests.conftest import CAPTIONS, content_fingerprint, draw_image, run_encoders, run_train, write_params

CPU = torch.device("cpu")


def opacity(seed: int) -> np.ndarray:
    """Of 128 x 128 pixels: a square that can be seen, with an edge that shines through."""
    alpha = np.zeros((128, 128), np.uint8)
    left, top = np.random.default_rng(seed).integers(8, 60, 2)
    alpha[top - 5 : top + 55, left - 5 : left + 55] = 77
    alpha[top : top + 50, left : left + 50] = 255
    return alpha


@pytest.fixture
def masked(project: Path) -> Path:
    """12 images of twice their resolution; of every third all can be seen."""
    shutil.rmtree("images")
    Path("images").mkdir()
    for seed in range(12):
        image = draw_image(seed, (128, 128))
        if seed % 3:
            image.putalpha(Image.fromarray(opacity(seed)))
        image.save(f"images/{seed:02d}.png")
        Path(f"images/{seed:02d}.txt").write_text(CAPTIONS[seed % len(CAPTIONS)])
    return project


def encode(**changes: object) -> None:
    encode_images.main(write_params(encode_images=changes))


def weights() -> dict[str, torch.Tensor]:
    return load_file("data/unet/diffusion_pytorch_model.safetensors")


def logged(name: str) -> list[float]:
    header, *lines = Path(f"data/training/plots/metrics/{name}.tsv").read_text().splitlines()
    return [float(line.split("\t")[header.split("\t").index(name)]) for line in lines]


def test_the_store_holds_the_mean_opacity_of_each_latent_pixel(masked: Path) -> None:
    run_encoders(write_params(encode_images={"masks": "alpha", "horizontal_flip": True}))
    latents = read_latents()
    for seed in range(12):
        alpha = opacity(seed) / 255 if seed % 3 else np.ones((128, 128))
        for view, seen in enumerate((alpha, alpha[:, ::-1])):
            found = latents.masks(latents.rows([f"{seed:02d}.png"]), view, CPU)
            assert found is not None
            expected = seen.reshape(16, 8, 16, 8).mean(axis=(1, 3))[None, None]
            np.testing.assert_allclose(found.double(), expected, atol=2e-3)  # of 8 bits and float16
    lazily = read_latents(resident=False)
    rows = lazily.rows(["03.png", "04.png"])
    assert torch.equal(
        lazily.masks(rows, torch.tensor([1, 0]), CPU), latents.masks(rows, torch.tensor([1, 0]), CPU)
    )


def test_masks_change_no_moments_and_are_made_once(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    put = WorkStore.put
    monkeypatch.setattr(
        WorkStore, "put", lambda self, keys, rows: (written.extend(keys), put(self, keys, rows))
    )
    run_encoders(read_params())
    before, moments = content_fingerprint(paths.LATENTS), read_latents().buckets[0].mean
    assert read_latents().masks(torch.tensor([0]), 0, CPU) is None
    written.clear()
    encode(masks="alpha")
    assert len(written) == 12
    assert torch.equal(read_latents().buckets[0].mean, moments)
    written.clear()
    encode(masks="alpha", horizontal_flip=True)
    assert len(written) == 24  # the mirrored moments and masks
    written.clear()
    encode()
    assert written == []
    assert content_fingerprint(paths.LATENTS) == before


def test_masks_of_several_resolutions(masked: Path) -> None:
    run_encoders(write_params(encode_images={"masks": "alpha", "resolution": [64, 32]}))
    latents = read_latents()
    for row, side in zip(latents.rows_of_each(["04.png"])[0], (16, 8), strict=True):
        found = latents.masks(torch.tensor([row]), 0, CPU)
        expected = (opacity(4) / 255).reshape(side, 128 // side, side, 128 // side).mean(axis=(1, 3))
        np.testing.assert_allclose(found.double()[0, 0], expected, atol=4e-3)
    run_train()


def first_loss(mask_floor: float) -> float:
    """Of the first step, in float64 by hand, but for the network."""
    params = read_params()
    data = read_training_data(params.train)
    latents = data.latents
    scheduler = DDPMScheduler.from_pretrained("data/base/scheduler")
    unet = UNet2DConditionModel.from_pretrained("data/base/unet")
    batch = draw_batch(data.training_set, params.train, 0, scheduler.config.num_train_timesteps)
    (bucket,) = latents.buckets
    mean, logvar = (moments[batch.latent_rows, batch.views] for moments in (bucket.mean, bucket.logvar))
    drawn = mean.double() + (logvar.double() / 2).exp() * batch.posterior_noise.double()
    clean = drawn * latents.scaling_factor
    abar = scheduler.alphas_cumprod[batch.timesteps].double()[:, None, None, None]
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * batch.noise.double()
    states = data.conditioning.states(batch.caption_rows, CPU)
    with torch.no_grad():
        found = unet(noisy.float(), batch.timesteps, states).sample.double()
    alpha = {
        f"{seed:02d}.png": opacity(seed) / 255 if seed % 3 else np.ones((128, 128)) for seed in range(12)
    }
    losses = []
    for index, sample in enumerate(batch.samples.tolist()):
        mask = alpha[data.training_set.sample_ids[sample]].reshape(16, 8, 16, 8).mean(axis=(1, 3))
        if batch.views[index] == 1:
            mask = mask[:, ::-1]
        weight = mask_floor + (1 - mask_floor) * mask
        errors = (found - batch.noise.double())[index].square().numpy()
        losses.append((errors * weight).sum() / (4 * weight.sum()))
    return float(np.mean(losses))


@pytest.mark.parametrize("mask_floor", [0.0, 0.25])
def test_training_weighs_errors_by_masks_and_held_out_losses_do_not(masked: Path, mask_floor: float) -> None:
    run_encoders(write_params(encode_images={"horizontal_flip": True}))
    run_train(max_train_steps=3)
    plain, held_out = logged("train_loss"), logged("validation_loss")
    encode(masks="alpha", horizontal_flip=True)
    run_train(max_train_steps=3, mask_floor=mask_floor, learning_rate=0.0)
    assert logged("train_loss")[0] == pytest.approx(first_loss(mask_floor), rel=2e-4)
    assert logged("train_loss")[0] != pytest.approx(plain[0], rel=2e-3)
    unchanged = logged("validation_loss")[-1]
    encode(horizontal_flip=True)
    run_train(max_train_steps=3, learning_rate=0.0)
    assert logged("validation_loss")[-1] == unchanged != held_out[-1]


def test_masks_that_are_ignored_or_hide_nothing_give_the_weights_of_a_run_without(masked: Path) -> None:
    run_encoders(read_params())
    run_train()
    plain = weights()
    encode(masks="alpha")
    run_train(mask_floor=1.0)
    ignored = weights()
    run_train(mask_floor=0.0)
    assert all(torch.equal(plain[name], ignored[name]) for name in plain)
    assert any(not torch.equal(plain[name], value) for name, value in weights().items())

    for path in Path("images").glob("*.png"):
        Image.open(path).convert("RGB").save(path)
    run_encoders(write_params())
    run_train()
    opaque = weights()
    encode(masks="alpha")
    run_train(mask_floor=0.0)
    assert all(torch.equal(opaque[name], value) for name, value in weights().items())


def test_mask_files_weigh_what_they_say_and_the_pictures_stay_whole(project: Path) -> None:
    """The same squares as files beside opaque images: the masks of their opacity, and other latents."""
    for seed in range(12):
        draw_image(seed, (128, 128)).save(f"images/{seed:02d}.png")
        if seed % 3:
            Image.fromarray(opacity(seed)).save(f"images/{seed:02d}.mask.png")
    run_encoders(write_params(encode_images={"masks": "files", "horizontal_flip": True}))
    latents = read_latents()
    for seed in range(12):
        alpha = opacity(seed) / 255 if seed % 3 else np.ones((128, 128))
        for view, seen in enumerate((alpha, alpha[:, ::-1])):
            found = latents.masks(latents.rows([f"{seed:02d}.png"]), view, CPU)
            expected = seen.reshape(16, 8, 16, 8).mean(axis=(1, 3))[None, None]
            np.testing.assert_allclose(found.double(), expected, atol=2e-3)
    moments = latents.moments(latents.rows(["01.png"]), 0, CPU)
    encode(masks="none", horizontal_flip=True)
    again = read_latents()
    assert all(map(torch.equal, moments, again.moments(again.rows(["01.png"]), 0, CPU)))
    # Another mask changes its own rows and nothing else.
    Image.fromarray(opacity(50)).save("images/01.mask.png")
    before = latents.masks(latents.rows(["02.png"]), 0, CPU)
    run_encoders(write_params(encode_images={"masks": "files", "horizontal_flip": True}))
    edited = read_latents()
    expected = (opacity(50) / 255).reshape(16, 8, 16, 8).mean(axis=(1, 3))[None, None]
    np.testing.assert_allclose(edited.masks(edited.rows(["01.png"]), 0, CPU).double(), expected, atol=2e-3)
    assert torch.equal(edited.masks(edited.rows(["02.png"]), 0, CPU), before)


def test_masks_of_other_images_are_refused(project: Path) -> None:
    Image.fromarray(opacity(1)).resize((80, 72)).save("images/01.mask.png")
    run_encoders(write_params())
    shutil.copytree("data/pairs/masks", "masks")
    draw_image(99).save("images/03.png")
    run_encoders(write_params())
    shutil.rmtree("data/pairs/masks")
    shutil.move("masks", "data/pairs/masks")
    with pytest.raises(StageError, match=r"data/pairs/masks: expected the masks of the images .*dvc repro"):
        encode(masks="files")
