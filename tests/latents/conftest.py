"""Tiny VAEs with random weights, made on the spot; nothing is downloaded."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

MakeVae = Callable[..., Any]
SCALING = {"scaling_factor": 0.7, "shift_factor": 0.1}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The number of threads changes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def diffusers() -> Any:
    """diffusers, whose import warns."""
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        _ = diffusers.AutoencoderKL, diffusers.AutoencoderTiny, diffusers.AutoencoderDC
    return diffusers


@pytest.fixture(scope="session")
def make_vae(diffusers: Any) -> MakeVae:
    """``make_vae(kind="AutoencoderKL", seed=0, **config)``: 8x8x3 -> 4x4, all weights drawn."""

    def make(kind: str = "AutoencoderKL", seed: int = 0, **config: Any) -> Any:
        sizes: dict[str, Any] = {
            "AutoencoderKL": {
                "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "sample_size": 8,
            },
            "AutoencoderTiny": {
                "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 2,
            },
            "AutoencoderDC": {
                "encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16), "latent_channels": 4,
                "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
                "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
                "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
            },
        }[kind]  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vae = getattr(diffusers, kind)(**sizes | config).eval()
            for parameter in vae.parameters():  # none of them zero
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        return vae

    return make


@pytest.fixture(scope="session")
def vae(make_vae: MakeVae) -> Any:
    """A tiny AutoencoderKL with a scale and a shift."""
    return make_vae(**SCALING)


@pytest.fixture(scope="session")
def pipeline(vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with nothing but that VAE."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "LatentDiffusionPipeline"}))
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def pixels() -> torch.Tensor:
    """Five images, uint8 ``[5, 3, 8, 8]``."""
    return torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
