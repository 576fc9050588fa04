"""Pipelines that are called as diffusers' are: stand-ins, and the real ones where diffusers is installed."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.pipelines import from_pipeline, open_pipeline
from fewstep.evaluation.samples import SampleSet


def joined(samples: SampleSet) -> Tensor:
    return torch.cat(list(samples.blocks()))


class UNet(nn.Module):
    """A network that knows its classes where diffusers keeps them."""

    def __init__(self, classes: int | None = None) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(num_class_embeds=classes)

    def forward(self, x: Tensor, t: int, class_labels: Tensor | None = None) -> Tensor:
        return 0.9 * x + (0.0 if class_labels is None else 0.1 * class_labels.reshape(-1, 1, 1, 1))


class Output:
    def __init__(self, images: Any) -> None:
        self.images = images


class HeunDiscreteScheduler:
    pass


class Unconditional:
    """DDPMPipeline's convention: batch_size, a list of generators, output_type."""

    def __init__(self) -> None:
        self.unet, self.scheduler, self.progress, self.calls = UNet(), HeunDiscreteScheduler(), True, []

    def set_progress_bar_config(self, *, disable: bool) -> None:
        self.progress = not disable

    def __call__(
        self, batch_size: int = 1, generator: Any = None, num_inference_steps: int = 1000, output_type: str = "pil"
    ) -> Output:
        assert len(generator) == batch_size
        self.calls.append(batch_size)
        x = torch.cat([torch.randn(1, 3, 4, 4, generator=g) for g in generator])
        for _ in range(num_inference_steps):
            x = self.unet(x, 0)
            x = x + 0.1 * torch.cat([torch.randn(1, 3, 4, 4, generator=g) for g in generator])
        return Output(self._post(x, output_type))

    def _post(self, x: Tensor, output_type: str) -> Any:
        array = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return array
        return [Image.fromarray(a) for a in (array * 255).round().astype("uint8")]


class Pil(Unconditional):
    """An older pipeline that knows PIL images only."""

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int) -> Output:  # type: ignore[override]
        return super().__call__(batch_size, generator, num_inference_steps, "pil")


class Conditional(Unconditional):
    """ConsistencyModelPipeline's convention: without labels it draws some from the global generator."""

    def __init__(self, classes: int | None = 5) -> None:
        super().__init__()
        self.unet, self.seen = UNet(classes), []

    def __call__(  # type: ignore[override]
        self,
        batch_size: int = 1,
        class_labels: list[int] | None = None,
        num_inference_steps: int = 1,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Output:
        if class_labels is None and self.unet.config.num_class_embeds:
            class_labels = torch.randint(0, 5, (batch_size,)).tolist()
        self.seen.append(class_labels)
        x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in generator])
        x = self.unet(x, 0, None if class_labels is None else torch.tensor(class_labels))
        return Output(self._post(x, output_type)[..., 0])


class Guided(Unconditional):
    """A text pipeline with guidance: twice the rows, no batch_size."""

    def __call__(  # type: ignore[override]
        self,
        prompt: list[str],
        guidance_scale: float = 5.0,
        num_inference_steps: int = 50,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Output:
        self.calls.append(prompt)
        x = torch.cat([torch.randn(1, 3, 4, 4, generator=g) for g in generator])
        for _ in range(num_inference_steps):
            rows = torch.cat([x, x]) if guidance_scale > 1 else x
            x = self.unet(rows, 0)[: len(x)]
        x = x + torch.tensor([float(len(p)) for p in prompt]).reshape(-1, 1, 1, 1) / 10
        return Output(self._post(x, output_type))


@pytest.mark.parametrize("kind", [Unconditional, Pil, Conditional])
def test_images_of_a_pipeline_do_not_depend_on_the_batch_size(kind: Callable[[], Any]) -> None:
    whole = from_pipeline(kind(), 11, steps=3, seed=4, batch_size=11)
    expected = joined(whole)
    for batch_size in (1, 4, 32):
        made = from_pipeline(kind(), 11, steps=3, seed=4, batch_size=batch_size)
        assert torch.equal(joined(made), expected)
    assert len({tuple(image.flatten().tolist()) for image in expected}) == 11
    assert torch.equal(joined(from_pipeline(kind(), 5, steps=3, seed=4, batch_size=2)), expected[:5])
    assert not torch.equal(joined(from_pipeline(kind(), 11, steps=3, seed=5)), expected)
    assert (whole.count, whole.shape, whole.is_images) == (11, tuple(expected.shape[1:]), True)


def test_arrays_and_pil_images_of_a_pipeline_are_the_same_bytes() -> None:
    arrays = joined(from_pipeline(Unconditional(), 6, steps=2))
    assert torch.equal(arrays, joined(from_pipeline(Pil(), 6, steps=2)))
    assert (arrays.shape, arrays.dtype) == ((6, 3, 4, 4), torch.uint8)
    assert arrays.is_contiguous()


def test_a_pipeline_is_called_quietly_and_says_what_it_did() -> None:
    pipeline = Unconditional()
    made = from_pipeline(pipeline, 7, steps=4, seed=9, batch_size=3)
    assert not pipeline.progress
    assert pipeline.calls == [1]
    list(made.blocks())
    assert pipeline.calls == [1, 3, 3, 1]
    assert made.name == "Unconditional"
    assert made.about == {
        "solver": "Unconditional/HeunDiscreteScheduler",
        "steps": 4,
        "nfe": 4,
        "times": None,
        "seed": 9,
    }
    assert not pipeline.unet._forward_pre_hooks


def test_labels_of_a_pipeline_are_drawn_here_and_not_from_the_global_generator() -> None:
    pipeline = Conditional()
    made = from_pipeline(pipeline, 40, steps=1, seed=2, batch_size=16)
    list(made.blocks())
    assert made.labels is not None and made.labels.tolist() == [label for call in pipeline.seen[1:] for label in call]
    assert len(made.labels.unique()) == 5
    given = torch.arange(10) % 5
    made = from_pipeline(pipeline, 10, steps=1, labels=given, batch_size=4)
    assert made.labels is not None and torch.equal(made.labels, given)
    list(made.blocks())
    assert pipeline.seen[-3:] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4]]
    unconditional = Conditional(None)
    assert from_pipeline(unconditional, 3, steps=1).labels is None
    assert unconditional.seen == [None]


def test_prompts_go_round_and_guidance_counts_twice() -> None:
    pipeline = Guided()
    made = from_pipeline(pipeline, 5, steps=3, prompts=["a", "bb"], batch_size=3)
    images = joined(made)
    assert pipeline.calls[1:] == [["a", "bb", "a"], ["bb", "a"]]
    assert made.about["nfe"] == 6
    plain = from_pipeline(pipeline, 5, steps=3, prompts=["a", "bb"], options={"guidance_scale": 1.0})
    assert plain.about["nfe"] == 3
    assert torch.equal(joined(plain), images)
    assert made.labels is None


def test_evaluations_are_unknown_without_a_network() -> None:
    pipeline = Unconditional()
    pipeline.network, pipeline.unet = pipeline.unet, lambda x, t: x  # type: ignore[attr-defined, assignment]
    assert from_pipeline(pipeline, 2, steps=4).about["nfe"] is None


class Returning:
    """Returns what it was told to."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int, output_type: str) -> Output:
        return Output(self.make(batch_size))


def raising(_: int) -> Any:
    raise RuntimeError("no text encoder\nand more")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda b: np.full((b, 4, 4, 3), np.nan), DataError, "Some samples are not finite.*number 0"),
        (lambda b: np.full((b, 4, 4, 3), -1.0), ConfigError, r"outside of \[0, 1\]. Got: -1 to -1"),
        (lambda b: np.full((b, 4, 4, 3), 255.0), ConfigError, r"outside of \[0, 1\]"),
        (lambda b: np.zeros((b, 3, 4, 4)), ConfigError, "did not return images. Got: float64"),
        (lambda b: np.zeros((b, 4, 4, 3), dtype=np.int64), ConfigError, "did not return images"),
        (lambda b: np.zeros((b + 1, 4, 4, 3)), ConfigError, "another number of images. Got: 2. Wanted: 1"),
        (lambda b: None, ConfigError, "did not return images"),
        (lambda b: [], ConfigError, "did not return images"),
        (raising, ConfigError, r"The pipeline Returning cannot be run in 2 steps: no text encoder\. Wanted"),
    ],
)
def test_a_pipeline_that_fails_is_refused_in_one_sentence(
    make: Callable[[int], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_pipeline(Returning(make), 4, steps=2)


def test_images_of_another_size_are_refused() -> None:
    made = from_pipeline(Returning(lambda b: np.zeros((b, 4, 4 + b, 3))), 4, steps=2, batch_size=2)
    with pytest.raises(DataError, match="differ in size"):
        joined(made)


def test_what_a_pipeline_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="Guided draws from text"):
        from_pipeline(Guided(), 2, steps=1)
    with pytest.raises(ConfigError, match="takes no prompt"):
        from_pipeline(Unconditional(), 2, steps=1, prompts=["a"])
    with pytest.raises(ConfigError, match="takes no class_labels"):
        from_pipeline(Unconditional(), 2, steps=1, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="one label per sample"):
        from_pipeline(Conditional(), 2, steps=1, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="not a pipeline"):
        from_pipeline(3, 2, steps=1)
    with pytest.raises(ConfigError, match="at least 1"):
        from_pipeline(Unconditional(), 2, steps=0)


class Careless(Unconditional):
    """Noise of its steps is drawn from the global generator, as DiTPipeline with DDPMScheduler does."""

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int, output_type: str) -> Output:  # type: ignore[override]
        self.calls.append(batch_size)
        x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in generator])
        for _ in range(num_inference_steps - 1):
            x = x + torch.randn_like(x)
        return Output(self._post(x, output_type))


def test_a_pipeline_that_draws_from_the_global_generator_makes_its_images_one_by_one() -> None:
    pipeline = Careless()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    expected = joined(from_pipeline(pipeline, 6, steps=3, seed=4, batch_size=6))
    assert pipeline.calls == [1] * 7
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(joined(from_pipeline(pipeline, 6, steps=3, seed=4, batch_size=2)), expected)
    assert not torch.equal(joined(from_pipeline(pipeline, 6, steps=3, seed=5)), expected)
    pipeline.calls.clear()
    joined(from_pipeline(pipeline, 6, steps=1, batch_size=4))  # nothing is drawn: nothing is in the way of batches
    assert pipeline.calls == [1, 4, 2]


def test_the_global_generator_does_not_repeat_the_noise_of_the_image() -> None:
    seen: list[Tensor] = []

    class Watched(Careless):
        def _post(self, x: Tensor, output_type: str) -> Any:
            seen.append(x)
            return super()._post(x, output_type)

    joined(from_pipeline(Watched(), 200, steps=1, batch_size=200))
    joined(from_pipeline(Watched(), 200, steps=2, batch_size=200))
    start, both = seen[1].flatten(1), torch.cat(seen[-200:]).flatten(1)
    correlation = torch.corrcoef(torch.stack([start.flatten(), (both - start).flatten()]))[0, 1]
    assert abs(correlation) < 0.08  # 3200 pairs: 4.5 standard errors


# ---- opening


def test_without_diffusers_the_command_to_install_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"The pipeline '.*' needs diffusers.*pip install 'fewstep\[hf\]'"):
        from_pipeline(tmp_path, 2, steps=1)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"no folder 'some/model': as a hub id, it needs diffusers.*fewstep\[hf\]"):
        from_pipeline("some/model", 2, steps=1)


class Opened(Unconditional):
    """Stands for diffusers.DiffusionPipeline."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fails = False

    @classmethod
    def from_pretrained(cls, where: str, **keywords: Any) -> Opened:
        cls.asked.append((where, keywords))
        assert Logging.level == Logging.CRITICAL
        assert not Logging.bars
        if cls.fails:
            raise OSError("Error no file named x.safetensors found.\nLong story")
        return cls()

    def to(self, device: str) -> Opened:
        return self


class Logging:
    """Stands for diffusers.utils.logging."""

    CRITICAL, level, bars = 50, 30, True

    @classmethod
    def get_verbosity(cls) -> int:
        return cls.level

    @classmethod
    def set_verbosity(cls, level: int) -> None:
        cls.level = level

    @classmethod
    def is_progress_bar_enabled(cls) -> bool:
        return cls.bars

    @classmethod
    def disable_progress_bar(cls) -> None:
        cls.bars = False

    @classmethod
    def enable_progress_bar(cls) -> None:
        cls.bars = True


def found_in_cache(hub_id: str, file: str) -> str | None:
    """Stands for huggingface_hub.try_to_load_from_cache."""
    if hub_id.count("/") != 1:
        raise ValueError("Repo id must be in the form 'namespace/repo_name'")
    assert file == "model_index.json"
    return "/cache/model_index.json" if hub_id == "some/model" else None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers, hub = types.ModuleType("diffusers"), types.ModuleType("huggingface_hub")
    diffusers.DiffusionPipeline = Opened  # type: ignore[attr-defined]
    diffusers.utils = types.SimpleNamespace(logging=Logging)  # type: ignore[attr-defined]
    hub.try_to_load_from_cache = found_in_cache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", diffusers)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


@pytest.mark.usefixtures("stand_ins")
def test_pipelines_are_opened_from_disk_without_pickles_or_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = from_pipeline(tmp_path, 3, steps=2)
    assert Opened.asked[-1] == (str(tmp_path), {"local_files_only": True, "use_safetensors": True})
    assert (Logging.level, Logging.bars) == (30, True)
    assert made.name == str(tmp_path)
    assert from_pipeline(Unconditional(), 3, steps=2, name="mine").name == "mine"
    assert torch.equal(joined(made), joined(from_pipeline(Unconditional(), 3, steps=2)))
    assert from_pipeline("some/model", 2, steps=1).name == "some/model"
    monkeypatch.setattr(Opened, "fails", True)
    with pytest.raises(ConfigError, match=r"some/model' cannot be opened: Error no file .* found\. .*hf download some"):
        from_pipeline("some/model", 2, steps=1)
    with pytest.raises(ConfigError, match=r"cannot be opened: Error.* with its weights as \.safetensors\.$"):
        from_pipeline(tmp_path, 2, steps=1)
    assert (Logging.level, Logging.bars) == (30, True)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("where", ["other/model", "nowhere", "a/b/c"])
def test_what_is_neither_here_nor_downloaded_is_refused(where: str) -> None:
    count = len(Opened.asked)
    with pytest.raises(
        ConfigError, match=rf"neither a folder nor a downloaded pipeline '{where}'.* hf download {where}"
    ):
        from_pipeline(where, 2, steps=1)
    assert len(Opened.asked) == count


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("index", "file"),
    [
        ({"_class_name": ["mine", "Mine"]}, "mine.py"),
        ({"_class_name": "DDPMPipeline", "unet": ["net", "Net"]}, "unet/net.py"),
        ({"_class_name": "DDPMPipeline"}, "None.py"),
    ],
)
def test_code_that_a_pipeline_brings_is_refused(
    index: dict[str, Any], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "other.py").write_text("")  # named by nothing: never run
    from_pipeline(tmp_path, 2, steps=1)
    (tmp_path / file).write_text("")
    count = len(Opened.asked)
    with pytest.raises(ConfigError, match=rf"brings code of its own, which is not run.*{re.escape(file)}"):
        from_pipeline(tmp_path, 2, steps=1)
    cached = types.SimpleNamespace(try_to_load_from_cache=lambda *_: str(tmp_path / "model_index.json"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", cached)
    with pytest.raises(ConfigError, match="brings code of its own"):
        from_pipeline("some/model", 2, steps=1)
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(ConfigError, match=r"model_index\.json is damaged"):
        from_pipeline(tmp_path, 2, steps=1)
    assert len(Opened.asked) == count


# ---- the real diffusers


@pytest.fixture(scope="module")
def diffusers() -> Any:
    """The package; its tests are skipped where it is absent."""
    return pytest.importorskip("diffusers", reason="diffusers is not installed: real pipelines cannot be opened")


def tiny_unet(diffusers: Any, size: int, channels: int, classes: int | None = None) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=classes,
    )  # fmt: skip


def tiny_dit(diffusers: Any) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4,
    )  # fmt: skip
    return transformer, vae


def pipeline_of(diffusers: Any, kind: str) -> Any:
    if kind == "ddpm":
        return diffusers.DDPMPipeline(tiny_unet(diffusers, 8, 1), diffusers.DDPMScheduler())
    if kind == "ddim":
        return diffusers.DDIMPipeline(tiny_unet(diffusers, 16, 3), diffusers.DDIMScheduler())
    if kind == "consistency":
        scheduler = diffusers.CMStochasticIterativeScheduler(sigma_min=0.0)
        return diffusers.ConsistencyModelPipeline(tiny_unet(diffusers, 8, 3, 10), scheduler)
    scheduler = diffusers.HeunDiscreteScheduler() if kind == "dit heun" else diffusers.DDPMScheduler()
    return diffusers.DiTPipeline(*tiny_dit(diffusers), scheduler)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # HeunDiscreteScheduler
@pytest.mark.parametrize(
    ("kind", "steps", "nfe", "shape"),
    [
        ("ddpm", 3, 3, (1, 8, 8)),
        ("ddim", 3, 3, (3, 16, 16)),
        ("consistency", 1, 1, (3, 8, 8)),
        ("consistency", 2, 2, (3, 8, 8)),
        ("dit heun", 3, 2 * (2 * 3 - 1), (3, 16, 16)),  # guided, and two evaluations in all steps but the last
        ("dit ddpm", 3, 2 * 3, (3, 16, 16)),  # its scheduler draws from the global generator
    ],
)
def test_real_diffusers_pipelines(
    diffusers: Any, tmp_path: Path, kind: str, steps: int, nfe: int, shape: tuple[int, ...]
) -> None:
    pipeline_of(diffusers, kind).save_pretrained(tmp_path / "saved")
    pipeline = open_pipeline(str(tmp_path / "saved"))
    state = torch.get_rng_state()
    made = from_pipeline(pipeline, 5, steps=steps, seed=3, batch_size=5)
    images = joined(made)
    assert (made.shape, made.about["nfe"]) == (shape, nfe)
    assert images.shape == (5, *shape)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 5
    for batch_size in (1, 2):
        other = joined(from_pipeline(pipeline, 5, steps=steps, seed=3, batch_size=batch_size))
        assert (other.int() - images.int()).abs().max() <= 1  # convolutions of other batches round otherwise
    assert (joined(from_pipeline(pipeline, 5, steps=steps, seed=4)).int() - images.int()).abs().max() > 20
    assert torch.equal(torch.get_rng_state(), state)
    assert (made.labels is not None) == (kind not in ("ddpm", "ddim"))


def test_real_diffusers_images_are_those_of_a_plain_call(diffusers: Any) -> None:
    pipeline = pipeline_of(diffusers, "consistency")
    made = from_pipeline(pipeline, 3, steps=1, seed=3, labels=torch.tensor([4, 0, 9]))
    seeds: list[int] = []
    kept = pipeline.prepare_latents

    def watched(*arguments: Any, **keywords: Any) -> Tensor:
        seeds.extend(generator.initial_seed() for generator in keywords["generator"])
        return kept(*arguments, **keywords)

    pipeline.prepare_latents = watched
    images = joined(made)
    pipeline.prepare_latents = kept
    for i, label in enumerate((4, 0, 9)):
        plain = pipeline(generator=torch.Generator().manual_seed(seeds[i]), class_labels=[label]).images[0]
        assert np.abs(np.asarray(plain).astype(int).transpose(2, 0, 1) - images[i].int().numpy()).max() <= 1
    assert len(set(seeds)) == 3


def test_real_diffusers_errors_are_one_sentence(diffusers: Any, tmp_path: Path) -> None:
    pipeline = pipeline_of(diffusers, "ddpm")
    with pytest.raises(ConfigError, match="cannot be run in 1001 steps: .*maximal 1000 timesteps"):
        from_pipeline(pipeline, 2, steps=1001)
    pipeline.save_pretrained(tmp_path)
    next((tmp_path / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"cannot be opened: Error no file named .*\.safetensors"):
        from_pipeline(tmp_path, 2, steps=1)
    with pytest.raises(ConfigError, match="neither a folder nor a downloaded pipeline 'google/ddpm-cifar10-32'"):
        from_pipeline("google/ddpm-cifar10-32", 2, steps=1)
