"""EMA arithmetic against NVlabs/edm2 and locuslab/ect's imgnet branch (shared/golden/ema.npz)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.ema import (
    AnyEMA,
    ConstantEMA,
    HalfLifeEMA,
    PowerEMA,
    gamma_to_std,
    posthoc_coefficients,
    reconstruct,
    std_to_gamma,
    update,
)

BATCH = 128
branches = pytest.mark.parametrize("branch", ["edm2", "imgnet"])


@pytest.fixture(scope="module")
def arrays(shared: Path) -> dict[str, np.ndarray]:
    path = shared / "golden" / "ema.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def track(ema: AnyEMA, start: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """The average after each step, ``[step, parameter]``."""
    average, out = torch.from_numpy(start.copy()), []
    for step, current in enumerate(sequence, start=1):
        update([average], [torch.from_numpy(current)], ema.decay(step * BATCH, BATCH))
        out.append(average.numpy().copy())
    return np.stack(out)


@branches
def test_exponents_and_widths(arrays: dict[str, np.ndarray], branch: str) -> None:
    stds, gammas = arrays[f"{branch}/stds"], arrays[f"{branch}/std_to_exp"]
    np.testing.assert_allclose([std_to_gamma(s) for s in stds], gammas, rtol=1e-9)
    np.testing.assert_allclose([gamma_to_std(g) for g in gammas], arrays[f"{branch}/exp_to_std_of_exp"], rtol=1e-9)


@branches
def test_betas(arrays: dict[str, np.ndarray], branch: str) -> None:
    got = [[PowerEMA(s).decay(int(n), BATCH) for n in arrays[f"{branch}/nimg"]] for s in arrays[f"{branch}/stds"]]
    np.testing.assert_allclose(got, arrays[f"{branch}/beta_batch128"], rtol=1e-9, atol=0)


@branches
def test_a_tracked_run(arrays: dict[str, np.ndarray], branch: str) -> None:
    want = arrays[f"{branch}/ema_seq"]
    for column, std in enumerate(arrays[f"{branch}/tracker_stds"]):
        got = track(PowerEMA(float(std)), arrays[f"{branch}/net_0"], arrays[f"{branch}/net_seq"])
        np.testing.assert_allclose(got, want[:, column], rtol=1e-9, atol=1e-12)


@branches
def test_posthoc_coefficients_and_reconstruction(arrays: dict[str, np.ndarray], branch: str) -> None:
    ends, stds = arrays[f"{branch}/posthoc_in_ofs"].tolist(), arrays[f"{branch}/posthoc_in_std"].tolist()
    tracked = arrays[f"{branch}/tracker_stds"].tolist()
    snapshots = [
        {"w": torch.from_numpy(arrays[f"{branch}/ema_seq"][int(end) // BATCH - 1, tracked.index(std)])}
        for end, std in zip(ends, stds, strict=True)
    ]
    for column, target in enumerate(arrays[f"{branch}/posthoc_out_std"].tolist()):
        got = posthoc_coefficients(ends, stds, float(arrays[f"{branch}/posthoc_out_ofs"]), target)
        np.testing.assert_allclose(got, arrays[f"{branch}/posthoc_coefs"][:, column], rtol=1e-9, atol=1e-12)
        weights = reconstruct(snapshots, got)["w"].numpy()
        np.testing.assert_allclose(weights, arrays[f"{branch}/posthoc_weights"][column], rtol=1e-9, atol=1e-12)


@branches
def test_the_traditional_average(arrays: dict[str, np.ndarray], branch: str) -> None:
    kwargs = json.loads(str(arrays[f"{branch}/traditional_kwargs_json"]))
    ema: AnyEMA = (
        ConstantEMA(kwargs["ema_beta"])
        if "ema_beta" in kwargs
        else HalfLifeEMA(kwargs["halflife_Mimg"] * 1e6, kwargs["rampup_ratio"])
    )
    got = track(ema, arrays[f"{branch}/traditional_net_0"], arrays[f"{branch}/traditional_net_seq"])
    np.testing.assert_allclose(got, arrays[f"{branch}/traditional_ema_seq"], rtol=1e-9, atol=1e-12)
