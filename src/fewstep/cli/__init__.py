"""The command line: verbs, options, exit codes; no maths."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Group

from fewstep import __version__
from fewstep.cli.options import check_environment
from fewstep.errors import FewstepError

_HELP = """Turn a pretrained diffusion model into a generator that needs 1, 2, 4 or 8 network evaluations.

```
fewstep demo                                # see it work
fewstep convert edm.pkl teacher             # an EDM, EDM2 or ECT pickle; diffusers folders need none
fewstep tune teacher --data photos.zip --out run
fewstep sample run --steps 2 -n 64 --out out.png
```

Each verb explains itself, with an example: `fewstep tune --help`.

Exit codes: 0 done; 2 wrong usage or unusable input; 1 internal failure; 130 interrupted and 75 preempted, both
after the state was saved. `FEWSTEP_DEBUG=1` shows tracebacks.
"""

VERBS = {
    "Start here": ("demo", "recipes", "plan"),
    "Make a model": ("convert", "pretrain", "generate", "tune", "resume", "merge"),
    "Use a model": ("sample", "eval", "dial", "scaling", "export", "report"),
}
"""Panels of ``fewstep --help``. A verb is a function in the module of its name; torch is imported only when it runs."""

app = App(name="fewstep", help=_HELP, version=__version__, help_format="markdown")
for _key, (_title, _verbs) in enumerate(VERBS.items()):
    _panel = Group(_title, sort_key=_key)
    for _verb in _verbs:
        app.command(getattr(importlib.import_module(f"fewstep.cli.{_verb}"), _verb), name=_verb, group=_panel)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        check_environment()
        result = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        verb = [name for name in error.command_chain or () if name != "fewstep"][:1]
        _say(f"Its options and an example: {' '.join(['fewstep', *verb, '--help'])}")
        return 2
    except FewstepError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("Interrupted.")
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if _out_of_memory(error):
            _say(
                "There is not enough memory. Try --set micro_batch=8 (the same result in more passes), a smaller "
                "--batch-size, or `fewstep plan` to see what a run needs."
            )
            return 2
        if os.environ.get("FEWSTEP_DEBUG"):
            traceback.print_exc()
        _say(f"Internal failure: {type(error).__name__}: {error}. For the traceback: FEWSTEP_DEBUG=1 fewstep ...")
        return 1


def _out_of_memory(error: Exception) -> bool:
    """Torch's own class on a GPU; on a CPU a RuntimeError that only its text tells apart."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"fewstep: {text}" if rank == "0" else f"fewstep (process {rank}): {text}", file=sys.stderr)
