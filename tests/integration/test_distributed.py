"""Two processes on gloo equal one process with the same global batch; so does accumulation over micro batches.

Sums of the same rows in another order differ by rounding only: in float64 by some 1e-16 of a gradient per step,
and Adam with a large ``eps`` does not blow that up, so float64 runs must agree to 1e-12; float32 runs, whose
rounding is 5e8 times larger, to 1e-5.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.errors import ConfigError
from fewstep.evaluation.record import read_history
from fewstep.world import World

OVERRIDES = {
    "images": 192,
    "batch_size": 16,
    "seed": 3,
    "precision": "fp32",  # the recipe's "auto" is bf16 in the first stages, where the processor has it
    "optim": {"name": "adam", "lr": 3e-3, "eps": 0.01, "clip": 1.0},
    "student.dropout": 0.3,
    "objective.schedule.images": 60,
    "objective.schedule.q": 2,
    "emas": [{"kind": "constant", "beta": 0.5}, {"kind": "power", "std": 0.1}],
    "output": {"log_images": 60, "checkpoint_images": 1000, "sample_images": 96, "grid": 4},
    "eval.samples": 0,
}

TEACHER = """
import os, sys
import fewstep

def watch(event, args):  # the second process may write nothing into the run
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if (writes or event in ("os.mkdir", "os.rename", "os.remove")) and str(args[0]).startswith({out!r}):
        raise RuntimeError(f"process 1 wrote: {{event}} {{args}}")

def teacher():
    if os.environ.get("RANK") == "1":
        sys.addaudithook(watch)
    return fewstep.load({teacher!r}).{dtype}()
"""

STOPS = """
import os, signal, sys
from fewstep.cli import main
from fewstep.cli.progress import Live
def stepped(self, report):
    if report.progress.images_seen == 96 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
Live.stepped = stepped
sys.exit(main(sys.argv[1:]))
"""

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def torchrun(tmp_path: Path) -> Launch:
    """``torchrun --nproc-per-node 2 -m fewstep ...`` (or a script) in this checkout."""

    def run(*arguments: str | Path, script: str | None = None) -> subprocess.CompletedProcess[str]:
        what = ["-m", "fewstep"]
        if script is not None:
            (tmp_path / "script.py").write_text(script)
            what = [str(tmp_path / "script.py")]
        sources = str(Path(__file__).resolve().parents[2] / "src")
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what,
             *map(str, arguments), "--quiet", "--device", "cpu"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": sources},
            text=True, capture_output=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def write_teacher(folder: Path, out: Path, tiny_path: Path, dtype: str) -> str:
    file = folder / f"teacher_{dtype}.py"
    file.write_text(TEACHER.format(out=str(out), teacher=str(tiny_path), dtype=dtype))
    return f"{file}:teacher"


def assignments(overrides: dict[str, Any]) -> list[str]:
    return ["--set", *(f"{k}={json.dumps(v)}" for k, v in overrides.items())]


def alone(tiny_path: Path, out: Path, dtype: torch.dtype, data: str = "digits", **more: Any) -> Path:
    """The same run in this process."""
    teacher = fewstep.load(tiny_path).to(dtype)
    return fewstep.tune(teacher, data, out=out, overrides=OVERRIDES | more, device="cpu").path


def weights(run: Path) -> dict[str, Tensor]:
    path = latest_checkpoint(run)
    assert path.name == "images-000000192"
    names = ("student", "ema-0", "ema-1", "optimizer")
    return {f"{n}/{k}": v for n in names for k, v in read_tensors(path / f"{n}.safetensors").items()}


def assert_close(run: Path, other: Path, atol: float, start: dict[str, Tensor]) -> None:
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=10 * atol, msg=lambda m, n=name: f"{n}: {m}")
    moved = max(float((a[f"student/{k}"] - v).abs().max()) for k, v in start.items())
    assert moved > 1000 * atol
    logs = [
        [(r["images"], r["stage"], r["lr"], r["loss"], r["grad_norm"]) for r in read_history(p)] for p in (run, other)
    ]
    assert [r[:3] for r in logs[0]] == [r[:3] for r in logs[1]]
    assert len(logs[0]) == 3
    for first, second in zip(*logs, strict=True):
        assert first[3:] == pytest.approx(second[3:], rel=1e-5)


def test_two_processes_on_samples_that_each_makes_for_itself(torchrun: Launch, tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    teacher = write_teacher(tmp_path, out, tiny_path, "double")
    done = torchrun("tune", teacher, "--data", "teacher:3", "--out", out, *assignments(OVERRIDES))
    assert done.returncode == 0, done.stderr
    one = alone(tiny_path, tmp_path / "one", torch.float64, "teacher:3")
    assert_close(out, one, 1e-12, fewstep.load(tiny_path).double().backbone.state_dict())


def test_two_processes_with_micro_batches_in_double(torchrun: Launch, tiny_path: Path, tmp_path: Path) -> None:
    """Accumulation of 3 + 3 + 2 rows in each of two processes; and the second process writes nothing."""
    out = tmp_path / "two"
    teacher = write_teacher(tmp_path, out, tiny_path, "double")
    done = torchrun("tune", teacher, "--data", "digits", "--out", out, *assignments(OVERRIDES | {"micro_batch": 3}))
    assert done.returncode == 0, done.stderr
    one = alone(tiny_path, tmp_path / "one", torch.float64)
    assert weights(one)["student/stem.weight"].dtype == torch.float64
    assert_close(out, one, 1e-12, fewstep.load(tiny_path).double().backbone.state_dict())
    assert tree(out) == tree(one)


def tree(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*"))


def test_two_processes_preempted_and_resumed_in_single(torchrun: Launch, tiny_path: Path, tmp_path: Path) -> None:
    """SIGTERM reaches one process, both stop at the same image, in the middle of a log interval."""
    out = tmp_path / "two"
    teacher = write_teacher(tmp_path, out, tiny_path, "float")
    done = torchrun("tune", teacher, "--data", "digits", "--out", out, *assignments(OVERRIDES), script=STOPS)
    assert done.returncode != 0
    assert done.stderr.count("Stopped at image 96; the state is saved") == 2
    assert latest_checkpoint(out).name == "images-000000096"
    done = torchrun("resume", out, "--network", teacher)
    assert done.returncode == 0, done.stderr
    one = alone(tiny_path, tmp_path / "one", torch.float32)
    assert_close(out, one, 1e-5, fewstep.load(tiny_path).backbone.state_dict())


@pytest.mark.parametrize("kept", [{"adapter.kind": "lora", "adapter.rank": 2}, {"student.freeze": ["down", "stem"]}])
def test_two_processes_that_keep_a_base(
    kept: dict[str, Any], torchrun: Launch, tiny_path: Path, tmp_path: Path
) -> None:
    """An adapter, or frozen parts: gradients of what is trained alone are shared."""
    if "adapter.kind" in kept:
        pytest.importorskip("peft")
    settings = kept | {"optim": OVERRIDES["optim"] | {"lr": 0.03}}
    out = tmp_path / "two"
    teacher = write_teacher(tmp_path, out, tiny_path, "double")
    done = torchrun("tune", teacher, "--data", "digits", "--out", out, *assignments(OVERRIDES | settings))
    assert done.returncode == 0, done.stderr
    one = alone(tiny_path, tmp_path / "one", torch.float64, **settings)
    first = read_tensors(one / "checkpoints" / "images-000000000" / "student.safetensors")
    assert any("lora_A" in name for name in first) is ("adapter.kind" in kept)
    assert_close(out, one, 1e-12, first)


@pytest.mark.parametrize("micro_batch", [1, 5, 16, 64])
def test_micro_batches_equal_the_batch(micro_batch: int, tiny_path: Path, tmp_path: Path) -> None:
    one = alone(tiny_path, tmp_path / "one", torch.float64)
    parts = alone(tiny_path, tmp_path / "parts", torch.float64, micro_batch=micro_batch)
    assert_close(parts, one, 1e-12, fewstep.load(tiny_path).double().backbone.state_dict())


def test_a_batch_that_does_not_divide(torchrun: Launch, tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    done = torchrun("tune", tiny_path, "--data", "digits", "--out", out, "--batch-size", "15")
    assert done.returncode != 0
    assert (
        "The batch does not divide by the number of processes. Got: batch_size=15. Wanted: a multiple of 2"
        in done.stderr
    )
    assert "exitcode  : 2" in done.stderr
    assert not out.exists()


def test_shares_cover_the_batch() -> None:
    cpu = torch.device("cpu")
    for size, batch in ((1, 7), (2, 16), (3, 12), (4, 4)):
        rows = [i for rank in range(size) for i in World(rank, size, cpu).share(batch)]
        assert rows == list(range(batch))
    with pytest.raises(ConfigError, match="a multiple of 3"):
        World(0, 3, cpu).share(16)
