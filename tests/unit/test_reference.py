"""References: one pass in constant memory, the cache, statistics files, and what may be compared with what."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data import Source, open_source
from fewstep.data.sources import ArraySource
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation import reference as module
from fewstep.evaluation.features import FeatureNet, open_features
from fewstep.evaluation.metrics import frechet_distance, gaussian_stats
from fewstep.evaluation.reference import (
    CODING,
    Reference,
    cache_directory,
    check_comparable,
    open_reference,
    save_statistics,
)
from fewstep.evaluation.statistics_file import UNSTATED, is_statistics

DIM = 5


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, *(shape or (1, 4, 4))), dtype=np.uint8))


def source(n: int = 700, *shape: int, seed: int = 0, name: str = "made") -> ArraySource:
    return ArraySource(name, images(n, *shape, seed=seed), np.arange(n) % 7)


class Counting:
    """A feature net that notes the batches it is given: random projections of the pixels."""

    def __init__(self, dim: int = DIM, name: str = "Counting", digest: str = "0" * 64) -> None:
        self.batches: list[int] = []
        self.net = FeatureNet(name, dim, digest, self._extract)

    def _extract(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        flat = x.flatten(1).double() / 255
        axes = torch.randn(flat.shape[1], self.net.dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return (flat @ axes).float()


def entries() -> list[Path]:
    root = cache_directory()
    assert root is not None
    return sorted((root / "references").iterdir()) if (root / "references").is_dir() else []


def same(a: Reference, b: Reference) -> bool:
    """To the bit."""
    assert a.rows is not None and b.rows is not None
    pairs = ((a.stats.mean, b.stats.mean), (a.stats.cov, b.stats.cov), (a.rows, b.rows))
    return all(torch.equal(x, y) for x, y in pairs) and a.stats.count == b.stats.count


def alike(a: Reference, b: Reference) -> bool:
    """To rounding: two passes over the same data, whose sums depend on how memory happens to be aligned."""
    assert a.rows is not None and b.rows is not None
    pairs = ((a.stats.mean, b.stats.mean), (a.stats.cov, b.stats.cov), (a.rows, b.rows))
    return all(torch.allclose(x, y, rtol=1e-6, atol=1e-7) for x, y in pairs) and a.stats.count == b.stats.count


# ---- the pass over the data


def test_statistics_are_of_everything_and_rows_are_evenly_spaced() -> None:
    data, net = source(1300), Counting().net
    reference = open_reference(data, net, rows=11, cache=False)
    everything = net.extract(data.data)
    expected, index = gaussian_stats(everything), [round(i * 1299 / 10) for i in range(11)]
    torch.testing.assert_close(reference.stats.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.stats.cov, expected.cov, rtol=1e-9, atol=1e-12)
    assert reference.stats.count == 1300
    torch.testing.assert_close(reference.rows, everything[index], rtol=1e-6, atol=1e-6)
    assert reference.labels is not None and reference.labels.tolist() == [i % 7 for i in index]
    assert reference.labels.dtype == torch.int64
    assert reference.source is data


@pytest.mark.parametrize("rows", [None, 5000])
def test_all_rows_are_kept_where_they_fit(rows: int | None) -> None:
    data, net = source(600), Counting().net
    reference = open_reference(data, net, rows=rows, batch_size=600)
    torch.testing.assert_close(reference.rows, net.extract(data.data), rtol=1e-6, atol=1e-6)
    assert reference.info["rows"] == 600


def test_batches_do_not_matter() -> None:
    whole = open_reference(source(), Counting().net, batch_size=700, cache=False)
    parts = open_reference(source(), Counting().net, batch_size=9, cache=False)
    torch.testing.assert_close(parts.stats.cov, whole.stats.cov, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(parts.rows, whole.rows, rtol=1e-5, atol=1e-5)


def test_what_a_reference_says_of_itself(own_cache: Path) -> None:
    info = open_reference(source(300, 3, 4, 4), Counting().net, split="train", rows=20).info
    fingerprint = source(300, 3, 4, 4).fingerprint
    assert json.loads(json.dumps(info)) == info
    assert info["preprocessing"] == {"resize": None, "channels": None, "shape": [3, 4, 4], "coding": CODING[True]}
    assert (info["source"], info["split"], info["count"], info["rows"]) == ("made", "train", 300, 20)
    assert info["fingerprint"] == fingerprint
    assert info["notes"] == []
    assert Path(info["cache"]).parent == own_cache / "references" and Path(info["cache"]).is_dir()
    other = open_reference(source(300, 1, 4, 4), Counting().net, rows=20).info
    assert info["preprocessing_hash"] != other["preprocessing_hash"]


def test_auto_is_pixels_for_small_and_pca_for_large_samples() -> None:
    assert open_reference("digits", rows=10).net.name == "Pixels"
    assert open_reference(source(300, 1, 17, 17)).net.name == "PCA64"
    assert open_reference(source(300, 1, 16, 16)).net.name == "Pixels"


def test_a_pca_is_the_one_of_open_features() -> None:
    data = source(300, 1, 8, 8)
    reference = open_reference(data, "pca:4", rows=300)
    expected = open_features("pca:4", reference=data.data)
    assert reference.net.hash == expected.hash
    torch.testing.assert_close(reference.rows, expected.extract(data.data), rtol=1e-4, atol=1e-5)


def test_splits_are_read_as_named(tmp_path: Path) -> None:
    x, x_test = images(40, 4, 4).numpy(), images(30, 4, 4, seed=1).numpy()
    np.savez(tmp_path / "two.npz", x_train=x, x_test=x_test)
    train = open_reference(tmp_path / "two.npz", "pixels")
    test = open_reference(tmp_path / "two.npz", "pixels", split="test")
    assert (train.info["split"], train.info["count"]) == ("train", 40)
    assert (test.info["split"], test.info["count"]) == ("test", 30)
    assert train.info["fingerprint"] != test.info["fingerprint"]
    torch.testing.assert_close(test.stats.mean.float(), torch.from_numpy(x_test).flatten(1).float().mean(0) / 127.5 - 1)


class Endless:
    """A source too large for memory that notes how much is asked for at once."""

    name, num_classes, is_images, labels = "endless", 0, True, None

    def __init__(self, count: int, *shape: int) -> None:
        self.shape, self.fingerprint, self._count = shape, f"endless {count} {shape}", count
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self._count

    def read(self, index: np.ndarray) -> Tensor:
        self.asked.append(len(index))
        ramp = (torch.from_numpy(index) % 251).to(torch.uint8).reshape(-1, *(1 for _ in self.shape))
        return ramp.expand(len(index), *self.shape)


def test_memory_does_not_grow_with_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_VALUES", 90)
    data, net = Endless(50_000, 1, 2, 2), Counting()
    reference = open_reference(data, net.net, batch_size=50)
    assert sum(data.asked) == sum(net.batches) == 50_000
    assert max(data.asked) == 500
    assert max(net.batches) == 50
    assert reference.rows is not None and reference.rows.shape == (90 // DIM, DIM)
    assert reference.info["rows"] == 18
    big = Endless(40, 3, 1024, 1024)
    tiny = FeatureNet("Corner", 1, "c", lambda x: x[:, 0, :1, 0].float())
    open_reference(big, tiny, batch_size=64)
    assert max(big.asked) * 3 * 1024 * 1024 <= 2**26


def test_other_nets_than_a_pca_do_not_read_thousands_of_samples_to_be_opened() -> None:
    data = Endless(6000, 1, 4, 4)
    open_reference(data, "pixels")
    assert data.asked[0] == 256
    data = Endless(6000, 1, 4, 4)
    open_reference(data, "pca:2", rows=2, cache=False)
    assert data.asked[0] == 4096


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        open_reference(source(1200), Counting().net, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(512, 1200), (1024, 1200), (1200, 1200), (1200, 1200)]


def test_no_random_stream_is_touched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    open_reference(source(), "pca:3")
    assert torch.equal(torch.get_rng_state(), before)


# ---- the cache


def test_a_second_call_reads_the_cache_to_the_bit_and_does_not_call_the_net() -> None:
    first, again = Counting(), Counting()
    made, read = open_reference(source(), first.net), open_reference(source(), again.net)
    assert sum(first.batches) == 700
    assert again.batches == []
    assert same(made, read)
    assert made.info == read.info
    assert (read.stats.mean.dtype, read.rows is not None and read.rows.dtype) == (torch.float64, torch.float32)
    assert read.labels is not None and made.labels is not None and torch.equal(read.labels, made.labels)
    assert len(entries()) == 1


def test_the_same_data_under_another_name_is_found_and_named_as_asked() -> None:
    open_reference(source(name="old"), Counting().net)
    again = Counting()
    assert open_reference(source(name="new"), again.net, split="train").info["source"] == "new"
    assert again.batches == []


def relabelled() -> ArraySource:
    data = source()
    return ArraySource(data.name, data.data, (np.arange(700) + 1) % 7)


VARIANTS: dict[str, Callable[[], tuple[Source, FeatureNet, int]]] = {
    "name of the net": lambda: (source(), Counting(name="Other").net, 50),
    "weights of the net": lambda: (source(), Counting(digest="1" * 64).net, 50),
    "preprocessing of the net": lambda: (source(), dataclasses.replace(Counting().net, preprocessing="x/255"), 50),
    "dimension": lambda: (source(), Counting(dim=4).net, 50),
    "one pixel": lambda: (source(seed=1), Counting().net, 50),
    "one sample less": lambda: (source(699), Counting().net, 50),
    "labels": lambda: (relabelled(), Counting().net, 50),
    "rows": lambda: (source(), Counting().net, 49),
}


@pytest.mark.parametrize("change", VARIANTS)
def test_the_key_changes_with_everything_that_matters(change: str) -> None:
    kept = open_reference(source(), Counting().net, rows=50)
    data, net, rows = VARIANTS[change]()
    other = open_reference(data, net, rows=rows)
    assert kept.info["cache"] != other.info["cache"]
    assert len(entries()) == 2


def test_the_key_changes_with_the_view(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=images(30, 8, 8, 3).numpy())
    views: list[dict[str, int]] = [{}, {"resize": 4}, {"channels": 1}, {"resize": 4, "channels": 1}]
    found = [open_reference(tmp_path / "x.npz", "pixels", **view) for view in views]  # type: ignore[arg-type]
    assert len({reference.info["cache"] for reference in found}) == 4
    assert [reference.net.dim for reference in found] == [192, 48, 64, 16]
    assert found[3].info["preprocessing"]["resize"] == 4
    assert found[3].info["preprocessing"]["shape"] == [1, 4, 4]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-11] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_text("[1, 2")


def of_another_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))


DAMAGE = [
    ("statistics.safetensors", truncate),
    ("statistics.safetensors", flip),
    ("statistics.safetensors", empty),
    ("statistics.safetensors", Path.unlink),
    ("reference.json", garble),
    ("reference.json", empty),
    ("reference.json", of_another_version),
    ("reference.json", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_entry_is_made_anew(name: str, damage: Callable[[Path], Any]) -> None:
    made = open_reference(source(), Counting().net)
    damage(entries()[0] / name)
    net = Counting()
    again = open_reference(source(), net.net)
    assert sum(net.batches) == 700
    assert alike(made, again)
    assert len(again.info["notes"]) == 1 and "damaged and is made anew" in again.info["notes"][0]
    third = Counting()
    assert open_reference(source(), third.net).info["notes"] == []
    assert third.batches == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_reference(source(), Counting().net)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        net = Counting()
        reference = open_reference(source(), net.net)
        assert sum(net.batches) == 700
        assert alike(made, reference)
        assert len(reference.info["notes"]) == 1 and "could not be kept in the cache" in reference.info["notes"][0]
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_full_disk_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    reference = open_reference(source(), Counting().net)
    assert "No space left on device" in reference.info["notes"][0]
    assert entries() == []


def test_without_a_cache_nothing_is_read_or_written(own_cache: Path) -> None:
    reference = open_reference(source(), Counting().net, cache=False)
    assert not own_cache.exists()
    assert (reference.info["cache"], reference.info["notes"]) == (None, [])
    open_reference(source(), Counting().net)
    net = Counting()
    open_reference(source(), net.net, cache=False)
    assert sum(net.batches) == 700


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEWSTEP_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("FEWSTEP_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "fewstep"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the XDG specification
    assert cache_directory() == tmp_path / ".cache" / "fewstep"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / ".cache" / "fewstep"


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cache_directory", lambda: None)
    assert "Set FEWSTEP_CACHE" in open_reference(source(), Counting().net).info["notes"][0]


def test_two_processes_at_once(own_cache: Path) -> None:
    script = "from fewstep.evaluation.reference import open_reference; print(open_reference('digits').info['cache'])"
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    done = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    assert done[0][0] == done[1][0]
    assert [entry.name for entry in entries()] == [Path(done[0][0].strip()).name]
    assert open_reference("digits").info["notes"] == []


# ---- statistics files


def edm_file(path: Path, dim: int = DIM, **more: Any) -> Path:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(dim, 2 * dim))
    np.savez(path, **({"mu": rng.normal(size=dim), "sigma": a @ a.T} | more))
    return path


def test_edms_file_is_read_and_its_silence_is_noted(tmp_path: Path) -> None:
    net = Counting().net
    reference = open_reference(edm_file(tmp_path / "cifar10-32x32.npz"), net)
    with np.load(tmp_path / "cifar10-32x32.npz", allow_pickle=False) as file:
        assert np.array_equal(reference.stats.mean, file["mu"])
        assert np.array_equal(reference.stats.cov, file["sigma"])
    assert (reference.rows, reference.labels, reference.source) == (None, None, None)
    assert reference.stats.count == UNSTATED
    info = reference.info
    assert (info["split"], info["count"], info["preprocessing"], info["rows"]) == (None, None, {}, 0)
    assert info["notes"] == [
        f"Not stated in the statistics '{tmp_path}/cifar10-32x32.npz': split, count, preprocessing of the reference"
    ]
    check_comparable(reference, (3, 32, 32), True)
    assert entries() == []
    fake = gaussian_stats(torch.randn(50, DIM, generator=torch.Generator().manual_seed(0)))
    assert frechet_distance(reference.stats, fake) == pytest.approx(frechet_distance(fake, reference.stats), rel=1e-12)


def test_our_own_file_comes_back_as_it_was(tmp_path: Path) -> None:
    net = Counting().net
    made = open_reference(source(300, 3, 4, 4), net, split="train", channels=3)
    path = save_statistics(tmp_path / "new" / "made.npz", made)
    read = open_reference(path, net)
    assert torch.equal(read.stats.mean, made.stats.mean)
    assert torch.equal(read.stats.cov, made.stats.cov)
    assert read.stats.count == 300
    assert read.rows is None and read.source is None
    for key in ("source", "split", "count", "fingerprint", "preprocessing", "preprocessing_hash"):
        assert read.info[key] == made.info[key], key
    assert (read.info["net"], read.info["net_hash"]) == (net.name, net.hash)
    assert read.info["notes"] == []
    assert [p.name for p in path.parent.iterdir()] == ["made.npz"]
    with np.load(path, allow_pickle=False) as file:  # as other tools do
        assert (file["mu"].shape, file["sigma"].shape, file["mu"].dtype) == ((DIM,), (DIM, DIM), np.float64)
        assert str(file["net"]) == "Counting"
    with pytest.raises(ConfigError, match=r"\.npz"):
        save_statistics(tmp_path / "made.txt", made)


def test_a_file_can_be_saved_again_without_inventing_what_it_does_not_say(tmp_path: Path) -> None:
    net = Counting().net
    reference = open_reference(edm_file(tmp_path / "a.npz"), net)
    again = open_reference(save_statistics(tmp_path / "b.npz", reference), net)
    assert again.info["count"] is None and again.info["split"] is None and again.info["preprocessing"] == {}
    assert torch.equal(again.stats.cov, reference.stats.cov)


def test_another_number_of_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        open_reference(edm_file(tmp_path / "cifar10.npz", dim=384), Counting().net)
    assert "Got: 384 features, probably of DINOv2 ViT-S/14. Wanted: 5 features." in str(error.value)
    with pytest.raises(DataError, match=r"Got: 6 features\. Wanted: 5 features"):
        open_reference(edm_file(tmp_path / "own.npz", dim=6), Counting().net)
    made = open_reference(source(300), Counting().net)
    path = save_statistics(tmp_path / "saved.npz", made)
    with pytest.raises(DataError, match=r"Got: 5 features, of Counting\. Wanted: 4 features"):
        open_reference(path, Counting(dim=4).net)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "saved.npz", open_reference(source(300), Counting().net))
    with pytest.raises(DataError, match=r"hash 000000000000\. Wanted: Counting with the hash 111111111111"):
        open_reference(path, Counting(digest="1" * 64).net)


def test_another_preprocessing_of_the_net_is_refused(tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "saved.npz", open_reference(source(300), Counting().net))
    with pytest.raises(DataError, match="another preprocessing in front of Counting.*Wanted: 'x/255'"):
        open_reference(path, dataclasses.replace(Counting().net, preprocessing="x/255"))


def test_our_own_file_refuses_samples_of_another_size(tmp_path: Path) -> None:
    made = open_reference(source(300, 3, 4, 4), Counting().net)
    read = open_reference(save_statistics(tmp_path / "saved.npz", made), Counting().net)
    check_comparable(read, (3, 4, 4), True)
    with pytest.raises(
        DataError, match="differ in resolution.*8x8 RGB.*4x4 RGB.*statistics of images like the samples"
    ):
        check_comparable(read, (3, 8, 8), True)
    with pytest.raises(DataError, match="differ in channels"):
        check_comparable(read, (1, 4, 4), True)


@pytest.mark.parametrize("features", ["auto", "pca:3"])
def test_the_net_of_a_file_must_be_named(tmp_path: Path, features: str) -> None:
    with pytest.raises(ConfigError, match="do not contain the feature net.*--features"):
        open_reference(edm_file(tmp_path / "a.npz"), features)


def test_a_net_by_spec_is_tried_on_the_stated_shape(tmp_path: Path) -> None:
    made = open_reference(source(300, 1, 4, 4), "pixels")
    read = open_reference(str(save_statistics(tmp_path / "saved.npz", made)), "pixels")
    assert (read.net.dim, read.net.hash) == (16, made.net.hash)
    points = ArraySource("points", torch.randn(100, 2, generator=torch.Generator().manual_seed(0)), None)
    saved = save_statistics(tmp_path / "points.npz", open_reference(points, "pixels"))
    assert open_reference(saved, "pixels").net.dim == 2


def test_a_file_with_images_beside_its_statistics_counts_as_statistics(tmp_path: Path) -> None:
    path = edm_file(tmp_path / "adm.npz", arr_0=images(4, 8, 8, 3).numpy())
    assert is_statistics(path) and is_statistics(f"npz:{path}")
    assert open_reference(f"npz:{path}", Counting().net).source is None
    np.savez(tmp_path / "images.npz", x=images(4, 8, 8, 3).numpy())
    assert not is_statistics(tmp_path / "images.npz")
    assert not is_statistics("digits") and not is_statistics(tmp_path / "missing.npz")


def test_a_file_cannot_be_resized(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be resized"):
        open_reference(edm_file(tmp_path / "a.npz"), Counting().net, resize=32)


def asymmetric() -> np.ndarray:
    sigma = np.eye(DIM)
    sigma[0, 1] = 0.1
    return sigma


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "objects": ({"mu": np.array([None] * DIM)}, "cannot be read"),
    "integers": ({"mu": np.zeros(DIM, dtype=int)}, "wrong form.*mu int64"),
    "shape": ({"sigma": np.eye(DIM + 1)}, "wrong form"),
    "scalar": ({"mu": np.array(1.0)}, "wrong form"),
    "NaN": ({"mu": np.full(DIM, np.nan)}, "not finite"),
    "asymmetric": ({"sigma": asymmetric()}, "not symmetric"),
    "count": ({"count": np.array("many")}, "'count'"),
    "one sample": ({"count": np.array(1)}, "'count'"),
    "preprocessing": ({"preprocessing": np.array("{")}, "'preprocessing'"),
    "shape of text": ({"preprocessing": np.array('{"shape": ["a"]}')}, "'preprocessing'"),
    "list": ({"preprocessing": np.array("[1]")}, "'preprocessing'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    arrays, message = BAD_FILES[case]
    with pytest.raises(DataError, match=message):
        open_reference(edm_file(tmp_path / "a.npz", **arrays), Counting().net)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    path = edm_file(tmp_path / "a.npz", dim=64)
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read"):
        open_reference(path, Counting(dim=64).net)


# ---- what may be compared with what


def test_samples_like_the_reference_are_accepted() -> None:
    check_comparable(open_reference(source(300, 3, 4, 4), Counting().net), (3, 4, 4), True)
    check_comparable(
        open_reference(source(300), Counting().net), (1, 4, 4), True, {"resize": 4, "coding": CODING[True]}
    )


@pytest.mark.parametrize(
    ("shape", "is_images", "message"),
    [
        ((3, 8, 8), True, r"differ in resolution\. Got: 8x8 RGB\. Wanted: 4x6 RGB\. .*--resize 8"),
        ((1, 6, 4), True, r"differ in channels\. Got: 4x6 grey\. Wanted: 4x6 RGB\. .*--channels 1"),
        ((2,), False, r"coded differently\. Got: points"),
        ((72,), True, "do not have the shape"),
        ((3, 6, 4), False, "coded differently"),
    ],
)
def test_other_samples_are_refused(shape: tuple[int, ...], is_images: bool, message: str) -> None:
    reference = open_reference(source(300, 3, 6, 4), Counting().net)
    with pytest.raises(DataError, match=message):
        check_comparable(reference, shape, is_images)


def test_another_value_coding_is_refused() -> None:
    reference = open_reference(source(300), Counting().net)
    with pytest.raises(DataError, match="coded differently.*float 0..1"):
        check_comparable(reference, (1, 4, 4), True, {"coding": "float 0..1"})


# ---- bad input


def test_points_that_are_not_finite_are_refused() -> None:
    points = torch.arange(2000.0).reshape(1000, 2)
    points[[700, 701], 1] = float("nan")
    data = ArraySource("points", points, None)
    with pytest.raises(DataError, match="'points' hold values that are not finite.*in 2 of 488 samples.*number 700"):
        open_reference(data, Counting().net)
    for features in ("pixels", "pca:1"):
        with pytest.raises(DataError, match="'points' hold values that are not finite"):
            open_reference(data, features)
    assert entries() == []


def test_one_sample_is_no_reference() -> None:
    with pytest.raises(DataError, match=r"'few' has too few samples\. Got: 1\. Wanted: at least 2"):
        open_reference(ArraySource("few", images(1), None), Counting().net)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="at least two rows"):
        open_reference(source(), Counting().net, rows=1)
    with pytest.raises(ConfigError, match="open already"):
        open_reference(source(), Counting().net, resize=8)
    with pytest.raises(ConfigError, match="open already"):
        open_reference(source(), Counting().net, channels=3)
    with pytest.raises(ConfigError, match="batch size"):
        open_reference(source(), Counting().net, batch_size=0)
    assert open_reference(source(), Counting().net, resize=4, channels=1).info["preprocessing"]["resize"] == 4


def test_data_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data source"):
        open_reference(tmp_path / "missing.npz", "pixels")
    stream = io.BytesIO()
    Image.fromarray(images(1, 8, 8)[0].numpy()).save(stream, format="PNG")
    with zipfile.ZipFile(tmp_path / "cut.zip", "w") as archive:
        for i in range(20):
            archive.writestr(f"{i}.png", stream.getvalue())
    content = (tmp_path / "cut.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"The zip '.*cut\.zip' cannot be read"):
        open_reference(tmp_path / "cut.zip", "pixels")
    (tmp_path / "cut.npz").write_bytes(edm_file(tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(DataError, match="not an npz archive, or is damaged"):
        open_reference(tmp_path / "cut.npz", "pixels")


def test_a_frozen_reference_stays_as_it_is() -> None:
    reference = open_reference(open_source("digits"), "pixels", rows=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reference.rows = None  # type: ignore[misc]
