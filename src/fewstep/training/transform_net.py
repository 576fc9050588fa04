"""A feature net of one's own: trained to tell how an image was transformed (AYT, arXiv 2510.00658, math.md 3.11).

What a transformation moves, the net must feel; so its features resolve the directions in which images differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.checkpoint.store import new_directory, read_tensors, write_json, write_tensors
from fewstep.data import Source, encode
from fewstep.errors import CheckpointError, ConfigError, DataError

KIND = "transform-net"
GEOMETRIC = ("rotation", "scale", "translation x", "translation y", "shear")
PROBABILITY = 0.5
"""Of each transformation; its label is 0 where it is left out."""

LARGEST = {"rotation": math.pi / 6, "scale": 0.3, "translation": 0.3, "shear": 0.4,
           "brightness": 0.4, "contrast": 0.7, "blur": 0.1, "noise": 0.4}  # fmt: skip
"""At label 1: radians; log scale; translation, in half sides; x per y; added in [-1, 1]; log gain; standard deviation
in sides; standard deviation."""

VALIDATION = 2048
"""At most this many images (a tenth, if that is less) are kept from the training."""

Report = Callable[[int, float], None]
"""``(images seen, mean squared error of the last batch)``."""


class TransformNet(nn.Module):
    """Three stages of two 3x3 convolutions, ReLU and max-pooling by 2, then two linear layers: VGG in small.

    Args:
        channels: of the images; side: that it was trained at, a multiple of 8.
        widths: of the stages; hidden: of the linear layer between.
    """

    def __init__(
        self, channels: int, side: int, widths: tuple[int, int, int] = (24, 48, 96), hidden: int = 128
    ) -> None:
        super().__init__()
        if side < 8 or side % 8:
            raise ConfigError("A transform net halves its images three times", got=f"side {side}", want="8, 16, ...")
        self.channels, self.side, self.widths, self.hidden = channels, side, widths, hidden
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
            )
            for a, b in zip((channels, *widths[:-1]), widths, strict=True)
        )
        self.between = nn.Linear(widths[-1] * (side // 8) ** 2, hidden)
        self.last = nn.Linear(hidden, len(label_names(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[b, channels, side, side]`` in [-1, 1] -> labels ``[b, labels]``."""
        return self.maps(x)[-1]

    def maps(self, x: Tensor) -> list[Tensor]:
        """What each stage pools, and the labels: four feature maps ``[b, ...]``."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return [*maps, self.last(self.between(x.flatten(1)).relu())]

    @property
    def shape(self) -> dict[str, Any]:
        """Its arguments, for JSON."""
        return {"channels": self.channels, "side": self.side, "widths": list(self.widths), "hidden": self.hidden}


def label_names(channels: int) -> tuple[str, ...]:
    """What is regressed: 5 geometric labels, a brightness per channel (colour), contrast, blur and noise."""
    brightness = ("brightness",) if channels == 1 else tuple(f"brightness {i}" for i in range(channels))
    return (*GEOMETRIC, *brightness, "contrast", "blur", "noise")


def random_labels(n: int, channels: int, generator: torch.Generator) -> Tensor:
    """Labels ``[n, labels]``: each uniform in (-1, 1), blur and noise in (0, 1), or 0 with probability 1/2."""
    count = len(label_names(channels))
    labels = torch.rand(n, count, generator=generator) * 2 - 1
    labels[:, -2:].abs_()
    return labels * (torch.rand(n, count, generator=generator) < PROBABILITY)


def transform(x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[b, c, h, w]`` in [-1, 1], moved, recoloured, blurred and made noisy, in this order, by ``labels``."""
    channels = x.shape[1]
    x = _move(x, labels[:, : len(GEOMETRIC)])
    brightness, (contrast, blur, noise) = labels[:, len(GEOMETRIC) : -3], labels[:, -3:].T
    gain = (LARGEST["contrast"] * contrast).exp()
    x = x * gain[:, None, None, None] + LARGEST["brightness"] * brightness.reshape(-1, channels, 1, 1)
    x = _blur(x, LARGEST["blur"] * blur * x.shape[-1])
    return x + LARGEST["noise"] * noise[:, None, None, None] * torch.randn(x.shape, generator=generator)


def _move(x: Tensor, labels: Tensor) -> Tensor:
    """The five geometric transformations ``[b, 5]`` in one bilinear resampling; the border is continued outside."""
    turn, scale, right, down, shear = labels.T
    turn, size = LARGEST["rotation"] * turn, (LARGEST["scale"] * scale).exp()
    cos, sin, shear = turn.cos() / size, turn.sin() / size, LARGEST["shear"] * shear
    first = torch.stack((cos, sin + shear * cos, -LARGEST["translation"] * right), dim=1)
    second = torch.stack((-sin, cos - shear * sin, -LARGEST["translation"] * down), dim=1)
    grid = F.affine_grid(torch.stack((first, second), dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of standard deviation ``sigma [b]`` pixels, with reflection at the border."""
    b, c, h, w = x.shape
    radius = min(max(round(3 * LARGEST["blur"] * max(h, w)), 1), min(h, w) - 1)
    at = torch.arange(-radius, radius + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (at / sigma.clamp_min(0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]
    x = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, b * c, h + 2 * radius, w + 2 * radius)
    x = F.conv2d(x, kernel[:, :, :, None], groups=b * c)
    return F.conv2d(x, kernel[:, :, None, :], groups=b * c).reshape(b, c, h, w)


@dataclass(frozen=True)
class Trained:
    """What came out: ``r2`` by label, on images kept from the training, of which there were ``validation``."""

    r2: dict[str, float]
    validation: int

    @property
    def mean_r2(self) -> float:
        """Mean over the labels."""
        return sum(self.r2.values()) / len(self.r2)


def train_transform_net(
    source: Source,
    images: int,
    seed: int,
    out: Path,
    *,
    batch: int = 128,
    lr: float = 2e-3,
    report: Report | None = None,
) -> Trained:
    """Train a :class:`TransformNet` on the CPU, mean squared error, Adam with a cosine, and write it to ``out``.

    Args:
        source: images, square, of a side that is a multiple of 8.
        images: how many transformed images to train on.
        seed: of weights, order, labels and noise; torch's global state is left as it was.
        out: directory to write: ``weights.safetensors`` and ``config.json``.
        batch, lr: of the optimiser.
        report: called about 20 times.

    Raises:
        DataError: the source holds points, or images that are not square or too few.
        ConfigError: their side is not a multiple of 8.
        StorageError: the disk refuses.
    """
    if not source.is_images or source.shape[1] != source.shape[2] or len(source) < 2 * batch:
        raise DataError(
            f"A transform net cannot be trained on '{source.name}'",
            got=f"{len(source)} samples of shape {source.shape}",
            want=f"at least {2 * batch} square images",
        )
    channels, side, _ = source.shape
    generator = torch.Generator().manual_seed(seed)
    kept, rest = _split(len(source), generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TransformNet(channels, side)
    steps = max(images // batch, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = rest[torch.randint(len(rest), (batch,), generator=generator)]
        x, labels = _example(source, rows, generator)
        loss = (net(x) - labels).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if report is not None and (step + 1) % max(steps // 20, 1) == 0:
            report((step + 1) * batch, loss.item())
    trained = validate(net.eval(), source, kept, generator)
    save_transform_net(net, out, {"source": source.name, "data": source.fingerprint, "images": steps * batch,
                                  "seed": seed, "r2": trained.r2, "validation": trained.validation})  # fmt: skip
    return trained


def validate(net: TransformNet, source: Source, rows: Tensor, generator: torch.Generator) -> Trained:
    """``R^2 = 1 - MSE/variance`` of each label on fresh transformations of the images ``rows``."""
    x, labels = _example(source, rows, generator)
    with torch.no_grad():
        found = torch.cat([net(part) for part in torch.split(x, 256)])
    r2 = 1 - (found - labels).square().mean(0) / labels.var(0, correction=0)
    return Trained(dict(zip(label_names(net.channels), r2.tolist(), strict=True)), len(rows))


def _split(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows kept for validation, and the others."""
    order = torch.randperm(n, generator=generator)
    kept = min(VALIDATION, n // 10)
    return order[:kept], order[kept:]


def _example(source: Source, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = encode(source.read(np.asarray(rows)))
    labels = random_labels(len(x), x.shape[1], generator)
    return transform(x, labels, generator), labels


def save_transform_net(net: TransformNet, out: Path, about: dict[str, Any]) -> None:
    """Write ``weights.safetensors`` and ``config.json`` (shape, labels and ``about``); the directory is made.

    Raises:
        StorageError: the disk refuses.
    """
    with new_directory(out) as path:
        write_tensors(path / "weights.safetensors", net.state_dict())
        write_json(path / "config.json", {"kind": KIND, "labels": label_names(net.channels)} | net.shape | about)


def load_transform_net(path: Path) -> TransformNet:
    """The net that :func:`train_transform_net` wrote to the directory ``path``, frozen, in evaluation mode.

    Raises:
        CheckpointError: it is missing, damaged or another network.
    """
    do = "Train one: python bench/train_transform_net.py --data SOURCE --out DIRECTORY"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("kind") != KIND:
            raise CheckpointError(f"'{path}' is not a transform net", want=f'"kind": "{KIND}" in config.json', do=do)
        net = TransformNet(config["channels"], config["side"], tuple(config["widths"]), config["hidden"])
        net.load_state_dict(read_tensors(path / "weights.safetensors"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"There is no transform net in '{path}'", got=error, do=do) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"The transform net in '{path}' is damaged", got=error, do=do) from error
    return net.eval().requires_grad_(False)
