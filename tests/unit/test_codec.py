"""Bytes into model space and back, pixels on the way in, pictures on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.data import open_source
from fewstep.data.codec import decode, encode, save_grid, save_images
from fewstep.data.pixels import composite, fit_square, prepare, to_channels
from fewstep.errors import ConfigError, DataError, StorageError

LEVELS = torch.arange(256, dtype=torch.uint8)
RANGES = [(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5), (-2.0, 6.0)]


def test_encode_is_the_golden_convention_to_the_bit() -> None:
    assert torch.equal(encode(LEVELS), LEVELS.float() / 127.5 - 1)
    assert torch.equal(encode(LEVELS, dtype=torch.float64), LEVELS.double() / 127.5 - 1)
    assert torch.equal(encode(LEVELS, (0.0, 1.0)), LEVELS.float() / 255)


@pytest.mark.parametrize("value_range", RANGES)
def test_encode_is_affine_between_the_ends_of_the_range(value_range: tuple[float, float]) -> None:
    low, high = value_range
    expected = np.linspace(low, high, 256)
    assert np.abs(encode(LEVELS, value_range, torch.float64).numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("value_range", RANGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_all_levels_survive_the_round_trip(value_range: tuple[float, float], dtype: torch.dtype) -> None:
    encoded = encode(LEVELS, value_range, dtype)
    assert encoded.dtype == dtype
    assert torch.equal(decode(encoded, value_range), LEVELS)


@given(x=st.floats(-2, 2, width=32))
def test_decode_takes_the_nearest_level(x: float) -> None:
    level = int(decode(torch.tensor([x], dtype=torch.float64)))
    distance = (LEVELS.double() / 127.5 - 1 - x).abs()
    assert distance[level] <= distance.min() + 1e-12


def test_decode_clips_and_has_a_level_for_what_is_no_number() -> None:
    x = torch.tensor([-9.0, 9.0, float("inf"), float("-inf"), float("nan")])
    assert decode(x).tolist() == [0, 255, 255, 0, 0]


def test_codec_refuses_what_it_cannot_code() -> None:
    with pytest.raises(DataError, match=r"Only bytes can be encoded\. Got: torch\.float32\. Wanted: uint8\."):
        encode(torch.zeros(3))
    with pytest.raises(
        ConfigError, match=r"A value range must rise\. Got: \(1\.0, 1\.0\)\. Wanted: \(lo, hi\) with lo < hi"
    ):
        decode(torch.zeros(3), (1.0, 1.0))


@settings(deadline=None)
@given(colour=st.integers(0, 255), alpha=st.integers(0, 255), background=st.integers(0, 255))
def test_composite_rounds_the_exact_mixture(colour: int, alpha: int, background: int) -> None:
    out = int(composite(np.array([colour, alpha], np.uint8), background)[0])
    assert abs(out - (colour * alpha + background * (255 - alpha)) / 255) <= 0.5


def test_composite_keeps_opaque_pixels_and_shows_the_background() -> None:
    rgba = np.array([[9, 8, 7, 255], [9, 8, 7, 0]], np.uint8)
    assert composite(rgba, 64).tolist() == [[9, 8, 7], [64, 64, 64]]
    opaque = rgba[:, :3]
    assert composite(opaque) is opaque


def test_grey_is_pillows_grey() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(to_channels(rgb, 1)[..., 0], np.asarray(Image.fromarray(rgb).convert("L")))
    assert np.array_equal(to_channels(rgb[..., :1], 3), np.repeat(rgb[..., :1], 3, axis=-1))
    assert to_channels(rgb, None) is rgb


def test_fit_square_takes_the_centre() -> None:
    wide = np.zeros((4, 9, 1), np.uint8)
    wide[:, 2:6] = 200  # the centred square of a 9x4 picture starts at (9 - 4) // 2 = 2
    assert (fit_square(wide, 2) == 200).all()
    assert (fit_square(wide.transpose(1, 0, 2), 2) == 200).all()


def test_fit_square_is_antialiased() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    small = fit_square(checks.astype(np.uint8)[..., None], 16).astype(int)
    assert small.mean() == pytest.approx(127.5, abs=1)
    assert small.std() < 5  # point sampling would give one level or the other: 0 or 127


def lanczos_matrix(source: int, target: int) -> np.ndarray:
    """Rows of normalised Lanczos-3 weights; shrinking widens the kernel by source / target."""
    scale = source / target
    centres = (np.arange(target) + 0.5) * scale
    x = (np.arange(source) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.sinc(x) * np.sinc(x / 3) * (np.abs(x) < 3)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("side", [5, 10, 33])
def test_fit_square_is_lanczos_3(side: int) -> None:
    image = np.random.default_rng(4).integers(60, 200, (20, 20, 1), dtype=np.uint8)  # far from clipping
    matrix = lanczos_matrix(20, side)
    exact = matrix @ image[..., 0] @ matrix.T
    assert np.abs(fit_square(image, side)[..., 0] - np.clip(exact, 0, 255)).max() < 1.5  # two roundings


def test_prepare_does_not_depend_on_the_batch() -> None:
    stack = np.random.default_rng(1).integers(0, 256, (5, 9, 12, 4), dtype=np.uint8)
    together = prepare(stack, channels=1, resize=7)
    alone = [prepare(image[None], channels=1, resize=7)[0] for image in stack]
    assert together.shape == (5, 1, 7, 7)
    assert np.array_equal(together, np.stack(alone))


def test_grid_puts_each_picture_in_its_place(tmp_path: Path) -> None:
    u8 = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 1, 2, 3) * 10
    path = save_grid(tmp_path / "new" / "grid.png", u8, columns=3, scale=2, pad=1)
    with Image.open(path) as image:
        grid = np.asarray(image)
    assert grid.shape == (2 * (4 + 1) + 1, 3 * (6 + 1) + 1)
    expected = np.full_like(grid, 255)
    for i in range(5):
        top, left = 1 + 5 * (i // 3), 1 + 7 * (i % 3)
        expected[top : top + 4, left : left + 6] = 10 * i
    assert np.array_equal(grid, expected)


def test_grid_enlarges_small_pictures_without_smoothing(tmp_path: Path) -> None:
    u8 = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with Image.open(save_grid(tmp_path / "grid.png", u8, pad=0)) as image:
        grid = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert grid.shape == (3, 128, 128)  # two columns of 8 * 8 pixels
    top = torch.cat([u8[0], u8[1]], dim=2)
    assert torch.equal(grid[:, :64].reshape(3, 8, 8, 16, 8), top[:, :, None, :, None].expand(3, 8, 8, 16, 8))


def test_writing_leaves_nothing_else_behind(tmp_path: Path) -> None:
    save_grid(tmp_path / "grid.png", torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def full(self: Image.Image, file: object, format: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StorageError, match=r"grid\.png' could not be written: No space left on device\."):
        save_grid(path, torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_grid_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"These are not pictures\. Got: torch\.float32 \[1, 1, 2, 2\]\. Wanted: uint8 \[n, 1 or 3",
    ):
        save_grid(tmp_path / "grid.png", torch.zeros(1, 1, 2, 2))
    with pytest.raises(
        ConfigError, match=r"Got: columns=0, scale=1, pad=0\. Wanted: columns >= 1, scale >= 1, pad >= 0"
    ):
        save_grid(tmp_path / "g.png", torch.zeros(1, 1, 2, 2, dtype=torch.uint8), columns=0, scale=1, pad=0)


@pytest.mark.parametrize("target", ["out", "out.npz"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_saved_images_can_be_opened_again(tmp_path: Path, target: str, channels: int, labelled: bool) -> None:
    u8 = torch.randint(0, 256, (12, channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    labels = np.arange(12)[::-1] if labelled else None
    path = save_images(tmp_path / target, u8, labels)
    source = open_source(str(path))
    assert torch.equal(source.read(np.arange(12)), u8)
    if labels is None:
        assert source.labels is None
    else:
        assert source.labels is not None
        assert source.labels.tolist() == labels.tolist()


def test_an_earlier_save_is_replaced_but_never_mixed(tmp_path: Path) -> None:
    u8 = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    save_images(tmp_path, u8)
    save_images(tmp_path, u8 + 1)
    assert int(open_source(str(tmp_path)).read(np.array([2])).max()) == 1
    with pytest.raises(
        StorageError, match=r"holds '000002\.png' of an earlier save.* Empty it or choose another folder\."
    ):
        save_images(tmp_path, u8[:2])
    save_images(tmp_path, u8, np.zeros(3))
    with pytest.raises(StorageError, match=r"holds 'dataset\.json' of an earlier save"):
        save_images(tmp_path, u8)


def test_labels_must_match_the_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Pictures and labels differ in number\. Got: 2\. Wanted: 3 labels\."):
        save_images(tmp_path, torch.zeros(3, 1, 2, 2, dtype=torch.uint8), np.zeros(2))
