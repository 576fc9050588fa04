"""Captions beside images: tables, texts, EDM's record, npz, Hugging Face data sets, and what is wrong with them."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep import open_source
from fewstep.data import save_images
from fewstep.data.sources import captions_of
from fewstep.errors import DataError, FewstepError

NAMES = ["a.png", "b.png", "deep/c.jpg"]
TEXTS = ["a red square", "", 'blue, "round" — Grün']


def images(folder: Path) -> Path:
    """Three pictures; the last is in a folder of its own."""
    for i, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)).save(folder / name)
    return folder


def table(folder: Path, column: str = "text", texts: list[str] = TEXTS) -> None:
    rows = [{"file_name": n, column: t, "other": 1} for n, t in zip(NAMES, texts, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in reversed(rows)), encoding="utf-8")


def write(folder: Path, how: str) -> None:
    if how.startswith("jsonl"):
        table(folder, {"jsonl": "text", "jsonl-caption": "caption", "jsonl-prompt": "prompt"}[how])
    elif how == "csv":
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["file_name", "text"], *zip(NAMES, TEXTS, strict=True)])
    elif how == "txt":
        for name, text in zip(NAMES, TEXTS, strict=True):
            (folder / name).with_suffix(".txt").write_text(f" {text}\n", encoding="utf-8")
    elif how == "edm":
        pairs = [[name, text] for name, text in zip(NAMES, TEXTS, strict=True)]
        (folder / "dataset.json").write_text(json.dumps({"labels": None, "captions": pairs}), encoding="utf-8")


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder.parent))  # all below one folder
    return folder.with_suffix(".zip")


@pytest.mark.parametrize("how", ["jsonl", "jsonl-caption", "jsonl-prompt", "csv", "txt", "edm"])
def test_captions_are_read_in_the_order_of_the_images(how: str, tmp_path: Path) -> None:
    folder = images(tmp_path / "x")
    write(folder, how)
    for where in (folder, zipped(folder)):
        source = open_source(str(where))
        assert captions_of(source) == TEXTS
        assert source.read(np.arange(3)).float().mean((1, 2, 3)).tolist() == pytest.approx([0, 40, 80], abs=2)


def test_without_captions_there_are_none(tmp_path: Path) -> None:
    folder = images(tmp_path / "x")
    assert captions_of(open_source(str(folder))) is None
    table(folder, "label")
    assert captions_of(open_source(str(folder))) is None
    assert captions_of(open_source("digits")) is None


def test_a_source_of_ones_own_needs_no_captions() -> None:
    class Own:
        name = "own"

    assert captions_of(Own()) is None  # type: ignore[arg-type]


def test_captions_change_the_fingerprint_and_can_be_left_unread(tmp_path: Path) -> None:
    folder = images(tmp_path / "x")
    plain = open_source(str(folder)).fingerprint
    table(folder)
    first = open_source(str(folder))
    table(folder, texts=["a red circle", *TEXTS[1:]])
    other = open_source(str(folder))
    unread = open_source(str(folder), labels=False)
    assert len({plain, first.fingerprint, other.fingerprint}) == 3
    assert (unread.fingerprint, captions_of(unread)) == (plain, None)


def test_captions_of_images_that_are_decoded_when_read(tmp_path: Path) -> None:
    from fewstep.data.files import folder
    from fewstep.data.sources import View

    where = images(tmp_path / "x")
    table(where)
    lazy = folder(str(where), View(), in_memory_bytes=1)
    plain = folder(str(where), View(labels=False), in_memory_bytes=1)
    assert captions_of(lazy) == TEXTS
    assert lazy.fingerprint != plain.fingerprint


def test_captions_of_an_npz(tmp_path: Path) -> None:
    x = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "x.npz", x=x, captions=np.array(TEXTS))
    np.savez(tmp_path / "splits.npz", x_train=x, captions_train=np.array(TEXTS), x_test=x[:1], captions_test=["t"])
    assert captions_of(open_source(str(tmp_path / "x.npz"))) == TEXTS
    assert captions_of(open_source(str(tmp_path / "splits.npz"))) == TEXTS
    assert captions_of(open_source(str(tmp_path / "splits.npz"), split="test")) == ["t"]
    np.savez(tmp_path / "bad.npz", x=x, captions=np.array(TEXTS[:2]))
    with pytest.raises(DataError, match=r"captions of .*bad\.npz' cannot be used.*texts \[3\]"):
        open_source(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("target", ["out", "out.npz"])
def test_what_is_saved_is_read_back(target: str, tmp_path: Path) -> None:
    u8 = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    save_images(tmp_path / target, u8, captions=TEXTS)
    source = open_source(str(tmp_path / target))
    assert captions_of(source) == TEXTS
    assert torch.equal(source.read(np.arange(3)), u8)
    with pytest.raises(DataError, match="captions differ in number"):
        save_images(tmp_path / target, u8, captions=TEXTS[:2])
    if target == "out":
        with pytest.raises(FewstepError, match=r"holds 'metadata\.jsonl' of an earlier save"):
            save_images(tmp_path / target, u8)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n', r"no caption for 'b\.png'.*may be empty"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": ',
            r"'metadata\.jsonl' in .* is not readable: .*file_name and",
        ),
        ("metadata.jsonl", '{"name": "a.png", "text": "x"}\n', r"is not readable.*rows with file_name and text"),
        ("metadata.jsonl", "[1, 2]\n", r"is not readable"),
        ("metadata.csv", "file_name,text\na.png,x\n", r"no caption for 'b\.png'"),
        ("a.txt", "x", r"no caption for 'b\.png'"),
        ("dataset.json", '{"captions": [["a.png", "x"]]}', r"no caption for 'b\.png'"),
        ("dataset.json", '{"captions": 3}', r'is not readable.*"captions": \[\["name", text\]'),
        (
            "dataset.json",
            '{"captions": [["a.png", "x"], ["b.png", 3], ["deep/c.jpg", "y"]]}',
            r"A caption of .* is not a text.*3",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(file: str, content: str, said: str, tmp_path: Path) -> None:
    folder = images(tmp_path / "x")
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=said):
        open_source(str(folder))


def test_a_caption_that_is_no_text_in_utf8(tmp_path: Path) -> None:
    folder = images(tmp_path / "x")
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"'a\.txt' in .* is not readable.*UTF-8"):
        open_source(str(folder))


class TestHuggingFace:
    """``hf:`` sources on the disk; the library's cache is the test's own."""

    @pytest.fixture(autouse=True)
    def own_library_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = pytest.importorskip("datasets").config
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "library")
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)

    def table(self, **columns: list[object]) -> object:
        import datasets

        pictures = [Image.fromarray(np.full((4, 4, 3), 40 * i, np.uint8)) for i in range(3)]
        made = datasets.Dataset.from_dict({"n": [0, 1, 2], **columns, "picture": pictures})
        return made.cast_column("picture", datasets.Image())

    def test_image_folders(self, tmp_path: Path) -> None:
        folder = images(tmp_path / "x")
        table(folder)
        source, plain = open_source(f"hf:{folder}"), open_source(str(folder))
        order = [TEXTS.index(text) for text in captions_of(source) or []]
        assert sorted(order) == [0, 1, 2]
        assert torch.equal(source.read(np.argsort(order)), plain.read(np.arange(3)))

    @pytest.mark.parametrize("how", ["parquet", "folder", "disk"])
    def test_parquet_and_what_was_saved_to_disk(self, how: str, tmp_path: Path) -> None:
        made = self.table(text=TEXTS, long=["one", "two", "three"])
        where = tmp_path / "x"
        if how == "disk":
            made.save_to_disk(where)  # type: ignore[attr-defined]
        else:
            where.mkdir()
            made.to_parquet(where / "train.parquet")  # type: ignore[attr-defined]
            where = where / "train.parquet" if how == "parquet" else where
        source = open_source(f"hf:{where}")
        assert captions_of(source) == TEXTS
        assert source.labels is None
        assert source.read(np.arange(3)).float().mean((1, 2, 3)).tolist() == [0, 40, 80]
        other = open_source(f"hf:{where}#long")
        assert captions_of(other) == ["one", "two", "three"]
        assert open_source(other.name).fingerprint == other.fingerprint != source.fingerprint
        with pytest.raises(DataError, match=r"no column 'lang'.*Did you mean 'long'"):
            open_source(f"hf:{where}#lang")
        with pytest.raises(DataError, match="are not texts"):
            open_source(f"hf:{where}#n")
        with pytest.raises(DataError, match="split 'test'"):
            open_source(f"hf:{where}", split="test")

    def test_splits_that_were_saved_to_disk(self, tmp_path: Path) -> None:
        import datasets

        datasets.DatasetDict({"train": self.table(text=TEXTS)}).save_to_disk(tmp_path / "x")
        assert captions_of(open_source(f"hf:{tmp_path / 'x'}")) == TEXTS
        with pytest.raises(DataError, match=r"no split 'test'.*train"):
            open_source(f"hf:{tmp_path / 'x'}", split="test")

    def test_offline_a_name_is_one_sentence(self) -> None:
        with pytest.raises(DataError, match=r"no data set 'hf:nobody/nothing'.*hf download nobody/nothing --repo-type"):
            open_source("hf:nobody/nothing")

    def test_no_images(self, tmp_path: Path) -> None:
        import datasets

        (tmp_path / "x").mkdir()
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "x" / "train.parquet")
        with pytest.raises(DataError, match=r"no images in 'hf:.*1 rows of text"):
            open_source(f"hf:{tmp_path / 'x'}")

    def test_without_the_library_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(FewstepError, match=r"pip install 'fewstep\[data\]'"):
            open_source("hf:anything")
