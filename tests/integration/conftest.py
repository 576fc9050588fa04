"""A tiny teacher with dropout, and ways to run it: in this process, in another, and in one that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import EDM, Denoiser, Parametrization, save_model
from fewstep.backbones import build
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.evaluation.record import read_history

SOURCES = Path(__file__).resolve().parents[2] / "src"
TINY = {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1, 2], "blocks": 1, "dropout": 0.2}

Settings = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The number of threads changes the order of sums, so here it is that of the other processes: one.

    Of the module, so that it holds while the fixtures of the module and of the session are made too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tiny(seed: int = 0) -> Denoiser:
    """A U-Net of 30,000 parameters, none of them zero, with dropout."""
    spec = {"name": "unet", "kwargs": TINY}
    backbone = build(spec)
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec)


@pytest.fixture(scope="session")
def tiny() -> Denoiser:
    """The tiny teacher, in memory."""
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_path(tiny: Denoiser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher, on disk."""
    path = tmp_path_factory.mktemp("teacher") / "tiny"
    save_model(tiny, path)
    return path


@pytest.fixture(scope="session")
def settings() -> Settings:
    """40 steps of 16 images; log rows every 3 or 4 steps, checkpoints every 5, stages of 12.5."""
    return {
        "images": 640,
        "batch_size": 16,
        "seed": 5,
        "optim.lr": 1e-3,
        "optim.schedule": "linear",
        "student.dropout": 0.3,
        "data.flip": True,
        "objective.schedule.images": 200,
        "emas": [{"kind": "constant", "beta": 0.9}, {"kind": "power", "std": 0.1}],
        "output.log_images": 60,
        "output.checkpoint_images": 80,
        "output.sample_images": 0,
        "eval.samples": 0,
    }


def as_arguments(settings: Settings) -> list[str]:
    """``--set`` for the command line."""
    return ["--set", *(f"{path}={json.dumps(value)}" for path, value in settings.items())]


def environment(**more: str) -> dict[str, str]:
    """Of a subprocess: one thread, the package from this checkout, warnings as they come."""
    path = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


def start(*arguments: str | Path, script: str | None = None, **env: str) -> subprocess.Popen[str]:
    """``python -m fewstep ARGUMENTS``, or a script that does the same and something else."""
    how = ["-m", "fewstep"] if script is None else ["-c", script]
    return subprocess.Popen(
        [sys.executable, *how, *map(str, arguments)],
        env=environment(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a subprocess and check its exit code; what it wrote to stderr."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return err


Call = Callable[..., str]


@pytest.fixture(scope="session")
def call() -> Call:
    """``call("resume", run, code=0)``: the command line in another process; its stderr."""

    def run(*arguments: str | Path, code: int = 0, script: str | None = None, **env: str) -> str:
        return finish(start(*arguments, script=script, **env), code)

    return run


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.Popen[str]]:
    """As ``call``, but the process is still running."""
    return start


@pytest.fixture(scope="session")
def tune_arguments(tiny_path: Path) -> Callable[[Path, Settings], list[str | Path]]:
    """``tune TEACHER --data digits --out OUT --set ...``."""

    def arguments(out: Path, settings: Settings) -> list[str | Path]:
        return ["tune", tiny_path, "--data", "digits", "--out", out, "--quiet", "--device", "cpu",
                *as_arguments(settings)]  # fmt: skip

    return arguments


@pytest.fixture(scope="session")
def whole(
    call: Call, tune_arguments: Callable[..., list[str]], settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    call(*tune_arguments(out, settings))
    return out


def state_of(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint and of the model: student, averages, optimiser, sums."""
    checkpoint = latest_checkpoint(run)
    files = [*checkpoint.glob("*.safetensors"), *(run / "model").glob("*.safetensors")]
    return {f"{f.parent.name}/{f.stem}/{k}": v for f in files for k, v in read_tensors(f).items()}


def history_of(run: Path) -> list[dict[str, float]]:
    """The log without the clock on the wall."""
    clock = ("images_per_second", "seconds")
    return [{k: v for k, v in row.items() if k not in clock} for row in read_history(run)]


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Path, Path], None]:
    """Asserts that two runs ended in the same bits: weights, averages, optimiser, log."""

    def check(run: Path, other: Path) -> None:
        a, b = state_of(run), state_of(other)
        assert a.keys() == b.keys()
        kinds = {name.split("/")[1] for name in a}
        assert {"student", "ema-0", "ema-1", "optimizer", "model", "sums"} <= kinds
        assert any("/optimizer/step/" in name for name in a)
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
        assert history_of(run) == history_of(other)
        assert len(history_of(run)) >= 5

    return check
