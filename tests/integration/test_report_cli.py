"""``fewstep report``: the page from the directory alone, comparisons, damaged and older runs, a look in Chromium."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import load, sample
from fewstep.checkpoint.store import read_tensors
from fewstep.cli import main
from fewstep.data import decode, open_source
from fewstep.data.sources import ArraySource
from fewstep.errors import DataError
from fewstep.evaluation.features import open_features
from fewstep.evaluation.neighbours import MOST_THROUGH_A_NET, find_neighbours
from fewstep.evaluation.record import TEACHER, TUNED, read_record
from fewstep.training.finish import with_seed

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["images=128", "batch_size=32", "eval.samples=64", "eval.steps=[1,2]", "eval.teacher_nfe=[1,4]"]
SETTINGS += ["output.grid=9", "output.log_images=32", "output.sample_images=0", "emas=[{kind: constant, beta: 0.9}]"]
Report = Callable[..., dict[str, Any]]


def tuned(teacher: Path, out: Path, *settings: str) -> Path:
    arguments = ["tune", str(teacher), "--data", "digits", "--out", str(out), "-q", "--device", "cpu"]
    assert main([*arguments, "--set", *SETTINGS, *settings]) == 0
    return out


@pytest.fixture(scope="module")
def runs(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ in the learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    return tuned(tiny_path, folder / "slow", "optim.lr=1e-4"), tuned(tiny_path, folder / "fast", "optim.lr=1e-3")


@pytest.fixture
def run(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the first run, to be damaged."""
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """``fewstep report ... --json``: what it printed on stdout; it must succeed."""

    def call(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        code = main(["report", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return call


def undated(page: Path) -> str:
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page.read_text("utf-8"))


# --- one run ------------------------------------------------------------------------------------------


def test_a_run_keeps_the_samples_of_its_model_and_how_it_was_made(runs: tuple[Path, Path], tiny_path: Path) -> None:
    record = read_record(runs[0])
    assert [(p.model, p.nfe) for p in record.pictures] == [(TEACHER, 1), (TEACHER, 4), (TUNED, 1), (TUNED, 2)]
    assert torch.equal(record.pictures[3].images, decode(sample(load(runs[0]), 9, steps=2, seed=0)))
    assert record.facts["images_seen"] == 128
    assert record.facts["dataset"] == {"count": 1797, "shape": [1, 8, 8]}
    assert record.facts["parameters"] == sum(p.numel() for p in load(tiny_path).parameters())
    assert len(record.facts["teacher"]["sha256"]) == 64
    assert record.environment["hardware"].startswith("CPU ")
    assert record.missing == []
    kinds = {path.suffix for path in runs[0].rglob("*") if path.is_file() and path.name != "latest"}
    assert kinds == {".yaml", ".jsonl", ".json", ".safetensors", ".png", ".html"}


def test_the_page_is_a_function_of_the_directory_without_the_model(run: Path, report: Report) -> None:
    first = undated(run / "report.html")
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints")
    assert report(run) == {"report": str(run / "report.html"), "runs": [str(run)], "missing": []}
    assert undated(run / "report.html") == first
    again = report(run, "--out", run / "elsewhere.html")
    assert again["report"].endswith("elsewhere.html")
    assert undated(run / "elsewhere.html") == first


def test_the_page_says_what_when_where_and_how(runs: tuple[Path, Path], tiny_path: Path) -> None:
    text = (runs[0] / "report.html").read_text("utf-8")
    results = json.loads((runs[0] / "results.json").read_text())[TUNED]
    said = [str(tiny_path), "128 images", "ect(law lognormal", "seed 0", results["features"]["hash"][:16]]
    said += [
        results["reference"]["fingerprint"][:16],
        "1,797 samples",
        "64 per step count",
        "noise levels 1: 80; 2: 80",
    ]
    said += ["nearest of 1,797 training images", "(t - r)/t", "is not a progress measure", "batch_size: 32"]
    assert [words for words in said if words not in text] == []
    assert [m for m in results["rows"][0]["metrics"] if f"<h3>{m} <span>" not in text] == []
    assert re.search(r"Memorised-Pixels-64: .* with 1 evaluation, .* with 2 evaluations\.", text)
    name, (low, high) = next(iter(results["rows"][0]["intervals"].items()))
    assert high > low
    assert f"<h3>{name} " in text
    assert "± is half of a 95 % interval" in text
    assert text.count("training image ") >= 8 * 3
    assert (runs[0] / "report.html").stat().st_size < 5_000_000


def test_the_command_of_the_page_repeats_the_run_to_the_bit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(read_record(run).again)
    assert words[:2] == ["fewstep", "tune"]
    monkeypatch.chdir(run)
    assert main([*words[1:], "-q", "--device", "cpu"]) == 0
    ours, theirs = (read_tensors(folder / "model" / "model.safetensors") for folder in (run, run / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    metrics = [[row["metrics"] for row in read_record(f).results[TUNED]["rows"]] for f in (run, run / "again")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("fewstep tune t --data 'my data' --out run", "fewstep tune t --data 'my data' --out run --seed 5"),
        ("fewstep tune t --out run --seed 5", "fewstep tune t --out run --seed 5"),
        ("fewstep tune t --out run --seed=5", "fewstep tune t --out run --seed=5"),
        ("fewstep tune t --set seed=5 --out run", "fewstep tune t --set seed=5 --out run --seed 5"),
        ("fewstep resume run", ""),
        ("", ""),
    ],
)
def test_the_seed_stands_in_every_command(typed: str, shown: str) -> None:
    assert with_seed(typed, 5) == shown


def test_a_run_of_an_earlier_release_shows_what_there_is_and_says_what_is_not(run: Path, report: Report) -> None:
    (run / "report.json").unlink()
    (run / "samples" / "report.safetensors").unlink()
    old = json.loads((run / "results.json").read_text())
    for result in old.values():
        for row in result["rows"]:
            del row["intervals"]
    (run / "results.json").write_text(json.dumps(old))
    found = report(run)
    assert len(found["missing"]) == 1
    assert found["missing"][0].startswith("Samples, neighbours, environment and command were not kept")
    text = (run / "report.html").read_text("utf-8")
    assert found["missing"][0] in text
    assert text.count("<img") == 1, "the dial that was drawn at the end of the run"
    assert "<table" in text
    assert "±" not in text
    assert "<h2>Training" in text


def test_a_run_that_has_not_ended_is_not_marked_as_ended(
    run: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("report.html", "report.json", "results.json"):
        (run / name).unlink()
    assert main(["report", str(run)]) == 2
    assert f"fewstep resume {run}" in capsys.readouterr().err
    assert not (run / "report.html").exists()
    found = report(run, "--out", run.parent / "so-far.html")
    assert len(found["missing"]) == 2
    assert "<h2>Training" in (run.parent / "so-far.html").read_text("utf-8")
    assert not (run / "report.html").exists()


def test_the_dial_of_a_run_is_on_its_page(run: Path, report: Report) -> None:
    row = {"model": TUNED, "nfe": 2, "times": [80.0, 1.25], "samples_per_second": 50.0}
    row |= {"metrics": {"FD-Pixels-64": 3.25}, "intervals": {"FD-Pixels-64": [3.0, 3.5]}}
    dial = {"metric": "FD-Pixels-64", "conclusion": "Best: 2 evaluations.", "rows": [row, row | {"nfe": 4}]}
    (run / "model" / "dial.json").write_text(json.dumps(dial))
    before = (run / "report.html").read_text("utf-8")
    report(run)
    text = (run / "report.html").read_text("utf-8")
    assert "80, 1.25" in text
    assert "Best: 2 evaluations." in text
    assert '3.25 <span class="margin">± 0.25</span>' in text
    assert text.count("<svg") == before.count("<svg") + 1
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def damage(run: Path, name: str, text: str) -> Path:
    (run / name).write_text(text)
    return run


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda run: run / "nowhere", "does not exist"),
        (lambda run: run / "config.yaml", "is not a directory"),
        (lambda run: run / "samples", "is not a run directory: it has no config.yaml"),
        (lambda run: damage(run, "results.json", "{"), "damaged"),
        (lambda run: damage(run, "results.json", '{"tuned": [1]}'), "does not hold the results of a run"),
        (lambda run: damage(run, "results.json", "[]"), "does not hold the results of a run"),
        (lambda run: damage(run, "report.json", "[]"), "does not describe"),
        (lambda run: damage(run, "samples/report.safetensors", "x"), "damaged"),
        (
            lambda run: damage(
                run,
                "config.yaml",
                "a: [",
            ),
            "not readable as YAML",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(
    make: Callable[[Path], Path], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (run / "report.html").read_text("utf-8")
    assert main(["report", str(make(run))]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert len(err.splitlines()) == 1
    assert (run / "report.html").read_text("utf-8") == kept


# --- several runs -------------------------------------------------------------------------------------


def test_runs_are_compared_on_one_page(runs: tuple[Path, Path], tmp_path: Path, report: Report) -> None:
    out = tmp_path / "compare.html"
    found = report(*runs, "--out", out)
    assert found["runs"] == {"A": str(runs[0]), "B": str(runs[1])}
    assert found["differences"] == {"optim.lr": ["0.0001", "0.001"]}
    assert found["notes"] == []
    assert found["verdict"].startswith("One step: ")
    text = out.read_text("utf-8")
    assert ">teacher<" in text
    assert text.count("<img") == 2 + 2 * 2, "the common teacher once, both runs at both step counts"
    assert "optim.lr" in text
    assert out.stat().st_size < 5_000_000


def test_other_references_and_seeds_are_flagged(runs: tuple[Path, Path], run: Path, report: Report) -> None:
    results = json.loads((run / "results.json").read_text())
    for result in results.values():
        result["reference"]["fingerprint"] = "other"
        result["seed"] = 9
    (run / "results.json").write_text(json.dumps(results))
    found = report(runs[0], run, "--out", run.parent / "compare.html")
    assert found["verdict"].startswith("The numbers of these runs cannot be ranked")
    assert ["fingerprint" in found["notes"][0], "seeds (A 0, B 9)" in found["notes"][1]] == [True, True]


# --- nearest neighbours -------------------------------------------------------------------------------


def test_neighbours_equal_a_search_through_everything() -> None:
    source = open_source("digits")
    images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = find_neighbours(images, source)
    everything = source.read(np.arange(len(source))).flatten(1).double() / 127.5 - 1
    queries = images[:8].flatten(1).double() / 127.5 - 1
    distances = (queries[:, None] - everything[None]).square().sum(-1).sqrt()
    expected, order = distances.sort(dim=1, stable=True)
    assert torch.equal(found.index, order[:, :3])
    assert torch.allclose(found.distances.double(), expected[:, :3], rtol=1e-6)
    assert torch.equal(found.found[2, 1], source.read(np.array([int(order[2, 1])]))[0])
    nearest = everything[order[:, 0]]
    own = (nearest[:, None] - everything[None]).square().sum(-1).sqrt().sort(dim=1).values[:, 1]
    assert torch.allclose(found.apart.double(), own, rtol=1e-6)
    assert (found.net, found.searched) == ("Pixels", 1797)


def test_a_memorised_sample_is_at_distance_nought_of_its_original() -> None:
    source = open_source("digits")
    found = find_neighbours(source.read(np.array([600, 5, 1796])), source)
    assert found.index[:, 0].tolist() == [600, 5, 1796]
    assert found.distances[:, 0].tolist() == [0, 0, 0]
    assert found.ratios.tolist() == [0, 0, 0]


def test_equal_training_images_are_not_each_others_distance() -> None:
    images = torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone = find_neighbours(images[3:6], ArraySource("alone", images, None))
    twice = find_neighbours(images[3:6], ArraySource("twice", torch.cat([images, images[3:4]]), None))
    assert torch.equal(twice.apart, alone.apart)
    assert twice.ratios.tolist() == [0, 0, 0]


def test_distances_are_in_the_net_that_is_named_and_large_data_is_searched_by_pixels() -> None:
    source = open_source("digits")
    net = open_features("pca:4", reference=source.read(np.arange(200)))
    found = find_neighbours(source.read(np.arange(3)) // 2, source, net)
    rows, queries = net.extract(source.read(np.arange(1797))), net.extract(found.samples)
    expected = (queries[:, None].double() - rows[None].double()).square().sum(-1).sqrt().sort(dim=1).values[:, :3]
    assert found.net == "PCA4"
    assert torch.allclose(found.distances.double(), expected, rtol=1e-5)
    many = torch.zeros(MOST_THROUGH_A_NET + 1, 1, 8, 8, dtype=torch.uint8)
    assert find_neighbours(found.samples, ArraySource("many", many, None), net).net == "Pixels"


def test_samples_of_another_shape_and_tiny_data_have_no_neighbours() -> None:
    source = open_source("digits")
    with pytest.raises(DataError, match="no neighbours"):
        find_neighbours(torch.zeros(2, 1, 9, 9, dtype=torch.uint8), source)
    tiny = ArraySource("tiny", torch.zeros(3, 1, 8, 8, dtype=torch.uint8), None)
    with pytest.raises(DataError, match="more than 3"):
        find_neighbours(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), tiny)


# --- in a browser -------------------------------------------------------------------------------------

chromium = pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="there is no Chromium here"
)


def look(page: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_report.py"), str(page), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@chromium
def test_the_pages_stand_on_a_desk_and_on_a_phone_in_light_and_dark(
    runs: tuple[Path, Path], tmp_path: Path, report: Report
) -> None:
    report(*runs, "--out", tmp_path / "compare.html")
    for page in (runs[0] / "report.html", tmp_path / "compare.html"):
        done = look(page, tmp_path / "pictures")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(": good") == 4
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 8


@chromium
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<script>console.error('ouch')</script>", "console: error ['ouch']"),
        ("<script>missing()</script>", "exception"),
        ("<div style='width:400px'>wide</div>", "pixels wider than the window"),
        ("<p style='font-size:8px'>small</p>", "text of 8.0 pixels: 'small'"),
        ("<img src='nowhere.png' alt='a'>", "loads file://"),
        ("<img src='data:,'>", "no alternative text"),
        (
            "<svg viewBox='0 0 300 50' width='300'><text x='5' y='20'>one</text><text x='15' y='20'>two</text></svg>",
            "labels overlap: one / two",
        ),
    ],
)
def test_the_look_finds_what_a_reader_would_stumble_over(body: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    head = "<meta name=viewport content='width=device-width, initial-scale=1'><link rel=icon href='data:,'>"
    page.write_text(f"<!doctype html><html lang=en>{head}<title>t</title><body>{body}</body></html>")
    done = look(page, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stdout
