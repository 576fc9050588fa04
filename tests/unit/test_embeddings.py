"""Embedded captions: encoded once, resumed to the same bits; what a batch, a dropped row and an evaluation get."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Parametrization
from fewstep.conditioning import Part
from fewstep.data import embeddings
from fewstep.data.embeddings import embed, open_embedded, with_conditions
from fewstep.data.order import indices_at
from fewstep.data.sources import ArraySource, Source, captions_of, conditions_of
from fewstep.errors import DataError
from fewstep.evaluation.samples import draw_labels, generated
from fewstep.randomness import Streams
from fewstep.training.checks import check_fit
from fewstep.training.config import DataConfig
from fewstep.training.feed import Feed

WIDTH = 6


class Letters:
    """An encoder whose rows follow from the prompt, and from its neighbours a little, as rounding does."""

    width = WIDTH

    def __init__(self, salt: str = "") -> None:
        self.hash = hashlib.sha256(salt.encode()).hexdigest()
        self.calls: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.calls.append(list(prompts))
        rows = [[b / 255 for b in hashlib.sha256(p.encode()).digest()[:WIDTH]] for p in prompts]
        return torch.tensor(rows) + 1e-7 * len(prompts)


def captions(n: int = 40) -> list[str]:
    """25 different ones, then some of them again from the end."""
    return [f"caption {i if i < 25 else 49 - i}" for i in range(n)]


def test_every_different_caption_is_encoded_once_and_kept(tmp_path: Path) -> None:
    encoder, seen = Letters(), []
    found = embed(encoder, captions(), tmp_path, lambda done, total: seen.append((done, total)))
    assert [p for call in encoder.calls for p in call] == [f"caption {i}" for i in range(25)]
    assert seen == [(0, 25), (16, 25), (25, 25)]
    assert (found.width, len(found)) == (WIDTH, 40)
    rows = found.read(np.array([39, 0, 14, 14]))
    wanted = encoder.encode(["caption 10", "caption 0", "caption 14", "caption 14"])
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, wanted, atol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 0.01
    again = Letters()
    assert torch.equal(embed(again, captions(), tmp_path).read(np.arange(40)), found.read(np.arange(40)))
    assert again.calls == []
    assert torch.equal(open_embedded(again, captions(), tmp_path).read(np.arange(3)), found.read(np.arange(3)))


def test_other_encoders_and_other_captions_are_other_sets(tmp_path: Path) -> None:
    embed(Letters(), captions(), tmp_path)
    other, more = Letters("other"), Letters()
    embed(other, captions(), tmp_path)
    embed(more, [*captions(), "new"], tmp_path)
    assert [len(call) for call in other.calls] == [16, 9]
    assert [len(call) for call in more.calls] == [16, 10]
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(DataError, match="is not a set of shards"):
        open_embedded(Letters("third"), captions(), tmp_path)


def test_a_stop_changes_no_bit(tmp_path: Path) -> None:
    class Stops(Letters):
        def encode(self, prompts: Sequence[str]) -> Tensor:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().encode(prompts)

    many = [f"caption {i}" for i in range(70)]
    whole = embed(Letters(), many, tmp_path / "whole").read(np.arange(70))
    with pytest.raises(KeyboardInterrupt):
        embed(Stops(), many, tmp_path / "stopped")
    with pytest.raises(DataError, match="not finished"):
        open_embedded(Letters(), many, tmp_path / "stopped")
    after = Letters()
    assert torch.equal(embed(after, many, tmp_path / "stopped").read(np.arange(70)), whole)
    assert [len(call) for call in after.calls] == [16, 16, 6]


def test_a_stop_within_a_block_changes_no_bit(tmp_path: Path) -> None:
    """Whoever wrote 19 rows was stopped within a block: its other rows come from the whole block again."""
    from fewstep.data.shards import ShardWriter

    many = [f"caption {i}" for i in range(40)]
    whole = embed(Letters(), many, tmp_path / "whole").read(np.arange(40))
    name = next((tmp_path / "whole").iterdir()).name
    key = embeddings._key(Letters(), many)
    with ShardWriter(tmp_path / "part" / name, key, 40, 16) as writer:
        writer.add({"cond": whole[:19]})
    after = Letters()
    assert torch.equal(embed(after, many, tmp_path / "part").read(np.arange(40)), whole)
    assert [len(call) for call in after.calls] == [16, 8]


def test_large_sets_are_kept_in_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embed(Letters(), captions(), tmp_path / "whole").read(np.arange(40))
    monkeypatch.setattr(embeddings, "HALF_BYTES", 4 * WIDTH * 25 - 1)
    half = embed(Letters(), captions(), tmp_path / "half").read(np.arange(40))
    assert half.dtype == torch.float32
    assert torch.equal(half, whole.half().float())
    assert not torch.equal(half, whole)


class Backbone(nn.Module):
    """Adds the mean of what it is told."""

    null_cond: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("null_cond", torch.arange(WIDTH).float())

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return self.scale * x + cond.mean(1).reshape(-1, 1, 1, 1)


def told(classes: int = 0) -> Denoiser:
    parts = () if classes else (Part("text", (3, 2)),)
    return Denoiser(Backbone(), EDM(), Parametrization("edm"), sample_shape=(1, 4, 4), parts=parts, num_classes=classes)


def data(labels: np.ndarray | None = None, texts: list[str] | None = None) -> ArraySource:
    pixels = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 1, 4, 4).contiguous()
    return ArraySource("test", pixels, labels, captions=texts)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return with_conditions(data(texts=captions()), embed(Letters(), captions(), tmp_path))


def test_a_batch_has_the_rows_of_its_images(source: Source) -> None:
    feed = Feed(source, told(), DataConfig(), seed=3)
    batch, index = feed.batch(range(5, 17)), indices_at(3, 5, 12, 40)
    feed.close()
    assert batch.cond is not None
    assert torch.equal(batch.cond, conditions_of(source).read(index))  # type: ignore[union-attr]
    assert torch.equal(((batch.x[:, 0, 0, 0] + 1) * 127.5).round(), torch.from_numpy(index).float())


def test_dropped_rows_are_the_models_own_nothing(source: Source) -> None:
    kept = Streams(3).uniform("label_drop", torch.arange(40)) >= 0.5
    feed = Feed(source, told(), DataConfig(label_drop=0.5), seed=3)
    cond = feed.batch(range(40)).cond
    feed.close()
    assert cond is not None
    assert 8 < int(kept.sum()) < 32
    assert torch.equal(cond[~kept], torch.arange(WIDTH).float().expand(int((~kept).sum()), WIDTH))
    assert torch.equal(cond[kept], conditions_of(source).read(indices_at(3, 0, 40, 40)[kept.numpy()]))  # type: ignore[union-attr]


def test_dropped_classes_stay_zeros() -> None:
    model = told(classes=4)
    del model.backbone.null_cond
    labels = np.arange(40) % 4
    kept = Streams(0).uniform("label_drop", torch.arange(40)) >= 0.5
    feed = Feed(data(labels), model, DataConfig(label_drop=0.5), seed=0)
    cond = feed.batch(range(40)).cond
    feed.close()
    one_hot = nn.functional.one_hot(torch.from_numpy(labels[indices_at(0, 0, 40, 40)]), 4).float()
    assert torch.equal(cond, one_hot * kept[:, None])


def test_evaluation_draws_captions_of_the_data(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    model, picked = told(), Streams(9).integers("evaluation/labels", torch.arange(7), 40).numpy()
    rows = draw_labels(model, source, 7, 9)
    assert torch.equal(rows, conditions_of(source).read(picked))  # type: ignore[arg-type,union-attr]
    encoder = Letters()
    monkeypatch.setattr("fewstep.backbones.text.encoders_of", lambda model: encoder)
    fresh = draw_labels(model, data(texts=captions()), 7, 9)
    assert fresh is not None
    assert torch.allclose(fresh, rows, atol=1e-5)  # type: ignore[arg-type]
    assert len(encoder.calls) == 1
    assert len(set(encoder.calls[0])) == len(encoder.calls[0])
    with pytest.raises(DataError, match="there are no data with captions"):
        draw_labels(model, None, 7, 9)


def test_samples_follow_their_rows_and_have_no_classes(source: Source) -> None:
    model = told()
    rows = draw_labels(model, source, 6, 0)
    some, other = generated(model, 6, 1, cond=rows), generated(model, 6, 1, cond=rows + 1)  # type: ignore[operator]
    assert some.labels is None
    assert not torch.equal(next(iter(some.blocks())), next(iter(other.blocks())))
    nothing = torch.arange(WIDTH).float().expand(6, WIDTH)
    unsaid = next(iter(generated(model, 6, 1).blocks()))
    assert torch.equal(unsaid, next(iter(generated(model, 6, 1, cond=nothing).blocks())))


def test_data_that_do_not_fit_a_text_model(source: Source) -> None:
    check_fit(told(), source)
    check_fit(told(), data(texts=captions()))
    with pytest.raises(DataError, match=r"told a text for every image, and 'test' has no captions.*metadata\.jsonl"):
        check_fit(told(), data())
    wide = Denoiser(Backbone(), EDM(), Parametrization("edm"), sample_shape=(1, 4, 4), parts=(Part("text", (5, 2)),))
    with pytest.raises(DataError, match=r"not those of this model's text encoders.*6 numbers per row.*Wanted: 10"):
        check_fit(wide, source)


def test_conditions_go_along_and_leave_the_source_as_it_was(source: Source) -> None:
    plain = data(texts=captions())
    twin = with_conditions(plain, conditions_of(source))  # type: ignore[arg-type]
    assert conditions_of(plain) is None
    assert (twin.fingerprint, captions_of(twin), len(twin)) == (plain.fingerprint, captions(), 40)
    assert torch.equal(twin.read(np.arange(40)), plain.read(np.arange(40)))
