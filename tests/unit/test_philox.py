"""Philox by known answers, against Python's integers, piece by piece and compiled: the bits never change."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep import philox as module
from fewstep import randomness
from fewstep.compiling import compiled
from fewstep.philox import draw, philox
from fewstep.randomness import DropoutTape, Streams

MASKS = {
    ((8, 5), 0.1): "2432dbb70926df292595fa1c2dee4933",
    ((8, 5), 0.5): "a663bd5fc7a593954ea9b85d4ed49a14",
    ((8, 5), 0.13): "f77b08ab48fe693d40ca0094a89e1ced",
    ((8, 5), 1.0): "2c34ce1df23b838c5abf2a7f6437cca3",
    ((8, 64, 33), 0.1): "65c43c29b8a3a846608de078897e796d",
}
"""Shape and p of calls in this order -> the mask."""

EXTREMES = (0, 1, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
INDICES = torch.tensor([0, 1, 7, 12345, 2**31, 2**32 - 1, 2**32, 2**40 + 3])


def reference(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, which do not overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words_of(words: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(words, dim=-1)


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:32]


@pytest.mark.parametrize("key", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x80000000, 1)])
def test_extreme_words_as_with_pythons_integers(key: tuple[int, int]) -> None:
    counters = list(itertools.product(EXTREMES, EXTREMES[::3], EXTREMES, EXTREMES[1::3]))
    columns = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
    got = words_of(philox(columns, key))  # type: ignore[arg-type]
    assert got.tolist() == [list(reference(counter, key)) for counter in counters]


def test_words_that_broadcast_are_the_same() -> None:
    block, row = torch.arange(5).reshape(1, -1), INDICES.reshape(-1, 1) & 0xFFFFFFFF
    got = words_of(philox((block, 3, row, torch.full_like(row, 9)), (11, 12)))
    for i, j in itertools.product(range(len(row)), range(5)):
        assert got[i, j].tolist() == list(reference((j, 3, int(row[i]), 9), (11, 12)))


@pytest.mark.parametrize(
    ("seed", "stream", "count", "want"),
    [
        (0, "noise", 1, "94b6b2a56184ced6d91206944bf35cd6"),
        (0, "noise", 13, "2948be594ca3608710a531357750eee2"),
        (3, "times", 4096, "96882076d5764557069d4ec9b7f47ed9"),
        (2**63 + 5, "x", 70001, "f240ccfa8ee3b50672aa0bed7cc4ac82"),
    ],
)
def test_streams_are_the_same_bits_for_ever(seed: int, stream: str, count: int, want: str) -> None:
    """Frozen on 2026-11-21, before the generator was made faster: resumed runs rely on them."""
    assert digest(Streams(seed).words(stream, INDICES, count)) == want


def test_masks_are_the_same_bits_for_ever() -> None:
    with DropoutTape(Streams(5), INDICES).record():
        got = [digest(F.dropout(torch.ones(shape), p) != 0) for shape, p in MASKS]
    assert got == list(MASKS.values())


def normal_by_slices(seed: int, stream: str, index: Tensor, count: int) -> Tensor:
    """Box-Muller as it was written first: on slices of all words at once."""
    u = (Streams(seed).words(stream, index, count).double() + 0.5) * 2.0**-32
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).reshape(len(index), -1)[:, :count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 5, 3072, 3 * 64 * 64 * 8])
def test_normal_numbers_are_the_same_bits(count: int, dtype: torch.dtype) -> None:
    got = Streams(1).normal("n", INDICES, (count,), dtype)
    assert torch.equal(got, normal_by_slices(1, "n", INDICES, count).to(dtype))


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 1000])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 7), (5, 3), (5, 20), (8, 1)])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, chunk: int, rows: int, blocks: int) -> None:
    index = INDICES[:rows]
    whole = draw(words_of, (1, 2), index, blocks, lane=4)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert torch.equal(draw(words_of, (1, 2), index, blocks, lane=4), whole)
    assert whole.shape == (rows, 4 * blocks)
    low, high = int(index[-1]) & 0xFFFFFFFF, int(index[-1]) >> 32
    want = [w for block in range(blocks) for w in reference((block, 4, low, high), (1, 2))]
    assert whole[-1].tolist() == want


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    want = draw(words_of, (1, 2), INDICES, 12)
    monkeypatch.setattr(module, "CHUNK", 8)  # no pieces in a graph
    graph = torch.compile(lambda index: draw(words_of, (1, 2), index, 12), fullgraph=True, backend="eager")
    assert torch.equal(graph(INDICES), want)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_c_plus_plus_makes_the_same_bits() -> None:
    """A compiler that takes signed products for positive gets the row 2^32 - 1 wrong."""
    want = draw(words_of, (1, 2), INDICES, 5)
    graph = torch.compile(lambda index: draw(words_of, (1, 2), index, 5), fullgraph=True)
    try:
        got = graph(INDICES)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no C++ compiler here: {error}")
    assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------- one kernel for all masks
def masks(drawn: Callable[..., Tensor]) -> list[Tensor]:
    """Of several layers, sizes and probabilities, under two keys."""
    wanted = [(1, 16, 3000, (123, 456)), (2, 100, 5000, (123, 456)), (7, 64, 3000, (2**32 - 1, 0))]
    return [drawn(INDICES, lane, blocks, least, key) for lane, blocks, least, key in wanted]


def test_the_operation_in_a_compiled_loss_draws_the_same_mask() -> None:
    opaque = masks(lambda index, lane, blocks, least, key: randomness._KEPT(index, *key, lane, blocks, least))
    plain = masks(randomness._mask_of)
    assert all(torch.equal(a, b) for a, b in zip(opaque, plain, strict=True))
    assert [0.9 < float(mask.float().mean()) < 0.98 for mask in plain] == [True] * 3
    for mask in plain:
        torch.library.opcheck(randomness._KEPT, (INDICES, 1, 2, 3, mask.shape[1] // 8, 5))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_gpu_draws_all_masks_with_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, compiled for this processor: one graph for all layers, sizes, probabilities and seeds."""
    plain = masks(randomness._mask_of)
    monkeypatch.setattr(randomness, "_compiled_mask", compiled(randomness._mask_of, dynamic=True))
    torch._dynamo.utils.counters.clear()
    fused = masks(randomness._fused)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
