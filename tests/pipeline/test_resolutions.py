"""Images in several resolutions, and samples that are drawn several times an epoch, through the stages."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from dvc.utils.hydra import apply_overrides
from PIL import Image
from safetensors.torch import load_file

from stages import baseline, encode_images, evaluate, prepare, report
from stages.lib.core import paths
from stages.lib.data.pairs import SampleCaptions, read_captions_and_images, write_captions
from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.diffusion.validation import validation_losses
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents, read_samples
from stages.lib.frame.params import read_params
from stages.lib.store.work_store import WorkStore
from stages.lib.training.feed import read_training_data
from tests.conftest import content_fingerprint, draw_image, run_encoders, run_train, write_params
from tests.pipeline.test_buckets import reference_pixels

CPU = torch.device("cpu")


def encode(**changes: object) -> None:
    encode_images.main(write_params(encode_images=changes))


def shapes_of(sample_id: str) -> list[tuple[int, int]]:
    """Width and height in pixels of each row of an image, in the order of the resolutions."""
    latents = read_latents()
    buckets = latents.bucket_of(torch.tensor(latents.rows_of_each([sample_id])[0])).tolist()
    shapes = [latents.buckets[number].mean.shape[-2:] for number in buckets]
    return [(4 * width, 4 * height) for height, width in shapes]


def train_samples() -> list[SampleCaptions]:
    return [sample for sample in read_captions_and_images(paths.PAIR_CAPTIONS)[0] if sample.split == "train"]


def num_steps(curve: str = "lr") -> int:
    lines = Path(f"data/training/plots/metrics/{curve}.tsv").read_text().splitlines()
    return int(lines[-1].split("\t")[lines[0].split("\t").index("step")])


def held_out_losses() -> HeldOutLosses:
    """Of the base's UNet."""
    latents, conditioning = read_latents(), read_conditioning()
    unet = UNet2DConditionModel.from_pretrained("data/base/unet").eval()
    scheduler = DDPMScheduler.from_pretrained("data/base/scheduler")
    samples = read_samples(latents, conditioning, paths.PAIR_CAPTIONS)
    return validation_losses(
        unet.forward, scheduler, latents, conditioning, samples, read_params().validation, CPU
    )


def test_each_image_has_the_moments_of_each_resolution_and_the_first_is_nominal(project: Path) -> None:
    prepare.main(read_params())
    encode(resolution=[64, 48], horizontal_flip=True)
    latents = read_latents()
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    assert latents.resolution == 64
    assert len(latents.buckets) == 2
    for seed in range(12):
        sample_id = f"{seed:02d}.png"
        assert shapes_of(sample_id) == [(64, 64), (48, 48)]
        assert latents.rows([sample_id]).tolist() == latents.rows_of_each([sample_id])[0][:1]
        for row, side in zip(latents.rows_of_each([sample_id])[0], (64, 48), strict=True):
            pixels = reference_pixels(sample_id, side, side)
            for view, seen in enumerate((pixels, pixels.flip(-1))):
                with torch.no_grad():
                    expected = vae.encode(seen[None]).latent_dist.mean
                found, _ = latents.moments(torch.tensor([row]), view, CPU)
                torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    metrics = json.loads(paths.ENCODE_IMAGES_METRICS.read_text())
    assert metrics["num_encoded_images"] == 12
    assert metrics["cropped_fraction"] == pytest.approx(1 - 64 / 71)  # of 80 x 72 pixels in the nominal one
    counts = Path("data/encode_images_report/shapes.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:3] for line in counts] == [["48", "48", "12"], ["64", "64", "12"]]
    encode(resolution=[48, 64])
    assert shapes_of("03.png") == [(48, 48), (64, 64)]
    assert read_latents().resolution == 48


def test_a_resolution_more_encodes_its_views_alone_and_one_less_gives_the_bytes_of_before(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    put = WorkStore.put
    monkeypatch.setattr(
        WorkStore, "put", lambda self, keys, rows: (written.extend(keys), put(self, keys, rows))
    )
    prepare.main(read_params())
    encode(resolution=64)
    before = content_fingerprint(paths.LATENTS)
    assert len(written) == 12 + 4
    written.clear()
    encode(resolution=[64, 48])
    assert len(written) == 12  # reconstructions are those of the first
    assert all(key.endswith("-48x48") for key in written)
    written.clear()
    encode(resolution=[64])
    assert content_fingerprint(paths.LATENTS) == before
    assert written == []


def test_a_resolution_that_is_too_large_for_an_image_is_left_out_of_it_alone(project: Path) -> None:
    draw_image(20, (50, 60)).save("images/small.png")
    draw_image(21, (30, 90)).save("images/tiny.png")
    for name in ("small", "tiny"):
        Path(f"images/{name}.txt").write_text("dog")
    run_encoders(write_params(encode_images={"resolution": [64, 48], "max_upscale": 1.0}))
    assert shapes_of("small.png") == [(48, 48)]
    assert shapes_of("00.png") == [(64, 64), (48, 48)]
    assert read_latents().left_out == {"tiny.png"}
    assert json.loads(paths.ENCODE_IMAGES_METRICS.read_text())["num_left_out"] == 1
    assert json.loads(paths.ENCODE_IMAGES_METRICS.read_text())["num_encoded_images"] == 13
    run_train()


def test_buckets_of_each_resolution(project: Path) -> None:
    draw_image(20, (150, 100)).save("images/wide.png")
    Path("images/wide.txt").write_text("dog")
    prepare.main(read_params())
    encode(resolution=[64, 96], buckets="auto", bucket_step=16, max_aspect=2.0)
    assert shapes_of("wide.png") == [(80, 48), (112, 80)]
    assert shapes_of("00.png") == [(64, 64), (96, 96)]


def test_training_draws_every_resolution_and_all_else_sees_the_nominal_one(project: Path) -> None:
    run_encoders(write_params(encode_images={"resolution": 64}))
    alone = held_out_losses()
    encode(resolution=[64, 48])
    both = held_out_losses()
    assert both.sample_ids == alone.sample_ids
    assert torch.equal(both.losses, alone.losses)

    data = read_training_data(read_params().train)
    names = Counter(data.training_set.sample_ids)
    assert names == {sample.sample_id: 2 for sample in train_samples()}
    by_size = data.training_set.buckets.bincount().tolist()
    assert by_size == [len(names), len(names)]

    run_train(max_train_steps=None, num_train_epochs=2, lr_warmup_steps=0)
    assert num_steps() == 2 * (2 * len(names) // 4)
    previews = load_file(next(Path("data/training/previews").glob("*.safetensors")))
    assert {tuple(latents.shape[-2:]) for latents in previews.values() if latents.ndim == 4} == {(16, 16)}
    baseline.main(read_params())
    evaluate.main(read_params())
    report.main(read_params())
    sample = next(Path("data/evaluation/samples").rglob("*.png"))
    assert Image.open(sample).size == (64, 64)


def test_previews_are_of_the_nominal_resolution_where_another_comes_first_by_name(encoded: Path) -> None:
    encode(resolution=[64, 48])
    assert read_training_data(read_params().train).main_shape == (4, 16, 16)
    encode(resolution=[48, 64])
    assert read_training_data(read_params().train).main_shape == (4, 12, 12)


def test_a_list_of_resolutions_of_the_command_line(project: Path) -> None:
    apply_overrides(Path("params.yaml"), ["encode_images.resolution=[64,96]"])
    assert read_params().encode_images.resolution == (64, 96)
    apply_overrides(Path("params.yaml"), ["encode_images.resolution=96"])
    assert read_params().encode_images.resolution == (96,)


# --- repeats


def repeat(repeats_of: dict[str, int]) -> None:
    samples, images = read_captions_and_images(paths.PAIR_CAPTIONS)
    changed = [dataclasses.replace(sample, repeats=repeats_of.get(sample.sample_id, 1)) for sample in samples]
    write_captions(paths.PAIR_CAPTIONS, changed, images)


def test_an_epoch_draws_the_repeats_and_held_out_samples_count_once(encoded: Path) -> None:
    before, names = held_out_losses(), [sample.sample_id for sample in train_samples()]
    repeat(dict.fromkeys([*names[:2], *before.sample_ids], 3))
    after = held_out_losses()
    assert after.sample_ids == before.sample_ids
    assert torch.equal(after.losses, before.losses)
    data = read_training_data(read_params().train)
    assert data.training_set.num_draws == len(names) + 4
    run_train(max_train_steps=None, num_train_epochs=3, lr_warmup_steps=0)
    assert num_steps() == 3 * (len(names) + 4) // 4


def test_another_number_of_repeats_is_another_run(encoded: Path) -> None:
    run_train()
    before = content_fingerprint(Path("data/unet"))
    repeat({train_samples()[0].sample_id: 4})
    run_train()
    assert content_fingerprint(Path("data/unet")) != before
    assert len(list(Path(".work/train").iterdir())) == 2
    repeat({})
    shutil.rmtree(".work/train")
    run_train()
    assert content_fingerprint(Path("data/unet")) == before
