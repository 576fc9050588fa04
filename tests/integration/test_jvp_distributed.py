"""Objectives with a forward-mode derivative on two gloo processes: float64 runs equal those of one process.

``torch.func.jvp`` and forward AD pass DistributedDataParallel by; the gradient goes through one ordinary pass inside
its forward, so every parameter, the learned weight's included, is averaged over the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.evaluation.record import read_history

SETTINGS: dict[str, Any] = {
    "images": 48,
    "batch_size": 16,
    "seed": 3,
    "optim": {"name": "adam", "lr": 3e-3, "eps": 0.01, "clip": 1.0},
    "student.dropout": 0.3,
    "emas": [{"kind": "constant", "beta": 0.5}],
    "output": {"log_images": 16, "checkpoint_images": 1000, "sample_images": 0, "grid": 4},
    "eval.samples": 0,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sct": {"kind": "scm", "warmup_images": 32},
    "scd": {"kind": "scm", "warmup_images": 32, "velocity": "teacher", "derivative": "finite"},
    "meanflow": {"kind": "meanflow"},
}
TEACHER = "import fewstep\ndef teacher():\n    return fewstep.load({path!r}).double()\n"


def two(folder: Path, out: Path, tiny_path: Path, settings: dict[str, Any]) -> None:
    """``torchrun --nproc-per-node 2 -m fewstep tune``, three micro batches in each process."""
    file = folder / "network.py"
    file.write_text(TEACHER.format(path=str(tiny_path)))
    assignments = [f"{k}={json.dumps(v)}" for k, v in (settings | {"micro_batch": 3}).items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fewstep",
         "tune", f"{file}:teacher", "--data", "digits", "--out", str(out), "--set", *assignments,
         "--quiet", "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def weights(run: Path) -> dict[str, Tensor]:
    files = sorted(latest_checkpoint(run).glob("*.safetensors"))
    return {f"{f.stem}/{k}": v for f in files for k, v in read_tensors(f).items() if f.stem != "sums"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_equal_one(name: str, tiny_path: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"objective": OBJECTIVES[name]}
    two(tmp_path, tmp_path / "two", tiny_path, settings)
    start = fewstep.load(tiny_path).double()
    fewstep.tune(start, "digits", out=tmp_path / "one", overrides=settings, device="cpu")
    a, b = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert a.keys() == b.keys()
    atol = 1e-10 if name == "scd" else 1e-12  # a finite difference divides rounding by its step
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=atol, rtol=10 * atol, msg=lambda m, k=key: f"{k}: {m}")
    own = ["student/landing.last.weight"] if name == "meanflow" else ["extra/coefficients"]
    for key in [*own, "student/inner.stem.weight" if name == "meanflow" else "student/stem.weight"]:
        assert a[key].dtype == torch.float64
        moved = a[key] if key in own else a[key] - start.backbone.state_dict()[key.split("/")[1].removeprefix("inner.")]
        assert moved.abs().max() > 1e6 * atol  # what is the objective's own starts at 0
    logs = [[(r["loss"], r["grad_norm"]) for r in read_history(tmp_path / n)] for n in ("two", "one")]
    assert logs[0] == [pytest.approx(row, rel=1e-5) for row in logs[1]]
    assert len(logs[0]) == 3


def test_derivatives_that_do_not_exist_are_refused_at_the_start(tiny_path: Path, tmp_path: Path) -> None:
    """In a sentence with its remedy, before anything is written."""
    file = tmp_path / "network.py"
    file.write_text(
        "import torch, fewstep\n"
        "class Swish(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x): return x * x.sigmoid()\n"
        "    @staticmethod\n"
        "    def backward(ctx, grad): return grad\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)\n"
        "    def forward(self, x, t): return Swish.apply(self.layer(x))\n"
        "def teacher():\n"
        "    process, shape = fewstep.EDM(), (1, 8, 8)\n"
        "    return fewstep.Denoiser.from_module(Net(), process=process, prediction='eps', sample_shape=shape)\n"
    )
    sources = str(Path(__file__).resolve().parents[2] / "src")
    command = [sys.executable, "-m", "fewstep", "tune", f"{file}:teacher", "--data", "digits", "--quiet"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--set", "objective.kind=scm", "objective.derivative=jvp"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": sources},
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be differentiated in forward mode" in done.stderr
    assert "--set objective.derivative=finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
