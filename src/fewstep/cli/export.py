"""``fewstep export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from fewstep.cli.options import Json, Network, Output, Quiet

HUB = Group("Hugging Face hub", sort_key=50)


def export(
    model: Annotated[str, Parameter(help="A run or model directory; or file.py:function.")],
    /,
    *,
    to: Annotated[
        Literal["diffusers", "onnx", "torch"],
        Parameter(help="diffusers needs a network of diffusers; onnx and torch take any."),
    ] = "diffusers",
    out: Annotated[
        Path | None, Parameter(help="The directory to write, new or empty. Default: MODEL-diffusers and the like.")
    ] = None,
    weights: Annotated[str, Parameter(help="ema; of a run also student, and ema-1, ... where it has several.")] = "ema",
    licence: Annotated[
        str | None,
        Parameter(
            name=["--licence", "--license"],
            help="Of the weights, for example cc-by-nc-4.0. Default: what the teacher's card says.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        Parameter(
            group=HUB, help="OWNER/NAME: show what would be uploaded there; an --out with the same export is taken."
        ),
    ] = None,
    yes: Annotated[bool, Parameter(group=HUB, negative="", help="Upload it.", show_default=False)] = False,
    private: Annotated[
        bool, Parameter(group=HUB, negative="", help="Make a new repository private.", show_default=False)
    ] = False,
    network: Network = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write a few-step model as other tools load it, with a model card.

    - diffusers: a pipeline for plain diffusers; its steps are the model's own, and each is checked before anything is
      kept.
    - onnx: model.onnx, the function f(x, sigma) -> x_0 for any batch size, checked in onnxruntime.
    - torch: program.pt2 for torch.export.load, and the weights as model.safetensors.

    The directory also holds README.md (provenance, licence, measured table, code to sample) and fewstep.json.

    For example:

    ```
    fewstep export run --to diffusers --out pipeline
    fewstep export run --to onnx --licence cc-by-nc-4.0
    fewstep export run --out pipeline --push me/few-step-cats --yes
    ```
    """
    from fewstep.cli.options import open_network
    from fewstep.errors import ConfigError
    from fewstep.exports.export import ABOUT, check_exported
    from fewstep.exports.export import export as write
    from fewstep.exports.push import is_export

    output = Output(quiet, json)
    if push is None and (yes or private):
        raise ConfigError("--yes and --private are about an upload", do="Add --push OWNER/NAME, or leave them out")
    own = open_network(model) if ".py:" in model else None
    target = out or Path(f"{Path(model.partition(':')[0]).with_suffix('') if own else model.rstrip('/')}-{to}")
    before = push is not None and is_export(target)
    if before and licence is not None:
        raise ConfigError(f"'{target}' was exported before, with its licence", do="Remove it, or leave --licence out")
    again = open_network(network) if network is not None else None
    source = own if own is not None else model
    if before:
        check_exported(target, source, to, weights=weights, network=again)
    else:
        write(source, target, to, weights=weights, network=again, licence=licence)
    about = _read(target / ABOUT)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    found = f"Exported before: {target}" if before else f"Wrote {target}"
    output.say(f"{found}, {size / 2**20:.1f} MiB; one evaluation differs by at most {about['difference']:.2g}.")
    if about["licence"] == "unknown":
        output.say("The licence of the weights is unknown: before publishing, say it with --licence.")
    address = _push(output, target, push, yes, private) if push is not None else None
    output.result({"export": str(target), "about": about, "pushed": address})
    return 0


def _push(output: Output, target: Path, repository: str, yes: bool, private: bool) -> str | None:
    from fewstep.exports.push import plan_push, push

    upload = plan_push(target, repository)
    for name, size in upload.files:
        output.say(f"  {name}  {size:,} bytes")
    if not yes:
        output.say(f"{len(upload.files)} files would go to {repository}. To upload them, add --yes.")
        return None
    address = push(upload, private=private)
    output.say(f"Uploaded {len(upload.files)} files to {address}.")
    return address


def _read(path: Path) -> dict[str, object]:
    import json

    return dict(json.loads(path.read_text(encoding="utf-8")))
