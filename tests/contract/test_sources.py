"""Every source: shape, dtype, determinism, labels, fingerprint, and the way into model space and back."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import SOURCES, open_source
from fewstep.data import Source, decode, encode
from fewstep.data.shards import ShardWriter
from fewstep.errors import DataError

BUILT_IN = {"digits": (1797, (1, 8, 8), 10), "tiles": (4192, (3, 32, 32), 8), "gaussians8": (65536, (2,), 8)}


def pictures(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def write_folder(path: Path) -> Path:
    for i, picture in enumerate(pictures()):
        file = path / "folder" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return path / "folder"


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path / "x.zip", "w") as archive:
        for i, picture in enumerate(pictures()):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "png")
            archive.writestr(f"class{i % 2}/{i}.png", buffer.getvalue())
    return path / "x.zip"


def write_hf(path: Path) -> str:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    rows = {"image": [Image.fromarray(p) for p in pictures()], "label": [i % 2 for i in range(6)]}
    (path / "hf").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(path / "hf" / "train.parquet")
    return f"hf:{path / 'hf'}"


def write_npz(path: Path) -> Path:
    np.savez(path / "x.npz", x=pictures(), y=np.arange(6) % 2)
    return path / "x.npz"


def write_shards(path: Path) -> Path:
    images = torch.from_numpy(pictures()).permute(0, 3, 1, 2)
    with ShardWriter(path / "shards", {"made": "for a test"}, 6, 4) as writer:
        writer.add({"x": images, "label": torch.arange(6) % 2})
    return path / "shards"


WRITERS: dict[str, Callable[[Path], Path | str]] = {
    "folder": write_folder, "zip": write_zip, "npz": write_npz, "shards": write_shards, "hf": write_hf,
}  # fmt: skip


@pytest.fixture(params=SOURCES)
def spec(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Kind of a source, and what opens one of it."""
    kind = str(request.param)
    if kind == "hf":
        config = pytest.importorskip("datasets").config
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return kind, kind if kind in BUILT_IN else str(WRITERS[kind](tmp_path))


def test_every_source_is_here() -> None:
    assert SOURCES.keys() == BUILT_IN.keys() | WRITERS.keys()


def test_shape_dtype_and_labels(spec: tuple[str, str]) -> None:
    kind, where = spec
    source = open_source(where)
    count, shape, _ = BUILT_IN.get(kind, (6, (3, 8, 8), 2))
    assert len(source) == count
    assert tuple(source.shape) == shape
    assert source.is_images == (kind != "gaussians8")
    index = np.array([count - 1, 0, 3, 3])
    x = source.read(index)
    assert x.shape == (4, *shape)
    assert x.dtype == (torch.uint8 if source.is_images else torch.float32)
    assert torch.equal(x[2], x[3])
    assert not torch.equal(x[0], x[1])
    if source.labels is not None:
        assert source.labels.shape == (count,)
        assert source.labels.dtype == np.int64
        assert sorted(set(source.labels.tolist())) == list(range(source.num_classes))
    else:
        assert source.num_classes == 0


def test_the_built_in_ones_have_labels() -> None:
    for name, (_, _, classes) in BUILT_IN.items():
        assert open_source(name).num_classes == classes


def test_the_same_every_time(spec: tuple[str, str]) -> None:
    first, again = open_source(spec[1]), open_source(spec[1])
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 64
    index = np.arange(6)
    whole = first.read(index)
    assert torch.equal(whole, again.read(index))
    assert torch.equal(whole, torch.cat([first.read(index[i : i + 1]) for i in range(6)]))


def test_a_read_can_be_changed_without_harm(spec: tuple[str, str]) -> None:
    source = open_source(spec[1])
    before = source.read(np.arange(2)).clone()
    source.read(np.arange(2)).zero_()
    assert torch.equal(source.read(np.arange(2)), before)


def test_name_opens_it_again(spec: tuple[str, str]) -> None:
    source = open_source(spec[1])
    assert open_source(source.name).fingerprint == source.fingerprint


def test_settings_change_the_fingerprint(spec: tuple[str, str]) -> None:
    kind, where = spec
    whole = open_source(where)
    prints = {whole.fingerprint}
    others: list[Source] = []
    if whole.labels is not None:
        others.append(open_source(where, labels=False))
        assert others[0].num_classes == 0
    if kind != "gaussians8":
        others += [open_source(where, resize=4), open_source(where, channels=3 if kind == "digits" else 1)]
        assert tuple(others[-2].shape)[1:] == (4, 4)
        assert others[-1].shape[0] == (3 if kind == "digits" else 1)
    for other in others:
        assert tuple(other.read(np.arange(2)).shape) == (2, *other.shape)
    prints |= {o.fingerprint for o in others}
    assert len(prints) == 1 + len(others)


def test_into_model_space_and_back(spec: tuple[str, str]) -> None:
    source = open_source(spec[1])
    x = source.read(np.arange(6))
    if not source.is_images:
        assert x.std() == pytest.approx(0.5, abs=0.2)
        return
    y = encode(x, (-1.0, 1.0), torch.float32)
    assert y.min() >= -1
    assert y.max() <= 1
    assert torch.equal(decode(y, (-1.0, 1.0)), x)


def test_only_npz_has_a_test_split(spec: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"split|x_test"):
        open_source(spec[1], split="test")
