"""Zip files of torch.save that attack, and files that are no checkpoint at all: one clear sentence each."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fewstep.checkpoint.edm_pickle import read_network, read_pickle
from fewstep.errors import CheckpointError, UnsafePickleError

VALUES = {"a": torch.arange(6.0).view(2, 3), "b": [torch.ones(4, dtype=torch.bfloat16), 3]}
Members = dict[str, bytes]


class Payload:
    """A pickle that runs a shell command when it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "pwned").exists()


def members() -> Members:
    """The members of a real torch.save file, under the root ``file``."""
    buffer = io.BytesIO()
    torch.save(VALUES, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {"file" + name[name.index("/") :]: archive.read(name) for name in archive.namelist()}


def zipped(content: Members, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def refusal(tmp_path: Path, raw: bytes) -> CheckpointError:
    path = tmp_path / "file.pt"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_pickle(path)
    message = str(caught.value)
    assert "file.pt" in message
    assert message.isprintable()
    assert len(message) < 600
    return caught.value


def test_a_plain_file_reads(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(zipped(members()))
    tree = read_pickle(path)
    assert isinstance(tree, dict)
    assert torch.equal(tree["a"], VALUES["a"])
    assert torch.equal(tree["b"][0], torch.ones(4, dtype=torch.bfloat16))
    assert tree["b"][1] == 3


def test_its_pickle_cannot_call(tmp_path: Path) -> None:
    for protocol in range(6):
        error = refusal(tmp_path, zipped(members() | {"file/data.pkl": pickle.dumps(Payload(), protocol)}))
        assert isinstance(error, UnsafePickleError)
        assert "posix.system" in str(error)


@pytest.mark.parametrize("name", ["../../pwned", "/pwned", "file/../../pwned", "..\\pwned", "c:\\pwned", "C:/pwned"])
def test_a_path_that_leads_outside(tmp_path: Path, name: str) -> None:
    assert "leads outside" in str(refusal(tmp_path, zipped(members() | {name: b"x"})))


def test_a_compressed_bomb_is_not_inflated(tmp_path: Path) -> None:
    raw = zipped(members() | {"file/data/9": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    assert len(raw) < 1 << 20
    assert "compressed or encrypted" in str(refusal(tmp_path, raw))


def test_members_larger_than_the_file(tmp_path: Path) -> None:
    raw = zipped(members())
    size = len(members()["file/data/0"]).to_bytes(4, "little")
    assert size * 2 in raw
    assert "larger than the file" in str(refusal(tmp_path, raw.replace(size * 2, b"\x00\x00\x00\x40" * 2)))


def test_overlapping_members(tmp_path: Path) -> None:
    """One stored member listed many times under different names costs nothing in the file."""
    raw = zipped(members() | {"file/data/9": bytes(10_000)})
    start = raw.index(b"PK\x01\x02")
    entry_at = raw.index(b"PK\x01\x02", raw.rindex(b"file/data/9") - 46)
    entry = raw[entry_at : entry_at + 46 + len("file/data/9")]
    extra = b"".join(entry.replace(b"data/9", f"data/{chr(97 + i)}".encode()) for i in range(20))
    end = raw.index(b"PK\x05\x06")
    count = int.from_bytes(raw[end + 8 : end + 10], "little") + 20
    size = end + len(extra) - start
    tail = raw[end : end + 8] + count.to_bytes(2, "little") * 2 + size.to_bytes(4, "little") + raw[end + 16 :]
    assert "larger than the file" in str(refusal(tmp_path, raw[:end] + extra + tail))


def test_two_members_of_the_same_name(tmp_path: Path) -> None:
    buffer = io.BytesIO(zipped(members()))
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("file/data.pkl", pickle.dumps(Payload()))
    assert "same name" in str(refusal(tmp_path, buffer.getvalue()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"file/data.pkl": None}, "exactly one data.pkl"),
        ({"other/data.pkl": b"N."}, "exactly one data.pkl"),
        ({"file/data/0": None}, "missing or damaged"),
        ({"file/data/0": b"\x00" * 23}, "23 bytes are stored"),
        ({"file/data/0": b"\x00" * 400}, "400 bytes are stored"),
        ({"file/byteorder": b"big"}, "big-endian"),
    ],
)
def test_members_that_do_not_fit(tmp_path: Path, change: dict[str, bytes | None], says: str) -> None:
    content = {name: data for name, data in {**members(), **change}.items() if data is not None}
    assert says in str(refusal(tmp_path, zipped(content)))


def test_a_storage_name_that_is_a_path(tmp_path: Path) -> None:
    content = members()
    content["file/data.pkl"] = content["file/data.pkl"].replace(b"X\x01\x00\x00\x000", b"X\x05\x00\x00\x00../.0", 1)
    assert "not a number" in str(refusal(tmp_path, zipped(content)))


def test_a_changed_byte_in_a_storage(tmp_path: Path) -> None:
    raw = bytearray(zipped(members()))
    raw[raw.index(members()["file/data/0"]) + 5] ^= 1
    assert "missing or damaged" in str(refusal(tmp_path, bytes(raw)))


def test_every_truncation(tmp_path: Path) -> None:
    raw = zipped(members())
    for length in range(0, len(raw), max(1, len(raw) // 40)):
        refusal(tmp_path, raw[:length])


# Files that are no checkpoint.


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "it is empty"),
        (b"hello, this is a text file\n", "not a pickle"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a pickle"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (bytes(1000), "not a pickle"),
        (b"PK\x05\x06" + bytes(18), "exactly one data.pkl"),
        (pickle.dumps({"a": 1}), r"holds no network (it holds: a)"),
        (pickle.dumps({}), "holds no network (it holds: nothing)"),
        (pickle.dumps([1, 2]), "holds no network"),
        (pickle.dumps(3), "holds no network"),
        (pickle.dumps({"ema": {"model": 1}}), "holds no network"),
        (pickle.dumps({"a": 1}) + b"more", "goes on after its end"),
    ],
)
def test_files_that_hold_no_network(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "file.pkl"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_network(path)
    assert says in str(caught.value)
    assert "file.pkl" in str(caught.value)
    assert not isinstance(caught.value, UnsafePickleError)


def test_a_tensor_file_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(zipped(members()))
    with pytest.raises(CheckpointError, match=r"holds no network \(it holds: a, b\)"):
        read_network(tmp_path / "file.pt")


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_network(tmp_path / "absent.pkl")
    with pytest.raises(CheckpointError, match="is not a file"):
        read_network(tmp_path)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_network(Path("/dev/zero"))
