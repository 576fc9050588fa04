"""``fewstep generate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.cli.options import COUNT, BatchSize, Device, Json, Output, Quiet, Seed


def generate(
    teacher: Annotated[str, Parameter(help="A diffusion model: a model or run directory; or file.py:function.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="The folder to write; one that was begun with the same settings goes on.")],
    number: Annotated[int, Parameter(name=["--number", "-n"], validator=COUNT, help="How many samples.")] = 50_000,
    nfe: Annotated[
        int, Parameter(validator=COUNT, help="Evaluations per sample: Heun where odd, Euler where even.")
    ] = 35,
    guidance: Annotated[
        float | None, Parameter(help="Strength of classifier-free guidance; doubles the evaluations.")
    ] = None,
    weights: Annotated[str, Parameter(help="ema; of a run also student, and ema-1, ... where it has several.")] = "ema",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Make training data with a diffusion model, to tune it without its own.

    Sample i depends on the seed and on i alone; of a class-conditional model it has class i mod the number of classes,
    which is kept with it. Images are kept as bytes, latents and points as float32. Ctrl-C keeps what was made, and the
    same command goes on; with a larger -n it adds to a finished folder.

    To tune without keeping samples, make each when it is needed: `fewstep tune TEACHER --data teacher`.

    For example:

    ```
    fewstep generate teacher --out samples -n 50000
    fewstep tune teacher --data samples --objective ecd --out run
    ```
    """
    from fewstep.cli.options import open_model
    from fewstep.cli.progress import Counting
    from fewstep.errors import ConfigError, Interrupted
    from fewstep.training.past import hides_labels, require_diffusion
    from fewstep.training.synthetic import generate as make

    output = Output(quiet, json)
    require_diffusion(Path(teacher), "Data are made by a diffusion model")
    if guidance not in (None, 1) and not hides_labels(Path(teacher)):
        raise ConfigError(
            "Guidance asks the model what it does without a label, and it never trained without one",
            got=f"data.label_drop=0 in '{teacher}'",
            do="Leave --guidance out",
        )
    denoiser = open_model(teacher, weights, device=device)
    started, done = time.perf_counter(), 0

    def count(so_far: int, total: int) -> None:
        nonlocal done
        done = so_far
        counting("samples", done, total)

    with Counting(output) as counting:
        try:
            shards = make(
                denoiser, out, number, nfe=nfe, guidance=guidance, seed=seed or 0, batch_size=batch_size,
                on_progress=count,
            )  # fmt: skip
        except KeyboardInterrupt as error:
            kept = f"{done:,} of {number:,} samples are kept in '{out}'"
            raise Interrupted(f"Stopped; {kept}", do="To go on, run the same command again") from error
    seconds = time.perf_counter() - started
    output.say(f"{len(shards):,} samples of {nfe} evaluations each are in {out} ({seconds:,.0f} s).")
    output.say(f"Next: fewstep tune {teacher} --data {out} --objective ecd --out RUN")
    output.result(
        {
            "samples": str(out), "number": len(shards), "fingerprint": shards.fingerprint, "key": shards.key,
            "seconds": seconds,
        }
    )  # fmt: skip
    return 0
