"""docs/teachers.md: every cell of its table is tried on a tiny teacher of that kind, and says what happened."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep import EDM, Denoiser, Parametrization, RectifiedFlow
from fewstep.backbones import build
from fewstep.data.sources import ArraySource
from fewstep.errors import ConfigError
from fewstep.objectives import Beside, StepRandom
from fewstep.randomness import Streams
from fewstep.runs import configure, make_trainer
from fewstep.training.config import RunConfig
from fewstep.training.student import make_student
from fewstep.types import Batch, Progress
from fewstep.world import World

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
COLUMNS = ("load", "teacher sampling", "ECT", "ECD", "LoRA", "guidance", "export")
CPU, ROWS = torch.device("cpu"), 4

_spec = importlib.util.spec_from_file_location("pipelines_of_diffusers", Path(__file__).with_name("test_diffusers.py"))
assert _spec is not None and _spec.loader is not None
_pipelines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_pipelines)
text, libraries, made = _pipelines.text, _pipelines.libraries, _pipelines.made
pytestmark = _pipelines.pytestmark

EDM_LIKE = {"img_resolution": 8, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "label_dim": 5}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "EDM, ECT (DDPM++, NCSN++)": ("edm", EDM_LIKE | {"in_channels": 3, "out_channels": 3, "attn_resolutions": [4]}),
    "ADM": ("adm", EDM_LIKE | {"in_channels": 3, "out_channels": 3, "attn_resolutions": [4]}),
    "EDM2": (
        "edm2", EDM_LIKE | {"img_channels": 3, "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8}
    ),
    "the library's U-Net": ("unet", {"sample_shape": [3, 8, 8], "num_classes": 5, "channels": 8, "blocks": 1}),
    "the library's DiT": ("dit", {"sample_shape": [3, 8, 8], "num_classes": 5, "width": 16, "depth": 1, "heads": 2}),
}  # fmt: skip
DIFFUSERS = {
    "`UNet2DModel`, eps, v or x0": "ddim",
    "`UNet2DModel`, EDM": "edm",
    "`UNet2DModel`, consistency": "consistency",
    "`DiTTransformer2DModel`": "dit",
    "`UNet2DConditionModel`, SD 1.x, 2.x": "sd",
    "`UNet2DConditionModel`, SDXL": "sdxl",
    "`SD3Transformer2DModel`": "sd3",
    "`FluxTransformer2DModel`": "flux",
}
MODULE = "your own `nn.Module`"
KINDS = (*OWN, MODULE, *DIFFUSERS)


class Mine(torch.nn.Module):
    """A network that nobody knows: flow prediction, no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Linear(1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + self.time(t[:, None])[:, :, None, None]


def made_folder(request: pytest.FixtureRequest, kind: str) -> Path:
    folder: Path = request.getfixturevalue("made")(kind)[1]
    return folder


def with_edm(request: pytest.FixtureRequest, work: Path) -> Path:
    """The class-conditional U-Net with EDM's scheduler."""
    folder = shutil.copytree(made_folder(request, "consistency"), work / "edm")
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.fixture
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Denoiser, Path | None]:
    """A teacher of the kind and, if it can be opened from disk, its folder."""
    kind = request.param
    if kind == MODULE:
        torch.manual_seed(0)
        own = Denoiser.from_module(Mine(), process=RectifiedFlow(), prediction="flow", sample_shape=(3, 8, 8))
        return own.eval(), None
    if kind in DIFFUSERS:
        folder = with_edm(request, tmp_path) if DIFFUSERS[kind] == "edm" else made_folder(request, DIFFUSERS[kind])
        return _pipelines.small(folder), folder
    name, kwargs = OWN[kind]
    spec = {"name": name, "kwargs": kwargs}
    torch.manual_seed(0)
    network = _pipelines.shaken(build(spec))
    found = Denoiser(network, EDM(), Parametrization("edm"), sample_shape=(3, 8, 8), num_classes=5, spec=spec).eval()
    fewstep.save_model(found, tmp_path / "model")
    return found, tmp_path / "model"


def said(teacher: Denoiser, rows: int) -> Tensor | None:
    """Conditions as rows, the last of which says nothing."""
    cond = _pipelines.any_condition(teacher, rows)
    told = teacher.condition(cond, rows)
    return None if told is None else torch.cat((told[:-1], teacher.condition(None, 1)))


def configured(objective: str, **settings: Any) -> RunConfig:
    short = {"images": 8, "batch_size": ROWS, "eval.samples": 0, "output.sample_images": 0}
    return configure("tune", "demo", objective, short | settings, "digits")


def tuned(teacher: Denoiser, config: RunConfig) -> tuple[Denoiser, Denoiser, Tensor]:
    """``(student, its start, mean loss)``: one step of the optimiser with the run's own objective and networks."""
    student = make_student(teacher, config)
    start = student.clone()
    images = torch.zeros(8, *teacher.sample_shape, dtype=torch.uint8)
    trainer = make_trainer(config, student, ArraySource("none", images, None), World(0, 1, CPU), teacher)
    x = torch.randn(ROWS, *teacher.sample_shape, generator=torch.Generator().manual_seed(1))
    random = StepRandom(Streams(0), torch.arange(ROWS), CPU)
    beside = Beside(trainer.beside.teacher, trainer.beside.companions)
    loss = trainer.objective.loss(
        trainer.student, Batch(x, said(teacher, ROWS)), Progress(4, 8), random, beside
    ).per_sample.mean()
    loss.backward()
    trainer.optimizer.step()
    return trainer.student, start, loss.detach()


def bits(model: Denoiser) -> list[Tensor]:
    return [p.detach().clone() for p in model.backbone.parameters()]


def moved(student: Denoiser, start: Denoiser) -> float:
    x_t = torch.randn(2, *student.sample_shape, generator=torch.Generator().manual_seed(2)) * 3
    with torch.no_grad():
        return float((student.under(EDM()).eval()(x_t, 3.0) - start.under(EDM()).eval()(x_t, 3.0)).abs().max())


def loads(teacher: Denoiser, folder: Path | None) -> str:
    if folder is None:
        return "in Python"
    again, x = (
        _pipelines.small(folder),
        torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(0)),
    )
    cond, t = said(teacher, 2), teacher.process.from_edm(torch.tensor([0.7, 3.0]))
    with torch.no_grad():
        assert torch.equal(again(x, t, cond), teacher(x, t, cond))
    return "yes"


def samples(teacher: Denoiser, folder: Path | None) -> str:
    cond = said(teacher, 3)
    three = fewstep.ode_sample(teacher, 3, steps=3, seed=1, cond=cond)
    one = fewstep.ode_sample(teacher, 1, steps=3, seed=1, cond=None if cond is None else cond[:1])
    scale = float(three.abs().max())
    torch.testing.assert_close(one[0] / scale, three[0] / scale, atol=1e-3, rtol=0)
    assert float((three[0] - three[1]).abs().max()) > 1e-2 * scale
    return "yes"


def trains(objective: str) -> Callable[[Denoiser, Path | None], str]:
    def run(teacher: Denoiser, folder: Path | None) -> str:
        before = bits(teacher)
        student, start, loss = tuned(teacher, configured(objective))
        assert torch.isfinite(loss) and loss > 0
        assert moved(student, start) > 1e-6
        assert all(map(torch.equal, before, bits(teacher)))
        return "yes"

    return run


def adapts(teacher: Denoiser, folder: Path | None) -> str:
    student, start, _ = tuned(teacher, configured("ecd", **{"adapter.kind": "lora", "adapter.rank": 2}))
    assert moved(start, teacher) == 0
    assert moved(student, start) > 1e-8
    assert sum(p.numel() for p in student.backbone.parameters() if p.requires_grad) > 0
    names = {name.rpartition(".")[2] for name, p in student.backbone.named_parameters() if p.requires_grad}
    assert all("lora" in name for name, p in student.backbone.named_parameters() if p.requires_grad), names
    return "yes"


def guides(teacher: Denoiser, folder: Path | None) -> str:
    config = configured("ecd", **{"objective.bridge.guidance": 1.0, "objective.bridge.guidance_max": 3.0})
    student, start, _ = tuned(teacher, config)
    assert student.guided and student.guidance_range == (1.0, 3.0)
    assert moved(start, teacher) == 0
    x, cond = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(0)), said(teacher, 3)
    assert cond is not None
    with torch.no_grad():
        weak, strong = (
            fewstep.Guided(teacher, w)(x, teacher.process.from_edm(torch.tensor(1.0)), cond[:2]) for w in (1, 3)
        )
    assert not torch.equal(weak, strong)
    return "yes"


def exports(teacher: Denoiser, folder: Path | None, work: Path) -> str:
    theirs = type(teacher.backbone).__name__ == "DiffusersNetwork"
    if theirs and teacher.parametrization.time != "quarter_log":
        fewstep.export(teacher, work / "pipeline")
        assert (work / "pipeline" / "model_index.json").is_file()
        return "diffusers"
    with pytest.raises(ConfigError, match="--to torch"):
        fewstep.export(teacher, work / "pipeline")
    fewstep.export(teacher, work / "program", to="torch")
    program = torch.export.load(work / "program" / "program.pt2")
    assert program is not None
    return "torch, onnx"


def cells() -> dict[str, dict[str, str]]:
    """The table of the page by row and column."""
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line[:1] == "|"
    ]
    head = next(i for i, row in enumerate(rows) if tuple(row[1:]) == COLUMNS)
    table = {}
    for row in rows[head + 2 :]:
        if len(row) != len(COLUMNS) + 1:
            break
        table[row[0]] = dict(zip(COLUMNS, (re.sub(r" \[\d\]$", "", cell) for cell in row[1:]), strict=True))
    return table


def test_the_page_has_every_kind() -> None:
    assert tuple(cells()) == KINDS


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("teacher", KINDS, indirect=True, ids=str)
def test_cell(teacher: Any, column: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, folder = teacher
    trials: dict[str, Callable[[Denoiser, Path | None], str]] = {
        "load": loads,
        "teacher sampling": samples,
        "ECT": trains("ect"),
        "ECD": trains("ecd"),
        "LoRA": adapts,
        "guidance": guides,
        "export": lambda m, f: exports(m, f, tmp_path),
    }
    try:
        found = trials[column](model, folder)
    except ConfigError:
        found = "-"
    kind = request.node.callspec.params["teacher"]
    assert found == cells()[kind][column], kind
