"""Bad input: exit code 2 and one clear sentence, which the tests hold to its text; never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import EDM, Denoiser, Parametrization, save_model
from fewstep.backbones import build
from fewstep.cli import main

Check = Callable[..., str]
DIGITS = "tune TEACHER --data digits --out OUT --images 32 --batch-size 16 --device cpu"

CASES = {
    # data
    "no such data": (
        "tune TEACHER --data nowhere --out OUT",
        "There is no data source 'nowhere'. Known: digits, tiles",
    ),
    "a near name": ("tune TEACHER --data digts --out OUT", "Did you mean 'digits'?"),
    "empty folder": ("tune TEACHER --data DATA/empty --out OUT", "There are no images in 'folder:DATA/empty'"),
    "not an image": (
        "tune TEACHER --data DATA/text --out OUT",
        "The image '1.png' in 'folder:DATA/text' cannot be read: it is no image of a known kind",
    ),
    "cut image": (
        "tune TEACHER --data DATA/cut --out OUT",
        "The image '1.png' in 'folder:DATA/cut' cannot be read: image file is truncated",
    ),
    "mixed sizes": (
        "tune TEACHER --data DATA/mixed --out OUT",
        "The images differ in size. Got: '1.png' is 9x8, '0.png' is 8x8 (width x height). "
        "Give one size to all: --resize N",
    ),
    "channels": ("tune TEACHER --data DATA/rgb --out OUT", "Got: (3, 8, 8). Wanted: (1, 8, 8). Add --channels 1"),
    "resolution": ("tune TEACHER --data DATA/large --out OUT", "Got: (1, 16, 16). Wanted: (1, 8, 8). Add --resize 8"),
    "both": ("tune TEACHER --data tiles --out OUT", "Add --resize 8 --channels 1"),
    "points": ("tune TEACHER --data gaussians8 --out OUT", "Got: (2,). Wanted: (1, 8, 8)"),
    "later sources": ("tune TEACHER --data wds:mnist --out OUT", "'wds:' is not in this version"),
    "no test split": ("tune TEACHER --data digits --split test --out OUT", "'digits' has no split 'test'"),
    "channels 2": ("tune TEACHER --data digits --channels 2 --out OUT", "Got: 2. Wanted: 1 (grey) or 3 (RGB)"),
    "eval shape": ("eval TEACHER --data DATA/rgb", "Add --channels 1"),
    # teachers
    "no teacher": ("tune nope --data digits --out OUT", "'nope' does not exist. Wanted: a directory with config.json"),
    "not a teacher": (
        "tune DATA/empty --data digits --out OUT",
        "'DATA/empty' is not a model, a run or a converted checkpoint",
    ),
    "a pickle": ("tune DATA/x.pkl --data digits --out OUT", "Run: fewstep convert DATA/x.pkl DIRECTORY"),
    "newer": (
        "tune NEWER --data digits --out OUT",
        "'NEWER' was written in another version of the format. Got: version 99. Wanted: version 1",
    ),
    "cut weights": ("tune CUT --data digits --out OUT", "model.safetensors' is damaged or not a safetensors file"),
    "no function": ("tune DATA/net.py:missing --data digits --out OUT", "'DATA/net.py' has no function 'missing'"),
    "function raises": ("tune DATA/net.py:boom --data digits --out OUT", "net.py:boom' failed: RuntimeError: kaputt"),
    "function returns nonsense": (
        "tune DATA/net.py:three --data digits --out OUT",
        "net.py:three' did not return a Denoiser. Got: int. Return Denoiser.from_module(...)",
    ),
    "no file": ("tune DATA/none.py:f --data digits --out OUT", "does not name a function in a Python file"),
    "syntax": ("tune DATA/syntax.py:f --data digits --out OUT", "syntax.py:f' failed: SyntaxError"),
    # names and settings
    "recipe": (f"{DIGITS} --recipe fsat", "There is no recipe 'fsat'. Did you mean 'fast'?"),
    "recipe of the other verb": (f"{DIGITS} --recipe demo-teacher", "Run: fewstep pretrain --recipe demo-teacher"),
    "recipes": ("recipes fsat", "Did you mean 'fast'?"),
    "objective": (f"{DIGITS} --objective eect", "There is no objective 'eect'. Did you mean 'ect'?"),
    "path": (f"{DIGITS} --set optim.bteas=1", "There is no setting 'optim.bteas'. Did you mean 'betas'?"),
    "path of a value": (f"{DIGITS} --set optim.lr.x=1", "'optim.lr' is a single value"),
    "no value": (f"{DIGITS} --set optim", "An override is not of the form path=value. Got: optim"),
    "whole number": (f"{DIGITS} --set seed=abc", "'seed' has the wrong type. Got: 'abc'. Wanted: a whole number"),
    "number": (f"{DIGITS} --set optim.lr=fast", "'optim.lr' has the wrong type. Got: 'fast'. Wanted: a number"),
    "nan": (f"{DIGITS} --set optim.lr=.nan", "'optim.lr' has the wrong type. Got: nan. Wanted: a number"),
    "group": (f"{DIGITS} --set optim=3", "'optim' has the wrong type. Got: 3. Wanted: a mapping of settings"),
    "choice": (f"{DIGITS} --set precision=fp17", "'precision' is not one of its choices. Got: fp17"),
    "variant": (f"{DIGITS} --set objective.schedule.kind=foo", "Known: stages, continuous"),
    "kind of the root": (f"{DIGITS} --set kind=3", "There is no setting 'kind'"),
    "kind of a plain group": (f"{DIGITS} --set optim.kind=3", "There is no setting 'optim.kind'"),
    "bad YAML value": (f"{DIGITS} --set emas=[1", "The value of 'emas' is not readable as YAML: expected ',' or ']'"),
    "bad YAML": (
        f"{DIGITS} --config DATA/syntax.yaml",
        "syntax.yaml' is not readable as YAML: expected ',' or ']', but got ':' (line 2",
    ),
    "no YAML": (f"{DIGITS} --config none.yaml", "The configuration file 'none.yaml' does not exist"),
    "YAML list": (f"{DIGITS} --config DATA/list.yaml", "list.yaml' does not hold a mapping. Got: list"),
    "folder as YAML": (f"{DIGITS} --config DATA/empty", "DATA/empty' is not readable: Is a directory"),
    "job": (f"{DIGITS} --set job=pretrain", "These settings are for a run to pretrain. Got: job: pretrain"),
    # schedules and numbers
    "q": (
        f"{DIGITS} --set objective.schedule.q=1",
        "A stage schedule needs q > 1, otherwise r never approaches t. Got: 1",
    ),
    "stage of nothing": (f"{DIGITS} --set objective.schedule.images=0", "A stage must last at least one image. Got: 0"),
    "too tight": (f"{DIGITS} --set objective.schedule.last=99", "beyond what any precision resolves"),
    "std": (f"{DIGITS} --set objective.law.std=0", "The lognormal law of t needs std > 0. Got: 0"),
    "law without mass": (f"{DIGITS} --set objective.law={{kind: loguniform, low: 5, high: 5}}", "needs 0 < low < high"),
    "beta": (f"{DIGITS} --set emas=[{{kind: constant, beta: 2}}]", "The EMA's beta is outside [0, 1). Got: 2"),
    "no averages": (f"{DIGITS} --set emas=[]", "A run needs at least one moving average"),
    "batch": (
        "tune TEACHER --data digits --out OUT --batch-size 0",
        'Invalid value "0" for --batch-size. Must be >= 1',
    ),
    "images": ("tune TEACHER --data digits --out OUT --images 0", 'Invalid value "0" for --images. Must be >= 1'),
    "batch as a setting": (
        "tune TEACHER --data digits --out OUT --set batch_size=-1",
        "A batch needs at least one image. Got: batch_size=-1",
    ),
    "lr": (f"{DIGITS} --set optim.lr=-1", "The learning rate must be positive. Got: -1"),
    "times": (
        f"{DIGITS} --set student.sampler_times={{2: [0.8, 80]}}",
        "one noise level per step",
        "Wanted: decreasing levels",
    ),
    "times of nothing": (f"{DIGITS} --set student.sampler_times={{a: 3}}", "does not give one noise level per step"),
    "table steps": (f"{DIGITS} --set eval.steps=[0]", "The settings under 'eval' cannot be used"),
    "table samples": (f"{DIGITS} --set eval.samples=1", "samples: 0 (no table) or at least 2"),
    "table net": (f"{DIGITS} --set eval.features=foo", "There is no feature net 'foo'. Known: pixels, pca"),
    "device": ("tune TEACHER --data digits --out OUT --device foo", "'foo' is not a device. Wanted: cpu, cuda"),
    # pretrain
    "network of points": (
        "pretrain --data gaussians8 --out OUT",
        "for samples of shape (2,)",
        "--set model.backbone=mlp",
    ),
    "network of images": (
        "pretrain --data digits --out OUT --set model.backbone=mlp",
        "The network 'mlp' cannot be built",
    ),
    "backbone": ("pretrain --data digits --out OUT --set model.backbone=unt", "Did you mean 'unet'?"),
    "argument": ("pretrain --data digits --out OUT --set model.kwargs={chanels: 8}", "'chanels'"),
    "value": (
        "pretrain --data digits --out OUT --set model.kwargs={channels: -8}",
        "The network 'unet' cannot be built",
    ),
    "labels": (
        "pretrain --data DATA/grey --out OUT --set model.conditional=true",
        "the data has none. Got: folder:DATA/grey",
    ),
    "recipe to tune": ("pretrain --data digits --out OUT --recipe fast", "Run: fewstep tune --recipe fast"),
    # usage
    "flag": (f"{DIGITS} --recipee fast", "Unknown option: --recipee. Did you mean --recipe?"),
    "verb": ("tunne TEACHER", 'Unknown command "tunne". Did you mean "tune"?'),
    "no out": ("tune TEACHER --data digits", "--out requires an argument", "fewstep tune --help"),
    "no model": ("sample --out OUT", "MODEL requires an argument", "fewstep sample --help"),
    "type of a flag": ("sample TEACHER --out OUT --steps two", 'unable to convert "two" into int'),
    # out
    "out": (
        "tune TEACHER --data digits --out DATA/grey",
        "'DATA/grey' already exists and is not empty. Choose another --out",
    ),
    "out is a file": ("tune TEACHER --data digits --out DATA/x.pkl", "already exists"),
    # sample and eval
    "steps": ("sample TEACHER --out OUT --steps 0", 'Invalid value "0" for --steps. Must be >= 1'),
    "how many": ("sample TEACHER --out OUT -n 0", "Must be >= 1"),
    "batch of samples": ("sample TEACHER --out OUT --batch-size -2", "Must be >= 1"),
    "increasing": (
        "sample TEACHER --out OUT --times 0.8,80",
        "Got: [0.8, 80.0]. Wanted: decreasing noise levels in (0, 80], largest first",
    ),
    "to zero": ("sample TEACHER --out OUT --times 80,0", "The sampling times cannot be used"),
    "beyond": ("sample TEACHER --out OUT --times 100", "The sampling times cannot be used"),
    "words": ("sample TEACHER --out OUT --times high,low", "--times is not a list of numbers. Got: high,low"),
    "two ways": (
        "sample TEACHER --out OUT --times 80,1 --steps 3",
        "--times and --steps do not agree. Got: 2 times, --steps 3",
    ),
    "ode times": ("sample TEACHER --out OUT --times 80,1 --sampler ode", "--times does not go with --sampler ode"),
    "guided commit": (
        "sample COND --out OUT --guidance 2 --sampler ode --commit confidence",
        "--guidance does not go with --commit",
    ),
    "no classes": ("sample TEACHER --out OUT --label 1", "The model is not class-conditional. Got: --label 1"),
    "class": ("sample COND --out OUT --label 3", "There is no such class. Got: --label 3. Wanted: 0 to 2"),
    "guidance": ("sample TEACHER --out OUT --guidance 2", "Guidance needs a class-conditional model"),
    "weights": ("sample TEACHER --out OUT --weights student", "holds one set of weights only. Got: student"),
    "kind of file": ("sample TEACHER --out OUT.jpg", "Wanted: x.png, x.npz or a directory"),
    "labels of the data": ("tune COND --data digits --out OUT", "Got: 10 classes. Wanted: labels of at most 3 classes"),
    "no labels": ("tune COND --data DATA/grey --out OUT", "Got: no labels. Wanted: labels of at most 3 classes"),
    "eval steps": ("eval TEACHER --data digits --steps 1,x", "--steps is not a list of numbers. Got: 1,x"),
    "eval step 0": ("eval TEACHER --data digits --steps 0 -n 4", "The number of sampling steps must be at least 1"),
    "eval samples": ("eval TEACHER --data digits -n 1", "Must be >= 2"),
    "metric": ("eval TEACHER --data digits --metrics fid", "There is no metric 'fid'. Did you mean 'fd'?"),
    "no metric": ("eval TEACHER --data digits --metrics ,", "--metrics is empty"),
    "net": ("eval TEACHER --data digits --features foo", "There is no feature net 'foo'"),
    "axes": ("eval TEACHER --data digits --features pca:99", "pca:K with K from 1 to 64"),
    "net file": ("eval TEACHER --data digits --features nope.pt", "The weights file 'nope.pt'"),
    "net module": ("eval TEACHER --data digits --features nope.nope:f", "an importable 'nope.nope:f'"),
    # resume, convert
    "not a run": ("resume DATA/empty", "'DATA/empty' is not a run directory: it has no config.yaml"),
    "no pickle": ("convert none.pkl OUT", "'none.pkl' does not exist"),
    "a folder": ("convert DATA/empty OUT", "'DATA/empty' is not a file"),
    "not a pickle": ("convert DATA/net.py OUT", "is damaged or not a pickle"),
    "empty pickle": ("convert DATA/x.pkl OUT", "it is a pickle but holds no network"),
}


@pytest.fixture(scope="module")
def places(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good and bad data and models."""
    root = tmp_path_factory.mktemp("bad")
    data = root / "data"
    draw = np.random.default_rng(0)

    def picture(name: str, side: tuple[int, int] = (8, 8), channels: int = 1) -> Path:
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = side if channels == 1 else (*side, channels)
        Image.fromarray(draw.integers(0, 255, shape, dtype=np.uint8)).save(path)
        return path

    (data / "empty").mkdir(parents=True)
    for i in range(3):
        picture(f"grey/{i}.png")
        picture(f"mixed/{i}.png", (8, 8 + i % 2))
        picture(f"rgb/{i}.png", channels=3)
        picture(f"large/{i}.png", (16, 16))
        picture(f"text/{i}.png")
        picture(f"cut/{i}.png", (64, 64))
    (data / "text/1.png").write_text("no image")
    whole = (data / "cut/1.png").read_bytes()
    (data / "cut/1.png").write_bytes(whole[: len(whole) // 2])
    (data / "x.pkl").write_bytes(b"\x80\x04N.")
    (data / "net.py").write_text("def boom():\n    raise RuntimeError('kaputt')\ndef three():\n    return 3\n")
    (data / "syntax.py").write_text("def f(:\n")
    (data / "syntax.yaml").write_text("a: [1\nb: {")
    (data / "list.yaml").write_text("- 1\n")
    for name in ("newer", "cut"):
        shutil.copytree(tiny_path, root / name)
    description = json.loads((root / "newer/config.json").read_text())
    (root / "newer/config.json").write_text(json.dumps(description | {"version": 99}))
    weights = (root / "cut/model.safetensors").read_bytes()
    (root / "cut/model.safetensors").write_bytes(weights[: len(weights) // 2])
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1], "num_classes": 3}}
    parts = {"sample_shape": (1, 8, 8), "num_classes": 3, "spec": spec}
    torch.manual_seed(0)
    save_model(Denoiser(build(spec), EDM(), Parametrization("edm"), **parts), root / "cond")
    return {"DATA": data, "NEWER": root / "newer", "CUT": root / "cut", "COND": root / "cond", "TEACHER": tiny_path}


def sentence(text: str) -> str:
    """Without the box around usage errors and the line breaks in it."""
    return " ".join(re.sub("[╭╮╰╯─│]", " ", text).split())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Check:
    """``refused([...])``: the message, after exit code 2 with nothing on stdout and no traceback."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert "Internal failure" not in err
        return sentence(err)

    return run


def split(line: str) -> list[str]:
    """Words; what follows ``--set`` is one word."""
    head, flag, setting = line.partition(" --set ")
    return [*head.split(" "), "--set", setting] if flag else head.split(" ")


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(case: str, places: dict[str, Path], tmp_path: Path, refused: Check) -> None:
    line, *wanted = CASES[case]

    def fill(text: str) -> str:
        text = text.replace("OUT", str(tmp_path / "out"))
        for name, path in places.items():
            text = re.sub(rf"\b{name}\b", str(path), text)
        return text

    message = refused(*(fill(word) for word in split(line)))
    for part in wanted:
        assert fill(part) in message
    assert message.count("fewstep:") == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "zero"}, {"RANK": "-1"}, {"RANK": "5"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "x"},
     {"WORLD_SIZE": "2"}],
    ids=lambda v: "=".join(*v.items()),
)  # fmt: skip
def test_odd_environment(
    variables: dict[str, str], tiny_path: Path, tmp_path: Path, refused: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    message = refused("tune", tiny_path, "--data", "digits", "--out", tmp_path / "out")
    name, value = next(iter(variables.items()))
    assert f"{name}='{value}'" in message
    assert f"Run: unset {name}" in message
    assert not (tmp_path / "out").exists()


def test_resume_refuses_other_data(tiny_path: Path, places: dict[str, Path], tmp_path: Path, refused: Check) -> None:
    data = tmp_path / "data"
    shutil.copytree(places["DATA"] / "grey", data)
    arguments = ["tune", tiny_path, "--data", data, "--out", tmp_path / "run", "--images", 8, "--batch-size", 4]
    assert main([*map(str, arguments), "-q", "--device", "cpu", "--set", "eval.samples=0"]) == 0
    assert main(["resume", str(tmp_path / "run"), "-q"]) == 0, "a finished run is left as it is"
    (tmp_path / "run/report.html").unlink()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(data / "1.png")
    assert "The data is not what this run was started with" in refused("resume", tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").unlink()
    assert "has no checkpoint" in refused("resume", tmp_path / "run")


def test_tune_does_not_overwrite_a_run(whole: Path, tiny_path: Path, refused: Check) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    message = refused("tune", tiny_path, "--data", "digits", "--out", whole)
    assert f"Continue it with: fewstep resume {whole}" in message
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*")) == before


def test_out_of_memory_is_a_sentence(
    tiny_path: Path, tmp_path: Path, refused: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64000000000 bytes")

    monkeypatch.setattr("fewstep.runs.tune", fail)
    message = refused("tune", tiny_path, "--data", "digits", "--out", tmp_path / "out")
    assert "There is not enough memory. Try --set micro_batch=8" in message


def test_an_internal_failure_says_so_and_how_to_see_more(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fewstep.runs.tune", fail)
    arguments = ["tune", str(tiny_path), "--data", "digits", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "Internal failure: ZeroDivisionError: a bug. For the traceback: FEWSTEP_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("FEWSTEP_DEBUG", "1")
    assert main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err
