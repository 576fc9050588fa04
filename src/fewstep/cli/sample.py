"""``fewstep sample``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from fewstep.cli.options import (
    COUNT,
    BatchSize,
    Compile,
    Device,
    Json,
    Network,
    Output,
    Precision,
    Quiet,
    Seed,
    noting_fallbacks,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.commit import Committed
    from fewstep.denoiser import Denoiser

EARLY = Group("Early commit", sort_key=50)
TOL = 0.02
FULL_STEPS = {"ode": 35, "multistep": 8}
"""Evaluations of the full chain where --commit is given without --steps: 18 Heun nodes; 8 few-step times."""


def sample(
    model: Annotated[str, Parameter(help="A run or model directory; or file.py:function.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="x.png for one picture, x.npz, or a directory of PNG files.")],
    steps: Annotated[
        int | None,
        Parameter(
            validator=COUNT,
            help="Network evaluations. Default: 1, or the fewest that the model can do; with --commit 35, or 8 for "
            "multistep.",
        ),
    ] = None,
    number: Annotated[int, Parameter(name=["--number", "-n"], validator=COUNT, help="How many samples.")] = 64,
    times: Annotated[
        str | None, Parameter(help="Noise levels instead of --steps, largest first, for example 80,0.8.")
    ] = None,
    sampler: Annotated[
        Literal["consistency", "ode", "multistep"],
        Parameter(
            help="ode is the teacher's solver; multistep is consistency without fresh noise between steps, for "
            "few-step models that were trained for it."
        ),
    ] = "consistency",
    commit: Annotated[
        Literal["confidence", "extrapolation"] | None,
        Parameter(
            group=EARLY,
            help="End a sample once the rest of its trajectory would change it by less than --tol: judged by one more "
            "evaluation (confidence; a diffusion model) or by how its changes decay (extrapolation). It assumes no "
            "fresh noise, a denoiser near the posterior mean, or geometric decay; pixels are not perceived quality.",
        ),
    ] = None,
    tol: Annotated[
        float | None,
        Parameter(
            group=EARLY, validator=Number(gte=0), help="Root mean square per value, in model units. Default: 0.02."
        ),
    ] = None,
    label: Annotated[int | None, Parameter(help="One class for all samples. Default: all classes in turn.")] = None,
    prompt: Annotated[str | None, Parameter(help="What the samples show, for a model that is told a text.")] = None,
    prompts: Annotated[Path | None, Parameter(help="A file with a prompt per line, used in turn.")] = None,
    guidance: Annotated[
        float | None,
        Parameter(
            help="Strength of guidance. A student that was tuned for a range of strengths is told it; of other models "
            "it doubles the evaluations, and on few-step models it is a heuristic."
        ),
    ] = None,
    weights: Annotated[str, Parameter(help="ema; of a run also student, and ema-1, ... where it has several.")] = "ema",
    batch_size: BatchSize = None,
    precision: Precision = "fp32",
    compile: Compile = False,
    network: Network = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Draw samples from a model.

    Sample i depends on the seed and on i alone: -n 3 gives the first 3 of -n 7.

    For example:

    ```
    fewstep sample run --steps 2 -n 64 --out out.png
    fewstep sample run --times 80,1.5 -n 5000 --seed 1 --out out.npz
    fewstep sample teacher --sampler ode --steps 35 -n 64 --out teacher.png
    fewstep sample run --steps 4 --prompt "a red square" -n 16 --out squares.png
    fewstep sample teacher --sampler ode --commit extrapolation --tol 0.02 -n 64 --out early.png
    fewstep sample run -n 50000 --precision auto --compile --out samples
    ```
    """
    from fewstep.backbones.text import prompt_rows
    from fewstep.cli.options import open_model
    from fewstep.cli.progress import Counting
    from fewstep.cli.write import check_output, save_samples, spread_labels, spread_prompts
    from fewstep.commit import require_end
    from fewstep.evaluation.samples import generated, shown
    from fewstep.sampling import few_step_times, possible_among

    output = Output(quiet, json)
    levels = _times(times, steps)
    _check(sampler, levels is not None, guidance, commit, tol)
    _check_speed(sampler, commit, precision, compile)
    denoiser = open_model(model, weights, network, device)
    check_output(out, denoiser)
    asked = spread_prompts(denoiser, number, prompt, prompts)
    cond = spread_labels(denoiser, number, label) if asked is None else prompt_rows(denoiser, asked)
    if commit is not None or sampler == "multistep":
        require_end(denoiser)
    fewest = FULL_STEPS[sampler] if commit is not None else 1 if sampler == "ode" else possible_among(denoiser, [1])[0]
    count = len(levels) if levels is not None else steps or fewest
    if sampler != "ode" and levels is None:
        levels = few_step_times(denoiser, count)
    for warning in _warnings(denoiser, Path(model), sampler, guidance):
        output.say(warning)
    started = time.perf_counter()
    blocks: Iterable[Tensor]
    nfe: float
    early: dict[str, Any] | None = None
    with Counting(output) as counting, noting_fallbacks(counting.say):
        if commit is None and sampler != "multistep":
            made = generated(
                denoiser, number, count, solver="ode" if levels is None else "consistency", times=levels,
                seed=seed or 0, cond=cond, guidance=guidance, batch_size=batch_size, precision=precision,
                compile=compile,
            )  # fmt: skip
            blocks, nfe, said = made.blocks(), made.about["nfe"], _evaluations(made.about["nfe"])
        else:
            found = _commit(denoiser, number, levels, count, seed or 0, cond, batch_size, commit, tol)
            blocks, (nfe, said, early) = [shown(denoiser, found.samples)], _described(found, commit, tol, count)
        path = save_samples(out, denoiser, blocks, number, cond, asked, lambda done: counting("sampling", done, number))
    rate = number / (time.perf_counter() - started)
    output.say(f"Wrote {number} samples, {said}, to {path} ({rate:,.1f} samples/s).")
    output.result(
        {
            "samples": str(path),
            "number": number,
            "sampler": sampler,
            "nfe": nfe,
            "times": levels,
            "label": label,
            "prompts": None if asked is None else list(dict.fromkeys(asked)),
            "guidance": guidance,
            "seed": seed or 0,
            "precision": precision,
            "compile": compile,
            "samples_per_second": rate,
            "commit": early,
        }
    )
    return 0


def _times(times: str | None, steps: int | None) -> list[float] | None:
    from fewstep.cli.write import parse_numbers
    from fewstep.errors import ConfigError

    levels = parse_numbers(times, "--times", float) if times is not None else None
    if levels is not None and steps not in (None, len(levels)):
        raise ConfigError(
            "--times and --steps do not agree", got=f"{len(levels)} times, --steps {steps}", do="Give one"
        )
    return levels


def _check(sampler: str, with_times: bool, guidance: float | None, commit: str | None, tol: float | None) -> None:
    from fewstep.errors import ConfigError

    if sampler == "ode" and with_times:
        raise ConfigError("--times does not go with --sampler ode", do="In Python: fewstep.ode_sample")
    if guidance is not None and (sampler == "multistep" or commit is not None):
        other = "--sampler multistep" if sampler == "multistep" else "--commit"
        raise ConfigError(f"--guidance does not go with {other}", do="Leave it out")
    if commit is None and tol is not None:
        raise ConfigError("--tol is the tolerance of --commit", do="Add --commit confidence, or leave --tol out")
    if commit is not None and sampler == "consistency":
        raise ConfigError(
            "--commit does not go with --sampler consistency, which adds fresh noise at every step: consecutive"
            " outputs differ by that noise and never settle",
            do="Use --sampler ode for a diffusion model, --sampler multistep for a few-step model",
        )


def _check_speed(sampler: str, commit: str | None, precision: str, compile: bool) -> None:
    from fewstep.errors import ConfigError

    if commit is None and sampler != "multistep":
        return
    other = "--sampler multistep" if commit is None else "--commit"
    for option, given in (("--precision", precision != "fp32"), ("--compile", compile)):
        if given:
            raise ConfigError(
                f"{option} does not go with {other}, whose batches shrink and whose rules compare outputs",
                do=f"Leave {option} out",
            )


def _warnings(denoiser: Denoiser, model: Path, sampler: str, guidance: float | None) -> Iterator[str]:
    """What is to be known of samples guided by the model's output without a label."""
    from fewstep.guidance import evaluations
    from fewstep.training.past import hides_labels

    if evaluations(denoiser, guidance) == 1:
        return
    if sampler != "ode":
        yield "Guidance on a few-step model is a heuristic: the guided flow's end point is not linear in the weight."
    if not hides_labels(model):
        yield "This model never trained without a label (data.label_drop=0), which guidance takes for granted."


def _commit(
    denoiser: Denoiser, n: int, levels: list[float] | None, count: int, seed: int, cond: Tensor | None,
    batch_size: int | None, rule: str | None, tol: float | None,
) -> Committed:  # fmt: skip
    """Without ``rule`` the full chain; without ``levels`` the teacher's, in ``count`` evaluations: Heun where odd."""
    from fewstep.commit import commit_sample

    solver = "multistep" if levels is not None else "heun" if count % 2 else "euler"
    return commit_sample(
        denoiser, n, times=levels, nodes=(count + 1) // 2 if solver == "heun" else count, solver=solver,
        rule=rule or "extrapolation", tol=0.0 if rule is None else TOL if tol is None else tol, seed=seed, cond=cond,
        batch_size=batch_size,
    )  # fmt: skip


def _described(
    found: Committed, rule: str | None, tol: float | None, full: int
) -> tuple[float, str, dict[str, Any] | None]:
    """Mean evaluations, the same in words, and for machines; the last is None for a full chain."""
    nfe = float(found.nfe.double().mean())
    if rule is None:
        return nfe, _evaluations(full), None
    histogram = {str(nfe): count for nfe, count in enumerate(found.nfe.bincount().tolist()) if count}
    least, most = int(found.nfe.min()), int(found.nfe.max())
    early = {
        "rule": rule, "tol": TOL if tol is None else tol, "nfe_full": full, "nfe_min": least, "nfe_max": most,
        "nfe_histogram": histogram, "committed": float((found.stopped_at > 0).double().mean()),
    }  # fmt: skip
    return nfe, f"{nfe:.1f} evaluations each on average ({least} to {most}; the full chain takes {full})", early


def _evaluations(nfe: float) -> str:
    return f"{nfe:g} evaluation{'s' if nfe > 1 else ''} each"
