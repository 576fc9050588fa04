"""``fewstep plan``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from fewstep.cli.options import (
    Channels,
    Config,
    DataOption,
    Device,
    Images,
    Json,
    Output,
    Quiet,
    Resize,
    Seed,
    Set,
    Split,
    TrainBatch,
    open_model,
    overrides,
)

if TYPE_CHECKING:
    from fewstep.training.plan import Plan


def plan(
    teacher: Annotated[str, Parameter(help="A model, run or converted checkpoint; or file.py:function.")],
    /,
    *,
    data: DataOption,
    recipe: Annotated[
        str | None, Parameter(help="A preset; see fewstep recipes. Default: mid (fast if you set the objective).")
    ] = None,
    objective: Annotated[str | None, Parameter(help="The training objective. Default: the recipe's.")] = None,
    images: Images = None,
    batch_size: TrainBatch = None,
    budget: Annotated[float, Parameter(validator=Number(gt=0), help="Seconds to spend on measuring.")] = 20.0,
    memory: Annotated[
        float | None, Parameter(validator=Number(gt=0), help="GB (10^9 bytes) to fit in. Default: what the device has.")
    ] = None,
    resize: Resize = None,
    channels: Channels = None,
    split: Split = "train",
    config: Config = None,
    set: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Predict memory and time of `fewstep tune` with the same arguments, on this machine.

    Memory is counted from tensors, without what the framework itself takes; time is measured on a few real steps.
    Nothing is written.

    For example:

    ```
    fewstep plan teacher --data photos.zip --recipe full --batch-size 256
    ```
    """
    from rich.table import Table

    from fewstep import runs
    from fewstep.training.plan import plan as make_plan

    output = Output(quiet, json)
    settings = overrides(
        config, set, seed, images=images, batch_size=batch_size, resize=resize, channels=channels, split=split
    )
    configuration = runs.configure("tune", recipe, objective, settings, data)
    with runs.joined(device) as world:
        model = open_model(teacher, device=str(world.device))
        source = runs.open_data(configuration.data)
        runs.check_fit(model, source)
        student = runs.make_student(model, configuration)
        room = None if memory is None else round(memory * 1e9)
        found = make_plan(runs.make_trainer(configuration, student, source, world, model), budget=budget, room=room)
    table = Table(box=None, show_header=False)
    notes = {"activations": f"kept of one pass of {found.micro_batch} images", "memory": "most of a step at once"}
    for name in ("weights", "gradients", "optimizer", "averages", "activations", "memory"):
        table.add_row(name, _bytes(getattr(found, name)), notes.get(name, ""))
    table.add_row(
        "disk",
        _bytes(found.disk),
        f"{configuration.output.keep + 1} checkpoints of {_bytes(found.checkpoint)} and the model",
    )
    table.add_row("speed", f"{found.images_per_second:,.0f} images/s", f"measured on {world.device}")
    table.add_row(
        "time", _duration(found.seconds), f"{found.steps:,} steps of {configuration.batch_size} images, training alone"
    )
    part = "" if found.trained == found.parameters else f" ({found.trained / 1e6:.2f} M of them trained)"
    size = f"{found.parameters / 1e6:.2f} M parameters{part}"
    output.say(f"{size}, recipe {configuration.recipe}, {configuration.images:,} images")
    output.say(table)
    for line in _advice(found):
        output.say(line)
    output.result(dataclasses.asdict(found))
    return 0


def _advice(found: Plan) -> Iterator[str]:
    """Whether it fits, and what would make it fit."""
    if found.memory <= found.room:
        yield f"It fits: there are {_bytes(found.room)}."
        if found.micro_batch > 1:
            yield "Less memory: --set micro_batch=N runs N images per pass, with the same result up to rounding."
        return
    yield f"It does not fit: there are {_bytes(found.room)}. With one other setting a step holds:"
    for setting, need in found.remedies.items():
        yield f"  --set {setting}: {_bytes(need)}{'' if need <= found.room else ', still too much'}"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
