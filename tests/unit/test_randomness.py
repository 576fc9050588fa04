"""Philox, the streams built on it, and the dropout tape."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import ConfigError
from fewstep.philox import philox
from fewstep.randomness import DropoutTape, Streams


def words(counter: str, key: str) -> str:
    """Philox4x32-10 in the notation of Random123's kat_vectors."""
    c = tuple(torch.tensor([int(w, 16)]) for w in counter.split())
    k = tuple(int(w, 16) for w in key.split())
    out = philox(c, k)  # type: ignore[arg-type]
    return " ".join(f"{int(w):08x}" for w in out)


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter: str, key: str, want: str) -> None:
    assert words(counter, key) == want


def test_words_are_thirty_two_bits() -> None:
    out = Streams(1).words("noise", torch.arange(50), 1000)
    assert out.shape == (50, 1000) and out.dtype == torch.int64
    assert int(out.min()) >= 0 and int(out.max()) < 2**32
    assert int(out.max()) > 2**32 - 2**20
    for bit in range(32):
        assert float((out >> bit & 1).double().mean()) == pytest.approx(0.5, abs=0.012), bit


# ----------------------------------------------------------------------------------- addressing
def test_a_row_depends_on_seed_stream_and_index_alone() -> None:
    streams, index = Streams(3), torch.tensor([5, 0, 2**40 + 1, 99, 5])
    whole = streams.normal("noise", index, (3, 4))
    for row, i in enumerate(index.tolist()):
        assert torch.equal(streams.normal("noise", torch.tensor([i]), (3, 4))[0], whole[row])
    assert torch.equal(whole[0], whole[4])
    flip = torch.flip(index, (0,))
    assert torch.equal(streams.normal("noise", flip, (3, 4)), torch.flip(whole, (0,)))


def test_a_shape_is_the_beginning_of_a_larger_one() -> None:
    streams, index = Streams(3), torch.arange(4)
    assert torch.equal(streams.normal("noise", index, (5,)), streams.normal("noise", index, (3, 3)).flatten(1)[:, :5])


def test_streams_seeds_and_indices_never_meet() -> None:
    index = torch.cat((torch.arange(20), 2**32 + torch.arange(20)))  # both halves of a 64-bit index count
    draws = [Streams(seed).words(name, index, 8) for seed in (0, 1, 2) for name in ("times", "noise", "sample/latent")]
    flat = torch.cat(draws).reshape(-1, 4)
    blocks = {tuple(row) for row in flat.tolist()}
    assert len(blocks) == len(flat) == 3 * 3 * 40 * 2


def test_a_draw_is_pinned() -> None:
    """Resumed runs and published samples rely on these bits: a change here is a change of format."""
    got = Streams(0).words("noise", torch.tensor([0, 7]), 4)
    counter = (torch.tensor([0]), torch.tensor([0]), torch.tensor([7]), torch.tensor([0]))
    digest = hashlib.blake2b(b"0/noise", digest_size=8).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
    assert got[1].tolist() == [int(w) for w in philox(counter, key)]


# ---------------------------------------------------------------------------------- distributions
def test_uniform_numbers_are_uniform_and_never_0_or_1() -> None:
    u = Streams(0).uniform("times", torch.arange(20_000))
    assert u.dtype == torch.float64 and u.shape == (20_000,)
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    consecutive = torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]
    assert abs(float(consecutive)) < 0.03


def test_normal_numbers_are_normal() -> None:
    z = Streams(0).normal("noise", torch.arange(2000), (3, 5), torch.float64)
    flat = z.flatten()
    n = len(flat)
    assert abs(float(flat.mean())) < 4 / math.sqrt(n)
    assert float(flat.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert float((flat**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    assert float((flat**3).mean()) == pytest.approx(0, abs=4 * math.sqrt(15 / n))
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(z.flatten(1).T) - torch.eye(15, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.11  # pairs of one Box-Muller draw included


def test_normal_numbers_in_single_precision_are_the_rounded_ones() -> None:
    index = torch.arange(10)
    exact = Streams(4).normal("noise", index, (7,), torch.float64)
    assert torch.equal(Streams(4).normal("noise", index, (7,)), exact.float())


def test_integers_cover_their_range() -> None:
    draws = Streams(0).integers("pick", torch.arange(5000), 7)
    assert draws.dtype == torch.int64
    assert stats.chisquare(torch.bincount(draws, minlength=7).numpy()).pvalue > 1e-3
    assert int(draws.max()) == 6


# --------------------------------------------------------------------------------------- dropout
def tape(rows: int = 6, seed: int = 0) -> DropoutTape:
    return DropoutTape(Streams(seed), torch.arange(rows))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 8), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_replay_repeats_the_recorded_masks() -> None:
    net, x, masks = Net().train(), torch.randn(6, 5), tape()
    with masks.record():
        first = net(x)
    with masks.replay():
        assert torch.equal(net(x), first)
    with masks.replay():
        assert torch.equal(net(x), first)  # as often as wanted
    with masks.record():
        assert torch.equal(net(x), first)  # the same rows of the same seed
    with tape(seed=1).record():
        assert not torch.equal(net(x), first)


def test_two_layers_of_equal_shape_get_different_masks() -> None:
    x = torch.ones(6, 50)
    with tape().record():
        assert not torch.equal(F.dropout(x, 0.5), F.dropout(x, 0.5))


@pytest.mark.parametrize("rows", [[0], [4, 1], [5, 0, 3, 2], [2, 2]])
def test_replay_for_some_rows(rows: list[int]) -> None:
    net, x, masks = Net().train(), torch.randn(6, 5), tape()
    with masks.record():
        whole = net(x)
    some = torch.tensor(rows)
    with masks.replay(some):
        torch.testing.assert_close(net(x[some]), whole[some])


def test_masks_follow_the_image_index_not_the_row() -> None:
    net, x = Net().train(), torch.randn(6, 5)
    with tape().record():
        whole = net(x)
    with DropoutTape(Streams(0), torch.tensor([4, 1])).record():
        torch.testing.assert_close(net(x[[4, 1]]), whole[[4, 1]])


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_keep_rate_and_scale(p: float) -> None:
    x = torch.ones(6, 5000)
    with tape().record():
        out = F.dropout(x, p)
    kept = out != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / x.numel()))
    assert float(out.mean()) == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / x.numel()))
    assert len(set(out[kept].tolist())) == 1
    per_row = kept.float().mean(1)
    assert float((per_row - (1 - p)).abs().max()) < 5 * math.sqrt(p * (1 - p) / 5000)


@pytest.mark.parametrize("form", ["2d", "1d", "3d"])
def test_channel_dropout_drops_whole_channels(form: str) -> None:
    layer, sides = {"1d": (nn.Dropout1d, 1), "2d": (nn.Dropout2d, 2), "3d": (nn.Dropout3d, 3)}[form]
    x, masks = torch.ones(6, 40, *[4] * sides), tape()
    with masks.record():
        out = layer(0.4)(x)
    channels = out.flatten(2)
    assert torch.equal(channels.amin(2), channels.amax(2))
    assert float((channels[..., 0] > 0).float().mean()) == pytest.approx(0.6, abs=0.13)
    with masks.replay(torch.tensor([3])):
        assert torch.equal(layer(0.4)(x[3:4]), out[3:4])


def test_tokens_folded_into_the_batch_keep_their_rows() -> None:
    """A first dimension of batch * tokens is one mask per image; anything else is refused."""
    x, masks = torch.ones(6 * 4, 10), tape()
    with masks.record():
        out = F.dropout(x, 0.5)
    with masks.replay(torch.tensor([2])):
        assert torch.equal(F.dropout(x[8:12], 0.5), out[8:12])
    with pytest.raises(ConfigError, match="not a multiple of the batch"), tape().record():
        F.dropout(torch.ones(7, 10), 0.5)


def test_evaluation_and_p_zero_draw_nothing() -> None:
    x, masks = torch.randn(6, 5), tape()
    with masks.record():
        assert F.dropout(x, 0.5, training=False) is x
        assert F.dropout(x, 0.0) is x
    with masks.replay():
        pass  # no mask was recorded, none is missing


def test_everything_dropped_is_zero_not_nan() -> None:
    with tape().record():
        assert torch.equal(F.dropout(torch.ones(6, 5), 1.0), torch.zeros(6, 5))


def test_in_place_dropout() -> None:
    x = torch.ones(6, 50)
    with tape().record():
        want = F.dropout(x.clone(), 0.5)
    with tape().record():
        out = F.dropout(x, 0.5, inplace=True)
    assert out is x and torch.equal(x, want)


def test_gradients_pass_through_the_mask() -> None:
    x = torch.ones(6, 50, requires_grad=True)
    with tape().record():
        out = F.dropout(x, 0.5)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    with tape().record():
        Net().train()(torch.zeros(6, 5))
        torch.set_rng_state(before)
        F.dropout(torch.ones(6, 5), 0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_number_of_masks_is_refused() -> None:
    x, masks = torch.ones(6, 5), tape()
    with masks.record():
        F.dropout(F.dropout(x, 0.5), 0.5)
    with (
        pytest.raises(ConfigError, match="another number of dropout masks.*Got: 1. Wanted: 2"),
        masks.replay(),
    ):
        F.dropout(x, 0.5)
    with pytest.raises(ConfigError, match="more dropout masks than the student pass"), masks.replay():
        F.dropout(F.dropout(F.dropout(x, 0.5), 0.5), 0.5)


def test_an_error_inside_the_pass_is_not_hidden() -> None:
    masks = tape()
    with masks.record():
        F.dropout(torch.ones(6, 5), 0.5)
    with pytest.raises(ZeroDivisionError), masks.replay():
        raise ZeroDivisionError


def test_dropout_inside_attention_is_refused() -> None:
    q = torch.randn(6, 2, 4, 8)
    with tape().record():
        F.scaled_dot_product_attention(q, q, q)
    with pytest.raises(ConfigError, match="scaled_dot_product_attention.*Set dropout_p=0"), tape().record():
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ConfigError, match="scaled_dot_product_attention"), tape().record():
        F.scaled_dot_product_attention(q, q, q, None, 0.1)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_inside_torchs_multihead_attention_is_refused(need_weights: bool) -> None:
    """Torch runs it with the tape set aside: its masks would silently differ between the passes."""
    x = torch.randn(6, 4, 8)
    attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
    with pytest.raises(ConfigError, match="cannot be shared"), tape().record():
        attention(x, x, x, need_weights=need_weights)
    attention.eval()
    with tape().record():
        attention(x, x, x, need_weights=need_weights)


@pytest.mark.parametrize("function", [F.alpha_dropout, F.feature_alpha_dropout], ids=["alpha", "feature_alpha"])
def test_dropouts_that_are_not_masks_are_refused(function: object) -> None:
    with pytest.raises(ConfigError, match="cannot be shared"), tape().record():
        function(torch.randn(6, 4, 8), 0.2, True)  # type: ignore[operator]


def test_the_tape_works_in_a_compiled_graph() -> None:
    net, x = Net().train(), torch.randn(6, 5)
    rows = torch.tensor([4, 1, 2])
    with tape().record():
        want = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    masks = tape()
    with masks.record():
        got = compiled(x)
    torch.testing.assert_close(got, want)
    with masks.replay(rows):
        torch.testing.assert_close(compiled(x[rows]), want[rows])
    again = tape(seed=1)
    with again.record():
        assert not torch.equal(compiled(x), want)
    with again.replay():
        compiled(x)
