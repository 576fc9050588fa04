"""``fewstep sample``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fewstep.cli.options import Device, Json, Network, Output, Quiet


def sample(
    model: Annotated[str, Parameter(help="A run or model directory; or file.py:function.")],
    *,
    out: Annotated[Path, Parameter(help="x.png for one picture, x.npz, or a directory of PNG files.")],
    steps: Annotated[int, Parameter(help="Network evaluations.")] = 1,
    number: Annotated[int, Parameter(name=["--number", "-n"], help="How many samples.")] = 64,
    times: Annotated[str | None, Parameter(help="Noise levels instead of --steps, for example 80,0.8.")] = None,
    sampler: Annotated[Literal["consistency", "ode"], Parameter(help="ode is the teacher's solver.")] = "consistency",
    label: Annotated[int | None, Parameter(help="One class for all samples. Default: all classes in turn.")] = None,
    guidance: Annotated[
        float | None, Parameter(help="Classifier-free guidance; a heuristic on few-step models.")
    ] = None,
    weights: Annotated[str, Parameter(help="ema, ema-1, student.")] = "ema",
    batch_size: int | None = None,
    network: Network = None,
    seed: int = 0,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Draw samples from a model. Sample i depends on the seed and on i alone."""
    import torch

    from fewstep.cli.options import open_model
    from fewstep.cli.write import parse_numbers, save_samples
    from fewstep.errors import ConfigError
    from fewstep.sampling import ode_sample_nfe
    from fewstep.sampling import sample as few_step_sample

    output = Output(quiet, json)
    denoiser = open_model(model, weights, network, device)
    cond = None
    if denoiser.num_classes:
        if label is not None and not 0 <= label < denoiser.num_classes:
            raise ConfigError("There is no such class", got=label, want=f"0 to {denoiser.num_classes - 1}")
        cond = torch.arange(number) % denoiser.num_classes if label is None else torch.full((number,), label)
        cond = cond.to(denoiser.device)
    elif label is not None:
        raise ConfigError("The model is not class-conditional", got=f"--label {label}", do="Leave --label out")
    if guidance is not None:
        output.say(
            "Guidance on a few-step model is a heuristic: the guided flow's end point is not linear in the weight."
        )
    started = time.perf_counter()
    if sampler == "ode":
        x = ode_sample_nfe(denoiser, number, steps, seed=seed, cond=cond, batch_size=batch_size)
        nfe = steps
    else:
        levels = parse_numbers(times, "--times", float) if times is not None else None
        x = few_step_sample(
            denoiser, number, steps=steps, times=levels, seed=seed, cond=cond, guidance=guidance, batch_size=batch_size
        )
        nfe = (len(levels) if levels else steps) * (2 if guidance is not None and guidance != 1 else 1)
    seconds = time.perf_counter() - started
    path = save_samples(out, denoiser, x, cond)
    output.say(f"Wrote {number} samples, {nfe} evaluations each, to {path} ({number / seconds:.1f} samples/s).")
    output.result(
        {"samples": str(path), "number": number, "nfe": nfe, "seed": seed, "samples_per_second": number / seconds}
    )
    return 0
