"""Every process: conversions invert, clocks agree, and a denoiser on any clock is the same function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.checkpoint.model import describe, rebuild
from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.process import EDM, PREDICTIONS, PROCESSES, DiscreteVP, Process, expand

SIGMAS = torch.tensor([0.05, 0.3, 1.0, 5.0, 60.0], dtype=torch.float64)


def make(kind: str) -> Process:
    return DiscreteVP.linear() if kind == "discrete_vp" else PROCESSES[kind]()


@pytest.mark.parametrize("kind", PROCESSES)
class TestProcess:
    def test_round_trip_of_the_configuration(self, kind: str) -> None:
        process = make(kind)
        assert process.kind == kind
        assert from_dict(PROCESSES[kind], to_dict(process)) == process

    def test_clock_inverts(self, kind: str) -> None:
        process = make(kind)
        t = process.from_edm(SIGMAS)
        torch.testing.assert_close(process.to_edm(t), SIGMAS, rtol=1e-9, atol=0)
        torch.testing.assert_close(process.sigma(t) / process.alpha(t), SIGMAS, rtol=1e-9, atol=0)
        torch.testing.assert_close(process.edm_scale(SIGMAS), process.alpha(t), rtol=1e-9, atol=0)

    def test_perturb_and_jump_stay_on_the_ray(self, kind: str) -> None:
        process, generator = make(kind), torch.Generator().manual_seed(0)
        x, eps = torch.randn(2, len(SIGMAS), 3, generator=generator, dtype=torch.float64)
        t = process.from_edm(SIGMAS)
        x_t = process.perturb(x, eps, t)
        assert x_t.shape == x.shape
        torch.testing.assert_close(x_t, expand(process.alpha(t), x) * x + expand(process.sigma(t), x) * eps)
        s = process.from_edm(SIGMAS / 3)
        torch.testing.assert_close(process.jump(x_t, x, t, s), process.perturb(x, eps, s), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
    def test_predictions_convert_to_x0_and_back(self, kind: str, prediction: str) -> None:
        process, generator = make(kind), torch.Generator().manual_seed(0)
        x, eps = torch.randn(2, len(SIGMAS), 3, generator=generator, dtype=torch.float64)
        t = process.from_edm(SIGMAS)
        x_t = process.perturb(x, eps, t)
        value = process.convert(x, "x0", prediction, x_t, t)
        torch.testing.assert_close(process.convert(value, prediction, "x0", x_t, t), x, rtol=1e-8, atol=1e-8)

    def test_a_denoiser_is_the_same_on_its_own_clock_and_edms(self, kind: str) -> None:
        torch.manual_seed(0)
        process, network = make(kind), nn.Linear(3, 3).double()
        own = Denoiser.from_module(_Plain(network), process=process, prediction="eps", sample_shape=(3,))
        other = own.under(EDM())
        x = torch.randn(len(SIGMAS), 3, dtype=torch.float64)
        got = other(x, SIGMAS)
        want = own(expand(process.edm_scale(SIGMAS), x) * x, process.from_edm(SIGMAS))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)

    def test_a_model_directory_describes_it(self, kind: str) -> None:
        spec = {"name": "mlp", "kwargs": {"sample_shape": [2], "width": 8, "depth": 1}}
        from fewstep.backbones import build

        process = make(kind)
        model = Denoiser(build(spec), process, Parametrization("v", time="native"), sample_shape=(2,), spec=spec)
        back = rebuild(describe(model), "here")
        assert (back.process, back.native, back.parametrization) == (process, process, model.parametrization)
        assert describe(back) == describe(model)
        moved = rebuild(describe(model.under(EDM())), "here")
        assert (moved.process, moved.native) == (EDM(), process)


class _Plain(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.network(x)
