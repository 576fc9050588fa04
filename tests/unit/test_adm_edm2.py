"""ADM and EDM2 without golden vectors: sizes, first weights, magnitudes, dropout by resolution, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.backbones.adm import ADM
from fewstep.backbones.edm2 import EDM2
from fewstep.backbones.edm2_layers import EPS, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize
from fewstep.derivative import settle
from fewstep.errors import ConfigError, DataError
from fewstep.training.config import StudentConfig
from fewstep.training.network import after_step, set_dropout

TINY: dict[str, dict[str, Any]] = {
    "edm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1},
    "adm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "dropout": 0.1},
    "edm2": {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
             "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8, "dropout": 0.1},
}  # fmt: skip


def tiny(name: str, **changes: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build({"name": name, "kwargs": TINY[name] | changes})


def denoiser(net: nn.Module) -> Denoiser:
    return Denoiser(net, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def magnitude(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


# ------------------------------------------------------------------------------------------------------- sizes
@pytest.mark.parametrize(("channels", "millions"), [(128, 124.7), (192, 280.2), (256, 497.8), (448, 1523.2)])
def test_edm2_has_as_many_parameters_as_published(channels: int, millions: float) -> None:
    """XS, S, M and XXL of the paper; S is also in performance.md. With 1000 classes."""
    with torch.device("meta"):
        net = EDM2(64, 3, label_dim=1000, model_channels=channels)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_adm_has_as_many_parameters_as_published() -> None:
    """296 million for ImageNet 64x64 (ADM, table 4; EDM, table 7)."""
    with torch.device("meta"):
        net = ADM(64, 3, 3, label_dim=1000)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(295.9, abs=0.05)


# ----------------------------------------------------------------------------------------------- first weights
def test_a_new_adm_adds_nothing_to_its_input() -> None:
    """Its closing layers are 0; the others have torch's own law, U(-1, 1)/sqrt(fan_in)."""
    net = tiny("adm", label_dim=3, augment_dim=9, model_channels=64)
    assert not net(noise(2, 1, 8, 8).float(), torch.zeros(2)).any()
    named = dict(net.named_parameters())
    zero = {name for name, p in named.items() if not p.any() and "norm" not in name}
    closing = {n for n in named if any(part in n for part in ("conv1.", "proj.", "out_conv.", "map_augment."))}
    assert zero == closing
    for name in ("map_layer1.weight", "map_layer1.bias", "enc.8x8_block0.conv0.weight", "enc.4x4_down.conv0.bias"):
        weight = named[name.replace("bias", "weight")]
        bound = weight[0].numel() ** -0.5
        assert 0.9 * bound < named[name].detach().abs().max() <= bound, name
        assert magnitude(named[name]) == pytest.approx(bound / math.sqrt(3), rel=0.2), name
    assert magnitude(named["map_label.weight"]) == pytest.approx(1, rel=0.1)  # N(0, 1)


def test_a_new_edm2_denoises_by_scaling_alone() -> None:
    """``out_gain`` starts at 0; all weights are N(0, 1), whatever their fan-in."""
    net = tiny("edm2", label_dim=3, model_channels=32).double()
    x, t = noise(2, 1, 8, 8), torch.tensor([0.3, 2.0], dtype=torch.float64)
    c_skip = (0.25 / (t**2 + 0.25))[:, None, None, None]
    model = Denoiser(net, EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), num_classes=3)
    torch.testing.assert_close(model(x, t), c_skip * x, rtol=1e-12, atol=0)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            assert not parameter.any(), name
        elif parameter.numel() > 500:
            assert magnitude(parameter) == pytest.approx(1, rel=0.1), name


# -------------------------------------------------------------------------------------------------- magnitudes
def test_layers_keep_the_magnitude_of_what_passes() -> None:
    a, b = noise(8, 64, 16, 16), noise(8, 32, 16, 16, seed=2)
    torch.manual_seed(0)
    assert magnitude(mp_silu(a)) == pytest.approx(1, rel=0.01)
    for t in (0.3, 0.5, 0.8):
        assert magnitude(mp_sum(a[:, :32], b, t)) == pytest.approx(1, rel=0.01)
        joined = mp_cat(a, b, t)
        assert magnitude(joined) == pytest.approx(1, rel=0.01)
        shares = joined[:, :64].square().sum() / a.square().mean(), joined[:, 64:].square().sum() / b.square().mean()
        assert float(shares[0] / shares[1]) == pytest.approx(((1 - t) / t) ** 2, rel=1e-12)
    for kernel in (0, 1, 3):
        layer = MPConv(64, 128, kernel).double()
        out = layer(a.permute(0, 2, 3, 1).reshape(-1, 64) if kernel == 0 else a)
        inside = out if kernel == 0 else out[..., 1:-1, 1:-1]
        assert magnitude(inside) == pytest.approx(1, rel=0.05), kernel
        assert magnitude(layer(a[:, :, 0, 0], gain=3.0)) == pytest.approx(3, rel=0.2) if kernel == 0 else True
    assert magnitude(MPFourier(256)(noise(256))) == pytest.approx(1, rel=0.05)


def test_normalize_divides_by_the_magnitude_of_each_row() -> None:
    x = noise(4, 6, 5) * torch.tensor([1e-6, 0.1, 1.0, 50.0], dtype=torch.float64)[:, None, None]
    rms = x.square().mean(dim=(1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(normalize(x), x / (rms + EPS), rtol=1e-12, atol=0)
    along = x.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(normalize(x, dim=1), x / (along + EPS), rtol=1e-12, atol=0)
    assert normalize(x.half()).dtype == torch.float16
    zero = torch.zeros(2, 3, requires_grad=True)
    normalize(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()  # type: ignore[arg-type]


def test_after_step_normalises_what_is_stored() -> None:
    """Each row to magnitude r/(r + 1e-4), its direction kept; gains stay; a second time changes next to nothing."""
    net = tiny("edm2", label_dim=3).double()
    for seed, parameter in enumerate(net.parameters()):
        if parameter.ndim:
            parameter.data.mul_(noise(len(parameter), *[1] * (parameter.ndim - 1), seed=seed).abs() + 0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    after_step(denoiser(net))
    once = {name: p.detach().clone() for name, p in net.named_parameters()}
    after_step(denoiser(net))
    for name, p in net.named_parameters():
        if p.ndim == 0:
            assert torch.equal(p, before[name]), name
            continue
        dims = tuple(range(1, p.ndim))
        rms = before[name].square().mean(dims, keepdim=True).sqrt()
        torch.testing.assert_close(once[name], before[name] / (rms + 1e-4), rtol=1e-12, atol=0)
        torch.testing.assert_close(p.detach(), once[name], rtol=2e-3, atol=0)
        assert float((p.detach().square().mean(dims).sqrt() - (1 - 1e-4)).abs().max()) < 1e-6, name


def test_frozen_weights_are_not_normalised() -> None:
    net = tiny("edm2")
    net.unet.out_conv.weight.data.mul_(2)  # type: ignore[union-attr]
    net.unet.out_conv.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = net.unet.out_conv.weight.clone()  # type: ignore[union-attr]
    after_step(denoiser(net))
    assert torch.equal(net.unet.out_conv.weight, before)  # type: ignore[union-attr]
    assert magnitude(net.unet.emb_noise.weight) == pytest.approx(1 - 1e-4, abs=5e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [True, False])
def test_no_pass_changes_a_weight(training: bool) -> None:
    net = tiny("edm2").train(training)
    for parameter in net.parameters():
        parameter.data.add_(0.3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x, c_noise = noise(2, 1, 8, 8).float(), torch.zeros(2)
    net(x, c_noise).square().sum().backward()
    with torch.no_grad():
        net(x, c_noise)
        net.logvar(c_noise)  # type: ignore[operator]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", ["adm", "edm2"])
def test_forward_mode_differentiation_works(name: str) -> None:
    net = tiny(name)
    for parameter in net.parameters():
        parameter.data.add_(0.1 * torch.ones_like(parameter))
    assert settle("jvp", denoiser(net)) == "jvp"


# ------------------------------------------------------------------------------------------ dropout by resolution
def probabilities(net: nn.Module) -> set[tuple[int, float]]:
    return {(layer.resolution, layer.p) for layer in net.modules() if isinstance(layer, nn.Dropout)}


@pytest.mark.parametrize("name", TINY)
def test_dropout_up_to_a_resolution(name: str) -> None:
    net = tiny(name)
    assert probabilities(net) == {(8, 0.1), (4, 0.1)}
    set_dropout(net, StudentConfig(dropout_max_resolution=4))  # no probability: the teacher's stays
    assert probabilities(net) == {(8, 0.1), (4, 0.1)}
    set_dropout(net, StudentConfig(dropout=0.5))
    assert probabilities(net) == {(8, 0.5), (4, 0.5)}
    set_dropout(net, StudentConfig(dropout=0.4, dropout_max_resolution=4))
    assert probabilities(net) == {(8, 0.0), (4, 0.4)}


@pytest.mark.parametrize("name", TINY)
def test_each_layer_acts_at_the_resolution_that_it_says(name: str) -> None:
    net, seen = tiny(name).train(), []
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_pre_hook(lambda layer, args: seen.append((layer.resolution, *args[0].shape[2:])))
    net(noise(2, 1, 8, 8).float(), torch.zeros(2))
    assert len(seen) >= 6
    assert all(said == height == width for said, height, width in seen)


def test_a_network_that_does_not_say_where_its_dropout_acts() -> None:
    config = StudentConfig(dropout=0.4, dropout_max_resolution=16)
    for net in (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=r"does not say at which resolution.*dropout_max_resolution=null"):
            set_dropout(net, config)


# --------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("adm", {"img_resolution": 30, "channel_mult": [1, 2, 2]}, "30 pixels cannot be halved 2 times"),
        ("adm", {"num_blocks": 0}, "Unusable num_blocks"),
        ("adm", {"dropout": 1.0}, "dropout is not a probability"),
        ("adm", {"model_channels": 18}, "18 channels, 4 groups"),
        ("adm", {"model_channels": 5, "channel_mult": [4]}, "even number of channels"),
        ("adm", {"model_channels": 4, "channel_mult": [2, 33]}, "132 channels, 32 groups"),
        ("edm2", {"img_resolution": 8.0}, "Unusable img_resolution"),
        ("edm2", {"channel_mult": []}, "channel_mult needs one whole factor"),
        ("edm2", {"channel_mult": [1, 1.5]}, "channel_mult needs one whole factor"),
        ("edm2", {"label_dim": -1}, "Unusable label_dim"),
        ("edm2", {"channels_per_head": 0}, "Unusable channels_per_head"),
        ("edm2", {"model_channels": 11, "channels_per_head": 5, "attn_resolutions": [8, 4]}, "11 channels, 2 heads"),
        ("edm2", {"resample_filter": [1, 2, 1]}, "even number of taps"),
        ("edm2", {"res_balance": 1.0}, "res_balance is not a probability"),
        ("edm2", {"channel_mult_emb": 0.5}, "Unusable channel_mult_emb"),
    ],
)
def test_impossible_settings_are_refused(name: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(name, **changes)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["adm", "edm2"])
def test_wrong_inputs_are_refused_with_sizes(name: str) -> None:
    net, x, t = tiny(name, label_dim=3), torch.zeros(2, 1, 8, 8), torch.zeros(2)
    for args, parts in (
        ((torch.zeros(2, 1, 16, 16), t), ["[2, 1, 16, 16]", "[b, 1, 8, 8]"]),
        ((x, torch.zeros(1)), ["[1]", "[2]"]),
        ((x, t, torch.zeros(2, 4)), ["class labels", "[2, 4]", "[2, 3]"]),
    ):
        with pytest.raises(DataError) as caught:
            net(*args)
        assert all(part in str(caught.value) for part in parts)


def test_an_edm2_without_log_variance_has_none() -> None:
    net = tiny("edm2", logvar_channels=0)
    assert not [name for name in net.state_dict() if "logvar" in name]
    with pytest.raises(ConfigError, match="no log-variance"):
        net.logvar(torch.zeros(2))  # type: ignore[operator]


def test_widths_of_embeddings_and_a_longer_filter() -> None:
    net = tiny("edm2", channel_mult_noise=2, channel_mult_emb=3, resample_filter=[1, 3, 3, 1])
    assert net.unet.emb_noise.weight.shape == (24, 16)  # type: ignore[union-attr]
    assert net.landing_width == 16
    assert not [name for name in net.state_dict() if "filter" in name]
    x = noise(2, 1, 8, 8).float()
    plain = tiny("edm2", channel_mult_noise=2, channel_mult_emb=3)
    plain.load_state_dict(net.state_dict())
    for network in (net, plain):
        network.unet.out_gain.data.fill_(1)  # type: ignore[union-attr]
    assert not torch.allclose(net(x, torch.zeros(2)), plain(x, torch.zeros(2)), atol=1e-2)


def test_activations_are_clipped() -> None:
    largest: dict[float | None, float] = {}
    for most in (0.05, 1e3, None):
        net = tiny("edm2", clip_act=most).eval()
        block = net.unet.dec["8x8_block0"]  # type: ignore[index,union-attr]
        block.register_forward_hook(
            lambda _, __, out, most=most: largest.update({most: float(out.detach().abs().max())})
        )
        net(noise(2, 1, 8, 8).float(), torch.zeros(2))
    assert largest[0.05] == pytest.approx(0.05)
    assert largest[1e3] == largest[None] > 1
