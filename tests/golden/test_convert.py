"""From a peer's file to a denoiser: EDM2 snapshots and ADM networks, and what of them does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import EDM, Denoiser, Parametrization, load
from fewstep.backbones.layout import LocalDropout
from fewstep.checkpoint.convert import convert, denoiser_of
from fewstep.checkpoint.edm_pickle import NetworkRecord, read_network
from fewstep.errors import CheckpointError

FILE = Path("network.pkl")
ADM = "adm_cond_augment"


@pytest.fixture
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture
def expected(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "edm2_snapshot_expected.npz", allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


@pytest.fixture
def edm2(golden: Path) -> NetworkRecord:
    return read_network(golden / "edm2_snapshot.pkl")


@pytest.fixture
def adm(golden: Path) -> tuple[NetworkRecord, dict[str, np.ndarray]]:
    """An EDM snapshot with ADM inside, and the peer's numbers for it; the peer wrote no such file."""
    with np.load(golden / "networks.npz", allow_pickle=False) as stored:
        found = {k.removeprefix(f"{ADM}/"): stored[k] for k in stored.files if k.startswith(f"{ADM}/")}
    kwargs = json.loads(str(found["kwargs_json"]))
    kind, channels = kwargs.pop("model_type"), kwargs.pop("img_channels")
    record = replace(
        read_network(golden / "edm_snapshot.pkl"),
        model_class=kind,
        model_kwargs=kwargs | {"in_channels": channels, "out_channels": channels},
        precond_kwargs={"img_resolution": 8, "img_channels": channels, "label_dim": 5, "sigma_data": 0.5},
        state={k.removeprefix("w/model."): torch.from_numpy(v) for k, v in found.items() if k.startswith("w/")},
    )
    return record, found


def denoised(model: Denoiser, arrays: dict[str, np.ndarray], *, labels: bool) -> Tensor:
    """D in float64 at the README's noisy input, which the peer computed in float32."""
    sigma = arrays["sigma"].astype(np.float64).reshape(-1, 1, 1, 1)
    noisy = arrays["x"] * np.sqrt(sigma**2 + 0.25).astype(np.float32)
    cond = torch.from_numpy(arrays["class_labels"]).double() if labels else None
    with torch.no_grad():
        return model.double()(torch.from_numpy(noisy).double(), torch.from_numpy(sigma).flatten(), cond)


def test_edm2_comes_out_in_float32_under_its_own_names(
    golden: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    converted = convert(golden / "edm2_snapshot.pkl", tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.spec == converted.spec
    assert (model.spec or {})["name"] == "edm2"
    assert (model.process, model.native, model.parametrization) == (EDM(), EDM(), Parametrization("edm", 0.5))
    assert (model.sample_shape, model.num_classes, model.sigma_max) == ((3, 8, 8), 5, 80.0)
    assert model.value_range == (-1.0, 1.0)
    state, stored = model.backbone.state_dict(), {k[2:]: v for k, v in expected.items() if k.startswith("w/")}
    assert state.keys() == stored.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, torch.from_numpy(stored[name]).float()), name
    provenance = json.loads((tmp_path / "model" / "config.json").read_text())["provenance"]
    assert (provenance["preconditioner"], provenance["network"]) == ("Precond", "UNet")


def test_edm2_denoises_as_the_peer_does(edm2: NetworkRecord, expected: dict[str, np.ndarray]) -> None:
    got, want = denoised(denoiser_of(edm2, FILE), expected, labels=True), torch.from_numpy(expected["D_f64"])
    for row in range(len(want)):
        assert float((got[row] - want[row]).abs().max() / want[row].abs().max()) < 1e-9


def test_adm_denoises_as_the_peer_does(adm: tuple[NetworkRecord, dict[str, np.ndarray]]) -> None:
    record, found = adm
    model = denoiser_of(record, FILE)
    assert (model.spec or {})["name"] == "adm"
    assert (model.sample_shape, model.num_classes) == ((3, 8, 8), 5)
    sigma = torch.from_numpy(found["sigma"]).double()
    noisy = torch.from_numpy(found["x"]).double() * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    with torch.no_grad():
        got = model.double()(noisy, sigma)
    want = torch.from_numpy(found["D_edm_nolabel_f64"])
    assert float((got - want).abs().max() / want.abs().max()) < 1e-9


def test_ects_own_snapshots_of_edm2_networks(edm2: NetworkRecord, expected: dict[str, np.ndarray]) -> None:
    """They have no log-variance, and dropout up to a resolution."""
    told = {"dropout": 0.4, "dropout_res": 4}
    model = denoiser_of(replace(edm2, precond_state={}, model_kwargs=edm2.model_kwargs | told), FILE)
    assert not [name for name in model.backbone.state_dict() if "logvar" in name]
    layers = [layer for layer in model.modules() if isinstance(layer, LocalDropout)]
    assert {(layer.resolution, layer.p) for layer in layers} == {(8, 0.0), (4, 0.4)}
    got, want = denoised(model, expected, labels=True), torch.from_numpy(expected["D_f64"])
    assert float((got - want).abs().max() / want.abs().max()) < 1e-9


def spoiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two tensors missing, two too many, two of another shape."""
    first, second, third, fourth = [name for name, tensor in state.items() if tensor.ndim > 1][:4]
    kept = {name: tensor for name, tensor in state.items() if name not in (first, second)}
    misshaped = {third: state[third][:-1], fourth: state[fourth][None]}
    return kept | misshaped | {"left.over": state[first], "odd.one": state[first]}


@pytest.mark.parametrize("kind", ["adm", "edm2"])
def test_every_tensor_that_does_not_fit_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    found: Any = request.getfixturevalue(kind)
    record: NetworkRecord = found[0] if kind == "adm" else found
    state, prefix = record.state, "unet." if kind == "edm2" else ""
    wrong = spoiled(state)
    with pytest.raises(CheckpointError) as caught:
        denoiser_of(replace(record, state=wrong), FILE)
    says = str(caught.value)
    missing, unexpected, misshaped = (says.index(word) for word in ("missing: ", "unexpected: ", "of another shape: "))
    assert missing < unexpected < misshaped
    for name in state.keys() - wrong.keys():
        assert missing < says.index(prefix + name) < unexpected
    for name in wrong.keys() - state.keys():
        assert unexpected < says.index(prefix + name) < misshaped
    changed = [name for name in state.keys() & wrong.keys() if state[name].shape != wrong[name].shape]
    assert len(changed) == 2
    for name in changed:
        own = f"{prefix}{name} {tuple(wrong[name].shape)} instead of {tuple(state[name].shape)}"
        assert misshaped < says.index(own)


def test_a_model_of_latents_is_refused(edm2: NetworkRecord) -> None:
    with pytest.raises(CheckpointError, match=r"model of latents \(of EDM2's StabilityVAEEncoder\).*pixel model"):
        denoiser_of(replace(edm2, encoder_class="StabilityVAEEncoder"), FILE)


def test_networks_in_preconditioners_that_they_do_not_belong_to(edm2: NetworkRecord) -> None:
    with pytest.raises(CheckpointError, match=r"holds a SongUNet in a Precond.*Wanted: UNet"):
        denoiser_of(replace(edm2, model_class="SongUNet"), FILE)
    with pytest.raises(CheckpointError, match=r"holds a UNet in a EDMPrecond.*Wanted: SongUNet or DhariwalUNet"):
        denoiser_of(replace(edm2, precond_class="EDMPrecond"), FILE)
