"""``fewstep demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.cli.options import Device, Json, Output, Quiet, Seed, Set, command_line, overrides
from fewstep.cli.tune import show_run


def demo(
    *,
    out: Annotated[Path, Parameter(help="The run directory to write.")] = Path("demo-run"),
    set: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Tune the shipped diffusion model of handwritten digits into a few-step generator, and show the difference.

    About four minutes on two CPU cores. An unfinished demo in the same directory is continued, a finished one
    is shown again. The result is
    OUT/report.html: samples and quality of the diffusion model and of the few-step model side by side.

    For example:

    ```
    fewstep demo --out demo-run
    ```
    """
    from fewstep import runs
    from fewstep.checkpoint.model import load
    from fewstep.cli.progress import Live

    output = Output(quiet, json)
    live = Live(output)
    try:
        if (out / "report.html").is_file():
            output.say(
                f"The demo in '{out}' is finished. To run it again, remove that directory or give another --out."
            )
            run = runs.open_run(out)
        elif (out / "config.yaml").is_file():
            run = runs.resume(
                out, device=device, teacher=load(runs.demo_teacher()), watcher=live, command=command_line()
            )
        else:
            run = runs.tune(
                runs.demo_teacher(), "digits", out=out, recipe="demo", overrides=overrides(None, set, seed),
                device=device, watcher=live, command=command_line(),
            )  # fmt: skip
    finally:
        live.close()
    show_run(output, run)
    return 0
