"""Pipelines for plain diffusers: 1, 2 and 4 steps are fewstep's, and refusals say what to do instead."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep import Denoiser
from fewstep.backbones import build
from fewstep.errors import CheckpointError, ConfigError
from fewstep.exports.stepping import stepping_of
from fewstep.sampling import few_step_times

STEPS = (1, 2, 4)
LABELS = [3, 1]
PIXELS = ("consistency", "shifted", "eps", "v", "x0")
PLAIN = ("dit", "flow")
Get = Callable[[str], Any]


def labels_of(name: str) -> dict[str, Any]:
    return {"class_labels": LABELS} if name in ("consistency", "v", "dit") else {}


def rows(denoiser: Denoiser) -> Tensor | None:
    return torch.tensor(LABELS) if denoiser.num_classes else None


@pytest.fixture(scope="module")
def theirs(exported: Get, plain_diffusers: Callable[[dict[str, Any]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What plain diffusers makes of every export: with the arguments of the card, and with a number of steps."""
    requests: dict[str, Any] = {}
    for name in (*PIXELS, *PLAIN):
        made, common = exported(name), {"output_type": "pt"} | labels_of(name)
        common |= {"guidance_scale": 1.0} if name == "dit" else {"batch_size": 2}
        for n in STEPS:
            requests[f"{name}-{n}"] = made.folder, common | {"num_inference_steps": n}
            if name in PIXELS:
                told = {"num_inference_steps": None} | made.about["calls"][str(n)]
                requests[f"{name}-{n}-told"] = made.folder, common | told
    return plain_diffusers(requests)


def start_of(made: Any, top: float) -> float:
    """Where diffusers starts, relative to ``T z``."""
    return 1.0 if made.about["scheduler"].startswith("CM") else math.sqrt(1 + top**-2)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("told", [True, False], ids=["told", "plain"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["consistency", "eps", "v"])
def test_steps_are_ours(name: str, steps: int, told: bool, exported: Get, theirs: dict[str, Tensor]) -> None:
    """With the card's arguments at our own levels, and with num_inference_steps at those that the card tells."""
    made = exported(name)
    levels = made.about["levels" if told else "plain"][str(steps)]
    assert len(levels) == steps
    wanted = made.ours(levels, start_of(made, levels[0]), rows(made.denoiser))
    assert_same(theirs[f"{name}-{steps}{'-told' if told else ''}"], wanted)


@pytest.mark.parametrize("steps", STEPS)
def test_a_boundary_shift_is_the_scheduler_s_sigma_min(steps: int, exported: Get, theirs: dict[str, Tensor]) -> None:
    """Exact but for the fresh noise, whose square diffusers lessens by that of the shift: 6e-6 of it at level 0.8."""
    made = exported("shifted")
    levels = made.about["levels"][str(steps)]
    noise = made.draws(steps)
    lessened = [z * math.sqrt(1 - (0.003 / level) ** 2) for z, level in zip(noise, levels, strict=True)]
    lessened[0] = noise[0]
    model = made.denoiser.under(fewstep.EDM())
    x = torch.zeros_like(noise[0])
    with torch.no_grad():
        for z, level in zip(lessened, levels, strict=True):
            x = model(x + level * z, level)
    assert_same(theirs[f"shifted-{steps}-told"], x)
    assert (theirs[f"shifted-{steps}-told"] - made.ours(levels, 1.0)).abs().max() < 5e-5


@pytest.mark.parametrize("steps", STEPS)
def test_a_network_that_predicts_x_0_loses_its_blend_only(steps: int, exported: Get, theirs: dict[str, Tensor]) -> None:
    made = exported("x0")
    levels = made.about["levels"][str(steps)]
    found, p = theirs[f"x0-{steps}-told"], made.denoiser.parametrization
    wanted = made.ours(levels, start_of(made, levels[0]))
    assert (found - wanted).abs().max() < 1e-5 + 10 * (p.blend / levels[-1]) ** 2
    bare = made.denoiser.with_parametrization(fewstep.Parametrization("x0", p.sigma_data, "native"))
    made = type(made)(bare, made.folder, made.about)
    assert_same(found, made.ours(levels, start_of(made, levels[0])))


@pytest.mark.parametrize("steps", STEPS)
def test_latents_of_a_dit(steps: int, exported: Get, theirs: dict[str, Tensor]) -> None:
    """The first half of what it predicts; its labels; the VAE goes along."""
    made = exported("dit")
    levels = made.about["plain"][str(steps)]
    assert_same(theirs[f"dit-{steps}"], made.ours(levels, start_of(made, levels[0]), rows(made.denoiser)))
    assert (made.folder / "vae" / "config.json").is_file()
    assert made.about["calls"] == {}


@pytest.mark.parametrize("steps", STEPS)
@torch.no_grad()
def test_a_flow_model_starts_at_t_1(steps: int, exported: Get, theirs: dict[str, Tensor]) -> None:
    """In its own time, since t = 1 is no finite noise level: ``x <- f(t z + (1 - t) x)``."""
    made = exported("flow")
    plain = made.about["plain"][str(steps)]
    assert plain[0] is None
    noise = made.draws(steps)
    x = torch.zeros_like(noise[0])
    for level, z in zip(plain, noise, strict=True):
        t = 1.0 if level is None else level / (1 + level)
        x = made.denoiser(t * z + (1 - t) * x, t)
    assert_same(theirs[f"flow-{steps}"], x)


@pytest.mark.parametrize("name", ["consistency", "shifted", "flow"])
def test_two_plain_steps_are_our_two(name: str, exported: Get) -> None:
    """rho of the ramp, and shift of the flow, put the second step at fewstep's own second level."""
    made = exported(name)
    assert made.about["plain"]["2"][1] == pytest.approx(few_step_times(made.denoiser, 2)[1], rel=1e-6)


@pytest.mark.parametrize("name", ["consistency", "shifted", "eps", "v", "x0"])
def test_told_levels_are_near_our_own(name: str, exported: Get) -> None:
    """Within 1e-4 on a ramp, within half an entry of a table of betas."""
    made = exported(name)
    near = 2e-4 if name in ("consistency", "shifted") else 0.01
    for n, levels in made.about["levels"].items():
        first = max(near, 0.3) if name == "x0" else near  # a cosine table ends in wide steps
        own = few_step_times(made.denoiser, int(n))
        assert levels[0] == pytest.approx(own[0], rel=first)
        assert levels[0] <= own[0] * (1 + 1e-6)
        assert levels[1:] == pytest.approx(own[1:], rel=near)


@pytest.mark.parametrize("name", [*PIXELS, *PLAIN])
@torch.no_grad()
def test_fewstep_loads_it_again(name: str, exported: Get) -> None:
    """The same function; the betas of a cosine table are rounded."""
    made = exported(name)
    again, x = fewstep.load(made.folder), made.draws(1)[0]
    for level in (0.5, 20.0):
        ours, theirs = (d.under(fewstep.EDM())(x * level, level, rows(d)) for d in (made.denoiser, again))
        assert (ours - theirs).abs().max() <= (1e-4 if name == "x0" else 1e-5) * max(1.0, float(ours.abs().max()))


def test_boundary_of_the_lcm_scheduler_is_exactly_one(exported: Get) -> None:
    made = exported("eps")
    stepping = stepping_of(made.denoiser)
    assert stepping is not None
    for t in (1, 222, 929):
        c_skip, c_out = stepping.scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(t))
        assert float(c_out) == 1.0
        assert float(c_skip) < 3e-19


# --- what diffusers cannot do -----------------------------------------------------------------------------------------


def unet_model() -> Denoiser:
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1}}
    return Denoiser(build(spec), fewstep.EDM(), fewstep.Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec)


def with_sampler(denoiser: Denoiser, sampler: Any, times: dict[int, tuple[float, ...]]) -> Denoiser:
    twin = denoiser.clone()
    twin.sampler, twin.sampler_times = sampler, times
    return twin


def test_refusals_name_the_other_formats(exported: Get, tmp_path: Path) -> None:
    from fewstep.backbones.two_time import with_landing

    eps, flow, consistency = (exported(name).denoiser for name in ("eps", "flow", "consistency"))
    quarter = consistency.with_parametrization(fewstep.Parametrization("edm"))
    grey = eps.clone()
    grey.value_range = (0.0, 1.0)
    cases = {
        "a network 'unet'": unet_model(),
        "a network 'of your own'": Denoiser.from_module(
            torch.nn.Identity(), process=fewstep.EDM(), prediction="x0", sample_shape=(1, 8, 8)
        ),
        "told where it lands": with_landing(consistency),
        "prediction 'edm' and time 'quarter_log'": quarter,
        "sampled by jump": with_sampler(eps, "jump", {2: (80.0, 0.8)}),
        "jumps between its own noise levels": with_sampler(flow, "jump", {2: (80.0, 0.8)}),
        "values in (0.0, 1.0)": grey,
    }
    for words, denoiser in cases.items():
        with pytest.raises(ConfigError) as caught:
            fewstep.export(denoiser, tmp_path / "out")
        assert words in str(caught.value)
        assert "--to torch or --to onnx" in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_network_that_would_sample_otherwise_is_not_kept(
    exported: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fewstep.exports.diffusers as module

    right = stepping_of(exported("consistency").denoiser)
    assert right is not None
    right.scheduler.register_to_config(sigma_min=0.002)
    monkeypatch.setattr(module, "stepping_of", lambda *_given, **_named: right)
    with pytest.raises(ConfigError, match="other samples of this network than fewstep"):
        fewstep.export(exported("consistency").denoiser, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vae_that_is_gone(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("dit"), tmp_path / "teacher")
    denoiser = fewstep.load(tmp_path / "teacher")
    from fewstep.backbones.vae import open_codec

    denoiser.codec = open_codec(denoiser.codec.description)  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "teacher" / "vae")
    with pytest.raises(CheckpointError, match="There is no VAE"):
        fewstep.export(denoiser, tmp_path / "out")


def test_an_output_that_is_taken(exported: Get, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        fewstep.export(exported("eps").denoiser, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="Did you mean 'torch'"):
        fewstep.export(exported("eps").denoiser, tmp_path / "new", "troch")  # type: ignore[arg-type]
