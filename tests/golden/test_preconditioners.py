"""EDM, ECM, VP and VE preconditioning as Denoisers, against the peers' own classes (shared/golden/networks.npz)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.adm import ADM
from fewstep.backbones.edm import SongUNet
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.process import EDM, VP, Process

CASES = (
    "ddpmpp", "ddpmpp_cond_augment", "ncsnpp", "ncsnpp_cond_augment", "ddpmpp_skip",
    "adm", "adm_cond_augment", "adm_two_heads",
)  # fmt: skip
KINDS = {"SongUNet": SongUNet, "DhariwalUNet": ADM}
PRECONDITIONERS: dict[str, tuple[Process, Parametrization, bool, bool]] = {
    # name: (native process, parametrization, training mode, augment labels given)
    "D_edm": (EDM(), Parametrization("edm"), False, True),
    "D_edm_nolabel": (EDM(), Parametrization("edm"), False, False),
    "D_ecm_train": (EDM(), Parametrization("edm", boundary_shift=0.003), True, True),
    "D_ecm_eval": (EDM(), Parametrization("edm", boundary_shift=0.003), False, True),
    "D_vp": (VP(), Parametrization("eps", time="thousand_minus_one"), False, True),
    "D_ve": (EDM(), Parametrization("sigma_score", time="half_log"), False, True),
}


class Augmented(nn.Module):
    """The network with fixed augmentation labels."""

    def __init__(self, net: nn.Module, augment: Tensor | None) -> None:
        super().__init__()
        self.net, self.augment = net, augment

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.net(x, c_noise, cond, augment=self.augment)


PAIRS = [(c, w) for c in CASES for w in PRECONDITIONERS if w != "D_edm_nolabel" or "cond" in c]


@pytest.mark.parametrize(("case", "what"), PAIRS)
def test_denoisers_match_the_peers(shared: Path, case: str, what: str) -> None:
    with np.load(shared / "golden" / "networks.npz", allow_pickle=False) as stored:
        arrays = {k.removeprefix(f"{case}/"): stored[k] for k in stored.files if k.startswith(f"{case}/")}
    kwargs = json.loads(str(arrays["kwargs_json"]))
    kind, channels = KINDS[kwargs.pop("model_type")], kwargs.pop("img_channels")
    net = kind(in_channels=channels, out_channels=channels, **kwargs).double()
    head = "w/model."
    net.load_state_dict({k[len(head) :]: torch.from_numpy(v).double() for k, v in arrays.items() if k.startswith(head)})
    native, parametrization, training, augmented = PRECONDITIONERS[what]
    augment = torch.from_numpy(arrays["augment_labels"]).double() if augmented and "augment_labels" in arrays else None
    x, sigma = (torch.from_numpy(arrays[k]).double() for k in ("x", "sigma"))
    denoiser = Denoiser(
        Augmented(net, augment),
        EDM(),
        parametrization,
        native=native,
        sample_shape=tuple(x.shape[1:]),
        num_classes=kwargs.get("label_dim", 0),
    ).train(training)
    cond = (
        torch.from_numpy(arrays["class_labels"]).double() if what != "D_edm_nolabel" and denoiser.num_classes else None
    )
    with torch.no_grad():
        got = denoiser(x * (sigma**2 + 0.25).sqrt()[:, None, None, None], sigma, cond)
    want = torch.from_numpy(arrays[f"{what}_f64"])
    assert float((got - want).abs().max() / want.abs().max()) < 1e-9
