"""What is compiled gives what it gives uncompiled, and what cannot be compiled still runs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.compiling import CompileFallback, compiled


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def broken(graph: Any, inputs: Any) -> Any:
    raise OSError("g++ is not here\nand a long story")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))


def test_compiled_code_is_the_function() -> None:
    network, x = net(), torch.randn(4, 3)
    fast = compiled(network, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fast(x), network(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(fast(x[:2]), network(x[:2]), rtol=1e-6, atol=1e-6)


def test_it_really_is_compiled() -> None:
    seen: list[int] = []

    def watching(graph: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return graph.forward

    fast = compiled(lambda x: (x * 2).sin() + 1, backend=watching)
    assert seen == []  # not before the first call
    for _ in range(3):
        fast(torch.ones(3))
    assert len(seen) == 1
    fast(torch.ones(5))  # one graph per shape
    fast(torch.ones(7))  # and none for any shape
    assert len(seen) == 3


def test_without_a_compiler_the_function_runs_and_says_so_once() -> None:
    network, x, calls = net(), torch.randn(4, 3), []

    def counted(x: Tensor) -> Tensor:
        calls.append(1)
        result: Tensor = network(x)
        return result

    slow = compiled(counted, backend=broken)
    with pytest.warns(CompileFallback, match="with the same result: .*g\\+\\+ is not here") as caught:
        first = slow(x)
    assert len(caught) == 1
    assert "long story" not in str(caught[0].message)
    assert torch.equal(first, network(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(slow(x + 1), network(x + 1))
        assert torch.equal(slow(x[:1]), network(x[:1]))


def test_a_later_failure_falls_back_too() -> None:
    graphs: list[Any] = []

    def once(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward if len(graphs) == 1 else broken(graph, inputs)

    fast = compiled(lambda x: x.sin() * 3, backend=once)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(torch.ones(3))
    with pytest.warns(CompileFallback):
        assert torch.equal(fast(torch.ones(4)), torch.ones(4).sin() * 3)


def test_a_system_that_refuses_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", refuse)
    slow = compiled(lambda x: x + 1)
    with pytest.warns(CompileFallback, match="not supported on Python 3.99"):
        assert float(slow(torch.zeros(()))) == 1.0
    assert float(slow(torch.ones(()))) == 2.0


def test_a_graph_break_counts_as_failure_where_one_graph_is_wanted() -> None:
    def breaking(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.cos()

    with pytest.warns(CompileFallback):
        compiled(breaking, fullgraph=True, backend="eager")(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(breaking, backend="eager")(torch.ones(2))


def test_errors_of_the_function_are_its_own() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        compiled(fails, backend="eager")(torch.ones(2))


def test_nothing_is_left_behind_on_a_network() -> None:
    network = net()
    before, names = dict(network.__dict__), [name for name, _ in network.named_modules()]
    fast = compiled(network, backend="eager")
    want = network(torch.ones(1, 3))
    assert torch.equal(fast(torch.ones(1, 3)), want)
    assert dict(network.__dict__) == before
    assert [name for name, _ in network.named_modules()] == names
    assert torch.equal(copy.deepcopy(network)(torch.ones(1, 3)), want)
    assert callable(copy.deepcopy(fast))


def test_gradients_flow_through_what_is_compiled() -> None:
    network, x = net(), torch.randn(4, 3)
    fast = compiled(network, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    got = torch.autograd.grad(fast(x).square().sum(), list(network.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
