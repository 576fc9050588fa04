"""Sets of samples from other people's pipelines: anything that is called as diffusers' pipelines are."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import CRITICAL
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.errors import ConfigError, DataError, FewstepError
from fewstep.evaluation.pretrained import quiet
from fewstep.evaluation.samples import SampleSet, check_finite, uniform_labels
from fewstep.randomness import Streams

INDEX = "model_index.json"
_SLACK = 1e-3
"""How far floats may leave [0, 1] by rounding."""


def from_pipeline(
    pipeline: Any,
    n: int,
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 16,
    labels: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    name: str | None = None,
) -> SampleSet:
    """``n`` images of a diffusers pipeline; image i depends on the seed and i alone.

    One image is made at once, to learn the shape and to count the network's evaluations (a guided step counts two). A
    pipeline that draws from torch's global generator makes all its images one by one, each with a seed of its own.

    Args:
        pipeline: a folder or a downloaded hub id (safetensors only; extra ``hf``), or any object that is called as
            diffusers' pipelines are and returns ``.images`` (NumPy in [0, 1], ``[b, h, w, c]``, or PIL).
        steps: ``num_inference_steps``.
        labels: classes ``[n]``; by default uniform where the network is class-conditional.
        prompts: for a text pipeline; image i gets number i modulo their count.
        options: further arguments of the call, for example ``{"guidance_scale": 4.0}``.
        device: where a pipeline that is opened here runs.
        name: for tables; by default the folder or hub id, or the pipeline's class.

    Raises:
        ConfigError: no such pipeline, diffusers is missing, or the pipeline cannot be called so.
        DataError: (while sampling) an image is not finite.
    """
    if n < 1 or steps < 1 or batch_size < 1:
        got = f"samples {n}, steps {steps}, batch size {batch_size}"
        raise ConfigError("Samples, steps and batch size must be at least 1", got=got)
    if isinstance(pipeline, str | Path):
        name = name or str(pipeline)
        pipeline = open_pipeline(str(pipeline), device)
    name = name or type(pipeline).__name__
    if not callable(pipeline):
        raise ConfigError("This is not a pipeline", got=name, want="a folder, a hub id or a diffusers pipeline")
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    call = _Call(name, pipeline, steps, seed, _asked_for(name, pipeline, n, seed, labels, prompts), options or {})
    with _Evaluations(pipeline) as evaluations:
        first, drew = call.together(range(1))
    call, shape = replace(call, one_by_one=drew), tuple(first.shape[1:])

    def blocks(part: int = 0, parts: int = 1) -> Iterator[Tensor]:
        for start in range(part * batch_size, n, parts * batch_size):
            images = call.images(range(start, min(start + batch_size, n)))
            if images.shape[1:] != shape:
                raise DataError(f"The images of {name} differ in size", got=list(images.shape[1:]), want=list(shape))
            yield images

    classes = call.asked.get("class_labels")
    about = {"solver": call.solver, "steps": steps, "nfe": evaluations.count, "times": None, "seed": seed}
    return SampleSet(name, n, shape, True, None if classes is None else torch.tensor(classes), about, blocks)


@dataclass(frozen=True)
class _Call:
    """How a pipeline is called for the images of given numbers."""

    name: str
    pipeline: Callable[..., Any]
    steps: int
    seed: int
    asked: dict[str, list[Any]]
    options: Mapping[str, Any]
    one_by_one: bool = False

    @property
    def solver(self) -> str:
        parts = (self.pipeline, getattr(self.pipeline, "scheduler", None))
        return "/".join(type(part).__name__ for part in parts if part is not None)

    def images(self, numbers: range) -> Tensor:
        """uint8 ``[b, c, h, w]``."""
        parts = [range(i, i + 1) for i in numbers] if self.one_by_one else [numbers]
        return torch.cat([self.together(part)[0] for part in parts])

    def together(self, numbers: range) -> tuple[Tensor, bool]:
        """uint8 ``[b, c, h, w]`` of one call, and whether this drew from torch's global generators."""
        generators = [torch.Generator().manual_seed(seed) for seed in self._seeds("pipeline/seed", numbers)]
        keywords: dict[str, Any] = {"num_inference_steps": self.steps, "generator": generators}
        keywords |= {"output_type": "np"} if _takes(self.pipeline, "output_type") else {}
        keywords |= {"batch_size": len(numbers)} if _takes(self.pipeline, "batch_size") else {}
        keywords |= {key: [values[i % len(values)] for i in numbers] for key, values in self.asked.items()}
        other = self._seeds("pipeline/global", numbers[:1])[0]
        try:
            with torch.no_grad(), _GlobalGenerators(self.pipeline, other) as watched:
                made = self.pipeline(**keywords, **self.options).images
            images = _to_bytes(made, numbers.start)
        except FewstepError:
            raise
        except Exception as error:  # someone else's code may raise anything
            raise ConfigError(
                f"The pipeline {self.name} cannot be run in {self.steps} steps: {_reason(error)}",
                want="a diffusers pipeline that makes images from noise or labels, and steps that its scheduler can do",
            ) from error
        if len(images) != len(numbers):
            raise ConfigError(
                f"The pipeline {self.name} made another number of images", got=len(images), want=len(numbers)
            )
        return images, watched.drew

    def _seeds(self, stream: str, numbers: range) -> list[int]:
        """One per image, for generators on the CPU: the same on every device, whatever else is in the batch."""
        words = Streams(self.seed).words(stream, torch.arange(numbers.start, numbers.stop), 2)
        return [int(seed) for seed in (words[:, 0] << 31) ^ words[:, 1]]


class _GlobalGenerators:
    """torch's global generators, seeded while open and put back afterwards; ``drew``: something was drawn from them.

    Some pipelines do not hand the generators they are given to their scheduler.
    """

    def __init__(self, pipeline: Any, seed: int) -> None:
        device = getattr(pipeline, "device", None)
        self._generators, self._seed, self.drew = [torch.default_generator], seed, False
        if isinstance(device, torch.device) and device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])

    def __enter__(self) -> _GlobalGenerators:
        self._kept = self._states()
        for generator in self._generators:
            generator.manual_seed(self._seed)
        self._fresh = self._states()
        return self

    def __exit__(self, *_: object) -> None:
        self.drew = not all(map(torch.equal, self._fresh, self._states()))
        for generator, state in zip(self._generators, self._kept, strict=True):
            generator.set_state(state)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]


class _Evaluations:
    """Counts the rows that the denoising network is given while open: its evaluations, for a single image."""

    def __init__(self, pipeline: Any) -> None:
        parts = (getattr(pipeline, name, None) for name in ("unet", "transformer"))
        self._network = next((part for part in parts if isinstance(part, nn.Module)), None)
        self.count: int | None = None if self._network is None else 0

    def __enter__(self) -> _Evaluations:
        if self._network is not None:
            self._hook = self._network.register_forward_pre_hook(self._add, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._network is not None:
            self._hook.remove()

    def _add(self, network: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        rows = (len(x) for x in (*args, *keywords.values()) if isinstance(x, Tensor) and x.ndim > 1)
        self.count = (self.count or 0) + next(rows, 1)


def open_pipeline(where: str, device: torch.device | str = "cpu") -> Callable[..., Any]:
    """A diffusers pipeline from a folder or the cache of downloads: safetensors only, no code of others, no network.

    Raises:
        ConfigError: there is no such pipeline here, it brings code of its own, or diffusers is missing.
    """
    local = Path(where).expanduser()
    what = f"The pipeline '{where}'"
    try:
        index = local / INDEX if local.is_dir() else _downloaded(where)
        if index is None:
            raise ConfigError(
                f"There is neither a folder nor a downloaded pipeline '{where}'",
                do=f"Check the path, or download it from the hub: hf download {where}",
            )
        import diffusers
    except ImportError as error:
        what = what if local.is_dir() else f"There is no folder '{where}': as a hub id, it"
        raise ConfigError(
            f"{what} needs diffusers, which is not installed", do="Run: pip install 'fewstep[hf]'"
        ) from error
    refuse_code(index, what)
    place = str(local) if local.is_dir() else where
    try:
        with quiet(diffusers.utils.logging, CRITICAL):
            kind: Any = diffusers.DiffusionPipeline
            pipeline = kind.from_pretrained(place, local_files_only=True, use_safetensors=True)
        return pipeline.to(device)
    except Exception as error:  # someone else's code may raise anything
        do = "It must be complete, with its weights as .safetensors"
        do = do if local.is_dir() else f"{do}; run: hf download {where}"
        raise ConfigError(f"{what} cannot be opened: {_reason(error)}", do=do) from error


def _downloaded(hub_id: str) -> Path | None:
    """The index of a pipeline in the cache of downloads."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(hub_id, INDEX)
    except ValueError:  # not a hub id at all
        return None
    return Path(found) if isinstance(found, str) else None


def refuse_code(index: Path, what: str) -> None:
    """diffusers runs, unasked, the Python files that the index of a pipeline on this machine names.

    Raises:
        ConfigError: there is such a file, or the index cannot be read.
    """
    try:
        named = dict(json.loads(index.read_text(encoding="utf-8"))) if index.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{what} cannot be opened: its {INDEX} is damaged") from error
    places = [index.parent / "None.py"]  # what diffusers looks for where no code is named
    for part, value in named.items():
        folder = index.parent if part == "_class_name" else index.parent / part
        places += [folder / f"{value[0]}.py"] if isinstance(value, list) and value else []
    for place in places:
        if place.is_file():
            raise ConfigError(f"{what} brings code of its own, which is not run", got=str(place))


def _reason(error: Exception) -> str:
    """The first line of what someone else's code says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(" .:")


def _takes(pipeline: Callable[..., Any], name: str, *, needs: bool = False) -> bool:
    """Has the call an argument of this name (``needs``: without a default)?"""
    try:
        parameter = inspect.signature(pipeline).parameters.get(name)
    except (TypeError, ValueError):  # a callable that hides its arguments
        return False
    return parameter is not None and (not needs or parameter.default is inspect.Parameter.empty)


def _asked_for(
    name: str, pipeline: Any, n: int, seed: int, labels: Tensor | None, prompts: Sequence[str] | None
) -> dict[str, list[Any]]:
    """Labels or prompts as arguments of the call: diffusers would draw missing labels from the global generator."""
    for key, given in (("class_labels", labels), ("prompt", prompts)):
        if given is not None and not _takes(pipeline, key):
            raise ConfigError(f"The pipeline {name} takes no {key}", do="Leave them out")
    if labels is not None and len(labels) != n:
        raise ConfigError("There is not one label per sample", got=len(labels), want=n)
    if _takes(pipeline, "prompt") and not prompts:
        raise ConfigError(f"The pipeline {name} draws from text", do="Give it prompts")
    asked: dict[str, list[Any]] = {"prompt": list(prompts)} if prompts else {}
    if labels is None and _takes(pipeline, "class_labels"):
        classes = _class_count(pipeline)
        if classes is None and _takes(pipeline, "class_labels", needs=True):
            raise ConfigError(f"The pipeline {name} needs labels", do="Give it labels")
        labels = None if classes is None else uniform_labels(classes, n, seed)
    return asked if labels is None else asked | {"class_labels": labels.tolist()}


def _class_count(pipeline: Any) -> int | None:
    """Number of classes of the network, in diffusers' words; None where it has none."""
    for part, key in (("unet", "num_class_embeds"), ("transformer", "num_embeds_ada_norm")):
        classes = getattr(getattr(getattr(pipeline, part, None), "config", None), key, None)
        if isinstance(classes, int) and classes > 0:
            return classes
    return None


def _to_bytes(made: Any, start: int) -> Tensor:
    """NumPy ``[b, h, w, c]`` (bytes, or floats in [0, 1], rounded as diffusers does) or a list of PIL images."""
    if isinstance(made, Sequence) and made and all(isinstance(image, Image.Image) for image in made):
        made = np.stack([np.asarray(image.convert("L" if image.mode == "L" else "RGB")) for image in made])
    pixels = np.asarray(made)
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or not (pixels.dtype == np.uint8 or pixels.dtype.kind == "f"):
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise ConfigError("A pipeline did not return images", got=got, want="PIL images, or floats [b, h, w, 1 or 3]")
    if pixels.dtype != np.uint8:
        values = pixels.astype(np.float32)
        check_finite(torch.from_numpy(values), start)
        if values.min() < -_SLACK or values.max() > 1 + _SLACK:
            got = f"{values.min():.3g} to {values.max():.3g}"
            raise ConfigError(
                "A pipeline returned pixels outside of [0, 1]", got=got, do="Scale them: 0 black, 1 white"
            )
        pixels = (values * 255).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))
