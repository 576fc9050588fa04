"""``fewstep scaling``."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter

from fewstep.cli.options import COUNT, Json, Output, Quiet, Seed

if TYPE_CHECKING:
    from fewstep.evaluation.scaling import Law, Point
    from fewstep.runs import Run

Against: TypeAlias = Literal["compute", "images", "seconds", "parameters"]

SIZES = {
    "compute": "training compute [FLOP]",
    "images": "training images",
    "seconds": "training time [s]",
    "parameters": "parameters of the network",
}
_FIELDS = ("metric", "feature net", "feature hash", "reference", "sample count", "solver", "step count")


def scaling(
    *runs: Annotated[Path, Parameter(help="Run directories of different sizes or budgets.")],
    points: Annotated[
        Path | None,
        Parameter(help="Instead of runs, a .csv or .json of your own: compute, value and, if you like, name."),
    ] = None,
    metric: Annotated[
        str | None, Parameter(help="A number of the runs' table, as FD-Pixels-2k. Default: the first one.")
    ] = None,
    steps: Annotated[int, Parameter(validator=COUNT, help="Its step count.")] = 1,
    against: Annotated[Against, Parameter(help="What C is; compute is counted in FLOP.")] = "compute",
    offset: Annotated[
        bool, Parameter(negative="", help="Also fit y = y_inf + K C^alpha, and say whether the points support it.")
    ] = False,
    out: Annotated[Path | None, Parameter(help="Draw the picture, a .png.")] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Fit the power law y = K C^alpha of quality in training compute to four or more runs.

    Least squares of ln y on ln C. The runs must have been measured alike: same metric, feature net, sample count,
    reference and step count. docs/scaling.md says how C is counted and what the interval means.

    For example:

    ```
    fewstep scaling run-10k run-40k run-160k run-640k --out scaling.png
    fewstep scaling --points fid.csv --offset --json
    ```
    """
    from fewstep.evaluation.scaling import fit, not_identifiable, notes
    from fewstep.evaluation.scaling_plot import formula, interval, scaling_png

    output = Output(quiet, json)
    _check(runs, points, out)
    if points is not None:
        found, name, size = read_points(points), metric or "y", f"size [as in {points.name}]"
    else:
        found, name = measured(runs, metric, steps, against)
        size = SIZES[against]
    law = fit(found, seed=seed or 0)
    shifted = fit(found, offset=True, resamples=500, seed=seed or 0) if offset else None
    said = notes(found, law, shifted)
    output.say(_table(found, law, name, size))
    for one in (law, shifted):
        if one is not None:
            output.say(f"{formula(one, name)}\n  {interval(one)}\n  {_trust(one)}")
    for note in said:
        output.say(f"- {note}")
    if out is not None:
        label = name if points is not None else f"{name}, {steps} step{'s' if steps > 1 else ''}"
        scaling_png(out, found, shifted or law, metric=label, size=size, plain=law if shifted else None)
        output.say(f"Picture: {out}")
    output.result(
        {
            "metric": name,
            "steps": None if points is not None else steps,
            "against": "points" if points is not None else against,
            "size": size,
            "points": [{"name": p.name, "compute": p.compute, "value": p.value, "interval": p.interval} for p in found],
            "law": law.describe(),
            "offset": None if shifted is None else shifted.describe(),
            "offset_identifiable": None if shifted is None else not not_identifiable(law, shifted),
            "notes": said,
            "picture": None if out is None else str(out),
        }
    )
    return 0


def _check(runs: Sequence[Path], points: Path | None, out: Path | None) -> None:
    from fewstep.errors import ConfigError

    if bool(runs) == (points is not None):
        raise ConfigError("A scaling law is of runs or of --points", do="Give either four or more runs, or --points")
    if out is not None and (out.suffix.lower() != ".png" or out.is_dir()):
        raise ConfigError("The picture is a PNG", got=str(out), want="--out scaling.png")


def _table(points: Sequence[Point], law: Law, metric: str, size: str) -> Any:
    from rich.table import Table

    table = Table(box=None)
    table.add_column("point")
    for head in (size.replace("[", "(").replace("]", ")"), metric, "law", "alpha without it"):
        table.add_column(head, justify="right")
    for p, without in zip(points, law.without, strict=True):
        table.add_row(p.name, f"{p.compute:.4g}", f"{p.value:.4g}", f"{law.curve.at(p.compute):.4g}", f"{without:.3g}")
    return table


def _trust(law: Law) -> str:
    low, high = law.alpha_bootstrap
    said = f"pairs bootstrap {low:.3g} to {high:.3g}; leave-one-out {min(law.without):.3g} to {max(law.without):.3g}; "
    aicc = "not defined" if law.aicc is None else f"{law.aicc:.4g}"
    return said + f"r² {law.r2:.4f}, Pearson {law.pearson:.4f}, AICc {aicc}"


# --- points from runs --------------------------------------------------------------------------------


def measured(paths: Sequence[Path], metric: str | None, steps: int, against: Against) -> tuple[list[Point], str]:
    """One point per run, and the full name of the metric.

    Raises:
        FewstepError: a run without results or without that number, or runs that were not measured alike.
    """
    from fewstep.evaluation.scaling import Point

    names = _names(paths)
    found = []
    for path, name in zip(paths, names, strict=True):
        run = _finished(path)
        value, interval, how = _number(run, metric, steps)
        found.append((Point(name, _size(run, against), value, interval), how))
    _check_alike(names, [how for _, how in found])
    return [point for point, _ in found], str(found[0][1]["metric"])


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or the whole paths where those are not different."""
    from fewstep.errors import ConfigError

    if len({p.resolve() for p in paths}) < len(paths):
        raise ConfigError("A run is given twice", got=", ".join(map(str, paths)), want="each run once")
    last = [p.resolve().name for p in paths]
    return last if len(set(last)) == len(last) else [str(p) for p in paths]


def _finished(path: Path) -> Run:
    """The run with its results."""
    from fewstep.errors import DataError
    from fewstep.runs import open_run

    try:
        run = open_run(path)
    except ValueError as error:
        raise DataError(f"'{path / 'results.json'}' is not readable: {error}") from error
    if run.results:
        return run
    if run.config.eval.samples == 0:
        do = f"Measure it (fewstep eval {path} --data {run.config.data.source}), and give the numbers by --points"
        raise DataError(f"The run '{path}' was not measured: its eval.samples is 0", do=do)
    raise DataError(f"The run '{path}' has no results.json: it has not ended", do=f"Run: fewstep resume {path}")


def _number(run: Run, metric: str | None, steps: int) -> tuple[float, tuple[float, float] | None, dict[str, Any]]:
    """The value, its interval, and how it was measured; of the tuned model, or of the only one there is."""
    from fewstep.errors import DataError, nearest

    assert run.results is not None
    model = "tuned" if "tuned" in run.results else next(iter(run.results))
    try:
        result = run.results[model]
        rows = {row["steps"]: row for row in result["rows"]}
        if steps not in rows:
            counts = ", ".join(map(str, rows))
            raise DataError(f"The run '{run.path}' was not measured at {steps} steps", want=f"--steps {counts}")
        row = rows[steps]
        wanted = metric or next(iter(row["metrics"]))
        name = next((m for m in row["metrics"] if m.lower() == wanted.lower()), None)
        if name is None:
            raise DataError(f"The run '{run.path}' has no '{wanted}'", do=nearest(wanted, row["metrics"]))
        low_high = row.get("intervals", {}).get(name)
        reference = result["reference"]
        parts = (reference.get(k) for k in ("source", "split", "count", "fingerprint", "preprocessing"))
        how = (name, result["features"]["name"], result["features"]["hash"], _joined(parts), result["samples"],
               row["solver"], steps)  # fmt: skip
        return (
            float(row["metrics"][name]),
            None if low_high is None else (float(low_high[0]), float(low_high[1])),
            dict(zip(_FIELDS, how, strict=True)),
        )
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError) as error:
        raise DataError(f"'{run.path / 'results.json'}' is not the table of a run", got=repr(error)) from error


def _joined(parts: Iterable[Any]) -> str:
    return " ".join(str(part)[:16] for part in parts if part is not None)


def _check_alike(names: Sequence[str], how: Sequence[dict[str, Any]]) -> None:
    """Refuse numbers that were not measured alike.

    Raises:
        DataError: what differs, and which run has what.
    """
    from fewstep.errors import DataError

    for field in _FIELDS:
        values = [str(one[field]) for one in how]
        if len(set(values)) > 1:
            groups = {value: [n for n, v in zip(names, values, strict=True) if v == value] for value in values}
            raise DataError(
                f"The runs were not measured alike: the {field} differs",
                got="; ".join(f"{', '.join(members)}: {value}" for value, members in groups.items()),
                do="Compare only numbers of one kind: choose --metric, or measure the runs again with fewstep eval",
            )


def _size(run: Run, against: Against) -> float:
    """C of a run."""
    import torch

    from fewstep.checkpoint.model import KIND, rebuild
    from fewstep.checkpoint.store import read_json
    from fewstep.errors import DataError
    from fewstep.evaluation.compute import training_flops
    from fewstep.evaluation.record import read_history

    if against == "seconds":
        history = read_history(run.path)
        if not history or "seconds" not in history[-1]:
            raise DataError(f"The run '{run.path}' has no times in its metrics.jsonl", do="Use --against images")
        return float(history[-1]["seconds"])
    description = read_json(run.path / "model" / "config.json", KIND)
    images = int((description.get("provenance") or {}).get("images") or run.config.steps * run.config.batch_size)
    if against == "images":
        return float(images)
    if description.get("backbone") is None:
        raise DataError(
            f"The network of '{run.path}' is your own, which cannot be counted from files",
            do="Use --against images or --against seconds",
        )
    with torch.device("meta"):
        denoiser = rebuild(description, str(run.path / "model"))
    if against == "parameters":
        return float(sum(p.numel() for p in denoiser.parameters()))
    return training_flops(denoiser, run.config.objective, images)


# --- points from a file ------------------------------------------------------------------------------


def read_points(path: Path) -> list[Point]:
    """Points of a .csv with the columns compute, value and perhaps name, low, high; or a .json list of such records.

    Raises:
        DataError: the file is missing or of another form, with the line.
    """
    import csv

    from fewstep.errors import DataError

    want = "columns compute,value[,name[,low,high]]"
    try:
        text = path.read_text(encoding="utf-8-sig")
        records: Any = (
            json_module.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(text.splitlines()))
        )
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"The points '{path}' cannot be read: {error}", want=f"a .csv with {want}, or .json") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"There are no points in '{path}'", want=want)
    return [_record(record, i, path, want) for i, record in enumerate(records, 1)]


def _record(record: Any, index: int, path: Path, want: str) -> Point:
    from fewstep.errors import DataError
    from fewstep.evaluation.scaling import Point

    try:
        fields = {str(k).strip().lower(): v for k, v in record.items()}
        low, high = fields.get("low"), fields.get("high")
        interval = None if low in (None, "") or high in (None, "") else (float(low), float(high))  # type: ignore[arg-type]
        name = str(fields.get("name") or index).strip()
        return Point(name, float(fields["compute"]), float(fields["value"]), interval)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"Point {index} of '{path}' cannot be used", got=record, want=f"{want}, numbers") from error
