"""The names of a text encoder's tensors, as every published base has them.

Written with transformers 5 the names of a ``CLIPTextModel`` lose their ``text_model.``; readers of before
find none of them then, and leave the weights random without an error. Files are renamed in their header
alone: no tensor is loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from stages.lib.core.files import open_atomically, write_json
from stages.lib.core.tensors import MAX_HEADER_BYTES, tensor_names
from stages.lib.frame.errors import StageError
from stages.lib.models.layout import read_config

PREFIX = "text_model."
_SHORT_STARTS = ("embeddings.", "encoder.", "final_layer_norm.")
_COPY_BYTES = 2**22


def published_name(name: str) -> str:
    """Of a tensor of a text encoder; ``text_projection.weight`` and published names stay as they are."""
    return PREFIX + name if name.startswith(_SHORT_STARTS) else name


def write_published_names(component: Path) -> None:
    """Give the tensors of a text encoder their published names; files that have them are left alone.

    Args:
        component: directory of safetensors, e.g. ``data/base/text_encoder``.

    Raises:
        StageError: naming a file that is not whole, or in which two tensors would get one name.
    """
    for path in sorted(component.glob("*.safetensors")):
        names = tensor_names(path)
        renamed = {name: new for name in sorted(names) if (new := published_name(name)) != name}
        if clashes := sorted(names & set(renamed.values())):
            raise StageError(
                f"{path}: expected each tensor once, got {clashes[0]} with and without {PREFIX!r}; "
                "take another copy of the text encoder"
            )
        if renamed:
            _rewrite(path, renamed)
    for path in sorted(component.glob("*.safetensors.index.json")):
        index = read_config(path)
        weight_map = index.get("weight_map", {})
        renamed_map = {published_name(name): shard for name, shard in weight_map.items()}
        if renamed_map != weight_map:
            write_json(path, {**index, "weight_map": renamed_map})


def _rewrite(path: Path, renamed: dict[str, str]) -> None:
    """The same bytes of tensors behind a header with other names: whole or not at all."""
    with open(path, "rb") as source, open_atomically(path) as target:
        length = int.from_bytes(source.read(8), "little")
        assert length <= MAX_HEADER_BYTES  # as `tensor_names` has checked
        header = {renamed.get(name, name): entry for name, entry in json.loads(source.read(length)).items()}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, _COPY_BYTES)
