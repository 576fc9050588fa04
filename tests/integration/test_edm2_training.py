"""Training EDM2 networks: weights stay normalised, averages follow them, a run resumes to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import EDM, Denoiser, Parametrization, load, save_model
from fewstep.backbones import build
from fewstep.backbones.edm2_layers import MPConv
from fewstep.data.sources import ArraySource
from fewstep.ema import PowerEMA
from fewstep.errors import ConfigError
from fewstep.objectives import ECT
from fewstep.times import Stages
from fewstep.training.config import OptimConfig, RunConfig, StudentConfig
from fewstep.training.loop import Watcher
from fewstep.training.trainer import StepReport, Trainer
from fewstep.world import World

KWARGS: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_channels": 8, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8, "dropout": 0.1,
}  # fmt: skip
SPEC: dict[str, Any] = {"name": "edm2", "kwargs": KWARGS}
BATCH, STD = 8, 0.1


def make_teacher() -> Denoiser:
    """With weights of any size, as averages of trained weights have, and gains that are not 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(SPEC)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.mul_(0.7).add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Denoiser(network, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), num_classes=10, spec=SPEC).eval()


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Of its magnitude-preserving layers, but for the log-variance, which is not trained."""
    found = {name: layer.weight.detach() for name, layer in network.named_modules() if isinstance(layer, MPConv)}
    return {name: weight for name, weight in found.items() if "logvar" not in name}


def distance_from_normal(network: nn.Module) -> float:
    """Largest distance of a row's magnitude from the one at which normalising rests, 1 - 1e-4."""
    rows = [w.flatten(1).double().square().mean(1).sqrt() for w in weights(network).values()]
    return float((torch.cat(rows) - (1 - 1e-4)).abs().max())


def make_trainer(teacher: Denoiser, **student: Any) -> Trainer:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=generator)
    config = RunConfig(
        images=5 * BATCH, batch_size=BATCH, objective=ECT(schedule=Stages(q=8.0, last=0)),
        student=StudentConfig(**student), optim=OptimConfig(name="adam", lr=0.1), emas=(PowerEMA(STD),),
    )  # fmt: skip
    data = ArraySource("images", images, np.arange(32) % 10)
    return Trainer(config, teacher.clone(), data, World(0, 1, torch.device("cpu")))


def test_weights_stay_normalised_and_the_log_variance_as_it_was() -> None:
    teacher = make_teacher()
    assert distance_from_normal(teacher.backbone) > 0.05
    trainer = make_trainer(teacher)
    network = trainer.student.backbone
    assert distance_from_normal(network) < 1e-3
    last = {name: weight.clone() for name, weight in weights(network).items()}
    for _ in trainer.steps():
        assert distance_from_normal(network) < 1e-4  # a step of 0.1 alone would move rows by 0.005 and more
        moved = [float((weight - last[name]).abs().max()) for name, weight in weights(network).items()]
        assert min(moved) > 0.01
        last = {name: weight.clone() for name, weight in weights(network).items()}
    for name, tensor in network.state_dict().items():
        if "logvar" in name or "fourier" in name:
            assert torch.equal(tensor, teacher.backbone.state_dict()[name]), name


def test_the_power_average_follows_the_normalised_weights() -> None:
    """``beta = (1 - B/n)^(gamma + 1)``; the first step copies the student; gamma of 0.1 is 6.94 (math.md 5)."""
    trainer = make_trainer(make_teacher())
    names = [name for name, p in trainer.student.named_parameters() if p.requires_grad]
    mean: dict[str, Tensor] = {}
    for report in trainer.steps():
        beta = (1 - BATCH / report.progress.images_seen) ** 7.94
        now = {name: p.detach().double() for name, p in trainer.student.named_parameters()}
        mean = {name: beta * mean.get(name, torch.tensor(0.0)) + (1 - beta) * now[name] for name in names}
        held = dict(trainer.averages[0].named_parameters())
        for name in names:
            torch.testing.assert_close(held[name].detach().double(), mean[name], rtol=1e-4, atol=1e-4, msg=name)
    assert distance_from_normal(trainer.student.backbone) < 1e-4
    assert distance_from_normal(trainer.averages[0].backbone) > 2e-4  # an average of unit vectors is shorter


def test_dropout_by_resolution_reaches_the_trainer() -> None:
    trainer = make_trainer(make_teacher(), dropout=0.4, dropout_max_resolution=4)
    layers = [layer for layer in trainer.student.modules() if isinstance(layer, nn.Dropout)]
    assert {(layer.resolution, layer.p) for layer in layers} == {(8, 0.0), (4, 0.4)}
    unet = Denoiser(
        build({"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1}}),
        EDM(), Parametrization("edm"), sample_shape=(1, 8, 8),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="does not say at which resolution"):
        make_trainer(unet, dropout=0.4, dropout_max_resolution=4)


class Stop(Exception):
    """Leaves a run from inside, as a crash would."""


class StopAt(Watcher):
    """Raises :class:`Stop` when ``images`` were seen."""

    def __init__(self, images: int) -> None:
        self.images = images

    def stepped(self, report: StepReport) -> None:
        if report.progress.images_seen == self.images:
            raise Stop


@pytest.mark.parametrize("kind", ["ect", "ctm"])
def test_the_imagenet_recipe_runs_and_resumes_to_the_same_bits(
    kind: str, tmp_path: Path, same_bits: Callable[[Path, Path], None]
) -> None:
    """The published recipe, shortened, on digits; also for a student that is told where it lands."""
    save_model(make_teacher(), tmp_path / "teacher")
    settings: dict[str, Any] = {
        "images": 48, "batch_size": 8, "micro_batch": 4, "student.dropout_max_resolution": 4, "data.labels": True,
        "output": {"log_images": 8, "checkpoint_images": 16, "sample_images": 0}, "eval.samples": 0,
    }  # fmt: skip
    if kind == "ect":
        settings["objective.schedule.images"] = 12
    else:
        settings["student.sampler_times"] = {}

    def tune(out: Path, watcher: Watcher | None = None) -> None:
        fewstep.tune(
            str(tmp_path / "teacher"), "digits", out=out, recipe="imagenet64-s", overrides=settings, device="cpu",
            objective=None if kind == "ect" else kind, watcher=watcher,
        )  # fmt: skip

    tune(tmp_path / "whole")
    with pytest.raises(Stop):
        tune(tmp_path / "run", StopAt(40))
    fewstep.resume(tmp_path / "run", device="cpu")
    same_bits(tmp_path / "run", tmp_path / "whole")
    student = load(tmp_path / "run", weights="student")
    assert distance_from_normal(student.backbone) < 1e-4
    rebuilt = load(tmp_path / "run", weights="std=0.075")  # from the snapshots of three power-function averages
    assert rebuilt.num_classes == 10
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(rebuilt(x, 80.0, torch.tensor([0, 1])), rebuilt(x, 80.0, torch.tensor([1, 0])))
