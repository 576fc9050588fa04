"""One complete configuration of a run: what a recipe is, and what ``config.yaml`` holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fewstep.arithmetic import Precision
from fewstep.ema import AnyEMA, ConstantEMA
from fewstep.errors import ConfigError
from fewstep.objectives import ECT, Objective


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Args:
        source: a SOURCE (see ``fewstep tune --help``).
        resize, channels, split: as for ``open_source``.
        labels: use the labels of the source where the model is class-conditional.
        label_drop: share of rows whose label is hidden, for guidance later.
        flip: mirror half of the images.
        cache: folder for what is made of the data once (latents); default: the user's cache.
    """

    source: str = "digits"
    resize: int | None = None
    channels: int | None = None
    split: str = "train"
    labels: bool = True
    label_drop: float = 0.0
    flip: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.label_drop <= 1, "data.label_drop must lie in [0, 1]", self.label_drop)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network of a pretraining run; tuning takes the teacher's.

    Args:
        backbone: a name in BACKBONES.
        kwargs: its arguments; sample_shape and num_classes come from the data.
        conditional: give it the labels.
        vae: for a model of latents: a folder with a VAE, or of a pipeline that has one (diffusers).
        sigma_data: standard deviation of the data in model space (of latents scaled as diffusers does: about 1).
    """

    backbone: str = "unet"
    kwargs: dict[str, Any] = field(default_factory=dict)
    conditional: bool = False
    vae: str | None = None
    sigma_data: float = 0.5
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _require(0 < self.sigma_data < math.inf, "model.sigma_data must be positive", self.sigma_data)
        _require(0 < self.sigma_max < math.inf, "model.sigma_max must be positive", self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How the tuned network differs from its teacher.

    Args:
        start: "teacher" copies its weights; "fresh" starts its architecture from seeded weights (cold start); else the
            path of a model or run of that architecture, for example one that was mid-trained with cmt.
        dropout: probability in every dropout layer while tuning; None keeps the teacher's.
        dropout_max_resolution: no dropout in layers that act above this resolution (EDM2 recipes: 16).
        boundary_shift: of the tuned model at evaluation (ECT's public code: 0.003).
        freeze: patterns of parameters or parts that stay as they are, ``[enc, "*.norm*"]``; whole parts run without
            dropout.
        sampler_times: step count -> noise levels that the tuned model carries ("2": [80, 0.821]).
    """

    start: str = "teacher"
    dropout: float | None = None
    dropout_max_resolution: int | None = None
    boundary_shift: float = 0.0
    freeze: tuple[str, ...] = ()
    sampler_times: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.dropout is None or 0 <= self.dropout < 1, "student.dropout must lie in [0, 1)", self.dropout)
        _require(
            0 <= self.boundary_shift < math.inf, "student.boundary_shift must not be negative", self.boundary_shift
        )


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank adapters ``W + scale B A`` instead of the network; the teacher is the network without them.

    Moving averages average A and B, not their product.

    Args:
        rank: of the adapters.
        alpha: ``scale = alpha / rank``; None is the rank itself, scale 1.
        targets: patterns of the Linear and Conv2d layers that get one, ``[attention, qkv]``; "all" is every one.
        stabilised: ``scale = alpha / sqrt(rank)`` (rsLoRA).
        merge: write ``model/`` with the adapter merged, beside ``adapter/``.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("all",)
    stabilised: bool = False
    merge: bool = True
    kind: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "The rank of an adapter must be at least 1", f"adapter.rank={self.rank}")
        _require(self.alpha is None or 0 < self.alpha < math.inf, "adapter.alpha must be positive", self.alpha)
        _require(bool(self.targets), "An adapter needs layers to adapt", "adapter.targets=[]")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its learning rate as a function of the images seen.

    Args:
        name: "radam", "adam" or "adamw".
        lr: base learning rate.
        schedule: "constant"; "inverse_sqrt", ``lr / sqrt(max(images/decay_images, 1))``; "linear" and "cosine",
            to 0 over the last ``decay_share`` of the run.
        decay_images, decay_share: of the schedules above.
        warmup_images: linear warm-up from 0.
        clip: largest gradient norm; None for none.
        lr_scale: pattern -> factor on the learning rate of the parameters it means, ``{enc: 0.1, lora_B: 16}``; several
            factors multiply.
        guard: what is done about non-finite gradients (in fp16 their step is skipped instead): "stop" (nothing is
            hidden: the run stops), "clamp"
            (nan -> 0, +-inf -> +-1e5: ECT's CIFAR-10 code) or "zero" (all -> 0: its ImageNet code). A non-finite loss
            always stops.
    """

    name: Literal["radam", "adam", "adamw"] = "radam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "inverse_sqrt", "linear", "cosine"] = "constant"
    decay_images: int = 256_000
    decay_share: float = 0.3
    warmup_images: int = 0
    clip: float | None = None
    lr_scale: dict[str, Any] = field(default_factory=dict)
    guard: Literal["stop", "clamp", "zero"] = "stop"

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "The learning rate must be positive", self.lr)
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas must lie in [0, 1)", self.betas)
        _require(0 < self.eps < math.inf, "optim.eps must be positive", self.eps)
        _require(self.weight_decay >= 0, "optim.weight_decay must not be negative", self.weight_decay)
        _require(self.clip is None or self.clip > 0, "optim.clip must be positive (or null for none)", self.clip)
        _require(
            self.decay_images >= 1 and 0 < self.decay_share <= 1,
            "The decay of the learning rate must cover some images",
            (self.decay_images, self.decay_share),
        )
        _require(
            all(isinstance(f, int | float) and 0 < f < math.inf for f in self.lr_scale.values()),
            "The factors of optim.lr_scale must be positive numbers (to keep parameters as they are: student.freeze)",
            self.lr_scale,
        )
        _require(self.warmup_images >= 0, "optim.warmup_images must not be negative", self.warmup_images)


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How a step is executed; the objective and its gradient stay the same, up to rounding (docs/performance.md).

    Args:
        compile: one ``torch.compile`` graph of the whole loss; "auto" is on a GPU with a compiler, for runs of at least
            100,000 images (compiling takes minutes).
        graphs: replay the compiled graph as CUDA graphs, for small networks, which wait for their kernels' launches.
        layout: of the convolutions' memory, "contiguous" or "channels_last"; "auto" chooses by device and arithmetic.
        recompute: keep only the inputs of the network's blocks and compute the rest again in the backward pass: a
            quarter more time, a fraction of the memory.
        resident: keep the images on the GPU as bytes; "auto" is where they fill at most a quarter of its free memory.
    """

    compile: Literal["auto", "on", "off"] = "auto"
    graphs: bool = False
    layout: Literal["auto", "contiguous", "channels_last"] = "auto"
    recompute: bool = False
    resident: Literal["auto", "on", "off"] = "auto"


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """When a run writes what; all in training images.

    Args:
        log_images: between two rows of metrics.jsonl.
        sample_images: between two sample grids; 0 for none.
        checkpoint_images: between two checkpoints.
        keep: how many checkpoints stay.
        grid: samples per grid.
    """

    log_images: int = 5_120
    sample_images: int = 102_400
    checkpoint_images: int = 102_400
    keep: int = 2
    grid: int = 64

    def __post_init__(self) -> None:
        if (
            self.log_images < 1
            or self.checkpoint_images < 1
            or self.sample_images < 0
            or self.keep < 1
            or self.grid < 1
        ):
            raise ConfigError("The output intervals must be positive (sample_images may be 0)", got=self)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The table at the end of a run.

    Args:
        samples: per row; 0 for no table.
        steps: of the tuned model; teacher_nfe: of the teacher's solver.
        features: a feature net (see ``fewstep eval --help``); "auto" is pixels up to 256 values, else pca:64.
        data: a SOURCE to compare with, seen as the training data are; None is these.
    """

    samples: int = 2_000
    steps: tuple[int, ...] = (1, 2, 4, 8)
    teacher_nfe: tuple[int, ...] = (1, 2, 4, 8, 35)
    features: str = "auto"
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run from start to end; every schedule in it is a function of the images seen.

    Args:
        job: "tune" or "pretrain".
        images: training images in total.
        batch_size: global, over all processes; micro_batch: per pass and process, None for all at once.
        adapter: train adapters instead of the network (``--set adapter.kind=lora``); None trains the network.
        emas: moving averages; the first one is the model that comes out.
        precision: arithmetic of the passes over fp32 weights: "fp32", "tf32" (CUDA), "fp16" (CUDA, loss scaling),
            "bf16", or "auto", the fastest that resolves the gap between student and target (docs/performance.md).
        speed: how a step is executed.
        note: shown by ``fewstep recipes`` and in the report, for example "not measured here".
    """

    job: Literal["tune", "pretrain"] = "tune"
    recipe: str = "custom"
    note: str = ""
    teacher: str = ""
    seed: int = 0
    images: int = 1_024_000
    batch_size: int = 128
    micro_batch: int | None = None
    precision: Precision = "fp32"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    adapter: LoRA | None = None
    objective: Objective = field(default_factory=ECT)
    optim: OptimConfig = field(default_factory=OptimConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    emas: tuple[AnyEMA, ...] = (ConstantEMA(0.9999),)
    output: OutputConfig = field(default_factory=OutputConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _require(self.images >= 1, "A run needs at least one training image", f"images={self.images}")
        _require(self.batch_size >= 1, "A batch needs at least one image", f"batch_size={self.batch_size}")
        _require(
            self.micro_batch is None or self.micro_batch >= 1,
            "micro_batch must be at least 1 (or null for the whole batch)",
            self.micro_batch,
        )
        self._require_base()
        if not self.emas:
            raise ConfigError(
                "A run needs at least one moving average", got="emas: []", do="Set emas: [{kind: constant, beta: 0}]"
            )

    def _require_base(self) -> None:
        """What is kept as it is must be worth keeping, and is said in one way."""
        if self.adapter is None and not self.student.freeze:
            return
        _require(self.job == "tune", "Adapters and freezing are for tuning a trained network", f"job: {self.job}")
        _require(
            self.student.start != "fresh",
            "A fresh network has nothing to keep, so it takes no adapter and is not frozen",
            "student.start=fresh",
        )
        _require(
            self.adapter is None or not self.student.freeze,
            "An adapter freezes the whole network already: choose where it acts with adapter.targets",
            f"student.freeze={list(self.student.freeze)}",
        )

    @property
    def models(self) -> tuple[str, ...]:
        """What the end of the run leaves of the trained network: ``model``, ``adapter`` or both."""
        if self.adapter is None:
            return ("model",)
        return ("model", "adapter") if self.adapter.merge else ("adapter",)

    @property
    def steps(self) -> int:
        """Optimiser steps: whole batches that cover ``images``."""
        return -(-self.images // self.batch_size)


def _require(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise ConfigError(what, got=got)
