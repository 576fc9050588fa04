"""EDM's statistics files: an ``.npz`` with the keys ``mu`` and ``sigma``, of a feature net it does not name.

Those written here also state, as plain text, what they are of; other tools read ``mu`` and ``sigma`` and ignore the
rest. Nothing is unpickled.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.data.codec import write_file
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.features import FeatureNet, open_features
from fewstep.evaluation.metrics import Stats

UNSTATED = sys.maxsize
"""``Stats.count`` of a file that does not say how many samples it is of: taken as exact."""

_TEXTS = ("net", "net_hash", "net_preprocessing", "source", "split", "fingerprint")
_MADE_WITH = {
    2048: "Inception-v3 (FID)",
    1536: "DINOv2 ViT-g/14",
    1024: "DINOv2 ViT-L/14",
    768: "DINOv2 ViT-B/14, CLIP ViT-L/14 or MobileNetV1",
    512: "CLIP ViT-B/32",
    500: "MNIST-CNN",
    384: "DINOv2 ViT-S/14",
}
"""Number of features -> the nets that give so many."""


@dataclass(frozen=True)
class StatisticsFile:
    """What a statistics file holds.

    Args:
        path: where it is.
        stats: mean and covariance, float64.
        stated: "count", "net", "net_hash", "net_preprocessing", "source", "split", "fingerprint" and "preprocessing";
            None where not stated.
    """

    path: Path
    stats: Stats
    stated: dict[str, Any]


def is_statistics(path: Path | str) -> bool:
    """Is this an ``.npz`` with the keys ``mu`` and ``sigma``, whatever else it holds?"""
    file = Path(str(path).removeprefix("npz:")).expanduser()
    try:
        if file.suffix.lower() != ".npz" or not zipfile.is_zipfile(file):
            return False
        with np.load(file, allow_pickle=False) as arrays:
            return {"mu", "sigma"} <= set(arrays)
    except (OSError, ValueError, zipfile.BadZipFile):  # whoever opens it as images says what is wrong
        return False


def write_statistics(path: Path, stats: Stats, net: FeatureNet, about: Mapping[str, Any]) -> Path:
    """Write ``mu [d]``, ``sigma [d, d]`` (float64), ``count`` (int64), and the rest as text; whole or not at all.

    Args:
        about: of "source", "split", "fingerprint", "count" and "preprocessing" what is known.

    Raises:
        ConfigError: the name does not end in ``.npz``.
        StorageError: the disk refused; an older file is untouched.
    """
    if path.suffix.lower() != ".npz":
        raise ConfigError("Statistics are written to an .npz file", got=str(path))
    texts: dict[str, str | None] = {"net": net.name, "net_hash": net.hash, "net_preprocessing": net.preprocessing}
    texts |= {key: about.get(key) for key in ("source", "split", "fingerprint")}
    texts |= {"preprocessing": json.dumps(about["preprocessing"])} if about.get("preprocessing") else {}
    arrays = {key: np.array(text) for key, text in texts.items() if text is not None}
    arrays |= {"mu": stats.mean.cpu().numpy(), "sigma": stats.cov.cpu().numpy()}
    arrays |= {} if about.get("count") is None else {"count": np.array(about["count"], dtype=np.int64)}
    return write_file(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def read_statistics(path: Path) -> StatisticsFile:
    """Read the file and refuse what cannot be a mean and a covariance.

    Raises:
        DataError: damaged, of wrong types or shapes, not finite, or not symmetric.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            known = ("mu", "sigma", "count", "preprocessing", *_TEXTS)
            arrays = {key: np.asarray(file[key]) for key in known if key in file}
        mu, sigma = arrays["mu"], arrays["sigma"]
    except Exception as error:  # numpy raises every kind of error on damaged bytes
        raise DataError(f"The statistics '{path}' cannot be read: {error}") from error
    if not mu.dtype.kind == sigma.dtype.kind == "f" or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        got = f"mu {mu.dtype} {list(mu.shape)}, sigma {sigma.dtype} {list(sigma.shape)}"
        raise DataError(f"The statistics '{path}' have a wrong form", got=got, want="floats, mu [d] and sigma [d, d]")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DataError(f"The statistics '{path}' hold values that are not finite", do="Make them anew")
    if not np.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * np.abs(sigma).max(initial=0)):
        raise DataError(f"The 'sigma' of '{path}' is no covariance: it is not symmetric")
    count = _count(path, arrays.get("count"))
    stated: dict[str, Any] = {key: str(arrays[key]) if key in arrays else None for key in _TEXTS}
    stated |= {"count": count, "preprocessing": _preprocessing(path, arrays.get("preprocessing"))}
    mean, cov = (torch.from_numpy(array.astype(np.float64)) for array in (mu, sigma))
    return StatisticsFile(path, Stats(mean, cov, count or UNSTATED), stated)


def net_for_statistics(file: StatisticsFile, features: str, like: Sequence[int] | None = None) -> FeatureNet:
    """The named net, tried on a black and a white image of the stated shape.

    Where none is stated they are ``like`` the samples that will be compared, or 32x32 RGB.

    Raises:
        ConfigError: "auto" or a PCA, which the file cannot give; or as :func:`open_features`.
    """
    if features == "auto" or features.startswith("pca"):
        raise ConfigError(
            f"The statistics '{file.path}' do not contain the feature net",
            got=features,
            do="Name the net they were made with: --features inception:PATH for EDM's files",
        )
    shape = (file.stated["preprocessing"] or {}).get("shape")
    shape = tuple(shape or like or (3, 32, 32))
    black = torch.zeros(shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
    return open_features(features, reference=torch.stack([black, black + 255]))


def check_net(file: StatisticsFile, net: FeatureNet) -> None:
    """Refuse a net that gives another number of features, or, where the file states its hash, another net.

    Raises:
        DataError: both are named, as far as they are known.
    """
    dim, made_with, digest = len(file.stats.mean), file.stated["net"], file.stated["net_hash"]
    pixels = file.stated["net_preprocessing"]
    do = "Give the net they were made with, or the images themselves"
    if dim != net.dim:
        guess = made_with or _MADE_WITH.get(dim)
        raise DataError(
            f"The statistics '{file.path}' are of another feature net than {net.name}",
            got=f"{dim} features" + (f", {'' if made_with else 'probably '}of {guess}" if guess else ""),
            want=f"{net.dim} features",
            do=do,
        )
    if digest is not None and digest != net.hash:
        raise DataError(
            f"The statistics '{file.path}' were not made with this {net.name}",
            got=f"{made_with or 'a net'} with the hash {digest[:12]}",
            want=f"{net.name} with the hash {net.hash[:12]}",
            do=do,
        )
    if pixels is not None and pixels != net.preprocessing:
        raise DataError(
            f"The statistics '{file.path}' were made with another preprocessing in front of {net.name}",
            got=repr(pixels),
            want=repr(net.preprocessing),
            do=do,
        )


def _count(path: Path, value: np.ndarray | None) -> int | None:
    if value is None:
        return None
    if value.shape != () or value.dtype.kind not in "iu" or int(value) < 2:
        raise DataError(f"The 'count' of '{path}' is no number of samples", got=value.tolist(), want="at least 2")
    return int(value)


def _preprocessing(path: Path, value: np.ndarray | None) -> dict[str, Any] | None:
    if value is None:
        return None
    try:
        stated = json.loads(str(value))
        if not all(isinstance(side, int) and side > 0 for side in stated.get("shape", [])):
            raise ValueError("shape")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"The 'preprocessing' of '{path}' cannot be read", want="the JSON fewstep writes") from error
    return dict(stated)
