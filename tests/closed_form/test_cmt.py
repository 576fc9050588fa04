"""Consistency mid-training: the solver's order against the exact flow, shared trajectories, who gets gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import Gaussian, Mixture, as_denoiser
from torch import Tensor, nn

from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.objectives import CMT, Beside, StepRandom
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.sampling import heun_sample
from fewstep.types import Batch, Progress

LAM, SIZE = 0.25, 4
LAW = Gaussian.white(LAM, SIZE)
TEACHER = Beside(teacher=as_denoiser(LAW.denoise, SIZE))
START, CPU = Progress(0, 1000), torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(first: int, count: int) -> StepRandom:
    return StepRandom(Streams(3), torch.arange(first, first + count), CPU)


class Net(nn.Module):
    """A small network with dropout and labels; records the rows of each pass and whether gradients are on."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(SIZE + 1 + classes, 16), nn.Linear(16, SIZE), nn.Dropout(0.3)
        self.passes: list[tuple[int, bool, bool]] = []
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * normal(*parameter.shape, seed=40 + seed)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.passes.append((len(x), torch.is_grad_enabled(), self.training))
        parts = [x, c_noise[:, None]] if cond is None else [x, c_noise[:, None], cond]
        return self.two(self.drop(self.one(torch.cat(parts, 1)).tanh()))


def network(classes: int = 0) -> Denoiser:
    return Denoiser(Net(classes), EDM(), Parametrization("edm"), sample_shape=(SIZE,), num_classes=classes)


def cost(solver: str, nodes: int) -> float:
    """RMS distance between the exact flow map at all nodes of eight trajectories and the solver's end points."""
    objective = CMT(nodes, solver, low=1e-4, penalty=Penalty("squared_l2", "one"))  # type: ignore[arg-type]
    student, z = as_denoiser(LAW.endpoint, SIZE), normal(8, SIZE)
    member, place = torch.arange(8).repeat_interleave(nodes), torch.arange(nodes).repeat(8)
    return float(objective.loss_at(student, z, member, place, beside=TEACHER).detach().mean().sqrt())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_exact_flow_map_pays_the_solvers_error_alone(solver: str, order: int) -> None:
    """On the Gaussian the loss of the exact f falls with the nodes as the solver's order says, towards 0."""
    costs = [cost(solver, nodes) for nodes in (16, 32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(costs)]
    assert all(abs(slope - order) < 0.2 for slope in slopes[1:]), (costs, slopes)
    assert costs[-1] < (0.05 if order == 1 else 0.003)


def split(trajectory: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and end."""
    return trajectory[:-1], trajectory[-1]


def test_trajectories_end_where_the_teachers_sampler_ends() -> None:
    """Heun's last point is EDM's 18-step sample of a bimodal law from the same noise; the nodes begin at T z."""
    teacher, z = as_denoiser(Mixture().denoise), normal(5, 1)
    objective = CMT(18)
    levels = objective.levels(teacher)
    states, end = split(objective.trajectories(teacher, z, levels))
    assert states.shape == (18, 5, 1) and len(levels) == 19
    assert torch.equal(states[0], 80 * z) and levels[0] == 80 and levels[-2] == pytest.approx(0.002) and levels[-1] == 0
    for t, x in zip(levels[:-1], states, strict=True):  # the nodes follow the flow
        torch.testing.assert_close(Mixture().endpoint(x, t), end.detach(), rtol=0, atol=0.15)
    sampled = heun_sample(lambda x, t, cond=None: teacher(x, t), z, levels)
    torch.testing.assert_close(end, sampled, rtol=1e-9, atol=1e-9)


def test_each_row_is_its_node_of_its_groups_trajectory() -> None:
    """Rows 6 to 13 of the run with 4 nodes: groups 1, 2, 3 by index // 4, the noise of images 4, 8, 12."""
    objective = CMT(4, penalty=Penalty("squared_l2", "snrpk"))
    student = as_denoiser(lambda x, t: 0.9 * LAW.denoise(x, t), SIZE)
    got = objective.loss(student, Batch(normal(8, SIZE)), START, rows(6, 8), TEACHER).per_sample
    levels, want = objective.levels(student), []
    for index in range(6, 14):
        z = Streams(3).normal("noise", torch.tensor([index // 4 * 4]), (SIZE,), torch.float64)
        states, end = split(objective.trajectories(TEACHER.teacher, z, levels))
        t = levels[index % 4]
        delta = 0.9 * LAW.denoise(states[index % 4], t) - end
        want.append((1 / t**2 + 4) * delta.square().sum())
    torch.testing.assert_close(got, torch.stack(want).reshape(-1))


def test_a_row_depends_on_its_index_alone_without_labels() -> None:
    """G6: permuted and split anywhere, the same losses; images play no part."""
    student, objective = network().train(), CMT(4)
    whole = objective.loss(student, Batch(normal(12, SIZE)), START, rows(0, 12), TEACHER).per_sample
    parts = [
        objective.loss(student, Batch(normal(b, SIZE, seed=7)), START, rows(a, b), TEACHER).per_sample
        for a, b in ((0, 3), (3, 5), (8, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = objective.loss(student, Batch(normal(12, SIZE)), START, StepRandom(Streams(3), order, CPU), TEACHER)
    torch.testing.assert_close(mixed.per_sample, whole[order])
    assert (whole[:, None] - whole).abs().add(torch.eye(12)).min() > 1e-4  # no two rows are the same


def test_labels_are_the_first_rows_and_whole_groups_split_well() -> None:
    student, teacher, objective = network(3).train(), network(3).eval(), CMT(4)
    beside = Beside(teacher=teacher)
    labels = torch.eye(3, dtype=torch.float64)[torch.arange(8) % 3]
    whole = objective.loss(student, Batch(normal(8, SIZE), labels), START, rows(0, 8), beside).per_sample
    held = labels[[0, 0, 0, 0, 4, 4, 4, 4]]
    torch.testing.assert_close(
        objective.loss(student, Batch(normal(8, SIZE), held), START, rows(0, 8), beside).per_sample, whole
    )
    halves = [
        objective.loss(student, Batch(normal(4, SIZE), labels[a : a + 4]), START, rows(a, 4), beside).per_sample
        for a in (0, 4)
    ]
    torch.testing.assert_close(torch.cat(halves), whole)
    other = held.roll(1, dims=1)
    moved = objective.loss(student, Batch(normal(8, SIZE), other), START, rows(0, 8), beside).per_sample
    assert ((moved - whole).abs() > 1e-3 * whole).all()


@pytest.mark.parametrize(("solver", "evaluations"), [("heun", 7), ("euler", 4)])
def test_gradients_and_cost(solver: str, evaluations: int) -> None:
    """One student pass; 2 nodes - 1 (Heun) teacher passes of b/nodes rows, in eval mode and without gradient; the
    gradient is that of the loss with the end points as constants."""
    student, teacher, objective = network().train(), network().eval(), CMT(4, solver)  # type: ignore[arg-type]
    loss = objective.loss(student, Batch(normal(8, SIZE)), START, rows(0, 8), Beside(teacher=teacher)).per_sample
    assert student.backbone.passes == [(8, True, True)]
    assert teacher.backbone.passes == evaluations * [(2, False, False)]
    got = torch.autograd.grad(loss.mean(), list(student.parameters()))
    z = rows(0, 8).groups(4).random.normal("noise", normal(8, SIZE))
    levels = objective.levels(student)
    states, end = split(objective.trajectories(teacher, z, levels))
    member, place = torch.arange(8) // 4, torch.arange(8) % 4
    with rows(0, 8).tape().record():
        out = student(states[place, member], torch.tensor(levels, dtype=torch.float64)[place])
    want = torch.autograd.grad((out - end[member]).norm(dim=1).mean(), list(student.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in teacher.parameters())


def test_regression_finds_the_flow_map() -> None:
    """f = a_i x at node i: least squares on trajectories gives a_i = sqrt(lam/(lam + t_i^2)) to the solver's error."""
    objective, teacher = CMT(32, low=0.01), as_denoiser(LAW.denoise, SIZE)
    levels = objective.levels(teacher)
    states, end = split(objective.trajectories(teacher, normal(64, SIZE), levels))
    fitted = (states * end).sum((1, 2)) / states.square().sum((1, 2))
    exact = (LAM / (LAM + torch.tensor(levels[:-1], dtype=torch.float64) ** 2)).sqrt()
    torch.testing.assert_close(fitted, exact, rtol=0.02, atol=0)
    denoiser = LAM / (LAM + levels[8] ** 2)
    assert abs(float(fitted[8]) - denoiser) > 10 * abs(float(fitted[8] - exact[8]))


@pytest.mark.parametrize("segments", [(8,), (1, 2, 4, 8), (2, 16)])
def test_rows_land_on_their_segments_lower_edge(segments: tuple[int, ...]) -> None:
    """With the exact flow map as student and nodes close enough, the loss vanishes for every count; the student is
    told the edge, and each count's edges are the ones that the jump sampler uses."""
    objective = CMT(16, segments=segments, penalty=Penalty("squared_l2", "one"))
    teacher, z = as_denoiser(LAW.denoise, SIZE), normal(4, SIZE)
    grid = objective.levels(teacher)
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    place, member = torch.arange(64) % 16, torch.arange(64) // 16
    landing = objective.landing_nodes(place, u)
    how, edges = objective.sampler(teacher)
    assert how == "jump" and sorted(edges) == sorted(segments)
    for k, node in enumerate(landing.tolist()):
        count = segments[int(u[k] * len(segments))]
        lower = [*edges[count][1:], 0.0]
        below = [level for level in lower if level < grid[int(place[k])] * (1 - 1e-12)]
        assert grid[node] == pytest.approx(max(below))
    states = objective.trajectories(teacher, z, grid)
    told: list[Tensor] = []

    class Exact(torch.nn.Module):
        two_time = True

        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None, c_landing: Tensor) -> Tensor:
            told.append(c_landing)
            return torch.zeros_like(x)

    student = Denoiser(Exact(), EDM(), Parametrization("x0"), sample_shape=(SIZE,))
    if not objective.two_time:
        student = as_denoiser(lambda x, t: torch.zeros_like(x), SIZE)
    loss = objective.loss_at(student, z, member, place, beside=Beside(teacher=teacher), landing=landing)
    t, s = (torch.tensor(grid, dtype=torch.float64)[node][:, None] for node in (place, landing))
    goal = (t * states[landing, member] - s * states[place, member]) / (t - s)
    torch.testing.assert_close(loss, goal.square().sum(1), rtol=1e-9, atol=1e-12)
    assert len(told) == objective.two_time
    if told:
        want = student.parametrization.c_landing(t[:, 0], s[:, 0])
        torch.testing.assert_close(told[0], torch.stack(want, 1) if isinstance(want, tuple) else want)
    exact = LAW.flow(states[place, member], t, s)
    assert (states[landing, member] - exact).square().mean().sqrt() < 0.2


def test_bad_input_and_configuration() -> None:
    with pytest.raises(ConfigError, match="at least 2 nodes"):
        CMT(1)
    with pytest.raises(ConfigError, match="must contain the edges"):
        CMT(16, segments=(1, 3))
    with pytest.raises(ConfigError, match="must have some noise"):
        CMT(low=0.0)
    with pytest.raises(ConfigError, match="above the highest"):
        CMT(low=90.0).prepare(network())
    with pytest.raises(ConfigError, match="follows a teacher"):
        CMT().loss(network(), Batch(normal(4, SIZE)), START, rows(0, 4))
    made = CMT(8, "euler", 0.01, Penalty("pseudo_huber", "snrpk", 0.03))
    assert from_dict(CMT, to_dict(made)) == made and made.needs_teacher and not made.two_time
