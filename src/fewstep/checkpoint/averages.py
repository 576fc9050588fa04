"""Snapshots of power-function averages, kept for the whole run, and any other width rebuilt from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fewstep.checkpoint.store import header, new_directory, read_json, read_tensors, write_json, write_tensors
from fewstep.ema import posthoc_coefficients, reconstruct
from fewstep.errors import CheckpointError

KIND = "fewstep-averages"


def save_averages(run: Path, images_seen: int, averages: Mapping[float, dict[str, Tensor]]) -> None:
    """Keep the power-function averages of this moment: ``averages/images-XXXXXXXXX/std-0.050.safetensors``.

    Args:
        averages: relative width sigma_rel -> weights.
    """
    if not averages or images_seen == 0:
        return
    with new_directory(run / "averages" / f"images-{images_seen:09d}") as directory:
        for std, weights in averages.items():
            write_tensors(directory / _file(std), weights)
        write_json(directory / "averages.json", header(KIND) | {"images_seen": images_seen, "stds": sorted(averages)})


def rebuild_average(run: Path, std: float) -> dict[str, Tensor]:
    """Weights averaged with the relative width ``std`` up to the newest snapshot (EDM2 algorithm 3; math.md 5).

    Raises:
        CheckpointError: there are fewer than two snapshots, or ``std`` is outside of the stored widths, where the
            reconstruction is not to be trusted.
    """
    ends, stds, files = [], [], []
    for directory in sorted((run / "averages").glob("images-*")):
        record = read_json(directory / "averages.json", KIND)
        for width in record["stds"]:
            ends.append(float(record["images_seen"]))
            stds.append(float(width))
            files.append(directory / _file(width))
    if len(files) < 2:
        raise CheckpointError(
            f"'{run}' has too few snapshots of power-function averages to rebuild another",
            got=len(files),
            want="at least two",
            do="Tune with --set emas='[{kind: power, std: 0.05}, {kind: power, std: 0.1}]'",
        )
    if not min(stds) <= std <= max(stds):
        raise CheckpointError(
            "The average cannot be rebuilt safely at this width", got=std, want=f"{min(stds)} to {max(stds)}"
        )
    weights = posthoc_coefficients(ends, stds, max(ends), std)
    return reconstruct([read_tensors(file) for file in files], weights)


def _file(std: float) -> str:
    return f"std-{std:.3f}.safetensors"
