"""Guidance from the command line: tuned for a range, told when sampled, refused where it means nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.cli import main

QUICK = ["--device", "cpu", "--images", "256", "--batch-size", "32"]
NETWORK = ["eval.samples=0", "output.sample_images=0", "emas=[{kind: constant, beta: 0.5}]", "optim.name=adam",
           "optim.lr=1e-2"]  # fmt: skip
SMALL = ["model.conditional=true", "model.kwargs={channels: 8, multipliers: [1], blocks: 1}"]
Fewstep = Callable[..., dict[str, Any]]


@pytest.fixture
def fewstep(capsys: pytest.CaptureFixture[str]) -> Fewstep:
    """``fewstep("sample", ..., code=0)``: the result, with what was said under "stderr"."""

    def call(*arguments: str | Path | float, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        found = main([*map(str, arguments), *(["--json"] if code == 0 else [])])
        out, err = capsys.readouterr()
        said = " ".join(err.split())
        assert found == code, said
        return (json.loads(out) if code == 0 else {}) | {"stderr": said}

    return call


def trained(root: Path, name: str, *settings: str) -> Path:
    arguments = ["pretrain", "--data", "digits", "--out", str(root / name), *QUICK, "--quiet"]
    assert main([*arguments, "--set", *NETWORK, *SMALL, *settings]) == 0
    return root / name


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two conditional teachers, one of which trained without labels, too."""
    root = tmp_path_factory.mktemp("teachers")
    return {"dropped": trained(root, "dropped", "data.label_drop=0.5"), "always": trained(root, "always")}


@pytest.fixture(scope="module")
def student(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of guided ECT over [1, 3]."""
    out = tmp_path_factory.mktemp("student") / "run"
    guided = ["objective.bridge.kind=guided", "objective.bridge.guidance=1", "objective.bridge.guidance_max=3"]
    arguments = ["tune", str(teachers["dropped"]), "--data", "digits", "--out", str(out), "--objective", "ect", *QUICK]
    assert main([*arguments, "--quiet", "--set", *NETWORK, *guided]) == 0
    return out


def images(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return np.asarray(file["images"])


def test_a_guided_student_is_told(student: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    found = {}
    for w in (1, 3):
        result = fewstep("sample", student, "--out", tmp_path / f"{w}.npz", "-n", 5, "--steps", 2, "--guidance", w)
        assert (result["nfe"], result["guidance"]) == (2, w)
        assert "heuristic" not in result["stderr"] and "label_drop" not in result["stderr"]
        found[w] = images(tmp_path / f"{w}.npz")
    assert not np.array_equal(found[1], found[3])
    fewstep("sample", student, "--out", tmp_path / "none.npz", "-n", 5, "--steps", 2)
    assert np.array_equal(images(tmp_path / "none.npz"), found[1])
    far = fewstep("sample", student, "--out", tmp_path / "far.npz", "--guidance", 4, code=2)
    assert "not tuned for that strength of guidance. Got: 4.0. Wanted: 1 to 3" in far["stderr"]


def test_other_models_are_evaluated_twice(teachers: dict[str, Path], tmp_path: Path, fewstep: Fewstep) -> None:
    drop, always = teachers["dropped"], teachers["always"]
    few = fewstep("sample", drop, "--out", tmp_path / "a.npz", "-n", 5, "--steps", 2, "--guidance", 2)
    assert few["nfe"] == 4
    assert "a heuristic: the guided flow's end point is not linear in the weight" in few["stderr"]
    ode = fewstep(
        "sample", drop, "--out", tmp_path / "b.npz", "-n", 5, "--steps", 3, "--guidance", 2, "--sampler", "ode"
    )
    plain = fewstep("sample", drop, "--out", tmp_path / "c.npz", "-n", 5, "--steps", 3, "--sampler", "ode")
    assert (ode["nfe"], plain["nfe"]) == (6, 3)
    assert "heuristic" not in ode["stderr"] and "label_drop" not in ode["stderr"]
    assert not np.array_equal(images(tmp_path / "b.npz"), images(tmp_path / "c.npz"))
    one = fewstep(
        "sample", drop, "--out", tmp_path / "d.npz", "-n", 5, "--steps", 3, "--guidance", 1, "--sampler", "ode"
    )
    assert one["nfe"] == 3 and np.array_equal(images(tmp_path / "d.npz"), images(tmp_path / "c.npz"))
    blind = fewstep("sample", always, "--out", tmp_path / "e.npz", "-n", 5, "--guidance", 2)
    assert "never trained without a label (data.label_drop=0)" in blind["stderr"]


@pytest.mark.parametrize("setting", ["objective.bridge.guidance=2", "objective.bridge.guidance_max=3"])
def test_a_teacher_that_always_saw_its_labels_cannot_guide(
    teachers: dict[str, Path], tmp_path: Path, fewstep: Fewstep, setting: str
) -> None:
    where = ("tune", teachers["always"], "--data", "digits", "--out", tmp_path / "run", "--objective", "ecd", *QUICK)
    refused = fewstep(*where, "--set", *NETWORK, setting, code=2)
    assert "never trained without one" in refused["stderr"] and "data.label_drop=0.1" in refused["stderr"]
    assert not (tmp_path / "run").exists()


def test_ranges_that_are_none(teachers: dict[str, Path], tmp_path: Path, fewstep: Fewstep) -> None:
    where = ("tune", teachers["dropped"], "--data", "digits", "--out", tmp_path / "run", "--objective", "ecd", *QUICK)
    refused = fewstep(*where, "--set", "objective.bridge.guidance=3", "objective.bridge.guidance_max=2", code=2)
    assert "strengths of guidance are no range" in refused["stderr"]


def test_eval_measures_what_sampling_makes(
    student: Path, teachers: dict[str, Path], tmp_path: Path, fewstep: Fewstep
) -> None:
    how = ("--data", "digits", "-n", 40, "--steps", 2, "--metrics", "fd", "--replicates", 0)
    rows = {
        w: fewstep("eval", student, *how, *([] if w is None else ["--guidance", w]))["rows"][0] for w in (None, 1, 3)
    }
    assert [row["nfe"] for row in rows.values()] == [2, 2, 2]
    assert (rows[3]["guidance"], "guidance" in rows[None]) == (3, False)
    value = {w: next(iter(row["metrics"].values())) for w, row in rows.items()}
    assert value[None] == value[1] != value[3]
    twice = fewstep("eval", teachers["dropped"], *how, "--guidance", 3, "--sampler", "ode")["rows"][0]
    assert (twice["steps"], twice["nfe"]) == (2, 4)
    refused = fewstep("eval", student, *how, "--guidance", 3, "--teacher", teachers["dropped"], code=2)
    assert "--guidance does not go with --teacher" in refused["stderr"]
    far = fewstep("eval", student, *how, "--guidance", 0.5, code=2)
    assert "not tuned for that strength of guidance. Got: 0.5. Wanted: 1 to 3" in far["stderr"]
