"""Recomputed blocks: the same gradient, bit for bit, with the tape's dropout, in fewer saved bytes."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fewstep.backbones import build
from fewstep.backbones import recompute as module
from fewstep.backbones.recompute import Recomputable, recomputed, set_recompute
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.objectives import ECT
from fewstep.process import EDM
from fewstep.randomness import DropoutTape, Streams

ROWS = 4
NETS: dict[str, tuple[dict[str, Any], int]] = {
    "unet": ({"sample_shape": [3, 16, 16], "channels": 16, "dropout": 0.2, "attention": [8]}, 11),
    "dit": ({"sample_shape": [3, 16, 16], "width": 32, "depth": 3, "heads": 2, "dropout": 0.2}, 3),
    "edm": (
        {
            "img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 16, "channel_mult": [1, 2],
            "num_blocks": 2, "attn_resolutions": [8], "dropout": 0.2, "label_dim": 2, "label_dropout": 0.3,
        },
        14,
    ),
    "adm": (
        {
            "img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1, 2],
            "num_blocks": 2, "attn_resolutions": [8], "dropout": 0.2,
        },
        14,
    ),
    "edm2": (
        {
            "img_resolution": 16, "img_channels": 3, "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 2,
            "attn_resolutions": [8], "dropout": 0.2,
        },
        14,
    ),
}  # fmt: skip


def make(name: str) -> Denoiser:
    torch.manual_seed(0)
    spec = {"name": name, "kwargs": NETS[name][0]}
    net = build(spec)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return Denoiser(net, EDM(), Parametrization(), sample_shape=(3, 16, 16), spec=spec).train()


def gradient(student: Denoiser, on: bool, bf16: bool = False, times: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Of ECT with two rows of four at r > 0, and the loss."""
    set_recompute(student, on)
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, ROWS, 3, 16, 16, generator=generator)
    t = torch.tensor([0.05, 0.3, 2.0, 10.0], dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = ECT().loss_at(student, x, t, eps, 2.0, None, DropoutTape(Streams(0), torch.arange(ROWS)))
    student.zero_grad()
    for i in range(times):
        loss.mean().backward(retain_graph=i + 1 < times)
    return loss.detach(), [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETS)
def test_the_gradient_of_ect_is_the_same(name: str, bf16: bool) -> None:
    student = make(name)
    want_loss, want = gradient(student, False, bf16)
    want = [g.clone() for g in want]
    loss, got = gradient(student, True, bf16)
    assert torch.equal(loss, want_loss)
    assert len(got) == len(want) and any(g.abs().max() > 0 for g in got)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backward_twice() -> None:
    student = make("unet")
    once = [g.clone() for g in gradient(student, True)[1]]
    twice = gradient(student, True, times=2)[1]
    assert all(torch.allclose(2 * a, b, rtol=1e-5, atol=1e-7) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_how_many_blocks_there_are_and_what_stays(name: str) -> None:
    student = make(name)
    names = list(student.state_dict())
    assert set_recompute(student, True) == NETS[name][1]
    assert all(m.recompute for m in student.modules() if isinstance(m, Recomputable))
    assert list(student.state_dict()) == names
    for twin in (copy.deepcopy(student.backbone), pickle.loads(pickle.dumps(student.backbone))):
        assert sum(getattr(m, "recompute", False) for m in twin.modules()) == NETS[name][1]
    assert set_recompute(student, False) == NETS[name][1]
    assert not any(getattr(m, "recompute", False) for m in student.modules())


def test_networks_without_blocks_have_none() -> None:
    assert set_recompute(build({"name": "mlp", "kwargs": {"sample_shape": [2]}}), True) == 0
    assert set_recompute(nn.Linear(2, 2), True) == 0


@pytest.mark.parametrize("name", NETS)
def test_only_passes_with_gradient_are_checkpointed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(module, "checkpoint", spy)
    student = make(name)
    gradient(student, True)
    assert calls == [True] * NETS[name][1]  # the student's pass; the target's is none
    gradient(student, False)
    assert len(calls) == NETS[name][1]


def test_networks_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    config = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "attention_head_dim": 8, "dropout": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    net = build({"name": "diffusers", "kwargs": {"kind": "UNet2DModel", "config": config}})
    student = Denoiser(net, EDM(), Parametrization(), sample_shape=(3, 16, 16)).train()
    want = [g.clone() for g in gradient(student, False)[1]]
    calls = []
    monkeypatch.setattr(module, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    got = gradient(student, True)[1]
    assert set_recompute(student, True) > 0 and len(calls) >= 4
    assert want and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert set_recompute(copy.deepcopy(student), False) > 0
    gradient(student, False)
    made = len(calls)
    gradient(student, False)
    assert len(calls) == made


class Drop(Recomputable):
    def compute(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(F.dropout(x, 0.4)), 0.3)


def through(x: Tensor, on: bool, between: DropoutTape | None = None) -> tuple[Tensor, Tensor]:
    """Output and gradient of two blocks and a dropout between them; another tape may be open in the backward pass."""
    blocks, x = nn.Sequential(Drop(), nn.Dropout(0.5), Drop()), x.clone().requires_grad_()
    set_recompute(blocks, on)
    out = blocks(x)
    with nullcontext() if between is None else between.record():
        (grad,) = torch.autograd.grad(out.square().sum(), x)
    return out.detach(), grad


def test_recorded_and_replayed_rows() -> None:
    x, rows = torch.randn(ROWS, 3, 5, generator=torch.Generator().manual_seed(2)), torch.tensor([2, 0])
    results = []
    for on in (False, True):
        tape = DropoutTape(Streams(0), torch.arange(ROWS))
        with tape.record():
            first = through(x, on, DropoutTape(Streams(9), torch.arange(ROWS)))
        with tape.replay(rows):
            some = through(x[rows], on)
        assert torch.equal(some[0], first[0][rows]) and torch.equal(some[1], first[1][rows])
        results.append((*first, *some))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][1] == 0).float().mean() > 0.3


def test_a_new_recording_leaves_the_old_masks() -> None:
    tape, block, x = DropoutTape(Streams(0), torch.arange(ROWS)), Drop(), torch.ones(ROWS, 50, requires_grad=True)
    set_recompute(block, True)
    with tape.record():
        out = block(x)
    with tape.record():
        F.dropout(torch.ones(ROWS, 3), 0.5)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad != 0, out != 0)


def test_torchs_own_dropout_without_a_tape() -> None:
    x = torch.randn(ROWS, 50)
    block = Drop()
    set_recompute(block, True)
    leaf = x.clone().requires_grad_()
    out = block(leaf)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(grad != 0, out != 0)


def test_foreign_checkpointing_is_still_refused() -> None:
    x = torch.ones(ROWS, 5, requires_grad=True)
    tape = DropoutTape(Streams(0), torch.arange(ROWS))
    with tape.record():
        recomputed(F.dropout, x, 0.5)  # leaves nothing open behind it
    with pytest.raises(ConfigError, match="would draw another mask"), tape.record():
        checkpoint(F.dropout, x, 0.5, use_reentrant=False)


def kept_bytes(tape: DropoutTape) -> int:
    return sum(getattr(mask, "bits", mask).nbytes for mask in tape._masks)


def test_masks_of_recomputed_blocks_take_one_bit_per_element() -> None:
    x, kept = torch.ones(ROWS, 9, 8, requires_grad=True), []
    for on in (False, True):
        tape, block = DropoutTape(Streams(0), torch.arange(ROWS)), Drop()
        set_recompute(block, on)
        with tape.record():
            block(x)
        kept.append(kept_bytes(tape))
    assert kept == [2 * x.numel(), 2 * x.numel() // 8]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 50])
def test_masks_of_any_size_are_packed(count: int) -> None:
    whole, bits = (DropoutTape(Streams(0), torch.arange(ROWS)) for _ in range(2))
    rows = torch.tensor([3, 3, 1])
    x = torch.ones(2 * ROWS, count)  # two tokens per image
    with whole.record():
        want = F.dropout(x, 0.5)
    with bits.record(), bits.contexts()[0]:
        assert torch.equal(F.dropout(x, 0.5), want)
    assert kept_bytes(bits) == ROWS * -(-2 * count // 8)
    with bits.replay():
        assert torch.equal(F.dropout(x, 0.5), want)
    with bits.replay(rows):
        got = F.dropout(torch.ones(6, count), 0.5)
    assert torch.equal(got, want.reshape(ROWS, 2, count)[rows].reshape(6, count))


def test_the_open_tape_is_found() -> None:
    outer, inner = (DropoutTape(Streams(0), torch.arange(ROWS)) for _ in range(2))
    assert DropoutTape.active() is None
    with outer.record():
        assert DropoutTape.active() is outer
        with inner.record():
            assert DropoutTape.active() is inner
        assert DropoutTape.active() is outer
    assert DropoutTape.active() is None


# ------------------------------------------------------------------------------- what dropout itself saves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_saves_one_byte_per_element(dtype: torch.dtype, inplace: bool) -> None:
    x = torch.randn(ROWS, 100, dtype=dtype, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    tape = DropoutTape(Streams(0), torch.arange(ROWS))
    with tape.record(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = F.dropout(x + 0, 0.13, inplace=inplace)
    assert sum(t.nbytes for t in saved) == x.numel()
    assert saved[0].data_ptr() == tape._masks[0].data_ptr()  # the tape's own, once
    out.sum().backward()
    assert out.dtype == dtype and torch.equal(x.grad != 0, out != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_kept_is_scaled_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, 1000).to(dtype)
    with DropoutTape(Streams(0), torch.arange(ROWS)).record():
        out = F.dropout(x, 0.13)
    scale = torch.tensor(1 / (1 - round(0.13 * 65536) / 65536))
    kept = out != 0
    assert torch.equal(out[kept], (x.float() * scale).to(dtype)[kept])
