"""The networks, the data and the runs that bench/step.py and bench/growth.py time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from fewstep import open_source
from fewstep.backbones import build
from fewstep.backbones.edm import ddpmpp
from fewstep.data import Source
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.ema import AnyEMA, ConstantEMA
from fewstep.objectives import ECT
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.times import Lognormal, Sigmoid, Stages
from fewstep.training.config import OptimConfig, Precision, RunConfig, SpeedConfig, StudentConfig
from fewstep.training.trainer import Trainer
from fewstep.world import World

ENDLESS = 10**12
Layout = Literal["auto", "contiguous", "channels_last"]


@dataclass(frozen=True)
class Net:
    """A network to time: how it is built, pixels per side, and batches that a core and a GPU take in their stride."""

    spec: dict[str, Any]
    side: int
    cpu_batch: int
    cuda_batch: int = 128
    dropout: float = 0.2
    dropout_max_resolution: int | None = None


def _small(name: str, side: int, **kwargs: Any) -> dict[str, Any]:
    return {"name": name, "kwargs": {"sample_shape": [3, side, side]} | kwargs}


_EDM2S = {"name": "edm2", "kwargs": {"img_resolution": 64, "img_channels": 3, "model_channels": 192}}
NETS: dict[str, Net] = {
    "ddpmpp": Net({"name": "edm", "kwargs": ddpmpp(32)}, 32, 2),
    "edm2s": Net(_EDM2S, 64, 1, 64, dropout=0.4, dropout_max_resolution=16),
    "unet": Net(_small("unet", 32, channels=64, multipliers=[1, 2], attention=[16]), 32, 8),
    "dit": Net(_small("dit", 32, width=192, depth=6, heads=6, patch=4), 32, 16),
    "tiny": Net(_small("unet", 16, channels=16, multipliers=[1, 2], blocks=1, attention=[8]), 16, 16),
}


def network(net: Net, device: torch.device, seed: int = 0) -> Denoiser:
    """A denoiser with seeded weights; layers that begin at 0 get some, so that every layer gets a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build(net.spec)
        for parameter in backbone.parameters():
            if parameter.ndim != 1 and float(parameter.detach().square().mean()) < 1e-6:
                fan_in = parameter[0].numel() if parameter.ndim else 1
                torch.nn.init.normal_(parameter, std=0.3 * fan_in**-0.5)
        for layer in backbone.modules():
            if isinstance(layer, torch.nn.Dropout):
                above = getattr(layer, "resolution", 0) > (net.dropout_max_resolution or ENDLESS)
                layer.p = 0.0 if above else net.dropout
    shape = (3, net.side, net.side)
    return Denoiser(backbone, EDM(), Parametrization(), sample_shape=shape, spec=net.spec).to(device)


def images(side: int) -> Source:
    """4,192 real images (pixel art, CC0), which ship with the package."""
    return open_source("tiles", resize=side, labels=False)


@dataclass(frozen=True)
class Variant:
    """One way to execute our step: ``bf16+compile+channels_last`` as a record."""

    precision: Precision
    compile: bool = False
    layout: Layout = "auto"
    recompute: bool = False

    @classmethod
    def of(cls, name: str) -> Variant:
        """Read a name: the arithmetic, then any of compile, recompute, contiguous, channels_last, joined by +."""
        precision, *more = name.split("+")
        unknown = set(more) - {"compile", "recompute", "contiguous", "channels_last"}
        if unknown or precision not in ("auto", "fp32", "tf32", "fp16", "bf16"):
            raise SystemExit(f"'{name}' is no variant: fp32, tf32, fp16, bf16, auto, +compile, +recompute, +LAYOUT")
        layout = next((m for m in more if m in ("contiguous", "channels_last")), "auto")
        return cls(cast(Precision, precision), "compile" in more, cast(Layout, layout), "recompute" in more)

    def config(
        self, net: Net, batch: int, ratio: float, emas: tuple[AnyEMA, ...] = (ConstantEMA(0.9999),)
    ) -> RunConfig:
        """The published CIFAR-10 recipe at a fixed ``q^a = ratio``, executed this way."""
        return RunConfig(
            images=ENDLESS,
            batch_size=batch,
            precision=self.precision,
            objective=ECT(
                law=Lognormal(-1.1, 2.0),
                mapping=Sigmoid(8.0, 1.0),
                schedule=Stages(q=ratio, images=ENDLESS, first=0, last=0),
                penalty=Penalty("l2", "dt", c=0.0),
            ),
            optim=OptimConfig(name="radam", lr=1e-4, guard="clamp"),
            student=StudentConfig(dropout=net.dropout, dropout_max_resolution=net.dropout_max_resolution),
            emas=emas,
            speed=SpeedConfig(
                compile="on" if self.compile else "off", layout=self.layout, recompute=self.recompute, resident="auto"
            ),
        )


def trainer_of(config: RunConfig, student: Denoiser, source: Source) -> tuple[Trainer, Iterator[Any]]:
    """Our trainer on ``student``, whose weights it changes, and the generator of its steps."""
    trainer = Trainer(config, student, source, World(0, 1, student.device))
    return trainer, trainer.steps()


def resolved(config: RunConfig, ratio: float, device: torch.device) -> str:
    """The arithmetic that ``config.precision`` means at this q^a."""
    try:
        from fewstep.training.arithmetic import arithmetic
    except ImportError:  # before per-stage arithmetic existed
        return "fp32" if config.precision == "auto" else config.precision
    return str(arithmetic(config.precision, ratio, device))
