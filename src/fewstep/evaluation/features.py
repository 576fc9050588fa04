"""Feature nets: what an image is turned into before two sets of images are compared.

A net is named by a spec (``pixels``, ``pca:64``, ``mnist-cnn:PATH``, ...), and every number computed with it
carries the net's name and the number of samples, as in ``FD-MNIST-CNN-5k``.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.checkpoint.store import file_hash
from fewstep.errors import ConfigError, DataError, FewstepError, nearest
from fewstep.evaluation.feature_net import (
    IN_UNITS,
    REPEATED,
    FeatureNet,
    checked_images,
    image_extractor,
    needed,
    pixels_of,
    with_logits,
)
from fewstep.evaluation.inception import INCEPTION_FILES, open_inception
from fewstep.evaluation.pretrained import Pretrained, open_clip, open_dinov2
from fewstep.evaluation.small_nets import load_mnist_cnn, load_mobilenet

PCA_ROWS = 4096


def open_features(spec: str, *, reference: Tensor | None = None) -> FeatureNet:
    """The feature net that ``spec`` names.

    =====================  ================================================================================
    ``pixels``             the pixels in [-1, 1], flattened; float points as they are
    ``pca:K``              those, projected on the first K principal axes of ``reference``
    ``mnist-cnn:PATH``     500 features of a small MNIST classifier; 28 x 28 grey images
    ``mobilenet:PATH``     768 features of MobileNetV1 0.75/224; any size, resized to 224 x 224
    ``inception[:PATH]``   2,048 features of the network of FID; without a path from the cache
    ``dinov2[:MODEL]``     the class token of DINOv2 (a folder or a hub id; by default ViT-L/14, 1,024 features)
    ``clip[:MODEL]``       the image embedding of CLIP (a folder or a hub id; by default ViT-B/32, 512 features)
    ``torchscript:PATH``   any TorchScript net (also: a path that ends in .pt or .ts)
    ``package.mod:name``   any importable callable (also: ``module:package.mod:name``)
    =====================  ================================================================================

    The last two are given float images ``[b, c, h, w]`` in [-1, 1] at the images' own size, and return
    ``[b, dim]`` (further dimensions are flattened); grey images are repeated to 3 channels if the net
    refuses 1. Opening ``module`` runs the named Python code: only a user may name it. torch's global
    random state is left as it was.

    Args:
        spec: see above.
        reference: the reference set, uint8 ``[n, c, h, w]`` or points; needed by pixels, pca and the last two.

    Raises:
        ConfigError: no such net, one that does not run on the reference, or a package is not installed.
        CheckpointError: the weights are missing or of another network.
        DataError: the reference is missing or unusable.
    """
    if reference is not None:
        _check_points(reference)
        if len(reference) > 1 and bool((reference == reference[:1]).all()):
            raise DataError(
                "The reference samples are all the same", got=f"{len(reference)} equal samples", want="a varied set"
            )
    kind, _, rest = spec.partition(":")
    with torch.random.fork_rng(devices=[]):  # building a network draws its first weights
        if kind in FEATURES:
            return FEATURES[kind](rest, reference)
        if Path(spec).suffix in (".pt", ".ts"):
            return _torchscript(spec, reference)
        if rest:
            return _module(spec, reference)
    raise ConfigError(f"There is no feature net '{spec}'", do=nearest(kind, FEATURES))


def is_fid_net(net: FeatureNet) -> bool:
    """Whether numbers of ``net`` may be called FID: Inception with the published weights."""
    return net.verified and net.name == "Inception"


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
    for features, _ in _outputs(net, images, batch_size, device, lambda batch: (net.extract(batch), None)):
        yield features


def iter_outputs(
    net: FeatureNet,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Features ``[b, dim]`` and logits ``[b, classes]`` (None where the net has none), as :func:`iter_features`."""
    return _outputs(net, images, batch_size, device, net.extract_with_logits or (lambda x: (net.extract(x), None)))


def _outputs(
    net: FeatureNet,
    images: Tensor | Iterable[Tensor],
    batch_size: int,
    device: torch.device | str,
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]],
) -> Iterator[tuple[Tensor, Tensor | None]]:
    blocks = [images] if isinstance(images, Tensor) else images
    for batch in (part for block in blocks if len(block) for part in torch.split(block, batch_size)):
        _check_points(batch)
        features, logits = run(batch.to(device))
        features = features.cpu()
        _check_shape(net, features, len(batch))
        check_features(net, features)
        yield features, None if logits is None else logits.cpu()


@torch.no_grad()
def outputs_of(
    net: FeatureNet, block: Tensor, *, logits: bool = False, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Tensor:
    """Features of a block ``[b, dim]``, and behind them the logits ``[b, dim + classes]`` where they are wanted.

    On ``device``, which is not waited for: whoever reads them checks them (:func:`check_features`).

    Raises:
        DataError: features of another shape than promised.
    """
    parts = []
    for batch in torch.split(block.to(device), batch_size):
        if logits and net.extract_with_logits is not None:
            features, scores = net.extract_with_logits(batch)
            _check_shape(net, features, len(batch))
            parts.append(torch.cat((features, scores), 1))
        else:
            parts.append(net.extract(batch))
            _check_shape(net, parts[-1], len(batch))
    return torch.cat(parts)


def _check_shape(net: FeatureNet, features: Tensor, rows: int) -> None:
    if features.shape != (rows, net.dim):
        raise DataError(
            f"The feature net {net.name} returned features of another shape",
            got=list(features.shape),
            want=[rows, net.dim],
            do="Compare images of one size only",
        )


def check_features(net: FeatureNet, features: Tensor) -> None:
    """Refuse features, on the CPU, that are not finite.

    Raises:
        DataError: they are not.
    """
    if not features.isfinite().numpy().all():
        raise DataError(f"The feature net {net.name} returned features that are NaN or infinite", do="Check the net")


def _check_points(x: Tensor) -> None:
    if x.is_floating_point() and not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise DataError("Samples are NaN or infinite", got=f"{bad} of {len(x)} samples", want="finite numbers")


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


def _pixel_net(rest: str, reference: Tensor | None) -> FeatureNet:
    if rest:
        raise ConfigError("The feature net 'pixels' takes no argument", got=f"pixels:{rest}", do="Write: pixels")
    dim = needed(reference, "pixels")[0].numel()
    return FeatureNet("Pixels", dim, hashlib.sha256(b"pixels").hexdigest(), pixels_of, IN_UNITS)


def _pca(rest: str, reference: Tensor | None) -> FeatureNet:
    """Axes: the top eigenvectors of the covariance of <= 4,096 evenly spaced reference samples."""
    reference = needed(reference, "pca")
    rows = torch.linspace(0, len(reference) - 1, min(PCA_ROWS, len(reference)), dtype=torch.float64)
    x = pixels_of(reference[rows.round().long().to(reference.device)]).cpu().double()
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
        flat = pixels_of(images)
        if flat.shape[1] != len(mean):
            raise DataError(
                "The images differ in size from the reference of the PCA", got=flat.shape[1], want=len(mean)
            )
        return (flat - mean.to(flat)) @ axes.to(flat)

    return FeatureNet(f"PCA{int(rest)}", int(rest), digest.hexdigest(), extract, f"{IN_UNITS}, principal axes")


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
    extract = image_extractor("MNIST-CNN", net, channels=1, side=28)
    how = "28x28 grey, (x/255 - 0.1307)/0.3081"
    return FeatureNet("MNIST-CNN", 500, file_hash(path), extract, how, with_logits(extract, net.fc2))


def _mobilenet(rest: str, reference: Tensor | None) -> FeatureNet:
    path = _path(rest, "mobilenet")
    net = load_mobilenet(path)
    extract = image_extractor("MobileNetV1", net, channels=3)
    how = f"{IN_UNITS}, bilinear 224x224 with antialias{REPEATED}"
    return FeatureNet("MobileNetV1", 768, file_hash(path), extract, how, with_logits(extract, net.head))


def _pretrained(load: Callable[[str], Pretrained]) -> Callable[[str, Tensor | None], FeatureNet]:
    def open_net(rest: str, reference: Tensor | None) -> FeatureNet:
        p = load(rest)
        extract = image_extractor(p.name, p.net, channels=3, scale=lambda x: x)
        logits = None if p.head is None else with_logits(extract, p.head)
        return FeatureNet(p.name, p.dim, p.hash, extract, p.preprocessing, logits, p.verified)

    return open_net


def _torchscript(rest: str, reference: Tensor | None) -> FeatureNet:
    path = _path(rest, "torchscript")
    try:
        digest = file_hash(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # deprecated in torch 2.13; files stay
            net = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"The file '{path}' is not a readable TorchScript net",
            do="Save one with torch.jit.trace(net, x).save(PATH)",
        ) from error
    if path.name in INCEPTION_FILES or digest in [known for known, _ in INCEPTION_FILES.values()]:
        raise ConfigError(
            "The Inception of FID reads uint8 images, not floats in [-1, 1]", got=path, do=f"Write: inception:{path}"
        )
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
    "inception": _pretrained(open_inception),
    "dinov2": _pretrained(open_dinov2),
    "clip": _pretrained(open_clip),
    "torchscript": _torchscript,
    "module": _module,
}


def _probed(name: str, digest: str, net: Callable[[Tensor], Tensor], reference: Tensor | None) -> FeatureNet:
    """The net with its dimension read off two reference images; 3 channels where it refuses grey."""
    images = checked_images(needed(reference, name)[:2], name)
    reason: Exception | None = None
    for channels in (images.shape[1], 3) if images.shape[1] == 1 else (images.shape[1],):
        extract = image_extractor(name, net, channels=channels)
        try:
            features = extract(images)
        except FewstepError:
            raise
        except Exception as error:  # someone else's code may raise anything
            reason = reason or error
            continue
        how = f"{IN_UNITS}, own size" + (REPEATED if channels != images.shape[1] else "")
        return FeatureNet(name, features.shape[1], digest, extract, how)
    first_line = next(iter(str(reason).strip().splitlines()[-1:]), type(reason).__name__)
    raise ConfigError(
        f"The feature net {name} does not run on images of shape {list(images.shape[1:])}: {first_line}",
        want="a net from float images [b, c, h, w] in [-1, 1] to features [b, dim]",
    ) from reason


def _path(rest: str, kind: str) -> Path:
    path = Path(rest).expanduser()
    if not rest:
        raise ConfigError(f"The feature net '{kind}' needs the path of its weights", do=f"Write: {kind}:PATH")
    if not path.is_file():
        raise ConfigError(f"The weights file '{path}' of the feature net '{kind}' does not exist")
    return path
