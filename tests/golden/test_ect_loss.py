"""ECT's loss and gradient against the peer's two branches (shared/golden/ect_loss_*.npz), in float64 and float32."""

from __future__ import annotations

import json
import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.backbones.edm import SongUNet
from fewstep.backbones.edm2 import EDM2
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.objectives import ECT
from fewstep.objectives.base import ALONE, Beside
from fewstep.objectives.pairs import target_pass
from fewstep.penalty import Penalty, Weight, weigh
from fewstep.process import EDM
from fewstep.times import Constant, Sigmoid, pair
from fewstep.training import execution
from fewstep.training.network import after_step

STAGES = [(2, s) for s in range(6)] + [(4, s) for s in range(6)] + [(256, s) for s in range(2)]
CASES = [f"{a}/c{c}/q{q}/stage{s}" for a in ("const", "sigmoid") for c in ("0", "0.06") for q, s in STAGES]
WEIGHTS: dict[str, Weight] = {"main": "dt", "imgnet": "snrpk"}


@cache
def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


class Golden:
    """One branch of the peer: its network, its loss, its inputs and outputs."""

    def __init__(self, branch: str, arrays: dict[str, np.ndarray]) -> None:
        self.branch, self.arrays = branch, arrays

    def network(self, dtype: torch.dtype) -> Denoiser:
        """The peer's network in training mode under the EDM clock: main's ECMPrecond, imgnet's EDM2."""
        kwargs = json.loads(str(self.arrays["kwargs_json"]))
        classes = kwargs.get("label_dim", 0)
        if self.branch == "main":
            assert kwargs.pop("model_type") == "SongUNet"
            channels, shift, prefix = kwargs.pop("img_channels"), 0.003, "w/model."
            net: torch.nn.Module = SongUNet(in_channels=channels, out_channels=channels, **kwargs).to(dtype)
        else:
            assert kwargs.pop("use_fp16") is False
            net, shift, prefix = EDM2(logvar_channels=0, **kwargs).to(dtype), 0.0, "w/"
        named = {k[len(prefix) :]: torch.from_numpy(v).to(dtype) for k, v in self.arrays.items() if k.startswith("w/")}
        net.load_state_dict(named, strict=True)
        model = Denoiser(net, EDM(), Parametrization(boundary_shift=shift), sample_shape=(3, 8, 8), num_classes=classes)
        after_step(model)
        return model.train()

    def settings(self, case: str) -> tuple[ECT, float]:
        adjust, c, q, stage = re.fullmatch(r"(\w+)/c([\d.]+)/q(\d+)/stage(\d+)", case).groups()  # type: ignore[union-attr]
        mapping = Constant() if adjust == "const" else Sigmoid(8.0, 1.0)
        penalty = Penalty("pseudo_huber", WEIGHTS[self.branch], float(c))
        return ECT(mapping=mapping, penalty=penalty), float(q) ** (int(stage) + 1)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x_0 = torch.from_numpy(self.arrays["images_u8"]).to(dtype) / 127.5 - 1
        t = (2.0 * torch.from_numpy(self.arrays["rnd_normal"]).double().flatten() - 1.1).exp()
        return x_0, t, torch.from_numpy(self.arrays["eps"]).to(dtype)

    def labels(self, dtype: torch.dtype) -> Tensor | None:
        found = self.arrays.get("class_labels")
        return None if found is None else torch.from_numpy(found).to(dtype)

    def order(self, student: Denoiser) -> list[torch.nn.Parameter]:
        """The parameters in the peer's order."""
        prefix = "model." if self.branch == "main" else ""
        named = {prefix + name: p for name, p in student.backbone.named_parameters()}
        names = [str(name) for name in self.arrays["grad_names"]]
        assert sorted(names) == sorted(named)
        return [named[name] for name in names]

    def run(self, case: str, dtype: torch.dtype, beside: Beside = ALONE) -> tuple[Tensor, list[Tensor]]:
        """Loss per sample, and gradients of its mean in the peer's order."""
        student = self.network(dtype)
        objective, ratio = self.settings(case)
        before = [p.detach().clone() for p in student.parameters()]
        loss = objective.loss_at(student, *self.inputs(dtype), ratio, self.labels(dtype), beside=beside)
        loss.mean().backward()
        assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)), "weights changed"
        return loss.detach(), [p.grad.detach() for p in self.order(student)]  # type: ignore[union-attr]


@pytest.fixture(params=WEIGHTS)
def golden(shared: Path, request: pytest.FixtureRequest) -> Golden:
    path = shared / "golden" / f"ect_loss_{request.param}.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    return Golden(request.param, load(path))


def worst(got: Tensor, want: np.ndarray) -> float:
    """Largest error relative to each entry."""
    expected = torch.from_numpy(np.asarray(want)).double()
    return float(((got.double() - expected).abs() / expected.abs().clamp_min(1e-300)).max())


def test_the_cases_are_all_there(golden: Golden) -> None:
    assert sorted(CASES) == sorted(k[: -len("/loss_f64")] for k in golden.arrays if k.endswith("/loss_f64"))


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_in_float64(golden: Golden, case: str) -> None:
    compare(golden, case, *golden.run(case, torch.float64))


@pytest.mark.parametrize("case", [f"sigmoid/c0.06/q{q}/stage{s}" for q, s in ((2, 0), (2, 1), (2, 3), (256, 0))])
def test_the_compiled_path_in_float64(golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with padded rows (stages 0 and 1 have rows with r = 0), traced, differentiated and run without a code
    generator, which tests/integration/test_compile.py adds."""
    monkeypatch.setattr(execution, "compiled", partial(execution.compiled, backend="aot_eager"))
    compare(golden, case, *golden.run(case, torch.float64, Beside(execute=execution.Compiled())))


def compare(golden: Golden, case: str, loss: Tensor, grads: list[Tensor]) -> None:
    """Loss and gradients are the peer's."""
    arrays, (objective, _) = golden.arrays, golden.settings(case)
    want = torch.from_numpy(arrays[f"{case}/loss_f64"])
    # the peer's sqrt(s + c^2) - c cancels where s << c^2; ours does not: allow two roundings of c
    t, r = (torch.from_numpy(arrays[f"{case}/{name}_f64"]) for name in "tr")
    roundings = 2 * torch.finfo(torch.float64).eps * objective.penalty.c  # type: ignore[operator]
    assert ((loss - want).abs() < 1e-9 * want + roundings * weigh(WEIGHTS[golden.branch], t, t - r)).all()
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
def test_both_outputs_in_float64(golden: Golden, stage: int) -> None:
    """D_t, and the target on rows with r > 0; on rows with r = 0 the target is the clean image."""
    case = f"sigmoid/c0/q2/stage{stage}"
    student, labels = golden.network(torch.float64), golden.labels(torch.float64)
    x_0, t, eps = golden.inputs(torch.float64)
    r, _ = pair(Sigmoid(), t, 2.0 ** (stage + 1))
    assert float(((r - torch.from_numpy(golden.arrays[f"{case}/r_f64"])) / t).abs().max()) < 1e-12
    out = student(x_0 + t[:, None, None, None] * eps, t, labels).detach()
    want = torch.from_numpy(golden.arrays[f"{case}/D_t_f64"])
    assert float((out - want).abs().max() / want.abs().max()) < 1e-9
    rows = (r > 0).nonzero()[:, 0]
    target = target_pass(student, x_0 + r[:, None, None, None].to(x_0.dtype) * eps, r, rows, labels, None)
    want = torch.from_numpy(golden.arrays[f"{case}/D_r_raw_f64"])
    assert float((target - want)[rows].abs().max() / want[rows].abs().max()) < 1e-9 if len(rows) else True
    clean = (r == 0).nonzero()[:, 0]
    assert torch.equal(target[clean], x_0[clean])


@pytest.mark.parametrize("case", [c for c in CASES if "c0/" in c])
def test_loss_in_float32_is_as_good_as_the_peers(golden: Golden, case: str) -> None:
    """At most ten times the peer's own float32 error, as its README asks; the worst row of the batch."""
    loss, _ = golden.run(case, torch.float32)
    exact = golden.arrays[f"{case}/loss_f64"]
    own = np.abs(golden.arrays[f"{case}/loss_f32"].astype(np.float64) - exact) / np.abs(exact)
    mine = np.abs(loss.double().numpy() - exact) / np.abs(exact)
    assert mine.max() <= 10 * max(own.max(), 1e-7)


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_the_weights_of_edm2_are_those_after_the_peers_student_pass(shared: Path, precision: str) -> None:
    """The peer's student pass normalises the weights and its target pass does not; here `after_step` did."""
    golden = Golden("imgnet", load(shared / "golden" / "ect_loss_imgnet.npz"))
    student = golden.network(torch.float64 if precision == "f64" else torch.float32)
    norms = torch.stack([p.detach().norm() for p in golden.order(student)])
    for case in CASES:
        want = golden.arrays[f"{case}/weights_after_norms_{precision}"]
        assert worst(norms, want) < (1e-12 if precision == "f64" else 1e-6)
