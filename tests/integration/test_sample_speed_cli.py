"""`fewstep sample` and `fewstep eval` in another arithmetic, compiled, and with output that is written meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep.compiling
from fewstep import Denoiser, load, sample
from fewstep.cli import main
from fewstep.evaluation import samples as module
from fewstep.evaluation.samples import to_host

Said = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """A verb with --json: what it printed, parsed, and its stderr as "err"; it must succeed."""

    def call(*arguments: object) -> dict[str, Any]:
        assert main([str(argument) for argument in arguments] + ["--json", "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out) | {"err": err}

    return call


def read(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))])[:, None]
    with np.load(path) as file:
        return file["images"].transpose(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["x", "x.npz"])
def test_blocks_are_written_as_the_whole_was(tiny_path: Path, tmp_path: Path, said: Said, name: str) -> None:
    said("sample", tiny_path, "-n", 11, "--batch-size", 4, "--steps", 2, "--seed", 3, "--out", tmp_path / name)
    model = load(tiny_path)
    want = to_host(model, sample(model, 11, steps=2, seed=3, batch_size=4)).numpy()
    assert np.array_equal(read(tmp_path / name), want)
    assert len({picture.tobytes() for picture in want}) == 11


def test_an_arithmetic_is_taken_and_said(tiny_path: Path, tmp_path: Path, said: Said) -> None:
    found = said("sample", tiny_path, "-n", 16, "--precision", "bf16", "--out", tmp_path / "x.npz")
    model = load(tiny_path)
    want = to_host(model, sample(model, 16, precision="bf16")).numpy()
    assert np.array_equal(read(tmp_path / "x.npz"), want)
    assert (found["precision"], found["compile"]) == ("bf16", False)
    assert (sample(model, 16, precision="bf16") - sample(model, 16)).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "tf32"], "This device has no TF32"),
        (["--precision", "bf16", "--sampler", "multistep"], "--precision does not go with --sampler multistep"),
        (["--compile", "--commit", "extrapolation", "--sampler", "ode"], "--compile does not go with --commit"),
        (["--precision", "half"], "half"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["sample", str(tiny_path), "--out", str(tmp_path / "x.npz"), "--device", "cpu", *options]
    try:
        code: Any = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert message in " ".join((out + err).split())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_an_earlier_save_is_refused_before_any_sample(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    made: list[int] = []
    monkeypatch.setattr(module, "blocks_of", lambda *args, **kwargs: iter(made.append(1) or ()))  # type: ignore[func-returns-value]
    assert main(["sample", str(tiny_path), "-n", "4", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "holds 'mine.png' of an earlier save" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_samples_that_are_not_finite_are_not_written(
    tiny: Denoiser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fewstep import save_model

    broken = tiny.clone()
    next(broken.backbone.parameters()).data.fill_(torch.nan)
    save_model(broken, tmp_path / "model")
    arguments = ["sample", str(tmp_path / "model"), "-n", "6", "--batch-size", "2", "--device", "cpu"]
    for name in ("x", "x.npz", "x.png"):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 2
        assert "Some samples are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_a_compiler_one_line_says_so(
    tiny_path: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("g++ is not here")

    real = fewstep.compiling.compiled
    monkeypatch.setattr("fewstep.inference.compiled", lambda network: real(network, backend=broken))
    found = said("sample", tiny_path, "-n", 6, "--batch-size", 4, "--compile", "--out", tmp_path / "x.npz")
    assert found["err"].count("g++ is not here") == 1
    assert "CompileFallback" not in found["err"]
    said("sample", tiny_path, "-n", 6, "--batch-size", 4, "--out", tmp_path / "y.npz")
    assert np.array_equal(read(tmp_path / "x.npz"), read(tmp_path / "y.npz"))


def test_eval_in_another_arithmetic(tiny_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["eval", tiny_path, "--data", "digits", "--steps", 1, "-n", 24, "--replicates", 0, "--metrics", "fd"]
    plain, rough = said(*arguments)["rows"][0], said(*arguments, "--precision", "bf16")["rows"][0]
    assert rough["precision"] == "bf16"
    assert "precision" not in plain
    [name] = plain["metrics"]
    assert plain["metrics"][name] != rough["metrics"][name]
    assert rough["metrics"][name] == pytest.approx(plain["metrics"][name], rel=0.02)
    monkeypatch.setattr("fewstep.inference.compiled", lambda network: network)
    padded = said(*arguments, "--compile", "--batch-size", 16)["rows"][0]
    assert padded["metrics"][name] == pytest.approx(plain["metrics"][name], rel=1e-4)


def test_files_have_no_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 1), dtype=np.uint8))
    for option in (["--precision", "bf16"], ["--compile"]):
        assert main(["eval", str(tmp_path / "x.npz"), "--data", "digits", *option]) == 2
        assert f"{option[0]} does not go with images made elsewhere" in " ".join(capsys.readouterr().err.split())
