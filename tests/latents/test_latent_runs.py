"""A model of latents from the first step to the last picture: pretrain, tune, sample, eval, dial, resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fewstep
from fewstep.backbones.vae import VaeCodec, codec_of
from fewstep.checkpoint.model import latest_checkpoint
from fewstep.checkpoint.store import read_tensors
from fewstep.cli import main
from fewstep.data.sources import ArraySource
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.features import features_of, open_features
from fewstep.evaluation.metrics import frechet_distance, gaussian_stats
from fewstep.evaluation.record import read_history
from fewstep.evaluation.samples import draw_labels
from fewstep.training.loop import Watcher
from fewstep.training.trainer import StepReport, Trainer

Encoded = list[int]
COUNT = 96
COMMON: dict[str, Any] = {
    "images": 256, "batch_size": 16, "seed": 3, "optim.lr": 1e-3, "emas": [{"kind": "constant", "beta": 0.9}],
    "output.log_images": 64, "output.checkpoint_images": 64, "output.sample_images": 128, "output.grid": 4,
    "eval.samples": 32, "eval.steps": [1, 2], "eval.teacher_nfe": [3], "eval.features": "pixels",
}  # fmt: skip
TUNE = COMMON | {"objective.schedule.images": 64}


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def encoded() -> Iterator[Encoded]:
    """How many images each call of a VAE encoded."""
    calls: Encoded = []
    with pytest.MonkeyPatch.context() as patch:
        before = VaeCodec.encode

        def encode(self: VaeCodec, images: Tensor) -> Tensor:
            calls.append(len(images))
            return before(self, images)

        patch.setattr(VaeCodec, "encode", encode)
        yield calls


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 smooth pictures of 8x8 RGB in three classes, as an npz."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(COUNT, 3, 2, 2, generator=generator)
    x = (torch.nn.functional.interpolate(small, (8, 8), mode="bilinear") * 255).byte()
    path = tmp_path_factory.mktemp("photos") / "photos.npz"
    np.savez(path, images=x.permute(0, 2, 3, 1).numpy(), labels=np.arange(COUNT) % 3)
    return path


@pytest.fixture(scope="module")
def teacher(photos: Path, pipeline: Path, module_cache: Path, encoded: Encoded) -> Path:
    """A class-conditional U-Net of latents; the reference of its table is made of pictures."""
    out = module_cache / "teacher"
    network = {"model.vae": str(pipeline), "model.kwargs": {"channels": 8, "blocks": 1}, "model.conditional": True}
    notes = Notes()
    fewstep.pretrain(
        photos, out=out, overrides=COMMON | network | {"data.cache": str(module_cache)}, device="cpu", watcher=notes
    )
    assert sum(encoded) == COUNT and notes.seen[-1] == (COUNT, COUNT)
    assert "mean" in notes.said[0] and "standard deviation" in notes.said[0]
    return out


@pytest.fixture(scope="module")
def tune(teacher: Path, photos: Path, module_cache: Path) -> Callable[..., fewstep.Run]:
    def run(out: Path, watcher: Watcher | None = None, **more: Any) -> fewstep.Run:
        settings = TUNE | {"data.cache": str(module_cache)} | more
        return fewstep.tune(
            teacher, photos, out=out, objective="ect", overrides=settings, device="cpu", watcher=watcher
        )

    return run


@pytest.fixture(scope="module")
def whole(tune: Callable[..., fewstep.Run], encoded: Encoded, module_cache: Path) -> fewstep.Run:
    before = sum(encoded)
    run = tune(module_cache / "tuned")
    assert sum(encoded) == before  # the teacher's latents were kept
    return run


class Notes(Watcher):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.seen: list[tuple[int, int]] = []

    def noted(self, text: str) -> None:
        self.said.append(text)

    def preparing(self, what: str, done: int, total: int) -> None:
        self.seen.append((done, total))


class Stop(Exception):
    """Something outside ends the run."""


class StopAt(Watcher):
    def __init__(self, images: int) -> None:
        self.images = images

    def stepped(self, report: StepReport) -> None:
        if report.progress.images_seen == self.images:
            raise Stop


# ---- training
def test_the_teacher_is_a_model_of_latents(teacher: Path, pipeline: Path) -> None:
    model = fewstep.load(teacher)
    assert model.sample_shape == (2, 4, 4) and model.num_classes == 3 and model.codec is not None
    assert model.codec.description["folder"] == str((pipeline / "vae").resolve())
    facts = json.loads((teacher / "report.json").read_text())["facts"]
    assert facts["dataset"] == {"count": COUNT, "shape": [3, 8, 8]}
    assert facts["latents"]["std"] > 0


def test_training_sees_the_latents(teacher: Path, photos: Path, module_cache: Path) -> None:
    model, source = fewstep.load(teacher), fewstep.open_source(str(photos))
    batches: list[Tensor] = []

    class Look(Watcher):
        def started(self, trainer: Trainer, run: Path) -> None:
            batches.append(trainer.source.read(np.arange(COUNT)))
            raise Stop

    with pytest.raises(Stop):
        fewstep.tune(model, photos, out=module_cache / "look", overrides=TUNE | {"data.cache": str(module_cache)},
                     objective="ect", device="cpu", watcher=Look())  # fmt: skip
    assert model.codec is not None
    want = model.codec.encode(source.read(np.arange(COUNT)))
    torch.testing.assert_close(batches[0], want, rtol=0, atol=1e-5)


def test_pictures_and_tables_are_of_decoded_images(whole: fewstep.Run, photos: Path) -> None:
    grids = sorted((whole.path / "samples").glob("images-*.png"))
    assert len(grids) == 4  # at 128 and 256 images, in 1 and 2 steps
    with Image.open(grids[0]) as picture:
        assert picture.mode == "RGB"
    assert whole.results is not None
    tuned, model = whole.results["tuned"], whole.model()
    assert tuned["reference"]["preprocessing"]["shape"] == [3, 8, 8]
    source = fewstep.open_source(str(photos))
    cond = draw_labels(model, source, 32, 3)
    assert model.codec is not None
    images = model.codec.decode(fewstep.sample(model, 32, steps=2, seed=3, cond=cond))
    net = open_features("pixels", reference=images)
    mine = features_of(net, images)
    real = features_of(net, source.read(np.arange(COUNT)))
    want = frechet_distance(gaussian_stats(mine), gaussian_stats(real))
    (found,) = [row["metrics"]["FD-Pixels-32"] for row in tuned["rows"] if row["nfe"] == 2]
    assert found == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [16, 144])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tune: Callable[..., fewstep.Run], whole: fewstep.Run, tmp_path: Path, stop: int, encoded: Encoded
) -> None:
    with pytest.raises(Stop):
        tune(tmp_path / "run", StopAt(stop), **{"eval.samples": 0})
    before = sum(encoded)
    fewstep.resume(tmp_path / "run", device="cpu")
    assert sum(encoded) == before
    for name in ("student", "ema-0", "optimizer"):
        mine, theirs = (read_tensors(latest_checkpoint(p) / f"{name}.safetensors")
                        for p in (tmp_path / "run", whole.path))  # fmt: skip
        assert mine.keys() == theirs.keys()
        assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []
    losses = [[row["loss"] for row in read_history(p)] for p in (tmp_path / "run", whole.path)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_pretraining_run_goes_on_without_its_latents(
    photos: Path, pipeline: Path, teacher: Path, module_cache: Path, tmp_path: Path, encoded: Encoded
) -> None:
    network = {"model.vae": str(pipeline), "model.kwargs": {"channels": 8, "blocks": 1}, "model.conditional": True}
    settings = COMMON | network | {"data.cache": str(tmp_path / "cache"), "eval.samples": 0}
    with pytest.raises(Stop):
        fewstep.pretrain(photos, out=tmp_path / "run", overrides=settings, device="cpu", watcher=StopAt(80))
    for file in (tmp_path / "cache").rglob("*"):
        if file.is_file():
            file.unlink()
    before = sum(encoded)
    fewstep.resume(tmp_path / "run", device="cpu")
    assert sum(encoded) == before + COUNT  # the cache may be deleted at any time
    mine, theirs = (read_tensors(p / "model" / "model.safetensors") for p in (tmp_path / "run", teacher))
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []


# ---- the command line
def test_sample_writes_decoded_pictures(whole: fewstep.Run, tmp_path: Path) -> None:
    assert main(["sample", str(whole.path), "-n", "6", "--steps", "2", "--out", str(tmp_path / "x.npz"), "-q"]) == 0
    with np.load(tmp_path / "x.npz") as archive:
        images = archive["images"]
    model = whole.model()
    assert model.codec is not None
    want = model.codec.decode(fewstep.sample(model, 6, steps=2, cond=torch.arange(6) % 3))
    assert np.array_equal(images, want.permute(0, 2, 3, 1).numpy())
    assert main(["sample", str(whole.path), "-n", "4", "--out", str(tmp_path / "x.png"), "-q"]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 * (64 + 2) + 2,) * 2


def test_eval_compares_pictures(
    whole: fewstep.Run, photos: Path, capsys: pytest.CaptureFixture[str], teacher: Path
) -> None:
    arguments = ["eval", str(whole.path), "--data", str(photos), "-n", "32", "--features", "pixels", "--steps", "2",
                 "--seed", "3", "--teacher", str(teacher), "--teacher-nfe", "3", "--json", "-q"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert whole.results is not None
    (want,) = [row["metrics"]["FD-Pixels-32"] for row in whole.results["tuned"]["rows"] if row["nfe"] == 2]
    assert result["rows"][0]["metrics"]["FD-Pixels-32"] == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_dial_judges_pictures(
    whole: fewstep.Run, photos: Path, teacher: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["dial", str(whole.path), "--data", str(photos), "--teacher", str(teacher), "--steps", "2", "-n", "32",
                 "--budget", "6", "--features", "pixels", "--commit", "--out", str(tmp_path),
                 "--json", "-q"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"] == "FD-Pixels-32" and len(result["commit"]) > 2
    assert result["reference"]["preprocessing"]["shape"] == [3, 8, 8]


@pytest.mark.parametrize(
    ("options", "remedy"), [(["--resize", "16"], "--resize 8"), (["--channels", "1"], "--channels 3")]
)
def test_pictures_of_another_size_are_refused_with_the_remedy(
    teacher: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], remedy: str
) -> None:
    for verb in (["tune", str(teacher), "--out", str(tmp_path / "run")], ["eval", str(teacher)]):
        assert main([*verb, "--data", str(photos), *options, "-q"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"Add {remedy}" in said and "(3, 8, 8)" in said


def test_a_vae_that_cannot_read_the_pictures_says_so(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    grey = fewstep.open_source(str(photos), channels=1)
    with pytest.raises(DataError, match="--channels 3"):
        fewstep.pretrain(grey, out=tmp_path / "run", overrides=COMMON | {"model.vae": str(pipeline)}, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.flip": True}, "mirrored image"),
        ({"objective.levers.distance.net": "transforms:NOWHERE"}, "makes latents"),
    ],
)
def test_settings_about_pixels_are_refused(
    tune: Callable[..., fewstep.Run], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        tune(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_latents_of_an_odd_scale_are_worth_a_word(
    photos: Path, make_vae: Callable[..., Any], tmp_path: Path, module_cache: Path
) -> None:
    said = {}
    for scale in (1.0, 100.0):
        make_vae(seed=4).save_pretrained(tmp_path / "vae")
        notes = Notes()
        std = measured(photos, tmp_path / "vae")
        make_vae(seed=4, scaling_factor=0.18215 * scale / std).save_pretrained(tmp_path / f"vae{scale}")
        settings = COMMON | {"model.vae": str(tmp_path / f"vae{scale}"), "model.sigma_data": 1.0,
                             "model.kwargs": {"channels": 8, "blocks": 1}, "data.cache": str(module_cache),
                             "images": 16, "eval.samples": 0}  # fmt: skip
        fewstep.pretrain(photos, out=tmp_path / f"run{scale}", overrides=settings, device="cpu", watcher=notes)
        said[scale] = notes.said
    assert len(said[1.0]) == 1 and "standard deviation 1." in said[1.0][0]
    assert "Caution" in said[100.0][1] and "--set model.sigma_data=1e+02" in said[100.0][1]


def measured(photos: Path, folder: Path) -> float:
    """Standard deviation of the latents."""
    source = fewstep.open_source(str(photos))
    return float(codec_of(folder).encode(source.read(np.arange(COUNT))).std())


def test_a_source_object_is_encoded_too(teacher: Path, tmp_path: Path, module_cache: Path) -> None:
    x = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    source = ArraySource("mine", x, np.arange(20) % 3)
    settings = TUNE | {"images": 16, "eval.samples": 0, "data.cache": str(module_cache)}
    run = fewstep.tune(teacher, source, out=tmp_path / "run", objective="ect", overrides=settings, device="cpu")
    assert run.model().sample_shape == (2, 4, 4)
    with pytest.raises(DataError, match="want|Wanted"):
        fewstep.tune(
            teacher, ArraySource("other", x[:, :1], np.arange(20) % 3), out=tmp_path / "other", device="cpu",
            objective="ect",
        )  # fmt: skip
