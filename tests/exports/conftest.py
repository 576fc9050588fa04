"""Tiny random teachers of diffusers, exported, and plain diffusers in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.denoiser import Denoiser
from fewstep.process import EDM
from fewstep.sampling import consistency_sample

os.environ["HF_HUB_OFFLINE"] = "1"
WORKER = Path(__file__).with_name("worker.py")
SEED, ROWS = 7, 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The number of threads changes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def diffusers() -> Any:
    """diffusers, whose import warns."""
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        _ = diffusers.UNet2DModel, diffusers.DiTTransformer2DModel, diffusers.AutoencoderKL
    return diffusers


def _drawn(network: Any) -> Any:
    """With weights none of which is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def unet(diffusers: Any, channels: int = 3, **more: Any) -> Any:
    """A UNet2DModel of 8x8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _drawn(
            diffusers.UNet2DModel(
                sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=4,
                block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4, **more,
            )
        )  # fmt: skip


def dit(diffusers: Any) -> Any:
    """A DiT of 4x4x4 latents that also predicts its variance, and its VAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
            patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=8, scaling_factor=0.7,
        )  # fmt: skip
    return diffusers.DiTPipeline(_drawn(transformer), vae.eval(), diffusers.DDPMScheduler())


TEACHERS: dict[str, Callable[[Any], Any]] = {
    "consistency": lambda d: d.ConsistencyModelPipeline(
        unet(d, 1, num_class_embeds=5), d.CMStochasticIterativeScheduler(sigma_min=0.0)
    ),
    "shifted": lambda d: d.ConsistencyModelPipeline(unet(d), d.CMStochasticIterativeScheduler(sigma_min=0.003)),
    "eps": lambda d: d.DDPMPipeline(unet(d), d.DDPMScheduler()),
    "v": lambda d: d.DDPMPipeline(
        unet(d, num_class_embeds=5), d.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    ),
    "x0": lambda d: d.DDPMPipeline(
        unet(d), d.DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2")
    ),
    "flow": lambda d: d.DDPMPipeline(unet(d), d.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "dit": dit,
}
"""Pipelines by what their network predicts."""


@dataclass(frozen=True)
class Exported:
    """A model, its export and ``fewstep.json``."""

    denoiser: Denoiser
    folder: Path
    about: dict[str, Any]

    def draws(self, count: int) -> list[Tensor]:
        """What diffusers draws from torch's generator: the start, then the noise of each step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return [torch.randn(ROWS, *self.denoiser.sample_shape) for _ in range(count)]

    @torch.no_grad()
    def ours(self, levels: list[float], start: float, cond: Tensor | None = None) -> Tensor:
        """fewstep's sampler on the worker's noise, from ``start * T z``; EDM noise levels."""
        noise = self.draws(len(levels))
        return consistency_sample(self.denoiser.under(EDM()), start * noise[0], levels, lambda k: noise[k], cond)


@pytest.fixture(scope="session")
def saved(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a teacher, saved once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "teacher"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                TEACHERS[name](diffusers).save_pretrained(made[name], safe_serialization=True)
        return made[name]

    return get


@pytest.fixture(scope="session")
def exported(saved: Callable[[str], Path]) -> Callable[[str], Exported]:
    """A teacher as if it were a student, exported once."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            folder = saved(name)
            out = fewstep.export(folder, folder.parent / "out", "diffusers")
            made[name] = Exported(fewstep.load(folder), out, json.loads((out / "fewstep.json").read_text()))
        return made[name]

    return get


@pytest.fixture(scope="session")
def plain_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """The last states of ``name -> (folder, arguments)``, sampled in a process that does not know fewstep."""

    def run(requests: dict[str, Any]) -> dict[str, Tensor]:
        work = tmp_path_factory.mktemp("plain")
        listed = [
            {"folder": str(folder), "arguments": arguments, "seed": SEED, "out": str(work / f"{name}.npy")}
            for name, (folder, arguments) in requests.items()
        ]
        (work / "requests.json").write_text(json.dumps(listed))
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", WORKER, work / "requests.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return {name: torch.from_numpy(np.load(work / f"{name}.npy")) for name in requests}

    return run
