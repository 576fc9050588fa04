"""What is made of the data once, before the first step: of captions their embeddings, of images their latents."""

from __future__ import annotations

from pathlib import Path

from fewstep.backbones.text import encoders_of
from fewstep.data import Source
from fewstep.data.cache import place_for
from fewstep.data.embeddings import Embedded, Encoder, embed, open_embedded, with_conditions
from fewstep.data.sources import captions_of, conditions_of
from fewstep.denoiser import Denoiser
from fewstep.training.config import RunConfig
from fewstep.training.latents import in_model_space
from fewstep.training.loop import Watcher
from fewstep.world import World


def prepared(model: Denoiser, source: Source, config: RunConfig, world: World, watcher: Watcher | None) -> Source:
    """The data as ``model`` is trained on them: :func:`with_prompts`, then :func:`in_model_space`."""
    watcher = watcher or Watcher()
    return in_model_space(model, with_prompts(model, source, config, world, watcher), config, world, watcher)


def with_prompts(model: Denoiser, source: Source, config: RunConfig, world: World, watcher: Watcher) -> Source:
    """The data with the embedded captions that a text-conditional ``model`` is told; for other models as they are.

    Only the leading process loads weights of text encoders, and only for captions that are not in the cache; they are
    gone when this returns. The data must fit the model (:func:`fewstep.training.checks.check_fit`).

    Raises:
        ConfigError: the model does not say where its text encoders are, or there is no place for a cache.
        CheckpointError: the text encoders are gone or damaged.
        DataError: a damaged cache.
    """
    captions = captions_of(source)
    if not model.conditioning.parts or conditions_of(source) is not None or captions is None:
        return source
    encoders = encoders_of(model, world.device)
    cache = place_for("embeddings", config.data.cache)
    return with_conditions(source, _embedded(encoders, list(captions), cache, world, watcher))


def _embedded(encoder: Encoder, captions: list[str], cache: Path, world: World, watcher: Watcher) -> Embedded:
    """Encoded by the leading process; the others wait for as long as that takes, by a collective call per block."""
    if not world.leads:
        while not world.any(False):
            pass
        return open_embedded(encoder, captions, cache)

    def tell(done: int, total: int) -> None:
        world.any(False)
        watcher.preparing("encoding captions", done, total)

    try:
        return embed(encoder, captions, cache, tell)
    finally:
        world.any(True)
