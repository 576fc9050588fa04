"""``fewstep resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.cli.options import Device, Json, Network, Output, Quiet, command_line, open_network
from fewstep.cli.tune import show_run


def resume(
    run: Annotated[Path, Parameter(help="The run directory.")],
    /,
    *,
    network: Network = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Continue a run from its newest checkpoint.

    On a CPU the result has the same bits as if the run had never stopped. A finished run is shown again.

    For example:

    ```
    fewstep resume run
    ```
    """
    from fewstep import runs
    from fewstep.cli.progress import Live

    output = Output(quiet, json)
    teacher = open_network(network) if network is not None else None
    live = Live(output)
    try:
        done = runs.resume(run, device=device, teacher=teacher, watcher=live, command=command_line())
    finally:
        live.close()
    show_run(output, done)
    return 0
