"""Diffusers' VAEs as the way from images to latents and back."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.config import from_dict, to_dict
from fewstep.errors import CheckpointError, ConfigError, DataError
from fewstep.levels import decode, encode
from fewstep.types import Samples
from fewstep.weights import tensors_hash

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
"""Diffusers' classes that can be opened: images in, ``[b, c, h, w]`` latents out."""

PIXELS_AT_ONCE = 2**19
"""Eight images of 256x256 pass through a VAE together, two of 512x512."""

WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class VaeDescription:
    """What a checkpoint says of a VAE.

    Args:
        folder: where its config.json and weights are; empty for one that was given in memory.
        sha256: of its weights, names and bits, in float32.
        channels: of the images; shrink: how many pixels a latent is wide.
        latent_channels: of the latents.
        scaling_factor, shift_factor, latents_mean, latents_std: see :class:`VaeCodec`.
    """

    folder: str
    sha256: str
    channels: int
    latent_channels: int
    shrink: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


class VaeCodec:
    """``z = (m - shift - mean_c) scale / std_c``, with m the mode of the VAE's posterior; and back (diffusers).

    The mode, not a sample: the same image always has the same latents. Weights are loaded and checked when they are
    first needed, go where the data is, and are shared by all copies of a denoiser; they are no part of its weights.

    Args:
        about: what is known of the VAE.
        vae: its network, in eval mode; None loads it from ``about.folder``.
    """

    def __init__(self, about: VaeDescription, vae: nn.Module | None = None) -> None:
        self.about, self._vae = about, vae

    def __deepcopy__(self, memo: dict[int, Any]) -> VaeCodec:
        return self

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says of it, JSON-able; :func:`open_codec` opens it again."""
        return dict(to_dict(self.about))

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(C, H, W)`` of the images of latents ``(c, h, w)``."""
        return (self.about.channels, *(side * self.about.shrink for side in latent_shape[1:]))

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(c, h, w)`` of the latents of images ``(C, H, W)``.

        Raises:
            DataError: the VAE does not read such images.
        """
        about = self.about
        if len(image_shape) != 3 or image_shape[0] != about.channels or any(s % about.shrink for s in image_shape[1:]):
            raise DataError(
                "The VAE does not read such images",
                got=image_shape,
                want=f"{about.channels} channels and sides that are multiples of {about.shrink}",
                do=f"Add --channels {about.channels} and --resize SIDE",
            )
        return (about.latent_channels, *(side // about.shrink for side in image_shape[1:]))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Samples:
        """uint8 ``[b, C, H, W]`` -> scaled latents ``[b, c, h, w]``, float32, on the same device.

        Raises:
            DataError: images that the VAE does not read.
            CheckpointError: the VAE is gone or has changed.
        """
        self.latent_shape(tuple(images.shape[1:]))
        vae, (low, scale) = self._loaded(images.device), self._affine(images.device)
        with torch.autocast(images.device.type, enabled=False):
            found = [_mode(vae.encode(encode(x), return_dict=False)[0]) for x in _parts(images, images.shape[2:])]
        return (torch.cat(found) - low) * scale

    @torch.no_grad()
    def decode(self, latents: Samples) -> Tensor:
        """Scaled latents ``[b, c, h, w]`` -> uint8 ``[b, C, H, W]``, rounded and clipped, on the same device.

        Raises:
            CheckpointError: the VAE is gone or has changed.
        """
        vae, (low, scale) = self._loaded(latents.device), self._affine(latents.device)
        sides = self.image_shape(tuple(latents.shape[1:]))[1:]
        with torch.autocast(latents.device.type, enabled=False):
            plain = latents.float() / scale + low
            return torch.cat([decode(vae.decode(z, return_dict=False)[0]) for z in _parts(plain, sides)])

    @property
    def network(self) -> nn.Module:
        """The VAE itself, loaded and checked, in float32 on the CPU."""
        return self._loaded(torch.device("cpu"))

    def _affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``shift + mean`` and ``scale / std``, each ``[1, c or 1, 1, 1]``."""
        about = self.about
        mean, std = (
            torch.tensor(v, device=device).reshape(1, -1, 1, 1)
            for v in (about.latents_mean or (0.0,), about.latents_std or (1.0,))
        )
        return mean + about.shift_factor, about.scaling_factor / std

    def _loaded(self, device: torch.device) -> Any:
        """The network on ``device``, loaded and checked at the first call."""
        if self._vae is None:
            if not self.about.folder:
                raise CheckpointError(
                    "The VAE of this model was given in memory, so a checkpoint cannot contain it",
                    do="Save it (vae.save_pretrained) and make the model from the saved pipeline",
                )
            vae = _open(Path(self.about.folder))
            if tensors_hash(vae.state_dict()) != self.about.sha256:
                raise CheckpointError(
                    f"The VAE in '{self.about.folder}' is not the one that this model was trained with",
                    want=f"weights with sha256 {self.about.sha256[:12]}...",
                    do="Put the old one back",
                )
            self._vae = vae
        return self._vae.to(device)


def codec_of(vae: str | Path | nn.Module) -> VaeCodec:
    """The codec of a pipeline folder, of a VAE folder (diffusers, safetensors) or of diffusers' VAE itself.

    Raises:
        CheckpointError: no VAE is there, or one that cannot be opened.
        ConfigError: diffusers is missing.
    """
    if isinstance(vae, nn.Module):
        return _in_memory(vae)
    folder = Path(vae).expanduser().resolve()
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    network = _open(folder)
    return VaeCodec(_describe(network, str(folder)), network)


def open_codec(description: dict[str, Any]) -> VaeCodec:
    """The codec of a description; its weights are loaded and checked when they are first needed.

    Raises:
        ConfigError: it describes something else.
    """
    return VaeCodec(from_dict(VaeDescription, description, "codec"))


def _in_memory(vae: Any) -> VaeCodec:
    if type(vae).__name__ not in CLASSES:
        raise CheckpointError("This VAE is of another kind", got=type(vae).__name__, want=" or ".join(CLASSES))
    folder = Path(str(vae.config.get("_name_or_path") or "-"))
    saved = (folder / "config.json").is_file()
    if saved and vae.dtype != torch.float32:
        return codec_of(folder)  # in full precision
    network = copy.deepcopy(vae).float().eval().requires_grad_(False)
    return VaeCodec(_describe(network, str(folder.resolve()) if saved else ""), network)


def _describe(vae: Any, folder: str) -> VaeDescription:
    config = vae.config
    blocks = config.get("encoder_block_out_channels") or config["block_out_channels"]
    known: dict[str, Any] = {
        name: config[name]
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        if config.get(name) is not None
    }
    known |= {"folder": folder, "sha256": tensors_hash(vae.state_dict()), "shrink": 2 ** (len(blocks) - 1)}
    known |= {"channels": config["in_channels"], "latent_channels": config["latent_channels"]}
    return from_dict(VaeDescription, known, f"{folder}/config.json")


def _open(folder: Path) -> Any:
    """A VAE from its folder: safetensors only, float32, eval, frozen; diffusers' errors in one sentence."""
    name = _class_name(folder)
    try:
        import diffusers
    except ImportError as error:
        raise ConfigError(
            f"The VAE '{folder}' needs diffusers, which is not installed", do="Run: pip install 'fewstep[hf]'"
        ) from error
    whole = any((folder / f"{WEIGHTS}.safetensors{ending}").is_file() for ending in ("", ".index.json"))
    try:
        vae, info = getattr(diffusers, name).from_pretrained(
            str(folder), variant=None if whole else "fp16", use_safetensors=True, local_files_only=True,
            low_cpu_mem_usage=False, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # someone else's code may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"The VAE '{folder}' cannot be opened: {reason}", do="Download it again: hf download NAME"
        ) from error
    lacking = {"missing": info["missing_keys"], "of another shape": [key[0] for key in info["mismatched_keys"]]}
    found = "; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in lacking.items() if names)
    if found:
        raise CheckpointError(
            f"The VAE '{folder}' lacks weights of a {name}", got=found, do="Download it again: hf download NAME"
        )
    return vae.float().eval().requires_grad_(False)


def _class_name(folder: Path) -> str:
    """The class that a VAE folder names, after a look at its files.

    Raises:
        CheckpointError: it is no VAE folder, has no safetensors weights, or is of another kind.
    """
    config = folder / "config.json"
    if not config.is_file() or not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"There is no VAE in '{folder}'",
            want="a folder with vae/config.json and vae/*.safetensors, as diffusers saves it",
            do="Download the whole pipeline: hf download NAME",
        )
    try:
        name = str(json.loads(config.read_text(encoding="utf-8")).get("_class_name"))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"'{config}' does not describe a VAE", got=error) from error
    if name not in CLASSES:
        raise CheckpointError(f"The VAE in '{folder}' is of another kind", got=name, want=" or ".join(CLASSES))
    return name


def _parts(x: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """``x`` in pieces that pass through a VAE together, for images of ``sides`` (height, width)."""
    size = max(1, PIXELS_AT_ONCE // math.prod(sides))
    return [x[start : start + size] for start in range(0, len(x), size)]


def _mode(posterior: Any) -> Tensor:
    """The mode of a posterior, or the latents of a VAE that has none."""
    mode: Tensor = posterior if isinstance(posterior, Tensor) else posterior.mode()
    return mode
