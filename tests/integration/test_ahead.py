"""Trajectories of some steps are computed at once: fewer, larger teacher passes, the same training, the same resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep import Denoiser
from fewstep.data import open_source
from fewstep.jumps import heun_step
from fewstep.objectives import CMT, ECT, Sequence, cmt
from fewstep.penalty import Penalty
from fewstep.training.config import OptimConfig, OutputConfig, RunConfig, StudentConfig
from fewstep.training.state import restore_state, save_state
from fewstep.training.trainer import Trainer
from fewstep.world import World

NODES, BATCH, STEPS = 4, 16, 11


def config(**changes: object) -> RunConfig:
    base = RunConfig(
        images=STEPS * BATCH,
        batch_size=BATCH,
        objective=CMT(nodes=NODES, penalty=Penalty("squared_l2", "one")),
        optim=OptimConfig(name="adam", lr=1e-3),
        output=OutputConfig(log_images=64, sample_images=0),
        student=StudentConfig(dropout=0.2),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def made(tiny: Denoiser, settings: RunConfig, world: World | None = None) -> Trainer:
    world = world or World(0, 1, torch.device("cpu"))
    return Trainer(settings, tiny.clone(), open_source("digits"), world, tiny)


def distance(one: Trainer, other: Trainer) -> float:
    pairs = zip(one.student.parameters(), other.student.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many trajectories each Heun step of the teacher moves."""
    seen: list[int] = []

    def counting(model, x_t, *rest):  # type: ignore[no-untyped-def]
        seen.append(len(x_t))
        return heun_step(model, x_t, *rest)

    monkeypatch.setattr(cmt, "heun_step", counting)
    return seen


def test_the_same_training_in_fewer_passes(tiny: Denoiser, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps have 16 trajectories: computed in three windows (44 in all), or step by step (4 in each of 11)."""
    monkeypatch.setattr(cmt, "MOST", (16, 16))
    together = made(tiny, config())
    assert len(list(together.steps())) == STEPS
    assert rows == [16] * 3 + [16] * 3 + [12] * 3  # three Heun steps a trajectory; the last window ends with the run
    rows.clear()
    monkeypatch.setattr(cmt, "MOST", (1, 1))
    alone = made(tiny, config())
    assert len(list(alone.steps())) == STEPS
    assert rows == [4] * 3 * STEPS
    assert distance(together, alone) < 1e-5 < 1e-3 < distance(together, made(tiny, config()))


@pytest.mark.parametrize("stop", [1, 4, 6, 10])
def test_a_resumed_run_computes_the_same_windows(
    tiny: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(cmt, "MOST", (16, 16))
    whole, first, second = (made(tiny, config()) for _ in range(3))
    assert len(list(whole.steps())) == STEPS
    for count, _ in enumerate(first.steps(), 1):
        if count == stop:
            break
    save_state(first, tmp_path)
    restore_state(second, tmp_path)
    assert len(list(second.steps())) == STEPS - stop
    assert distance(whole, second) == 0


def test_micro_batches_and_a_sequence(tiny: Denoiser, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches share a window; after the switch nothing is computed ahead; the batch may cut groups."""
    monkeypatch.setattr(cmt, "MOST", (16, 16))
    both = Sequence(first=config().objective, then=ECT(penalty=Penalty("pseudo_huber", "dt", c=0.03)), share=0.5)  # type: ignore[arg-type]
    parts, whole = made(tiny, config(objective=both, micro_batch=6)), made(tiny, config(objective=both))
    assert len(list(parts.steps())) == STEPS
    assert rows == [16] * 6
    assert len(list(whole.steps())) == STEPS
    assert distance(parts, whole) < 1e-5


def test_each_process_has_its_own_window(tiny: Denoiser) -> None:
    trainer = made(tiny, config(), World(0, 1, torch.device("cpu")))
    trainer.images_seen, trainer._horizon = 6 * BATCH, 32
    window = trainer._window(range(8, 16))  # of two processes, the second: 8 rows a step, so four steps
    assert window is not None
    assert window.tolist() == [n * BATCH + k for n in range(4, 8) for k in range(8, 16)]
    trainer._horizon = 15
    assert trainer._window(range(8, 16)) is None


def test_labels_of_later_batches_are_not_known(tiny: Denoiser) -> None:
    """A conditional teacher's trajectories are those of the batch's own labels, step by step."""
    from fewstep.objectives.base import Beside, StepRandom
    from fewstep.randomness import Streams
    from fewstep.types import Batch, Progress

    told: list[torch.Tensor] = []

    class Teacher(Denoiser):
        def forward(self, x_t, t, cond=None, s=None, guidance=None):  # type: ignore[no-untyped-def]
            told.append(cond)
            return super().forward(x_t, t, None, s, guidance)

    teacher = tiny.clone()
    teacher.__class__ = Teacher
    cond = torch.nn.functional.one_hot(torch.arange(16) // NODES, 4).float()
    random = StepRandom(Streams(0), torch.arange(16), torch.device("cpu"), torch.arange(64))
    student = tiny.clone()
    student.condition = lambda cond, batch: None  # type: ignore[method-assign]
    CMT(nodes=NODES).loss(student, Batch(torch.zeros(16, 1, 8, 8), cond), Progress(0, 64), random, Beside(teacher))
    assert all(torch.equal(c, torch.eye(4)) for c in told) and told
