"""Runs of the whole family: exact resumption, the command line for each, students as asked, and two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep import EDM, OBJECTIVES, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.cli import main
from fewstep.data.sources import ArraySource
from fewstep.errors import CheckpointError, ConfigError
from fewstep.evaluation.record import read_history
from fewstep.runs import configure, make_student
from fewstep.sampling import few_step_times, possible_among, possible_steps
from fewstep.training.loop import Watcher
from fewstep.training.network import unused_parameters
from fewstep.training.trainer import StepReport, Trainer
from fewstep.world import World

Settings = dict[str, Any]
SHORT: Settings = {
    "images": 128,
    "batch_size": 16,
    "seed": 5,
    "optim.lr": 1e-3,
    "student.dropout": 0.3,
    "output.log_images": 32,
    "output.sample_images": 0,
    "output.keep": 9,
    "eval.samples": 0,
}
"""8 steps; halves of a run begin at image 64."""

RESUMED: dict[str, tuple[str, Settings, set[str]]] = {
    "ct": ("ct", {}, {"companion-target"}),
    "tcm": ("tcm", {}, {"companion-frozen"}),
    "tract": (
        "tract",
        {"objective.time_schedule": [4, 2, 1]},
        {"companion-self", "companion-average", "companion-phase_teacher"},
    ),
    "scm": ("scm", {"objective.warmup_images": 100, "objective.derivative": "finite"}, {"extra"}),
    "learned coupling": ("ect", {"objective.levers.coupling.kind": "learned"}, {"extra"}),
    "two-time": ("multistep", {"objective.segments": [1, 2, 4]}, set()),
}


class Stop(Exception):
    """Leaves a run from inside, as a crash would."""


class StopAt(Watcher):
    """Raises :class:`Stop` when ``images`` were seen."""

    def __init__(self, images: int) -> None:
        self.images = images

    def stepped(self, report: StepReport) -> None:
        if report.progress.images_seen == self.images:
            raise Stop


def state_of(run: Path) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run)
    assert checkpoint.name == "images-000000128"
    files = [*checkpoint.glob("*.safetensors"), run / "model" / "model.safetensors"]
    return {f"{f.stem}/{k}": v for f in files for k, v in read_tensors(f).items()}


@pytest.mark.parametrize(("name", "interval"), [*((name, 48) for name in RESUMED), ("tcm", 64), ("tract", 64)])
def test_resumed_to_the_same_bits(name: str, interval: int, tiny_path: Path, tmp_path: Path) -> None:
    """Stopped at image 80, after the second half began; continued from image 48, before it, or 64, where it begins."""
    objective, more, kinds = RESUMED[name]
    overrides = SHORT | {"output.checkpoint_images": interval} | more
    whole = fewstep.tune(
        tiny_path, "digits", out=tmp_path / "whole", objective=objective, overrides=overrides, device="cpu"
    )
    run = tmp_path / "run"
    with pytest.raises(Stop):
        fewstep.tune(
            tiny_path, "digits", out=run, objective=objective, overrides=overrides, device="cpu", watcher=StopAt(80)
        )
    assert latest_checkpoint(run).name == f"images-0000000{interval}"
    fewstep.resume(run, device="cpu")
    a, b = state_of(whole.path), state_of(run)
    assert {"student", "ema-0", "optimizer", "sums", "model", *kinds} <= {key.split("/")[0] for key in a}
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    clock = ("images_per_second", "seconds")
    one, two = ([{k: v for k, v in r.items() if k not in clock} for r in read_history(p)] for p in (whole.path, run))
    assert one == two
    for kind in kinds:  # each has moved, and no companion is the student
        start = read_tensors(whole.path / "checkpoints" / "images-000000000" / f"{kind}.safetensors")
        assert any(not torch.equal(value, a[f"{kind}/{key}"]) for key, value in start.items())
        assert kind == "extra" or any(not torch.equal(a[f"student/{key}"], a[f"{kind}/{key}"]) for key in start)


def test_a_run_whose_teacher_is_gone(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(tiny_path, teacher)
    overrides = SHORT | {"output.checkpoint_images": 32}
    with pytest.raises(Stop):
        fewstep.tune(teacher, "digits", out=run, objective="ecd", overrides=overrides, device="cpu", watcher=StopAt(48))
    shutil.rmtree(teacher)
    with pytest.raises(CheckpointError, match="is gone, and the objective 'ecd' follows it"):
        fewstep.resume(run, device="cpu")
    assert main(["resume", str(run), "--device", "cpu"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "is gone, and the objective 'ecd' follows it" in err
    assert "Traceback" not in err
    given = fewstep.resume(run, device="cpu", teacher=fewstep.load(tiny_path))
    assert latest_checkpoint(given.path).name == "images-000000128"


# ------------------------------------------------------------------------------------------ the command line
def tuned(teacher: Path, out: Path, objective: str, *settings: str) -> Path:
    """Three steps and a table, through the command line."""
    few = ["images=48", "batch_size=16", "eval.samples=16", "eval.steps=[1,2]", "eval.teacher_nfe=[1]", "output.grid=4"]
    command = [
        "tune",
        teacher,
        "--data",
        "digits",
        "--out",
        out,
        "--objective",
        objective,
        "--quiet",
        "--device",
        "cpu",
    ]
    assert main([*map(str, command), "--set", *few, *settings]) == 0
    return out


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tune_end_to_end(objective: str, tiny_path: Path, tmp_path: Path) -> None:
    run = tuned(tiny_path, tmp_path / "run", objective)
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")
    model = fewstep.load(run / "model")
    kind = OBJECTIVES[objective]()
    sampler, times = kind.sampler(fewstep.load(tiny_path))
    assert (model.sampler, model.two_time) == (sampler, kind.two_time)
    assert model.sampler_times == times
    steps = possible_among(model, (1, 2))
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))["tuned"]["rows"]
    assert [row["steps"] for row in rows] == steps
    assert [row["times"] for row in rows] == [few_step_times(model, n) for n in steps]
    start = fewstep.load(tiny_path).backbone.state_dict()
    mine = (model.backbone.inner if model.two_time else model.backbone).state_dict()
    assert any(not torch.equal(mine[name], value) for name, value in start.items())
    for n in steps:
        x = fewstep.sample(model, 3, steps=n, seed=1)
        assert x.shape == (3, 1, 8, 8)
        assert bool(torch.isfinite(x).all())
        assert not torch.equal(x[0], x[1])


@pytest.fixture(scope="module")
def jumpers(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of four segments, and one that is told where it lands."""
    folder = tmp_path_factory.mktemp("jumpers")
    return {
        "one-time": tuned(tiny_path, folder / "one", "multistep", "objective.segments=[4]", "eval.samples=0"),
        "two-time": tuned(tiny_path, folder / "two", "multistep", "objective.segments=[1,2,4]", "eval.samples=0"),
    }


def said(capsys: pytest.CaptureFixture[str], code: int, *command: object) -> tuple[str, str]:
    """stdout and stderr of a command that ends with ``code``; one sentence where it fails."""
    capsys.readouterr()
    assert main([*map(str, command), "--device", "cpu"]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, " ".join(err.split())


EVAL = ("--data", "digits", "-n", 16, "--features", "pca:4", "--metrics", "fd", "--json")


def test_only_possible_step_counts(
    jumpers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = jumpers["one-time"], tmp_path / "x.npz"
    _, err = said(capsys, 2, "sample", run, "--steps", 3, "-n", 2, "--out", out)
    assert "jumps between the levels it was trained for only. Got: 3 steps. Wanted: 4" in err
    assert not out.exists()
    _, err = said(capsys, 2, "sample", run, "--times", "80,10,2,0.5", "-n", 2, "--out", out)
    assert "jumps between the levels it was trained for only" in err
    found, _ = said(capsys, 0, "sample", run, "-n", 2, "--out", out, "--json")
    assert json.loads(found)["nfe"] == 4, "without --steps the fewest that it can do"
    _, err = said(capsys, 2, "eval", run, *EVAL, "--steps", "4,2")
    assert "Got: 2 steps. Wanted: 4" in err
    assert "NFE" not in err, "nothing was measured before"
    found, _ = said(capsys, 0, "eval", run, *EVAL)
    assert [row["steps"] for row in json.loads(found)["rows"]] == [4]
    found, _ = said(capsys, 0, "eval", jumpers["two-time"], *EVAL, "--steps", "3,1")
    assert [row["steps"] for row in json.loads(found)["rows"]] == [3, 1]


DIAL = ("--data", "digits", "--steps", "2", "-n", 64, "--budget", 8, "--features", "pca:4", "--json")


def test_the_dial_of_students_that_jump(
    jumpers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = said(capsys, 2, "dial", jumpers["one-time"], *DIAL)
    assert "There are no sampling times to find: this student jumps between the levels" in err
    assert "times for 4 steps" in err
    run = shutil.copytree(jumpers["two-time"], tmp_path / "run")
    out, _ = said(capsys, 0, "dial", run, *DIAL)
    entry = json.loads(out)["steps"]["2"]
    model = fewstep.load(run)
    assert few_step_times(model, 2) == pytest.approx(entry["times"])
    assert entry["search"]["found"] <= entry["search"]["default"]
    assert possible_steps(model) is None


def test_no_early_commit_of_students_that_jump(
    jumpers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in jumpers.values():
        for sampler in (["--sampler", "multistep"], ["--sampler", "ode", "--commit", "confidence"]):
            _, err = said(capsys, 2, "sample", run, *sampler, "-n", 2, "--out", tmp_path / "x.npz")
            assert "jumps from level to level: what its network returns aims at where it lands" in err
    _, err = said(capsys, 2, "dial", jumpers["two-time"], *DIAL, "--commit")
    assert "aims at where it lands" in err
    assert not (jumpers["two-time"] / "model" / "dial.partial.json").exists()


def test_plans_count_what_is_beside_the_student(tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def plan(objective: str, *settings: str) -> dict[str, Any]:
        few = ["--budget", "0.1", "--batch-size", "4", "--objective", objective, "--json", "--set", "seed=0", *settings]
        out, _ = said(capsys, 0, "plan", tiny_path, "--data", "digits", *few)
        found: dict[str, Any] = json.loads(out)
        return found

    ect, ecd, ct = plan("ect"), plan("ecd"), plan("ct")
    flow = plan("multistep", "objective.segments=[1,2,4]")
    size = ect["weights"]
    assert size == 4 * ect["parameters"]
    assert ecd["weights"] == 2 * size
    assert ct["averages"] == ect["averages"] + size
    landing = flow["parameters"] - ect["parameters"]
    assert landing > 1000
    assert flow["optimizer"] == ect["optimizer"] + 8 * landing
    assert min(p["images_per_second"] for p in (ect, ecd, ct, flow)) > 0


# -------------------------------------------------------------------------------------------------- students
def student_of(teacher: Denoiser, objective: str = "ect", **overrides: Any) -> Denoiser:
    settings = {name.replace("__", "."): value for name, value in overrides.items()}
    return make_student(teacher, configure("tune", None, objective, settings, "digits"))


def test_a_cold_start_has_seeded_weights_of_its_own(tiny: Denoiser) -> None:
    first, again, other, warm = (
        student_of(tiny, student__start=start, seed=seed)
        for start, seed in (("fresh", 1), ("fresh", 1), ("fresh", 2), ("teacher", 1))
    )
    names = [name for name, p in tiny.named_parameters() if p.ndim > 1]
    a, b, c, w, t = (dict(model.named_parameters()) for model in (first, again, other, warm, tiny))
    assert all(torch.equal(a[name], b[name]) for name in names)
    assert all(torch.equal(w[name], t[name]) for name in names)
    assert not any(torch.equal(a[name], t[name]) for name in names)
    drawn = [name for name in names if a[name].any()]
    assert len(drawn) > len(names) / 2
    assert not any(torch.equal(a[name], c[name]) for name in drawn)
    before = torch.random.get_rng_state()
    student_of(tiny.double(), student__start="fresh")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert student_of(tiny, student__start="fresh").dtype == torch.float64
    tiny.float()


def test_sampling_times_that_a_student_cannot_have(tiny: Denoiser) -> None:
    with pytest.raises(ConfigError, match="takes no others. Got: student.sampler_times for 2 steps"):
        student_of(tiny, "tract", student__sampler_times={"2": [80, 0.8]})
    with pytest.raises(ConfigError, match="not told where it lands, and this one is told"):
        student_of(student_of(tiny, "ctm"), "tract")
    teacher = student_of(tiny, student__sampler_times={"2": [80, 0.8]})
    assert student_of(teacher).sampler_times == {2: (80, 0.8)}
    assert student_of(teacher, "ctm").sampler_times == {}, "levels of fresh noise are no levels of jumps"


def test_augmentation_labels_of_a_wrapped_network_stay_out() -> None:
    spec = {"name": "edm", "kwargs": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8,
            "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "augment_dim": 9}}  # fmt: skip
    teacher = Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec)
    config = configure("tune", None, "multistep", SHORT | {"objective.segments": [1, 2]}, "digits")
    data = ArraySource("zeros", torch.zeros(16, 1, 8, 8, dtype=torch.uint8), None)
    student = make_student(teacher, config)
    assert student.two_time
    trainer = Trainer(config, student, data, World(0, 1, torch.device("cpu")))
    idle = [name for name, p in trainer.student.named_parameters() if not p.requires_grad]
    assert idle == ["backbone.inner.map_augment.weight"]
    assert [p.shape for p in unused_parameters(teacher)] == [p.shape for p in unused_parameters(student)]


# ---------------------------------------------------------------------------------------------- two processes
DOUBLE: Settings = SHORT | {
    "images": 64,
    "optim": {"name": "adam", "lr": 3e-3, "eps": 0.01, "clip": 1.0},
    "emas": [{"kind": "constant", "beta": 0.5}],
    "output.checkpoint_images": 1000,
}
SPREAD: dict[str, Settings] = {
    "ct": {"objective.schedule.first": 4},
    "ecd": {},
    "tcm": {},
    "multistep": {"objective.segments": [1, 2, 4]},
}
SCRIPT = """
import json, sys
import torch.distributed
import fewstep
torch.distributed.init_process_group("gloo")  # several runs share one group
teacher, out, settings, spread = sys.argv[1:]
for objective, more in json.loads(spread).items():
    fewstep.tune(fewstep.load(teacher).double(), "digits", out=f"{out}/{objective}", objective=objective,
                 overrides=json.loads(settings) | more, device="cpu")
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one_in_double(tiny_path: Path, tmp_path: Path) -> None:
    """Sums of the same rows in another order: student, averages, companions and optimiser agree to 1e-12."""
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = [str(tiny_path), str(tmp_path / "two"), json.dumps(DOUBLE), json.dumps(SPREAD)]
    sources = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "script.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": sources},
        text=True, capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for objective, more in SPREAD.items():
        teacher = fewstep.load(tiny_path).double()
        one = fewstep.tune(
            teacher, "digits", out=tmp_path / "one" / objective, objective=objective, overrides=DOUBLE | more,
            device="cpu",
        )  # fmt: skip
        a, b = (_checkpoint(path) for path in (one.path, tmp_path / "two" / objective))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-12, rtol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        start = _checkpoint(one.path, "images-000000000")
        assert max(float((a[k] - v).abs().max()) for k, v in start.items() if k.startswith("student/")) > 1e-4


def _checkpoint(run: Path, name: str = "images-000000064") -> dict[str, Tensor]:
    files = (run / "checkpoints" / name).glob("*.safetensors")
    return {f"{f.stem}/{k}": v for f in files if f.stem != "sums" for k, v in read_tensors(f).items()}


def test_a_few_step_model_is_no_teacher_but_can_be_the_start(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "digits", "--images", "32", "--batch-size", "16", "--quiet", "--set", "eval.samples=0"]
    mid = tmp_path / "mid"
    assert main(["tune", str(tiny_path), *words, "objective.nodes=4", "--objective", "cmt", "--out", str(mid)]) == 0
    assert main(["tune", str(mid), *words, "--objective", "ecd", "--out", str(tmp_path / "a")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "follows a diffusion model" in said and f"student.start={mid}" in said
    later = ["tune", str(tiny_path), *words, f"student.start={mid}", "optim.lr=1e-12", "--objective", "ecd"]
    assert main([*later, "--out", str(tmp_path / "b")]) == 0
    begun, tuned = fewstep.load(mid), fewstep.load(tmp_path / "b", weights="ema")
    for a, b in zip(begun.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert any(
        not torch.equal(a, b) for a, b in zip(begun.parameters(), fewstep.load(tiny_path).parameters(), strict=True)
    )
