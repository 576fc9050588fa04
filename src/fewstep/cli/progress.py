"""The live view of a run: progress bar, log lines where there is no terminal, tables."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from fewstep.cli.options import Output
from fewstep.training.arithmetic import BF16_UP_TO, FP16_UP_TO
from fewstep.training.loop import Watcher
from fewstep.training.synthetic import origin
from fewstep.training.trainer import StepReport, Trainer
from fewstep.types import Progress as Clock

WIDE = 120
"""Columns of a terminal that show everything."""


SCHEDULE = {"part": ".0f", "stage": ".0f", "phase": ".0f", "r/t": ".4f", "nodes": ".0f", "share": ".2f"}
"""Numbers of an objective's schedule -> how they are written."""


class _Numbers(ProgressColumn):
    """The schedule, loss and images/s, as far as they are known."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("numbers", ""), no_wrap=True)


def _make_bar(console: Console) -> Progress:
    """One line at any width: below WIDE columns the percentage goes and the bar is short."""
    wide = console.width >= WIDE
    one_line = Column(no_wrap=True)
    columns: list[ProgressColumn] = [TextColumn("{task.percentage:>3.0f}%", table_column=one_line)] if wide else []
    columns += [
        BarColumn(bar_width=24 if wide else 8),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} images", table_column=one_line),
        _Numbers(table_column=one_line),
        TimeRemainingColumn(compact=True, table_column=one_line),
        TextColumn("left", table_column=one_line),
    ]
    return Progress(*(columns if wide else columns[:-1]), console=console)


class Live(Watcher):
    """Draws a progress bar on a terminal, and a line per log row elsewhere."""

    def __init__(self, output: Output) -> None:
        self._out = output
        self._bar: Progress | None = None
        self._task: Any = None
        self._row: dict[str, Any] = {}
        self._table = False
        self._first, self._began = 0, time.perf_counter()
        self._preparing: Counting | None = None

    def preparing(self, what: str, done: int, total: int) -> None:
        if self._preparing is None:
            self._preparing = Counting(self._out).__enter__()
            self._out.say(f"{what[:1].upper()}{what[1:]}: {done:,} of {total:,} are done.")
        self._preparing(what, done, total)
        if done >= total:
            self._end_preparing()

    def noted(self, text: str) -> None:
        self._out.say(text)

    def started(self, trainer: Trainer, run: Path) -> None:
        if not self._out.speaks:
            return
        verb = "Tuning" if trainer.config.job == "tune" else "Pretraining"
        parameters = sum(p.numel() for p in trainer.student.parameters())
        trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
        size = (
            f"{parameters / 1e6:.2f} M parameters"
            if not trainer.frozen
            else (f"{trained / 1e6:.2f} M of {parameters / 1e6:.2f} M parameters")
        )
        self._out.say(
            f"{verb} {size} on {trainer.source.name} ({len(trainer.source):,} samples), "
            f"{trainer.config.images:,} images, recipe {trainer.config.recipe}, on {trainer.world.device}. Run: {run}"
        )
        made = origin(trainer.source, trainer.beside.teacher)
        for sentence in (made and f"The data are {made}.", _caution(trainer)):
            if sentence:
                self._out.say(sentence)
        if trainer.images_seen:
            self._out.say(f"Continuing at image {trainer.images_seen:,}.")
        if self._out.console.is_terminal:
            self._bar = _make_bar(self._out.console)
            self._task = self._bar.add_task("", total=trainer.config.images, completed=trainer.images_seen, numbers="")
            self._first, self._began = trainer.images_seen, time.perf_counter()
            self._bar.start()

    def stepped(self, report: StepReport) -> None:
        if self._bar is not None:
            done = min(report.progress.images_seen, report.progress.total_images)
            narrow, seconds = self._out.console.width < WIDE, time.perf_counter() - self._began
            speed = {"images_per_second": (done - self._first) / max(seconds, 1e-9)}  # until the first log row
            self._bar.update(self._task, completed=done, numbers=_numbers(speed | self._row | report.schedule, narrow))

    def logged(self, row: dict[str, Any]) -> None:
        self._row = row
        if self._bar is None:
            self._out.say(f"images {row['images']:>10,}  {_numbers(row)}")

    def saved(self, path: Path) -> None:
        if self._bar is None and path.name in ("model", "report.html"):
            self._out.say(f"Wrote {path}")

    def trained(self) -> None:
        self.close()

    def evaluated(self, row: dict[str, Any]) -> None:
        if not self._table:
            self._out.say("Evaluating (model, evaluations, first metric, samples/s):")
            self._table = True
        name, value = next(iter(row["metrics"].items()))
        self._out.say(
            f"  {row['model']:<20} NFE {row['nfe']:>3}  {name} {value:8.4f}  {row['samples_per_second']:8.1f} samples/s"
        )

    def close(self) -> None:
        """Take the bars off the terminal."""
        self._end_preparing()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _end_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.__exit__()
            self._preparing = None


def _numbers(row: dict[str, Any], narrow: bool = False) -> str:
    schedule = [f"{name} {row[name]:{form}}" for name, form in SCHEDULE.items() if name in row]
    parts = [" ".join(schedule)] if schedule else []
    if "arithmetic" in row and not narrow:
        parts.append(row["arithmetic"])
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4g}")
    if "images_per_second" in row:
        parts.append(f"{row['images_per_second']:.0f}{'/s' if narrow else ' images/s'}")
    return (" " if narrow else "  ").join(parts)


def _caution(trainer: Trainer) -> str | None:
    """16 bits cannot tell student and target apart once the pairs are tight, and on a CPU fp16 is slow."""
    config, device = trainer.config, trainer.world.device
    if config.precision == "fp16" and device.type == "cpu":
        return "Caution: fp16 is some ten times slower than fp32 on a CPU; prefer precision=auto."
    ratio = trainer.objective.tightness(Clock(config.images - 1, config.images))
    most = {"bf16": BF16_UP_TO, "fp16": FP16_UP_TO}.get(config.precision)
    if most is None or ratio is None or ratio <= most:
        return None
    return f"Caution: {config.precision} is too coarse for pairs as tight as q^a = {ratio:g}; prefer precision=auto."


class Counting:
    """One line that counts samples while something is measured; lines of text go above it.

    Called with (what, done, total). Where there is no terminal only the lines are printed.
    """

    def __init__(self, output: Output) -> None:
        self._out = output
        self._bar: Progress | None = None
        self._task: Any = None
        self._what = ""

    def __enter__(self) -> Counting:
        if self._out.speaks and self._out.console.is_terminal:
            columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=24)]
            columns += [TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), TimeRemainingColumn(compact=True)]
            self._bar = Progress(*columns, console=self._out.console, transient=True)
            self._task = self._bar.add_task("", total=1, visible=False)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            return
        if what != self._what or not done:
            self._what = what
            self._bar.reset(self._task, total=total, visible=True, description=what)
        self._bar.update(self._task, completed=done)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._out.say(text)
