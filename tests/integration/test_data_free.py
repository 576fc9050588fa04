"""Tuning without training data: `fewstep generate`, `--data FOLDER`, `--data teacher`; stopped, resumed, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep import Denoiser, open_source, save_model
from fewstep.cli import main
from fewstep.errors import CheckpointError, ConfigError, DataError
from fewstep.evaluation.record import read_record
from fewstep.evaluation.summary import summary_of
from fewstep.training.loop import Watcher
from fewstep.training.synthetic import Sampler
from fewstep.training.trainer import StepReport

INTERRUPTED = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from fewstep.cli import main
from fewstep.cli.progress import Counting
def told(self, what, done, total):
    if done == 64:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
Counting.__call__ = told
sys.exit(main(sys.argv[1:]))
"""
QUICK = {"eval.steps": [1], "eval.teacher_nfe": [3], "output.grid": 4, "eval.samples": 40, "data.flip": False}
Settings = dict[str, Any]


def generate(teacher: Path, out: Path, *more: str | int, number: int = 100) -> list[str]:
    begin = ["generate", str(teacher), "--out", str(out), "-n", str(number), "--nfe", "3"]
    return [*begin, "--batch-size", "16", "--device", "cpu", *map(str, more)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def samples(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 samples of the tiny teacher."""
    out = tmp_path_factory.mktemp("samples") / "set"
    assert main(generate(tiny_path, out, "--quiet")) == 0
    return out


# ---- fewstep generate


def test_ctrl_c_keeps_what_was_made_and_the_same_command_goes_on(
    tmp_path: Path, call: Callable[..., str], tiny_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    err = call(*generate(tiny_path, out), script=INTERRUPTED, code=130)
    assert f"Stopped; 64 of 100 samples are kept in '{out}'. To go on, run the same command again." in err
    with pytest.raises(DataError, match=r"is not finished\. Run the command that began it again"):
        open_source(str(out))
    assert main([*generate(tiny_path, out), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["number"], found["samples"], found["key"]["nfe"]) == (100, str(out), 3)
    assert f"Next: fewstep tune {tiny_path} --data {out} --objective ecd" in " ".join(said.err.split())
    assert files(out) == files(samples)


def test_the_samples_are_the_teachers(samples: Path, tiny: Denoiser) -> None:
    source = open_source(str(samples))
    assert (len(source), source.shape, source.is_images, source.labels) == (100, (1, 8, 8), True, None)
    made = Sampler(tiny.clone().eval(), 3, batch_size=16).samples(np.arange(16))
    assert torch.equal(source.read(np.arange(16)), made)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_what_cannot_be_generated(
    tmp_path: Path, tiny_path: Path, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"x")
    assert "holds other files. Got: a.png." in error_of(generate(tiny_path, photos), capsys)
    assert "Got: seed 0. Wanted: seed 7." in error_of(generate(tiny_path, samples, "--seed", 7), capsys)
    assert "has more rows already" in error_of(generate(tiny_path, samples, number=50), capsys)
    assert ">= 1" in error_of(generate(tiny_path, tmp_path / "s", number=0), capsys)
    assert "class-conditional" in error_of(generate(tiny_path, tmp_path / "s", "--guidance", 2), capsys)
    assert "does not exist" in error_of(generate(tmp_path / "none", tmp_path / "s"), capsys)
    assert not (tmp_path / "s").exists()


# ---- tuning from shards


def test_tuning_from_shards(tmp_path: Path, tiny_path: Path, samples: Path, settings: Settings) -> None:
    run = fewstep.tune(
        tiny_path, samples, out=tmp_path / "run", objective="ecd",
        overrides=settings | QUICK | {"images": 64}, device="cpu",
    )  # fmt: skip
    assert run.config.data.source == str(samples)
    assert run.results is not None
    assert run.results["tuned"]["reference"]["source"] == f"shards:{samples}"
    summary = dict(summary_of(read_record(run.path)))
    assert summary["Made by"] == "the teacher's own samples, 3 evaluations each"
    assert "100 samples of 1 x 8 x 8" in summary["Data"]
    assert "the teacher&#39;s own samples" in (run.path / "report.html").read_text()


# ---- tuning on samples made when needed


class Stop(Exception):
    """Leaves a run from inside, as a crash would."""


class StopAt(Watcher):
    """Raises :class:`Stop` when ``images`` were seen."""

    def __init__(self, images: int) -> None:
        self.images = images

    def stepped(self, report: StepReport) -> None:
        if report.progress.images_seen == self.images:
            raise Stop


def on_the_fly(teacher: Path, out: Path, settings: Settings, stop: int = 0) -> fewstep.Run:
    overrides = settings | {"data.flip": False}
    return fewstep.tune(
        teacher, "teacher:3", out=out, objective="ecd", overrides=overrides, device="cpu", watcher=StopAt(stop)
    )


def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, tiny_path: Path, settings: Settings, same_bits: Callable[[Path, Path], None]
) -> None:
    on_the_fly(tiny_path, tmp_path / "once", settings)
    with pytest.raises(Stop):
        on_the_fly(tiny_path, tmp_path / "often", settings, 304)
    fewstep.resume(tmp_path / "often", device="cpu")
    same_bits(tmp_path / "often", tmp_path / "once")


def test_the_table_compares_with_the_teachers_samples_and_says_so(
    tmp_path: Path, tiny_path: Path, settings: Settings
) -> None:
    run = on_the_fly(tiny_path, tmp_path / "run", settings | QUICK | {"images": 64})
    assert run.config.data.source == "teacher:3"
    assert run.results is not None
    assert run.results["tuned"]["reference"]["source"] == "teacher:3 (40 samples)"
    summary = dict(summary_of(read_record(run.path)))
    assert summary["Made by"] == "the teacher's own samples, 3 evaluations each, made when needed"


def test_the_table_can_compare_with_real_data(tmp_path: Path, tiny_path: Path, settings: Settings) -> None:
    more = settings | QUICK | {"images": 64, "eval.data": "digits"}
    run = on_the_fly(tiny_path, tmp_path / "run", more)
    assert run.results is not None
    assert run.results["tuned"]["reference"]["source"] == "digits"
    assert run.results["tuned"]["reference"]["count"] == 1797


def test_data_to_compare_with_are_checked_before_training(tmp_path: Path, tiny_path: Path, settings: Settings) -> None:
    for wrong, message in [
        ("tiles", r"tiles' \(eval\.data\) do not have the shape"),
        ("digit", "Did you mean 'digits'"),
    ]:
        with pytest.raises(DataError, match=message):
            on_the_fly(tiny_path, tmp_path / "run", settings | QUICK | {"eval.data": wrong})
    assert not (tmp_path / "run").exists()


def test_the_teacher_must_be_there_and_the_same(
    tmp_path: Path, tiny: Denoiser, tiny_path: Path, settings: Settings
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_path, teacher)
    with pytest.raises(Stop):
        fewstep.tune(
            teacher, "teacher:3", out=tmp_path / "run", objective="ect", overrides=settings | {"data.flip": False},
            device="cpu", watcher=StopAt(96),
        )  # fmt: skip
    other = tiny.clone()
    next(other.parameters()).data.add_(0.01)
    shutil.rmtree(teacher)
    with pytest.raises(CheckpointError, match=r"is gone, and the data are its own samples\. Put it back, or give it"):
        fewstep.resume(tmp_path / "run", device="cpu")
    save_model(other, teacher)
    with pytest.raises(CheckpointError, match="The data is not what this run was started with"):
        fewstep.resume(tmp_path / "run", device="cpu")


def test_a_folder_named_teacher_is_a_path_with_a_dot(
    tmp_path: Path, tiny_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the source is not made a path, the teacher's own is."""
    shutil.copytree(tiny_path, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    run = fewstep.tune(
        "teacher", "teacher", out="run", objective="ect", device="cpu",
        overrides=settings | {"images": 16, "data.flip": False, "output.grid": 4},
    )  # fmt: skip
    assert (run.config.teacher, run.config.data.source) == (str(tmp_path / "teacher"), "teacher")


def test_where_there_is_no_diffusion_model(tmp_path: Path, tiny_path: Path, settings: Settings) -> None:
    with pytest.raises(ConfigError, match="'teacher' are samples of the model that is tuned, and here is none"):
        fewstep.pretrain("teacher", out=tmp_path / "run")
    run = fewstep.tune(tiny_path, "digits", out=tmp_path / "few", overrides=settings | {"images": 16}, device="cpu")
    with pytest.raises(ConfigError, match=r"samples of a diffusion model, and '.*few' is a few-step model"):
        fewstep.tune(run.path, "teacher", out=tmp_path / "run", objective="ect", device="cpu")
    assert main(generate(run.path, tmp_path / "s")) == 2
    shutil.copytree(run.path / "model", tmp_path / "copied")
    few = settings | {"images": 16, "data.flip": False}
    for model in (run.path / "model", tmp_path / "copied"):
        for data, objective in (("teacher", "ect"), ("digits", "ecd")):
            with pytest.raises(ConfigError, match=rf"and '{model}' is a few-step model\. Got: a run tuned with '"):
                fewstep.tune(model, data, out=tmp_path / "run", objective=objective, overrides=few, device="cpu")
        assert main(generate(model, tmp_path / "s")) == 2
    assert not (tmp_path / "run").exists()
