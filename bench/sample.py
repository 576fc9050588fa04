"""Few-step sampling, ours against diffusers' `ConsistencyModelPipeline`, with the same weights.

    python bench/sample.py                                   # a small U-Net; under 3 minutes on one core
    python bench/sample.py --size large --compile            # a GPU: 50 M parameters at 32x32, fp32, tf32, fp16, bf16

Interleaved A B A B in one process; medians and, behind +-, half the range between the quartiles. On a CPU seconds are
processor time, so other load on the machine weighs little (files: wall clock). Columns: images per second; the ratio of
ours to theirs; the share of the floor, which is the forward passes' FLOPs at the machine's own matmul rate in that
arithmetic; peak memory beside the weights; and how far the images are from the same ones in fp32, in grey levels
(largest, root mean square). Ours runs through autocast over fp32 weights,
theirs as its users do, with the whole pipeline in that type. The last table is the time until PNGs are on the disk.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewstep import EDM, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.cli.write import save_samples
from fewstep.evaluation.samples import generated
from fewstep.exports.stepping import stepping_of
from fewstep.inference import arithmetic, evaluated
from fewstep.overlap import Arriving, ahead
from fewstep.randomness import Streams
from fewstep.sampling import few_step_times

SIZES: dict[str, dict[str, Any]] = {
    "small": {  # 1.1 M parameters: that of bench/teachers/train_ddpm.py, in colour
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": [32, 64, 64], "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3,
    },
    "large": {  # near 50 M parameters, attention at 16x16, as CIFAR-10's DDPM++
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 3,
        "block_out_channels": [128, 256, 256], "norm_num_groups": 32,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MATMUL = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Setting:
    """What is compared in one line of the table."""

    precision: Any
    steps: int
    compile: bool

    def __str__(self) -> str:
        how = "compiled" if self.compile else "eager"
        return f"{self.precision:<5} {self.steps} step{'s' if self.steps > 1 else ' '} {how:<8}"


def make(size: str, device: torch.device) -> tuple[Denoiser, Any, Any]:
    """Our model, the same network as diffusers has it, and the scheduler."""
    config, shape = SIZES[size], (SIZES[size]["in_channels"], SIZES[size]["sample_size"], SIZES[size]["sample_size"])
    torch.manual_seed(0)
    spec = {"name": "diffusers", "kwargs": {"kind": "UNet2DModel", "config": config}}
    denoiser = Denoiser(
        build(spec), EDM(), Parametrization("edm", time="quarter_log_thousand"), sample_shape=shape, spec=spec
    )
    network = diffusers.UNet2DModel(**config)
    network.load_state_dict(denoiser.backbone.get_submodule("network").state_dict())
    stepping = stepping_of(denoiser)
    return denoiser.to(device).eval(), network.to(device).eval(), stepping


class Theirs:
    """diffusers' pipeline, in one arithmetic."""

    def __init__(self, network: Any, stepping: Any, denoiser: Denoiser, setting: Setting) -> None:
        from copy import deepcopy

        unet = deepcopy(network).to(DTYPES[setting.precision])
        self.dtype, self.denoiser, self.steps = DTYPES[setting.precision], denoiser, setting.steps
        self.pipeline = diffusers.ConsistencyModelPipeline(unet=unet, scheduler=stepping.scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        if setting.compile:
            self.pipeline.unet = torch.compile(unet, dynamic=False)
        self.told = stepping.told(few_step_times(denoiser, setting.steps))

    @torch.no_grad()
    def __call__(self, n: int, batch: int) -> np.ndarray:
        """uint8 ``[n, h, w, c]``; our noise, so that the images can be compared."""
        found, streams = [], Streams(0)
        for start in range(0, n, batch):
            index = torch.arange(start, min(start + batch, n), device=self.denoiser.device)
            with our_noise(streams, index, self.denoiser.sample_shape, self.dtype) as latents:
                images = self.pipeline(
                    batch_size=len(index), timesteps=self.told, num_inference_steps=None, latents=latents,
                    output_type="pt",
                ).images  # fmt: skip
            found.append((images.float() * 255).round().to(torch.uint8).cpu())
        return torch.cat(found).permute(0, 2, 3, 1).numpy()


@contextmanager
def our_noise(streams: Streams, index: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """The first noise is given out, that of later steps replaces the scheduler's own."""
    from diffusers.schedulers import scheduling_consistency_models as module

    calls, real = [0], module.randn_tensor

    def later(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return streams.normal(f"sample/noise/{calls[0]}", index, shape, torch.float32).to(dtype)

    module.randn_tensor = later
    try:
        yield streams.normal("sample/latent", index, shape, torch.float32).to(dtype)
    finally:
        module.randn_tensor = real


def ours(denoiser: Denoiser, setting: Setting) -> Callable[[int, int], np.ndarray]:
    """As ``fewstep sample`` makes them: bytes on the host, one block behind."""

    def call(n: int, batch: int) -> np.ndarray:
        made = generated(
            denoiser, n, setting.steps, batch_size=batch, precision=setting.precision, compile=setting.compile
        )
        blocks = [block.get() for block in ahead(Arriving(block) for block in made.blocks())]
        return torch.cat(blocks).permute(0, 2, 3, 1).numpy()

    return call


# ------------------------------------------------------------------------------------------------ measuring
def seconds(call: Callable[[], object], device: torch.device, wall: bool = False) -> float:
    """Of one call: wall clock on a GPU, processor time on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if wall or device.type == "cuda" else time.process_time
    started = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def rate_of(precision: str, device: torch.device) -> float:
    """FLOP/s of a square matmul in that arithmetic: the best of eight."""
    side = MATMUL[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def flops_of(denoiser: Denoiser) -> float:
    """Of one evaluation of one sample."""
    x = torch.zeros(1, *denoiser.sample_shape, device=denoiser.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        evaluated(denoiser).under(EDM())(x, 1.0)
    return float(counter.get_total_flops())


def resident(key: str) -> float:
    """MiB of this process in memory: VmRSS now, VmHWM at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), float("nan"))


def peak(call: Callable[[], object], device: torch.device) -> float:
    """MiB that a call needs at most beside what is there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def spread(values: list[float]) -> float:
    """Half the range between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """TF32 exactly where it is asked for, for both sides."""
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old


def compare(model: tuple[Denoiser, Any, Any], setting: Setting, exact: np.ndarray, a: argparse.Namespace) -> None:
    """Two lines of the table."""
    denoiser, network, stepping = model
    device, n = denoiser.device, a.images
    sides = {"ours": ours(denoiser, setting), "diffusers": Theirs(network, stepping, denoiser, setting)}
    with tf32(setting.precision == "tf32"):
        first = {name: side(n, a.batch) for name, side in sides.items()}  # warm up, and the images
        memory = {name: peak(lambda side=side: side(n, a.batch), device) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(a.repeats):
            for name, side in sides.items():
                times[name].append(seconds(lambda side=side: side(n, a.batch), device))
        floor = n * setting.steps * flops_of(denoiser) / rate_of(setting.precision, device)
    ratio = statistics.median(theirs / our for our, theirs in zip(times["ours"], times["diffusers"], strict=True))
    for name, found in times.items():
        off = first[name].astype(int) - exact
        print(
            f"{setting}  {name:<9} {n / statistics.median(found):9.1f} +-{spread([n / t for t in found]):6.1f}  "
            f"{ratio if name == 'ours' else 1:5.2f}  {floor / statistics.median(found):6.1%}  {memory[name]:7.0f}  "
            f"{abs(off).max():4d}  {float((off**2).mean()) ** 0.5:6.3f}",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------ files
def files(denoiser: Denoiser, theirs: Theirs, a: argparse.Namespace) -> None:
    """Time until ``a.files`` one-step PNGs are there: overlapped, one after the other, and diffusers with Pillow."""
    folder, setting = Path(tempfile.mkdtemp()), Setting(a.precisions[0], 1, False)
    numbers = iter(range(1000))

    def blocks() -> Iterator[Tensor]:
        return generated(denoiser, a.files, 1, batch_size=a.batch, precision=setting.precision).blocks()

    def overlapped() -> None:
        save_samples(folder / f"{next(numbers)}", denoiser, blocks(), a.files, None)

    def in_turn() -> None:
        save_samples(folder / f"{next(numbers)}", denoiser, [torch.cat(list(blocks()))], a.files, None)

    def pillow() -> None:
        out = folder / f"{next(numbers)}"
        out.mkdir()
        for i, picture in enumerate(theirs(a.files, a.batch)):
            Image.fromarray(picture.squeeze()).save(out / f"{i:06d}.png")

    ways = {"overlapped": overlapped, "in turn": in_turn, "diffusers, Pillow": pillow}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(a.repeats):
        for name, way in ways.items():
            times[name].append(seconds(way, denoiser.device, wall=True))
    shutil.rmtree(folder)
    print(f"\n{a.files} images in one step, {setting.precision}, until they are PNGs on the disk (wall clock):")
    for name, found in times.items():
        print(f"  {name:<18} {a.files / statistics.median(found):8.1f} images/s  {statistics.median(found):6.2f} s "
              f"+-{spread(found):.2f}")  # fmt: skip


def hardware(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--images", type=int, help="per measured call")
    parser.add_argument("--files", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precisions", nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compile", action="store_true", help="also both sides through torch.compile")
    a = parser.parse_args()
    device = torch.device(a.device)
    diffusers.utils.logging.set_verbosity_error()
    cuda = device.type == "cuda"
    a.batch = a.batch or (512 if cuda else 64)
    a.images = a.images or (8 if cuda else 2) * a.batch
    a.files = a.files or 4 * a.batch
    a.precisions = a.precisions or (["fp32", "tf32", "fp16", "bf16"] if cuda else ["fp32", "bf16"])
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    model = make(a.size, device)
    parameters = sum(p.numel() for p in model[0].parameters()) / 1e6
    print(
        f"{hardware(device)}, torch {torch.__version__}, diffusers {diffusers.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    print(f"UNet2DModel {parameters:.1f} M, {flops_of(model[0]) / 1e9:.3f} GFLOP per evaluation, "
          f"{a.images} images in batches of {a.batch}, {a.repeats} interleaved repeats")  # fmt: skip
    for precision in a.precisions:
        arithmetic(precision, device)
        with tf32(precision == "tf32"):
            print(f"  matmul in {precision}: {rate_of(precision, device) / 1e12:.3f} TFLOP/s")
    print("\nsetting                 side       images/s            ratio   floor   MiB     max     rms")
    for steps in a.steps:
        with tf32(False):
            exact = ours(model[0], Setting("fp32", steps, False))(a.images, a.batch).astype(int)
        for compile in (False, True) if a.compile else (False,):
            for precision in a.precisions:
                compare(model, Setting(precision, steps, compile), exact, a)
    files(model[0], Theirs(model[1], model[2], model[0], Setting(a.precisions[0], 1, False)), a)


if __name__ == "__main__":
    main()
