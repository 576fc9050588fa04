"""Inception, DINOv2 and CLIP from stand-in files: what is computed, what it is called, and every way to fail."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.checkpoint.hub import PROBE_SECONDS
from fewstep.errors import CheckpointError, ConfigError, DataError
from fewstep.evaluation import inception, pretrained
from fewstep.evaluation.features import features_of, is_fid_net, iter_outputs, open_features
from fewstep.evaluation.pretrained import resize_bicubic


def images(n: int, c: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, c, side, side), generator=rng, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cache of the person who runs the tests is read, and no test asks the network."""
    caches = tmp_path / "caches"
    monkeypatch.setenv("TORCH_HOME", str(caches / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / "xdg"))
    monkeypatch.delenv("FEWSTEP_CACHE", raising=False)
    monkeypatch.setenv("FEWSTEP_OFFLINE", "1")
    return caches


# --- Inception: NVIDIA's TorchScript file, which needs torch alone ------------------------------------------------


class StandIn(nn.Module):
    """The interface of NVIDIA's file: what it returns depends on two flags."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Linear(12, dim)
        self.output = nn.Linear(dim, 1008)
        nn.init.normal_(self.output.bias, 0, 3.0)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        x = (img.to(torch.float32) - 128) / 128
        features = self.layers(nn.functional.adaptive_avg_pool2d(x, [2, 2]).flatten(1))
        if return_features:
            return features
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return nn.functional.linear(features, self.output.weight, bias).softmax(1)


def scripted(path: Path, net: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(str(path))
    return path


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(tmp_path_factory.mktemp("nvidia") / "inception.pt", StandIn(2048))


def test_nvidias_file_gets_uint8_and_gives_features_and_logits_without_bias(nvidia: Path) -> None:
    x = images(5)
    net = open_features(f"inception:{nvidia}")
    ((features, logits),) = iter_outputs(net, x)
    reference = StandIn(2048)
    with torch.no_grad():
        torch.testing.assert_close(features, reference(x, return_features=True))
        torch.testing.assert_close(logits.softmax(1), reference(x, no_output_bias=True))
        assert (logits.softmax(1) - reference(x)).abs().max() > 0.01
    assert net.dim == 2048 and logits.shape == (5, 1008)
    torch.testing.assert_close(features_of(net, x[:, :1]), features_of(net, x[:, :1].repeat(1, 3, 1, 1)))
    with pytest.raises(DataError, match=r"cannot read images of 4 channels\. Wanted: 3"):
        features_of(net, images(2, c=4))
    with pytest.raises(DataError, match=r"reads images\. Got: float32"):
        features_of(net, x / 255)


def test_only_the_published_hash_gives_the_name_inception(nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(nvidia.read_bytes()).hexdigest()
    net = open_features(f"inception:{nvidia}")
    assert (net.name, net.hash, net.verified) == (f"Inception-{digest[:8]}", digest, False)
    assert not is_fid_net(net)
    assert "TF1 bilinear 299x299 without antialias" in net.preprocessing and "grey repeated" in net.preprocessing
    monkeypatch.setitem(inception.INCEPTION_FILES, "inception-2015-12-05.pt", (digest, "https://nowhere"))
    net = open_features(f"inception:{nvidia}")
    assert (net.name, net.verified) == ("Inception", True) and is_fid_net(net)


def test_the_published_hashes_are_those_of_the_file_names() -> None:
    (fidelity, (first, _)), (_, (second, _)) = inception.INCEPTION_FILES.items()
    assert fidelity == f"weights-inception-2015-12-05-{first[:8]}.pth"  # the name carries the first 8 digits
    assert len(first) == len(second) == 64 and first != second


@pytest.mark.parametrize("folder", ["torch/hub/checkpoints", "xdg/fewstep"])
def test_inception_alone_looks_into_the_caches(nvidia: Path, empty_caches: Path, folder: str) -> None:
    with pytest.raises(CheckpointError, match=r"not in the cache .*torch/hub/checkpoints.*xdg/fewstep"):
        open_features("inception")
    path = empty_caches / folder / "inception-2015-12-05.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(nvidia.read_bytes())
    assert open_features("inception").hash == hashlib.sha256(nvidia.read_bytes()).hexdigest()


def test_missing_weights_name_the_command_for_what_is_installed(
    empty_caches: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = empty_caches / "torch/hub/checkpoints"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for spec in ("inception", f"inception:{tmp_path / 'none.pth'}"):
        with pytest.raises(CheckpointError) as caught:
            open_features(spec)
        address = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
        assert str(caught.value).endswith(f"Run `curl -L --create-dirs -o '{where}/inception-2015-12-05.pt' {address}`")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(CheckpointError, match=rf"-o '{where}/{name}' https://github.com/toshas/.*/v0.2.0/{name}`$"):
        open_features("inception")


class OtherDim(StandIn):
    def __init__(self) -> None:
        super().__init__(64)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (OtherDim(), r"Got: features \[2, 64\], logits \[2, 1008\]"),
        (nn.AvgPool2d(8), r"Got: RuntimeError: .*return_features"),
    ],
    ids=["64 features", "no such flag"],
)
def test_another_torchscript_net_is_refused(tmp_path: Path, net: nn.Module, message: str) -> None:
    path = scripted(tmp_path / "net.pt", net)
    with pytest.raises(CheckpointError, match=rf"is not NVIDIA's Inception\. {message}.*Use torchscript:"):
        open_features(f"inception:{path}")


# --- Inception: torch-fidelity's file; the numbers are compared in tests/fidelity ----------------------------------


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    trace, path = tmp_path / "it ran", tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(2), "x": Payload(trace)}, path)
    torch.save({"x": Payload(trace)}, tmp_path / "older.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(trace)))
    for file in (path, tmp_path / "older.pth", tmp_path / "plain.pth"):
        with pytest.raises(CheckpointError, match=r"is not a readable file of plain tensors\. Got: UnsafePickleError"):
            open_features(f"inception:{file}")
    assert not trace.exists()


def damaged(kind: str, path: Path) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.png", b"not an image")
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    elif kind == "nested":
        torch.save({"state_dict": {"fc.weight": torch.zeros(3)}}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"<!DOCTYPE html><html>404", "cut": b"PK\x03\x04 broken"}[kind])
    return path


@pytest.mark.parametrize("kind", ["zip", "list", "nested", "empty", "text", "cut"])
def test_damaged_inception_files_are_one_clear_sentence(tmp_path: Path, kind: str) -> None:
    path = damaged(kind, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="is not a readable file of plain tensors"):
        open_features(f"inception:{path}")
    path = damaged("text", tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="is not a readable file of plain tensors"):
        open_features(f"inception:{path}")


@pytest.fixture
def plain_weights(tmp_path: Path) -> Path:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``fake_package(name, code)``: an installed package that does ``code`` when it is imported."""

    def make(name: str, code: str) -> None:
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        for known in [key for key in sys.modules if key.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, known)

    yield make
    for name in ("torch_fidelity", "transformers"):
        if "packages" in str(getattr(sys.modules.get(name), "__file__", "")):
            del sys.modules[name]


def test_torch_fidelity_that_is_not_installed(plain_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        open_features(f"inception:{plain_weights}")
    assert str(caught.value).startswith("This Inception file needs torch-fidelity, which is not installed. Run `pip")
    assert 'pip install "fewstep[metrics]"`, or use NVIDIA\'s file, which needs torch alone: `curl' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torch_fidelity_that_cannot_be_imported(plain_weights: Path, fake_package: Any) -> None:
    fake_package("torch_fidelity", "raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    with pytest.raises(ConfigError) as caught:
        open_features(f"inception:{plain_weights}")
    assert f"cannot be imported with torch {torch.__version__}. Got: RuntimeError: operator torchvision::nms" in str(
        caught.value
    )
    assert "\n" not in str(caught.value) and "inception-2015-12-05.pt" in str(caught.value)


# --- The resize of DINOv2 and CLIP --------------------------------------------------------------------------------


def pillow(x: np.ndarray, side: int) -> np.ndarray:
    """Width first: Pillow 13 chooses the order by size, before it was always this one."""
    wide = Image.fromarray(x).resize((side, len(x)), Image.Resampling.BICUBIC)
    return np.asarray(wide.resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(32, 32), (300, 260), (64, 64), (224, 100), (224, 224)])
def test_the_resize_is_pillows_bicubic_within_one_level(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))
    for x in (smooth, rng.integers(0, 256, (*size, 3), dtype=np.uint8)):
        expected = pillow(x, 224).astype(np.float32)
        got = resize_bicubic(torch.from_numpy(x.copy()).permute(2, 0, 1)[None], 224)[0].permute(1, 2, 0).numpy()
        assert np.abs(got - expected).max() <= 1
        assert (got == expected).mean() > 0.99
    at_once = np.asarray(Image.fromarray(smooth).resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    smoothed = resize_bicubic(torch.from_numpy(smooth.copy()).permute(2, 0, 1)[None], 224)[0].permute(1, 2, 0).numpy()
    assert np.abs(smoothed - at_once).max() <= 2  # on smooth images the order hardly matters


# --- DINOv2 and CLIP ----------------------------------------------------------------------------------------------

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(scope="module")
def transformers() -> Any:
    module = pytest.importorskip("transformers", reason='transformers is not installed: pip install "fewstep[metrics]"')
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="module")
def dinov2(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=70, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dinov2")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 30, "max_position_embeddings": 8},
        vision_config=small | {"patch_size": 16, "image_size": 64, "projection_dim": 10},
        projection_dim=10,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)  # with its text half, as on the hub
    return folder


def as_pillow(x: Tensor, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    pixels = np.stack([pillow(row.permute(1, 2, 0).numpy(), side) for row in x]).astype(np.float64) / 255
    return torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()


def smooth_images(n: int) -> Tensor:
    return nn.functional.interpolate(images(n, side=5).float(), size=(40, 48), mode="bilinear").byte()


def test_dinov2_features_are_the_class_token_of_pillows_pixels(transformers: Any, dinov2: Path) -> None:
    x = smooth_images(3)
    net = open_features(f"dinov2:{dinov2}")
    assert (net.name, net.dim, net.verified, net.extract_with_logits) == ("DINOv2-24", 24, False, None)
    assert net.preprocessing.startswith("uint8, bicubic 224x224 with antialias, ImageNet mean and std")
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        exact = resize_bicubic(x, 224).sub(255 * torch.tensor(IMAGENET[0])[:, None, None])
        exact = exact / (255 * torch.tensor(IMAGENET[1])[:, None, None])
        token = model(pixel_values=exact).last_hidden_state[:, 0]
        from_pillow = model(pixel_values=as_pillow(x, 224, *IMAGENET)).last_hidden_state[:, 0]
    got = features_of(net, x)
    assert got.std(0).mean() > 0.01  # the three images are told apart
    torch.testing.assert_close(got, token, rtol=1e-4, atol=1e-4)
    assert (got - from_pillow).abs().max() < 0.05 * got.std(0).mean()


def test_clip_features_are_the_projected_image_embeddings(transformers: Any, clip: Path) -> None:
    x = smooth_images(3)
    net = open_features(f"clip:{clip}")
    assert (net.name, net.dim, net.extract_with_logits) == ("CLIP-24-16", 10, None)
    assert net.preprocessing.startswith("uint8, bicubic 64x64 with antialias, CLIP mean and std")
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=as_pillow(x, 64, *CLIP)).pooler_output
        from_pillow = model.visual_projection(pooled)
    got = features_of(net, x)
    assert got.std(0).mean() > 0.01
    assert (got - from_pillow).abs().max() < 0.05 * got.std(0).mean()
    grey = x[:, :1]
    torch.testing.assert_close(features_of(net, grey), features_of(net, grey.repeat(1, 3, 1, 1)))


def test_opening_a_transformer_draws_no_random_numbers_and_prints_nothing(
    dinov2: Path, clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    first, second = open_features(f"dinov2:{dinov2}"), open_features(f"clip:{clip}")
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert first.hash != second.hash and len(first.hash) == 64


def test_the_hash_of_a_folder_is_that_of_its_files(dinov2: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((dinov2 / name).read_bytes())
    (copy / "README.md").write_text("not part of the map")
    same = open_features(f"dinov2:{copy}").hash
    assert same == open_features(f"dinov2:{dinov2}").hash
    state = load_file(copy / "model.safetensors")
    state["layernorm.bias"] += 1e-3
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert open_features(f"dinov2:{copy}").hash != same


def test_models_with_weights_missing_or_of_other_shapes_are_refused(dinov2: Path, clip: Path, tmp_path: Path) -> None:
    """transformers alone would fill the gaps at random and only log it."""
    state, config = load_file(dinov2 / "model.safetensors"), (dinov2 / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    save_file(
        {k: v for k, v in state.items() if k != "layernorm.bias"}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"not those of Dinov2Model\. Got: 1 weights missing .*layernorm\.bias"):
        open_features(f"dinov2:{tmp_path}")
    wrong = state | {"layernorm.bias": torch.zeros(7)}
    save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Dinov2Model"):
        open_features(f"dinov2:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"cannot be read as Dinov2Model\. Got: \w*Safetensor\w*"):
        open_features(f"dinov2:{tmp_path}")
    with pytest.raises(CheckpointError, match=r"is not dinov2\. Got: clip\. Wanted: dinov2"):
        open_features(f"dinov2:{clip}")
    with pytest.raises(CheckpointError, match=r"is not clip\. Got: dinov2\. Wanted: clip"):
        open_features(f"clip:{dinov2}")


def test_pickled_weights_are_not_read(dinov2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
    torch.save({"x": Payload(tmp_path / "it ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no model of dinov2\. Wanted: config\.json and safetensors"):
        open_features(f"dinov2:{tmp_path}")
    assert not (tmp_path / "it ran").exists()


def test_a_model_of_several_files_needs_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip("ab", parts, strict=True))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / parts[0]).write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds no model of dinov2"):
        open_features(f"dinov2:{tmp_path}")
    (tmp_path / parts[1]).write_bytes(b"")
    with pytest.raises(CheckpointError, match="does not say which model it is"):
        open_features(f"dinov2:{tmp_path}")


def cached(hub: Path, name: str, revision: str, source: Path) -> None:
    """What the hub's library leaves behind: a snapshot by commit, and a reference where the name is a branch."""
    repository = hub / ("models--" + name.replace("/", "--"))
    commit = revision if len(revision) == 40 else "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).write_bytes((source / file).read_bytes())
    if commit != revision:
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text(commit)


@pytest.fixture
def hub_cache(transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot_download = huggingface_hub.snapshot_download

    def within(*args: Any, **kwargs: Any) -> str:
        return snapshot_download(*args, cache_dir=tmp_path / "hub", **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", within)
    return tmp_path / "hub"


def test_hub_ids_come_from_the_cache_without_the_network(hub_cache: Path, dinov2: Path, clip: Path) -> None:
    cached(hub_cache, "facebook/dinov2-large", "main", dinov2)
    cached(hub_cache, "someone/dino", "v2", dinov2)
    cached(hub_cache, pretrained.CLIP_ID, pretrained.REVISIONS[pretrained.CLIP_ID], clip)
    same = open_features(f"dinov2:{dinov2}").hash
    assert [open_features(s).hash for s in ("dinov2", "dinov2:someone/dino@v2")] == [same, same]
    assert open_features("clip").hash == open_features(f"clip:{pretrained.CLIP_ID}").hash
    assert open_features("clip").name == "CLIP-24-16"


def test_offline_fails_at_once_with_the_command(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "get_session", refuse)
    (hub_cache / "models--facebook--dinov2-large" / "snapshots").mkdir(parents=True)
    for variable, value in (("FEWSTEP_OFFLINE", "1"), ("HF_HUB_OFFLINE", "true")):
        monkeypatch.delenv("FEWSTEP_OFFLINE", raising=False)
        monkeypatch.setenv(variable, value)
        with pytest.raises(CheckpointError) as caught:
            open_features("dinov2")
        assert "'facebook/dinov2-large' is neither a folder nor in the cache" in str(caught.value)
        assert "this process is offline" in str(caught.value)
        assert "Run `hf download facebook/dinov2-large config.json model.safetensors` where" in str(caught.value)
    with pytest.raises(CheckpointError, match=rf"--revision {pretrained.REVISIONS[pretrained.CLIP_ID]}` where"):
        open_features("clip")


def test_an_unreachable_hub_is_asked_once(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.delenv("FEWSTEP_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked: list[tuple[str, float]] = []

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append((address, timeout))
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(CheckpointError, match=r"does not answer \(OSError: Name or service not known\)\. Run `hf down"):
        open_features("dinov2:someone/dino")
    assert asked == [(huggingface_hub.constants.ENDPOINT, PROBE_SECONDS)]


def test_a_hub_that_answers_is_asked_for_the_files(hub_cache: Path, dinov2: Path, monkeypatch: Any) -> None:
    import huggingface_hub

    monkeypatch.delenv("FEWSTEP_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **kwargs: Any) -> str:
        calls.append({"name": name} | kwargs)
        if kwargs["local_files_only"]:
            raise OSError("not cached")
        return str(dinov2)

    class Session:
        def head(self, address: str, timeout: float) -> None:
            """Answers."""

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_features("dinov2:someone/dino@v2").dim == 24
    assert [(c["name"], c["revision"], c["local_files_only"]) for c in calls] == [
        ("someone/dino", "v2", True),
        ("someone/dino", "v2", False),
    ]
    assert not any(pattern.endswith((".bin", "*")) for pattern in calls[1]["allow_patterns"])

    def fail(name: str, **kwargs: Any) -> str:
        raise OSError("401 Client Error\nmany lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded\. Got: OSError: 401 Client Error\. Run `hf downl"):
        open_features("dinov2:someone/dino")


# --- Without transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_transformers_that_is_not_installed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        open_features(kind)
    assert str(caught.value) == (
        'DINOv2 and CLIP need transformers, which is not installed. Run `pip install "fewstep[metrics]"`'
    )


def test_transformers_that_cannot_be_imported(fake_package: Any) -> None:
    fake_package("transformers", "raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    with pytest.raises(ConfigError, match=r"cannot be imported\. Got: RuntimeError: .*nms.*pip uninstall torchvision"):
        open_features("dinov2")


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    for spec in (f"dinov2:{tmp_path / 'none'}", "clip:./none"):
        with pytest.raises(
            CheckpointError, match=r"The model folder '.*none' of (dinov2|clip) does not exist\. Write: "
        ):
            open_features(spec)
    with pytest.raises(CheckpointError, match=r"holds no model of clip\. Wanted: config\.json and safetensors weights"):
        open_features(f"clip:{tmp_path}")
