"""Where data come from: the packaged sets, folders, zips and npz archives, and what is said of bad ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.data import SOURCES, View, open_source
from fewstep.data.files import FileImages, folder, zipped
from fewstep.data.sources import GAUSSIANS_RADIUS, ArraySource, Source
from fewstep.errors import DataError


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray | Image.Image) -> bytes:
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, format="PNG")
    return stream.getvalue()


def make_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def make_zip(root: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(root / "data.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(root / "data.zip")


def make_npz(root: Path, **arrays: np.ndarray) -> str:
    np.savez(root / "data.npz", **arrays)  # type: ignore[arg-type]
    return str(root / "data.npz")


def everything(source: Source) -> np.ndarray:
    return source.read(np.arange(len(source))).numpy()


containers = pytest.mark.parametrize("make", [make_folder, make_zip])
Make = Callable[[Path, dict[str, bytes]], str]


# ---- the packaged sets


def test_digits_are_scikit_learns() -> None:
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    source = open_source("digits")
    expected = np.array([round(v * 255 / 16) for v in range(17)])[reference.images.astype(int)]
    assert (len(source), source.shape, source.num_classes, source.is_images) == (1797, (1, 8, 8), 10, True)
    assert np.array_equal(everything(source)[:, 0], expected)
    assert source.labels is not None
    assert np.array_equal(source.labels, reference.target)


def test_tiles_are_the_shared_tiles_on_dark_grey(shared: Path) -> None:
    with np.load(shared / "data" / "dcss_nov2015_cc0_32x32_rgba.npz", allow_pickle=False) as arrays:
        rgba, paths = arrays["x"].astype(float), arrays["paths"]
    source = open_source("tiles")
    alpha = rgba[..., 3:] / 255
    exact = (rgba[..., :3] * alpha + 64 * (1 - alpha)).transpose(0, 3, 1, 2)
    assert np.abs(everything(source) - exact).max() <= 0.5 + 1e-9
    names = ["UNUSED", "dngn", "effect", "gui", "item", "misc", "mon", "player"]
    assert source.labels is not None
    assert [names[k] for k in source.labels] == [path.split("/")[2] for path in paths]


def test_tiles_ship_with_the_package() -> None:
    source = open_source("tiles")
    assert (len(source), source.shape, source.num_classes) == (4192, (3, 32, 32), 8)
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [265, 1105, 195, 274, 622, 220, 695, 816]
    assert open_source("tiles", resize=16, channels=1).shape == (1, 16, 16)


def test_gaussians_have_the_law_they_promise() -> None:
    source = open_source("gaussians8")
    points = everything(source).astype(float)
    assert (source.shape, source.num_classes, source.is_images) == ((2,), 8, False)
    assert source.read(np.array([0])).dtype == torch.float32
    assert source.labels is not None
    assert np.bincount(source.labels).tolist() == [len(source) // 8] * 8
    assert np.abs(points.std(axis=0) - 0.5).max() < 1e-3
    for k in range(8):
        mode = points[source.labels == k]
        centre = GAUSSIANS_RADIUS * np.array([np.cos(np.pi * k / 4), np.sin(np.pi * k / 4)])
        assert np.abs(mode.mean(axis=0) - centre).max() < 5 * 0.05 / np.sqrt(len(mode))
        assert np.abs(mode.std(axis=0) - 0.05).max() < 5 * 0.05 / np.sqrt(2 * len(mode))


@pytest.mark.parametrize("name", ["digits", "tiles", "gaussians8"])
def test_packaged_sets_are_the_same_at_every_opening(name: str) -> None:
    first, second = open_source(name), open_source(name, labels=False)
    assert first.name == name
    assert np.array_equal(everything(first), everything(second))
    assert (second.labels, second.num_classes) == (None, 0)
    assert first.fingerprint == open_source(name).fingerprint
    assert first.fingerprint != second.fingerprint
    with pytest.raises(
        DataError, match=rf"'{name}' has no split 'test'\. Wanted: train; only an \.npz with the key x_test"
    ):
        open_source(name, split="test")


def test_the_registry_names_what_open_source_opens() -> None:
    assert list(SOURCES) == ["digits", "tiles", "gaussians8", "folder", "zip", "npz", "shards", "hf"]


@settings(deadline=None, max_examples=30)
@given(index=st.lists(st.integers(0, 1796), max_size=20))
def test_reading_is_indexing(index: list[int]) -> None:
    source = open_source("digits")
    assert np.array_equal(source.read(np.array(index, np.int64)).numpy(), everything(source)[index])


def test_what_was_read_is_the_readers_own() -> None:
    source = open_source("digits")
    before = source.read(np.array([3]))
    source.read(np.array([3])).fill_(7)
    assert torch.equal(source.read(np.array([3])), before)


# ---- names and paths


def test_a_misspelt_name_or_path_gets_the_nearest_match(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"There is no data source 'digit'\. Did you mean 'digits'\? Known: digits, tiles, gaussians8",
    ):
        open_source("digit")
    make_zip(tmp_path, {"a.png": png(noise(0, 2, 2))})
    with pytest.raises(
        DataError, match=r"Did you mean '.*data\.zip'\? .*or the path of a folder, a \.zip or an \.npz\."
    ):
        open_source(str(tmp_path / "dota.zip"))
    with pytest.raises(DataError, match=r"There is no data source ''\. Known: digits"):
        open_source("")
    with pytest.raises(DataError, match=r"There is no data source '"):
        open_source("x" * 5000)


@pytest.mark.parametrize("spec", ["wds:shards-{000..009}.tar"])
def test_streams_are_not_in_this_version(spec: str) -> None:
    with pytest.raises(
        DataError,
        match=r"is not in this version\. Save the images as a folder, a \.zip or an \.npz and give",
    ):
        open_source(spec)


def test_a_prefix_says_the_kind(tmp_path: Path) -> None:
    path = make_folder(tmp_path / "x.zip", {"a.png": png(noise(0, 2, 2))})
    source = open_source(path)
    assert source.name == f"folder:{path}"
    assert open_source(source.name).fingerprint == source.fingerprint
    for kind in ("folder", "zip", "npz"):
        with pytest.raises(DataError, match=rf"There is no {kind} '{tmp_path}/none'\."):
            open_source(f"{kind}:{tmp_path}/none")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(
        DataError,
        match=r"notes\.txt' is of no kind that can be read\. Wanted: a folder, a \.zip or an \.npz\.",
    ):
        open_source(str(tmp_path / "notes.txt"))


def test_settings_are_checked() -> None:
    with pytest.raises(DataError, match=r"Got: 2\. Wanted: 1 \(grey\) or 3 \(RGB\)\."):
        open_source("digits", channels=2)
    with pytest.raises(
        DataError, match=r"cannot be resized to this\. Got: 0\. Wanted: a whole number of pixels, 1 to 8192\."
    ):
        open_source("digits", resize=0)
    with pytest.raises(DataError, match=r"There is no split 'tset'\. Did you mean 'test'\? Known: train, test\."):
        open_source("digits", split="tset")
    with pytest.raises(DataError, match=r"'gaussians8' holds points, not images\. Leave out --resize and --channels\."):
        open_source("gaussians8", resize=4)


# ---- folders and zips


@containers
def test_images_come_in_the_order_of_their_names(tmp_path: Path, make: Make) -> None:
    pixels = noise(1, 3, 4, 5, 3)
    files = {"b/z.png": png(pixels[1]), "a.png": png(pixels[0]), "c/d/e.PNG": png(pixels[2])}
    hidden = {".c/x.png": b"no", "._b.png": b"no", "__MACOSX/a.png": b"no", "readme.txt": b"no"}
    source = open_source(make(tmp_path, files | hidden))
    assert source.shape == (3, 4, 5)
    assert source.labels is None
    assert np.array_equal(everything(source), pixels.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
@containers
def test_lossless_kinds_are_read_exactly(tmp_path: Path, make: Make, kind: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(noise(2, 6, 6, 3)).save(stream, format=kind, lossless=True)
    source = open_source(make(tmp_path, {f"a.{kind.lower()}": stream.getvalue()}))
    assert np.array_equal(everything(source)[0].transpose(1, 2, 0), noise(2, 6, 6, 3))


def test_a_turned_jpeg_is_set_upright(tmp_path: Path) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.jpeg", quality=100, exif=exif)
    source = open_source(str(tmp_path))
    assert source.shape == (3, 24, 16)
    upright = np.rot90(pixels, -1).transpose(2, 0, 1).astype(int)
    assert np.abs(everything(source)[0] - upright).max() < 30


@containers
def test_sub_folders_are_classes(tmp_path: Path, make: Make) -> None:
    image = png(noise(0, 2, 2))
    files = {f"top/{name}/{i}.png": image for name, i in [("dog", 0), ("cat", 0), ("dog", 1), ("ape", 5)]}
    source = open_source(make(tmp_path, files))
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [
        0,
        1,
        2,
        2,
    ]  # ape, cat, dog, dog; the shared folder 'top' does not count
    assert source.num_classes == 3
    unread = open_source(make(tmp_path, files), labels=False)
    assert (unread.labels, unread.num_classes) == (None, 0)


@containers
def test_edm_labels_are_understood(tmp_path: Path, make: Make) -> None:
    image = png(noise(0, 2, 2))
    names = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]
    table = {"labels": [[names[2], 0], [names[0], 7], [names[1].replace("/", "\\"), 2]]}
    files = dict.fromkeys(names, image) | {"dataset.json": json.dumps(table).encode()}
    source = open_source(make(tmp_path, files))
    assert source.labels is not None
    assert source.labels.tolist() == [7, 2, 0]
    assert source.num_classes == 8
    source = open_source(make(tmp_path, files | {"dataset.json": b'{"labels": null}'}))
    assert (source.labels, source.num_classes) == (None, 0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            b'{"labels": [',
            r"'dataset\.json' in '.*' is not readable: Expecting value.* "
            r"Wanted: \{\"labels\": \[\[\"name\", class\], \.\.\.\]\}, or null for the list\.",
        ),
        (b"[1, 2]", r"'dataset\.json' in '.*' is not readable\. Wanted:"),
        (b'{"labels": [["a.png"]]}', r"'dataset\.json' in '.*' is not readable\. Wanted:"),
        (
            b'{"labels": [["a.png", 1]]}',
            r"has no label for 'b\.png'\. Add it, or open the data without labels\.",
        ),
        (
            b'{"labels": [["a.png", 1], ["b.png", 0.5]]}',
            r"is not a class index\. Got: 0\.5\. Wanted: a whole number from 0\.",
        ),
        (
            b'{"labels": [["a.png", 1], ["b.png", -1]]}',
            r"is not a class index\. Got: -1\. Wanted: a whole number from 0\.",
        ),
        (b'{"labels": [["a.png", true], ["b.png", 1]]}', r"is not a class index\. Got: True\."),
    ],
)
@containers
def test_bad_edm_labels_are_explained(tmp_path: Path, make: Make, table: bytes, message: str) -> None:
    image = png(noise(0, 2, 2))
    path = make(tmp_path, {"a.png": image, "b.png": image, "dataset.json": table})
    with pytest.raises(DataError, match=message):
        open_source(path)
    assert open_source(path, labels=False).labels is None


@containers
def test_grey_stays_grey_and_a_mixture_becomes_rgb(tmp_path: Path, make: Make) -> None:
    grey, rgb = noise(1, 4, 4), noise(2, 4, 4, 3)
    assert open_source(make(tmp_path, {"a.png": png(grey)})).shape == (1, 4, 4)
    path = make(tmp_path, {"a.png": png(grey), "b.png": png(rgb)})
    mixed = everything(open_source(path))
    assert np.array_equal(mixed[0], np.stack([grey] * 3))
    assert np.array_equal(mixed[1], rgb.transpose(2, 0, 1))
    luma = everything(open_source(path, channels=1))
    assert np.array_equal(luma[0, 0], grey)
    assert np.array_equal(luma[1, 0], np.asarray(Image.fromarray(rgb).convert("L")))


def test_every_png_kind_is_understood(tmp_path: Path) -> None:
    rgba, words = noise(3, 4, 4, 4), np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    palette = Image.fromarray(noise(4, 4, 4, 3)).quantize(8)
    kinds = {
        "rgba": (Image.fromarray(rgba), 3),
        "grey_alpha": (Image.fromarray(rgba).convert("LA"), 1),
        "bits": (Image.fromarray(noise(5, 4, 4)).convert("1"), 1),
        "words": (Image.fromarray(words), 1),
        "palette": (palette, 3),
    }
    seen = {}
    for name, (image, channels) in kinds.items():
        source = open_source(make_folder(tmp_path / name, {"a.png": png(image)}))
        assert source.shape == (channels, 4, 4), name
        seen[name] = everything(source)[0]
    alpha = rgba[..., 3:] / 255
    assert np.abs(seen["rgba"].transpose(1, 2, 0) - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9
    assert np.array_equal(seen["words"][0], (words >> 8).astype(np.uint8))
    assert set(np.unique(seen["bits"])) == {0, 255}
    assert np.array_equal(seen["palette"].transpose(1, 2, 0), np.asarray(palette.convert("RGB")))


@containers
def test_mixed_sizes_name_two_files_and_the_remedy(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path, {"a.png": png(noise(0, 4, 6)), "b.png": png(noise(0, 4, 6)), "c.png": png(noise(0, 5, 3))})
    message = (
        r"The images differ in size\. Got: 'c\.png' is 3x5, 'a\.png' is 6x4 \(width x height\)\. "
        r"Give one size to all: --resize N\."
    )
    with pytest.raises(DataError, match=message):
        open_source(path)
    source = open_source(path, resize=4)
    assert source.shape == (1, 4, 4)
    assert np.array_equal(everything(source)[0, 0], noise(0, 4, 6)[:, 1:5])


@containers
@pytest.mark.parametrize("in_memory_bytes", [0, 2**20])
def test_a_damaged_image_is_named(tmp_path: Path, make: Make, in_memory_bytes: int) -> None:
    whole = png(noise(0, 32, 32, 3))
    opener = folder if make is make_folder else zipped
    path = make(tmp_path, {"good.png": whole, "sub/bad.png": whole[: len(whole) // 2]})
    with pytest.raises(
        DataError,
        match=r"The image 'sub/bad\.png' in '.*' cannot be read: .*truncated.*\. Replace or remove it\.",
    ):
        everything(opener(path, View(), in_memory_bytes=in_memory_bytes))
    path = make(tmp_path, {"good.png": whole, "sub/bad.png": b"hello"})
    with pytest.raises(DataError, match=r"'sub/bad\.png' in '.*' cannot be read: it is no image of a known kind\."):
        open_source(path)


@containers
def test_nothing_to_read_is_explained(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path, {"readme.txt": b"no"})
    with pytest.raises(
        DataError,
        match=r"There are no images in '(folder|zip):.*'\. Wanted: \.png \.jpg \.jpeg \.webp \.bmp\.",
    ):
        open_source(path)


def test_a_damaged_zip_is_explained(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"The zip '.*bad\.zip' cannot be read: File is not a zip file\."):
        open_source(str(tmp_path / "bad.zip"))
    content = bytearray(Path(make_zip(tmp_path, {"a.png": png(noise(0, 9, 9))})).read_bytes())
    content[60] ^= 255
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(
        DataError,
        match=r"The image 'a\.png' in 'zip:.*data\.zip' cannot be read: Bad CRC-32 for file 'a\.png'\.",
    ):
        open_source(str(tmp_path / "data.zip"))


def test_linked_folders_are_read_and_loops_are_cut(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", {"a/x.png": png(noise(0, 2, 2))})
    (tmp_path / "data" / "b").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    source = open_source(str(tmp_path / "data"))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]


@containers
@pytest.mark.parametrize("view", [View(), View(resize=5), View(channels=1), View(resize=9, channels=3)])
def test_decoding_on_demand_equals_decoding_at_once(tmp_path: Path, make: Make, view: View) -> None:
    opener = folder if make is make_folder else zipped
    path = make(tmp_path, {f"{i % 3}/{i}.png": png(noise(i, 7, 8, *([3] * (i % 2)))) for i in range(12)})
    at_once, on_demand = opener(path, view), opener(path, view, in_memory_bytes=0)
    assert isinstance(at_once, ArraySource)
    assert isinstance(on_demand, FileImages)
    assert (at_once.name, at_once.shape, at_once.num_classes) == (
        on_demand.name,
        on_demand.shape,
        on_demand.num_classes,
    )
    assert at_once.labels is not None
    assert on_demand.labels is not None
    assert at_once.labels.tolist() == on_demand.labels.tolist()
    index = np.array([11, 0, 5, 5, 3])
    assert torch.equal(at_once.read(index), on_demand.read(index))
    assert on_demand.read(np.array([], np.int64)).shape == (0, *on_demand.shape)


@containers
@pytest.mark.parametrize("in_memory_bytes", [0, 2**20])
def test_the_fingerprint_follows_data_labels_and_settings(tmp_path: Path, make: Make, in_memory_bytes: int) -> None:
    opener = folder if make is make_folder else zipped
    image, other = png(noise(0, 6, 6)), png(noise(1, 6, 6))
    files = {"a/0.png": image, "b/1.png": image}

    def fingerprint(view: View, changed: dict[str, bytes] | None = None) -> str:
        return opener(make(tmp_path, files | (changed or {})), view, in_memory_bytes=in_memory_bytes).fingerprint

    path = make(tmp_path, files)
    again = [opener(path, View(), in_memory_bytes=in_memory_bytes).fingerprint for _ in range(2)]
    assert again[0] == again[1]
    assert len(again[0]) == 64
    variants = [
        again[0],
        fingerprint(View(labels=False)),
        fingerprint(View(resize=3)),
        fingerprint(View(channels=3)),
    ]
    variants.append(fingerprint(View(), {"b/1.png": other}))
    variants.append(
        fingerprint(View(), {"b/1.png": image, "dataset.json": b'{"labels": [["a/0.png", 1], ["b/1.png", 0]]}'})
    )
    assert len(set(variants)) == len(variants)


def test_a_file_changed_under_an_open_source_is_noticed(tmp_path: Path) -> None:
    path = make_folder(tmp_path, {"a.png": png(noise(0, 4, 4)), "b.png": png(noise(1, 4, 4))})
    source = folder(path, View(), in_memory_bytes=0)
    (tmp_path / "b.png").write_bytes(png(noise(1, 8, 4)))
    with pytest.raises(DataError, match=r"'b\.png' is 4x8, 'the data when they were opened' is 4x4"):
        source.read(np.array([1]))


# ---- npz


@pytest.mark.parametrize(
    ("shape", "to_nchw"),
    [
        ((5, 6, 7), lambda x: x[:, None]),
        ((5, 6, 7, 1), lambda x: x.transpose(0, 3, 1, 2)),
        ((5, 6, 7, 3), lambda x: x.transpose(0, 3, 1, 2)),
        ((5, 1, 6, 7), lambda x: x),
        ((5, 3, 6, 7), lambda x: x),
        ((5, 3, 6, 3), lambda x: x.transpose(0, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("key", ["x", "images", "x_train"])
def test_npz_layouts(
    tmp_path: Path, shape: tuple[int, ...], to_nchw: Callable[[np.ndarray], np.ndarray], key: str
) -> None:
    x = noise(0, *shape)
    source = open_source(make_npz(tmp_path, **{key: x}))
    assert np.array_equal(everything(source), to_nchw(x))
    assert (source.labels, source.num_classes) == (None, 0)


def test_npz_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    x = noise(0, 2, 3, 3, 4)
    x[0, ..., 3], x[1, ..., 3] = 0, 255
    seen = everything(open_source(make_npz(tmp_path, images=x)))
    assert (seen[0] == 255).all()
    assert np.array_equal(seen[1], x[1, ..., :3].transpose(2, 0, 1))


def test_npz_splits_and_labels(tmp_path: Path) -> None:
    train, test = noise(0, 6, 4, 4), noise(1, 3, 4, 4)
    y = np.array([[3], [0], [1], [1], [2], [0]])
    path = make_npz(tmp_path, x_train=train, y_train=y, x_test=test, y_test=np.array([1, 0, 4], np.uint8))
    source = open_source(path)
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert (source.labels.tolist(), source.num_classes) == ([3, 0, 1, 1, 2, 0], 4)
    held_out = open_source(path, split="test")
    assert np.array_equal(everything(held_out)[:, 0], test)
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [1, 0, 4]
    assert open_source(path, labels=False).labels is None


def test_npz_blocks_equal_single_images(tmp_path: Path) -> None:
    x = noise(0, 2500, 6, 5, 3)
    source = open_source(make_npz(tmp_path, x=x), resize=4, channels=1)
    alone = open_source(make_npz(tmp_path, x=x[2048:2049]), resize=4, channels=1)
    assert np.array_equal(everything(source)[2048:2049], everything(alone))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        (
            {"x": np.zeros((2, 4, 4))},
            {},
            r"The images of '.*' are not bytes\. Got: float64\. Wanted: uint8, 0\.\.255\.",
        ),
        (
            {"x": noise(0, 4, 4)},
            {},
            r"have a wrong shape\. Got: \[4, 4\]\. "
            r"Wanted: \[n,h,w\], \[n,h,w,c\] or \[n,c,h,w\] with c 1, 3 or 4\.",
        ),
        ({"x": noise(0, 2, 5, 5, 5)}, {}, r"have a wrong shape\. Got: \[2, 5, 5, 5\]\."),
        ({"x": noise(0, 0, 5, 5)}, {}, r"There are no images in '.*'\. Got: shape \[0, 5, 5\]\."),
        (
            {"x64": noise(0, 2, 4, 4)},
            {},
            r"images for the split 'train'\. Got: the keys x64\. Wanted: x or images or samples or arr_0 or x_train\.",
        ),
        (
            {"x": noise(0, 2, 4, 4)},
            {"split": "test"},
            r"has no images for the split 'test'\. Got: the keys x\. Wanted: x_test\.",
        ),
        (
            {"x": np.array([None, {}], object)},
            {},
            r"The npz '.*' cannot be read: Object arrays cannot be loaded when allow_pickle=False\.",
        ),
        (
            {"x": noise(0, 2, 4, 4), "y": np.array([0.5, 1])},
            {},
            r"The labels of '.*' cannot be used\. Got: float64 \[2\]\. Wanted: whole numbers \[2\]",
        ),
        (
            {"x": noise(0, 2, 4, 4), "y": np.array([1])},
            {},
            r"cannot be used\. Got: int64 \[1\]\. Wanted: whole numbers \[2\], one per image\.",
        ),
        (
            {"x": noise(0, 2, 4, 4), "y": np.array([0, -1])},
            {},
            r"is not a class index\. Got: -1\. Wanted: a whole number from 0\.",
        ),
    ],
)
def test_bad_npz_are_explained(
    tmp_path: Path, arrays: dict[str, np.ndarray], options: dict[str, str], message: str
) -> None:
    path = make_npz(tmp_path, **arrays)
    with pytest.raises(DataError, match=message):
        open_source(path, split=options.get("split", "train"))


def test_a_damaged_npz_is_explained(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"'.*bad\.npz' is not an npz archive, or is damaged\."):
        open_source(str(tmp_path / "bad.npz"))
    content = Path(make_npz(tmp_path, x=noise(0, 9, 9, 9))).read_bytes()
    (tmp_path / "bad.npz").write_bytes(content[:200] + bytes(8) + content[208:])
    with pytest.raises(DataError, match=r"The npz '.*bad\.npz' cannot be read: Bad CRC-32 for file 'x\.npy'\."):
        open_source(str(tmp_path / "bad.npz"))
