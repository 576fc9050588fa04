"""A network made into a denoiser: ``D(x_t, t) ~ x_0``, whatever it predicts and whatever its clock.

``D = c_skip x_t + c_out F(c_in x_t, c_noise)``; the four coefficients are the only place where eps-, v-, x0-,
flow-prediction and EDM preconditioning exist (:class:`Parametrization`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from fewstep.conditioning import Conditioning, Part
from fewstep.errors import ConfigError, nearest
from fewstep.levels import Codec
from fewstep.process import PREDICTIONS, Process, affine, expand
from fewstep.types import Condition, Samples, Times

TimeMap = Literal["quarter_log", "quarter_log_thousand", "half_log", "native", "thousand", "thousand_minus_one"]

Sampler = Literal["consistency", "jump"]
"""How a trained student is sampled: f with fresh noise between the steps, or straight jumps from level to level."""

LANDING_FLOOR = 0.002
"""Noise level, at sigma_d = 0.5, below which a two-time network hardly tells landing times apart."""


class Backbone(Protocol):
    """A raw network ``F(x, c_noise, cond)``: knows no process. ``x [b, ...]``, ``c_noise [b]``.

    One that has an attribute ``two_time = True`` takes a fourth argument, ``c_landing [b, 2]``; one that has ``guided =
    True`` takes ``guidance [b]`` by name, within its ``guidance_range`` if it has that. A buffer ``null_cond [width]``
    is the condition that says nothing. A method ``after_step()`` of the network or of any layer in it is called after
    every step of the optimiser.
    """

    def __call__(self, x: Samples, c_noise: Tensor, cond: Condition | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Parametrization:
    """What the network predicts, and how it is told the time: ``(c_in, c_noise, c_skip, c_out)``.

    Args:
        prediction: a member of ``process.PREDICTIONS``.
        sigma_data: standard deviation of the data in model space.
        time: what the network is given: "quarter_log" ``ln(sigma_edm)/4`` (EDM), "quarter_log_thousand"
            ``250 ln(sigma_edm)`` (diffusers' consistency models), "half_log"
            ``ln(sigma_edm/2)`` (VE), "native" t, "thousand" 1000 t (flow models of diffusers),
            "thousand_minus_one" 999 t (EDM's VP networks).
        boundary_shift: at evaluation only, replaces sigma by ``sigma - shift`` in c_skip and the numerator of
            c_out (ECT's public code: 0.003; math.md 1.4). EDM prediction only.
        blend: for "x0" networks, ``D = c x + (1 - c) F`` with ``c = blend^2/(sigma^2 + blend^2)``, so that
            D(x, 0) = x (math.md 1.4).
    """

    prediction: str = "edm"
    sigma_data: float = 0.5
    time: TimeMap = "quarter_log"
    boundary_shift: float = 0.0
    blend: float = 0.0

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS or self.prediction == "velocity":
            raise ConfigError(f"'{self.prediction}' is not a prediction type", do=nearest(self.prediction, PREDICTIONS))
        if self.time not in get_args(TimeMap):
            raise ConfigError(f"'{self.time}' is not a time map", do=nearest(self.time, get_args(TimeMap)))
        if not self.sigma_data > 0:
            raise ConfigError("sigma_data must be positive", got=self.sigma_data)

    def skip_and_out(self, alpha: Tensor, sigma: Tensor, *, evaluating: bool) -> tuple[Tensor, Tensor]:
        """``(c_skip, c_out)`` with ``D = c_skip x_t + c_out F`` (math.md 1.2, 1.3)."""
        c_skip, c_out = affine(self.prediction, alpha, sigma, self.sigma_data)
        if self.prediction == "edm" and evaluating and self.boundary_shift > 0:
            sd, t = self.sigma_data, sigma / alpha
            shifted = t - self.boundary_shift
            return sd**2 / (shifted**2 + sd**2) / alpha, shifted * sd / (t**2 + sd**2).sqrt()
        if self.prediction == "x0" and self.blend > 0:
            c = self.blend**2 / ((sigma / alpha) ** 2 + self.blend**2)
            return c / alpha, 1 - c
        return c_skip, c_out

    def c_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Input scale: ``1/sqrt(sigma_edm^2 + sigma_d^2)`` on ``x_edm`` for EDM and TrigFlow, else 1."""
        if self.prediction in ("edm", "trig"):
            return 1 / (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()
        return torch.ones_like(alpha)

    def c_noise(self, t: Times, sigma_edm: Times) -> Tensor:
        """What the network is told, ``[b]``, from native time and EDM noise level; finite at sigma = 0."""
        least = torch.finfo(sigma_edm.dtype).tiny  # ln 0 would make the network's output NaN, and 0 * NaN too
        if self.time in ("quarter_log", "quarter_log_thousand"):
            return sigma_edm.clamp_min(least).log() * (0.25 if self.time == "quarter_log" else 250.0)
        if self.time == "half_log":
            return (0.5 * sigma_edm.clamp_min(2 * least)).log()
        return t * {"native": 1.0, "thousand": 1000.0, "thousand_minus_one": 999.0}[self.time]

    def c_landing(self, t: Times, s: Times) -> Tensor:
        """What a two-time network is told about a jump from t to s (EDM noise levels), ``(l(s), l(t))``, ``[b, 2]``.

        ``l(u) = ln(u/(2 sigma_d) + 0.002)/4``: EDM's c_noise, at sigma_d = 0.5, but smooth and finite down to 0.
        """
        levels = torch.stack((s, t), dim=1) / (2 * self.sigma_data)
        return (levels + LANDING_FLOOR).log() / 4


class Denoiser(nn.Module):
    """``D(x_t, t, cond) -> x_0-like``: a backbone, the process it was trained under, and a clock.

    A two-time student, ``g(x_t, t, cond, s)``, is also told the time s at which it lands: its landing point is
    ``x_s = g + (s/t) (x_t - g)`` (EDM coordinates). Its g(x_t, t, t) is a denoiser, its g(x_t, t, 0) a consistency
    function.

    Calling it takes ``x_t`` in the coordinates of ``process`` (the clock); internally everything goes
    through EDM coordinates into those of ``native``, where the parametrization lives (math.md 1.1).

    Args:
        backbone: raw network, ``(x, c_noise, cond) -> tensor``.
        process: the clock of ``x_t`` and ``t`` in calls.
        parametrization: meaning of the backbone's output under ``native``.
        native: the process the backbone was trained under; default: ``process``.
        sample_shape: shape of one sample without the batch.
        num_classes: 0 for unconditional models.
        parts: of text-conditional models, the embeddings that a condition is packed from.
        sigma_min, sigma_max: EDM noise levels between which the network is to be trusted; sampling
            starts at ``sigma_max``. Below ``sigma_min`` a sample counts as clean.
        value_range: what uint8 levels 0 and 255 are in model space.
        sampler: how :func:`fewstep.sample` uses it: "consistency" (always to 0, then fresh noise) or "jump"
            (straight from level to level).
        sampler_times: step count -> EDM noise levels of the few-step sampler, largest first, without the final 0.
        spec: how to rebuild the backbone from a file, ``{"name": ..., "kwargs": {...}}``, or None for a
            user's own module.
        codec: the way from latents to images; None where model space is made of pixels or points.
        text: where the text encoders of a text-conditional model are, ``{"pipeline": folder, ...}``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        process: Process,
        parametrization: Parametrization,
        *,
        sample_shape: tuple[int, ...],
        native: Process | None = None,
        num_classes: int = 0,
        parts: tuple[Part, ...] = (),
        sigma_min: float = 0.0,
        sigma_max: float = 80.0,
        value_range: tuple[float, float] = (-1.0, 1.0),
        sampler: Sampler = "consistency",
        sampler_times: dict[int, tuple[float, ...]] | None = None,
        spec: dict[str, Any] | None = None,
        codec: Codec | None = None,
        text: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.process, self.native = process, native or process
        self.parametrization = parametrization
        self.sample_shape, self.conditioning = tuple(sample_shape), Conditioning(num_classes, parts)
        low, high = self.native.edm_range
        self.sigma_min, self.sigma_max = max(sigma_min, low), min(sigma_max, high)
        self.value_range = value_range
        if sampler not in get_args(Sampler):
            raise ConfigError(f"'{sampler}' is not a sampler", do=nearest(sampler, get_args(Sampler)))
        self.sampler: Sampler = sampler
        self.sampler_times = dict(sampler_times or {})
        self.spec, self.codec, self.text = spec, codec, text

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for models without labels."""
        return self.conditioning.num_classes

    @property
    def guided(self) -> bool:
        """Whether the network is told the strength of guidance."""
        return bool(getattr(self.backbone, "guided", False))

    @property
    def guidance_range(self) -> tuple[float, float]:
        """Least and largest strength of guidance that the network may be told."""
        return getattr(self.backbone, "guidance_range", (-math.inf, math.inf))

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data in model space."""
        return self.parametrization.sigma_data

    @property
    def two_time(self) -> bool:
        """Whether the network is told its landing time."""
        return bool(getattr(self.backbone, "two_time", False))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((p.device for p in self.backbone.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Working precision of the weights."""
        return next((p.dtype for p in self.backbone.parameters()), torch.float32)

    def forward(
        self,
        x_t: Samples,
        t: Times | float,
        cond: Tensor | None = None,
        s: Times | float | None = None,
        guidance: Times | float | None = None,
    ) -> Samples:
        """Estimate of x_0 (diffusion model), landing point at time 0 (consistency model), or g (two-time student).

        Args:
            x_t: ``[b, ...]`` in the coordinates of ``process``.
            t: scalar or ``[b]``, in the time of ``process`` (sigma for EDM).
            cond: class indices ``[b]``, one-hot ``[b, num_classes]`` or packed embeddings ``[b, width]``; None is
                "nothing said".
            guidance: strength w that a guided student is told, scalar or ``[b]``; None is 1, or as near as it knows.
            s: landing time of a two-time student, scalar or ``[b]``, on the same clock; None is 0.

        Returns:
            ``[b, ...]`` in model space.

        Raises:
            ConfigError: shapes do not fit, or the network cannot be told a landing time.
        """
        t = self._per_sample(t, x_t)
        label = self.condition(cond, x_t.shape[0])  # not len(): torch.export keeps the batch open
        if self.process == self.native:
            native_t, z, alpha, sigma = t, x_t, self.native.alpha(t), self.native.sigma(t)
            edm = sigma / alpha
        else:
            edm = self.process.to_edm(t)
            alpha = self.native.edm_scale(edm)
            sigma, native_t = alpha * edm, self.native.from_edm(edm)
            z = expand(alpha / self.process.edm_scale(edm), x_t).to(x_t.dtype) * x_t
        landing, strength = self._landing(edm, s, x_t), self._strength(guidance, x_t)
        p = self.parametrization
        c_skip, c_out = p.skip_and_out(alpha, sigma, evaluating=not self.training)
        c_skip, c_out, c_in = (expand(c, z).to(z.dtype) for c in (c_skip, c_out, p.c_in(alpha, sigma)))
        out = self.backbone(c_in * z, p.c_noise(native_t, edm).to(z.dtype), label, *landing, **strength)
        return c_skip * z + c_out * out.to(z.dtype)

    def _landing(self, edm: Times, s: Times | float | None, x_t: Samples) -> tuple[Tensor, ...]:
        """What the network gets beside x_t, t and label: nothing, or ``c_landing [b, 2]`` for the jump to s."""
        if self.two_time:
            landing = (
                torch.zeros_like(edm) if s is None else self.process.to_edm(self._per_sample(s, x_t)).to(edm.dtype)
            )
            return (self.parametrization.c_landing(edm, landing).to(x_t.dtype),)
        if s is not None:
            raise ConfigError(
                "This network cannot be told where to land",
                got="a landing time s",
                do="Leave s out, or make a two-time student of it: fewstep.backbones.two_time.with_landing(denoiser)",
            )
        return ()

    def _strength(self, guidance: Times | float | None, x_t: Samples) -> dict[str, Tensor]:
        """``guidance [b]`` by name for a network that is told it."""
        if self.guided:
            low, high = self.guidance_range
            told = min(max(1.0, low), high) if guidance is None else guidance
            return {"guidance": self._per_sample(told, x_t).to(x_t.dtype)}
        if guidance is not None:
            raise ConfigError(
                "This network cannot be told a strength of guidance",
                got=f"guidance={guidance}",
                do="Leave it out, or wrap the model: fewstep.Guided(denoiser, weight)",
            )
        return {}

    def condition(self, cond: Tensor | None, batch: int) -> Condition | None:
        """What the network is told, float ``[b, width]``: see :meth:`Conditioning.encode`; None is "nothing said"."""
        nothing = getattr(self.backbone, "null_cond", None)
        return self.conditioning.encode(cond, batch, nothing, self.device, self.dtype)

    def under(self, process: Process) -> Denoiser:
        """The same network (shared weights) on another clock."""
        twin = copy.copy(self)
        twin.process = process
        return twin

    def with_parametrization(self, parametrization: Parametrization) -> Denoiser:
        """The same network (shared weights) under another parametrization."""
        twin = copy.copy(self)
        twin.parametrization = parametrization
        return twin

    def around(self, backbone: nn.Module, spec: dict[str, Any] | None) -> Denoiser:
        """The same process, meaning and sampler around another network."""
        twin = copy.copy(self)
        twin._modules = self._modules | {"backbone": backbone}  # a shallow copy would share the table
        twin.sampler_times, twin.spec = dict(self.sampler_times), spec
        return twin

    def clone(self) -> Denoiser:
        """An independent copy: own weights."""
        return copy.deepcopy(self)

    def _per_sample(self, t: Times | float, x_t: Samples) -> Times:
        if tuple(x_t.shape[1:]) != self.sample_shape:
            raise ConfigError(
                "The input does not have the model's sample shape", got=tuple(x_t.shape), want=("b", *self.sample_shape)
            )
        keep = isinstance(t, Tensor) and t.is_floating_point()
        t = torch.as_tensor(t, dtype=None if keep else x_t.dtype, device=x_t.device)
        if t.ndim == 0:
            return t.expand(x_t.shape[0])
        if t.shape != x_t.shape[:1]:
            raise ConfigError("The times have the wrong shape", got=tuple(t.shape), want=f"a scalar or [{len(x_t)}]")
        return t

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        process: Process,
        prediction: Literal["eps", "v", "x0", "flow", "score"],
        sample_shape: tuple[int, ...],
        time: Callable[[Tensor], Tensor] | None = None,
        num_classes: int = 0,
        sigma_data: float = 0.5,
        sigma_max: float = 80.0,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> Denoiser:
        """Wrap any ``nn.Module`` that was trained as a diffusion or flow model.

        Args:
            module: called as ``module(x_t, time(t))``, with a third argument ``one_hot [b, num_classes]`` when
                ``num_classes > 0``; returns the prediction, ``[b, ...]``.
            process: the process it was trained under, for example ``DiscreteVP.linear()``.
            prediction: what it returns: "eps", "v", "x0", "flow" or "score".
            sample_shape: shape of one sample.
            time: maps native times ``[b]`` to what the module expects; default: unchanged.
            sigma_data: standard deviation of its training data, in its own value range.
            sigma_max: EDM noise level to start sampling from (clipped to the process's own range).
            value_range: what uint8 levels 0 and 255 are for this module.
        """
        low, _ = process.edm_range
        blend = max(low, 0.004 * sigma_data) if prediction == "x0" else 0.0
        parametrization = Parametrization(prediction, sigma_data=sigma_data, time="native", blend=blend)
        return cls(
            ModuleBackbone(module, time, num_classes > 0),
            process,
            parametrization,
            sample_shape=sample_shape,
            num_classes=num_classes,
            sigma_max=sigma_max,
            value_range=value_range,
        )


class ModuleBackbone(nn.Module):
    """A user's module as a backbone: applies its time map, passes labels only if it takes them."""

    def __init__(self, module: nn.Module, time: Callable[[Tensor], Tensor] | None, conditional: bool) -> None:
        super().__init__()
        self.module, self.time, self.conditional = module, time, conditional

    def forward(self, x: Samples, c_noise: Tensor, cond: Condition | None = None) -> Tensor:
        t = self.time(c_noise) if self.time is not None else c_noise
        out = self.module(x, t, cond) if self.conditional else self.module(x, t)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise ConfigError(
                "The wrapped module did not return a tensor of its input's shape",
                got=tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__,
                want=tuple(x.shape),
                do="Return the prediction itself, not a record around it",
            )
        return out
