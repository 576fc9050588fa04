"""``fewstep report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fewstep.cli.options import Json, Output, Quiet


def report(
    runs: Annotated[list[Path], Parameter(help="Run directories, what --out of tune or pretrain was.", negative="")],
    /,
    *,
    out: Annotated[
        Path | None, Parameter(help="The page to write. Default: RUN/report.html; of several runs compare.html.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Draw the page of a run again from its directory alone, or one page that compares runs.

    No model is loaded and nothing is measured again. A comparison shows the settings that differ, the numbers side by
    side with their intervals, and the samples of the same noise; what cannot be compared is said, not ranked.

    For example:

    ```
    fewstep report run
    fewstep report run-a run-b run-c --out compare.html
    ```
    """
    from fewstep.errors import ConfigError

    output = Output(quiet, json)
    if out is not None and out.is_dir():
        raise ConfigError("The page is one file", got=f"--out {out}, a directory", want="for example --out page.html")
    return _one(output, runs[0], out) if len(runs) == 1 else _several(output, runs, out or Path("compare.html"))


def _one(output: Output, run: Path, out: Path | None) -> int:
    from fewstep.errors import ConfigError
    from fewstep.evaluation.record import read_record
    from fewstep.evaluation.report import report_of, verdict, write_report

    record = read_record(run)
    ended = (run / "report.html").is_file() or (run / "report.json").is_file()
    if out is None and not ended:
        raise ConfigError(
            f"The run '{run}' has not ended, and the page would mark it as ended",
            do=f"Run: fewstep resume {run}. Or see how far it is: fewstep report {run} --out so-far.html",
        )
    page = out or run / "report.html"
    write_report(page, report_of(record))
    for sentence in record.missing:
        output.say(sentence)
    output.say(f"{verdict(record.rows)}\nReport: {page}")
    output.result({"report": str(page), "runs": [str(run)], "missing": record.missing})
    return 0


def _several(output: Output, runs: list[Path], out: Path) -> int:
    from fewstep.evaluation.compare import compare_runs, verdict_of

    found = compare_runs(runs, out)
    for entry in found.entries:
        output.say(f"{entry.letter}  {entry.record.path}")
    for sentence in found.notes:
        output.say(sentence)
    output.say(f"{verdict_of(found)}\nComparison: {out}")
    output.result(
        {
            "report": str(out),
            "runs": {entry.letter: str(entry.record.path) for entry in found.entries},
            "verdict": verdict_of(found),
            "notes": found.notes,
            "differences": found.differences,
        }
    )
    return 0
