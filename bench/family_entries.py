"""What bench/family.py compares: one entry per objective and lever, everything else equal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEACHER = {
    "data.resize": 16, "images": 1_000_000, "batch_size": 64, "precision": "bf16", "optim.lr": 1.5e-3,
    "eval.samples": 0,
    "model.kwargs": {"channels": 16, "multipliers": [1, 2, 2], "blocks": 1, "attention": [4]},
}  # fmt: skip

COMMON = {
    "data.resize": 16, "batch_size": 64, "precision": "bf16", "eval.samples": 0, "output.sample_images": 0,
    "output.keep": 99, "output.checkpoint_images": 10**9, "output.log_images": 3_200,
    "optim.name": "radam", "optim.lr": 1e-3, "optim.schedule": "constant",
    "emas": [{"kind": "constant", "beta": 0.99}],
}  # fmt: skip
"""The same for all: optimiser, learning rate, average. N stands for the number of training images."""

ECT = {
    "objective.schedule.q": 2, "objective.schedule.first": 1, "objective.schedule.last": 3,
    "objective.schedule.images": "N/3", "objective.penalty.distance": "l2", "objective.penalty.c": 0.0,
}  # fmt: skip
"""Plain ECT, the baseline: q^a = 4, 8, 16, unit-norm gradient, weight 1/(t-r)."""

AT_ONCE = ECT | {"objective.schedule.q": 16, "objective.schedule.first": 0, "objective.schedule.last": 0}
DECAY = {"optim.schedule": "linear", "optim.decay_share": 0.5}
SLOW_AVERAGE = {"emas": [{"kind": "constant", "beta": 0.998}]}
CALM = {
    "optim.lr": 5e-4, "optim.schedule": "linear", "optim.decay_share": 1.0,
    "emas": [{"kind": "constant", "beta": 0.999}],
}  # fmt: skip

UNIT_GRADIENT = {"objective.penalty.distance": "l2", "objective.penalty.weight": "dt", "objective.penalty.c": 0.0}
PAIRS = {"objective.pairing.kind": "ect", "objective.pairing.schedule.kind": "stages"} | {
    key.replace("objective.", "objective.pairing."): value for key, value in ECT.items() if "schedule" in key
}
HEUN = {"objective.step.kind": "heun"}
DIAL = {"objective.segments": [1, 2, 4, 8]} | PAIRS | UNIT_GRADIENT
"""One student for 1, 2, 4 and 8 jumps, with plain ECT's pairs."""
GRID_DIAL = HEUN | {
    "objective.segments": [1, 1, 2, 4, 8], "objective.pairing.first": 32, "objective.pairing.last": 32,
    "objective.penalty.distance": "squared_l2", "objective.penalty.weight": "one",
}  # fmt: skip
GAP_DIAL = UNIT_GRADIENT | HEUN | PAIRS | {
    "objective.segments": [1, 1, 2, 4, 8], "objective.pairing.schedule.q": 8, "objective.pairing.schedule.first": 0,
    "objective.pairing.schedule.last": 0, "objective.pairing.law.mean": -0.4, "objective.pairing.law.std": 1.8,
}  # fmt: skip
WIDE = {"objective.pairing.law.mean": 0.0, "objective.pairing.law.std": 2.2}
LOW_WIDE = {
    "objective.pairing.law.mean": -0.4, "objective.pairing.law.std": 2.0, "objective.segments": [1, 2, 4, 8, 8],
}  # fmt: skip
CMT_DIAL = {"objective.segments": [1, 1, 2, 4, 8]}


@dataclass(frozen=True)
class Phase:
    """A tuning run; a second phase starts from the first one's model."""

    objective: str
    overrides: dict[str, Any]
    share: float = 1.0


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Args:
        group: which table it belongs to.
        curve: measure every checkpoint, too.
        weights: further averages of the run to measure.
    """

    group: str
    phases: tuple[Phase, ...]
    curve: bool = False
    weights: tuple[str, ...] = ()


def one(group: str, objective: str, overrides: dict[str, Any], **more: Any) -> Entry:
    return Entry(group, (Phase(objective, overrides),), **more)


def lever(**changes: Any) -> Entry:
    """Plain ECT with dotted settings changed (dots written as __)."""
    return one("lever", "ect", ECT | {key.replace("__", "."): value for key, value in changes.items()})


def tightening(start: str, immediate: bool) -> Entry:
    """To q^a = 256 in four stages, or from the first image on."""
    q, last = (256, 0) if immediate else (4, 3)
    changes = {
        "objective.schedule.q": q, "objective.schedule.first": 0, "objective.schedule.last": last,
        "objective.schedule.images": "N/4", "student.start": start, "output.checkpoint_images": "N/4",
    }  # fmt: skip
    return one("start", "ect", ECT | changes, curve=True)


def scaled(overrides: dict[str, Any], images: int, work: Path) -> dict[str, Any]:
    """Settings for a phase of ``images``: "N/3" becomes a number, {work} a folder."""

    def value(v: Any) -> Any:
        if isinstance(v, str) and v.startswith("N/"):
            return max(1, round(images / float(v[2:])))
        return v.replace("{work}", str(work.resolve())) if isinstance(v, str) else v

    return {key: value(v) for key, v in overrides.items()} | {"images": images}


ENTRIES: dict[str, Entry] = {
    "ect": one("objective", "ect", ECT),
    "ct": one("objective", "ct", {"objective.schedule.last": 50}),
    "ict": one("objective", "ict", {"objective.schedule.last": 80}),
    "cd": one("objective", "cd", {}),
    "ecd-heun": one("objective", "ecd", ECT),
    "ecd-euler": one("objective", "ecd", ECT | {"objective.bridge.solver": "euler"}),
    "tcm": one("objective", "tcm", {k: v for k, v in ECT.items() if "penalty" not in k}),
    "multistep-8": one("objective", "multistep", {"objective.pairing.last": 128}),
    "multistep-8-addim": one("objective", "multistep", {"objective.pairing.last": 128, "objective.step.kind": "addim"}),
    "multistep-dial": one("objective", "multistep", DIAL),
    "multistep-dial-heun": one("objective", "multistep", DIAL | HEUN),
    "tract": one("objective", "tract", {"objective.time_schedule": [32, 8, 1]}),
    "sct": one("objective", "scm", {"objective.warmup_images": "N/4"}),
    "scd": one("objective", "scm", {"objective.warmup_images": "N/4", "objective.velocity": "teacher"}),
    "meanflow": one("objective", "meanflow", {}),
    "meanflow-teacher": one("objective", "meanflow", {"objective.velocity": "teacher"}),
    "ctm": one("objective", "ctm", {}),
    # levers on plain ECT, one at a time
    "ect+continuous": one("lever", "ect", {k: v for k, v in ECT.items() if "schedule" not in k} | {
        "objective.schedule.kind": "continuous", "objective.schedule.q": 2, "objective.schedule.images": "N/4",
        "objective.schedule.limit": 16,
    }),
    "ect+adaptive": lever(objective__adaptive={}),
    "ect+reference": lever(objective__bridge__kind="reference"),
    "ect+ot": lever(objective__levers__coupling__kind="ot"),
    "ect+vct": lever(objective__levers__coupling__kind="learned"),
    "ect+features": lever(objective__levers__distance__net="transforms:{work}/transforms"),
    "ect+huber": lever(objective__penalty__distance="pseudo_huber", objective__penalty__c=0.03),
    "ect+decay": lever(optim__schedule="linear", optim__decay_share=0.3),
    "ect+anchor": lever(objective__levers__anchor={}),
    "ect+emas": Entry(
        "lever",
        (Phase("ect", ECT | {"emas": [{"kind": "constant", "beta": 0.99}, {"kind": "power", "std": 0.05},
                                      {"kind": "power", "std": 0.1}]}),),
        weights=("ema-1", "ema-2", "std=0.07"),
    ),
    "cmt-then-ect": Entry("lever", (Phase("cmt", {}, 0.5), Phase("ect", AT_ONCE, 0.5))),
    # recipes put together from the above
    "cd+decay": one("recipe", "cd", DECAY),
    "dial": one("recipe", "multistep", GRID_DIAL | DECAY),
    "dial-c_out": one("recipe", "multistep", GRID_DIAL | DECAY | {"objective.penalty.weight": "c_out"}),
    "dial-gaps": one("recipe", "multistep", GAP_DIAL | DECAY),
    "dial-gaps-squared": one(
        "recipe", "multistep",
        GAP_DIAL | DECAY | {"objective.penalty.distance": "squared_l2", "objective.penalty.weight": "c_out"},
    ),
    "dial-wide": one("recipe", "multistep", GAP_DIAL | DECAY | WIDE | SLOW_AVERAGE),
    "cmt": one("recipe", "cmt", DECAY),
    "cmt-dial": one("recipe", "cmt", DECAY | CMT_DIAL),
    "dial-recipe": Entry(
        "recipe",
        (Phase("cmt", DECAY | CMT_DIAL, 0.25), Phase("multistep", GAP_DIAL | DECAY | SLOW_AVERAGE | LOW_WIDE, 0.75)),
    ),
    "dial-wide-again": Entry(
        "recipe",
        (Phase("multistep", GAP_DIAL | DECAY | WIDE | SLOW_AVERAGE, 0.5),
         Phase("multistep", GAP_DIAL | WIDE | CALM, 0.5)),
    ),
    "mid": one("recipe", "sequence", {f"objective.then.{k.removeprefix('objective.')}": v for k, v in AT_ONCE.items()}),
    # cold or warm start, progressive or immediate tightening
    "warm-progressive": tightening("teacher", immediate=False),
    "warm-immediate": tightening("teacher", immediate=True),
    "cold-progressive": tightening("fresh", immediate=False),
    "cold-immediate": tightening("fresh", immediate=True),
}  # fmt: skip
