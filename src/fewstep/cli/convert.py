"""``fewstep convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fewstep.cli.options import Json, Output, Quiet


def convert(
    src: Annotated[
        Path, Parameter(help="A .pkl of EDM, ECT or EDM2, ECT's training-state-*.pt, a diffusers folder or a hub id.")
    ],
    dst: Annotated[Path, Parameter(help="Directory to write: model.safetensors and config.json.")],
    /,
    *,
    weights: Annotated[
        Literal["ema", "net"] | None, Parameter(help="Which network of the file. Default: ema, or net of a .pt.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Convert an EDM, ECT or EDM2 pickle, or a diffusers model, to a safe model directory.

    Nothing in the pickle is executed: names outside a short allow-list of inert stand-ins are refused. Known are the
    DDPM++, NCSN++ and ADM networks with EDM, VP, VE or ECT preconditioning, and EDM2's models of pixels; DST holds
    safetensors and JSON afterwards.
    Diffusers' pipelines need no conversion (fewstep tune takes them as they are), but a directory of their own lets
    them be moved. VAE and text encoders stay in the pipeline's folder.

    For example:

    ```
    fewstep convert edm-cifar10-32x32-uncond-vp.pkl teacher
    fewstep convert google/ddpm-cifar10-32 teacher
    ```
    """
    from fewstep.checkpoint.convert import convert as convert_file

    output = Output(quiet, json)
    denoiser = convert_file(src, dst, which=weights)
    parameters = sum(p.numel() for p in denoiser.backbone.parameters())
    labels = f", {denoiser.num_classes} classes" if denoiser.num_classes else ""
    output.say(f"Wrote {dst}: {parameters / 1e6:.2f} M parameters, samples of {denoiser.sample_shape}{labels}.")
    output.say(f"Next: fewstep tune {dst} --data SOURCE --out RUN")
    output.result(
        {
            "model": str(dst),
            "parameters": parameters,
            "sample_shape": list(denoiser.sample_shape),
            "num_classes": denoiser.num_classes,
        }
    )
    return 0
