"""EDM2's layers and network against the numbers of the peer's own code (shared/golden/edm2.npz)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import EDM, Denoiser, Parametrization
from fewstep.backbones.edm2 import EDM2
from fewstep.backbones.edm2_layers import mp_cat, mp_silu, mp_sum, normalize
from fewstep.backbones.edm_layers import Resample
from fewstep.training.network import after_step

cases = pytest.mark.parametrize("name", ["uncond", "cond"])


@cache
def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture
def arrays(shared: Path) -> dict[str, np.ndarray]:
    path = shared / "golden" / "edm2.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    return load(path)


class Golden:
    """One case: the network with the peer's weights, its inputs and the peer's outputs."""

    def __init__(self, arrays: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> None:
        self.arrays, self.name, self.dtype = arrays, name, dtype
        kwargs = json.loads(str(arrays[f"{name}/kwargs_json"]))
        assert kwargs.pop("use_fp16") is False
        self.net = EDM2(**kwargs).to(dtype)
        head = f"{name}/w/"
        weights = {key[len(head) :]: value for key, value in arrays.items() if key.startswith(head)}
        self.net.load_state_dict({k: torch.from_numpy(v).to(dtype) for k, v in weights.items()}, strict=True)
        self.model = Denoiser(
            self.net, EDM(), Parametrization("edm"), sample_shape=(3, 8, 8), num_classes=kwargs["label_dim"]
        )
        self.x, self.sigma, self.cond = self.given("x"), self.given("sigma"), self.given("class_labels")
        self.noisy = self.x * (self.sigma[:, None, None, None] ** 2 + 0.25).sqrt()

    def given(self, what: str) -> Any:
        value = self.arrays.get(f"{self.name}/{what}")
        return None if value is None else torch.from_numpy(value).to(self.dtype)

    def peer(self, what: str, precision: str = "f64") -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[f"{self.name}/{what}_{precision}"]))

    def train(self) -> Golden:
        """Training mode as the trainer makes it: weights normalised once, outside of any forward pass."""
        after_step(self.model)
        self.model.train()
        return self

    def outputs(self) -> dict[str, Tensor]:
        """D at the noisy input and the log-variance."""
        c_noise = self.sigma.log() / 4
        return {
            "D": self.model(self.noisy, self.sigma, self.cond),
            "logvar": self.net.logvar(c_noise)[:, None, None, None],
        }

    def gradient_norms(self) -> Tensor:
        """Of ``mean(D x) + mean(logvar)``, in the peer's order."""
        self.net.zero_grad()
        out = self.outputs()
        ((out["D"] * self.x).mean() + out["logvar"].mean()).backward()
        found = {name: p.grad for name, p in self.net.named_parameters()}
        order = [str(name) for name in self.arrays[f"{self.name}/grad_names"]]
        assert sorted(found) == sorted(order)
        return torch.stack([found[name].norm() for name in order])  # type: ignore[union-attr]

    def flat(self) -> Tensor:
        """All parameters in the peer's order."""
        named = dict(self.net.named_parameters())
        order = [str(name) for name in self.arrays[f"{self.name}/grad_names"]]
        return torch.cat([named[name].detach().flatten() for name in order])


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.double()
    return float((got - want).abs().max() / want.abs().max())


@cases
def test_evaluation_in_float64(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float64)
    case.model.eval()
    raw = case.net(case.x, case.sigma.log() / 4, case.cond)
    assert raw.dtype == torch.float64
    assert relative_error(raw, case.peer("F_eval")) < 1e-9
    out = case.outputs()
    assert relative_error(out["logvar"], case.peer("logvar_eval")) < 1e-9
    for got, want in zip(out["D"], case.peer("D_eval"), strict=True):  # each noise level to its own scale
        assert relative_error(got, want) < 1e-9


@cases
def test_training_in_float64_is_after_step_and_a_forward_pass_that_writes_nothing(
    arrays: dict[str, np.ndarray], name: str
) -> None:
    case = Golden(arrays, name, torch.float64).train()
    want = case.peer("weights_after_train_forward")
    assert relative_error(case.flat(), want) < 1e-12
    for what, got in case.outputs().items():
        assert relative_error(got, case.peer(f"{what}_train")) < 1e-9
        assert relative_error(got, case.peer(f"{what}_eval")) > 1e-6  # so that the test can tell the modes apart
    assert relative_error(case.flat(), want) < 1e-12


@cases
def test_gradients_in_float64(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float64).train()
    got, want = case.gradient_norms(), case.peer("grad_norms")
    assert ((got - want).abs() <= 1e-7 * want).all()
    assert relative_error(got.norm(), case.peer("grad_total_norm")) < 1e-7


@cases
def test_float32_error_is_at_most_ten_times_the_peers(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float32)
    case.model.eval()
    found = {"F_eval": case.net(case.x, case.sigma.log() / 4, case.cond)}
    found |= {f"{what}_eval": got for what, got in case.outputs().items()}
    case.train()
    found |= {f"{what}_train": got for what, got in case.outputs().items()}
    found |= {"grad_norms": case.gradient_norms(), "weights_after_train_forward": case.flat()}
    for what, got in found.items():
        exact = case.peer(what)
        own = (case.peer(what, "f32").double() - exact).abs().max()
        assert (got.detach().double() - exact).abs().max() <= 10 * own, what


def test_parts(arrays: dict[str, np.ndarray]) -> None:
    part = {key.removeprefix("parts/"): torch.from_numpy(v) for key, v in arrays.items() if key.startswith("parts/")}
    a, b = part.pop("a"), part.pop("b")
    found = {
        "mp_silu_f64": mp_silu(a),
        "mp_sum_0.3_f64": mp_sum(a, b, 0.3),
        "mp_cat_0.6_f64": mp_cat(a, b[:, :3], 0.6),
        "resample_up_f64": Resample((1, 1), "up")(a),
        "resample_down_f64": Resample((1, 1), "down")(a),
        "normalize_pixel_f64": normalize(a, dim=1),
        "normalize_weight_f64": normalize(a),
    }
    assert found.keys() == part.keys()
    for what, got in found.items():
        torch.testing.assert_close(got, part[what], rtol=1e-9, atol=1e-12, msg=what)
