"""Distances in feature space, and the nets they look through."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.config import from_dict, to_dict
from fewstep.data import Source, encode, open_source
from fewstep.errors import CheckpointError, ConfigError, DataError
from fewstep.evaluation.small_nets import load_mnist_cnn
from fewstep.objectives.feature_distance import FeatureDistance, distance, smooth_length, unit_gradient
from fewstep.objectives.levers import Levers
from fewstep.penalty import Penalty
from fewstep.training.feature_space import LPIPS, open_differentiable
from fewstep.training.transform_net import (
    LARGEST,
    TransformNet,
    label_names,
    load_transform_net,
    random_labels,
    save_transform_net,
    train_transform_net,
    transform,
    validate,
)

WEIGHED = Penalty(distance="l2", weight="dt")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(x: Tensor) -> list[Tensor]:
    """Two maps of images ``[b, 2, 4, 4]``, not linear: ``[b, 3, 4, 4]`` and ``[b, 5]``."""
    mix, last = normal(3, 2, seed=20).to(x.dtype), normal(48, 5, seed=21).to(x.dtype)
    first = torch.einsum("bchw,dc->bdhw", x, mix).tanh()
    return [first, first.flatten(1) @ last]


def setting() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, goal, t and t - r."""
    t, r = torch.tensor([0.5, 2.0, 40.0]).double(), torch.tensor([0.25, 0.0, 39.0]).double()
    return normal(3, 2, 4, 4).requires_grad_(True), normal(3, 2, 4, 4, seed=1), t, t - r


def test_the_distance_is_that_of_the_formula() -> None:
    out, goal, t, gap = setting()
    apart = [(a - b).detach().numpy() for a, b in zip(features(out), features(goal), strict=True)]
    lengths = sum(np.sqrt((v.reshape(*v.shape[:2], -1) ** 2).sum(-1) + 1e-10).sum(1) - 1e-5 * v.shape[1] for v in apart)
    squares = sum((v.reshape(3, -1) ** 2).sum(1) for v in apart)
    for metric, truth in (("channels", lengths), ("squared", squares)):
        of = FeatureDistance("x", form="plain", metric=metric)
        loss = of(WEIGHED, out, goal, t, gap, 0.5, features)
        np.testing.assert_allclose(loss.detach().numpy(), truth / gap.numpy(), rtol=1e-12)


def test_the_distance_is_zero_only_where_the_images_are_equal() -> None:
    out, _, t, gap = setting()
    goal = out.detach().clone()
    goal[1, 0, 2, 2] += 1e-3
    for metric in ("channels", "squared"):
        loss = FeatureDistance("x", form="plain", metric=metric)(WEIGHED, out, goal, t, gap, 0.5, features)
        assert (loss == 0).tolist() == [True, False, True]
        (gradient,) = torch.autograd.grad(loss.sum(), out)
        assert (gradient.flatten(1).norm(dim=1) == 0).tolist() == [True, False, True]


def test_no_gradient_flows_to_the_goal() -> None:
    out, goal, t, gap = setting()
    goal.requires_grad_(True)
    for form in ("plain", "unit_gradient"):
        loss = FeatureDistance("x", form=form)(WEIGHED, out, goal, t, gap, 0.5, features).sum()
        assert torch.autograd.grad(loss, goal, allow_unused=True) == (None,)


def test_the_unit_gradient_has_length_one_over_the_gap_and_the_distances_direction() -> None:
    out, goal, t, gap = setting()
    loss = FeatureDistance("x")(WEIGHED, out, goal, t, gap, 0.5, features)
    (found,) = torch.autograd.grad(loss.sum(), out)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), 1 / gap, rtol=1e-12, atol=0)
    (h,) = torch.autograd.grad(distance("channels", features, out, goal).sum(), out)
    alike = torch.cosine_similarity(found.flatten(1), h.flatten(1))
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.detach(), 0.5 / gap, rtol=1e-12, atol=0)


def test_the_unit_gradient_follows_the_penaltys_weight() -> None:
    out, goal, t, gap = setting()
    loss = FeatureDistance("x")(Penalty(weight="snr+1"), out, goal, t, gap, 0.5, features)
    (found,) = torch.autograd.grad(loss.sum(), out)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), t**-2 + 1)


def test_a_vanishing_gradient_is_not_stretched() -> None:
    """At the goal it is 0, not NaN; where h is shorter than 1e-5 it stays h/1e-5."""
    out, _, t, gap = setting()
    assert torch.equal(unit_gradient("channels", features, out, out.detach()), torch.zeros_like(out))
    loss = FeatureDistance("x")(WEIGHED, out, out.detach(), t, gap, 0.5, features)
    assert torch.equal(loss, torch.zeros_like(loss))

    def faint(x: Tensor) -> list[Tensor]:
        return [1e-7 * x]

    h = unit_gradient("channels", faint, out, torch.zeros_like(out))
    assert h.flatten(1).norm(dim=1).max() < 1e-7 * math.sqrt(2) / 1e-5 * 1.001
    assert h.flatten(1).norm(dim=1).min() > 1e-3 * 0.1


def test_smooth_length_in_float32() -> None:
    v = torch.tensor([[[[3.0, 4.0]], [[1e-7, 0.0]]]])
    torch.testing.assert_close(smooth_length(v), torch.tensor([[5.0 - 1e-5, 5e-10]]), rtol=1e-4, atol=0)
    torch.testing.assert_close(smooth_length(v[:, :, 0, 0]), torch.tensor([[3.0 - 1e-5, 5e-10]]), rtol=1e-4, atol=0)


def test_the_share_mixes_features_and_pixels() -> None:
    out, goal, t, gap = setting()

    def loss(share: float) -> Tensor:
        return FeatureDistance("x", "plain", share=share)(WEIGHED, out, goal, t, gap, 0.5, features).detach()

    pixels = WEIGHED(out - goal, t, gap).detach()
    torch.testing.assert_close(loss(0.25), 0.25 * loss(1.0) + 0.75 * pixels, rtol=1e-12, atol=0)
    assert not torch.allclose(loss(1.0), pixels)


def test_features_are_compared_in_float32_whatever_the_autocast() -> None:
    out, goal = (x.detach().float() for x in setting()[:2])
    near = out + 1e-4 * goal  # bf16 resolves 4e-3
    truth = distance("channels", features, out.double(), near.double()).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(distance("channels", features, out, near), truth, rtol=0.02, atol=0)


def test_a_feature_distance_comes_back_from_its_description_and_refuses_nonsense() -> None:
    levers = Levers(distance=FeatureDistance("transforms:x", form="plain", metric="squared", share=0.5))
    assert from_dict(Levers, to_dict(levers)) == levers
    assert levers.features == "transforms:x"
    with pytest.raises(ConfigError, match="Did you mean 'plain'"):
        FeatureDistance("x", form="plane")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="share"):
        FeatureDistance("x", share=0.0)
    with pytest.raises(ConfigError, match="needs a network"):
        FeatureDistance()
    out, goal, t, gap = setting()
    with pytest.raises(ConfigError, match="not opened"):
        FeatureDistance("x")(WEIGHED, out, goal, t, gap, 0.5, None)


def test_label_0_changes_nothing_and_each_label_does_its_own() -> None:
    """At side 20 the largest translation, 0.3 half sides, is 3 pixels."""
    x = 0.5 * normal(1, 1, 20, 20).float()
    numbers = torch.Generator().manual_seed(0)

    def moved(**labels: float) -> Tensor:
        row = torch.tensor([[labels.get(name.replace(" ", "_"), 0.0) for name in label_names(1)]])
        return transform(x, row, numbers)

    torch.testing.assert_close(moved(), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved(translation_x=1.0)[..., 3:], x[..., :-3], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved(translation_y=-1.0)[..., :-3, :], x[..., 3:, :], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved(brightness=0.5), x + 0.2, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved(contrast=1.0), x * math.exp(0.7), rtol=0, atol=1e-5)
    assert (moved(noise=0.5) - x).std().item() == pytest.approx(0.2, rel=0.1)
    assert moved(blur=1.0).std() < 0.3 * x.std()


def test_geometry_by_the_moments_of_a_spot() -> None:
    """The centre of a spot is turned and scaled, then sheared; also all at once."""
    side, at = 64, (torch.arange(64) + 0.5) / 32 - 1
    right, down = 0.3, -0.4
    spot = torch.exp(-((at[None, :] - right) ** 2 + (at[:, None] - down) ** 2) / (2 * 0.06**2))[None, None]
    angle, scale, shear = LARGEST["rotation"], LARGEST["scale"], LARGEST["shear"]
    cos, sin = math.cos(angle), math.sin(angle)
    for name, where in (
        ("rotation", (cos * right - sin * down, sin * right + cos * down)),
        ("scale", (math.exp(scale) * right, math.exp(scale) * down)),
        ("shear", (right - shear * down, down)),
        ("rotation shear", (cos * right - sin * down - shear * (sin * right + cos * down), sin * right + cos * down)),
    ):
        row = torch.tensor([[float(label in name.split()) for label in label_names(1)]])
        found = transform(spot, row, torch.Generator()).clamp_min(0)[0, 0]
        weight = found / found.sum()
        centre = ((weight.sum(0) * at).sum().item(), (weight.sum(1) * at).sum().item())
        assert centre == pytest.approx(where, abs=3 / side / 10), name


def test_random_labels_are_left_out_half_of_the_time() -> None:
    labels = random_labels(20_000, 3, torch.Generator().manual_seed(0))
    assert labels.shape[1] == len(label_names(3)) == 11
    assert ((labels == 0).float().mean(0) - 0.5).abs().max() < 0.02
    assert labels[:, -2:].min() == 0 and labels[:, :-2].min() < -0.99
    assert (labels.square().mean(0) - 1 / 6).abs().max() < 0.01


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits", labels=False)


@pytest.fixture(scope="module")
def trained(digits: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transform net after 16,000 digits: R^2 0.30, on contrast 0.72."""
    out = tmp_path_factory.mktemp("nets") / "transforms"
    result = train_transform_net(digits, 16_000, 0, out)
    assert result.validation == 179
    assert result.mean_r2 > 0.2
    assert result.r2["contrast"] > 0.6
    return out


def test_a_transform_net_learns_and_is_written(trained: Path, digits: Source) -> None:
    net = load_transform_net(trained)
    assert sorted(p.name for p in trained.iterdir()) == ["config.json", "weights.safetensors"]
    assert [len(m[0].flatten()) for m in net.maps(torch.zeros(1, 1, 8, 8))] == [24 * 16, 48 * 4, 96, 9]
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_the_same_seed_gives_the_same_net(digits: Source, tmp_path: Path) -> None:
    """Whatever torch's global state."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        train_transform_net(digits, 256, seed, tmp_path / name)
    a, b, c = ((tmp_path / name / "weights.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_r2_of_a_net_that_always_says_0(digits: Source) -> None:
    """0 for labels of mean 0; for blur and noise, of mean 1/4 and second moment 1/6, 1 - (1/6)/(1/6 - 1/16) = -0.6."""
    net = TransformNet(1, 8)
    for parameter in net.last.parameters():
        parameter.data.zero_()
    found = validate(net, digits, torch.arange(1797), torch.Generator().manual_seed(0))
    assert list(found.r2.values()) == pytest.approx([0.0] * 7 + [-0.6] * 2, abs=0.06)


def test_an_open_net_is_frozen_and_shows_the_gradient_at_any_size(trained: Path, digits: Source) -> None:
    look = open_differentiable(f"transforms:{trained}")
    truth = load_transform_net(trained)
    x = encode(digits.read(np.arange(3)))
    for mine, theirs in zip(look(x), truth.maps(x), strict=True):
        assert torch.equal(mine, theirs)
    large = nn.functional.interpolate(x, scale_factor=2).requires_grad_(True)
    gap = torch.ones(3)
    loss = FeatureDistance("x")(WEIGHED, large, large.detach().flip(3), gap, gap, 0.5, look)
    loss.sum().backward()
    assert large.grad is not None
    torch.testing.assert_close(large.grad.flatten(1).norm(dim=1), torch.ones(3))
    look(x.double())
    for mine, theirs in zip(look(x), truth.maps(x), strict=True):
        assert torch.equal(mine, theirs), "unchanged by a loss, a backward pass and a call in float64"
        assert not mine.requires_grad


def test_the_mnist_classifiers_maps_end_in_its_features(shared: Path) -> None:
    path = shared / "data" / "features" / "cls_mnist_cnn_botorch.safetensors"
    look = open_differentiable(f"mnist-cnn:{path}")
    x = (0.5 * normal(2, 1, 28, 28)).float().clamp(-1, 1)
    maps = look(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(20, 12, 12), (50, 4, 4), (500,)]
    assert torch.equal(maps[-1], load_mnist_cnn(path)(x))
    with pytest.raises(DataError, match="images of 1 channel"):
        look(x.expand(-1, 3, -1, -1))
    with pytest.raises(DataError, match=r"\[2\]"):
        look(torch.zeros(3, 2))


def vgg_weights() -> dict[str, Tensor]:
    """VGG16 with random weights that keep the size of the maps, and linear layers, some of whose weights are 0."""
    generator = torch.Generator().manual_seed(0)
    weights, width = {}, 3
    for stage, out in zip(LPIPS.STAGES, LPIPS.WIDTHS, strict=True):
        for index in stage:
            scale = math.sqrt(2 / (9 * width))
            weights[f"features.{index}.weight"] = scale * torch.randn(out, width, 3, 3, generator=generator)
            weights[f"features.{index}.bias"] = 0.05 * torch.randn(out, generator=generator)
            width = out
    for i, out in enumerate(LPIPS.WIDTHS):
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator).sub(0.3).clamp_min(0)
    return weights


def test_lpips_is_that_of_torchmetrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same random weights in torchmetrics' implementation, which reads torchvision's VGG16 layer by layer."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    weights = vgg_weights()
    save_file(weights, tmp_path / "lpips.safetensors")
    layers: list[nn.Module] = []
    for index in range(31):
        if (w := weights.get(f"features.{index}.weight")) is not None:
            conv = nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1)
            conv.load_state_dict({"weight": w, "bias": weights[f"features.{index}.bias"]})
            layers.append(conv)
        else:
            layers.append(nn.MaxPool2d(2) if index in (4, 9, 16, 23, 30) else nn.ReLU())
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained=False: nn.Sequential(*layers))
    reference = theirs._LPIPS(pretrained=False, net="vgg", pnet_rand=True).eval()
    for i, layer in enumerate(reference.lins):
        layer.model[-1].weight.data = weights[f"lin{i}.model.1.weight"]
    x, y = (torch.rand(2, 3, 40, 36, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in (1, 2))
    look = open_differentiable(f"lpips:{tmp_path / 'lpips.safetensors'}")
    with torch.no_grad():
        truth = reference(x, y).flatten()
        torch.testing.assert_close(distance("squared", look, x, y), truth, rtol=1e-4, atol=0)
        grey = look(x[:, :1, :16, :16])
    assert [tuple(m.shape[1:]) for m in grey] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    for w in ("lin0.model.1.weight", "features.28.bias"):
        broken = {k: v for k, v in weights.items() if k != w}
        save_file(broken, tmp_path / "broken.safetensors")
        with pytest.raises(CheckpointError, match="does not hold LPIPS's VGG16"):
            open_differentiable(f"lpips:{tmp_path / 'broken.safetensors'}")


def test_nets_that_cannot_be_opened_say_what_to_do(tmp_path: Path, digits: Source) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'transforms'"):
        open_differentiable("transform:x")
    with pytest.raises(ConfigError, match="Write: lpips:PATH"):
        open_differentiable("lpips")
    with pytest.raises(CheckpointError, match=r"torchvision(?s:.)*lpips\.safetensors"):
        open_differentiable(f"lpips:{tmp_path / 'none.safetensors'}")
    with pytest.raises(CheckpointError, match="bench/train_transform_net.py"):
        open_differentiable(f"transforms:{tmp_path / 'none'}")
    save_transform_net(TransformNet(1, 8), tmp_path / "net", {})
    config = tmp_path / "net" / "config.json"
    good = config.read_text()
    for bad in ("{", "[]", good.replace('"side": 8', '"side": 16'), good.replace('"side": 8', '"side": "x"')):
        config.write_text(bad)
        with pytest.raises(CheckpointError, match="transform net"):
            open_differentiable(f"transforms:{tmp_path / 'net'}")
    with pytest.raises(DataError, match="square images"):
        train_transform_net(open_source("gaussians8"), 256, 0, tmp_path / "points")
    with pytest.raises(ConfigError, match="three times"):
        train_transform_net(open_source("digits", resize=12), 256, 0, tmp_path / "twelve")
