"""Teacher agreement on Gaussian oracles, where the teacher's end points are known exactly."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from oracles import Gaussian, Plain, as_denoiser
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.agreement import teacher_agreement
from fewstep.process import EDM, RectifiedFlow
from fewstep.randomness import Streams
from fewstep.sampling import karras_grid, ode_sample

D = 24
WHITE = Gaussian.white(0.25, D)
TEACHER = as_denoiser(WHITE.denoise, D)
PERFECT = as_denoiser(WHITE.endpoint, D)


def agreement(student: Denoiser, teacher: Denoiser = TEACHER, **settings: Any) -> dict[str, Any]:
    return teacher_agreement(student, teacher, **({"samples": 40, "steps": (1,)} | settings))


def gained(gain: float) -> Denoiser:
    return as_denoiser(lambda x, t: gain * WHITE.endpoint(x, t), D)


def gain_of_heun(nodes: int, variance: float = 0.25) -> float:
    """The ratio of Heun's end point to the exact one on N(0, variance): its steps are linear, x <- factor · x."""
    grid = karras_grid(nodes)
    factor = 1.0
    for t, s in itertools.pairwise(grid[:-1]):
        slope = t / (variance + t * t)
        ahead = (1 + (s - t) * slope) * s / (variance + s * s)
        factor *= 1 + (s - t) * (slope + ahead) / 2
    factor *= variance / (variance + grid[-2] ** 2)
    return factor / math.sqrt(variance / (variance + grid[0] ** 2))


# --- The number -------------------------------------------------------------------------------------------


def test_the_exact_flow_map_differs_by_the_error_of_the_nodes_alone() -> None:
    """math.md 4.1: 72 nodes overshoot the spread by 0.29 %, 144 by .07 %; the relative √A is (gain - 1)/gain."""
    assert gain_of_heun(72) - 1 == pytest.approx(0.0029, abs=1e-4)
    for nodes in (72, 144):
        gain = gain_of_heun(nodes)
        row = agreement(PERFECT, nodes=nodes)["rows"][0]
        assert row["relative"] == pytest.approx((gain - 1) / gain, rel=1e-6)
        assert row["rms"] == pytest.approx((gain - 1) * 0.5, rel=0.1)  # of 40 · 24 draws with standard deviation 0.5


@pytest.mark.parametrize("gain", [0.8, 1.1])
def test_a_known_error_of_the_student_is_found(gain: float) -> None:
    row = agreement(gained(gain), nodes=144)["rows"][0]
    assert row["relative"] == pytest.approx(abs(gain - 1), rel=0.01)
    shifted = as_denoiser(lambda x, t: WHITE.endpoint(x, t) + 0.3, D)
    found = agreement(shifted, nodes=144)
    assert found["rows"][0]["rms"] == pytest.approx(0.3, rel=0.01)
    assert found["rows"][0]["relative"] == pytest.approx(found["rows"][0]["rms"] / found["teacher_rms"], rel=1e-12)


def test_the_teacher_against_its_own_solution_is_zero() -> None:
    """Same noise, same nodes."""
    solver = as_denoiser(lambda x, t: ode_end(x), D)
    assert agreement(solver)["rows"][0]["rms"] < 1e-12
    assert agreement(solver, seed=1)["rows"][0]["rms"] < 1e-12


def test_the_clock_of_either_model_does_not_matter() -> None:
    flow = RectifiedFlow()
    expected, found = (
        agreement(*pair, at=[1.0]) for pair in ((PERFECT, TEACHER), (PERFECT.under(flow), TEACHER.under(flow)))
    )
    for place in ("rows", "at"):
        assert found[place][0]["rms"] == pytest.approx(expected[place][0]["rms"], rel=1e-6)


def ode_end(x: Tensor) -> Tensor:
    return x * gain_of_heun(72) * math.sqrt(0.25 / (0.25 + 80**2))


def test_end_points_are_those_of_the_teachers_own_sampler() -> None:
    """rms(Φ) is that of ode_sample with the same seed; another seed gives another."""
    for seed in (0, 5):
        end = ode_sample(TEACHER, 40, steps=72, seed=seed)
        assert agreement(PERFECT, seed=seed)["teacher_rms"] == pytest.approx(
            float(end.square().mean().sqrt()), rel=1e-12
        )


def test_fresh_noise_keeps_two_steps_apart() -> None:
    """x' = Φ + t z': f(x', t) = a (Φ + t z') with a = √(λ/(λ + t²)), so A = λ (1 - a)² + a² t²."""
    rows = agreement(PERFECT, steps=(2, 1), samples=2000, nodes=144)["rows"]
    assert [row["steps"] for row in rows] == [2, 1] and rows[0]["times"][0] == 80.0
    t = rows[0]["times"][1]
    a = math.sqrt(0.25 / (0.25 + t * t))
    assert rows[0]["rms"] == pytest.approx(math.sqrt(0.25 * (1 - a) ** 2 + (a * t) ** 2), rel=0.02)
    assert rows[0]["rms"] > 0.3 and rows[1]["rms"] < 0.002


def test_from_points_of_the_teachers_path() -> None:
    """x_t lies on the same path: a student of gain g errs by g - 1 from every level; an exact one by the nodes."""
    levels = [0.3, 5.0, 40.0]
    found = agreement(PERFECT, at=levels, nodes=144)
    assert [row["sigma"] for row in found["at"]] == [40.0, 5.0, 0.3]
    assert found["teacher_nfe"] == 2 * (144 + 3) - 1
    errors = [row["relative"] for row in found["at"]]
    assert all(error < 0.0008 for error in errors) and errors[2] < errors[0]
    wrong = agreement(gained(0.9), at=levels, nodes=144)
    assert [row["relative"] for row in wrong["at"]] == pytest.approx([0.1] * 3, rel=0.01)
    assert wrong["rows"][0]["relative"] == pytest.approx(0.1, rel=0.01)
    off = as_denoiser(lambda x, t: WHITE.endpoint(x, t) + 0.01 * t[:, None], D)  # an error that depends on the level
    assert [row["rms"] for row in agreement(off, at=levels, nodes=144)["at"]] == pytest.approx(
        [0.4, 0.05, 0.003], rel=0.01
    )


def test_a_level_on_a_node_costs_nothing() -> None:
    node = karras_grid(72)[30]
    with_node, without = agreement(PERFECT, at=[node]), agreement(PERFECT)
    assert with_node["teacher_nfe"] == without["teacher_nfe"] == 143
    assert with_node["rows"][0]["rms"] == pytest.approx(without["rows"][0]["rms"], rel=1e-9)


# --- Intervals, batches, labels ---------------------------------------------------------------------------


def test_intervals_hold_the_truth_and_shrink_with_the_root_of_the_count() -> None:
    """Errors of independent samples: the spread of √A is √(Var e/n)/(2√A), e a scaled χ² of D degrees."""
    row = agreement(gained(0.5), samples=400, replicates=400, nodes=72)["rows"][0]
    low, high = row["rms_interval"]
    assert low < row["rms"] < high and (low + high) / 2 == pytest.approx(row["rms"])
    assert (high - low) / 2 == pytest.approx(1.96 * row["rms"] * math.sqrt(2 / D / 400) / 2, rel=0.2)
    low, high = row["relative_interval"]
    assert high - low < 1e-9  # the ratio is the same for every sample here
    assert agreement(gained(0.5), replicates=0)["rows"][0]["rms_interval"][0] == pytest.approx(0.25, rel=0.1)


def test_batches_do_not_matter_and_the_result_is_json() -> None:
    found = agreement(gained(0.9), steps=(1, 2), at=[1.0])
    assert json.loads(json.dumps(found)) == found
    for size in (1, 7, 64):
        again = agreement(gained(0.9), steps=(1, 2), at=[1.0], batch_size=size)
        for mine, theirs in zip(again["rows"] + again["at"], found["rows"] + found["at"], strict=True):
            assert mine["rms"] == pytest.approx(theirs["rms"], rel=1e-9)
    assert agreement(gained(0.9), samples=41)["rows"][0]["rms"] != found["rows"][0]["rms"]


class Labelled(nn.Module):
    """N(label, 0.25) per class, label 0 or 1: the denoiser, or its flow map."""

    def __init__(self, end: bool) -> None:
        super().__init__()
        self.end, self.idle = end, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        gain = 0.25 / (0.25 + t[:, None] ** 2)
        mean = cond[:, 1:]
        return mean + (gain.sqrt() if self.end else gain) * (x - mean) + 0 * self.idle


def labelled(end: bool) -> Denoiser:
    p = Parametrization("x0", time="native")
    return Denoiser(Labelled(end), EDM(), p, sample_shape=(D,), num_classes=2)


def test_labels_reach_student_and_teacher() -> None:
    cond = torch.arange(40) % 2
    found = agreement(labelled(True), labelled(False), cond=cond, at=[2.0], batch_size=7, nodes=144)
    assert found["rows"][0]["rms"] < 0.002 and found["at"][0]["rms"] < 0.002
    assert found["teacher_rms"] == pytest.approx(math.sqrt(0.25 + 0.5), rel=0.1)


def test_dropout_is_off_and_the_modes_are_restored() -> None:
    def noisy(function: Any) -> Denoiser:
        denoiser = as_denoiser(function, D)
        denoiser.backbone = nn.ModuleDict({"net": Plain(function), "drop": nn.Dropout(0.5)})
        denoiser.backbone.forward = lambda x, t, cond=None: denoiser.backbone["drop"](denoiser.backbone["net"](x, t))
        denoiser.train()
        denoiser.backbone["net"].eval()
        return denoiser

    student, teacher = noisy(WHITE.endpoint), noisy(WHITE.denoise)
    found = agreement(student, teacher, at=[1.0])
    assert found["rows"][0]["relative"] < 0.01 and found["at"][0]["relative"] < 0.01
    for model in (student, teacher):
        assert model.training and model.backbone["drop"].training and not model.backbone["net"].training


def test_latents_are_those_of_the_few_step_sampler() -> None:
    """A student that returns its input shows the noise itself: A = mean (T z - Φ)² with Φ in proportion to z."""
    z = Streams(3).normal("sample/latent", torch.arange(40), (D,), torch.float64)
    row = agreement(as_denoiser(lambda x, t: x / 80, D), seed=3)["rows"][0]
    end = ode_end(80 * z)
    assert row["rms"] == pytest.approx(float((z - end).square().mean().sqrt()), rel=1e-9)


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        (as_denoiser(WHITE.endpoint, D + 1), {}, r"differ in sample_shape.*student \(25,\), teacher \(24,\)"),
        (as_denoiser(WHITE.endpoint, D, sigma_max=40.0), {}, "differ in sigma_max"),
        (PERFECT, {"nodes": 18}, "Got: 18. Wanted: at least 72. On a Gaussian 18 nodes overshoot"),
        (PERFECT, {"at": [80.0]}, r"out of range.*in \(0, 80\)"),
        (PERFECT, {"at": [0.0]}, "out of range"),
        (PERFECT, {"samples": 0}, "at least 1"),
        (PERFECT, {"steps": (0,)}, "at least 1"),
        (PERFECT, {"cond": torch.zeros(3).long()}, "one label per sample"),
        (PERFECT, {"cond": torch.zeros(40).long()}, "unconditional"),
    ],
)
def test_what_cannot_be_compared_is_refused(student: Denoiser, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agreement(student, **settings)


def test_another_value_range_is_refused() -> None:
    student = as_denoiser(WHITE.endpoint, D)
    student.value_range = (0.0, 1.0)
    with pytest.raises(ConfigError, match=r"differ in value_range.*student \(0.0, 1.0\), teacher \(-1.0, 1.0\)"):
        agreement(student)


def test_samples_that_are_not_finite_and_too_few_are_refused() -> None:
    with pytest.raises(DataError, match="not finite. Got: 40 of 40"):
        agreement(gained(math.nan))
    with pytest.raises(DataError, match="at least 4"):
        agreement(PERFECT, samples=3)
