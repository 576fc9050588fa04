"""Options that several verbs share, and where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number
from rich.console import Console

if TYPE_CHECKING:
    from fewstep.denoiser import Denoiser

COMMON = Group("Common options", sort_key=90)
DATA = Group("Data", sort_key=50)

COUNT = Number(gte=1)
BatchSize = Annotated[
    int | None, Parameter(validator=COUNT, help="Samples at once; changes the memory and the rounding only.")
]
Precision = Annotated[
    Literal["auto", "fp32", "tf32", "fp16", "bf16"],
    Parameter(
        help="Arithmetic of the sampled network. auto: fp16 on a GPU, else fp32. bf16 is also fast on recent CPUs; it "
        "moves pixels by up to a few grey levels in one step. fp32: as torch is set (docs/performance.md)."
    ),
]
Compile = Annotated[
    bool,
    Parameter(
        negative="",
        show_default=False,
        help="Compile the sampled network first, which takes minutes and pays from tens of thousands of samples on.",
    ),
]
Images = Annotated[int | None, Parameter(validator=COUNT, help="Training images in total. Default: the recipe's.")]
TrainBatch = Annotated[
    int | None, Parameter(validator=COUNT, help="Global batch, over all processes. Default: the recipe's.")
]
Seed = Annotated[int | None, Parameter(group=COMMON, help="Seed of all randomness.")]
Device = Annotated[str, Parameter(group=COMMON, help="auto, cpu, cuda or cuda:1.")]
Json = Annotated[
    bool,
    Parameter(name="--json", group=COMMON, negative="", help="Machine-readable result on stdout.", show_default=False),
]
Quiet = Annotated[
    bool,
    Parameter(name=["--quiet", "-q"], group=COMMON, negative="", help="No progress, no tables.", show_default=False),
]
Config = Annotated[
    Path | None,
    Parameter(group=COMMON, help="A YAML file with settings, as in a run's config.yaml; --set wins over it."),
]
Set = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        group=COMMON,
        consume_multiple=True,
        negative="",
        help="Settings as path=value, repeatable: --set optim.lr=2e-4 objective.schedule.q=4. "
        "See them all: fewstep recipes NAME.",
    ),
]
Network = Annotated[
    str | None,
    Parameter(
        group=COMMON,
        help="For a network of your own: file.py:function, which returns the Denoiser again. Runs that file.",
    ),
]
DataOption = Annotated[
    str,
    Parameter(
        group=DATA,
        help="digits, tiles, gaussians8, a folder (of images, or made by fewstep generate), a zip (EDM labels "
        "understood), an npz or hf:NAME_OR_PATH[#CAPTIONS]; tune only: teacher, its own samples made when needed.",
    ),
]
Resize = Annotated[int | None, Parameter(group=DATA, help="Centre-crop to a square and resize to this side.")]
Channels = Annotated[int | None, Parameter(group=DATA, help="1 (grey) or 3 (RGB): convert the images.")]
Split = Annotated[str, Parameter(group=DATA, help="train, or test for an npz with x_test.")]


def leads() -> bool:
    """True in the one process that prints: RANK, as torchrun sets it, is 0 or not set."""
    return os.environ.get("RANK", "0").strip() in ("", "0")


def check_environment() -> None:
    """Refuse odd values of what torchrun sets, which would silence or split the run.

    Raises:
        ConfigError: RANK, WORLD_SIZE and LOCAL_RANK are not whole numbers that fit together.
    """
    from fewstep.errors import ConfigError

    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    if not given:
        return
    whole = all(value.isdecimal() for value in given.values())
    alone = not whole or int(given.get("WORLD_SIZE", 1)) == 1
    if whole and int(given.get("RANK", 0)) < int(given.get("WORLD_SIZE", 1)) and (alone or "MASTER_ADDR" in os.environ):
        return
    raise ConfigError(
        "The environment variables of a distributed run do not make sense",
        got=", ".join(f"{name}='{value}'" for name, value in given.items()),
        want="whole numbers with RANK below WORLD_SIZE, and MASTER_ADDR, as torchrun sets them",
        do=f"Run: unset {' '.join(given)}",
    )


def _console() -> Console:
    """A console on stderr; where that is no terminal, wide enough for the tables."""
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=140)


@dataclass(frozen=True)
class Output:
    """Where a verb writes: a console on stderr, and the result on stdout where it is asked for as JSON."""

    quiet: bool = False
    as_json: bool = False
    console: Console = field(default_factory=_console)

    @property
    def speaks(self) -> bool:
        """True in the leading process, unless --quiet."""
        return not self.quiet and leads()

    def say(self, text: Any) -> None:
        """A line, table or other renderable for people."""
        if self.speaks:
            self.console.print(text)

    def result(self, value: dict[str, Any]) -> None:
        """The result for machines."""
        if self.as_json and leads():
            print(json.dumps(value))


def overrides(
    config: Path | None,
    assignments: list[str] | None,
    seed: int | None,
    *,
    images: int | None = None,
    batch_size: int | None = None,
    resize: int | None = None,
    channels: int | None = None,
    split: str = "train",
) -> dict[str, Any]:
    """Settings by dotted path: file, then --set, then the options that were given."""
    from fewstep.config import flatten, parse_assignments, read_yaml

    out = flatten(read_yaml(config)) if config is not None else {}
    out |= parse_assignments(assignments or [])
    given = {
        "seed": seed,
        "images": images,
        "batch_size": batch_size,
        "data.resize": resize,
        "data.channels": channels,
        "data.split": split if split != "train" else None,
    }
    return out | {path: value for path, value in given.items() if value is not None}


def command_line() -> str:
    """What was typed, to reproduce a run."""
    return shlex.join(["fewstep", *sys.argv[1:]])


@contextmanager
def noting_fallbacks(say: Callable[[str], None]) -> Iterator[None]:
    """What cannot be compiled is said in a line like any other, once."""
    from fewstep.compiling import CompileFallback

    said: set[str] = set()
    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.simplefilter("always", CompileFallback)

        def note(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if not issubclass(category, CompileFallback):
                shown(message, category, *rest)
            elif str(message) not in said:
                said.add(str(message))
                say(f"{message}.")

        warnings.showwarning = note  # type: ignore[assignment]
        yield


def open_model(path: str, weights: str = "ema", network: str | None = None, device: str = "auto") -> Denoiser:
    """A model directory, a run, or ``file.py:function``; on its device."""
    from fewstep.checkpoint.model import load
    from fewstep.world import pick_device

    own = open_network(network) if network is not None else None
    where = pick_device(device)
    if ".py:" in path:
        return open_network(path).to(where)
    return load(path, weights=weights, network=own, device=where)


def open_network(spec: str) -> Denoiser:
    """The denoiser that the function of a user's Python file returns; the file is run.

    Raises:
        ConfigError: no such file or function, or it returns something else.
    """
    import importlib.util

    from fewstep.denoiser import Denoiser
    from fewstep.errors import ConfigError

    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"'{spec}' does not name a function in a Python file", want="file.py:function")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        made = getattr(module, name)()
    except AttributeError as error:
        raise ConfigError(f"'{path}' has no function '{name}': {error}") from error
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"'{spec}' failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, Denoiser):
        raise ConfigError(
            f"'{spec}' did not return a Denoiser", got=type(made).__name__, do="Return Denoiser.from_module(...)"
        )
    return made
