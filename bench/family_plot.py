"""The figure of docs/family.md: quality against steps, and against images.

python bench/family_plot.py --work work --out docs/family.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from family_table import STEPS, fd
from matplotlib import pyplot as plt

SHOWN = ("ect", "mid", "cd", "ecd-heun", "tcm", "multistep-dial-heun", "meanflow")
STARTS = ("warm-progressive", "warm-immediate", "cold-progressive", "cold-immediate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=25_600)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.work / "rows.jsonl").read_text().splitlines()]
    teacher = {r["nfe"]: fd(r) for row in rows if row["entry"] == "teacher" for r in row["rows"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_steps(left, [row for row in rows if row["images"] == arguments.images], teacher)
    draw_curves(right, rows)
    figure.savefig(arguments.out, dpi=130)


def draw_steps(axes: Any, rows: list[dict[str, Any]], teacher: dict[int, float]) -> None:
    """Mean over the seeds, and the range of the seeds as a band."""
    for entry in SHOWN:
        found = {
            n: [fd(r) for row in rows if row["entry"] == entry for r in row["rows"] if r["steps"] == n] for n in STEPS
        }
        steps = [n for n in STEPS if found[n]]
        if steps:
            (line,) = axes.plot(steps, [statistics.mean(found[n]) for n in steps], marker="o", label=entry)
            low, high = ([bound(found[n]) for n in steps] for bound in (min, max))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    for nfe, value in teacher.items():
        axes.axhline(value, color="0.5", linestyle=":", linewidth=1)
        axes.annotate(f"teacher, {nfe} evaluations", (4.2, value), fontsize=8, color="0.35", va="bottom")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="FD-FashionNet16-1k", title="Equal images")
    axes.set_xticks(STEPS, [str(n) for n in STEPS])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper right")


def draw_curves(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One step (solid) and two steps (dashed) against the images seen, mean over the seeds."""
    for k, entry in enumerate(STARTS):
        points: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            for point in row.get("curve", []) if row["entry"] == entry else []:
                for r in point["rows"]:
                    points.setdefault((r["steps"], point["images"]), []).append(fd(r))
        for steps, style in ((1, "-"), (2, "--")):
            x = sorted(images for n, images in points if n == steps)
            y = [statistics.mean(points[steps, images]) for images in x]
            axes.plot(x, y, style, color=f"C{k}", marker="o", label=entry if steps == 1 else None)
    axes.set(yscale="log", xlabel="training images", title="Cold or warm start: 1 step, 2 steps (dashed)")
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
