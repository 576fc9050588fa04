"""What a run directory holds for its page: written at the end of a run, read by ``fewstep report``.

``report.json`` has the facts, the command and the environment; ``samples/report.safetensors`` the pictures. The page is
a function of the directory alone, so it can be drawn again, and beside others, without the model.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.checkpoint.store import header, read_json, read_tensors, write_json, write_tensors
from fewstep.config import flatten, read_yaml
from fewstep.errors import CheckpointError, ConfigError, StorageError
from fewstep.evaluation.figures import Row
from fewstep.evaluation.neighbours import Neighbours
from fewstep.evaluation.pictures import MOST_POINTS, MOST_SAMPLES, Picture

KIND = "fewstep-report"
FACTS, TENSORS = Path("report.json"), Path("samples", "report.safetensors")
TEACHER, TUNED = "teacher (diffusion)", "tuned"

MOST_PIXELS = 900_000
"""Of one kept grid: large images are kept fewer, at least 4, as the page shows them."""

MOST_BYTES_OF_A_FIGURE = 1_500_000


@dataclass(frozen=True)
class Record:
    """A run as its directory tells it; any part but the configuration may be empty.

    Args:
        path: the directory; job: "tune" or "pretrain"; config: config.yaml by dotted path; yaml: its text.
        facts: "images_seen", "parameters", "trained", "dataset" (count, shape), "peak_memory", "processes", "teacher".
        results: results.json, model -> what ``evaluate`` found.
        pictures, reference, neighbours: samples, real data, and the training images nearest to some samples.
        history: rows of metrics.jsonl.
        command: as it was typed, with the seed; environment: versions and machine.
        tables: dial.json and commit.json, where the run has them; figures: dial.png and the like.
        missing: sentences on what the page would show and the directory does not hold.
    """

    path: Path
    config: dict[str, Any]
    yaml: str
    facts: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    reference: Tensor | None = None
    neighbours: Neighbours | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    command: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Path] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def job(self) -> str:
        """ "tune" or "pretrain"."""
        return str(self.config.get("job", "tune"))

    @property
    def rows(self) -> list[Row]:
        """The quality table."""
        return rows_from(self.results)

    @property
    def again(self) -> str:
        """The command that repeats the run from its own configuration; empty where the teacher was an object."""
        teacher, data = str(self.config.get("teacher", "")), str(self.config.get("data.source", ""))
        if self.job == "tune" and (not teacher or teacher.startswith("(")):
            return ""
        first = ["fewstep", "tune", teacher] if self.job == "tune" else ["fewstep", "pretrain"]
        seed = str(self.config.get("seed", 0))
        return shlex.join([*first, "--data", data, "--config", "config.yaml", "--seed", seed, "--out", "again"])


def rows_from(results: Mapping[str, Any]) -> list[Row]:
    """The rows of a results.json; intervals that were not estimated (all of no width) are left out."""
    return [
        Row(model, int(row["nfe"]), row["metrics"], _rate(row), intervals_of(row))
        for model, result in results.items()
        for row in result["rows"]
    ]


def write_record(
    run: Path,
    *,
    facts: Mapping[str, Any],
    command: str,
    environment: Mapping[str, str],
    pictures: list[Picture],
    reference: Tensor | None,
    neighbours: Neighbours | None,
) -> None:
    """Write ``samples/report.safetensors`` and ``report.json``, each atomically.

    Raises:
        StorageError: the disk refused.
    """
    tensors = {f"picture/{i}": _kept(p.images) for i, p in enumerate(pictures)}
    if reference is not None:
        tensors["reference"] = _kept(reference)
    if neighbours is not None:
        names = ("samples", "found", "index", "distances", "apart")
        tensors |= {f"neighbours/{name}": getattr(neighbours, name) for name in names}
    _write_tensors(run / TENSORS, tensors)
    record: dict[str, Any] = {"facts": dict(facts), "command": command, "environment": dict(environment)}
    record["pictures"] = [{"model": p.model, "nfe": p.nfe} for p in pictures]
    if neighbours is not None:
        record["neighbours"] = {"net": neighbours.net, "searched": neighbours.searched}
    write_json(run / FACTS, header(KIND) | record)


def read_record(run: Path) -> Record:
    """A run directory, whatever release wrote it; parts that it lacks are named in ``missing``.

    Raises:
        ConfigError: it is no run directory.
        CheckpointError: a file of it is damaged.
    """
    file = run / "config.yaml"
    if not file.is_file():
        what = "is not a run directory: it has no config.yaml" if run.is_dir() else "is not a directory"
        raise ConfigError(f"'{run}' {what if run.exists() else 'does not exist'}", do="Give the --out of a run")
    record = Record(
        run,
        flatten(read_yaml(file)),
        file.read_text(encoding="utf-8"),
        results=_read_results(run / "results.json"),
        history=read_history(run),
        tables={path.stem: found for path in _places(run, "dial.json", "commit.json") if (found := _plain(path))},
        figures={path.stem: path for path in _places(run, "dial.png", "commit.png", "samples/step-dial.png")},
        **_read_kept(run),
    )
    return replace(record, missing=_missing(record))


def read_history(run: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl``; a last line that a crash cut short is ignored."""
    path = run / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return rows


def _missing(record: Record) -> list[str]:
    said = []
    if not record.results:
        said.append("No quality was measured (eval.samples was 0, or the run has not ended).")
    if not (record.path / FACTS).is_file():
        said.append(
            "Samples, neighbours, environment and command were not kept: "
            "the run has not ended, or an earlier fewstep wrote it."
        )
    elif not record.pictures:
        said.append("No samples were kept.")
    if not record.history:
        said.append("There is no training log.")
    return said


def _read_kept(run: Path) -> dict[str, Any]:
    if not (run / FACTS).is_file():
        return {}
    facts = read_json(run / FACTS, KIND)
    tensors = read_tensors(run / TENSORS)
    try:
        pictures = [
            Picture(p["model"], int(p["nfe"]), tensors[f"picture/{i}"]) for i, p in enumerate(facts["pictures"])
        ]
        near = facts.get("neighbours")
        names = ("samples", "found", "index", "distances", "apart")
        neighbours = near and Neighbours(
            near["net"], int(near["searched"]), *(tensors[f"neighbours/{name}"] for name in names)
        )
        known = {"facts": dict(facts["facts"]), "environment": dict(facts["environment"]), "command": facts["command"]}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The files '{run / FACTS}' and '{run / TENSORS}' do not fit together: {error}"
        ) from error
    return known | {"pictures": pictures, "reference": tensors.get("reference"), "neighbours": neighbours}


def _read_results(path: Path) -> dict[str, Any]:
    found = _plain(path) if path.is_file() else {}
    try:
        rows_from(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The file '{path}' does not hold the results of a run") from error
    return dict(found)


def _plain(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' is damaged", got=str(error)) from error


def _places(run: Path, *names: str) -> list[Path]:
    """The files of these names in the run or in its model directory, if small enough for a page."""
    paths = [folder / name for name in names for folder in (run, run / "model")]
    return [path for path in paths if path.is_file() and path.stat().st_size <= MOST_BYTES_OF_A_FIGURE]


def _rate(row: Mapping[str, Any]) -> float:
    """Samples per second; nan where the samples were not made here."""
    rate = row.get("samples_per_second")
    return math.nan if rate is None else float(rate)


def intervals_of(row: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The 95 % intervals of a row; none, where all are of no width because they were not estimated."""
    found = {name: (float(low), float(high)) for name, (low, high) in (row.get("intervals") or {}).items()}
    return found if any(high > low for low, high in found.values()) else {}


def _kept(images: Tensor) -> Tensor:
    """As many samples as a page can show."""
    if images.ndim != 4:
        return images[:MOST_POINTS]
    return images[: max(4, min(MOST_SAMPLES, MOST_PIXELS // max(1, images.shape[2] * images.shape[3])))]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, tensors or {"empty": torch.zeros(0)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"'{path}' could not be written ({error})", do="Free some space") from error
    finally:
        temporary.unlink(missing_ok=True)
