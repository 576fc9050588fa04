"""``fewstep eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from fewstep.cli.options import (
    BatchSize,
    Channels,
    DataOption,
    Device,
    Json,
    Network,
    Output,
    Quiet,
    Resize,
    Seed,
    Split,
)


def eval(
    model: Annotated[str, Parameter(help="A run or model directory; or file.py:function.")],
    /,
    *,
    data: DataOption,
    steps: Annotated[str, Parameter(help="Numbers of network evaluations.")] = "1,2,4,8",
    samples: Annotated[
        int,
        Parameter(
            name=["--samples", "-n"],
            validator=Number(gte=2),
            help="Samples per step count; part of every number's name.",
        ),
    ] = 5000,
    features: Annotated[
        str,
        Parameter(
            help="pixels, pca:K, mnist-cnn:PATH, mobilenet:PATH, a TorchScript file, or package.module:callable. "
            "auto: pixels up to 256 values per sample, else pca:64."
        ),
    ] = "auto",
    metrics: Annotated[str, Parameter(help="Of fd, kid, sw2, precision, recall.")] = "fd,kid,sw2,precision,recall",
    sampler: Annotated[Literal["consistency", "ode"], Parameter(help="ode is the teacher's solver.")] = "consistency",
    resize: Resize = None,
    channels: Channels = None,
    split: Split = "train",
    weights: Annotated[str, Parameter(help="ema; of a run also student, and ema-1, ... where it has several.")] = "ema",
    out: Annotated[Path | None, Parameter(help="Also write the result to this JSON file.")] = None,
    batch_size: BatchSize = None,
    network: Network = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure a model at several step counts against real data.

    Every number is named after its metric, feature net and sample count. The reference statistics of the Fréchet
    distance come from all of the data; the other metrics use evenly spaced rows of it, as many as samples.
    fd: Fréchet distance; kid: kernel distance; sw2: sliced Wasserstein distance; precision and recall: shares of
    samples among the data and of data among the samples.

    For example:

    ```
    fewstep eval run --data photos.zip --steps 1,2,4 -n 5000 --features pca:64
    fewstep eval teacher --data photos.zip --steps 35 --sampler ode --json > teacher.json
    ```
    """
    from fewstep.checkpoint.store import write_json
    from fewstep.cli.options import open_model
    from fewstep.cli.write import parse_numbers
    from fewstep.data import open_source
    from fewstep.errors import ConfigError
    from fewstep.evaluation import evaluate
    from fewstep.evaluation.report import Row, print_table
    from fewstep.runs import check_shape

    output = Output(quiet, json)
    counts = parse_numbers(steps, "--steps", int)
    chosen = [m.strip() for m in metrics.split(",") if m.strip()]
    if not chosen:
        raise ConfigError("--metrics is empty", want="for example fd,kid")
    denoiser = open_model(model, weights, network, device)
    source = open_source(data, resize=resize, channels=channels, split=split)
    check_shape(denoiser, source)

    def show(row: dict[str, Any]) -> None:
        output.say(f"  steps {row['steps']}: " + "  ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items()))

    output.say(f"{model} against {source.name} ({len(source):,} samples)")
    results = evaluate(
        denoiser,
        source,
        steps=counts,
        solver=sampler,
        metrics=chosen,
        features=features,
        samples=samples,
        seed=seed or 0,
        batch_size=batch_size,
        on_row=show,
    )
    results["model"] = model
    if output.speaks:
        name = "teacher (diffusion)" if sampler == "ode" else Path(model).name
        print_table(
            [Row(name, r["nfe"], r["metrics"], r["samples_per_second"]) for r in results["rows"]], output.console
        )
    output.result(results)
    if out is not None:
        write_json(out, results)
    return 0
