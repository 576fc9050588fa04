"""Networks of the user's own: frozen and tied weights, batch normalisation, checkpointing, and their way back in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep import Denoiser
from fewstep.backbones.edm import SongUNet
from fewstep.config import with_overrides
from fewstep.errors import CheckpointError, ConfigError
from fewstep.process import EDM, DiscreteVP
from fewstep.randomness import DropoutTape, Streams
from fewstep.recipes import RECIPES
from fewstep.times import Continuous

SETTINGS: dict[str, Any] = {
    "images": 64, "batch_size": 16, "eval.samples": 0, "output.sample_images": 0, "output.log_images": 16,
}  # fmt: skip


class Net(nn.Module):
    """Predicts noise of plane points; a frozen table, tied layers, optional extras."""

    def __init__(self, *, batch_norm: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(8), requires_grad=False)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(0.5 if recompute else 0.0)
        self.recompute = recompute
        self.out = nn.Linear(8, 2)

    def body(self, h: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.third(torch.tanh(self.second(h)))))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.first(torch.cat((x, t[:, None] / 1000), 1)) * self.table)
        h = checkpoint(self.body, h, use_reentrant=False) if self.recompute else self.body(h)
        return self.out(h)


def wrap(net: nn.Module) -> Denoiser:
    return Denoiser.from_module(net, process=DiscreteVP.linear(), prediction="eps", sample_shape=(2,))


def tune(net: nn.Module, out: Path, **settings: Any) -> fewstep.Run:
    overrides = SETTINGS | settings
    return fewstep.tune(wrap(net), "gaussians8", out=out, recipe="points", overrides=overrides, device="cpu")


def test_frozen_and_tied_weights_stay_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    run = tune(net, tmp_path / "run")
    tuned = fewstep.load(run.path, weights="student", network=wrap(net)).backbone.module
    assert torch.equal(tuned.table, net.table), "a frozen parameter was trained"
    assert not torch.equal(tuned.first.weight, net.first.weight), "nothing was trained"
    assert torch.equal(tuned.second.weight, tuned.third.weight)


def test_batch_normalisation_keeps_its_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(batch_norm=True)
    net.norm.running_mean.fill_(0.25)
    run = tune(net, tmp_path / "run")
    tuned = fewstep.load(run.path, weights="student", network=wrap(net)).backbone.module
    assert torch.equal(tuned.norm.running_mean, net.norm.running_mean)
    assert int(tuned.norm.num_batches_tracked) == 0


def test_dropout_recomputed_in_backward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recomputes dropout in its backward pass"):
        tune(Net(recompute=True), tmp_path / "run")
    tune(Net(recompute=True), tmp_path / "other", **{"student.dropout": 0.0})


def test_label_dropout_is_drawn_from_the_tape() -> None:
    torch.manual_seed(0)
    net = SongUNet(8, 1, 1, label_dim=3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(),
                   dropout=0.0, label_dropout=0.5).double().train()  # fmt: skip
    x, t, label = (
        torch.randn(16, 1, 8, 8).double(),
        torch.zeros(16).double(),
        torch.eye(3).double()[torch.arange(16) % 3],
    )
    tape = DropoutTape(Streams(0), torch.arange(16))
    with torch.no_grad(), tape.record():
        first = net(x, t, label)
    torch.manual_seed(1)
    with torch.no_grad(), tape.replay():
        again = net(x, t, label)
    assert torch.equal(first, again)
    with torch.no_grad():
        kept = net.eval()(x, t, label)
    changed = (first != kept).flatten(1).any(1)
    assert 0 < int(changed.sum()) < 16


def test_a_kind_does_not_undo_what_stands_before_it() -> None:
    changes = {"objective.schedule.q": 4, "objective.schedule.kind": "continuous"}
    assert with_overrides(RECIPES["fast"], changes).objective.schedule == Continuous(q=4)


def test_resume_without_the_teacher(tmp_path: Path) -> None:
    small = {"model.kwargs": {"width": 16, "depth": 1}} | SETTINGS
    fewstep.pretrain("gaussians8", out=tmp_path / "teacher", recipe="points-teacher", overrides=small, device="cpu")
    run = fewstep.tune(tmp_path / "teacher", "gaussians8", out=tmp_path / "run", recipe="points", overrides=SETTINGS,
                       device="cpu")  # fmt: skip
    (run.path / "report.html").unlink()
    shutil.rmtree(tmp_path / "teacher")
    fewstep.resume(run.path, device="cpu")
    assert (run.path / "report.html").is_file()


def test_resume_of_an_own_network_says_how(tmp_path: Path) -> None:
    run = tune(Net(), tmp_path / "run", teacher="mine.py:teacher")
    (run.path / "report.html").unlink()
    with pytest.raises(CheckpointError, match=r"--network file\.py:function"):
        fewstep.resume(run.path, device="cpu")


def test_paths_are_data_too(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    net = {"model.kwargs": {"channels": 8, "blocks": 1, "multipliers": [1]}}
    run = fewstep.pretrain(tmp_path, out=tmp_path / "out/run", overrides=SETTINGS | net, device="cpu")
    assert run.config.data.source == str(tmp_path.resolve())
    found = fewstep.evaluate(run.model(), tmp_path, steps=(1,), samples=8, metrics=("fd",))
    assert found["rows"][0]["nfe"] == 1


def test_the_tuned_model_lives_on_the_edm_clock(tmp_path: Path) -> None:
    assert tune(Net(), tmp_path / "run").model(network=wrap(Net())).process == EDM()
