"""The step dial: sampling times for N = 2 to 8 steps, found on one draw and checked on another.

Quality is the Fréchet distance in one feature net. The search has a draw of its own; the times it finds are kept only
where they win on another (other noise, other labels), where every number of the result is measured. Intervals are of
the generated samples; the reference is fixed. Both draws have the same size, hence the Fréchet distance's same bias
at that size: with no more samples than features, times are found that suit the bias, and the check cannot see it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.checkpoint.model import KIND as MODEL
from fewstep.checkpoint.store import read_json, write_json
from fewstep.denoiser import Denoiser
from fewstep.errors import CheckpointError, ConfigError, DataError
from fewstep.evaluation.bootstrap import Estimate, half_samples, spread_of
from fewstep.evaluation.features import features_of
from fewstep.evaluation.figures import evaluations, number
from fewstep.evaluation.measure import affordable, metric_name
from fewstep.evaluation.metrics import gaussian_stats
from fewstep.evaluation.reference import Reference, check_comparable
from fewstep.evaluation.samples import draw_labels, makes_images, shown_shape, to_host
from fewstep.evaluation.times_search import Chain, Score, Times, Trials, find_times, resampled, rounded, time_range
from fewstep.sampling import few_step_times, ode_sample_nfe, possible_steps, sample

FIRST_SEED = 7_000_000
"""Where the seeds of dials begin: far from those that evaluations use."""

FEWEST, MOST = 2, 8
TEACHER_NFE = 35
TUNED, DEFAULT, TEACHER = "tuned", "tuned, default times", "teacher (diffusion)"


# ------------------------------------------------------------------------------------ the held-out check
@dataclass(frozen=True)
class Drawn:
    """Features of one draw, their Fréchet distance with its half-sample spread, and the time it took."""

    distance: Estimate
    halves: list[float]
    seconds: float

    def better_than(self, other: Drawn) -> Estimate:
        """``self - other`` of the same draw, paired half by half: their common noise cancels."""
        pairs = [a - b for a, b in zip(self.halves, other.halves, strict=True)]
        return Estimate(self.distance.value - other.distance.value, spread_of(pairs))


class Judge:
    """Measures draws of one seed: distances in a reference's net, with paired half-sample intervals.

    Args:
        reference: real data; ``n``, ``seed``: the draw, the same for every model and time.
        replicates: halves per interval.
    """

    def __init__(self, reference: Reference, n: int, seed: int, batch_size: int | None, replicates: int = 50) -> None:
        self.reference, self.n, self.seed, self.batch_size = reference, n, seed, batch_size
        self.replicates = affordable(replicates, reference.net.dim)

    def score(self, denoiser: Denoiser) -> Score:
        """Samples -> Fréchet distance."""
        return lambda x: self._distance(self._features(denoiser, x))

    def few_step(self, denoiser: Denoiser, times: Sequence[float]) -> Drawn:
        """The few-step sampler at ``times``."""
        return self._drawn(denoiser, lambda n, cond: sample(
            denoiser, n, times=times, seed=self.seed, cond=cond, batch_size=self.batch_size))  # fmt: skip

    def solver(self, denoiser: Denoiser, nfe: int) -> Drawn:
        """The teacher's ODE solver in exactly ``nfe`` evaluations."""
        return self._drawn(denoiser, lambda n, cond: ode_sample_nfe(
            denoiser, n, nfe, seed=self.seed, cond=cond, batch_size=self.batch_size))  # fmt: skip

    def _drawn(self, denoiser: Denoiser, draw: Callable[[int, Tensor | None], Tensor]) -> Drawn:
        cond = draw_labels(denoiser, self.reference.source, self.n, self.seed)
        draw(min(self.n, 8), None if cond is None else cond[:8])  # warm up
        started = _now(denoiser)
        x = draw(self.n, cond)
        seconds = (_now(denoiser) - started) / self.n
        features = self._features(denoiser, x)
        halves = [self._distance(features[half]) for half in half_samples(self.n, self.replicates, self.seed)]
        return Drawn(Estimate(self._distance(features), spread_of(halves)), halves, seconds)

    def _features(self, denoiser: Denoiser, x: Tensor) -> Tensor:
        images = to_host(denoiser, x)
        return features_of(self.reference.net, images, device=denoiser.device)

    def _distance(self, features: Tensor) -> float:
        return self.reference.real.frechet.distance(gaussian_stats(features))


def _now(denoiser: Denoiser) -> float:
    if denoiser.device.type == "cuda":
        torch.cuda.synchronize(denoiser.device)
    return time.perf_counter()


# ---------------------------------------------------------------------------------------- the whole dial
@dataclass(frozen=True)
class Found:
    """What the search of one step count found: times and their value, and that of the default times."""

    times: Times
    value: float
    default: float
    evaluations: int


@dataclass(frozen=True)
class Settings:
    """What the result depends on beside the model and the data.

    Args:
        steps: step counts from 2 to 8.
        samples: of the search, and again of the held-out draw.
        seed: number of the search. Its draws have seeds of their own (:data:`FIRST_SEED`), so that ``fewstep eval`` at
            the usual small seeds never measures the samples that the times were chosen by.
        budget: network evaluations per sample that the search of one step count may spend.
    """

    steps: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    samples: int = 2_000
    seed: int = 0
    budget: int = 60

    @property
    def search_seed(self) -> int:
        """Seed of the samples that candidates are compared on."""
        return FIRST_SEED + 2 * self.seed

    @property
    def held_out_seed(self) -> int:
        """Seed of the samples that the result is measured on."""
        return self.search_seed + 1

    def __post_init__(self) -> None:
        wanted = [n for n in range(FEWEST, MOST + 1) if n in self.steps]
        if not wanted or wanted != list(self.steps):
            raise ConfigError(
                "These step counts have no times to find", got=list(self.steps), want=f"rising, from {FEWEST} to {MOST}"
            )
        if self.samples < 8:
            raise DataError("There are too few samples to compare sampling times", got=self.samples, want="at least 8")
        if self.budget < self.steps[-1]:
            raise ConfigError(
                "The budget does not pay for one candidate", got=self.budget, want=f"at least {self.steps[-1]}"
            )


@dataclass(frozen=True)
class Watch:
    """What :func:`search` and :func:`check` tell of their progress; every part may be left out."""

    tried: Callable[[int, int, float], None] = lambda steps, spent, best: None
    found: Callable[[int, Found], None] = lambda steps, found: None
    measured: Callable[[dict[str, Any]], None] = lambda row: None


def require_free_times(denoiser: Denoiser) -> None:
    """Refuse a student whose sampling times are settled by its training.

    Raises:
        ConfigError: it jumps, and is not told where it lands.
    """
    known = possible_steps(denoiser)
    if known is not None:
        raise ConfigError(
            "There are no sampling times to find: this student jumps between the levels it was trained for only",
            got=f"times for {', '.join(map(str, known)) or 'no'} steps",
            do="Measure it as it is: fewstep eval",
        )


def without_own_times(denoiser: Denoiser) -> Denoiser:
    """The same network without sampling times of its own: :func:`few_step_times` gives the defaults."""
    twin = denoiser.under(denoiser.process)
    twin.sampler_times = {}
    return twin


def search(
    denoiser: Denoiser,
    reference: Reference,
    settings: Settings,
    *,
    known: Mapping[int, Found] | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
) -> dict[int, Found]:
    """Sampling times of every step count; each starts from the default, the model's own and the last found resampled.

    Args:
        known: what an interrupted search with the same settings had found: taken as it is.

    Raises:
        ConfigError: a student whose times are settled.
        DataError: the data has another shape than the model's samples.
    """
    require_free_times(denoiser)
    check_comparable(reference, shown_shape(denoiser), makes_images(denoiser))
    watch, known, found = watch or Watch(), known or {}, {}
    cond = draw_labels(denoiser, reference.source, settings.samples, settings.search_seed)
    chain = Chain(denoiser, settings.samples, seed=settings.search_seed, cond=cond, batch_size=batch_size)
    trials = Trials(chain, Judge(reference, settings.samples, settings.search_seed, batch_size).score(denoiser))
    bare, bounds, last = without_own_times(denoiser), time_range(denoiser), Times()
    for steps in settings.steps:
        if steps not in known:
            trials.watch = partial(watch.tried, steps)
            trials.allow(settings.budget)
            default = rounded(few_step_times(bare, steps))
            value = trials.value(default)
            starts = [default, few_step_times(denoiser, steps)] + ([resampled(last, steps)] if last else [])
            times = find_times(trials, starts, bounds)
            found[steps] = Found(times, trials.value(times), value, trials.spent)
        else:
            found[steps] = known[steps]
        last = found[steps].times
        watch.found(steps, found[steps])
    return found


def check(
    denoiser: Denoiser,
    reference: Reference,
    found: Mapping[int, Found],
    settings: Settings,
    *,
    teacher: Denoiser | None = None,
    batch_size: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The held-out draw: which times are kept, and quality against evaluations and seconds.

    Found times are kept where they are better than the default times, and than the model's own if it carries some,
    by more than the standard deviation of the paired difference; else the model keeps what it has.

    Returns:
        ``{"steps": {"2": {"kept": "found" | "own" | "default", "times", "found", "default", "own": {"times",
        "held_out": [value, low, high]}, "difference": [found - default, low, high], "clear": whether that excludes 0,
        "optimism": held-out - search value of the found times, "evaluations": per sample}}, "metric", "rows": [as
        evaluate, and "model"], "best": N}``; JSON-able. "default" times are those of a model without its own.
    """
    watch, judge = watch or Watch(), Judge(reference, settings.samples, settings.held_out_seed, batch_size)
    metric, bare = metric_name("fd", reference.net, settings.samples), without_own_times(denoiser)
    rows: list[dict[str, Any]] = []

    def row(model: str, nfe: int, times: Sequence[float] | None, drawn: Drawn) -> None:
        solver = "ode" if times is None else "consistency"
        levels = None if times is None else list(times)
        rows.append(
            {"model": model, "solver": solver, "steps": nfe, "nfe": nfe, "times": levels}
            | {"seed": judge.seed, "samples_per_second": 1 / drawn.seconds, "metrics": {metric: drawn.distance.value}}
            | {"intervals": {metric: [drawn.distance.low, drawn.distance.high]}}
        )  # fmt: skip
        watch.measured(rows[-1])

    one = [denoiser.sigma_max]
    row(TUNED, 1, one, judge.few_step(denoiser, one))
    steps = {}
    for count, result in found.items():
        default, own = few_step_times(bare, count), few_step_times(denoiser, count)
        drawn = {"default": judge.few_step(denoiser, default), "found": judge.few_step(denoiser, result.times)}
        if own != default:
            drawn["own"] = judge.few_step(denoiser, own)
        times = {"default": default, "found": list(result.times), "own": own}
        steps[str(count)] = entry = _decision(result, times, drawn)
        kept = entry["kept"]
        row(TUNED, count, times[kept], drawn[kept])
        if kept != "default":
            row(DEFAULT, count, default, drawn["default"])
    if teacher is not None:
        for nfe in sorted({1, *found, TEACHER_NFE}):
            row(TEACHER, nfe, None, judge.solver(teacher, nfe))
    tuned = {r["nfe"]: r["metrics"][metric] for r in rows if r["model"] == TUNED}
    return {"metric": metric, "steps": steps, "rows": rows, "best": min(tuned, key=lambda n: (tuned[n], n))}


def _decision(result: Found, times: Mapping[str, Sequence[float]], drawn: Mapping[str, Drawn]) -> dict[str, Any]:
    """One step count: every value, and which times the model is to have."""
    rivals = {name: drawn["found"].better_than(d) for name, d in drawn.items() if name != "found"}
    better = all(difference.value + difference.spread < 0 for difference in rivals.values())
    kept = "found" if better else "own" if "own" in drawn else "default"
    held_out = {name: d.distance for name, d in drawn.items()}
    return {
        "kept": kept,
        "times": list(times[kept]),
        **{name: {"times": list(times[name]), "held_out": _interval(value)} for name, value in held_out.items()},
        "search": {"found": result.value, "default": result.default},
        "difference": _interval(rivals["default"]),
        "clear": rivals["default"].high < 0,
        "optimism": held_out["found"].value - result.value,
        "evaluations": result.evaluations,
    }


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def conclusion(result: Mapping[str, Any]) -> str:
    """Which N is best, and what more steps bring, in one or two sentences."""
    metric, best = result["metric"], result["best"]
    tuned = {r["nfe"]: r for r in result["rows"] if r["model"] == TUNED}
    value, (_, high) = tuned[best]["metrics"][metric], tuned[best]["intervals"][metric]
    text = f"Best: {evaluations(best)} ({metric} {number(value)})."
    enough = min(n for n, r in tuned.items() if r["intervals"][metric][0] <= value)
    if enough < best:
        few = number(tuned[enough]["metrics"][metric])
        text += f" Not worse beyond the interval: {evaluations(enough)} ({few})."
    worse = [n for n, r in tuned.items() if n > best and r["metrics"][metric] > high]
    if worse:
        text += (
            f" More steps are worse here (from {min(worse)} on beyond the interval): plain consistency models are "
            "known to get worse with more steps."
        )
    elif best < max(tuned):
        text += " More steps than that bring nothing here."
    return text


# ------------------------------------------------------------------------------------------------- files
def model_directory(path: str | Path) -> Path | None:
    """The model directory behind ``path``: itself, or a run's ``model``; None for ``file.py:function``.

    Raises:
        CheckpointError: a run that has no finished model yet; its checkpoints are never touched.
    """
    root = Path(path)
    for directory in (root, root / "model"):
        if (directory / "config.json").is_file():
            return directory
    if (root / "checkpoints").is_dir():
        raise CheckpointError(
            f"The run '{root}' has no finished model to write sampling times into",
            do=f"Let it finish: fewstep resume {root}; its checkpoints are never touched",
        )
    return None


def write_times(directory: Path, times: Mapping[int, Sequence[float]]) -> None:
    """Put sampling times into a model directory's config.json, atomically; everything else in it stays.

    Raises:
        CheckpointError: it is not a model directory.
        StorageError: the disk refused; the file is untouched.
    """
    config = read_json(directory / "config.json", MODEL)
    own = config.get("sampler_times") or {}
    config["sampler_times"] = own | {str(n): list(t) for n, t in times.items()}
    write_json(directory / "config.json", config)
