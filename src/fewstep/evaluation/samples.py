"""Sets of samples to be measured: from a model, from files, or from a diffusers pipeline; block by block."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.data import Source, decode
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError, FewstepError, nearest
from fewstep.randomness import Streams
from fewstep.sampling import check_times, default_batch_size, few_step_times, ode_sample_nfe, sample

READ_ROWS, READ_VALUES = 512, 2**26
"""Most samples, and most pixel values, that are read from files at once."""

SOLVERS = ("consistency", "ode")
FILES = "files"
"""The solver of images that were made elsewhere."""
_SLACK = 1e-3


@dataclass(frozen=True)
class SampleSet:
    """Samples that can be gone through any number of times, in constant memory.

    Args:
        name: for tables.
        count: how many.
        shape: of one, ``(c, h, w)`` or ``(k,)``.
        is_images: uint8 images, or float points.
        labels: the classes that were asked for, int64 ``[count]``, or None.
        about: JSON-able: "solver", "steps", "nfe" (network evaluations per sample), "times" and "seed"; None where
            unknown.
        blocks: ``blocks(part=0, parts=1)`` starts a pass: uint8 ``[b, c, h, w]`` or float ``[b, k]`` on the CPU, in
            order; of several parts, every ``parts``-th block beginning with number ``part``.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    is_images: bool
    labels: Tensor | None
    about: dict[str, Any]
    blocks: Callable[..., Iterator[Tensor]]


def generated(
    denoiser: Denoiser,
    n: int,
    steps: int,
    *,
    solver: Literal["consistency", "ode"] = "consistency",
    times: Sequence[float] | None = None,
    seed: int = 0,
    cond: Tensor | None = None,
    batch_size: int | None = None,
    is_images: bool = True,
) -> SampleSet:
    """``n`` samples of a model in ``steps`` network evaluations each; sample i depends on the seed and i alone.

    Args:
        solver: "consistency" (few-step sampler) or "ode" (EDM's Heun; Euler where ``steps`` is even).
        times: noise levels of the consistency sampler, ``steps`` of them; default: the model's own.
        cond: classes ``[n]`` or one-hot ``[n, num_classes]``; by default uniform for a conditional model.
        batch_size: samples at once; changes nothing but the rounding.

    Raises:
        ConfigError: settings that cannot be sampled with.
        DataError: (while sampling) a sample is not finite.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"There is no solver '{solver}'", do=nearest(solver, SOLVERS))
    if n < 1 or steps < 1 or (batch_size is not None and batch_size < 1):
        got = f"samples {n}, steps {steps}, batch size {batch_size}"
        raise ConfigError("Samples, steps and batch size must be at least 1", got=got)
    levels = _levels(denoiser, steps, solver, times)
    cond = draw_labels(denoiser, None, n, seed) if cond is None else cond
    if cond is not None and len(cond) != n:
        raise ConfigError("There is not one label per sample", got=len(cond), want=n)
    size = batch_size or default_batch_size(denoiser.sample_shape, denoiser.device)

    def blocks(part: int = 0, parts: int = 1) -> Iterator[Tensor]:
        for start in range(part * size, n, parts * size):
            count = min(size, n - start)
            asked = None if cond is None else cond[start : start + count]
            if levels is None:
                x = ode_sample_nfe(denoiser, count, steps, seed=seed, cond=asked, batch_size=count, first=start)
            else:
                x = sample(denoiser, count, times=levels, seed=seed, cond=asked, batch_size=count, first=start)
            _check_finite(x, start)
            yield to_host(denoiser, x, is_images)

    about = {"solver": solver, "steps": steps, "nfe": steps, "times": levels, "seed": seed}
    return SampleSet(solver, n, denoiser.sample_shape, is_images, _classes(cond), about, blocks)


def from_source(source: Source) -> SampleSet:
    """All of a source of images made elsewhere (:func:`fewstep.open_source`), in its order, with its labels."""

    def blocks(part: int = 0, parts: int = 1) -> Iterator[Tensor]:
        return itertools.islice((block for _, block in read_blocks(source)), part, None, parts)

    labels = None if source.labels is None else torch.from_numpy(source.labels)
    about = {"solver": FILES, "steps": None, "nfe": None, "times": None, "seed": None}
    return SampleSet(source.name, len(source), tuple(source.shape), source.is_images, labels, about, blocks)


def read_blocks(source: Source, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(number of its first sample, block) of a whole source in order: a multiple of ``multiple`` where that fits."""
    most = max(1, min(READ_ROWS, READ_VALUES // math.prod(source.shape)))
    size = most - most % multiple if most > multiple else most
    for start in range(0, len(source), size):
        yield start, read_rows(source, np.arange(start, min(start + size, len(source))))


def read_rows(source: Source, index: np.ndarray) -> Tensor:
    """``source.read(index)``; points that are not finite are refused.

    Raises:
        DataError: with the number of the first such sample.
    """
    block = source.read(index)
    bad = _not_finite(block)
    if len(bad):
        raise DataError(
            f"The data '{source.name}' hold values that are not finite",
            got=f"NaN or infinity in {len(bad)} of {len(block)} samples, first in number {int(index[bad[0]])}",
            do="Remove them from the data",
        )
    return block


def draw_labels(denoiser: Denoiser, source: Source | None, n: int, seed: int) -> Tensor | None:
    """Class indices ``[n]`` drawn from the data's labels (uniform without labels); None if unconditional."""
    if denoiser.num_classes == 0:
        return None
    if source is None or source.labels is None:
        return _uniform_labels(denoiser.num_classes, n, seed).to(denoiser.device)
    picked = Streams(seed).integers("evaluation/labels", torch.arange(n), len(source.labels)).numpy()
    return torch.from_numpy(source.labels[picked]).to(denoiser.device)


def to_host(denoiser: Denoiser, x: Tensor, images: bool) -> Tensor:
    """Samples as uint8 images (or float points) on the CPU."""
    return (decode(x, denoiser.value_range) if images else x.float()).cpu()


def _levels(denoiser: Denoiser, steps: int, solver: str, times: Sequence[float] | None) -> list[float] | None:
    """Noise levels of the consistency sampler; None for the ODE solver, which has its own grid."""
    if solver == "ode":
        if times is not None:
            raise ConfigError("The ode solver has its own grid of times", got=f"times={list(times)}", do="Leave it out")
        return None
    if times is None:
        return few_step_times(denoiser, steps)
    levels = check_times(times, denoiser)
    if len(levels) != steps:
        raise ConfigError("There is not one sampling time per step", got=f"{len(levels)} times", want=f"{steps}")
    return levels


def _classes(cond: Tensor | None) -> Tensor | None:
    if cond is None:
        return None
    return (cond.argmax(1) if cond.ndim == 2 else cond).long().cpu()


def _uniform_labels(classes: int, n: int, seed: int) -> Tensor:
    return Streams(seed).integers("evaluation/labels", torch.arange(n), classes)


def _not_finite(x: Tensor) -> Tensor:
    """Row numbers with NaN or infinity."""
    if not x.is_floating_point():
        return torch.empty(0, dtype=torch.int64)
    return (~torch.isfinite(x.flatten(1))).any(1).nonzero().flatten()


def _check_finite(x: Tensor, start: int) -> None:
    bad = _not_finite(x)
    if len(bad):
        raise DataError(
            "Some samples are not finite",
            got=f"NaN or infinity in {len(bad)} of {len(x)}, first in number {start + int(bad[0])}",
            do="The model has diverged or overflows in half precision: take an earlier checkpoint, or float32",
        )


# ----------------------------------------------------------------------------------------- other people's pipelines
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
) -> SampleSet:
    """``n`` images of a diffusers pipeline; image i depends on the seed and i alone.

    One image is made at once, to learn the shape and to count the network's evaluations (a guided step counts two).

    Args:
        pipeline: a folder or a downloaded hub id (safetensors only; extra ``hf``), or any object that is called as
            diffusers' pipelines are and returns ``.images`` (NumPy in [0, 1], ``[b, h, w, c]``, or PIL).
        steps: ``num_inference_steps``.
        labels: classes ``[n]``; by default uniform where the network is class-conditional.
        prompts: for a text pipeline; image i gets number i modulo their count.
        options: further arguments of the call, for example ``{"guidance_scale": 4.0}``.
        device: where a pipeline that is opened here runs.

    Raises:
        ConfigError: no such pipeline, diffusers is missing, or the pipeline cannot be called so.
        DataError: (while sampling) an image is not finite.
    """
    if n < 1 or steps < 1 or batch_size < 1:
        got = f"samples {n}, steps {steps}, batch size {batch_size}"
        raise ConfigError("Samples, steps and batch size must be at least 1", got=got)
    name = str(pipeline) if isinstance(pipeline, str | Path) else type(pipeline).__name__
    if isinstance(pipeline, str | Path):
        pipeline = _open_pipeline(name, device)
    if not callable(pipeline):
        raise ConfigError("This is not a pipeline", got=name, want="a folder, a hub id or a diffusers pipeline")
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    call = _Call(name, pipeline, steps, seed, _asked_for(name, pipeline, n, seed, labels, prompts), options or {})
    with _Evaluations(pipeline) as evaluations:
        shape = tuple(call.images(range(1)).shape[1:])

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

    @property
    def solver(self) -> str:
        parts = (self.pipeline, getattr(self.pipeline, "scheduler", None))
        return "/".join(type(part).__name__ for part in parts if part is not None)

    def images(self, numbers: range) -> Tensor:
        """uint8 ``[b, c, h, w]``."""
        keywords = {"num_inference_steps": self.steps, "generator": self._generators(numbers)}
        keywords |= {"output_type": "np"} if _takes(self.pipeline, "output_type") else {}
        keywords |= {"batch_size": len(numbers)} if _takes(self.pipeline, "batch_size") else {}
        keywords |= {key: [values[i % len(values)] for i in numbers] for key, values in self.asked.items()}
        try:
            with torch.no_grad():
                made = self.pipeline(**keywords, **self.options).images
            images = _to_bytes(made, numbers.start)
        except FewstepError:
            raise
        except Exception as error:  # someone else's code may raise anything
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(
                f"The pipeline {self.name} cannot be run: {reason}",
                want="a diffusers pipeline that makes images from noise, labels or prompts",
            ) from error
        if len(images) != len(numbers):
            raise ConfigError(
                f"The pipeline {self.name} made another number of images", got=len(images), want=len(numbers)
            )
        return images

    def _generators(self, numbers: range) -> list[torch.Generator]:
        """One per image, on the CPU: the same on every device, whatever else is in the batch."""
        words = Streams(self.seed).words("pipeline/seed", torch.arange(numbers.start, numbers.stop), 2)
        seeds = ((words[:, 0] << 31) ^ words[:, 1]).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]


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


def _open_pipeline(where: str, device: torch.device | str) -> Callable[..., Any]:
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ConfigError(
            f"The pipeline '{where}' needs diffusers, which is not installed", do="Run: pip install 'fewstep[hf]'"
        ) from error
    local = Path(where).expanduser()
    try:
        place = str(local) if local.is_dir() else where
        pipeline: Any = DiffusionPipeline.from_pretrained(place, local_files_only=True, use_safetensors=True)
        return pipeline.to(device)
    except Exception as error:  # someone else's code may raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        do = "Is it a folder that diffusers wrote?" if local.is_dir() else f"Download it first: hf download {where}"
        raise ConfigError(f"The pipeline '{where}' cannot be opened: {reason}", do=do) from error


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
        labels = None if classes is None else _uniform_labels(classes, n, seed)
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
        _check_finite(torch.from_numpy(values), start)
        if values.min() < -_SLACK or values.max() > 1 + _SLACK:
            got = f"{values.min():.3g} to {values.max():.3g}"
            raise ConfigError(
                "A pipeline returned pixels outside of [0, 1]", got=got, do="Scale them: 0 black, 1 white"
            )
        pixels = (values * 255).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))
