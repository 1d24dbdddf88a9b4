"""`python -m stages.try_it` in a browser: it shows what the renderer draws, and asks no other server."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.lib.evaluation.measuring.rendering import Request, Setting, load_renderer, render
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.models.trained import load_trained_unet
from stages.lib.trial.page import build_page
from stages.lib.trial.studio import Wish, open_studio
from tests.browser import Browser, headless_browser
from tests.conftest import REPOSITORY, changed, run_train

PROMPT = "a dog of a rocket"
FILL = """
((label, value) => {
  const field = [...document.querySelectorAll("label, .block")].find(
    (each) => each.querySelector("span")?.textContent.trim() === label
      && each.querySelector("input, textarea"));
  const input = field.querySelector("input[type=number], textarea, input");
  const kind = input.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
  Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(input, value);
  for (const event of ["input", "change", "blur"]) input.dispatchEvent(new Event(event, {bubbles: true}));
})
"""


def wait_for(browser: Browser, condition: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not browser.run(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


def shown(browser: Browser, side: str) -> np.ndarray:
    """Pixels of one side's picture, as the server sent them."""
    data = browser.run(
        f"""(async () => {{
          const blob = await (await fetch(document.querySelector("#{side} img").src)).blob();
          return [...new Uint8Array(await blob.arrayBuffer())];
        }})()"""
    )
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def draw(browser: Browser) -> tuple[np.ndarray, np.ndarray]:
    before = browser.run("document.querySelector('#tuned img')?.src ?? ''")
    browser.run("(document.querySelector('button#draw') ?? document.querySelector('#draw button')).click()")
    wait_for(browser, f"(document.querySelector('#tuned img')?.src ?? '') !== {before!r}")
    return shown(browser, "base"), shown(browser, "tuned")


@pytest.mark.slow
def test_a_browser_draws_base_and_fine_tuned_side_by_side(encoded, tmp_path):
    pytest.importorskip("gradio", reason="the page is an extra")
    run_train(learning_rate=3e-3)
    options = read_params().evaluate
    server = subprocess.Popen(
        [sys.executable, "-m", "stages.try_it", "--no-browser"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = re.match(r"http://127\.0\.0\.1:\d+", server.stdout.readline()).group()
        with headless_browser() as browser:
            browser.open(address, width=1280)
            wait_for(browser, "document.querySelector('#prompt textarea, #prompt input') !== null")
            browser.run(f"{FILL}('Prompt', {PROMPT!r})")
            browser.run(f"{FILL}('Seed', '7')")
            browser.run(f"{FILL}('Steps', '3')")
            base, tuned = draw(browser)
            browser.screenshot(tmp_path / "page.png", whole=True)
            browser.run(f"{FILL}('Strength', '0')")
            again, weak = draw(browser)
            asked = [each for each in browser.requests() if not each.startswith(("blob:", address))]
        assert asked == []
        setting = Setting("base", options.guidance_scale[0], 3)
        for picture, unet in ((base, "data/base/unet"), (tuned, "data/unet")):
            renderer = load_renderer(
                Path("data/base"), Path(unet), changed(options, batch_size=1), [PROMPT], 64, None, 1
            )
            [expected] = render(renderer, setting, [Request(PROMPT, 7)], "")
            assert np.array_equal(picture, np.asarray(expected.picture))
        assert not np.array_equal(base, tuned)
        assert np.array_equal(again, base) and np.array_equal(weak, base)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130


def test_strength_goes_from_the_base_to_the_trained_weights_and_beyond(encoded):
    run_train(learning_rate=3e-3)
    studio = open_studio(read_params().evaluate)
    unet = studio.renderer.pipeline.unet
    name = "conv_out.bias"
    base = studio.base[name].double()
    wish = Wish(PROMPT, "", 0, 1, 1.0, 1.0, "fine-tuned")
    studio.pictures(wish)
    trained = unet.state_dict()[name].double()
    assert not base.equal(trained)
    for strength in (0.0, 0.25, 1.5):
        studio.pictures(changed(wish, strength=strength))
        expected = base + strength * (trained - base)
        assert (unet.state_dict()[name].double() - expected).abs().max() < 1e-7


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_snapshots_are_tried_like_the_result(encoded, lora_rank):
    run_train(learning_rate=3e-3, lora_rank=lora_rank, snapshot_every_steps=2)
    studio = open_studio(read_params().evaluate)
    assert list(studio.choices) == ["fine-tuned", "step 2", "step 4", "step 6"]
    wish = Wish(PROMPT, "", 0, 1, 1.0, 1.0, "step 2")
    studio.pictures(wish)
    expected = load_trained_unet(Path("data/base"), Path("data/snapshots/step-000002")).state_dict()
    found = studio.renderer.pipeline.unet.state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())
    studio.pictures(changed(wish, weights="fine-tuned"))
    assert not all(found[name].equal(value) for name, value in expected.items())
    with pytest.raises(StageError, match=r"expected weights of fine-tuned, step 2, .*got 'step 3'"):
        studio.pictures(changed(wish, weights="step 3"))


def test_without_gradio_the_command_to_install_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(
        StageError, match=r"needs the package gradio.*pip install --no-deps -r requirements/try"
    ):
        build_page(None, ["fine-tuned"], None, tmp_path / "pictures")
    assert (REPOSITORY / "requirements" / "try.txt").is_file()
