"""Distances and weights per sample (math.md 2.3, 2.4)."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.penalty import Distance, Penalty, Weight, weigh

T = torch.tensor([0.1, 0.5, 2.0, 80.0], dtype=torch.float64)
GAP = T / 8


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "want"),
    [
        ("dt", [80, 16, 4, 0.1]),
        ("sqrt_dt", [math.sqrt(80), 4, 2, math.sqrt(0.1)]),
        ("snr", [100, 4, 0.25, 1 / 6400]),
        ("snr+1", [101, 5, 1.25, 1 + 1 / 6400]),
        ("truncated_snr", [100, 4, 1, 1]),
        ("snrpk", [104, 8, 4.25, 4 + 1 / 6400]),
        ("c_out", [math.sqrt(104), math.sqrt(8), math.sqrt(4.25), math.sqrt(4 + 1 / 6400)]),
        ("one", [1, 1, 1, 1]),
    ],
)
def test_weights(weight: Weight, want: list[float]) -> None:
    torch.testing.assert_close(weigh(weight, T, GAP, 0.5), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_every_weight_has_its_formula_here() -> None:
    assert set(get_args(Weight)) == {
        "dt",
        "sqrt_dt",
        "snr",
        "snr+1",
        "truncated_snr",
        "snrpk",
        "c_out",
        "one",
    }


def test_snrpk_is_one_over_c_out_squared() -> None:
    for sigma_data in (0.5, 1.3):
        c_out = T * sigma_data / (T**2 + sigma_data**2).sqrt()
        torch.testing.assert_close(weigh("snrpk", T, GAP, sigma_data), c_out**-2, rtol=1e-12, atol=0)
        torch.testing.assert_close(weigh("c_out", T, GAP, sigma_data), 1 / c_out, rtol=1e-12, atol=0)


def test_distances_sum_over_all_but_the_batch() -> None:
    delta = normal(4, 3, 2, 5)
    norm = delta.flatten(1).norm(dim=1)
    for distance, c, want in [
        ("squared_l2", 0.0, norm**2),
        ("l2", 0.0, norm),
        ("pseudo_huber", 0.0, norm),
        ("pseudo_huber", 0.7, (norm**2 + 0.49).sqrt() - 0.7),
    ]:
        penalty = Penalty(distance, "one", c)  # type: ignore[arg-type]
        torch.testing.assert_close(penalty(delta, T, GAP), want, rtol=1e-12, atol=0)
        torch.testing.assert_close(penalty.measure(delta), want, rtol=1e-12, atol=0)


def test_weight_times_distance() -> None:
    delta = normal(4, 7)
    got = Penalty("pseudo_huber", "snrpk", 0.06)(delta, T, GAP, 0.4)
    want = (T**-2 + 1 / 0.16) * ((delta.square().sum(1) + 0.0036).sqrt() - 0.06)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=0)


def test_limits_of_the_pseudo_huber_distance() -> None:
    delta = normal(4, 7)
    square = delta.square().sum(1)
    torch.testing.assert_close(Penalty("pseudo_huber", "one", 1e4).measure(delta), square / 2e4, rtol=1e-6, atol=0)
    torch.testing.assert_close(Penalty("pseudo_huber", "one", 1e-8).measure(delta), square.sqrt(), rtol=1e-7, atol=0)


def test_small_gaps_keep_their_digits_in_float32() -> None:
    """sqrt(s + c^2) - c would be 0 in float32 where |delta| = 1e-5 and c = 0.06."""
    delta = torch.full((1, 1), 1e-5)
    assert float(Penalty("pseudo_huber", "one", 0.06).measure(delta)) == pytest.approx(1e-10 / 0.12, rel=1e-5)
    assert float((delta.square().sum() + 0.06**2).sqrt() - 0.06) != pytest.approx(1e-10 / 0.12, rel=0.5)


@pytest.mark.parametrize("distance", get_args(Distance))
@pytest.mark.parametrize("c", [0.0, 1e-8, 0.06])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_zero_where_the_outputs_agree(distance: Distance, c: float, dtype: torch.dtype) -> None:
    delta = torch.zeros(2, 5, dtype=dtype)
    delta[1] = 0.1
    delta.requires_grad_()
    value = Penalty(distance, "one", c).measure(delta)
    value.sum().backward()
    assert float(value[0].detach()) == 0
    assert torch.equal(delta.grad[0], torch.zeros(5, dtype=dtype))
    assert (delta.grad[1] > 0).all()


def test_l2_has_a_gradient_of_norm_one() -> None:
    delta = normal(4, 7).requires_grad_()
    Penalty("l2", "one")(delta, T, GAP).sum().backward()
    torch.testing.assert_close(delta.grad.norm(dim=1), torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    delta = torch.full((1, 70_000), 1.0, dtype=dtype)  # its square sum overflows float16
    out = Penalty("squared_l2", "one").measure(delta)
    assert out.dtype == torch.float32 and float(out) == 70_000


def test_choices_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="constant is negative"):
        Penalty("pseudo_huber", "dt", -0.1)
    with pytest.raises(ConfigError, match="Did you mean 'pseudo_huber'"):
        Penalty("huber")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Did you mean 'snrpk'"):
        Penalty("l2", "snrk")  # type: ignore[arg-type]
