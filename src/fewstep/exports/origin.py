"""Where an exported model comes from, and under which licence: what its directory and its teacher's say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fewstep.checkpoint.hub import is_hub_id
from fewstep.evaluation.record import Record, read_record

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Origin:
    """What is known of a model; of local paths only the last name, since cards are published.

    Args:
        record: of the run that made it; provenance: what a model directory says of itself.
        base: hub id of the teacher, where it has one.
        licence: of the weights, as the hub abbreviates it; said_by: who says so, empty if nobody does.
    """

    record: Record | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    licence: str = UNKNOWN
    said_by: str = ""


def origin_of(path: Path | None, licence: str | None = None) -> Origin:
    """The origin of a run or model directory; of a model in memory (None) nothing is known.

    Args:
        licence: of the weights; by default what the card of the model says, or else its teacher's.

    Raises:
        CheckpointError: a file of the run is damaged.
    """
    if path is not None and path.name == "model" and (path.parent / "config.yaml").is_file():
        path = path.parent
    record = read_record(path) if path is not None and (path / "config.yaml").is_file() else None
    provenance = _provenance(path)
    teacher = str((record.config if record is not None else provenance).get("teacher") or "")
    if record is not None:
        record = replace(record, config=_published(record.config), facts=_published(record.facts))
    base = teacher if teacher and not Path(teacher).exists() and is_hub_id(teacher) else None
    asked = {"whoever exported it": licence, "the card of the model": licence_of(path)}
    asked["the card of its teacher"] = licence_of(Path(teacher)) if teacher else None
    said_by, known = next(((who, said) for who, said in asked.items() if said), ("", UNKNOWN))
    return Origin(record, _published(provenance), base, known, said_by)


def _provenance(path: Path | None) -> dict[str, Any]:
    """What ``config.json`` of a model directory, or of a run's, says of how it was made."""
    for folder in (path, path / "model") if path is not None else ():
        if (folder / "config.json").is_file():
            about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return {name: value for name, value in (about.get("provenance") or {}).items() if value not in ("", None)}
    return {}


def licence_of(path: Path | None) -> str | None:
    """The licence in the YAML front matter of a directory's ``README.md``."""
    file = None if path is None else path / "README.md"
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    first, _, rest = text.partition("---\n")
    if first.strip() or "\n---" not in rest:
        return None
    try:
        about = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    said = about.get("license") if isinstance(about, Mapping) else None
    said = said[0] if isinstance(said, list) and said else said
    return str(said) if said and said != UNKNOWN else None


def _published(value: Any) -> Any:
    """Without the folders of whoever exports: absolute paths become their last name."""
    if isinstance(value, Mapping):
        return {name: _published(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_published(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value
