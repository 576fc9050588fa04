"""Feature nets: real weights against naive loops and known labels, specs, names, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.errors import CheckpointError, ConfigError, DataError, FewstepError
from fewstep.evaluation.feature_net import FeatureNet
from fewstep.evaluation.features import (
    FEATURES,
    features_of,
    is_fid_net,
    iter_features,
    iter_outputs,
    open_features,
)
from fewstep.evaluation.metrics import StatsAccumulator, gaussian_stats
from fewstep.evaluation.small_nets import ConvRelu6, MobileNetV1, load_mnist_cnn, load_mobilenet

MNIST_CNN = "data/features/cls_mnist_cnn_botorch.safetensors"
MOBILENET = "data/features/mobilenet_v1_0.75_224_tfjs_float32.npz"
EMOJI = {  # code point: ImageNet class (soccer ball, basketball, strawberry, pineapple, lemon, orange, ...)
    "26bd": 805, "1f3c0": 430, "1f353": 949, "1f34d": 953, "1f34b": 951, "1f34a": 950,
    "2602": 879, "1f32d": 934, "23f0": 409, "1f3be": 852,
}  # fmt: skip


def images(n: int, c: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, c, side, side), generator=rng, dtype=torch.uint8)


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Names ------------------------------------------------------------------------------------------------


def test_only_verified_inception_is_the_net_of_fid() -> None:
    def net(name: str, verified: bool) -> FeatureNet:
        return FeatureNet(name, 2048, "0" * 64, lambda x: x, verified=verified)

    assert is_fid_net(net("Inception", True))
    assert not is_fid_net(net("Inception", False))
    assert not is_fid_net(net("Inception-01234567", False))
    assert not is_fid_net(net("MobileNetV1", True))
    assert not is_fid_net(open_features("pixels", reference=images(2)))


# --- Pixels and principal axes ----------------------------------------------------------------------------


def test_pixels_are_in_minus_one_to_one_and_points_are_themselves() -> None:
    x = images(5)
    net = open_features("pixels", reference=x)
    assert (net.name, net.dim) == ("Pixels", 192)
    np.testing.assert_allclose(features_of(net, x), (x.numpy().reshape(5, -1) - 127.5) / 127.5, atol=1e-6)
    cloud = points(7, 2)
    assert torch.equal(features_of(open_features("pixels", reference=cloud), cloud), cloud)


@pytest.mark.parametrize("n", [60, 12], ids=["more samples than values", "fewer samples than values"])
def test_pca_keeps_the_axes_of_largest_variance(n: int) -> None:
    x = points(n, 20, seed=1) @ torch.diag(torch.linspace(3, 0.1, 20, dtype=torch.float64)) + 5
    net = open_features("pca:4", reference=x)
    f = features_of(net, x)
    assert f.shape == (n, 4) and net.dim == 4
    centred = x - x.mean(0)
    _, s, vt = np.linalg.svd(centred.numpy(), full_matrices=False)
    np.testing.assert_allclose(f.square().sum(0).sqrt(), s[:4], rtol=1e-9)
    np.testing.assert_allclose(f.abs(), np.abs(centred.numpy() @ vt[:4].T), atol=1e-9)


def test_pca_hash_fixes_reference_and_size() -> None:
    x, y = images(10, side=4), images(10, side=4, seed=1)
    assert open_features("pca:2", reference=x).hash == open_features("pca:2", reference=x.clone()).hash
    assert len({open_features(s, reference=r).hash for s, r in [("pca:2", x), ("pca:3", x), ("pca:2", y)]}) == 3


def test_batches_do_not_matter() -> None:
    x = images(23)
    net = open_features("pca:5", reference=x)
    whole = features_of(net, x, batch_size=23)
    torch.testing.assert_close(features_of(net, x, batch_size=4), whole)
    torch.testing.assert_close(features_of(net, iter([x[:1], x[1:20], x[20:]])), whole)
    accumulator = StatsAccumulator()
    for part in iter_features(net, x, batch_size=6):
        accumulator.add(part)
    torch.testing.assert_close(accumulator.stats().cov, gaussian_stats(whole).cov, rtol=1e-5, atol=1e-6)


def test_blocks_larger_than_a_batch_are_cut() -> None:
    seen: list[int] = []
    net = open_features("pixels", reference=images(2))
    counting = dataclasses.replace(net, extract=lambda x: (seen.append(len(x)), net.extract(x))[1])
    features_of(counting, iter([images(7), images(0), images(3)]), batch_size=4)
    assert seen == [4, 3, 3]


# --- The MNIST classifier ---------------------------------------------------------------------------------


def naive_mnist_features(image: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    x = ((image / 255 - 0.1307) / 0.3081)[None]
    for layer in ("conv1", "conv2"):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
        x = np.einsum("ihwab,oiab->ohw", windows, w[f"{layer}.weight"]) + w[f"{layer}.bias"][:, None, None]
        x = np.maximum(x, 0)
        x = np.maximum(np.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]), np.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2]))
    return np.maximum(w["fc1.weight"] @ x.reshape(-1) + w["fc1.bias"], 0)


def test_mnist_cnn_features_equal_a_naive_network(shared: Path) -> None:
    path = shared / MNIST_CNN
    net = open_features(f"mnist-cnn:{path}")
    with np.load(shared / "data/mnist_28x28_uint8.npz") as file:
        x = file["x_test"][:3]
    weights = {k: v.double().numpy() for k, v in load_mnist_cnn(path).state_dict().items()}
    expected = np.stack([naive_mnist_features(image.astype(np.float64), weights) for image in x])
    np.testing.assert_allclose(features_of(net, torch.from_numpy(x)[:, None]), expected, atol=1e-4)
    assert (net.name, net.dim) == ("MNIST-CNN", 500)
    assert net.hash == hashlib.sha256(path.read_bytes()).hexdigest()


def test_mnist_cnn_reads_digits(shared: Path) -> None:
    with np.load(shared / "data/mnist_28x28_uint8.npz") as file:
        x, y = (
            torch.from_numpy(file["x_test"][::5].copy())[:, None],
            torch.from_numpy(file["y_test"][::5].copy()),
        )
    net = load_mnist_cnn(shared / MNIST_CNN)
    right = sum(
        int((net.logits(a.float() / 127.5 - 1).argmax(1) == b).sum())
        for a, b in zip(x.split(250), y.split(250), strict=True)
    )
    assert abs(right - 1985) <= 1  # measured with 9,894 of all 10,000, the 98.9 % of its authors


def test_mnist_cnn_refuses_other_images(shared: Path) -> None:
    net = open_features(f"mnist-cnn:{shared / MNIST_CNN}")
    with pytest.raises(DataError, match=r"28x28 pixels only\. Got: 32x32"):
        features_of(net, images(2, c=1, side=32))
    with pytest.raises(DataError, match=r"cannot read images of 3 channels\. Wanted: 1"):
        features_of(net, images(2, c=3, side=28))
    with pytest.raises(DataError, match=r"reads images\. Got: float32 of shape \[2, 5\]"):
        features_of(net, torch.zeros(2, 5))


# --- MobileNet --------------------------------------------------------------------------------------------


def same_convolution(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """TensorFlow's SAME on HWC with an HWIO kernel: output ceil(h/stride), the odd pixel of padding last."""
    k, side = kernel.shape[0], x.shape[0]
    out = -(-side // stride)
    total = max((out - 1) * stride + k - side, 0)
    padded = np.pad(x, ((total // 2, total - total // 2), (total // 2, total - total // 2), (0, 0)))
    y = np.zeros((out, out, kernel.shape[3]))
    for i in range(out):
        for j in range(out):
            window = padded[i * stride : i * stride + k, j * stride : j * stride + k]
            y[i, j] = np.einsum("abi,abio->o", window, kernel)
    return y


def naive_layer(x: np.ndarray, arrays: dict[str, np.ndarray], kernel: str, stride: int) -> np.ndarray:
    """Convolution, then batch norm, then relu6, each on its own."""
    weights = arrays[kernel].astype(np.float64)
    if "depthwise" in kernel:  # HWI1: each channel by itself
        y = np.concatenate(
            [same_convolution(x[..., [c]], weights[:, :, [c]], stride) for c in range(x.shape[2])], axis=2
        )
    else:
        y = same_convolution(x, weights, stride)
    norm = kernel.split("|")[0] + "_bn|"
    y = (y - arrays[norm + "moving_mean"]) / np.sqrt(arrays[norm + "moving_variance"] + 1e-3)
    return np.clip(y * arrays[norm + "gamma"] + arrays[norm + "beta"], 0, 6)


@pytest.fixture(scope="module")
def mobilenet(shared: Path) -> tuple[MobileNetV1, dict[str, np.ndarray]]:
    path = shared / MOBILENET
    with np.load(path) as file:
        return load_mobilenet(path), {name: file[name] for name in file.files}


@pytest.mark.parametrize("side", [8, 7])
def test_stem_and_strided_separable_block_equal_naive_loops(mobilenet, side: int) -> None:
    net, arrays = mobilenet
    x = points(3, side * side, seed=4).reshape(3, side, side).tanh()
    expected = x.permute(1, 2, 0).numpy()
    layers = ["conv1|kernel", "conv_dw_1|depthwise_kernel", "conv_pw_1|kernel", "conv_dw_2|depthwise_kernel"]
    for kernel, stride in zip(layers, (2, 1, 1, 2), strict=True):
        expected = naive_layer(expected, arrays, kernel, stride)
    with torch.no_grad():
        got = net.layers[:4](x.float()[None])[0].permute(1, 2, 0)
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_whole_network_has_the_published_shapes(mobilenet) -> None:
    net, _ = mobilenet
    x, sides, widths = torch.zeros(1, 3, 224, 224), [], []
    with torch.no_grad():
        for layer in net.layers:
            assert isinstance(layer, ConvRelu6)
            x = layer(x)
            sides.append(x.shape[-1])
            widths.append(x.shape[1])
    assert sides[0::2] == [112, 112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]  # Howard 2017, table 1
    assert widths[0::2] == [24, 48, 96, 96, 192, 192, 384, 384, 384, 384, 384, 384, 768, 768]
    assert len(net.layers) == 27 and net.head.weight.shape == (1000, 768)


def test_mobilenet_recognises_emoji(shared: Path, mobilenet) -> None:
    """64 x 64 drawings, upsampled to 224: the ImageNet class is among the first 5 of 1000 for all 10."""
    with np.load(shared / "data/emojione_2.2.7_on_white.npz") as file:
        codes = [str(c) for c in file["code"]]
        x = torch.from_numpy(file["x64"][[codes.index(code) for code in EMOJI]]).permute(0, 3, 1, 2)
    net = open_features(f"mobilenet:{shared / MOBILENET}")
    features = features_of(net, x)
    assert features.shape == (len(EMOJI), 768) and (net.name, net.dim) == ("MobileNetV1", 768)
    first = mobilenet[0].head(features).topk(5).indices
    seen = [wanted in row for wanted, row in zip(EMOJI.values(), first.tolist(), strict=True)]
    assert all(seen), seen


def test_grey_is_repeated_for_mobilenet(shared: Path) -> None:
    net = open_features(f"mobilenet:{shared / MOBILENET}")
    grey = images(2, c=1, side=32)
    torch.testing.assert_close(features_of(net, grey), features_of(net, grey.repeat(1, 3, 1, 1)))
    with pytest.raises(DataError, match=r"cannot read images of 4 channels\. Wanted: 3 \(or 1\)"):
        features_of(net, images(2, c=4, side=32))


def test_logits_are_those_of_the_nets_own_classifier(shared: Path) -> None:
    x = images(5, c=1, side=28)
    small = open_features(f"mnist-cnn:{shared / MNIST_CNN}")
    features, logits = small.extract_with_logits(x)
    torch.testing.assert_close(features, small.extract(x), rtol=0, atol=0)
    torch.testing.assert_close(logits, load_mnist_cnn(shared / MNIST_CNN).logits(x.float() / 127.5 - 1).detach())
    x = images(3, side=40)
    big = open_features(f"mobilenet:{shared / MOBILENET}")
    expected = load_mobilenet(shared / MOBILENET).logits(x.float() / 127.5 - 1).detach()
    assert expected.shape == (3, 1000) and expected.std() > 0.1
    parts = list(iter_outputs(big, x, batch_size=2))
    assert [len(f) for f, _ in parts] == [2, 1]
    torch.testing.assert_close(torch.cat([part for _, part in parts]), expected, rtol=1e-4, atol=1e-4)
    assert [part for _, part in iter_outputs(open_features("pixels", reference=x), x)] == [None]


def test_every_net_says_what_it_does_to_the_pixels(shared: Path) -> None:
    x = images(4)
    assert open_features("pixels", reference=x).preprocessing == "x/127.5 - 1"
    assert open_features("pca:2", reference=x).preprocessing == "x/127.5 - 1, principal axes"
    assert "(x/255 - 0.1307)/0.3081" in open_features(f"mnist-cnn:{shared / MNIST_CNN}").preprocessing
    mobilenet = open_features(f"mobilenet:{shared / MOBILENET}")
    assert mobilenet.preprocessing == "x/127.5 - 1, bilinear 224x224 with antialias; grey repeated to 3 channels"


# --- The user's own nets ----------------------------------------------------------------------------------


def save_torchscript(path: Path, net: torch.nn.Module, example: Tensor) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, example).save(str(path))
    return path


def test_torchscript_gets_floats_in_minus_one_to_one(tmp_path: Path) -> None:
    path = save_torchscript(tmp_path / "pool.pt", torch.nn.AvgPool2d(8), torch.zeros(1, 3, 8, 8))
    x = images(6)
    for spec in (str(path), f"torchscript:{path}"):
        net = open_features(spec, reference=x)
        assert (net.name, net.dim) == ("pool", 3)
        assert net.hash == hashlib.sha256(path.read_bytes()).hexdigest()
        np.testing.assert_allclose(features_of(net, x), x.numpy().mean((2, 3)) / 127.5 - 1, atol=1e-6)


def test_torchscript_that_needs_colour_gets_grey_repeated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 8), torch.nn.Flatten())
    path = save_torchscript(tmp_path / "net.ts", convolution, torch.zeros(1, 3, 8, 8))
    grey = images(4, c=1)
    got = features_of(open_features(str(path), reference=grey), grey)
    expected = convolution(grey.repeat(1, 3, 1, 1) / 127.5 - 1).detach()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert open_features(str(path), reference=grey).preprocessing.endswith("own size; grey repeated to 3 channels")
    assert open_features(str(path), reference=images(4)).preprocessing.endswith("own size")


def test_the_inception_file_is_not_fed_with_floats_by_mistake(tmp_path: Path) -> None:
    path = save_torchscript(tmp_path / "inception-2015-12-05.pt", torch.nn.AvgPool2d(8), torch.zeros(1, 3, 8, 8))
    for spec in (str(path), f"torchscript:{path}"):
        with pytest.raises(ConfigError, match=r"reads uint8 images.*Write: inception:.*inception-2015-12-05\.pt"):
            open_features(spec, reference=images(3))


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "fewstep_test_nets.py").write_text(
        "import torch\n"
        "def corners(x):\n    return x[:, :, ::7, ::7].flatten(1)\n"
        "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9))\n"
        "def broken(x):\n    raise KeyError('layer 3')\n"
        "def total(x):\n    return x.sum()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "fewstep_test_nets"


def test_a_callable_by_its_import_path(user_module: str) -> None:
    x = images(5)
    for spec in (f"{user_module}:corners", f"module:{user_module}:corners"):
        net = open_features(spec, reference=x)
        assert (net.name, net.dim) == ("corners", 12)
        np.testing.assert_allclose(features_of(net, x), x.numpy()[:, :, ::7, ::7].reshape(5, 12) / 127.5 - 1, atol=1e-6)
    module = open_features(f"{user_module}:net", reference=x)
    torch.testing.assert_close(features_of(module, x), x.flatten(1) / 127.5 - 1)  # evaluation mode: no dropout
    assert module.hash != net.hash
    with pytest.raises(ConfigError, match=r"broken does not run on images of shape .*layer 3"):
        open_features(f"{user_module}:broken", reference=x)
    with pytest.raises(ConfigError, match=r"total does not return features\. Got: shape \[\]"):
        open_features(f"{user_module}:total", reference=x)
    with pytest.raises(ConfigError, match="not a function or a network"):
        open_features("fewstep.types:Batch", reference=x)


def test_images_of_another_size_than_the_reference_are_refused() -> None:
    for spec in ("pixels", "pca:3"):
        net = open_features(spec, reference=images(9))
        with pytest.raises(DataError, match="size"):
            features_of(net, images(3, side=6))


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("inceptoin", "Did you mean 'inception'"),
        ("pixls", "Did you mean 'pixels'"),
        ("mobilnet:weights.npz", "Did you mean 'mobilenet'"),
        ("no_such_module_here:net", r"neither a feature net .* nor an importable"),
        ("fewstep.types:nothing", "nor an importable 'fewstep.types:nothing'"),
        ("pixels:3", "takes no argument"),
        ("pca:0", "from 1 to 5"),
        ("pca:6", "from 1 to 5"),
        ("pca:two", "from 1 to 5"),
        ("mnist-cnn:", "needs the path of its weights"),
        ("mnist-cnn:/no/such/file", "does not exist"),
        ("torchscript:/no/such/file", "does not exist"),
    ],
)
def test_unusable_specs_are_one_clear_sentence(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_features(spec, reference=images(6))


@pytest.mark.parametrize("kind", ["mnist-cnn", "mobilenet", "torchscript"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 broken zip", b"\x93NUMPY\x01\x00"])
def test_damaged_weights_are_one_clear_sentence(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(FewstepError, match=r"The (weights )?file '.*weights' is n") as caught:
        open_features(f"{kind}:{path}", reference=images(6))
    assert isinstance(caught.value, CheckpointError if kind != "torchscript" else ConfigError)


def test_weights_of_another_net_are_refused(tmp_path: Path, shared: Path) -> None:
    np.savez(tmp_path / "other.npz", w=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"not that of MobileNetV1.*conv1"):
        open_features(f"mobilenet:{tmp_path / 'other.npz'}")
    np.savez(tmp_path / "objects.npz", w=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="no npz of plain arrays"):
        open_features(f"mobilenet:{tmp_path / 'objects.npz'}")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(CheckpointError, match="no npz of plain arrays"):
        open_features(f"mobilenet:{tmp_path / 'array.npy'}")
    with pytest.raises(CheckpointError, match="not that of the MNIST CNN"):
        open_features(f"mnist-cnn:{shared / 'data/teachers/ddpm_cnn_mnist_yichizz.safetensors'}")


def test_a_reference_is_asked_for_by_name() -> None:
    for kind in ("pixels", "pca:3"):
        with pytest.raises(DataError, match=f"{kind.split(':')[0]} needs reference samples"):
            open_features(kind)
    with pytest.raises(DataError, match="no images"):
        features_of(open_features("pixels", reference=images(2)), images(0))
    with pytest.raises(DataError, match="neither images nor points"):
        open_features("pixels", reference=images(3)).extract(images(3).long())


def test_nan_points_are_refused_and_counted() -> None:
    cloud = points(9, 3)
    net = open_features("pca:2", reference=cloud)
    cloud[2, 1], cloud[5] = float("nan"), float("inf")
    with pytest.raises(DataError, match=r"Samples are NaN or infinite\. Got: 2 of 9 samples"):
        features_of(net, cloud)
    with pytest.raises(DataError, match=r"Got: 2 of 9 samples"):
        open_features("pixels", reference=cloud)
    broken = dataclasses.replace(net, extract=lambda x: x[:, :2] * float("inf"))
    with pytest.raises(DataError, match="PCA2 returned features that are NaN or infinite"):
        features_of(broken, points(4, 3))


def test_a_constant_reference_is_refused_but_constant_samples_are_measured() -> None:
    for reference in (torch.full((5, 3, 8, 8), 7, dtype=torch.uint8), torch.ones(4, 2)):
        with pytest.raises(DataError, match=rf"all the same\. Got: {len(reference)} equal samples"):
            open_features("pixels", reference=reference)
    net = open_features("pca:2", reference=images(6))
    collapsed = images(1).expand(5, -1, -1, -1)
    assert features_of(net, collapsed).std(0).max() < 1e-5  # a collapsed model is a finding, not bad input


def test_opening_a_net_draws_no_random_numbers(shared: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for spec in (f"mnist-cnn:{shared / MNIST_CNN}", f"mobilenet:{shared / MOBILENET}"):
        open_features(spec)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_registry_is_what_the_message_lists() -> None:
    with pytest.raises(ConfigError, match=", ".join(FEATURES)):
        open_features("nothing")
