"""``fewstep sample``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fewstep.cli.options import COUNT, BatchSize, Device, Json, Network, Output, Quiet, Seed


def sample(
    model: Annotated[str, Parameter(help="A run or model directory; or file.py:function.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="x.png for one picture, x.npz, or a directory of PNG files.")],
    steps: Annotated[int | None, Parameter(validator=COUNT, help="Network evaluations. Default: 1.")] = None,
    number: Annotated[int, Parameter(name=["--number", "-n"], validator=COUNT, help="How many samples.")] = 64,
    times: Annotated[
        str | None, Parameter(help="Noise levels instead of --steps, largest first, for example 80,0.8.")
    ] = None,
    sampler: Annotated[Literal["consistency", "ode"], Parameter(help="ode is the teacher's solver.")] = "consistency",
    label: Annotated[int | None, Parameter(help="One class for all samples. Default: all classes in turn.")] = None,
    guidance: Annotated[
        float | None, Parameter(help="Classifier-free guidance; a heuristic on few-step models.")
    ] = None,
    weights: Annotated[str, Parameter(help="ema; of a run also student, and ema-1, ... where it has several.")] = "ema",
    batch_size: BatchSize = None,
    network: Network = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Draw samples from a model.

    Sample i depends on the seed and on i alone: -n 3 gives the first 3 of -n 7.

    For example:

    ```
    fewstep sample run --steps 2 -n 64 --out out.png
    fewstep sample run --times 80,1.5 -n 5000 --seed 1 --out out.npz
    fewstep sample teacher --sampler ode --steps 35 -n 64 --out teacher.png
    ```
    """
    from fewstep.cli.options import open_model
    from fewstep.cli.write import check_output, draw, parse_numbers, save_samples, spread_labels
    from fewstep.errors import ConfigError
    from fewstep.sampling import few_step_times

    output = Output(quiet, json)
    levels = parse_numbers(times, "--times", float) if times is not None else None
    if levels is not None and steps not in (None, len(levels)):
        raise ConfigError(
            "--times and --steps do not agree", got=f"{len(levels)} times, --steps {steps}", do="Give one"
        )
    if sampler == "ode" and (levels is not None or guidance is not None):
        option = "--times" if levels is not None else "--guidance"
        raise ConfigError(f"{option} does not go with --sampler ode", do="In Python: fewstep.ode_sample")
    denoiser = open_model(model, weights, network, device)
    check_output(out, denoiser)
    cond = spread_labels(denoiser, number, label)
    if sampler == "consistency" and levels is None:
        levels = few_step_times(denoiser, steps or 1)
    if guidance is not None:
        output.say(
            "Guidance on a few-step model is a heuristic: the guided flow's end point is not linear in the weight."
        )
    started = time.perf_counter()
    x, nfe = draw(denoiser, number, levels, steps or 1, seed or 0, cond, guidance, batch_size)
    rate = number / (time.perf_counter() - started)
    path = save_samples(out, denoiser, x, cond)
    evaluations = f"{nfe} evaluation{'s' if nfe > 1 else ''}"
    output.say(f"Wrote {number} samples, {evaluations} each, to {path} ({rate:,.1f} samples/s).")
    output.result(
        {
            "samples": str(path),
            "number": number,
            "sampler": sampler,
            "nfe": nfe,
            "times": levels,
            "label": label,
            "guidance": guidance,
            "seed": seed or 0,
            "samples_per_second": rate,
        }
    )
    return 0
