"""Training compute of a run in FLOP: images x what the networks do per image."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.objectives import ECT, Beside, Objective, StepRandom
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.times import draw, pair
from fewstep.types import Batch, Progress

_LAW_GRID, _CLOCK_GRID = 1 << 14, 1 << 10
_ROWS, _MOMENTS = 64, 32
_SIDE = 8

Passes = dict[tuple[str, int], float]
"""(network, cost of one of its passes in units of a forward pass) -> such passes per training image."""


def forward_flops(denoiser: Denoiser) -> int:
    """FLOP of one network evaluation of one sample: matrix products and convolutions, 2 per multiply-add.

    Counted by torch's counter. Use a denoiser on the "meta" device: nothing is computed there, and attention, which
    the counter misses in the CPU's fused kernel, is counted. On one CPU core a DDPM++ counts in under a second.
    """
    where = denoiser.device
    x = torch.zeros(1, *denoiser.sample_shape, device=where)
    cond = denoiser.condition(None, 1)
    landing = (torch.zeros(1, 2, device=where),) if denoiser.two_time else ()
    told = {"guidance": torch.ones(1, device=where)} if denoiser.guided else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser.backbone(x, torch.zeros(1, device=where), cond, *landing, **told)
    return int(counter.get_total_flops())


def target_share(objective: ECT, images: int, sigma_min: float = 0.0, sigma_max: float = 80.0) -> float:
    """Share of ECT's images with a second, target pass: ``P(r > 0)`` under the law of t, meant over the schedule.

    Args:
        images: length of the run, over which the schedule moves.
        sigma_min, sigma_max: of the student; as in the loss, the law is cut off only where sigma_min > 0.
    """
    u = (torch.arange(_LAW_GRID, dtype=torch.float64) + 0.5) / _LAW_GRID
    t = draw(objective.law, u, sigma_min, sigma_max if sigma_min > 0 else float("inf"))
    ratios = Counter(objective.schedule.ratio(progress) for progress in _moments(images, _CLOCK_GRID))
    shares = {q: float((pair(objective.mapping, t, q, sigma_min)[0] > 0).double().mean()) for q in ratios}
    return sum(shares[q] * count for q, count in ratios.items()) / _CLOCK_GRID


def passes(objective: Objective, denoiser: Denoiser, images: int) -> Passes:
    """Network passes per training image, meant over a run of ``images``, by what the loss does to stub networks.

    A pass with gradient costs 3 (forward, and backward to weights and input), one through a frozen network to its
    input 2, one without gradient 1; with a forward-mode derivative twice that. Which rows pass depends on their
    times: 64 stratified rows at each of 32 moments of the run decide (shares good to about 0.01); for plain ECT the law
    is integrated instead.

    Args:
        denoiser: gives the shape of the samples, labels and noise levels; its network is not run.
    """
    if isinstance(objective, ECT) and not objective.needs_teacher:
        share = target_share(objective, images, denoiser.sigma_min, denoiser.sigma_max)
        return {("student", 3): 1.0, ("student", 1): share}
    counts: Counter[tuple[str, int]] = Counter()
    student = _stub("student", counts, denoiser, objective).train()
    objective = objective.prepare(student)
    with torch.random.fork_rng(devices=[]):
        extra = objective.extra(student)
    teacher = _stub("teacher", counts, denoiser).requires_grad_(False).eval()
    names = objective.companions()
    companions = {name: _stub(name, counts, denoiser, objective).requires_grad_(False) for name in names}
    beside = Beside(teacher, companions, extra, lambda x: [x])
    counts.clear()  # prepare may have tried the student
    for k, progress in enumerate(_moments(images, _MOMENTS)):
        random = _Stratified(Streams(0), torch.arange(k * _ROWS, (k + 1) * _ROWS), student.device)
        objective.loss(student, _batch(student, random), progress, random, beside)
    return {key: rows / (_ROWS * _MOMENTS) for key, rows in sorted(counts.items())}


def training_flops(denoiser: Denoiser, objective: Objective, images: int) -> float:
    """``images F sum_passes cost``, F the FLOP of one forward pass, passes and their costs as in :func:`passes`.

    All networks count as the student's. Optimiser, averages, sampling, feature nets, an objective's own parameters
    and what the teacher had cost are not counted. EDM's CIFAR-10 network: F = 42.38 GFLOP, so 169.5 per image of an
    ECT step whose target passes never rest.
    """
    found = passes(objective, denoiser, images)
    return images * forward_flops(denoiser) * sum(cost * share for (_, cost), share in found.items())


def _moments(images: int, count: int) -> list[Progress]:
    """``count`` evenly spaced moments of a run."""
    return [Progress(images * (2 * i + 1) // (2 * count), images) for i in range(count)]


class _Stratified(StepRandom):
    """Random numbers whose uniform ones fall into one of as many equal cells as rows each."""

    def uniform(self, stream: str) -> Tensor:
        rank = super().uniform(f"{stream}/cell").argsort().argsort()
        return (rank + super().uniform(stream)) / len(rank)


class _Counter(nn.Module):
    """A network of one weight that counts the rows of its passes by what they cost."""

    def __init__(self, name: str, counts: Counter[tuple[str, int]], objective: Objective | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.name, self.counts = name, counts
        self.two_time = objective is not None and objective.two_time
        self.guided = objective is not None and objective.guidance_range is not None

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Tensor | None = None,
        landing: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        dual = forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        trained = torch.is_grad_enabled() and self.weight.requires_grad
        through = torch.is_grad_enabled() and x.requires_grad
        self.counts[self.name, (3 if trained else 2 if through else 1) * (2 if dual else 1)] += len(x)
        return self.weight * x + c_noise.reshape(-1, *[1] * (x.ndim - 1))


def _stub(name: str, counts: Counter[tuple[str, int]], like: Denoiser, objective: Objective | None = None) -> Denoiser:
    """A denoiser like ``like``, told what ``objective`` tells, around a counter; images are small: only rows count."""
    shape = like.sample_shape
    return Denoiser(
        _Counter(name, counts, objective),
        EDM(),
        Parametrization("edm", sigma_data=like.sigma_data),
        sample_shape=(shape[0], *(min(side, _SIDE) for side in shape[1:])),
        num_classes=like.num_classes,
        parts=like.conditioning.parts,
        sigma_min=like.sigma_min,
        sigma_max=like.sigma_max,
    )


def _batch(student: Denoiser, random: StepRandom) -> Batch:
    x = student.sigma_data * random.normal("data", torch.empty(_ROWS, *student.sample_shape))
    label = torch.arange(_ROWS) % max(student.num_classes, 1)
    return Batch(x, student.condition(label, _ROWS) if student.num_classes else None)
