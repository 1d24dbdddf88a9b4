"""The page for trying models by hand, in gradio: what is asked for on the left, both pictures beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.core.files import fresh_directory
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Evaluate
from stages.lib.trial.studio import Wish

if TYPE_CHECKING:
    from PIL import Image

INSTALL = "pip install --no-deps -r requirements/try.txt"
TITLE = "Base and fine-tuned, side by side"
FONTS = ["system-ui", "sans-serif"]  # of the machine: gradio's own come from a server
ENLARGED = "#base img, #tuned img {width: 100%; height: auto}"
MAX_SEED = 2**31 - 1


def build_page(
    draw: Callable[[Wish], tuple[Image.Image, Image.Image]],
    choices: list[str],
    options: Evaluate,
    pictures: Path,
) -> Any:
    """The page, a ``gradio.Blocks`` that is not started yet.

    Args:
        draw: makes the pictures of both sides; one call at a time.
        choices: names of the weights that can be tried, the first is shown first.
        options: what the fields begin with, as `evaluate` renders.
        pictures: directory from whose files gradio serves them; what an earlier page left there is removed.

    Raises:
        StageError: if gradio is not installed.
    """
    fresh_directory(pictures)
    os.environ["GRADIO_TEMP_DIR"] = str(pictures.resolve())
    gradio = _gradio()

    def make(
        prompt: str, negative: str, seed: float, steps: float, guidance: float, strength: float, weights: str
    ) -> tuple[Image.Image, Image.Image]:
        wish = Wish(prompt, negative, int(seed or 0), int(steps), float(guidance), float(strength), weights)
        try:
            return draw(wish)
        except StageError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    theme = gradio.themes.Base(font=FONTS, font_mono=["monospace"])
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(f"# {TITLE}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                asked = _fields(gradio, choices, options)
                button = gradio.Button("Draw", variant="primary", elem_id="draw")
            shown: dict[str, Any] = {
                "interactive": False, "format": "png", "buttons": ["download", "fullscreen"]
            }  # fmt: skip
            base = gradio.Image(label="Base", elem_id="base", **shown)
            tuned = gradio.Image(label="Fine-tuned", elem_id="tuned", **shown)
        for event in (button.click, *(field.submit for field in asked[:2])):
            event(
                make,
                asked,
                [base, tuned],
                api_visibility="private",
                concurrency_limit=1,
                concurrency_id="model",
            )
    page.theme = theme
    return page


def _fields(gradio: Any, choices: list[str], options: Evaluate) -> list[Any]:
    """What is asked for, in the order of `Wish`."""
    return [
        gradio.Textbox(options.prompts[0], label="Prompt", autofocus=True, elem_id="prompt"),
        gradio.Textbox(options.negative_prompt, label="Negative prompt"),
        gradio.Number(options.seeds[0], label="Seed", precision=0, minimum=0, maximum=MAX_SEED),
        gradio.Slider(1, 100, options.num_inference_steps[0], step=1, label="Steps"),
        gradio.Slider(1, 20, options.guidance_scale[0], step=0.1, label="Guidance scale"),
        gradio.Slider(0, 2, 1, step=0.05, label="Strength", info="0 is the base, 1 the weights as trained"),
        gradio.Dropdown(choices, value=choices[0], label="Weights"),
    ]


def serve(page: Any, port: int | None, open_browser: bool) -> None:
    """Serve the page on this machine alone, until Ctrl-C.

    Raises:
        StageError: if the port is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            theme=page.theme,
            css=ENLARGED,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            run_history=False,
            pwa=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise StageError(
            f"port {port}: cannot be used ({error}); give another with --port, or none for a free one"
        ) from error
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise StageError(
            f"this page needs the package gradio, which is not installed; run `{INSTALL}`"
        ) from error
    return gradio
