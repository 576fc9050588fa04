"""The step dial on a Gaussian whose biased consistency model has a known best second time (math.md 2.9)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Parametrization, sample, save_model
from fewstep.backbones import build
from fewstep.errors import CheckpointError, ConfigError, DataError, StorageError
from fewstep.evaluation.dial import (
    DEFAULT,
    TEACHER,
    TUNED,
    Found,
    Judge,
    Settings,
    Watch,
    check,
    conclusion,
    model_directory,
    search,
    write_times,
)
from fewstep.evaluation.dial_plot import dial_png
from fewstep.evaluation.feature_net import FeatureNet
from fewstep.evaluation.metrics import Stats
from fewstep.evaluation.reference import Reference
from fewstep.evaluation.times_search import Chain, Trials, find_times, resampled, rounded, time_range

SIZE, VARIANCE, TOP = 16, 0.25, 80.0
Gain = Callable[[float], float]


def exact(t: float) -> float:
    """a(t) of the Gaussian's consistency function."""
    return math.sqrt(VARIANCE / (VARIANCE + t * t))


def early_bias(t: float) -> float:
    """A model that shrinks by up to half where the noise is large: late times repair, but repair less."""
    return (1 - 0.5 * t / (1 + t)) * exact(t)


def good_at_four(t: float) -> float:
    """A model that shrinks by half everywhere but around sigma = 4."""
    return (1 - 0.5 * (1 - math.exp(-(math.log(t / 4) ** 2) / 2))) * exact(t)


def best_at_default(t: float) -> float:
    """A model whose best second time is the default one, 0.821."""
    return (1 - 0.2 * (1 - math.exp(-(math.log(t / 0.821) ** 2) / 2))) * exact(t)


class Linear(nn.Module):
    """x -> gain(sigma) x + nudge * label, in float64."""

    def __init__(self, gain: Gain, nudge: float = 0.0) -> None:
        super().__init__()
        self.gain, self.nudge = gain, nudge
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        shift = 0.0 if cond is None else self.nudge * cond.argmax(1, keepdim=True)
        return self.gain(float(t[0])) * x + shift + 0 * self.idle


def model_of(gain: Gain, classes: int = 0) -> Denoiser:
    parametrization = Parametrization("x0", sigma_data=math.sqrt(VARIANCE), time="native")
    backbone = Linear(gain, 0.1 if classes else 0.0)
    return Denoiser(backbone, EDM(), parametrization, sample_shape=(SIZE,), num_classes=classes, sigma_max=TOP)


def identity(x: Tensor) -> Tensor:
    return x.flatten(1)


def gaussian_reference() -> Reference:
    """N(0, 0.25 I), exactly."""
    net = FeatureNet("Pixels", SIZE, "hash", identity)
    stats = Stats(torch.zeros(SIZE).double(), VARIANCE * torch.eye(SIZE).double(), 10**9)
    info = {"source": "gaussian", "preprocessing": {"shape": [SIZE], "coding": None}, "notes": []}
    return Reference(net, stats, None, None, None, info)


def final_spread(gain: Gain, times: tuple[float, ...]) -> float:
    """Standard deviation after all steps: v <- g(t)^2 (v + t^2), from v = 0 at the first."""
    variance = 0.0
    for t in times:
        variance = gain(t) ** 2 * (variance + t * t)
    return math.sqrt(variance)


def distance(gain: Gain, times: tuple[float, ...]) -> float:
    """The exact Fréchet distance of the sampler's law to the data."""
    return SIZE * (final_spread(gain, times) - math.sqrt(VARIANCE)) ** 2


def best_second(gain: Gain) -> float:
    grid = np.geomspace(0.01, 20, 4000).tolist()
    return min(grid, key=lambda t: distance(gain, (TOP, t)))


SETTINGS = Settings(steps=(2, 3), samples=1000, seed=0, budget=60)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return gaussian_reference()


@pytest.fixture(scope="module")
def found(reference: Reference) -> dict[int, Found]:
    return search(model_of(good_at_four), reference, SETTINGS)


# -------------------------------------------------------------------------------------------- the sampler
@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_chain_is_the_sampler_to_the_bit(batch_size: int | None) -> None:
    model, cond = model_of(early_bias, classes=3), torch.arange(40) % 3
    chain = Chain(model, 40, seed=3, cond=cond, batch_size=batch_size)
    for times in ((80.0, 2.0, 0.5), (80.0, 2.0, 0.1), (80.0, 1.0), (80.0, 1.0, 0.5, 0.2)):
        want = sample(model, 40, times=times, seed=3, cond=cond, batch_size=batch_size)
        assert torch.equal(chain.run(times), want), times


def test_shared_beginnings_are_evaluated_once() -> None:
    model = model_of(early_bias)
    chain = Chain(model, 8)
    spent = []
    for times in ((80.0, 2.0, 0.5), (80.0, 2.0, 0.1), (80.0, 2.0, 0.1), (80.0, 1.0, 0.1), (80.0, 1.0)):
        spent.append(chain.cost(times))
        chain.run(times)
    assert spent == [3, 1, 0, 2, 0]
    assert chain.evaluations == 6


def test_dropout_is_off_and_modes_come_back() -> None:
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1], "blocks": 1,
                                       "dropout": 0.5}}  # fmt: skip
    model = Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    model.train()
    assert torch.equal(Chain(model, 4).run((80.0, 1.0)), sample(model, 4, times=(80.0, 1.0)))
    assert all(module.training for module in model.modules())


# ------------------------------------------------------------------------------------------- the search
@pytest.mark.parametrize(("gain", "near"), [(early_bias, None), (good_at_four, 4.0)])
def test_the_best_second_time_is_found(gain: Gain, near: float | None, reference: Reference) -> None:
    want = best_second(gain)
    assert near is None or abs(math.log(want / near)) < 0.05
    got = search(model_of(gain), reference, Settings(steps=(2,), samples=3000))[2]
    assert abs(math.log(got.times[1] / want)) < 0.15, (got.times, want)
    assert distance(gain, got.times) < 1.02 * distance(gain, (TOP, want)) + 0.002
    assert got.times[0] == TOP
    assert got.default == pytest.approx(distance(gain, (TOP, 0.821)), rel=0.1)


def test_three_steps_come_near_brute_force(reference: Reference) -> None:
    """On the same draw, against a grid of all pairs."""
    model = model_of(early_bias)
    got = search(model, reference, Settings(steps=(2, 3), samples=1000, budget=80))
    score, chain = Judge(reference, 1000, 0, None).score(model), Chain(model, 1000)
    grid = np.geomspace(0.02, 20, 22).tolist()
    brute = min(score(chain.run((TOP, a, b))) for a in grid for b in grid if a > b)
    assert got[3].value < 1.02 * brute
    assert got[3].value < got[2].value < got[2].default


def test_the_search_is_seeded_and_free_of_the_batch_size(reference: Reference, found: dict[int, Found]) -> None:
    model = model_of(good_at_four)
    assert search(model, reference, SETTINGS) == found
    split = search(model, reference, SETTINGS, batch_size=64)
    assert {n: f.times for n, f in split.items()} == {n: f.times for n, f in found.items()}
    other = search(model, reference, Settings(steps=(2,), samples=1000, seed=5))
    assert other[2].value != found[2].value


def test_no_more_is_spent_than_the_budget(reference: Reference) -> None:
    told: list[tuple[int, int, float]] = []
    settings = Settings(steps=(2, 5, 8), samples=50, budget=11)
    watch = Watch(tried=lambda n, spent, best: told.append((n, spent, best)))
    got = search(model_of(early_bias), reference, settings, watch=watch)
    assert [f.evaluations for f in got.values()] == [max(s for n, s, _ in told if n == count) for count in got]
    assert all(0 < f.evaluations <= 11 for f in got.values())
    assert all(len(f.times) == n and f.value <= f.default for n, f in got.items())
    assert [best for n, _, best in told if n == 8][-1] == got[8].value


def test_what_was_known_is_not_searched_again(reference: Reference, found: dict[int, Found]) -> None:
    model, tried = model_of(good_at_four), []
    watch = Watch(tried=lambda n, spent, best: tried.append(n))
    again = search(model, reference, SETTINGS, known={2: found[2]}, watch=watch)
    assert again == found
    assert set(tried) == {3}


def test_times_that_do_not_fall_cost_nothing() -> None:
    chain = Chain(model_of(early_bias), 4)
    trials = Trials(chain, lambda x: 1.0)
    assert trials.value((80.0, 1.0, 1.0)) == math.inf
    assert chain.evaluations == 0


def test_a_known_bowl_is_descended() -> None:
    """Seven times at once: a score with its minimum at given times, no sampling."""
    goal = np.log([30.0, 12.0, 5.0, 2.0, 1.0, 0.4, 0.1])

    class Fake(Chain):
        def __init__(self) -> None:
            self.evaluations = 0

        def forget(self) -> None:
            pass

        def cost(self, times: Any) -> int:
            return 1

        def run(self, times: Any) -> Tensor:
            self.evaluations += 1
            return torch.tensor(times[1:], dtype=torch.float64)

    trials = Trials(Fake(), lambda x: 1e-3 + float(((np.log(x.numpy()) - goal) ** 2).sum()))
    best = find_times(trials, [(80.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)], (0.01, 40.0))
    assert np.abs(np.log(best[1:]) - goal).max() < 0.03


def test_the_curve_of_times_keeps_its_ends() -> None:
    assert resampled((80.0, 1.0), 3) == (80.0, 2.0, 0.5)
    assert resampled((80.0, 4.0, 1.0), 4) == (80.0, 4.0, 2.0, 1.0)
    assert resampled((80.0, 4.0, 2.0, 1.0), 2) == (80.0, 2.0)
    assert rounded((80.12345, 1.234567)) == (80.12345, 1.235)
    assert time_range(model_of(exact)) == (0.01, 20.0)


# ------------------------------------------------------------------------------------------ the held-out
def test_a_real_gain_is_kept_and_measured_on_another_draw(reference: Reference, found: dict[int, Found]) -> None:
    model = model_of(good_at_four)
    result = check(model, reference, found, SETTINGS, teacher=model_of(lambda t: VARIANCE / (VARIANCE + t * t)))
    two = result["steps"]["2"]
    assert two["kept"] == "found"
    assert two["times"] == list(found[2].times)
    assert two["difference"][2] < 0
    assert two["search"] == {"found": found[2].value, "default": found[2].default}
    x = sample(model, 1000, times=found[2].times, seed=SETTINGS.held_out_seed)
    value, low, high = two["found"]["held_out"]
    assert value == Judge(reference, 1000, 1, None).score(model)(x)
    assert low < value < high
    assert two["optimism"] == value - found[2].value != 0
    assert two["default"]["held_out"][0] == pytest.approx(distance(good_at_four, (TOP, 0.821)), rel=0.15)
    assert [(r["model"], r["nfe"]) for r in result["rows"]] == [
        (TUNED, 1), (TUNED, 2), (DEFAULT, 2), (TUNED, 3), (DEFAULT, 3), (TEACHER, 1), (TEACHER, 2), (TEACHER, 3),
        (TEACHER, 35)]  # fmt: skip
    assert all(r["intervals"]["FD-Pixels-1k"][0] < r["metrics"]["FD-Pixels-1k"] for r in result["rows"])
    assert result["rows"][-1]["metrics"]["FD-Pixels-1k"] < 0.1, "35 evaluations of an exact teacher"
    json.dumps(result)


def test_an_overfit_is_thrown_out(reference: Reference) -> None:
    """Few samples, and default times that cannot be beaten: every search gains, and the other draw says no."""
    model, kept, gains, borne_out = model_of(best_at_default), [], [], []
    for seed in range(8):
        settings = Settings(steps=(2,), samples=64, seed=seed)
        got = search(model, reference, settings)
        entry = check(model, reference, got, settings)["steps"]["2"]
        gains.append(got[2].default - got[2].value)
        borne_out.append(-entry["difference"][0])
        kept.append(entry["kept"])
    assert min(gains) > 0
    assert statistics.fmean(borne_out) < 0.3 * statistics.fmean(gains)
    assert kept.count("default") >= 7


def test_planted_times_that_look_good_are_thrown_out(reference: Reference) -> None:
    planted = {2: Found((TOP, 0.1), value=1e-6, default=1.0, evaluations=9)}
    result = check(model_of(good_at_four), reference, planted, Settings(steps=(2,), samples=500))
    entry = result["steps"]["2"]
    assert entry["kept"] == "default"
    assert entry["times"] == [TOP, 0.821]
    assert entry["optimism"] > 1
    assert [r["times"] for r in result["rows"] if r["nfe"] == 2] == [[TOP, 0.821]]


def test_times_of_its_own_are_not_replaced_by_worse_ones(reference: Reference, found: dict[int, Found]) -> None:
    model = model_of(good_at_four)
    model.sampler_times = {2: (TOP, 4.0)}
    planted = {2: Found((TOP, 2.0), 0.0, 1.0, 9)}
    entry = check(model, reference, planted, Settings(steps=(2,), samples=1000))["steps"]["2"]
    assert entry["difference"][2] < 0, "better than the default"
    assert entry["kept"] == "own"
    assert entry["times"] == [TOP, 4.0]


def test_the_paired_interval_is_as_wide_as_the_scatter_over_draws(reference: Reference) -> None:
    model, values, spreads = model_of(early_bias), [], []
    for seed in range(30):
        judge = Judge(reference, 300, seed, None)
        one, other = judge.few_step(model, (TOP, 1.0)), judge.few_step(model, (TOP, 0.9))
        values.append(one.better_than(other).value)
        spreads.append(one.better_than(other).spread)
        assert one.better_than(one).spread == 0
        assert one.better_than(other).spread < one.distance.spread
    ratio = statistics.fmean(spreads) / statistics.stdev(values)
    assert 0.7 < ratio < 1.6, ratio


# --------------------------------------------------------------------------------- words, picture, files
def row(model: str, nfe: int, value: float, half: float = 0.01) -> dict[str, Any]:
    return {"model": model, "nfe": nfe, "metrics": {"FD": value}, "intervals": {"FD": [value - half, value + half]},
            "samples_per_second": 1000 / nfe}  # fmt: skip


def test_the_conclusion_names_the_best_and_says_when_more_is_worse() -> None:
    rows = [row(TUNED, 1, 1.0), row(TUNED, 2, 0.5), row(TUNED, 4, 0.495), row(TUNED, 8, 0.7)]
    text = conclusion({"metric": "FD", "best": 4, "rows": rows})
    assert text == (
        "Best: 4 evaluations (FD 0.495). Not worse beyond the interval: 2 evaluations (0.5). More steps are worse "
        "here (from 8 on beyond the interval): plain consistency models are known to get worse with more steps."
    )
    assert conclusion({"metric": "FD", "best": 2, "rows": rows[:2]}) == "Best: 2 evaluations (FD 0.5)."
    assert "bring nothing" in conclusion({"metric": "FD", "best": 2, "rows": [*rows[:2], row(TUNED, 3, 0.501)]})


def test_the_picture_has_every_curve(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "dial.png"
    models = ((TUNED, 1.0), (DEFAULT, 1.3), (TEACHER, 9.0))
    rows = [row(m, n, v / n, 0.1 / n) for m, v in models for n in (1, 2, 4, 8)]
    dial_png(path, {"metric": "FD", "rows": rows}, "2,000 samples, CPU")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert image.width > 1000
    for colour in ((0xC2, 0x41, 0x0C), (0x25, 0x63, 0xEB), (0x52, 0x60, 0x6D)):
        assert (np.abs(pixels.astype(int) - colour).sum(1) == 0).sum() > 100, colour


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1], "blocks": 1}}
    model = Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec,
                     sampler_times={2: (80.0, 0.821)})  # fmt: skip
    save_model(model, tmp_path / "run" / "model", {"recipe": "none"})
    return tmp_path / "run" / "model"


def test_only_the_times_change(directory: Path) -> None:
    before = json.loads((directory / "config.json").read_text())
    write_times(directory, {4: (80.0, 3.0, 1.0, 0.3)})
    after = json.loads((directory / "config.json").read_text())
    assert after.pop("sampler_times") == {"2": [80.0, 0.821], "4": [80.0, 3.0, 1.0, 0.3]}
    before.pop("sampler_times")
    assert list(after.items()) == list(before.items())


def test_a_write_that_fails_leaves_the_model_as_it_was(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (directory / "config.json").read_bytes()

    def refuse(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(StorageError, match="Read-only"):
        write_times(directory, {2: (80.0, 1.0)})
    assert (directory / "config.json").read_bytes() == before


def test_where_a_model_lives(directory: Path, tmp_path: Path) -> None:
    assert model_directory(directory) == model_directory(directory.parent) == directory
    assert model_directory("net.py:make") is None
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no finished model.*never touched"):
        model_directory(tmp_path / "young")


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"steps": (1, 2)}, ConfigError, "no times to find"),
        ({"steps": (2, 9)}, ConfigError, "rising, from 2 to 8"),
        ({"steps": ()}, ConfigError, "no times to find"),
        ({"samples": 7}, DataError, "too few samples"),
        ({"budget": 7}, ConfigError, "Wanted: at least 8"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        Settings(**given)


def test_data_of_another_shape_is_refused(reference: Reference) -> None:
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1], "blocks": 1}}
    model = Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=(1, 8, 8), spec=spec)
    with pytest.raises(DataError, match="shape"):
        search(model, reference, SETTINGS)
