"""Two small published classifiers, rebuilt layer by layer so that their weight files run no code.

Both take images in [-1, 1], float ``[b, c, h, w]``, and return the features before their last layer.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import CheckpointError

MOBILENET_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
MOBILENET_EPS = 1e-3
MOBILENET_SIDE = 224


class MnistCNN(nn.Module):
    """conv5x5(1-20) relu pool2 conv5x5(20-50) relu pool2 fc(800-500) relu | fc(500-10).

    Images ``[b, 1, 28, 28]`` in [-1, 1]; normalised inside as (x/255 - .1307)/.3081 of the grey levels.
    Source: pytorch/botorch tutorials (MIT), 98.9 % on the MNIST test set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[b, 500]``, not negative."""
        return self.maps(x)[-1]

    def maps(self, x: Tensor) -> list[Tensor]:
        """What each layer but the last sees next: ``[b, 20, 12, 12]``, ``[b, 50, 4, 4]``, and the features."""
        x = ((x + 1) / 2 - 0.1307) / 0.3081
        first = F.max_pool2d(self.conv1(x).relu(), 2)
        second = F.max_pool2d(self.conv2(first).relu(), 2)
        return [first, second, F.relu(self.fc1(second.flatten(1)))]

    def logits(self, x: Tensor) -> Tensor:
        """Class scores ``[b, 10]``."""
        out: Tensor = self.fc2(self(x))
        return out


class MobileNetV1(nn.Module):
    """MobileNet v1 0.75/224: a strided stem, 13 depthwise-separable blocks, global mean pooling.

    Each layer is a convolution with its batch norm folded in (eps 1e-3), then relu6. Images
    ``[b, 3, h, w]`` in [-1, 1] are resized to 224 x 224 (bilinear, antialiased).
    Source: Howard et al. 2017, table 1; weights from Google (Apache-2.0).
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        layers = [_folded(arrays, "conv1|kernel", "conv1_bn", stride=2)]
        for i, stride in enumerate(MOBILENET_STRIDES, start=1):
            layers.append(_folded(arrays, f"conv_dw_{i}|depthwise_kernel", f"conv_dw_{i}_bn", stride=stride))
            layers.append(_folded(arrays, f"conv_pw_{i}|kernel", f"conv_pw_{i}_bn", stride=1))
        self.layers = nn.Sequential(*layers)
        kernel, bias = _tensor(arrays, "conv_preds|kernel"), _tensor(arrays, "conv_preds|bias")
        self.head = nn.Linear(kernel.shape[2], kernel.shape[3])
        self.head.load_state_dict({"weight": kernel[0, 0].T, "bias": bias})

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[b, 768]``, in [0, 6]."""
        if x.shape[-2:] != (MOBILENET_SIDE, MOBILENET_SIDE):
            x = F.interpolate(x, size=(MOBILENET_SIDE, MOBILENET_SIDE), mode="bilinear", antialias=True)
        out: Tensor = self.layers(x).mean((2, 3))
        return out

    def logits(self, x: Tensor) -> Tensor:
        """ImageNet class scores ``[b, 1000]``."""
        out: Tensor = self.head(self(x))
        return out


class ConvRelu6(nn.Module):
    """relu6(conv(x)) with TensorFlow's "same" padding: at stride 2 and even sides, bottom and right only."""

    def __init__(self, weight: Tensor, bias: Tensor, *, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, c, h, w]`` -> ``[b, c', ceil(h/stride), ceil(w/stride)]``."""
        height, width = x.shape[-2:]
        x = F.pad(x, (*self._padding(width), *self._padding(height)))
        return F.relu6(F.conv2d(x, self.weight, self.bias, stride=self.stride, groups=self.groups))

    def _padding(self, length: int) -> tuple[int, int]:
        kernel = self.weight.shape[-1]
        total = max((-(-length // self.stride) - 1) * self.stride + kernel - length, 0)
        return total // 2, total - total // 2


def load_mnist_cnn(path: Path) -> MnistCNN:
    """The MNIST classifier from a safetensors file, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds another network.
    """
    net = MnistCNN()
    try:
        net.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The weights file '{path}' is not a safetensors file", got=error) from error
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights file '{path}' is not that of the MNIST CNN",
            want="conv1, conv2, fc1, fc2 (weight, bias)",
        ) from error
    return net.eval().requires_grad_(False)


def load_mobilenet(path: Path) -> MobileNetV1:
    """MobileNetV1 from an npz of TensorFlow arrays ("/" written as "|", kernels HWIO), in evaluation mode.

    Raises:
        CheckpointError: the file is missing, unreadable, or holds another network.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"The weights file '{path}' is no npz of plain arrays", got=error) from error
    try:
        net = MobileNetV1(arrays)
    except (KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"The weights file '{path}' is not that of MobileNetV1",
            got=error,
            want="conv1, conv_dw_1 .. conv_pw_13",
        ) from error
    return net.eval().requires_grad_(False)


def _tensor(arrays: Mapping[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(np.asarray(arrays[name], dtype=np.float32))


def _folded(arrays: Mapping[str, np.ndarray], kernel: str, norm: str, *, stride: int) -> ConvRelu6:
    """conv then batch norm as one convolution: w γ/√(v + eps), β - μ γ/√(v + eps)."""
    gamma, beta, mean, variance = (
        _tensor(arrays, f"{norm}|{part}") for part in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    gain = gamma / (variance + MOBILENET_EPS).sqrt()
    bias = beta - mean * gain
    depthwise = kernel.endswith("depthwise_kernel")
    order = (2, 3, 0, 1) if depthwise else (3, 2, 0, 1)  # TensorFlow's HWIO, depthwise HWI1
    weight = (_tensor(arrays, kernel).permute(order) * gain[:, None, None, None]).contiguous()
    return ConvRelu6(weight, bias, stride=stride, groups=len(gain) if depthwise else 1)


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(f"The weights file '{path}' does not exist", do="Give the path of a downloaded file")
