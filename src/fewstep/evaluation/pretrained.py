"""Published vision transformers as feature nets: DINOv2 and CLIP, through transformers (extra ``metrics``).

Weights are read from safetensors only, so nothing that a file brings is run. A model is found as a folder, in the
hub's cache, or on the hub; the hub is asked only for an id that is not in the cache, and only if it answers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.checkpoint.hub import HUB_ID, first_line, snapshot
from fewstep.checkpoint.store import file_hash
from fewstep.errors import CheckpointError, ConfigError, nearest

DINOV2_ID = "facebook/dinov2-large"
CLIP_ID = "openai/clip-vit-base-patch32"
REVISIONS = {CLIP_ID: "c237dc49a33fc61debc9276459120b7eac67e7ef"}  # main has no safetensors file, this commit has
DINOV2_NAMES = {384: "DINOv2-S14", 768: "DINOv2-B14", 1024: "DINOv2", 1536: "DINOv2-G14"}
DINOV2_SIDE = 224
MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
INSTALL = 'Run `pip install "fewstep[metrics]"`'


@dataclass(frozen=True)
class Pretrained:
    """A network as it was published.

    Args:
        name: as it stands in the names of numbers.
        dim: number of features.
        hash: sha256 of the weights file (of all files of a model folder).
        preprocessing: what happens to the pixels.
        net: uint8 images ``[b, 3, h, w]`` -> features ``[b, dim]``.
        head: features ``[b, dim]`` -> logits ``[b, classes]``, None where the net has no classifier.
        verified: the weights are known to be the published ones.
    """

    name: str
    dim: int
    hash: str
    preprocessing: str
    net: nn.Module
    head: Callable[[Tensor], Tensor] | None = None
    verified: bool = False


class VisionTransformer(nn.Module):
    """Pillow's bicubic resize to side x side, (x/255 - mean)/std, a transformers model, one of its outputs."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, output: str, side: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.model, self.output, self.side = model, output, side
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """uint8 ``[b, 3, h, w]`` -> ``[b, dim]``."""
        x = (resize_bicubic(x, self.side) / 255 - self.mean) / self.std
        features: Tensor = getattr(self.model(pixel_values=x), self.output)
        return features


def resize_bicubic(x: Tensor, side: int) -> Tensor:
    """Levels 0..255 ``[b, c, side, side]``, float32: Pillow's bicubic (a = -1/2, antialiased), width first.

    As in Pillow, each pass is rounded to whole levels and cut to 0..255 (one pass for both axes differs by up to 20
    levels on noise); in float64, or ties fall the other way. Pillow 13 takes the height first for some sizes: up to
    2 levels on smooth images.
    """
    device, x = x.device, x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)  # mps has no float64
    for size in ((x.shape[-2], side), (side, side)):
        if x.shape[-2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic", antialias=True).add(0.5).floor().clamp(0, 255)
    return x.float().to(device)


def open_dinov2(spec: str) -> Pretrained:
    """DINOv2's class token after the last norm (ViT-L/14: 1024), images resized to 224 x 224.

    Args:
        spec: a folder in the transformers layout, or a hub id ``owner/name[@revision]``; empty: ViT-L/14.

    Source: Oquab et al. 2023; Stein et al. 2023 (FD-DINOv2).

    Raises:
        CheckpointError: the weights are missing, unreadable or of another network.
        ConfigError: transformers is missing or cannot be imported.
    """
    folder = _model_folder("dinov2", spec or DINOV2_ID, ("dinov2",))
    model = _from_folder("Dinov2Model", folder)
    dim = int(model.config.hidden_size)
    return Pretrained(
        name=DINOV2_NAMES.get(dim, f"DINOv2-{dim}"),
        dim=dim,
        hash=_folder_hash(folder),
        preprocessing=_resized(DINOV2_SIDE, "ImageNet"),
        net=VisionTransformer(model, "pooler_output", DINOV2_SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )


def open_clip(spec: str) -> Pretrained:
    """CLIP's image embedding: the class token, projected, not normalised (ViT-B/32: 512).

    Args:
        spec: a folder in the transformers layout, or a hub id ``owner/name[@revision]``; empty: ViT-B/32.

    Source: Radford et al. 2021; Kynkäänniemi et al. 2023 (Fréchet distance on CLIP).

    Raises:
        CheckpointError: the weights are missing, unreadable or of another network.
        ConfigError: transformers is missing or cannot be imported.
    """
    folder = _model_folder("clip", spec or CLIP_ID, ("clip", "clip_vision_model"))
    model = _from_folder("CLIPVisionModelWithProjection", folder)
    config = model.config
    size = {768: "B", 1024: "L"}.get(config.hidden_size, f"{config.hidden_size}-")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return Pretrained(
        name=f"CLIP-{size}{config.patch_size}",
        dim=int(config.projection_dim),
        hash=_folder_hash(folder),
        preprocessing=_resized(config.image_size, "CLIP"),
        net=VisionTransformer(model, "image_embeds", config.image_size, mean, std),
    )


def _resized(side: int, whose: str) -> str:
    return f"uint8, bicubic {side}x{side} with antialias, {whose} mean and std; grey repeated to 3 channels"


def _from_folder(architecture: str, folder: Path) -> Any:
    """A transformers model in float32 whose every weight came from the folder's safetensors files."""
    transformers = _transformers()
    with quiet(transformers.utils.logging, ERROR):  # what matters of its warnings becomes an error
        try:
            model, info = getattr(transformers, architecture).from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # named below, with what is missing
                output_loading_info=True,
            )
        except Exception as error:  # wrong shapes, damaged files, broken configurations
            raise CheckpointError(
                f"The model in '{folder}' cannot be read as {architecture}", got=first_line(error)
            ) from error
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise CheckpointError(
            f"The weights in '{folder}' are not those of {architecture}",
            got=f"{len(lacking)} weights missing or of another shape, such as {lacking[0]}",
        )
    return model.float().eval().requires_grad_(False)


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("DINOv2 and CLIP need transformers, which is not installed", do=INSTALL)
    try:
        import transformers

        _ = transformers.Dinov2Model, transformers.CLIPVisionModelWithProjection
    except Exception as error:  # transformers imports torchvision where it finds one, broken or not
        raise ConfigError(
            "transformers is installed, but cannot be imported",
            got=first_line(error),
            do="If torchvision is what fails, run `pip uninstall torchvision`: transformers works without it",
        ) from error
    return transformers


@contextmanager
def quiet(logging: Any, level: int) -> Iterator[None]:
    """No bars, and nothing below ``level``, from the logging module of a Hugging Face library."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(level)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _model_folder(kind: str, spec: str, types: tuple[str, ...]) -> Path:
    """The folder of a model: itself, the hub's cache, or a download into that cache; in this order."""
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        name, _, revision = spec.partition("@")
        if not HUB_ID.fullmatch(name):
            raise CheckpointError(f"The model folder '{folder}' of {kind} does not exist", do=_write(kind))
        folder = _snapshot(kind, name, revision or REVISIONS.get(name, "main"))
    if not _is_complete(folder):
        raise CheckpointError(
            f"The folder '{folder}' holds no model of {kind}",
            want="config.json and safetensors weights (pickles are not read)",
            do=_write(kind),
        )
    try:
        found = str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"'{folder / 'config.json'}' does not say which model it is") from error
    if found not in types:
        raise CheckpointError(
            f"The model in '{folder}' is not {kind}", got=found, want=types[0], do=nearest(found, types)
        )
    return folder


def _snapshot(kind: str, name: str, revision: str) -> Path:
    _transformers()
    command = f"hf download {name} config.json model.safetensors" + (
        f" --revision {revision}" if revision != "main" else ""
    )
    do = f"Run `{command}` where there is a network, or give a folder: {kind}:FOLDER"
    return snapshot(name, revision, MODEL_FILES, _is_complete, do)


def _is_complete(folder: Path) -> bool:
    """The configuration and all the weights that it takes."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return False
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]:
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def _write(kind: str) -> str:
    return f"Write: {kind} or {kind}:FOLDER or {kind}:OWNER/NAME[@REVISION]"
