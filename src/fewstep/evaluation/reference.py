"""Real data seen through a feature net: read once, kept in the user's cache, or taken from a statistics file.

The cache holds one folder per reference, ``references/KEY``, below ``$FEWSTEP_CACHE``, ``$XDG_CACHE_HOME/fewstep`` or
``~/.cache/fewstep``; the key covers the data, their labels and view, the net and the kept rows. It may be deleted at
any time. Statistics files are EDM's ``.npz`` with the keys ``mu`` and ``sigma``; those written here say more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.checkpoint.store import (
    file_hash,
    header,
    new_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from fewstep.data import Source, open_source
from fewstep.data.cache import cache_directory
from fewstep.errors import CheckpointError, ConfigError, DataError, StorageError
from fewstep.evaluation.bootstrap import evenly
from fewstep.evaluation.features import PCA_ROWS, FeatureNet, features_of, open_features
from fewstep.evaluation.measure import Real
from fewstep.evaluation.metrics import Stats, StatsAccumulator
from fewstep.evaluation.samples import READ_VALUES, read_blocks, read_rows
from fewstep.evaluation.statistics_file import (
    check_net,
    is_statistics,
    net_for_statistics,
    read_statistics,
    write_statistics,
)

KEPT_VALUES = 128_000_000
"""Most feature values that are kept row by row: 512 MB."""

PCA_VALUES = 2**28
"""Most values of the samples that a PCA is made from, where these are more than 256."""

CODING = {True: "uint8 0..255, channels first", False: "float32, as they are"}
"""What a reference's values are, by ``is_images``; part of the key of the cache."""

FORMAT = 1
"""Version of what a cached reference means; part of its key."""

_KIND = "reference"
_TENSORS, _RECORD = "statistics.safetensors", "reference.json"


@dataclass(frozen=True)
class Reference:
    """Real data seen through a feature net: statistics of all of it, features of evenly spaced rows.

    Args:
        net: the feature net.
        stats: mean and covariance of all samples.
        rows: features ``[m, d]``, float32, of m evenly spaced samples; None for a statistics file.
        labels: int64 ``[m]`` of these samples, or None.
        source: where they come from; None for a statistics file.
        info: JSON-able: "source", "split", "count", "fingerprint", "preprocessing" ("resize", "channels", "shape",
            "coding"), "preprocessing_hash", "rows" (m), "cache" (the folder, or None) and "notes" (sentences for the
            user). What a statistics file does not state is None.
    """

    net: FeatureNet
    stats: Stats
    rows: Tensor | None
    labels: Tensor | None
    source: Source | None
    info: dict[str, Any]

    @cached_property
    def real(self) -> Real:
        """What the metrics see of it; what they factor and sort is kept for all later step counts."""
        return Real(self.stats, self.rows, self.labels)


def open_reference(
    data: Source | Path | str,
    features: str | FeatureNet = "auto",
    *,
    split: str = "train",
    resize: int | None = None,
    channels: int | None = None,
    rows: int | None = None,
    like: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """One pass over the data through the feature net, in constant memory; a second call reads the cache.

    Args:
        data: an open source, what :func:`fewstep.open_source` opens, or a statistics ``.npz`` (``mu``, ``sigma``).
        features: a net or its spec; "auto" is "pixels" up to 256 values per sample, else "pca:64".
        split, resize, channels: of the data, when opened here; of an open source they only state what it is.
        rows: most samples whose features are kept; never more than 128 million values.
        like: shape of the samples that will be measured: another one is refused before the pass.
        batch_size: samples the net sees at once.
        cache: False neither reads nor writes the cache. A damaged entry is made anew and a cache that cannot be
            written is done without; ``info["notes"]`` says so.
        progress: called with (samples read, all samples).

    Raises:
        ConfigError: no such net, or settings that do not go together.
        DataError: no such data, fewer than 2 samples, values that are not finite, or statistics of another net.
    """
    if rows is not None and rows < 2:
        raise ConfigError("A reference keeps at least two rows", got=rows)
    if isinstance(data, str | Path):
        if is_statistics(data):
            if resize is not None or channels is not None:
                raise ConfigError(
                    f"The statistics '{data}' cannot be resized or converted",
                    do="Leave out --resize and --channels, or give the images themselves",
                )
            return _open_statistics(Path(str(data).removeprefix("npz:")).expanduser(), features, like)
        data = open_source(str(data), resize=resize, channels=channels, split=split)
    _check_source(data, resize, channels)
    if like is not None:
        _refuse_others(_describe(data, split, resize, channels, 0), False, like, data.is_images, None)
    net = features if isinstance(features, FeatureNet) else _open_net(data, features)
    kept = evenly(len(data), max(2, min(rows or len(data), KEPT_VALUES // net.dim))).numpy()
    labels = None if data.labels is None else torch.from_numpy(data.labels[kept])
    info = _describe(data, split, resize, channels, len(kept))
    entry = _entry(data, net, len(kept)) if cache else None
    if cache and entry is None:
        info["notes"].append("The reference is not cached: there is no home directory. Set FEWSTEP_CACHE")
    known = _recall(entry, net, len(data), len(kept), info["notes"])
    if known is None:
        known = _measure(data, net, kept, device, batch_size, progress)
        _keep(entry, known, info, net)
    elif progress is not None:
        progress(len(data), len(data))
    return Reference(net, *known, labels, data, info | {"cache": None if entry is None else str(entry)})


def check_comparable(
    reference: Reference,
    sample_shape: Sequence[int],
    is_images: bool,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Refuse samples that are not of the reference's kind, size, channels or value coding.

    Args:
        sample_shape: of one sample, ``(c, h, w)`` or ``(k,)``.
        is_images: uint8 images, or float points.
        preprocessing: of the samples, with the keys of ``reference.info["preprocessing"]`` that are known.

    Raises:
        DataError: what differs. A statistics file that does not state its images is taken on trust.
    """
    _refuse_others(reference.info, reference.source is None, sample_shape, is_images, preprocessing)


def _refuse_others(
    info: Mapping[str, Any],
    is_statistics: bool,
    sample_shape: Sequence[int],
    is_images: bool,
    preprocessing: Mapping[str, Any] | None,
) -> None:
    stated = info["preprocessing"]
    coding = (preprocessing or {}).get("coding") or CODING[is_images]
    shape, want = tuple(sample_shape), stated.get("shape")
    name = info["source"]
    if stated.get("coding") not in (None, coding):
        raise DataError(
            f"The samples cannot be compared with '{name}': their values are coded differently",
            got=f"{'images' if is_images else 'points'} ({coding})",
            want=stated["coding"],
            do="Give samples of the same kind as the reference",
        )
    if want is None or shape == tuple(want):
        return
    if len(shape) != 3 or len(want) != 3:
        raise DataError(f"The samples do not have the shape of '{name}'", got=shape, want=tuple(want))
    if shape[0] != want[0]:
        what, do = (
            "channels",
            f"Open the reference with --channels {shape[0]}: no colours are dropped or made up silently",
        )
    else:
        what, do = "resolution", f"Open the reference with --resize {shape[1]}: nothing is resized silently"
    if is_statistics:
        do = "Use statistics of images like the samples, or the images themselves"
    raise DataError(
        f"The samples and the reference '{name}' differ in {what}", got=_size(shape), want=_size(want), do=do
    )


# ------------------------------------------------------------------------------------------ the pass over the data
def _check_source(source: Source, resize: int | None, channels: int | None) -> None:
    if len(source) < 2:
        raise DataError(f"The reference '{source.name}' has too few samples", got=len(source), want="at least 2")
    shape = source.shape
    if (resize is not None and shape[-2:] != (resize, resize)) or (channels is not None and shape[0] != channels):
        raise ConfigError(
            f"The source '{source.name}' is open already and is not of that size",
            got=f"resize={resize}, channels={channels}",
            want=f"its own shape {shape}",
            do="Give resize and channels to open_source",
        )


def _open_net(source: Source, features: str) -> FeatureNet:
    """The named net; a PCA sees up to 4,096 evenly spaced samples, the others a few."""
    values = math.prod(source.shape)
    if features == "auto":
        features = "pixels" if values <= 256 else "pca:64"
    pca = features.startswith("pca")
    seen = min(PCA_ROWS, max(256, PCA_VALUES // values)) if pca else min(256, max(2, READ_VALUES // values))
    return open_features(features, reference=read_rows(source, evenly(len(source), seen).numpy()))


def _measure(
    source: Source,
    net: FeatureNet,
    kept: np.ndarray,
    device: torch.device | str,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Stats, Tensor]:
    if batch_size < 1:
        raise ConfigError("The batch size must be at least 1", got=batch_size)
    total, rows = StatsAccumulator(), torch.empty(len(kept), net.dim)
    for start, block in read_blocks(source, batch_size):
        features = features_of(net, block, batch_size=batch_size, device=device)
        total.add(features)
        first, last = np.searchsorted(kept, [start, start + len(block)])
        rows[first:last] = features[torch.from_numpy(kept[first:last] - start)].float()
        if progress is not None:
            progress(start + len(block), len(source))
    return total.stats(), rows


def _describe(source: Source, split: str, resize: int | None, channels: int | None, rows: int) -> dict[str, Any]:
    preprocessing = {
        "resize": resize,
        "channels": channels,
        "shape": list(source.shape),
        "coding": CODING[source.is_images],
    }
    return {
        "source": source.name,
        "split": split,
        "count": len(source),
        "fingerprint": source.fingerprint,
        "preprocessing": preprocessing,
        "preprocessing_hash": _sha256(preprocessing),
        "rows": rows,
        "cache": None,
        "notes": [],
    }


# -------------------------------------------------------------------------------------------------------- the cache
def _entry(source: Source, net: FeatureNet, rows: int) -> Path | None:
    root = cache_directory()
    data = [source.fingerprint, len(source), list(source.shape), CODING[source.is_images]]
    key = _sha256([FORMAT, data, [net.name, net.hash, net.dim, net.preprocessing], rows])
    return None if root is None else root / "references" / key


def _recall(
    entry: Path | None, net: FeatureNet, count: int, rows: int, notes: list[str]
) -> tuple[Stats, Tensor] | None:
    """What an earlier call kept; None, with a note, where it is damaged."""
    if entry is None or not os.path.lexists(entry):
        return None
    try:
        record, file = read_json(entry / _RECORD, _KIND), entry / _TENSORS
        found = read_tensors(file)
        forms = {"mean": (net.dim,), "cov": (net.dim, net.dim), "rows": (rows, net.dim)}
        same = record.get("sha256") == file_hash(file) and record.get("count") == count
        if not same or forms != {name: tuple(value.shape) for name, value in found.items()}:
            raise CheckpointError(f"The file '{file}' is not the one that was written")
    except (CheckpointError, OSError) as error:
        notes.append(f"The cached reference was damaged and is made anew: {error}")
        return None
    return Stats(found["mean"], found["cov"], count), found["rows"]


def _keep(entry: Path | None, known: tuple[Stats, Tensor], info: dict[str, Any], net: FeatureNet) -> None:
    if entry is None:
        return
    stats, rows = known
    try:
        with new_directory(entry) as folder:
            write_tensors(folder / _TENSORS, {"mean": stats.mean, "cov": stats.cov, "rows": rows})
            about = {k: v for k, v in info.items() if k not in ("cache", "notes")}
            about |= {"net": net.name, "net_hash": net.hash, "sha256": file_hash(folder / _TENSORS)}
            write_json(folder / _RECORD, header(_KIND) | about)
    except StorageError as error:
        reason = error.__cause__ or error
        info["notes"].append(f"The reference could not be kept in the cache '{entry.parent}': {reason}")


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- statistics files
def save_statistics(path: Path | str, reference: Reference) -> Path:
    """Write ``mu`` and ``sigma`` as EDM does, and beside them what they are of; :func:`open_reference` reads both.

    Raises:
        ConfigError: the name does not end in ``.npz``.
        StorageError: the disk refused; an older file is untouched.
    """
    return write_statistics(Path(path).expanduser(), reference.stats, reference.net, reference.info)


def _open_statistics(path: Path, features: str | FeatureNet, like: Sequence[int] | None) -> Reference:
    file = read_statistics(path)
    net = net_for_statistics(file, features, like) if isinstance(features, str) else features
    check_net(file, net)
    preprocessing = file.stated["preprocessing"] or {}
    missing = [key for key in ("split", "count", "preprocessing") if not file.stated[key]]
    info = file.stated | {
        "source": file.stated["source"] or str(path),
        "fingerprint": file.stated["fingerprint"] or file_hash(path),
        "preprocessing": preprocessing,
        "preprocessing_hash": _sha256(preprocessing) if preprocessing else None,
        "rows": 0,
        "cache": None,
        "notes": [f"Not stated in the statistics '{path}': {', '.join(missing)} of the reference"] if missing else [],
    }
    return Reference(net, file.stats, None, None, None, info)


def _size(shape: Sequence[int]) -> str:
    colour = {1: "grey", 3: "RGB"}.get(shape[0], f"{shape[0]} channels")
    return f"{shape[2]}x{shape[1]} {colour}"
