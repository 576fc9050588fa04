"""Ctrl-C and SIGTERM: the state of that very step is saved, the exit code says which, resume gives the same bits."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewstep
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.training.loop import StopSignal

SIGNALS_AT = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from fewstep.cli import main
from fewstep.cli.progress import Live
def stepped(self, report):
    if report.progress.images_seen == {images}:
        for number in {numbers}:
            signal.pthread_kill(threading.get_ident(), number)  # at once, and never two in one
Live.stepped = stepped
sys.exit(main(sys.argv[1:]))
"""
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 75)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_state_of_that_step_is_saved(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    call: Callable[..., str],
    tune_arguments: Callable[..., list[str]],
    settings: dict[str, Any],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    run = tmp_path / "run"
    images = 16 * random.Random(code).choice([6, 13, 27, 34])  # neither a log row nor a checkpoint
    script = SIGNALS_AT.format(images=images, numbers=[int(number)])
    err = call(*tune_arguments(run, settings), script=script, code=code)
    assert (
        err.strip() == f"fewstep: Stopped at image {images}; the state is saved. Continue with: fewstep resume {run}."
    )
    assert latest_checkpoint(run).name == f"images-{images:09d}"
    assert not (run / "model").exists()
    fewstep.resume(run, device="cpu")
    same_bits(run, whole)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_closing_evaluation_can_be_stopped(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    call: Callable[..., str],
    tune_arguments: Callable[..., list[str]],
    settings: dict[str, Any],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    run = tmp_path / "run"
    script = f"""
import os, sys
from fewstep.cli import main
from fewstep.training import finish
finish.report_run = lambda *arguments: os.kill(os.getpid(), {int(number)})
sys.exit(main(sys.argv[1:]))
"""
    err = call(*tune_arguments(run, settings), script=script, code=code)
    assert f"Stopped during the closing evaluation; the training is saved. Run: fewstep resume {run}." in err
    assert not (run / "report.html").exists()
    fewstep.resume(run, device="cpu")
    assert (run / "report.html").is_file()
    same_bits(run, whole)


def test_from_outside(
    tmp_path: Path,
    launch: Callable[..., subprocess.Popen[str]],
    tune_arguments: Callable[..., list[str]],
    settings: dict[str, Any],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    run = tmp_path / "run"
    process = launch(*tune_arguments(run, settings))
    log, deadline = run / "metrics.jsonl", time.monotonic() + 100
    while not (log.is_file() and log.read_text().count("\n") >= 1):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    said = re.search(r"Stopped at image (\d+); the state is saved", err)
    assert said is not None
    assert latest_checkpoint(run).name == f"images-{int(said[1]):09d}"
    fewstep.resume(run, device="cpu")
    same_bits(run, whole)


def test_a_second_signal_does_not_wait(
    tmp_path: Path,
    call: Callable[..., str],
    tune_arguments: Callable[..., list[str]],
    settings: dict[str, Any],
) -> None:
    run = tmp_path / "run"
    script = SIGNALS_AT.format(images=176, numbers=[int(signal.SIGINT)] * 2)
    err = call(*tune_arguments(run, settings), script=script, code=130)
    assert "Stopped at image" not in err
    assert "Traceback" not in err
    assert latest_checkpoint(run).name == "images-000000160"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] != before
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
