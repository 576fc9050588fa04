"""What the tests of multistep consistency models, TRACT and CTM share: exact students and a small network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from oracles import Gaussian, column
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.process import EDM
from fewstep.randomness import DropoutTape, Streams

SIZE = 6
Landing = Callable[[Tensor, Tensor, Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tape(batch: int, seed: int = 0) -> DropoutTape:
    return DropoutTape(Streams(seed), torch.arange(batch))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def gradient(denoiser: Denoiser, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss.mean(), list(denoiser.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def aim_of(law: Gaussian, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The exact g: ``(t x_s - s x_t)/(t - s)``, and the denoiser where s = t."""
    t, s = column(t), column(s)
    same = s == t
    jump = (t * law.flow(x, t, s) - s * x) / torch.where(same, 1, t - s)
    return torch.where(same, law.denoise(x, t), jump)


class Lander(nn.Module):
    """``landing(x, t, s)`` as a backbone of a two-time student, which reads both times off ``c_landing``."""

    two_time = True

    def __init__(self, landing: Landing) -> None:
        super().__init__()
        self.landing = landing
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None, c_landing: Tensor) -> Tensor:
        s = ((4 * c_landing[:, 0]).exp() - 0.002).clamp_min(0)
        s = torch.where((s - c_noise).abs() < 1e-9, c_noise, torch.where(s < 1e-12, 0, s))
        return self.landing(x, c_noise, s) + 0 * self.idle


def lander(landing: Landing, size: int = SIZE, sigma_max: float = 80.0) -> Denoiser:
    """An exact two-time student under the EDM clock (sigma_d = 0.5)."""
    parametrization = Parametrization("x0", time="native")
    return Denoiser(Lander(landing), EDM(), parametrization, sample_shape=(size,), sigma_max=sigma_max, sampler="jump")


class Net(nn.Module):
    """A small network with dropout that remembers the rows it saw, what it was told, and whether it could learn."""

    def __init__(self, two_time: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.two_time = two_time
        self.one, self.two = nn.Linear(SIZE + (6 if two_time else 2), 32), nn.Linear(32, SIZE)
        self.dropout = nn.Dropout(dropout)
        self.rows: list[int] = []
        self.told: list[Tensor] = []
        self.learns: list[bool] = []
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = 0.4 * normal(*parameter.shape, seed=50 + seed)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None, c_landing: Tensor | None = None
    ) -> Tensor:
        self.rows.append(len(x))
        self.learns.append(torch.is_grad_enabled())
        angles = c_noise[:, None] if c_landing is None else torch.cat((c_noise[:, None], c_landing), 1)
        self.told.append(angles.detach())
        hidden = self.one(torch.cat((x, angles.cos(), angles.sin()), 1)).tanh()
        return self.two(self.dropout(hidden))


def student(two_time: bool = False, dropout: float = 0.0) -> Denoiser:
    """The small network in EDM's preconditioning, in training mode."""
    return Denoiser(Net(two_time, dropout), EDM(), Parametrization("edm"), sample_shape=(SIZE,)).train()


def frozen(denoiser: Denoiser) -> Denoiser:
    """A copy without gradients, as the trainer makes them."""
    return denoiser.clone().requires_grad_(False)
