"""Two-time students: the pretrained network bit for bit at the start, and a landing time that is heard and learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Guided, Parametrization, RectifiedFlow, load, sample, save_model
from fewstep.backbones import build
from fewstep.backbones.two_time import TwoTime, with_landing
from fewstep.errors import ConfigError
from fewstep.process import DiscreteVP

CLASSES = 3
SPECS: dict[str, dict[str, Any]] = {
    "edm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "label_dim": CLASSES},
    "adm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "label_dim": CLASSES},
    "edm2": {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
             "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8, "label_dim": CLASSES},
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "attention": [4], "num_classes": CLASSES},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 2, "heads": 2, "num_classes": CLASSES},
    "mlp": {"sample_shape": [2], "width": 16, "depth": 2, "num_classes": CLASSES},
}  # fmt: skip
T = torch.tensor([0.02, 0.3, 1.0, 60.0])
LABELS = torch.arange(4) % CLASSES
every = pytest.mark.parametrize("name", SPECS)


def scatter(module: nn.Module, seed: int = 0) -> None:
    """Move every weight, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def pretrained(name: str, **settings: Any) -> Denoiser:
    spec = {"name": name, "kwargs": SPECS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(spec)
    scatter(network)
    shape = (2,) if name == "mlp" else (1, 8, 8)
    settings = {"process": EDM(), "parametrization": Parametrization("edm")} | settings
    return Denoiser(network, sample_shape=shape, num_classes=CLASSES, spec=spec, **settings).eval()


def student(name: str, **settings: Any) -> Denoiser:
    """A two-time student that has moved away from its start."""
    two = with_landing(pretrained(name, **settings))
    scatter(two.backbone.landing)
    return two


def noisy(denoiser: Denoiser, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, *denoiser.sample_shape, generator=generator, dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------- the start
@every
@pytest.mark.parametrize("cast", [False, True])
def test_the_start_is_the_pretrained_network_bit_for_bit(name: str, cast: bool) -> None:
    teacher = pretrained(name)
    before = torch.random.get_rng_state()
    two = with_landing(teacher, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert two.two_time and not teacher.two_time
    x = noisy(teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        want = teacher(x, T, LABELS)
        for s in (None, 0.0, 0.01, T / 2, T):
            assert torch.equal(two(x, T, LABELS, s), want)
    scatter(two.backbone.landing.last)  # which does reach the output
    assert not torch.allclose(two(x, T, LABELS, T / 2), teacher(x, T, LABELS), atol=1e-3)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    teacher = pretrained("unet")
    first, again, other = (with_landing(teacher, seed=k).backbone.landing.first for k in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.allclose(first.weight, other.weight)
    assert float(first.weight.detach().std()) == pytest.approx(first.in_features**-0.5, rel=0.1)
    assert not first.bias.any()


def test_weights_are_shared_and_the_teacher_stays_as_it_is() -> None:
    teacher = pretrained("mlp", sampler_times={2: (80.0, 1.0)}, sigma_max=40.0)
    two = with_landing(teacher)
    assert two.backbone.inner is teacher.backbone
    assert isinstance(two.backbone, TwoTime) and not isinstance(teacher.backbone, TwoTime)
    assert teacher.spec == {"name": "mlp", "kwargs": SPECS["mlp"]}
    assert (two.sigma_max, two.sampler_times) == (40.0, {2: (80.0, 1.0)})
    two.sampler_times.clear()
    assert teacher.sampler_times
    assert with_landing(two) is two


def test_precision_of_the_teacher() -> None:
    two = with_landing(pretrained("unet").double())
    assert {p.dtype for p in two.parameters()} == {torch.float64}
    assert two(noisy(two, torch.float64), T.double(), LABELS, 0.01).dtype == torch.float64


# ------------------------------------------------------------------------------------ landing time heard
@every
def test_it_hears_both_times_and_none_is_zero(name: str) -> None:
    two = student(name)
    x, c_noise = noisy(two), torch.zeros(4)
    assert torch.equal(two(x, T, LABELS), two(x, T, LABELS, 0.0))
    assert torch.equal(two(x, T, LABELS, 0.01), two(x, T, LABELS, torch.full((4,), 0.01)))
    outs = [two(x, T, LABELS, s) for s in (0.0, 0.01, T / 2, T)]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outs) for b in outs[:i])
    told = two.parametrization.c_landing(T, T / 2)
    one = two.backbone(x, c_noise, None, told)
    for column in (0, 1):
        moved = told.clone()
        moved[:, column] += 0.1
        assert not torch.allclose(one, two.backbone(x, c_noise, None, moved), atol=1e-4)


def test_what_the_network_is_told() -> None:
    """l(u) = ln(u/(2 sigma_d) + 0.002)/4 by hand: finite at 0, and the same when data and times scale together."""
    t, s = torch.tensor([80.0, 0.998], dtype=torch.float64), torch.tensor([0.0, 0.002], dtype=torch.float64)
    want = [[-1.5536520246, 1.0955129084], [-1.3803652294, 0.0]]
    got = Parametrization("edm").c_landing(t, s)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(Parametrization("edm", sigma_data=1.5).c_landing(3 * t, 3 * s), got)


@pytest.mark.parametrize("clock", [EDM(), RectifiedFlow()])
def test_the_landing_time_is_on_the_clock_of_the_call(clock: EDM | RectifiedFlow) -> None:
    two = student("unet").double()
    x, t = noisy(two, torch.float64), T.double()
    native, other = two.under(EDM()), two.under(clock)
    scale = clock.edm_scale(t)[:, None, None, None]
    got = other(scale * x, clock.from_edm(t), LABELS, clock.from_edm(t / 2))
    torch.testing.assert_close(got, native(x, t, LABELS, t / 2), rtol=1e-9, atol=1e-9)


def test_another_parametrization_and_a_coarse_clock() -> None:
    two = student("unet", process=DiscreteVP.linear(), parametrization=Parametrization("eps", time="native"))
    edm = two.under(EDM())
    x = noisy(two)
    for s in (0.0, 0.1):
        assert edm(x, 2.0, LABELS, s).isfinite().all()
    assert not torch.allclose(edm(x, 2.0, LABELS, 0.0), edm(x, 2.0, LABELS, 0.1), atol=1e-4)


def test_guidance_passes_the_landing_time_on() -> None:
    two = student("unet")
    x, s = noisy(two), T / 2
    want = 3 * two(x, T, LABELS, s) - 2 * two(x, T, None, s)
    torch.testing.assert_close(Guided(two, 3.0)(x, T, LABELS, s), want)
    assert not torch.allclose(Guided(two, 3.0)(x, T, LABELS), want, atol=1e-3)


def test_a_network_without_landing_time_says_so() -> None:
    teacher = pretrained("unet")
    with pytest.raises(ConfigError, match=r"cannot be told where to land.*with_landing"):
        teacher(noisy(teacher), T, LABELS, T / 2)
    two = student("unet")
    with pytest.raises(ConfigError, match="times have the wrong shape"):
        two(noisy(two), T, LABELS, T[:3])


def test_a_module_of_ones_own_is_refused_with_a_remedy() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    own = Denoiser.from_module(Own(), process=EDM(), prediction="x0", sample_shape=(2,))
    with pytest.raises(
        ConfigError, match=r"cannot be told a landing time.*edm, adm, edm2, unet, dit or mlp.*--objective ect"
    ):
        with_landing(own)


# --------------------------------------------------------------------------------------------- learning
@every
def test_gradients_reach_every_landing_parameter_after_one_step(name: str) -> None:
    two = with_landing(pretrained(name)).train()
    x, weights = noisy(two), dict(two.backbone.landing.named_parameters())

    def gradients(s: Tensor | None) -> set[str]:
        two.zero_grad()
        two(x, T, LABELS, s).square().sum().backward()
        assert all(p.grad is not None for p in two.backbone.landing.parameters())  # also without s: DDP waits for all
        return {n for n, p in weights.items() if p.grad.any()}

    assert gradients(T / 2) == {"last.weight", "last.bias"}
    torch.optim.SGD(two.parameters(), lr=1e-3).step()
    for s in (T / 2, None):
        assert gradients(s) == set(weights)


@every
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, at its first tangent
def test_forward_derivatives_agree_with_differences(name: str) -> None:
    """The tangent of MeanFlow and sCM, through x, t and s at once."""
    two = student(name).double()
    x, t = noisy(two, torch.float64), T.double()
    s, along = t / 2, (noisy(two, torch.float64).flip(0), torch.ones(4).double(), 0.5 * torch.ones(4).double())

    def at(h: float) -> Tensor:
        return two(*(v + h * d for v, d in zip((x, t), along[:2], strict=True)), LABELS, s + h * along[2])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x, t, s: two(x, t, LABELS, s), (x, t, s), along)
    slope = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / 12e-4
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-5)
    assert tangent.abs().max() > 0.1


def test_one_graph_when_compiled() -> None:
    two = student("unet")
    x = noisy(two)
    compiled = torch.compile(two, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, T, LABELS.float().new_zeros(4, CLASSES), T / 2), two(x, T, None, T / 2))


# ---------------------------------------------------------------------------------------- on the disk
@every
def test_round_trip_of_a_jump_model(name: str, tmp_path: Path) -> None:
    two = student(name, sampler="jump", sampler_times={2: (80.0, 2.0)})
    save_model(two, tmp_path / "model")
    back = load(tmp_path / "model")
    assert (back.sampler, back.sampler_times, back.two_time) == ("jump", {2: (80.0, 2.0)}, True)
    assert back.spec == two.spec
    x = noisy(two)
    assert torch.equal(back(x, T, LABELS, T / 2), two(x, T, LABELS, T / 2))
    assert torch.equal(sample(back, 3, steps=2), sample(two, 3, steps=2))


def test_an_old_config_without_a_sampler_is_a_consistency_model(tmp_path: Path) -> None:
    save_model(pretrained("mlp"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config.pop("sampler") == "consistency"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert load(tmp_path / "model").sampler == "consistency"
    path.write_text(json.dumps(config | {"sampler": "jmp"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="Did you mean 'jump'"):
        load(tmp_path / "model")
    with pytest.raises(ConfigError, match="Did you mean 'jump'"):
        pretrained("mlp", sampler="jmp")
