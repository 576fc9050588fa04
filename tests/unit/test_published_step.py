"""The published-style step that bench/step.py compares ours with is the same computation: same loss, same update."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fewstep import open_source
from fewstep.backbones import build
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.ema import ConstantEMA
from fewstep.objectives import ECT, StepRandom
from fewstep.objectives.pairs import draw_times
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.times import Lognormal, Stages, pair
from fewstep.training.config import OptimConfig, RunConfig
from fewstep.training.feed import Feed
from fewstep.training.trainer import Trainer
from fewstep.world import World

BENCH = Path(__file__).resolve().parents[2] / "bench"
BATCH, BETA = 6, 0.9
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def step() -> Iterator[ModuleType]:
    """bench/step.py, whose own modules lie beside it."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        import step

        yield step
    finally:
        sys.path.remove(str(BENCH))
        for name in set(sys.modules) - before:
            if name.startswith(("step", "quality_table")):
                del sys.modules[name]


def network(dropout: float = 0.0) -> Denoiser:
    """A U-Net in float64 whose layers all matter."""
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "dropout": dropout}}
    torch.manual_seed(0)
    backbone = build(spec).double()
    for parameter in backbone.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(backbone, EDM(), Parametrization(), sample_shape=(1, 8, 8), spec=spec)


def gradients(model: Denoiser) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("c", [0.0, 0.03])
@pytest.mark.parametrize("ratio", [2.0, 256.0])
def test_loss_and_gradient_are_ours(step: ModuleType, ratio: float, c: float) -> None:
    """Rows with r > 0 and rows with r = 0, whose target pass at r = 0 is thrown away."""
    ours, theirs = network(), network()
    t = torch.tensor([0.01, 0.1, 0.7, 3.0, 20.0, 60.0], dtype=torch.float64)
    x, eps = 0.5 * torch.randn(BATCH, 1, 8, 8).double(), torch.randn(BATCH, 1, 8, 8).double()
    objective = ECT(penalty=Penalty("pseudo_huber" if c else "l2", "dt", c=c))
    noisy = pair(objective.mapping, t, ratio)[0] > 0
    assert noisy.any() and (ratio > 2 or not noisy.all())
    loss = objective.loss_at(ours.train(), x, t, eps, ratio)
    loss.mean().backward()
    published = step.Published(theirs, torch.zeros(0), step.Recipe(batch=BATCH, q=ratio, last=0, c=c))
    found = published.update(x, t, eps)
    torch.testing.assert_close(found, loss.detach(), **CLOSE)
    torch.testing.assert_close(gradients(theirs), gradients(ours), **CLOSE)


def test_ten_updates_are_the_trainers(step: ModuleType) -> None:
    """Data, times and noise of the trainer, ten RAdam updates (rectified from the sixth on), weights and average."""
    source, objective = open_source("digits", labels=False), ECT(law=Lognormal(-1.1, 2.0), schedule=Stages(q=4.0))
    config = RunConfig(
        images=10 * BATCH,
        batch_size=BATCH,
        objective=objective,
        optim=OptimConfig(name="radam", lr=1e-3, guard="clamp"),
        emas=(ConstantEMA(BETA),),
    )
    trainer = Trainer(config, network(), source, World(0, 1, torch.device("cpu")))
    model = network()
    published = step.Published(model, torch.zeros(0), step.Recipe(batch=BATCH, q=4.0, lr=1e-3, beta=BETA))
    feed, streams = Feed(source, model, config.data, config.seed), Streams(config.seed)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for k, _ in enumerate(trainer.steps()):
        x = feed.batch(range(k * BATCH, (k + 1) * BATCH)).x
        random = StepRandom(streams, torch.arange(k * BATCH, (k + 1) * BATCH), x.device)
        published.update(x, draw_times(objective.law, model, random), random.normal("noise", x))
    feed.close()
    assert published.images_seen == trainer.images_seen == 10 * BATCH
    moved = [float((p.detach() - start[name]).abs().max()) for name, p in model.named_parameters()]
    assert min(moved) > 1e-5
    for theirs, ours in ((model, trainer.student), (published.average_model, trainer.averages[0])):
        torch.testing.assert_close(
            dict(theirs.named_parameters()), dict(ours.named_parameters()), rtol=1e-9, atol=1e-10
        )


def test_both_passes_share_the_dropout(step: ModuleType) -> None:
    """The generator is set back between them."""
    model = network(dropout=0.5)
    published = step.Published(model, torch.zeros(0), step.Recipe(batch=4))
    seen: list[Tensor] = []
    model.backbone.up[0].block.dropout.register_forward_hook(lambda _m, _i, out: seen.append(out.detach() == 0))
    t = torch.full((4,), 0.5, dtype=torch.float64)
    x = 0.5 * torch.randn(4, 1, 8, 8).double()
    published.update(x, t, torch.randn_like(x))
    assert len(seen) == 2
    assert 0.3 < float(seen[0].double().mean()) < 0.7
    assert torch.equal(seen[0], seen[1])


def test_data_are_every_image_once_a_round_in_minus_one_to_one(step: ModuleType) -> None:
    source = open_source("digits", labels=False)
    published = step.Published(network(), source.data[:10], step.Recipe(batch=5))
    rows = torch.cat([published.batch(), published.batch()])
    assert rows.dtype == torch.float64
    expected = source.data[:10].double() / 127.5 - 1
    assert sorted(r.tolist() for r in rows.flatten(1)) == sorted(r.tolist() for r in expected.flatten(1))


def test_stages_tighten_with_the_images_seen(step: ModuleType) -> None:
    seen = (0, 99, 100, 250, 399, 400, 10_000)
    for first, expected in ((0, [2.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0]), (2, [8.0, 8.0, 16.0, 16.0, 16.0, 16.0, 16.0])):
        recipe = step.Recipe(q=2.0, stage_images=100, first=first, last=3)
        published = step.Published(network(), torch.zeros(0), recipe)
        ratios = []
        for published.images_seen in seen:
            ratios.append(published.ratio)
        assert ratios == expected


def test_gradients_that_are_not_finite_are_replaced(step: ModuleType) -> None:
    """nan -> 0, +-inf -> +-1e5, and the rest stays."""
    published = step.Published(network(), torch.zeros(0), step.Recipe())
    parameter = published.model.backbone.stem.bias
    parameter.grad = torch.tensor([math.nan, math.inf, -math.inf, 2e5, *[0.5] * 4], dtype=torch.float64)
    published.sanitise()
    assert parameter.grad.tolist() == [0.0, 1e5, -1e5, 2e5, *[0.5] * 4]


def test_gradient_error_tells_direction_and_size(step: ModuleType) -> None:
    exact = {"a": torch.tensor([3.0, 0.0]).double(), "b": torch.tensor([4.0]).double()}
    twice = step.gradient_error({k: 2 * v for k, v in exact.items()}, exact)
    assert twice == pytest.approx({"cosine": 1.0, "error": 1.0})
    turned = step.gradient_error({"a": torch.tensor([0.0, 3.0]).double(), "b": exact["b"]}, exact)
    assert turned == pytest.approx({"cosine": 16 / 25, "error": (18 / 25) ** 0.5})


def test_the_split_counts_each_second_once(step: ModuleType) -> None:
    """Pieces inside pieces belong to the outer one; the shares and the rest are the whole; methods come back."""
    from step_parts import Stopwatch

    class Work:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            pass

    work = Work()
    watch = Stopwatch(torch.device("cpu"))
    with watch.watching([(work, "outer", "backward"), (work, "inner", "student"), (work, "gone", "data")]):
        work.outer()
        assert set(watch.seconds) == {"backward"}
        work.inner()
    assert set(watch.seconds) == {"backward", "student"}
    assert not vars(work)
    watch.seconds.update(backward=5.0, student=2.0)
    assert watch.shares(10.0) == pytest.approx({"backward": 0.5, "student": 0.2, "rest": 0.3})


def test_it_goes_on_from_its_state_to_the_same_bits(step: ModuleType) -> None:
    """Through a file: weights, average, optimiser, order of the images, generators."""
    data, recipe = open_source("digits", labels=False).data[:20], step.Recipe(batch=6, q=4.0)
    whole = step.Published(network(dropout=0.2), data, recipe)
    for _ in range(3):
        whole.step()
    file = io.BytesIO()
    torch.save(whole.state(), file)
    for _ in range(4):
        whole.step()
    file.seek(0)
    again = step.Published(network(dropout=0.2), data, recipe, seed=5)
    again.restore(torch.load(file, weights_only=True))
    for _ in range(4):
        again.step()
    assert again.images_seen == whole.images_seen == 42
    for one, other in ((again.model, whole.model), (again.average_model, whole.average_model)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_seconds_to_a_quality_are_read_between_the_measurements(step: ModuleType) -> None:
    from quality_table import seconds_to

    rows = [{"1": fd, "wall": wall} for fd, wall in ((400.0, 0.0), (100.0, 10.0), (25.0, 20.0), (30.0, 30.0))]
    assert seconds_to(rows, 200.0, "1", "wall") == ("=", pytest.approx(5.0))
    assert seconds_to(rows, 25.0, "1", "wall") == ("=", pytest.approx(20.0))
    assert seconds_to(rows, 400.0, "1", "wall") == ("<", 0.0)
    assert seconds_to(rows, 20.0, "1", "wall") == (">", 30.0)
