"""The model card, README.md: what the Hub reads in front, and what a person reads below."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import yaml

from stages.lib.export.facts import Estimated, Facts
from stages.lib.frame.params import Export

GRID = "grid.png"
PIPELINE = "pipeline"
_TAGS = ("stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers")


class Files(NamedTuple):
    """Names of what was exported beside the card; None where it was not."""

    pipeline: str | None = None
    single_file: str | None = None
    config: str | None = None
    lora_diffusers: str | None = None
    lora_kohya: str | None = None


def file_stem(title: str) -> str:
    """A title as a name of files."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "model"


def model_card(facts: Facts, options: Export, files: Files) -> str:
    """The card's text, in Markdown with a front matter of YAML."""
    front = yaml.safe_dump(_front_matter(facts, options), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---",
        f"# {options.title}",
        *_introduction(facts, options),
        f"![Pictures of the base and of the fine-tuned model]({GRID})",
        f"Guidance {facts.guidance_scale:g}, {facts.num_inference_steps} steps; one row a prompt.",
        *_loading(facts, files),
        "## Data",
        _data(facts),
        "## Metrics",
        *_metrics(facts),
        "## Training",
        _training(facts),
        "## Lineage",
        *_lineage(facts),
    ]
    return "\n\n".join(sections) + "\n"


def for_hub(card: str, hub_id: str) -> str:
    """The card of a repository at whose top the pipeline lies: its examples name the repository."""
    stored = rf'(from_pretrained\(|config=|load_lora_weights\()"(?:{PIPELINE}|\.)"'
    card = re.sub(stored, rf'\1"{hub_id}"', card)
    address = f"https://huggingface.co/{hub_id}/blob/main/"
    return re.sub(r'(from_single_file\(\s*")', rf"\1{address}", card)


def _front_matter(facts: Facts, options: Export) -> dict[str, Any]:
    fields = {
        "license": options.license,
        "license_name": options.license_name if options.license == "other" else None,
        "license_link": options.license_link if options.license == "other" else None,
        "base_model": facts.base_id,
        "base_model_relation": None
        if facts.base_id is None
        else ("adapter" if facts.adapters else "finetune"),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": list(dict.fromkeys([*_TAGS, *(["lora"] if facts.adapters else []), *options.tags])),
        "datasets": [facts.data_id] if facts.data_id else None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _introduction(facts: Facts, options: Export) -> list[str]:
    what = "Adapters (LoRA) of the UNet" if facts.adapters else "The UNet"
    vae = f", with the VAE {facts.vae}" if facts.vae else ""
    steps = f", {facts.step} optimizer steps" if facts.step is not None else ""
    texts = [f"{what} of {facts.base}{vae}, fine-tuned on {facts.data}{steps}."]
    if options.description:
        texts.insert(0, options.description.strip())
    if facts.prediction != "epsilon" or facts.rescaled:
        schedule = (
            ", on a noise schedule that ends in pure noise (zero terminal SNR)" if facts.rescaled else ""
        )
        texts.append(
            f"It predicts `{facts.prediction}`{schedule}: sample it with the scheduler that lies here."
        )
    if options.author:
        texts.append(f"By {options.author}.")
    return texts


def _loading(facts: Facts, files: Files) -> list[str]:
    if files == Files():
        return []
    prompt = json.dumps(facts.prompt, ensure_ascii=False)
    call = (
        f"pipeline({prompt}, guidance_scale={facts.guidance_scale:g}, "
        f"num_inference_steps={facts.num_inference_steps}).images[0].save"
    )
    load = [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipeline = DiffusionPipeline.from_pretrained("{PIPELINE}")',
    ]
    sections = ["## How to load it"]
    if files.pipeline:
        sections += ["The whole pipeline, in diffusers:", _python([*load, f'{call}("pipeline.png")'])]
    if files.single_file:
        sections += [_single_file(files, facts)]
        if files.pipeline:
            sections += [
                "In diffusers, with the configs of the pipeline:",
                _python(
                    [
                        f"from diffusers import {facts.pipeline_class}",
                        "",
                        f"pipeline = {facts.pipeline_class}.from_single_file(",
                        f'    "{files.single_file}", config="{PIPELINE}"',
                        ")",
                        f'{call}("single_file.png")',
                    ]
                ),
            ]
    if files.lora_diffusers:
        base = json.dumps(facts.base_id or "BASE")
        sections += [
            f"The adapters, in diffusers (`{files.lora_diffusers}`), on top of the base:",
            _python(
                [
                    "from diffusers import DiffusionPipeline",
                    "",
                    f"pipeline = DiffusionPipeline.from_pretrained({base})",
                    f'pipeline.load_lora_weights(".", weight_name="{files.lora_diffusers}")',
                    f'{call}("lora.png")',
                ]
            ),
        ]
    if files.lora_kohya:
        sections += [
            f"The adapters for A1111 and ComfyUI: `{files.lora_kohya}`, into their folder `Lora` or `loras`."
        ]
    return sections


def _single_file(files: Files, facts: Facts) -> str:
    text = f"One file for A1111, Forge and ComfyUI: `{files.single_file}`, into their folder of checkpoints"
    text += f", with `{files.config}` beside it for A1111." if files.config else "."
    if facts.prediction == "v_prediction":
        text += " In ComfyUI, a node ModelSamplingDiscrete with `v_prediction`"
        text += " and `zsnr`" if facts.rescaled else ""
        text += " goes before the sampler, but for SDXL, where the file itself says so."
        if facts.rescaled:
            text += " In A1111, set the noise schedule for sampling to Zero Terminal SNR."
    return text


def _python(lines: Iterable[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _data(facts: Facts) -> str:
    counts = facts.counts
    return (
        f"{facts.data}: {counts['num_samples']} images with {counts['num_captions']} captions; "
        f"{counts['num_train_samples']} trained on, {counts['num_validation_samples']} held out, "
        f"{counts['num_rejected']} left out because they could not be used."
    )


def _metrics(facts: Facts) -> list[str]:
    rows = [
        f"| {metric.label} | {metric.better} | {_estimate(metric.base)} | {_estimate(metric.tuned)} |"
        for metric in facts.metrics
        if metric.tuned.value is not None
    ]
    table = "\n".join(["| metric | better | base | fine-tuned |", "|---|---|---|---|", *rows])
    return [table, "In brackets, intervals of the values over the held-out samples."]


def _estimate(estimate: Estimated) -> str:
    if estimate.value is None:
        return "not measured"
    interval = (
        "" if estimate.low is None or estimate.high is None else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
    )
    return f"{estimate.value:.4g}{interval}"


def _training(facts: Facts) -> str:
    return "\n".join(["| parameter | value |", "|---|---|", *_rows(facts.parameters)])


def _rows(parameters: Mapping[str, Any]) -> list[str]:
    return [f"| `{name}` | `{json.dumps(value)}` |" for name, value in parameters.items()]


def _lineage(facts: Facts) -> list[str]:
    if facts.lineage_problem:
        return [facts.lineage_problem]
    rows = [f"| {output.stage} | `{output.path}` | `{output.hash}` |" for output in facts.lineage]
    return [
        "MD5 of what each stage made, as DVC recorded it in `dvc.lock`.",
        "\n".join(["| stage | output | hash |", "|---|---|---|", *rows]),
    ]
