"""DDPM++, NCSN++ and ADM against the numbers of the peer's own code (shared/golden/networks.npz)."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.backbones.adm import ADM
from fewstep.backbones.edm import SongUNet, ddpmpp, ncsnpp
from fewstep.backbones.edm_layers import Resample
from fewstep.errors import ConfigError, DataError, FewstepError

CASES = (
    "ddpmpp", "ddpmpp_cond_augment", "ncsnpp", "ncsnpp_cond_augment", "ddpmpp_skip",
    "adm", "adm_cond_augment", "adm_two_heads",
)  # fmt: skip
CONDITIONAL = ("ddpmpp_cond_augment", "ncsnpp_cond_augment", "adm_cond_augment")
KINDS = {"SongUNet": SongUNet, "DhariwalUNet": ADM}


@cache
def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture
def arrays(shared: Path) -> dict[str, np.ndarray]:
    path = shared / "golden" / "networks.npz"
    if not path.exists():
        pytest.skip(f"golden vectors are not at {path}")
    return load(path)


class Golden:
    """One case: the network with the peer's weights, its inputs and the peer's outputs."""

    def __init__(self, arrays: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> None:
        self.arrays, self.name, self.dtype = arrays, name, dtype
        kwargs = json.loads(str(arrays[f"{name}/kwargs_json"]))
        kind, channels = KINDS[kwargs.pop("model_type")], kwargs.pop("img_channels")
        self.net = kind(in_channels=channels, out_channels=channels, **kwargs).to(dtype)
        head = f"{name}/w/model."
        weights = {key[len(head) :]: value for key, value in arrays.items() if key.startswith(head)}
        tensors = {key: torch.from_numpy(value).to(dtype) for key, value in weights.items()}
        self.net.load_state_dict(tensors, strict=True)
        self.x, self.sigma = self.given("x"), self.given("sigma")
        self.cond, self.augment = self.given("class_labels"), self.given("augment_labels")

    def given(self, what: str) -> Any:
        value = self.arrays.get(f"{self.name}/{what}")
        return None if value is None else torch.from_numpy(value).to(self.dtype)

    def peer(self, what: str, precision: str = "f64") -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[f"{self.name}/{what}_{precision}"]))

    def raw(self) -> Tensor:
        return self.net(self.x, self.sigma.log() / 4, self.cond, augment=self.augment)

    def denoise(self, *, labels: bool = True) -> Tensor:
        """EDM preconditioning (math.md 1.3) at the noisy input x sqrt(sigma^2 + 1/4)."""
        sigma, sigma_data = self.sigma[:, None, None, None], 0.5
        norm = (sigma**2 + sigma_data**2).sqrt()
        noisy = self.x * norm
        cond, augment = (self.cond, self.augment) if labels else (None, None)
        out = self.net(noisy / norm, self.sigma.log() / 4, cond, augment=augment)
        return sigma_data**2 / norm**2 * noisy + sigma * sigma_data / norm * out

    def gradient_norms(self) -> Tensor:
        """Norm of each parameter's gradient of mean(D x), in the peer's order."""
        self.net.zero_grad()
        (self.denoise() * self.x).mean().backward()
        found = {f"model.{name}": p.grad for name, p in self.net.named_parameters()}
        order = [str(name) for name in self.arrays[f"{self.name}/grad_names"]]
        assert sorted(found) == sorted(order)
        return torch.stack([found[name].norm() for name in order])


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.double()
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_raw_output_float64(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float64)
    out = case.raw()
    assert out.dtype == torch.float64
    assert relative_error(out, case.peer("F")) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_denoiser_float64(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float64)
    got, want = case.denoise(), case.peer("D_edm")
    for row in range(len(got)):  # per row: sigma = 0.002 and 80 each to their own scale
        assert relative_error(got[row], want[row]) < 1e-9


@pytest.mark.parametrize("name", CONDITIONAL)
def test_no_label_means_zeros(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float64)
    without = case.denoise(labels=False)
    assert relative_error(without, case.peer("D_edm_nolabel")) < 1e-9
    case.cond, case.augment = torch.zeros_like(case.cond), torch.zeros_like(case.augment)
    assert torch.equal(case.denoise(), without)


@pytest.mark.parametrize("name", CASES)
def test_gradients_float64(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float64)
    assert relative_error((case.denoise() * case.x).mean(), case.peer("grad_scalar")) < 1e-9
    got, want = case.gradient_norms(), case.peer("grad_norms")
    assert ((got - want).abs() <= 1e-7 * want).all()
    assert relative_error(got.norm(), case.peer("grad_total_norm")) < 1e-7


@pytest.mark.parametrize("name", CASES)
def test_float32_error_is_at_most_ten_times_the_peers(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float32)
    found = {"F": case.raw(), "D_edm": case.denoise(), "grad_norms": case.gradient_norms()}
    for what, got in found.items():
        exact = case.peer(what)
        own = (case.peer(what, "f32").double() - exact).abs().max()
        assert (got.detach().double() - exact).abs().max() <= 10 * own, what


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_autocast_keeps_two_digits(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.raw()
    error = relative_error(out, case.peer("F"))
    assert 1e-5 < error < 0.03  # it did run in bfloat16, and it did no worse than bfloat16


@pytest.mark.parametrize("name", CASES)
def test_output_is_bitwise_deterministic(arrays: dict[str, np.ndarray], name: str) -> None:
    case = Golden(arrays, name, torch.float32)
    first, first_norms = case.raw(), case.gradient_norms()
    again = Golden(arrays, name, torch.float32)
    again.net = copy.deepcopy(case.net)
    assert torch.equal(again.raw(), first)
    assert torch.equal(again.gradient_norms(), first_norms)


# ---- the networks themselves, without golden vectors -----------------------------------------------------


def small(**changes: Any) -> SongUNet:
    torch.manual_seed(0)
    settings = ddpmpp(8, label_dim=3, augment_dim=9) | {"model_channels": 16, "num_blocks": 1}
    return SongUNet(**(settings | {"channel_mult": [1, 2], "attn_resolutions": [4]} | changes))


def wake(net: SongUNet) -> SongUNet:
    """Replace the near-zero initial weights, so that every part reaches the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(max(1, p[0].numel())))
    return net


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (ddpmpp(), 55_732_739),  # 55.7M: recipes.md; 55.73M: performance.md
        (ddpmpp(augment_dim=9), 55_732_739 + 9 * 128),
        (ddpmpp(label_dim=10), 55_732_739 + 10 * 128 + 128),
        # 128 more noise channels into map_layer0; residual convolutions 3 -> 256 and 256 -> 256
        (ncsnpp(), 55_732_739 + 128 * 512 + (27 * 256 + 256) + (9 * 256 * 256 + 256)),
    ],
)
def test_cifar10_parameter_counts(settings: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        net = SongUNet(**settings)
    assert sum(p.numel() for p in net.parameters()) == count


def test_presets_are_the_published_settings() -> None:
    plus, ncsn = ddpmpp(), ncsnpp()
    assert (plus["model_channels"], plus["channel_mult"], plus["num_blocks"]) == (128, [2, 2, 2], 4)
    assert (plus["attn_resolutions"], plus["resample_filter"], plus["dropout"]) == ([16], [1, 1], 0.13)
    differing = {key: ncsn[key] for key in plus if ncsn[key] != plus[key]}
    assert differing == {
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
    }
    json.dumps(plus)  # plain data


def test_config_rebuilds_the_network() -> None:
    net = small()
    again = SongUNet(**dataclasses.asdict(net.config))
    assert again.config == net.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        net.config.dropout = 0.5  # type: ignore[misc]


def test_initialisation() -> None:
    net = small(model_channels=64)
    block, weight = net.dec["4x4_in0"], net.map_layer0.weight
    bound = math.sqrt(6 / sum(weight.shape))
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    closing = (block.conv1, block.proj, net.dec["8x8_aux_conv"])
    for layer in closing:
        out, into, side, _ = layer.weight.shape
        bound = 1e-5 * math.sqrt(6 / (side * side * (out + into)))
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    qkv_bound = math.sqrt(0.2 * 6 / sum(block.qkv.weight.shape[:2]))
    assert 0.98 * qkv_bound < block.qkv.weight.abs().max() <= qkv_bound
    assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("encoder_type", ["skip", "residual"])
def test_auxiliary_input_runs_through_three_levels(encoder_type: str) -> None:
    """Residual: the merged features go on as the auxiliary input. Skip: the image itself, halved again."""
    settings = ncsnpp(16) | {"model_channels": 16, "num_blocks": 1, "encoder_type": encoder_type}
    net = wake(SongUNet(**settings)).double().eval()
    seen: dict[str, Tensor] = {}
    for name in ("8x8_block0", "4x4_aux_residual", "4x4_aux_down"):
        if name in net.enc:
            net.enc[name].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert net(x, torch.tensor([-1.0, 0.5], dtype=torch.float64)).shape == x.shape
    if encoder_type == "residual":
        assert torch.equal(seen["4x4_aux_residual"], seen["8x8_block0"])
    else:
        assert torch.equal(seen["4x4_aux_down"], Resample((1, 3, 3, 1), "down")(x))


@pytest.mark.parametrize("mode", ["up", "down"])
def test_box_filter_shortcut_equals_the_convolution(mode: Any) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    short, long = Resample((1, 1), mode), Resample((1, 1), mode)
    assert short.box
    long.box = False
    torch.testing.assert_close(short(x), long(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
def test_resampling_keeps_a_constant_inside(taps: tuple[int, ...]) -> None:
    ones = torch.ones(1, 2, 16, 16, dtype=torch.float64)
    for mode, side in (("up", 32), ("down", 8)):
        out = Resample(taps, mode)(ones)  # type: ignore[arg-type]
        assert out.shape == (1, 2, side, side)
        inside = out[..., 3:-3, 3:-3]
        torch.testing.assert_close(inside, torch.ones_like(inside))


def test_dropout_and_label_dropout_act_in_training_only() -> None:
    net = wake(small(dropout=0.5, label_dropout=0.5))
    x, c_noise = (
        torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2)),
        torch.linspace(-1.5, 1, 16),
    )
    cond = F.one_hot(torch.arange(16) % 3, 3).float()
    net.eval()
    quiet, dropped = net(x, c_noise, cond), net(x, c_noise)
    assert torch.equal(quiet, net(x, c_noise, cond))
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    net.train()
    noisy = net(x, c_noise, cond)
    for row in range(16):  # every row is either its class or "no class"
        kept = torch.allclose(noisy[row], quiet[row], rtol=1e-4, atol=1e-5)
        lost = torch.allclose(noisy[row], dropped[row], rtol=1e-4, atol=1e-5)
        assert kept != lost
    distances = (noisy - quiet).detach().abs().amax(dim=(1, 2, 3)).tolist()
    assert 0 < sum(distance > 1e-4 for distance in distances) < 16
    net = wake(small(dropout=0.5)).train()
    assert not torch.equal(net(x, c_noise, cond), net(x, c_noise, cond))


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        (dict(x=(2, 3, 16, 16)), ["[2, 3, 16, 16]", "[b, 3, 8, 8]"]),
        (dict(x=(2, 1, 8, 8)), ["[2, 1, 8, 8]", "[b, 3, 8, 8]", "3 channels"]),
        (dict(x=(3, 8, 8)), ["[3, 8, 8]", "[b, 3, 8, 8]"]),
        (dict(c_noise=(1,)), ["[1]", "[2]"]),
        (dict(cond=(2, 4)), ["class labels", "[2, 4]", "[2, 3]"]),
        (dict(cond=(2,)), ["class labels", "shape [2]", "[2, 3]", "one-hot"]),
        (dict(augment=(2, 8)), ["augmentation labels", "[2, 8]", "[2, 9]"]),
    ],
)
def test_wrong_inputs_are_refused_with_sizes(inputs: dict[str, tuple[int, ...]], parts: list[str]) -> None:
    shapes = {"x": (2, 3, 8, 8), "c_noise": (2,), "cond": (2, 3), "augment": (2, 9)} | inputs
    given = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(DataError) as caught:
        small()(given["x"], given["c_noise"], given["cond"], augment=given["augment"])
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_labels_for_an_unconditional_network_are_refused() -> None:
    net = small(label_dim=0)
    with pytest.raises(DataError, match=r"class labels do not fit.*\[2, 3\].*Wanted: none"):
        net(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"img_resolution": 30, "channel_mult": [1, 2, 2]}, "30 pixels cannot be halved 2 times"),
        ({"img_resolution": 0}, "Unusable img_resolution"),
        ({"img_resolution": 8.0}, "Unusable img_resolution"),
        ({"channel_mult": []}, "channel_mult needs one whole factor"),
        ({"channel_mult": [1, 1.5]}, "channel_mult needs one whole factor"),
        ({"embedding_type": "fourrier"}, "Did you mean 'fourier'"),
        ({"encoder_type": "residuals"}, "Did you mean 'residual'"),
        ({"decoder_type": "residual"}, "Known: standard, skip"),
        ({"model_channels": 18}, "18 channels, 4 groups"),
        ({"model_channels": 2}, "channel_mult_noise = 2"),
        ({"resample_filter": [1, 2, 1]}, "even number of taps"),
        ({"dropout": 1.5}, "dropout is not a probability"),
        ({"label_dim": -1}, "Unusable label_dim"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(**changes)
    assert isinstance(caught.value, FewstepError) and caught.value.exit_code == 2
    assert text in str(caught.value)
