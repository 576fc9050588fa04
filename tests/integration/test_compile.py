"""ECT under torch.compile without graph breaks: the same loss and gradient, with the shared dropout mask.

Which rows have r = 0 is decided on the host (shapes depend on it), so the graph begins after that: the two passes,
the dropout tape and the penalty are one graph. A network that was compiled itself works in the whole objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import Denoiser
from fewstep.backbones.two_time import with_landing
from fewstep.data import open_source
from fewstep.errors import ConfigError
from fewstep.objectives import CMT, CT, ECT, TRACT, Diffusion, MeanFlow, Multistep, Objective
from fewstep.objectives.base import AS_IT_IS
from fewstep.objectives.multistep import Gaps
from fewstep.objectives.pairs import make_pair, rows_where, target_pass
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape, Streams
from fewstep.times import Stages, draw, pair
from fewstep.training import execution
from fewstep.training.config import OutputConfig, RunConfig, SpeedConfig, StudentConfig
from fewstep.training.trainer import Trainer
from fewstep.world import World

ROWS = 8
OBJECTIVE = ECT(penalty=Penalty("pseudo_huber", "dt", c=0.03))
TIMES = torch.linspace(0.05, 3, ROWS, dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tape(first: int) -> DropoutTape:
    return DropoutTape(Streams(0), torch.arange(first, first + ROWS))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, ROWS, 1, 8, 8, generator=generator)
    return x, eps


def gradient(loss: Tensor, student: Denoiser) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(student.parameters())))


@pytest.mark.parametrize(("ratio", "noisy"), [(1.0, 0), (2.0, 3), (8.0, ROWS)])
def test_the_two_passes_are_one_graph(tiny: Denoiser, ratio: float, noisy: int) -> None:
    student = tiny.clone().train()
    r, gap = pair(OBJECTIVE.mapping, TIMES, ratio)
    assert len(r.nonzero()) == noisy
    compiled = torch.compile(OBJECTIVE.loss_between, fullgraph=True, backend="eager")
    for step in range(2):  # other data and other masks in the second step: neither is baked into the graph
        x, eps = batch(step)
        want = OBJECTIVE.loss_at(student, x, TIMES, eps, ratio, None, tape(step * ROWS))
        got = compiled(student, make_pair(x, eps, TIMES, r, gap), tape(step * ROWS))
        assert torch.equal(got, want)
        for a, b in zip(gradient(got, student), gradient(want, student), strict=True):
            assert torch.equal(a, b)
        undropped = OBJECTIVE.loss_at(student.eval(), x, TIMES, eps, ratio, None, None)
        assert (want - undropped).abs().max() > 1e-4
        student.train()


@pytest.mark.parametrize("ratio", [1.0, 2.0, 8.0])
def test_a_compiled_network_in_the_whole_objective(tiny: Denoiser, ratio: float) -> None:
    student, compiled = tiny.clone().train(), tiny.clone().train()
    compiled.backbone.compile(fullgraph=True, backend="eager")
    for step in range(2):
        x, eps = batch(step)
        want = OBJECTIVE.loss_at(student, x, TIMES, eps, ratio, None, tape(step * ROWS))
        got = OBJECTIVE.loss_at(compiled, x, TIMES, eps, ratio, None, tape(step * ROWS))
        assert torch.equal(got, want)


# ---------------------------------------------------------------------------------------- through the trainer
@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compilation as it is but for the code generator; returns the names of what was compiled."""
    names: list[str] = []
    real = execution.compiled

    def compiled(function: Any, **options: Any) -> Any:
        names.append(function.__name__)
        return real(function, backend="aot_eager", **options)

    monkeypatch.setattr(execution, "compiled", compiled)
    return names


def run_config(objective: Objective, compile: str, **changes: Any) -> RunConfig:
    output = OutputConfig(log_images=64, sample_images=0)
    base = RunConfig(images=128, batch_size=16, objective=objective, output=output, student=StudentConfig(dropout=0.2))
    return replace(base, speed=SpeedConfig(compile=compile), **changes)  # type: ignore[arg-type]


def trained(student: Denoiser, config: RunConfig, steps: int = 8) -> Trainer:
    made = Trainer(config, student.clone(), open_source("digits"), World(0, 1, torch.device("cpu")), student)
    for count, _ in enumerate(made.steps(), 1):
        if count == steps:
            break
    return made


def distance(one: Trainer, other: Trainer) -> float:
    pairs = zip(one.student.parameters(), other.student.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


STAGES = Stages(q=2.0, images=32, last=3)
OBJECTIVES: dict[str, tuple[Objective, list[str]]] = {
    "ect": (ECT(schedule=STAGES, penalty=Penalty("pseudo_huber", "dt", c=0.03)), ["loss_between"]),
    "ct": (CT(), ["gap_loss"]),
    "diffusion": (Diffusion(), ["loss_between"]),
    "cmt": (CMT(nodes=4), ["heun_step", "euler_step", "loss_between"]),
    "multistep": (Multistep(segments=(2, 4), pairing=Gaps(schedule=STAGES)), ["loss_between"]),
    "tract": (TRACT(), ["loss_between"]),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_training_compiled_is_training(tiny: Denoiser, quick: list[str], kind: str) -> None:
    """Eight steps through the trainer: padded rows, every count of them, masks, optimiser and averages."""
    objective, parts = OBJECTIVES[kind]
    student = with_landing(tiny) if objective.two_time else tiny
    torch._dynamo.utils.counters.clear()
    plain, made = (trained(student, run_config(objective, way)) for way in ("off", "on"))
    assert quick == parts
    assert not torch._dynamo.utils.counters["graph_break"]
    assert distance(made, plain) < 2e-5
    assert distance(made, trained(student, run_config(objective, "off"), 1)) > 5e-5
    assert made.read_sums()["loss"] == pytest.approx(plain.read_sums()["loss"], rel=1e-4)


def test_the_shapes_are_few(tiny: Denoiser, quick: list[str]) -> None:
    """However many rows have r > 0, the target pass has five sizes, so there are at most five graphs."""
    stages = Stages(q=2.0, images=512, last=1)
    objective = ECT(schedule=stages, penalty=Penalty("pseudo_huber", "dt", c=0.03))
    torch._dynamo.utils.counters.clear()
    trained(tiny, run_config(objective, "on", images=1024), 64)
    counts = {len(pair(objective.mapping, t, q)[0].nonzero()) for q in (2.0, 4.0) for t in times(32)}
    assert len(counts) > 8
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5


def times(batches: int) -> list[Tensor]:
    streams = Streams(0)
    return [draw(ECT().law, streams.uniform("times", torch.arange(16 * k, 16 * k + 16))) for k in range(batches)]


def test_padded_rows() -> None:
    rows = execution.Compiled().rows
    assert [rows(count, 16) for count in (0, 1, 4, 5, 12, 13, 16)] == [0, 4, 4, 8, 12, 16, 16]
    assert [rows(count, 5) for count in range(6)] == [0, 2, 2, 4, 4, 5]
    mask = torch.tensor([False, True, False, False, True, False, False, False])
    chosen = rows_where(mask, torch.zeros(8), execution.Compiled())
    assert chosen.tolist() == [1, 4]
    assert rows_where(mask | (torch.arange(8) == 7), torch.zeros(8), execution.Compiled()).tolist() == [1, 4, 7, 0]


def test_what_fills_up_the_target_pass_is_not_used() -> None:
    """Also of a network whose output at r = 0 is not its input."""
    x, r = torch.randn(6, 2), torch.tensor([0.5, 0, 1, 0, 0, 2.0])
    rows = rows_where(r > 0, x, execution.Compiled())
    assert rows.tolist() == [0, 2, 5, 1]

    def seven(x: Tensor, *rest: Any) -> Tensor:
        return torch.full_like(x, 7)

    for some in (rows, torch.arange(6)):
        out = target_pass(seven, x, r, some, None, None)  # type: ignore[arg-type]
        assert torch.equal(out, torch.where(r[:, None] > 0, 7, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_is_generated(tiny: Denoiser) -> None:
    """Once with inductor, in float64: the same step to rounding."""
    objective = OBJECTIVES["ect"][0]
    student = tiny.clone().double()
    plain, made = (trained(student, run_config(objective, way, images=16), 1) for way in ("off", "on"))
    assert (
        torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"]
        + torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    )
    assert distance(made, plain) < 1e-9


def test_what_cannot_be_compiled_is_refused(tiny: Denoiser) -> None:
    with pytest.raises(ConfigError, match="'meanflow' cannot be compiled"):
        execution.execution(run_config(MeanFlow(), "on"), MeanFlow(), torch.device("cpu"))
    assert execution.execution(run_config(MeanFlow(), "auto"), MeanFlow(), torch.device("cuda")) is AS_IT_IS
    long = run_config(ECT(), "auto", images=10**6)
    assert execution.execution(long, ECT(), torch.device("cpu")) is AS_IT_IS
    assert isinstance(execution.execution(long, ECT(), torch.device("cuda")), execution.Compiled)
    assert execution.execution(replace(long, images=1000), ECT(), torch.device("cuda")) is AS_IT_IS
    graphs = replace(long, speed=SpeedConfig(graphs=True))
    with pytest.raises(ConfigError, match="CUDA device"):
        execution.execution(graphs, ECT(), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"speed\.compile=on"):
        execution.execution(replace(graphs, images=1000), ECT(), torch.device("cuda"))
