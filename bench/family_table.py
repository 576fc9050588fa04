"""The tables and curves of bench/family.py from its rows."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from family_entries import ENTRIES

STEPS = (1, 2, 4, 8)
HEADS = {
    "objective": "Objectives",
    "lever": "Levers, one at a time on plain ECT",
    "start": "Cold or warm start, progressive or immediate tightening (to q^a = 256)",
    "recipe": "Recipes put together from the above",
}


def print_tables(work: Path) -> None:
    """Markdown tables: the mean over the seeds, and in brackets the smallest and largest seed."""
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    teacher = [row for row in rows if row["entry"] == "teacher"]
    for row in teacher:
        found = ", ".join(f"{r['nfe']} NFE {fd(r):.1f} ({interval(r)})" for r in row["rows"])
        print(f"Teacher, {name_of(row['rows'][0])}: {found}\n")
    for images in sorted({row["images"] for row in rows if row["entry"] != "teacher"}):
        for group, head in HEADS.items():
            table(head, group, images, [row for row in rows if row["images"] == images])
    curves([row for row in rows if row.get("curve")])


def table(head: str, group: str, images: int, rows: list[dict[str, Any]]) -> None:
    by_entry: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if (row["entry"] in ENTRIES and ENTRIES[row["entry"]].group == group) or row["entry"] == "ect":
            by_entry[row["entry"]].append(row)
    if len(by_entry) < 2:
        return
    print(f"### {head}, {images:,} images\n")
    print(
        "| entry | seeds | 1 step | 2 steps | 4 steps | 8 steps | seconds | peak MiB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for entry in sorted(by_entry, key=lambda e: list(ENTRIES).index(e)):
        for weights in (None, *ENTRIES[entry].weights):
            print(line(entry, weights, by_entry[entry]))
    print()


def line(entry: str, weights: str | None, rows: list[dict[str, Any]]) -> str:
    cells = [
        cell([r for row in rows for r in row["rows"] if r["steps"] == n and r.get("weights") == weights]) for n in STEPS
    ]
    seconds = statistics.mean(row["seconds"] for row in rows)
    peak = max((row["peak"] for row in rows if "peak" in row), default=float("nan"))
    name = entry if weights is None else f"{entry}, {weights}"
    return f"| {name} | {len(rows)} | {' | '.join(cells)} | {seconds:.0f} | {peak:.0f} |"


def cell(rows: list[dict[str, Any]]) -> str:
    """Mean over the seeds, their range, and the mean half-width of the 95 % interval of one draw."""
    if not rows:
        return "-"
    values = [fd(row) for row in rows]
    half = statistics.mean((high - low) / 2 for low, high in (bounds(row) for row in rows))
    spread = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ± {half:.1f}"


def curves(rows: list[dict[str, Any]]) -> None:
    """Fréchet distance at one and two steps against the images seen, mean over the seeds."""
    if not rows:
        return
    print("### Curves\n\n| entry | images | 1 step | 2 steps |\n|---|---|---|---|")
    found: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        for point in row["curve"]:
            found[row["entry"], point["images"]] += point["rows"]
    for (entry, images), points in sorted(
        found.items(), key=lambda item: (list(ENTRIES).index(item[0][0]), item[0][1])
    ):
        cells = [cell([p for p in points if p["steps"] == n]) for n in (1, 2)]
        print(f"| {entry} | {images:,} | {' | '.join(cells)} |")
    print()


def fd(row: dict[str, Any]) -> float:
    return float(row["metrics"][name_of(row)])


def bounds(row: dict[str, Any]) -> tuple[float, float]:
    low, high = row["intervals"][name_of(row)]
    return float(low), float(high)


def interval(row: dict[str, Any]) -> str:
    low, high = bounds(row)
    return f"{low:.1f} to {high:.1f}"


def name_of(row: dict[str, Any]) -> str:
    return next(name for name in row["metrics"] if name.startswith("FD-"))
