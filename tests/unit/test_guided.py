"""Guided students: the pretrained network bit for bit at the start, a strength that is heard, kept and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Parametrization, load, sample, save_model
from fewstep.backbones import build
from fewstep.backbones.guided import GuidanceTold, with_guidance
from fewstep.backbones.two_time import with_landing
from fewstep.conditioning import Part
from fewstep.data.sources import ArraySource
from fewstep.ema import ConstantEMA
from fewstep.errors import ConfigError
from fewstep.objectives import ECD, ECT, MeanFlow
from fewstep.objectives.bridges import GuidedRay, TeacherStep
from fewstep.training.config import DataConfig, OptimConfig, RunConfig
from fewstep.training.student import make_student
from fewstep.training.synthetic import Sampler
from fewstep.training.trainer import Trainer
from fewstep.types import Samples
from fewstep.world import World

CLASSES = 3
SPECS: dict[str, dict[str, Any]] = {
    "edm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "label_dim": CLASSES},
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "attention": [4], "num_classes": CLASSES},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 2, "heads": 2, "num_classes": CLASSES},
    "mlp": {"sample_shape": [2], "width": 16, "depth": 2, "num_classes": CLASSES},
}  # fmt: skip
T = torch.tensor([0.02, 0.3, 1.0, 60.0])
LABELS = torch.arange(4) % CLASSES
W = torch.tensor([1.0, 1.7, 3.0, 0.2])
every = pytest.mark.parametrize("name", SPECS)


def scatter(module: nn.Module) -> None:
    """Move every weight, so that none is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def pretrained(name: str) -> Denoiser:
    spec = {"name": name, "kwargs": SPECS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(spec)
    scatter(network)
    shape = (2,) if name == "mlp" else (1, 8, 8)
    return Denoiser(
        network, EDM(), Parametrization(), sample_shape=shape, num_classes=CLASSES, spec=spec, sigma_max=70.0
    ).eval()


def student(name: str, low: float = 1.0, high: float = 3.0) -> Denoiser:
    """A guided student that has moved away from its start."""
    told = with_guidance(pretrained(name), low, high)
    scatter(told.backbone.strength)
    return told


def noisy(model: Denoiser) -> Tensor:
    return torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(1)).to(model.dtype)


# ------------------------------------------------------------------------------------------- the start
@every
@pytest.mark.parametrize("cast", [False, True])
def test_the_start_is_the_pretrained_network_bit_for_bit(name: str, cast: bool) -> None:
    teacher = pretrained(name)
    before = torch.random.get_rng_state()
    told = with_guidance(teacher, 1.0, 3.0, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert told.guided and not teacher.guided
    assert (told.guidance_range, told.sigma_max) == ((1.0, 3.0), 70.0)
    x = noisy(teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
        for cond in (LABELS, None):
            want = teacher(x, T, cond)
            for w in (None, 1.0, 2.5, W):
                assert torch.equal(told(x, T, cond, None, w), want)
    scatter(told.backbone.strength.last)
    assert not torch.allclose(told(x, T, LABELS, None, 2.5), teacher(x, T, LABELS), atol=1e-3)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    teacher = pretrained("unet")
    first, again, other = (with_guidance(teacher, 1.0, 3.0, k).backbone.strength.first.weight for k in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# ------------------------------------------------------------------------------------------- strength heard
@every
def test_every_row_hears_its_own_strength(name: str) -> None:
    told = student(name)
    x = noisy(told)
    together = told(x, T, LABELS, None, W)
    for i, w in enumerate(W.tolist()):
        torch.testing.assert_close(together[i], told(x, T, LABELS, None, w)[i], rtol=1e-5, atol=1e-5)
    outs = [told(x, T, LABELS, None, w) for w in (0.0, 1.0, 1.2, 3.0, 8.0)]
    assert all((a - b).flatten(1).norm(dim=1).min() > 1e-6 for i, a in enumerate(outs) for b in outs[:i])
    assert torch.equal(told(x, T, LABELS), told(x, T, LABELS, None, 1.0))


def test_rows_that_say_nothing_are_told_one() -> None:
    told = student("unet")
    x, cond = noisy(told), torch.nn.functional.one_hot(LABELS, CLASSES).float()
    cond[2] = 0
    assert torch.equal(told(x, T, None, None, W), told(x, T, None, None, 1.0))
    got, one = told(x, T, cond, None, W), told(x, T, cond, None, 1.0)
    torch.testing.assert_close(got[2], one[2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[1], one[1], atol=1e-4)


class Prompted(nn.Module):
    """A text network: its empty prompt is not zero."""

    landing_width = 4

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("null_cond", torch.tensor([1.0, -2.0]))
        self.mix = nn.Linear(4, 1)

    def forward(self, x: Samples, c_noise: Tensor, cond: Tensor, *, landing: Tensor | None = None) -> Tensor:
        added = 0 if landing is None else self.mix(landing)
        return x * (1 + cond.sum(1, keepdim=True) + added)


def test_the_empty_prompt_says_nothing() -> None:
    parts = (Part("text", (2,)),)
    model = Denoiser(Prompted(), EDM(), Parametrization("x0"), sample_shape=(1,), parts=parts)
    told = with_guidance(model, 1.0, 3.0)
    scatter(told.backbone.strength)
    x = torch.ones(3, 1)
    cond = torch.tensor([[1.0, -2.0], [0.0, 0.0], [1.0, 2.0]])
    assert torch.equal(told(x, 1.0, None), told(x, 1.0, cond[:1].expand(3, 2)))
    moved = (told(x, 1.0, cond, None, 3.0) - told(x, 1.0, cond, None, 1.0)).abs() > 1e-4
    assert moved.flatten().tolist() == [False, True, True]


def test_a_range_above_one_is_entered_at_its_lower_end() -> None:
    for (low, high), want in {(2.0, 4.0): 2.0, (1.0, 4.0): 1.0, (-1.0, 0.5): 0.5}.items():
        told = student("mlp", low, high)
        x = noisy(told)
        assert torch.equal(told(x, T, LABELS), told(x, T, LABELS, None, want))


# ---------------------------------------------------------------------------------------- kept and refused
def test_the_range_survives_a_file_and_bounds_what_may_be_asked_for(tmp_path: Path) -> None:
    save_model(student("unet", 1.5, 4.0), tmp_path / "model")
    back = load(tmp_path / "model")
    assert back.guidance_range == (1.5, 4.0)
    x = noisy(back)
    assert torch.equal(back(x, T, LABELS, None, W), student("unet", 1.5, 4.0)(x, T, LABELS, None, W))
    sample(back, 2, cond=LABELS[:2], guidance=4.0)
    with pytest.raises(ConfigError, match=r"not tuned for that strength of guidance. Got: 1. Wanted: 1.5 to 4"):
        sample(back, 2, cond=LABELS[:2], guidance=1)


def test_another_range_keeps_what_was_learnt() -> None:
    told = student("mlp")
    wide = with_guidance(told, 1.0, 5.0, seed=9)
    x = noisy(told)
    assert torch.equal(wide(x, T, LABELS, None, W), told(x, T, LABELS, None, W))
    assert wide.backbone.inner is told.backbone.inner
    assert (told.guidance_range, wide.guidance_range) == ((1.0, 3.0), (1.0, 5.0))
    assert wide.spec == {"name": "guided", "kwargs": {"inner": pretrained("mlp").spec, "low": 1.0, "high": 5.0}}


def test_what_cannot_be_guided_says_so() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return x

    own = Denoiser.from_module(Own(), process=EDM(), prediction="x0", sample_shape=(2,), num_classes=2)
    for model in (own, with_landing(pretrained("mlp"))):
        with pytest.raises(ConfigError, match=r"cannot be told a strength of guidance.*leave objective.bridge"):
            with_guidance(model, 1.0, 3.0)
    free = Denoiser(
        build({"name": "mlp", "kwargs": {"sample_shape": [2]}}), EDM(), Parametrization(), sample_shape=(2,)
    )
    with pytest.raises(ConfigError, match="Guidance needs a class-conditional model"):
        with_guidance(free, 1.0, 3.0)
    with pytest.raises(ConfigError, match="cannot be told a landing time"):
        with_landing(student("mlp"))


# -------------------------------------------------------------------------------------------------- runs
def config(objective: ECD | ECT | MeanFlow, drop: float = 0.2, **settings: Any) -> RunConfig:
    return RunConfig(
        images=96, batch_size=16, objective=objective, emas=(ConstantEMA(0.5),), data=DataConfig(label_drop=drop),
        optim=OptimConfig(name="adam", lr=1e-2), **settings,
    )  # fmt: skip


def trained(run: RunConfig) -> Trainer:
    teacher = pretrained("mlp")
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(48) % CLASSES
    source = ArraySource("points", torch.randn(48, 2, generator=generator) + labels[:, None], labels.numpy())
    trainer = Trainer(run, make_student(teacher, run), source, World(0, 1, torch.device("cpu")), teacher)
    for _ in trainer.steps():
        pass
    return trainer


@pytest.mark.parametrize("objective", [ECD(bridge=TeacherStep("euler", 1.0, 3.0)), ECT(bridge=GuidedRay(1.0, 3.0))])
def test_a_run_makes_a_guided_student(objective: ECD | ECT) -> None:
    trainer = trained(config(objective))
    again = trained(config(objective))
    assert trainer.student.guidance_range == trainer.averages[0].guidance_range == (1.0, 3.0)
    assert trainer.beside.teacher is not None and not trainer.beside.teacher.guided
    weights = trainer.student.backbone.strength
    assert weights.last.weight.abs().max() > 1e-3  # it has learnt something
    assert torch.equal(weights.last.weight, again.student.backbone.strength.last.weight)
    few = {w: sample(trainer.averages[0], 3, cond=LABELS[:3], guidance=w) for w in (1.0, 3.0)}
    assert not torch.allclose(few[1.0], few[3.0], atol=1e-4)


def test_a_run_whose_labels_are_all_dropped_learns_nothing_of_guidance() -> None:
    trainer = trained(config(ECD(bridge=TeacherStep("euler", 1.0, 3.0)), drop=1.0))
    first = with_guidance(pretrained("mlp"), 1.0, 3.0).backbone.strength.first.weight
    assert torch.equal(trainer.student.backbone.strength.first.weight[:, 16:], first[:, 16:])  # sin(0) = 0
    got = [sample(trainer.averages[0], 3, guidance=w) for w in (1.0, 3.0)]
    assert torch.equal(*got)


def test_a_guided_start_needs_an_objective_that_tells_it(tmp_path: Path) -> None:
    save_model(student("mlp"), tmp_path / "start")
    from fewstep.training.config import StudentConfig

    start = StudentConfig(start=str(tmp_path / "start"))
    wide = ECD(bridge=TeacherStep("euler", 1.0, 4.0))
    assert make_student(pretrained("mlp"), config(wide, student=start)).guidance_range == (1.0, 4.0)
    for objective in (ECT(), ECD(bridge=TeacherStep("euler", 2.0)), MeanFlow()):
        with pytest.raises(ConfigError, match=r"objective says none|cannot be told a landing time"):
            make_student(pretrained("mlp"), config(objective, student=start))


def test_a_guided_student_is_no_diffusion_model() -> None:
    run, few = config(ECD()), student("mlp")
    source = ArraySource("points", torch.zeros(8, 2), np.arange(8) % CLASSES)
    with pytest.raises(ConfigError, match="follows a diffusion model, and the teacher is a few-step model"):
        Trainer(run, pretrained("mlp"), source, World(0, 1, torch.device("cpu")), few)
    with pytest.raises(ConfigError, match="This is a few-step model, and the samples are to be a diffusion model's"):
        Sampler(few)


def test_the_kind_of_network() -> None:
    assert isinstance(student("mlp").backbone, GuidanceTold)
