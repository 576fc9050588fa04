"""Eight Gaussians from nothing to one step, through the public interface: pretrain, tune, compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fewstep

METRIC = "SW2-Pixels-4k"
GAIN = 4.0
"""One-step sliced Wasserstein distance must shrink at least by this factor."""


@pytest.mark.slow
def test_tuning_makes_one_step_enough(tmp_path: Path) -> None:
    quiet = {"output.sample_images": 0, "output.checkpoint_images": 1_000_000, "batch_size": 512}
    teacher = fewstep.pretrain(
        "gaussians8",
        out=tmp_path / "teacher",
        recipe="points-teacher",
        overrides=quiet | {"images": 350_000, "eval.samples": 0},
        device="cpu",
    )
    overrides = quiet | {
        "images": 300_000,
        "objective.schedule.images": 75_000,
        "eval.steps": [1, 2],
        "eval.teacher_nfe": [1, 35],
    }
    run = fewstep.tune(
        teacher.path, "gaussians8", out=tmp_path / "tuned", recipe="points", overrides=overrides, device="cpu"
    )
    assert run.results is not None
    value = {
        (model, row["nfe"]): row["metrics"][METRIC] for model, result in run.results.items() for row in result["rows"]
    }
    before = fewstep.evaluate(
        teacher.model(), fewstep.open_source("gaussians8"), steps=(1,), metrics=("sw2",), samples=4000
    )
    untuned = before["rows"][0]["metrics"][METRIC]
    print(value, "untuned", untuned)
    assert untuned == pytest.approx(value["teacher (diffusion)", 1], rel=0.05)
    assert value["tuned", 1] < untuned / GAIN
    assert value["tuned", 1] < value["teacher (diffusion)", 1] / GAIN
    assert value["teacher (diffusion)", 35] < untuned / GAIN  # the teacher itself is good
    dial = Image.open(run.path / "samples" / "step-dial.png")
    assert min(dial.size) > 100
    assert np.asarray(dial.convert("RGB")).std() > 10  # not blank


def test_a_sample_of_the_tuned_model_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    """The model directory of a short run: sample i depends on the seed and i alone."""
    small = {"images": 2048, "batch_size": 256, "output.sample_images": 0, "eval.samples": 0}
    teacher = fewstep.pretrain(
        "gaussians8", out=tmp_path / "teacher", recipe="points-teacher", overrides=small, device="cpu"
    )
    run = fewstep.tune(
        teacher.path, "gaussians8", out=tmp_path / "tuned", recipe="points", overrides=small, device="cpu"
    )
    model = fewstep.load(run.path / "model")
    many, few = (fewstep.sample(model, n, steps=2, seed=3) for n in (64, 5))
    np.testing.assert_allclose(many[:5].numpy(), few.numpy(), atol=1e-5)
    again = fewstep.sample(run.model(), 5, steps=2, seed=3)
    np.testing.assert_array_equal(again.numpy(), few.numpy())
