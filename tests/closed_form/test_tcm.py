"""Truncated consistency: the second stage against its formula, its anchor, and both stages in one run (math.md 3.7)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import as_denoiser
from torch import Tensor

from fewstep.backbones.small import MLP
from fewstep.config import from_dict, to_dict
from fewstep.data.sources import ArraySource
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ScheduleError
from fewstep.objectives import ECT, TCM, Beside, StepRandom
from fewstep.objectives.tcm import StudentT
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.sampling import check_times, few_step_times
from fewstep.times import Constant, Sigmoid, Stages, pair
from fewstep.training.config import RunConfig
from fewstep.training.state import restore_state, save_state
from fewstep.training.trainer import Trainer
from fewstep.types import Batch, Progress
from fewstep.world import World

SIZE, CPU = 6, torch.device("cpu")
LENGTH = Penalty("l2", "dt")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0) -> Denoiser:
    spec = {"name": "mlp", "kwargs": {"sample_shape": [SIZE], "width": 32, "depth": 2}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = MLP((SIZE,), 32, 2).double()
        for parameter in mlp.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return Denoiser(mlp, EDM(), Parametrization(), sample_shape=(SIZE,), spec=spec).train()


def setting() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0, t, eps and boundary rows; at ratio 8 and t' = 1, r is 0.61 (twice), 0.95, 2.0, 26."""
    t = torch.tensor([1.0, 1.0, 1.4, 2.5, 30.0], dtype=torch.float64)
    return normal(5, SIZE, seed=1), t, normal(5, SIZE, seed=2), torch.tensor([True, True, False, False, False])


def gradient(denoiser: Denoiser, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, [p for p in denoiser.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def step_random(batch: int, seed: int = 0, first: int = 0) -> StepRandom:
    return StepRandom(Streams(seed), torch.arange(first, first + batch), CPU)


# ----------------------------------------------------------------------------- the law of t
@pytest.mark.parametrize("nu", [0.01, 0.5, 3.0])
@pytest.mark.parametrize(("low", "high"), [(1.0, 80.0), (0.3, 14.6)])
def test_truncated_student_law(nu: float, low: float, high: float) -> None:
    """ln t = 0.1 + 0.2 T_nu on [low, high], against scipy's quantiles."""
    stats = pytest.importorskip("scipy.stats")
    u = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    ends = [stats.t.cdf((math.log(v) - 0.1) / 0.2, nu) for v in (low, high)]
    want = np.exp(0.1 + 0.2 * stats.t.ppf(ends[0] + u.numpy() * (ends[1] - ends[0]), nu))
    got = StudentT(0.1, 0.2, nu).draw(u, low, high)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)


def test_the_papers_law_is_heavy_on_both_ends() -> None:
    """nu = 0.01: nearly uniform in asinh(ln t/0.02), so the median is far from both ends in ln t."""
    u = torch.tensor([1e-9, 0.5, 1 - 1e-9], dtype=torch.float64)
    low, middle, high = StudentT().draw(u, 1.0, 80.0).tolist()
    assert (low, high) == pytest.approx((1.0, 80.0), rel=1e-6)
    assert middle == pytest.approx(math.exp(0.02 * math.sinh(0.5 * math.asinh(math.log(80) / 0.02))), rel=0.02)


def test_draws_of_the_second_stage() -> None:
    """A quarter of the rows at t' exactly, the others above; each row depends on its own index alone."""
    objective = TCM(transition=0.7)
    t, held = objective.draw(step_random(4000), 80.0)
    assert held.double().mean() == pytest.approx(0.25, abs=0.02)
    assert (t[held] == 0.7).all()
    assert (t[~held] > 0.7).all() and (t <= 80).all()
    again, held_again = objective.draw(step_random(7, first=100), 80.0)
    assert torch.equal(again, t[100:107]) and torch.equal(held_again, held[100:107])
    assert not TCM(boundary=0.0).draw(step_random(100), 80.0)[1].any()


# ----------------------------------------------------------------------------- the second stage
def written_out(student: Denoiser, frozen: Denoiser, ratio: float) -> Tensor:
    """w rho of every row, before the two kinds are weighed: the target is the frozen net's where r < t'."""
    x_0, t, eps, _ = setting()
    r, gap = pair(Sigmoid(), t, ratio)
    x_r = x_0 + r[:, None] * eps
    goals = [net(x_r, r.clamp_min(1e-3)).detach() for net in (frozen, student)]
    goal = torch.where((r >= 1.0)[:, None], goals[1], goals[0])
    goal = torch.where(r[:, None] > 0, goal, x_0)
    return (student(x_0 + t[:, None] * eps, t) - goal).norm(dim=1) / gap


@pytest.mark.parametrize("ratio", [2.0, 8.0, 64.0])
def test_second_stage_against_its_formula(ratio: float) -> None:
    """Ratio 2 has rows with r = 0; the gradient equals the one with the targets as constants."""
    student, frozen, (x_0, t, eps, held) = network(), network(1), setting()
    beside = Beside(companions={"frozen": frozen})
    objective = TCM(penalty=LENGTH, boundary=0.4, boundary_weight=0.1)
    got = objective.loss_at(student, x_0, t, eps, ratio, held, beside=beside)
    want = written_out(student, frozen, ratio)
    # 2 of 5 rows at the boundary = p_b: the batch mean is mean(ordinary) + lambda_b mean(boundary), exactly
    loss = want[~held].mean() + 0.1 * want[held].mean()
    close(got.mean(), loss)
    close(gradient(student, got.mean()), gradient(student, loss))
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize(("ratio", "student_rows", "frozen_rows"), [(8.0, 2, 3), (2.0, 1, 1)])
def test_only_rows_between_zero_and_t_prime_ask_the_frozen_model(
    ratio: float, student_rows: int, frozen_rows: int
) -> None:
    """At ratio 8: r = 0.61, 0.61, 0.95 below t' = 1, and 2.0, 26 above; at ratio 2: three times 0, then 0.49, 15."""
    student, frozen, (x_0, t, eps, held) = network(), network(1), setting()
    rows: dict[str, list[int]] = {"student": [], "frozen": []}
    for name, net in (("student", student), ("frozen", frozen)):
        net.backbone.register_forward_pre_hook(lambda _, args, name=name: rows[name].append(len(args[0])))
    TCM().loss_at(student, x_0, t, eps, ratio, held, beside=Beside(companions={"frozen": frozen}))
    assert rows == {"student": [5, student_rows], "frozen": [frozen_rows]}


def test_a_full_boundary_batch_compares_with_the_frozen_model() -> None:
    student, frozen, (x_0, _, eps, _) = network(), network(1), setting()
    t = torch.ones(5, dtype=torch.float64)
    got = TCM(penalty=LENGTH).loss_at(
        student, x_0, t, eps, 64.0, torch.ones(5, dtype=torch.bool), beside=Beside(companions={"frozen": frozen})
    )
    r = t * (1 - (1 + 8 / (1 + math.e)) / 64)
    delta = student(x_0 + eps, t) - frozen(x_0 + r[:, None] * eps, r).detach()
    close(got, 0.1 / 0.25 * delta.norm(dim=1) / (t - r), 1e-10)


def test_without_a_transition_it_is_ect() -> None:
    """t' -> 0 without boundary rows: value and gradient of ECT."""
    student, (x_0, _, eps, _) = network(), setting()
    t = torch.tensor([0.2, 1.1, 2.5, 6.0, 40.0], dtype=torch.float64)
    beside = Beside(companions={"frozen": network(1)})
    none = torch.zeros(5, dtype=torch.bool)
    for ratio in (2.0, 16.0):
        tcm = TCM(transition=1e-9, boundary=0.0, penalty=LENGTH).loss_at(
            student, x_0, t, eps, ratio, none, beside=beside
        )
        ect = ECT(penalty=LENGTH).loss_at(student, x_0, t, eps, ratio)
        close(tcm, ect)
        close(gradient(student, tcm.mean()), gradient(student, ect.mean()))


def test_only_the_anchor_speaks_against_a_constant() -> None:
    """A constant student is consistent with itself above t'; rows whose target is the frozen model are not pleased."""
    constant = as_denoiser(lambda x, t: torch.full_like(x, 0.3), SIZE)
    x_0, _, eps, _ = setting()
    beside = Beside(companions={"frozen": network(1)})
    t = torch.tensor([1.0, 1.0, 1.5, 9.0, 30.0], dtype=torch.float64)  # at ratio 64: r = 0.95 twice, 1.44, 8.9, 29.5
    held = torch.tensor([True, True, False, False, False])
    with_anchor, without = (
        TCM(boundary_weight=w).loss_at(constant, x_0, t, eps, 64.0, held, beside=beside).detach() for w in (0.1, 0.0)
    )
    assert torch.equal(without, torch.zeros(5, dtype=torch.float64))
    assert (with_anchor[:2] > 0.1).all() and torch.equal(with_anchor[2:], torch.zeros(3, dtype=torch.float64))


def test_times_below_the_transition_are_refused() -> None:
    student, (x_0, t, eps, held) = network(), setting()
    with pytest.raises(ScheduleError, match="below TCM's transition"):
        TCM(transition=1.2).loss_at(student, x_0, t, eps, 8.0, held, beside=Beside(companions={"frozen": network(1)}))


def test_rows_do_not_depend_on_the_rest_of_the_batch() -> None:
    student, x = network(), normal(9, SIZE)
    beside = Beside(companions={"frozen": network(1)})
    objective = TCM(first_share=0.0, schedule=Stages(q=8.0, last=0))
    whole = objective.loss(student, Batch(x), Progress(0, 100), step_random(9), beside).per_sample
    parts = [
        objective.loss(student, Batch(x[i : i + 2]), Progress(0, 100), step_random(len(x[i : i + 2]), first=i), beside)
        for i in range(0, 9, 2)
    ]
    close(torch.cat([p.per_sample for p in parts]), whole, 1e-9)


# ------------------------------------------------------------------------------- the two stages
def test_the_first_stage_is_ect() -> None:
    student, x = network(), normal(16, SIZE)
    beside = Beside(companions={"frozen": network(1)})
    tcm, ect = TCM(first_share=0.5), ECT(penalty=TCM().penalty)
    for seen, same in ((0, True), (499, True), (500, False)):
        progress = Progress(seen, 1000)
        got = tcm.loss(student, Batch(x), progress, step_random(16), beside).per_sample
        want = ect.loss(student, Batch(x), progress, step_random(16)).per_sample
        assert torch.equal(got, want) == same
        assert tcm.describe(progress) == ect.describe(progress) | {"truncated": float(not same)}


def test_the_frozen_model_stops_at_the_transition() -> None:
    """It copies the student after the last step of the first stage, and at no other time."""
    tcm = TCM(first_share=0.25)
    decays = [tcm.follow("frozen", Progress(seen, 800), 100)[1] for seen in range(100, 801, 100)]
    assert decays == [1.0, 0.0] + [1.0] * 6
    assert TCM(first_share=0.0).follow("frozen", Progress(100, 800), 100) == ("student", 1.0)


def trainer(images: int = 48) -> Trainer:
    """Six steps of eight images, three in each stage."""
    objective = TCM(first_share=0.5, schedule=Stages(q=8.0, last=0))
    source = ArraySource("points", normal(32, SIZE).float(), None)
    return Trainer(
        RunConfig(images=images, batch_size=8, objective=objective), network().float(), source, World(0, 1, CPU)
    )


def weights(net: Denoiser) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


def test_a_run_freezes_the_student_half_way_and_goes_on() -> None:
    run = trainer()
    history = [(weights(run.student), weights(run.beside.companions["frozen"])) for _ in run.steps()]
    for k, (student, frozen) in enumerate(history):
        assert torch.equal(frozen, weights(trainer().student) if k < 2 else history[2][0])
        assert k == 0 or not torch.equal(student, history[k - 1][0])


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_gives_the_same_bits_in_both_stages(stop: int, tmp_path: Path) -> None:
    whole = trainer()
    list(whole.steps())
    half = trainer()
    for _ in itertools.islice(half.steps(), stop):
        pass
    save_state(half, tmp_path)
    rest = trainer()
    restore_state(rest, tmp_path)
    assert sum(1 for _ in rest.steps()) == 6 - stop
    assert torch.equal(weights(rest.student), weights(whole.student))
    assert torch.equal(weights(rest.beside.companions["frozen"]), weights(whole.beside.companions["frozen"]))


# ------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(("transition", "top"), [(1.0, 80.0), (0.5, 14.6), (10.0, 14.6)])
def test_sampling_times_stay_where_the_student_was_trained(transition: float, top: float) -> None:
    student = network()
    student.sigma_max = top
    sampler, times = TCM(transition=transition).sampler(student)
    assert sampler == "consistency"
    student.sampler_times = times
    for steps in range(1, 9):
        levels = few_step_times(student, steps)
        assert len(levels) == steps and levels[0] == top
        assert check_times(levels, student) == levels
        assert levels[-1] >= transition


def test_the_papers_sampling_times() -> None:
    _, times = TCM().sampler(network())
    assert times[2] == pytest.approx((80.0, 1.0))
    assert times[4] == pytest.approx((80.0, 4.0, 2.0, 1.0))
    assert times[8][1:] == pytest.approx([8 ** (1 - k / 6) for k in range(7)])


# -------------------------------------------------------------------------------- configuration
def test_choices_survive_a_file() -> None:
    objective = TCM(first_share=0.2, transition=0.6, truncated_law=StudentT(0.3, 0.4, 2.0), mapping=Constant())
    assert from_dict(TCM, to_dict(objective)) == objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TCM(first_share=1.5), "share of the run"),
        (lambda: TCM(boundary=1.0), "share of the batch"),
        (lambda: TCM(transition=0.0), "transition time > 0"),
        (lambda: TCM(boundary_weight=-1.0), "boundary weight >= 0"),
        (lambda: StudentT(nu=0.0), "nu > 0"),
        (lambda: TCM(transition=80.0).prepare(network()), "second stage would train nothing"),
    ],
)
def test_unusable_choices_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()
