"""The command line: verbs, options, exit codes; no maths."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from fewstep import __version__
from fewstep.errors import FewstepError

_HELP = """Turn a pretrained diffusion model into a generator that needs 1, 2, 4 or 8 network evaluations.

    fewstep demo                                       see it work in a few minutes
    fewstep convert edm.pkl teacher                    an EDM or ECT pickle, read without running it
    fewstep tune teacher --data photos.zip --out run   tune it
    fewstep sample run --steps 2 -n 64 --out out.png   use it

Exit codes: 0 done; 2 wrong usage or unusable input; 1 internal failure; 130 interrupted and 75 preempted, both
after the state was saved.
"""

_VERBS = {
    "demo": "From the shipped diffusion checkpoint to a few-step generator of digits, with a report.",
    "convert": "Convert an EDM or ECT pickle to a safe model directory.",
    "pretrain": "Train a small diffusion model from scratch, to tune it afterwards.",
    "tune": "Tune a diffusion model into a few-step generator.",
    "sample": "Draw samples from a model.",
    "eval": "Measure a model at several step counts.",
    "recipes": "List the presets, or show one whole.",
    "resume": "Continue a run from its newest checkpoint.",
    "plan": "Predict memory and time of a run before starting it.",
}

app = App(name="fewstep", help=_HELP, version=__version__, help_format="markdown")
for _verb, _text in _VERBS.items():
    app.command(f"fewstep.cli.{_verb}:{_verb}", name=_verb, help=_text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
        return result if isinstance(result, int) else 0
    except CycloptsError:
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
        if os.environ.get("FEWSTEP_DEBUG"):
            traceback.print_exc()
        _say(f"Internal failure: {type(error).__name__}: {error}. For the traceback: FEWSTEP_DEBUG=1 fewstep ...")
        return 1


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"fewstep: {text}" if rank == "0" else f"fewstep (process {rank}): {text}", file=sys.stderr)
