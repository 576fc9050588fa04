"""``fewstep eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from fewstep.cli.options import (
    BatchSize,
    Channels,
    Compile,
    Device,
    Json,
    Network,
    Output,
    Precision,
    Quiet,
    Resize,
    Seed,
    Split,
)


def eval(
    model: Annotated[
        str,
        Parameter(
            help="A run or model directory; file.py:function; a diffusers pipeline (a folder or hub id); or images "
            "made elsewhere: a folder, .zip or .npz."
        ),
    ],
    /,
    *,
    data: Annotated[
        str,
        Parameter(
            help="The real data: digits, tiles, a folder, .zip or .npz of images, or EDM's .npz of statistics (mu and "
            "sigma)."
        ),
    ],
    steps: Annotated[
        str | None,
        Parameter(
            help="Numbers of network evaluations (of a pipeline: its own steps). Default: 1,2,4,8, "
            "as far as the model can."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        Parameter(
            name=["--samples", "-n"],
            validator=Number(gte=2),
            help="Samples per step count; part of every number's name. Default: 5000; of images made elsewhere all.",
        ),
    ] = None,
    features: Annotated[
        str,
        Parameter(
            help="inception[:PATH], dinov2[:PATH_OR_ID], clip[:PATH_OR_ID], mobilenet:PATH, mnist-cnn:PATH, pixels, "
            "pca:K, a TorchScript file, or package.module:callable. auto: pixels up to 256 values per sample, else "
            "pca:64."
        ),
    ] = "auto",
    metrics: Annotated[
        str,
        Parameter(
            help="Of fd, fd_inf, kid, sw2, precision, recall, density, coverage, memorised, is, class. auto: all of "
            "these but fd_inf, as far as model, data and features allow; all: fd_inf too."
        ),
    ] = "auto",
    sampler: Annotated[Literal["consistency", "ode"], Parameter(help="ode is the teacher's solver.")] = "consistency",
    guidance: Annotated[
        float | None, Parameter(help="Strength of guidance, as of fewstep sample; it is part of every row.")
    ] = None,
    teacher: Annotated[
        str | None, Parameter(help="Also measure this diffusion model, and how far the model agrees with its ODE.")
    ] = None,
    teacher_nfe: Annotated[
        str | None, Parameter(help="Network evaluations of the teacher's solver. Default: 35.")
    ] = None,
    repeats: Annotated[int, Parameter(validator=Number(gte=1), help="Repeat with so many seeds: --seed and on.")] = 1,
    replicates: Annotated[
        int, Parameter(validator=Number(gte=0), help="Half-samples behind each 95 % interval; 0: no intervals.")
    ] = 50,
    resize: Resize = None,
    channels: Channels = None,
    split: Split = "train",
    weights: Annotated[str, Parameter(help="ema; of a run also student, and ema-1, ... where it has several.")] = "ema",
    out: Annotated[
        Path | None,
        Parameter(help="Also write the result to this JSON file; an interrupted call goes on from its parts."),
    ] = None,
    batch_size: BatchSize = None,
    precision: Precision = "fp32",
    compile: Compile = False,
    network: Network = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure a model, or images made elsewhere, against real data.

    Every number is named after its metric, feature net and sample count, and comes with a 95 % interval; the result
    (--json, --out) says the net's hash, the reference, the sampler's times and the seed. Compare numbers of one name
    and one reference only. "FID-50k" is printed for the published Inception weights, 50,000 samples and the full
    training set, and for nothing else.

    fd: Fréchet distance; fd_inf: the same, extrapolated to infinitely many samples; kid: kernel distance; sw2: sliced
    Wasserstein distance; precision and density: are the samples like the data; recall and coverage: is all of the data
    there; memorised: share of samples at less than half the distance that a training image keeps from the next; is:
    Inception score; class: share of samples recognised as the class asked for.

    For example:

    ```
    fewstep eval run --data photos.zip --steps 1,2,4 -n 5000 --features dinov2
    fewstep eval run --data photos.zip --teacher teacher --teacher-nfe 8,35 --repeats 5
    fewstep eval samples.zip --data photos.zip --features inception --metrics fd,kid
    torchrun --nproc-per-node 8 -m fewstep eval run --data cifar10-32x32.npz --features inception -n 50000 --steps 1,2
    ```
    """
    from fewstep.cli.evaluation import Request, run

    request = Request(
        model=model, data=data, steps=steps, samples=samples, features=features, metrics=metrics, sampler=sampler,
        teacher=teacher, teacher_nfe=teacher_nfe, repeats=repeats, replicates=replicates, resize=resize,
        channels=channels, split=split, weights=weights, out=out, batch_size=batch_size, network=network,
        seed=seed or 0, device=device, guidance=guidance, precision=precision, compile=compile,
    )  # fmt: skip
    return run(request, Output(quiet, json))
