"""Learn the embeddings of a placeholder token (textual inversion); UNet and text encoder stay as they are.

Reads  data/base/{tokenizer,text_encoder,unet,scheduler}, data/latents.zarr, data/captions.zarr,
       data/pairs/captions.parquet
Writes data/embeddings: learned_embeds.safetensors (diffusers), a1111.safetensors, metrics.json, plots/;
       nothing but SHA256SUMS with invert.placeholder: null
Params invert, validation
"""

from __future__ import annotations

from stages.lib.core.files import fresh_directory
from stages.lib.core.paths import EMBEDDINGS
from stages.lib.core.sums import write_sums
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage


def main(params: Params) -> None:
    if params.invert.placeholder is None:
        write_sums(fresh_directory(EMBEDDINGS))
        return
    # Only here: a run that learns nothing need not wait for the libraries.
    from stages.lib.core.fingerprints import code_identity
    from stages.lib.core.paths import BASE
    from stages.lib.inversion.embedding_files import write_placeholder
    from stages.lib.inversion.learning import WATCHING, learn
    from stages.lib.models.layout import check_component

    for component in ("tokenizer", "text_encoder", "unet", "scheduler"):
        check_component(BASE, component)
    placeholder, lineage = learn(params, code_identity(learn, without=WATCHING))
    write_placeholder(placeholder, lineage)


if __name__ == "__main__":
    run_stage("invert", ("invert", "validation"), main)
