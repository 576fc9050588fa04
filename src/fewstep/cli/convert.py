"""``fewstep convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fewstep.cli.options import Json, Output, Quiet


def convert(
    src: Annotated[Path, Parameter(help="An EDM or ECT .pkl, or ECT's training-state-*.pt.")],
    dst: Annotated[Path, Parameter(help="Directory to write: model.safetensors and config.json.")],
    /,
    *,
    weights: Annotated[
        Literal["ema", "net"] | None, Parameter(help="Which network of the file. Default: ema, or net of a .pt.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Convert an EDM or ECT pickle to a safe model directory.

    Nothing in the pickle is executed: names outside a short allow-list of inert stand-ins are refused. Known are the
    DDPM++ and NCSN++ networks with EDM, VP, VE or ECT preconditioning; DST holds safetensors and JSON afterwards.

    For example:

    ```
    fewstep convert edm-cifar10-32x32-uncond-vp.pkl teacher
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
