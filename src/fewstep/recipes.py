"""Named presets: each is one complete :class:`RunConfig`; beside each number its measurement, or "not measured"."""

from __future__ import annotations

from dataclasses import replace

from fewstep.ema import AnyEMA, ConstantEMA, PowerEMA
from fewstep.errors import ConfigError, nearest
from fewstep.objectives import CMT, ECT, Diffusion, Multistep, Sequence
from fewstep.objectives.aims import Heun
from fewstep.objectives.multistep import Gaps
from fewstep.penalty import Penalty
from fewstep.times import Lognormal, Sigmoid, Stages
from fewstep.training.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    RunConfig,
    StudentConfig,
)

NOT_MEASURED = "not measured here"
MILLION = 1_000_000


def _cifar10(
    name: str, *, q: float, stage_iterations: int, last: int, images: int, beta: float, published: str
) -> RunConfig:
    """ECT on CIFAR-10, branch ``main`` of the published code (recipes.md c.1; math.md 2.6)."""
    return RunConfig(
        recipe=name,
        note=f"{NOT_MEASURED}; published: {published}. Teacher: EDM cifar10-32x32-uncond-vp (its EMA)",
        images=images,
        batch_size=128,
        objective=ECT(
            law=Lognormal(-1.1, 2.0),
            mapping=Sigmoid(k=8.0, b=1.0),
            schedule=Stages(q=q, images=stage_iterations * 128, last=last),
            penalty=Penalty("l2", "dt", c=0.0),
        ),
        optim=OptimConfig(name="radam", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, guard="clamp"),
        emas=(ConstantEMA(beta),),
        student=StudentConfig(dropout=0.2, boundary_shift=0.003, sampler_times={"2": [80.0, 0.821]}),
        data=DataConfig(source="cifar10.zip", labels=False),
        output=OutputConfig(log_images=12_800, sample_images=640_000, checkpoint_images=640_000),
        eval=EvalConfig(samples=0),
    )


def _imagenet64(size: str, *, lr: float, dropout: float, teacher: str, published: str) -> RunConfig:
    """ECT on ImageNet 64x64, branch ``imgnet`` of the published code (recipes.md c.2; math.md 2.6)."""
    emas: tuple[AnyEMA, ...] = (ConstantEMA(0.9999), PowerEMA(0.010), PowerEMA(0.050), PowerEMA(0.100))
    return RunConfig(
        recipe=f"imagenet64-{size}",
        note=f"{NOT_MEASURED}; published: {published}. Teacher: {teacher} (fewstep convert {teacher}.pkl)",
        images=12_800_000,
        batch_size=128,
        micro_batch=32,
        precision="tf32",
        objective=ECT(
            law=Lognormal(-0.8, 1.6),
            mapping=Sigmoid(k=8.0, b=1.0),
            schedule=Stages(q=4.0, images=3_200_000, last=3),
            penalty=Penalty("pseudo_huber", "snrpk", c=0.06),
        ),
        optim=OptimConfig(
            name="adam", lr=lr, betas=(0.9, 0.99), schedule="inverse_sqrt", decay_images=2000 * 128, guard="zero"
        ),
        emas=emas,
        student=StudentConfig(dropout=dropout, dropout_max_resolution=16, sampler_times={"2": [80.0, 1.526]}),
        data=DataConfig(source="imagenet-64x64.zip"),
        output=OutputConfig(log_images=6_400, sample_images=640_000, checkpoint_images=640_000),
        eval=EvalConfig(samples=0),
    )


def _demo(teacher: bool) -> RunConfig:
    """The embedded 8x8 digits: what ``make demo`` runs, and what made the checkpoint it starts from."""
    if teacher:
        return RunConfig(
            job="pretrain",
            recipe="demo-teacher",
            note="made the checkpoint that the package ships; measured by `make demo` (docs/demo.md)",
            images=600_000,
            batch_size=128,
            objective=Diffusion(),
            optim=OptimConfig(name="adam", lr=1e-3, warmup_images=12_800, schedule="cosine", decay_share=0.6),
            emas=(ConstantEMA(0.999),),
            data=DataConfig(source="digits", labels=False),
            model=ModelConfig(
                backbone="unet", kwargs={"channels": 32, "multipliers": [1, 2], "blocks": 1, "attention": [4]}
            ),
            output=OutputConfig(log_images=2_560, sample_images=64_000, checkpoint_images=64_000),
        )
    return RunConfig(
        recipe="demo",
        note="measured by `make demo` (docs/demo.md)",
        images=140_000,
        batch_size=128,
        objective=ECT(
            schedule=Stages(q=2.0, images=25_000, first=1, last=4),
            penalty=Penalty("pseudo_huber", "dt", c=0.03),
        ),
        optim=OptimConfig(name="radam", lr=5e-4, schedule="linear", decay_share=0.4),
        emas=(ConstantEMA(0.997),),
        data=DataConfig(source="digits", labels=False),
        output=OutputConfig(log_images=1_280, sample_images=20_480, checkpoint_images=40_960, grid=25),
    )


def _points(job: str) -> RunConfig:
    """Eight Gaussians in the plane: a minute on a laptop."""
    pretraining = job == "pretrain"
    return RunConfig(
        job="pretrain" if pretraining else "tune",
        recipe="points-teacher" if pretraining else "points",
        note="measured by tests/integration/test_points.py",
        images=1_536_000 if pretraining else 1_024_000,
        batch_size=1024,
        objective=Diffusion()
        if pretraining
        else ECT(schedule=Stages(q=4.0, images=256_000, last=2), penalty=Penalty("pseudo_huber", "dt", c=0.001)),
        optim=OptimConfig(name="adam", lr=2e-3 if pretraining else 2e-4, schedule="cosine", decay_share=0.7),
        emas=(ConstantEMA(0.99),),
        data=DataConfig(source="gaussians8", labels=False),
        model=ModelConfig(backbone="mlp", kwargs={"width": 128, "depth": 4}),
        output=OutputConfig(log_images=51_200, sample_images=512_000, checkpoint_images=512_000, grid=2000),
        eval=EvalConfig(samples=4000),
    )


def _images(size: str) -> RunConfig:
    """Your own EDM-type checkpoint and images, on one GPU or a patient laptop."""
    return RunConfig(
        recipe=size,
        note=NOT_MEASURED,
        precision="auto",
        images=MILLION if size == "fast" else 12_800_000,
        objective=ECT(
            schedule=Stages(q=256.0, images=MILLION, last=0)
            if size == "fast"
            else Stages(q=2.0, images=1_600_000, last=7),
            penalty=Penalty("pseudo_huber", "dt", c=0.03),
        ),
        optim=OptimConfig(name="radam", lr=1e-4, schedule="linear", decay_share=0.2),
        emas=(ConstantEMA(0.9993 if size == "fast" else 0.9999), PowerEMA(0.05), PowerEMA(0.10)),
    )


def _mid() -> RunConfig:
    """The default: half of the images on the teacher's trajectories, then ECT."""
    fast = _images("fast")
    return replace(
        fast,
        recipe="mid",
        note="beats plain ECT at equal images on 16x16 images (docs/family.md); not measured here at size",
        objective=Sequence(first=CMT(), then=fast.objective, share=0.5),
    )


def _dial() -> RunConfig:
    """One model for 1, 2, 4 and 8 steps, each better than the one before."""
    return replace(
        _images("fast"),
        recipe="dial",
        note="each further step is better on 16x16 images (docs/family.md); not measured here at size",
        images=2 * MILLION,
        objective=Multistep(
            segments=(1, 1, 2, 4, 8),
            pairing=Gaps(law=Lognormal(0.0, 2.2), schedule=Stages(q=8.0, last=0)),
            step=Heun(),
            penalty=Penalty("l2", "dt"),
        ),
        optim=OptimConfig(name="radam", lr=1e-4, schedule="linear", decay_share=0.5),
    )


RECIPES: dict[str, RunConfig] = {
    "demo": _demo(teacher=False),
    "demo-teacher": _demo(teacher=True),
    "points": _points("tune"),
    "points-teacher": _points("pretrain"),
    "mid": _mid(),
    "dial": _dial(),
    "fast": _images("fast"),
    "full": _images("full"),
    "cifar10-1h": _cifar10(
        "cifar10-1h", q=256.0, stage_iterations=8_000, last=0, images=1_024_000, beta=0.9993,
        published="2-step FID 2.73 in one A100-hour (that speed needs --set precision=tf32, or auto)",
    ),
    "cifar10-100k": _cifar10(
        "cifar10-100k", q=2.0, stage_iterations=12_500, last=7, images=12_800_000, beta=0.9999,
        published="FID 4.54 (1 step), 2.20 (2 steps)",
    ),
    "cifar10-200k": _cifar10(
        "cifar10-200k", q=2.0, stage_iterations=25_000, last=7, images=25_600_000, beta=0.9999,
        published="FID 3.86 (1 step), 2.15 (2 steps)",
    ),
    "cifar10-400k": _cifar10(
        "cifar10-400k", q=2.0, stage_iterations=50_000, last=7, images=51_200_000, beta=0.9999,
        published="FID 3.60 (1 step), 2.11 (2 steps)",
    ),
    "imagenet64-s": _imagenet64(
        "s", lr=1.0e-3, dropout=0.40, teacher="edm2-img64-s-1073741-0.075", published="FID 5.51 (1 step)"
    ),
    "imagenet64-m": _imagenet64(
        "m", lr=0.9e-3, dropout=0.50, teacher="edm2-img64-m-2147483-0.060", published="FID 3.67 (1 step)"
    ),
    "imagenet64-l": _imagenet64(
        "l", lr=0.8e-3, dropout=0.50, teacher="edm2-img64-l-1073741-0.040", published="FID 3.55 (1 step, from memory)"
    ),
    "imagenet64-xl": _imagenet64(
        "xl", lr=0.7e-3, dropout=0.50, teacher="edm2-img64-xl-0671088-0.040", published="FID 3.35 (1 step, from memory)"
    ),
}  # fmt: skip


def recipe(name: str) -> RunConfig:
    """The preset of that name.

    Raises:
        ConfigError: there is none (with the nearest match).
    """
    if name not in RECIPES:
        raise ConfigError(f"There is no recipe '{name}'", do=nearest(name, RECIPES) + ". See: fewstep recipes")
    return RECIPES[name]


def default_recipe(job: str, *, about_objective: bool = False) -> RunConfig:
    """What is run when no recipe is named: "mid", or "fast" (plain ECT) where something is said about the objective."""
    if job == "pretrain":
        return RunConfig(job="pretrain", recipe="default", objective=Diffusion())
    return RECIPES["fast" if about_objective else "mid"]
