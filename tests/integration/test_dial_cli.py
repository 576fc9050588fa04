"""``fewstep dial`` on a small model: what it writes, what it refuses, and what an interruption leaves."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep import load
from fewstep.cli import main
from fewstep.cli.dial import parse_steps
from fewstep.errors import ConfigError
from fewstep.evaluation.dial import DEFAULT, TEACHER, TUNED
from fewstep.evaluation.times_search import Chain
from fewstep.sampling import few_step_times

QUICK = shlex.split("--data digits --steps 2,4 -n 64 --budget 12 --device cpu --features pca:8 --batch-size 50")
MORE = ["200" if word == "64" else word for word in QUICK]
"""Enough samples that other times than the default ones are clearly better for random weights."""
Dial = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tiny_path: Path, tmp_path: Path) -> Path:
    """What looks like a finished run."""
    shutil.copytree(tiny_path, tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoints").mkdir()
    return tmp_path / "run"


@pytest.fixture
def dial(capsys: pytest.CaptureFixture[str]) -> Dial:
    """``dial(model, ...)`` with --json: what it printed, parsed."""

    def call(*arguments: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        found = main(["dial", *map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert found == code, err
        return {"stderr": err} | (json.loads(out) if out else {})

    return call


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_times_are_found_written_and_used(run: Path, tiny_path: Path, dial: Dial, tmp_path: Path) -> None:
    before = files(run)
    result = dial(run, *MORE, "--teacher", tiny_path)
    kept = {n: e["times"] for n, e in result["steps"].items() if e["kept"] == "found"}
    assert "4" in kept, "random weights: other times must help"
    assert result["written"] == str(run / "model" / "config.json")
    after = files(run)
    assert set(after) - set(before) == {"model/dial.json", "model/dial.png"}
    assert {name for name in before if after[name] != before[name]} == {"model/config.json"}
    config, old = json.loads(after["model/config.json"]), json.loads(before["model/config.json"])
    assert config.pop("sampler_times") == kept
    assert old.pop("sampler_times") == {}
    assert config == old
    assert few_step_times(load(run), 4) == kept["4"]
    assert main(["sample", str(run), "--steps", "4", "-n", "3", "--out", str(tmp_path / "a.npz"), "-q"]) == 0
    spelled = ",".join(map(repr, kept["4"]))
    assert main(["sample", str(run), "--times", spelled, "-n", "3", "--out", str(tmp_path / "b.npz"), "-q"]) == 0
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert f"Best: {result['best']} evaluation" in result["stderr"]
    assert re.search(r"Wrote the times for (2 and )?4 steps", result["stderr"])


def test_dial_json_says_where_the_times_come_from(run: Path, tiny_path: Path, dial: Dial) -> None:
    result = dial(run, *QUICK, "--teacher", tiny_path, "--seed", 3)
    written = json.loads((run / "model" / "dial.json").read_text())
    assert written == {k: v for k, v in result.items() if k != "stderr"}
    assert written["features"]["name"] == "PCA8"
    assert len(written["features"]["hash"]) == len(written["weights"]) == 64
    assert written["reference"]["source"] == "digits"
    assert written["settings"] == {
        "steps": [2, 4],
        "samples": 64,
        "seed": 3,
        "budget": 12,
        "search_seed": 7_000_006,
        "held_out_seed": 7_000_007,
    }
    assert written["metric"] == "FD-PCA8-64"
    assert written["environment"]["date"].endswith("UTC")
    assert {(r["model"], r["nfe"]) for r in written["rows"]} >= {
        (TUNED, 1), (TUNED, 2), (TUNED, 4), (TEACHER, 1), (TEACHER, 2), (TEACHER, 4), (TEACHER, 35)}  # fmt: skip
    assert {r["seed"] for r in written["rows"]} == {7_000_007}
    four = written["steps"]["4"]
    assert 0 < four["evaluations"] <= 12
    assert four["optimism"] == four["found"]["held_out"][0] - four["search"]["found"]
    assert four["search"]["found"] <= four["search"]["default"]
    kept = {n for n, e in written["steps"].items() if e["kept"] == "found"}
    assert {r["nfe"] for r in written["rows"] if r["model"] == DEFAULT} == set(map(int, kept))


def test_a_second_dial_keeps_what_the_first_found(run: Path, dial: Dial) -> None:
    first = dial(run, *MORE)
    assert first["steps"]["4"]["kept"] == "found"
    config = (run / "model" / "config.json").read_bytes()
    second = dial(run, *MORE)
    assert second["steps"]["4"]["kept"] in ("own", "found")
    if second["written"] is None:
        assert (run / "model" / "config.json").read_bytes() == config
    assert second["steps"]["4"]["search"]["found"] <= first["steps"]["4"]["search"]["found"]


def test_dry_writes_nothing(run: Path, dial: Dial) -> None:
    before = files(run)
    result = dial(run, *QUICK, "--dry")
    assert files(run) == before
    assert result["written"] is None
    assert set(result["steps"]) == {"2", "4"}
    assert "Nothing was written" in result["stderr"]


def test_out_puts_the_record_elsewhere(run: Path, dial: Dial, tmp_path: Path) -> None:
    dial(run, *QUICK, "--out", tmp_path / "there")
    assert {p.name for p in (tmp_path / "there").iterdir()} == {"dial.json", "dial.png"}
    assert not (run / "model" / "dial.json").exists()
    assert set(load(run).sampler_times)


def test_an_interrupted_search_goes_on(run: Path, dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dial(run, *QUICK, "--dry")
    before, ran = files(run), Chain.run
    calls = []

    def interrupted(chain: Chain, times: Any) -> Any:
        calls.append(len(times))
        if len(times) == 4 and calls.count(4) == 2:
            raise KeyboardInterrupt
        return ran(chain, times)

    monkeypatch.setattr(Chain, "run", interrupted)
    said = dial(run, *QUICK, code=130)["stderr"]
    assert "What was found is kept in" in said and "The same command goes on" in said
    left = files(run)
    assert set(left) - set(before) == {"model/dial.partial.json"}
    assert {name: left[name] for name in before} == before
    assert set(json.loads(left["model/dial.partial.json"])["found"]) == {"2"}
    calls.clear()

    def counted(chain: Chain, times: Any) -> Any:
        calls.append(len(times))
        return ran(chain, times)

    monkeypatch.setattr(Chain, "run", counted)
    result = dial(run, *QUICK)
    assert set(calls) == {4}
    assert not (run / "model" / "dial.partial.json").exists()
    assert result["steps"] == whole["steps"]


def test_another_search_does_not_take_over_what_was_found(
    run: Path, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Chain.run
    stop = True

    def maybe(chain: Chain, times: Any) -> Any:
        if len(times) == 4 and stop:
            raise KeyboardInterrupt
        return ran(chain, times)

    monkeypatch.setattr(Chain, "run", maybe)
    dial(run, *QUICK, code=130)
    stop = False
    ran_for = []
    monkeypatch.setattr(Chain, "run", lambda chain, times: (ran_for.append(len(times)), ran(chain, times))[1])
    assert dial(run, *QUICK, "--seed", 7)["settings"]["seed"] == 7
    assert set(ran_for) == {2, 4}, "seed 0's two-step times are not taken over"


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--steps", "1-4"), "no times to find"),
        (("--steps", "2-9"), "rising, from 2 to 8"),
        (("--steps", "a-b"), "not a range"),
        (("--steps", "8-2"), "not a range"),
        (("--steps", "two"), "not a list of numbers"),
        (("-n", "5"), "too few samples"),
        (("--budget", "3"), "does not pay for one candidate"),
        (("--data", "tiles"), "do not have the shape"),
        (("--data", "nowhere.zip"), "nowhere.zip"),
        (("--features", "pixel"), "Did you mean 'pixels'"),
        (("--teacher", "nobody"), "'nobody' does not exist"),
    ],
)
def test_what_cannot_be_dialled(run: Path, dial: Dial, arguments: tuple[str, str], text: str) -> None:
    before = files(run)
    given = {"--data": "digits", "-n": "16"} | dict([arguments])
    said = dial(run, "--device", "cpu", *itertools.chain(*given.items()), code=2)["stderr"]
    assert re.search(text, said), said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert files(run) == before


def test_a_run_in_training_is_left_alone(tmp_path: Path, dial: Dial) -> None:
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    said = dial(tmp_path / "young", *QUICK, code=2)["stderr"]
    assert "no finished model" in said and "fewstep resume" in said
    assert files(tmp_path / "young") == {}


def test_a_model_without_a_directory(tiny_path: Path, tmp_path: Path, dial: Dial) -> None:
    own = tmp_path / "own.py"
    own.write_text(f"import fewstep\n\ndef make():\n    return fewstep.load({str(tiny_path)!r})\n")
    assert "Add --out DIRECTORY" in dial(f"{own}:make", *QUICK, code=2)["stderr"]
    before = files(tiny_path)
    result = dial(f"{own}:make", *QUICK, "--out", tmp_path / "there")
    assert result["written"] is None
    assert "sample --times" in result["stderr"]
    assert (tmp_path / "there" / "dial.json").is_file()
    assert files(tiny_path) == before


def test_a_directory_that_cannot_be_written_is_said_before_the_work(
    run: Path, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run)

    def refuse(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    def worked(*_: object) -> None:
        raise AssertionError("the search began")

    monkeypatch.setattr(Chain, "run", worked)
    monkeypatch.setattr("fewstep.checkpoint.store.os.replace", refuse)
    monkeypatch.setenv("FEWSTEP_CACHE", "/proc/none")
    said = dial(run, *QUICK, code=2)["stderr"]
    assert "could not be written" in said and "Read-only file system" in said
    assert "Internal failure" not in said
    assert files(run) == before


def test_ranges_of_steps() -> None:
    assert parse_steps("2-8") == (2, 3, 4, 5, 6, 7, 8)
    assert parse_steps("4,2,4") == (2, 4)
    with pytest.raises(ConfigError, match="2-8"):
        parse_steps("2-")
