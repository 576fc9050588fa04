"""Diffusers' VAEs as the way from latents to images."""

from __future__ import annotations

from typing import Any

from fewstep.denoiser import Codec


def open_codec(description: dict[str, Any]) -> Codec:
    """The codec of a description."""
    raise NotImplementedError
