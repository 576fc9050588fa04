"""How each kind of diffusers network is called, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.types import Samples

Config = Mapping[str, Any]
"""A network's configuration, every argument of its class present."""

FLUX_GUIDANCE = 3.5
"""What a Flux that was distilled for guidance is told: the strength that its pipeline asks for."""

FLUX_SIDE = 128
"""Flux's latents per side: it says no size of its own, its pipeline makes 1024 pixels."""


class Kind:
    """One class of networks: U-Nets with one embedding of time, unless a method says otherwise."""

    def problem(self, config: Config) -> str | None:
        """Why such a network cannot be called from here, or None."""
        inputs, outputs = config["in_channels"], config["out_channels"]
        if outputs not in (None, inputs, 2 * inputs):
            return f"{inputs} channels in and {outputs} out"
        return None

    def classes(self, config: Config) -> int:
        """Number of class labels; 0 where it is told none."""
        return int(config["num_class_embeds"] or 0)

    def null_class(self, config: Config) -> int:
        """The label that says nothing."""
        return -1

    def parts(self, config: Config) -> dict[str, int]:
        """Embeddings that it is told: name -> size of the last dimension."""
        return {}

    def sample_shape(self, config: Config, side: int | None = None) -> tuple[int, ...] | None:
        """Shape of a sample, of ``side`` pixels (or latents) or as configured; None where it says no size."""
        size = side or config["sample_size"]
        if size is None:
            return None
        return (int(config["in_channels"]), *((size, size) if isinstance(size, int) else size))

    def width(self, network: Any) -> int:
        """Width of its embedding of time."""
        return int(network.time_embedding.linear_2.out_features)

    def embedders(self, network: Any) -> list[nn.Module]:
        """What returns the embedding of time."""
        return [network.time_embedding]

    def adapt(self, network: Any) -> None:
        """Changes in place, none in names or values of weights."""
        table = network.class_embedding
        if isinstance(table, nn.Embedding):
            network.class_embedding = LabelTable(table.num_embeddings, table.embedding_dim)

    def call(self, network: Any, x: Samples, t: Tensor, said: dict[str, Tensor]) -> Tensor:
        """The prediction, as its pipeline asks for it. ``said`` holds parts by name, or ``labels [b]``."""
        raise NotImplementedError


class LabelTable(nn.Embedding):
    """An embedding of labels ``[b]`` in which -1 is zeros."""

    def forward(self, labels: Tensor) -> Tensor:
        rows = super().forward(labels.clamp_min(0))
        return torch.where((labels >= 0)[:, None], rows, torch.zeros_like(rows))


class UNet2D(Kind):
    """``UNet2DModel``: DDPM, DDIM, consistency models."""

    def problem(self, config: Config) -> str | None:
        if config["time_embedding_type"] != "positional":
            return f"time_embedding_type '{config['time_embedding_type']}'"
        if config["class_embed_type"] is not None:
            return f"class_embed_type '{config['class_embed_type']}'"
        return super().problem(config)

    def call(self, network: Any, x: Samples, t: Tensor, said: dict[str, Tensor]) -> Tensor:
        return network(x, t, class_labels=said.get("labels"), return_dict=False)[0]


class UNet2DCondition(Kind):
    """``UNet2DConditionModel``: Stable Diffusion 1, 2 and XL."""

    def problem(self, config: Config) -> str | None:
        known = {
            "class_embed_type": (None,),
            "encoder_hid_dim_type": (None, "text_proj"),
            "addition_embed_type": (None, "text", "text_time"),
            "time_cond_proj_dim": (None,),
        }
        other = [f"{name} {config[name]!r}" for name, values in known.items() if config[name] not in values]
        return other[0] if other else super().problem(config)

    def parts(self, config: Config) -> dict[str, int]:
        blocks = [*config["down_block_types"], config["mid_block_type"], *config["up_block_types"]]
        if not any("CrossAttn" in str(block) for block in blocks):
            return {}
        width = config["encoder_hid_dim"] or config["cross_attention_dim"]
        told = {"text": width if isinstance(width, int) else width[0]}
        if config["addition_embed_type"] != "text_time":
            return told
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return told | {"pooled": pooled, "time_ids": 6}

    def call(self, network: Any, x: Samples, t: Tensor, said: dict[str, Tensor]) -> Tensor:
        added = {"text_embeds": said["pooled"], "time_ids": said["time_ids"]} if "time_ids" in said else None
        return network(
            x, t, encoder_hidden_states=said.get("text"), class_labels=said.get("labels"), added_cond_kwargs=added,
            return_dict=False,
        )[0]  # fmt: skip


class DiT(Kind):
    """``DiTTransformer2DModel``: every block embeds time and label for itself."""

    def classes(self, config: Config) -> int:
        return int(config["num_embeds_ada_norm"])

    def null_class(self, config: Config) -> int:
        return int(config["num_embeds_ada_norm"])

    def width(self, network: Any) -> int:
        return int(network.inner_dim)

    def embedders(self, network: Any) -> list[nn.Module]:
        return [block.norm1.emb for block in network.transformer_blocks]

    def adapt(self, network: Any) -> None:
        for block in network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def call(self, network: Any, x: Samples, t: Tensor, said: dict[str, Tensor]) -> Tensor:
        return network(x, timestep=t, class_labels=said["labels"], return_dict=False)[0]


class SD3(Kind):
    """``SD3Transformer2DModel``: token states and a pooled embedding."""

    def classes(self, config: Config) -> int:
        return 0

    def parts(self, config: Config) -> dict[str, int]:
        return {"text": config["joint_attention_dim"], "pooled": config["pooled_projection_dim"]}

    def width(self, network: Any) -> int:
        return int(network.inner_dim)

    def embedders(self, network: Any) -> list[nn.Module]:
        return [network.time_text_embed]

    def adapt(self, network: Any) -> None:
        """Nothing."""

    def call(self, network: Any, x: Samples, t: Tensor, said: dict[str, Tensor]) -> Tensor:
        return network(
            x, encoder_hidden_states=said["text"], pooled_projections=said["pooled"], timestep=t, return_dict=False
        )[0]


class Flux(SD3):
    """``FluxTransformer2DModel``: SD3's conditions; latents in patches of 2 x 2, each with its place."""

    def problem(self, config: Config) -> str | None:
        return f"in_channels {config['in_channels']}" if config["in_channels"] % 4 else super().problem(config)

    def sample_shape(self, config: Config, side: int | None = None) -> tuple[int, ...] | None:
        side = side or FLUX_SIDE
        return (int(config["in_channels"]) // 4, side, side)

    def call(self, network: Any, x: Samples, t: Tensor, said: dict[str, Tensor]) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        told = network.config.guidance_embeds
        out = network(
            x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(x.shape[0], height * width, -1),
            encoder_hidden_states=said["text"],
            pooled_projections=said["pooled"],
            timestep=t / 1000,
            img_ids=_places(height, width, x),
            txt_ids=x.new_zeros(said["text"].shape[1], 3),
            guidance=torch.full_like(t, FLUX_GUIDANCE) if told else None,
            return_dict=False,
        )[0]
        return out.reshape(x.shape[0], height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Index, row and column of each patch, ``[height * width, 3]``."""
    row, column = (torch.arange(n, dtype=like.dtype, device=like.device) for n in (height, width))
    rows, columns = torch.meshgrid(row, column, indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)


KINDS: dict[str, Kind] = {
    "UNet2DModel": UNet2D(),
    "UNet2DConditionModel": UNet2DCondition(),
    "DiTTransformer2DModel": DiT(),
    "SD3Transformer2DModel": SD3(),
    "FluxTransformer2DModel": Flux(),
}
