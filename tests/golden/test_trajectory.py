"""A training run of the peer, step by step (shared/golden/trajectory.npz): RAdam, gradient guard, EMA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import ema
from fewstep.backbones.edm import SongUNet
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.objectives import ECT
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.times import Sigmoid


@pytest.fixture(scope="module")
def arrays(shared: Path) -> dict[str, np.ndarray]:
    path = shared / "golden" / "trajectory.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def start(arrays: dict[str, np.ndarray]) -> Denoiser:
    kwargs = json.loads(str(arrays["kwargs_json"]))
    assert kwargs.pop("model_type") == "SongUNet"
    channels = kwargs.pop("img_channels")
    net = SongUNet(in_channels=channels, out_channels=channels, **kwargs).double()
    head = "w0/model."
    weights = {k[len(head) :]: torch.from_numpy(v).double() for k, v in arrays.items() if k.startswith(head)}
    net.load_state_dict(weights, strict=True)
    return Denoiser(net, EDM(), Parametrization(), sample_shape=(3, 8, 8)).train()


def flat(denoiser: Denoiser, order: list[str]) -> Tensor:
    named = {f"model.{name}": p.detach() for name, p in denoiser.backbone.named_parameters()}
    assert sorted(named) == sorted(order)
    return torch.cat([named[name].flatten() for name in order])


def guard(denoiser: Denoiser) -> Tensor:
    """The peer's ``nan_to_num(0, 1e5, -1e5)`` on every gradient; returns the total norm."""
    grads = [p.grad for p in denoiser.backbone.parameters()]
    for grad in grads:
        torch.nan_to_num(grad, nan=0.0, posinf=1e5, neginf=-1e5, out=grad)  # type: ignore[arg-type]
    return torch.stack([g.norm() for g in grads]).norm()  # type: ignore[union-attr]


def test_the_whole_run(arrays: dict[str, np.ndarray]) -> None:
    hyper = json.loads(str(arrays["hyper_json"]))
    order = [str(name) for name in arrays["parameter_names"]]
    student = start(arrays)
    average, keep = student.clone(), ema.ConstantEMA(hyper["ema_beta"])
    optimiser = torch.optim.RAdam(student.parameters(), lr=hyper["lr"], betas=tuple(hyper["betas"]), eps=hyper["eps"])
    objective = ECT(mapping=Sigmoid(hyper["k"], hyper["b"]), penalty=Penalty("pseudo_huber", "dt", hyper["c"]))
    losses, norms = [], []
    for step, stage in enumerate(hyper["stages"]):
        x_0 = torch.from_numpy(arrays["images_u8"][step]).double() / 127.5 - 1
        eps = torch.from_numpy(arrays["eps"][step]).double()
        t = (2.0 * torch.from_numpy(arrays["rnd_normal"][step]).double().flatten() - 1.1).exp()
        optimiser.zero_grad()
        loss = objective.loss_at(student, x_0, t, eps, hyper["q"] ** (stage + 1))
        loss.mean().backward()
        losses.append(loss.detach())
        norms.append(guard(student))
        optimiser.step()
        ema.update(average.parameters(), student.parameters(), keep.decay((step + 1) * len(x_0), len(x_0)))

    def error(got: Tensor, want: np.ndarray) -> float:
        expected = torch.from_numpy(want)
        return float((got - expected).abs().max() / expected.abs().max())

    got, want = torch.stack(losses), torch.from_numpy(arrays["run/losses_f64"])
    assert float(((got - want) / want).abs().max()) < 1e-9
    assert error(torch.stack(norms), arrays["run/grad_norms_f64"]) < 1e-7
    assert error(flat(student, order), arrays["run/w_final_f64"]) < 1e-9
    assert error(flat(average, order), arrays["run/ema_final_f64"]) < 1e-9
    moved = flat(student, order) - flat(start(arrays), order)
    peers = torch.from_numpy(arrays["run/w_final_f64"]) - flat(start(arrays), order)
    assert float((moved - peers).norm() / peers.norm()) < 1e-9
