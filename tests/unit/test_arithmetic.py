"""Which arithmetic a step runs in, and fp16's loss scaling: overflows skip the step on the device and are counted."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep import Denoiser
from fewstep import arithmetic as module
from fewstep.arithmetic import Arithmetic, rounding
from fewstep.backbones import build
from fewstep.data import open_source
from fewstep.denoiser import Parametrization
from fewstep.errors import NonFiniteError
from fewstep.objectives import CMT, ECT, TCM, Diffusion, Multistep, Sequence
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.recipes import RECIPES
from fewstep.times import Stages
from fewstep.training.arithmetic import Scaling, arithmetic
from fewstep.training.config import OptimConfig, Precision, RunConfig
from fewstep.training.optim import rectified, steps_taken
from fewstep.training.state import restore_state, save_state
from fewstep.training.trainer import Trainer
from fewstep.types import Progress
from fewstep.world import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def student(width: int = 32) -> Denoiser:
    torch.manual_seed(0)
    spec = {"name": "mlp", "kwargs": {"sample_shape": [2], "width": width, "depth": 2}}
    net = Denoiser(build(spec), EDM(), Parametrization(), sample_shape=(2,), spec=spec)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def config(precision: Precision, **changes: object) -> RunConfig:
    objective = ECT(schedule=Stages(q=2.0, images=128, last=6), penalty=Penalty("pseudo_huber", "dt", c=0.01))
    optim = OptimConfig(name="adam", lr=1e-3)
    whole = replace(RECIPES["points"], images=1024, batch_size=64, objective=objective, optim=optim)
    return replace(whole, precision=precision, **changes)  # type: ignore[arg-type]


def trainer(settings: RunConfig) -> Trainer:
    return Trainer(settings, student(), open_source("gaussians8"), World(0, 1, CPU))


def weights(made: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in made.student.parameters()]


@pytest.mark.parametrize(
    ("tightness", "cpu", "ampere", "turing"),
    [
        (1.0, "bf16", "bf16", "fp16"),
        (16.0, "bf16", "bf16", "fp16"),
        (32.0, "fp32", "fp16", "fp16"),
        (256.0, "fp32", "fp16", "fp16"),
        (512.0, "fp32", "fp32", "fp32"),
        (None, "fp32", "tf32", "fp32"),
    ],
)
def test_the_rule(monkeypatch: pytest.MonkeyPatch, tightness: float | None, cpu: str, ampere: str, turing: str) -> None:
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    for amx, avx in itertools.product((False, True), repeat=2):
        for unit, has in zip(units, (amx, avx), strict=True):
            monkeypatch.setattr(torch.cpu, unit, lambda has=has: has)
        assert arithmetic("auto", tightness, CPU) == (cpu if amx or avx else "fp32")
    for capability, want in (((9, 0), ampere), ((8, 0), ampere), ((7, 5), turing)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert arithmetic("auto", tightness, CUDA) == want


def test_what_is_asked_for_is_what_runs() -> None:
    for kind in ("fp32", "tf32", "fp16", "bf16"):
        assert arithmetic(kind, 1.0, CUDA) == kind
    assert arithmetic("tf32", 1.0, CPU) == "fp32"
    assert arithmetic("bf16", 1e6, CPU) == "bf16"


def test_how_tight_an_objective_is() -> None:
    stages = Stages(q=2.0, images=100, last=7)
    early, late = Progress(0, 1000), Progress(250, 1000)
    assert [ECT(schedule=stages).tightness(p) for p in (early, late)] == [2, 8]
    assert [TCM(schedule=stages).tightness(p) for p in (early, late)] == [2, 8]
    assert Diffusion().tightness(late) == CMT().tightness(late) == 1
    assert Multistep().tightness(early) == 64
    both = Sequence(first=CMT(), then=ECT(schedule=stages), share=0.5)
    assert [both.tightness(Progress(n, 1000)) for n in (0, 499, 500, 600)] == [1, 1, 2, 4]


def test_the_target_pass_leaves_the_student_its_gradient() -> None:
    """Both in one autocast, the student first: its weights are rounded with gradient, and the target finds them."""
    net, x = student(), torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    t, found = torch.full((8,), 0.5), {}
    for kind in ("fp32", "bf16"):
        with rounding(kind, CPU, (2,)):  # type: ignore[arg-type]
            out = net(x, t)
            with torch.no_grad():
                goal = net(x, 0.5 * t)
        gradients = torch.autograd.grad((out - goal).square().sum(), list(net.parameters()))
        found[kind] = torch.cat([g.flatten() for g in gradients])
    assert torch.cosine_similarity(found["bf16"], found["fp32"], 0) > 0.99
    assert not torch.equal(found["bf16"], found["fp32"])


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "norms_in_float32", lambda device: True)


class Layers(torch.nn.Module):
    """A first and a last convolution, one between, an embedding and a linear layer over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.between, self.head = (torch.nn.Conv2d(a, b, 3) for a, b in ((3, 8), (8, 8), (8, 3)))
        self.embed, self.mix = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.seen: dict[str, tuple[torch.dtype, bool]] = {}

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        def run(name: str, value: Tensor) -> Tensor:
            layer = getattr(self, name)
            with torch.autocast("cpu", enabled=False):
                exact = layer(value.float())
            out = layer(value)
            self.seen[name] = (out.dtype, torch.equal(out.float(), exact))
            return out

        h = run("between", run("stem", x)) + run("embed", c)[:, :, None, None]
        h = run("norm", h)
        return run("head", run("mix", h.movedim(1, -1)).movedim(-1, 1))


def test_the_edges_stay_exact(as_on_a_gpu: None) -> None:
    """First and last convolution and the embedding in float32, the first one's result in 16 bits; the rest in 16."""
    torch.manual_seed(0)
    net, x, c = Layers(), torch.randn(2, 3, 9, 9), torch.randn(2, 4)
    with rounding("bf16", CPU, (3, 9, 9)):
        net(x, c)
    half, full = torch.bfloat16, torch.float32
    kinds = {name: dtype for name, (dtype, _) in net.seen.items()}
    assert kinds == {"stem": half, "between": half, "embed": full, "norm": full, "mix": half, "head": full}
    assert {name for name, (_, same) in net.seen.items() if same} == {"embed", "norm", "head"}
    with torch.autocast("cpu", enabled=False):
        exact = net.stem(x).bfloat16()
    with rounding("bf16", CPU, (3, 9, 9)):
        assert torch.equal(net.stem(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(net.stem(x), exact)
    with rounding("bf16", CPU, (3,)):  # no images: plain autocast
        net(x, c)
    assert {dtype for dtype, _ in net.seen.values()} == {half}
    with rounding("fp32", CPU, (3, 9, 9)):
        net(x, c)
    assert set(net.seen.values()) == {(full, True)}


def test_auto_is_bf16_and_then_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    made, plain = trainer(config("auto")), trainer(config("fp32"))
    kinds = [report.arithmetic for report in made.steps()]
    assert kinds == ["bf16"] * 8 + ["fp32"] * 8  # q^a = 2 to 16, then 32 and more
    assert [report.arithmetic for report in plain.steps()] == ["fp32"] * 16
    row, reference = made.read_sums(), plain.read_sums()
    assert row["loss"] == pytest.approx(reference["loss"], rel=0.02) and row["loss"] != reference["loss"]
    assert "skipped" not in row


def test_fp16_follows_fp32() -> None:
    made, plain = trainer(config("fp16")), trainer(config("fp32"))
    made.scaling._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert [report.arithmetic for report in made.steps()] == ["fp16"] * 16
    assert len(list(plain.steps())) == 16
    row, reference = made.read_sums(), plain.read_sums()
    assert row["skipped"] == 0
    assert row["loss"] == pytest.approx(reference["loss"], rel=0.01)
    assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.02)
    assert row["loss"] != reference["loss"]
    moved = [(a - b).norm() for a, b in zip(weights(made), weights(plain), strict=True)]
    total = [(a - b).norm() for a, b in zip(weights(plain), student().parameters(), strict=True)]
    assert sum(moved) < 0.15 * sum(total)


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    made = trainer(config("fp16"))
    made.scaling._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    before, steps = weights(made), made.steps()
    next(steps)
    assert all(torch.equal(a, b) for a, b in zip(weights(made), before, strict=True))
    assert made.scaling.state()["scale"] == 2.0**21
    state = next(iter(made.optimizer.state.values()))
    assert state["step"] == 0 and not state["exp_avg"].any()
    taken = 1 + sum(1 for _ in steps)
    row = made.read_sums()
    scale = made.scaling.state()["scale"]
    assert 0 < row["skipped"] < taken and scale == 2.0 ** (22 - row["skipped"])
    assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
    assert state["step"] == taken - row["skipped"]
    assert not all(torch.equal(a, b) for a, b in zip(weights(made), before, strict=True))


def test_a_scale_that_only_falls_is_an_error() -> None:
    made = trainer(config("fp16"))
    made.scaling._scaler = torch.amp.GradScaler("cpu", init_scale=Scaling.LEAST)
    for parameter in made.student.parameters():
        parameter.register_hook(lambda g: g * math.inf)
    next(made.steps())
    with pytest.raises(NonFiniteError):
        made.read_sums()


def test_a_loss_that_is_not_finite_is_an_error_in_fp16_too() -> None:
    made = trainer(config("fp16"))
    with torch.no_grad():
        next(iter(made.student.parameters())).fill_(math.nan)
    next(made.steps())
    with pytest.raises(NonFiniteError):
        made.read_sums()


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_checkpoint_holds_the_scale(tmp_path: Path, precision: Arithmetic) -> None:
    """Stopped and continued in the middle: the same scale, sums and bits as without a stop."""
    whole, first, second = (trainer(config(precision)) for _ in range(3))
    for made in (whole, first, second):
        made.scaling._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    for count, _ in enumerate(whole.steps()):
        if count == 6:
            at_stop = whole.scaling.state()
    for count, _ in enumerate(first.steps()):
        if count == 6:
            break
    save_state(first, tmp_path)
    restore_state(second, tmp_path)
    assert second.scaling.state() == at_stop == first.scaling.state()
    assert bool(at_stop) == (precision == "fp16")
    assert len(list(second.steps())) == 9
    assert second.scaling.state() == whole.scaling.state()
    assert torch.equal(second.sums, whole.sums)
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(whole), strict=True))


def test_norms_compute_in_float32_and_keep_16_bits(as_on_a_gpu: None) -> None:
    """Value and gradients of norm and activation are float32's at the rounded input; saved are two bytes a value."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(2, 8)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 8, 5, 5).bfloat16()

    def through(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = torch.nn.functional.silu(norm(x))
        return out, list(torch.autograd.grad(out.pow(3).sum(), [x, norm.weight, norm.bias]))

    exact, gradients = through(x.float().requires_grad_())
    saved: list[Tensor] = []
    given = x.clone().requires_grad_()
    with (
        rounding("bf16", CPU, (8, 5, 5)),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t),
    ):
        out = torch.nn.functional.silu(norm(given))
    assert torch.equal(out, exact) and out.dtype == torch.float32
    assert sorted(t.dtype.itemsize for t in saved if t.numel() == x.numel()) == [2, 2]
    for got, want in zip(
        torch.autograd.grad(out.pow(3).sum(), [given, norm.weight, norm.bias]), gradients, strict=True
    ):
        assert got.dtype == (torch.bfloat16 if got.shape == x.shape else torch.float32)
        assert (got.float() - want).abs().max() < 0.02 * want.abs().max()
    with rounding("bf16", CPU, (8, 5, 5)), torch.no_grad():
        assert torch.equal(norm(x), norm(x.float()))


def test_who_switches_autocast_off_gets_float32() -> None:
    """Derivatives and feature distances do; the edges then leave everything alone. Arguments may come by name."""
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 9, 9)
    with rounding("bf16", CPU, (3, 9, 9)):
        with torch.autocast("cpu", enabled=False):
            assert conv(x).dtype == torch.float32
        assert torch.nn.functional.conv2d(input=x, weight=conv.weight).dtype == torch.bfloat16
        assert conv.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("skipped", [0, 3, 6])
def test_radam_does_not_count_skipped_steps(skipped: int) -> None:
    """After overflows at the beginning, each step is the one that follows those that were taken."""
    settings = config("fp16", optim=OptimConfig(name="radam", lr=1e-3))
    made, taken = trainer(settings), 0
    made.scaling._scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (12 + skipped))
    for _ in made.steps():
        assert made.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * rectified(taken + 1, 0.999, 1e-8)[0])
        taken = steps_taken(made.optimizer)
    lost = int(made.read_sums()["skipped"])
    assert taken == 16 - lost and (lost > 0) == (skipped > 0)
    assert made.scaling.skipped == lost


def test_a_cpu_normalises_in_16_bits() -> None:
    norm, x = torch.nn.GroupNorm(2, 8), torch.randn(2, 8, 5, 5).bfloat16()
    with rounding("bf16", CPU, (8, 5, 5)):
        assert norm(x).dtype == torch.bfloat16
    assert module.norms_in_float32(CUDA) and not module.norms_in_float32(CPU)
