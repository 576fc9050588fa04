"""State dicts of both layouts of ``torch.save`` equal torch's own reading; everything else is refused."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.checkpoint.state_dict import read_state_dict
from fewstep.errors import CheckpointError, UnsafePickleError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older layout"])


def saved(path: Path, value: object, zipped: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shared = torch.randn(6, 4)
    return {
        "weight": torch.randn(3, 2, 5),
        "half": torch.randn(7).half(),
        "count": torch.tensor(12345678901),
        "all": shared,
        "part": shared[1:4, 2:],  # a view with an offset and strides, of the storage of "all"
        "turned": shared.T,
        "parameter": nn.Parameter(torch.randn(2)),
    }


@LAYOUTS
def test_both_layouts_hold_the_same_numbers(tmp_path: Path, zipped: bool) -> None:
    wanted = tensors()
    got = read_state_dict(saved(tmp_path / "x.pth", OrderedDict(wanted), zipped))
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor.detach()), name


def test_an_empty_tensor_in_the_older_layout(tmp_path: Path) -> None:
    got = read_state_dict(saved(tmp_path / "x.pth", {"a": torch.zeros(0, 3), "b": torch.ones(2)}, False))
    assert got["a"].shape == (0, 3) and torch.equal(got["b"], torch.ones(2))


@LAYOUTS
def test_a_networks_state_is_read(tmp_path: Path, zipped: bool) -> None:
    net, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    other.load_state_dict(read_state_dict(saved(tmp_path / "x.pth", net.state_dict(), zipped)))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@LAYOUTS
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    raw = saved(tmp_path / "x.pth", tensors(), zipped).read_bytes()
    for end in [0, 1, 10, 100, 400, len(raw) // 2, len(raw) - 40, len(raw) - 1]:
        (tmp_path / "cut.pth").write_bytes(raw[:end])
        with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint|nothing was executed"):
            read_state_dict(tmp_path / "cut.pth")


def test_a_wrong_length_or_byte_order_in_the_older_layout_is_refused(tmp_path: Path) -> None:
    raw = saved(tmp_path / "x.pth", {"w": torch.arange(5.0)}, False).read_bytes()
    count = (5).to_bytes(8, "little")
    assert raw.count(count) == 1
    for changed in (raw.replace(count, (4).to_bytes(8, "little")), raw.replace(b"little_endian", b"little_mndian")):
        (tmp_path / "y.pth").write_bytes(changed)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            read_state_dict(tmp_path / "y.pth")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@LAYOUTS
def test_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "x.pth", {"w": torch.zeros(2), "x": Payload(tmp_path / "it ran")}, zipped)
    with pytest.raises(UnsafePickleError, match="nothing was executed"):
        read_state_dict(path)
    assert not (tmp_path / "it ran").exists()


@LAYOUTS
@pytest.mark.parametrize("value", [[torch.zeros(2)], {"a": {"b": torch.zeros(2)}}, {1: torch.zeros(2)}, {"step": 3}])
def test_anything_but_tensors_by_name_is_refused(tmp_path: Path, zipped: bool, value: object) -> None:
    with pytest.raises(CheckpointError, match="does not hold tensors by name"):
        read_state_dict(saved(tmp_path / "x.pth", value, zipped))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_state_dict(tmp_path / "none.pth")
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (tmp_path / "none.pth").write_bytes(buffer.getvalue())
    assert read_state_dict(tmp_path / "none.pth") == {}
