"""What an objective costs: every network pass of its loss, counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewstep import EDM, OBJECTIVES, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.backbones.two_time import with_landing
from fewstep.evaluation.compute import Passes, forward_flops, passes, target_share, training_flops
from fewstep.objectives import CTM, ECD, ECT, SCM, TCM, TRACT, Diffusion, MeanFlow
from fewstep.objectives.anchor import Anchor
from fewstep.objectives.bridges import TeacherStep
from fewstep.objectives.levers import Levers
from fewstep.times import Lognormal, Stages

IMAGES = 12_800


def model(classes: int = 0) -> Denoiser:
    return Denoiser(
        nn.Linear(1, 1), EDM(), Parametrization("edm"), sample_shape=(3, 32, 32), num_classes=classes
    )  # fmt: skip


def cost(found: Passes) -> float:
    return sum(units * share for (_, units), share in found.items())


def at(q: float) -> Stages:
    return Stages(q=q, images=10**9, last=0)


def test_diffusion_and_ect() -> None:
    assert passes(Diffusion(), model(), IMAGES) == {("student", 3): 1.0}
    ect = ECT(law=Lognormal(-1.1, 2.0), schedule=at(2.0))
    assert passes(ect, model(), IMAGES) == {("student", 3): 1.0, ("student", 1): target_share(ect, IMAGES)}


@pytest.mark.parametrize("q", [2.0, 4.0, 256.0])
def test_distillation_adds_the_teachers_passes(q: float) -> None:
    """One pass with gradient, two of Heun on every row, and the target where r > 0, as in ECT."""
    law = Lognormal(-1.1, 2.0)
    share = target_share(ECT(law=law, schedule=at(q)), IMAGES)
    found = passes(ECD(law=law, schedule=at(q)), model(), IMAGES)
    assert found == {("student", 3): 1.0, ("student", 1): pytest.approx(share, abs=0.01), ("teacher", 1): 2.0}
    euler = ECD(law=law, schedule=at(q), bridge=TeacherStep("euler"))
    assert passes(euler, model(), IMAGES)["teacher", 1] == 1.0
    guided = replace(euler, bridge=TeacherStep("euler", guidance=2.0))
    assert passes(guided, model(classes=3), IMAGES)["teacher", 1] == 2.0


def test_an_anchor_looks_at_low_rows_only() -> None:
    """P(t < 1) is 1/2 for the median 1."""
    ect = ECT(law=Lognormal(0.0, 1.0), schedule=at(256.0), levers=Levers(anchor=Anchor(below=1.0)))
    found = passes(ect, model(), IMAGES)
    assert found == {
        ("student", 3): 1.0,
        ("student", 1): pytest.approx(1.0),
        ("teacher", 1): pytest.approx(0.5, abs=0.01),
    }


def test_networks_beside_the_student_are_told_apart() -> None:
    """TRACT's second phase asks its phase teacher instead of the diffusion model; TCM's has a frozen model below t'."""
    tract = passes(TRACT(time_schedule=(8, 4, 2)), model(), IMAGES)
    assert tract["student", 3] == 1.0
    assert (tract["teacher", 1], tract["phase_teacher", 1]) == (1.0, 0.5)
    assert tract["self", 1] == pytest.approx(0.5, abs=0.02), "of two teacher steps the second lands on the edge"
    first = TCM(first_share=1.0, schedule=at(256.0))
    assert set(passes(first, model(), IMAGES)) == {("student", 3), ("student", 1)}
    second = passes(replace(first, first_share=0.0), model(), IMAGES)
    assert second["frozen", 1] + second["student", 1] == pytest.approx(1.0)
    assert second["frozen", 1] > 0.2, "the boundary rows at least"


def test_passes_to_the_input_and_derivatives_cost_more() -> None:
    ctm = passes(replace(CTM(), weight=0.0), model(), IMAGES)
    assert ctm["student", 3] == 1.0
    assert 0 < ctm["target", 2] < 1, "where s > 0 gradients pass through the target"
    assert passes(CTM(), model(), IMAGES)["student", 3] == 2.0, "the denoising term"
    jvp, finite = (passes(replace(SCM(), derivative=how), model(), IMAGES) for how in ("jvp", "finite"))
    assert jvp == {("student", 3): 1.0, ("student", 2): 1.0}
    assert finite == {("student", 3): 1.0, ("student", 1): 2.0}
    flow = passes(replace(MeanFlow(), equal=0.25), model(), IMAGES)
    assert flow["student", 2] == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_can_be_counted(kind: str) -> None:
    """At least the student's own pass, with gradient; nothing else is trained; the teacher only where it is needed."""
    objective = OBJECTIVES[kind]()
    found = passes(objective, model(), IMAGES)
    assert found["student", 3] >= 1
    assert {name for name, units in found if units == 3} == {"student"}
    assert any(name == "teacher" for name, _ in found) == objective.needs_teacher
    assert {name for name, _ in found} <= {"student", "teacher", *objective.companions()}


def test_two_time_networks_are_counted_with_their_embedding() -> None:
    spec = {"name": "mlp", "kwargs": {"sample_shape": [2], "width": 16, "depth": 2}}
    with torch.device("meta"):
        plain = Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(2,), spec=spec)
    width = plain.backbone.landing_width
    student = with_landing(plain)
    student.backbone.to("meta")
    assert forward_flops(student) - forward_flops(plain) == 2 * (64 * width + width * width)
    found = cost(passes(CTM(), student, IMAGES))
    assert training_flops(student, CTM(), IMAGES) == pytest.approx(IMAGES * forward_flops(student) * found)
