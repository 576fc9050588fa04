"""The code that a user of Inception runs, offline: stand-in weights of the right shapes, torch-fidelity as referee.

torch-fidelity and torchvision live in a folder of their own (``make test`` fills .venv/fidelity; FEWSTEP_FIDELITY
names another one), because a torchvision that cannot be imported would break other packages of the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packages() -> Path:
    path = Path(os.environ.get("FEWSTEP_FIDELITY") or REPOSITORY / ".venv/fidelity").resolve()
    if not (path / "torch_fidelity").is_dir():
        pytest.skip(f"torch-fidelity is not in {path}: run `make test`, or set FEWSTEP_FIDELITY")
    return path


def python(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(REPOSITORY / "src"), str(packages)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("inception")
    done = python(packages, str(WORKER), str(folder))
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_fid_kid_and_inception_score_equal_torch_fidelity(run: tuple[Path, dict[str, Any]]) -> None:
    _, got = run
    theirs = got["theirs"]
    assert got["spread"] > 0.05 and theirs["frechet_inception_distance"] > 1  # the stand-in tells the sets apart
    assert theirs["inception_score_mean"] > 1.01
    assert got["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert got["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)  # float32
    assert got["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_stand_in_weights_never_bear_the_name_of_fid(run: tuple[Path, dict[str, Any]]) -> None:
    folder, got = run
    digest = hashlib.sha256((folder / "stand-in.pth").read_bytes()).hexdigest()
    assert got["net"][:4] == [f"Inception-{digest[:8]}", 2048, digest, False]
    assert got["net"][4].startswith("uint8, TF1 bilinear 299x299 without antialias, (x-128)/128")
    assert got["shapes"] == [[24, 2048], [24, 1008]]


def test_formats_grey_and_random_state(run: tuple[Path, dict[str, Any]]) -> None:
    _, got = run
    assert got["quiet"]
    assert got["safetensors"] <= 1e-5 * got["spread"]
    assert got["grey"] == 0


def test_weights_of_another_network_are_one_clear_sentence(run: tuple[Path, dict[str, Any]]) -> None:
    _, got = run
    assert "is not that of torch-fidelity's Inception" in got["refusals"]["classes"]
    assert "1 differences: size mismatch for fc.weight" in got["refusals"]["classes"]
    assert 'Missing key(s) in state_dict: "Conv2d_1a_3x3.conv.weight"' in got["refusals"]["layer"]
    assert all("Run `curl -L --create-dirs" in message for message in got["refusals"].values())


def test_a_torchvision_that_does_not_load_is_one_clear_sentence(packages: Path, tmp_path: Path) -> None:
    """On a torch with CUDA the registry's torchvision loads; then there is nothing to see."""
    program = (
        "import sys, torch\nfrom fewstep.errors import ConfigError\n"
        "try:\n    import torchvision\nexcept RuntimeError: pass\nelse: sys.exit(3)\n"
        "from fewstep.evaluation.features import open_features\n"
        "torch.save({}, sys.argv[1])\n"
        "try: open_features('inception:' + sys.argv[1])\nexcept ConfigError as error: print(error)\n"
    )
    done = python(packages, "-c", program, str(tmp_path / "weights.pth"))
    if done.returncode == 3:
        pytest.skip("torchvision loads beside this torch")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("torch-fidelity is installed, but cannot be imported with torch")
    assert "RuntimeError: operator torchvision::nms does not exist" in done.stdout
    assert "https://pytorch.org/get-started" in done.stdout and "inception-2015-12-05.pt" in done.stdout
