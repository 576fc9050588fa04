"""Tables (Markdown, printed) and picture of what bench/precision.py measured.

python bench/precision_plot.py --rows docs/precision-rows.jsonl --out docs/precision.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from fewstep.training.arithmetic import BF16_UP_TO, FP16_UP_TO

Row = dict[str, Any]
KINDS = {"bf16": "C3", "bf16+edges": "C1", "fp16": "C0", "fp16+edges": "C9", "tf32": "C2", "fp32": "C7"}
ORDER = (
    "fp32", "tf32", "fp16", "fp16+edges", "fp16+edges, norms 16", "bf16", "bf16+edges", "bf16+edges, norms 16",
    "bf16-cpu", "bf16-cpu+edges", "bf16-cpu+edges, norms 16",
)  # fmt: skip
STYLES = ("-", "--", ":", "-.")
CRITERION = 0.15
"""Largest error of the gradient, in units of its spread from batch to batch: 2 % more variance."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    for net in nets(rows):
        print_gradients(rows, net)
    print_curves(rows)
    if arguments.out:
        draw(rows, arguments.out)


def nets(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(r["net"] for r in rows if r["part"] == "gradient"))


def gradients(rows: list[Row], net: str) -> list[Row]:
    return [r for r in rows if r["part"] == "gradient" and r["net"] == net]


def print_gradients(rows: list[Row], net: str) -> None:
    """Two tables, one line per (q, stage, c): the gradient alone, then as training sees it."""
    found = gradients(rows, net)
    size = f"{found[0]['parameters'] / 1e6:.2f} M parameters, {found[0]['batches']} batches of {found[0]['batch']}"
    print_table(found, f"{net}, {size}: relative error of the gradient, and cosine",
                lambda r: f"{percent(r['error'])} {digits(r['cosine'])}")  # fmt: skip
    print_table(found, f"{net}: error of the gradient / its spread, and median error of a sample's loss",
                lambda r: f"{percent(r['error_to_spread'])} ({percent(r['loss_error'])})")  # fmt: skip


def print_table(found: list[Row], title: str, cell: Callable[[Row], str]) -> None:
    cases = list(dict.fromkeys((r["q"], r["stage"], r["c"], r["ratio"]) for r in found))
    kinds = [kind for kind in ORDER if any(r["kind"] == kind for r in found)]
    print(f"\n{title}\n\n| q, stage: q^a | gap/output | spread/norm | " + " | ".join(kinds) + " |")
    print("|---" * (3 + len(kinds)) + "|")
    for q, stage, c, ratio in sorted(cases):
        here = {r["kind"]: r for r in found if (r["q"], r["stage"], r["c"]) == (q, stage, c)}
        first = next(iter(here.values()))
        name = f"{q:g}, {stage}: {ratio:g}" + (f", c = {c:g}" if c else "")
        cells = [cell(here[k]) if k in here else "-" for k in kinds]
        relative = f"{first['spread'] / first['norm']:.2g}" if first["norm"] else "-"
        print(f"| {name} | {percent(first['gap'])} | {relative} | " + " | ".join(cells) + " |")


def percent(value: float) -> str:
    """Two digits, as a power of ten below 0.005 %."""
    if value < 5e-5:
        return f"{value:.0e}"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def digits(cosine: float) -> str:
    """A cosine up to the second digit that is not a 9."""
    nines = 0 if cosine < 0.9 else min(int(-math.log10(max(1 - cosine, 1e-9))), 6)
    return "1" if nines == 6 else f"{cosine:.{max(nines + 1, 2)}f}".removeprefix("0")


def print_curves(rows: list[Row]) -> None:
    """Loss per 100 steps of the fp32 run, the others as difference from it, in percent."""
    for net, lr in dict.fromkeys((r["net"], r["lr"]) for r in rows if r["part"] == "curve"):
        found = {r["mode"]: r for r in rows if r["part"] == "curve" and (r["net"], r["lr"]) == (net, lr)}
        base = found["fp32"]
        columns = [f"{100 * (k + 1)}" for k in range(len(base["losses"]))]
        finals = [f"final at {q}" for q in base["final"]]
        print(f"\n{net}, batch {base['batch']}, learning rate {lr:g}, mean loss of the 100 steps that end at\n")
        print(
            "| mode | " + " | ".join(columns + finals) + " | skipped |\n" + "|---" * (2 + len(columns + finals)) + "|"
        )
        for mode, r in found.items():
            reached = dict(zip(columns, r["losses"], strict=False)) | {
                f"final at {q}": v for q, v in r["final"].items()
            }
            first = dict(zip(columns, base["losses"], strict=True)) | {
                f"final at {q}": v for q, v in base["final"].items()
            }
            cells = [
                "-" if c not in reached else f"{v:.3f}" if mode == "fp32" else f"{100 * (reached[c] / v - 1):+.2f} %"
                for c, v in first.items()
            ]
            print(f"| {mode} | " + " | ".join(cells) + f" | {r['skipped']} |")


def draw(rows: list[Row], out: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    draw_errors(left, rows)
    draw_theory(middle, rows)
    draw_curves(right, rows)
    figure.savefig(out, dpi=120)


def draw_errors(axes: Any, rows: list[Row]) -> None:
    """Against q^a, q = 2 and unit-norm distance; one line per network and arithmetic."""
    for net, style in zip(nets(rows), STYLES, strict=False):
        for kind, color in KINDS.items():
            chosen = [r for r in gradients(rows, net) if (r["kind"], r["q"], r["c"]) == (kind, 2, 0)]
            line = sorted((r["ratio"], r["error_to_spread"]) for r in chosen)
            if line:
                x, y = zip(*line, strict=True)
                label = kind if style == STYLES[0] else None
                axes.plot(x, y, style, color=color, marker="o", markersize=3, label=label)
    for limit, text in ((BF16_UP_TO, "auto: bf16 up to here"), (FP16_UP_TO, "auto: fp16 up to here")):
        axes.axvline(limit, color="0.6", linewidth=1)
        axes.annotate(text, (limit, 2e-5), rotation=90, fontsize=8, color="0.35", ha="right", va="bottom")
    axes.axhline(CRITERION, color="0.6", linestyle=":", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="q^a",
        title="Error of the gradient / its spread from batch to batch",
        ylim=(2e-6, 1),
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**k for k in range(1, 9)], [str(2**k) for k in range(1, 9)])
    names = ", ".join(f"{net} {style}" for net, style in zip(nets(rows)[:2], STYLES, strict=False))
    axes.legend(fontsize=7, ncols=3, loc="center", bbox_to_anchor=(0.5, 0.46), title=names, title_fontsize=8)


def draw_theory(axes: Any, rows: list[Row]) -> None:
    """Error of the gap f(x_t) - f(x_r): measured against sqrt(2) x error of one output / gap."""
    for net, marker in zip(nets(rows), "os^v", strict=False):
        for kind, color in KINDS.items():
            chosen = [r for r in gradients(rows, net) if r["kind"] == kind and r["c"] == 0]
            x, y = [r["predicted_gap_error"] for r in chosen], [r["gap_error"] for r in chosen]
            axes.scatter(x, y, s=16, marker=marker, color=color, label=kind if marker == "o" else None)
    axes.plot((1e-7, 10), (1e-7, 10), color="0.6", linewidth=1)
    title = "Median error of f(x_t) - f(x_r): theory and measurement"
    axes.set(xscale="log", yscale="log", xlabel="sqrt(2) x error of f / gap", ylabel="measured", title=title)
    axes.legend(fontsize=7, loc="upper left", title=", ".join(nets(rows)), title_fontsize=7)


def draw_curves(axes: Any, rows: list[Row]) -> None:
    """Loss relative to the fp32 run; a style per learning rate."""
    curves = [r for r in rows if r["part"] == "curve"]
    axes.axhspan(-1, 1, color="0.92")
    for lr, style in zip(sorted({r["lr"] for r in curves}), STYLES, strict=False):
        found = {r["mode"]: r for r in curves if r["lr"] == lr}
        base = found.pop("fp32")["losses"]
        for k, (mode, r) in enumerate(sorted(found.items())):
            difference = [100 * (a / b - 1) for a, b in zip(r["losses"], base, strict=False)]
            steps = [100 * (j + 1) for j in range(len(difference))]
            axes.plot(steps, difference, style, color=f"C{k}", marker="o", markersize=3, label=f"{mode}, lr {lr:g}")
    axes.set(xlabel="steps", ylabel="%", title="Mean loss of 100 steps, relative to fp32 (band: 1 %)")
    axes.set_yscale("symlog", linthresh=1)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
