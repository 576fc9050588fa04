"""VAEs as codecs: diffusers' own numbers, what a checkpoint says of them, and what is said when they are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fewstep import EDM, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.backbones import vae as module
from fewstep.backbones.vae import VaeCodec, codec_of, open_codec
from fewstep.checkpoint.model import load, save_model
from fewstep.errors import CheckpointError, DataError
from fewstep.evaluation.samples import makes_images, shown_shape, to_host

MakeVae = Callable[..., Any]


def mode_of(vae: Any, pixels: Tensor) -> Tensor:
    """The latents of diffusers itself, before any scaling."""
    out = vae.encode(pixels.float() / 127.5 - 1, return_dict=False)[0]
    return out if isinstance(out, Tensor) else out.mode()


def bytes_of(x: Tensor) -> Tensor:
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- the numbers
@torch.no_grad()
def test_latents_are_diffusers_own_scaled_and_shifted(vae: Any, pipeline: Path, pixels: Tensor) -> None:
    codec = codec_of(pipeline)
    z = codec.encode(pixels)
    torch.testing.assert_close(z, (mode_of(vae, pixels) - 0.1) * 0.7, rtol=0, atol=1e-6)
    assert z.shape == (5, 2, 4, 4) and z.dtype == torch.float32
    assert torch.equal(codec.decode(z), bytes_of(vae.decode(z / 0.7 + 0.1, return_dict=False)[0]))
    assert codec.decode(z).float().std() > 1  # not all clipped


@torch.no_grad()
def test_channels_have_their_own_mean_and_deviation(make_vae: MakeVae, pixels: Tensor) -> None:
    mean, std = (0.3, -0.2), (2.0, 0.5)
    vae = make_vae(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    codec = codec_of(vae)
    m, s = (torch.tensor(v).reshape(1, 2, 1, 1) for v in (mean, std))
    z = codec.encode(pixels)
    torch.testing.assert_close(z, (mode_of(vae, pixels) - m) * 0.5 / s, rtol=0, atol=1e-6)
    assert torch.equal(codec.decode(z), bytes_of(vae.decode(z * s / 0.5 + m, return_dict=False)[0]))


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderDC"])
@torch.no_grad()
def test_vaes_without_a_posterior(make_vae: MakeVae, pixels: Tensor, kind: str) -> None:
    vae = make_vae(kind, scaling_factor=1.5)
    codec = codec_of(vae)
    z = codec.encode(pixels)
    torch.testing.assert_close(z, 1.5 * mode_of(vae, pixels), rtol=0, atol=1e-6)
    assert codec.image_shape(tuple(z.shape[1:])) == (3, 8, 8) and codec.latent_shape((3, 8, 8)) == tuple(z.shape[1:])
    assert torch.equal(codec.decode(z), bytes_of(vae.decode(z / 1.5, return_dict=False)[0]))


def test_the_mode_needs_no_random_numbers(pipeline: Path, pixels: Tensor) -> None:
    codec, before = codec_of(pipeline), torch.get_rng_state()
    assert torch.equal(codec.encode(pixels), codec.encode(pixels))
    assert torch.equal(torch.get_rng_state(), before)
    assert not codec.encode(pixels).requires_grad


def test_images_pass_in_small_batches(pipeline: Path, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, seen = codec_of(pipeline), []
    whole = codec.encode(pixels), codec.decode(codec.encode(pixels))
    assert isinstance(codec._vae, torch.nn.Module)
    for name in ("encoder", "decoder"):
        getattr(codec._vae, name).register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 2 * 64)
    torch.testing.assert_close(codec.encode(pixels), whole[0], rtol=0, atol=1e-6)
    assert torch.equal(codec.decode(whole[0]), whole[1])
    assert seen == [2, 2, 1, 2, 2, 1]


def test_half_precision_around_it_changes_nothing(pipeline: Path, pixels: Tensor) -> None:
    codec = codec_of(pipeline)
    z = codec.encode(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codec.encode(pixels), z)
        assert torch.equal(codec.decode(z), codec.decode(z))
    assert codec.decode(z.bfloat16()).dtype == torch.uint8


def test_images_it_cannot_read_are_refused_with_the_remedy(pipeline: Path) -> None:
    codec = codec_of(pipeline)
    assert codec.latent_shape((3, 16, 8)) == (2, 8, 4) and codec.image_shape((2, 8, 4)) == (3, 16, 8)
    for shape in ((1, 8, 8), (3, 9, 8), (3, 8)):
        with pytest.raises(DataError, match="multiples of 2.*--channels 3 and --resize"):
            codec.latent_shape(shape)
    with pytest.raises(DataError, match="does not read"):
        codec.encode(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


# ---- folders and descriptions
def test_a_pipeline_and_its_vae_folder_are_the_same(pipeline: Path) -> None:
    assert codec_of(pipeline).description == codec_of(str(pipeline / "vae")).description


def test_a_description_opens_it_again_at_the_first_use(pipeline: Path, pixels: Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(pipeline / "vae", folder)
    codec = codec_of(folder)
    description = json.loads(json.dumps(codec.description))
    again = open_codec(description)
    assert again.description == codec.description and again.image_shape((2, 4, 4)) == (3, 8, 8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 9.0}))
    assert torch.equal(again.encode(pixels), codec.encode(pixels))  # as recorded, whatever the folder says now
    gone = open_codec(description)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"There is no VAE in .*hf download"):
        gone.decode(torch.zeros(1, 2, 4, 4))


def test_another_vae_in_the_same_place_is_refused(make_vae: MakeVae, tmp_path: Path) -> None:
    make_vae(seed=0).save_pretrained(tmp_path)
    codec = open_codec(codec_of(tmp_path).description)
    make_vae(seed=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not the one that this model was trained with"):
        codec.decode(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("damage", ["empty", "pickle", "class", "json", "cut", "other weights"])
def test_what_is_no_vae_is_said_in_one_sentence(pipeline: Path, tmp_path: Path, damage: str, make_vae: MakeVae) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(pipeline / "vae", folder)
    weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    if damage == "empty":
        weights.unlink()
    elif damage == "pickle":
        weights.rename(folder / "diffusion_pytorch_model.bin")
    elif damage == "class":
        config.write_text(config.read_text().replace("AutoencoderKL", "UNet2DModel"))
    elif damage == "json":
        config.write_text("{")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:999])
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 3}))
    with pytest.raises(CheckpointError, match="VAE") as caught:
        codec_of(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("damage", ["missing", "mis-shaped"])
def test_weights_that_do_not_fit_are_listed(pipeline: Path, tmp_path: Path, damage: str) -> None:
    """Diffusers itself opens such a VAE with random ones in their place."""
    folder = tmp_path / "vae"
    shutil.copytree(pipeline / "vae", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load(file.read_bytes())
    names = ["decoder.conv_out.bias", "encoder.conv_in.weight"]
    for name in names:
        weight = state.pop(name)
        if damage == "mis-shaped":
            state[name] = weight[:-1].contiguous()
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"The VAE '.*' .*hf download") as caught:
        codec_of(tmp_path)
    assert all(name in str(caught.value) for name in names) and "\n" not in str(caught.value)


def test_half_precision_weights_alone_are_read_in_full(make_vae: MakeVae, tmp_path: Path, pixels: Tensor) -> None:
    vae = make_vae().half()
    vae.save_pretrained(tmp_path, variant="fp16")
    codec = codec_of(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(pixels), mode_of(vae.float(), pixels) * 0.18215, rtol=0, atol=1e-6)


def test_a_vae_in_memory_cannot_be_opened_again(make_vae: MakeVae, pixels: Tensor) -> None:
    vae = make_vae()
    codec = codec_of(vae)
    z = codec.encode(pixels)
    next(vae.parameters()).data.add_(1)  # the user's own: the codec has a copy
    assert torch.equal(codec.encode(pixels), z)
    with pytest.raises(CheckpointError, match="given in memory"):
        open_codec(codec.description).encode(pixels)
    with pytest.raises(CheckpointError, match="of another kind"):
        codec_of(torch.nn.Linear(1, 1))


def test_a_pipelines_vae_in_memory_knows_its_folder(diffusers: Any, pipeline: Path, pixels: Tensor) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae", low_cpu_mem_usage=False)
    assert codec_of(vae).description == codec_of(pipeline).description
    assert codec_of(vae.half()).description == codec_of(pipeline).description


# ---- in a denoiser
@pytest.fixture
def denoiser(pipeline: Path) -> Denoiser:
    spec = {"name": "unet", "kwargs": {"sample_shape": [2, 4, 4], "channels": 8, "blocks": 1}}
    return Denoiser(
        build(spec), EDM(), Parametrization("edm"), sample_shape=(2, 4, 4), spec=spec, codec=codec_of(pipeline)
    )


def test_copies_share_the_vae_and_checkpoints_only_name_it(denoiser: Denoiser, tmp_path: Path) -> None:
    assert denoiser.clone().codec is denoiser.codec
    assert all(name.startswith("backbone.") for name in denoiser.state_dict())
    save_model(denoiser, tmp_path / "model")
    again = load(tmp_path / "model")
    assert isinstance(again.codec, VaeCodec) and again.codec._vae is None
    assert again.codec.description == denoiser.codec.description  # type: ignore[union-attr]
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(to_host(again, z), denoiser.codec.decode(z))  # type: ignore[union-attr]


def test_its_samples_are_images_of_the_vaes_size(denoiser: Denoiser) -> None:
    assert shown_shape(denoiser) == (3, 8, 8) and makes_images(denoiser)
    x = to_host(denoiser, torch.zeros(2, 2, 4, 4, dtype=torch.bfloat16))
    assert x.shape == (2, 3, 8, 8) and x.dtype == torch.uint8
