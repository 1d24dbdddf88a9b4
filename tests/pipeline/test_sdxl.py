"""A base of Stable Diffusion XL through every stage, held against diffusers' pipeline and training script."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from stages import baseline, encode_captions, evaluate, fetch_base, gallery, invert, report, tokenize_captions
from stages.lib.core.paths import BASE
from stages.lib.diffusion.previews import sample_previews
from stages.lib.diffusion.schedule import training_scheduler
from stages.lib.diffusion.validation import validation_losses
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents, read_samples
from stages.lib.evaluation.measuring.rendering import Request, Setting, load_renderer, render
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.models.layout import read_config
from stages.lib.store.zarr_store import open_store
from stages.lib.training.batches import draw_batch, training_set
from stages.lib.training.feed import load_part
from tests.checkpoints import edit_json, sdxl_like
from tests.conftest import CAPTIONS, changed, draw_image, enter, run_encoders, run_train, write_params

CPU = torch.device("cpu")
IMAGES = {"horizontal_flip": True, "random_crops": 1}


def make(root: Path, force_zeros: bool = True, **changes: dict) -> None:
    """A project with an XL base and twelve images of several sizes, and everything encoded."""
    sdxl_like(root / "xl", force_zeros=force_zeros)
    (root / "images").mkdir()
    for seed in range(12):
        size = (80, 72) if seed % 2 else (96, 130)
        draw_image(seed, size).save(root / "images" / f"{seed:02d}.png")
        (root / "images" / f"{seed:02d}.txt").write_text(CAPTIONS[seed % len(CAPTIONS)])
    base = {"directory": "xl", "vae_directory": "xl/vae", "clip_directory": "xl"}
    params = write_params(fetch_base=base, **{"encode_images": IMAGES, **changes})
    fetch_base.main(params)
    run_encoders(params)


@pytest.fixture(scope="module")
def made_xl(tmp_path_factory):
    root = tmp_path_factory.mktemp("xl")
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(root, monkeypatch)
        make(root)
    return root


@pytest.fixture
def xl(made_xl, tmp_path, monkeypatch):
    enter(shutil.copytree(made_xl, tmp_path, dirs_exist_ok=True), monkeypatch)
    return tmp_path


def stock() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(BASE, add_watermarker=False)


def test_the_base_is_a_pipeline_whose_index_stands_for_the_components_that_sd_has_not(xl):
    pipeline = stock()
    assert pipeline.config.force_zeros_for_empty_prompt is True
    assert (pipeline.tokenizer.pad_token, pipeline.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    before = (BASE / "model_index.json").read_bytes()
    fetch_base.main(read_params())
    assert (BASE / "model_index.json").read_bytes() == before
    edit_json(Path("xl/text_encoder_2/config.json"), layer_norm_eps=1e-6)
    fetch_base.main(read_params())
    assert (BASE / "model_index.json").read_bytes() != before


def test_token_ids_are_those_of_both_tokenizers(xl):
    store, pipeline = open_store(Path("data/tokens.zarr"), "tokenize"), stock()
    for name, tokenizer in (("input_ids", pipeline.tokenizer), ("input_ids_2", pipeline.tokenizer_2)):
        expected = tokenizer(store["caption"][:].tolist(), padding="max_length", max_length=77).input_ids
        assert store[name][:].tolist() == expected
    assert (store["input_ids"][:] != store["input_ids_2"][:]).any()


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_captions_are_encoded_as_the_stock_pipeline_encodes_prompts(xl, clip_skip):
    encode_captions.main(write_params(encode_captions={"clip_skip": clip_skip}))
    conditioning = read_conditioning()
    captions = [caption for caption in conditioning.row_of if caption]
    found = conditioning.conditions(conditioning.rows(captions), CPU)
    with torch.no_grad():
        states, _, pooled, _ = stock().encode_prompt(captions, clip_skip=clip_skip)
    assert states.shape[2] == 48 and pooled.shape[1] == 24
    for name, expected in (("encoder_hidden_states", states), ("text_embeds", pooled)):
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-3)  # float16 as stored
    assert np.abs(found["text_embeds"] - pooled.half().float()).mean() < 1e-5


@pytest.mark.parametrize("force_zeros", [True, False])
def test_no_caption_is_what_the_base_says_in_training_and_in_sampling(tmp_path, monkeypatch, force_zeros):
    enter(tmp_path, monkeypatch)
    make(tmp_path, force_zeros)
    conditioning = read_conditioning()
    empty = conditioning.conditions(torch.tensor([conditioning.empty_row]), CPU)
    with torch.no_grad():
        _, states, _, pooled = stock().encode_prompt("cat", negative_prompt=None)
    assert torch.equal(empty["encoder_hidden_states"].half(), states.half()) or not force_zeros
    torch.testing.assert_close(empty["encoder_hidden_states"], states, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(empty["text_embeds"], pooled, rtol=1e-3, atol=1e-3)
    assert bool(states.any()) is not force_zeros
    options = changed(read_params().evaluate, negative_prompt="")
    sampled = load_renderer(BASE, BASE / "unet", options, ["cat"], 64, None, 1).conditions[""]
    assert torch.equal(sampled["encoder_hidden_states"], states[0])
    assert torch.equal(sampled["text_embeds"], pooled[0])


def script_time_ids(
    image: tuple[int, int], side: int, flip: bool, corner: tuple[int, int] | None
) -> list[int]:
    """As train_text_to_image_sdxl.py: resize, mirror, crop; ``corner`` (top, left) or the centre crop's."""
    width, height = image
    upright = width <= height
    resized = (side, int(side * height / width)) if upright else (int(side * width / height), side)
    top, left = corner or (round((resized[1] - side) / 2), round((resized[0] - side) / 2))
    if flip and corner:  # ``corner`` is that of the picture that is mirrored afterwards
        left = resized[0] - side - left
    return [height, width, top, left, side, side]


def test_every_view_has_the_time_ids_of_the_training_script(xl):
    latents = read_latents()
    (bucket,) = latents.buckets
    time_ids = bucket.told["time_ids"]
    assert time_ids.shape == (12, 4, 6)  # centre, crop, and both mirrored
    for row, name in enumerate(bucket.sample_ids):
        size = (80, 72) if int(Path(name).stem) % 2 else (96, 130)
        centre, crop, mirrored, mirrored_crop = time_ids[row].tolist()
        assert centre == script_time_ids(size, 64, False, None)
        assert mirrored == script_time_ids(size, 64, True, tuple(centre[2:4]))
        assert mirrored_crop == script_time_ids(size, 64, True, tuple(crop[2:4]))
    assert (time_ids[:, 1] != time_ids[:, 3]).any() and (time_ids[:, 0] != time_ids[:, 1]).any()


def test_the_mirrored_view_is_the_crop_of_the_mirrored_picture_at_its_corner():
    from stages.lib.encoding.framing import Framing, Size
    from stages.lib.encoding.pixels import load_pixels
    from tests.conftest import png

    picture = draw_image(3, (100, 64))
    framing = Framing(Size(100, 64), 7, 0, Size(64, 64), True)
    left = framing.left_as_seen
    expected = np.asarray(picture)[:, ::-1][:, left : left + 64]
    assert np.array_equal(load_pixels(png(picture), framing, "lanczos", False), expected)


def test_shapes_and_resolutions_have_targets_of_their_own(xl):
    from stages import encode_images

    many = {"resolution": [64, 32], "buckets": "auto", "bucket_step": 16, **IMAGES}
    encode_images.main(write_params(encode_images=many))
    latents = read_latents()
    targets = set()
    for bucket in latents.buckets:
        height, width = (side * 4 for side in bucket.mean.shape[-2:])
        assert (bucket.told["time_ids"][:, :, 4:] == torch.tensor([height, width])).all()
        targets.add((height, width))
    assert len(targets) > 2


def test_a_step_has_the_loss_and_gradients_of_the_training_script(xl):
    params = write_params(train={"caption_dropout": 0.5})
    options = changed(params.train, caption_dropout=0.5, train_batch_size=6)
    latents, conditioning = read_latents(), read_conditioning()
    samples = read_samples(latents, conditioning, Path("data/pairs/captions.parquet"))
    data = training_set(samples, latents, conditioning)
    batch = draw_batch(data, options, 3, 1000)
    part = load_part(batch, latents, conditioning, CPU)
    assert (batch.caption_rows == data.empty_row).any() and (batch.caption_rows != data.empty_row).any()

    mean, logvar = part.mean.float(), part.logvar.float()
    model_input = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * batch.posterior_noise) * 0.13025
    noise_scheduler = DDPMScheduler.from_pretrained(BASE / "scheduler")
    noisy = noise_scheduler.add_noise(model_input, batch.noise, batch.timesteps)
    bucket = latents.buckets[0]
    pairs = zip(batch.latent_rows.tolist(), batch.views.tolist(), strict=True)
    add_time_ids = torch.stack([bucket.told["time_ids"][row, view] for row, view in pairs]).float()
    prompt_embeds = conditioning.encoder_hidden_states[batch.caption_rows].float()
    pooled = conditioning.others["text_embeds"][batch.caption_rows].float()
    expected = UNet2DConditionModel.from_pretrained(BASE / "unet").train()
    model_pred = expected(
        noisy, batch.timesteps, prompt_embeds, return_dict=False,
        added_cond_kwargs={"time_ids": add_time_ids, "text_embeds": pooled},
    )[0]  # fmt: skip
    loss = torch.nn.functional.mse_loss(model_pred, batch.noise, reduction="mean")
    loss.backward()

    from accelerate import Accelerator

    from stages.lib.training.loop import train_step

    unet = UNet2DConditionModel.from_pretrained(BASE / "unet").train()
    kept = {}

    class Keeping(torch.optim.SGD):
        def step(self, closure=None):
            kept.update({name: each.grad.clone() for name, each in unet.named_parameters()})

    optimizer = Keeping(unet.parameters(), lr=0.0)
    scheduler = training_scheduler(read_config(BASE / "scheduler/scheduler_config.json"))
    free = changed(options, max_grad_norm=1e9, snr_gamma=None)
    losses, _ = train_step(
        Accelerator(cpu=True), unet, optimizer, scheduler, [part], latents.scaling_factor, 0.0, free
    )
    torch.testing.assert_close(losses[0][0].mean(), loss.detach(), rtol=1e-6, atol=1e-7)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(kept[name], parameter.grad, rtol=1e-5, atol=1e-6)


def test_pictures_are_those_of_the_stock_pipeline(xl):
    options = changed(read_params().evaluate, negative_prompt="dog", batch_size=1)
    renderer = load_renderer(BASE, BASE / "unet", options, ["red cat"], 64, None, 1)
    (rendered,) = render(renderer, Setting("base", 3.0, 3), [Request("red cat", 5)], "pictures")
    expected = stock()(
        "red cat", negative_prompt="dog", generator=torch.Generator().manual_seed(5), guidance_scale=3.0,
        num_inference_steps=3, height=64, width=64,
    ).images[0]  # fmt: skip
    assert np.abs(np.asarray(rendered.picture, int) - np.asarray(expected, int)).max() <= 1
    assert np.asarray(expected).std() > 1
    with torch.no_grad():
        states, negative, pooled, _ = stock().encode_prompt("red cat", negative_prompt="dog")
    for text, name, value in (
        ("red cat", "encoder_hidden_states", states),
        ("red cat", "text_embeds", pooled),
        ("dog", "encoder_hidden_states", negative),
    ):
        torch.testing.assert_close(renderer.conditions[text][name], value[0], rtol=1e-6, atol=1e-6)


def test_previews_and_held_out_losses_tell_the_unet_the_sizes(xl):
    params, latents, conditioning = read_params(), read_latents(), read_conditioning()
    samples = read_samples(latents, conditioning, Path("data/pairs/captions.parquet"))
    seen = []

    class Unet:
        def __call__(self, sample, timestep, encoder_hidden_states, added_cond_kwargs):
            seen.append(added_cond_kwargs["time_ids"])
            return type("Output", (), {"sample": sample})

    config = read_config(BASE / "scheduler/scheduler_config.json")
    sample_previews(Unet(), config, conditioning, ["dog"], (4, 16, 16), latents.factor, params.train, CPU)
    assert seen[0].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    seen.clear()
    scheduler = training_scheduler(config)
    validation_losses(Unet(), scheduler, latents, conditioning, samples, params.validation, CPU)
    held_out = [sample.sample_id for sample in samples if sample.split == "validation"]
    expected = latents.buckets[0].told["time_ids"][latents.rows(held_out), 0].tolist()
    assert sorted(row for ids in seen[::2] for row in ids.int().tolist()) == sorted(expected)


def test_long_captions_have_windows_side_by_side_and_the_pooled_projection_of_the_first(xl):
    one = read_conditioning()
    params = write_params(tokenize={"num_chunks": 2})
    tokenize_captions.main(params)
    encode_captions.main(params)
    two = read_conditioning()
    row = two.rows(["red cat"])
    assert two.encoder_hidden_states.shape[1] == 154
    assert torch.equal(two.encoder_hidden_states[row][:, :77], one.encoder_hidden_states[row])
    assert torch.equal(two.others["text_embeds"][row], one.others["text_embeds"][row])


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_from_pairs_to_the_page(xl, lora_rank):
    params = write_params(train={"lora_rank": lora_rank, "caption_dropout": 0.3}, encode_images=IMAGES)
    run_train(lora_rank=lora_rank, caption_dropout=0.3)
    for stage in (invert, baseline, evaluate, report, gallery):
        stage.main(params)
    assert "<html" in Path("data/evaluation/index.html").read_text()
    base = StableDiffusionXLPipeline.from_pretrained(BASE).unet
    if lora_rank is None:
        trained = UNet2DConditionModel.from_pretrained("data/unet").state_dict()
        changed_names = [name for name, value in base.state_dict().items() if not trained[name].equal(value)]
        assert any(name.startswith("add_embedding") for name in changed_names)
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, add_watermarker=False)
        pipeline.load_lora_weights("data/unet")


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("model_index.json", {"requires_aesthetics_score": True}, "got a refiner"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256: a base with the guidance"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 64}, "a refiner's UNet"),
        ("unet/config.json", {"addition_embed_type": None}, "expected addition_embed_type 'text_time'"),
        ("unet/config.json", {"cross_attention_dim": 32}, "48, the sum of both text encoders'"),
        (
            "model_index.json",
            {"text_encoder_2": [None, None]},
            "expected text_encoder_2 CLIPTextModelWithPro",
        ),
        ("text_encoder_2/config.json", {"architectures": ["CLIPTextModel"]}, "text_encoder_2/config.json"),
        ("text_encoder_2/config.json", {"vocab_size": 100}, "tokenizer_2: expected token ids below 100"),
    ],
)
def test_other_bases_are_refused_by_name(xl, file, changes, expected):
    edit_json(Path("xl") / file, **changes)
    with pytest.raises(StageError, match=expected):
        fetch_base.main(read_params())


def test_a_distilled_base_is_warned_about(xl, caplog):
    edit_json(
        Path("xl/scheduler/scheduler_config.json"),
        _class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing",
    )  # fmt: skip
    fetch_base.main(read_params())
    assert "distilled to a few steps" in caplog.text


def test_stores_of_another_family_are_refused(xl):
    latents, conditioning = read_latents(), read_conditioning()
    bare = changed(latents, buckets=[changed(bucket, told={}) for bucket in latents.buckets])
    with pytest.raises(StageError, match="expected time_ids of each view"):
        read_samples(bare, conditioning, Path("data/pairs/captions.parquet"))


def test_clip_skip_beyond_the_layers_used_is_refused(xl):
    with pytest.raises(StageError, match="has 3 layers, of which 1 is not used"):
        encode_captions.main(write_params(encode_captions={"clip_skip": 3}))
