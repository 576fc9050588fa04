"""What bench/step.py measures beside the speed of a step: its pieces, its memory, its gradient, the machine's rate."""

from __future__ import annotations

import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from step_nets import trainer_of
from torch import Tensor

from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.training import trainer as trainer_module
from fewstep.training.config import RunConfig
from fewstep.training.feed import Feed
from fewstep.training.trainer import Trainer

MATMUL = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices whose product is the rate of the machine."""

PIECES = ("student", "target", "backward", "optimiser", "sanitise", "average", "data")
Run = Callable[[int], tuple[float, float]]
Place = tuple[Any, str, str | Callable[[], str]]
"""Object, name of its method, and the piece it is."""


class Stopwatch:
    """Seconds by piece; of pieces inside each other the outer one counts."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._busy = device, False

    def timed(self, name: str | Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, watched; ``name`` may depend on the moment."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return function(*args, **kwargs)
            piece = name if isinstance(name, str) else name()
            self._busy = True
            self._wait()
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._wait()
                self.seconds[piece] += time.perf_counter() - start
                self._busy = False

        return watched

    @contextmanager
    def watching(self, places: list[Place]) -> Iterator[None]:
        """Replace methods by watched ones for a while; those that do not exist are left out."""
        undo: list[tuple[Any, str, Any]] = []
        for owner, attribute, piece in places:
            if hasattr(owner, attribute):
                undo.append((owner, attribute, vars(owner).get(attribute)))
                setattr(owner, attribute, self.timed(piece, getattr(owner, attribute)))
        try:
            yield
        finally:
            for owner, attribute, old in reversed(undo):
                delattr(owner, attribute) if old is None else setattr(owner, attribute, old)

    def shares(self, total: float) -> dict[str, float]:
        """Share of each piece in ``total`` seconds, and of the rest."""
        found = {piece: self.seconds[piece] / total for piece in PIECES if piece in self.seconds}
        return found | {"rest": 1 - sum(found.values())}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def split_of_published(published: Any, run: Run, steps: int) -> dict[str, float]:
    """Shares of the published step's methods."""
    names = {"student": "student", "target": "target", "sanitise": "sanitise", "optimise": "optimiser"}
    names |= {"average": "average", "batch": "data"}
    return _split(published.model.device, [(published, *pair) for pair in names.items()], run, steps)


def split_of_ours(trainer: Trainer, run: Run, steps: int) -> dict[str, float]:
    """Shares of our step: the network's passes with and without gradient, and what the trainer calls."""
    places: list[Place] = [
        (trainer.student.backbone, "forward", lambda: "student" if torch.is_grad_enabled() else "target"),
        (trainer.optimizer, "step", "optimiser"),
        (trainer, "_average", "average"),
        (trainer_module, "sanitise", "sanitise"),
        (Feed, "batch", "data"),
    ]
    return _split(trainer.student.device, places, run, steps)


def _split(device: torch.device, places: list[Place], run: Run, steps: int) -> dict[str, float]:
    watch = Stopwatch(device)
    with watch.watching([*places, (torch.autograd, "backward", "backward")]):
        total, _ = run(steps)
    return watch.shares(total)


def peak_bytes(of: Any, run: Run, device: torch.device) -> int | None:
    """Most memory that a step holds with this contender alone, CUDA; None on a CPU (see bench/count.py)."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run(1)
    return torch.cuda.max_memory_allocated(device) - before + resident_bytes(of)


def resident_bytes(of: Any) -> int:
    """Bytes that live between steps: weights, gradients, averages, moments; each storage once."""
    models = [of.student, *of.averages] if isinstance(of, Trainer) else [of.model, of.average_model]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    tensors += [p.grad for model in models for p in model.parameters() if p.grad is not None]
    tensors += [v for state in of.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time on a CPU, which counts no waiting for neighbours; else wall time."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def matmul_rate(kind: str, device: torch.device) -> float:
    """FLOP/s of a large square matrix product in this arithmetic, here and now; the median of many."""
    n, clock = MATMUL[device.type], clock_of(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    old = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    times = []
    try:
        for _ in range(12):
            _wait(device)
            start = clock()
            a @ b
            _wait(device)
            times.append(clock() - start)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = old
    return 2 * n**3 / statistics.median(times[2:])


def our_gradient(config: RunConfig, student: Denoiser, source: Source) -> dict[str, Tensor]:
    """The gradient of the first step of a run, by parameter."""
    trainer, steps = trainer_of(config, student, source)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    return _gradients(trainer.student)


def published_gradient(kind: Any, recipe: Any, model: Denoiser, source: Source) -> dict[str, Tensor]:
    """The gradient of a published step without dropout, at times and noise that were rounded to float32."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    published = kind(model, source.data, recipe)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    x = published.batch()
    t = (torch.randn(len(x), generator=generator) * recipe.p_std + recipe.p_mean).exp()
    eps = torch.randn(x.shape, generator=generator)
    published.update(x, t.to(x), eps.to(x))
    return _gradients(model)


def _gradients(model: Denoiser) -> dict[str, Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """``cosine`` and ``|g - g64| / |g64|`` over all parameters at once."""
    inner, mine, theirs = (
        float(sum((a * b).sum() for a, b in pairs))
        for pairs in (
            [(found[k], exact[k]) for k in exact],
            [(found[k], found[k]) for k in exact],
            [(exact[k], exact[k]) for k in exact],
        )
    )
    distance = float(sum((found[k] - exact[k]).square().sum() for k in exact))
    return {"cosine": inner / (mine * theirs) ** 0.5, "error": (distance / theirs) ** 0.5}


def machine(device: torch.device) -> dict[str, Any]:
    """Where and when."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    """The processor's name and what of 16-bit arithmetic it has (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = text.split("model name")[1].split(":")[1].splitlines()[0].strip()
    flags = set(text.split("flags")[1].split(":")[1].splitlines()[0].split()) if "flags" in text else set()
    return " ".join([name, *sorted(flags & {"avx512f", "avx512_bf16", "amx_bf16"})])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
