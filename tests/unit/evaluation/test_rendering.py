"""Pictures equal a stock pipeline's, by every scheduler, and the batch is a matter of speed alone."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from stages.lib.evaluation.measuring import rendering
from stages.lib.evaluation.measuring.rendering import (
    Request,
    Setting,
    decode,
    load_renderer,
    render,
    settings,
)
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from tests.checkpoints import edit_json
from tests.conftest import changed

BASE = Path("data/base")
PROMPTS = ("red cat", "a dog of a rocket", "heart")
REQUESTS = [Request(prompt, seed) for prompt in PROMPTS for seed in (3, 5)]


def renderer_of(batch_size: int = 4, unet: Path = BASE / "unet"):
    options = changed(read_params().evaluate, batch_size=batch_size, negative_prompt="photo")
    return load_renderer(BASE, unet, options, PROMPTS, 64, None, 1)


def pixels(rendered) -> np.ndarray:
    return np.stack([np.asarray(each.picture, int) for each in rendered])


@pytest.mark.parametrize(
    ("name", "scheduler_class"),
    [
        ("base", "DDIMScheduler"),
        ("ddim", "DDIMScheduler"),
        ("dpmsolver++", "DPMSolverMultistepScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
    ],
)
def test_a_stock_pipeline_with_that_scheduler_makes_the_same_picture(project, name, scheduler_class):
    renderer = renderer_of()
    ours = list(render(renderer, Setting(name, 3.0, 5), REQUESTS[:2], "pictures"))
    stock = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    stock.scheduler = getattr(diffusers, scheduler_class).from_config(stock.scheduler.config)
    for request, rendered in zip(REQUESTS[:2], ours, strict=True):
        picture = stock(
            request.prompt,
            negative_prompt="photo",
            generator=torch.Generator().manual_seed(request.seed),
            guidance_scale=3.0,
            num_inference_steps=5,
            height=64,
            width=64,
        ).images[0]
        assert np.abs(np.asarray(picture, int) - np.asarray(rendered.picture, int)).max() <= 1
    assert type(renderer.pipeline.scheduler).__name__ == "DDIMScheduler"


def test_each_scheduler_makes_another_picture_and_is_put_away_after_it(project):
    renderer = renderer_of()
    names = ("base", "dpmsolver++", "euler", "unipc", "base")
    first, *others, again = [
        pixels(render(renderer, Setting(name, 3.0, 4), REQUESTS[:1], "pictures")) for name in names
    ]
    assert all((first != other).any() for other in others)
    assert np.array_equal(first, again)


def test_ddim_does_not_clip_latents_where_the_base_has_another_scheduler(project):
    config = json.loads((BASE / "scheduler/scheduler_config.json").read_text())
    del config["clip_sample"]
    config["_class_name"] = "EulerDiscreteScheduler"
    (BASE / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    ours = rendering._sampler("ddim", renderer_of().pipeline.scheduler)
    assert not ours.config.clip_sample and ours.config.beta_end == 0.012


def test_the_batch_size_moves_pixels_by_rounding_alone(project):
    setting = Setting("base", 5.0, 10)
    expected = pixels(render(renderer_of(1), setting, REQUESTS, "pictures"))
    for batch_size in (3, 4, 8):
        found = pixels(render(renderer_of(batch_size), setting, REQUESTS, "pictures"))
        assert np.abs(found - expected).max() <= 1


def test_neighbours_and_places_in_a_batch_do_not_matter(project):
    renderer, setting = renderer_of(4), Setting("base", 5.0, 4)
    expected = pixels(render(renderer, setting, REQUESTS, "pictures"))
    assert np.array_equal(pixels(render(renderer, setting, REQUESTS[::-1], "pictures")), expected[::-1])
    assert np.array_equal(pixels(render(renderer, setting, REQUESTS[4:5], "pictures")), expected[4:5])


@pytest.mark.parametrize(("guidance_scale", "num_inputs"), [(3.0, 8), (1.0, 4)])
def test_the_unet_and_the_vae_see_batches_of_one_shape(project, guidance_scale, num_inputs):
    renderer = renderer_of(4)
    seen = {}
    for module in (renderer.pipeline.unet, renderer.pipeline.vae.decoder):
        module.register_forward_pre_hook(
            lambda module, given: seen.setdefault(type(module).__name__, []).append(len(given[0]))
        )
    list(render(renderer, Setting("base", guidance_scale, 2), REQUESTS, "pictures"))  # 4 and 2
    assert seen == {"UNet2DConditionModel": [num_inputs] * 4, "Decoder": [4] * 2}


def test_the_path_ends_in_the_picture(project):
    renderer, setting = renderer_of(4), Setting("base", 3.0, 5)
    rendered = list(render(renderer, setting, REQUESTS, "pictures", every_steps=2))
    plain = list(render(renderer, setting, REQUESTS, "pictures"))
    assert np.array_equal(pixels(rendered), pixels(plain)) and plain[0].path == []
    assert [len(each.path) for each in rendered] == [3] * 6  # after 2, 4 and 5 steps
    last = decode(renderer, [each.path[-1] for each in rendered])
    assert np.array_equal(np.stack([np.asarray(picture, int) for picture in last]), pixels(plain))
    (each_step,) = render(renderer, setting, REQUESTS[:1], "pictures", every_steps=1)
    for kept, step in zip(rendered[0].path, (2, 4, 5), strict=True):
        assert torch.equal(kept, each_step.path[step - 1])


def test_a_vae_with_a_shift_is_given_unshifted_latents(project):
    edit_json(BASE / "vae/config.json", shift_factor=0.25)
    renderer = renderer_of()
    (rendered,) = render(renderer, Setting("ddim", 3.0, 4), REQUESTS[:1], "pictures", every_steps=4)
    vae = AutoencoderKL.from_pretrained(BASE / "vae")
    with torch.inference_mode():
        decoded = vae.decode(rendered.path[-1][None] / vae.config.scaling_factor + 0.25).sample
    expected = ((decoded[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().numpy()
    assert np.abs(expected - np.asarray(rendered.picture, int)).max() <= 1


def test_latents_of_several_shapes_are_decoded_in_order(project):
    renderer = renderer_of(2)
    shapes = [(4, 8, 8), (4, 16, 8), (4, 8, 8), (4, 8, 8)]
    latents = [
        torch.randn(shape, generator=torch.Generator().manual_seed(row)) for row, shape in enumerate(shapes)
    ]
    vae = AutoencoderKL.from_pretrained(BASE / "vae")
    for picture, scaled in zip(decode(renderer, latents), latents, strict=True):
        with torch.no_grad():
            decoded = vae.decode(scaled[None] / vae.config.scaling_factor).sample[0]
        expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(picture) - expected).max() <= 1


def test_each_text_is_encoded_once(project, monkeypatch):
    calls = []
    encode_prompt = rendering.encode_prompt
    monkeypatch.setattr(
        rendering, "encode_prompt", lambda *given: calls.append(given) or encode_prompt(*given)
    )
    options = changed(read_params().evaluate, negative_prompt="")
    renderer = load_renderer(BASE, BASE / "unet", options, ["cat", "dog", "cat", ""], 64, None, 1)
    assert len(calls) == 3
    list(render(renderer, Setting("base", 3.0, 1), [Request("cat", 0), Request("dog", 0)], "pictures"))
    assert len(calls) == 3


def test_a_trained_unet_brings_its_scheduler(project):
    expected = pixels(render(renderer_of(), Setting("base", 3.0, 4), REQUESTS, "pictures"))
    config = json.loads((BASE / "scheduler/scheduler_config.json").read_text())
    trained = BASE / "unet" / "scheduler_config.json"
    trained.write_text(json.dumps(config | {"prediction_type": "v_prediction"}))
    renderer = renderer_of()
    assert renderer.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert (pixels(render(renderer, Setting("base", 3.0, 4), REQUESTS, "pictures")) != expected).any()
    edit_json(trained, _class_name="NoSuchScheduler")
    with pytest.raises(StageError, match=r"expected a scheduler of diffusers .* got NoSuchScheduler"):
        renderer_of()


def test_settings_are_all_combinations_with_names_of_their_own(project):
    options = changed(
        read_params().evaluate,
        scheduler=("base", "dpmsolver++"),
        guidance_scale=(1.0, 7.5),
        num_inference_steps=(5, 25),
    )
    names = [setting.name for setting in settings(options)]
    assert len(set(names)) == 8
    assert names[0] == "base_guidance1_steps5" and names[-1] == "dpmsolver++_guidance7.5_steps25"
