"""``fewstep merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.cli.options import Json, Network, Output, Quiet


def merge(
    run: Annotated[Path, Parameter(help="The run directory of an adapter, finished or not.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="The model directory to write.")],
    weights: Annotated[
        str, Parameter(help="ema (the first average), ema-K, student, or std=0.075 (see fewstep sample --help).")
    ] = "ema",
    network: Network = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Merge the adapter of a run into the network it was trained on: a whole model of its own.

    A run with adapter.merge=true, the default, ends with RUN/model, which is that already; this is for runs with
    adapter.merge=false, for runs that have not ended, and for other averages. The network the adapter was trained on
    must still be where it was.

    For example:

    ```
    fewstep merge run --out model
    fewstep merge run --weights student --out model
    ```
    """
    from fewstep.checkpoint.model import load, save_model
    from fewstep.cli.options import open_network
    from fewstep.errors import ConfigError
    from fewstep.training.past import provenance, read_run

    output = Output(quiet, json)
    config = read_run(run)
    if config.adapter is None:
        raise ConfigError(f"'{run}' was trained without an adapter: nothing is to be merged", do=f"Use '{run}' itself")
    if out.exists():
        raise ConfigError(f"The output '{out}' already exists", do="Choose another --out")
    model = load(run, weights=weights, network=None if network is None else open_network(network))
    save_model(model, out, provenance(config) | {"run": str(run), "weights": weights})
    output.say(f"Wrote {out}. Next: fewstep sample {out} --steps 2 -n 64 --out samples.png")
    output.result({"model": str(out), "weights": weights})
    return 0
