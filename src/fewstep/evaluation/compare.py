"""Several runs on one page: what differs between them, whose numbers are better, and whether that can be said."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fewstep.checkpoint.store import write_text
from fewstep.errors import ConfigError
from fewstep.evaluation.figures import Interval, Row, evaluations, higher_is_better, number, overlap, overlay_svg
from fewstep.evaluation.page import fill, markup, metric_cards, sample_sections
from fewstep.evaluation.pictures import Picture, is_teacher, model_order
from fewstep.evaluation.record import Record, read_record
from fewstep.evaluation.svg import KINDS

MOST_RUNS = len(KINDS)
LOSS_NOTE = "A loss is not a progress measure, and losses of different settings cannot be compared: read the quality."
_CURVES = (
    ("loss", "loss"),
    ("r/t", "r/t of a pair"),
    ("lr", "learning rate"),
    ("images_per_second", "images per second"),
)
_MACHINE = ("fewstep", "torch", "python", "hardware")


@dataclass(frozen=True)
class Entry:
    """A run of a comparison: its letter, its directory's name, and what that holds."""

    letter: str
    name: str
    record: Record

    @property
    def basis(self) -> tuple[str, ...] | None:
        """What two numbers must share to be ranked: reference, its split and count, net and preprocessing."""
        result = next(iter(self.record.results.values()), None)
        if result is None:
            return None
        net, known = result.get("features", {}), result.get("reference", {})
        facts = [known.get(key) for key in ("fingerprint", "split", "count", "preprocessing")]
        return tuple(json.dumps(v, sort_keys=True) for v in (*facts, net.get("hash"), net.get("preprocessing")))

    @property
    def teacher(self) -> tuple[Any, Any]:
        """Where the teacher is, and the hash of its weights."""
        return self.record.config.get("teacher"), self.record.facts.get("teacher", {}).get("sha256")

    @property
    def seed(self) -> Any:
        """The seed of the samples."""
        result: dict[str, Any] = next(iter(self.record.results.values()), {})
        return result.get("seed", self.record.config.get("seed"))


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        entries: the runs; rows, pictures: theirs, with the letter as the model's name.
        differences: setting -> its value in every run, for settings that differ.
        notes: what cannot be compared, and why, one sentence each.
        ranked: whether numbers of one name may be ranked at all.
    """

    entries: list[Entry]
    rows: list[Row]
    pictures: list[Picture]
    differences: dict[str, list[str]]
    notes: list[str]
    ranked: bool


def compare_runs(paths: Sequence[Path], out: Path) -> Comparison:
    """Write the page that compares runs.

    Raises:
        ConfigError: a path is no run, a run is given twice, or there are fewer than 2 or more than 8.
    """
    if not 2 <= len(paths) <= MOST_RUNS:
        raise ConfigError("A page compares 2 to 8 runs", got=len(paths))
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError("The same run is given twice", got=" ".join(map(str, paths)))
    found = compare([read_record(path) for path in paths])
    write_text(out, render_comparison(found, datetime.now(UTC)))
    return found


def compare(records: Sequence[Record]) -> Comparison:
    """Everything the page says, as a pure function of the runs."""
    entries = [
        Entry(chr(ord("A") + i), name, record)
        for i, (name, record) in enumerate(zip(_names(records), records, strict=True))
    ]
    bases = [entry.basis for entry in entries if entry.basis is not None]
    notes = [*_notes_on_numbers(entries), *_notes_on_teachers(entries)]
    notes += [*_notes_on_seeds(entries), *_notes_on_shapes(entries)]
    rows = _merged([(entry, row) for entry in entries for row in entry.record.rows])
    pictures = _merged([(entry, picture) for entry in entries for picture in _drawable(entries, entry)])
    return Comparison(entries, rows, pictures, _differences(entries), notes, len(set(bases)) <= 1)


# --- what may be said -------------------------------------------------------------------------------


def marks_of(values: Mapping[str, tuple[float, Interval | None]], *, higher: bool) -> dict[str, str]:
    """Which of several numbers is best: model -> "best", "undecided" or "unproven"; those clearly worse have none.

    "best": its 95 % interval is clear of all others. "undecided": the intervals of the best value and of these
    overlap, or they are equal. "unproven": the best value, where some interval is unknown. One number is not ranked.
    """
    finite = {model: (v, interval) for model, (v, interval) in values.items() if v == v}
    if len(finite) < 2:
        return {}
    pick = max if higher else min
    best = pick(finite, key=lambda model: finite[model][0])
    intervals = {model: interval for model, (_, interval) in finite.items() if interval is not None}
    if len(intervals) < len(finite):
        ties = [model for model in finite if finite[model][0] == finite[best][0]]
        return {best: "unproven"} if len(ties) == 1 else dict.fromkeys(ties, "undecided")
    near = [m for m in finite if m != best and overlap(intervals[m], intervals[best])]
    return dict.fromkeys([best, *near], "undecided") if near else {best: "best"}


def marks(comparison: Comparison, metric: str) -> dict[tuple[str, int], str]:
    """(letter, evaluations) -> mark, at every number of evaluations; teachers are not ranked."""
    if not comparison.ranked:
        return {}
    rows = [row for row in comparison.rows if metric in row.metrics and not is_teacher(row.model)]
    out = {}
    for nfe in {row.nfe for row in rows}:
        column = {row.model: (row.metrics[metric], row.intervals.get(metric)) for row in rows if row.nfe == nfe}
        for model, mark in marks_of(column, higher=higher_is_better(metric)).items():
            out[model, nfe] = mark
    return out


def verdict_of(comparison: Comparison) -> str:
    """One sentence: who is best at the fewest evaluations that at least two runs share, in the leading metric."""
    rows = [row for row in comparison.rows if not is_teacher(row.model)]
    if not comparison.ranked:
        return "The numbers of these runs cannot be ranked: they were not measured in the same way."
    measured = [
        (name, nfe)
        for name in dict.fromkeys(name for row in rows for name in row.metrics)
        for nfe in sorted({row.nfe for row in rows})
        if sum(row.nfe == nfe and name in row.metrics for row in rows) >= 2
    ]
    if not measured:
        return "These runs share no number: nothing can be ranked."
    metric, nfe = measured[0]
    values = {row.model: row.metrics[metric] for row in rows if row.nfe == nfe and metric in row.metrics}
    marked = {model: mark for (model, n), mark in marks(comparison, metric).items() if n == nfe}
    steps = "One step" if nfe == 1 else evaluations(nfe).capitalize()
    if "undecided" in marked.values():
        near = ", ".join(f"{model} {number(values[model])}" for model in sorted(marked))
        return f"{steps}: {metric} does not decide between {near}: their 95 % intervals overlap."
    if not marked:
        return f"{steps}: {metric} is not a number in these runs."
    best, higher = next(iter(marked)), higher_is_better(metric)
    others = {model: v for model, v in values.items() if model != best and v == v}
    second = (max if higher else min)(others, key=lambda model: others[model])
    why = "the 95 % intervals are apart" if marked[best] == "best" else "without an interval this may be chance"
    word, much = "highest" if higher else "lowest", ""
    if values[best] > 0 and values[second] > 0:
        ratio = values[second] / values[best]
        much = f" ({100 * abs(ratio - 1):.0f} % {'higher' if ratio > 1 else 'lower'})"
    text = f"{steps}: {best} has the {word} {metric}, {number(values[best])}; {second} has {number(values[second])}"
    return f"{text}{much}; {why}."


def _notes_on_numbers(entries: Sequence[Entry]) -> list[str]:
    notes = [f"{entry.letter} has no quality table." for entry in entries if entry.basis is None]
    measured = [entry for entry in entries if entry.basis is not None]
    names = {e.letter: list(dict.fromkeys(n for row in e.record.rows for n in row.metrics)) for e in measured}
    shared = set.intersection(*map(set, names.values())) if names else set()
    if len(measured) > 1 and not shared:
        said = "; ".join(f"{letter}: {', '.join(found)}" for letter, found in names.items())
        notes.append(f"No number has the same name in all runs ({said}): other nets or sample counts, not comparable.")
    elif any(set(found) != shared for found in names.values()):
        extra = [f"{letter}: {', '.join(x for x in found if x not in shared)}" for letter, found in names.items()]
        notes.append(f"Not measured in all runs: {'; '.join(e for e in extra if not e.endswith(': '))}.")
    by_basis: dict[tuple[str, ...], list[str]] = {}
    for entry in measured:
        by_basis.setdefault(entry.basis or (), []).append(entry.letter)
    if len(by_basis) > 1:
        what = ("fingerprint", "split", "count", "preprocessing", "net", "preprocessing of the net")
        differ = [w for w, *vs in zip(what, *by_basis, strict=True) if len(set(vs)) > 1]
        groups = " and ".join(", ".join(letters) for letters in by_basis.values())
        notes.append(
            f"{groups} were not measured alike (the reference or net differs in {', '.join(differ)}): "
            "their numbers are shown, and not ranked."
        )
    return notes


def _notes_on_teachers(entries: Sequence[Entry]) -> list[str]:
    """One teacher, measured in one way from one seed, has one set of numbers, or code or machine differ."""
    tuned = [entry for entry in entries if entry.record.job == "tune" and entry.basis is not None]
    for one, other in itertools.combinations(tuned, 2):
        alike = one.basis == other.basis and one.seed == other.seed and one.teacher == other.teacher
        rows = [[(e, row) for row in e.record.rows if is_teacher(row.model)] for e in (one, other)]
        if alike and not _all_same([*rows[0], *rows[1]]):
            return [
                f"{one.letter} and {other.letter} measured other numbers for the same teacher, seed and reference: "
                "another release or machine measures differently, so small differences between them mean nothing."
            ]
    return []


def _notes_on_seeds(entries: Sequence[Entry]) -> list[str]:
    seeds = {entry.letter: entry.seed for entry in entries}
    if len(set(map(str, seeds.values()))) == 1:
        return []
    said = ", ".join(f"{letter} {seed}" for letter, seed in seeds.items())
    return [
        f"The samples have different seeds ({said}): pictures in the same place are not of the same noise, "
        "and part of a difference is the draw."
    ]


def _notes_on_shapes(entries: Sequence[Entry]) -> list[str]:
    left = [entry.letter for entry in entries if entry.record.pictures and not _drawable(entries, entry)]
    return [f"Samples of {', '.join(left)} have another shape and are not shown beside the others."] if left else []


def _drawable(entries: Sequence[Entry], entry: Entry) -> list[Picture]:
    """The samples of an entry, if of the first entry's shape."""
    shapes = [tuple(p.images.shape[1:]) for e in entries for p in e.record.pictures]
    return [p for p in entry.record.pictures if tuple(p.images.shape[1:]) == shapes[0]]


# --- what is shown ----------------------------------------------------------------------------------


def _names(records: Sequence[Record]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    paths = [record.path.resolve().parts for record in records]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def _differences(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Settings, then facts of the machine, that are not the same in all runs."""
    known = [
        entry.record.config | {f"({name})": entry.record.environment.get(name) for name in _MACHINE}
        for entry in entries
    ]
    keys = dict.fromkeys(itertools.chain.from_iterable(known))
    values = {key: [_shown(found.get(key)) for found in known] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def _merged(found: Sequence[tuple[Entry, Any]]) -> list[Any]:
    """Rows or pictures under the letters of their runs; a teacher that is the same in all runs is shown once."""
    out, tuning = [], {entry.letter: entry.record.job == "tune" for entry, _ in found}
    teachers = [(entry, item) for entry, item in found if tuning[entry.letter] and is_teacher(item.model)]
    same = _all_same(teachers)
    seen = set()
    for entry, item in found:
        if not tuning[entry.letter] or not is_teacher(item.model):
            out.append(replace(item, model=entry.letter))
        elif not same:
            out.append(replace(item, model=f"teacher of {entry.letter}"))
        elif item.nfe not in seen:
            seen.add(item.nfe)
            out.append(replace(item, model="teacher"))
    return out


def _all_same(teachers: Sequence[tuple[Entry, Any]]) -> bool:
    """Whether every run measured or drew the same teacher, and found the same, wherever counts are shared."""
    by_nfe: dict[int, list[Any]] = {}
    for _, item in teachers:
        by_nfe.setdefault(item.nfe, []).append(item)
    for items in by_nfe.values():
        first = items[0]
        for other in items[1:]:
            if not (_same_numbers(first, other) if isinstance(first, Row) else _same_samples(first, other)):
                return False
    return len({entry.record.config.get("teacher") for entry, _ in teachers}) <= 1


def _same_numbers(one: Row, other: Row) -> bool:
    """Equal up to the rounding of another machine, in all numbers that both have."""
    shared = one.metrics.keys() & other.metrics.keys()
    return all(math.isclose(one.metrics[k], other.metrics[k], rel_tol=1e-3, abs_tol=1e-6) for k in shared)


def _same_samples(one: Picture, other: Picture) -> bool:
    """Equal up to rounding: half a grey level (or a thousandth of the plane) in the mean."""
    if one.images.shape != other.images.shape:
        return False
    most = 0.5 if one.images.dtype == torch.uint8 else 1e-3
    return float((one.images.double() - other.images.double()).abs().mean()) <= most


def render_comparison(comparison: Comparison, written: datetime) -> str:
    """The page as text, a pure function of its arguments."""
    entries, rows = comparison.entries, comparison.rows
    kinds = {entry.letter: KINDS[i] for i, entry in enumerate(entries)}
    everything = model_order([row.model for row in rows] + [picture.model for picture in comparison.pictures])
    kinds |= {model: "teacher" for model in everything if is_teacher(model)}
    names = {entry.letter: entry.name for entry in entries}
    histories = {entry.letter: entry.record.history for entry in entries}
    metrics = dict.fromkeys(name for row in rows for name in row.metrics)
    marked = {name: marks(comparison, name) for name in metrics}
    said = {mark for found in marked.values() for mark in found.values()}
    context = {
        "title": f"Comparison of {len(entries)} runs",
        "verdict": verdict_of(comparison),
        "entries": [_described(entry, kinds[entry.letter]) for entry in entries],
        "notes": comparison.notes,
        "cards": metric_cards(rows, kinds, marked, names),
        "said": said,
        "intervals": any(row.intervals for row in rows),
        "differences": comparison.differences,
        "curves": markup((label, overlay_svg(histories, key, label, kinds)) for key, label in _CURVES),
        "loss_note": LOSS_NOTE,
        "same_noise": not _notes_on_seeds(entries),
        "when": f"{written:%Y-%m-%d %H:%M} UTC",
        **sample_sections(comparison.pictures, None, rows, kinds, names),
    }
    return fill("compare.html.j2", context)


def _described(entry: Entry, kind: str) -> dict[str, Any]:
    record = entry.record
    seen = record.facts.get("images_seen", record.config.get("images"))
    about = [f"{seen:,} images" if isinstance(seen, int) else "", f"recipe {record.config.get('recipe', 'custom')}"]
    about += [f"objective {record.config.get('objective.kind', '?')}", f"seed {record.config.get('seed', '?')}"]
    source = f"{Path(str(record.config.get('teacher', '?'))).name} → " if record.job == "tune" else ""
    return {
        "letter": entry.letter,
        "name": entry.name,
        "kind": kind,
        "from": f"{source}{record.config.get('data.source', '?')}",
        "about": ", ".join(text for text in about if text),
        "command": record.command,
        "again": record.again,
        "missing": record.missing,
    }
