"""Another arithmetic, compiled networks and overlapped output: what changes (rounding) and what does not."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep.compiling
from fewstep import EDM, Denoiser, Parametrization, ode_sample, sample
from fewstep.backbones import build
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.evaluate import see
from fewstep.evaluation.features import check_features, features_of, open_features, outputs_of
from fewstep.evaluation.samples import generated
from fewstep.inference import Evaluated, arithmetic, evaluated
from fewstep.overlap import Arriving, ahead
from fewstep.randomness import Streams
from fewstep.sampling import consistency_sample, heun_sample, karras_grid

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def tiny(num_classes: int = 0) -> Denoiser:
    """A U-Net of 30,000 parameters, none of them zero, with dropout, in training mode."""
    kwargs: dict[str, Any] = {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1, 2], "blocks": 1}
    spec = {"name": "unet", "kwargs": kwargs | {"dropout": 0.2, "num_classes": num_classes}}
    backbone = build(spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Denoiser(
        backbone, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), num_classes=num_classes, spec=spec
    ).train()


class Shapes(nn.Module):
    """The network's own output; notes the shapes it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.scale * x / (1 + t.reshape(-1, 1, 1, 1))


def wrapped(net: nn.Module) -> Denoiser:
    return Denoiser.from_module(net, process=EDM(), prediction="x0", sample_shape=(1, 4, 4))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding and batches of the compiled path, without a compiler's minutes."""
    monkeypatch.setattr("fewstep.inference.compiled", lambda function: function)


def by_hand(denoiser: Denoiser, n: int, levels: list[float], cond: Tensor | None = None) -> Tensor:
    """The sampler as it was before there were blocks: one batch, float32, the network as it is."""
    edm, streams = denoiser.clone().under(EDM()).eval(), Streams(3)
    index = torch.arange(n)

    def noise(k: int) -> Tensor:
        return streams.normal(f"sample/noise/{k}", index, denoiser.sample_shape)

    latents = streams.normal("sample/latent", index, denoiser.sample_shape)
    with torch.no_grad():
        if levels[-1] == 0:
            return heun_sample(edm, latents, levels, noise, cond)
        return consistency_sample(edm, latents, levels, noise, cond)


# ---- nothing changes by default


@pytest.mark.parametrize("classes", [0, 3])
def test_the_default_is_the_plain_sampler_to_the_bit(classes: int) -> None:
    denoiser = tiny(classes)
    cond = torch.arange(9) % 3 if classes else None
    levels = [80.0, 0.821]
    assert torch.equal(sample(denoiser, 9, steps=2, seed=3, cond=cond), by_hand(denoiser, 9, levels, cond))
    grid = karras_grid(3)
    assert torch.equal(ode_sample(denoiser, 9, steps=3, seed=3, cond=cond), by_hand(denoiser, 9, grid, cond))


def test_one_hot_rows_are_the_classes() -> None:
    denoiser, classes = tiny(3), torch.tensor([2, 0, 1, 1, 2])
    rows = nn.functional.one_hot(classes, 3).float()
    assert torch.equal(sample(denoiser, 5, cond=classes, batch_size=2), sample(denoiser, 5, cond=rows, batch_size=2))
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ConfigError, match="A label is not a class of this model"):
            sample(denoiser, 2, cond=wrong)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}, {"compile": True, "precision": "bf16"}])
def test_the_model_stays_as_it_was(settings: dict[str, Any], uncompiled: None) -> None:
    denoiser = tiny()
    list(denoiser.backbone.children())[-1].eval()
    modes = [module.training for module in denoiser.modules()]
    assert 0 < sum(modes) < len(modes)
    before, names = copy.deepcopy(denoiser.state_dict()), [name for name, _ in denoiser.named_modules()]
    blocks = generated(denoiser, 5, 1, batch_size=2, **settings).blocks()
    next(blocks)
    assert [module.training for module in denoiser.modules()] == modes  # between two blocks, too
    list(blocks)
    assert [module.training for module in denoiser.modules()] == modes
    assert [name for name, _ in denoiser.named_modules()] == names
    assert all(torch.equal(value, before[key]) for key, value in denoiser.state_dict().items())
    assert all(p.dtype == torch.float32 for p in denoiser.parameters())
    assert torch.equal(sample(copy.deepcopy(denoiser), 5, seed=1), sample(denoiser, 5, seed=1))


# ---- arithmetic


@pytest.mark.parametrize(("precision", "bits"), [("bf16", 8), ("fp16", 11)])
@pytest.mark.parametrize("steps", [1, 2])
def test_half_precision_rounds_the_network_and_nothing_else(precision: Any, bits: int, steps: int) -> None:
    denoiser = tiny()
    exact, rough = (sample(denoiser, 16, steps=steps, seed=3, precision=p) for p in ("fp32", precision))
    error = float((rough - exact).abs().max())
    assert 1e-3 * 2.0**-bits < error < 2.0**-bits
    assert rough.dtype == torch.float32
    seen: dict[str, torch.dtype] = {}
    twin = evaluated(denoiser, precision)
    for name, layer in twin.backbone.network.named_children():  # type: ignore[operator]
        layer.register_forward_hook(lambda m, given, out, name=name: seen.update({name: out.dtype}))
    out = twin.under(EDM())(torch.randn(2, 1, 8, 8), 3.0)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert (seen["stem"], seen["middle"]) == (half, half)  # autocast really was on
    assert (seen["embed"], seen["head"], out.dtype) == (torch.float32,) * 3  # and the edges were exact
    assert not torch.is_autocast_enabled("cpu")


def test_the_solver_takes_an_arithmetic_too() -> None:
    denoiser = tiny()
    exact, rough = (ode_sample(denoiser, 4, steps=3, seed=3, precision=p) for p in ("fp32", "bf16"))
    assert 1e-6 < (rough - exact).abs().max() < 0.01


def test_what_a_device_does() -> None:
    assert [arithmetic(p, CPU) for p in ("auto", "fp32", "fp16", "bf16")] == ["fp32", "fp32", "fp16", "bf16"]
    with pytest.raises(ConfigError, match=r"no TF32. Got: precision 'tf32' on cpu.*Use fp32, or auto"):
        sample(tiny(), 1, precision="tf32")
    with pytest.raises(ConfigError, match="no precision 'bf61'. Did you mean 'bf16'"):
        sample(tiny(), 1, precision="bf61")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no TF32"):
        generated(tiny(), 1, 1, precision="tf32")  # at once


@pytest.mark.parametrize(
    ("capability", "wanted", "refused"),
    [(6, "fp32", {"tf32", "bf16"}), (7, "fp16", {"tf32", "bf16"}), (9, "fp16", set())],
)
def test_what_a_gpu_does(capability: int, wanted: str, refused: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    gpu = torch.device("cuda", 0)
    assert arithmetic("auto", gpu) == wanted
    for precision in ("tf32", "bf16", "fp16", "fp32"):
        if precision in refused:
            with pytest.raises(ConfigError, match="has no"):
                arithmetic(precision, gpu)  # type: ignore[arg-type]
        else:
            assert arithmetic(precision, gpu) == precision  # type: ignore[arg-type]


def test_the_twin_says_what_the_backbone_says() -> None:
    class Told(nn.Module):
        guided, two_time, guidance_range = True, False, (1.0, 4.0)

    twin = Evaluated(Told(), "bf16", compile=False)
    assert (twin.guided, twin.two_time, twin.guidance_range) == (True, False, (1.0, 4.0))
    assert not hasattr(Evaluated(Shapes(), "bf16", compile=False), "guided")


def test_the_arithmetic_is_part_of_what_is_said_of_samples() -> None:
    assert generated(tiny(), 2, 1, precision="bf16").about["precision"] == "bf16"
    assert "precision" not in generated(tiny(), 2, 1, precision="auto").about


# ---- compiled networks


def test_compiled_batches_have_one_shape(uncompiled: None) -> None:
    net = Shapes()
    want = sample(wrapped(net), 23, steps=2, seed=1, batch_size=10)
    assert net.batches == [10, 10, 10, 10, 3, 3]
    net.batches.clear()
    assert torch.equal(sample(wrapped(net), 23, steps=2, seed=1, batch_size=10, compile=True), want)
    assert net.batches == [10] * 6
    net.batches.clear()
    assert torch.equal(sample(wrapped(net), 7, steps=2, seed=1, batch_size=10, compile=True), want[:7])
    assert net.batches == [7, 7]
    net.batches.clear()
    list(generated(wrapped(net), 23, 1, batch_size=10, compile=True).blocks(1, 2))
    assert net.batches == [10]
    list(generated(wrapped(net), 23, 1, batch_size=10, compile=True).blocks(0, 2))
    assert net.batches == [10, 10, 10]


def test_labels_of_padded_rows(uncompiled: None) -> None:
    denoiser, cond = tiny(3), torch.arange(11) % 3
    for told in (cond, nn.functional.one_hot(cond, 3).float()):
        plain, padded = (sample(denoiser, 11, cond=told, batch_size=4, compile=c) for c in (False, True))
        torch.testing.assert_close(padded, plain, rtol=0, atol=2e-6)
    assert (plain[0] - plain[1]).abs().max() > 1e-4


def test_the_compiled_network_is_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo and AOT autograd; inductor takes minutes on a loaded machine (bench/sample.py runs it)."""
    real = fewstep.compiling.compiled
    monkeypatch.setattr("fewstep.inference.compiled", lambda f: real(f, backend="aot_eager", fullgraph=True))
    denoiser = tiny()
    plain, fast = (sample(denoiser, 6, steps=2, seed=3, batch_size=4, compile=c) for c in (False, True))
    torch.testing.assert_close(fast, plain, rtol=0, atol=5e-6)
    assert not [name for name, _ in denoiser.named_modules() if "_orig_mod" in name]
    assert "_is_torch_compile" not in vars(denoiser.backbone)


def test_without_a_compiler_samples_come_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no g++")

    real = fewstep.compiling.compiled
    monkeypatch.setattr("fewstep.inference.compiled", lambda f: real(f, backend=broken))
    with pytest.warns(fewstep.compiling.CompileFallback, match="no g\\+\\+") as said:
        x = sample(wrapped(Shapes()), 8, batch_size=4, compile=True)
    assert len(said) == 1
    assert torch.equal(x, sample(wrapped(Shapes()), 8, batch_size=4))


# ---- the device is not waited for


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a scalar that is read, a shape that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.found.update([name] if name in self.NAMES else [])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("solver", ["consistency", "ode"])
def test_blocks_read_nothing_back(classes: int, solver: Any) -> None:
    denoiser = tiny(classes)
    counts = []
    for n in (4, 16):
        made = generated(denoiser, n, 2, solver=solver, batch_size=4)
        with Reads() as reads:
            list(made.blocks())
        counts.append(reads.found.total())
    assert counts[0] == counts[1]  # nothing per block
    assert counts[0] <= (4 if classes else 0)  # the least and the largest label are looked at once


def test_features_read_nothing_back_and_arrive_once_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals: list[int] = []
    get = Arriving.get
    monkeypatch.setattr(Arriving, "get", lambda self: arrivals.append(1) or get(self))  # type: ignore[func-returns-value]
    net = open_features("pca:4", reference=torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8))
    made = generated(tiny(), 16, 1, batch_size=4)
    with Reads() as reads:
        fake, seconds = see(made, net)
    assert fake is not None and fake.stats.count == 16 and seconds > 0
    assert len(arrivals) == 2 * 4  # whether the samples are finite, and their features
    assert reads.found.total() <= 4  # the statistics look at what has arrived


@pytest.mark.parametrize("bad", [0, 4, 5])
def test_a_block_that_is_not_finite_is_refused_wherever_it_is(bad: int) -> None:
    class Diverged(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            first[0] += len(x)
            rows = torch.arange(first[0] - len(x), first[0]).reshape(-1, 1, 1, 1)
            return torch.where(rows == bad, torch.nan, x)

    first = [0]
    with pytest.raises(DataError, match=rf"not finite. Got: NaN or infinity in 1 of 2, first in number {bad}\."):
        list(generated(wrapped(Diverged()), 6, 1, batch_size=2).blocks())


def test_the_next_block_is_asked_for_before_one_is_used() -> None:
    order: list[str] = []

    def made() -> Iterator[int]:
        for i in range(3):
            order.append(f"make {i}")
            yield i

    for i in ahead(made()):
        order.append(f"use {i}")
    assert order == ["make 0", "make 1", "use 0", "make 2", "use 1", "use 2"]
    assert list(ahead([])) == []


def test_outputs_that_are_not_waited_for_are_the_features() -> None:
    images = torch.randint(0, 256, (130, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = open_features("pca:4", reference=images)
    assert torch.equal(outputs_of(net, images), features_of(net, images))
    told = replace(net, extract_with_logits=lambda x: (net.extract(x), x.flatten(1)[:, :3].float()))
    both = outputs_of(told, images, logits=True)
    assert both.shape == (130, 7)
    assert torch.equal(both[:, 4:], images.flatten(1)[:, :3].float())
    for wrong in (replace(net, dim=5), replace(told, dim=5)):
        with pytest.raises(DataError, match="features of another shape"):
            outputs_of(wrong, images, logits=True)
    with pytest.raises(DataError, match="NaN or infinite"):
        check_features(net, torch.tensor([[1.0, torch.nan]]))
    check_features(net, torch.ones(2, 4))
