"""A text-conditional pipeline from load to PNG: tuned on captions, resumed to the same bits, sampled by prompt."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.backbones.text import TextEncoders, null_row, prompt_rows
from fewstep.checkpoint.store import read_tensors
from fewstep.cli import main
from fewstep.data.sources import captions_of
from fewstep.errors import DataError
from fewstep.evaluation.compute import forward_flops
from fewstep.evaluation.record import TUNED
from fewstep.training.loop import Watcher
from fewstep.training.prepared import _embedded
from fewstep.world import World

pytestmark = pytest.mark.slow
Make = Callable[[str], tuple[Any, Path]]
COLOURS = {"a red square": (200, 30, 30), "a blue circle": (30, 30, 200), "a green line": (30, 200, 30)}
SETTINGS = {
    "images": 64, "batch_size": 8, "micro_batch": 4, "seed": 1, "data.label_drop": 0.25,
    "objective.schedule.images": 32,
    "output.log_images": 16, "output.checkpoint_images": 32, "output.sample_images": 32, "output.grid": 4,
    "eval.samples": 12, "eval.steps": [1, 2], "eval.teacher_nfe": [2], "eval.features": "pixels",
}  # fmt: skip


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of three colours with metadata.jsonl."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    rows = []
    for i in range(24):
        text, colour = list(COLOURS.items())[i % 3]
        pixels = np.clip(np.array(colour) + generator.normal(0, 8, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Counted(Watcher):
    """Remembers what was prepared, and stops a run after some steps."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.prepared: list[tuple[str, int, int]] = []
        self.stop_at, self.steps = stop_at, 0

    def preparing(self, what: str, done: int, total: int) -> None:
        self.prepared.append((what, done, total))

    def stepped(self, report: Any) -> None:
        self.steps += 1
        if self.steps == self.stop_at:
            raise KeyboardInterrupt


def tuned(teacher: Path, photos: Path, out: Path, watcher: Watcher | None = None) -> fewstep.Run:
    return fewstep.tune(teacher, photos, out=out, recipe="fast", overrides=SETTINGS, watcher=watcher, device="cpu")


@pytest.fixture(scope="module")
def run(pipeline: Make, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned run of the SD kind."""
    out = tmp_path_factory.mktemp("runs") / "run"
    tuned(pipeline("sd")[1], photos, out, watcher := Counted())
    assert watcher.prepared == [("encoding captions", 0, 3), ("encoding captions", 3, 3)]
    return out


def test_the_whole_way(run: Path, pipeline: Make) -> None:
    model = fewstep.load(run)
    assert model.text == {"pipeline": str(pipeline("sd")[1])}
    assert [part.name for part in model.conditioning.parts] == ["text"]
    assert torch.allclose(model.condition(None, 1)[0], null_row(pipeline("sd")[1]))  # type: ignore[index]
    results = json.loads((run / "results.json").read_text())
    assert [row["steps"] for row in results[TUNED]["rows"]] == [1, 2]
    assert sorted(p.name for p in (run / "samples").glob("*-1step.png")) == [
        "images-000000032-1step.png", "images-000000064-1step.png",
    ]  # fmt: skip


def test_the_cache_is_used_without_the_encoders(run: Path, pipeline: Make, photos: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    cache = tmp_path / "cache"
    settings = SETTINGS | {"data.cache": str(cache), "images": 8, "eval.samples": 0, "output.sample_images": 0}
    teacher = fewstep.load(pipeline("sd")[1])
    fewstep.tune(teacher, photos, out=tmp_path / "first", recipe="fast", overrides=settings, device="cpu")
    assert len(list(cache.glob("*/manifest.json"))) == 1
    monkeypatch.setattr(TextEncoders, "encode", None)
    watcher = Counted()
    fewstep.tune(teacher, photos, out=tmp_path / "again", recipe="fast", overrides=settings, watcher=watcher,
                 device="cpu")  # fmt: skip
    assert watcher.prepared == []
    first, again = (read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_resumed_run_has_the_same_bits(run: Path, pipeline: Make, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(pipeline("sd")[1], photos, tmp_path / "stopped", Counted(stop_at=6))
    fewstep.resume(tmp_path / "stopped", device="cpu")
    whole, resumed = (read_tensors(path / "model" / "model.safetensors") for path in (run, tmp_path / "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_training_depends_on_the_captions(run: Path, pipeline: Make, photos: Path, tmp_path: Path) -> None:
    other = shutil.copytree(photos, tmp_path / "other")
    table = other / "metadata.jsonl"
    table.write_text(table.read_text().replace("red square", "blue line"))
    settings = SETTINGS | {"images": 16, "eval.samples": 0, "output.sample_images": 0}
    teacher = fewstep.load(pipeline("sd")[1])
    weights = [
        read_tensors(
            fewstep.tune(teacher, data, out=tmp_path / name, recipe="fast", overrides=settings, device="cpu").path
            / "model" / "model.safetensors"
        )
        for name, data in (("one", photos), ("two", other))
    ]  # fmt: skip
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_data_without_captions_are_refused(pipeline: Make, photos: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(photos, tmp_path / "bare", ignore=shutil.ignore_patterns("*.jsonl"))
    with pytest.raises(DataError, match=r"told a text for every image.*metadata\.jsonl beside the images"):
        tuned(pipeline("sd")[1], bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sampled(*arguments: str) -> int:
    return main(["sample", *arguments, "--device", "cpu", "--quiet"])


def test_sampling_by_prompt(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "one"
    assert sampled(str(run), "--prompt", "a red square", "-n", "3", "--out", str(out)) == 0
    source = fewstep.open_source(str(out))
    assert captions_of(source) == ["a red square"] * 3
    model = fewstep.load(run)
    rows = TextEncoders(model.text["pipeline"]).encode(["a red square"]).expand(3, -1)  # type: ignore[index]
    wanted = fewstep.sample(model, 3, steps=1, seed=0, cond=rows)
    shown = ((wanted + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(source.read(np.arange(3)), shown)


def test_prompts_of_a_file_are_used_in_turn(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red square\n\na blue circle\n")
    out = tmp_path / "many.npz"
    assert sampled(str(run), "--prompts", str(tmp_path / "prompts.txt"), "-n", "3", "--out", str(out)) == 0
    assert captions_of(fewstep.open_source(str(out))) == ["a red square", "a blue circle", "a red square"]
    assert sampled(str(run), "--out", str(tmp_path / "empty.png"), "-n", "2") == 0
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--label", "3"], "The model is not class-conditional. Got: --label 3. Use --prompt"),
        (["--prompt", "x", "--prompts", "y.txt"], "--prompt and --prompts exclude each other"),
        (["--prompts", "nowhere.txt"], "The prompts 'nowhere.txt' cannot be read"),
    ],
)
def test_options_that_do_not_go(
    options: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampled(str(run), *options, "--out", str(tmp_path / "x.png")) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_model_of_no_text_refuses_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.runs import demo_teacher

    assert sampled(str(demo_teacher()), "--prompt", "a seven", "--out", str(tmp_path / "x.png")) == 2
    assert "The model is not told a text. Got: --prompt a seven" in " ".join(capsys.readouterr().err.split())


def test_evaluation_draws_its_prompts_from_the_data(run: Path, photos: Path, pipeline: Make) -> None:
    model = fewstep.load(run)
    found = fewstep.evaluate(model, str(photos), steps=(1,), samples=12, features="pixels", replicates=0)
    again = fewstep.evaluate(model, str(photos), steps=(1,), samples=12, features="pixels", replicates=0)
    assert found["rows"][0]["metrics"] == again["rows"][0]["metrics"]
    bare = fewstep.open_source(str(photos), labels=False)
    with pytest.raises(DataError, match="told a text for every image"):
        fewstep.evaluate(model, bare, steps=(1,), samples=12, features="pixels", replicates=0)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_loaded_pipeline_takes_these_rows(kind: str, pipeline: Make) -> None:
    model = fewstep.load(pipeline(kind)[1])
    rows = prompt_rows(model, ["a red square", "a blue circle", "a red square"])
    assert torch.equal(rows[0], rows[2])
    x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    x[2] = x[1] = x[0]
    out = model(x, 300.0, rows)
    assert torch.allclose(out[0], out[2], atol=1e-5)
    assert (out[0] - out[1]).abs().max() > 1e-5
    assert forward_flops(model.to("meta")) > 0
    model = fewstep.load(pipeline(kind)[1])
    nothing = null_row(pipeline(kind)[1]).expand(3, -1)
    assert torch.equal(model(x, 300.0, None), model(x, 300.0, nothing))


def test_one_process_encodes_for_all(pipeline: Make, tmp_path: Path) -> None:
    """Two threads stand for two processes; a collective call too few or too many breaks the barrier."""

    class Half(World):
        barrier = threading.Barrier(2, timeout=30)
        flags: ClassVar[dict[int, bool]] = {}
        calls: ClassVar[list[int]] = []

        def any(self, flag: bool) -> bool:
            self.flags[self.rank] = flag
            self.calls.append(self.rank)
            self.barrier.wait()
            found = any(self.flags.values())
            self.barrier.wait()
            return found

    captions = [f"a red square {i}" for i in range(40)]
    encoders, rows = [TextEncoders(pipeline("sd")[1]) for _ in range(2)], {}

    def join(rank: int) -> None:
        world = Half(rank, 2, torch.device("cpu"))
        rows[rank] = _embedded(encoders[rank], captions, tmp_path, world, Watcher()).read(np.arange(40))

    for calls in (5, 6):  # at the start, per block, at the end; the second time from the cache
        other = threading.Thread(target=join, args=(1,))
        other.start()
        join(0)
        other.join(30)
        assert Half.calls.count(0) == Half.calls.count(1) == calls
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows.pop(0)[:16], encoders[0].encode(captions[:16]))
    assert "_pipeline" not in vars(encoders[1])
