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
from fewstep.runs import _absolute
from fewstep.training.loop import Watcher
from fewstep.training.synthetic import generate
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


def test_from_another_folder_a_relative_source_is_found(
    tiny: Denoiser, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    generate(tiny, "made", 32, nfe=3)
    few = settings | {"images": 160, "data.flip": False, "output.grid": 4}
    stop_at(tiny, tmp_path / "run", few, 96, data="shards:made")
    monkeypatch.chdir(tmp_path / "else")
    run = fewstep.resume(tmp_path / "run", teacher=tiny, device="cpu")
    assert run.config.data.source == f"shards:{tmp_path / 'there' / 'made'}"


def test_only_paths_that_are_there_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("made", "digits", "a#b"):
        (tmp_path / name).mkdir()
    for kind in ("folder", "zip", "npz", "shards", "hf"):
        assert _absolute(f"{kind}:made") == f"{kind}:{tmp_path}/made"
    assert _absolute("hf:made#text") == f"hf:{tmp_path}/made#text"
    assert _absolute("folder:a#b") == f"folder:{tmp_path}/a#b"
    assert _absolute("folder:digits") == f"folder:{tmp_path}/digits"
    for name in ("digits", "hf:owner/name#text", "folder:", "shards:gone", "net.py:made", "hf:#text"):
        assert _absolute(name) == name


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


FOLLOWS = {"objective": "ecd", "data": "digits"}, {"objective": "ect", "data": "teacher:3"}


@pytest.fixture
def following(tiny_path: Path, tmp_path: Path, settings: dict[str, Any]) -> Callable[..., Path]:
    """A run from a model directory that may be changed, stopped at image 96."""

    def start(data: str, objective: str, **more: Any) -> Path:
        shutil.copytree(tiny_path, tmp_path / "teacher")
        few = dict(settings) | {"images": 160, "data.flip": False, "output.grid": 4} | more
        with pytest.raises(Stop):
            fewstep.tune(
                tmp_path / "teacher", data, out=tmp_path / "run", objective=objective, overrides=few, device="cpu",
                watcher=StopAt(96),
            )  # fmt: skip
        return tmp_path / "run"

    return start


def edit(model: Path, **settings: Any) -> None:
    """Change what ``config.json`` of a model directory says."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_another_teacher_is_refused(following: Callable[..., Path], tmp_path: Path, tiny: Denoiser) -> None:
    run, other = following("digits", "ecd"), tiny.clone()
    next(other.parameters()).data.add_(0.01)
    shutil.rmtree(tmp_path / "teacher")
    fewstep.save_model(other, tmp_path / "teacher")
    with pytest.raises(CheckpointError, match=r"The teacher is not what this run was started with") as error:
        fewstep.resume(run, device="cpu")
    assert error.value.exit_code == 2 and str(tmp_path / "teacher") in str(error.value)
    fewstep.resume(run, teacher=tiny, device="cpu")


def test_a_run_that_does_not_follow_its_teacher_takes_another(
    following: Callable[..., Path], tmp_path: Path, tiny: Denoiser
) -> None:
    run, other = following("digits", "ect"), tiny.clone()
    next(other.parameters()).data.add_(0.01)
    assert json.loads((latest_checkpoint(run) / "state.json").read_text())["teacher"] is None
    fewstep.resume(run, teacher=other, device="cpu")


@pytest.mark.parametrize("follows", FOLLOWS, ids=lambda kind: kind["data"])
def test_a_teacher_that_means_something_else_is_refused(
    follows: dict[str, str], following: Callable[..., Path], tmp_path: Path, tiny_path: Path
) -> None:
    """The student is from elsewhere, so only the teacher's own record can tell."""
    shutil.copytree(tiny_path, tmp_path / "start")
    run = following(**follows, **{"student.start": str(tmp_path / "start")})
    edit(tmp_path / "teacher", parametrization={"prediction": "x0", "sigma_data": 0.5})
    with pytest.raises(CheckpointError, match=r"The (teacher|data) is not what this run was started with"):
        fewstep.resume(run, device="cpu")


def test_an_older_checkpoint_says_nothing_of_its_teacher(
    following: Callable[..., Path], tmp_path: Path, tiny: Denoiser
) -> None:
    run, other = following("digits", "ecd"), tiny.clone()
    next(other.parameters()).data.add_(0.01)
    path = latest_checkpoint(run) / "state.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "teacher"}))
    assert (fewstep.resume(run, teacher=other, device="cpu").path / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parametrization", {"prediction": "edm", "sigma_data": 0.7}),
        ("sigma_max", 40.0),
        ("native", {"kind": "vp"}),
    ],
)
def test_a_student_that_means_something_else_is_refused(
    name: str, value: Any, following: Callable[..., Path], tmp_path: Path
) -> None:
    run = following("digits", "ect")
    edit(tmp_path / "teacher", **{name: value})
    with pytest.raises(CheckpointError, match=rf"does not mean what it did when this run was started.*{name}"):
        fewstep.resume(run, device="cpu")


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
