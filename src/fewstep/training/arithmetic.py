"""In which arithmetic a pass runs: chosen per stage, from how close student and target are.

A few-step objective compares two outputs of the network, ``f(x_t, t) - f(x_r, r)``, whose distance shrinks like the
gap ``t - r ~ t/q^a``, while their rounding errors do not. So the coarse arithmetics are right early and wrong late
(docs/performance.md has the measurements behind the two limits). Weights, optimiser and averages are float32 always.
"""

from __future__ import annotations

import torch

from fewstep.arithmetic import Arithmetic, Precision

BF16_UP_TO = 16.0
"""Largest q^a whose gradients bf16 (8 bits) resolves."""

FP16_UP_TO = 256.0
"""Largest q^a whose gradients fp16 and TF32 (11 bits) resolve."""


def arithmetic(precision: Precision, tightness: float | None, device: torch.device) -> Arithmetic:
    """What a step runs in: ``precision`` itself, or for "auto" the fastest arithmetic that is fine enough.

    On a GPU bf16 up to q^a = BF16_UP_TO, fp16 up to FP16_UP_TO, then fp32; on a CPU bf16 (where it has such units),
    then fp32. Without TF32 units, and off the GPU, "tf32" is fp32.

    Args:
        tightness: q^a of :meth:`fewstep.objectives.Objective.tightness`; None, not known, is TF32 on a GPU, else fp32.
    """
    if precision != "auto":
        return "fp32" if precision == "tf32" and device.type != "cuda" else precision
    if device.type == "cuda":
        return _on_gpu(tightness, torch.cuda.get_device_capability(device)[0] >= 8)
    fast = device.type == "cpu" and _cpu_has_bf16()
    return "bf16" if fast and tightness is not None and tightness <= BF16_UP_TO else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bf16 (AVX-512 BF16 or AMX); elsewhere it is slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _on_gpu(tightness: float | None, ampere: bool) -> Arithmetic:
    """Before Ampere there is neither bf16 nor TF32, but fp16."""
    if tightness is None or tightness > FP16_UP_TO:
        return "tf32" if tightness is None and ampere else "fp32"
    return "bf16" if tightness <= BF16_UP_TO and ampere else "fp16"


class Scaling:
    """Loss scaling for fp16, without asking the device: overflowing steps are skipped there, and counted.

    ``backward(scale loss)``, then gradients / scale; where one of them is not finite the optimiser's kernel writes
    nothing and the scale halves, after 2,000 good steps it doubles (Micikevicius et al., arXiv 1710.03740, 3.2). Other
    arithmetics pass through unscaled.
    """

    LEAST = 2.0**-10
    """A smaller scale says that it is not the scale that makes the gradients overflow."""

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
        self.used, self.skipped = False, 0
        """Whether anything was scaled, and how many steps are known to have been skipped."""

    def backward(self, loss: torch.Tensor, kind: Arithmetic) -> None:
        """Gradients of ``loss``, scaled for fp16."""
        self.used |= kind == "fp16"
        scaled: torch.Tensor = self._scaler.scale(loss) if kind == "fp16" else loss
        torch.autograd.backward(scaled)

    def unscale(self, optimizer: torch.optim.Optimizer, kind: Arithmetic) -> None:
        """Gradients in their own units."""
        if kind == "fp16":
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, kind: Arithmetic) -> None:
        """The optimiser's step, or none where a gradient overflowed."""
        if kind != "fp16":
            optimizer.step()
            return
        self._scaler.step(optimizer)
        self._scaler.update()

    def exhausted(self) -> bool:
        """Whether the scale has fallen as far as it goes (reads the device)."""
        return self.used and self._scaler.get_scale() < self.LEAST

    def state(self) -> dict[str, float]:
        """For a checkpoint; empty where nothing was ever scaled (reads the device)."""
        if not self.used:
            return {}
        state = self._scaler.state_dict()
        return {
            "scale": float(state["scale"]),
            "growth": float(state["_growth_tracker"]),
            "skipped": float(self.skipped),
        }

    def restore(self, state: dict[str, float]) -> None:
        """Invert :meth:`state`."""
        if state:
            self.used, self.skipped = True, int(state["skipped"])
            whole = self._scaler.state_dict() | {"scale": state["scale"], "_growth_tracker": int(state["growth"])}
            self._scaler.load_state_dict(whole)
