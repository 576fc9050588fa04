"""Samplers against the peer's images (shared/golden/samplers.npz), in float64 and float32."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.backbones.edm import SongUNet
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.process import EDM
from fewstep.sampling import consistency_sample, heun_sample, karras_grid

HEUN = ["n5_churn0", "n5_churn10", "n18_churn0", "n18_churn10"]
CONSISTENCY = ["one", "two", "three"]
PRECISIONS = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def arrays(shared: Path) -> dict[str, np.ndarray]:
    path = shared / "golden" / "samplers.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def network(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> Denoiser:
    """ECMPrecond in eval mode: c_skip and c_out are shifted by 0.003."""
    kwargs = json.loads(str(arrays["kwargs_json"]))
    assert kwargs.pop("model_type") == "SongUNet"
    channels = kwargs.pop("img_channels")
    net = SongUNet(in_channels=channels, out_channels=channels, **kwargs).to(dtype)
    head = "w/model."
    weights = {k[len(head) :]: torch.from_numpy(v).to(dtype) for k, v in arrays.items() if k.startswith(head)}
    net.load_state_dict(weights, strict=True)
    return Denoiser(net, EDM(), Parametrization(boundary_shift=0.003), sample_shape=(3, 8, 8)).eval()


def given(arrays: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(arrays[name]).to(dtype)


def check(got: Tensor, arrays: dict[str, np.ndarray], name: str) -> None:
    """1e-9 of the largest pixel in float64; in float32 at most ten times the peer's own error."""
    exact = torch.from_numpy(arrays[f"{name}/images_f64"])
    scale = float(exact.abs().max())
    error = float((got.double() - exact).abs().max()) / scale
    own = float((torch.from_numpy(arrays[f"{name}/images_f32"]).double() - exact).abs().max()) / scale
    assert error < (1e-9 if got.dtype == torch.float64 else 10 * max(own, 1e-7))


@torch.no_grad()
@pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency(arrays: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> None:
    path = f"consistency/{name}"
    mid = arrays[f"{path}/mid_t"].tolist() if name != "one" else []
    noise = given(arrays, f"{path}/noise", dtype) if mid else torch.empty(0)
    latents = given(arrays, "latents", dtype)
    out = consistency_sample(network(arrays, dtype), latents, [80.0, *mid], lambda k: noise[k - 1])
    assert out.dtype == dtype
    check(out, arrays, path)


@torch.no_grad()
@pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("name", HEUN)
def test_heun(arrays: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> None:
    nodes, churn = (int(v) for v in re.fullmatch(r"n(\d+)_churn(\d+)", name).groups())  # type: ignore[union-attr]
    path = f"heun/{name}"
    stored = given(arrays, f"{path}/noise", dtype) if churn else torch.empty(0)
    grid = karras_grid(nodes, 0.002, 80.0, 7.0)
    churned = [k for k, t in enumerate(grid[:-1]) if 0.05 <= t <= 50]
    used = []

    def noise(k: int) -> Tensor:
        used.append(k)
        return stored[churned.index(k)]

    out = heun_sample(
        network(arrays, dtype),
        given(arrays, "latents", dtype),
        grid,
        noise,
        churn=float(churn),
        churn_range=(0.05, 50.0),
        churn_noise=1.003,
    )
    assert used == (churned if churn else [])
    assert len(used) == len(stored)
    check(out, arrays, path)


@torch.no_grad()
def test_the_boundary_shift_is_seen_by_the_images(arrays: dict[str, np.ndarray]) -> None:
    """Without the shift the peer's two-step images are missed by far more than the tolerance."""
    net = network(arrays, torch.float64)
    net = net.with_parametrization(replace(net.parametrization, boundary_shift=0.0))
    noise = given(arrays, "consistency/two/noise", torch.float64)
    out = consistency_sample(net, given(arrays, "latents", torch.float64), [80.0, 0.821], lambda k: noise[k - 1])
    assert float((out - torch.from_numpy(arrays["consistency/two/images_f64"])).abs().max()) > 1e-4
