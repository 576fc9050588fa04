"""Text-conditional students out to plain diffusers: prompts in, fewstep's samples out."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.backbones.text import encoders_of
from fewstep.errors import CheckpointError, ConfigError
from fewstep.sampling import consistency_sample, jump_sample

WORKER = Path(__file__).resolve().parents[1] / "exports" / "worker.py"
PROMPTS, SEED = ["a red square", "a blue circle"], 7
CLASSES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
           "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}  # fmt: skip
JUMPS = (9.0, 2.0, 0.7)
Make = Callable[[str], tuple[Any, Path]]


def load_student(kind: str, folder: Path, sampler: Any = "consistency") -> fewstep.Denoiser:
    """The teacher as if it were a student; Flux says no size of its own."""
    from fewstep.checkpoint.diffusers import load_diffusers

    denoiser = load_diffusers(folder, side=8) if kind == "flux" else fewstep.load(folder)
    denoiser.sampler = sampler
    denoiser.sampler_times = {3: JUMPS} if sampler == "jump" else {}
    return denoiser


@pytest.fixture(scope="module")
def teachers(pipeline: Make, libraries: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders, each with a VAE: plain diffusers does not open a pipeline without."""
    found = {}
    for kind, channels in {"sd": 3, "sdxl": 3, "sd3": 4, "flux": 1}.items():
        found[kind] = tmp_path_factory.mktemp("whole") / kind
        shutil.copytree(pipeline(kind)[1], found[kind])
        libraries[1].AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, scaling_factor=0.7, shift_factor=0.1,
        ).save_pretrained(found[kind] / "vae")  # fmt: skip
        index = json.loads((found[kind] / "model_index.json").read_text())
        (found[kind] / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    return found


@pytest.fixture(scope="module")
def students(teachers: dict[str, Path]) -> dict[str, fewstep.Denoiser]:
    """Consistency students of every kind, and jumping ones with a table of betas and of a flow."""
    made = {kind: load_student(kind, teachers[kind]) for kind in CLASSES}
    return made | {f"{kind}-jump": load_student(kind, teachers[kind], "jump") for kind in ("sd", "sd3")}


@pytest.fixture(scope="module")
def folders(students: dict[str, fewstep.Denoiser], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their exports."""
    work = tmp_path_factory.mktemp("exports")
    return {name: fewstep.export(student, work / name) for name, student in students.items()}


def about_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "fewstep.json").read_text()))


@pytest.fixture(scope="module")
def theirs(
    students: dict[str, fewstep.Denoiser], folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """Plain diffusers in another process, called as the cards say."""
    work, requests = tmp_path_factory.mktemp("plain"), []
    for name, folder in folders.items():
        kind = name.partition("-")[0]
        for steps, call in about_of(folder)["calls"].items():
            given = {"prompt": PROMPTS, "output_type": "latent", "num_inference_steps": int(steps)} | call
            given |= {} if kind == "flux" else {"guidance_scale": 1.0}
            given |= {"height": 16, "width": 16} if kind == "flux" else {}
            out = str(work / f"{name}-{steps}.npy")
            requests.append({"folder": str(folder), "arguments": given, "seed": SEED, "out": out})
    (work / "requests.json").write_text(json.dumps(requests))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", WORKER, work / "requests.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return {Path(r["out"]).stem: torch.from_numpy(np.load(r["out"])) for r in requests}


@torch.no_grad()
def ours(student: fewstep.Denoiser, levels: list[float], start: float) -> Tensor:
    """fewstep's sampler on diffusers' noise, from ``start * T z``, for the prompts as packed rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        noise = [torch.randn(2, *student.sample_shape) for _ in levels]
    if "FluxTransformer" in str(student.spec):
        noise = [noise[0], *(packed_back(z) for z in noise[1:])]
    cond, model = encoders_of(student).encode(PROMPTS), student.under(fewstep.EDM())
    if student.sampler == "jump":
        return jump_sample(model, start * noise[0], levels, cond)
    return consistency_sample(model, start * noise[0], levels, lambda k: noise[k], cond)


def packed_back(z: Tensor) -> Tensor:
    """Flux's pipeline draws fresh noise for its tokens ``[b, (h/2)(w/2), 4c]``: as latents ``[b, c, h, w]``."""
    b, c, h, w = z.shape
    return z.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def start_of(name: str, top: float) -> float:
    if name.startswith(("sd3", "flux")):
        return (1 + top) / top
    return 1.0 if name.endswith("jump") else math.sqrt(1 + top**-2)


@pytest.mark.parametrize("name", [*(f"{kind}-{n}" for kind in CLASSES for n in (1, 2, 4)), "sd-jump-3", "sd3-jump-3"])
def test_prompts_are_sampled_as_here(
    name: str, students: dict[str, fewstep.Denoiser], folders: dict[str, Path], theirs: dict[str, Tensor]
) -> None:
    model, _, steps = name.rpartition("-")
    levels = about_of(folders[model])["levels"][steps]
    assert len(levels) == int(steps)
    wanted = ours(students[model], levels, start_of(model, levels[0]))
    found = theirs[name]
    if model == "flux":
        found = packed_back(found.reshape(wanted.shape))
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("kind", CLASSES)
def test_the_whole_pipeline_goes_along(kind: str, folders: dict[str, Path], students: dict[str, Any]) -> None:
    index = json.loads((folders[kind] / "model_index.json").read_text())
    assert index["_class_name"] == CLASSES[kind]
    assert (folders[kind] / "text_encoder" / "model.safetensors").is_file()
    card = (folders[kind] / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert '"a photo of a cat"' in card
    assert ("guidance_scale=1" in card) == (kind != "flux")


def test_two_plain_steps_of_a_flow_are_our_two(folders: dict[str, Path], students: dict[str, Any]) -> None:
    for kind in ("sd3", "flux"):
        about = about_of(folders[kind])
        assert about["plain"]["2"][0] is None
        assert about["plain"]["2"][1] == pytest.approx(about["sampler_times"]["2"][1], rel=1e-5)


def test_the_student_is_exported_not_its_teacher(
    students: dict[str, fewstep.Denoiser], tmp_path: Path, teachers: dict[str, Path]
) -> None:
    changed = students["sd"].clone()
    with torch.no_grad():
        changed.backbone.network.conv_out.bias.add_(1.0)  # type: ignore[union-attr,operator]
    fewstep.export(changed, tmp_path / "out")
    again, old = fewstep.load(tmp_path / "out"), fewstep.load(teachers["sd"])
    grown = again.backbone.network.conv_out.bias - old.backbone.network.conv_out.bias  # type: ignore[union-attr,operator]
    assert torch.allclose(grown, torch.ones(3), atol=1e-6)


def test_a_teacher_s_pipeline_that_is_gone(students: dict[str, fewstep.Denoiser], tmp_path: Path) -> None:
    lost = students["sd"].clone()
    lost.text = {"pipeline": str(tmp_path / "gone")}
    with pytest.raises(CheckpointError, match="whose VAE and text encoders belong to this student"):
        fewstep.export(lost, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_index(folder: Path, out: Path, **entries: Any) -> fewstep.Denoiser:
    """A student of a copy of the teacher whose index says something else once the student is there."""
    shutil.copytree(folder, out)
    student = load_student("sd", out)
    index = json.loads((out / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps(index | entries))
    return student


@pytest.mark.parametrize(
    "entries",
    [
        {"text_encoder": ["own_code", "Encoder"]},
        {"unet": ["own_code", "Network"]},
        {"_class_name": ["own_code", "Pipeline"]},
        {"image_encoder": ["os", "system"]},
        {"tokenizer": ["transformers"]},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_only_known_classes_are_opened(
    entries: dict[str, Any], teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its index names, the teacher's folder is not handed to diffusers before every entry is known."""
    diffusers = pytest.importorskip("diffusers")
    student, opened = with_index(teachers["sd"], tmp_path / "teacher", **entries), []
    for name, value in entries.items():
        for place in (tmp_path / "teacher", tmp_path / "teacher" / name):
            if place.is_dir():
                (place / f"{value[0]}.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *a, **k: opened.append(a))
    with pytest.raises(CheckpointError, match="names a part that is not known here"):
        fewstep.export(student, tmp_path / "out")
    assert opened == []


def test_code_beside_a_known_class_is_refused(teachers: dict[str, Path], tmp_path: Path) -> None:
    student = with_index(teachers["sd"], tmp_path / "teacher")
    (tmp_path / "teacher" / "text_encoder" / "transformers.py").write_text("raise SystemExit('run')")
    with pytest.raises(ConfigError, match="brings code of its own, which is not run"):
        fewstep.export(student, tmp_path / "out")


def test_the_vae_is_the_student_s(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Not what lies in the teacher's folder by now; where it was not loaded yet, its hash must fit."""
    from safetensors.torch import load_file, save_file

    from fewstep.backbones.vae import open_codec
    from fewstep.weights import tensors_hash

    student = with_index(teachers["sd"], tmp_path / "teacher")
    file = Path("vae", "diffusion_pytorch_model.safetensors")
    old = load_file(tmp_path / "teacher" / file)
    save_file({name: value + 1 for name, value in old.items()}, tmp_path / "teacher" / file)
    fewstep.export(student, tmp_path / "out")
    assert tensors_hash(load_file(tmp_path / "out" / file)) == tensors_hash(old)
    student.codec = open_codec(student.codec.description)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="is not the one that this model was trained with"):
        fewstep.export(student, tmp_path / "other")


def test_bars_are_left_as_they_were(students: dict[str, fewstep.Denoiser], tmp_path: Path) -> None:
    logging = pytest.importorskip("diffusers").utils.logging
    before = logging.is_progress_bar_enabled()
    try:
        for number, (wanted, switch) in enumerate(
            [(False, logging.disable_progress_bar), (True, logging.enable_progress_bar)]
        ):
            switch()
            fewstep.export(students["sd"], tmp_path / str(number))
            assert logging.is_progress_bar_enabled() is wanted
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
