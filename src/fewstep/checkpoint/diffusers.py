"""Models of diffusers -> a :class:`Denoiser`: a pipeline's folder, a network's folder, a hub id or an open pipeline.

Nothing that a folder brings is run: networks are built by name from diffusers itself, weights are read from safetensors
files and must fit exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones import build
from fewstep.backbones.hf import complete, kind_of
from fewstep.backbones.schedulers import read_schedule
from fewstep.backbones.text import null_row, text_parts
from fewstep.backbones.vae import codec_of
from fewstep.checkpoint.hub import is_hub_id, snapshot
from fewstep.checkpoint.store import read_tensors
from fewstep.conditioning import Part
from fewstep.denoiser import Codec, Denoiser
from fewstep.errors import CheckpointError
from fewstep.process import EDM
from fewstep.weights import load_weights

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
NETWORKS = ("unet", "transformer")
WEIGHTS = "diffusion_pytorch_model"
FILES = ("*.json", "*/*.txt", "*/*.model", "*/*.safetensors", f"{WEIGHTS}*.safetensors")
"""What is fetched of a hub id; whole checkpoints at its top, for other programs, are not."""

PIXELS, LATENTS = 0.5, 1.0
"""sigma_data where the scheduler does not say it: of images in [-1, 1], as in EDM; of a VAE's scaled latents, whose
scaling factor is chosen for unit variance (Rombach et al. 2022)."""

MOST = 320.0
"""Highest noise level of a student's sampler, in units of sigma_data: twice EDM's 80/0.5, so that a DDPM's student
starts where its table of betas ends, at 157/0.5 (math.md 1.5). Flows end at infinity, tables at 4096 and more where
their last step has no signal: no student is trained there."""

RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Attention weights in files of diffusers before 0.13 -> since."""

LEGACY = {"Transformer2DModel": "DiTTransformer2DModel"}
"""What DiT's class was called before 0.30."""


def is_diffusers(where: str | Path) -> bool:
    """Whether this is a folder that diffusers wrote, or a name that may be a hub id; names on disk are none."""
    root = Path(where).expanduser()
    if root.is_dir():
        return (root / INDEX).is_file() or ((root / CONFIG).is_file() and "_class_name" in _json(root / CONFIG))
    return is_hub_id(str(where))


def is_here(where: str | Path) -> bool:
    """Whether a model's folder exists, or its hub id is in the cache of downloads."""
    if Path(where).is_dir():
        return True
    try:
        return is_hub_id(str(where)) and _folder(where, fetch=False).is_dir()
    except CheckpointError:
        return False


def load_diffusers(where: Any, *, scheduler: Mapping[str, Any] | None = None, side: int | None = None) -> Denoiser:
    """A denoiser from a model of diffusers; its process and prediction are read from the scheduler.

    Pixels are in [-1, 1]. With a VAE, model space is its scaled latents. Text encoders stay in their folder, which the
    denoiser names; its ``null_cond`` is the empty prompt's row.

    Args:
        where: a pipeline's folder, a network's folder, a hub id ``owner/name[@revision]`` (only if nothing on disk has
            that name), or an open pipeline, whose network is copied.
        scheduler: its configuration, in place of the pipeline's.
        side: pixels (or latents) per side, where the network does not say it or is to be used at another size.

    Raises:
        CheckpointError: nothing is there, or something that it takes is missing, damaged or does not fit.
        ConfigError: a kind of network, scheduler or condition that is not supported, or diffusers is not installed.
    """
    found = _read(_folder(where)) if isinstance(where, str | Path) else _take(where)
    schedule = read_schedule(scheduler or found.scheduler or _no_scheduler(found))
    kind = kind_of(found.kind)
    config = complete(found.kind, found.config)
    shape = kind.sample_shape(config, side)
    if shape is None:
        raise CheckpointError(
            f"The network of {found.name} does not say how large its samples are",
            do="Write its sample_size into its config.json, or say it: load_diffusers(..., side=32)",
        )
    size = None if side is None or not kind.parts(config) else found.pixels(shape)
    parts, nothing = found.text(config, size) if kind.parts(config) else ((), None)
    spec = {
        "name": "diffusers",
        "kwargs": {"kind": found.kind, "config": config, "parts": [[part.name, list(part.shape)] for part in parts]},
    }
    with torch.random.fork_rng(devices=[]):  # the weights that are replaced now
        backbone: Any = build(spec)
    load_weights(backbone.network, _renamed(found.weights, backbone.network), found.name)
    if nothing is not None:
        backbone.null_cond.copy_(nothing)
    codec = found.codec(shape)
    p = schedule.parametrization(PIXELS if codec is None else LATENTS)
    limit = math.inf if isinstance(schedule.process, EDM) else MOST * p.sigma_data
    return Denoiser(
        backbone, schedule.process, p, sample_shape=shape, num_classes=0 if parts else kind.classes(config),
        parts=parts, sigma_min=schedule.sigma_min, sigma_max=min(schedule.sigma_max, limit), spec=spec, codec=codec,
        text={"pipeline": str(found.folder)} | ({} if size is None else {"size": size}) if parts else None,
    ).eval()  # fmt: skip


@dataclass(frozen=True)
class _Found:
    """A network with what belongs to it, wherever it came from; ``name`` is quoted in messages."""

    name: str
    kind: str
    config: Mapping[str, Any]
    weights: dict[str, Tensor]
    scheduler: Mapping[str, Any] | None
    vae: Path | nn.Module | None
    folder: Path | None

    def codec(self, shape: tuple[int, ...]) -> Codec | None:
        """The VAE, or None for a network of pixels."""
        if self.vae is not None:
            return codec_of(self.vae)
        if shape[0] in (1, 3):
            return None
        raise CheckpointError(
            f"The network of {self.name} makes latents of {shape[0]} channels, and there is no VAE to decode them",
            do="Give the whole pipeline, a folder with model_index.json and vae/: hf download NAME",
        )

    def pixels(self, shape: tuple[int, ...]) -> list[int]:
        """Height and width of the images whose samples have this shape."""
        codec = self.codec(shape)
        return list((shape if codec is None else codec.image_shape(shape))[1:])

    def text(self, config: Mapping[str, Any], size: list[int] | None) -> tuple[tuple[Part, ...], Tensor]:
        """The parts of a row and the row of the empty prompt."""
        if self.folder is None or not (self.folder / INDEX).is_file():
            raise CheckpointError(
                f"The network of {self.name} is told text, and there is no folder with its tokenizer and text encoder",
                do="Give the folder of a whole pipeline; save an open one: pipeline.save_pretrained(FOLDER)",
            )
        return text_parts(self.folder, config), null_row(self.folder, size)


def _folder(where: str | Path, *, fetch: bool = True) -> Path:
    """The folder itself, or that of a hub id in the cache, or downloaded into it."""
    root = Path(where).expanduser()
    if root.is_dir():
        return root.resolve()
    if not is_hub_id(str(where)):
        raise CheckpointError(f"There is no folder '{where}'", want="a folder that diffusers saved, or owner/name")
    name, _, revision = str(where).partition("@")
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    do = f"Check the path, or run where there is a network: {command}"
    return snapshot(name, revision or "main", FILES, _is_complete, do, fetch=fetch)


def _is_complete(folder: Path) -> bool:
    """Every part that the index of a pipeline names is there; or a network with its weights."""
    try:
        if not (folder / INDEX).is_file():
            return bool(_weight_files(folder))
        parts = [name for name, value in _json(folder / INDEX).items() if isinstance(value, list) and value[0]]
        networks = [folder / name for name in parts if name in NETWORKS]
        return all((folder / name).is_dir() for name in parts) and all(map(_weight_files, networks))
    except CheckpointError:
        return False


def _read(folder: Path) -> _Found:
    """From the folder of a pipeline or of a network."""
    if not (folder / INDEX).is_file():
        scheduler = _json(folder / SCHEDULER) if (folder / SCHEDULER).is_file() else None
        return _network(folder, folder, scheduler, None)
    index = _json(folder / INDEX)
    present = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[:1] != [None]}
    name = next((name for name in NETWORKS if name in present), None)
    if name is None:
        raise CheckpointError(
            f"The pipeline '{folder}' has no denoising network", got=sorted(present), want=" or ".join(NETWORKS)
        )
    scheduler = _json(folder / "scheduler" / SCHEDULER) if (folder / "scheduler" / SCHEDULER).is_file() else None
    vae = next((folder / part for part in ("vae", "vqvae", "movq") if part in present), None)
    return _network(folder / name, folder, scheduler, vae)


def _network(place: Path, folder: Path, scheduler: Mapping[str, Any] | None, vae: Path | None) -> _Found:
    if not (place / CONFIG).is_file():
        raise CheckpointError(
            f"The network's folder '{place}' has no {CONFIG}", do="Download it again: hf download NAME"
        )
    config = _json(place / CONFIG)
    kind = str(config.get("_class_name"))
    kind = LEGACY.get(kind, kind)
    kind_of(kind)  # before its weights are read
    weights: dict[str, Tensor] = {}
    for file in _weight_files(place):
        weights |= read_tensors(file)
    return _Found(f"'{folder}'", kind, config, weights, scheduler, vae, folder)


def _take(pipeline: Any) -> _Found:
    """From an open pipeline."""
    network = next((n for name in NETWORKS if (n := getattr(pipeline, name, None)) is not None), None)
    if network is None or not hasattr(network, "config"):
        raise CheckpointError(
            "This is no model",
            got=type(pipeline).__name__,
            want="a path, a hub id, or a diffusers pipeline with a network",
        )
    scheduler = getattr(pipeline, "scheduler", None)
    about = None if scheduler is None else dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
    source = str(getattr(pipeline, "name_or_path", None) or getattr(pipeline.config, "_name_or_path", "") or "")
    folder = _folder(source) if source and is_here(source) else None
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    vae, name = getattr(pipeline, "vae", None), f"the open {type(pipeline).__name__}"
    return _Found(name, type(network).__name__, dict(network.config), state, about, vae, folder)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a network: one file or shards, of full precision or else of its only variant.

    Raises:
        CheckpointError: there are none (with a word on pickles), or some shards are missing.
    """
    whole = sorted(folder.glob(f"{WEIGHTS}.safetensors")) + sorted(folder.glob(f"{WEIGHTS}.safetensors.index.json"))
    variants = [
        path
        for path in (*folder.glob(f"{WEIGHTS}.*.safetensors"), *folder.glob(f"{WEIGHTS}.safetensors.index.*.json"))
        if "-of-" not in path.name
    ]
    found = whole[:1] or sorted(variants)
    if not found:
        if any(folder.glob("*.bin")):
            raise CheckpointError(
                f"The weights in '{folder}' are pickles (.bin), which are not opened",
                do="Save them again where you trust them: pipeline.save_pretrained(FOLDER, safe_serialization=True)",
            )
        raise CheckpointError(
            f"There are no weights in '{folder}'",
            want=f"{WEIGHTS}.safetensors",
            do="Download it again: hf download NAME",
        )
    if found[0].suffix == ".safetensors":
        return found[:1]
    shards = sorted({folder / Path(str(name)).name for name in dict(_json(found[0]).get("weight_map", {})).values()})
    lost = [path.name for path in shards if not path.is_file()]
    if lost or not shards:
        raise CheckpointError(f"Weights in '{folder}' are missing", got=lost, do="Download it again: hf download NAME")
    return shards


def _renamed(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights under today's names, where the network has a layer of that name and the file the old one."""
    own = network.state_dict().keys()

    def today(name: str) -> str:
        path, _, ending = name.rpartition(".")
        path, _, old = path.rpartition(".")
        new = f"{path}.{RENAMED.get(old, old)}.{ending}"
        return new if name not in own and new in own else name

    return {today(name): tensor for name, tensor in weights.items()}


def _no_scheduler(found: _Found) -> Mapping[str, Any]:
    whole = None if found.folder is None else found.folder.parent
    if whole is not None and (whole / INDEX).is_file():
        raise CheckpointError(
            f"{found.name} is the network of a pipeline, without its scheduler", do=f"Give the pipeline: {whole}"
        )
    raise CheckpointError(
        f"Nothing says what the network of {found.name} predicts: there is no {SCHEDULER}",
        do=f"Put its {SCHEDULER} beside its {CONFIG}, or say it: load_diffusers(..., scheduler={{...}})",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"The file '{path}' is damaged", got=error) from error
