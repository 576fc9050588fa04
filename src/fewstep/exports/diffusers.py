"""A few-step student as a pipeline that plain diffusers loads and samples (extra ``hf``)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.backbones.hf import complete, kind_of, library
from fewstep.backbones.hf_kinds import KINDS
from fewstep.backbones.text import CLASSES as TEXT_CLASSES
from fewstep.backbones.text import quiet
from fewstep.backbones.vae import CLASSES as VAE_CLASSES
from fewstep.backbones.vae import VaeCodec
from fewstep.denoiser import Denoiser
from fewstep.errors import CheckpointError, ConfigError
from fewstep.evaluation.pipelines import INDEX, refuse_code
from fewstep.evaluation.pretrained import quiet as quiet_of
from fewstep.exports.graph import TOLERANCE, example_inputs
from fewstep.exports.stepping import Stepping, stepping_of
from fewstep.process import EDM, expand
from fewstep.sampling import few_step_times, possible_among
from fewstep.weights import load_weights

STEPS = (1, 2, 4, 8)
OTHERWISE = "Export it with --to torch or --to onnx"

_CM, _LCM, _EULER = "CMStochasticIterativeScheduler", "LCMScheduler", "EulerDiscreteScheduler"
_FLOW = "FlowMatchEulerDiscreteScheduler"
PIPELINES: dict[tuple[str, str], tuple[str, bool]] = {
    ("UNet2DModel", _CM): ("ConsistencyModelPipeline", True),
    ("UNet2DModel", _LCM): ("ConsistencyModelPipeline", True),
    ("UNet2DModel", _FLOW): ("DDPMPipeline", False),
    ("UNet2DConditionModel", _LCM): ("StableDiffusionPipeline", True),
    ("UNet2DConditionModel", _EULER): ("StableDiffusionPipeline", True),
    ("DiTTransformer2DModel", _LCM): ("DiTPipeline", False),
    ("SD3Transformer2DModel", _FLOW): ("StableDiffusion3Pipeline", True),
    ("FluxTransformer2DModel", _FLOW): ("FluxPipeline", True),
}
"""Network and scheduler -> pipeline, and whether its call passes noise levels on to the scheduler; with SDXL's
conditions StableDiffusionPipeline is StableDiffusionXLPipeline."""

_EYES = (
    "CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPVisionModelWithProjection", "SiglipImageProcessor",
    "SiglipVisionModel",
)  # fmt: skip
KNOWN = {
    *(("transformers", name) for name in (*TEXT_CLASSES, *_EYES)),
    *(("diffusers", name) for name in (*KINDS, *VAE_CLASSES)),
    ("stable_diffusion", "StableDiffusionSafetyChecker"),
}
"""What the index of a teacher's pipeline may name as (library, class), beside diffusers' own schedulers."""


def write_pipeline(denoiser: Denoiser, folder: Path) -> dict[str, Any]:
    """Write ``model_index.json``, scheduler, network and, of latent models, VAE and text encoders into ``folder``.

    Every step is the student's own. The start is where diffusers has it: N(0, 1) in the network's coordinates, so
    ``sqrt(1 + T^2) z`` at noise level T for a network with a table of betas (2e-5 more than the student's ``T z`` at a
    DDPM's T = 157, 0.2 % at Stable Diffusion's 14.6) and ``(1 + T) z`` for a flow model (0.3 % at T = 320). A
    consistency scheduler starts from ``T z``.

    Returns:
        For ``fewstep.json``: class names; by number of steps the arguments that lead to the student's own levels
        ("calls", empty where the call takes none), the EDM noise levels that they visit ("levels") and those that
        ``num_inference_steps`` alone visits ("plain"; None is no bound; empty for jumps); "difference", the largest
        one of a step from the student's, relative to its output where that is above 1.

    Raises:
        ConfigError: no pipeline of diffusers samples such a student, or diffusers is not installed.
        CheckpointError: the teacher's pipeline, whose VAE and text encoders are copied, is gone or damaged.
    """
    kind = _kind(denoiser)
    stepping = stepping_of(denoiser, spread="even" if kind.startswith("Flux") else "own")
    scheduler = type(stepping.scheduler).__name__ if stepping else ""
    if stepping is None or (kind, scheduler) not in PIPELINES:
        raise _refused(denoiser, f"a {kind} {_in_words(denoiser)}")
    pipeline, takes_levels = PIPELINES[kind, scheduler]
    if "time_ids" in {part.name for part in denoiser.conditioning.parts}:
        pipeline = "StableDiffusionXLPipeline"
    _check_pipeline(denoiser, kind, pipeline, takes_levels)
    network = _plain_network(denoiser, kind)
    with _quiet():
        difference = _check_steps(denoiser, network, stepping, kind)
        _save(denoiser, pipeline, network, stepping.scheduler, folder)
        return {"pipeline": pipeline, "scheduler": scheduler, "difference": difference} | _calls(
            denoiser, stepping, takes_levels
        )


def _calls(denoiser: Denoiser, stepping: Stepping, takes_levels: bool) -> dict[str, dict[str, Any]]:
    """How the pipeline is called for the student's step counts, and which noise levels it visits."""
    counts = possible_among(denoiser, STEPS)
    told = {n: stepping.told(few_step_times(denoiser, n)) for n in counts if takes_levels}
    told = {n: values for n, values in told.items() if len(set(values)) == len(values)}
    plain = {} if denoiser.sampler == "jump" else {n: stepping.visited(n) for n in counts}
    return {
        "calls": {str(n): {stepping.argument: values} for n, values in told.items()},
        "levels": {str(n): stepping.visited(values) for n, values in told.items()},
        "plain": {str(n): [level if math.isfinite(level) else None for level in v] for n, v in plain.items()},
    }


def _kind(denoiser: Denoiser) -> str:
    """The class of its diffusers network.

    Raises:
        ConfigError: it is of another library, or wrapped.
    """
    spec = denoiser.spec or {"name": "of your own"}
    if denoiser.two_time or denoiser.guided:
        raise _refused(denoiser, f"one that is told {'where it lands' if denoiser.two_time else 'its guidance'}")
    if spec["name"] != "diffusers":
        raise _refused(denoiser, f"a network '{spec['name']}'")
    return str(spec["kwargs"]["kind"])


def _refused(denoiser: Denoiser, got: str) -> ConfigError:
    return ConfigError("No pipeline of diffusers samples this student", got=got, do=OTHERWISE)


def _in_words(denoiser: Denoiser) -> str:
    p = denoiser.parametrization
    return f"with prediction '{p.prediction}' and time '{p.time}', sampled by {denoiser.sampler}"


def _check_pipeline(denoiser: Denoiser, kind: str, pipeline: str, takes_levels: bool) -> None:
    """Refuse what the pipeline cannot say to the network, or the network cannot do in it."""
    config = complete(kind, denoiser.spec["kwargs"]["config"])  # type: ignore[index]
    pixels, low_high = kind == "UNet2DModel", tuple(denoiser.value_range)
    problems = {
        "one of latents without text": pixels and denoiser.codec is not None,
        f"values in {low_high}": pixels and low_high != (-1.0, 1.0),
        "labels": pipeline == "DDPMPipeline" and denoiser.num_classes > 0,
        "no text": kind not in ("UNet2DModel", "DiTTransformer2DModel") and not denoiser.text,
        "no VAE": kind == "DiTTransformer2DModel" and not isinstance(denoiser.codec, VaeCodec),
        "a network that predicts its variance, too": kind.startswith("UNet")
        and config["out_channels"] != config["in_channels"],
        "jumps between its own noise levels": denoiser.sampler == "jump" and not takes_levels,
    }
    found = [name for name, is_so in problems.items() if is_so]
    if found:
        raise _refused(denoiser, f"{found[0]}, which diffusers' {pipeline} does not know")


def _plain_network(denoiser: Denoiser, kind: str) -> Any:
    """The network as diffusers has it, with the size of the samples it was tuned for."""
    config = complete(kind, denoiser.spec["kwargs"]["config"])  # type: ignore[index]
    if kind.startswith("UNet"):
        height, width = denoiser.sample_shape[1:]
        config["sample_size"] = height if height == width else [height, width]
    network = getattr(library(), kind)(**config)
    load_weights(network, denoiser.backbone.get_submodule("network").state_dict(), "the student")
    return network.eval()


@torch.no_grad()
def _check_steps(denoiser: Denoiser, network: Any, stepping: Stepping, kind: str) -> float:
    """The largest difference of a step in diffusers from the student's, over the levels of its sampler.

    A network that predicts x_0 loses its blend with x (:class:`Parametrization`): 6e-4 at noise level 0.4.

    Raises:
        ConfigError: it is above the tolerance.
    """
    edm, worst, blend = denoiser.under(EDM()).eval(), 0.0, denoiser.parametrization.blend
    for level in few_step_times(denoiser, possible_among(denoiser, (4,))[-1]):
        given = example_inputs(denoiser, 1)
        [sigma] = stepping.visited(stepping.told([level]))
        x = given["x"] / expand(given["sigma"], given["x"]) * sigma
        wanted = edm(x, sigma, given.get("cond"))
        state = stepping.scale(sigma) * x
        found = _one_step(denoiser, network, stepping.scheduler, kind, state, given.get("cond"))
        found = found + blend**2 / (sigma**2 + blend**2) * (x - found)
        worst = max(worst, float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max())))
    if not worst <= TOLERANCE:
        raise ConfigError(
            "diffusers makes other samples of this network than fewstep, so nothing was written",
            got=f"a difference of {worst:.3g}",
            want=f"at most {TOLERANCE:g}",
            do=f"{OTHERWISE}, and please report the network",
        )
    return worst


def _one_step(denoiser: Denoiser, network: Any, scheduler: Any, kind: str, x: Tensor, cond: Tensor | None) -> Tensor:
    """The only step of ``scheduler``, to noise level 0."""
    [t] = scheduler.timesteps
    said = {}
    if denoiser.num_classes and cond is not None:
        said = {"labels": cond.argmax(dim=1)}
    elif cond is not None:
        said = denoiser.conditioning.unpack(cond)
    scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    out = kind_of(kind).call(network, scaled, t.expand(len(x)), said)
    result: Tensor = scheduler.step(out[:, : x.shape[1]], t, x).prev_sample
    return result


def _save(denoiser: Denoiser, pipeline: str, network: Any, scheduler: Any, folder: Path) -> None:
    name = "unet" if type(network).__name__.startswith("UNet") else "transformer"
    parts: dict[str, Any] = {name: network, "scheduler": scheduler}
    if isinstance(denoiser.codec, VaeCodec):
        parts["vae"] = denoiser.codec.network  # whose hash was checked
    made = getattr(library(), pipeline)
    whole = made(**parts) if denoiser.text is None else _with_text(made, Path(denoiser.text["pipeline"]), parts)
    whole.save_pretrained(folder, safe_serialization=True)


def _with_text(made: Any, teacher: Path, parts: dict[str, Any]) -> Any:
    """The teacher's pipeline with another network, scheduler and VAE; its own are not read."""
    index = _known_index(teacher)
    weights = list(teacher.glob("text_encoder*/*.safetensors"))
    half = bool(weights) and all(".fp16." in file.name for file in weights)
    options = {"local_files_only": True, "use_safetensors": True, "variant": "fp16" if half else None}
    try:
        left_out = {name: None for name, value in index.items() if value == [None, None]}  # SD3 without its T5
        with quiet():
            return made.from_pretrained(str(teacher), **left_out, **parts, **options)
    except Exception as error:  # someone else's code may raise anything
        raise _cannot_be_opened(teacher, error) from error


def _known_index(teacher: Path) -> Mapping[str, Any]:
    """The index of the teacher's pipeline, which names nothing but known classes: diffusers imports what it names.

    Raises:
        CheckpointError: it is gone or damaged, or names something else.
        ConfigError: there is code in the folder that diffusers would run.
    """
    file = teacher / INDEX
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _cannot_be_opened(teacher, error) from error
    for name, value in index.items():
        if isinstance(value, list | dict) and not (name != "_class_name" and _is_known(value)):
            raise CheckpointError(
                f"The index '{file}' names a part that is not known here, so it is not opened",
                got=f"{name}: {value}",
                want="classes of diffusers and transformers",
            )
    refuse_code(file, f"The pipeline '{teacher}'")
    return index


def _is_known(value: Any) -> bool:
    """Whether an entry of an index names nothing, or a class that may be opened."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    source, name = value
    own = source == "diffusers" and isinstance(name, str) and name.isidentifier() and name.endswith("Scheduler")
    return value == [None, None] or own or (str(source), str(name)) in KNOWN


def _cannot_be_opened(teacher: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The pipeline '{teacher}', whose VAE and text encoders belong to this student, cannot be opened",
        got=next(iter(str(error).strip().splitlines()), type(error).__name__),
        do="Put it back where it was when the student was tuned: hf download NAME --local-dir FOLDER",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars and warnings of diffusers."""
    with quiet_of(library().utils.logging, ERROR), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
