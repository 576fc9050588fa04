"""Latents of a source: encoded once, kept, continued to the same bits, and never mistaken for others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.backbones.vae import VaeCodec, codec_of
from fewstep.data import latents as module
from fewstep.data.cache import place_for
from fewstep.data.latents import Decoded, LatentSource, latents_key, latents_of, open_latents, pictures_of
from fewstep.data.sources import ArraySource
from fewstep.errors import ConfigError, DataError
from fewstep.training.latents import _encoded
from fewstep.training.loop import Watcher
from fewstep.world import World

MakeVae = Callable[..., Any]
COUNT, BLOCK = 22, 4


class Counting(VaeCodec):
    """Counts the images that are encoded; Ctrl-C at image ``stop``."""

    def __init__(self, codec: VaeCodec, stop: int = 10**9) -> None:
        super().__init__(codec.about, codec._vae)
        self.images, self.stop = 0, stop

    def encode(self, images: Tensor) -> Tensor:
        if self.images + len(images) > self.stop:
            raise KeyboardInterrupt
        self.images += len(images)
        return super().encode(images)


def images(seed: int = 0, side: int = 8, channels: int = 3) -> ArraySource:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (COUNT, channels, side, side), dtype=torch.uint8, generator=generator)
    return ArraySource("noise", x, np.arange(COUNT) % 3, captions=[f"number {i}" for i in range(COUNT)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of two blocks of four images, so that 22 images fill two and leave a third unfinished."""
    monkeypatch.setattr(module, "BLOCK", BLOCK)
    monkeypatch.setattr(module, "SHARD_BYTES", 2 * BLOCK * 32 * 4)


@pytest.fixture
def codec(pipeline: Path) -> Counting:
    return Counting(codec_of(pipeline))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


EVERY = np.arange(COUNT)


def test_every_image_is_encoded_once_and_read_back(codec: Counting, tmp_path: Path) -> None:
    source, told = images(), []
    latents = latents_of(source, codec, tmp_path, on_encoded=lambda done, total: told.append((done, total)))
    want = codec.encode(source.read(EVERY))
    torch.testing.assert_close(latents.read(EVERY), want, rtol=0, atol=1e-6)
    assert torch.equal(latents.read(np.array([20, 3, 3])), latents.read(EVERY)[[20, 3, 3]])
    assert told == [(n, COUNT) for n in (0, 4, 8, 12, 16, 20, 22)]
    assert latents.shape == (2, 4, 4) and len(latents) == COUNT and not latents.is_images
    assert latents.labels is source.labels and latents.num_classes == 3 and latents.name == "noise"
    assert latents.captions == source.captions and latents.pixels is source
    mean, std = latents.moments
    assert mean == pytest.approx(float(want.mean()), abs=1e-5) and std == pytest.approx(float(want.std()), rel=1e-5)


def test_a_second_call_does_not_call_the_vae(codec: Counting, tmp_path: Path) -> None:
    first = latents_of(images(), codec, tmp_path)
    assert codec.images == COUNT
    told: list[int] = []
    second = latents_of(images(), codec, tmp_path, on_encoded=lambda done, total: told.append(done))
    assert codec.images == COUNT and told == []
    assert second.fingerprint == first.fingerprint and torch.equal(second.read(EVERY), first.read(EVERY))
    assert open_latents(images(), codec, tmp_path).fingerprint == first.fingerprint


@pytest.mark.parametrize("stop", [0, 4, 12, 20])
def test_a_stop_loses_nothing_and_changes_no_bit(codec: Counting, tmp_path: Path, stop: int) -> None:
    whole = latents_of(images(), codec, tmp_path / "whole")
    codec.images, codec.stop = 0, stop
    with pytest.raises(KeyboardInterrupt):
        latents_of(images(), codec, tmp_path / "cut")
    assert codec.images == stop
    with pytest.raises(DataError):
        open_latents(images(), codec, tmp_path / "cut")
    codec.stop = 10**9
    again = latents_of(images(), codec, tmp_path / "cut")
    assert codec.images == COUNT  # the rest, and nothing twice
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert again.fingerprint == whole.fingerprint


def test_the_key_is_of_all_that_latents_depend_on(make_vae: MakeVae, pipeline: Path, tmp_path: Path) -> None:
    codec = codec_of(pipeline)
    variants = {
        "same": latents_key(images(), codec),
        "other weights": latents_key(images(), codec_of(make_vae(seed=1, scaling_factor=0.7, shift_factor=0.1))),
        "other scale": latents_key(images(), codec_of(make_vae(scaling_factor=0.8, shift_factor=0.1))),
        "other shift": latents_key(images(), codec_of(make_vae(scaling_factor=0.7))),
        "other size": latents_key(images(side=16), codec),
        "other images": latents_key(images(seed=1), codec),
        "other labels": latents_key(ArraySource("noise", images().data, None), codec),
    }
    assert len(set(variants.values())) == len(variants)
    make_vae(scaling_factor=0.7, shift_factor=0.1).save_pretrained(tmp_path / "elsewhere")
    assert latents_key(images(), codec_of(tmp_path / "elsewhere")) == variants["same"]


def test_a_damaged_shard_is_found_and_made_again(codec: Counting, tmp_path: Path) -> None:
    latents_of(images(), codec, tmp_path)
    before, (shard, *_) = files_of(tmp_path), sorted(tmp_path.rglob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-00000.*its content differs.*Delete it.*again"):
        latents_of(images(), codec, tmp_path).read(EVERY)
    shard.write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"shard-00000.*damaged"):
        latents_of(images(), codec, tmp_path)
    shard.unlink()
    latents_of(images(), codec, tmp_path)
    assert files_of(tmp_path) == before
    next(tmp_path.rglob("shard-00001*")).unlink()
    codec.images = 0
    latents_of(images(), codec, tmp_path)
    assert files_of(tmp_path) == before and codec.images == COUNT - 2 * BLOCK  # goes on with whole blocks


def test_images_that_the_vae_does_not_read_are_refused(codec: Counting, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--channels 3"):
        latents_of(images(channels=1), codec, tmp_path)
    assert files_of(tmp_path) == {}


def test_what_latents_look_like(codec: Counting, tmp_path: Path) -> None:
    source = images()
    latents = latents_of(source, codec, tmp_path)
    assert pictures_of(latents, codec) is source
    assert pictures_of(source, codec) is source and pictures_of(source, None) is source
    bare = ArraySource("made", latents.read(EVERY), source.labels)
    decoded = pictures_of(bare, codec)
    assert isinstance(decoded, Decoded) and decoded.is_images and decoded.shape == (3, 8, 8) and len(decoded) == COUNT
    assert torch.equal(decoded.read(EVERY[:3]), codec.decode(bare.data[:3]))
    assert decoded.labels is bare.labels and decoded.fingerprint != bare.fingerprint
    assert pictures_of(bare, None) is bare


def test_where_they_are_kept(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_for("latents") == own_cache / "latents"
    assert place_for("latents", str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.delenv("FEWSTEP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert place_for("latents") == tmp_path / "fewstep" / "latents"
    monkeypatch.setattr("fewstep.data.cache.cache_directory", lambda: None)
    with pytest.raises(ConfigError, match="no home directory.*data.cache=FOLDER"):
        place_for("latents")


class Pair(World):
    """One of two processes, played by a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier, flags: list[bool]) -> None:
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "shared", (barrier, flags))

    def any(self, flag: bool) -> bool:
        barrier, flags = self.shared  # type: ignore[attr-defined]
        flags[self.rank] = flag
        barrier.wait(20)
        found = any(flags)
        barrier.wait(20)
        return found


@pytest.mark.parametrize("stop", [10**9, 8])
def test_one_process_encodes_and_the_others_wait(codec: Counting, tmp_path: Path, stop: int) -> None:
    codec.stop = stop
    barrier, flags = threading.Barrier(2), [False, False]
    found: list[LatentSource | BaseException] = []

    def follow() -> None:
        try:
            follower = Counting(codec, stop=0)
            found.append(_encoded(images(), follower, tmp_path, Pair(1, barrier, flags), Watcher()))
        except BaseException as error:
            found.append(error)

    other = threading.Thread(target=follow)
    other.start()
    try:
        mine = _encoded(images(), codec, tmp_path, Pair(0, barrier, flags), Watcher())
        assert stop > COUNT
    except KeyboardInterrupt:
        assert stop == 8
    other.join(30)
    if stop == 8:
        assert isinstance(found[0], DataError)  # it does not wait for ever
    else:
        assert isinstance(found[0], LatentSource) and found[0].fingerprint == mine.fingerprint
