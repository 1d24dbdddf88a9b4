"""A run's outputs as its stages would leave them, made of small drawn pictures and round numbers."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from stages.lib.core.sums import SUMS, hash_file, write_sealed_json, write_sum, write_sums
from stages.lib.core.tensors import write_safetensors
from stages.lib.evaluation.measuring.pictures import hashes_of_pictures
from tests.conftest import REPOSITORY, draw_image, png

PROMPTS = (
    "red heart",
    '<b>bold</b> & "quoted" </script><script>alert(1)</script>',
    "قلب أحمر",
    "赤いハート 🫀",
)
SETTINGS = (("base", 5.0, 25), ("ddim", 2.0, 10))


def setting_name(scheduler: str, guidance_scale: float, num_inference_steps: int) -> str:
    return f"{scheduler}_guidance{guidance_scale:g}_steps{num_inference_steps}"


def estimate(value: float | None, spread: float = 0.01) -> dict[str, float | None]:
    if value is None:
        return {"value": None, "low": None, "high": None}
    return {"value": value, "low": value - spread, "high": value + spread}


def metric(
    name: str, label: str, better: str, base: float | None, tuned: float | None, num_values: int = 0
) -> dict[str, Any]:
    """An entry of the report; with ``num_values``, those it is the mean of, which vary far more than it."""
    change = None if base is None or tuned is None else tuned - base
    values = {}
    if num_values and base is not None and tuned is not None:
        spread = [math.sin(3.0 * index) * base for index in range(num_values)]
        values = {
            "names": [f"{index}.png" for index in range(num_values)],
            "base": [base + each for each in spread],
            "tuned": [tuned + 0.9 * each for each in spread],
        }
    return ({"values": values} if values else {}) | {
        "name": name,
        "label": label,
        "better": better,
        "base": estimate(base),
        "tuned": estimate(tuned),
        "difference": estimate(change),
        "note": f"how {label} is measured",
    }


def write_run(
    root: Path,
    tuned: int = 1,
    loss: float = 0.08,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0, 7),
    pictures: bool = True,
    size: int = 16,
) -> None:
    """Write data/ and params.yaml.

    Args:
        tuned: another number draws other pictures of the tuned UNet; the base's stay.
        loss: of the tuned UNet; the base's is 0.1.
        pictures: False leaves out all that can be switched off, as well as rejected samples.
    """
    data = root / "data"
    for folder, number in (("baseline", 0), ("evaluation", tuned)):
        for place, setting in enumerate(SETTINGS):
            for index, _ in enumerate(prompts):
                for seed in seeds:
                    name = f"prompt{index:02d}_seed{seed}.png"
                    draw(
                        data / folder / "samples" / setting_name(*setting) / name,
                        number,
                        place,
                        index,
                        seed,
                        size,
                    )
    draw(data / "baseline/contact_sheet.png", 0, 1, 0, 0, 64)
    if pictures:
        for place, name in enumerate(("sweep", "denoising", "learning", "nearest")):
            draw(data / f"evaluation/{name}.png", tuned, 5, place, 0, 300)
        draw(data / "baseline/denoising.png", 0, 5, 0, 0, 300)
        for setting in SETTINGS:
            draw(data / f"evaluation/grids/{setting_name(*setting)}.png", tuned, 6, 0, 0, 400)
        draw(data / "encode_images_report/worst_reconstructions.png", 0, 7, 0, 0, 200)
        write(
            data / "pairs/rejected.jsonl",
            lines({"name": f"{i}<i>.png", "reason": "broken"} for i in range(23)),
        )
        write(
            data / "encode_images_report/left_out.jsonl",
            lines([{"sample_id": "tiny.png", "reason": "small"}]),
        )
    report = {
        "prompts": list(prompts),
        "seeds": list(seeds),
        "settings": [
            {
                "name": setting_name(*setting),
                "scheduler": setting[0],
                "guidance_scale": setting[1],
                "num_inference_steps": setting[2],
            }
            for setting in SETTINGS
        ],
        "examples": {prompts[0]: "hearts/<red>.png"},
        "metrics": [
            metric("validation_loss", "Held-out loss", "lower", 0.1, loss, 20),
            metric("clip_score", "CLIP score", "higher", 21.5, 21.5078125, 20),
            metric("kid", "KID", "lower", 0.02, 0.06) | {"real": estimate(0.001, 0.0005)},
            metric("fid", "FID", "lower", None, None),
        ],
        "memorised": [{"picture": "prompt00_seed0.png", "sample_id": "hearts/<red>.png", "similarity": 0.97}],
    }  # fmt: skip
    write(data / "evaluation/report.json", json.dumps(report, indent=2))
    for name, scale in (("train_loss", loss), ("validation_loss", loss), ("lr", 3e-4), ("grad_norm", 1.0)):
        rows = [f"{step}\t{scale * (1 + 10 / step)}" for step in range(10, 101, 10)]
        write(data / f"training/plots/metrics/{name}.tsv", "\n".join([f"step\t{name}", *rows]) + "\n")
    (data / "unet").mkdir(exist_ok=True)
    write_safetensors(data / "unet/diffusion_pytorch_model.safetensors", {}, {"prediction_type": "epsilon"})
    (data / "encode_images_report").mkdir(exist_ok=True)
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["evaluate"] |= {"prompts": list(prompts), "seeds": list(seeds)}
    write(root / "params.yaml", yaml.safe_dump(params, sort_keys=False, allow_unicode=True))
    seal_run(root)


def seal_run(root: Path) -> None:
    """Write the hashes that the stages leave beside what they make, of what is there now."""
    data = root / "data"
    if not (data / "pairs/rejected.jsonl").exists():
        write(data / "pairs/rejected.jsonl", "")
    write_sum(data / "pairs/rejected.jsonl")
    write_sums(data / "unet")
    unet = hash_file(data / "unet" / SUMS)
    write(data / "training/plots/run.json", json.dumps({"unet_sha256": unet}))
    for directory in (data / "training/plots", data / "encode_images_report"):
        write_sums(directory)
    path = data / "evaluation/report.json"
    report = json.loads(path.read_text())
    report |= {
        "unet_sha256": unet,
        "base_files": hashes_of_pictures(data / "baseline"),
        "files": hashes_of_pictures(data / "evaluation"),
    }
    write_sealed_json(path, {name: value for name, value in report.items() if name != "sha256"})


def write_lock(root: Path) -> None:
    """dvc.lock with three stages upstream of the report, and two that are not."""

    def entry(path: str) -> dict[str, Any]:
        file = root / path
        content = file.read_bytes() if file.is_file() else path.encode()
        return {"path": path, "hash": "md5", "md5": hashlib.md5(content).hexdigest(), "size": len(content)}

    stages = {
        "plots_page": {"cmd": "plots_page", "outs": [entry("data/plots_page.html")]},
        "evaluate": {
            "cmd": "evaluate",
            "deps": [entry("data/unet"), entry("data/base")],
            "outs": [entry("data/evaluation/report.json"), entry("data/evaluation/samples")],
        },
        "gallery": {"cmd": "gallery", "deps": [entry("data/evaluation/report.json")], "outs": []},
        "train": {"cmd": "train", "deps": [entry("data/base/unet")], "outs": [entry("data/unet")]},
        "fetch_base": {"cmd": "fetch_base", "deps": [entry("data/tiny")], "outs": [entry("data/base")]},
    }
    write(root / "dvc.lock", yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))


def draw(path: Path, *numbers: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    *seed, size = numbers
    path.write_bytes(png(draw_image(hash(tuple(seed)) % 2**32, (size, size))))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def lines(entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
