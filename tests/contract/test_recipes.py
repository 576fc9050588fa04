"""Every recipe survives a round trip, and the published ones hold the published numbers.

Sources: recipes.md c.1 (CIFAR-10, branch ``main`` of the published ECT code) and c.2 (ImageNet-64, ``imgnet``);
math.md 2.6.
"""

from __future__ import annotations

import json

import pytest
import yaml

from fewstep import RECIPES
from fewstep.config import dump_yaml, flatten, from_dict, to_dict, with_overrides
from fewstep.ema import ConstantEMA, PowerEMA
from fewstep.errors import ConfigError
from fewstep.objectives import ECT
from fewstep.recipes import recipe
from fewstep.times import Lognormal, Sigmoid, Stages
from fewstep.training.config import RunConfig
from fewstep.training.optim import learning_rate
from fewstep.types import Progress

BATCH = 128

# name: (q, iterations per stage, images, EMA)
CIFAR10 = {
    "cifar10-1h": (256, None, 1_024_000, 0.9993),
    "cifar10-100k": (2, 12_500, 12_800_000, 0.9999),
    "cifar10-200k": (2, 25_000, 25_600_000, 0.9999),
    "cifar10-400k": (2, 50_000, 51_200_000, 0.9999),
}
# size: (learning rate, dropout, teacher)
IMAGENET64 = {
    "s": (1.0e-3, 0.40, "edm2-img64-s-1073741-0.075"),
    "m": (0.9e-3, 0.50, "edm2-img64-m-2147483-0.060"),
    "l": (0.8e-3, 0.50, "edm2-img64-l-1073741-0.040"),
    "xl": (0.7e-3, 0.50, "edm2-img64-xl-0671088-0.040"),
}


@pytest.mark.parametrize("name", RECIPES)
class TestEveryRecipe:
    def test_round_trip(self, name: str) -> None:
        config = RECIPES[name]
        assert from_dict(RunConfig, to_dict(config)) == config
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
        assert from_dict(RunConfig, yaml.safe_load(dump_yaml(config))) == config
        assert with_overrides(config, {}) == config

    def test_every_setting_can_be_set_to_itself(self, name: str) -> None:
        config = RECIPES[name]
        overrides = flatten(to_dict(config))
        assert overrides["objective.kind"] == config.objective.kind
        assert with_overrides(config, overrides) == config

    def test_one_setting_can_be_changed(self, name: str) -> None:
        changed = with_overrides(RECIPES[name], {"optim.lr": 0.125})
        assert changed.optim.lr == 0.125
        assert changed != RECIPES[name]
        assert with_overrides(changed, {"optim.lr": RECIPES[name].optim.lr}) == RECIPES[name]

    def test_is_found_under_its_name(self, name: str) -> None:
        config = recipe(name)
        assert config.recipe == name
        assert config.note  # says what was measured, or that nothing was

    def test_says_whether_it_was_measured(self, name: str) -> None:
        note = RECIPES[name].note
        assert ("not measured here" in note) != ("measured by" in note)

    def test_the_schedule_ends_where_it_should(self, name: str) -> None:
        """Stages advance within the run, and r/t never reaches 1."""
        config = RECIPES[name]
        if not isinstance(config.objective, ECT):
            return
        ends = [config.objective.schedule.ratio(Progress(n, config.images)) for n in (0, config.images - 1)]
        assert 1 < ends[0] <= ends[1] <= 256


@pytest.mark.parametrize("name", CIFAR10)
def test_cifar10(name: str) -> None:
    q, iterations, images, beta = CIFAR10[name]
    config = RECIPES[name]
    objective = config.objective
    assert isinstance(objective, ECT)
    assert isinstance(objective.schedule, Stages)
    assert (config.job, config.batch_size, config.images, config.precision) == ("tune", BATCH, images, "fp32")
    assert objective.law == Lognormal(mean=-1.1, std=2.0)
    assert objective.mapping == Sigmoid(k=8.0, b=1.0)
    assert objective.schedule.q == q
    assert objective.schedule.first == 0
    assert (objective.penalty.weight, objective.penalty.c) == ("dt", 0.0)
    assert objective.penalty.distance in ("l2", "pseudo_huber")  # the same at c = 0
    optim = config.optim
    assert (optim.name, optim.lr, optim.betas, optim.eps) == ("radam", 1e-4, (0.9, 0.999), 1e-8)
    assert (optim.weight_decay, optim.schedule, optim.warmup_images, optim.clip) == (0.0, "constant", 0, None)
    assert optim.guard == ("clamp" if "cifar10" in config.recipe else "zero")
    assert config.emas == (ConstantEMA(beta),)
    assert (config.student.dropout, config.student.dropout_max_resolution) == (0.2, None)
    assert config.student.boundary_shift == 0.003
    assert config.student.sampler_times == {"2": [80.0, 0.821]}
    assert (config.data.flip, config.data.labels) == (False, False)
    ratios = [objective.schedule.ratio(Progress(n, images)) for n in range(0, images, BATCH * 500)]
    if iterations is None:
        assert set(ratios) == {256.0}
    else:
        assert objective.schedule.images == iterations * BATCH
        assert sorted(set(ratios)) == [2.0**a for a in range(1, 9)]  # eight stages, to 1/256
        assert images == 8 * iterations * BATCH


@pytest.mark.parametrize("size", IMAGENET64)
def test_imagenet64(size: str) -> None:
    lr, dropout, teacher = IMAGENET64[size]
    config = RECIPES[f"imagenet64-{size}"]
    objective = config.objective
    assert isinstance(objective, ECT)
    assert isinstance(objective.schedule, Stages)
    assert (config.job, config.batch_size, config.images, config.micro_batch) == ("tune", BATCH, 12_800_000, 32)
    assert config.precision == "tf32"
    assert teacher in config.note
    assert objective.law == Lognormal(mean=-0.8, std=1.6)
    assert objective.mapping == Sigmoid(k=8.0, b=1.0)
    assert (objective.schedule.q, objective.schedule.images) == (4.0, 25_000 * BATCH)
    assert objective.schedule.ratio(Progress(12_799_999, 12_800_000)) == 256.0
    assert (objective.penalty.distance, objective.penalty.weight, objective.penalty.c) == (
        "pseudo_huber",
        "snrpk",
        0.06,
    )
    optim = config.optim
    assert (optim.name, optim.lr, optim.betas) == ("adam", lr, (0.9, 0.99))
    assert (optim.weight_decay, optim.warmup_images, optim.clip) == (0.0, 0, None)
    for steps, factor in ((0, 1.0), (2000, 1.0), (8000, 0.5), (50_000, 0.2)):  # lr / sqrt(max(n / (2000 B), 1))
        assert learning_rate(optim, Progress(steps * BATCH, 12_800_000)) == pytest.approx(lr * factor, rel=1e-12)
    assert set(config.emas) == {ConstantEMA(0.9999), PowerEMA(0.010), PowerEMA(0.050), PowerEMA(0.100)}
    assert (config.student.dropout, config.student.dropout_max_resolution) == (dropout, 16)
    assert config.student.boundary_shift == 0.0
    assert config.student.sampler_times == {"2": [80.0, 1.526]}
    assert config.data.labels is True
    assert config.data.flip is False


def test_an_unknown_recipe_has_a_nearest_match() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cifar10-1h'"):
        recipe("cifar10-1hour")
