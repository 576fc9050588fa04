"""Images as what a model of latents trains on: encoded before the first step, by one process for all."""

from __future__ import annotations

from pathlib import Path

from fewstep.data import Source
from fewstep.data.cache import place_for
from fewstep.data.latents import LatentSource, latents_of, open_latents
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.levels import Codec
from fewstep.training.config import RunConfig
from fewstep.training.loop import Watcher
from fewstep.world import World

FAR = 1.5
"""Measured and expected standard deviation of latents that differ by more than this factor are worth a word."""


def in_model_space(model: Denoiser, source: Source, config: RunConfig, world: World, watcher: Watcher) -> Source:
    """The data that ``model`` is trained on: of a model of latents, the (cached) latents of a source of images.

    Raises:
        ConfigError: settings that are about pixels, or no place for a cache.
        DataError: images that the VAE does not read, or a damaged cache.
        CheckpointError: the VAE is gone or has changed.
    """
    if model.codec is None:
        return source
    _refuse_pixels(config)
    if not source.is_images:
        return source
    latents = _encoded(source, model.codec, place_for("latents", config.data.cache), world, watcher)
    mean, std = latents.moments
    watcher.noted(f"Latents of {source.name}: mean {mean:.3g}, standard deviation {std:.3g}.")
    if not 1 / FAR < std / model.sigma_data < FAR:
        watcher.noted(
            f"Caution: the model expects a standard deviation of {model.sigma_data:g} (sigma_data). Noise levels and "
            f"weights of the loss do not suit the data then; a new model can have --set model.sigma_data={std:.2g}."
        )
    return latents


def _refuse_pixels(config: RunConfig) -> None:
    if config.data.flip:
        raise ConfigError(
            "The latents of a mirrored image are not the mirrored latents, so they cannot be flipped while training",
            got="data.flip=true",
            do="Set data.flip=false, and put mirrored copies into the data if it should have them",
        )
    if config.objective.features is not None:
        raise ConfigError(
            "The objective compares pictures in a feature net, and this model makes latents",
            got=config.objective.features,
            do="Set the objective's distance to null (--set objective.levers.distance=null): it measures latents then",
        )


def _encoded(source: Source, codec: Codec, cache: Path, world: World, watcher: Watcher) -> LatentSource:
    """Encoded by the leading process; the others wait for as long as that takes, by a collective call per block."""
    if not world.leads:
        while not world.any(False):
            pass
        return open_latents(source, codec, cache)

    def tell(done: int, total: int) -> None:
        world.any(False)
        watcher.preparing("encoding images", done, total)

    try:
        return latents_of(source, codec, cache, device=world.device, on_encoded=tell)
    finally:
        world.any(True)
