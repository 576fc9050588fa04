"""torch.export programs and ONNX graphs: any batch, the model's own values, and code that samples without fewstep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import EDM, Denoiser, DiscreteVP, Parametrization
from fewstep.backbones import build
from fewstep.backbones.guided import with_guidance
from fewstep.backbones.two_time import with_landing
from fewstep.errors import ConfigError
from fewstep.exports import graph
from fewstep.exports.graph import Function, example_inputs
from fewstep.sampling import consistency_sample, jump_sample

SPECS: dict[str, dict[str, Any]] = {
    "edm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4]},
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "attention": [4], "num_classes": 3},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 2, "heads": 2},
}  # fmt: skip
Get = Callable[[str], Any]


def model(name: str) -> Denoiser:
    """A small network of that kind, no weight of which is zero; DiT predicts eps under a table of betas."""
    spec = {"name": name, "kwargs": SPECS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(spec)
        for parameter in backbone.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    table = DiscreteVP.linear() if name == "dit" else None
    parametrization = Parametrization("eps", time="native") if table else Parametrization("edm")
    classes = SPECS[name].get("num_classes", 0)
    return Denoiser(
        backbone, EDM(), parametrization, native=table, sample_shape=(1, 8, 8), num_classes=classes, spec=spec
    ).eval()


def two_time() -> Denoiser:
    student = with_landing(model("edm"))
    nn.init.normal_(student.backbone.landing.last.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr,arg-type]
    student.sampler = "jump"
    return student


def guided() -> Denoiser:
    student = with_guidance(model("unet"), 1.0, 3.0)
    nn.init.normal_(student.backbone.strength.last.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr,arg-type]
    return student


MAKERS: dict[str, Callable[[], Denoiser]] = {
    "unet": lambda: model("unet"),
    "dit": lambda: model("dit"),
    "two_time": two_time,
    "guided": guided,
}


@pytest.fixture(scope="module")
def programs(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Get:
    """``name -> (model, its torch export)``, exported once."""
    made: dict[str, tuple[Denoiser, Path]] = {}

    def get(name: str) -> tuple[Denoiser, Path]:
        if name not in made:
            denoiser = named(name, saved)
            made[name] = denoiser, fewstep.export(denoiser, tmp_path_factory.mktemp(name) / "out", "torch")
        return made[name]

    return get


def named(name: str, saved: Callable[[str], Path]) -> Denoiser:
    return fewstep.load(saved("eps")) if name == "diffusers" else MAKERS[name]()


def code_of(folder: Path) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def run_code(folder: Path, code: str) -> Tensor:
    """The images that a card's code makes, in a process that does not import fewstep."""
    code += "\nimport sys\nassert 'fewstep' not in sys.modules\nnp.save('x.npy', np.asarray(x))\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import numpy as np\n" + code],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.from_numpy(np.load(folder / "x.npy")).float()


@torch.no_grad()
def ours(denoiser: Denoiser, noise: list[Tensor], levels: list[float]) -> Tensor:
    """fewstep's sampler on that noise, with the conditions of the card's code."""
    n = len(noise[0])
    cond = torch.arange(n) % denoiser.num_classes if denoiser.num_classes else None
    edm = denoiser.under(EDM())
    if denoiser.sampler == "jump":
        return jump_sample(edm, noise[0], levels, cond, two_time=denoiser.two_time)

    def f(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return edm(x, t, cond, guidance=2.0 if denoiser.guided else None)

    return consistency_sample(f, noise[0], levels, lambda k: noise[k], cond)


@pytest.mark.parametrize("name", ["dit", "two_time", "guided", "diffusers"])
def test_a_program_is_the_model(name: str, programs: Get) -> None:
    """Bit for bit, at any batch size; its weights open as a model again.

    "two_time" is EDM's network, told where to land; "guided" the U-Net with labels, told how strongly they count.
    """
    denoiser, out = programs(name)
    about = json.loads((out / "fewstep.json").read_text())
    assert about["difference"] == 0.0
    program = torch.export.load(out / "program.pt2").module()
    function = Function(denoiser).eval()
    assert about["largest_batch"] == (63 if name == "diffusers" else None)
    for batch in (1, 3, 63 if name == "diffusers" else 70):
        given = example_inputs(denoiser, batch)
        assert list(given) == list(about["inputs"])
        with torch.no_grad():
            assert torch.equal(program(**given), function(**given)), batch
    given = example_inputs(denoiser, 4)
    for changed in given.keys() - {"x", "sigma"}:  # it listens to everything that it is told
        other = given | {changed: given[changed].roll(1, dims=0) if changed == "cond" else given[changed] * 0.5}
        assert not torch.allclose(program(**other), program(**given), atol=1e-4), changed
    again = Function(fewstep.load(out)).eval()
    with torch.no_grad():
        assert torch.equal(again(**given), function(**given))


@pytest.mark.parametrize("name", ["two_time", "guided"])
def test_the_program_s_code_samples(name: str, programs: Get) -> None:
    """As the card shows it; torch's generator is seeded before."""
    denoiser, out = programs(name)
    x = run_code(out, "import torch\ntorch.manual_seed(7)\n" + code_of(out))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        noise = [torch.randn(4, 1, 8, 8) for _ in range(2)]
    levels = json.loads((out / "fewstep.json").read_text())["sampler_times"]["2"]
    assert (x - ours(denoiser, noise, levels)).abs().max() <= 1e-4 * max(1.0, float(x.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "diffusers"])
def test_an_onnx_graph_is_the_model(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """At other batch sizes than it was traced with; sampled by the card's code, in numpy and without torch."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    denoiser = named(name, saved)
    out = fewstep.export(denoiser, tmp_path / "out", "onnx")
    about = json.loads((out / "fewstep.json").read_text())
    session = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    assert {i.name: [*i.shape] for i in session.get_inputs()} == about["inputs"]
    assert [o.name for o in session.get_outputs()] == ["x_0"]
    function = Function(denoiser).eval()
    for batch in (3, 70):
        given = example_inputs(denoiser, batch)
        [found] = session.run(None, {k: v.numpy() for k, v in given.items()})
        with torch.no_grad():
            wanted = function(**given)
        assert found.shape == tuple(wanted.shape)
        assert (torch.from_numpy(found) - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    code = code_of(out)
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    x = run_code(out, code + "\nimport sys\nassert 'torch' not in sys.modules\nassert images.dtype == np.uint8\n")
    draw = np.random.default_rng(0).standard_normal
    noise = [torch.from_numpy(draw((4, *denoiser.sample_shape))).float() for _ in range(2)]
    wanted = ours(denoiser, noise, about["sampler_times"]["2"])
    assert (x - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))


def test_searchsorted_is_counted() -> None:
    """ONNX has none: entries below each value, ties as torch has them."""
    table = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    values = torch.tensor([-3.0, -1.0, 0.2, 0.5, 1.9, 2.0, 9.0], dtype=torch.float64)
    for right in (False, True):
        assert torch.equal(
            graph._count_below(table, values, right=right), torch.searchsorted(table, values, right=right)
        )


def test_a_graph_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares with the model itself: another model's program is refused."""
    wrong, right = model("dit"), model("dit")
    with torch.no_grad():
        for parameter in wrong.parameters():
            parameter.mul_(1.01)
    trace = graph.trace
    monkeypatch.setattr(graph, "trace", lambda _denoiser: trace(wrong))
    with pytest.raises(ConfigError, match="disagrees with the model, and was not kept"):
        fewstep.export(right, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


class Counts(nn.Module):
    """A network that turns the batch into a number."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * torch.ones(len(x), 1, 1, 1)


class Branches(nn.Module):
    """A network that looks at the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.weight if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("kind", [Branches, Counts])
def test_a_network_that_cannot_be_traced(kind: type[nn.Module], tmp_path: Path) -> None:
    denoiser = Denoiser.from_module(kind(), process=EDM(), prediction="x0", sample_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match=r"cannot be traced with an open batch size.*not len\(x\)"):
        fewstep.export(denoiser, tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


class Timed(nn.Module):
    """A network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x) + 0.1 * t.reshape(-1, 1, 1, 1)


def test_a_network_of_one_s_own(tmp_path: Path) -> None:
    denoiser = Denoiser.from_module(Timed(), process=EDM(), prediction="x0", sample_shape=(1, 8, 8))
    out = fewstep.export(denoiser, tmp_path / "out", "torch")
    assert "was given without a directory" in (out / "README.md").read_text()
    again = fewstep.load(out, network=denoiser)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x, 1.0), denoiser(x, 1.0))


def test_onnx_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'fewstep\[onnx\]'"):
        fewstep.export(model("dit"), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
