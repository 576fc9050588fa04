"""Compilation by ``torch.compile``, where there is a compiler; elsewhere the same function runs as it is, said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class CompileFallback(UserWarning):
    """What could not be compiled runs uncompiled, with the same result."""


def compiled(
    function: Callable[P, R],
    *,
    graphs: bool = False,
    fullgraph: bool = False,
    dynamic: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[P, R]:
    """``function``, compiled at its first call for the shapes it is called with; nothing that it belongs to is changed.

    Every set of shapes is compiled anew, which takes seconds to minutes: call it with one. Code that was compiled once
    is found again by later calls of :func:`compiled` on the same function or network. If the compiler fails, at
    whichever call, the function itself is run from then on, with one :class:`CompileFallback` warning; errors of its
    own are raised as they are.

    Args:
        function: pure, or without effect before its end: after a failure of the compiler it starts again.
        graphs: replay it as CUDA graphs; its result then lives until the next call only.
        fullgraph: take a graph break as a failure of the compiler.
        dynamic: compile once for all sizes and numbers, instead.
        backend: of ``torch.compile``; modes exist for "inductor" only.
    """
    function = _calling(function) if isinstance(function, torch.nn.Module) else function
    chosen: list[Callable[P, R]] = []

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not chosen:
            chosen.append(_compile(function, graphs, fullgraph, dynamic, backend))
        if chosen[0] is function:
            return function(*args, **kwargs)
        try:
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):  # or it fails in backward()
                return chosen[0](*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _note(error)
            chosen[0] = function
            return function(*args, **kwargs)

    return call


def _calling(network: Callable[P, R]) -> Callable[P, R]:
    """``torch.compile`` marks a module that it is given; so it is given a function."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return network(*args, **kwargs)

    return call


def _compile(
    function: Callable[P, R], graphs: bool, fullgraph: bool, dynamic: bool, backend: str | Callable[..., Any]
) -> Callable[P, R]:
    """``torch.compile``, which refuses at once what it cannot do with this Python or on this system."""
    mode = "reduce-overhead" if graphs else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it imports its compiler
            return torch.compile(function, dynamic=dynamic, mode=mode, fullgraph=fullgraph, backend=backend)
    except (RuntimeError, ImportError) as error:
        _note(error)
        return function


def _note(error: Exception) -> None:
    error = getattr(error, "inner_exception", error)  # of the compiler's parts: what stopped them
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    warnings.warn(f"Not compiled, so slower, with the same result: {reason}", CompileFallback, stacklevel=3)
