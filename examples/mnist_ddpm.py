"""A network that fewstep knows nothing about: a real MNIST DDPM, wrapped by ``Denoiser.from_module``.

The weights are ``ddpm_cnn_mnist_yichizz.safetensors`` (Yichizz/hot_vs_cold_diffusion, MIT). Put them beside this
file, or name them in the environment variable MNIST_DDPM. Then:

    fewstep sample examples/mnist_ddpm.py:teacher --sampler ode --steps 35 -n 64 --out teacher.png
    fewstep tune   examples/mnist_ddpm.py:teacher --config examples/mnist_ddpm.yaml --data mnist.npz --out mnist-run
    fewstep eval   mnist-run --network examples/mnist_ddpm.py:teacher --data mnist.npz --features mnist-cnn:CNN
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep import Denoiser, DiscreteVP


class Block(nn.Module):
    """conv 7x7 - LayerNorm over (C, 28, 28) - GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(inputs, outputs, 7, padding=3), nn.LayerNorm((outputs, 28, 28)), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class MnistDDPM(nn.Module):
    """The network as published: eps-prediction, ``t`` in [0, 1], images in [-0.5, 0.5]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(16))
        self.time_embed = nn.Sequential(
            nn.Linear(32, 128),
            nn.GELU(),
            nn.Linear(128, 128),
            nn.GELU(),
            nn.Linear(128, 128),
            nn.GELU(),
            nn.Linear(128, 16),
        )
        widths = (1, 16, 32, 32, 16)
        blocks: list[nn.Module] = [Block(a, b) for a, b in pairwise(widths)]
        self.blocks = nn.ModuleList([*blocks, nn.Conv2d(16, 1, 3, padding=1)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        embedding = self.time_embed(torch.cat((angle.sin(), angle.cos() - 1), dim=1))
        h = self.blocks[0](x) + embedding[:, :, None, None]
        for block in list(self.blocks)[1:]:
            h = block(h)
        return h


def teacher() -> Denoiser:
    """The published weights under their own clock: 1,001 steps of linear betas, told to the network as step/1000."""
    beside = Path(__file__).with_name("ddpm_cnn_mnist_yichizz.safetensors")
    weights = load_file(os.environ.get("MNIST_DDPM", beside))
    table = tuple(weights.pop("alpha_t").double().tolist())
    weights.pop("beta_t")
    module = MnistDDPM()
    module.load_state_dict({name.removeprefix("gt."): tensor for name, tensor in weights.items()})
    return Denoiser.from_module(
        module,
        process=DiscreteVP(table),
        prediction="eps",
        time=lambda index: index / 1000,
        sample_shape=(1, 28, 28),
        sigma_data=0.31,
        sigma_max=10.0,
        value_range=(-0.5, 0.5),
    )
