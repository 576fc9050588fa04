"""The tables and the figure of bench/quality.py."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def seconds_to(rows: Rows, goal: float, steps: str, clock: str) -> tuple[str, float]:
    """When a run's distance first falls to ``goal``: ``("=", seconds)``, between two measurements on a log scale.

    ``("<", seconds)`` where it is below before training, ``(">", seconds)`` where the run never gets there.
    """
    before: dict[str, Any] | None = None
    for row in rows:
        if row[steps] <= goal:
            if before is None:
                return "<", row[clock]
            if before[steps] == row[steps]:
                return "=", row[clock]
            share = math.log(before[steps] / goal) / math.log(before[steps] / row[steps])
            return "=", before[clock] + share * (row[clock] - before[clock])
        before = row
    return ">", rows[-1][clock]


def of_runs(rows: Rows) -> dict[str, dict[int, Rows]]:
    """Recipe -> seed -> rows in the order of training."""
    found: dict[str, dict[int, Rows]] = {}
    for row in sorted(rows, key=lambda r: r["images"]):
        found.setdefault(row["recipe"], {}).setdefault(row["seed"], []).append(row)
    return found


def print_tables(rows: Rows, about: dict[str, Any]) -> None:
    """Where every recipe ends, and how soon ours are where the published ones end."""
    runs = of_runs(rows)
    print(f"\n{about['machine']}, {about['threads']} thread(s), torch {about['torch']}, {about['date']}")
    print("\n| recipe | seeds | images | 1 step | 2 steps | images/s | seconds | processor seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seeds in runs.items():
        ends = [run[-1] for run in seeds.values()]
        wall, cpu = (statistics.median(end[key] for end in ends) for key in ("wall", "cpu"))
        print(
            f"| {name} | {len(ends)} | {ends[0]['images']:,} | {_range(ends, '1')} | {_range(ends, '2')} "
            f"| {ends[0]['images'] / wall:.0f} | {wall:.0f} | {cpu:.0f} |"
        )
    print("\n| to the final FD of | steps | FD, by seed | its s | ours | our s, by seed | ratio, by seed | cpu ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for baseline in (name for name in runs if name.startswith("published")):
        for ours in (name for name in runs if name.startswith("ours")):
            for steps in ("1", "2"):
                _compare(runs, baseline, ours, steps)


def _compare(runs: dict[str, dict[int, Rows]], baseline: str, ours: str, steps: str) -> None:
    """A row: seed by seed, when ``ours`` is where ``baseline`` ends."""
    seeds = [seed for seed in runs[baseline] if seed in runs[ours]]
    if not seeds:
        return
    goals = {seed: runs[baseline][seed][-1][steps] for seed in seeds}
    cells = [baseline, steps, ", ".join(f"{goal:.1f}" for goal in goals.values())]
    ratios = []
    for clock in ("wall", "cpu"):
        theirs, mine = (
            [seconds_to(runs[name][seed], goal, steps, clock) for seed, goal in goals.items()]
            for name in (baseline, ours)
        )
        if clock == "wall":
            cells += [", ".join(map(_when, theirs)), ours, ", ".join(map(_when, mine))]
        ratios.append(", ".join(_ratio(a, b) for a, b in zip(theirs, mine, strict=True)))
    print(f"| {' | '.join([*cells, *ratios])} |")


def _ratio(theirs: tuple[str, float], ours: tuple[str, float]) -> str:
    """Their seconds over ours; at most that where ours never got there."""
    if "<" in (theirs[0], ours[0]):
        return "-"
    return f"{'< ' if ours[0] == '>' else ''}{theirs[1] / ours[1]:.2f}"


def _when(found: tuple[str, float]) -> str:
    if found[0] == "<":
        return "the teacher is there"
    return f"{found[0].replace('=', '')}{found[1]:.1f}"


def _range(rows: Rows, key: str) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def draw(rows: Rows, about: dict[str, Any], path: Path) -> None:
    """Distance against seconds of training, one line per seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    clock = "cpu" if about["device"] == "cpu" else "wall"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for axis, steps in zip(axes, ("1", "2"), strict=True):
        for k, (name, seeds) in enumerate(of_runs(rows).items()):
            for first, run in enumerate(seeds.values()):
                axis.plot([r[clock] for r in run], [r[steps] for r in run], color=f"C{k}", marker=".", linewidth=1.2,
                          label=name if first == 0 else None)  # fmt: skip
        axis.set(yscale="log", title=f"{steps} step{'s' if steps == '2' else ''}",
                 xlabel="processor seconds of training" if clock == "cpu" else "seconds of training")  # fmt: skip
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel("FD-FashionNet16-1k")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{about['machine']}, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=130)
