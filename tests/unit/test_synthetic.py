"""A model's own samples: their law in closed form, by number alone, in shards and on the fly, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Parametrization, RectifiedFlow, ode_sample
from fewstep.conditioning import Part
from fewstep.data import View, decode, open_source
from fewstep.data.shards import ShardWriter, open_shards
from fewstep.errors import ConfigError, DataError
from fewstep.randomness import Streams
from fewstep.training.synthetic import DIFFERENT, Sampler, TeacherSource, generate, origin, own_samples, standing

T, SD = 80.0, 0.5
MANY = 401
"""Evaluations that leave Heun's error, of second order, below 1e-3 of the standard deviation."""

MEANS = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.5, 0.5]])


class Gaussian(nn.Module):
    """eps of N(m_c, SD^2), exactly: ``(x - m) sigma/(sigma^2 + SD^2)``; no class is the mean 0.

    ``mix`` adds a little of the batch's mean, so that results tell which samples were made together.
    """

    def __init__(self, conditional: bool, mix: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout, self.conditional, self.mix = nn.Dropout(0.5), conditional, mix

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        mean = label @ MEANS.to(label) if self.conditional and label is not None else torch.zeros_like(x[:1])
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        eps = (x - mean) * sigma / (sigma**2 + SD**2) * self.scale
        return self.dropout(eps + self.mix * x.mean())


def teacher(conditional: bool = False, mix: float = 0.0, shape: tuple[int, ...] = (2,), **more: object) -> Denoiser:
    return Denoiser.from_module(
        Gaussian(conditional, mix), process=EDM(), prediction="eps", sample_shape=shape,
        num_classes=3 if conditional else 0, **more,  # type: ignore[arg-type]
    ).eval()  # fmt: skip


def changed(model: Denoiser) -> Denoiser:
    next(model.parameters()).data.fill_(1.01)
    return model


def exact(index: np.ndarray, seed: int, mean: Tensor | float = 0.0, shape: tuple[int, ...] = (2,)) -> Tensor:
    """Where the probability-flow ODE ends: ``m + (T z - m) SD / sqrt(SD^2 + T^2)``."""
    z = Streams(seed).normal("synthetic/latent", torch.from_numpy(index), shape)
    return mean + (T * z - mean) * SD / math.sqrt(SD**2 + T**2)


# ---- the samples


def test_samples_are_where_the_ode_ends() -> None:
    index = np.array([5, 0, 2**21, 7])
    found = Sampler(teacher(), MANY, seed=3).samples(index)
    assert (found - exact(index, 3)).abs().max() < 1e-3
    assert (Sampler(teacher(), 10, seed=3).samples(index) - exact(index, 3)).abs().max() > 2e-2  # Euler, and few


@pytest.mark.parametrize("weight", [None, 1.0, 2.5])
def test_sample_i_has_class_i_mod_the_classes_and_its_guidance(weight: float | None) -> None:
    """The guided denoiser of these classes is that of a Gaussian around w times the mean."""
    index = np.arange(7, 14)
    sampler = Sampler(teacher(True), MANY, guidance=weight)
    classes = sampler.labels(index)
    assert classes is not None
    assert classes.tolist() == [1, 2, 0, 1, 2, 0, 1]
    expected = exact(index, 0, MEANS[classes] * (1.0 if weight is None else weight))
    assert (sampler.samples(index) - expected).abs().max() < 2e-3


def test_evaluations_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = Gaussian.forward

    def counted(self: Gaussian, x: Tensor, *more: Tensor) -> Tensor:
        calls.append(len(x))
        return forward(self, x, *more)

    monkeypatch.setattr(Gaussian, "forward", counted)
    for nfe in (1, 2, 8, 35):
        calls.clear()
        Sampler(teacher(), nfe, batch_size=3).samples(np.arange(5))
        assert calls == [3] * nfe + [2] * nfe


def test_a_sample_depends_on_its_number_alone() -> None:
    sampler = Sampler(teacher(True), 5, seed=1)
    whole = sampler.samples(np.arange(20))
    index = np.array([19, 3, 3, 0, 12])
    assert torch.equal(sampler.samples(index), whole[index])
    assert torch.equal(Sampler(teacher(True), 5, seed=1, batch_size=3).samples(np.arange(20)), whole)
    assert not torch.equal(Sampler(teacher(True), 5, seed=2).samples(np.arange(20)), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 20


def test_an_evaluation_with_the_same_seed_draws_others() -> None:
    made = Sampler(teacher(), 35).samples(np.arange(50))
    drawn = ode_sample(teacher(), 50, steps=18)
    assert torch.cdist(made, drawn).min() > 1e-3


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_pixels_are_kept_as_bytes_by_their_range(low: float) -> None:
    sampler = Sampler(teacher(shape=(1, 4, 4), value_range=(low, 1.0)), MANY)
    x = sampler.samples(np.arange(6))
    assert x.dtype == torch.uint8
    expected = decode(exact(np.arange(6), 0, shape=(1, 4, 4)), (low, 1.0))
    assert (x.int() - expected.int()).abs().max() <= 1
    assert x.float().std() > 30


def test_latents_are_kept_as_they_are() -> None:
    latents = teacher(shape=(4, 2, 2))
    latents.codec = object()  # type: ignore[assignment]
    x = Sampler(latents, MANY).samples(np.arange(6))
    assert x.dtype == torch.float32
    assert (x - exact(np.arange(6), 0, shape=(4, 2, 2))).abs().max() < 2e-3


# ---- kept in shards


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_the_samples_their_classes_and_what_they_are(tmp_path: Path) -> None:
    shards = generate(teacher(True), tmp_path / "s", 20, nfe=5, seed=4, guidance=2, batch_size=6)
    sampler = Sampler(teacher(True), 5, 4, 2.0)
    assert torch.equal(shards.read("x", np.arange(20)), sampler.samples(np.arange(20)))
    assert shards.read("label", np.arange(20)).tolist() == [i % 3 for i in range(20)]
    known = {"nfe": 5, "seed": 4, "guidance": 2, "solver": "heun", "num_classes": 3, "sigma_max": T}
    assert {name: shards.key[name] for name in known} == known
    source = open_source(str(tmp_path / "s"))
    assert (source.name, source.shape, source.num_classes, source.is_images) == (f"shards:{tmp_path}/s", (2,), 3, False)
    assert torch.equal(source.read(np.array([7])), sampler.samples(np.array([7])))


def test_all_classes_are_known_even_if_few_were_drawn(tmp_path: Path) -> None:
    generate(teacher(True), tmp_path / "s", 2, nfe=1)
    source = open_source(str(tmp_path / "s"))
    assert source.labels is not None
    assert (source.labels.tolist(), source.num_classes) == ([0, 1], 3)
    assert open_source(str(tmp_path / "s"), labels=False).num_classes == 0


class Stop(Exception):
    """A stop from inside."""


def stopping(at: int) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        if done >= at:
            raise Stop

    return told


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("at", [0, 6, 13, 29])
def test_stopped_anywhere_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, killed: bool
) -> None:
    """Killed: only full shards remain, which end within a batch; samples know which others they were made with."""
    monkeypatch.setattr("fewstep.data.shards.SHARD_BYTES", 8 * 10)
    model = teacher(mix=0.01)
    generate(model, tmp_path / "once", 32, nfe=3, batch_size=6)
    with monkeypatch.context() as patch:
        if killed:
            patch.setattr(ShardWriter, "__exit__", lambda self, *error: self._unlock())
        with pytest.raises(Stop):
            generate(model, tmp_path / "often", 32, nfe=3, batch_size=6, on_progress=stopping(at))
    begun = ShardWriter(tmp_path / "often", Sampler(model, 3).key, 32).done
    assert begun == (at + -at % 6) // (10 if killed else 1) * (10 if killed else 1)
    generate(model, tmp_path / "often", 32, nfe=3, batch_size=6)
    assert files(tmp_path / "often") == files(tmp_path / "once")


def test_a_larger_number_extends_a_set(tmp_path: Path) -> None:
    first = generate(teacher(), tmp_path / "s", 10, nfe=1).fingerprint
    told: list[tuple[int, int]] = []
    more = generate(teacher(), tmp_path / "s", 25, nfe=1, batch_size=10, on_progress=lambda *both: told.append(both))
    assert told == [(10, 25), (20, 25), (25, 25)]
    assert torch.equal(more.read("x", np.arange(25)), Sampler(teacher(), 1).samples(np.arange(25)))
    assert more.fingerprint != first


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "seed 0. Wanted: seed 1"), ({"nfe": 5}, "nfe 3. Wanted: nfe 5"),
     ({"guidance": 2.0}, "guidance None. Wanted: guidance 2.0")],
)  # fmt: skip
def test_other_settings_do_not_go_on(tmp_path: Path, change: dict[str, float], message: str) -> None:
    generate(teacher(True), tmp_path / "s", 4, nfe=3)
    with pytest.raises(DataError, match=f"was made with other settings. Got: {message}"):
        generate(teacher(True), tmp_path / "s", 8, **({"nfe": 3} | change))  # type: ignore[arg-type]


def test_another_teacher_does_not_go_on(tmp_path: Path) -> None:
    generate(teacher(), tmp_path / "s", 4, nfe=3)
    other = changed(teacher())
    with pytest.raises(
        DataError, match=r"was made with other settings\. Got: teacher '[0-9a-f]{64}'\. Wanted: teacher"
    ):
        generate(other, tmp_path / "s", 8, nfe=3)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.with_parametrization(replace(m.parametrization, prediction="trig")),
        lambda m: m.with_parametrization(replace(m.parametrization, sigma_data=0.7)),
        lambda m: setattr(m, "sigma_min", 0.01),
        lambda m: setattr(m, "value_range", (0.0, 1.0)),
        lambda m: setattr(m, "native", RectifiedFlow()),
        lambda m: setattr(m, "spec", {"name": "other", "kwargs": {"heads": 2}}),
        lambda m: setattr(m, "codec", SimpleNamespace(description={"folder": "a", "sha256": "0"})),
    ],
)
def test_the_same_weights_in_another_meaning_do_not_go_on(
    tmp_path: Path, change: Callable[[Denoiser], Denoiser | None]
) -> None:
    model, other = teacher(), teacher()
    other = change(other) or other
    assert Sampler(model).key == Sampler(teacher()).key
    generate(model, tmp_path / "s", 4, nfe=3)
    with pytest.raises(DataError, match=r"other settings\. Got: meaning '[0-9a-f]{64}'\. Wanted: meaning '"):
        generate(other, tmp_path / "s", 8, nfe=3)
    assert TeacherSource(model, "cpu").fingerprint != TeacherSource(other, "cpu").fingerprint


def test_where_the_vae_is_means_nothing() -> None:
    keys = []
    for folder, sha256 in (("a", "0"), ("b", "0"), ("a", "1")):
        model = teacher(shape=(4, 2, 2))
        vars(model)["codec"] = SimpleNamespace(description={"folder": folder, "sha256": sha256})
        keys.append(Sampler(model).key)
    assert keys[0] == keys[1] != keys[2]


def test_modes_are_as_before(tmp_path: Path) -> None:
    """Dropout is off while samples are made, and on again afterwards where it was on."""
    model = teacher()
    frozen = model.clone()
    model.train()
    model.backbone.training = False
    modes = [module.training for module in model.modules()]
    made = generate(model, tmp_path / "s", 8, nfe=3).read("x", np.arange(8))
    assert torch.equal(made, Sampler(frozen, 3).samples(np.arange(8)))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ConfigError):
        generate(model, tmp_path / "s", 8, nfe=0)
    assert [module.training for module in model.modules()] == modes == [True, False, True, True]


# ---- made when needed


def test_a_row_is_what_the_shards_hold(tmp_path: Path) -> None:
    shards = generate(teacher(True), tmp_path / "s", 30, nfe=5, seed=2)
    source = TeacherSource(teacher(True), "cpu", nfe=5, seed=2)
    index = np.array([29, 0, 11])
    assert torch.equal(source.read(index), shards.read("x", index))
    assert source.labels is not None
    assert source.labels[index].tolist() == shards.read("label", index).tolist()
    assert (len(source), source.num_classes, source.name, source.shape) == (DIFFERENT, 3, "teacher:5", (2,))
    assert len(source.labels) == DIFFERENT


def test_it_has_a_network_of_its_own() -> None:
    """Neither training mode nor training of the network it was given shows."""
    model = teacher()
    source = TeacherSource(model, "cpu", nfe=3)
    before = source.read(np.arange(5))
    model.train()
    next(model.parameters()).data.fill_(2.0)
    assert torch.equal(source.read(np.arange(5)), before)
    assert not any(p.requires_grad for p in source.sampler.teacher.parameters())


def test_the_fingerprint_follows_what_the_samples_depend_on() -> None:
    def of(nfe: int = 3, seed: int = 0, scale: float = 1.0, labels: bool = True) -> str:
        model = teacher(True)
        next(model.parameters()).data.fill_(scale)
        return TeacherSource(model, "cpu", nfe=nfe, seed=seed, view=View(labels=labels)).fingerprint

    assert of() == of()
    assert len({of(), of(nfe=5), of(seed=1), of(scale=1.1), of(labels=False)}) == 5


def test_what_goes_through_all_data_gets_a_number_of_samples() -> None:
    source = TeacherSource(teacher(True), "cpu", nfe=3)
    some = standing(source, 12)
    assert standing(source, 12) is some
    assert (len(some), some.name, some.num_classes) == (12, "teacher:3 (12 samples)", 3)
    assert torch.equal(some.read(np.arange(12)), source.read(np.arange(12)))
    assert len(standing(source, 0)) == 2
    digits = open_source("digits")
    assert standing(digits, 12) is digits


def test_a_view_that_the_model_does_not_make() -> None:
    model = teacher(shape=(1, 8, 8))
    assert TeacherSource(model, "cpu", view=View(resize=8, channels=1)).shape == (1, 8, 8)
    for view, message in [
        (View(resize=16), r"as they are\. Got: --resize 16\. Wanted: 8\."),
        (View(channels=3), r"as they are\. Got: --channels 3\. Wanted: 1\."),
        (View(split="test"), "has no split 'test'"),
    ]:
        with pytest.raises(DataError, match=message):
            TeacherSource(model, "cpu", view=view)


def test_whose_samples_they_are(tmp_path: Path) -> None:
    generate(teacher(True), tmp_path / "s", 3, nfe=5, guidance=1.5)
    kept = open_source(str(tmp_path / "s"))
    assert origin(kept, teacher(True)) == "the teacher's own samples, 5 evaluations each, guidance 1.5"
    digest = open_shards(tmp_path / "s").key["teacher"][:16]
    assert origin(kept, changed(teacher(True))) == origin(kept, None)
    assert origin(kept, None) == f"samples of the diffusion model {digest}, 5 evaluations each, guidance 1.5"
    made = TeacherSource(teacher(), "cpu")
    assert origin(made, None) == "the teacher's own samples, 35 evaluations each, made when needed"
    assert origin(open_source("digits"), None) is None


def test_the_name_of_the_source() -> None:
    assert [own_samples(s) for s in ("teacher", "teacher:9", "digits", "./teacher", "teachers", "")] == [
        35, 9, None, None, None, None,
    ]  # fmt: skip
    for wrong in ("teacher:", "teacher:0", "teacher:x", "teacher:-3", "teacher:3.5"):
        with pytest.raises(DataError, match=rf"is not one\. Got: {wrong}\. Wanted: teacher:35\."):
            own_samples(wrong)


# ---- what cannot be used


def test_numbers_below_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"number of samples must be at least 1\. Got: 0\."):
        generate(teacher(), tmp_path / "s", 0)
    with pytest.raises(ConfigError, match=r"Got: 0 evaluations, batch size None\."):
        generate(teacher(), tmp_path / "s", 1, nfe=0)
    with pytest.raises(ConfigError, match=r"Got: 35 evaluations, batch size 0\."):
        generate(teacher(), tmp_path / "s", 1, batch_size=0)
    assert not (tmp_path / "s").exists()


def test_models_without_such_samples(tmp_path: Path) -> None:
    told = Denoiser(nn.Linear(2, 2), EDM(), Parametrization("edm"), sample_shape=(2,), parts=(Part("text", (3,)),))
    with pytest.raises(
        ConfigError, match=r"text-conditional model need prompts.* Give the training data: --data SOURCE"
    ):
        generate(told, tmp_path / "s", 4)
    jumps = Denoiser(nn.Linear(2, 2), EDM(), Parametrization("edm"), sample_shape=(2,), sampler="jump")
    with pytest.raises(ConfigError, match="This is a few-step model"):
        generate(jumps, tmp_path / "s", 4)
    with pytest.raises(ConfigError, match=r"Guidance needs a class-conditional model\. Got: guidance 2\."):
        generate(teacher(), tmp_path / "s", 4, guidance=2)


def test_samples_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    model = teacher()
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(DataError, match=r"not finite\. Got: NaN or infinity in 3 of 3, first in number 0\."):
        generate(model, tmp_path / "s", 3)
    assert not list(tmp_path.glob("s/shard-*"))
