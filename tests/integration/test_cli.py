"""The command line as a user meets it: every verb, its files, its JSON, its help."""

from __future__ import annotations

import json
import os
import pickle
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from fewstep import EDM, RECIPES, Denoiser, Parametrization, load, sample, save_model
from fewstep.backbones import build
from fewstep.checkpoint.store import read_tensors
from fewstep.cli import VERBS, main
from fewstep.config import to_dict

SOURCES = Path(__file__).resolve().parents[2] / "src"
ALL_VERBS = [verb for verbs in VERBS.values() for verb in verbs]
QUICK = ["--images", "64", "--batch-size", "32", "--device", "cpu"]
SMALL = [
    "--set",
    "eval.samples=16",
    "eval.steps=[1,2]",
    "eval.teacher_nfe=[2]",
    "output.grid=4",
    "output.log_images=32",
]
Fewstep = Callable[..., dict[str, Any]]


@pytest.fixture
def fewstep(capsys: pytest.CaptureFixture[str]) -> Fewstep:
    """``fewstep("sample", run, ...)`` with --json: what it printed on stdout, parsed; it must succeed."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return run


@pytest.fixture(scope="module")
def run_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short tuned run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["tune", str(tiny_path), "--data", "digits", "--out", str(out), "-q", *QUICK, *SMALL]) == 0
    return out


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 3 classes whose output depends on the class."""
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1], "blocks": 1,
                                       "num_classes": 3}}  # fmt: skip
    backbone = build(spec)
    generator = torch.Generator().manual_seed(1)
    for parameter in backbone.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model = Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), num_classes=3, spec=spec)
    path = tmp_path_factory.mktemp("conditional") / "model"
    save_model(model, path)
    return path


def images_of(path: Path) -> np.ndarray:
    with np.load(path) as file:
        key = "points" if "points" in file else "images"
        return np.array(file[key])


# ------------------------------------------------------------------------------------------------ help
def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = "import sys; from fewstep.cli import main; main(['--help']); print([m for m in sys.modules if '.' not in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1]
    assert "'fewstep'" in loaded
    assert not {"torch", "numpy", "matplotlib", "PIL"} & set(re.findall(r"'(\w+)'", loaded))


def test_help_names_every_verb_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert sorted(ALL_VERBS) == sorted(
        [
            "demo",
            "recipes",
            "plan",
            "convert",
            "pretrain",
            "generate",
            "tune",
            "resume",
            "merge",
            "sample",
            "eval",
            "dial",
            "report",
            "export",
            "scaling",
        ]
    )
    for verb in ALL_VERBS:
        assert re.search(rf"│ {verb} +[A-Z]\w+ ", text), verb
    assert "Exit codes" in text


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_help_of_a_verb_has_an_example_that_is_valid(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "For example:" in text
    assert re.search(rf"\n fewstep {verb}\b", text)


# --------------------------------------------------------------------------------- tune, pretrain, demo
def test_pretrain_then_tune_then_resume(tmp_path: Path, fewstep: Fewstep) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    network = "model.kwargs={channels: 8, multipliers: [1], blocks: 1}"
    first = fewstep("pretrain", "--data", "digits", "--out", teacher, *QUICK, *SMALL, network)
    assert first["model"] == str(teacher / "model")
    assert [row["nfe"] for row in first["results"]["teacher (diffusion)"]["rows"]] == [2]
    second = fewstep("tune", teacher, "--data", "digits", "--out", run, *QUICK, *SMALL)
    assert [row["steps"] for row in second["results"]["tuned"]["rows"]] == [1, 2]
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "model/config.json",
        "report.html",
        "results.json",
        "checkpoints/latest",
    ):
        assert (run / name).is_file(), name
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["images"], config["batch_size"], config["teacher"]) == (64, 32, str(teacher))
    before = read_tensors(run / "model" / "model.safetensors")
    third = fewstep("resume", run, "--device", "cpu")
    after = read_tensors(run / "model" / "model.safetensors")
    assert third["run"] == str(run)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_settings_later_beat_earlier(tiny_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    """recipe < --config < --set < an option of its own."""
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 3.0e-4, clip: 2.0}\nimages: 96\nseed: 4\n")
    run = tmp_path / "run"
    fewstep("tune", tiny_path, "--data", "digits", "--out", run, "--recipe", "fast", "--config", file, *QUICK, *SMALL,
            "optim.lr=5e-4", "--seed", 7)  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["optim"]["lr"] == 5e-4
    assert config["optim"]["clip"] == 2.0
    assert (config["images"], config["seed"]) == (64, 7)
    assert config["objective"]["schedule"]["q"] == to_dict(RECIPES["fast"])["objective"]["schedule"]["q"]


def test_demo_runs_and_continues(tmp_path: Path, fewstep: Fewstep) -> None:
    small = ["images=128", "batch_size=64", "output.sample_images=0", "output.log_images=64"]
    made = fewstep("demo", "--out", tmp_path / "demo", "--device", "cpu", *SMALL, *small)
    assert (tmp_path / "demo" / "report.html").is_file()
    (tmp_path / "demo" / "report.html").unlink()
    again = fewstep("demo", "--out", tmp_path / "demo", "--device", "cpu")
    metrics = [[row["metrics"] for row in found["results"]["tuned"]["rows"]] for found in (made, again)]
    assert metrics[0] == metrics[1]


def test_without_a_terminal_there_are_lines_and_stdout_is_empty(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", str(tiny_path), "--data", "digits", "--out", str(tmp_path / "run"), "--recipe", "fast"]
    assert main([*arguments, *QUICK, *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"images +32 +stage 0 r/t 0\.\d+  fp32  loss [\d.e+-]+  \d+ images/s\n", err)
    assert re.search(r"images +64 +stage 0", err)
    assert "Next: fewstep sample" in err
    assert "\x1b" not in err


def test_quiet_is_silent_and_json_is_alone_on_stdout(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in (("a", ["-q"]), ("b", ["--json"]), ("c", ["-q", "--json"])):
        arguments = ["tune", str(tiny_path), "--data", "digits", "--out", str(tmp_path / name), *flags, *QUICK]
        assert main([*arguments, "--set", "eval.samples=0"]) == 0
        out, err = capsys.readouterr()
        assert (err == "") == ("-q" in flags)
        assert (out == "") == ("--json" not in flags)
        if out:
            assert json.loads(out)["run"] == str(tmp_path / name)


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_a_live_bar(columns: int, tiny_path: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(SOURCES), "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    arguments = ["tune", str(tiny_path), "--data", "digits", "--out", str(tmp_path / "run"), "--images", "640",
                 "--batch-size", "32", "--device", "cpu", "--set", "eval.samples=0",
                 "output.log_images=32"]  # fmt: skip
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-m", "fewstep", *arguments], os.environ | env)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    kind, speed = ("", r"\d+/s") if columns == 80 else (" +fp32", r"\d+ images/s")
    line = rf"━ +640/640 images part 2 stage 0 r/t 0\.\d{{4}}{kind} +loss [\d.e+-]+ +{speed} +\d\d:\d\d"
    assert re.search(line, frames), frames[-2000:]
    assert max(len(frame) for frame in re.split(r"[\r\n]+", frames)) <= columns


# ---------------------------------------------------------------------------------------------- sample
def test_sample_to_a_picture_an_archive_and_a_folder(run_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    fewstep("sample", run_path, "--out", tmp_path / "x.png", "-n", 4)
    fewstep("sample", run_path, "--out", tmp_path / "x.npz", "-n", 4)
    fewstep("sample", run_path, "--out", tmp_path / "x", "-n", 4)
    archive = images_of(tmp_path / "x.npz")
    assert archive.shape[0] == 4
    assert archive.dtype == np.uint8
    assert archive.std() > 0
    files = sorted((tmp_path / "x").glob("*.png"))
    assert [np.asarray(Image.open(f)).tolist() for f in files] == archive.reshape(4, 8, 8).tolist()
    with Image.open(tmp_path / "x.png") as grid:
        assert grid.size >= (16, 16)


def test_sample_is_the_python_function(run_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    said = fewstep("sample", run_path, "--out", tmp_path / "x.npz", "-n", 3, "--steps", 2, "--seed", 5)
    x = sample(load(run_path), 3, steps=2, seed=5)
    wanted = ((x.clamp(-1, 1) + 1) * 127.5).round()
    got = torch.from_numpy(images_of(tmp_path / "x.npz").reshape(3, 1, 8, 8).astype(np.float32))
    assert (got - wanted).abs().max() <= 1
    assert (said["nfe"], said["seed"], said["number"], said["times"]) == (2, 5, 3, [80.0, 0.821])


def test_sample_i_depends_on_the_seed_and_on_i_alone(run_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    def draw(name: str, *options: object) -> np.ndarray:
        fewstep("sample", run_path, "--out", tmp_path / name, *options)
        return images_of(tmp_path / name)

    seven = draw("a.npz", "-n", 7, "--steps", 2)
    assert np.array_equal(draw("b.npz", "-n", 7, "--steps", 2), seven)
    assert np.array_equal(draw("c.npz", "-n", 3, "--steps", 2), seven[:3])
    assert not np.array_equal(draw("d.npz", "-n", 7, "--steps", 2, "--seed", 1), seven)
    assert not np.array_equal(draw("e.npz", "-n", 7, "--steps", 1), seven)
    near = draw("f.npz", "-n", 7, "--steps", 2, "--batch-size", 2).astype(int) - seven.astype(int)
    assert abs(near).max() <= 1


def test_sample_times_and_the_teachers_solver(run_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    times = fewstep("sample", run_path, "--out", tmp_path / "a.npz", "-n", 3, "--times", "80,0.821")
    two = fewstep("sample", run_path, "--out", tmp_path / "b.npz", "-n", 3, "--steps", 2)
    other = fewstep("sample", run_path, "--out", tmp_path / "c.npz", "-n", 3, "--times", "40,2,0.3")
    ode = fewstep("sample", run_path, "--out", tmp_path / "d.npz", "-n", 3, "--steps", 3, "--sampler", "ode")
    assert (times["nfe"], two["nfe"], other["nfe"], ode["nfe"]) == (2, 2, 3, 3)
    assert (other["times"], ode["times"], ode["sampler"]) == ([40.0, 2.0, 0.3], None, "ode")
    assert np.array_equal(images_of(tmp_path / "a.npz"), images_of(tmp_path / "b.npz"))
    assert not np.array_equal(images_of(tmp_path / "a.npz"), images_of(tmp_path / "c.npz"))
    assert not np.array_equal(images_of(tmp_path / "c.npz"), images_of(tmp_path / "d.npz"))


def test_sample_labels_and_guidance(conditional: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    fewstep("sample", conditional, "--out", tmp_path / "all.npz", "-n", 7)
    fewstep("sample", conditional, "--out", tmp_path / "one.npz", "-n", 7, "--label", 1)
    guided = fewstep("sample", conditional, "--out", tmp_path / "g.npz", "-n", 7, "--label", 1, "--guidance", 3)
    every, one = images_of(tmp_path / "all.npz"), images_of(tmp_path / "one.npz")
    with np.load(tmp_path / "all.npz") as file:
        assert file["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert [np.array_equal(a, b) for a, b in zip(every, one, strict=True)] == [i % 3 == 1 for i in range(7)]
    assert guided["nfe"] == 2
    assert not np.array_equal(images_of(tmp_path / "g.npz"), one)


def test_sample_weights_of_a_run(run_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    for weights in ("ema", "ema-1", "student"):
        fewstep("sample", run_path, "--out", tmp_path / f"{weights}.npz", "-n", 2, "--weights", weights)
    latest = run_path / "checkpoints" / (run_path / "checkpoints" / "latest").read_text().strip()
    for weights in ("ema-1", "student"):
        tensors, model = read_tensors(latest / f"{weights}.safetensors"), load(run_path, weights=weights)
        assert all(torch.equal(v, tensors[k]) for k, v in model.backbone.state_dict().items())


def test_points(tmp_path: Path, fewstep: Fewstep) -> None:
    run = tmp_path / "points"
    network = ["model.backbone=mlp", "model.kwargs={width: 8, depth: 1}"]
    fewstep("pretrain", "--data", "gaussians8", "--out", run, *QUICK, "--set", "eval.samples=0", *network)
    fewstep("sample", run, "--out", tmp_path / "x.npz", "-n", 5, "--steps", 2)
    fewstep("sample", run, "--out", tmp_path / "x.png", "-n", 5)
    assert images_of(tmp_path / "x.npz").shape == (5, 2)
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 50


# ------------------------------------------------------------------------------------------------ eval
def test_eval_says_everything_about_its_numbers(run_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    out = tmp_path / "numbers.json"
    found = fewstep("eval", run_path, "--data", "digits", "--steps", "1,2,4", "-n", 32, "--seed", 3, "--out", out)
    assert json.loads(out.read_text()) == found
    assert found["features"]["name"] == "Pixels"
    assert re.fullmatch(r"[0-9a-f]{64}", found["features"]["hash"])
    assert (found["reference"]["source"], found["reference"]["count"]) == ("digits", 1797)
    assert (found["samples"], found["seed"], found["model"]) == (32, 3, str(run_path))
    assert [(row["steps"], row["nfe"], len(row["times"])) for row in found["rows"]] == [(1, 1, 1), (2, 2, 2), (4, 4, 4)]
    labels = ("FD", "KID", "SW2", "Precision", "Recall", "Density", "Coverage", "Memorised")
    names = {f"{label}-Pixels-32" for label in labels}
    assert all(set(row["metrics"]) == names for row in found["rows"])
    for row in found["rows"]:
        assert all(low <= row["metrics"][name] <= high for name, (low, high) in row["intervals"].items())
        assert {"FD-Pixels-32", "KID-Pixels-32", "SW2-Pixels-32"} <= set(row["intervals"])
    again = fewstep("eval", run_path, "--data", "digits", "--steps", 2, "-n", 32, "--seed", 3, "--metrics", "sw2,fd")
    assert list(again["rows"][0]["metrics"]) == ["SW2-Pixels-32", "FD-Pixels-32"]
    assert again["rows"][0]["metrics"]["FD-Pixels-32"] == found["rows"][1]["metrics"]["FD-Pixels-32"]
    solver = fewstep("eval", run_path, "--data", "digits", "--steps", 3, "-n", 32, "--sampler", "ode")
    assert [(row["solver"], row["nfe"], row["times"]) for row in solver["rows"]] == [("ode", 3, None)]


def test_eval_feature_nets(run_path: Path, tmp_path: Path, fewstep: Fewstep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TorchScript net and a callable that are the pixels give the numbers of the pixels."""
    (tmp_path / "my_net.py").write_text("def flat(x):\n    return x.flatten(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "net.pt"))
    values, hashes = {}, set()
    for spec in ("pixels", "pca:8", str(tmp_path / "net.pt"), "my_net:flat"):
        found = fewstep(
            "eval", run_path, "--data", "digits", "--steps", 1, "-n", 32, "--features", spec, "--metrics", "fd"
        )
        ((name, value),) = found["rows"][0]["metrics"].items()
        assert name == f"FD-{found['features']['name']}-32"
        values[spec] = value
        hashes.add(found["features"]["hash"])
    assert len(hashes) == 4
    assert values["my_net:flat"] == pytest.approx(values["pixels"], rel=1e-5)
    assert values[str(tmp_path / "net.pt")] == pytest.approx(values["pixels"], rel=1e-5)
    assert 0 < values["pca:8"] < values["pixels"]


# --------------------------------------------------------------------------------------------- convert
GOLDEN = {
    "edm_snapshot.pkl": "edm_snapshot_expected.npz",
    "edm_snapshot_numpy1.pkl": "edm_snapshot_expected.npz",
    "ect_snapshot.pkl": "ect_snapshot_expected.npz",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_convert_gives_the_peers_denoiser(name: str, shared: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    said = fewstep("convert", shared / "golden" / name, tmp_path / "model")
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert not Path("/tmp/fewstep_pwned").exists()
    with np.load(shared / "golden" / GOLDEN[name], allow_pickle=False) as file:
        e = {key: np.array(file[key]) for key in file.files}
    model = load(tmp_path / "model")
    assert said["parameters"] == sum(p.numel() for p in model.backbone.parameters())
    sigma = e["sigma"].astype(np.float64)
    noisy = e["x"] * np.sqrt(sigma.reshape(-1, 1, 1, 1) ** 2 + 0.25).astype(np.float32)
    labels = torch.from_numpy(e["class_labels"]) if "class_labels" in e else None
    with torch.no_grad():
        for kind, dtype, tolerance in (("D_f32", torch.float32, 2e-5), ("D_f64", torch.float64, 1e-9)):
            if kind not in e:
                continue
            cond = None if labels is None else labels.to(dtype)
            got = model.to(dtype)(torch.from_numpy(noisy).to(dtype), torch.from_numpy(sigma).to(dtype), cond)
            torch.testing.assert_close(got.double(), torch.from_numpy(e[kind]).double(), rtol=tolerance, atol=tolerance)
    assert "D_f64" in e


def test_convert_the_peers_loop(shared: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    golden = shared / "golden"
    fewstep("convert", golden / "ect_loop_network-snapshot-000001.pkl", tmp_path / "ema")
    fewstep("convert", golden / "ect_loop_training-state-000001.pt", tmp_path / "net")
    with np.load(golden / "ect_loop_expected.npz", allow_pickle=False) as e:
        for kind in ("ema", "net"):
            tensors = read_tensors(tmp_path / kind / "model.safetensors")
            wanted = {k.removeprefix(f"{kind}/model."): e[k] for k in e.files if k.startswith(f"{kind}/model.")}
            assert sorted(tensors) == sorted(wanted)
            assert all(np.array_equal(tensors[k].numpy(), v.astype(np.float32)) for k, v in wanted.items())
        with torch.no_grad():
            got = load(tmp_path / "ema")(torch.from_numpy(e["x"]), torch.from_numpy(e["sigma"]).flatten())
        wanted_d = torch.from_numpy(e["D_ema_f32"])
        assert (got - wanted_d).abs().max() < 2e-5 * wanted_d.abs().max()


def test_convert_refuses(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = shared / "golden"

    def refused(source: Path, target: str = "model") -> str:
        assert main(["convert", str(source), str(tmp_path / target)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err

    whole = (golden / "edm_snapshot.pkl").read_bytes()
    (tmp_path / "cut.pkl").write_bytes(whole[: len(whole) // 2])
    assert "cut.pkl' cannot be read as a checkpoint" in refused(tmp_path / "cut.pkl")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cut.pkl"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "already exists and is not empty" in refused(golden / "edm_snapshot.pkl", "full")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["mine"]


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"ema": _Hostile(tmp_path / "marker")}))
    assert main(["convert", str(tmp_path / "evil.pkl"), str(tmp_path / "model")]) == 2
    assert "mkdir" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["evil.pkl"]


# --------------------------------------------------------------------------------------- plan, recipes
def test_plan_counts_bytes(tiny_path: Path, run_path: Path, tmp_path: Path, fewstep: Fewstep) -> None:
    model = load(tiny_path)
    weights = sum(p.numel() * p.element_size() for p in model.backbone.parameters())
    arguments = ["plan", tiny_path, "--data", "digits", "--budget", "0.01", "--recipe", "fast", *QUICK, *SMALL]
    found = fewstep(*arguments)
    assert found["weights"] == found["gradients"] == weights
    assert found["optimizer"] == 2 * weights
    assert found["averages"] == 3 * weights
    assert (found["steps"], found["micro_batch"]) == (2, 32)
    assert found["activations"] > 0
    lasting = sum(found[name] for name in ("weights", "optimizer", "averages"))
    assert lasting + found["activations"] < found["memory"] < lasting + found["gradients"] + 1.5 * found["activations"]
    assert found["memory"] < found["room"] and found["remedies"] == {}
    assert found["seconds"] == pytest.approx(64 / found["images_per_second"])
    small = fewstep(*arguments, "micro_batch=8")
    assert small["micro_batch"] == 8
    assert small["activations"] * 4 == pytest.approx(found["activations"], rel=0.01)
    assert not (tmp_path / "run").exists()
    newest = run_path / "checkpoints" / (run_path / "checkpoints" / "latest").read_text().strip()
    on_disk = sum(f.stat().st_size for f in newest.glob("*.safetensors"))
    assert found["checkpoint"] == pytest.approx(on_disk, rel=0.25)  # headers weigh in so small a network
    assert found["disk"] >= 3 * found["checkpoint"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_print_yaml_that_config_reads(
    name: str, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fewstep.cli.options import overrides
    from fewstep.runs import configure

    assert main(["recipes", name]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    recipe = RECIPES[name]
    again = configure(recipe.job, None, None, overrides(file, None, None), recipe.data.source)
    assert to_dict(again) == to_dict(recipe)


def test_recipes_lists_all(capsys: pytest.CaptureFixture[str], fewstep: Fewstep) -> None:
    assert set(fewstep("recipes")) == set(RECIPES)
    assert main(["recipes"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert all(re.search(rf"^ {name} +(tune|pretrain) ", err, re.MULTILINE) for name in RECIPES)


def test_the_default_recipe_is_mid_unless_something_is_said_about_the_objective() -> None:
    from fewstep.runs import configure

    assert configure("tune", None, None, {}, "digits") == replace(
        RECIPES["mid"], data=replace(RECIPES["mid"].data, source="digits")
    )
    for objective, overrides in (("ect", {}), (None, {"objective.schedule.q": 4}), (None, {"objective.kind": "cd"})):
        assert configure("tune", None, objective, overrides, "digits").recipe == "fast"
    inherited = configure("tune", "mid", "ecd", {}, "digits").objective
    plain = RECIPES["fast"].objective
    assert (inherited.schedule, inherited.penalty, inherited.law) == (plain.schedule, plain.penalty, plain.law)
    assert configure("tune", "cifar10-1h", "meanflow", {}, "digits").student.sampler_times == {}
