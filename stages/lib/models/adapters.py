"""Adapters in a UNet, through peft: small updates that are trained while its own weights stay as they are.

| kind | update of a weight W, with s = alpha / rank | source |
|---|---|---|
| lora | s B A, of the rank of A | Hu et al. 2022 |
| dora | the same, and the length of each row is trained apart from its direction | Liu et al. 2024 |
| lokr | s w1 x w2, a Kronecker product; w2 is a product itself where that is smaller | Yeh et al. 2024 |
| loha | s (w1_a w1_b) * (w2_a w2_b), a product element by element | Hyeon-Woo et al. 2022 |
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.core.draws import generator
from stages.lib.frame.errors import StageError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft import PeftConfig

NAME = "default"  # peft's name of the one adapter that there is
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
ALL = "all_linear_and_conv"
PRESETS = {"attention": ATTENTION, "attention_and_feed_forward": (*ATTENTION, *FEED_FORWARD)}
# conv_in, conv_out and the time embedding lie outside of them: other tools have no adapters there.
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


@dataclass(frozen=True)
class Strength:
    """Rank and alpha of the modules whose whole name a pattern fits, e.g. ``mid_block.*``.

    Attributes:
        modules: a pattern as of file names, with * and ?.
        rank: of their update.
        alpha: None is that of the others.
    """

    modules: str
    rank: int
    alpha: float | None = None


@dataclass(frozen=True)
class Adapters:
    """Which adapters a UNet gets.

    Attributes:
        kind: lora, dora, lokr or loha.
        rank: of the update, 1 or more.
        alpha: the update is scaled by alpha / rank.
        target_modules: ends of module names, e.g. ``to_q`` or ``to_out.0``, or a preset's name.
        by_module: other ranks and alphas; the first pattern that fits a module is taken.
    """

    kind: str
    rank: int
    alpha: float
    target_modules: Sequence[str]
    by_module: Sequence[Strength] = ()


def add_adapters(unet: UNet2DConditionModel, adapters: Adapters, seed: int) -> None:
    """Freeze the UNet and add adapters, in place; only they require a gradient.

    One factor of each update is zero, so the output is the base's until the first step. The others are drawn
    as peft draws them, uniform within 1 / sqrt(fan_in), from a stream of (seed, name of the weight).

    Args:
        unet: on the CPU.
        adapters: kind, size and place.
        seed: of the run.

    Raises:
        StageError: naming what fits no module, and modules that peft has no adapter for.
    """
    ends = expand_targets(unet, adapters.target_modules)
    try:
        config = config_of(adapters, ends, [name for name, _ in unet.named_modules()])
    except ImportError as error:
        raise StageError(
            "params.yaml: train.lora_rank needs the package peft, which is not installed; "
            'run `pip install -e ".[lora]"`'
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):
            unet.add_adapter(config)
    except (TypeError, ValueError) as error:
        raise StageError(f"params.yaml: train.lora_target_modules: {error}") from error
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad and ".lora_magnitude_vector." not in name and parameter.any():
            torch.nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator(seed, "lora", name))


def expand_targets(unet: torch.nn.Module, target_modules: Iterable[str]) -> list[str]:
    """Ends of module names, with presets written out.

    Raises:
        StageError: naming every entry that no module's name ends in.
    """
    ends: list[str] = []
    for entry in target_modules:
        ends += _all_of(unet) if entry == ALL else PRESETS.get(entry, (entry,))
    names = [f".{name}" for name, _ in unet.named_modules()]
    absent = [end for end in ends if not any(name.endswith(f".{end}") for name in names)]
    if absent:
        raise StageError(
            f"params.yaml: train.lora_target_modules: data/base/unet has no module {', '.join(absent)}; "
            "attention projections are to_q, to_k, to_v and to_out.0; "
            f"presets are {', '.join([*PRESETS, ALL])}"
        )
    return list(dict.fromkeys(ends))


def _all_of(unet: torch.nn.Module) -> list[str]:
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.startswith(BLOCKS)
    ]


def config_of(adapters: Adapters, ends: Sequence[str], names: Sequence[str]) -> PeftConfig:
    """peft's configuration.

    Args:
        adapters: kind and size.
        ends: of the names of modules that get one.
        names: of all modules.

    Raises:
        StageError: naming the patterns that fit no module which gets an adapter.
    """
    targets = [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    unused = list(adapters.by_module)
    for name in targets:
        fitting = (each for each in adapters.by_module if fnmatch.fnmatchcase(name, each.modules))
        if (first := next(fitting, None)) is not None:
            ranks[name] = first.rank
            alphas[name] = adapters.alpha if first.alpha is None else first.alpha
            unused = [each for each in unused if each is not first]
    if unused:
        raise StageError(
            "params.yaml: train.lora_by_module: expected patterns that fit modules with an adapter and are "
            f"not reached by earlier ones, got {', '.join(each.modules for each in unused)}; "
            f"such modules are {targets[0]} and others"
        )
    return peft_config(adapters.kind, list(ends), adapters.rank, adapters.alpha, ranks, alphas)


def peft_config(
    kind: str, targets: list[str], rank: int, alpha: float, ranks: dict[str, int], alphas: dict[str, float]
) -> PeftConfig:
    """The configuration of adapters, with ranks and alphas of single modules that have others."""
    import peft

    shared: dict[str, Any] = {"target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas}
    if kind in ("lora", "dora"):
        return peft.LoraConfig(r=rank, lora_alpha=alpha, use_dora=kind == "dora", **shared)  # type: ignore[arg-type]
    config_class = {"lokr": peft.LoKrConfig, "loha": peft.LoHaConfig}[kind]
    return config_class(r=rank, alpha=alpha, **shared)  # type: ignore[arg-type]


def layers_of(unet: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of each module with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def merge(unet: UNet2DConditionModel) -> None:
    """Add the adapters to the weights and take them away, in place."""
    for name, layer in list(layers_of(unet)):
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(unet.get_submodule(parent), last, layer.get_base_layer())
    del unet.peft_config
    unet._hf_peft_config_loaded = False
