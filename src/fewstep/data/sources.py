"""What a data source is, and the three that come with the package.

A source yields bytes (or plane points) by index and nothing else: it knows no noise, no batch order and no
model space. :mod:`fewstep.data.files` reads the user's own folders, zips and npz archives.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fewstep.data.pixels import prepare
from fewstep.errors import DataError, nearest

LARGEST_RESIZE = 8192

TILES_BACKGROUND = 64
"""Grey level behind the transparent tiles: dark enough for bright outlines, light enough for shadows."""

GAUSSIANS_STD = 0.05
"""Standard deviation of each of the eight Gaussians."""

GAUSSIANS_RADIUS = float(np.sqrt(2 * (0.5**2 - GAUSSIANS_STD**2)))
"""Circle of their centres: ``R**2 / 2 + s**2 = 0.5**2``, so that each coordinate has sigma_data = 0.5."""

GAUSSIANS_COUNT = 65_536


class Source(Protocol):
    """Images or plane points that can be read by index.

    ``name`` is for reports and can be opened again; ``shape`` is ``(c, h, w)`` or ``(2,)``; ``labels`` int64
    ``[n]`` or None with ``num_classes`` 0; ``fingerprint`` is a sha256 that changes with the data, the labels
    and the settings, so that resume can refuse other data.

    A source may also have ``captions``, a text per sample (:func:`captions_of`), and ``conditions``, what a network
    is to be told about each sample (:func:`conditions_of`).
    """

    name: str
    shape: tuple[int, ...]
    labels: np.ndarray | None
    num_classes: int
    fingerprint: str
    is_images: bool

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def read(self, index: np.ndarray) -> torch.Tensor:
        """Samples at ``index`` (int ``[b]``): uint8 ``[b, c, h, w]`` images or float32 ``[b, 2]`` points."""
        ...


class Conditions(Protocol):
    """Packed rows for the samples of a source, ready for the network: see :mod:`fewstep.conditioning`."""

    width: int

    def read(self, index: np.ndarray) -> torch.Tensor:
        """Rows of the samples at ``index`` (int ``[b]``), float32 ``[b, width]``."""
        ...


def captions_of(source: Source) -> Sequence[str] | None:
    """The text that belongs to each sample, or None."""
    captions: Sequence[str] | None = getattr(source, "captions", None)
    return captions


def conditions_of(source: Source) -> Conditions | None:
    """What a network is to be told about each sample, or None."""
    conditions: Conditions | None = getattr(source, "conditions", None)
    return conditions


@dataclass(frozen=True)
class View:
    """How a source is to be seen: the settings of ``open_source``.

    Raises:
        DataError: a value that cannot be used.
    """

    resize: int | None = None
    channels: int | None = None
    labels: bool = True
    split: str = "train"

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            got, want = self.channels, "1 (grey) or 3 (RGB)"
            raise DataError("Images cannot have this number of channels", got=got, want=want)
        whole = isinstance(self.resize, int) and 1 <= self.resize <= LARGEST_RESIZE
        if self.resize is not None and not whole:
            want = f"a whole number of pixels, 1 to {LARGEST_RESIZE}"
            raise DataError("Images cannot be resized to this", got=self.resize, want=want)
        if self.split not in ("train", "test"):
            raise DataError(f"There is no split '{self.split}'", do=nearest(self.split, ["train", "test"]))

    def only_train(self, name: str) -> None:
        """Raises DataError where a source that has no splits is asked for another than ``train``."""
        if self.split != "train":
            raise DataError(
                f"'{name}' has no split '{self.split}'",
                want="train; only an .npz with the key x_test has a test split",
            )


class ArraySource:
    """A source held in memory as one tensor, uint8 ``[n, c, h, w]`` or float32 ``[n, 2]``.

    Args:
        name: see :class:`Source`.
        data: the samples.
        labels: class indices ``[n]``, or None.
        num_classes: by default the largest label plus one.
        captions: a text per sample, or None.
    """

    def __init__(
        self,
        name: str,
        data: torch.Tensor,
        labels: np.ndarray | None,
        num_classes: int | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.data = data
        self.shape = tuple(data.shape[1:])
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.num_classes = count_classes(self.labels) if num_classes is None else num_classes
        self.captions = captions
        self.is_images = data.dtype == torch.uint8
        self.fingerprint = fingerprint(
            f"{data.dtype} {tuple(data.shape)}", data.contiguous().numpy().data.cast("B"), self.labels, captions
        )

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: np.ndarray) -> torch.Tensor:
        """A copy of the samples at ``index``."""
        return self.data[torch.as_tensor(np.asarray(index, dtype=np.int64))]


def count_classes(labels: np.ndarray | None) -> int:
    """The largest label plus one; 0 without labels."""
    return 0 if labels is None else int(labels.max()) + 1


def fingerprint(
    head: str, content: bytes | memoryview, labels: np.ndarray | None, captions: Sequence[str] | None = None
) -> str:
    """sha256, in hex, of a description, the content, the labels (as little-endian int64) and the captions."""
    digest = hashlib.sha256(head.encode() + b"\0")
    digest.update(content)
    if labels is not None:
        digest.update(b"labels\0" + labels.astype("<i8").tobytes())
    if captions is not None:
        digest.update(b"captions\0" + json.dumps(list(captions)).encode())
    return digest.hexdigest()


def digits(where: str, view: View) -> Source:
    """The 1,797 optical digits of the UCI repository, 8x8 grey, ten classes; CC BY 4.0 (Alpaydin and Kaynak).

    The file holds counts ``v`` of 0..16; the pixel is ``rint(255 v / 16)``. ``where`` is not used.
    """
    view.only_train("digits")
    x, y, _ = _embedded("digits")
    levels = np.rint(x * (255 / 16)).astype(np.uint8)
    return _embedded_source("digits", levels[..., None], y, view)


def tiles(where: str, view: View) -> Source:
    """4,192 pixel-art tiles of Dungeon Crawl Stone Soup (Nov 2015), 32x32 RGB on dark grey; CC0.

    The eight classes are the game's top folders: UNUSED, dngn, effect, gui, item, misc, mon, player.
    ``where`` is not used.
    """
    view.only_train("tiles")
    x, y, _ = _embedded("tiles")
    return _embedded_source("tiles", x, y, view)


def gaussians8(where: str, view: View) -> Source:
    """65,536 plane points: eight Gaussians of equal weight on a circle, one class each.

    Point i is ``R (cos, sin)(pi k / 4) + s n_i`` with ``k = i mod 8``, R = 0.7036, s = 0.05 and a fixed seed,
    so that each coordinate has standard deviation 0.5. ``where`` is not used.
    """
    view.only_train("gaussians8")
    if view.resize is not None or view.channels is not None:
        raise DataError("'gaussians8' holds points, not images", do="Leave out --resize and --channels")
    modes = np.arange(GAUSSIANS_COUNT) % 8
    diagonal = np.sqrt(0.5)
    first = np.array([1, diagonal, 0, -diagonal, -1, -diagonal, 0, diagonal])
    centres = GAUSSIANS_RADIUS * np.stack([first, np.roll(first, 2)], axis=1)
    noise = np.random.Generator(np.random.PCG64(8)).standard_normal((GAUSSIANS_COUNT, 2))
    points = (centres[modes] + GAUSSIANS_STD * noise).astype(np.float32)
    return ArraySource("gaussians8", torch.from_numpy(points), modes if view.labels else None)


def _embedded(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    file = importlib.resources.files("fewstep.data") / "embedded" / f"{name}.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return arrays["x"], arrays["labels"], arrays["classes"]


def _embedded_source(name: str, x: np.ndarray, labels: np.ndarray, view: View) -> Source:
    data = prepare(x, channels=view.channels, resize=view.resize, background=TILES_BACKGROUND)
    return ArraySource(name, torch.from_numpy(data), labels if view.labels else None)
