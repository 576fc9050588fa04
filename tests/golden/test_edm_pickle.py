"""EDM and ECT pickles: class, arguments, weights and outputs equal the peers', and nothing in them ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.backbones.edm import SongUNet
from fewstep.checkpoint.edm_pickle import NetworkRecord, read_network, read_pickle, require_supported
from fewstep.checkpoint.inert import Opaque, Persistent
from fewstep.errors import CheckpointError

TRIPWIRE = Path("/tmp/fewstep_pwned")
SNAPSHOTS = {
    "edm_snapshot.pkl": "edm_snapshot_expected.npz",
    "edm_snapshot_numpy1.pkl": "edm_snapshot_expected.npz",
    "ect_snapshot.pkl": "ect_snapshot_expected.npz",
}
LOOP_PKL = "ect_loop_network-snapshot-000001.pkl"
LOOP_PT = "ect_loop_training-state-000001.pt"
LOOP_EXPECTED = "ect_loop_expected.npz"


@pytest.fixture(autouse=True)
def _nothing_embedded_ran() -> Iterator[None]:
    assert not TRIPWIRE.exists(), f"{TRIPWIRE} is left from an earlier execution; remove it"
    yield
    assert not TRIPWIRE.exists(), "source text embedded in a pickle was executed"


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def assert_bit_equal(state: dict[str, Tensor], expected: dict[str, np.ndarray]) -> None:
    """Same names, shapes and values (the arrays may be stored in a shorter type that is exact)."""
    assert sorted(state) == sorted(expected)
    for name, tensor in state.items():
        wanted = torch.from_numpy(expected[name].copy()).to(tensor.dtype)
        assert tensor.shape == wanted.shape, name
        assert torch.equal(tensor, wanted), name
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def below(values: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def denoise(record: NetworkRecord, x: np.ndarray, sigma: np.ndarray, labels: np.ndarray | None) -> Tensor:
    """D(x, sigma) in float64, math.md 1.3; ECMPrecond in eval mode shifts by sigma_min."""
    network = SongUNet(**record.model_kwargs)
    network.load_state_dict(record.state, strict=True)
    network.double().eval()
    sd = record.precond_kwargs["sigma_data"]
    shift = record.precond_kwargs["sigma_min"] if record.precond_class == "ECMPrecond" else 0.0
    noisy = torch.from_numpy(x).double()
    s = torch.from_numpy(sigma).double().view(-1, 1, 1, 1)
    c_skip = sd**2 / ((s - shift) ** 2 + sd**2)
    c_out = (s - shift) * sd / (s**2 + sd**2).sqrt()
    cond = None if labels is None else torch.from_numpy(labels).double()
    with torch.no_grad():
        raw = network(noisy / (s**2 + sd**2).sqrt(), s.flatten().log() / 4, cond)
    return c_skip * noisy + c_out * raw


def noisy_input(expected: dict[str, np.ndarray]) -> np.ndarray:
    """The README's noisy input x * sqrt(sigma^2 + 0.25): the peer rounded factor and product to float32."""
    sigma = expected["sigma"].astype(np.float64).reshape(-1, 1, 1, 1)
    return expected["x"] * np.sqrt(sigma**2 + 0.25).astype(np.float32)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_class_and_arguments(golden: Path, name: str) -> None:
    expected = arrays(golden / SNAPSHOTS[name])
    record = read_network(golden / name)
    arguments = json.loads(str(expected["init_kwargs_json"]))
    assert record.precond_class == str(expected["class_name"])
    assert record.model_class == arguments.pop("model_type")
    channels = arguments.pop("img_channels")
    assert record.precond_kwargs["img_channels"] == channels
    assert record.precond_kwargs["label_dim"] == arguments["label_dim"]
    assert record.precond_kwargs["img_resolution"] == arguments["img_resolution"]
    assert record.precond_kwargs["sigma_data"] == 0.5
    assert record.precond_kwargs["sigma_min"] == (0.003 if record.precond_class == "ECMPrecond" else 0)
    assert record.model_kwargs == {**arguments, "in_channels": channels, "out_channels": channels}
    assert json.loads(json.dumps(record.model_kwargs)) == record.model_kwargs


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_weights_are_bit_equal(golden: Path, name: str) -> None:
    record = read_network(golden / name)
    assert_bit_equal(record.state, below(arrays(golden / SNAPSHOTS[name]), "w/model."))
    assert record.precond_state == {}
    assert record.optimizer_state is None


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_denoiser_output_is_the_peers(golden: Path, name: str) -> None:
    expected = arrays(golden / SNAPSHOTS[name])
    record = read_network(golden / name)
    wanted = torch.from_numpy(expected["D_f64"])
    got = denoise(record, noisy_input(expected), expected["sigma"], expected.get("class_labels"))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_snapshot_and_training_state_of_the_peers_loop(golden: Path) -> None:
    expected = arrays(golden / LOOP_EXPECTED)
    ema, net = read_network(golden / LOOP_PKL), read_network(golden / LOOP_PT, which="net")
    assert_bit_equal(ema.state, below(expected, "ema/model."))
    assert_bit_equal(net.state, below(expected, "net/model."))
    assert ema.precond_class == net.precond_class == "ECMPrecond"
    assert ema.model_class == net.model_class == "SongUNet"
    assert ema.model_kwargs == net.model_kwargs
    weight = "enc.8x8_conv.weight"
    assert not torch.equal(ema.state[weight], net.state[weight])


def test_loop_ema_output(golden: Path) -> None:
    """Stored in float32 only, at ``x`` itself."""
    expected = arrays(golden / LOOP_EXPECTED)
    wanted = torch.from_numpy(expected["D_ema_f32"]).double()
    record = read_network(golden / LOOP_PKL)
    got = denoise(record, expected["x"], expected["sigma"], None)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_optimizer_state_is_bit_equal(golden: Path) -> None:
    expected = arrays(golden / LOOP_EXPECTED)
    state = read_network(golden / LOOP_PT, which="net").optimizer_state
    assert state is not None
    names = [str(name).removeprefix("model.") for name in expected["parameter_names"]]
    assert list(state) == names
    for name, slot in state.items():
        assert float(slot["step"]) == float(expected["opt_step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(slot[key], torch.from_numpy(expected[f"opt/model.{name}/{key}"])), name


def test_edm2_is_read(golden: Path) -> None:
    path = golden / "edm2_snapshot.pkl"
    expected = below(arrays(golden / "edm2_snapshot_expected.npz"), "w/")
    record = read_network(path)
    assert (record.precond_class, record.model_class) == ("Precond", "UNet")
    assert record.encoder_class == "StandardRGBEncoder"
    assert_bit_equal(record.state, below(expected, "unet."))
    assert_bit_equal(record.precond_state, {k: v for k, v in expected.items() if not k.startswith("unet.")})
    assert {tensor.dtype for tensor in record.state.values()} == {torch.float16}
    with pytest.raises(CheckpointError, match=r"Precond \(a network of EDM2\).*cannot be converted yet"):
        require_supported(record, {"EDMPrecond", "ECMPrecond"}, path)
    require_supported(record, {"Precond"}, path)


def test_what_is_not_the_network_stays_inert(golden: Path) -> None:
    tree = read_pickle(golden / "edm_snapshot.pkl")
    assert isinstance(tree, dict)
    loss, pipe = tree["loss_fn"], tree["augment_pipe"]
    assert isinstance(loss, Persistent)
    assert isinstance(pipe, Persistent)
    assert (loss.class_name, pipe.class_name) == ("ECMLoss", "AugmentPipe")
    assert str(TRIPWIRE) in loss.source, "the embedded source is kept as text"
    method = loss.state["t_to_r"]
    assert isinstance(method, Opaque)
    assert method.name == "builtins.getattr"
    assert method.args[1] == "t_to_r_sigmoid"
    assert pipe.init_kwargs["p"] == 0.12  # type: ignore[index]


def test_the_error_names_the_networks_there_are(golden: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no network called 'ema'.*Known: net"):
        read_network(golden / LOOP_PT)


@pytest.mark.parametrize("name", [*SNAPSHOTS, LOOP_PKL, LOOP_PT, "edm2_snapshot.pkl"])
def test_every_truncation_is_one_clear_sentence(golden: Path, tmp_path: Path, name: str) -> None:
    raw = (golden / name).read_bytes()
    for twentieth in range(20):
        path = tmp_path / name
        path.write_bytes(raw[: len(raw) * twentieth // 20])
        with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint: it.*Check that"):
            read_network(path, which="net" if name == LOOP_PT else "ema")


@pytest.mark.parametrize("name", ["ect_snapshot.pkl", LOOP_PT])
def test_damaged_bytes_never_end_in_another_exception(golden: Path, tmp_path: Path, name: str) -> None:
    raw = (golden / name).read_bytes()
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(40):
        damaged = bytearray(raw)
        for position in rng.integers(0, len(raw), 20):
            damaged[position] = rng.integers(0, 256)
        path = tmp_path / name
        path.write_bytes(damaged)
        try:
            read_network(path, which="net" if name == LOOP_PT else "ema")
        except CheckpointError:
            refused += 1
    assert refused >= 20
