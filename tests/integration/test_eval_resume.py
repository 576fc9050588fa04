"""An interrupted ``fewstep eval --out`` loses no finished part and gives the same result as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fewstep.cli.evaluation as module
from fewstep.cli import main
from fewstep.runs import demo_teacher

OPTIONS = ["--data", "digits", "--sampler", "ode", "--replicates", "4", "--quiet", "--device", "cpu"]


class Counted:
    """``evaluate`` that fails at its ``breaks``-th call."""

    def __init__(self, breaks: int = 99) -> None:
        self.calls: list[tuple[int, int]] = []
        self._breaks, self._plain = breaks, module.evaluate

    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        self.calls.append((options["steps"][0], options["seed"]))
        if len(self.calls) == self._breaks:
            raise KeyboardInterrupt
        return self._plain(*args, **options)


def measure(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str, breaks: int = 99) -> tuple[int, Counted]:
    counted = Counted(breaks)
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", counted)
        try:
            code = main(["eval", str(demo_teacher()), *OPTIONS, "--out", str(out), *more])
        except SystemExit as error:  # how the command-line library ends a Ctrl-C
            code = int(error.code or 0)
    return code, counted


def without_speed(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    for row in result["rows"]:
        del row["samples_per_second"]
    return result


def test_finished_parts_are_kept_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("--steps", "1,2", "-n", "16", "--repeats", "2")
    whole, broken, kept = tmp_path / "whole.json", tmp_path / "broken.json", tmp_path / "broken.partial.json"
    assert measure(monkeypatch, whole, *more)[1].calls == [(1, 0), (2, 0), (1, 1), (2, 1)]
    code, counted = measure(monkeypatch, broken, *more, breaks=3)
    assert (code, len(counted.calls)) == (130, 3)
    assert not broken.exists() and len(json.loads(kept.read_text())["parts"]) == 2
    assert measure(monkeypatch, broken, *more)[1].calls == [(1, 1), (2, 1)]
    assert without_speed(broken) == without_speed(whole)
    assert not kept.exists()


def test_parts_of_something_else_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.json"
    measure(monkeypatch, out, "--steps", "1,2", "-n", "16", breaks=2)
    assert measure(monkeypatch, out, "--steps", "1", "-n", "17")[1].calls == [(1, 0)]
    measure(monkeypatch, out, "--steps", "1,2", "-n", "16", breaks=2)
    (tmp_path / "x.partial.json").write_text("{ damaged")
    assert measure(monkeypatch, out, "--steps", "1", "-n", "16")[1].calls == [(1, 0)]
