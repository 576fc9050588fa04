"""Early commit on the command line: what it prints, what it refuses, and that it does save evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.cli import main
from fewstep.commit import commit_sample
from fewstep.runs import demo_teacher

Call = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def draw(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """``draw("--sampler", "ode", ...)`` from the shipped teacher: the JSON result and what was said."""

    def run(*options: object, n: int = 6) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        out = tmp_path / "x.npz"
        command = ["sample", demo_teacher(), "--out", out, "-n", n, "--device", "cpu", "--json", *options]
        code = main([*map(str, command)])
        said, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(said)
        with np.load(out) as file:
            found["images"] = file["images"]
        return found, " ".join(err.split())

    return run


def refused(capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> str:
    capsys.readouterr()
    code = main(["sample", str(demo_teacher()), "--out", str(out), "-n", "2", "--device", "cpu", *options])
    err = " ".join(capsys.readouterr().err.split())
    assert code == 2, err
    assert "Traceback" not in err
    assert not out.exists()
    return err


@pytest.mark.parametrize("rule", ["confidence", "extrapolation"])
def test_a_commit_saves_evaluations_and_says_how_many(draw: Call, rule: str) -> None:
    full, said = draw("--sampler", "ode", "--steps", 35)
    assert full["nfe"] == 35 and full["commit"] is None
    assert "35 evaluations each" in said
    found, said = draw("--sampler", "ode", "--commit", rule, "--tol", 0.05)
    early = found["commit"]
    assert (early["rule"], early["tol"], early["nfe_full"], early["committed"]) == (rule, 0.05, 35, 1.0)
    counts = {int(nfe): count for nfe, count in early["nfe_histogram"].items()}
    assert sum(counts.values()) == 6
    assert found["nfe"] == pytest.approx(sum(nfe * count for nfe, count in counts.items()) / 6)
    assert (early["nfe_min"], early["nfe_max"]) == (min(counts), max(counts))
    assert found["nfe"] < 33
    assert f"{found['nfe']:.1f} evaluations each on average ({min(counts)} to {max(counts)}; the full" in said
    difference = (found["images"].astype(float) - full["images"]) / 127.5
    assert 0 < float(np.sqrt((difference**2).mean())) < 0.05


def test_no_tolerance_writes_the_same_images(draw: Call) -> None:
    for steps in (35, 8):
        full, _ = draw("--sampler", "ode", "--steps", steps, n=3)
        found, _ = draw("--sampler", "ode", "--steps", steps, "--commit", "confidence", "--tol", 0, n=3)
        assert np.array_equal(found["images"], full["images"])
        assert found["nfe"] == steps
        assert found["commit"]["committed"] == 0


def test_multistep_is_deterministic_and_can_commit(draw: Call) -> None:
    full, said = draw("--sampler", "multistep", "--times", "80,10,2,0.8,0.4,0.2,0.1")
    assert (full["nfe"], full["commit"], full["sampler"]) == (7, None, "multistep")
    assert "7 evaluations each" in said
    fresh, _ = draw("--times", "80,10,2,0.8,0.4,0.2,0.1")
    assert not np.array_equal(fresh["images"], full["images"])
    options = ("--sampler", "multistep", "--times", "80,10,2,0.8,0.4,0.2,0.1", "--commit", "extrapolation")
    found, _ = draw(*options, "--tol", 0.3)
    assert found["nfe"] < 7
    assert found["commit"]["nfe_full"] == 7
    assert draw("--sampler", "multistep", "--commit", "extrapolation")[0]["commit"]["nfe_full"] == 8


def test_the_default_tolerance_is_the_librarys(draw: Call) -> None:
    from fewstep import load

    found, _ = draw("--sampler", "ode", "--commit", "extrapolation", n=4)
    want = commit_sample(load(demo_teacher(), device="cpu"), 4, rule="extrapolation")
    assert found["nfe"] == pytest.approx(float(want.nfe.double().mean()))
    assert found["commit"]["tol"] == 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--commit confidence", "fresh noise at every step"),
        ("--times 80,1 --commit extrapolation", "fresh noise at every step"),
        ("--sampler ode --tol 0.1", "--tol is the tolerance of --commit"),
        ("--sampler ode --commit confidence --tol nan", "Must be >= 0"),
        ("--sampler ode --commit confidence --tol -1", "Must be >= 0"),
        ("--sampler ode --commit delta", 'Invalid value "delta" for --commit'),
        ("--sampler multistep --commit confidence", "whose slope means something else"),
        ("--sampler multistep --guidance 2", "--guidance does not go with --sampler multistep"),
        ("--sampler ode --commit confidence --times 80,1", "--times does not go with --sampler ode"),
    ],
)
def test_what_does_not_go_together_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str, message: str
) -> None:
    assert message in refused(capsys, tmp_path / "x.npz", *options.split())


def test_the_help_names_the_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for word in ("no fresh noise", "posterior mean", "geometric decay", "perceived quality"):
        assert word in said, word
