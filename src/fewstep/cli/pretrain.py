"""``fewstep pretrain``."""

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
    overrides,
)
from fewstep.cli.tune import show_run


def pretrain(
    *,
    data: DataOption,
    out: Annotated[Path, Parameter(help="The run directory to write.")],
    recipe: Annotated[str | None, Parameter(help="A preset; see fewstep recipes.")] = None,
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
    """Train a small diffusion model from scratch, to tune it afterwards.

    The network is chosen by `--set model.backbone=unet` (edm, dit; mlp for points) and its arguments by
    `--set model.kwargs="{channels: 64}"`. Ctrl-C saves the state; `fewstep resume OUT` continues.
    `--set model.vae=FOLDER`, a VAE or a pipeline of diffusers, makes it a model of latents: images are encoded once and
    kept in the cache.

    For example:

    ```
    fewstep pretrain --data digits --recipe demo-teacher --out teacher
    fewstep pretrain --data tiles --images 500000 --set model.kwargs="{channels: 64}" --out teacher
    fewstep pretrain --data photos.zip --resize 256 --set model.vae=sd-vae model.backbone=dit model.sigma_data=1 --out t
    ```
    """
    from fewstep import runs
    from fewstep.cli.progress import Live

    output = Output(quiet, json)
    settings = overrides(
        config, set, seed, images=images, batch_size=batch_size, resize=resize, channels=channels, split=split
    )
    live = Live(output)
    try:
        run = runs.pretrain(
            data, out=out, recipe=recipe, overrides=settings, device=device, watcher=live, command=command_line()
        )
    finally:
        live.close()
    show_run(output, run)
    return 0
