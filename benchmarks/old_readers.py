"""Whether what `export` writes loads in earlier releases of diffusers and transformers, and draws the same.

    python -m venv old && old/bin/pip install torch==2.13.0 diffusers==0.32.2 transformers==4.48.3 \
        accelerate==1.3.0 peft==0.14.0 huggingface_hub==0.28.1 safetensors==0.5.2
    python benchmarks/old_readers.py old/bin/python

A small project with shrunk weights of Stable Diffusion 1.5 and 2.1, true configs and names, trains its UNet
and adapters and exports every format. The other Python loads each, and fails on a missing or unexpected key.
Writes benchmarks/results/old_readers.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from small_project import MODULE_OF, ROOT, environment, make, must, run, write_params

from tests import checkpoints
from tests.clips import bundled_clip

RESULT = ROOT / "benchmarks" / "results" / "old_readers.json"
READER = """
import json, sys, logging, io
from pathlib import Path
import diffusers, numpy as np, torch, transformers
from diffusers import StableDiffusionPipeline
export, base = Path(sys.argv[1]), Path(sys.argv[2])
logged = io.StringIO()
for library in (diffusers, transformers):
    library.logging.set_verbosity_warning()
for name in ("diffusers", "transformers"):
    logging.getLogger(name).addHandler(logging.StreamHandler(logged))

def picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("red cat", num_inference_steps=3, generator=generator, output_type="np",
                    height=64, width=64).images[0].tolist()

text_encoder = export / "pipeline/text_encoder"
_, loading = transformers.CLIPTextModel.from_pretrained(text_encoder, output_loading_info=True)
keys = {name: sorted(loading[name]) for name in ("missing_keys", "unexpected_keys")}
whole = StableDiffusionPipeline.from_pretrained(export / "pipeline", safety_checker=None)
pictures = {"pipeline": picture(whole)}
single = next(path for path in export.glob("*.safetensors") if "lora" not in path.name)
pipeline = StableDiffusionPipeline.from_single_file(str(single), config=str(export / "pipeline"),
                                                    local_files_only=True, safety_checker=None)
pictures["single_file"] = picture(pipeline)
for path in sorted(export.glob("*lora*.safetensors")):
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, torch_dtype=torch.float32)
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(export / "pipeline/scheduler")
    pipeline.load_lora_weights(str(export), weight_name=path.name)
    pictures[path.name] = picture(pipeline)
print("RESULT" + json.dumps({"keys": keys, "pictures": pictures, "log": logged.getvalue(),
      "versions": {each.__name__: each.__version__ for each in (diffusers, transformers, torch)}}))
"""


def read(python: str, export: Path, base: Path) -> dict:
    """What a Python says of the files: loading keys, a picture of each, what was logged."""
    done = subprocess.run(
        [python, "-c", READER, export, base],
        env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{python}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.partition("RESULT")[2])


def exported(root: Path, like: str, adapters: bool) -> Path:
    """A project with a base like the published one, trained and exported."""
    make(root)
    shutil.rmtree(root / "base")
    bundled_clip(getattr(checkpoints, like)(root / "base") / "clip")
    formats = ["pipeline", "single_file", *(["lora_diffusers", "lora_kohya"] if adapters else [])]
    train = {"lora_rank": 4, "lora_alpha": 2.5, "learning_rate": 1.0e-2} if adapters else {}
    write_params(root, export={"formats": formats}, train=train)
    for stage in [*MODULE_OF, "export"]:
        must(run(root, sys.executable, "-m", MODULE_OF.get(stage, f"stages.{stage}")))
    return root / "data" / "export"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("python", help="of the environment with the earlier releases")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for like in ("sd15_like", "sd21_like"):
            for adapters in (False, True):
                export = exported(Path(scratch) / f"{like}_{adapters}", like, adapters)
                base = export.parent / "base"
                here, there = read(sys.executable, export, base), read(options.python, export, base)
                expected = np.array(here["pictures"]["pipeline"])
                differences = {
                    f"{where} {name}": float(np.abs(np.array(picture) - expected).max())
                    for where, found in (("here", here), ("there", there))
                    for name, picture in found["pictures"].items()
                }
                rows.append({"base": like, "adapters": adapters, "keys": there["keys"], "log": there["log"],
                             "versions": there["versions"], "largest_differences": differences})  # fmt: skip
                print(json.dumps(rows[-1], indent=1), flush=True)
    here = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    RESULT.write_text(json.dumps({"here": here, "runs": rows}, indent=1) + "\n")
    if any(row["keys"]["missing_keys"] or row["keys"]["unexpected_keys"] for row in rows):
        raise SystemExit("keys are missing or unexpected")


if __name__ == "__main__":
    main()
