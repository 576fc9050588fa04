"""Low-rank adapters on the Linear and Conv2d layers of any network, through peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.backbones.hf import DiffusersNetwork
from fewstep.denoiser import Denoiser, ModuleBackbone
from fewstep.errors import ConfigError
from fewstep.weights import chosen, shared, tensors_of

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
"""peft's name of a network's only adapter."""

_WRAPPERS: dict[type[nn.Module], str] = {ModuleBackbone: "module", DiffusersNetwork: "network"}
"""Backbones around somebody else's network, and where it is: its adapter has the names that its tools know."""


@dataclass(frozen=True)
class Adapter:
    """``W' = W + scale B A`` on ``layers``, with B = 0 at the start (arXiv 2106.09685; rsLoRA: 2312.03732).

    Args:
        root: where in the backbone the network is that peft sees ("" is the backbone itself).
        layers: full names in it, or pieces of "all".
        rank: rows of A and columns of B.
        alpha: ``scale = alpha / rank``, or ``alpha / sqrt(rank)`` if ``stabilised``.
    """

    root: str
    layers: tuple[str, ...]
    rank: int
    alpha: float
    stabilised: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.stabilised else self.rank)


def adaptable(backbone: nn.Module, patterns: tuple[str, ...] = ("all",)) -> tuple[str, tuple[str, ...]]:
    """Where peft is to see the network, and the layers in it that take an adapter and that ``patterns`` mean.

    They are plain Linear layers and Conv2d layers without groups, dilation or circular padding. Layers that do more
    than their weight says (EDM's resampling convolutions, EDM2's normalised ones) are left as they are: what is added
    beside them would not be what merging adds to their weight.

    Raises:
        ConfigError: there are none, or a pattern means none of them.
    """
    root = next((name for wrapper, name in _WRAPPERS.items() if isinstance(backbone, wrapper)), "")
    names = [name for name, layer in backbone.get_submodule(root).named_modules() if _takes(name, layer)]
    if not names:
        raise ConfigError(
            "This network has no layer that takes an adapter",
            got=f"a {type(backbone.get_submodule(root)).__name__}",
            want="a Linear or Conv2d layer",
            do="Freeze parts of it by name instead: --set student.freeze=[...]",
        )
    return root, tuple(chosen(patterns, names, "adapter.targets"))


def _takes(name: str, layer: nn.Module) -> bool:
    if name.endswith("map_augment"):  # EDM's: takes no part without augmentation labels
        return False
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and layer.dilation == (1, 1)
    return type(layer) is nn.Linear


def attach(backbone: nn.Module, adapter: Adapter, seed: int = 0) -> None:
    """Put the adapter into the network, in place, and freeze everything else; its A is drawn from ``seed``.

    Raises:
        ConfigError: peft is not installed, or the network has adapters already.
    """
    if adapter_of(backbone) is not None:
        raise ConfigError("The network carries an adapter already", do="Merge it into the network first")
    config = _peft_config(adapter)
    from peft import inject_adapter_in_model

    backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, backbone.get_submodule(adapter.root), NAME)


def adapter_of(backbone: nn.Module) -> Adapter | None:
    """The adapter that a network carries."""
    for root, module in backbone.named_modules():
        config = vars(module).get("peft_config", {}).get(NAME)
        if config is not None:
            layers = tuple(name for name, _ in _adapted_layers(module))
            return Adapter(root, layers, config.r, config.lora_alpha, config.use_rslora)
    return None


def base_names(backbone: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that an adapted network had before; all of them frozen."""
    adapter = adapter_of(backbone)
    if adapter is None:
        return frozenset()
    inside = f"{adapter.root}." if adapter.root else ""
    return frozenset(name for name in tensors_of(backbone) if name.startswith(inside) and ".lora_" not in name)


def plain_name(name: str) -> str:
    """What a parameter of an adapted network was called before."""
    return name.replace(".base_layer.", ".")


def merged(denoiser: Denoiser) -> Denoiser:
    """The same function without adapters, ``W + scale B A`` in place of W; equal up to rounding.

    Everything else is shared with ``denoiser``. One that carries no adapter is returned as it is.
    """
    adapter = adapter_of(denoiser.backbone)
    if adapter is None:
        return denoiser
    memo = shared(denoiser.backbone, tensors_of(denoiser.backbone)) | {id(denoiser.codec): denoiser.codec}
    out: Denoiser = copy.deepcopy(denoiser, memo)
    root = out.backbone.get_submodule(adapter.root)
    for name, layer in list(_adapted_layers(root)):
        plain = layer.get_base_layer()
        weight = plain.weight.detach() + layer.get_delta_weight(NAME).detach().to(plain.weight.dtype)
        plain.weight = nn.Parameter(weight)
        root.set_submodule(name, plain)
    vars(root).pop("peft_config")
    return out.requires_grad_(True)


def adapter_tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """A and B by name: ``"enc.conv0.lora_A.weight"``, relative to the network that peft sees."""
    adapter = adapter_of(backbone)
    if adapter is None:
        return {}
    found = {}
    for name, layer in _adapted_layers(backbone.get_submodule(adapter.root)):
        found[f"{name}.lora_A.weight"] = layer.lora_A[NAME].weight.detach()
        found[f"{name}.lora_B.weight"] = layer.lora_B[NAME].weight.detach()
    return found


def peft_record(adapter: Adapter, base: str) -> dict[str, Any]:
    """What peft's ``adapter_config.json`` holds, for the base model of that name or path."""
    record: dict[str, Any] = _peft_config(adapter).to_dict()  # type: ignore[no-untyped-call]
    record |= {"base_model_name_or_path": base, "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in record.items()}


def _adapted_layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in root.named_modules() if hasattr(layer, "lora_A"))


def _peft_config(adapter: Adapter) -> LoraConfig:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            "Adapters need the package peft, which is not installed", do="Run: pip install 'fewstep[hf]'"
        ) from error
    exactly = "|".join(re.escape(name) for name in adapter.layers)  # a list would match other names that end alike
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft divides by the rank
        use_rslora=adapter.stabilised,
        target_modules=exactly,
    )
