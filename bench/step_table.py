"""The file and the table of bench/step.py."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from step_parts import PIECES

SHORT = dict(zip(PIECES, ("stu", "tgt", "bwd", "opt", "san", "ema", "dat"), strict=True)) | {"rest": "rest"}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 25 % and 75 % quantile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def load_groups(path: Path | None) -> dict[str, dict[str, Any]]:
    """What was measured before."""
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def save_group(path: Path | None, key: str, group: dict[str, Any]) -> None:
    """Add a group to the file, at once."""
    if path is not None:
        whole = load_groups(path) | {key: group}
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(whole, indent=1) + "\n")
        temporary.replace(path)


def print_groups(groups: list[dict[str, Any]]) -> None:
    """A Markdown table per group."""
    for group in groups:
        rates = ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in group["matmul_flops"].items())
        where = f"{group['machine']}, {group['threads']} thread(s), torch {group['torch']}, {group['date']}"
        what = f"{group['net']} ({group['parameters'] / 1e6:.2f} M), batch {group['batch']}, q^a = {group['ratio']:g}"
        work = f"{group['target_share']:.0%} of rows with r > 0, {group['flops_per_image'] / 1e9:.3g} GFLOP per image"
        print(f"\n### {what}: {work}\n\n{where}; matrix product: {rates}\n")
        print("| step | images/s | ratio | images/cpu-s | cpu ratio | floor | peak GiB | split, % | cosine | error |")
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for row in group["rows"]:
            print(f"| {' | '.join(_cells(row))} |", flush=True)


def _cells(row: dict[str, Any]) -> list[str]:
    split, peak = row["split"], row["peak_bytes"]
    name = row["name"] if row["name"].split("+")[0] != "auto" else f"{row['name']} ({row['arithmetic']})"
    return [
        name,
        _three(row["images_per_second"], ".3g"),
        _three(row["ratio"], ".2f"),
        _three(row["images_per_processor_second"], ".3g"),
        _three(row["processor_ratio"], ".2f"),
        f"{row['floor_share']:.0%}",
        "-" if peak is None else f"{peak / 2**30:.2f}",
        "one graph" if split is None else " ".join(f"{SHORT[k]} {100 * v:.1f}" for k, v in split.items()),
        f"{row['cosine']:.6f}" if "cosine" in row else "-",
        f"{row['error']:.1e}" if "error" in row else "-",
    ]


def _three(value: tuple[float, float, float], form: str) -> str:
    """Median and quartiles."""
    middle, low, high = (f"{v:{form}}" for v in value)
    return f"{middle} [{low}, {high}]"
