"""Shard sets: what is written is what is read, whatever stopped the writer; and what is said of bad folders."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.data.lock import LOCK
from fewstep.data.shards import MANIFEST, ShardWriter, open_shards
from fewstep.errors import DataError, StorageError

TOTAL, PER_SHARD = 50, 16
KEY = {"teacher": "abc", "seed": 3, "nested": [1, {"w": 1.5}]}
X = torch.randn(2 * TOTAL, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
LABEL = torch.arange(2 * TOTAL)
EMPTY = torch.empty(2 * TOTAL, 0, dtype=torch.float16)


def fill(folder: Path, stop: int = TOTAL, *, size: int = 7, total: int = TOTAL, key: dict[str, object] = KEY) -> int:
    """Rows up to ``stop``; the number that were there before."""
    with ShardWriter(folder, key, total, PER_SHARD) as writer:
        before = writer.done
        while (start := writer.done) < stop:
            rows = slice(start, min(start + size, stop))
            writer.add({"x": X[rows], "label": LABEL[rows], "nothing": EMPTY[rows]})
        return before


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    fill(tmp_path / "set")
    return tmp_path / "set"


def test_what_was_written_is_read(whole: Path) -> None:
    shards = open_shards(whole)
    assert (len(shards), shards.key, shards.tensor_names) == (TOTAL, KEY, ("label", "nothing", "x"))
    assert shards.tensors == {
        "x": ((3, 4), torch.bfloat16), "label": ((), torch.int64), "nothing": ((0,), torch.float16),
    }  # fmt: skip
    assert [path.name for path in sorted(whole.iterdir())] == [
        MANIFEST,
        *(f"shard-0000{i}.safetensors" for i in range(4)),
    ]
    index = np.array([49, 0, 16, 15, 15, 48])
    x = shards.read("x", index)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, X[index])
    assert torch.equal(shards.read("label", index), LABEL[index])
    assert shards.read("nothing", index).shape == (6, 0)
    assert shards.read("x", np.array([], dtype=np.int64)).shape == (0, 3, 4)
    x.zero_()
    assert torch.equal(shards.read("x", index), X[index])


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool, torch.float16, torch.float32, torch.float64],
)
def test_every_kind_of_number_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.randn(5, 2, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)
    with ShardWriter(tmp_path / "set", {}, 5, 2) as writer:
        writer.add({"x": values})
    assert torch.equal(open_shards(tmp_path / "set").read("x", np.arange(5)), values)


@settings(deadline=None, max_examples=25)
@given(stops=st.lists(st.integers(0, TOTAL), max_size=4), size=st.integers(1, 60))
def test_stopped_anywhere_it_ends_with_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], size: int
) -> None:
    once, often = tmp_path_factory.mktemp("once") / "set", tmp_path_factory.mktemp("often") / "set"
    fill(once)
    reached = 0
    for stop in stops:
        assert fill(often, stop, size=size) == reached
        reached = max(reached, stop)
    assert fill(often, size=size) == reached
    assert files(often) == files(once)


def test_an_error_keeps_the_rows(tmp_path: Path) -> None:
    def stopped() -> None:
        with ShardWriter(tmp_path / "set", KEY, TOTAL, PER_SHARD) as writer:
            writer.add({"x": X[:20]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with ShardWriter(tmp_path / "set", KEY, TOTAL, PER_SHARD) as writer:
        assert writer.done == 20
        writer.add({"x": X[20:TOTAL]})
    assert torch.equal(open_shards(tmp_path / "set").read("x", np.arange(TOTAL)), X[:TOTAL])


def test_a_kill_loses_only_what_was_not_written(tmp_path: Path) -> None:
    """Without leaving the context: full shards are on the disk, and the left-overs of a write are cleared away."""
    writer = ShardWriter(tmp_path / "set", KEY, TOTAL, PER_SHARD)
    writer.add({"x": X[:40]})
    (tmp_path / "set" / ".shard-00002.safetensors.123.tmp").write_bytes(b"half")
    del writer  # a process that ends has no locks
    assert ShardWriter(tmp_path / "set", KEY, TOTAL, PER_SHARD).done == 32
    assert sorted(files(tmp_path / "set")) == ["shard-00000.safetensors", "shard-00001.safetensors"]


def test_rows_do_not_wait_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("fewstep.data.shards.time.monotonic", lambda: clock[0])
    writer = ShardWriter(tmp_path / "set", KEY, TOTAL, PER_SHARD)
    writer.add({"x": X[:3]})
    assert not list(tmp_path.glob("set/shard-*"))
    clock[0] = 61.0
    writer.add({"x": X[3:5]})
    del writer
    assert ShardWriter(tmp_path / "set", KEY, TOTAL, PER_SHARD).done == 5


def test_a_finished_set_can_be_opened_again_and_extended(whole: Path) -> None:
    before = files(whole)
    assert fill(whole) == TOTAL
    assert files(whole) == before
    assert fill(whole, 2 * TOTAL, total=2 * TOTAL) == TOTAL
    shards = open_shards(whole)
    assert len(shards) == 2 * TOTAL
    assert torch.equal(shards.read("x", np.arange(2 * TOTAL)), X)
    with pytest.raises(DataError, match=r"has more rows already\. Got: 100\. Wanted: 50\. Use the whole set"):
        fill(whole)


def test_the_size_of_a_shard_follows_from_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.data.shards.SHARD_BYTES", 24 * 10 + 23)
    with ShardWriter(tmp_path / "set", {}, TOTAL) as writer:
        writer.add({"x": X[:TOTAL]})
    assert len(list((tmp_path / "set").glob("shard-*"))) == 5
    assert torch.equal(open_shards(tmp_path / "set").read("x", np.arange(TOTAL)), X[:TOTAL])


def test_the_fingerprint_is_of_key_and_content(tmp_path: Path) -> None:
    def made(name: str, key: dict[str, object], last: int = 2) -> str:
        with ShardWriter(tmp_path / name, key, 3) as writer:
            writer.add({"x": torch.tensor([0, 1, last])})
        return open_shards(tmp_path / name).fingerprint

    first = made("a", {"k": 1, "l": 2})
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert made("b", {"l": 2, "k": 1}) == first
    assert len({first, made("c", {"k": 2, "l": 2}), made("d", {"k": 1, "l": 2}, last=3)}) == 3


# ---- two writers


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is told what to do, and changes nothing; it may write when the first has closed, however it did."""
    monkeypatch.setattr("fewstep.data.lock.PATIENCE", 0.0)
    folder = tmp_path / "set"
    with ShardWriter(folder, KEY, TOTAL, PER_SHARD) as first:
        first.add({"x": X[:20]})
        first.flush()
        before = files(folder)
        with pytest.raises(DataError, match=r"Another process is writing .*set'\. Wait for it, or choose another fold"):
            ShardWriter(folder, KEY, TOTAL, PER_SHARD)
        assert files(folder) == before
        first.add({"x": X[20:40]})
    with pytest.raises(DataError, match="other settings") as kept:
        ShardWriter(folder, KEY | {"seed": 4}, TOTAL, PER_SHARD)
    with pytest.raises(KeyboardInterrupt), ShardWriter(folder, KEY, TOTAL, PER_SHARD):
        raise KeyboardInterrupt
    with ShardWriter(folder, KEY, TOTAL, PER_SHARD) as last:
        last.add({"x": X[40:TOTAL]})
    assert torch.equal(open_shards(folder).read("x", np.arange(TOTAL)), X[:TOTAL])
    assert not (folder / LOCK).exists() and kept.tb is not None  # in which the refused writer lives on


def test_another_process_is_waited_for_a_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that look at a finished cache at the same moment both get it."""
    first = ShardWriter(tmp_path / "set", KEY, TOTAL, PER_SHARD)
    monkeypatch.setattr("fewstep.data.lock.time.sleep", lambda seconds: first.close())
    assert fill(tmp_path / "set") == 0


def test_a_lock_that_is_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the first writer's end removed it, locked after: that would exclude nobody."""
    folder, flock, seen = tmp_path / "set", fcntl.flock, list[int]()

    def late(file: int, how: int) -> None:
        flock(file, how)
        if not seen:
            (folder / LOCK).unlink()
        seen.append(file)

    monkeypatch.setattr("fcntl.flock", late)
    writer = ShardWriter(folder, KEY, TOTAL, PER_SHARD)
    assert (len(seen), (folder / LOCK).exists()) == (2, True)
    writer.close()


def test_where_files_cannot_be_locked_the_last_manifest_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refused)
    folder = tmp_path / "set"
    slow = ShardWriter(folder, KEY, TOTAL, PER_SHARD)
    slow.add({"x": X[:5]})
    with ShardWriter(folder, KEY, TOTAL, PER_SHARD) as fast:
        fast.add({"x": X[:TOTAL]})
    slow.add({"x": X[50 : 50 + TOTAL - 5]})  # on another device: not the same bits
    slow.close()
    assert torch.equal(open_shards(folder).read("x", np.arange(5, TOTAL)), X[50 : 50 + TOTAL - 5])


def test_a_manifest_of_another_number_is_written_anew(whole: Path) -> None:
    before, path = files(whole), whole / MANIFEST
    path.write_text(path.read_text().replace(f'"count": {TOTAL}', '"count": 40'))
    assert len(open_shards(whole)) == 40
    assert fill(whole) == TOTAL
    assert files(whole) == before


# ---- what cannot be used


def test_another_key_is_refused_by_what_differs(whole: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"made with other settings\. Got: seed 3\. Wanted: seed 4\. Choose another folder, or the setting",
    ):
        fill(whole, key=KEY | {"seed": 4})
    with pytest.raises(DataError, match=r"Got: extra None\. Wanted: extra 1\."):
        fill(whole, key=KEY | {"extra": 1})


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds other files\. Got: photo\.png\. Choose a new or empty folder\."):
        fill(tmp_path)
    with pytest.raises(DataError, match=r"photo\.png' is a file\. Wanted: a folder\."):
        fill(tmp_path / "photo.png")


def test_rows_must_fit(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", KEY, 10, 4) as writer:
        writer.add({"x": X[:2], "label": LABEL[:2]})
        for wrong in (
            {"x": X[:2]}, {"x": X[:2], "label": LABEL[:3]}, {"x": X[:2].float(), "label": LABEL[:2]},
            {"x": X[:2, 0], "label": LABEL[:2]}, {},
        ):  # fmt: skip
            with pytest.raises(DataError, match="The rows do not fit the set"):
                writer.add(wrong)
        with pytest.raises(DataError, match=r"more rows than the set .* has\. Got: 11 rows\. Wanted: 10\."):
            writer.add({"x": X[:9], "label": LABEL[:9]})
        assert writer.done == 2
    with pytest.raises(DataError, match=r"at least one row, and one per shard\. Got: 0 rows, None per shard\."):
        ShardWriter(tmp_path / "none", KEY, 0)


def test_an_unfinished_or_foreign_folder(tmp_path: Path) -> None:
    fill(tmp_path / "set", 20)
    with pytest.raises(DataError, match=r"is not finished\. Run the command that began it again: it goes on\."):
        open_shards(tmp_path / "set")
    with pytest.raises(DataError, match=r"is not a set of shards: it has no manifest\.json\.$"):
        open_shards(tmp_path)
    for text, message in [
        ("{", "is damaged"), ("[]", "does not describe a set of shards"), ('{"format": "x"}', "does not describe"),
        ('{"format": "fewstep-shards", "version": 2}', r"another version of the format\. Got: 2\. Wanted: 1\."),
        ('{"format": "fewstep-shards", "version": 1}', "is damaged"),
    ]:  # fmt: skip
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(DataError, match=message):
            open_shards(tmp_path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def foreign(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 something else altogether")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (cut, "is damaged, cut short"), (longer, "is damaged, cut short"), (foreign, "is damaged, cut short"),
    (emptied, "is damaged, cut short"), (flipped, "is not the one that was written: its content differs"),
    (Path.unlink, "is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_shard_is_named_and_can_be_made_again(
    whole: Path, damage: Callable[[Path], object], message: str
) -> None:
    before, path = files(whole), whole / "shard-00001.safetensors"
    damage(path)
    shards = open_shards(whole)
    assert torch.equal(shards.read("x", np.array([15, 32])), X[[15, 32]])
    with pytest.raises(DataError, match=rf"shard-00001\.safetensors' {message}.*un the command that wrote the folder"):
        shards.read("x", np.array([15, 16]))
    path.unlink(missing_ok=True)
    assert fill(whole) == PER_SHARD
    assert files(whole) == before


def test_a_damaged_shard_stops_the_writer(tmp_path: Path) -> None:
    fill(tmp_path / "set", 20)
    cut(tmp_path / "set" / "shard-00001.safetensors")
    with pytest.raises(DataError, match=r"shard-00001\.safetensors' is damaged"):
        fill(tmp_path / "set")


def test_rows_and_names_that_are_not_there(whole: Path) -> None:
    shards = open_shards(whole)
    with pytest.raises(DataError, match=r"has no 'y'\. Got: y\. Wanted: label or nothing or x\."):
        shards.read("y", np.array([0]))
    for wrong in (-1, TOTAL):
        with pytest.raises(DataError, match=r"has no such rows\. Got: rows .*\. Wanted: 0 to 49\."):
            shards.read("x", np.array([0, wrong]))


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "set", 20)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            fill(tmp_path / "set")
    assert fill(tmp_path / "set") == 20
    assert json.loads((tmp_path / "set" / MANIFEST).read_text())["count"] == TOTAL
