"""Files of adapters alone. Their scale alpha / rank lies in the weights: read at scale 1 they are as trained,
by a reader that knows alpha, which is the rank there, and by one that does not.

LoRA and DoRA are kept in diffusers' format, LoKr and LoHa in peft's own, as diffusers has none for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.core.files import read_json, write_json
from stages.lib.core.tensors import checked_metadata, read_header, write_safetensors
from stages.lib.frame.errors import StageError
from stages.lib.models.adapters import NAME, layers_of, peft_config
from stages.lib.models.layout import LORA_WEIGHTS, PEFT_WEIGHTS

if TYPE_CHECKING:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft import PeftConfig

PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_PREFIX, _PEFT_PREFIX = "unet.", "base_model.model."
_DIFFUSERS_CONFIG = "lora_adapter_metadata"
# The first of a module's tensors that is there carries the scale: every update is linear in each.
_SCALED = ("lora_B.weight", "lokr_w1", "lokr_w1_a", "hada_w1_a")


@dataclass(frozen=True)
class AdapterState:
    """Adapters of any kind, apart from their UNet.

    Attributes:
        kind: lora, dora, lokr or loha.
        rank: of modules that ``ranks`` does not name.
        ranks: full module name -> rank.
        target_modules: ends of module names.
        tensors: ``<module>.<parameter>`` -> float32, e.g. ``mid_block...to_q.lora_A.weight``; alpha / rank is
            part of them.
        lineage: texts that travel with them.
    """

    kind: str
    rank: int
    ranks: Mapping[str, int]
    target_modules: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]
    lineage: Mapping[str, str]

    @property
    def config(self) -> PeftConfig:
        """peft's configuration for these tensors: alpha is the rank."""
        ranks = dict(self.ranks)
        alphas = {name: float(rank) for name, rank in ranks.items()}
        return peft_config(self.kind, list(self.target_modules), self.rank, self.rank, ranks, alphas)


def state_of(unet: UNet2DConditionModel, lineage: Mapping[str, str]) -> AdapterState:
    """The adapters of a UNet that `add_adapters` was applied to; the UNet stays as it is."""
    from peft import get_peft_model_state_dict

    config: Any = unet.peft_config[NAME]
    kind = config.peft_type.value.lower()
    tensors = dict(get_peft_model_state_dict(unet))
    for name, layer in layers_of(unet):
        scaled = next(f"{name}.{end}" for end in _SCALED if f"{name}.{end}" in tensors)
        tensors[scaled] = tensors[scaled].detach().float() * layer.scaling[NAME]
    return AdapterState(
        "dora" if getattr(config, "use_dora", False) else kind,
        config.r,
        dict(config.rank_pattern),
        tuple(sorted(config.target_modules)),
        tensors,
        dict(lineage),
    )


def save_adapters(state: AdapterState, path: Path) -> None:
    """Write adapters so that diffusers' ``load_lora_weights(path)`` or peft's ``PeftModel`` reads them.

    The same weights give the same bytes.

    Args:
        state: what is written.
        path: of an existing directory.
    """
    if state.kind in ("lora", "dora"):
        # The keys that every version of peft knows, where they suffice: a reader rejects those it does not.
        adapter: dict[str, Any] = {
            "unet.r": state.rank,
            "unet.lora_alpha": state.rank,
            "unet.target_modules": list(state.target_modules),
        }
        if state.ranks:
            adapter |= {"unet.rank_pattern": dict(state.ranks), "unet.alpha_pattern": dict(state.ranks)}
        if state.kind == "dora":
            adapter["unet.use_dora"] = True
        tensors = {f"{_DIFFUSERS_PREFIX}{name}": tensor for name, tensor in state.tensors.items()}
        metadata = {**state.lineage, _DIFFUSERS_CONFIG: json.dumps(adapter, sort_keys=True)}
        write_safetensors(path / LORA_WEIGHTS, tensors, metadata)
        return
    tensors = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in state.tensors.items()}
    write_safetensors(path / PEFT_WEIGHTS, tensors, state.lineage)
    config = {
        "peft_type": state.kind.upper(),
        "r": state.rank,
        "alpha": state.rank,
        "rank_pattern": dict(state.ranks),
        "alpha_pattern": dict(state.ranks),
        "target_modules": list(state.target_modules),
    }
    write_json(path / PEFT_CONFIG, config)


def read_adapters(directory: Path) -> AdapterState:
    """What `save_adapters` has written.

    Raises:
        StageError: if it is damaged or says nothing of its adapters.
    """
    is_lora = (directory / LORA_WEIGHTS).exists()
    path = directory / (LORA_WEIGHTS if is_lora else PEFT_WEIGHTS)
    prefix = _DIFFUSERS_PREFIX if is_lora else _PEFT_PREFIX
    try:
        from safetensors.torch import load_file

        with open(path, "rb") as file:
            metadata = checked_metadata(read_header(file, path.stat().st_size))
        tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
        if is_lora:
            texts = json.loads(metadata.pop(_DIFFUSERS_CONFIG))
            config = {name.removeprefix(_DIFFUSERS_PREFIX): value for name, value in texts.items()}
            kind = "dora" if config.get("use_dora") else "lora"
        else:
            config = read_json(directory / PEFT_CONFIG, "run `dvc repro train`")
            kind = {"LOKR": "lokr", "LOHA": "loha"}[config["peft_type"]]
        ranks, targets = config.get("rank_pattern", {}), tuple(config["target_modules"])
        return AdapterState(kind, config["r"], ranks, targets, tensors, metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{path}: expected adapters of stage train, got: {error}; run `dvc repro train`"
        ) from error
