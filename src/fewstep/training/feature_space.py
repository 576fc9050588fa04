"""Feature nets that a loss can look through: frozen, differentiable in the images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.checkpoint.store import read_tensors
from fewstep.errors import CheckpointError, ConfigError, DataError, nearest
from fewstep.evaluation.small_nets import MnistCNN, load_mnist_cnn
from fewstep.objectives.base import Features
from fewstep.training.transform_net import TransformNet, load_transform_net

MAKE_LPIPS = """python -c "import torchvision as v, lpips, safetensors.torch as s
w = {**v.models.vgg16(weights='DEFAULT').state_dict(), **lpips.LPIPS(net='vgg').state_dict()}
wanted = ('features.', 'lin0.', 'lin1.', 'lin2.', 'lin3.', 'lin4.')
s.save_file({k: w[k].clone() for k in w if k.startswith(wanted)}, 'lpips.safetensors')\""""
"""Makes the file of ``lpips:FILE``, where torchvision and lpips are installed."""


def open_differentiable(spec: str) -> Features:
    """The frozen feature net that ``spec`` names: images ``[b, c, h, w]`` in [-1, 1] -> a list of feature maps.

    ====================  =====================================================================================
    ``transforms:DIR``    a net trained on one's own images (:mod:`fewstep.training.transform_net`): its three
                          pooled stages and its labels
    ``mnist-cnn:FILE``    a small MNIST classifier: its two pooled stages and its 500 features; grey images
    ``lpips:FILE``        VGG16 with LPIPS's linear weights: squared differences of its maps are LPIPS
    ====================  =====================================================================================

    Images of another size than the net's are resized (bilinear, antialiased), inside the gradient; for LPIPS only
    those below 32 pixels, up to 32. Grey images are repeated to 3 channels for LPIPS.

    Raises:
        ConfigError: no such net.
        CheckpointError: its weights are missing or of another network.
        DataError: when called, on points or on images of other channels.
    """
    kind, _, rest = spec.partition(":")
    if kind not in NETS:
        raise ConfigError(f"There is no differentiable feature net '{spec}'", do=nearest(kind, NETS))
    if not rest:
        raise ConfigError(f"The feature net '{kind}' needs the path of its weights", do=f"Write: {kind}:PATH")
    with torch.random.fork_rng(devices=[]):  # building a network draws its first weights
        return NETS[kind](Path(rest).expanduser())


def _transforms(path: Path) -> Features:
    net = load_transform_net(path)
    return _frozen(net, f"transforms:{path}", net.channels, net.side)


def _mnist_cnn(path: Path) -> Features:
    return _frozen(load_mnist_cnn(path), f"mnist-cnn:{path}", channels=1, side=28)


def _lpips(path: Path) -> Features:
    return _frozen(load_lpips(path), f"lpips:{path}", channels=3, side=None)


NETS: dict[str, Callable[[Path], Features]] = {"transforms": _transforms, "mnist-cnn": _mnist_cnn, "lpips": _lpips}


def _frozen(net: TransformNet | MnistCNN | LPIPS, name: str, channels: int, side: int | None) -> Features:
    """``net.maps`` behind the checks of its images; ``side`` None takes any size from ``SMALLEST`` on, and grey."""
    net.eval().requires_grad_(False)

    def features(x: Tensor) -> list[Tensor]:
        if x.ndim == 4 and x.shape[1] == 1 and side is None:
            x = x.expand(-1, channels, -1, -1)
        if x.ndim != 4 or x.shape[1] != channels:
            raise DataError(
                f"The feature net '{name}' cannot read samples of shape {list(x.shape[1:])}",
                want=f"images of {channels} channel{'s' * (channels > 1)}",
            )
        x = x if x.dtype == torch.float64 else x.float()
        net.to(x.device, x.dtype)  # float32 to float64 and back is exact
        return net.maps(_resized(x, side))

    return features


SMALLEST = 32
"""Side below which VGG16, which halves four times before its last map, has nothing left to see."""


def _resized(x: Tensor, side: int | None) -> Tensor:
    size = (side, side) if side is not None else tuple(max(n, SMALLEST) for n in x.shape[2:])
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


class LPIPS(nn.Module):
    """VGG16 up to its fifth stage, as LPIPS reads it (Zhang et al., arXiv 1801.03924, eq. 1).

    With y the maps after the last ReLU of each stage, divided by their length over channels, LPIPS is
    ``sum_l mean_pixels sum_channels w_l (y_l - y'_l)^2``. :meth:`maps` gives ``y_l sqrt(w_l / pixels)``, so that it is
    the sum of squared differences of the maps.

    Args:
        weights: "features.N.weight" and ".bias" as torchvision's VGG16 names them; LPIPS's linear layers
            "linL.model.1.weight" for L = 0 to 4, or none of them, which is w = 1.
    """

    STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    WIDTHS = (64, 128, 256, 512, 512)
    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
    """What LPIPS subtracts from images in [-1, 1], and divides by."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        width = 3
        for stage, out in zip(self.STAGES, self.WIDTHS, strict=True):
            for index in stage:
                conv = nn.Conv2d(width, out, 3, padding=1, device="meta")
                given = {part: weights[f"features.{index}.{part}"] for part in ("weight", "bias")}
                conv.load_state_dict(given, assign=True)
                self.add_module(f"conv{index}", conv)
                width = out
        plain = not any(name.startswith("lin") for name in weights)
        for i, out in enumerate(self.WIDTHS):
            linear = torch.ones(out) if plain else weights[f"lin{i}.model.1.weight"].reshape(out)
            self.register_buffer(f"linear{i}", linear.clamp_min(0))
        self.register_buffer("shift", torch.tensor(self.SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(self.SCALE)[:, None, None])

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images ``[b, 3, h, w]`` in [-1, 1] -> five maps, each with LPIPS's weights in it."""
        x = (x - self.get_buffer("shift")) / self.get_buffer("scale")
        maps = []
        for i, stage in enumerate(self.STAGES):
            x = F.max_pool2d(x, 2) if i else x
            for index in stage:
                x = self.get_submodule(f"conv{index}")(x).relu()
            unit = x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()
            pixels = x.shape[2] * x.shape[3]
            maps.append(unit * (self.get_buffer(f"linear{i}") / pixels).sqrt()[:, None, None])
        return maps


def load_lpips(path: Path) -> LPIPS:
    """LPIPS's network from a safetensors file, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, or holds something else; it says how to make one.
    """
    do = f"Make it where torchvision and lpips are installed:\n{MAKE_LPIPS}"
    if not path.is_file():
        raise CheckpointError(f"The file '{path}' is missing: LPIPS's weights do not come with fewstep", do=do)
    weights = read_tensors(path)
    try:
        return LPIPS({name: value.float() for name, value in weights.items()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"The file '{path}' does not hold LPIPS's VGG16",
            got=error,
            want="features.N.weight, .bias of VGG16 (N = 0, 2, 5, .. 28), lin0.model.1.weight .. lin4.model.1.weight",
            do=do,
        ) from error
