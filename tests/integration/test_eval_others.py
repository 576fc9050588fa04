"""``fewstep eval`` of what fewstep did not make: images and pipelines; options that would change nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.data import open_source, save_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 of the digits, with their labels."""
    source = open_source("digits")
    assert source.labels is not None
    path = tmp_path_factory.mktemp("images") / "made.npz"
    return save_images(path, source.read(np.arange(40)), source.labels[:40])


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A tiny pipeline as diffusers writes it; the test is skipped without diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: there are no pipelines")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    return tmp_path / "ddim"


def test_every_number_of_images_is_shown(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    assert main(["eval", str(images), "--data", "digits", "--out", str(out), "-n", "40", "--device", "cpu"]) == 0
    result, said = json.loads(out.read_text()), capsys.readouterr().err
    (row,) = result["rows"]
    assert (row["solver"], row["nfe"], row["samples_per_second"], result["samples"]) == ("files", None, None, 40)
    assert row["metrics"]["Memorised-Pixels-40"] == 1.0
    assert len(row["metrics"]) == 9
    assert all(f"{name}\u00a0" in said for name in row["metrics"])


def test_labels_that_the_reference_lacks_are_left_out(tmp_path: Path) -> None:
    pixels = open_source("digits").read(np.arange(40))
    path = save_images(tmp_path / "other.npz", pixels, np.arange(40) + 500)
    command = ["eval", str(path), "--data", "digits", "--out", str(tmp_path / "found.json"), "--device", "cpu"]
    assert main(command) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(row["metrics"]) == 8
    assert "ClassAgreement-Pixels-40" not in row["metrics"]
    assert main([*command, "--metrics", "class"]) == 2


REFUSED = {
    "--steps 1,2": "--steps does not go with images made elsewhere",
    "--sampler ode": "--sampler does not go with images made elsewhere. Got: --sampler ode. Leave --sampler out.",
    "--teacher x": "--teacher does not go with images made elsewhere",
    "--repeats 2": "--repeats does not go with images made elsewhere",
    "--network net.py:f": "--network does not go with images made elsewhere",
    "--weights student": "--weights does not go with images made elsewhere",
    "-n 5000": "Got: -n 5000, 40 images. Leave -n out",
    "-n 20": "Got: -n 20, 40 images. Leave -n out",
    "--teacher-nfe 8": "--teacher-nfe is about a teacher",
    "--out .": "The result is written to a file. Got: --out ., a directory",
    "--steps 0": "The number of sampling steps must be at least 1. Got: 0",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_change_nothing_are_refused(
    images: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(images), "--data", "digits", *options.split()]) == 2
    assert REFUSED[options] in " ".join(capsys.readouterr().err.split())


def test_a_teacher_and_its_solver_exclude_each_other(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(tiny_path), "--data", "digits", "--teacher", str(tiny_path), "--sampler", "ode"]
    assert main([*command, "--device", "cpu"]) == 2
    assert "Got: --sampler ode. Leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, False])
def test_a_hub_id_that_is_not_here_is_refused_at_once(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if installed:
        pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: the other case is tested")
    else:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["eval", "google/ddpm-cifar10-32", "--data", "tiles"]) == 2
    said = capsys.readouterr().err
    assert ("hf download google/ddpm-cifar10-32" if installed else "pip install 'fewstep[hf]'") in said
    assert said.count("\n") == 1


def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/typo", "nowhere/samples.zip", "./a/b", "typo"):
        assert main(["eval", name, "--data", "digits"]) == 2
        said = capsys.readouterr().err
        assert "hub" not in said
        assert name.removeprefix("./") in said


def test_a_diffusers_pipeline(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    command = ["eval", str(pipeline), "--data", "digits", "-n", "8", "--device", "cpu"]
    assert main([*command, "--steps", "1,3", "--repeats", "2", "--metrics", "fd", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(row["solver"], row["steps"], row["nfe"]) for row in result["rows"]] == [
        ("DDIMPipeline/DDIMScheduler", 1, 1),
        ("DDIMPipeline/DDIMScheduler", 3, 3),
    ]
    assert result["seeds"] == [0, 1]
    assert all(row["seeds"]["FD-Pixels-8"]["std"] > 0 for row in result["rows"])
    capsys.readouterr()
    assert main([*command, "--sampler", "ode"]) == 2
    assert "--sampler does not go with a diffusers pipeline" in capsys.readouterr().err
