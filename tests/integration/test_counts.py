"""What an update costs, guarded by counts: operations by phase, FLOPs, bytes, waits for the device. Never by time.

The trainer's second step is counted, on a simulated device. A bound that is broken says which phase got dearer; lower
it where a phase got cheaper.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

from fewstep import Denoiser, open_source, runs
from fewstep.backbones import build
from fewstep.backbones.edm import ddpmpp
from fewstep.denoiser import Parametrization
from fewstep.objectives.pairs import target_pass
from fewstep.process import EDM
from fewstep.training.cost import Counting, Memory, Work
from fewstep.training.plan import Need, plan
from fewstep.training.simulated import DEVICE, HOST, SimulatedDevice, Wait
from fewstep.training.trainer import Trainer
from fewstep.world import World

FITS = [({"precision": "fp16", "speed.recompute": True}, 6e9), ({"precision": "fp16"}, 12e9)]
"""Settings -> bytes that DDPM++ must fit in on CUDA at batch 128, all in."""

SMALL_EDM = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.2}
BATCH = 8

BOUNDS: dict[str, dict[str, int]] = {
    "unet": {"data": 4, "random": 1161, "student": 214, "target": 181, "backward": 391, "sanitise": 100, "norm": 103}
    | {"optimiser": 2, "ema": 2, "other": 92},
    "edm": {"data": 4, "random": 1548, "student": 301, "target": 250, "backward": 510, "sanitise": 142, "norm": 145}
    | {"optimiser": 2, "ema": 10, "other": 92},
}
"""Most operations of an update by network and phase; for 100 and 142 parameter tensors."""


SPECS: dict[str, dict[str, Any]] = {
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1, 2], "blocks": 1, "dropout": 0.2},
    "edm": ddpmpp(8, channels=1) | SMALL_EDM,
}


def network(name: str) -> Denoiser:
    """A tiny U-Net, or a tiny DDPM++ with every kind of block, for 8x8 images."""
    spec = {"name": name, "kwargs": SPECS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec)


def trainer_of(
    net: Denoiser, device: torch.device, objective: str = "ect", data: str = "digits", **settings: Any
) -> Trainer:
    """A run at its end, where every row has its target pass."""
    settings = {
        "images": 10**6,
        "batch_size": BATCH,
        "student.dropout": 0.2,
        "optim.guard": "clamp",
        "emas": [{"kind": "constant", "beta": 0.99}],
    } | settings
    config = runs.configure("tune", "fast", objective, settings, data)
    student = runs.make_student(net, config)
    source = open_source(data, resize=net.sample_shape[-1], labels=False)
    trainer = runs.make_trainer(config, student, source, World(0, 1, device), net)
    trainer.images_seen = 10**6 - 4 * config.batch_size
    return trainer


@dataclass(frozen=True)
class Found:
    """Of one update."""

    work: Work
    waits: tuple[Wait, ...]
    memory: Memory


def count(net: Denoiser, objective: str = "ect", hollow: bool = False, **settings: Any) -> Found:
    with SimulatedDevice(hollow=hollow) as device, Memory(only=device.has) as memory:
        steps = trainer_of(net, DEVICE, objective, **settings).steps()
        next(steps)
        device.waits.clear()
        memory.restart()
        with Counting() as counting:
            next(steps)
        steps.close()  # type: ignore[attr-defined]
    return Found(counting.work, tuple(device.waits), memory)


@cache
def usual(name: str) -> Found:
    return count(network(name))


@pytest.mark.parametrize("name", BOUNDS)
def test_an_update_dispatches_no_more_operations_than_that(name: str) -> None:
    found = usual(name).work.operations
    assert {phase: n for phase, n in found.items() if n > BOUNDS[name].get(phase, 0)} == {}
    assert {"student", "target", "backward", "optimiser", "ema", "random"} <= found.keys()


def test_an_update_is_four_forward_passes() -> None:
    flops = usual("edm").work.flops
    assert flops["target"] == flops["student"]
    assert flops["backward"] == pytest.approx(2 * flops["student"], rel=0.03)
    with torch.no_grad(), Counting() as counting:
        net = network("edm")
        target_pass(net, torch.ones(BATCH, 1, 8, 8), torch.ones(BATCH), torch.arange(BATCH), None, None)
    assert counting.work.flops["target"] == flops["target"]


def test_rows_that_are_their_own_target_cost_no_pass() -> None:
    early = count(network("unet"), **{"objective.schedule": {"kind": "stages", "q": 1.0001, "images": 10**9}})
    assert 0 <= early.work.flops["target"] < 0.7 * early.work.flops["student"]


@pytest.mark.parametrize("objective", ["ect", "ct", "cd", "cmt", "multistep"])
def test_an_update_never_waits_for_the_device(objective: str) -> None:
    assert count(network("unet"), objective).waits == ()


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp16"},
        {"precision": "bf16", "speed.recompute": True},
        {"optim.clip": 1.0, "optim.guard": "stop"},
        {"speed.resident": "on", "data.flip": True},
        {"micro_batch": 4, "emas": [{"kind": "power", "std": 0.1}, {"kind": "half_life"}]},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_no_setting_makes_an_update_wait(settings: dict[str, Any]) -> None:
    assert count(network("unet"), **settings).waits == ()


def test_a_read_that_is_planted_in_the_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(target: Denoiser, x_r: torch.Tensor, r: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        return target_pass(target, x_r, r, *more, **named) if r.max() > 0 else x_r

    monkeypatch.setattr("fewstep.objectives.pairs.target_pass", reading)
    (wait,) = count(network("unet")).waits
    assert wait.what == "_local_scalar_dense" and wait.where.startswith("test_counts.py:")


def test_a_hollow_step_counts_as_a_real_one() -> None:
    real, hollow = usual("edm"), count(network("edm"), hollow=True)
    assert hollow.work.flops == real.work.flops
    assert hollow.memory.peak == pytest.approx(real.memory.peak, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- memory
def kept(**settings: Any) -> float:
    """Bytes per image that autograd keeps."""
    need = Need.count(trainer_of(network("edm"), HOST, **settings), several=False)
    return need.kept(101) - need.kept(100)


def test_what_autograd_keeps_of_an_image_does_not_grow() -> None:
    full = kept()
    assert full <= 301_000
    assert kept(precision="bf16") <= 0.65 * full
    assert kept(**{"speed.recompute": True}) <= 0.2 * full


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 16, "precision": "bf16"}, {"speed.recompute": True}])
def test_the_plan_predicts_the_peak_of_a_step(settings: dict[str, Any]) -> None:
    settings = {"batch_size": 64, "emas": [{"kind": "constant", "beta": 0.99}] * 2} | settings
    predicted = plan(trainer_of(network("edm"), HOST, **settings), budget=0.01)
    with Memory(only=lambda tensor: tensor.is_floating_point()) as memory:
        steps = trainer_of(network("edm"), HOST, **settings).steps()
        next(steps)
        memory.restart()
        next(steps)
        steps.close()  # type: ignore[attr-defined]
    assert predicted.memory == pytest.approx(memory.peak, rel=0.1)


def test_the_plan_says_what_would_make_it_fit() -> None:
    trainer = trainer_of(network("edm"), HOST, batch_size=64)
    whole = plan(trainer, budget=0.01)
    assert whole.remedies == {}
    lasting = whole.weights + whole.gradients + whole.optimizer + whole.averages
    room = lasting + (whole.memory - lasting) // 3
    tight = plan(trainer_of(network("edm"), HOST, batch_size=64), budget=0.01, room=room)
    assert list(tight.remedies) == ["micro_batch=16", "precision=bf16", "speed.recompute=true"]
    assert tight.remedies["micro_batch=16"] <= room < whole.memory == tight.memory
    assert max(tight.remedies.values()) < whole.memory
    again = plan(trainer_of(network("edm"), HOST, batch_size=64, micro_batch=16), budget=0.01, room=room)
    assert again.memory == pytest.approx(tight.remedies["micro_batch=16"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "limit"), FITS)
def test_tuning_56_million_parameters_at_batch_128_fits(settings: dict[str, Any], limit: float) -> None:
    spec = {"name": "edm", "kwargs": ddpmpp(32, channels=3)}
    net = Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(3, 32, 32), spec=spec)
    found = count(net, hollow=True, data="tiles", batch_size=128, **settings)
    assert found.work.flops["student"] / 128 == pytest.approx(42.38e9, rel=1e-4)
    assert found.memory.peak < limit
