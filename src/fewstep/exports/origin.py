"""Where an exported model comes from, and under which licence: what its directory and its teacher's say."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fewstep.checkpoint.hub import is_hub_id
from fewstep.evaluation.record import Record, read_record

UNKNOWN = "unknown"

_FOLDERS = ("/", "~", "./", "../")
_INSIDE = re.compile(r"""(?<![^\s"'(=:])~?/[^\s"'(),;:#]+""")
"""An absolute path in a sentence."""

_CHUNK = re.compile(r"""[^:=#"']+""")
"""What may be a path in a word of a command, such as ``data.source=hf:FOLDER#column``."""


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
        config, facts, results = map(published, (record.config, record.facts, record.results))
        command = published_command(record.command, {name for name in config.values() if isinstance(name, str)})
        record = replace(record, config=config, facts=facts, results=results, command=command)
    base = teacher if teacher and not Path(teacher).exists() and is_hub_id(teacher) else None
    asked = {"whoever exported it": licence, "the card of the model": licence_of(path)}
    asked["the card of its teacher"] = licence_of(Path(teacher)) if teacher else None
    said_by, known = next(((who, said) for who, said in asked.items() if said), ("", UNKNOWN))
    return Origin(record, published(provenance), base, known, said_by)


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


def published(value: Any) -> Any:
    """JSON without the folders of whoever exports: of paths, also of those behind ``kind:``, the last name is left.

    >>> published({"teacher": "/home/me/run", "data": "hf:/home/me/cats#text", "base": "owner/name"})
    {'teacher': 'run', 'data': 'hf:cats#text', 'base': 'owner/name'}
    """
    if isinstance(value, Mapping):
        return {name: published(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [published(inner) for inner in value]
    return _shortened(value) if isinstance(value, str) and "://" not in value else value


def _shortened(text: str) -> str:
    kind, colon, rest = text.partition(":")
    if colon and "/" not in kind:
        return f"{kind}:{_shortened(rest)}"
    if text.startswith(_FOLDERS) or ("/" in text and Path(text.partition("#")[0]).exists()):
        return Path(text).name
    return _INSIDE.sub(lambda found: Path(found[0]).name, text)


def published_command(command: str, names: Collection[str]) -> str:
    """A command whose words lose their folders, relative ones, too, unless they are among ``names``."""
    try:
        words = shlex.split(command)
    except ValueError:  # a lone quote
        words = command.split()
    return shlex.join(word if word in names or "://" in word else _CHUNK.sub(_last_name, word) for word in words)


def _last_name(chunk: re.Match[str]) -> str:
    return Path(chunk[0]).name if "/" in chunk[0] else chunk[0]
