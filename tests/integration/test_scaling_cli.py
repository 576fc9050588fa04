"""``fewstep scaling`` on run directories and files, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep import EDM, Denoiser, Parametrization, save_model
from fewstep.backbones import build
from fewstep.checkpoint.store import write_json, write_text
from fewstep.cli import main
from fewstep.config import dump_yaml
from fewstep.evaluation.compute import training_flops
from fewstep.objectives import ECT
from fewstep.times import Stages
from fewstep.training.config import RunConfig

METRIC = "FD-Pixels-1k"
OBJECTIVE = ECT(schedule=Stages(q=256.0, images=1000, last=0))
Edit = Callable[[dict[str, Any]], None]


def network(width: int) -> Denoiser:
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": width, "multipliers": [1], "blocks": 1}}
    return Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec)


def table(images: int) -> dict[str, Any]:
    """What a run measures: FD = 500 images^-0.5, and at two steps half of it."""
    value = 500 * images**-0.5
    rows = [
        {
            "solver": "consistency", "steps": steps, "nfe": steps, "times": [80.0], "samples_per_second": 1.0,
            "metrics": {METRIC: value / steps, "Recall-Pixels-1k": 0.5},
            "intervals": {METRIC: [0.9 * value / steps, 1.1 * value / steps]},
        }
        for steps in (1, 2)
    ]  # fmt: skip
    return {
        "features": {"name": "Pixels", "hash": "abc"},
        "reference": {"source": "digits", "count": 1797, "fingerprint": "f" * 64},
        "samples": 1000, "seed": 0, "rows": rows,
    }  # fmt: skip


def write_run(path: Path, images: int, width: int = 8) -> Path:
    config = RunConfig(images=images, batch_size=100, objective=OBJECTIVE)
    write_text(path / "config.yaml", dump_yaml(config))
    save_model(network(width), path / "model", {"images": images})
    write_json(path / "results.json", {"teacher (diffusion)": table(7), "tuned": table(images)})
    log = [{"images": images // 2, "seconds": images / 40}, {"images": images, "seconds": images / 20}]
    write_text(path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Four runs whose number falls as images^-0.5."""
    return [write_run(tmp_path / f"run-{n}", n) for n in (1000, 4000, 16000, 64000)]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        code = main(["scaling", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What it says when it exits with 2."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main(["scaling", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert "Traceback" not in err and out == ""
        return " ".join(err.split())

    return run


def change(run: Path, edit: Edit) -> None:
    results = json.loads((run / "results.json").read_text())
    edit(results["tuned"])
    write_json(run / "results.json", results)


def test_runs_give_the_law_and_a_picture(
    runs: list[Path], ask: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scaling.png"
    found = ask(*runs, "--out", out)
    assert found["metric"] == METRIC
    assert found["law"]["alpha"] == pytest.approx(-0.5, abs=1e-9)
    assert found["law"]["leave_one_out"] == pytest.approx([-0.5, -0.5], abs=1e-9)
    assert found["offset"] is None and found["offset_identifiable"] is None
    assert [p["name"] for p in found["points"]] == ["run-1000", "run-4000", "run-16000", "run-64000"]
    assert found["points"][0]["compute"] == pytest.approx(training_flops(network(8).to("meta"), OBJECTIVE, 1000))
    assert found["points"][0]["interval"] == pytest.approx([0.9 * 500 / 1000**0.5, 1.1 * 500 / 1000**0.5])
    image = np.asarray(Image.open(out).convert("RGB")).astype(int)
    assert image.shape[0] > 600 and image.shape[1] > 900
    orange = (abs(image - [194, 65, 12]).sum(-1) < 40).sum()
    blue = (abs(image - [37, 99, 235]).sum(-1) < 40).sum()
    assert orange > 200 and blue > 500, "points with their intervals, and the line"
    main(["scaling", *map(str, runs)])
    said = " ".join(capsys.readouterr().err.split())
    assert "alpha -0.5, 95 % interval" in said and "2 degrees of freedom" in said


def test_what_c_is_can_be_chosen(runs: list[Path], ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    images = ask(*runs, "--against", "images", "--steps", 2)
    assert images["law"]["K"] == pytest.approx(250, rel=1e-9)
    seconds = ask(*runs, "--against", "seconds")
    assert [p["compute"] for p in seconds["points"]] == [50, 200, 800, 3200]
    wide = [write_run(tmp_path / f"wide-{w}", 1000 * w, w) for w in (8, 16, 24, 32)]
    parameters = ask(*wide, "--against", "parameters")
    want = [sum(p.numel() for p in network(w).parameters()) for w in (8, 16, 24, 32)]
    assert [p["compute"] for p in parameters["points"]] == want
    assert ask(*runs, "--metric", "recall-pixels-1k")["law"]["alpha"] == pytest.approx(0, abs=1e-9)


def test_the_offset_is_fitted_beside_the_law_never_instead(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    rows = [f"{10.0**i},{0.5 + 20 * 10 ** (-0.5 * i)},p{i}" for i in range(7)]
    path = tmp_path / "points.csv"
    path.write_text("\ufeffcompute,value,name\n" + "\n".join(rows) + "\n")
    found = ask("--points", path, "--offset", "--out", tmp_path / "p.png")
    assert found["offset"]["y_inf"] == pytest.approx(0.5, rel=1e-6)
    assert found["offset"]["alpha"] == pytest.approx(-0.5, abs=1e-6)
    assert found["offset_identifiable"] is True
    plain = ask("--points", path)
    assert found["law"] == plain["law"] and plain["law"]["alpha"] > -0.4
    assert (tmp_path / "p.png").is_file()


def test_points_from_json_with_intervals(ask: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    points = [{"compute": 2.0**i, "value": 3 * 2.0**-i, "low": 2.9 * 2.0**-i, "high": 3.2 * 2.0**-i} for i in range(4)]
    path.write_text(json.dumps(points))
    found = ask("--points", path, "--offset")
    assert found["law"]["alpha"] == pytest.approx(-1, abs=1e-10) and found["law"]["K"] == pytest.approx(3)
    assert found["points"][1]["interval"] == pytest.approx([1.45, 1.6]) and found["points"][1]["name"] == "2"
    assert found["offset_identifiable"] is False and "too few" in found["notes"][-1]


def test_numbers_that_were_measured_otherwise_are_refused(runs: list[Path], refused: Callable[..., str]) -> None:
    change(runs[1], lambda t: t["features"].update(hash="xyz"))
    said = refused(*runs)
    assert "the feature hash differs" in said
    assert "run-1000, run-16000, run-64000: abc; run-4000: xyz" in said
    change(runs[1], lambda t: t["features"].update(hash="abc"))
    change(runs[2], lambda t: t["reference"].update(fingerprint="e" * 64))
    assert "the reference differs" in refused(*runs)
    change(runs[2], lambda t: t["reference"].update(fingerprint="f" * 64, split="test"))
    assert "the reference differs" in refused(*runs)
    change(runs[2], lambda t: t["reference"].pop("split"))
    change(runs[0], lambda t: t["rows"][0].update(solver="ode"))
    assert "the solver differs" in refused(*runs)
    change(runs[0], lambda t: t["rows"][0].update(solver="consistency", metrics={"FD-Pixels-5k": 3.0}))
    assert "the metric differs" in refused(*runs) and "run-1000: FD-Pixels-5k" in refused(*runs)
    change(runs[0], lambda t: t["rows"][0].update(metrics={METRIC: 3.0}))
    change(runs[0], lambda t: t.update(samples=5000))
    assert "the sample count differs" in refused(*runs)


def test_too_few_runs_and_unusable_values(runs: list[Path], refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "scaling.png"
    assert "3 points of 3 sizes" in refused(*runs[:3], "--out", out)
    assert "A run is given twice" in refused(*runs, runs[0])
    change(runs[3], lambda t: t["rows"][0]["metrics"].update({METRIC: -0.2}))
    assert "run-64000" in refused(*runs, "--out", out)
    assert not out.exists()


def test_runs_without_results_say_what_to_run(runs: list[Path], refused: Callable[..., str], tmp_path: Path) -> None:
    (runs[0] / "results.json").unlink()
    assert f"Run: fewstep resume {runs[0]}" in refused(*runs)
    unmeasured = RunConfig(images=1000, objective=OBJECTIVE)
    unmeasured = replace(unmeasured, eval=replace(unmeasured.eval, samples=0))
    write_text(runs[0] / "config.yaml", dump_yaml(unmeasured))
    assert f"fewstep eval {runs[0]} --data digits" in refused(*runs)
    (runs[0] / "results.json").write_text("{")
    assert "not readable" in refused(*runs)
    write_json(runs[0] / "results.json", {"tuned": {"rows": [{"steps": 1}]}})
    assert "is not the table of a run" in refused(*runs)
    assert "has no config.yaml" in refused(tmp_path / "nothing", *runs[1:])


def test_a_metric_a_step_count_or_a_network_that_is_not_there(runs: list[Path], refused: Callable[..., str]) -> None:
    assert f"Did you mean '{METRIC}'" in refused(*runs, "--metric", "FD-Pixel-1k")
    assert "--steps 1, 2" in refused(*runs, "--steps", 4)
    (runs[1] / "metrics.jsonl").unlink()
    assert "Use --against images" in refused(*runs, "--against", "seconds")
    config = json.loads((runs[1] / "model" / "config.json").read_text())
    write_json(runs[1] / "model" / "config.json", config | {"backbone": None})
    assert "your own" in refused(*runs)
    (runs[2] / "model" / "config.json").unlink()
    assert "config.json" in refused(*runs, "--against", "images")


def test_files_and_options_that_cannot_be_used(refused: Callable[..., str], runs: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    for text, want in (("", "no points"), ("a,b\n1,2\n", "Point 1"), ("compute,value\n1,2\n2,x\n", "Point 2")):
        path.write_text(text)
        assert want in refused("--points", path)
    (tmp_path / "bad.json").write_text("{")
    assert "cannot be read" in refused("--points", tmp_path / "bad.json")
    assert "cannot be read" in refused("--points", tmp_path / "absent.csv")
    assert "four or more runs, or --points" in refused()
    assert "four or more runs, or --points" in refused(*runs, "--points", path)
    assert "scaling.png" in refused(*runs, "--out", tmp_path / "x.pdf")


@pytest.mark.slow
def test_real_runs(tiny_path: Path, tmp_path: Path, ask: Callable[..., dict[str, Any]]) -> None:
    """Four short tuned runs, end to end."""
    runs = [tmp_path / f"run-{n}" for n in (32, 64, 128, 256)]
    for run in runs:
        small = ["eval.samples=16", "eval.steps=[1]", "eval.teacher_nfe=[2]", "output.grid=4", "output.log_images=32"]
        images = ["--images", run.name.split("-")[1], "--batch-size", "32", "--device", "cpu"]
        assert (
            main(["tune", str(tiny_path), "--data", "digits", "--out", str(run), "-q", *images, "--set", *small]) == 0
        )
    found = ask(*runs, "--out", tmp_path / "scaling.png")
    first = found["points"][0]["compute"]
    sizes = [p["compute"] / first for p in found["points"]]
    assert sizes == pytest.approx([1, 2, 4, 8], rel=1e-6), "recipe 'fast' has one stage, so compute goes as images"
    assert found["metric"].startswith("FD-Pixels") and math.isfinite(found["law"]["alpha"])
    assert found["law"]["alpha_interval"][0] < found["law"]["alpha"] < found["law"]["alpha_interval"][1]
