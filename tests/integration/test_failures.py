"""Divergence, a full disk, an occupied output: exit code 2, and what was saved before is intact."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import EDM, Denoiser
from fewstep.checkpoint import store
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.cli import main
from fewstep.data.sources import ArraySource
from fewstep.errors import ConfigError, NonFiniteError, StorageError

Arguments = Callable[..., list[Any]]


def run_cli(arguments: list[Any]) -> int:
    return main([str(a) for a in arguments])


def all_finite(run: Path) -> bool:
    """Whether every tensor in every file of a run is finite, and there are some."""
    files = list(run.rglob("*.safetensors"))
    assert files
    return all(bool(torch.isfinite(t).all()) for f in files for t in store.read_tensors(f).values())


def temporaries(run: Path) -> list[Path]:
    return [p for p in run.rglob("*") if p.name.startswith(".")]


# ------------------------------------------------------------------------------------- not finite
class Breaks(nn.Module):
    """A linear network whose output turns to NaN after ``good`` forward passes."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.layer, self.left = nn.Linear(2, 2), good

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.left -= self.training
        return self.layer(x) if self.left >= 0 else self.layer(x) * torch.nan


def points(bad_row: int | None = None) -> ArraySource:
    data = torch.randn(640, 2, generator=torch.Generator().manual_seed(0))
    if bad_row is not None:
        data[bad_row] = torch.nan
    return ArraySource("points", data, None)


def breaking(good: int) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser.from_module(Breaks(good), process=EDM(), prediction="x0", sample_shape=(2,))


def test_a_learning_rate_that_explodes(
    tmp_path: Path, tune_arguments: Arguments, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_cli(tune_arguments(run, settings | {"optim.lr": 1e30})) == 2
    err = capsys.readouterr().err
    assert "stopped being finite before image 64" in err
    assert "last good checkpoint is kept" in err
    assert "Traceback" not in err
    assert latest_checkpoint(run).name == "images-000000000"
    assert all_finite(run)
    assert not (run / "model").exists()
    fewstep.load(run)


@pytest.mark.parametrize("objective", ["ect", "diffusion"])
@pytest.mark.parametrize("guard", ["stop", "clamp", "zero"])
def test_a_network_that_breaks(guard: str, objective: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    """20 steps pass; at image 320 the checkpoint is good, at 336 the loss is NaN, at 360 the log finds it."""
    run, passes = tmp_path / "run", 20 if objective == "diffusion" else 40
    overrides = {k: v for k, v in settings.items() if not k.startswith(("objective", "data.flip"))}
    overrides |= {"optim.guard": guard}
    if objective == "ect":
        overrides |= {"objective.schedule.q": 8}  # r > 0 in all rows: two passes a step
    with pytest.raises(NonFiniteError, match="before image 368") as error:
        fewstep.tune(breaking(passes), points(), out=run, objective=objective, overrides=overrides, device="cpu")
    assert error.value.exit_code == 2
    assert latest_checkpoint(run).name == "images-000000320"
    assert all_finite(run)
    kept = fewstep.load(run, weights="student", network=breaking(0))
    assert torch.isfinite(kept.backbone.state_dict()["module.layer.weight"]).all()


def test_a_nan_in_the_data(tmp_path: Path, settings: dict[str, Any]) -> None:
    from fewstep.data.order import indices_at

    run, source = tmp_path / "run", points(int(indices_at(5, 330, 1, 640)[0]))
    overrides = {k: v for k, v in settings.items() if not k.startswith(("objective", "data.flip"))}
    with pytest.raises(NonFiniteError, match="before image 368"):
        fewstep.tune(breaking(10**6), source, out=run, overrides=overrides, device="cpu")
    assert latest_checkpoint(run).name == "images-000000320"
    assert all_finite(run)


def test_weights_that_overflow_while_the_loss_is_finite_are_not_saved(
    tiny: Denoiser, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """One step with a learning rate beyond float32: loss and gradient are finite, the weights are not."""
    overrides = settings | {"images": 16, "optim.lr": 1e39, "optim.schedule": "constant"}
    with pytest.raises(NonFiniteError, match="before image 16"):
        fewstep.tune(tiny, "digits", out=tmp_path / "run", overrides=overrides, device="cpu")
    assert latest_checkpoint(tmp_path / "run").name == "images-000000000"
    assert all_finite(tmp_path / "run")


# -------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("name", ["student", "ema-1", "optimizer"])
def test_no_space_while_saving(
    name: str,
    tmp_path: Path,
    tune_arguments: Arguments,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    run, save = tmp_path / "run", store.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        if "images-000000240" in str(path) and path.stem == name:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(tensors, path)

    monkeypatch.setattr(store, "save_file", full)
    assert run_cli(tune_arguments(run, settings)) == 2
    err = capsys.readouterr().err
    assert "The disk is full" in err
    assert "images-000000240" in err
    assert "fewstep resume" in err
    assert latest_checkpoint(run).name == "images-000000160"
    assert sorted(p.name for p in (run / "checkpoints").glob("images-*")) == ["images-000000080", "images-000000160"]
    assert temporaries(run) == []
    monkeypatch.undo()
    fewstep.load(run)
    fewstep.resume(run, device="cpu")
    same_bits(run, whole)


def test_a_refused_log_is_a_storage_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not there")
    with pytest.raises(StorageError, match="The disk is full"):
        store.append_text(Path("/dev/full"), "{}\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small file system needs root")
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path,
    tune_arguments: Arguments,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    whole: Path,
    same_bits: Callable[[Path, Path], None],
) -> None:
    run = small_disk / "run"
    assert run_cli(tune_arguments(run, settings | {"output.keep": 100})) == 2
    err = capsys.readouterr().err
    assert "The disk is full" in err
    assert "Traceback" not in err
    kept = sorted((run / "checkpoints").glob("images-*"))
    assert latest_checkpoint(run) == kept[-1]
    assert kept[-1].name >= "images-000000080"
    assert temporaries(run) == []
    assert all_finite(run)
    fewstep.load(run)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    fewstep.resume(run, device="cpu")
    same_bits(run, whole)


# ------------------------------------------------------------------------------- occupied outputs
def test_an_output_that_exists(
    tmp_path: Path, tune_arguments: Arguments, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    assert run_cli(tune_arguments(run, settings)) == 2
    err = capsys.readouterr().err
    assert f"'{run}' already exists and is not empty" in err
    assert "Choose another --out" in err
    assert "fewstep resume" not in err  # there is no run to continue
    assert [p.name for p in run.iterdir()] == ["mine.txt"]


def test_an_output_that_is_a_file(tiny: Denoiser, tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        fewstep.tune(tiny, "digits", out=tmp_path / "run", overrides=settings, device="cpu")
    assert (tmp_path / "run").read_text() == "mine"


def test_an_empty_output_is_welcome(tiny: Denoiser, tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "run").mkdir()
    done = fewstep.tune(tiny, "digits", out=tmp_path / "run", overrides=settings | {"images": 16}, device="cpu")
    assert (done.path / "model" / "model.safetensors").is_file()


def test_an_output_under_a_file(tiny: Denoiser, tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="could not be written"):
        fewstep.tune(tiny, "digits", out=tmp_path / "file" / "run", overrides=settings, device="cpu")
