"""Feature nets: what an image is turned into before two sets of images are compared.

A net is named by a spec (``pixels``, ``pca:64``, ``mnist-cnn:PATH``, ...), and every number computed with it
carries the net's name and the number of samples, as in ``FD-MNIST-CNN-5k``.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError, DataError, FewstepError, nearest
from fewstep.evaluation.small_nets import load_mnist_cnn, load_mobilenet

Extract: TypeAlias = Callable[[Tensor], Tensor]
"""uint8 images ``[b, c, h, w]`` or float points ``[b, ...]`` -> features ``[b, dim]`` on the same device."""

PCA_ROWS = 4096
METRICS = {"fd": "FD", "kid": "KID", "sw2": "SW2", "precision": "Precision", "recall": "Recall"}


@dataclass(frozen=True)
class FeatureNet:
    """A named map from images to features.

    Args:
        name: as it stands in the names of numbers ("MNIST-CNN").
        dim: number of features.
        hash: sha256 of what fixes the map: the weights file, or the reference of a PCA.
        extract: uint8 images ``[b, c, h, w]`` (or, for ``pixels`` and ``pca``, float points) -> ``[b, dim]``.
    """

    name: str
    dim: int
    hash: str
    extract: Extract


def open_features(spec: str, *, reference: Tensor | None = None) -> FeatureNet:
    """The feature net that ``spec`` names.

    =====================  ==================================================================
    ``pixels``             the pixels in [-1, 1], flattened; float points as they are
    ``pca:K``              those, projected on the first K principal axes of ``reference``
    ``mnist-cnn:PATH``     500 features of a small MNIST classifier; 28 x 28 grey images
    ``mobilenet:PATH``     768 features of MobileNetV1 0.75/224; any size, resized to 224 x 224
    ``torchscript:PATH``   any TorchScript net (also: a path that ends in .pt or .ts)
    ``package.mod:name``   any importable callable (also: ``module:package.mod:name``)
    =====================  ==================================================================

    The last two are given float images ``[b, c, h, w]`` in [-1, 1] at the images' own size, and return
    ``[b, dim]`` (further dimensions are flattened); grey images are repeated to 3 channels if the net
    refuses 1. Opening ``module`` runs the named Python code: only a user may name it.

    Args:
        spec: see above.
        reference: the reference set, uint8 ``[n, c, h, w]`` or points; all but the two classifiers need it.

    Raises:
        ConfigError: no such net, or one that does not run on the reference.
        CheckpointError: the weights are missing or of another network.
        DataError: the reference is missing or unusable.
    """
    kind, _, rest = spec.partition(":")
    if kind in FEATURES:
        return FEATURES[kind](rest, reference)
    if Path(spec).suffix in (".pt", ".ts"):
        return _torchscript(spec, reference)
    if rest:
        return _module(spec, reference)
    raise ConfigError(f"There is no feature net '{spec}'", do=nearest(kind, FEATURES))


def iter_features(
    net: FeatureNet,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Features ``[b, dim]`` batch by batch, on the CPU: for statistics in constant memory.

    ``images`` is one tensor or an iterable of blocks; each is cut into batches of ``batch_size``.

    Raises:
        DataError: images that the net cannot read, or features of another shape than promised.
    """
    blocks = [images] if isinstance(images, Tensor) else images
    for batch in (part for block in blocks if len(block) for part in torch.split(block, batch_size)):
        features = net.extract(batch.to(device)).cpu()
        if features.shape != (len(batch), net.dim):
            raise DataError(
                f"The feature net {net.name} returned features of another shape",
                got=list(features.shape),
                want=[len(batch), net.dim],
                do="Compare images of one size only",
            )
        yield features


def features_of(
    net: FeatureNet,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """All features ``[n, dim]`` of ``images`` (one tensor, or an iterable of blocks), on the CPU.

    Raises:
        DataError: there are no images, or as :func:`iter_features`.
    """
    parts = list(iter_features(net, images, batch_size=batch_size, device=device))
    if not parts:
        raise DataError("There are no images to compute features of", got=0, want="at least 1")
    return torch.cat(parts)


def metric_name(metric: str, net: FeatureNet | str, n: int) -> str:
    """The full name of a number: metric, net, samples.

    >>> metric_name("fd", "MNIST-CNN", 5000), metric_name("kid", "Pixels", 1234)
    ('FD-MNIST-CNN-5k', 'KID-Pixels-1234')

    Raises:
        ConfigError: no such metric; "fid" is none, because that name is taken by Inception's conventions.
    """
    if metric not in METRICS:
        raise ConfigError(f"There is no metric '{metric}'", do=nearest(metric, METRICS))
    count = f"{n // 1000}k" if n >= 1000 and n % 1000 == 0 else str(n)
    return f"{METRICS[metric]}-{net if isinstance(net, str) else net.name}-{count}"


def _pixel_net(rest: str, reference: Tensor | None) -> FeatureNet:
    if rest:
        raise ConfigError("The feature net 'pixels' takes no argument", got=f"pixels:{rest}", do="Write: pixels")
    dim = _needed(reference, "pixels")[0].numel()
    return FeatureNet("Pixels", dim, hashlib.sha256(b"pixels").hexdigest(), _pixels)


def _pca(rest: str, reference: Tensor | None) -> FeatureNet:
    """Axes: the top eigenvectors of the covariance of <= 4,096 evenly spaced reference samples."""
    reference = _needed(reference, "pca")
    rows = torch.linspace(0, len(reference) - 1, min(PCA_ROWS, len(reference)), dtype=torch.float64)
    x = _pixels(reference[rows.round().long().to(reference.device)]).cpu().double()
    most = min(len(x) - 1, x.shape[1])
    if not rest.isdecimal() or not 1 <= int(rest) <= most:
        raise ConfigError(
            "The number of principal axes is not usable",
            got=f"pca:{rest}",
            want=f"pca:K with K from 1 to {most} ({len(x)} reference samples of {x.shape[1]} values)",
        )
    mean, axes = _principal_axes(x, int(rest))
    digest = hashlib.sha256(f"pca:{int(rest)}".encode())
    digest.update(reference.contiguous().cpu().numpy().tobytes())

    def extract(images: Tensor) -> Tensor:
        flat = _pixels(images)
        if flat.shape[1] != len(mean):
            raise DataError(
                "The images differ in size from the reference of the PCA", got=flat.shape[1], want=len(mean)
            )
        return (flat - mean.to(flat)) @ axes.to(flat)

    return FeatureNet(f"PCA{int(rest)}", int(rest), digest.hexdigest(), extract)


def _principal_axes(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean ``[d]`` and orthonormal axes ``[d, k]``, largest variance first, largest entry positive."""
    mean = x.mean(0)
    x = x - mean
    if x.shape[1] <= len(x):
        axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -k:].flip(1)
    else:  # the smaller Gram matrix has the same spectrum: x xᵀ u = λ u  =>  axis = xᵀu/|xᵀu|
        axes = torch.linalg.qr(x.T @ torch.linalg.eigh(x @ x.T).eigenvectors[:, -k:].flip(1)).Q
    return mean, axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def _mnist_cnn(rest: str, reference: Tensor | None) -> FeatureNet:
    path = _path(rest, "mnist-cnn")
    net = load_mnist_cnn(path)
    return FeatureNet("MNIST-CNN", 500, _file_hash(path), _image_extractor("MNIST-CNN", net, channels=1, side=28))


def _mobilenet(rest: str, reference: Tensor | None) -> FeatureNet:
    path = _path(rest, "mobilenet")
    net = load_mobilenet(path)
    return FeatureNet("MobileNetV1", 768, _file_hash(path), _image_extractor("MobileNetV1", net, channels=3))


def _torchscript(rest: str, reference: Tensor | None) -> FeatureNet:
    path = _path(rest, "torchscript")
    try:
        digest = _file_hash(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # deprecated in torch 2.13; files stay
            net = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"The file '{path}' is not a readable TorchScript net",
            do="Save one with torch.jit.trace(net, x).save(PATH)",
        ) from error
    return _probed(path.stem, digest, net, reference)


def _module(rest: str, reference: Tensor | None) -> FeatureNet:
    where, _, name = rest.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in where.split(".")):
        raise ConfigError(f"'{rest}' does not name a callable", want="package.module:name", do=nearest(where, FEATURES))
    try:
        module = importlib.import_module(where)
        net = getattr(module, name)
    except Exception as error:  # importing runs someone else's code
        raise ConfigError(
            f"There is neither a feature net '{where}' nor an importable '{rest}': {error}",
            do=nearest(where, FEATURES) + ". Is its folder on PYTHONPATH?",
        ) from error
    if not callable(net) or isinstance(net, type):
        raise ConfigError(f"'{rest}' is not a function or a network", got=type(net).__name__, want="a callable object")
    source = getattr(module, "__file__", None)
    digest = hashlib.sha256(rest.encode() + (Path(source).read_bytes() if source else b""))
    if isinstance(net, nn.Module):
        net = net.eval()
        for key, value in net.state_dict().items():
            digest.update(key.encode() + value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return _probed(name, digest.hexdigest(), net, reference)


FEATURES: dict[str, Callable[[str, Tensor | None], FeatureNet]] = {
    "pixels": _pixel_net,
    "pca": _pca,
    "mnist-cnn": _mnist_cnn,
    "mobilenet": _mobilenet,
    "torchscript": _torchscript,
    "module": _module,
}


def _probed(name: str, digest: str, net: Callable[[Tensor], Tensor], reference: Tensor | None) -> FeatureNet:
    """The net with its dimension read off two reference images; 3 channels where it refuses grey."""
    images = _images(_needed(reference, name)[:2], name)
    reason: Exception | None = None
    for channels in (images.shape[1], 3) if images.shape[1] == 1 else (images.shape[1],):
        extract = _image_extractor(name, net, channels=channels)
        try:
            features = extract(images)
        except FewstepError:
            raise
        except Exception as error:  # someone else's code may raise anything
            reason = reason or error
            continue
        return FeatureNet(name, features.shape[1], digest, extract)
    first_line = next(iter(str(reason).strip().splitlines()[-1:]), type(reason).__name__)
    raise ConfigError(
        f"The feature net {name} does not run on images of shape {list(images.shape[1:])}: {first_line}",
        want="a net from float images [b, c, h, w] in [-1, 1] to features [b, dim]",
    ) from reason


def _image_extractor(name: str, net: Callable[[Tensor], Tensor], *, channels: int, side: int | None = None) -> Extract:
    def extract(images: Tensor) -> Tensor:
        x = _with_channels(_images(images, name), channels, name)
        if side is not None and tuple(x.shape[2:]) != (side, side):
            raise DataError(
                f"The feature net {name} reads images of {side}x{side} pixels only",
                got=f"{x.shape[2]}x{x.shape[3]}",
                do="For other sizes use mobilenet, pca or pixels: nothing is resized silently",
            )
        with torch.no_grad():
            out = (net.to(x.device) if isinstance(net, nn.Module) else net)(_unit(x))
        if not isinstance(out, Tensor) or out.ndim < 2 or len(out) != len(x):
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(f"The feature net {name} does not return features", got=got, want=f"[{len(x)}, dim]")
        return out.flatten(1)

    return extract


def _images(x: Tensor, name: str) -> Tensor:
    if x.ndim != 4 or x.dtype != torch.uint8:
        raise DataError(
            f"The feature net {name} reads images",
            got=f"{str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}",
            want="uint8 [b, c, h, w]",
            do="Use pixels or pca for points",
        )
    return x


def _with_channels(x: Tensor, channels: int, name: str) -> Tensor:
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    raise DataError(
        f"The feature net {name} cannot read images of {x.shape[1]} channels",
        want=f"{channels} (or 1)",
        do="Use another feature net: colour is not dropped silently",
    )


def _pixels(x: Tensor) -> Tensor:
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise DataError("These are neither images nor points", got=f"values of type {x.dtype}", want="uint8 or float")
    if x.ndim < 2:
        raise DataError(
            "These are neither images nor points", got=f"shape {list(x.shape)}", want="[b, c, h, w] or [b, k]"
        )
    return _unit(x).flatten(1)


def _unit(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1; floats as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def _needed(reference: Tensor | None, name: str) -> Tensor:
    if reference is None or not len(reference):
        raise DataError(f"The feature net {name} needs reference samples to be opened", got="none", want="at least 2")
    return reference


def _path(rest: str, kind: str) -> Path:
    path = Path(rest).expanduser()
    if not rest:
        raise ConfigError(f"The feature net '{kind}' needs the path of its weights", do=f"Write: {kind}:PATH")
    if not path.is_file():
        raise ConfigError(f"The weights file '{path}' of the feature net '{kind}' does not exist")
    return path


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
