"""Tiny random pipelines of every family, with tokenizers made on the spot; nothing is downloaded."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
PROMPTS = ["a red square", "a blue circle", "", "a red square on a very long green line " * 20]


@pytest.fixture(scope="session")
def libraries() -> tuple[Any, Any]:
    """transformers and diffusers, whose imports warn of each other."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        _ = transformers.CLIPTextModel, diffusers.StableDiffusionPipeline
    return transformers, diffusers


def clip_tokenizer(transformers: Any, folder: Path) -> Any:
    """A byte-level tokenizer of 26 letters, with and without the end of a word, and six merges."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    merges = ["r e", "re d</w>", "b l", "bl u", "l i", "a n"]
    joined = [pair.replace(" ", "") for pair in merges]
    words = ["!", *letters, *(letter + "</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        str(folder), model_max_length=77, unk_token="<|endoftext|>", bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    assert len(tokenizer("a red square").input_ids) > 5
    return tokenizer


def t5_tokenizer(transformers: Any) -> Any:
    """A unigram model of pieces: letters, and words that are likelier."""
    words = ["a", "red", "blue", "green", "square", "circle", "on", "very", "long", "line"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    pieces += [("\u2581" + word, -2.0) for word in words] + [(chr(i), -5.0) for i in range(ord("a"), ord("z") + 1)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    assert len(tokenizer("a red square").input_ids) == 4
    return tokenizer


def clip_encoder(transformers: Any, seed: int, width: int, *, projected: int | None = None) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=70, hidden_size=width, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3,
        projection_dim=projected or width, bos_token_id=59, eos_token_id=60, pad_token_id=60,
    )  # fmt: skip
    torch.manual_seed(seed)
    kind = transformers.CLIPTextModel if projected is None else transformers.CLIPTextModelWithProjection
    return kind(config).eval()


def t5_encoder(transformers: Any, width: int) -> Any:
    config = transformers.T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    torch.manual_seed(7)
    return transformers.T5EncoderModel(config).eval()


def unet(diffusers: Any, cross: int, **more: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=2, **more,
    )  # fmt: skip


def sd(libraries: tuple[Any, Any], work: Path) -> Any:
    """Stable Diffusion 1.x's kind, in pixels."""
    transformers, diffusers = libraries
    return diffusers.StableDiffusionPipeline(
        vae=None, unet=unet(diffusers, 12), scheduler=diffusers.DDIMScheduler(),
        tokenizer=clip_tokenizer(transformers, work / "clip"), text_encoder=clip_encoder(transformers, 1, 12),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(libraries: tuple[Any, Any], work: Path, zeros: bool = True) -> Any:
    """SDXL's kind: two encoders, a pooled embedding and sizes."""
    transformers, diffusers = libraries
    return diffusers.StableDiffusionXLPipeline(
        vae=None, scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
        unet=unet(diffusers, 28, addition_embed_type="text_time", addition_time_embed_dim=8,
                  projection_class_embeddings_input_dim=10 + 6 * 8),
        tokenizer=clip_tokenizer(transformers, work / "clip"), text_encoder=clip_encoder(transformers, 1, 12),
        tokenizer_2=clip_tokenizer(transformers, work / "clip2"),
        text_encoder_2=clip_encoder(transformers, 2, 16, projected=10), force_zeros_for_empty_prompt=zeros,
    )  # fmt: skip


def sd3(libraries: tuple[Any, Any], work: Path, t5: bool = True) -> Any:
    """SD3's kind: two CLIP encoders, T5 or none."""
    transformers, diffusers = libraries
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=22, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        vae=None, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=clip_tokenizer(transformers, work / "clip"),
        text_encoder=clip_encoder(transformers, 1, 12, projected=12),
        tokenizer_2=clip_tokenizer(transformers, work / "clip2"),
        text_encoder_2=clip_encoder(transformers, 2, 16, projected=10),
        tokenizer_3=t5_tokenizer(transformers) if t5 else None,
        text_encoder_3=t5_encoder(transformers, 32) if t5 else None,
    )  # fmt: skip


def flux(libraries: tuple[Any, Any], work: Path) -> Any:
    """Flux's kind: CLIP's pooled embedding and T5."""
    transformers, diffusers = libraries
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        vae=None, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=clip_tokenizer(transformers, work / "clip"), text_encoder=clip_encoder(transformers, 1, 12),
        tokenizer_2=t5_tokenizer(transformers), text_encoder_2=t5_encoder(transformers, 32),
    )  # fmt: skip


MAKERS: dict[str, Callable[..., Any]] = {
    "sd": sd,
    "sdxl": sdxl,
    "sdxl-empty": lambda libraries, work: sdxl(libraries, work, zeros=False),
    "sd3": sd3,
    "sd3-clip": lambda libraries, work: sd3(libraries, work, t5=False),
    "flux": flux,
}


@pytest.fixture(scope="session")
def pipeline(libraries: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """``name -> (pipeline, folder where it is saved)``, made once each."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            work = tmp_path_factory.mktemp(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole = MAKERS[name](libraries, work)
                whole.save_pretrained(work / "pipeline", safe_serialization=True)
            made[name] = whole, work / "pipeline"
        return made[name]

    return make
