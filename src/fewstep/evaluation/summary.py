"""A run in words: what was tuned from what, how its numbers were measured, and the tables of its other results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.evaluation.figures import margin, number, quality_svg
from fewstep.evaluation.record import Record, rows_from

Pairs = list[tuple[str, str]]

INTERVALS = (
    "95 %: value ± 1.96 standard deviations over random halves of the samples, without replacement; "
    "the reference is fixed"
)


def summary_of(record: Record) -> Pairs:
    """What was tuned from what; lines on which the directory is silent are left out."""
    config, facts = record.config, record.facts
    data, note = facts.get("dataset", {}), config.get("note")
    size = f", {data['count']:,} samples of {' x '.join(map(str, data['shape']))}" if data else ""
    view = [f"{k} {config[f'data.{k}']}" for k in ("split", "resize", "channels") if config.get(f"data.{k}")]
    recipe = config.get("recipe")
    seen = facts.get("images_seen", config.get("images"))
    pairs = [
        ("Teacher", teacher_of(record) if record.job == "tune" else None),
        ("Data", f"{config.get('data.source')}{size} ({', '.join(view)})"),
        ("Made by", facts.get("origin")),
        ("Recipe", f"{recipe} ({note})" if note else recipe),
        ("Objective", in_words(nested(config, "objective"))),
        ("Optimiser", in_words(nested(config, "optim"))),
        ("Network", _size(facts)),
        ("Images", f"{seen:,} in batches of {config.get('batch_size')}" if isinstance(seen, int) else None),
        ("Seed", config.get("seed")),
        ("Processes", facts.get("processes")),
        ("Peak memory", f"{facts['peak_memory'] / 2**20:.0f} MiB" if "peak_memory" in facts else None),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def _size(facts: Mapping[str, Any]) -> str | None:
    """Parameters of the network, and how many of them were trained where not all were."""
    if "parameters" not in facts:
        return None
    size, trained = facts["parameters"], facts.get("trained", facts["parameters"])
    part = "" if trained == size else f", {trained / 1e6:.2f} M of them trained"
    return f"{size / 1e6:.2f} M parameters{part}"


def teacher_of(record: Record) -> str:
    """Name of the teacher, where it is, and what is known of how it was made."""
    path, known = str(record.config.get("teacher", "")), record.facts.get("teacher", {})
    made = {name: value for name, value in known.get("provenance", {}).items() if value not in ("", None)}
    said = ", ".join(f"{v:,} images" if name == "images" else f"{name} {v}" for name, v in made.items())
    weights = f"; sha256 of the weights {known['sha256'][:16]}" if known.get("sha256") else ""
    return f"{path}{f' ({said})' if said else ''}{weights}"


def measured_of(results: Mapping[str, Any]) -> Pairs:
    """Feature net, reference, counts, seeds and noise levels of a results.json."""
    pairs: Pairs = []
    for model, result in results.items():
        rows = result["rows"]
        said: Pairs = [("Feature net", _net(result)), ("Reference", _reference(result))]
        said.append(("Samples", f"{result.get('samples', '?'):,} per step count, seed {result.get('seed', '?')}"))
        if any(row.get("intervals") for row in rows):
            said.append(("Intervals", INTERVALS))
        solvers = ", ".join(dict.fromkeys(str(row.get("solver")) for row in rows))
        levels = [f"{row['nfe']}: {', '.join(f'{t:.4g}' for t in row['times'])}" for row in rows if row.get("times")]
        said.append((f"Sampler of {model}", f"{solvers}{'; noise levels ' if levels else ''}{'; '.join(levels)}"))
        pairs += [pair for pair in said if pair not in pairs]
    return pairs


def _net(result: Mapping[str, Any]) -> str:
    net = result.get("features", {})
    how = net.get("preprocessing")
    return f"{net.get('name')}, sha256 {str(net.get('hash'))[:16]}{f', {in_words(how)}' if how else ''}"


def _reference(result: Mapping[str, Any]) -> str:
    known = result.get("reference", {})
    count = f", {known['count']:,} samples" if isinstance(known.get("count"), int) else ""
    split = f", split {known['split']}" if known.get("split") else ""
    how = f", {in_words(known['preprocessing'])}" if known.get("preprocessing") else ""
    return f"{known.get('source')}{split}{count}{how}, fingerprint {str(known.get('fingerprint'))[:16]}"


def in_words(value: Any) -> str:
    """Nested settings in one line: ``lognormal(mean -1.1, std 2.0)``.

    >>> in_words({"kind": "stages", "q": 2.0, "law": {"kind": "uniform"}, "clip": None})
    'stages(q 2.0, law uniform)'
    """
    if isinstance(value, Mapping):
        inner = [f"{k} {in_words(v)}" for k, v in value.items() if k != "kind" and v is not None]
        kind = str(value.get("kind", ""))
        return f"{kind}({', '.join(inner)})" if kind and inner else kind or ", ".join(inner)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(in_words(v) for v in value)
    return str(value)


def nested(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings below ``name`` of a configuration by dotted path."""
    out: dict[str, Any] = {}
    for path, value in config.items():
        first, *rest = path.split(".")
        node = out
        if first == name and rest:
            for part in rest[:-1]:
                node = node.setdefault(part, {})
            node[rest[-1]] = value
    return out


# --- the dial and the like --------------------------------------------------------------------------


def tables_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for every list of rows in dial.json and commit.json."""
    tables = []
    for name, content in found.items():
        named = content.items() if isinstance(content, Mapping) else [("rows", content)]
        for key, rows in named:
            if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
                title = TITLES.get(key if name == "dial" and key != "rows" else name, name)
                note = content.get("conclusion", "") if isinstance(content, Mapping) else ""
                tables.append({"title": title, "note": str(note), "svg": _curve(name, rows), **_listed(rows)})
    return tables


def _curve(name: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Quality against evaluations of rows as ``evaluate`` writes them; None for other rows."""
    by_model: dict[str, Any] = {}
    for row in rows:
        if not isinstance(row.get("nfe"), int) or not row.get("metrics"):
            return None
        by_model.setdefault(str(row.get("model")), {"rows": []})["rows"].append(row)
    found = rows_from(by_model)
    return quality_svg(found, next(iter(found[0].metrics)), name=name)


TITLES = {"dial": "Sampling times, on a held-out draw", "commit": "Early commit: mean evaluations against quality"}

_COLUMNS = {
    "model": "Model",
    "rule": "Rule",
    "tol": "Tolerance",
    "nfe": "Evaluations",
    "mean_nfe": "Mean evaluations",
    "committed": "Share stopped early",
}
_LAST = {"samples_per_second": "Samples/s", "times": "Noise levels"}


def _listed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    last = [key for key in _LAST if any(row.get(key) is not None for row in rows)]
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics", {})))
    lines = []
    for row in rows:
        cells = [(_plain(row.get(key)), "") for key in first]
        for name in metrics:
            value, interval = row.get("metrics", {}).get(name), (row.get("intervals") or {}).get(name)
            known = isinstance(value, int | float)
            cells.append((number(value), margin(value, interval and tuple(interval))) if known else ("–", ""))
        lines.append([*cells, *((_plain(row.get(key)), "") for key in last)])
    head = [*(_COLUMNS[key] for key in first), *metrics, *(_LAST[key] for key in last)]
    return {"head": head, "lines": lines}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(f"{v:.4g}" if isinstance(v, int | float) else str(v) for v in value)
    return "–" if value is None else str(value)
