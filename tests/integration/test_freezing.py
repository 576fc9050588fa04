"""Frozen parts stay as they are and are the teacher's memory; learning rates per part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import EDM, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.data import open_source
from fewstep.errors import CheckpointError, ConfigError
from fewstep.runs import configure, make_trainer
from fewstep.training.frozen import storage_bytes
from fewstep.training.loop import Watcher
from fewstep.training.network import train_mode
from fewstep.training.optim import make_optimizer
from fewstep.training.student import make_student
from fewstep.training.trainer import StepReport, Trainer
from fewstep.world import World

BATCH = 4
SHORT: dict[str, Any] = {
    "images": 4 * BATCH, "batch_size": BATCH, "optim.lr": 1e-2, "optim.name": "adam", "eval.samples": 0,
    "output.sample_images": 0, "output.grid": 4, "output.checkpoint_images": 2 * BATCH,
    "emas": [{"kind": "constant", "beta": 0.5}],
}  # fmt: skip
ENCODER = {"student.freeze": ["down", "stem"]}


def configured(objective: str = "ect", **settings: Any) -> Any:
    return configure("tune", "demo", objective, SHORT | settings, "digits")


def trainer_of(teacher: Denoiser, config: Any) -> Trainer:
    return make_trainer(config, make_student(teacher, config), open_source("digits"), World(0, 1, torch.device("cpu")),
                        teacher)  # fmt: skip


def bits(network: Denoiser) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}


def test_frozen_parts_stay(tiny: Denoiser) -> None:
    """In the student, its averages, its companions; all the rest moves; and both are one piece of memory."""
    trainer = trainer_of(tiny, configured("tcm", **ENCODER))
    start = bits(trainer.student)
    frozen = {name for name in start if name.startswith(("down.", "stem."))}
    assert trainer.frozen == frozen
    for _ in trainer.steps():
        pass
    networks = [trainer.student, *trainer.averages, *trainer.beside.companions.values()]
    for network in networks:
        now = bits(network)
        moved = {name for name in start if not torch.equal(start[name], now[name])}
        assert moved == start.keys() - frozen
        for name in frozen:
            ours, theirs = network.backbone.get_parameter(name), tiny.backbone.get_parameter(name)
            assert ours.data_ptr() == theirs.data_ptr()
            assert not ours.requires_grad
    size, kept = (sum(tiny.backbone.get_parameter(n).nbytes for n in names) for names in (start, frozen))
    assert storage_bytes([tiny, *networks]) == size + len(networks) * (size - kept)
    assert all(p.requires_grad for p in tiny.parameters())


def test_frozen_parts_run_without_dropout(tiny: Denoiser) -> None:
    """Parts that are frozen as a whole rest; one with a single trained parameter does not."""
    trainer = trainer_of(tiny, configured(**{"student.freeze": ["down.0", "up.*.block.conv1"]}))
    trainer._train_mode()
    for name, module in trainer.student.backbone.named_modules():
        rests = (
            name == "down.0" or name.startswith("down.0.") or (name.startswith("up.") and name.endswith("block.conv1"))
        )
        assert module.training is not rests, name
    train_mode(trainer.student)
    assert trainer.student.backbone.get_submodule("down.0.block.dropout").training


class Stepping(nn.Linear):
    """A layer that acts after every step, as EDM2's do."""

    def after_step(self) -> None:
        with torch.no_grad():
            self.weight.mul_(0.5)


class Two(nn.Module):
    """Two such layers and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stepping(64, 64), Stepping(64, 64)
        self.first.register_buffer("scale", torch.ones(64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.flatten(1)) * self.first.scale)).reshape(x.shape)


def test_frozen_layers_do_not_act_after_steps() -> None:
    """Not before training either: their weights are the teacher's memory."""
    teacher = Denoiser.from_module(Two(), process=EDM(), prediction="x0", sample_shape=(1, 8, 8))
    before = bits(teacher)
    trainer = trainer_of(teacher, configured(**{"student.freeze": ["first"]}))
    assert trainer.frozen == {f"module.first.{each}" for each in ("weight", "bias", "scale")}
    assert torch.equal(trainer.student.backbone.module.second.weight, 0.5 * before["module.second.weight"])
    next(trainer.steps())
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(teacher).items())
    assert trainer.averages[0].backbone.module.first.scale is teacher.backbone.module.first.scale


class Halfway(Watcher):
    """Leaves the run in the middle, as a crash would."""

    def stepped(self, report: StepReport) -> None:
        if report.progress.images_seen == 3 * BATCH:
            raise KeyError


@pytest.mark.parametrize("objective", ["ect", "ctm"])
def test_resumed_and_loaded(objective: str, tiny_path: Path, tmp_path: Path) -> None:
    """A two-time student, too, whose frozen parts are inside of another network."""
    settings = SHORT | ENCODER
    whole = fewstep.tune(tiny_path, "digits", out=tmp_path / "whole", recipe="demo", objective=objective,
                         overrides=settings, device="cpu").path  # fmt: skip
    run = tmp_path / "run"
    with pytest.raises(KeyError):
        fewstep.tune(tiny_path, "digits", out=run, recipe="demo", objective=objective, overrides=settings,
                     device="cpu", watcher=Halfway())  # fmt: skip
    unfinished = fewstep.load(run)
    start = fewstep.load(tiny_path).backbone
    inner = getattr(unfinished.backbone, "inner", unfinished.backbone)
    assert torch.equal(inner.stem.weight, start.stem.weight)
    fewstep.resume(run, device="cpu")
    for file in ("student", "ema-0", "optimizer"):
        ours, theirs = (read_tensors(latest_checkpoint(each) / f"{file}.safetensors") for each in (run, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not any(".down." in f".{name}" or "stem" in name for name in ours)
    model = read_tensors(run / "model" / "model.safetensors")
    average = read_tensors(latest_checkpoint(run) / "ema-0.safetensors")
    assert model.keys() == unfinished.backbone.state_dict().keys()
    assert all(torch.equal(model[name], tensor) for name, tensor in average.items())
    record = json.loads((run / "report.json").read_text())
    facts = record["facts"]
    assert facts["trained"] == sum(t.numel() for n, t in average.items())
    assert facts["parameters"] == sum(t.numel() for t in model.values())


def test_a_start_that_changed(tiny_path: Path, tmp_path: Path) -> None:
    """The base is the model that the student starts from, wherever the teacher is."""
    start = tmp_path / "start"
    other = fewstep.load(tiny_path)
    other.backbone.stem.weight.data.mul_(1.5)
    fewstep.save_model(other, start)
    run = tmp_path / "run"
    with pytest.raises(KeyError):
        fewstep.tune(tiny_path, "digits", out=run, recipe="demo", device="cpu", watcher=Halfway(),
                     overrides=SHORT | ENCODER | {"student.start": str(start)})  # fmt: skip
    assert torch.equal(fewstep.load(run).backbone.stem.weight, other.backbone.stem.weight)
    fewstep.save_model(fewstep.load(tiny_path), start)
    with pytest.raises(CheckpointError, match=f"the rest is not in '{start}' any more"):
        fewstep.resume(run, device="cpu")


@pytest.mark.parametrize("name", ["adam", "radam", "adamw"])
def test_learning_rates_per_part(name: str) -> None:
    """One step on the same gradient: moves are proportional to the factors; several factors multiply."""
    module = nn.ModuleDict({"enc": nn.Linear(3, 3), "dec": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    config = configured(**{"optim.name": name, "optim.lr_scale": {"enc": 0.25, "dec.bias": 4, "bias": 0.5}}).optim
    module["head"].weight.requires_grad_(False)
    start = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = make_optimizer(module, config)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    moves = {n: float((start[n] - p.detach()).mean()) for n, p in module.named_parameters()}
    assert moves.pop("head.weight") == 0
    unit = moves["dec.weight"]
    factors = {"enc.weight": 0.25, "enc.bias": 0.125, "dec.weight": 1, "dec.bias": 2, "head.bias": 0.5}
    assert unit > 1e-4
    assert {n: move / unit for n, move in moves.items()} == pytest.approx(factors, rel=1e-3)


def test_schedules_multiply_the_factors(tiny: Denoiser) -> None:
    """Every step sets each group's rate to the schedule's times its factor."""
    schedule = {"optim.schedule": "linear", "optim.decay_share": 1.0, "optim.lr_scale": {"down": 0.1}}
    trainer = trainer_of(tiny, configured(**schedule))
    for step, report in enumerate(trainer.steps()):
        lr = 1e-2 * (1 - step / 4)
        assert report.lr == pytest.approx(lr)
        rates = {group["factor"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == pytest.approx({1.0: lr, 0.1: 0.1 * lr})


def test_an_edm2_network_takes_no_adapter_but_freezes() -> None:
    """A frozen layer's weights are not normalised again, which would change the teacher; trained ones are."""
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
              "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build({"name": "edm2", "kwargs": kwargs})
    for parameter in backbone.parameters():
        parameter.data.mul_(3).add_(0.1)
    teacher = Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match="no layer that takes an adapter.*Freeze parts of it"):
        make_student(teacher, configured(**{"adapter.kind": "lora"}))
    before = bits(teacher)
    frozen = {name for name in before if ".enc." in f".{name}"}
    trainer = trainer_of(teacher, configured(**{"student.freeze": ["enc"]}))
    norms = {
        n: float(p.detach().square().mean()) for n, p in trainer.student.backbone.named_parameters() if p.ndim == 4
    }
    assert all(norm == pytest.approx(1, abs=0.1) for name, norm in norms.items() if name not in frozen)
    assert all(norm > 4 for name, norm in norms.items() if name in frozen)
    assert 0 < len(frozen & norms.keys()) < len(norms)
    next(trainer.steps())
    assert all(torch.equal(before[name], tensor) for name, tensor in bits(teacher).items())
    assert all(torch.equal(before[name], bits(trainer.student)[name]) for name in frozen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student.freeze": ["*"]}, "Nothing is left to train"),
        ({"student.freeze": ["stem", "dwon"]}, r"of student.freeze means nothing.*Got: dwon. Did you mean 'down'\?"),
        ({"optim.lr_scale": {"mid": 2}}, r"of optim.lr_scale means nothing.*Got: mid. Did you mean 'middle'\?"),
        ({"student.freeze": ["stem"], "optim.lr_scale": {"stem": 2}}, "of optim.lr_scale means nothing"),
        ({"optim.lr_scale": {"down": 0}}, "must be positive numbers .*student.freeze"),
        ({"optim.lr_scale": {"down": "fast"}}, "must be positive numbers"),
    ],
)
def test_bad_patterns(settings: dict[str, Any], message: str, tiny: Denoiser) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(tiny, configured(**settings))
