"""Dataclasses to dicts and back, overrides by dotted path, and what bad settings say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.config import (
    dump_yaml,
    flatten,
    from_dict,
    parse_assignments,
    read_yaml,
    to_dict,
    with_overrides,
)
from fewstep.errors import ConfigError
from fewstep.objectives import ECT, OBJECTIVES, Diffusion, Multistep, Objective
from fewstep.objectives.multistep import Gaps
from fewstep.penalty import Penalty
from fewstep.process import VP, AnyProcess, DiscreteVP
from fewstep.times import Constant, Continuous, KarrasUniform, Lognormal, LogUniform, Sigmoid, Stages
from fewstep.training.config import RunConfig


@dataclass(frozen=True)
class Circle:
    radius: float = 1.0
    name: str = "round"
    kind: ClassVar[str] = "circle"


@dataclass(frozen=True)
class Square:
    side: float
    name: str = "edgy"
    kind: ClassVar[str] = "square"


@dataclass(frozen=True)
class Plan:
    shape: Circle | Square = field(default_factory=Circle)
    spare: Circle | Square | None = None
    count: int = 3
    rate: float = 0.5
    fast: bool = False
    mode: Literal["slow", "steady"] = "slow"
    sizes: tuple[int, ...] = (1, 2)
    box: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    either: int | str = 1
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    plan: Plan = field(default_factory=Plan)
    objective: Objective = field(default_factory=ECT)
    process: AnyProcess = field(default_factory=VP)


EVERYTHING = Run(
    Plan(
        Square(2.0),
        Circle(3.0),
        7,
        0.25,
        True,
        "steady",
        (4, 5, 6),
        (7, 8.5),
        9,
        "text",
        {"a": [1, {"b": None}]},
    ),
    ECT(LogUniform(0.01, 50.0), Constant(), Continuous(4.0, 10, 99.0), Penalty("pseudo_huber", "snrpk", 0.06)),
    DiscreteVP((0.9, 0.5, 0.1)),
)


# -------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize(
    "config", [Run(), EVERYTHING, Run(objective=Diffusion())], ids=["defaults", "all", "diffusion"]
)
def test_round_trip_through_dict_json_and_yaml(config: Run) -> None:
    data = to_dict(config)
    assert from_dict(Run, data) == config
    assert from_dict(Run, json.loads(json.dumps(data))) == config
    assert from_dict(Run, yaml.safe_load(dump_yaml(config))) == config
    assert with_overrides(Run(), flatten(data)) == config


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 10), st.floats(0, 20), st.integers(1, 10**9), st.floats(0, 1))
def test_round_trip_keeps_every_digit(std: float, k: float, images: int, c: float) -> None:
    config = ECT(Lognormal(-1.1, std), Sigmoid(k), Stages(images=images), Penalty("pseudo_huber", "dt", c))
    assert from_dict(ECT, yaml.safe_load(dump_yaml(config))) == config


def test_dicts_are_plain_and_name_their_kind() -> None:
    data = to_dict(Run())
    assert data["objective"]["kind"] == "ect"
    assert data["objective"]["law"] == {"kind": "lognormal", "mean": -1.1, "std": 2.0}
    assert data["plan"]["sizes"] == [1, 2]
    assert "kind" not in data["plan"]


def test_missing_settings_take_their_defaults() -> None:
    assert from_dict(Run, {}) == Run()
    assert from_dict(Plan, {"shape": {"kind": "square", "side": 4}}).shape == Square(4.0)


# ---------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"plan": {"cuont": 4}}, "There is no setting 'plan.cuont'. Did you mean 'count'?"),
        ({"objektive": {}}, "There is no setting 'objektive'. Did you mean 'objective'?"),
        (
            {"objective": {"kind": "ect", "law": {"kind": "lognormal", "sdt": 1}}},
            "no setting 'objective.law.sdt'. Did you mean 'std'?",
        ),
        (
            {"objective": {"kind": "eect"}},
            "'objective.kind' is not one of its choices. Got: eect. Did you mean 'ect'?",
        ),
        ({"objective": {"laww": {}}}, "no setting 'objective.laww'. Did you mean 'law'?"),
        (
            {"plan": {"mode": "steddy"}},
            "'plan.mode' is not one of its choices. Got: steddy. Did you mean 'steady'?",
        ),
        ({"plan": {"shape": {"kind": "square"}}}, "The settings under 'plan.shape' are incomplete"),
        ({"plan": {"count": 2.5}}, "'plan.count' has the wrong type. Got: 2.5. Wanted: a whole number"),
        ({"plan": {"count": True}}, "'plan.count' has the wrong type. Got: True"),
        ({"plan": {"count": "many"}}, "'plan.count' has the wrong type. Got: 'many'"),
        ({"plan": {"count": None}}, "'plan.count' has the wrong type. Got: None"),
        ({"plan": {"rate": "quick"}}, "'plan.rate' has the wrong type. Got: 'quick'. Wanted: a number"),
        ({"plan": {"rate": True}}, "'plan.rate' has the wrong type"),
        ({"plan": {"fast": 1}}, "'plan.fast' has the wrong type. Got: 1. Wanted: true or false"),
        ({"plan": {"fast": "yes"}}, "'plan.fast' has the wrong type. Got: 'yes'"),
        ({"plan": {"shape": {"kind": "circle", "name": ["a"]}}}, "'plan.shape.name' has the wrong type"),
        ({"plan": {"sizes": [1, "two"]}}, "'plan.sizes[1]' has the wrong type. Got: 'two'"),
        ({"plan": {"box": [1, 2, 3]}}, "'plan.box' has the wrong type. Got: [1, 2, 3]. Wanted: 2 values"),
        ({"plan": {"extra": 3}}, "'plan.extra' has the wrong type. Got: 3. Wanted: a mapping"),
        ({"plan": 3}, "'plan' has the wrong type. Got: 3. Wanted: a mapping of settings"),
        ({"plan": {"shape": 3}}, "'plan.shape' has the wrong type"),
        ({"plan": {7: 3}}, "There is no setting 'plan.7'"),
        ({7: 3}, "There is no setting '7'"),
        ({"objective": {"kind": "ect", "schedule": {"kind": "stages", "q": 1}}}, "needs q > 1"),
    ],
)
def test_bad_settings_say_where_and_what(data: dict[Any, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Run, data)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("data", "want"),
    [
        ({"count": "1_000"}, 1000),
        ({"count": "3e6"}, 3_000_000),
        ({"count": 4.0}, 4),
    ],
)
def test_whole_numbers_as_people_write_them(data: dict[str, Any], want: int) -> None:
    got = from_dict(Plan, data).count
    assert got == want and type(got) is int


def test_numbers_as_yaml_reads_them() -> None:
    assert from_dict(Plan, {"rate": "1e-4"}).rate == 1e-4  # YAML 1.1 reads 1e-4 as text
    assert from_dict(Plan, {"rate": 1}).rate == 1.0
    assert type(from_dict(Plan, {"rate": 1}).rate) is float
    assert from_dict(Plan, {"limit": None}).limit is None and from_dict(Plan, {"limit": 4}).limit == 4
    assert from_dict(Plan, {"either": "a"}).either == "a" and from_dict(Plan, {"either": 5}).either == 5
    assert from_dict(Plan, {"sizes": 5}).sizes == (5,)


# ---------------------------------------------------------------------------------------- overrides
def test_overrides_reach_in_and_leave_the_rest() -> None:
    got = with_overrides(Run(), {"objective.schedule.q": 4, "plan.count": 9, "objective.penalty.weight": "snrpk"})
    assert got.objective.schedule == Stages(q=4.0)
    assert got.plan == Plan(count=9)
    assert got.objective.penalty == Penalty("l2", "snrpk")
    assert Run().objective.schedule.q == 2.0


def test_a_new_kind_keeps_nothing_of_the_old() -> None:
    config = Run(plan=Plan(Circle(5.0, "mine")))
    got = with_overrides(config, {"plan.shape.kind": "square", "plan.shape.side": 2})
    assert got.plan.shape == Square(2.0)
    same = with_overrides(config, {"plan.shape.kind": "circle", "plan.shape.radius": 2})
    assert same.plan.shape == Circle(2.0, "mine")
    switched = with_overrides(Run(), {"objective.law.kind": "loguniform", "objective.law.high": 10})
    assert switched.objective.law == LogUniform(high=10.0)
    nested = {"objective.kind": "diffusion", "objective.law.kind": "karras", "objective.law.rho": 3}
    assert with_overrides(Run(), nested).objective == Diffusion(KarrasUniform(rho=3.0))
    penalty = {"objective.kind": "diffusion", "objective.penalty.distance": "l2", "objective.penalty.c": 0.1}
    assert with_overrides(Run(), penalty).objective == Diffusion(penalty=Penalty("l2", c=0.1))
    with pytest.raises(ConfigError, match="no setting 'objective.law.std'. Known: low, high"):
        with_overrides(Run(), {"objective.law.kind": "loguniform", "objective.law.std": 1.0})


def test_every_objective_can_be_switched_to() -> None:
    for name, cls in OBJECTIVES.items():
        assert isinstance(with_overrides(Run(), {"objective.kind": name}).objective, cls)


def test_an_optional_record_can_be_filled_and_emptied() -> None:
    filled = with_overrides(Run(), {"plan.spare.kind": "square", "plan.spare.side": 1})
    assert filled.plan.spare == Square(1.0)
    assert with_overrides(filled, {"plan.spare": None}).plan.spare is None


def test_free_dictionaries_take_new_names() -> None:
    config = Run(plan=Plan(extra={"a": {"b": 1}}))
    assert with_overrides(config, {"plan.extra.a.b": 2}).plan.extra == {"a": {"b": 2}}
    both = with_overrides(Run(), {"plan.extra.new": 2, "plan.extra.other": 3})
    assert both.plan.extra == {"new": 2, "other": 3}


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("objective.shedule.q", "There is no setting 'objective.shedule'. Did you mean 'schedule'?"),
        ("objective.schedule.qq", "There is no setting 'objective.schedule.qq'. Did you mean 'q'?"),
        ("pln.count", "There is no setting 'pln'. Did you mean 'plan'?"),
        ("plan.count.deep", "There is no setting 'plan.count.deep': 'plan.count' is a single value"),
        ("plan.sizes.deep", "'plan.sizes' is a single value"),
        ("cuont", "There is no setting 'cuont'"),
        ("plan.cuont", "Did you mean 'count'?"),
    ],
)
def test_paths_that_do_not_exist(path: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(Run(), {path: 1})
    assert text in str(caught.value)


def test_assignments_are_read_as_yaml() -> None:
    got = parse_assignments(["a.b=3", "c=[1, 2]", "d=true", "e=", "f=x=y", "g=null", "h={k: 1}"])
    assert got == {"a.b": 3, "c": [1, 2], "d": True, "e": "", "f": "x=y", "g": None, "h": {"k": 1}}
    for bad in ("a.b", "=3", " =3"):
        with pytest.raises(ConfigError, match="not of the form path=value"):
            parse_assignments([bad])
    with pytest.raises(ConfigError, match="value of 'a' is not readable"):
        parse_assignments(["a=[1, 2"])


def test_files(tmp_path: Path) -> None:
    good, broken, other = tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "c.yaml"
    good.write_text("plan:\n  count: 4\n")
    broken.write_text("plan: [1,\n")
    other.write_text("- 1\n")
    assert from_dict(Run, read_yaml(good)).plan.count == 4
    for path, text in [
        (broken, "is not readable"),
        (other, "does not hold a mapping. Got: list"),
        (tmp_path / "d.yaml", "does not exist"),
        (tmp_path, "is not readable"),
    ]:
        with pytest.raises(ConfigError, match=text):
            read_yaml(path)
    other.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="is not readable"):
        read_yaml(other)


def test_kind_comes_first_in_flat_settings() -> None:
    flat = list(flatten({"law": {"std": 1, "kind": "lognormal"}, "a": {}}))
    assert flat == ["law.kind", "law.std", "a"]


def test_a_setting_without_a_kind_is_of_the_default_kind() -> None:
    assert from_dict(RunConfig, {"objective": {"law": {"std": 1.5}}}).objective == ECT(law=Lognormal(std=1.5))
    changed = with_overrides(
        RunConfig(), {"objective.kind": "multistep", "objective.pairing.kind": "ect", "objective.pairing.schedule.q": 4}
    )
    assert changed.objective == Multistep(pairing=Gaps(schedule=Stages(q=4.0, last=0)))
