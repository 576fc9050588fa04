"""Invariants of every objective (math.md 8: G1 to G8) and of ECT (8.2: E1 to E7)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import Gaussian, as_denoiser, quadrature
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.backbones.small import MLP
from fewstep.backbones.two_time import with_landing
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.objectives import ECT, OBJECTIVES, Beside, Diffusion, Objective, StepRandom
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.randomness import DropoutTape, Streams
from fewstep.sampling import karras_grid
from fewstep.times import Constant, Lognormal, Mapping, Sigmoid, Stages, pair
from fewstep.types import Batch, Progress

SIZE = 6
START = Progress(images_seen=0, total_images=1000)
TOLERANCE: dict[str, float] = {}
"""Of the split losses, where differences of networks magnify rounding."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A small network with dropout that counts the rows it sees; ``shift`` is added to c_noise."""

    def __init__(self, dropout: float = 0.0, shift: float = 0.0) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIZE + 2, 32), nn.Linear(32, SIZE)
        self.dropout, self.shift = nn.Dropout(dropout), shift
        self.rows: list[int] = []
        self.told: list[Tensor] = []
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = 0.4 * normal(*parameter.shape, seed=50 + seed)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        self.told.append(c_noise.detach())
        angle = (c_noise + self.shift)[:, None]
        hidden = self.one(torch.cat((x, angle.cos(), angle.sin()), 1)).tanh()
        return self.two(self.dropout(hidden))


def student(dropout: float = 0.0, sigma_data: float = 0.5, shift: float = 0.0) -> Denoiser:
    parametrization = Parametrization("edm", sigma_data=sigma_data)
    return Denoiser(Net(dropout, shift), EDM(), parametrization, sample_shape=(SIZE,)).train()


def company(objective: Objective, classes: int = 0) -> tuple[Denoiser, Beside]:
    """A student that the objective can train, and networks beside it."""
    denoiser = student(0.2)
    if classes or objective.two_time:
        mlp = MLP((SIZE,), 32, 2, num_classes=classes).double()
        denoiser = Denoiser(mlp, EDM(), Parametrization(), sample_shape=(SIZE,), num_classes=classes).train()
    denoiser = with_landing(denoiser) if objective.two_time else denoiser
    twins = {word: denoiser.clone().requires_grad_(False) for word in ("teacher", *objective.companions())}
    return denoiser, Beside(twins.pop("teacher").eval(), twins, objective.extra(denoiser))


def setting(batch: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, t (r = 0 for the first two at q^a = 2), eps."""
    t = torch.tensor([0.2, 1.1, 2.5, 6.0, 40.0], dtype=torch.float64)[:batch]
    return normal(batch, SIZE, seed=1), t, normal(batch, SIZE, seed=2)


def step_random(batch: int, seed: int = 0, first: int = 0) -> StepRandom:
    return StepRandom(Streams(seed), torch.arange(first, first + batch), torch.device("cpu"))


def gradient(denoiser: Denoiser, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, list(denoiser.parameters()))
    return torch.cat([g.flatten() for g in grads])


def tape(batch: int, seed: int = 0) -> DropoutTape:
    return DropoutTape(Streams(seed), torch.arange(batch))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------- G2 to G6
@pytest.mark.parametrize("ratio", [2.0, 16.0])
@pytest.mark.parametrize("penalty", [Penalty(), Penalty("pseudo_huber", "snrpk", 0.06), Penalty("squared_l2", "dt")])
def test_gradient_flows_through_the_student_only(ratio: float, penalty: Penalty) -> None:
    """G3: the gradient equals the one with the target passed in as a constant tensor."""
    denoiser, (x_0, t, eps), objective = student(), setting(), ECT(penalty=penalty)
    got = objective.loss_at(denoiser, x_0, t, eps, ratio)
    r, gap = pair(Sigmoid(), t, ratio)
    raw = denoiser(x_0 + r[:, None] * eps, r)
    target = torch.where(r[:, None] > 0, raw, x_0)
    out = denoiser(x_0 + t[:, None] * eps, t)
    constant = penalty(out - target.detach(), t, gap)
    close(got, constant)
    close(gradient(denoiser, got.mean()), gradient(denoiser, constant.mean()))


def test_a_leaking_target_would_change_the_gradient() -> None:
    """The other half of G3: the comparison above can tell the two apart."""
    denoiser, (x_0, t, eps) = student(), setting()
    r, gap = pair(Sigmoid(), t, 16.0)
    target = denoiser(x_0 + r[:, None] * eps, r)
    leaking = Penalty()(denoiser(x_0 + t[:, None] * eps, t) - target, t, gap).mean()
    stopped = ECT().loss_at(denoiser, x_0, t, eps, 16.0).mean()
    assert float((gradient(denoiser, leaking) - gradient(denoiser, stopped)).norm()) > 1e-3


def gaps(denoiser: Denoiser, shared: bool) -> list[float]:
    """|delta| at three gaps, each a tenth of the last, at fixed noise (and fixed masks)."""
    x_0, t, eps = setting()
    objective, out = ECT(mapping=Constant(), penalty=Penalty("l2", "one")), []
    for ratio in (1e2, 2e2, 4e2):
        if shared:
            loss = objective.loss_at(denoiser, x_0, t, eps, ratio, None, tape(5))
        else:
            torch.manual_seed(0)
            loss = objective.loss_at(denoiser, x_0, t, eps, ratio)
        out.append(float(loss.mean().detach()))
    return out


def test_halving_the_gap_halves_delta_only_with_shared_dropout() -> None:
    """G4: |delta| = O(t - r) with the shared mask, O(1) with independent masks."""
    coarse, middle, fine = gaps(student(0.3), shared=True)
    assert 1.9 < coarse / middle < 2.1 and 1.9 < middle / fine < 2.1
    loose = gaps(student(0.3), shared=False)
    assert 0.8 < loose[0] / loose[2] < 1.25
    assert loose[2] > 20 * fine


def test_masks_are_shared_on_the_rows_that_enter_the_network() -> None:
    """With r = 0 rows left out, the others still get the masks of their own rows."""
    denoiser, (x_0, t, eps) = student(0.3), setting()
    order = torch.tensor([2, 0, 3, 1, 4])  # rows with r = 0 first and in between
    together = ECT().loss_at(denoiser, x_0, t, eps, 2.0, None, tape(5))
    indexed = DropoutTape(Streams(0), torch.arange(5)[order])
    mixed = ECT().loss_at(denoiser, x_0[order], t[order], eps[order], 2.0, None, indexed)
    close(mixed, together[order])
    alone = DropoutTape(Streams(0), torch.tensor([3]))
    close(ECT().loss_at(denoiser, x_0[3:4], t[3:4], eps[3:4], 2.0, None, alone), together[3:4])


def test_the_global_generator_is_neither_used_nor_changed() -> None:
    denoiser, batch = student(0.3), Batch(normal(5, SIZE))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = ECT().loss(denoiser, batch, START, step_random(5)).per_sample
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(ECT().loss(denoiser, batch, START, step_random(5)).per_sample, first)
    assert not torch.equal(ECT().loss(denoiser, batch, START, step_random(5, seed=1)).per_sample, first)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_do_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    """G6: permuted, split and padded batches give the same loss per sample."""
    objective, x = OBJECTIVES[name](), normal(8, SIZE)
    denoiser, beside = company(objective)

    def loss(x: Tensor, random: StepRandom) -> Tensor:
        return objective.loss(denoiser, Batch(x), START, random, beside).per_sample

    whole = loss(x, step_random(8))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    close(loss(x[order], StepRandom(Streams(0), order, torch.device("cpu"))), whole[order], TOLERANCE.get(name, 1e-12))
    parts = [loss(x[i : i + 3], step_random(len(x[i : i + 3]), first=i)) for i in (0, 3, 6)]
    close(torch.cat(parts), whole, TOLERANCE.get(name, 1e-12))


@pytest.mark.parametrize(("weight", "power"), [("dt", 0), ("snrpk", -1)])
def test_scale_equivariance(weight: str, power: int) -> None:
    """G5: (x, sigma_d, t, c) -> s (...) leaves 1/(t-r) pseudo-Huber alone, 1/c_out^2 scales as 1/s (1.6)."""
    x_0, t, eps = setting()
    s = 3.0
    small = ECT(mapping=Sigmoid(8, 1.0), penalty=Penalty("pseudo_huber", weight, 0.06))  # type: ignore[arg-type]
    large = ECT(mapping=Sigmoid(8, 1.0 / s), penalty=Penalty("pseudo_huber", weight, 0.06 * s))  # type: ignore[arg-type]
    want = small.loss_at(student(), x_0, t, eps, 8.0)
    scaled = student(sigma_data=0.5 * s, shift=-math.log(s) / 4)  # the network is told ln(t/sigma_d)/4
    close(large.loss_at(scaled, s * x_0, s * t, eps, 8.0), want * s**power, 1e-11)


def test_perfect_denoiser_at_ratio_one_costs_its_mmse() -> None:
    """G8: E|D - x_0|^2 = lam t^2/(lam + t^2), exactly, by quadrature; nothing costs less."""
    lam, law = 0.25, Gaussian.white(0.25)
    x_0, eps, weights = quadrature(lam)
    objective = ECT(penalty=Penalty("squared_l2", "one"))
    for t in (0.1, 1.0, 30.0):
        times = torch.full((len(x_0),), t, dtype=torch.float64)
        cost = float(weights @ objective.loss_at(as_denoiser(law.denoise), x_0, times, eps, 1.0).detach())
        assert cost == pytest.approx(lam * t**2 / (lam + t**2), rel=1e-9)
        worse = as_denoiser(lambda x, now: 1.01 * law.denoise(x, now))
        assert float(weights @ objective.loss_at(worse, x_0, times, eps, 1.0).detach()) > cost


# ------------------------------------------------------------------------------------ r = 0 rows
def test_rows_with_r_zero_never_enter_the_network() -> None:
    """Stage 0 of q = 2: rows with t <= 1.9459 take x_0; the target pass sees the other three only."""
    denoiser, (x_0, t, eps) = student(), setting()
    net = denoiser.backbone
    loss = ECT(penalty=Penalty("l2", "one")).loss_at(denoiser, x_0, t, eps, 2.0)
    assert net.rows == [5, 3]
    r, _ = pair(Sigmoid(), t, 2.0)
    close(net.told[1], r[2:].log() / 4)
    clean = denoiser(x_0 + t[:, None] * eps, t) - x_0
    close(loss[:2], clean.norm(dim=1)[:2])
    net.rows.clear()
    ECT().loss_at(denoiser, x_0, t, eps, 1.0)
    assert net.rows == [5]  # nothing to evaluate at all
    net.rows.clear()
    ECT().loss_at(denoiser, x_0, t, eps, 8.0)
    assert net.rows == [5, 5]


def test_times_below_the_teachers_least_noise_count_as_clean() -> None:
    denoiser, (x_0, t, eps) = student(), setting()
    denoiser.sigma_min = 1.0  # r = t (1 - n/8) = 0.14 and 0.70 on the first two rows
    ECT().loss_at(denoiser, x_0, t, eps, 8.0)
    assert denoiser.backbone.rows == [5, 3]


def test_the_student_pass_comes_first_and_the_target_has_no_graph() -> None:
    denoiser, (x_0, t, eps) = student(), setting()
    seen: list[bool] = []
    denoiser.backbone.register_forward_hook(lambda *a: seen.append(torch.is_grad_enabled()))
    ECT().loss_at(denoiser, x_0, t, eps, 16.0)
    assert seen == [True, False]
    close(denoiser.backbone.told[0], t.log() / 4)


# ------------------------------------------------------------------------------------- E1 to E7
def test_e1_ratio_one_is_denoising() -> None:
    denoiser, (x_0, t, eps) = student(), setting()
    loss = ECT(penalty=Penalty("l2", "dt")).loss_at(denoiser, x_0, t, eps, 1.0)
    close(loss, (denoiser(x_0 + t[:, None] * eps, t) - x_0).norm(dim=1) / t)


@dataclass(frozen=True)
class Neighbours:
    """The mapping whose r is the next lower node of a grid, written as n(t) = ratio (1 - r/t)."""

    nodes: tuple[float, ...]
    ratio: float
    kind: str = "neighbours"

    def n(self, t: Tensor) -> Tensor:
        grid = torch.tensor(self.nodes, dtype=torch.float64)
        where = (t[:, None] - grid).abs().argmin(1)
        return self.ratio * (1 - grid[where + 1] / grid[where])


def test_e2_adjacent_karras_nodes_are_ict() -> None:
    """iCT's value and gradient: w = 1/(t - r), pseudo-Huber with c = 0.00054 sqrt(d)."""
    nodes = karras_grid(11)[:-1]
    denoiser, (x_0, _, eps) = student(), setting()
    picks = torch.tensor([0, 2, 5, 7, 8])
    t, r = (
        torch.tensor(nodes, dtype=torch.float64)[picks],
        torch.tensor(nodes, dtype=torch.float64)[picks + 1],
    )
    c = 0.00054 * math.sqrt(SIZE)
    objective = ECT(mapping=Neighbours(tuple(nodes), 4.0), penalty=Penalty("pseudo_huber", "dt", c))  # type: ignore[arg-type]
    got = objective.loss_at(denoiser, x_0, t, eps, 4.0)
    delta = denoiser(x_0 + t[:, None] * eps, t) - denoiser(x_0 + r[:, None] * eps, r).detach()
    ict = (((delta**2).sum(1) + c**2).sqrt() - c) / (t - r)
    close(got, ict, 1e-10)
    close(gradient(denoiser, got.mean()), gradient(denoiser, ict.mean()), 1e-9)


def test_e3_squared_metric_at_r_zero_is_edms_loss() -> None:
    """1/c_out^2 |D - x_0|^2 summed over pixels: ECT at q^a = 1 and Diffusion alike."""
    denoiser, (x_0, t, eps) = student(), setting()
    want = (t**2 + 0.25) / (0.5 * t) ** 2 * (denoiser(x_0 + t[:, None] * eps, t) - x_0).square().sum(1)
    close(ECT(penalty=Penalty("squared_l2", "snrpk")).loss_at(denoiser, x_0, t, eps, 1.0), want)
    close(Diffusion().loss_at(denoiser, x_0, t, eps), want)


def test_e4_pseudo_huber_is_adaptively_weighted_l2() -> None:
    """Eq. 2.7: the gradients of rho_c and of 1/2 sg(w) |delta|^2, w = (|delta|^2 + c^2)^(-1/2)."""
    delta, one, c = normal(4, 12).requires_grad_(), torch.ones(4, dtype=torch.float64), 0.06
    (got,) = torch.autograd.grad(Penalty("pseudo_huber", "one", c)(delta, one, one).sum(), delta)
    square = delta.square().sum(1)
    (want,) = torch.autograd.grad((0.5 * (square.detach() + c**2).rsqrt() * square).sum(), delta)
    close(got, want)


def test_e5_thresholds_decide_what_the_loss_compares_with() -> None:
    """r = 0 iff t <= ln(k/(q^a - 1) - 1)/b: 1.9459 at q^a = 2, 0.5108 at 4 (math.md 2.5)."""
    for ratio, threshold in ((2.0, 1.9459), (4.0, 0.5108)):
        denoiser = student()
        t = torch.tensor([threshold - 1e-3, threshold + 1e-3], dtype=torch.float64)
        ECT().loss_at(denoiser, normal(2, SIZE), t, normal(2, SIZE, seed=3), ratio)
        assert denoiser.backbone.rows == [2, 1]


def test_e7_sigmoid_with_k_zero_is_the_constant_mapping() -> None:
    denoiser, (x_0, t, eps) = student(), setting()

    def loss(mapping: Mapping) -> Tensor:
        return ECT(mapping=mapping).loss_at(denoiser, x_0, t, eps, 4.0)

    assert torch.equal(loss(Sigmoid(k=0.0)), loss(Constant()))
    assert not torch.equal(loss(Sigmoid()), loss(Constant()))


# ------------------------------------------------------------------------------ numerics, devices
@pytest.mark.parametrize("distance", ["l2", "pseudo_huber", "squared_l2"])
@pytest.mark.parametrize("c", [0.0, 1e-8, 0.06])
def test_a_zero_gap_between_outputs_has_zero_gradient(distance: str, c: float) -> None:
    """A network that already agrees with itself: loss 0 and gradient 0, not NaN (math.md 2.3)."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    constant = as_denoiser(lambda x, t: scale * torch.ones_like(x), SIZE)
    x_0, t, eps = setting()
    loss = ECT(penalty=Penalty(distance, "dt", c)).loss_at(constant, x_0, t, eps, 16.0)  # type: ignore[arg-type]
    assert torch.equal(loss, torch.zeros(5, dtype=torch.float64))
    loss.sum().backward()
    assert float(scale.grad) == 0.0


class Reads(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in self.WAITING or name.startswith("_unique"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("classes", [0, 3])
def test_no_scalar_is_read_in_a_step(name: str, classes: int) -> None:
    """Loss and backward never ask a tensor for a value: on a GPU they would wait for it."""
    objective = OBJECTIVES[name]()
    denoiser, beside = company(objective, classes)
    cond = torch.eye(3, dtype=torch.float64)[torch.arange(16) % 3] if classes else None
    batch, random = Batch(normal(16, SIZE), cond), step_random(16)
    with Reads() as reads:
        objective.loss(denoiser, batch, START, random, beside).per_sample.mean().backward()
    assert not reads.seen
    with Reads() as reads:
        bool(batch.x.sum() > 0)
    assert reads.seen["_local_scalar_dense"] + reads.seen["is_nonzero"] == 1  # the counter counts


def test_the_step_draws_what_its_parts_say() -> None:
    """ECT.loss is loss_at with t from the law, noise and masks of the rows' own streams."""
    denoiser, x = student(0.2), normal(5, SIZE)
    objective = ECT(law=Lognormal(-0.8, 1.6), schedule=Stages(q=4, images=100, last=3))
    progress = Progress(images_seen=250, total_images=1000)
    got = objective.loss(denoiser, Batch(x), progress, step_random(5, seed=7, first=20)).per_sample
    streams, index = Streams(7), torch.arange(20, 25)
    u = streams.uniform("times", index)
    t = (-0.8 + 1.6 * torch.special.ndtri(u)).exp()
    eps = streams.normal("noise", index, (SIZE,), torch.float64)
    close(got, objective.loss_at(denoiser, x, t, eps, 64.0, None, DropoutTape(streams, index)))
    assert objective.describe(progress) == {"stage": 2.0, "r/t": pytest.approx(1 - 1 / 64)}


def test_half_precision_inputs_keep_float32_times_and_losses() -> None:
    """In bfloat16 t - r would be 0 at q^a = 1024: times stay float32, and so does the penalty."""
    denoiser = Denoiser(student().backbone.bfloat16(), EDM(), Parametrization(), sample_shape=(SIZE,))
    x_0, t, eps = (v.bfloat16() if v.ndim > 1 else v for v in setting())
    loss = ECT(mapping=Constant()).loss_at(denoiser, x_0, t, eps, 1024.0)
    assert loss.dtype == torch.float32
    level, r, gap = t.float(), (t - t / 1024).float(), (t / 1024).float()
    out = denoiser(x_0 + level[:, None].bfloat16() * eps, level)
    target = denoiser(x_0 + r[:, None].bfloat16() * eps, r)
    want = (out - target).float().norm(dim=1) / gap
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
