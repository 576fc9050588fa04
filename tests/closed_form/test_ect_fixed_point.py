"""What ECT converges to on a Gaussian (math.md 7.2), by the exact recursion over fewstep.times.pair."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from oracles import Gaussian, as_denoiser, quadrature
from torch import Tensor

from fewstep.objectives import ECT
from fewstep.penalty import Penalty
from fewstep.times import Constant, Mapping, Sigmoid, pair

LAM = 0.25
CONSTANT = {
    2: 0.84090,
    4: 0.93061,
    8: 0.96717,
    16: 0.98400,
    32: 0.99209,
    64: 0.99607,
    128: 0.99804,
    256: 0.99902,
}
SIGMOID = {
    2: 0.59695,
    4: 0.67801,
    8: 0.86154,
    16: 0.93654,
    32: 0.96946,
    64: 0.98500,
    128: 0.99257,
    256: 0.99630,
}
SIGMOID_8 = {2: 0.2773, 4: 0.6787, 8: 0.8616, 16: 0.9366, 32: 0.9695, 64: 0.9850}
HALVING = {2: 2.41, 4: 2.15, 8: 2.07, 16: 2.03, 32: 2.02, 64: 2.01, 128: 2.004}


@cache
def fixed_point(mapping: Mapping, ratio: float, t: float) -> float:
    """``a(t) = prod (lam + t_k t_{k+1})/(lam + t_k^2)`` along the chain t_{k+1} = r(t_k) (eq. 7.4)."""
    log_gain, now = 0.0, torch.tensor([t], dtype=torch.float64)
    while float(now) > 1e-6:
        r, gap = pair(mapping, now, ratio)
        # 1 - (t - r) t / (lam + t^2), with the gap as the library computes it
        log_gain += math.log1p(-float(gap * now / (LAM + now**2)))
        now = r
    return math.exp(log_gain)


def exact(t: float) -> float:
    return math.sqrt(LAM / (LAM + t**2))


def bias(mapping: Mapping, ratio: float, t: float = 80.0) -> float:
    return fixed_point(mapping, ratio, t) / exact(t)


@pytest.mark.parametrize(("ratio", "want"), CONSTANT.items())
def test_constant_mapping(ratio: int, want: float) -> None:
    assert bias(Constant(), ratio) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("ratio", "want"), SIGMOID.items())
def test_sigmoid_mapping(ratio: int, want: float) -> None:
    assert bias(Sigmoid(), ratio) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("ratio", "want"), SIGMOID_8.items())
def test_sigmoid_mapping_from_8(ratio: int, want: float) -> None:
    assert bias(Sigmoid(), ratio, 8.0) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("ratio", "want"), HALVING.items())
def test_halving_the_gap_halves_the_log_error(ratio: int, want: float) -> None:
    got = math.log(bias(Constant(), ratio)) / math.log(bias(Constant(), 2 * ratio))
    assert got == pytest.approx(want, abs=6e-3)
    if ratio >= 16:
        assert 1.9 < got < 2.2


def test_halving_the_gap_with_the_sigmoid_mapping() -> None:
    for ratio in (16, 32, 64, 128):
        assert 1.9 < math.log(bias(Sigmoid(), ratio)) / math.log(bias(Sigmoid(), 2 * ratio)) < 2.2


def test_first_order_formula() -> None:
    """Eq. 7.5 for a constant gap: ln(a/a*) = -(delta/4) T^2/(lam + T^2)."""
    want = -(1 / 256 / 4) * 6400 / (LAM + 6400)
    assert math.log(bias(Constant(), 256)) == pytest.approx(want, rel=4e-3)


def test_ratio_one_is_the_denoiser() -> None:
    for t in (0.1, 1.3, 80.0):
        assert fixed_point(Sigmoid(), 1.0, t) == pytest.approx(LAM / (LAM + t**2), rel=1e-12)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 16.0])
@pytest.mark.parametrize(
    "penalty",
    [Penalty("squared_l2", "dt"), Penalty("squared_l2", "snrpk"), Penalty("pseudo_huber", "dt", c=0.3)],
)
def test_the_objective_itself_is_stationary_there(penalty: Penalty, ratio: float) -> None:
    """The expected gradient of ECT.loss_at vanishes at the fixed point, whatever the metric and weight.

    The student is f(x, t) = (a(t) + shift(t)) x; the expectation over x_0 and eps is Gauss-Hermite.
    """
    mapping = Sigmoid()
    x_0, eps, weights = quadrature(LAM)
    for t in (0.3, 1.7, 6.0):
        r = float(pair(mapping, torch.tensor([t], dtype=torch.float64), ratio)[0])
        gains = {t: fixed_point(mapping, ratio, t), r: fixed_point(mapping, ratio, r) if r > 0 else 1.0}
        gradients = []
        for offset in (0.0, 0.02):
            shift = torch.tensor(offset, dtype=torch.float64, requires_grad=True)

            def f(
                x: Tensor, now: Tensor, t: float = t, shift: Tensor = shift, gains: dict[float, float] = gains
            ) -> Tensor:
                level = float(now[0])
                known = min(gains, key=lambda g: abs(g - level))
                return (gains[known] + (shift if abs(level - t) < 1e-12 else 0)) * x

            times = torch.full((len(x_0),), t, dtype=torch.float64)
            loss = ECT(mapping=mapping, penalty=penalty).loss_at(as_denoiser(f), x_0, times, eps, ratio)
            (weights @ loss).backward()
            gradients.append(float(shift.grad))
        # the pseudo-Huber distance is no polynomial: its quadrature is good to four digits
        exactness = 1e-6 if penalty.distance == "squared_l2" else 5e-3
        assert abs(gradients[0]) < exactness * abs(gradients[1]), (t, gradients)


def test_loss_floor_of_a_perfect_model() -> None:
    """math.md 7.2: at the optimum E|delta|^2 = d a(r)^2 lam (t-r)^2/(lam+t^2), not 0."""
    t, ratio = 1.3, 8.0
    x_0, eps, weights = quadrature(LAM)
    r, gap = (float(v) for v in pair(Constant(), torch.tensor([t], dtype=torch.float64), ratio))
    factor = (LAM + r * t) / (LAM + t**2)

    def f(x: Tensor, now: Tensor) -> Tensor:
        return exact(r) * (factor if float(now[0]) == t else 1.0) * x

    objective = ECT(mapping=Constant(), penalty=Penalty("squared_l2", "one"))
    times = torch.full((len(x_0),), t, dtype=torch.float64)
    loss = float(weights @ objective.loss_at(as_denoiser(f), x_0, times, eps, ratio).detach())
    assert loss == pytest.approx(exact(r) ** 2 * LAM * gap**2 / (LAM + t**2), rel=1e-10)


def test_weighted_loss_floor_does_not_vanish_as_r_approaches_t() -> None:
    """With the exact f: E|delta|/(t-r) -> sqrt(2/pi) a(t) sqrt(lam/(lam+t^2)) in one dimension."""
    t, law = 1.3, Gaussian.white(LAM)
    x_0, eps, weights = quadrature(LAM)
    times = torch.full((len(x_0),), t, dtype=torch.float64)
    objective = ECT(mapping=Constant(), penalty=Penalty("squared_l2", "one"))
    for ratio, tolerance in ((2.0**10, 3e-3), (2.0**14, 2e-4)):
        loss = float(weights @ objective.loss_at(as_denoiser(law.endpoint), x_0, times, eps, ratio).detach())
        floor = exact(t) * math.sqrt(LAM / (LAM + t**2))
        assert math.sqrt(loss) / (t / ratio) == pytest.approx(floor, rel=tolerance)


def test_propagation_from_a_denoiser_takes_log_t_over_delta_sweeps() -> None:
    """math.md 7.2: 10 and 109 sweeps of bootstrapping at delta = 1/2 and 1/16."""
    for ratio, want in ((2.0, 10), (16.0, 109)):
        target, log_gain, now = (
            fixed_point(Constant(), ratio, 80.0),
            0.0,
            torch.tensor([80.0], dtype=torch.float64),
        )
        sweeps, distance = 0, 1.0
        while distance >= 0.01:
            r, gap = pair(Constant(), now, ratio)
            log_gain += math.log1p(-float(gap * now / (LAM + now**2)))
            now, sweeps = r, sweeps + 1
            distance = abs(math.exp(log_gain) * LAM / (LAM + float(now) ** 2) / target - 1)
        assert sweeps == want
