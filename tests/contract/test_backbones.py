"""Every backbone: shape, determinism, labels, every precision, a bit-equal round trip through a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import BACKBONES, EDM, Denoiser, Parametrization, load, save_model
from fewstep.backbones import build
from fewstep.errors import CheckpointError, ConfigError

IMAGE, POINT = (1, 8, 8), (2,)
SMALL: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "edm": (
        IMAGE,
        {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
         "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.2},
    ),
    "adm": (
        IMAGE,
        {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 8],
         "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.2},
    ),
    "edm2": (
        IMAGE,
        {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
         "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8, "dropout": 0.2},
    ),
    "unet": (IMAGE, {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "attention": [4], "dropout": 0.2}),
    "dit": (IMAGE, {"sample_shape": [1, 8, 8], "width": 16, "depth": 2, "heads": 2, "dropout": 0.2}),
    "mlp": (POINT, {"sample_shape": [2], "width": 16, "depth": 2}),
}  # fmt: skip
SMALL["diffusers"] = (
    IMAGE,
    {"kind": "UNet2DModel", "config": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "attention_head_dim": 4, "dropout": 0.2}},
)  # fmt: skip
SMALL["two_time"] = (IMAGE, {"inner": {"name": "unet", "kwargs": SMALL["unet"][1]}})
SMALL["guided"] = (IMAGE, SMALL["two_time"][1] | {"low": 1.0, "high": 3.0})
CLASSES = 3


def spec_of(name: str, classes: int = 0) -> dict[str, Any]:
    if name in ("two_time", "guided"):
        return {"name": name, "kwargs": SMALL[name][1] | {"inner": spec_of("unet", classes)}}
    if name == "diffusers":
        pytest.importorskip("diffusers", reason="diffusers is not installed: its networks cannot be built")
        config = SMALL[name][1]["config"] | ({"num_class_embeds": classes} if classes else {})
        return {"name": name, "kwargs": {"kind": "UNet2DModel", "config": config}}
    count = {"label_dim" if name in ("edm", "adm", "edm2") else "num_classes": classes} if classes else {}
    return {"name": name, "kwargs": SMALL[name][1] | count}


def make(name: str, classes: int = 0) -> Denoiser:
    """A small network of that kind, no weight of which is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(spec_of(name, classes))
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Denoiser(
        backbone, EDM(), Parametrization("edm"), sample_shape=SMALL[name][0], num_classes=classes,
        spec=spec_of(name, classes), sampler_times={2: (80.0, 0.8)}, value_range=(-1.0, 1.0),
    )  # fmt: skip


def inputs(name: str, dtype: torch.dtype = torch.float32, rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *SMALL[name][0], generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.tensor([0.02, 0.3, 1.0, 60.0], dtype=dtype)[:rows]


def raw(model: Denoiser, x: Tensor, c_noise: Tensor) -> Tensor:
    """The network itself; a two-time one is told a jump to its c_noise from twice that, a guided one strength 2."""
    told = (torch.stack((c_noise, 2 * c_noise), dim=1),) if model.two_time else ()
    strength = {"guidance": torch.full_like(c_noise, 2.0)} if model.guided else {}
    return model.backbone(x, c_noise, None, *told, **strength)


def test_every_backbone_is_here() -> None:
    assert SMALL.keys() == BACKBONES.keys()


@pytest.mark.parametrize("name", BACKBONES)
class TestBackbone:
    def test_shape_and_determinism(self, name: str) -> None:
        model, (x, t) = make(name).eval(), inputs(name)
        first, again = model(x, t), model(x, t)
        assert first.shape == x.shape
        assert torch.equal(first, again)
        assert torch.equal(first, make(name).eval()(x, t))
        assert not torch.allclose(first, model(x, 2 * t))  # hears the time
        assert not torch.allclose(raw(model, x, t.log()), raw(model, x + 1, t.log()))

    def test_each_row_alone(self, name: str) -> None:
        model, (x, t) = make(name).double().eval(), inputs(name, torch.float64)
        together = model(x, t)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)

    def test_labels(self, name: str) -> None:
        model, (x, t) = make(name, CLASSES).eval(), inputs(name)
        outs = [model(x, t, torch.full((len(x),), k)) for k in range(CLASSES)] + [model(x, t, None)]
        for i, a in enumerate(outs):
            for b in outs[:i]:
                assert not torch.allclose(a, b)
        one_hot = torch.nn.functional.one_hot(torch.full((len(x),), 1), CLASSES).float()
        assert torch.equal(model(x, t, one_hot), outs[1])

    def test_float64_agrees_with_float32(self, name: str) -> None:
        model, (x, t) = make(name).eval(), inputs(name, torch.float64)
        single = model(x.float(), t.float())
        double = model.double()(x, t)
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
        assert not torch.equal(single.double(), double)  # it was really computed in float64

    def test_no_lower_precision_hides_in_float64(self, name: str) -> None:
        """Changes that float32 cannot hold are still heard, in the samples and in the noise level."""
        model, (x, t) = make(name).double().eval(), inputs(name, torch.float64)
        out = raw(model, x, t.log() / 4)
        for near in (raw(model, x, t.log() / 4 + 1e-10), raw(model, x + 1e-10 * x.roll(1, 0), t.log() / 4)):
            assert 0 < (near - out).abs().max() < 1e-6

    def test_bf16_autocast_is_near(self, name: str) -> None:
        model, (x, t) = make(name).eval(), inputs(name)
        want = model(x, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = model(x, t)
        assert got.dtype == torch.float32
        scale = (want - x / (1 + 4 * t.reshape(-1, *[1] * (x.ndim - 1)) ** 2)).abs().max()
        assert 0 < (got - want).abs().max() < 0.05 * scale

    def test_gradients_reach_every_parameter(self, name: str) -> None:
        model, (x, t) = make(name, CLASSES).train(), inputs(name)
        model(x, t, torch.arange(len(x)) % CLASSES).square().sum().backward()
        idle = [n for n, p in model.backbone.named_parameters() if p.grad is None or not p.grad.any()]
        assert [n for n in idle if "map_augment" not in n and "logvar" not in n] == []

    def test_dropout_only_in_training(self, name: str) -> None:
        if "dropout" not in str(SMALL[name][1]):
            pytest.skip("this network has no dropout")
        model, (x, t) = make(name), inputs(name)
        torch.manual_seed(0)
        assert torch.equal(model.eval()(x, t), model.eval()(x, t))
        assert not torch.allclose(model.train()(x, t), model.train()(x, t))

    @pytest.mark.parametrize("classes", [0, CLASSES])
    def test_round_trip_through_a_model_directory(self, name: str, classes: int, tmp_path: Path) -> None:
        model, (x, t) = make(name, classes).eval(), inputs(name)
        save_model(model, tmp_path / "model", {"from": "here"})
        back = load(tmp_path / "model")
        a, b = model.backbone.state_dict(), back.backbone.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert torch.equal(model(x, t), back(x, t))
        for field in ("process", "native", "parametrization", "sample_shape", "num_classes", "sigma_min", "sigma_max",
                      "value_range", "sampler", "sampler_times"):  # fmt: skip
            assert getattr(back, field) == getattr(model, field), field
        save_model(back, tmp_path / "again", {"from": "here"})
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()

    def test_weights_of_another_size_are_refused(self, name: str, tmp_path: Path) -> None:
        from fewstep.checkpoint.store import read_tensors, write_tensors

        save_model(make(name), tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
        tensors = read_tensors(path)
        first = next(k for k, v in tensors.items() if v.ndim > 1)
        write_tensors(path, tensors | {first: tensors[first][:-1]})
        with pytest.raises(CheckpointError, match=first.replace(".", r"\.")):
            load(tmp_path / "model")

    def test_unknown_arguments_are_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match=rf"'{name}' does not take these arguments.*colour"):
            build({"name": name, "kwargs": SMALL[name][1] | {"colour": 3}})


def test_an_unknown_name_has_a_nearest_match() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'unet'"):
        build({"name": "unett", "kwargs": {}})
