"""The derivative of a network pass: forward mode, finite differences, their agreement, and the choice between them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import BACKBONES, EDM, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.backbones.two_time import with_landing
from fewstep.derivative import Method, derivative, settle
from fewstep.errors import ConfigError
from fewstep.objectives.pairs import network_pass
from fewstep.randomness import DropoutTape, Streams

ROWS = 4
SPECS: dict[str, dict[str, Any]] = {
    "edm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.3},
    "ncsnpp": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
               "num_blocks": 1, "attn_resolutions": [4], "embedding_type": "fourier", "encoder_type": "residual"},
    "adm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 2, "attn_resolutions": [4], "dropout": 0.3},
    "edm2": {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
             "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 0, "dropout": 0.3},
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "attention": [8], "dropout": 0.3},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 1, "heads": 2, "dropout": 0.3},
    "mlp": {"sample_shape": [2], "width": 16, "depth": 2},
}  # fmt: skip
ATTENTION = ["edm", "unet", "dit"]


def make(name: str, *, landing: bool = False) -> Denoiser:
    """None of its parameters is zero, so that everything takes part."""
    spec = {"name": "edm" if name == "ncsnpp" else name, "kwargs": SPECS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(spec)
        shape = (2,) if name == "mlp" else (1, 8, 8)
        made = Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=shape, spec=spec)
        made = with_landing(made) if landing else made
        for parameter in made.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def path(student: Denoiser) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Four rows of x_0 + t eps with their tangents in ln t, in the student's precision."""
    t = torch.tensor([0.02, 0.5, 2.0, 40.0], dtype=torch.float64)
    x_0, noise = (Streams(1).normal(n, torch.arange(ROWS), student.sample_shape, torch.float64) for n in ("x", "eps"))
    noise = t.reshape(-1, *[1] * (noise.ndim - 1)) * noise
    x, noise, t = (v.to(student.dtype) for v in (0.5 * x_0 + noise, noise, t))
    return (x, t), (noise, t)


def gaps(a: Tensor, b: Tensor) -> Tensor:
    """Relative difference per row."""
    return (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


# ------------------------------------------------------------------------------------- by hand
@pytest.mark.parametrize(("method", "bound"), [("jvp", 1e-14), ("finite", 1e-9)])
def test_derivative_by_hand(method: Method, bound: float) -> None:
    """``d/dh sin(x + h v) (t + h w)^2 = cos(x) v t^2 + 2 sin(x) t w``."""
    x, v = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, w = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = derivative(lambda x, t: x.sin() * t**2, (x, t), (v, w), method)
    torch.testing.assert_close(got, x.cos() * v * t**2 + 2 * x.sin() * t * w, rtol=0, atol=bound)


@pytest.mark.parametrize("method", ["jvp", "finite"])
def test_what_does_not_depend_on_the_path_has_derivative_zero(method: Method) -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    got = derivative(lambda x: torch.full_like(x, 7.0), (x,), (x,), method)
    assert torch.equal(got, torch.zeros(3, 2, dtype=torch.float64))


def test_the_difference_is_central_and_its_step_relative_to_the_precision() -> None:
    """``d^3`` of a cubic is left over as ``h^2``: h = 0.2 eps^(1/3)."""
    x = torch.zeros(1, dtype=torch.float64)
    left = derivative(lambda x: x**3, (x,), (torch.ones_like(x),), "finite")
    assert float(left) == pytest.approx((0.2 * 2.0 ** (-52 / 3)) ** 2, rel=1e-9)
    left = derivative(lambda x: x**3, (x.float(),), (torch.ones(1),), "finite")
    assert math.sqrt(float(left)) == pytest.approx(0.985e-3, rel=1e-3)


# ------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("landing", [False, True])
@pytest.mark.parametrize("name", [n for n in SPECS if n != "ncsnpp"])
def test_forward_mode_agrees_with_finite_differences(name: str, landing: bool) -> None:
    """With attention, and with the dropout masks of the student's own pass. float64: 1e-7; float32: 1 %."""
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-2)):
        student = make(name, landing=landing).to(dtype).train()
        (x, t), tangents = path(student)
        tape, s = DropoutTape(Streams(0), torch.arange(ROWS)), t / 3 if landing else None
        network_pass(student, x, t, None, tape.record(), s)

        def function(x: Tensor, t: Tensor, student=student, tape=tape, s=s) -> Tensor:  # type: ignore[no-untyped-def]
            return network_pass(student, x, t, None, tape.replay(), s)

        jvp = derivative(function, (x, t), tangents, "jvp")
        finite = derivative(function, (x, t), tangents, "finite")
        assert jvp.dtype == dtype
        assert gaps(jvp, finite).max() < bound
        for held in ((tangents[0], 0 * t), (0 * x, t)):  # both parts of the tangent matter
            assert (gaps(derivative(function, (x, t), held, "jvp"), finite) > 10 * bound).any()


@pytest.mark.parametrize("name", ATTENTION)
def test_masks_that_are_not_shared_give_another_derivative(name: str) -> None:
    student = make(name).double().train()
    (x, t), tangents = path(student)

    def function(seeds: list[int]) -> Any:
        def run(x: Tensor, t: Tensor) -> Tensor:
            return network_pass(student, x, t, None, DropoutTape(Streams(seeds.pop(0)), torch.arange(ROWS)).record())

        return run

    shared = derivative(function([0, 0]), (x, t), tangents, "finite")
    torch.testing.assert_close(derivative(function([0]), (x, t), tangents, "jvp"), shared, rtol=1e-5, atol=1e-6)
    other = derivative(function([1]), (x, t), tangents, "jvp")
    assert gaps(other, shared).median() > 0.01  # another network's derivative
    torn = derivative(function([0, 1]), (x, t), tangents, "finite")
    assert gaps(torn, shared).median() > 1000  # two networks' difference over 2e-6


@pytest.mark.parametrize("name", ["edm", "dit"])
def test_the_fused_attention_has_no_forward_mode(name: str) -> None:
    """Why the plain formula is asked for: without it this network cannot be differentiated."""
    student = make(name).eval()
    (x, t), (v, w) = path(student)
    derivative(student, (x, t), (v, w), "jvp")
    fw = torch.autograd.forward_ad
    with fw.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="forward AD"):
        student(fw.make_dual(x, v), fw.make_dual(t, w))


@pytest.mark.parametrize("method", ["jvp", "finite"])
def test_without_autocast_and_without_gradient(method: Method) -> None:
    student = make("unet").eval()
    primals, tangents = path(student)
    outside = derivative(student, primals, tangents, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student(*primals).sub(student.double()(*(p.double() for p in primals))).abs().max() > 1e-3
        inside = derivative(student.float(), primals, tangents, method)
    assert torch.equal(inside, outside)
    assert not inside.requires_grad
    assert all(p.requires_grad for p in student.parameters())


def test_finite_differences_do_without_tf32() -> None:
    flags: list[tuple[bool, bool]] = []

    def function(x: Tensor) -> Tensor:
        flags.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        if len(flags) > 4:
            raise ValueError
        return x

    x = torch.ones(2)
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        derivative(function, (x,), (x,), "finite")
        derivative(function, (x,), (x,), "jvp")
        assert flags == [(False, False), (False, False), (True, True)]
        derivative(function, (x,), (x,), "jvp")
        with pytest.raises(ValueError):
            derivative(function, (x,), (x,), "finite")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old


# ------------------------------------------------------------------------------------- the choice
class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class WrongForwardMode(NoForwardMode):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 0.5 * tangent


class Custom(nn.Module):
    """A network with a custom function, batch normalisation and dropout inside."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.norm, self.dropout = function, nn.BatchNorm1d(2), nn.Dropout(0.5)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.dropout(self.norm(self.function(x + c_noise[:, None])))


def custom(function: Any) -> Denoiser:
    return Denoiser(Custom(function), EDM(), Parametrization("edm"), sample_shape=(2,)).train()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("landing", [False, True])
def test_the_librarys_networks_have_a_forward_mode(name: str, landing: bool) -> None:
    student = make(name, landing=landing)
    assert {settle(method, student) for method in ("auto", "jvp")} == {"jvp"}
    assert settle("finite", student) == "finite"


def test_every_backbone_is_tried_here() -> None:
    assert set(BACKBONES) <= set(SPECS) | {"two_time", "guided", "diffusers"}


def test_attention_of_diffusers_has_no_forward_mode() -> None:
    """Its own code views what forward mode makes strided: "auto" takes finite differences."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: its networks cannot be built")
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "attention_head_dim": 4,
    }  # fmt: skip
    network = build({"name": "diffusers", "kwargs": {"kind": "UNet2DModel", "config": config}})
    student = Denoiser(network, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8))
    assert settle("auto", student) == "finite"
    with pytest.raises(ConfigError, match="Use finite differences"):
        settle("jvp", student)


@pytest.mark.parametrize(
    ("function", "problem"),
    [(NoForwardMode.apply, "jvp"), (WrongForwardMode.apply, r"forward mode and finite differences differ by \d+"),
     (lambda x: torch.tensor(x.tolist()).tanh(), r"forward mode and finite differences differ by \d+")],
)  # fmt: skip
def test_a_network_without_forward_mode(function: Any, problem: str) -> None:
    student = custom(function)
    assert settle("auto", student) == "finite"
    with pytest.raises(ConfigError, match=problem) as caught:
        settle("jvp", student)
    assert "--set objective.derivative=finite" in str(caught.value)
    assert settle("auto", custom(torch.tanh)) == "jvp"


def test_trying_changes_nothing() -> None:
    student = custom(torch.tanh)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    settle("auto", student)
    assert student.training and student.backbone.norm.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
