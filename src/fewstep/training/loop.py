"""Runs a trainer to its end: log rows, sample grids, checkpoints, signals."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fewstep.checkpoint.store import append_text, write_text
from fewstep.data import save_grid
from fewstep.denoiser import Denoiser
from fewstep.errors import FewstepError, Interrupted, Preempted
from fewstep.evaluation.evaluate import draw_labels, to_host
from fewstep.evaluation.pictures import save_points
from fewstep.evaluation.record import read_history
from fewstep.evaluation.samples import makes_images
from fewstep.sampling import possible_among, sample
from fewstep.training.state import save_state
from fewstep.training.trainer import StepReport, Trainer

GRID_STEPS = (1, 2)


class Watcher:
    """Is told how a run proceeds; the base class says nothing. The command line's draws a progress bar."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Something is made of the data, once: latents."""

    def noted(self, text: str) -> None:
        """A sentence for the user."""

    def started(self, trainer: Trainer, run: Path) -> None:
        """Training begins or continues."""

    def stepped(self, report: StepReport) -> None:
        """One optimiser step was done."""

    def logged(self, row: dict[str, Any]) -> None:
        """A row was added to metrics.jsonl."""

    def saved(self, path: Path) -> None:
        """A checkpoint, a picture, the model or the report was written."""

    def evaluated(self, row: dict[str, Any]) -> None:
        """A row of the final table is ready."""

    def trained(self) -> None:
        """Training is over; evaluation follows."""


@dataclass
class StopSignal:
    """The first SIGINT or SIGTERM asks to stop after the current step; a second one acts at once."""

    number: int | None = None
    _old: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._old[number])


def train(trainer: Trainer, run: Path, watcher: Watcher) -> None:
    """Train to the end, writing ``metrics.jsonl``, ``samples/`` and ``checkpoints/`` as it goes.

    Raises:
        NonFiniteError: nothing non-finite is ever saved; the last good checkpoint stays.
        Interrupted, Preempted: after SIGINT or SIGTERM, when the state was saved.
    """
    output, batch = trainer.config.output, trainer.config.batch_size
    log = _Log(run, trainer) if trainer.world.leads else None
    watcher.started(trainer, run)
    if trainer.images_seen == 0:
        watcher.saved(save_state(trainer, run))
    with _main_thread_signals() as stop:
        for report in trainer.steps():
            watcher.stepped(report)
            seen = report.progress.images_seen
            last = seen >= trainer.config.images
            if last or _crossed(seen, batch, output.log_images):
                row = trainer.read_sums()
                if log is not None:
                    watcher.logged(log.write(report, row))
            if trainer.world.leads and output.sample_images and _crossed(seen, batch, output.sample_images):
                for path in draw_grids(trainer, run):
                    watcher.saved(path)
            stopping = trainer.world.any(stop.number is not None)
            if last or stopping or _crossed(seen, batch, output.checkpoint_images):
                watcher.saved(_save_good(trainer, run))
            if stopping and not last:
                raise _stopped(stop.number, run, seen)
    watcher.trained()


def draw_grids(trainer: Trainer, run: Path) -> Iterator[Path]:
    """Samples of the first average at 1 and 2 steps, same noise every time, as pictures."""
    model = trainer.averages[0]
    for steps in possible_among(model, GRID_STEPS if trainer.config.job == "tune" else (2,)):
        path = run / "samples" / f"images-{trainer.images_seen:09d}-{steps}step.png"
        yield draw_grid(trainer, model, steps, path)


def draw_grid(trainer: Trainer, model: Denoiser, steps: int, path: Path) -> Path:
    """One picture of ``output.grid`` samples."""
    n = trainer.config.output.grid
    cond = draw_labels(model, trainer.source, n, trainer.config.seed)
    x = to_host(model, sample(model, n, steps=steps, seed=trainer.config.seed, cond=cond))
    path.parent.mkdir(parents=True, exist_ok=True)
    if makes_images(model):
        save_grid(path, x)
    else:
        save_points(path, x)
    return path


class _Log:
    """Appends rows to metrics.jsonl; on resume, rows beyond the checkpoint are dropped first."""

    def __init__(self, run: Path, trainer: Trainer) -> None:
        self._path, self._chosen = run / "metrics.jsonl", trainer.config.precision == "auto"
        kept = [r for r in read_history(run) if r["images"] <= trainer.images_seen]
        write_text(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self._before = kept[-1]["seconds"] if kept else 0.0
        self._start = self._last = time.perf_counter()
        self._images = trainer.images_seen

    def write(self, report: StepReport, sums: dict[str, float]) -> dict[str, Any]:
        now, seen = time.perf_counter(), report.progress.images_seen
        row: dict[str, Any] = {"images": seen, **sums, "lr": report.lr, **report.schedule}
        if self._chosen:
            row["arithmetic"] = report.arithmetic
        row["images_per_second"] = (seen - self._images) / max(now - self._last, 1e-9)
        row["seconds"] = self._before + now - self._start
        self._last, self._images = now, seen
        append_text(self._path, json.dumps(row) + "\n")
        return row


def _save_good(trainer: Trainer, run: Path) -> Path:
    trainer.require_finite()
    return save_state(trainer, run)


def _crossed(seen: int, batch: int, interval: int) -> bool:
    """Whether the last step passed a multiple of ``interval``: a pure function of the images seen."""
    return seen // interval > (seen - batch) // interval


def _stopped(number: int | None, run: Path, seen: int) -> FewstepError:
    kind = Interrupted if number == signal.SIGINT else Preempted
    return kind(f"Stopped at image {seen}; the state is saved", do=f"Continue with: fewstep resume {run}")


@contextmanager
def _main_thread_signals() -> Iterator[StopSignal]:
    """Signal handlers can only be set in the main thread; elsewhere the signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield StopSignal()
        return
    with StopSignal() as stop:
        yield stop


@contextmanager
def stopping_at_once(run: Path) -> Iterator[None]:
    """While a finished training is evaluated, SIGINT and SIGTERM raise what their exit codes need.

    Raises:
        Interrupted, Preempted: ``resume`` repeats the evaluation alone.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        kind = Interrupted if number == signal.SIGINT else Preempted
        raise kind("Stopped during the closing evaluation; the training is saved", do=f"Run: fewstep resume {run}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes in use so far: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
