"""``fewstep tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

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
    command_line,
    open_model,
    overrides,
)


def tune(
    teacher: Annotated[
        str, Parameter(help="A model, run or converted checkpoint; or file.py:function for a network of your own.")
    ],
    /,
    *,
    data: DataOption,
    out: Annotated[Path, Parameter(help="The run directory to write.")],
    recipe: Annotated[
        str | None, Parameter(help="A preset; see fewstep recipes. Default: mid (fast if you set the objective).")
    ] = None,
    objective: Annotated[
        str | None, Parameter(help="One of those above, with its own settings. Default: the recipe's.")
    ] = None,
    images: Images = None,
    batch_size: TrainBatch = None,
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
    """Tune a diffusion model into a few-step generator.

    Writes OUT/config.yaml, metrics.jsonl, samples/, checkpoints/, model/ and report.html. Ctrl-C saves the state;
    `fewstep resume OUT` goes on (on a CPU: to the same bits). On several GPUs:
    `torchrun --nproc-per-node N -m fewstep tune ...`.

    Objectives; docs/objectives.md says which, when, and what its settings are:

    ```
    ect        ever tighter pairs on the data's own noise; start here
    ecd        the same along the teacher's ODE
    ct, ict    consistency training on a grid that grows
    cd         consistency distillation along the teacher's ODE
    tcm        ect, then large noise alone: for one and two steps
    multistep  segments: sampled in as many jumps, 4 or 8
    tract      phases that each shrink the number of steps
    scm        continuous time, no gap: sCT, sCD
    meanflow   average velocities: any number of jumps
    ctm        every jump against the teacher's: any number of jumps
    cmt        mid-training on the teacher's trajectories, before ect
    sequence   two of these in one run; --recipe mid is cmt, then ect
    diffusion  plain denoising, as fewstep pretrain
    ```

    For example:

    ```
    fewstep tune teacher --data photos.zip --recipe fast --out run
    fewstep tune teacher --data photos.zip --set optim.lr=2e-4 objective.schedule.q=4 --out run
    fewstep tune teacher --data photos.zip --objective cd --set objective.nodes=10 --out run
    fewstep tune teacher --data teacher --objective ecd --out run       # without data: on its own samples
    ```
    """
    from fewstep import runs
    from fewstep.cli.progress import Live

    output = Output(quiet, json)
    settings = overrides(
        config, set, seed, images=images, batch_size=batch_size, resize=resize, channels=channels, split=split
    )
    own = ".py:" in teacher
    source = open_model(teacher, device="cpu") if own else teacher
    settings |= {"teacher": teacher} if own else {}
    live = Live(output)
    try:
        run = runs.tune(
            source, data, out=out, recipe=recipe, objective=objective, overrides=settings,
            device=device, watcher=live, command=command_line(),
        )  # fmt: skip
    finally:
        live.close()
    show_run(output, run)
    return 0


def show_run(output: Output, run: object) -> None:
    """The closing table and where to look."""
    from fewstep.evaluation.report import print_table
    from fewstep.runs import Run, rows_of

    assert isinstance(run, Run)
    rows = rows_of(run)
    if output.speaks and rows:
        print_table(rows, output.console)
    made = [run.path / name for name in run.config.models]
    output.say(f"Model: {' and '.join(map(str, made))}   Report: {run.path / 'report.html'}")
    if run.config.job == "tune":
        output.say(f"Next: fewstep sample {run.path} --steps 2 -n 64 --out samples.png")
    else:
        output.say(f"Next: fewstep tune {run.path} --data {run.config.data.source} --out RUN")
    output.result(
        {
            "run": str(run.path),
            "model": str(made[0]),
            "report": str(run.path / "report.html"),
            "results": run.results,
        }
    )
