"""ECT's loss and gradient against the peer's (shared/golden/ect_loss_main.npz), in float64 and float32."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.backbones.edm import SongUNet
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.objectives import ECT
from fewstep.objectives.pairs import target_pass
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.times import Constant, Sigmoid, pair

STAGES = [(2, s) for s in range(6)] + [(4, s) for s in range(6)] + [(256, s) for s in range(2)]
CASES = [f"{a}/c{c}/q{q}/stage{s}" for a in ("const", "sigmoid") for c in ("0", "0.06") for q, s in STAGES]


@cache
def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture
def arrays(shared: Path) -> dict[str, np.ndarray]:
    path = shared / "golden" / "ect_loss_main.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    return load(path)


def network(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> Denoiser:
    """The peer's ECMPrecond network in training mode, under the EDM clock."""
    kwargs = json.loads(str(arrays["kwargs_json"]))
    assert kwargs.pop("model_type") == "SongUNet"
    channels = kwargs.pop("img_channels")
    net = SongUNet(in_channels=channels, out_channels=channels, **kwargs).to(dtype)
    head = "w/model."
    weights = {k[len(head) :]: torch.from_numpy(v).to(dtype) for k, v in arrays.items() if k.startswith(head)}
    net.load_state_dict(weights, strict=True)
    return Denoiser(net, EDM(), Parametrization(boundary_shift=0.003), sample_shape=(3, 8, 8)).train()


def settings(case: str) -> tuple[ECT, float]:
    adjust, c, q, stage = re.fullmatch(r"(\w+)/c([\d.]+)/q(\d+)/stage(\d+)", case).groups()  # type: ignore[union-attr]
    mapping = Constant() if adjust == "const" else Sigmoid(8.0, 1.0)
    return ECT(mapping=mapping, penalty=Penalty("pseudo_huber", "dt", float(c))), float(q) ** (int(stage) + 1)


def inputs(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_0 = torch.from_numpy(arrays["images_u8"]).to(dtype) / 127.5 - 1
    t = (2.0 * torch.from_numpy(arrays["rnd_normal"]).double().flatten() - 1.1).exp()
    return x_0, t, torch.from_numpy(arrays["eps"]).to(dtype)


def run(arrays: dict[str, np.ndarray], case: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Loss per sample, and gradients of its mean in the peer's order."""
    student = network(arrays, dtype)
    objective, ratio = settings(case)
    loss = objective.loss_at(student, *inputs(arrays, dtype), ratio)
    loss.mean().backward()
    grads = {f"model.{name}": p.grad for name, p in student.backbone.named_parameters()}
    order = [str(name) for name in arrays["grad_names"]]
    assert sorted(order) == sorted(grads)
    return loss.detach(), [grads[name].detach() for name in order]  # type: ignore[union-attr]


def worst(got: Tensor, want: np.ndarray) -> float:
    """Largest error relative to each entry."""
    expected = torch.from_numpy(np.asarray(want)).double()
    return float(((got.double() - expected).abs() / expected.abs().clamp_min(1e-300)).max())


def test_the_cases_are_all_there(arrays: dict[str, np.ndarray]) -> None:
    assert sorted(CASES) == sorted(k[: -len("/loss_f64")] for k in arrays if k.endswith("/loss_f64"))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_in_float64(arrays: dict[str, np.ndarray], case: str) -> None:
    loss, grads = run(arrays, case, torch.float64)
    want = torch.from_numpy(arrays[f"{case}/loss_f64"])
    # the peer's sqrt(s + c^2) - c cancels where s << c^2; ours does not: allow two roundings of c
    gap = torch.from_numpy(arrays[f"{case}/t_f64"] - arrays[f"{case}/r_f64"])
    cancelled = 2 * torch.finfo(torch.float64).eps * settings(case)[0].penalty.c / gap
    assert ((loss - want).abs() < 1e-9 * want + cancelled).all()
    norms = torch.stack([g.norm() for g in grads])
    assert worst(norms.square().sum().sqrt(), arrays[f"{case}/grad_norm_f64"]) < 1e-7
    want = torch.from_numpy(arrays[f"{case}/grad_norms_f64"])
    assert float((norms - want).abs().max() / want.max()) < 1e-7
    loud = want > 1e-9 * want.max()  # biases before a normalisation have gradient 0 up to rounding
    assert float(((norms - want).abs() / want)[loud].max()) < 1e-7
    if f"{case}/grad_f64" in arrays:
        flat, whole = torch.cat([g.flatten() for g in grads]), torch.from_numpy(arrays[f"{case}/grad_f64"])
        assert float((flat - whole).norm() / whole.norm()) < 1e-7


@pytest.mark.parametrize("stage", range(6))
def test_both_outputs_in_float64(arrays: dict[str, np.ndarray], stage: int) -> None:
    """D_t, and the target on rows with r > 0; on rows with r = 0 the target is the clean image."""
    case = f"sigmoid/c0/q2/stage{stage}"
    student = network(arrays, torch.float64)
    x_0, t, eps = inputs(arrays, torch.float64)
    r, _ = pair(Sigmoid(), t, 2.0 ** (stage + 1))
    assert float(((r - torch.from_numpy(arrays[f"{case}/r_f64"])) / t).abs().max()) < 1e-12
    out = student(x_0 + t[:, None, None, None] * eps, t).detach()
    want = torch.from_numpy(arrays[f"{case}/D_t_f64"])
    assert float((out - want).abs().max() / want.abs().max()) < 1e-9
    rows = (r > 0).nonzero()[:, 0]
    target = target_pass(student, x_0 + r[:, None, None, None].to(x_0.dtype) * eps, r, rows, None, None)
    want = torch.from_numpy(arrays[f"{case}/D_r_raw_f64"])
    assert float((target - want)[rows].abs().max() / want[rows].abs().max()) < 1e-9 if len(rows) else True
    clean = (r == 0).nonzero()[:, 0]
    assert torch.equal(target[clean], x_0[clean])


@pytest.mark.parametrize("case", [c for c in CASES if "c0/" in c])
def test_loss_in_float32_is_as_good_as_the_peers(arrays: dict[str, np.ndarray], case: str) -> None:
    """At most ten times the peer's own float32 error, as its README asks; the worst row of the batch."""
    loss, _ = run(arrays, case, torch.float32)
    exact = arrays[f"{case}/loss_f64"]
    own = np.abs(arrays[f"{case}/loss_f32"].astype(np.float64) - exact) / np.abs(exact)
    mine = np.abs(loss.double().numpy() - exact) / np.abs(exact)
    assert mine.max() <= 10 * max(own.max(), 1e-7)
