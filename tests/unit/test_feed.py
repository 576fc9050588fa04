"""Batches as a function of the position alone: read ahead, or from samples that stay on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep import Denoiser
from fewstep.backbones import build
from fewstep.data.sources import ArraySource
from fewstep.denoiser import Parametrization
from fewstep.process import EDM
from fewstep.training import feed as module
from fewstep.training.config import DataConfig
from fewstep.training.feed import Feed


def images(count: int = 37) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 1, 4, 4), generator=generator).to(torch.uint8)
    return ArraySource("noise", x, np.arange(count) % 3)


def model(source: ArraySource) -> Denoiser:
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 4, 4], "channels": 8, "blocks": 1}}
    shape = tuple(source.shape)
    if len(shape) == 1:
        spec = {"name": "mlp", "kwargs": {"sample_shape": list(shape), "width": 8, "depth": 1}}
    return Denoiser(build(spec), EDM(), Parametrization(), sample_shape=shape, num_classes=3 * (len(shape) == 3))


@pytest.mark.parametrize("flip", [False, True])
def test_what_stays_on_the_device_is_what_is_read(monkeypatch: pytest.MonkeyPatch, flip: bool) -> None:
    """The same bits over two epochs, with labels and mirroring; and the source is read once."""
    monkeypatch.setattr(module, "BLOCK", 10)
    source, read = images(), 0
    original = source.read

    def counting(index: np.ndarray) -> torch.Tensor:
        nonlocal read
        read += len(index)
        return original(index)

    config = DataConfig(flip=flip, label_drop=0.3)
    plain = Feed(source, model(source), config, seed=5)
    source.read = counting  # type: ignore[method-assign]
    held = Feed(source, model(source), config, seed=5, resident="on")
    assert read == len(source)
    source.read = original  # type: ignore[method-assign]
    for start in range(0, 80, 16):
        ahead = range(start + 16, start + 32)
        one, other = (feed.batch(range(start, start + 16), ahead) for feed in (plain, held))
        assert torch.equal(one.x, other.x)
        assert one.cond is not None and other.cond is not None and torch.equal(one.cond, other.cond)
    assert read == len(source)
    mirrored = Feed(source, model(source), DataConfig(flip=True, label_drop=0.3), seed=5, resident="on")
    assert torch.equal(mirrored.batch(range(64, 80)).x, one.x) is flip
    for feed in (plain, held, mirrored):
        feed.close()


def test_points_stay_as_they_are() -> None:
    source = ArraySource("points", torch.randn(20, 2, generator=torch.Generator().manual_seed(1)), None)
    plain, held = (Feed(source, model(source), DataConfig(), 0, way) for way in ("off", "on"))  # type: ignore[arg-type]
    assert torch.equal(plain.batch(range(30)).x, held.batch(range(30)).x)
    plain.close()
    held.close()


def test_when_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto": on a GPU, where they fill at most a quarter of what is free; never on a CPU."""
    source, cuda = images(64), torch.device("cuda")  # 1,024 bytes
    free = {"bytes": 4096}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 10**9))
    assert module._stays(source, cuda, "auto")
    free["bytes"] = 4095
    assert not module._stays(source, cuda, "auto")
    assert module._stays(source, cuda, "on") and not module._stays(source, cuda, "off")
    assert not module._stays(source, torch.device("cpu"), "auto")
    points = ArraySource("points", torch.zeros(64, 4), None)  # float32: 1,024 bytes, too
    assert not module._stays(points, cuda, "auto")
    free["bytes"] = 4096
    assert module._stays(points, cuda, "auto")
