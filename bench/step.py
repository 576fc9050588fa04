"""Our training step against one as published: images/s, share of the floor, memory, where the time goes, gradient.

    OMP_NUM_THREADS=1 python bench/step.py --out step.json
    python bench/step.py --nets ddpmpp --ratios 256 --compile --out step.json      # on a GPU: batch 128
    python bench/step.py --quick                                                   # 20 seconds: does it run?

Same network, weights, batch size, data and recipe (RAdam 1e-4, dropout .2, one average); ours goes through
``fewstep.training.trainer.Trainer``. All variants of a group take turns, A B C A B C, in one process; numbers are
medians, [25 %, 75 %] in brackets; on a CPU processor time, too, which neighbours disturb less, and the floor is by it.
Groups that are in --out already are not measured again (--fresh measures them).
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from step_nets import NETS, Net, Variant, images, network, resolved, trainer_of
from step_parts import (
    MATMUL,
    gradient_error,
    machine,
    matmul_rate,
    our_gradient,
    peak_bytes,
    published_gradient,
    split_of_ours,
    split_of_published,
)
from step_table import load_groups, print_groups, save_group, spread
from torch import Tensor

from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.evaluation.compute import forward_flops, target_share


@dataclass(frozen=True)
class Recipe:
    """The settings of the published CIFAR-10 runs (spec/recipes.md c.1); q = 256 from the start is the one-hour one."""

    batch: int = 128
    q: float = 256.0
    stage_images: int = 10**12
    first: int = 0
    last: int = 7
    p_mean: float = -1.1
    p_std: float = 2.0
    k: float = 8.0
    b: float = 1.0
    c: float = 0.0
    lr: float = 1e-4
    beta: float = 0.9993
    tf32: bool = False


class Published:
    """A consistency tuning step as the public code makes it (facts from spec/recipes.md c.1 and e; no line is theirs).

    Eager, fp32; a target pass over all rows, whatever their r; dropout shared by saving and restoring the state of the
    generator; a host read of the device (``r.max() > 0``); one operation per parameter for the guard and the average.

    Args:
        model: the network to train, in place; its dropout probabilities as they are.
        data: images, uint8 ``[n, c, h, w]``, on the host.
        recipe: see there.
        seed: of times, noise, dropout (torch's global generators) and the order of the images.
    """

    def __init__(self, model: Denoiser, data: Tensor, recipe: Recipe, seed: int = 0) -> None:
        self.model, self.data, self.recipe = model.train().requires_grad_(True), data, recipe
        self.average_model = copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.RAdam(model.parameters(), lr=recipe.lr)
        self.images_seen = 0
        self._order = torch.Generator().manual_seed(seed)
        self._left = torch.zeros(0, dtype=torch.int64)
        torch.manual_seed(seed)

    @property
    def ratio(self) -> float:
        """``q^(stage + 1)``."""
        recipe = self.recipe
        return float(recipe.q ** (1 + min(recipe.first + self.images_seen // recipe.stage_images, recipe.last)))

    def step(self) -> None:
        """One update on a batch of the data."""
        x = self.batch()
        t = (torch.randn(len(x), device=x.device) * self.recipe.p_std + self.recipe.p_mean).exp()
        self.update(x, t.to(x.dtype), torch.randn_like(x))

    def update(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """One update on data ``x``, times ``t [b]`` and noise ``eps``; the loss per sample."""
        old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.recipe.tf32
        try:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(x, t, eps)
            loss.mean().backward()
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old
        self.sanitise()
        self.optimise()
        self.images_seen += len(x)
        self.average()
        return loss.detach()

    def batch(self) -> Tensor:
        """The next images of a random order, copied from the host, in [-1, 1]."""
        size = self.recipe.batch
        if len(self._left) < size:
            self._left = torch.cat((self._left, torch.randperm(len(self.data), generator=self._order)))
        rows, self._left = self._left[:size], self._left[size:]
        x = self.data[rows]
        x = x.pin_memory() if self.model.device.type == "cuda" else x
        return x.to(self.model.device, non_blocking=True).to(self.model.dtype) / 127.5 - 1

    def loss(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """``|D(x + t eps, t) - D(x + r eps, r)| / (t - r)`` per sample, r = max(0, t (1 - n(t)/q^a))."""
        recipe = self.recipe
        r = (t * (1 - (1 + recipe.k * torch.sigmoid(-recipe.b * t)) / self.ratio)).clamp(min=0)
        wide = (-1, *(1,) * (x.ndim - 1))
        state = _generator_state(x.device)
        out = self.student(x + t.reshape(wide) * eps, t)
        target = x
        if r.max() > 0:  # the host waits for the device here
            _set_generator_state(x.device, state)
            found = torch.nan_to_num(self.target(x + r.reshape(wide) * eps, r))
            target = torch.where(r.reshape(wide) > 0, found, x)
        square = (out - target).square().flatten(1).sum(1)
        distance = (square + recipe.c**2).sqrt() - recipe.c if recipe.c > 0 else square.sqrt()
        return distance / (t - r)

    def student(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The pass with gradient."""
        return self.model(x_t, t)

    @torch.no_grad()
    def target(self, x_r: Tensor, r: Tensor) -> Tensor:
        """The pass without, over every row."""
        return self.model(x_r, r)

    def sanitise(self) -> None:
        """nan -> 0, +-inf -> +-1e5, parameter by parameter."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)

    def optimise(self) -> None:
        """torch's RAdam as it comes; then what EDM2's layers do after a step."""
        self.optimizer.step()
        for layer in self.model.backbone.modules():
            if hasattr(layer, "after_step"):
                layer.after_step()

    @torch.no_grad()
    def average(self) -> None:
        """The average, parameter by parameter."""
        for mine, theirs in zip(self.average_model.parameters(), self.model.parameters(), strict=True):
            mine.copy_(theirs.detach().lerp(mine, self.recipe.beta))
        for mine, theirs in zip(self.average_model.buffers(), self.model.buffers(), strict=True):
            mine.copy_(theirs)

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs to go on."""
        model, average = self.model.state_dict(), self.average_model.state_dict()
        record = {"model": model, "average": average, "optimizer": self.optimizer.state_dict()}
        record |= {"order": self._order.get_state(), "left": self._left, "images_seen": self.images_seen}
        return record | {"generator": _generator_state(self.model.device), "host": torch.get_rng_state()}

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from :meth:`state`, to the same numbers."""
        self.model.load_state_dict(record["model"])
        self.average_model.load_state_dict(record["average"])
        self.optimizer.load_state_dict(record["optimizer"])
        self._order.set_state(record["order"])
        self._left, self.images_seen = record["left"], record["images_seen"]
        torch.set_rng_state(record["host"])
        _set_generator_state(self.model.device, record["generator"])


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class Contender:
    """One column of a group: something with steps, and what was measured of it."""

    def __init__(self, name: str, net: Net, start: Denoiser, source: Source, batch: int, ratio: float) -> None:
        self.name, self.batch = name, batch
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.first = 0.0
        device = start.device
        if name.startswith("published"):
            recipe = Recipe(batch=batch, q=ratio, last=0, tf32=name == "published-tf32")
            self.of: Any = Published(start.clone(), source.data, recipe)  # type: ignore[attr-defined]
            self.step = self.of.step
        else:
            config = Variant.of(name).config(net, batch, ratio)
            self.of, steps = trainer_of(config, start.clone(), source)
            self.step = lambda: next(steps)
        self.device, self.arithmetic = device, kind_of(name, net, batch, ratio, device)

    def run(self, steps: int) -> tuple[float, float]:
        """Wall and processor seconds of ``steps`` updates."""
        wait(self.device)
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        wait(self.device)
        return time.perf_counter() - start, time.process_time() - busy

    def warm_up(self, steps: int) -> float:
        """Seconds of a step, after the first ones."""
        self.first = self.run(1)[0]
        if "compile" in self.name:
            self.run(12)  # a graph for every quarter of the batch that comes up
        return self.run(steps)[0] / steps

    def split(self, steps: int) -> dict[str, float] | None:
        """Share of each piece, in a pass of its own; None where the passes are one graph."""
        if self.name.startswith("published"):
            return split_of_published(self.of, self.run, steps)
        return None if "compile" in self.name else split_of_ours(self.of, self.run, steps)


def kind_of(name: str, net: Net, batch: int, ratio: float, device: torch.device) -> str:
    """The arithmetic of a contender."""
    if name.startswith("published"):
        return "tf32" if name == "published-tf32" else "fp32"
    return resolved(Variant.of(name).config(net, batch, ratio), ratio, device)


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(arguments: argparse.Namespace, name: str, batch: int, ratio: float, variants: list[str]) -> dict[str, Any]:
    """One group: every variant on one network at one q^a, in turns with the published step."""
    net, device = NETS[name], torch.device(arguments.device)
    start, source = network(net, device), images(net.side)
    share = target_share(Variant("fp32").config(net, batch, ratio).objective, 1)  # type: ignore[arg-type]
    flops = forward_flops(network(net, torch.device("meta"))) * (3 + share)
    group = machine(device) | {
        "net": name,
        "parameters": sum(p.numel() for p in start.parameters()),
        "batch": batch,
        "ratio": ratio,
        "target_share": share,
        "flops_per_image": flops,
    }
    ours = [v for v in variants if not v.startswith("published")]
    always = [v for v in variants if v.startswith("published")]
    size = max(1, arguments.fit // (20 * group["parameters"]) - len(always))
    rows: list[dict[str, Any]] = []
    kinds = sorted({kind_of(name, net, batch, ratio, device) for name in variants})
    rates = {kind: matmul_rate(kind, device) for kind in kinds}
    for k in range(0, max(len(ours), 1), size):
        rows += race(arguments, [*always, *ours[k : k + size]], net, start, source, batch, ratio)
        gc.collect()
    rates = {kind: max(rate, matmul_rate(kind, device)) for kind, rate in rates.items()}
    for row in rows:
        rate = row["images_per_processor_second" if device.type == "cpu" else "images_per_second"]
        row["floor_share"] = rate[0] * flops / rates[row["arithmetic"]]
        if arguments.gradient == "all" or (arguments.gradient == "small" and group["parameters"] < 10**7):
            row |= gradient_row(row["name"], net, start, source, min(batch, 16), ratio)
    return group | {"matmul_flops": rates, "matmul_size": MATMUL[device.type], "rows": rows}


def race(
    arguments: argparse.Namespace, names: list[str], net: Net, start: Denoiser, source: Source, batch: int, ratio: float
) -> list[dict[str, Any]]:
    """Take turns until the time is up; one record per variant."""
    contenders = [Contender(name, net, start, source, batch, ratio) for name in names]
    step = [c.warm_up(arguments.warmup) for c in contenders]
    block = max(1, round(arguments.block / min(step)))
    deadline, rounds = time.perf_counter() + arguments.seconds, 0
    while rounds < arguments.most and (rounds < 3 or time.perf_counter() < deadline):
        for contender in contenders:
            wall, busy = contender.run(block)
            contender.seconds.append(wall / block)
            contender.processor.append(busy / block)
        rounds += 1
    rows = []
    for contender in contenders:
        first = contenders[0]
        rows.append(
            {
                "name": contender.name,
                "arithmetic": contender.arithmetic,
                "images_per_second": spread([batch / s for s in contender.seconds]),
                "images_per_processor_second": spread([batch / s for s in contender.processor]),
                "ratio": spread([a / b for a, b in zip(first.seconds, contender.seconds, strict=True)]),
                "processor_ratio": spread([a / b for a, b in zip(first.processor, contender.processor, strict=True)]),
                "first_step": contender.first,
                "rounds": rounds,
                "steps_per_round": block,
                "peak_bytes": peak_bytes(contender.of, contender.run, contender.device),
                "split": contender.split(max(1, min(block, 5))),
            }
        )
    return rows


def gradient_row(name: str, net: Net, start: Denoiser, source: Source, batch: int, ratio: float) -> dict[str, Any]:
    """Cosine and relative error of one batch's gradient against float64, with the same times, noise and masks.

    The published step's masks cannot be had in float64: its gradient is taken without dropout.
    """
    if name.startswith("published"):
        recipe = Recipe(batch=batch, q=ratio, last=0, tf32=name == "published-tf32")
        pair = [
            published_gradient(Published, recipe, model, source) for model in (start.clone(), start.clone().double())
        ]
    else:
        exact = Variant("fp32", layout="contiguous").config(net, batch, ratio)
        config = Variant.of(name).config(net, batch, ratio)
        pair = [our_gradient(config, start.clone(), source), our_gradient(exact, start.clone().double(), source)]
    return gradient_error(*pair)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    groups = {} if arguments.fresh else load_groups(arguments.out)
    for name in arguments.nets.split(","):
        batch = arguments.batch or (NETS[name].cuda_batch if device.type == "cuda" else NETS[name].cpu_batch)
        for ratio in map(float, arguments.ratios.split(",")):
            key = f"{machine(device)['machine']}/{arguments.threads}/{name}/{batch}/{ratio:g}/{arguments.variants}"
            if key not in groups:
                groups[key] = measure(arguments, name, batch, ratio, arguments.variants.split(","))
                save_group(arguments.out, key, groups[key])
            print_groups([groups[key]])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nets", default="ddpmpp,edm2s,unet,dit,tiny" if cuda else "tiny,unet,dit,ddpmpp")
    parser.add_argument("--ratios", default="2,4,256", help="q^a: 2 and 4 are stages 0 and 1 of q = 2; 256 its last")
    parser.add_argument(
        "--variants", default="", help="fp32,tf32,fp16,bf16,auto, each with +compile, +recompute, +LAYOUT"
    )
    parser.add_argument("--compile", action="store_true", help="each of ours compiled, too")
    parser.add_argument("--layouts", default="", help="each of ours in these layouts: contiguous,channels_last")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of taking turns, per group")
    parser.add_argument("--most", type=int, default=25, help="rounds at most")
    parser.add_argument("--block", type=float, default=0.5 if cuda else 0.2, help="seconds of a turn, at least a step")
    parser.add_argument("--warmup", type=int, default=10 if cuda else 2)
    parser.add_argument("--fit", type=float, default=60e9 if cuda else 8e9, help="bytes for networks side by side")
    parser.add_argument("--gradient", choices=("small", "all", "none"), default="all" if cuda else "small")
    parser.add_argument("--out", type=Path, help="JSON, written after every group")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.nets, arguments.ratios, arguments.seconds, arguments.most = "tiny", "2,256", 1.0, 3
    base = arguments.variants or ("fp32,tf32,fp16,bf16,auto" if cuda else "fp32,bf16,auto")
    names = [name for name in base.split(",") if not name.startswith("published")]
    names = [f"{name}{layout}" for layout in _suffixes(arguments.layouts) for name in names]
    names += [f"{name}+compile" for name in names] if arguments.compile else []
    arguments.variants = ",".join(["published", *(["published-tf32"] if cuda else []), *names])
    arguments.fit = int(arguments.fit)
    return arguments


def _suffixes(layouts: str) -> list[str]:
    return ["", *(f"+{layout}" for layout in layouts.split(","))] if layouts else [""]


if __name__ == "__main__":
    main()
