"""TRACT: the published target node by node, phases and their companions, exact students."""

from __future__ import annotations

import pytest
import torch
from jumping import SIZE, aim_of, close, double, frozen, gradient, normal, student, tape
from oracles import Gaussian, as_denoiser
from torch import Tensor

from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.jumps import ddim, euler_step, heun_step, inv_ddim
from fewstep.objectives import TRACT, Beside, StepRandom
from fewstep.penalty import Penalty
from fewstep.randomness import Streams
from fewstep.sampling import karras_grid, sample
from fewstep.types import Batch, Progress

LAW = Gaussian.random(SIZE)
TEACHER = as_denoiser(LAW.denoise, SIZE)
MEASURE = Penalty("l2", "one")


def column(values: Tensor) -> Tensor:
    return values[:, None]


def stepping(nodes: Tensor, every: int) -> Denoiser:
    """The exact student that lands on the next lower multiple of ``every`` nodes."""
    edges = nodes[::every]

    def g(x: Tensor, t: Tensor) -> Tensor:
        return aim_of(LAW, x, t, edges[torch.searchsorted(edges[1:-1].contiguous(), t.contiguous())])

    return as_denoiser(g, SIZE)


def beside(network: Denoiser, **others: Denoiser) -> Beside:
    return Beside(TEACHER, {"self": frozen(network), **others})


# -------------------------------------------------------------------------------------- the target
def test_the_published_target_node_by_node() -> None:
    """8 -> 2 steps on n = 8: every node of both segments, against the paper's update written out."""
    objective, network = TRACT((8, 2), penalty=MEASURE), student()
    nodes = torch.tensor(karras_grid(8)[::-1], dtype=torch.float64)
    u = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    clocks = objective.clocks(network, 0, u)
    self_teacher = student()
    with torch.no_grad():
        for parameter in self_teacher.parameters():
            parameter.mul_(0.7)
    x_0, eps = normal(8, SIZE, seed=1), normal(8, SIZE, seed=2)
    got = objective.loss_at(network, x_0, clocks, eps, 0, beside=Beside(TEACHER, {"self": self_teacher}))
    for i in range(8):
        row, e = slice(i, i + 1), 4 * (i // 4) + 4
        semi = e - (i + 1)
        t, s, tau = nodes[e - semi][None], nodes[max(e - semi - 1, 1)][None], nodes[e - 4][None]
        x_t = x_0[row] + column(t) * eps[row]
        if e - semi == 1:  # the terminal node
            y = TEACHER(x_t, t)
        else:
            x_s = heun_step(TEACHER, x_t, t, s)
            x_tau = x_s if semi + 1 == 4 else ddim(self_teacher(x_s, s), x_s, s, tau)
            y = (x_tau * t - x_t * tau) / (t - tau)
        close(got[row], (network(x_t, t) - y).norm(dim=1), 1e-9)
    assert self_teacher.backbone.rows[0] == 6  # the terminal node and semi + 1 = step stay out


def test_the_vp_variant_takes_ddim_steps() -> None:
    objective, network = TRACT((8, 2), solver="ddim", penalty=MEASURE), student()
    clocks = objective.clocks(network, 0, double(0.3, 0.9))  # nodes 3 and 8
    x_0, eps = normal(2, SIZE, seed=1), normal(2, SIZE, seed=2)
    company = beside(network)
    got = objective.loss_at(network, x_0, clocks, eps, 0, beside=company)
    x_t = x_0 + column(clocks.t) * eps
    x_s = euler_step(TEACHER, x_t, clocks.t, clocks.r)
    x_tau = ddim(network(x_s, clocks.r), x_s, clocks.r, clocks.s)
    y = inv_ddim(x_tau, x_t, clocks.t, clocks.s)
    close(got, (network(x_t, clocks.t) - y).norm(dim=1), 1e-9)


def test_the_loss_is_plain_in_the_networks_own_space() -> None:
    """|F - F_y|^2 with F_y = (y - c_skip x_t)/c_out: the published weight (t^2 + sd^2) c_out^2/(t sd)^2 is 1."""
    objective, network = TRACT((8, 1)), student()
    clocks = objective.clocks(network, 0, double(0.05, 0.4, 0.95))
    x_0, eps, t = normal(3, SIZE, seed=1), normal(3, SIZE, seed=2), clocks.t
    company = beside(network)
    got = objective.loss_at(network, x_0, clocks, eps, 0, beside=company)
    x_t = x_0 + column(t) * eps
    x_s = torch.where(column(clocks.r) > 0, heun_step(TEACHER, x_t, t, clocks.r), TEACHER(x_t, t))
    y = torch.where(column(clocks.r) > 0, network(x_s, clocks.r), x_s)  # one segment: y is where the self-teacher ends
    c_in, c_skip, c_out = (t**2 + 0.25) ** -0.5, 0.25 / (t**2 + 0.25), 0.5 * t * (t**2 + 0.25) ** -0.5
    raw = network.backbone(column(c_in) * x_t, t.log() / 4)
    want = (raw - (y - column(c_skip) * x_t) / column(c_out)).square().sum(1)
    close(got, want, 1e-9)
    close((t**2 + 0.25) * c_out**2 / (0.5 * t) ** 2, torch.ones(3, dtype=torch.float64))


def test_gradient_flows_through_the_student_only() -> None:
    objective, network = TRACT((8, 2)), student()
    clocks = objective.clocks(network, 0, double(0.1, 0.3, 0.6, 0.9))
    x_0, eps = normal(4, SIZE, seed=1), normal(4, SIZE, seed=2)
    got = objective.loss_at(network, x_0, clocks, eps, 0, beside=Beside(TEACHER, {"self": network}))
    assert network.backbone.learns == [True, False]
    x_t = x_0 + column(clocks.t) * eps
    y = network(x_t, clocks.t).detach()
    apart = objective.loss_at(network, x_0, clocks, eps, 0, beside=beside(network))
    close(gradient(network, got), gradient(network, apart))
    assert not torch.allclose(gradient(network, got), gradient(network, (network(x_t, clocks.t) - y).square().sum(1)))


def test_masks_are_shared_with_the_companions() -> None:
    """Both companions of a later phase see the student's masks: identical networks disagree by the gap alone."""
    objective, network = TRACT((8, 4, 1), penalty=MEASURE), student(dropout=0.4)
    clocks = objective.clocks(network, 1, double(0.1, 0.3, 0.6, 0.9))
    x_0, eps = normal(4, SIZE, seed=1), normal(4, SIZE, seed=2)
    company = beside(network, phase_teacher=frozen(network))
    assert (clocks.r == clocks.s).tolist() == [True, False, False, False]
    shared = objective.loss_at(network, x_0, clocks, eps, 1, None, tape(4), company)
    assert float(shared[0].detach()) == 0.0  # student and phase teacher at the same x_t, t and mask
    torch.manual_seed(0)
    assert float(objective.loss_at(network, x_0, clocks, eps, 1, None, None, company)[0].detach()) > 1e-2


# ------------------------------------------------------------------------------------------- phases
def test_phases_and_companions() -> None:
    """Three phases of 400 images in steps of 40: values of follow, and what they make of a moving weight."""
    objective = TRACT((32, 16, 4, 1))
    assert objective.companions() == ("self", "average", "phase_teacher")
    at = lambda seen: objective.phase(Progress(seen, 1200))  # noqa: E731
    assert [at(s) for s in (0, 399, 400, 799, 800, 1199, 1200)] == [0, 0, 1, 1, 2, 2, 2]
    average, teacher, copies = 0.0, 0.0, []
    for step in range(1, 31):
        progress = Progress(40 * step, 1200)
        assert objective.follow("self", progress, 40) == ("student", 0.5)
        followed, beta = objective.follow("average", progress, 40)
        assert followed == "student"
        average = beta * average + (1 - beta) * step
        assert beta**10 == pytest.approx(1e-3)  # a phase has 10 steps
        followed, beta = objective.follow("phase_teacher", progress, 40)
        assert followed == "average" and beta in (0.0, 1.0)
        if beta == 0:
            copies.append(step)
            teacher = average
    assert copies == [10, 20]
    beta = 1e-3**0.1
    assert teacher == pytest.approx(sum((1 - beta) * beta ** (20 - k) * k for k in range(1, 21)))
    assert objective.describe(Progress(400, 1200)) == {"phase": 1.0, "steps": 4.0}


def test_one_phase_needs_no_average() -> None:
    assert TRACT((40, 1)).companions() == ("self",)


def test_a_step_that_spans_the_change_copies_once() -> None:
    objective = TRACT((8, 4, 1))
    betas = [objective.follow("phase_teacher", Progress(seen, 100), 30)[1] for seen in (30, 60, 90)]
    assert betas == [1.0, 0.0, 1.0]


def test_a_later_phase_follows_the_last_phases_student() -> None:
    """Exact phase teacher (8 steps) and exact self (2 steps): loss 0; the diffusion teacher plays no part."""
    objective = TRACT((64, 8, 2), penalty=MEASURE)
    nodes = objective.nodes(TEACHER)
    last, now = stepping(nodes, 8), stepping(nodes, 32)
    clocks = objective.clocks(TEACHER, 1, (torch.arange(8, dtype=torch.float64) + 0.5) / 8)
    x_0, eps = normal(8, SIZE, seed=1), normal(8, SIZE, seed=2)
    company = Beside(None, {"self": now, "phase_teacher": last})
    loss = objective.loss_at(now, x_0, clocks, eps, 1, beside=company)
    close(loss, torch.zeros_like(loss), 1e-9)
    other = Beside(None, {"self": now, "phase_teacher": TEACHER})
    wrong = objective.loss_at(now, x_0, clocks, eps, 1, beside=other)
    assert (wrong > 1e-4).all()


def test_the_first_phase_pays_heuns_error() -> None:
    """With the exact student, the mismatch is of third order in the gap: 8 times smaller on a grid twice as fine."""
    means = []
    for n in (64, 128, 256):
        objective = TRACT((n, 4), penalty=Penalty("l2", "one"))
        exact = stepping(objective.nodes(TEACHER), n // 4)
        u = torch.full((16,), 0.6, dtype=torch.float64)
        x_0, eps = normal(16, SIZE, seed=1), normal(16, SIZE, seed=2)
        clocks = objective.clocks(TEACHER, 0, u)
        company = Beside(TEACHER, {"self": exact})
        means.append(float(objective.loss_at(exact, x_0, clocks, eps, 0, beside=company).detach().mean()))
    assert means[2] > 1e-9 and 6 < means[0] / means[1] < 10 and 6 < means[1] / means[2] < 10


@pytest.mark.parametrize("schedule", [(64, 8, 1), (64, 8, 2), (32, 8)])
def test_sampling_with_the_exact_student_is_the_flow_map(schedule: tuple[int, ...]) -> None:
    objective, steps = TRACT(schedule), schedule[-1]
    exact = stepping(objective.nodes(TEACHER), schedule[0] // steps)
    exact.sampler, exact.sampler_times = objective.sampler(exact)
    assert exact.sampler == "jump" and list(exact.sampler_times) == [steps]
    latents = Streams(5).normal("sample/latent", torch.arange(6), (SIZE,), torch.float64)
    close(sample(exact, 6, steps=steps, seed=5), LAW.flow(80 * latents, 80.0, 0.0), 1e-9)


def test_a_step_draws_from_the_rows_streams_and_knows_its_phase() -> None:
    objective, network, x = TRACT((16, 4, 1)), student(dropout=0.2), normal(9, SIZE)
    index, now = torch.arange(20, 29), Progress(60, 100)
    random = StepRandom(Streams(7), index, torch.device("cpu"))
    company = beside(network, phase_teacher=frozen(student(dropout=0.2)))
    got = objective.loss(network, Batch(x), now, random, company).per_sample
    clocks = objective.clocks(network, 1, Streams(7).uniform("times", index))
    eps = Streams(7).normal("noise", index, (SIZE,), torch.float64)
    close(got, objective.loss_at(network, x, clocks, eps, 1, None, random.tape(), company))


# ------------------------------------------------------------------------------------ configuration
def test_configuration_round_trip_and_refusals() -> None:
    made = TRACT((36, 6, 1), "ddim", 0.9, 1e-2)
    assert from_dict(TRACT, to_dict(made)) == made
    assert made.needs_teacher and not made.two_time
    for schedule in ((8,), (), (8, 8), (8, 3), (1, 8), (8, 0)):
        with pytest.raises(ConfigError, match="time schedule"):
            TRACT(schedule)
    for bad in ({"self_ema": 1.0}, {"ema_residual": 0.0}):
        with pytest.raises(ConfigError, match="averages"):
            TRACT(**bad)  # type: ignore[arg-type]
