"""Several runs on one page: what may be ranked, who is best, what is undecided, and what differs."""

from __future__ import annotations

import copy
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import ConfigError
from fewstep.evaluation.compare import compare, compare_runs, marks, marks_of, render_comparison, verdict_of
from fewstep.evaluation.pictures import Picture
from fewstep.evaluation.record import TEACHER, TUNED, Record

WHEN = datetime(2025, 11, 21, 5, 7, tzinfo=UTC)
FD, RECALL = "FD-Pixels-2k", "Recall-Pixels-2k"


def result(values: dict[int, float], spread: float | None = 0.1, metric: str = FD, **facts: Any) -> dict[str, Any]:
    """What ``evaluate`` returns, with ± spread about every value; None for no intervals."""
    rows = []
    for nfe, value in values.items():
        row = {"solver": "consistency", "nfe": nfe, "times": None, "samples_per_second": 10.0}
        row |= {"metrics": {metric: value}}
        row |= {} if spread is None else {"intervals": {metric: [value - spread, value + spread]}}
        rows.append(row)
    reference = {"source": "digits", "split": "train", "count": 1797, "fingerprint": "aa"} | facts.get("reference", {})
    net = {"name": "Pixels", "hash": "11"} | facts.get("features", {})
    return {"features": net, "reference": reference, "samples": 2000, "seed": facts.get("seed", 0), "rows": rows}


def record(name: str, results: dict[str, Any], **changes: Any) -> Record:
    config = {"job": "tune", "teacher": "/teachers/big", "seed": 0, "recipe": "demo", "optim.lr": 1e-4}
    config |= {"data.source": "digits", "images": 1000, "batch_size": 10} | changes.pop("config", {})
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=generator)
    pictures = [Picture(model, row["nfe"], images) for model, found in results.items() for row in found["rows"]]
    history = [{"images": 10.0 * i, "loss": 1.0 / i, "lr": 1e-4, "r/t": 0.5} for i in range(1, 6)]
    return Record(
        Path("/runs") / name, config, "", results=results, **{"pictures": pictures, "history": history} | changes
    )


def two(a: dict[str, Any], b: dict[str, Any], **changes: Any) -> list[Record]:
    return [record("a", {TUNED: a}), record("b", {TUNED: b}, **changes)]


# --- who is best --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "higher", "expected"),
    [
        ({"A": (1.0, (0.9, 1.1)), "B": (2.0, (1.9, 2.1))}, False, {"A": "best"}),
        ({"A": (1.0, (0.9, 1.1)), "B": (2.0, (1.9, 2.1))}, True, {"B": "best"}),
        ({"A": (1.0, (0.5, 1.5)), "B": (1.2, (1.1, 1.3))}, False, {"A": "undecided", "B": "undecided"}),
        ({"A": (1.0, (0.9, 1.1)), "B": (1.3, (1.1, 1.5))}, False, {"A": "undecided", "B": "undecided"}),
        (
            {"A": (1.0, (0.9, 1.1)), "B": (1.1, (1.0, 1.2)), "C": (1.2, (1.15, 1.25))},
            False,
            {"A": "undecided", "B": "undecided"},
        ),
        (
            {"A": (0.5, (0.4, 0.6)), "B": (1.1, (1.0, 1.2)), "C": (1.2, (1.1, 1.3))},
            False,
            {"A": "best"},
        ),
        (
            {"A": (1.0, (0.9, 1.1)), "B": (2.0, (1.9, 2.1)), "C": (3.0, (1.0, 5.0))},
            False,
            {"A": "undecided", "C": "undecided"},
        ),
        ({"A": (1.0, None), "B": (2.0, (1.9, 2.1))}, False, {"A": "unproven"}),
        ({"A": (1.0, (0.9, 1.1)), "B": (2.0, None)}, True, {"B": "unproven"}),
        ({"A": (1.0, (1.0, 1.0)), "B": (1.0, (1.0, 1.0))}, False, {"A": "undecided", "B": "undecided"}),
        ({"A": (0.0, None), "B": (0.0, None), "C": (0.5, None)}, False, {"A": "undecided", "B": "undecided"}),
        ({"A": (1.0, (0.9, 1.1))}, False, {}),
        ({"A": (1.0, (0.9, 1.1)), "B": (float("nan"), None)}, False, {}),
    ],
)
def test_the_best_is_marked_only_where_its_interval_is_clear(
    values: dict[str, Any], higher: bool, expected: dict[str, str]
) -> None:
    assert marks_of(values, higher=higher) == expected


def test_every_number_of_evaluations_is_ranked_by_itself_in_the_metrics_own_direction() -> None:
    found = compare(two(result({1: 1.0, 2: 0.5, 4: 0.3}), result({1: 2.0, 2: 0.2, 8: 0.1})))
    assert marks(found, FD) == {("A", 1): "best", ("B", 2): "best"}
    rising = compare(two(result({1: 1.0}, metric=RECALL), result({1: 2.0}, metric=RECALL)))
    assert marks(rising, RECALL) == {("B", 1): "best"}


def test_a_teacher_is_never_ranked() -> None:
    runs = [record(name, {TEACHER: result({1: 0.001}), TUNED: result({1: v})}) for name, v in (("a", 1.0), ("b", 2.0))]
    found = compare(runs)
    assert marks(found, FD) == {("A", 1): "best"}
    assert [row.model for row in found.rows] == ["teacher", "A", "B"]


def test_teachers_are_one_line_only_where_they_are_the_same() -> None:
    runs = [record(n, {TEACHER: result({1: v}), TUNED: result({1: 1.0})}) for n, v in (("a", 9.0), ("b", 9.5))]
    assert [row.model for row in compare(runs).rows] == ["teacher of A", "A", "teacher of B", "B"]
    moved = [record(n, {TEACHER: result({1: 9.0})}, config={"teacher": n}) for n in ("x", "y")]
    assert [row.model for row in compare(moved).rows] == ["teacher of A", "teacher of B"]
    counts = [record(n, {TEACHER: result({k: 9.0, 35: 1.0})}) for n, k in (("a", 1), ("b", 2))]
    assert [(row.model, row.nfe) for row in compare(counts).rows] == [("teacher", 1), ("teacher", 35), ("teacher", 2)]


def test_one_teacher_with_two_sets_of_numbers_is_flagged() -> None:
    def runs(other: float, **changes: Any) -> list[Record]:
        first = record("a", {TEACHER: result({1: 9.0}), TUNED: result({1: 1.0})})
        return [first, record("b", {TEACHER: result({1: other}), TUNED: result({1: 3.0})}, **changes)]

    said = ["A and B measured other numbers for the same teacher" in note for note in compare(runs(9.5)).notes]
    assert said == [True]
    assert compare(runs(9.0 + 1e-6)).notes == [], "the rounding of another machine"
    assert [row.model for row in compare(runs(9.0 + 1e-6)).rows] == ["teacher", "A", "B"]
    assert compare(runs(9.5, config={"teacher": "/teachers/small"})).notes == []
    assert compare(runs(9.5, facts={"teacher": {"sha256": "ff"}})).notes == []


def test_pretrained_models_are_the_runs_themselves() -> None:
    runs = [record(n, {TEACHER: result({35: v})}, config={"job": "pretrain"}) for n, v in (("a", 2.0), ("b", 1.0))]
    found = compare(runs)
    assert [(row.model, row.nfe) for row in found.rows] == [("A", 35), ("B", 35)]
    assert marks(found, FD) == {("B", 35): "best"}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (
            result({1: 2.0, 2: 0.1}),
            result({1: 1.0, 2: 0.9}),
            "One step: B has the lowest FD-Pixels-2k, 1.00; A has 2.00 (100 % higher); the 95 % intervals are apart.",
        ),
        (
            result({2: 2.0}, metric=RECALL),
            result({2: 1.0}, metric=RECALL),
            "2 evaluations: A has the highest Recall-Pixels-2k, 2.00; B has 1.00 (50 % lower); "
            "the 95 % intervals are apart.",
        ),
        (
            result({1: 1.0}),
            result({1: 1.15}),
            "One step: FD-Pixels-2k does not decide between A 1.00, B 1.15: their 95 % intervals overlap.",
        ),
        (
            result({1: 1.0}, spread=None),
            result({1: 1.5}, spread=None),
            "One step: A has the lowest FD-Pixels-2k, 1.00; B has 1.50 (50 % higher); "
            "without an interval this may be chance.",
        ),
        (
            result({1: 1.0}, spread=0.0),
            result({1: 1.5}, spread=0.0),
            "One step: A has the lowest FD-Pixels-2k, 1.00; B has 1.50 (50 % higher); "
            "without an interval this may be chance.",
        ),
        (result({1: 1.0}), result({2: 1.0}), "These runs share no number: nothing can be ranked."),
        (result({1: 1.0}), result({1: 1.0}, metric=RECALL), "These runs share no number: nothing can be ranked."),
        (
            result({1: 1.0}),
            result({1: 2.0}, reference={"fingerprint": "bb"}),
            "The numbers of these runs cannot be ranked: they were not measured in the same way.",
        ),
    ],
)
def test_the_verdict(a: dict[str, Any], b: dict[str, Any], expected: str) -> None:
    assert verdict_of(compare(two(a, b))) == expected


# --- what cannot be compared --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"reference": {"fingerprint": "bb"}}, "fingerprint"),
        ({"reference": {"split": "test"}}, "split"),
        ({"reference": {"count": 99}}, "count"),
        ({"reference": {"preprocessing": {"resize": 16}}}, "preprocessing"),
        ({"features": {"hash": "22"}}, "net"),
        ({"features": {"preprocessing": "resized"}}, "preprocessing of the net"),
    ],
)
def test_numbers_measured_in_another_way_are_shown_and_not_ranked(change: dict[str, Any], named: str) -> None:
    found = compare(two(result({1: 1.0}), result({1: 2.0}, **change)))
    assert not found.ranked
    assert marks(found, FD) == {}
    assert found.notes == [
        f"A and B were not measured alike (the reference or net differs in {named}): "
        "their numbers are shown, and not ranked."
    ]
    page = render_comparison(found, WHEN)
    assert "1.00" in page
    assert "✓" not in page


def test_equal_measurements_need_no_note() -> None:
    found = compare(two(result({1: 1.0}), result({1: 2.0})))
    assert found.notes == []
    assert found.ranked


def test_numbers_of_other_names_are_flagged() -> None:
    notes = compare(two(result({1: 1.0}), result({1: 1.0}, metric="FD-Pixels-5k"))).notes
    assert notes == [
        "No number has the same name in all runs (A: FD-Pixels-2k; B: FD-Pixels-5k): "
        "other nets or sample counts, not comparable."
    ]
    both = result({1: 1.0})
    both["rows"][0]["metrics"]["KID-Pixels-2k"] = 0.1
    assert compare(two(both, result({1: 2.0}))).notes == ["Not measured in all runs: A: KID-Pixels-2k."]
    assert compare([record("a", {}), *two(both, both)]).notes == ["A has no quality table."]


def test_different_seeds_are_said_and_the_numbers_stay_ranked() -> None:
    found = compare(two(result({1: 1.0}), result({1: 2.0}, seed=7)))
    assert found.notes == [
        "The samples have different seeds (A 0, B 7): pictures in the same place are not of the same noise, "
        "and part of a difference is the draw."
    ]
    assert marks(found, FD) == {("A", 1): "best"}
    page = render_comparison(found, WHEN)
    assert "not of the same noise" in page
    assert "Every picture starts from the same noise" not in page


def test_samples_of_another_shape_are_left_out_and_said() -> None:
    large = [Picture(TUNED, 1, torch.zeros(4, 3, 16, 16, dtype=torch.uint8))]
    found = compare(two(result({1: 1.0}), result({1: 2.0}), pictures=large))
    assert [picture.model for picture in found.pictures] == ["A"]
    assert found.notes == ["Samples of B have another shape and are not shown beside the others."]


# --- what differs -------------------------------------------------------------------------------------


def test_only_settings_and_machines_that_differ_are_listed() -> None:
    other = {"optim.lr": 2e-4, "student.dropout": 0.1}
    runs = two(result({1: 1.0}), result({1: 1.0}), config=other, environment={"torch": "2.9", "date": "today"})
    assert compare(runs).differences == {
        "optim.lr": ["0.0001", "0.0002"],
        "student.dropout": ["–", "0.1"],
        "(torch)": ["–", "2.9"],
    }
    same = compare(two(result({1: 1.0}), result({1: 1.0})))
    assert same.differences == {}
    assert "all settings are the same" in render_comparison(same, WHEN)


def test_runs_are_named_by_the_shortest_ends_that_differ() -> None:
    runs = [record(name, {}) for name in ("x/run", "y/run", "y/other")]
    assert [entry.name for entry in compare(runs).entries] == ["x/run", "y/run", "y/other"]
    assert [entry.name for entry in compare(runs[1:]).entries] == ["run", "other"]


def test_the_page_puts_runs_side_by_side() -> None:
    runs = two(result({1: 1.0, 2: 0.5}), result({1: 2.0, 2: 0.45}))
    page = render_comparison(compare(runs), WHEN)
    cells = [re.sub("<[^>]*>", "", c).replace("&nbsp;", " ") for c in re.findall("<td.*?</td>", page, re.DOTALL)]
    assert cells[:4] == ["1.00 ✓ ± 0.10", "2.00 ± 0.10", "0.5 ≈ ± 0.10", "0.45 ≈ ± 0.10"]
    assert page.count('<td class="best">') == 1
    assert page.count('<td class="undecided">') == 2
    assert page.count("<img") == 4
    figures = re.findall(r'aria-label="([^"]*)"', page)
    assert "A: 1.00 at 1, 0.5 at 2; B: 2.00 at 1, 0.45 at 2" in figures[0]
    assert sum("over the images seen. A:" in words and "; B:" in words for words in figures) == 3
    assert "<script" not in page
    assert "://" not in page


def test_comparing_changes_nothing_in_the_records() -> None:
    runs = two(result({1: 1.0}), result({1: 2.0}))
    before = copy.deepcopy([run.results for run in runs])
    render_comparison(compare(runs), WHEN)
    assert [run.results for run in runs] == before


def test_one_run_or_the_same_twice_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 to 8 runs"):
        compare_runs([tmp_path], tmp_path / "out.html")
    with pytest.raises(ConfigError, match="given twice"):
        compare_runs([tmp_path, tmp_path / "."], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()
