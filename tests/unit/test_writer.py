"""Pictures that are written while the next ones are made: the same bytes as before, and nothing half done."""

from __future__ import annotations

import itertools
import threading
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data import save_images
from fewstep.data import writer as writer_module
from fewstep.data.writer import picture_writer
from fewstep.errors import DataError, StorageError


def pictures(n: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, channels, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def write(target: Path, count: int, blocks: Iterable[Tensor], made: list[int]) -> None:
    """All blocks, with labels; notes their sizes as they come."""
    with picture_writer(target, count, np.zeros(count)) as writer:
        for block in blocks:
            made.append(len(block))
            writer.add(block)


def failing(fails: bool) -> Iterator[Tensor]:
    """No blocks, or an error of whoever makes them."""
    if fails:
        raise KeyError("mine")
    yield from ()


def by_pillow(folder: Path, u8: Tensor) -> dict[str, bytes]:
    """What was written before there were threads: Pillow's default PNG of each picture."""
    from PIL import Image

    folder.mkdir()
    for i, picture in enumerate(u8.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture[..., 0] if u8.shape[1] == 1 else picture).save(folder / f"{i:06d}.png", format="PNG")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sizes", [[70], [33, 33, 4], [1] * 5])
def test_pictures_are_the_same_bytes_in_any_blocks(tmp_path: Path, channels: int, sizes: list[int]) -> None:
    u8 = pictures(sum(sizes), channels)
    labels, captions = np.arange(len(u8)) % 3, [f"picture {i}" for i in range(len(u8))]
    with picture_writer(tmp_path / "x", len(u8), labels, captions) as writer:
        for block in torch.split(u8, sizes):
            writer.add(block)
    found = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    save_images(tmp_path / "whole", u8, labels, captions)
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {name: data for name, data in found.items() if name.endswith(".png")} == by_pillow(tmp_path / "old", u8)
    assert set(found) - {f"{i:06d}.png" for i in range(len(u8))} == {"dataset.json", "metadata.jsonl"}


@pytest.mark.parametrize("sizes", [[70], [33, 33, 4]])
def test_an_archive_is_what_numpy_writes(tmp_path: Path, sizes: list[int]) -> None:
    u8 = pictures(sum(sizes))
    labels, captions = np.arange(len(u8)) % 3, [f"picture {i}" for i in range(len(u8))]
    with picture_writer(tmp_path / "x.npz", len(u8), labels, captions) as writer:
        for block in torch.split(u8, sizes):
            writer.add(block)
    images = np.ascontiguousarray(u8.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(tmp_path / "numpy.npz", images=images, labels=labels, captions=np.array(captions))
    found, want = (zipfile.ZipFile(tmp_path / name) for name in ("x.npz", "numpy.npz"))
    with found, want:
        assert found.namelist() == want.namelist() == ["images.npy", "labels.npy", "captions.npy"]
        for name in found.namelist():
            assert found.read(name) == want.read(name)
            assert found.getinfo(name).compress_size == want.getinfo(name).compress_size
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["numpy.npz", "x.npz"]


def test_writing_goes_on_while_the_next_block_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """add() comes back before its pictures are written, but waits once AHEAD blocks are unwritten."""
    go, real, written = threading.Event(), writer_module.write_picture, []

    def slow(path: Path, pixels: np.ndarray, **options: Any) -> Path:
        assert go.wait(30)
        written.append(path.name)
        return real(path, pixels, **options)

    monkeypatch.setattr(writer_module, "write_picture", slow)
    u8 = pictures(8)
    with picture_writer(tmp_path / "x", 8) as writer:
        for block in torch.split(u8, 2)[: writer_module.AHEAD]:
            writer.add(block)
        assert written == []
        third = threading.Thread(target=lambda: writer.add(u8[4:6]))
        third.start()
        third.join(0.3)
        assert third.is_alive()  # memory is bounded
        go.set()
        third.join(30)
        writer.add(u8[6:])
    assert sorted(written) == [f"{i:06d}.png" for i in range(8)]


@pytest.mark.parametrize("target", ["x", "x.npz"])
def test_a_full_disk_stops_the_samples(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    if target == "x":
        real = writer_module.write_file

        def full(path: Path, fill: Any, **options: Any) -> Path:
            if path.name >= "000004":
                fill = lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
            return real(path, fill, **options)

        monkeypatch.setattr(writer_module, "write_file", full)
    else:
        (tmp_path / target).write_bytes(b"old")
        monkeypatch.setattr(
            np.lib.format,
            "write_array_header_1_0",
            lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )

    with pytest.raises(StorageError, match="could not be written: No space left on device"):
        write(tmp_path / target, 400, torch.split(pictures(400), 2), made)
    assert len(made) < 100
    if target == "x":
        assert not [path.name for path in (tmp_path / "x").iterdir() if path.name.startswith(".")]
        assert not (tmp_path / "x" / "dataset.json").exists()
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
        assert (tmp_path / "x.npz").read_bytes() == b"old"


@pytest.mark.parametrize("target", ["x", "x.npz"])
@pytest.mark.parametrize("fault", ["error", "fewer", "more"])
def test_what_is_not_finished_is_not_passed_off_as_finished(tmp_path: Path, target: str, fault: str) -> None:
    wanted: tuple[type[Exception], str] = {
        "error": (KeyError, "mine"), "fewer": (DataError, "fewer pictures than"), "more": (DataError, "more pictures"),
    }[fault]  # fmt: skip
    blocks = itertools.chain(torch.split(pictures(30 if fault == "more" else 12), 2), failing(fault == "error"))
    with pytest.raises(wanted[0], match=wanted[1]):
        write(tmp_path / target, 20, blocks, [])
    assert not (tmp_path / "x.npz").exists()
    assert not (tmp_path / "x" / "dataset.json").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fewstep-")]
