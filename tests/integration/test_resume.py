"""Kill a run anywhere, resume it, and get the same bits; and refuse to resume what would not give them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import fewstep
from fewstep import Denoiser
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.data.sources import ArraySource
from fewstep.errors import CheckpointError, ConfigError
from fewstep.training.loop import Watcher
from fewstep.training.trainer import StepReport

DIES_AT_STEP = """
import os, signal, sys
from fewstep.cli import main
from fewstep.cli.progress import Live
def stepped(self, report):
    if report.progress.images_seen == {images}:
        os.kill(os.getpid(), signal.SIGKILL)
Live.stepped = stepped
sys.exit(main(sys.argv[1:]))
"""

DIES_WHILE_SAVING = """
import os, signal, sys
from fewstep.cli import main
from fewstep.training import state
write = state.write_tensors
def dying(path, tensors):
    if "images-{images:09d}" in str(path) and path.name == "ema-1.safetensors":
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tensors)
state.write_tensors = dying
sys.exit(main(sys.argv[1:]))
"""

DIES_BEFORE_POINTER = """
import os, signal, sys
from fewstep.cli import main
from fewstep.training import state
write = state.write_text
def dying(path, text):
    if text == "images-{images:09d}\\n":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, text)
state.write_text = dying
sys.exit(main(sys.argv[1:]))
"""


class Stop(Exception):
    """Leaves a run from inside, as a crash would."""


class StopAt(Watcher):
    """Raises :class:`Stop` when ``images`` were seen."""

    def __init__(self, images: int) -> None:
        self.images = images

    def stepped(self, report: StepReport) -> None:
        if report.progress.images_seen == self.images:
            raise Stop


def stop_at(
    teacher: Denoiser, out: Path, settings: Mapping[str, Any], images: int, data: Any = "digits", **more: Any
) -> None:
    with pytest.raises(Stop):
        fewstep.tune(teacher, data, out=out, overrides=dict(settings), device="cpu", watcher=StopAt(images), **more)


def test_killed_again_and_again_it_ends_in_the_same_bits(
    tmp_path: Path,
    call: Callable[..., str],
    tune_arguments: Callable[..., list[str]],
    settings: dict[str, Any],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    rng, run = random.Random(1), tmp_path / "run"
    first, second = 16 * rng.randrange(6, 14), 16 * rng.randrange(31, 39)
    call(*tune_arguments(run, settings), script=DIES_AT_STEP.format(images=first), code=-signal.SIGKILL)
    saved = first // 80 * 80 - (80 if first % 80 == 0 else 0)
    assert latest_checkpoint(run).name == f"images-{saved:09d}"
    call("resume", run, "--quiet", script=DIES_WHILE_SAVING.format(images=320), code=-signal.SIGKILL)
    assert latest_checkpoint(run).name == "images-000000240"
    assert len(list((run / "checkpoints").glob(".*.tmp"))) == 1
    call("resume", run, "--quiet", script=DIES_BEFORE_POINTER.format(images=400), code=-signal.SIGKILL)
    assert latest_checkpoint(run).name == "images-000000320"
    call("resume", run, "--quiet", script=DIES_AT_STEP.format(images=second), code=-signal.SIGKILL)
    call("resume", run, "--quiet")
    same_bits(run, whole)
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == ["images-000000560", "images-000000640", "latest"]


def test_killed_from_outside(
    tmp_path: Path,
    launch: Callable[..., subprocess.Popen[str]],
    call: Callable[..., str],
    tune_arguments: Callable[..., list[str]],
    settings: dict[str, Any],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    run, rows = tmp_path / "run", random.Random(2).randrange(2, 7)
    process = launch(*tune_arguments(run, settings))
    log, deadline = run / "metrics.jsonl", time.monotonic() + 100
    while not (log.is_file() and log.read_text().count("\n") >= rows):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    assert not (run / "report.html").exists()
    call("resume", run, "--quiet")
    same_bits(run, whole)


@pytest.mark.parametrize("images", [16, 384])  # the second resumes from 320, between two rows of the log
def test_in_python_with_a_teacher_in_memory(
    images: int,
    tiny: Denoiser,
    tmp_path: Path,
    settings: dict[str, Any],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    run = tmp_path / "run"
    stop_at(tiny, run, settings, images)
    done = fewstep.resume(run, teacher=tiny, device="cpu")
    assert done.path == run
    same_bits(run, whole)


def test_without_the_teacher_it_says_what_is_missing(tiny: Denoiser, tmp_path: Path, settings: dict[str, Any]) -> None:
    stop_at(tiny, tmp_path / "run", settings, 96)
    with pytest.raises(CheckpointError, match=r"given \(in memory\).*teacher="):
        fewstep.resume(tmp_path / "run", device="cpu")


def test_pretraining_resumes(tmp_path: Path, same_bits: Callable[[Path, Path], None]) -> None:
    overrides = {
        "images": 320,
        "batch_size": 32,
        "emas": [{"kind": "half_life", "images": 200}, {"kind": "constant", "beta": 0.9}],
        "model": {"backbone": "unet", "kwargs": {"channels": 8, "blocks": 1, "dropout": 0.1}, "conditional": True},
        "data.label_drop": 0.2,
        "output": {"log_images": 64, "checkpoint_images": 96, "sample_images": 0},
        "eval.samples": 0,
    }
    fewstep.pretrain("digits", out=tmp_path / "whole", overrides=overrides, device="cpu")
    with pytest.raises(Stop):
        fewstep.pretrain("digits", out=tmp_path / "run", overrides=overrides, device="cpu", watcher=StopAt(160))
    fewstep.resume(tmp_path / "run", device="cpu")
    same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(whole: Path, tmp_path: Path, same_bits: Callable[[Path, Path], None]) -> None:
    shutil.copytree(whole, tmp_path / "run")
    fewstep.resume(tmp_path / "run", device="cpu")
    same_bits(tmp_path / "run", whole)


# ----------------------------------------------------------------------------------------- refusals
@pytest.fixture
def stopped(tiny: Denoiser, tmp_path: Path, settings: dict[str, Any]) -> Path:
    """A run that stopped at image 96, with a checkpoint at 80."""
    stop_at(tiny, tmp_path / "run", settings, 96)
    return tmp_path / "run"


def test_other_data_is_refused(stopped: Path, tiny: Denoiser) -> None:
    digits = fewstep.open_source("digits")
    other = digits.data.clone()
    other[7, 0, 3, 3] ^= 1
    changed = ArraySource("digits", other, digits.labels)
    with pytest.raises(CheckpointError, match=r"The data is not what this run was started with") as error:
        fewstep.resume(stopped, teacher=tiny, data=changed, device="cpu")
    assert changed.fingerprint[:12] in str(error.value)
    assert digits.fingerprint[:12] in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("record", ["state.json", "model.json"])
def test_another_version_is_refused(stopped: Path, tiny: Denoiser, record: str) -> None:
    path = latest_checkpoint(stopped) / record
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match=r"another version of the format\. Got: version 2\. Wanted: version 1"):
        fewstep.resume(stopped, teacher=tiny, device="cpu")


@pytest.mark.parametrize("name", ["student", "ema-0", "ema-1", "optimizer", "sums"])
@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_a_truncated_file_is_named(stopped: Path, tiny: Denoiser, name: str, keep: float) -> None:
    path = latest_checkpoint(stopped) / f"{name}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(CheckpointError, match=r"damaged or not a safetensors file") as error:
        fewstep.resume(stopped, teacher=tiny, device="cpu")
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(stopped: Path, tiny: Denoiser) -> None:
    (latest_checkpoint(stopped) / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors' is missing"):
        fewstep.resume(stopped, teacher=tiny, device="cpu")


def test_an_optimiser_of_another_network_is_refused(stopped: Path, tiny: Denoiser) -> None:
    from fewstep.checkpoint.store import read_tensors, write_tensors

    path = latest_checkpoint(stopped) / "optimizer.safetensors"
    tensors = read_tensors(path)
    name = next(k for k in tensors if k.startswith("exp_avg/"))
    write_tensors(path, {k: v for k, v in tensors.items() if k != name} | {"exp_avg/nowhere.weight": tensors[name]})
    with pytest.raises(CheckpointError, match=r"nowhere\.weight"):
        fewstep.resume(stopped, teacher=tiny, device="cpu")


def test_a_truncated_record_is_named(stopped: Path, tiny: Denoiser) -> None:
    path = latest_checkpoint(stopped) / "state.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(CheckpointError, match=r"state\.json' is damaged"):
        fewstep.resume(stopped, teacher=tiny, device="cpu")


def test_a_pointer_to_nothing_is_named(stopped: Path, tiny: Denoiser) -> None:
    (stopped / "checkpoints" / "latest").write_text("images-000000999\n")
    with pytest.raises(CheckpointError, match=r"images-000000999.* does not exist"):
        fewstep.resume(stopped, teacher=tiny, device="cpu")


def test_a_log_cut_in_the_middle_of_a_row(
    stopped: Path, tiny: Denoiser, whole: Path, same_bits: Callable[[Path, Path], None]
) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"images": 96, "lo')
    fewstep.resume(stopped, teacher=tiny, device="cpu")
    same_bits(stopped, whole)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        fewstep.resume(tmp_path)
