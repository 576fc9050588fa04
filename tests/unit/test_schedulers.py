"""Schedulers of diffusers: the same tables, the same x_0 and the same steps as theirs; what is not known is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, DiscreteVP, RectifiedFlow
from fewstep.backbones.schedulers import DISCRETE, KNOWN, Schedule, read_schedule
from fewstep.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # NumPy's, in diffusers itself
SHAPE, ROWS = (3, 4, 4), 2
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"num_train_timesteps": 50, "beta_end": 0.2},
    "trained": {"trained_betas": [0.01, 0.02, 0.05, 0.2, 0.4]},
}


@pytest.fixture(scope="module")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers", reason="diffusers is not installed: there is nothing to compare with")


def config_of(scheduler: Any) -> dict[str, Any]:
    return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}


class Network(nn.Module):
    """Any function of x and of the time it is told, nonlinear in both; notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.given.append((x, t))
        turn = (t / 300).reshape(-1, 1, 1, 1)
        return torch.einsum("dc,bchw->bdhw", self.mix.to(x), x).tanh() + turn.cos() * x / (1 + x.abs())


def denoiser_of(schedule: Schedule, network: nn.Module) -> Denoiser:
    p = replace(schedule.parametrization(0.5), blend=0.0, boundary_shift=0.0)
    return Denoiser(network, schedule.process, p, sample_shape=SHAPE, sigma_max=math.inf).eval()


def noise(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def per_row(t: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=like.dtype).expand(ROWS)


# ---- tables
@pytest.mark.parametrize("kind", TABLES)
def test_the_table_has_the_bits_of_theirs(diffusers: Any, kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(**TABLES[kind])
    process = read_schedule(config_of(scheduler)).process
    assert isinstance(process, DiscreteVP)
    assert torch.equal(torch.tensor(process.alphas_cumprod), scheduler.alphas_cumprod)


def test_sigmoid_betas(diffusers: Any) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    process = read_schedule(config_of(scheduler)).process
    assert torch.equal(torch.tensor(process.alphas_cumprod), scheduler.alphas_cumprod)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_zero_terminal_snr(diffusers: Any, name: str, kind: str) -> None:
    scheduler = getattr(diffusers, name)(**TABLES[kind], rescale_betas_zero_snr=True)
    schedule = read_schedule(config_of(scheduler))
    ours, theirs = torch.tensor(schedule.process.alphas_cumprod), scheduler.alphas_cumprod
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=2e-6, atol=0)
    if kind != "linear":
        assert float(ours[-1]) == 2**-24
        assert schedule.sigma_max == pytest.approx(4096, rel=1e-6)
    else:  # the entry before it is smaller than 2**-24
        assert ours[-1] == ours[-2] / 2


def test_classmethods_are_the_same_laws_in_float64(diffusers: Any) -> None:
    made = {"scaled_linear": DiscreteVP.scaled_linear(), "cosine": DiscreteVP.cosine(), "linear": DiscreteVP.linear()}
    for kind, process in made.items():
        theirs = diffusers.DDPMScheduler(**TABLES[kind]).alphas_cumprod.double()
        exact = torch.tensor(process.alphas_cumprod, dtype=torch.float64)
        torch.testing.assert_close(exact, theirs, rtol=1e-4 if kind == "cosine" else 2e-6, atol=0)
    bar = torch.tensor(made["cosine"].alphas_cumprod[:900], dtype=torch.float64)
    u = torch.arange(1, 901, dtype=torch.float64) / 1000
    law = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(bar, law, rtol=1e-12, atol=0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    rescaled = torch.tensor(DiscreteVP.from_betas(betas, zero_terminal_snr=True).alphas_cumprod, dtype=torch.float64)
    root, old = rescaled.sqrt(), torch.cumprod(1 - betas, 0).sqrt()
    stretch = (root[1:-1] - root[:-2]) / (old[1:-1] - old[:-2])
    torch.testing.assert_close(stretch, stretch[:1].expand(998), rtol=1e-10, atol=0)  # an affine map of sqrt(alpha_bar)
    assert float(rescaled[0]) == pytest.approx(1 - 0.00085, rel=1e-12)


# ---- x_0 and steps
CASES = [
    (name, table, prediction)
    for name in ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
                 "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    for table in ("linear", "scaled_linear", "cosine")
    for prediction in ("epsilon", "v_prediction", "sample")
    if not (prediction == "sample" and name.startswith("Euler"))  # theirs refuse it
]  # fmt: skip


@pytest.mark.parametrize(("name", "table", "prediction"), CASES)
def test_the_network_is_given_and_means_the_same(diffusers: Any, name: str, table: str, prediction: str) -> None:
    """x_0 by ``step`` at eight times: theirs from the scaled input and ``timestep``, ours from D."""
    plain = {"clip_sample": False} if name.startswith("DD") else {}
    scheduler = getattr(diffusers, name)(
        **TABLES[table], prediction_type=prediction, timestep_spacing="leading", **plain
    )
    scheduler.set_timesteps(8)
    network = Network()
    denoiser = denoiser_of(read_schedule(config_of(scheduler)), network)
    vp = not name.startswith("Euler")  # the others keep their samples in EDM coordinates
    for k, t in enumerate(scheduler.timesteps):
        index = per_row(t, torch.zeros(()))
        sigma = denoiser.process.to_edm(index)
        x = 0.5 * noise(2) + sigma.reshape(-1, 1, 1, 1) * noise(3)
        x = x * denoiser.process.edm_scale(sigma).reshape(-1, 1, 1, 1) if vp else x
        scheduler._step_index = k
        inputs = scheduler.scale_model_input(x, t)
        out = network(inputs, index)
        if hasattr(scheduler, "convert_model_output"):
            theirs = scheduler.convert_model_output(out, sample=x)
        else:
            theirs = scheduler.step(out, t, x).pred_original_sample
        ours = denoiser(x, index) if vp else denoiser.under(EDM())(x, sigma)
        (x_1, t_1), (x_2, t_2) = network.given[-2:]
        torch.testing.assert_close(x_2, x_1, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(t_2, t_1, rtol=0, atol=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_steps_in_float64(diffusers: Any, prediction: str, zero_snr: bool) -> None:
    scheduler = diffusers.DDIMScheduler(
        **SD,
        prediction_type=prediction,
        clip_sample=False,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
    )
    schedule, network = read_schedule(config_of(scheduler)), Network()
    scheduler.alphas_cumprod = torch.tensor(schedule.process.alphas_cumprod, dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    denoiser = denoiser_of(schedule, network)
    scheduler.set_timesteps(5)
    ours = theirs = noise(dtype=torch.float64)
    times = [int(t) for t in scheduler.timesteps]
    assert times[0] == 999
    for t, s in zip(times, [*times[1:], None], strict=True):
        index = per_row(t, ours)
        theirs = scheduler.step(network(theirs, index), t, theirs).prev_sample
        x_0 = denoiser(ours, index)
        ours = x_0 if s is None else denoiser.process.jump(ours, x_0, index, per_row(s, ours))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11 * float(theirs.abs().max()))


def euler(
    denoiser: Denoiser, sigmas: Tensor, x: Tensor, scheduler: Any, network: Network, told: Callable[..., Any]
) -> None:
    """Their sampler and our Euler steps in EDM coordinates, side by side."""
    ours = theirs = float(sigmas[0]) * x
    edm = denoiser.under(EDM())
    for k, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(network(inputs, per_row(told(t), theirs)), t, theirs).prev_sample
        x_0 = edm(ours, per_row(sigmas[k], ours))
        ours = ours + (ours - x_0) / float(sigmas[k]) * float(sigmas[k + 1] - sigmas[k])
        torch.testing.assert_close(network.given[-1][1], network.given[-2][1], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("more", [{}, {"use_karras_sigmas": True}, {"rescale_betas_zero_snr": True}], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_steps(diffusers: Any, prediction: str, more: dict[str, Any]) -> None:
    if more.get("rescale_betas_zero_snr") and prediction == "epsilon":
        pytest.skip("where there is no signal the noise says nothing of x_0")
    scheduler = diffusers.EulerDiscreteScheduler(**SD, prediction_type=prediction, timestep_spacing="trailing", **more)
    scheduler.set_timesteps(6)
    network = Network()
    euler(
        denoiser_of(read_schedule(config_of(scheduler)), network), scheduler.sigmas, noise(), scheduler, network, float
    )


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_steps(diffusers: Any, prediction: str, sigma_data: float) -> None:
    for name, more in (("EDMEulerScheduler", {}), ("EDMDPMSolverMultistepScheduler", {"solver_order": 1})):
        scheduler = getattr(diffusers, name)(sigma_min=0.01, sigma_max=60, sigma_data=sigma_data,
                                             prediction_type=prediction, **more)  # fmt: skip
        schedule, network = read_schedule(config_of(scheduler)), Network()
        assert (schedule.sigma_min, schedule.sigma_max, schedule.sigma_data) == (0.01, 60, sigma_data)
        assert (schedule.prediction, schedule.time) == ({"epsilon": "edm"}.get(prediction, "trig"), "quarter_log")
        scheduler.set_timesteps(6)
        euler(denoiser_of(schedule, network), scheduler.sigmas, noise(), scheduler, network, float)


def test_continuous_euler_is_preconditioned(diffusers: Any) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        **SD, prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=70.0,
        use_karras_sigmas=True,
    )  # fmt: skip
    schedule, network = read_schedule(config_of(scheduler)), Network()
    assert (schedule.process, schedule.sigma_data, schedule.sigma_max) == (EDM(), 1.0, 70.0)
    scheduler.set_timesteps(6)
    euler(denoiser_of(schedule, network), scheduler.sigmas, noise(), scheduler, network, float)


@pytest.mark.parametrize(
    ("name", "more", "shift"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, 1.0),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 3.0),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, math.exp(1.15)),
        ("DPMSolverMultistepScheduler",
         {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0, "solver_order": 1}, 2.0),
    ],
)  # fmt: skip
def test_flow_steps(diffusers: Any, name: str, more: dict[str, Any], shift: float) -> None:
    scheduler = getattr(diffusers, name)(**more)
    schedule, network = read_schedule(config_of(scheduler)), Network()
    assert (schedule.process, schedule.shift, schedule.sigma_max) == (RectifiedFlow(), pytest.approx(shift), math.inf)
    denoiser = denoiser_of(schedule, network)
    scheduler.set_timesteps(5, **({"mu": 0.8} if more.get("use_dynamic_shifting") else {}))
    ours = theirs = noise()
    for k, t in enumerate(scheduler.timesteps):
        told = 1000 * scheduler.sigmas[k]  # the timestep itself, but for DPM-Solver, which rounds it
        theirs = scheduler.step(network(theirs, per_row(told, theirs)), t, theirs).prev_sample
        now, then = (per_row(scheduler.sigmas[j], ours) for j in (k, k + 1))
        ours = denoiser.process.jump(ours, denoiser(ours, now), now, then)
        torch.testing.assert_close(network.given[-1][1], network.given[-2][1], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("least", [0.0, 0.002])
def test_consistency_models(diffusers: Any, least: float) -> None:
    """One step of CMStochasticIterativeScheduler is f, with the boundary at its sigma_min; it is told 250 ln sigma."""
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=least)
    schedule, network = read_schedule(config_of(scheduler)), Network()
    assert (schedule.time, schedule.boundary_shift, schedule.sigma_max) == ("quarter_log_thousand", least, 80.0)
    denoiser = Denoiser(network, schedule.process, schedule.parametrization(0.5), sample_shape=SHAPE).eval()
    for sigma, t in ((80.0, 1000 * 0.25 * math.log(80.0)),):
        scheduler.set_timesteps(1)
        x = sigma * noise()
        inputs = scheduler.scale_model_input(x, scheduler.timesteps[0])
        theirs = scheduler.step(network(inputs, per_row(t, x)), scheduler.timesteps[0], x).prev_sample
        torch.testing.assert_close(denoiser(x, sigma), theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(network.given[-1][1], network.given[-2][1], rtol=1e-6, atol=0)
        torch.testing.assert_close(network.given[-1][0], network.given[-2][0], rtol=1e-6, atol=1e-6)


def test_a_network_of_x_0_is_blended_to_keep_clean_samples() -> None:
    schedule = read_schedule({"_class_name": "DDPMScheduler", "prediction_type": "sample"})
    p = schedule.parametrization(0.5)
    assert p.blend == pytest.approx(0.01, rel=1e-2)  # the least noise level of the table
    denoiser = Denoiser(Network(), schedule.process, p, sample_shape=SHAPE).under(EDM()).eval()
    x = noise()
    torch.testing.assert_close(denoiser(x, 0.0), x)
    bare = denoiser_of(schedule, Network()).under(EDM())
    torch.testing.assert_close(denoiser(x, 10.0), bare(x, 10.0), rtol=1e-5, atol=1e-5)


# ---- what is known
@pytest.mark.parametrize("name", KNOWN)
def test_every_known_scheduler_exists_and_is_read_with_its_defaults(diffusers: Any, name: str) -> None:
    try:
        scheduler = getattr(diffusers, name)()
    except ImportError as error:
        pytest.skip(str(error))
    schedule = read_schedule(config_of(scheduler))
    bare = read_schedule({"_class_name": name} | ({"prediction_type": "epsilon"} if name in DISCRETE else {}))
    assert type(schedule.process) is type(bare.process)
    if name in DISCRETE:
        assert schedule.prediction == "eps"
        assert schedule.time == "native"
        assert torch.equal(torch.tensor(schedule.process.alphas_cumprod), scheduler.alphas_cumprod)
    else:
        assert schedule == bare  # the defaults here are theirs


def test_clipping_and_grids_change_nothing() -> None:
    plain = {"_class_name": "DDIMScheduler"}
    noisy = plain | {"clip_sample": True, "thresholding": True, "timestep_spacing": "trailing", "steps_offset": 1,
                     "use_karras_sigmas": True, "set_alpha_to_one": False}  # fmt: skip
    assert read_schedule(plain) == read_schedule(noisy)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "DDIMSchedular"}, r"'DDIMSchedular'.*Did you mean 'DDIMScheduler'\?.*FlowMatchEuler"),
        ({}, r"The scheduler 'None' does not say.*Known: DDPMScheduler"),
        ({"_class_name": "VQDiffusionScheduler"}, r"'VQDiffusionScheduler'.*Known: DDPMScheduler"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "score"},
         r"prediction type 'score' is not known\. .*Known: epsilon, v_prediction, sample"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"},
         r"prediction type 'sample' is not known\. Known: epsilon, v_prediction"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "epsilon"},
         r"prediction type 'epsilon' is not known\. Known: flow_prediction"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"},
         r"beta schedule 'laplace' is not known\. .*squaredcos_cap_v2"),
        ({"_class_name": "DDPMScheduler", "beta_end": "high"}, "settings of the DDPMScheduler cannot be used: c"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.0, 0.1]}, "not a decreasing sequence"),
        ({"_class_name": "DDPMScheduler", "trained_betas": "x"}, "settings of the DDPMScheduler cannot be used"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "told 1000 t.*500"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "inverted time is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_in_one_sentence(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_schedule(config)
