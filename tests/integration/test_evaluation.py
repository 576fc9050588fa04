"""``evaluate`` and ``fewstep eval`` as a whole: what the numbers depend on, what they are called, what is refused."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep import Denoiser
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.cli import main
from fewstep.data import open_source
from fewstep.data.codec import save_images
from fewstep.data.sources import ArraySource
from fewstep.errors import ConfigError, FewstepError
from fewstep.evaluation import METRICS, evaluate, evaluate_samples, open_reference
from fewstep.evaluation.agreement import teacher_agreement
from fewstep.evaluation.features import FeatureNet
from fewstep.evaluation.reference import save_statistics
from fewstep.evaluation.samples import from_source, generated
from fewstep.runs import demo_teacher

TEACHER = str(demo_teacher())
PLAIN = ["--device", "cpu", "--quiet"]
QUICK = [*PLAIN, "-n", "24", "--steps", "1"]
Result = dict[str, Any]
Measure = Callable[..., Result]


@pytest.fixture(scope="module")
def teacher() -> Denoiser:
    """The diffusion model of digits that the package ships."""
    return fewstep.load(TEACHER)


@pytest.fixture
def measured(capsys: pytest.CaptureFixture[str]) -> Measure:
    """``measured("eval", ...)``: the JSON on stdout, after exit code 0."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments] + ["--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return dict(json.loads(out))

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one sentence on stderr, after exit code 2 with nothing on stdout and no traceback."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("fewstep: ") == 1 and "Traceback" not in err and "Internal failure" not in err
        return " ".join(err.split())

    return run


def without_clock(result: Result) -> Result:
    rows = [{k: v for k, v in row.items() if k != "samples_per_second"} for row in result["rows"]]
    return result | {"rows": rows}


def own_net(dim: int = 6, classes: int = 4) -> FeatureNet:
    """Fixed random projections of the pixels, with a classifier."""
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(64, dim, generator=draw) / 8, torch.randn(dim, classes, generator=draw)

    def extract(images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1).float() / 127.5 - 1) @ first

    def both(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return extract(images), extract(images) @ second

    return FeatureNet("Own", dim, "0" * 64, extract, "", both)


# ------------------------------------------------------------------------- what the numbers do not depend on
@pytest.mark.parametrize("batch_size", [7, 16, 64])
def test_numbers_do_not_depend_on_the_batch_size(batch_size: int, teacher: Denoiser) -> None:
    """In double precision, where no pixel sits on the edge between two levels within the rounding."""
    model = fewstep.load(TEACHER).double()
    reference = open_reference("digits", "pixels")
    settings: Result = {"steps": (1, 2), "samples": 40, "metrics": ("fd", "sw2", "precision", "memorised")}
    one = evaluate(model, reference, **settings)
    other = evaluate(model, reference, **settings, batch_size=batch_size)
    for a, b in zip(one["rows"], other["rows"], strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-6)
        assert a["intervals"].keys() == b["intervals"].keys()
        for name, interval in a["intervals"].items():
            assert interval == pytest.approx(b["intervals"][name], rel=1e-5)


def test_images_do_not_depend_on_the_batch_size(teacher: Denoiser) -> None:
    """In single precision a pixel in thousands may round to the next level, none farther."""
    many, few = (torch.cat(list(generated(teacher, 40, 2, seed=4, batch_size=n).blocks())) for n in (40, 7))
    gap = (many.int() - few.int()).abs()
    assert many.float().std() > 20
    assert int(gap.max()) <= 1
    assert float((gap > 0).double().mean()) < 1e-3


def test_numbers_do_not_depend_on_the_order() -> None:
    """All eleven metrics with their intervals; the samples, and then the reference, in another order."""
    digits = open_source("digits")
    assert digits.labels is not None
    order = np.random.default_rng(0).permutation(300)
    net, found = own_net(), []
    for real, fake in ((range(300), range(300, 600)), (range(300), 300 + order), (order, range(300, 600))):
        a, b = np.asarray(real), np.asarray(fake)
        reference = open_reference(ArraySource("real", digits.read(a), digits.labels[a]), net, cache=False)
        samples = from_source(ArraySource("fake", digits.read(b), digits.labels[b]))
        found.append(evaluate_samples([samples], reference, metrics=tuple(METRICS), replicates=10)["rows"][0])
    assert len(found[0]["metrics"]) == len(METRICS) == 11
    assert len({round(v, 6) for v in found[0]["metrics"].values()}) == 11
    for other in found[1:]:
        assert other["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-6, abs=1e-9)
        for name, interval in found[0]["intervals"].items():
            assert other["intervals"][name] == pytest.approx(interval, rel=1e-5, abs=1e-8), name


def test_numbers_do_not_depend_on_the_number_of_processes(tmp_path: Path, measured: Measure) -> None:
    """Three blocks for two processes: the second has one less, and writes nothing."""
    arguments = ["eval", TEACHER, "--data", "digits", "-n", "40", "--batch-size", "16", "--steps", "1,2",
                 "--features", "pca:12", "--device", "cpu", "--replicates", "10", "--quiet"]  # fmt: skip
    one = measured(*arguments)
    two = tmp_path / "two.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fewstep",
         *arguments, "--json", "--out", str(two)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(two.read_text())
    assert json.loads(done.stdout) == found, "one process prints, once"
    assert one["reference"].pop("cache") == found["reference"].pop("cache")
    assert without_clock(found) == without_clock(one)
    assert [row["nfe"] for row in found["rows"]] == [1, 2]
    assert found["rows"][0]["metrics"]["FD-PCA12-40"] > 1


# ---------------------------------------------------------------------------------------------- the streams
def test_global_random_states_are_left_alone(teacher: Denoiser) -> None:
    """With everything measured, a PCA made, labels drawn, a reference written and read."""

    def states() -> list[Any]:
        kind, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), kind, np.asarray(keys).tolist(), rest]

    torch.manual_seed(3)
    before = states()
    modes = [module.training for module in teacher.modules()]
    for _ in range(2):
        evaluate(teacher, "digits", steps=(1, 3), samples=24, features="pca:6", replicates=4)
        evaluate(teacher, "digits", steps=(3,), solver="ode", samples=24, metrics=("fd",), replicates=4)
    assert states() == before
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_watching_a_run_does_not_change_it(tiny_path: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    """Sample grids every 16 images and a table at the end, or none of it: the same weights and averages to the bit."""
    watched = {"output.sample_images": 16, "eval.samples": 24, "eval.steps": [1, 2], "eval.features": "pca:4"}
    kept = []
    for name, more in (("blind", {}), ("watched", watched)):
        short = settings | {"images": 96, "output.log_images": 32, "output.checkpoint_images": 48} | more
        run = fewstep.tune(tiny_path, "digits", out=tmp_path / name, overrides=short, device="cpu").path
        files = [*latest_checkpoint(run).glob("*.safetensors"), *(run / "model").glob("*.safetensors")]
        kept.append({f"{f.stem}/{k}": v for f in files for k, v in read_tensors(f).items()})
    assert len(list((tmp_path / "watched/samples").glob("*.png"))) > len(list((tmp_path / "blind").rglob("*.png")))
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) > 50
    assert [k for k, v in kept[0].items() if not torch.equal(v, kept[1][k])] == []


# ---------------------------------------------------------------------------------------- refused before sampling
REFUSED: dict[str, tuple[Result, str]] = {
    "unknown metric": ({"metrics": ("fid",)}, "There is no metric 'fid'. Did you mean 'fd'?"),
    "unknown solver": ({"solver": "dpm"}, "There is no solver 'dpm'"),
    "labels": ({"metrics": ("fd", "class")}, "The metric 'class' compares the class asked for"),
    "logits": ({"metrics": ("is",)}, "The metric 'is' needs class scores"),
    "many": ({"metrics": ("fd_inf",), "samples": 259}, "The metric 'fd_inf' extrapolates over subsets"),
    "one sample": ({"samples": 1}, "An evaluation needs at least two samples"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_network_runs(case: str, teacher: Denoiser) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        calls(teacher, open_reference("digits", "pixels"), settings)
    assert calls.count == 0


def test_statistics_refuse_metrics_of_rows_before_the_network_runs(teacher: Denoiser, tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "s.npz", open_reference("digits", "pixels"))
    with pytest.raises(ConfigError, match="The metric 'kid' compares samples one by one"):
        calls(teacher, open_reference(path, "pixels"), {"metrics": ("kid",)})
    assert calls.count == 0
    calls(teacher, open_reference(path, "pixels"), {"metrics": ("fd",)})
    assert calls.count > 0


class _Calls:
    """``evaluate``, with the calls of the network counted."""

    count = 0

    def __call__(self, model: Denoiser, reference: Any, settings: Result) -> Result:
        self.count = 0
        hook = model.backbone.register_forward_pre_hook(lambda *_: setattr(self, "count", self.count + 1))
        try:
            return evaluate(model, reference, **{"samples": 24, "steps": (1,), "replicates": 0} | settings)
        finally:
            hook.remove()


calls = _Calls()


# ------------------------------------------------------------------------------------------------- bad input
NAN = """
import torch
from fewstep import EDM, Denoiser
class Diverged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
    def forward(self, x, t):
        return self.scale * x / 0 * 0
def make():
    return Denoiser.from_module(Diverged(), process=EDM(), prediction="x0", sample_shape=(1, 8, 8))
"""

BAD = {
    "nan": ("NET:make --data digits", "Some samples are not finite. Got: NaN or infinity in 24 of 24"),
    "no reference": ("TEACHER --data nowhere.npz", "There is no data source 'nowhere.npz'"),
    "no such file": ("PLACE/none.zip --data digits", "There is no data source 'PLACE/none.zip'"),
    "grey and RGB": ("PLACE/rgb.npz --data digits", "differ in channels. Got: 8x8 RGB. Wanted: 8x8 grey"),
    "resolution": ("PLACE/large.npz --data digits", "differ in resolution. Got: 9x9 grey. Wanted: 8x8 grey"),
    "constant reference": ("TEACHER --data PLACE/constant.npz", "The reference samples are all the same"),
    "other dimension": (
        "TEACHER --data PLACE/edm.npz --features pixels",
        "The statistics 'PLACE/edm.npz' are of another feature net than Pixels. Got: 10 features",
    ),
    "rows of statistics": (
        "TEACHER --data PLACE/own.npz --features pixels --metrics fd,kid",
        "this reference holds statistics only",
    ),
    "class without labels": ("TEACHER --data digits --metrics class", "compares the class asked for"),
    "one image": ("TEACHER --data PLACE/single.npz", "has too few samples. Got: 1. Wanted: at least 2"),
    "steps of images": ("PLACE/grey.npz --data digits --steps 2", "--steps does not go with images made elsewhere"),
    "teacher of images": (
        "PLACE/grey.npz --data digits --teacher TEACHER",
        "--teacher does not go with images made elsewhere",
    ),
    "one replicate": ("TEACHER --data digits --replicates 1", "A spread needs at least two half-samples"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and statistics to measure, good and bad."""
    root = tmp_path_factory.mktemp("place")
    draw = np.random.default_rng(0)
    np.savez(root / "rgb.npz", images=draw.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    np.savez(root / "large.npz", images=draw.integers(0, 256, (20, 9, 9), dtype=np.uint8))
    np.savez(root / "grey.npz", images=draw.integers(0, 256, (40, 8, 8), dtype=np.uint8))
    np.savez(root / "single.npz", images=draw.integers(0, 256, (1, 8, 8), dtype=np.uint8))
    np.savez(root / "constant.npz", images=np.full((40, 8, 8), 77, dtype=np.uint8))
    np.savez(root / "edm.npz", mu=np.zeros(10), sigma=np.eye(10))
    save_statistics(root / "own.npz", open_reference("digits", "pixels", cache=False))
    (root / "net.py").write_text(NAN)
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, place: Path, refused: Callable[..., str]) -> None:
    line, wanted = BAD[case]
    words = line.replace("PLACE", str(place)).replace("NET", str(place / "net.py")).replace("TEACHER", TEACHER)
    message = refused("eval", *words.split(" "), *(PLAIN if line.startswith("PLACE") else QUICK))
    assert wanted.replace("PLACE", str(place)) in message


def test_data_of_another_shape_are_refused_before_they_are_read(own_cache: Path, refused: Callable[..., str]) -> None:
    """Not after a pass over all of them through the feature net, which would be in the cache."""
    assert "Add --resize 8 --channels 1" in refused("eval", TEACHER, "--data", "tiles", *QUICK)
    assert not own_cache.exists()


def test_constant_images_have_finite_numbers(place: Path, measured: Measure) -> None:
    """A covariance of zero and balls of radius zero: FD is that of the reference's own spread, nothing is reached."""
    row = measured("eval", place / "constant.npz", "--data", "digits", *PLAIN)["rows"][0]
    values = {name.split("-")[0]: value for name, value in row["metrics"].items()}
    assert all(map(math.isfinite, [*values.values(), *(x for pair in row["intervals"].values() for x in pair)]))
    reference = open_reference("digits", "pixels")
    assert reference.rows is not None
    level = torch.full((64,), 77 / 127.5 - 1, dtype=torch.float64)
    want = float((reference.stats.mean - level).square().sum() + reference.stats.cov.trace())
    assert values["FD"] == pytest.approx(want, rel=1e-6)
    assert values["Recall"] == 0
    assert values["Memorised"] == 0
    assert values["KID"] > 1


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(24, "The covariance of 24 samples of 64 features has a rank of at most 23"),
     (100, "100 samples are few for 64 features: even a perfect model would score an FD of about"),
     (640, None)],
)  # fmt: skip
def test_too_few_samples_are_said(count: int, wanted: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", TEACHER, "--data", "digits", "-n", str(count), "--steps", "1", "--metrics", "fd"]
    assert main([*arguments, "--replicates", "0", "--device", "cpu"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    if wanted is None:
        assert "a perfect model" not in said
    else:
        assert wanted in said and "compare FD at equal sample counts only" in said


# ------------------------------------------------------------------------------------------------- the names
PUBLISHED = {"verified": True, "name": "Inception"}
NAMES: dict[str, tuple[int, Result, str, bool, str]] = {
    "the published protocol": (50_000, PUBLISHED, "train", False, "FID-50k"),
    "fewer samples": (10_000, PUBLISHED, "train", False, "FD-Inception-10k"),
    "an odd count": (10_001, PUBLISHED, "train", False, "FD-Inception-10001"),
    "the test split": (50_000, PUBLISHED, "test", False, "FD-Inception-50k"),
    "other weights": (50_000, PUBLISHED | {"verified": False}, "train", False, "FD-Inception-50k"),
    "another net": (50_000, {"verified": True, "name": "DINOv2"}, "train", False, "FD-DINOv2-50k"),
    "unknown statistics": (50_000, PUBLISHED, "train", True, "FD-Inception-50k"),
}


@pytest.mark.parametrize("case", NAMES)
def test_only_the_published_protocol_is_called_fid(case: str, tmp_path: Path) -> None:
    count, about, split, from_statistics, wanted = NAMES[case]
    net = replace(own_net(2), extract=lambda x: x.flatten(1)[:, :2].float(), **about)
    images = torch.randint(0, 256, (count, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = open_reference(ArraySource("real", images[:400], None), net, split=split, cache=False)
    if from_statistics:
        np.savez(tmp_path / "s.npz", mu=reference.stats.mean.numpy(), sigma=reference.stats.cov.numpy())
        reference = open_reference(tmp_path / "s.npz", net)
    found = evaluate_samples(
        [from_source(ArraySource("fake", images, None))], reference, metrics=("fd", "fd_inf"), replicates=0
    )
    first, second = found["rows"][0]["metrics"]
    assert first == wanted
    assert second == wanted.replace("FID-50k", "FD-Inception-50k").replace("FD-", "FD-inf-")


# ------------------------------------------------------------------------------------------------ fewstep eval
def test_repeats_are_summarised_over_seeds(measured: Measure) -> None:
    options = ["eval", TEACHER, "--data", "digits", *QUICK, "--metrics", "fd,precision", "--replicates", "4"]
    three, alone = measured(*options, "--seed", 5, "--repeats", 3), measured(*options, "--seed", 6)
    assert three["seeds"] == [5, 6, 7]
    (row,) = three["rows"]
    assert row["seeds"].keys() == row["metrics"].keys() == {"FD-Pixels-24", "Precision-Pixels-24"}
    found = row["seeds"]["FD-Pixels-24"]
    values = found["values"]
    assert len(set(values)) == 3
    assert values[1] == alone["rows"][0]["metrics"]["FD-Pixels-24"]
    assert found["mean"] == row["metrics"]["FD-Pixels-24"] == pytest.approx(statistics.fmean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))
    assert (found["min"], found["max"]) == (min(values), max(values))


def test_folder_zip_and_npz_measure_the_same(tmp_path: Path, measured: Measure) -> None:
    images = open_source("digits").read(np.arange(30))
    folder, archive = save_images(tmp_path / "folder", images), save_images(tmp_path / "a.npz", images)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in sorted(folder.iterdir()):
            file.write(path, path.name)
    rows = [
        measured("eval", path, "--data", "digits", *PLAIN, "--metrics", "fd,recall")["rows"][0]
        for path in (folder, tmp_path / "a.zip", archive)
    ]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["solver"] == "files" and rows[0]["nfe"] is None and rows[0]["samples_per_second"] is None
    direct = evaluate_samples(
        [from_source(ArraySource("x", images, None))], open_reference("digits", "pixels"), metrics=("fd", "recall")
    )
    assert rows[0]["metrics"] == direct["rows"][0]["metrics"]
    assert [*rows[0]["metrics"]] == ["FD-Pixels-30", "Recall-Pixels-30"]


def test_a_teacher_adds_its_rows_and_the_agreement(teacher: Denoiser, tmp_path: Path, measured: Measure) -> None:
    out = tmp_path / "r.json"
    options = ["--teacher", TEACHER, "--teacher-nfe", "3,5", "--metrics", "fd", "--out", out]
    found = measured("eval", TEACHER, "--data", "digits", "-n", 16, "--steps", "1,2", "--quiet", *options)
    assert [(row["solver"], row["nfe"]) for row in found["rows"]] == [("consistency", 1), ("consistency", 2)]
    assert [(row["solver"], row["nfe"]) for row in found["teacher"]["rows"]] == [("ode", 3), ("ode", 5)]
    assert found["teacher"]["model"] == found["model"] == TEACHER
    want = teacher_agreement(teacher, teacher, steps=(1, 2), samples=16)
    agreed = found["teacher_agreement"]
    assert agreed["nodes"] == want["nodes"] == 72
    assert [row["rms"] for row in agreed["rows"]] == pytest.approx([row["rms"] for row in want["rows"]], rel=1e-6)
    assert agreed["rows"][0]["rms"] > 0.1, "one step of a diffusion model is far from its ODE"
    assert json.loads(out.read_text()) == found
    slow = evaluate(teacher, "digits", steps=(3,), solver="ode", samples=16, metrics=("fd",))
    assert found["teacher"]["rows"][0]["metrics"] == slow["rows"][0]["metrics"]


def test_intervals_are_there_and_hold_their_numbers(measured: Measure) -> None:
    options = ["eval", TEACHER, "--data", "digits", "-n", 60, "--steps", "1,4", "--features", "pca:5", "--quiet"]
    found = measured(*options, "--metrics", "all")
    labels = {m.label for m in METRICS.values()} - {"IS", "ClassAgreement"}
    for row in found["rows"]:
        assert {name.removesuffix("-PCA5-60") for name in row["metrics"]} == labels
        for name, (low, high) in row["intervals"].items():
            assert low <= row["metrics"][name] <= high and low < high
        always = {f"{label}-PCA5-60" for label in ("FD", "FD-inf", "KID", "SW2", "Density")}
        assert always <= row["intervals"].keys()
    bare = measured(*options, "--metrics", "fd", "--replicates", 0)
    assert bare["rows"][0]["intervals"] == {}
    assert bare["rows"][0]["metrics"]["FD-PCA5-60"] == found["rows"][0]["metrics"]["FD-PCA5-60"]


def test_errors_of_the_evaluation_are_our_own(teacher: Denoiser) -> None:
    """Values that only Python can give."""
    for settings in ({"samples": 0}, {"steps": (0,)}, {"replicates": 1}, {"batch_size": 0}, {"features": "nope"}):
        with pytest.raises(FewstepError):
            evaluate(teacher, "digits", **{"samples": 16, "steps": (1,)} | settings)
