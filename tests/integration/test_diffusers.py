"""Models of diffusers: every kind is loaded, samples as its own pipeline does, is saved, tuned and resumed."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import EDM, Denoiser, convert, load, save_model, tune
from fewstep.backbones import build
from fewstep.backbones.hf import TimeFeatures
from fewstep.backbones.two_time import with_landing
from fewstep.checkpoint import hub as hub_module
from fewstep.checkpoint.diffusers import is_diffusers, load_diffusers
from fewstep.checkpoint.model import describe
from fewstep.cli import main
from fewstep.data.sources import ArraySource
from fewstep.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # NumPy's, in diffusers itself
STEPS = 4
TEXT = Path(__file__).parents[1] / "text" / "conftest.py"


@pytest.fixture(scope="module")
def text() -> Any:
    """The makers of tiny text pipelines (tests/text)."""
    spec = importlib.util.spec_from_file_location("tiny_text_pipelines", TEXT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def libraries() -> tuple[Any, Any]:
    pytest.importorskip("transformers", reason="transformers is not installed: there are no text encoders")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        _ = transformers.CLIPTextModel, diffusers.StableDiffusionPipeline
    return transformers, diffusers


def shaken(network: Any, seed: int = 0) -> Any:
    """No weight is zero, so that nothing the network is told is without effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def unet(diffusers: Any, channels: int = 3, **more: Any) -> Any:
    torch.manual_seed(0)
    about = {"sample_size": 8, "in_channels": channels, "out_channels": channels, "attention_head_dim": 4} | more
    return shaken(diffusers.UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **about,
    ))  # fmt: skip


def dit(diffusers: Any, classes: int = 1000, out_channels: int = 8) -> Any:
    torch.manual_seed(0)
    return shaken(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, num_layers=2,
        sample_size=4, num_embeds_ada_norm=classes, norm_num_groups=4,
    ))  # fmt: skip


def vae(diffusers: Any, channels: int, **more: Any) -> Any:
    torch.manual_seed(1)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return shaken(diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=down, up_block_types=up, latent_channels=channels,
        norm_num_groups=4, sample_size=16, scaling_factor=0.4, **more,
    ))  # fmt: skip


def ddim(diffusers: Any, **more: Any) -> Any:
    return diffusers.DDIMScheduler(clip_sample=False, **more)


def latent(whole: Any, diffusers: Any, channels: int) -> Any:
    """A text pipeline of tests/text on the latents of a VAE; all its weights have an effect."""
    shaken(whole.unet if hasattr(whole, "unet") else whole.transformer)
    parts = whole.components | {"vae": vae(diffusers, channels, shift_factor=0.1)}
    more = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    more |= {"add_watermarker": False} if "XL" in type(whole).__name__ else {}
    return type(whole)(**parts, **more)


Made = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def made(libraries: tuple[Any, Any], text: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``kind -> (pipeline, its folder)``, made once each."""
    _, diffusers = libraries
    work = tmp_path_factory.mktemp("pipelines")
    guided = {"guidance_embeds": True}

    def flux() -> Any:
        whole = text.flux(libraries, work / "flux-files")
        torch.manual_seed(0)
        config = {k: v for k, v in whole.transformer.config.items() if not k.startswith("_")}
        whole.transformer = diffusers.FluxTransformer2DModel(**config | guided | {"in_channels": 16})
        return latent(whole, diffusers, 4)

    makers: dict[str, Callable[[], Any]] = {
        "ddim": lambda: diffusers.DDIMPipeline(unet(diffusers), ddim(diffusers)),
        "ddim-v": lambda: diffusers.DDIMPipeline(
            unet(diffusers, 1),
            ddim(diffusers, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2",
                 timestep_spacing="trailing", rescale_betas_zero_snr=True),
        ),
        "learned variance": lambda: diffusers.DDIMPipeline(unet(diffusers, 3, out_channels=6), ddim(diffusers)),
        "consistency": lambda: diffusers.ConsistencyModelPipeline(
            unet(diffusers, num_class_embeds=5), diffusers.CMStochasticIterativeScheduler(sigma_min=0.0)
        ),
        "dit": lambda: diffusers.DiTPipeline(dit(diffusers), vae(diffusers, 4), ddim(diffusers)),
        "sd": lambda: latent(text.sd(libraries, work / "sd-files"), diffusers, 3),
        "sdxl": lambda: latent(text.sdxl(libraries, work / "sdxl-files"), diffusers, 3),
        "sd3": lambda: latent(text.sd3(libraries, work / "sd3-files", t5=False), diffusers, 4),
        "flux": flux,
    }  # fmt: skip
    kept: dict[str, tuple[Any, Path]] = {}

    def make(kind: str) -> tuple[Any, Path]:
        if kind not in kept:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole = makers[kind]()
                whole.save_pretrained(work / kind)
            whole.set_progress_bar_config(disable=True)
            kept[kind] = whole, work / kind
        return kept[kind]

    return make


KINDS = ("ddim", "ddim-v", "learned variance", "consistency", "dit", "sd", "sdxl", "sd3", "flux")


def small(folder: Path) -> Denoiser:
    """The denoiser; Flux, which says no size, at 8 latents per side."""
    return load_diffusers(folder, side=8) if folder.name == "flux" else load(folder)


def network_of(pipeline: Any) -> Any:
    return getattr(pipeline, "unet", None) or pipeline.transformer


def noise(denoiser: Denoiser, rows: int, seed: int = 3) -> Tensor:
    return torch.randn(rows, *denoiser.sample_shape, generator=torch.Generator().manual_seed(seed))


def any_condition(denoiser: Denoiser, rows: int) -> Tensor | None:
    if denoiser.num_classes:
        return torch.arange(rows) % denoiser.num_classes
    if not denoiser.conditioning:
        return None
    return torch.randn(rows, denoiser.conditioning.width, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def by_jumps(denoiser: Denoiser, x: Tensor, times: list[float], end: float | None, cond: Tensor | None) -> Tensor:
    """DDIM in the network's own coordinates; at the end x_0 itself, or the point at ``end``."""
    for t, s in zip(times, [*times[1:], end], strict=True):
        x_0, now = denoiser(x, t, cond), torch.full((len(x),), t)
        x = x_0 if s is None else denoiser.process.jump(x, x_0, now, torch.full((len(x),), s))
    return x


# ---- the same samples as the pipeline
@pytest.mark.parametrize("kind", ["ddim", "ddim-v", "learned variance"])
def test_pixels_by_ddim(made: Made, kind: str) -> None:
    pipeline, folder = made(kind)
    denoiser = load(folder)
    assert denoiser.num_classes == 0
    assert denoiser.codec is None
    assert denoiser.sample_shape == (1 if kind == "ddim-v" else 3, 8, 8)
    assert denoiser.sigma_data == 0.5
    if kind == "learned variance":  # DDIMPipeline hands six channels to its scheduler: cut them for it
        pipeline = copy.deepcopy(pipeline)
        whole = pipeline.unet.forward
        pipeline.unet.forward = lambda *given: SimpleNamespace(sample=whole(*given).sample[:, :3])
    if kind == "ddim-v":  # DDIM divides by no signal at all; as in the Euler scheduler
        pipeline.scheduler.alphas_cumprod[-1] = 2**-24
    theirs = pipeline(
        batch_size=3, generator=torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np"
    )
    times = [float(t) for t in pipeline.scheduler.timesteps]
    ours = by_jumps(denoiser, noise(denoiser, 3), times, None, None)
    images = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert images.std() > 0.1
    torch.testing.assert_close(images, torch.from_numpy(theirs.images), rtol=0, atol=2e-5)


@torch.no_grad()
def test_consistency_model(made: Made) -> None:
    pipeline, folder = made("consistency")
    denoiser = load(folder)
    assert denoiser.num_classes == 5
    assert denoiser.parametrization.time == "quarter_log_thousand"
    labels = torch.tensor([4, 0, 2])
    latents = noise(denoiser, 3)
    theirs = pipeline(batch_size=3, class_labels=labels, latents=80 * latents / pipeline.scheduler.init_noise_sigma,
                      num_inference_steps=1, output_type="np").images  # fmt: skip
    images = (denoiser(80 * latents, 80.0, labels) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(images, torch.from_numpy(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_with_its_null_class(made: Made, scale: float) -> None:
    pipeline, folder = made("dit")
    denoiser = load(folder)
    assert (denoiser.sample_shape, denoiser.num_classes, denoiser.sigma_data) == ((4, 4, 4), 1000, 1.0)
    seen: list[Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z, *a, **k: (seen.append(z), decode(z, *a, **k))[1]
    labels = [7, 999, 0]
    generator = torch.Generator().manual_seed(3)
    images = pipeline(
        labels, guidance_scale=scale, generator=generator, num_inference_steps=STEPS, output_type="np"
    ).images
    pipeline.vae.decode = decode
    times = [float(t) for t in pipeline.scheduler.timesteps]

    def guided(x: Tensor, t: float, cond: Tensor | None) -> Tensor:
        with_label, without = denoiser(x, t, cond), denoiser(x, t, None)
        return without + scale * (with_label - without)

    guided.process = denoiser.process  # type: ignore[attr-defined]
    model: Any = denoiser if scale == 1 else guided
    ours = by_jumps(model, noise(denoiser, 3), times, None, torch.tensor(labels))
    torch.testing.assert_close(ours, seen[-1] * 0.4, rtol=1e-4, atol=1e-4)
    assert denoiser.codec is not None
    shown = denoiser.codec.decode(ours).permute(0, 2, 3, 1).float() / 255
    torch.testing.assert_close(shown, torch.from_numpy(images), rtol=0, atol=1 / 255)


def ask(pipeline: Any, latents: Tensor, scale: float = 1.0) -> Tensor:
    """Latents of the text pipeline for two prompts."""
    more: dict[str, Any] = {"height": 16, "width": 16} if latents.shape[-1] == 8 else {}
    if "StableDiffusion3" in type(pipeline).__name__:
        more |= {"max_sequence_length": 256}
    given = pipeline._pack_latents(latents, *latents.shape) if "Flux" in type(pipeline).__name__ else latents
    with torch.no_grad():
        return pipeline(
            prompt=["a red square", "a blue circle"], latents=given, num_inference_steps=STEPS, guidance_scale=scale,
            output_type="latent", **more,
        ).images  # fmt: skip


def test_sdxl_is_told_the_size_that_was_asked_for(made: Made, tmp_path: Path) -> None:
    from fewstep.backbones.text import encoders_of

    _, folder = made("sdxl")
    own, other = load(folder), load_diffusers(folder, side=12)
    save_model(other, tmp_path / "other")
    for denoiser, side in ((own, 8), (other, 12), (load(tmp_path / "other"), 12)):
        encoders = encoders_of(denoiser)
        rows = torch.stack([encoders.encode(["a red square"])[0], denoiser.backbone.null_cond])
        pixels = 2.0 * side  # the VAE halves them
        assert denoiser.conditioning.unpack(rows)["time_ids"].tolist() == [[pixels, pixels, 0, 0, pixels, pixels]] * 2
    assert encoders_of(other).hash != encoders_of(own).hash


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_text_pipelines(made: Made, kind: str, scale: float) -> None:
    """The same prompts and noise give the same latents; without guidance, and with it against ``null_cond``."""
    from fewstep.backbones.text import encoders_of

    pipeline, folder = made(kind)
    denoiser = load(folder)
    if kind == "flux" and scale != 1:
        pytest.skip("Flux is told a strength")
    rows = encoders_of(denoiser).encode(["a red square", "a blue circle"])
    if kind == "flux":
        assert denoiser.sample_shape == (4, 128, 128)
        denoiser = load_diffusers(folder, side=8)
    x = noise(denoiser, 2)
    theirs = ask(pipeline, x, 3.5 if kind == "flux" else scale)
    if kind == "flux":
        theirs = pipeline._unpack_latents(theirs, 16, 16, pipeline.vae_scale_factor)
    scheduler = pipeline.scheduler

    def model(x: Tensor, t: Any, cond: Tensor | None) -> Tensor:
        said = clock(x, t, cond)
        return said if scale == 1 else clock(x, t, None) * (1 - scale) + scale * said

    clock = denoiser if kind != "sdxl" else denoiser.under(EDM())
    model.process = clock.process  # type: ignore[attr-defined]
    if kind == "sd":
        ours = by_jumps(model, x, [float(t) for t in scheduler.timesteps], None, rows)  # type: ignore[arg-type]
    else:
        levels = [float(s) for s in scheduler.sigmas]
        start = x * float(scheduler.init_noise_sigma) if kind == "sdxl" else x
        ours = by_jumps(model, start, levels[:-1], levels[-1], rows)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert denoiser.sigma_data == 1.0
    size = {"size": [16, 16]} if kind == "flux" else {}  # it was opened at a size
    assert denoiser.text == {"pipeline": str(folder)} | size
    told = clock(x, 0.5 if kind != "sd" else 500, rows)
    assert (told[0] - clock(x, 0.5 if kind != "sd" else 500, rows.flip(0))[0]).abs().max() > 1e-4  # the prompt counts


# ---- what the adapter does to a network
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_theirs_and_survives_saving(made: Made, kind: str, tmp_path: Path) -> None:
    pipeline, folder = made(kind)
    denoiser = small(folder)
    theirs = network_of(pipeline).state_dict()
    ours = denoiser.backbone.network.state_dict()  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not denoiser.training
    save_model(denoiser, tmp_path / "model")
    back = load(tmp_path / "model")
    assert describe(back) == describe(denoiser)
    assert back.spec == denoiser.spec
    x, cond = noise(denoiser, 2), any_condition(denoiser, 2)
    t = denoiser.process.from_edm(torch.tensor([0.4, 3.0]))
    with torch.no_grad():
        want = denoiser(x, t, cond)
        assert torch.equal(back(x, t, cond), want)
        assert torch.equal(back(x, t), denoiser(x, t))
        assert torch.equal(denoiser.clone()(x, t, cond), want)
    if cond is not None:
        assert not torch.allclose(want, denoiser(x, t).detach(), atol=1e-4)
        assert denoiser.conditioning == back.conditioning


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_told_a_landing_time(made: Made, kind: str, tmp_path: Path) -> None:
    """Nothing changes at the start; then the landing time is heard; no hook is left behind."""
    denoiser = small(made(kind)[1])
    student = with_landing(denoiser)
    x, cond = noise(denoiser, 2), any_condition(denoiser, 2)
    t = denoiser.process.from_edm(torch.tensor([0.4, 3.0]))
    with torch.no_grad():
        want = denoiser(x, t, cond)
        assert torch.equal(student(x, t, cond), want)
        assert torch.equal(student(x, t), denoiser(x, t))  # null_cond passes through
        student.backbone.landing.last.weight.normal_(0, 0.3)  # type: ignore[union-attr]
        low = denoiser.process.from_edm(torch.tensor([0.1, 0.1]))
        landed = student(x, t, cond, low)
        assert not torch.allclose(landed, student(x, t, cond, t), atol=1e-5)
        assert torch.equal(student.clone()(x, t, cond, low), landed)
        assert torch.equal(denoiser(x, t, cond), want)
        save_model(student, tmp_path / "student")
        assert torch.equal(load(tmp_path / "student")(x, t, cond, low), landed)
    student.train()(x, t, cond, low).square().mean().backward()
    assert student.backbone.landing.last.weight.grad.any()  # type: ignore[union-attr]
    assert all(not m._forward_hooks for m in student.modules())


def test_labels_that_say_nothing(made: Made, libraries: tuple[Any, Any]) -> None:
    """A row of zeros is DiT's null class; a U-Net has none and embeds zeros. No label is dropped in training."""
    network = dit(libraries[1], classes=10)
    backbone = build({"name": "diffusers", "kwargs": {"kind": "DiTTransformer2DModel", "config": dict(network.config)}})
    backbone.network.load_state_dict(network.state_dict())  # type: ignore[union-attr]
    x, t = torch.randn(3, 4, 4, 4), torch.tensor([3.0, 400.0, 999.0])
    rows = torch.eye(10)[[4, 9, 0]]
    rows[1] = 0
    with torch.no_grad():
        want = network(x, t, class_labels=torch.tensor([4, 10, 0]), return_dict=False)[0][:, :4]
        assert torch.equal(backbone(x, t, rows), want)
        assert torch.equal(backbone.train()(x, t, rows), want)
        torch.manual_seed(0)
        assert not torch.equal(network.train()(x, t, class_labels=torch.tensor([4, 4, 0]), return_dict=False)[0],
                               network(x, t, class_labels=torch.tensor([4, 4, 0]), return_dict=False)[0])  # fmt: skip
        classes = load(made("consistency")[1])
        without = classes(torch.ones(2, 3, 8, 8), 1.0, None)
        classes.backbone.network.class_embedding.weight.add_(1.0)  # type: ignore[union-attr]
        assert torch.equal(classes(torch.ones(2, 3, 8, 8), 1.0, None), without)  # no class is in it
        assert torch.equal(classes(torch.ones(2, 3, 8, 8), 1.0, torch.zeros(2, 5)), without)
        assert not torch.allclose(classes(torch.ones(2, 3, 8, 8), 1.0, torch.tensor([1, 1])), without)


@pytest.mark.parametrize("channels", [8, 7])
@pytest.mark.parametrize("flip", [True, False])
def test_time_is_told_in_float64(libraries: tuple[Any, Any], channels: int, flip: bool) -> None:
    """The same numbers as theirs, but so that 1e-9 of 999 is heard."""
    from diffusers.models.embeddings import Timesteps

    plain = Timesteps(channels, flip, 0.5)
    features, t = TimeFeatures(plain), torch.tensor([0.3, 999.0], dtype=torch.float64)
    assert torch.equal(features(t.float()), plain(t.float()))
    torch.testing.assert_close(features(t), plain(t).double(), rtol=0, atol=2e-4)
    step = (features(t + 1e-9) - features(t)) / 1e-9
    slope = (features(t + 1e-4) - features(t - 1e-4)) / 2e-4
    assert features(t).dtype == torch.float64
    torch.testing.assert_close(step, slope, rtol=0, atol=1e-3)
    assert step[1].abs().max() > 0.1


# ---- ways in
def test_a_folder_its_network_and_an_open_pipeline_are_the_same(made: Made, tmp_path: Path) -> None:
    pipeline, folder = made("ddim")
    shutil.copytree(folder / "unet", tmp_path / "unet")
    shutil.copy(folder / "scheduler" / "scheduler_config.json", tmp_path / "unet")
    state = torch.get_rng_state()
    whole, alone, opened = load(folder), load(tmp_path / "unet"), load(pipeline)
    assert torch.equal(torch.get_rng_state(), state)  # nothing random is left of the first weights
    said = load_diffusers(folder / "unet", scheduler=dict(pipeline.scheduler.config) | {"_class_name": "DDIMScheduler"})
    x = noise(whole, 2)
    for other in (alone, opened, said):
        assert describe(other) == describe(whole)
        assert torch.equal(other(x, 300.0), whole(x, 300.0))
    before = pipeline.unet.conv_in.weight.clone()
    with torch.no_grad():
        opened.backbone.network.conv_in.weight.zero_()  # type: ignore[union-attr]
    assert torch.equal(pipeline.unet.conv_in.weight, before)  # a copy
    with pytest.raises(CheckpointError, match="holds one set of weights only"):
        load(folder, weights="student")


def test_an_open_text_pipeline_needs_its_folder(made: Made, libraries: tuple[Any, Any]) -> None:
    pipeline, folder = made("sd")
    with pytest.raises(CheckpointError, match=r"no folder with its tokenizer.*pipeline\.save_pretrained\(FOLDER\)"):
        load(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = libraries[1].StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    assert describe(load(opened)) == describe(load(folder))


def test_shards_variants_and_old_names(made: Made, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    pipeline, folder = made("ddim")
    want = load(folder)
    x = noise(want, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        copy.deepcopy(pipeline).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert len(list((tmp_path / "sharded" / "unet").glob("*-of-*.safetensors"))) > 1
    assert torch.equal(load(tmp_path / "sharded")(x, 300.0), want(x, 300.0))
    half = load(tmp_path / "half")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half(x, 300.0), want(x, 300.0), rtol=0.05, atol=0.05)
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, past in new.items():
        tensors = {name.replace(f".{now}.", f".{past}."): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, file)
    assert torch.equal(load(tmp_path / "old")(x, 300.0), want(x, 300.0))
    lost = next((tmp_path / "sharded" / "unet").glob("*-00001-of-*.safetensors"))
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"Weights in .* are missing.*{lost.name}.*hf download"):
        load(tmp_path / "sharded")


def test_dit_under_its_former_name(made: Made, tmp_path: Path) -> None:
    _, folder = made("dit")
    shutil.copytree(folder, tmp_path / "dit")
    for name, key in (("model_index.json", "transformer"), ("transformer/config.json", "_class_name")):
        path = tmp_path / "dit" / name
        record = json.loads(path.read_text())
        record[key] = ["diffusers", "Transformer2DModel"] if key == "transformer" else "Transformer2DModel"
        path.write_text(json.dumps(record | ({"double_self_attention": False} if key == "_class_name" else {})))
    ours = describe(load(tmp_path / "dit"))
    want = describe(load(folder))
    assert ours["backbone"] == want["backbone"]


def test_convert_writes_a_model_directory(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = made("ddim")
    assert main(["convert", str(folder), str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sample_shape"] == [3, 8, 8]
    want, back = load(folder), load(tmp_path / "model")
    x = noise(want, 2)
    assert torch.equal(back(x, 300.0), want(x, 300.0))
    record = json.loads((tmp_path / "model" / "config.json").read_text())
    assert record["provenance"] == {"source": str(folder), "network": "UNet2DModel"}
    with pytest.raises(CheckpointError, match="Leave --weights out"):
        convert(folder, tmp_path / "other", which="net")


# ---- tuning
def images(count: int = 48, shape: tuple[int, ...] = (3, 8, 8)) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    return ArraySource("noise", torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator), None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import numpy as np

    np.savez(tmp_path / "data.npz", images=images().read(np.arange(48)).permute(0, 2, 3, 1).numpy())
    return tmp_path / "data.npz"


SETTINGS: dict[str, Any] = {
    "images": 64, "batch_size": 8, "seed": 5, "optim.lr": 1e-3, "student.dropout": 0.2, "objective.schedule.images": 24,
    "emas": [{"kind": "constant", "beta": 0.9}, {"kind": "power", "std": 0.1}], "output.log_images": 8,
    "output.checkpoint_images": 16, "output.sample_images": 0, "eval.samples": 0,
}  # fmt: skip


@pytest.mark.slow
def test_ect_of_a_pipeline_resumes_to_the_same_bits(
    made: Made, data: Path, tmp_path: Path, same_bits: Callable[[Path, Path], None], call: Callable[..., str]
) -> None:
    """``fewstep tune PIPELINE``, whole; and cut off after 40 images in another process, then resumed."""
    _, folder = made("ddim")
    arguments = ["--set", *(f"{path}={json.dumps(value)}" for path, value in SETTINGS.items())]
    common = ["tune", folder, "--data", data, "--quiet", "--device", "cpu"]
    assert main([*map(str, common), "--out", str(tmp_path / "whole"), *arguments]) == 0
    stop = (
        "import fewstep.training.trainer as t, itertools, os\n"
        "steps = t.Trainer.steps\n"
        "def some(self):\n"
        "    for report in steps(self):\n"
        "        yield report\n"
        "        if report.progress.images_seen >= 40: os._exit(9)\n"
        "t.Trainer.steps = some\n"
        "from fewstep.cli import main\nimport sys\nsys.exit(main())"
    )
    call(*common, "--out", tmp_path / "cut", *arguments, script=stop, code=9)
    assert not (tmp_path / "cut" / "model").exists()
    assert main(["resume", str(tmp_path / "cut"), "--quiet", "--device", "cpu"]) == 0
    same_bits(tmp_path / "cut", tmp_path / "whole")
    student = load(tmp_path / "whole")
    assert student.spec == load(folder).spec
    assert student.process == EDM()
    assert student.sigma_max == load(folder).sigma_max
    x = noise(student, 2)
    assert not torch.allclose(student(x, 1.0), load(folder).under(EDM())(x, 1.0), atol=1e-4)


@pytest.mark.parametrize("objective", ["ecd", "meanflow"])
def test_objectives_with_a_teacher_and_with_a_landing_time(made: Made, tmp_path: Path, objective: str) -> None:
    _, folder = made("ddim")
    settings = {k: v for k, v in SETTINGS.items() if k not in ("emas", "objective.schedule.images")} | {"images": 16}
    run = tune(str(folder), images(), out=tmp_path / "run", objective=objective, overrides=settings, device="cpu")
    student = run.model()
    assert student.two_time == (objective == "meanflow")
    assert torch.equal(student(noise(student, 2), 1.0), load(tmp_path / "run" / "model")(noise(student, 2), 1.0))


def test_the_command_line_takes_a_pipeline(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = made("ddim")
    out = tmp_path / "x.npz"
    assert main(["sample", str(folder), "-n", "3", "--out", str(out), "--quiet", "--device", "cpu"]) == 0
    assert out.is_file()
    assert main(["plan", str(folder), "--data", "digits", "--quiet", "--device", "cpu"]) == 2
    assert "--channels 3" in capsys.readouterr().err


# ---- hub ids
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of downloads; whoever asks the network is found out."""
    pytest.importorskip("huggingface_hub.constants")
    import huggingface_hub as hub

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real = hub.snapshot_download

    def within(name: str, **options: Any) -> str:
        assert options["local_files_only"], "the network was asked"
        return str(real(name, cache_dir=tmp_path / "hub", **options))

    monkeypatch.setattr(hub, "snapshot_download", within)
    monkeypatch.setattr(hub, "get_session", lambda: pytest.fail("the network was asked"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache: Path, name: str, folder: Path) -> Path:
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, root / "snapshots" / ("a" * 40))
    return root / "snapshots" / ("a" * 40)


def test_a_hub_id_comes_from_the_cache(made: Made, cache: Path, data: Path, tmp_path: Path) -> None:
    _, folder = made("ddim")
    place = cached(cache, "someone/ddim", folder)
    assert describe(load("someone/ddim")) == describe(load(folder))
    assert describe(load("someone/ddim@main")) == describe(load(folder))
    run = tune("someone/ddim", str(data), out=tmp_path / "run", overrides=SETTINGS | {"images": 16}, device="cpu")
    assert run.config.teacher == "someone/ddim"
    (tmp_path / "run" / "report.html").unlink()
    from fewstep.runs import resume, teacher_again

    assert teacher_again(run.config, run.path) is not None
    resume(tmp_path / "run", device="cpu")
    (place / "unet" / "config.json").unlink()
    (place / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert teacher_again(run.config, run.path) is None  # gone: only its rows of the table need it


def test_a_hub_id_offline_fails_at_once_with_the_command(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'no/such' is neither a folder nor in the cache .*offline.*hf download no/such"
    ):
        load("no/such")
    with pytest.raises(CheckpointError, match=r"hf download no/such --revision v2"):
        load("no/such@v2")
    (tmp_path / "on" / "disk").mkdir(parents=True)
    assert not is_diffusers("on/disk")  # never sent to the hub
    with pytest.raises(CheckpointError, match=r"'on/disk' is not a model"):
        load("on/disk")
    with pytest.raises(CheckpointError, match=r"'on/other' does not exist"):
        load("on/other")  # beside other files: a path
    for path in ("a/b/c", "nothing", "./no/such", "models/x.pkl"):
        assert not is_diffusers(path)


def test_an_unreachable_hub_is_asked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append(timeout)
            raise OSError("Name or service not known")

    for variable in ("HF_HUB_OFFLINE", "FEWSTEP_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    with pytest.raises(CheckpointError, match=r"does not answer \(OSError: Name or service.*hf download no/such"):
        load("no/such")
    assert asked == [hub_module.PROBE_SECONDS]


# ---- bad input
def edit(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (record | changes).items() if v is not ...}))


@pytest.fixture
def spoiled(made: Made, tmp_path: Path) -> Callable[[str], Path]:
    def take(kind: str) -> Path:
        return Path(shutil.copytree(made(kind)[1], tmp_path / kind))

    return take


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "unknown scheduler": ("ddim", lambda p: edit(p / "scheduler" / "scheduler_config.json", _class_name="Fancy"),
                          r"scheduler 'Fancy' .*Known: DDPMScheduler"),
    "unknown prediction": ("ddim", lambda p: edit(p / "scheduler" / "scheduler_config.json", prediction_type="score"),
                           r"prediction type 'score' is not known.*epsilon"),
    "no scheduler": ("ddim", lambda p: shutil.rmtree(p / "scheduler"),
                     r"no scheduler_config\.json\. Put its scheduler_config\.json beside its config\.json, or say it"),
    "pickles": ("ddim", lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").rename(p / "unet" / "d.bin"),
                r"are pickles \(\.bin\), which are not opened\. .*safe_serialization=True"),
    "no weights": ("ddim", lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
                   r"There are no weights in .*unet.*hf download"),
    "damaged weights": ("ddim", lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"),
                        r"is damaged or not a safetensors file"),
    "no network": ("ddim", lambda p: edit(p / "model_index.json", unet=...), r"no denoising network.*unet or tr"),
    "network's folder gone": ("ddim", lambda p: shutil.rmtree(p / "unet"), r"folder '.*unet' has no config\.json"),
    "broken index": ("ddim", lambda p: (p / "model_index.json").write_text("{"), r"model_index\.json' is damaged"),
    "unknown network": ("ddim", lambda p: edit(p / "unet" / "config.json", _class_name="UNet1DModel"),
                        r"no way to call .* 'UNet1DModel'\. Did you mean 'UNet2DModel'\?"),
    "another width": ("ddim", lambda p: edit(p / "unet" / "config.json", block_out_channels=[8, 24]),
                      r"do not fit the network.*of another shape: .*\(16,\) instead of \(24,\)"),
    "another depth": ("ddim", lambda p: edit(p / "unet" / "config.json", layers_per_block=2),
                      r"do not fit the network. Got: missing: .*resnets\.1"),
    "odd blocks": ("ddim", lambda p: edit(p / "unet" / "config.json", down_block_types=["Nothing", "DownBlock2D"]),
                   r"UNet2DModel cannot be built from this configuration: .*Nothing"),
    "no size": ("ddim", lambda p: edit(p / "unet" / "config.json", sample_size=None), r"not say how large.*side=32"),
    "inpainting": ("ddim", lambda p: edit(p / "unet" / "config.json", in_channels=9), r"9 channels in and 3 out"),
    "learned times": ("ddim", lambda p: edit(p / "unet" / "config.json", time_embedding_type="learned"),
                      r"time_embedding_type 'learned'"),
    "told images": ("sd", lambda p: edit(p / "unet" / "config.json", encoder_hid_dim_type="image_proj"),
                    r"encoder_hid_dim_type 'image_proj'"),
    "no VAE": ("dit", lambda p: shutil.rmtree(p / "vae"), r"There is no VAE in .*vae'.*hf download"),
    "no VAE in the index": ("dit", lambda p: edit(p / "model_index.json", vae=[None, None]),
                            r"latents of 4 channels, and there is no VAE.*whole pipeline"),
    "no tokenizer": ("sd", lambda p: shutil.rmtree(p / "tokenizer"), r"has no tokenizer, which its prompts need"),
    "no text encoder": ("sd", lambda p: shutil.rmtree(p / "text_encoder"), r"has no text encoder, which its prompts"),
    "other text encoder": ("sd", lambda p: edit(p / "unet" / "config.json", cross_attention_dim=20), 
                           r"do not fit|shapes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_pipelines_are_one_sentence(spoiled: Callable[[str], Path], case: str, capsys: Any) -> None:
    kind, spoil, says = BAD[case]
    folder = spoiled(kind)
    spoil(folder)
    with pytest.raises((CheckpointError, ConfigError), match=says):
        load(folder)
    assert main(["sample", str(folder), "-n", "1", "--out", str(folder / "x.npz"), "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown


def test_a_network_without_its_pipeline(made: Made, tmp_path: Path) -> None:
    _, folder = made("sd")
    with pytest.raises(
        CheckpointError, match=rf"network of a pipeline, without its scheduler\. Give the pipeline: {folder}"
    ):
        load(folder / "unet")
    shutil.copytree(folder / "unet", tmp_path / "unet")
    with pytest.raises(CheckpointError, match=r"there is no scheduler_config\.json"):
        load(tmp_path / "unet")
    shutil.copy(folder / "scheduler" / "scheduler_config.json", tmp_path / "unet")
    with pytest.raises(CheckpointError, match=r"is told text, and there is no folder with its tokenizer"):
        load(tmp_path / "unet")


def test_wrong_conditions_and_parts(made: Made) -> None:
    denoiser = load(made("sd")[1])
    x = noise(denoiser, 2)
    with pytest.raises(
        ConfigError, match=r"embedded conditions have the wrong shape. Got: \(2, 7\). Wanted: \(2, 924\)"
    ):
        denoiser(x, 300.0, torch.zeros(2, 7))
    kwargs = denoiser.spec["kwargs"]  # type: ignore[index]
    for parts, says in (
        ([], r"takes other conditions. Got: none. Wanted: {'text': 12}"),
        ([["text", [77, 20]]], r"Got: {'text': 20}. Wanted: {'text': 12}"),
        ([["text", [77, 12]], ["pooled", [4]]], r"Got: {'text': 12, 'pooled': 4}"),
    ):
        with pytest.raises(ConfigError, match=says):
            build({"name": "diffusers", "kwargs": kwargs | {"parts": parts}})
    with pytest.raises(CheckpointError, match=r"This is no model. Got: dict. Wanted: a path, a hub id, or a diffusers"):
        load({})


def test_without_diffusers_the_command_to_install_it_is_named(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = made("ddim")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        ConfigError, match=r"need the package diffusers, which is not installed.*pip install 'fewstep\[hf\]'"
    ):
        load(folder)


def test_ranges_of_noise(made: Made) -> None:
    """Tables end where they end; those that end without signal, and flows, at 320 sigma_d."""
    for kind in ("ddim", "sd"):
        scheduler, denoiser = made(kind)[0].scheduler, load(made(kind)[1])
        sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
        assert denoiser.sigma_max == pytest.approx(float(sigmas[-1]), rel=1e-5)
        assert denoiser.sigma_min == pytest.approx(float(sigmas[0]), rel=1e-5)
    assert load(made("ddim-v")[1]).sigma_max == 160
    assert load(made("sd3")[1]).sigma_max == 320
    assert load(made("consistency")[1]).sigma_max == 80
