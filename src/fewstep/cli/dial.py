"""``fewstep dial``."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from fewstep.cli.options import (
    COUNT,
    BatchSize,
    Channels,
    DataOption,
    Device,
    Json,
    Network,
    Output,
    Quiet,
    Resize,
    Seed,
    Split,
)

if TYPE_CHECKING:
    from fewstep.data import Source
    from fewstep.denoiser import Denoiser
    from fewstep.evaluation.dial import Found, Settings
    from fewstep.evaluation.reference import Reference

RESULT, PARTIAL, PICTURE = "dial.json", "dial.partial.json", "dial.png"


def dial(
    model: Annotated[str, Parameter(help="A run or model directory; or file.py:function with --out.")],
    /,
    *,
    data: DataOption,
    teacher: Annotated[
        str | None, Parameter(help="Also measure this diffusion model at the same evaluations, and at 35.")
    ] = None,
    steps: Annotated[str, Parameter(help="Step counts from 2 to 8: 2-8 or 2,4.")] = "2-8",
    samples: Annotated[
        int, Parameter(name=["--samples", "-n"], validator=COUNT, help="Of the search, and again of the check.")
    ] = 2000,
    budget: Annotated[
        int, Parameter(validator=COUNT, help="Network evaluations per sample for the search of one step count.")
    ] = 60,
    commit: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Also measure early commit: stopping each sample once it is settled (commit.json, commit.png).",
        ),
    ] = False,
    features: Annotated[str, Parameter(help="A feature net, as of fewstep eval.")] = "auto",
    resize: Resize = None,
    channels: Channels = None,
    split: Split = "train",
    out: Annotated[
        Path | None, Parameter(help="Directory for dial.json and dial.png. Default: the model directory.")
    ] = None,
    dry: Annotated[bool, Parameter(negative="", help="Write nothing.", show_default=False)] = False,
    batch_size: BatchSize = None,
    network: Network = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Find the sampling times of a few-step model for 2 to 8 steps, and how quality depends on the step count.

    A seeded search for the smallest Fréchet distance, then a check on another seed: times are written into the model
    (`sampler_times` of its config.json) only where they are better there by more than the standard deviation of the
    paired difference; `fewstep sample` uses them from then on. After Ctrl-C the same command goes on.

    For example:

    ```
    fewstep dial run --data photos.zip --teacher teacher --commit
    fewstep dial run --data digits --steps 2,4 -n 5000 --dry
    ```
    """
    from fewstep.cli.options import command_line, open_model
    from fewstep.data import open_source
    from fewstep.evaluation.dial import Settings, Watch, check, conclusion, model_directory, search
    from fewstep.evaluation.reference import open_reference
    from fewstep.evaluation.statistics_file import is_statistics
    from fewstep.training.checks import check_shape
    from fewstep.training.finish import environment

    output = Output(quiet, json)
    settings = Settings(parse_steps(steps), samples, seed or 0, budget)
    directory = None if ".py:" in model else model_directory(model)
    place = _place(directory, out, dry)
    denoiser = open_model(model, "ema", network, device)
    _require_dial(denoiser, commit)
    baseline = None if teacher is None else open_model(teacher, "ema", None, device)
    source: Source | str = data
    if not is_statistics(data):
        source = open_source(data, resize=resize, channels=channels, split=split)
        for one in (denoiser, baseline):
            if one is not None:
                check_shape(one, source)
    reference = open_reference(
        source, features, split=split, resize=resize, channels=channels, rows=2, device=denoiser.device
    )
    _introduce(output, denoiser, baseline, reference, settings, model)
    about = _about(denoiser, reference, settings)
    partial = None if place is None else place / PARTIAL
    known = {} if partial is None else read_partial(partial, about)
    if partial is not None:
        _keep(partial, about, known)  # fails before the work where nothing can be written
    with _interruptible(partial), _Bar(output, settings) as bar:

        def found(count: int, result: Found) -> None:
            known[count] = result
            bar.found(count, result)
            if partial is not None:
                _keep(partial, about, known)

        watch = Watch(tried=bar.tried, found=found, measured=bar.measured)
        times = search(denoiser, reference, settings, known=dict(known), batch_size=batch_size, watch=watch)
        result = check(denoiser, reference, times, settings, teacher=baseline, batch_size=batch_size, watch=watch)
    result = {"model": model, "teacher": teacher} | about | result | {"conclusion": conclusion(result)}
    result |= {"command": command_line(), "environment": environment(denoiser.device), "written": None}
    _write(output, result, place, directory)
    if commit:
        from fewstep.cli.early import measure_commit

        result["commit"] = measure_commit(
            output, denoiser, baseline, reference,
            samples=samples, seed=settings.seed, batch_size=batch_size, place=place,
        )  # fmt: skip
    output.result(result)
    return 0


def _require_dial(denoiser: Denoiser, commit: bool) -> None:
    """Refuse, before the work, a student whose times are settled or, with --commit, one that jumps."""
    from fewstep.commit import require_end
    from fewstep.evaluation.dial import require_free_times

    require_free_times(denoiser)
    if commit:
        require_end(denoiser)


def _write(output: Output, result: dict[str, Any], place: Path | None, directory: Path | None) -> None:
    """Times into the model, dial.json and dial.png into ``place``; says what was written."""
    from fewstep.checkpoint.store import write_json
    from fewstep.evaluation.dial import write_times
    from fewstep.evaluation.dial_plot import dial_png

    kept = {int(n): entry["times"] for n, entry in result["steps"].items() if entry["kept"] == "found"}
    if place is not None and directory is not None and kept:
        result["written"] = str(directory / "config.json")
    _show(output, result)
    if place is not None:
        dial_png(place / PICTURE, result, _caption(result))
        if directory is not None and kept:
            write_times(directory, kept)
        write_json(place / RESULT, result)
        (place / PARTIAL).unlink(missing_ok=True)
    _say_written(output, result, place, directory, kept)


@contextmanager
def _interruptible(partial: Path | None) -> Iterator[None]:
    """Ctrl-C as one sentence that says what is left."""
    from fewstep.errors import Interrupted

    try:
        yield
    except KeyboardInterrupt as error:
        kept = "Nothing was written" if partial is None else f"What was found is kept in {partial}"
        raise Interrupted(f"The dial was interrupted. {kept}; the model is as it was",
                          do=None if partial is None else "The same command goes on from there") from error  # fmt: skip


def parse_steps(text: str) -> tuple[int, ...]:
    """``"2-8"`` or ``"2,4"`` -> step counts.

    Raises:
        ConfigError: something else.
    """
    from fewstep.cli.write import parse_numbers
    from fewstep.errors import ConfigError

    first, dash, last = text.partition("-")
    if not dash:
        return tuple(sorted(set(parse_numbers(text, "--steps", int))))
    if not (first.strip().isdecimal() and last.strip().isdecimal() and int(first) <= int(last) <= 1000):
        raise ConfigError("--steps is not a range", got=text, want="for example 2-8, or 2,4")
    return tuple(range(int(first), int(last) + 1))


def _place(directory: Path | None, out: Path | None, dry: bool) -> Path | None:
    """Where dial.json goes; None with --dry."""
    from fewstep.errors import ConfigError

    if dry:
        return None
    if out is None and directory is None:
        raise ConfigError(
            "There is no model directory to write sampling times into",
            do="Add --out DIRECTORY for dial.json and dial.png; the times then go into sample --times",
        )
    return out if out is not None else directory


def _about(denoiser: Denoiser, reference: Reference, settings: Settings) -> dict[str, Any]:
    """What the result of the search depends on: provenance, and the key by which a search goes on."""
    from fewstep.checkpoint.model import weights_hash

    about = {
        "weights": weights_hash(denoiser),
        "features": {"name": reference.net.name, "hash": reference.net.hash},
        "reference": {k: v for k, v in reference.info.items() if k not in ("cache", "notes")},
        "settings": asdict(settings) | {"search_seed": settings.search_seed, "held_out_seed": settings.held_out_seed},
        "own_times": {str(n): list(t) for n, t in denoiser.sampler_times.items()},
    }
    plain: dict[str, Any] = json_module.loads(json_module.dumps(about))
    return plain


def read_partial(path: Path, about: dict[str, Any]) -> dict[int, Found]:
    """What an interrupted search of the same model, data and settings had found; else nothing."""
    from fewstep.evaluation.dial import Found

    try:
        kept = json_module.loads(path.read_text(encoding="utf-8"))
        if kept["about"] != about:
            return {}
        return {int(n): Found(**f | {"times": tuple(f["times"])}) for n, f in kept["found"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep(path: Path, about: dict[str, Any], found: dict[int, Found]) -> None:
    from fewstep.checkpoint.store import write_json

    write_json(path, {"about": about, "found": {str(n): asdict(f) for n, f in found.items()}})


# ---------------------------------------------------------------------------------------------- what is said
class _Bar:
    """A progress bar on a terminal; elsewhere a line per step count and per measurement."""

    def __init__(self, output: Output, settings: Settings) -> None:
        self._out, self._settings = output, settings
        columns = [BarColumn(bar_width=24), TextColumn("{task.description}")]
        self._bar = Progress(*columns, console=output.console, transient=True)
        self._task = self._bar.add_task("", total=settings.budget * len(settings.steps))

    def __enter__(self) -> _Bar:
        if self._out.speaks and self._out.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tried(self, steps: int, spent: int, best: float) -> None:
        done = self._settings.budget * self._settings.steps.index(steps) + spent
        text = f"{steps} steps: {spent} of {self._settings.budget} evaluations per sample, best {best:.4g}"
        self._bar.update(self._task, completed=done, description=text)

    def found(self, steps: int, found: Found) -> None:
        times = ", ".join(f"{t:g}" for t in found.times)
        self._out.say(f"  {steps} steps: {found.value:.4g} at {times} (default times {found.default:.4g})")

    def measured(self, row: dict[str, Any]) -> None:
        name, value = next(iter(row["metrics"].items()))
        self._bar.update(self._task, description=f"check: {row['model']}, {row['nfe']} evaluations")
        if not self._out.console.is_terminal:
            self._out.say(f"  {row['model']:<20} NFE {row['nfe']:>3}  {name} {value:.4g}")


def _introduce(
    output: Output, denoiser: Denoiser, teacher: Denoiser | None, reference: Reference, settings: Settings, model: str
) -> None:
    from fewstep.evaluation.dial import TEACHER_NFE

    counts, n = settings.steps, settings.samples
    check = 1 + 2 * sum(counts) + (0 if teacher is None else 1 + sum(counts) + TEACHER_NFE)
    most = (settings.budget * len(counts) + check) * n
    output.say(
        f"{model} against {reference.info['source']} in {reference.net.name}: {n:,} samples, "
        f"at most {most:,} network evaluations."
    )
    if n // 2 <= reference.net.dim:
        output.say(
            f"Half of {n:,} samples are no more than the {reference.net.dim} features: the Fréchet distance is then "
            f"mostly bias, and its intervals are rough. Better: -n {4 * reference.net.dim}."
        )
    for note in reference.info["notes"]:
        output.say(note)


def _show(output: Output, result: dict[str, Any]) -> None:
    from fewstep.evaluation.figures import Row, margin, number
    from fewstep.evaluation.report import print_table

    if not output.speaks:
        return
    table = Table(title=f"{result['metric']} at the found times; held out: seed {result['settings']['held_out_seed']}")
    for name in ("Steps", "Found times", "Search", "Held out", "Default times", "Found - default", "Kept"):
        table.add_column(name, justify="left" if name in ("Found times", "Kept") else "right")
    for count, e in result["steps"].items():
        value, low, high = e["difference"]
        found, default = (", ".join(f"{t:.4g}" for t in e[which]["times"]) for which in ("found", "default"))
        difference = f"{value:+.3g} {margin(value, (low, high))}" if found != default else "same times"
        table.add_row(
            count, found, number(e["search"]["found"]),
            number(e["found"]["held_out"][0]), number(e["default"]["held_out"][0]), difference, e["kept"],
        )  # fmt: skip
    output.console.print(table)
    rows = result["rows"]
    print_table(
        [Row(r["model"], r["nfe"], r["metrics"], r["samples_per_second"], _pairs(r)) for r in rows], output.console
    )
    output.say(result["conclusion"])
    spent = sum(e["evaluations"] for e in result["steps"].values()) * result["settings"]["samples"]
    output.say(f"The search took {spent:,} network evaluations.")


def _pairs(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (low, high) for name, (low, high) in row["intervals"].items()}


def _say_written(
    output: Output, result: dict[str, Any], place: Path | None, directory: Path | None, kept: dict[int, Any]
) -> None:
    left = [int(n) for n, e in result["steps"].items() if e["kept"] != "found"]
    if left:
        output.say(
            f"For {_list(left)} steps the found times are not better on the held-out draw by more than the standard "
            "deviation of the difference: the model keeps the times it has."
        )
    if place is None:
        output.say("Nothing was written (--dry).")
        return
    if result["written"]:
        output.say(f"Wrote the times for {_list(list(kept))} steps into {result['written']}: fewstep sample uses them.")
    elif directory is None:
        output.say("This model has no directory to write times into: use fewstep sample --times.")
    output.say(f"Wrote {place / RESULT} and {place / PICTURE}")


def _list(counts: list[int]) -> str:
    return ", ".join(map(str, counts[:-1])) + (" and " if len(counts) > 1 else "") + str(counts[-1])


def _caption(result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["environment"]
    return (
        f"{settings['samples']:,} samples of seed {settings['held_out_seed']}, which the search did not see, against "
        f"{result['reference']['source']}. Bars: 95 % half-sample intervals. Found times were kept where better "
        f"there than the default ones. Seconds: {machine['hardware']}, torch {machine['torch']}, {machine['date']}."
    )
