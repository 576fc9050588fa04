"""Prompts as packed rows, by the text encoders of a diffusers pipeline and its own ``encode_prompt``.

Only tokenizers and encoders are opened, from safetensors files; networks and VAEs stay where they are. A row holds the
parts "text" (the states of the tokens) and, where the network takes it, "pooled"; SDXL's also "time_ids".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning import Conditioning, Part
from fewstep.denoiser import Denoiser
from fewstep.errors import CheckpointError, ConfigError

BATCH = 16
"""Prompts at once."""

CLIP_TOKENS, SD3_T5_TOKENS, FLUX_T5_TOKENS = 77, 256, 512
"""Lengths that the pipelines pad to (CLIP's only where the tokenizer does not say it)."""

INSTALL = "Run `pip install 'fewstep[hf]'`"
CLASSES = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel",
    "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast",
)  # fmt: skip
"""What a model_index.json may name: nothing else is looked up."""

_HASHED = (".safetensors", ".json", ".txt", ".model")


@dataclass(frozen=True)
class _Family:
    """Pipelines with the same text encoders: the class that encodes, its parts, and what its rows hold."""

    pipeline: str
    network: str
    encoders: tuple[str, ...]
    optional: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def components(self) -> list[str]:
        """Folders of the tokenizers and the encoders."""
        return [*(name.replace("text_encoder", "tokenizer") for name in self.encoders), *self.encoders]


_ONE, _TWO, _THREE = "text_encoder", "text_encoder_2", "text_encoder_3"
_SD = _Family("StableDiffusionPipeline", "unet", (_ONE,), extra=("safety_checker", "feature_extractor"))
_SDXL = _Family("StableDiffusionXLPipeline", "unet", (_ONE, _TWO))
_SD3 = _Family("StableDiffusion3Pipeline", "transformer", (_ONE, _TWO, _THREE), optional=(_THREE, "tokenizer_3"))
_FLUX = _Family("FluxPipeline", "transformer", (_ONE, _TWO))


def text_parts(folder: str | Path, network: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts of a row, from the pipeline's files and the configuration of its network; no weights are read.

    Args:
        folder: a diffusers pipeline.
        network: the content of ``unet/config.json`` or ``transformer/config.json``.

    Raises:
        CheckpointError: a pipeline without text encoders, or of a kind whose encoders are not known here.
    """
    family, path = _family(Path(folder)), Path(folder)
    if family is _FLUX:
        tokens, pooled = FLUX_T5_TOKENS, network["pooled_projection_dim"]
    elif family is _SD3:
        tokens, pooled = _clip_tokens(path) + SD3_T5_TOKENS, network["pooled_projection_dim"]
    else:
        tokens, pooled = _clip_tokens(path), None
    width = network["cross_attention_dim" if family.network == "unet" else "joint_attention_dim"]
    text = Part("text", (tokens, width if isinstance(width, int) else width[0]))
    if family is _SDXL:
        pooled = network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"]
        return text, Part("pooled", (pooled,)), Part("time_ids", (6,))
    return (text,) if pooled is None else (text, Part("pooled", (pooled,)))


def null_row(folder: str | Path, size: Sequence[int] | None = None) -> Tensor:
    """The row ``[width]`` of the empty prompt: what the pipeline guides away from (SDXL's may be zeros)."""
    return TextEncoders(folder, size=size).nothing()


def encoders_of(denoiser: Denoiser, device: torch.device | None = None) -> TextEncoders:
    """The text encoders that a text-conditional model names; on its device, unless another is given.

    Raises:
        ConfigError: it names none, or they make other rows than it takes.
        CheckpointError: they are gone.
    """
    text = denoiser.text or {}
    folder = text.get("pipeline")
    if folder is None:
        raise ConfigError("This model does not say where its text encoders are", want="text={'pipeline': FOLDER}")
    encoders = TextEncoders(folder, denoiser.device if device is None else device, size=text.get("size"))
    if encoders.conditioning != denoiser.conditioning:
        raise ConfigError(
            f"The text encoders in '{folder}' make other embeddings than this model was trained with",
            got=encoders.conditioning,
            want=denoiser.conditioning,
        )
    return encoders


def prompt_rows(denoiser: Denoiser, prompts: Sequence[str]) -> Tensor:
    """Rows ``[b, width]`` on the CPU that tell a text-conditional model these prompts; equal ones are encoded once."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return encoders_of(denoiser).encode(list(number))[[number[prompt] for prompt in prompts]]


class TextEncoders:
    """The tokenizers and text encoders of a pipeline folder; loaded at the first prompt, in float32.

    Args:
        folder: a diffusers pipeline of Stable Diffusion 1, 2, XL, 3 or Flux.
        device: where to encode.
        size: height and width of the images, in pixels, where it is not the one that the network was made for; only
            SDXL is told.

    Raises:
        CheckpointError: no pipeline, or one without its tokenizers, encoders or safetensors weights.
    """

    def __init__(
        self, folder: str | Path, device: torch.device | str = "cpu", *, size: Sequence[int] | None = None
    ) -> None:
        self.folder, self.device = Path(folder).expanduser(), torch.device(device)
        self._family, self._size = _family(self.folder), size
        self._index = _json(self.folder / "model_index.json")
        self._network = _json(self.folder / self._family.network / "config.json")
        self._present = [name for name in self._family.components if self._has(name)]
        self.conditioning = Conditioning(parts=text_parts(self.folder, self._network))

    @property
    def width(self) -> int:
        """Numbers per row."""
        return self.conditioning.width

    @cached_property
    def hash(self) -> str:
        """sha256, in hex, of all that rows depend on: encoders, tokenizers, and sizes of images."""
        digest = hashlib.sha256(json.dumps([self._family.pipeline, str(self.conditioning), self._time_ids]).encode())
        for path in sorted(f for name in self._present for f in (self.folder / name).iterdir() if f.suffix in _HASHED):
            status = path.stat()
            content = _file_hash(path, status.st_size, status.st_mtime_ns)
            digest.update(f"{path.relative_to(self.folder).as_posix()} {content}\n".encode())
        return digest.hexdigest()

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Rows ``[b, width]`` of the prompts, float32 on the CPU, as the pipeline would condition its network."""
        blocks = [list(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
        return torch.cat([torch.empty(0, self.width), *(self._packed(self._ask(block)) for block in blocks)])

    def nothing(self) -> Tensor:
        """The row ``[width]`` of no prompt: the pipeline's unconditional side of guidance; Flux's empty prompt."""
        return self._packed(self._ask([""], nothing=True))[0]

    @torch.no_grad()
    def _ask(self, prompts: list[str], *, nothing: bool = False) -> dict[str, Tensor]:
        """The pipeline's ``encode_prompt``: "text" and, where it has one, "pooled"; or both of nothing said."""
        about: dict[str, Any] = {"device": self.device, "num_images_per_prompt": 1}
        with quiet():
            if self._family is _FLUX:
                found = self._pipeline.encode_prompt(prompts, None, max_sequence_length=FLUX_T5_TOKENS, **about)
                return {"text": found[0], "pooled": found[1]}
            about["do_classifier_free_guidance"] = nothing
            if self._family is _SD3:
                about |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": SD3_T5_TOKENS}
            found = self._pipeline.encode_prompt(prompts, **about)
        return dict(zip(("text", "pooled"), found[int(nothing) :: 2], strict=False))

    def _packed(self, parts: dict[str, Tensor]) -> Tensor:
        if self._family is _SDXL:
            parts = parts | {"time_ids": torch.tensor(self._time_ids).expand(len(parts["text"]), -1)}
        return self.conditioning.pack(**{name: value.float().cpu() for name, value in parts.items()})

    @cached_property
    def _time_ids(self) -> list[float]:
        """SDXL: original height and width, top and left of the crop, target height and width; all of the image."""
        if self._family is not _SDXL:
            return []
        if self._size is not None:
            height, width = map(float, self._size)
            return [height, width, 0.0, 0.0, height, width]
        size, vae = self._network["sample_size"], self.folder / "vae" / "config.json"
        factor = 2 ** (len(_json(vae)["block_out_channels"]) - 1) if vae.is_file() else 8
        height, width = (float(side * factor) for side in ((size, size) if isinstance(size, int) else size))
        return [height, width, 0.0, 0.0, height, width]

    @cached_property
    def _pipeline(self) -> Any:
        """The pipeline's class around tokenizers and encoders alone."""
        transformers, diffusers = _libraries()
        absent = ("vae", "scheduler", self._family.network, *self._family.extra, *self._family.components)
        parts: dict[str, Any] = dict.fromkeys(absent)
        with quiet():
            parts |= {name: self._open(transformers, name) for name in self._present}
            if self._family is _SD:
                return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
            if self._family is _SDXL:
                zeros = bool(self._index.get("force_zeros_for_empty_prompt", True))
                return diffusers.StableDiffusionXLPipeline(
                    **parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False
                )
            pipeline = getattr(diffusers, self._family.pipeline)(**parts)
        if self._family is _SD3:  # without T5 it asks how wide its states would be
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**self._network))
        return pipeline

    def _has(self, name: str) -> bool:
        """Whether the pipeline has the component; it must, where it is not optional."""
        library, kind = (self._index.get(name) or (None, None))[:2]
        what = name.replace("_", " ")
        if kind is None and name in self._family.optional:
            return False
        if kind is None or not (self.folder / name).is_dir():
            raise CheckpointError(
                f"The pipeline '{self.folder}' has no {what}, which its prompts need",
                do=f"Fetch it again, whole: hf download NAME --local-dir {self.folder}",
            )
        if library != "transformers" or kind not in CLASSES:
            known = ", ".join(CLASSES)
            raise CheckpointError(f"The {what} of '{self.folder}' is of no known kind", got=kind, want=known)
        if name in self._family.encoders and not any((self.folder / name).glob("*.safetensors")):
            raise CheckpointError(
                f"The {what} of '{self.folder}' has no safetensors weights, and pickles are not read",
                do="Save the pipeline again with pipeline.save_pretrained(folder, safe_serialization=True)",
            )
        return True

    def _open(self, transformers: Any, name: str) -> Any:
        """A tokenizer, or an encoder in float32 whose every weight came from its files."""
        kind = getattr(transformers, self._index[name][1])
        folder = self.folder / name
        try:
            if name not in self._family.encoders:
                return kind.from_pretrained(str(folder), local_files_only=True)
            half = all(".fp16." in file.name for file in folder.glob("*.safetensors"))
            model, info = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                variant="fp16" if half else None,
                output_loading_info=True,
            )
        except Exception as error:  # damaged files, broken configurations, a missing sentencepiece
            raise CheckpointError(
                f"The {name.replace('_', ' ')} in '{folder}' cannot be opened", got=_first_line(error)
            ) from error
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if lacking:
            raise CheckpointError(
                f"The weights in '{folder}' are not those of a {kind.__name__}",
                got=f"{len(lacking)} weights missing or of another shape, such as {lacking[0]}",
            )
        return model.float().eval().requires_grad_(False).to(self.device)


def _family(folder: Path) -> _Family:
    """By the network and the number of text encoders, whatever the pipeline's class is called."""
    if not folder.is_dir():
        raise CheckpointError(
            f"The text encoders should be in '{folder}', which does not exist",
            do="Put the pipeline back, or name its folder under text.pipeline in the model's config.json",
        )
    index = _json(folder / "model_index.json")
    networks = {name: (index.get(name) or [None, None])[1] for name in ("unet", "transformer")}
    if networks["unet"] == "UNet2DConditionModel":
        return _SDXL if (index.get(_TWO) or [None])[0] is not None else _SD
    known = {"SD3Transformer2DModel": _SD3, "FluxTransformer2DModel": _FLUX}
    if networks["transformer"] in known:
        return known[networks["transformer"]]
    raise CheckpointError(
        f"How '{folder}' turns prompts into embeddings is not known here",
        got=f"{index.get('_class_name')} with {networks['unet'] or networks['transformer']}",
        want="a pipeline of Stable Diffusion 1, 2, XL, 3 or Flux",
    )


def _clip_tokens(folder: Path) -> int:
    file = folder / "tokenizer" / "tokenizer_config.json"
    return int(_json(file).get("model_max_length", CLIP_TOKENS)) if file.is_file() else CLIP_TOKENS


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path.parent}' is no folder of a diffusers pipeline: it has no {path.name}") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"The file '{path}' is damaged", got=error) from error


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """sha256 of a file's content; once per process, unless the file changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _libraries() -> tuple[Any, Any]:
    try:
        import diffusers
        import transformers

        _ = transformers.CLIPTextModel, diffusers.StableDiffusionPipeline
    except Exception as error:  # missing, or broken: they import torchvision where they find one, broken or not
        missing = isinstance(error, ModuleNotFoundError)
        raise ConfigError(
            f"Prompts need transformers and diffusers, which are {'not installed' if missing else 'broken'}",
            got=_first_line(error),
            do=INSTALL if missing else "If torchvision is what fails, run `pip uninstall torchvision`",
        ) from error
    return transformers, diffusers


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing but errors from both libraries, and no bars; too long prompts are cut, as in the pipeline."""
    transformers, diffusers = (library.utils.logging for library in _libraries())
    before, bars = (transformers.get_verbosity(), diffusers.get_verbosity()), transformers.is_progress_bar_enabled()
    transformers.set_verbosity_error()
    diffusers.set_verbosity_error()
    transformers.disable_progress_bar()
    try:
        yield
    finally:
        transformers.set_verbosity(before[0])
        diffusers.set_verbosity(before[1])
        if bars:
            transformers.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")[:200].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
