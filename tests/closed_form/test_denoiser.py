"""Denoiser: every prediction type, every clock, labels, and what a bad call says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from oracles import Gaussian, as_denoiser, exact_denoiser, raw
from torch import Tensor, nn

from fewstep.backbones.small import MLP
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import CheckpointError, ConfigError
from fewstep.guidance import Guided
from fewstep.process import EDM, VP, DiscreteVP, Process, RectifiedFlow, TrigFlow
from fewstep.weights import load_weights

PROCESSES = [EDM(), VP(), RectifiedFlow(), TrigFlow(), DiscreteVP.linear()]
KINDS = ["x0", "eps", "score", "sigma_score", "v", "flow", "edm", "trig"]
LEVELS = torch.tensor([0.02, 0.3, 1.0, 5.0, 70.0], dtype=torch.float64)
LAW = Gaussian.random(3)
by_name = lambda p: p.kind if isinstance(p, Process) else str(p)  # noqa: E731


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points() -> Tensor:
    return normal(len(LEVELS), 3) * (1 + LEVELS**2).sqrt()[:, None]


@pytest.mark.parametrize(("process", "kind"), list(itertools.product(PROCESSES, KINDS)), ids=by_name)
def test_an_exact_network_gives_the_exact_denoiser(process: Process, kind: str) -> None:
    x = points()
    z, t = x * process.edm_scale(LEVELS)[:, None], process.from_edm(LEVELS)
    got = exact_denoiser(kind, LAW, process, 3)(z, t)
    torch.testing.assert_close(got, LAW.denoise(x, LEVELS), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("native", "clock"), list(itertools.product(PROCESSES, PROCESSES)), ids=by_name)
def test_another_clock_is_the_same_function(native: Process, clock: Process) -> None:
    x = points()
    twin = exact_denoiser("eps", LAW, native, 3).under(clock)
    got = twin(x * clock.edm_scale(LEVELS)[:, None], clock.from_edm(LEVELS))
    torch.testing.assert_close(got, LAW.denoise(x, LEVELS), rtol=1e-8, atol=1e-8)


def test_another_clock_shares_the_weights_and_keeps_the_original() -> None:
    denoiser = exact_denoiser("v", LAW, VP(), 3)
    twin = denoiser.under(EDM())
    assert twin.backbone is denoiser.backbone
    assert isinstance(denoiser.process, VP) and isinstance(twin.process, EDM) and isinstance(twin.native, VP)
    assert denoiser.clone().backbone is not denoiser.backbone


class Wild(nn.Module):
    """A network that is far from any law, and remembers what it was told."""

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.x, self.c_noise, self.cond = x, c_noise, cond
        return 7 + x.flip(-1) + c_noise[:, None].sin()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "x0"])
@pytest.mark.parametrize("process", [EDM(), RectifiedFlow(), TrigFlow()], ids=by_name)
def test_boundary_at_time_zero(process: Process, kind: str) -> None:
    """f(x, 0) = x (G1) for any network: EDM, eps, v, flow, score and TrigFlow forms (math.md 1.4)."""
    denoiser = Denoiser(Wild(), process, Parametrization(kind, time="native"), sample_shape=(3,))
    x = normal(4, 3)
    torch.testing.assert_close(denoiser(x, 0.0), x, rtol=1e-14, atol=0)


@pytest.mark.parametrize("time", ["quarter_log", "half_log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boundary_with_logarithmic_times(time: str, dtype: torch.dtype) -> None:
    """ln 0 must not reach the network as -inf: 0 * NaN is not 0."""
    torch.manual_seed(0)
    network = MLP((3,), width=16, depth=1)
    nn.init.normal_(network.head.weight)
    denoiser = Denoiser(network, EDM(), Parametrization("edm", time=time), sample_shape=(3,)).to(dtype)
    x = normal(4, 3).to(dtype)
    assert torch.equal(denoiser(x, 0.0), x)


def test_boundary_of_x0_networks_needs_the_blend() -> None:
    x = normal(4, 3)
    bare = Denoiser(Wild(), EDM(), Parametrization("x0", time="native"), sample_shape=(3,))
    blended = bare.with_parametrization(replace(bare.parametrization, blend=0.01))
    assert (bare(x, 0.0) - x).abs().min() > 0.1
    assert torch.equal(blended(x, 0.0), x)
    torch.testing.assert_close(blended(x, 0.01), 0.5 * x + 0.5 * bare(x, 0.01), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.003, 0.01, 1.0, 80.0])
def test_boundary_shift_acts_at_evaluation_only(sigma: float) -> None:
    """ECT's code: c_skip and the numerator of c_out see sigma - 0.003 in eval mode (math.md 1.4)."""
    denoiser = Denoiser(Wild(), EDM(), Parametrization("edm", boundary_shift=0.003), sample_shape=(3,))
    x, sd = normal(2, 3), 0.5
    norm = (sigma**2 + sd**2) ** 0.5
    plain = denoiser.with_parametrization(replace(denoiser.parametrization, boundary_shift=0.0))
    assert torch.equal(denoiser.train()(x, sigma), plain.train()(x, sigma))
    out = denoiser.backbone(x / norm, torch.full((2,), sigma, dtype=torch.float64).log() / 4)
    low = sigma - 0.003
    want = sd**2 / (low**2 + sd**2) * x + low * sd / norm * out
    torch.testing.assert_close(denoiser.eval()(x, sigma), want, rtol=1e-12, atol=1e-12)


def test_the_network_is_told_the_time_it_knows() -> None:
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    flow = RectifiedFlow()
    for process, time, want in [
        (EDM(), "quarter_log", sigma.log() / 4),
        (EDM(), "half_log", (sigma / 2).log()),
        (flow, "native", sigma / (1 + sigma)),
        (flow, "thousand", 1000 * sigma / (1 + sigma)),
        (VP(), "thousand_minus_one", 999 * VP().from_edm(sigma)),
    ]:
        network = Wild()
        denoiser = Denoiser(network, process, Parametrization("flow", time=time), sample_shape=(3,)).under(EDM())
        denoiser(normal(2, 3), sigma)
        torch.testing.assert_close(network.c_noise, want, rtol=1e-12, atol=1e-12)


def test_discrete_networks_get_the_fractional_index() -> None:
    network, table = Wild(), DiscreteVP.linear()
    denoiser = Denoiser(network, table, Parametrization("eps", time="native"), sample_shape=(3,)).under(EDM())
    between = (table.to_edm(torch.tensor([400.0, 401.0], dtype=torch.float64))).log().mean().exp()
    denoiser(normal(1, 3), between[None])
    assert float(network.c_noise) == pytest.approx(400.5, abs=1e-9)
    assert denoiser.sigma_min == pytest.approx(0.0100, abs=6e-5)
    assert denoiser.sigma_max == 80.0


def test_whole_number_times_are_times() -> None:
    """A DDPM is called with int64 indices: they must not round the noise level to a whole number."""
    denoiser = exact_denoiser("eps", LAW, DiscreteVP.linear(), 3)
    x, index = normal(2, 3), torch.tensor([37, 512])
    assert torch.equal(denoiser(x, index), denoiser(x, index.double()))
    assert torch.equal(denoiser(x[:1], 37), denoiser(x[:1], 37.0))


# ----------------------------------------------------------------------------- user's modules
class Theirs(nn.Module):
    """A user's network, trained under ``process``; takes 1000 * t."""

    def __init__(self, kind: str, process: Process) -> None:
        super().__init__()
        self.kind, self.process = kind, process

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return raw(self.kind, LAW, self.process, x, time / 1000)


@pytest.mark.parametrize(
    ("kind", "process"),
    [
        ("eps", VP()),
        ("v", VP()),
        ("x0", VP()),
        ("score", VP()),
        ("flow", RectifiedFlow()),
        ("eps", DiscreteVP.linear()),
    ],
    ids=by_name,
)
def test_from_module(kind: str, process: Process) -> None:
    denoiser = Denoiser.from_module(
        Theirs(kind, process), process=process, prediction=kind, sample_shape=(3,), time=lambda t: 1000 * t
    )
    x, levels = points()[1:], LEVELS[1:]
    z, t = x * process.edm_scale(levels)[:, None], process.from_edm(levels)
    loose = 1e-4 if kind == "x0" else 1e-8  # the blend of x0 networks: 0.002^2/sigma^2 of x at sigma = 0.3
    torch.testing.assert_close(denoiser(z, t), LAW.denoise(x, levels), rtol=loose, atol=loose)
    torch.testing.assert_close(denoiser.under(EDM())(x, levels), LAW.denoise(x, levels), rtol=loose, atol=loose)


def test_from_module_refuses_what_is_not_a_prediction() -> None:
    class Record(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return {"sample": x}

    with pytest.raises(ConfigError, match="did not return a tensor.*Return the prediction itself"):
        Denoiser.from_module(Record(), process=EDM(), prediction="eps", sample_shape=(3,))(normal(2, 3), 1.0)
    with pytest.raises(ConfigError, match="'epsilon' is not a prediction type"):
        Denoiser.from_module(Record(), process=EDM(), prediction="epsilon", sample_shape=(3,))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ labels
def labelled() -> Denoiser:
    return Denoiser(Wild(), EDM(), Parametrization("edm"), sample_shape=(3,), num_classes=4)


def test_labels_as_indices_one_hot_or_none() -> None:
    denoiser, x = labelled(), normal(2, 3)
    denoiser(x, 1.0, torch.tensor([2, 0]))
    want = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0]])
    assert torch.equal(denoiser.backbone.cond, want)
    denoiser(x, 1.0, want)
    assert torch.equal(denoiser.backbone.cond, want)
    denoiser(x, 1.0)
    assert torch.equal(denoiser.backbone.cond, torch.zeros(2, 4))


@pytest.mark.parametrize("cond", [torch.tensor([4, 0]), torch.tensor([-1, 0]), torch.zeros(2, 3), torch.zeros(3, 4)])
def test_labels_that_do_not_fit(cond: Tensor) -> None:
    with pytest.raises(ConfigError, match="[Ll]abel"):
        labelled()(normal(2, 3), 1.0, cond)


def test_labels_for_an_unconditional_model() -> None:
    with pytest.raises(ConfigError, match="unconditional model"):
        as_denoiser(LAW.denoise, 3)(normal(2, 3), 1.0, torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="class-conditional"):
        Guided(as_denoiser(LAW.denoise, 3), 2.0)


def test_guidance_is_the_lerp_and_one_is_no_guidance() -> None:
    class ByClass(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor) -> Tensor:
            return x + cond.sum(1, keepdim=True)

    denoiser = Denoiser(ByClass(), EDM(), Parametrization("x0", time="native"), sample_shape=(3,), num_classes=2)
    x, cond = normal(2, 3), torch.tensor([0, 1])
    torch.testing.assert_close(Guided(denoiser, 3.0)(x, 1.0, cond), x + 3.0)
    torch.testing.assert_close(Guided(denoiser, 1.0)(x, 1.0, cond), denoiser(x, 1.0, cond))


# -------------------------------------------------------------------------------- bad calls
def test_shapes_that_do_not_fit_are_named() -> None:
    denoiser = as_denoiser(LAW.denoise, 3)
    with pytest.raises(ConfigError, match=r"sample shape. Got: \(2, 4\). Wanted: \('b', 3\)"):
        denoiser(normal(2, 4), 1.0)
    with pytest.raises(ConfigError, match=r"times have the wrong shape. Got: \(3,\)"):
        denoiser(normal(2, 3), torch.ones(3, dtype=torch.float64))


def test_parametrizations_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'flow'"):
        Parametrization("flw")
    with pytest.raises(ConfigError, match="sigma_data must be positive"):
        Parametrization(sigma_data=0.0)
    with pytest.raises(ConfigError, match="Did you mean 'quarter_log'"):
        Parametrization(time="quarterlog")  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_all_listed() -> None:
    network = nn.Linear(2, 3)
    state = {"weight": torch.zeros(3, 3), "scale": torch.zeros(1)}
    with pytest.raises(
        CheckpointError,
        match=r"missing: bias; unexpected: scale; of another shape: weight \(3, 3\) instead of \(3, 2\)",
    ):
        load_weights(network, state, "a.safetensors")
    load_weights(network, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "a.safetensors")
    assert torch.equal(network.weight, torch.ones(3, 2))
