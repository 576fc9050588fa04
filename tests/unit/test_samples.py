"""Sets of samples: from a model, and from files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, ode_sample, sample
from fewstep.data import decode, open_source, save_images
from fewstep.data.sources import ArraySource
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation import samples as module
from fewstep.evaluation.samples import SampleSet, draw_labels, from_source, generated, to_host
from fewstep.sampling import few_step_times, ode_sample_nfe

SHAPE = (1, 4, 4)


class Affine(nn.Module):
    """x / (1 + t) + 0.05 class: elementwise arithmetic, the same bits in every batch; notes its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        shift = 0.0 if label is None else 0.05 * label.argmax(1).to(x.dtype).reshape(-1, 1, 1, 1)
        return x / (1 + t.reshape(-1, 1, 1, 1)) + shift


def model(num_classes: int = 0, net: nn.Module | None = None) -> Denoiser:
    return Denoiser.from_module(
        net or Affine(), process=EDM(), prediction="x0", sample_shape=SHAPE, num_classes=num_classes
    )


def joined(samples: SampleSet) -> Tensor:
    return torch.cat(list(samples.blocks()))


# ---- from a model


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_consistency_model_gives_the_samples_of_the_sampler(steps: int) -> None:
    denoiser = model()
    made = generated(denoiser, 37, steps, seed=5, batch_size=10)
    expected = decode(sample(denoiser, 37, steps=steps, seed=5), denoiser.value_range)
    assert torch.equal(joined(made), expected)
    assert len(torch.unique(expected)) > 20
    assert made.about == {
        "solver": "consistency",
        "steps": steps,
        "nfe": steps,
        "times": few_step_times(denoiser, steps),
        "seed": 5,
    }
    assert (made.count, made.shape, made.is_images, made.labels) == (37, SHAPE, True, None)


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_the_ode_solver_gives_the_teachers_samples(steps: int) -> None:
    denoiser = model()
    made = generated(denoiser, 12, steps, solver="ode", seed=5, batch_size=5)
    assert torch.equal(joined(made), decode(ode_sample_nfe(denoiser, 12, steps, seed=5)))
    assert made.about == {"solver": "ode", "steps": steps, "nfe": steps, "times": None, "seed": 5}
    if steps == 5:
        assert torch.equal(joined(made), decode(ode_sample(denoiser, 12, steps=3, seed=5)))


@pytest.mark.parametrize("solver", ["consistency", "ode"])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_batch_size_changes_nothing(solver: Any, classes: int) -> None:
    denoiser = model(classes)
    whole, *others = [joined(generated(denoiser, 23, 3, solver=solver, seed=2, batch_size=b)) for b in (23, 1, 7, 64)]
    for other in others:
        assert torch.equal(other, whole)
    fewer = joined(generated(denoiser, 9, 3, solver=solver, seed=2, batch_size=4))
    assert torch.equal(fewer, whole[:9])
    assert not torch.equal(joined(generated(denoiser, 9, 3, solver=solver, seed=3)), fewer)


def test_blocks_are_of_the_batch_size_and_can_be_gone_through_again() -> None:
    net = Affine()
    made = generated(model(net=net), 25, 1, batch_size=10)
    assert net.batches == []  # nothing happens before it is asked for
    assert [len(block) for block in made.blocks()] == [10, 10, 5] == net.batches
    assert torch.equal(joined(made), joined(made))
    assert made.blocks().__next__().dtype == torch.uint8


def test_given_times_are_used() -> None:
    denoiser = model()
    made = generated(denoiser, 8, 2, times=[80.0, 3.0], seed=1)
    assert torch.equal(joined(made), decode(sample(denoiser, 8, times=[80.0, 3.0], seed=1)))
    assert made.about["times"] == [80.0, 3.0]
    assert not torch.equal(joined(made), joined(generated(denoiser, 8, 2, seed=1)))


def test_points_stay_floats() -> None:
    denoiser = Denoiser.from_module(Flat(), process=EDM(), prediction="x0", sample_shape=(2,))
    made = generated(denoiser, 11, 1, seed=4, batch_size=4)
    assert joined(made).dtype == torch.float32
    assert torch.equal(joined(made), sample(denoiser, 11, seed=4))


class Flat(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * 0.25


def test_labels_are_those_asked_for() -> None:
    denoiser = model(3)
    given = torch.arange(20) % 3
    made = generated(denoiser, 20, 1, cond=given, batch_size=6)
    assert made.labels is not None and torch.equal(made.labels, given)
    assert torch.equal(joined(made), decode(sample(denoiser, 20, cond=given)))
    one_hot = generated(denoiser, 20, 1, cond=nn.functional.one_hot(given, 3).float(), batch_size=6)
    assert one_hot.labels is not None and torch.equal(one_hot.labels, given)
    assert torch.equal(joined(one_hot), joined(made))
    drawn = generated(denoiser, 20, 1, seed=8)
    assert drawn.labels is not None and torch.equal(drawn.labels, draw_labels(denoiser, None, 20, 8))
    assert drawn.labels.dtype == torch.int64
    assert torch.equal(joined(drawn), decode(sample(denoiser, 20, seed=8, cond=drawn.labels)))


def test_labels_are_drawn_as_often_as_in_the_data() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    data = ArraySource("data", torch.zeros(1000, *SHAPE, dtype=torch.uint8), labels)
    drawn = draw_labels(model(3), data, 6000, 0)
    assert drawn is not None
    shares = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.025)
    assert torch.equal(drawn[:50], draw_labels(model(3), data, 50, 0))  # type: ignore[arg-type]
    uniform = draw_labels(model(3), None, 6000, 0)
    torch.testing.assert_close(torch.bincount(uniform) / 6000, torch.full((3,), 1 / 3), rtol=0, atol=0.025)  # type: ignore[arg-type]
    assert draw_labels(model(), data, 10, 0) is None


def test_images_reach_the_host_as_bytes_of_the_models_range() -> None:
    denoiser = Denoiser.from_module(
        Affine(), process=EDM(), prediction="x0", sample_shape=SHAPE, value_range=(0.0, 1.0)
    )
    x = torch.tensor([0.0, 0.5, 1.0, 1.2])
    assert to_host(denoiser, x).tolist() == [0, 128, 255, 255]
    points = Denoiser.from_module(Flat(), process=EDM(), prediction="x0", sample_shape=(2,))
    assert to_host(points, x.double()).dtype == torch.float32


def test_no_random_stream_is_touched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    joined(generated(model(3), 9, 2))
    assert torch.equal(torch.get_rng_state(), before)


class Diverged(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x[:, :1, :1, :1] > self.limit, torch.nan, x)


def test_a_model_that_diverged_is_not_measured_as_black() -> None:
    corner = sample(model(net=Same()), 60, seed=0)[:, 0, 0, 0]
    limit = float(corner[:30].max())
    first = int((corner > limit).nonzero()[0])
    made = generated(model(net=Diverged(limit)), 60, 1, seed=0, batch_size=20)
    assert first >= 30
    with pytest.raises(DataError, match=rf"Some samples are not finite.*first in number {first}\."):
        joined(made)


class Same(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "odd"}, "There is no solver 'odd'. Did you mean 'ode'"),
        ({"n": 0}, "at least 1. Got: samples 0"),
        ({"steps": 0}, "at least 1. Got: samples 5, steps 0"),
        ({"batch_size": 0}, "at least 1.*batch size 0"),
        ({"times": [80.0]}, "one sampling time per step. Got: 1 times. Wanted: 2"),
        ({"times": [1.0, 2.0]}, "sampling times cannot be used"),
        ({"solver": "ode", "times": [80.0, 1.0]}, "ode solver has its own grid"),
        ({"cond": torch.zeros(4, dtype=torch.int64)}, "one label per sample. Got: 4. Wanted: 5"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    arguments = {"n": 5, "steps": 2} | settings
    with pytest.raises(ConfigError, match=message):
        generated(model(), **arguments)


# ---- from files


def pictures(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_images_made_elsewhere_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    pixels, labels = torch.from_numpy(pictures(30, 3, 8, 8)), np.arange(30) % 4
    path = save_images(tmp_path / ("images.npz" if kind == "npz" else "images"), pixels, labels)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for file in path.iterdir():
                archive.write(file, file.name)
        path = tmp_path / "images.zip"
    made = from_source(open_source(str(path)))
    assert torch.equal(joined(made), pixels)
    assert made.labels is not None and made.labels.tolist() == labels.tolist()
    assert (made.count, made.shape, made.is_images, made.name) == (30, (3, 8, 8), True, f"{kind}:{path}")
    assert made.about == {"solver": "files", "steps": None, "nfe": None, "times": None, "seed": None}


@pytest.mark.parametrize(("key", "labels"), [("samples", "labels"), ("images", "y"), ("arr_0", "arr_1")])
def test_npz_keys_of_other_tools(tmp_path: Path, key: str, labels: str) -> None:
    pixels = pictures(6, 8, 8, 3)
    np.savez(tmp_path / "made.npz", **{key: pixels, labels: np.arange(6)})  # type: ignore[arg-type]
    made = from_source(open_source(str(tmp_path / "made.npz")))
    assert np.array_equal(joined(made), pixels.transpose(0, 3, 1, 2))
    assert made.labels is not None and made.labels.tolist() == list(range(6))


def test_files_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ArraySource("data", torch.from_numpy(pictures(1100, 1, 4, 4)), None)
    assert [len(block) for block in from_source(data).blocks()] == [512, 512, 76]
    monkeypatch.setattr(module, "READ_VALUES", 16 * 300)
    assert [len(block) for block in from_source(data).blocks()] == [300, 300, 300, 200]
    assert [len(block) for _, block in module.read_blocks(data, 128)] == [256] * 4 + [76]
    assert [start for start, _ in module.read_blocks(data, 128)] == [0, 256, 512, 768, 1024]
    monkeypatch.setattr(module, "READ_VALUES", 3)  # not one sample fits
    assert {len(block) for block in from_source(data).blocks()} == {1}


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    path = save_images(tmp_path / "images", torch.from_numpy(pictures(20, 1, 8, 8)))
    with zipfile.ZipFile(tmp_path / "cut.zip", "w") as archive:
        for file in path.iterdir():
            archive.write(file, file.name)
    content = (tmp_path / "cut.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cut.zip' cannot be read"):
        from_source(open_source(str(tmp_path / "cut.zip")))


def test_points_that_are_not_finite_are_refused() -> None:
    points = torch.zeros(900, 2)
    points[600, 0] = torch.inf
    with pytest.raises(DataError, match=r"'mine' hold values that are not finite.*first in number 600"):
        joined(from_source(ArraySource("mine", points, None)))
