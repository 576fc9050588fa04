"""Rows of prompts: those of the pipeline's own ``encode_prompt``, and one sentence where that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import EDM, Denoiser, Parametrization
from fewstep.backbones.text import TextEncoders, encoders_of, null_row, text_parts
from fewstep.conditioning import Part
from fewstep.errors import CheckpointError, FewstepError

PROMPTS = ["a red square", "a blue circle", "", "a red square on a very long green line " * 20]
KINDS = ("sd", "sdxl", "sdxl-empty", "sd3", "sd3-clip", "flux")
Make = Callable[[str], tuple[Any, Path]]


def network_config(folder: Path) -> dict[str, Any]:
    name = "unet" if (folder / "unet").is_dir() else "transformer"
    return json.loads((folder / name / "config.json").read_text())


@torch.no_grad()
def by_pipeline(whole: Any, kind: str, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the pipeline's ``__call__`` would feed its network: for the prompts, and without guidance's prompt."""
    if kind == "sd":
        text, none = whole.encode_prompt(prompts, "cpu", 1, True)
        return {"text": text}, {"text": none}
    if kind.startswith("sdxl"):
        text, none, pooled, no_pooled = whole.encode_prompt(prompts, device="cpu")
        side = whole.unet.config.sample_size * whole.vae_scale_factor
        ids = whole._get_add_time_ids((side, side), (0, 0), (side, side), torch.float32, 10).expand(len(text), -1)
        return {"text": text, "pooled": pooled, "time_ids": ids}, {"text": none, "pooled": no_pooled, "time_ids": ids}
    if kind.startswith("sd3"):
        text, none, pooled, no_pooled = whole.encode_prompt(prompts, None, None, device="cpu")
        return {"text": text, "pooled": pooled}, {"text": none, "pooled": no_pooled}
    text, pooled, _ = whole.encode_prompt(prompts, None, device="cpu")
    empty, no_pooled, _ = whole.encode_prompt([""], None, device="cpu")
    return {"text": text, "pooled": pooled}, {"text": empty, "pooled": no_pooled}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_pipelines(kind: str, pipeline: Make) -> None:
    whole, folder = pipeline(kind)
    encoders = TextEncoders(folder)
    rows = encoders.encode(PROMPTS)
    wanted, nothing = by_pipeline(whole, kind, PROMPTS)
    assert rows.shape == (4, encoders.width)
    assert rows.dtype == torch.float32
    found = encoders.conditioning.unpack(rows)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-6, name
    none = encoders.conditioning.unpack(null_row(folder)[None])
    for name, value in nothing.items():
        assert (none[name] - value[:1]).abs().max() <= 1e-6, name
    assert (rows[0] - rows[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_known_without_weights(kind: str, pipeline: Make, tmp_path: Path) -> None:
    _, folder = pipeline(kind)
    light = shutil.copytree(folder, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    parts = text_parts(light, network_config(light))
    assert parts == TextEncoders(folder).conditioning.parts
    shapes = {
        "sd": {"text": (77, 12)},
        "sdxl": {"text": (77, 28), "pooled": (10,), "time_ids": (6,)},
        "sd3": {"text": (77 + 256, 32), "pooled": (22,)},
        "flux": {"text": (512, 32), "pooled": (12,)},
    }
    assert {part.name: part.shape for part in parts} == shapes[kind.split("-")[0]]


def test_the_unconditional_row_is_the_empty_prompt_or_zeros(pipeline: Make) -> None:
    empty = TextEncoders(pipeline("sd")[1]).encode([""])[0]
    assert torch.equal(null_row(pipeline("sd")[1]), empty)
    zeros, kept = (TextEncoders(pipeline(kind)[1]) for kind in ("sdxl", "sdxl-empty"))
    assert zeros.conditioning.unpack(zeros.nothing()[None])["text"].abs().max() == 0
    assert kept.conditioning.unpack(kept.nothing()[None])["text"].abs().max() > 0.01


def test_blocks_do_not_matter(pipeline: Make) -> None:
    encoders = TextEncoders(pipeline("sd")[1])
    many = [f"a red square {i}" for i in range(35)]
    rows = encoders.encode(many)
    assert torch.allclose(rows[[0, 16, 34]], encoders.encode([many[0], many[16], many[34]]), atol=1e-6)
    assert encoders.encode([]).shape == (0, encoders.width)


def test_the_hash_follows_weights_and_tokenizer(pipeline: Make, tmp_path: Path) -> None:
    _, folder = pipeline("sdxl")
    first = TextEncoders(folder).hash
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert TextEncoders(copy).hash == first
    for file, old, new in [
        ("text_encoder_2/model.safetensors", None, None),
        ("tokenizer/tokenizer.json", '"fuse_unk"', '"fuse_ unk"'),
        ("unet/config.json", '"sample_size": 8', '"sample_size": 16'),
    ]:
        changed = shutil.copytree(folder, tmp_path / file.replace("/", "-"))
        path = changed / file
        content = path.read_bytes()
        if old is None:
            content = content[:-1] + bytes([content[-1] ^ 1])
        else:
            content = content.decode().replace(old, new).encode()
        assert content != path.read_bytes(), file
        path.write_bytes(content)
        assert TextEncoders(changed).hash != first, file


def broken(folder: Path, how: str) -> None:
    index = folder / "model_index.json"
    if how == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif how == "null encoder":
        index.write_text(index.read_text().replace('"CLIPTextModel"', "null"))
    elif how == "foreign encoder":
        index.write_text(index.read_text().replace("CLIPTextModel", "os.system"))
    elif how == "pickle":
        (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "pytorch_model.bin")
    elif how == "damaged":
        file = folder / "text_encoder" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:500])
    elif how == "no weights inside":
        from safetensors.torch import load_file, save_file

        file = folder / "text_encoder" / "model.safetensors"
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if "layers.1" in name))
        save_file(tensors, file, metadata={"format": "pt"})
    elif how == "index":
        index.write_text("{")
    elif how == "other network":
        index.write_text(index.read_text().replace("UNet2DConditionModel", "UNet2DModel"))
    elif how == "gone":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no tokenizer", r"has no tokenizer, which its prompts need.*hf download"),
        ("null encoder", r"has no text encoder.*hf download"),
        ("foreign encoder", r"is of no known kind.*os\.system"),
        ("pickle", r"no safetensors weights, and pickles are not read.*safe_serialization=True"),
        ("damaged", r"text encoder in .* cannot be opened"),
        ("no weights inside", r"not those of a CLIPTextModel.*1 weights missing"),
        ("index", r"model_index\.json' is damaged"),
        ("other network", r"not known here.*UNet2DModel.*Stable Diffusion 1, 2, XL, 3 or Flux"),
        ("gone", r"does not exist.*Put the pipeline back"),
    ],
)
def test_what_is_missing_is_one_sentence(how: str, said: str, pipeline: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline("sd")[1], tmp_path / "broken")
    broken(folder, how)
    with pytest.raises(CheckpointError, match=said):
        TextEncoders(folder).encode(["a red square"])


def test_without_the_libraries_the_extra_is_named(pipeline: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    encoders = TextEncoders(pipeline("sd")[1])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FewstepError, match=r"not installed.*pip install 'fewstep\[hf\]'"):
        encoders.encode(["a red square"])


def test_only_half_precision_files_are_read_too(pipeline: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline("sd")[1], tmp_path / "half")
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "model.fp16.safetensors")
    assert torch.equal(TextEncoders(folder).encode(PROMPTS), TextEncoders(pipeline("sd")[1]).encode(PROMPTS))


def test_a_model_without_encoders_says_so() -> None:
    model = Denoiser(
        torch.nn.Identity(), EDM(), Parametrization("edm"), sample_shape=(3, 8, 8), parts=(Part("text", (7, 2)),)
    )
    with pytest.raises(FewstepError, match="does not say where its text encoders are"):
        encoders_of(model)


def test_encoders_of_another_model_are_refused(pipeline: Make) -> None:
    parts, text = (Part("text", (77, 13)),), {"pipeline": str(pipeline("sd")[1])}
    model = Denoiser(torch.nn.Identity(), EDM(), Parametrization("edm"), sample_shape=(3, 8, 8), parts=parts, text=text)
    with pytest.raises(FewstepError, match=r"make other embeddings.*Got: told text \[77, 12\].*told text \[77, 13\]"):
        encoders_of(model)
