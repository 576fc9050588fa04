"""The Inception network of FID, from one of the two published files of TensorFlow's weights of 2015-12-05.

torch-fidelity's ``.pth`` needs torch-fidelity (extra ``metrics``), NVIDIA's TorchScript ``.pt`` needs torch alone.
A pickle is read as plain tensors, so nothing that a file brings is run, and nothing is downloaded: where the weights
are missing, the message names the command that fetches them.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.checkpoint.hub import first_line
from fewstep.checkpoint.state_dict import read_state_dict
from fewstep.checkpoint.store import file_hash
from fewstep.errors import CheckpointError, ConfigError
from fewstep.evaluation.pretrained import INSTALL, Pretrained

INCEPTION_DIM = 2048
PREPROCESSING = "uint8, TF1 bilinear 299x299 without antialias, (x-128)/128; grey repeated to 3 channels"
INCEPTION_FILES = {  # file name: (sha256, address). Both hold the TensorFlow weights of 2015-12-05, in two formats.
    "weights-inception-2015-12-05-6726825d.pth": (
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    "inception-2015-12-05.pt": (
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    ),
}


class FidelityInception(nn.Module):
    """torch-fidelity's Inception: features before the last layer, uint8 ``[b, 3, h, w]`` -> ``[b, 2048]``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[b, 2048]``."""
        features: Tensor = self.net(x)[0]
        return features

    def head(self, features: Tensor) -> Tensor:
        """Logits ``[b, 1008]`` without bias (Salimans et al. 2016 left it out): W f."""
        weight: Tensor = self.net.fc.weight  # type: ignore[union-attr,assignment]
        return features @ weight.T


class ScriptedInception(nn.Module):
    """NVIDIA's TorchScript Inception: uint8 ``[b, 3, h, w]`` -> ``[b, 2048]``; needs torch only."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[b, 2048]``."""
        features: Tensor = self.net(x, return_features=True)
        return features

    def head(self, features: Tensor) -> Tensor:
        """Logits ``[b, 1008]`` without bias: W f. The file's own ``no_output_bias=True`` is their softmax."""
        weight: Tensor = self.net.output.weight  # type: ignore[union-attr,assignment]
        return features @ weight.T


def open_inception(spec: str) -> Pretrained:
    """The Inception network of FID, 2048 features: from a path, or from the cache where ``spec`` is empty.

    Reads torch-fidelity's ``.pth`` (or the same tensors as ``.safetensors``) and NVIDIA's TorchScript ``.pt``.
    The name is "Inception" for the two published files (by sha256), else "Inception-" and 8 digits of the hash.
    Source: Heusel et al. 2017 (FID); Salimans et al. 2016 (Inception score).

    Raises:
        CheckpointError: the weights are missing, unreadable or of another network.
        ConfigError: torch-fidelity is missing or cannot be imported.
    """
    path = Path(spec).expanduser() if spec else _cached_inception()
    if not path.is_file():
        raise CheckpointError(f"The weights file '{path}' of Inception does not exist", do=f"Run `{_download()}`")
    digest = file_hash(path)
    net = _scripted_inception(path) if _is_torchscript(path) else _fidelity_inception(path)
    verified = digest in [known for known, _ in INCEPTION_FILES.values()]
    return Pretrained(
        name="Inception" if verified else f"Inception-{digest[:8]}",
        dim=INCEPTION_DIM,
        hash=digest,
        preprocessing=PREPROCESSING,
        net=net.eval().requires_grad_(False),
        head=net.head,
        verified=verified,
    )


def _inception_folders() -> list[Path]:
    own = os.environ.get("FEWSTEP_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fewstep")
    return [Path(torch.hub.get_dir()) / "checkpoints", Path(own).expanduser()]


def _cached_inception() -> Path:
    fidelity, nvidia = INCEPTION_FILES
    names = (nvidia, fidelity, f"pt_{fidelity.removeprefix('weights-')}")  # the last: pytorch-fid's copy of the second
    for path in (folder / name for folder in _inception_folders() for name in names):
        if path.is_file():
            return path
    places = " and ".join(f"'{folder}'" for folder in _inception_folders())
    raise CheckpointError(f"The Inception weights are not in the cache ({places})", do=f"Run `{_download()}`")


def _download(name: str = "") -> str:
    """The command that fetches ``name``; by default the file that this installation can read."""
    fidelity, nvidia = INCEPTION_FILES
    name = name or (nvidia if importlib.util.find_spec("torch_fidelity") is None else fidelity)
    return f"curl -L --create-dirs -o '{_inception_folders()[0] / name}' {INCEPTION_FILES[name][1]}"


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except zipfile.BadZipFile:
        return False


def _scripted_inception(path: Path) -> ScriptedInception:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # deprecated in torch 2.13; the file stays
            net = ScriptedInception(torch.jit.load(str(path), map_location="cpu").eval())  # type: ignore[no-untyped-call]
        with torch.no_grad():
            features = net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
            logits = net.head(features)
        got = f"features {list(features.shape)}, logits {list(logits.shape)}"
        wrong = features.shape != (2, INCEPTION_DIM) or logits.ndim != 2
    except Exception as error:  # a file's own code may raise anything
        got, wrong = first_line(error), True
    if wrong:
        raise CheckpointError(
            f"The TorchScript file '{path}' is not NVIDIA's Inception",
            got=got,
            want=f"net(uint8 [b, 3, h, w], return_features=True) -> [b, {INCEPTION_DIM}], net.output.weight",
            do=f"Use torchscript:{path} for another net",
        )
    return net


def _fidelity_inception(path: Path) -> FidelityInception:
    """torch-fidelity reads its file as a pickle that may run code, so it is given our own copy of the tensors."""
    state = _plain_tensors(path)
    extractor = _torch_fidelity()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(state, copy)
        try:
            net = extractor("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy)
        except RuntimeError as error:
            lines = [" ".join(line.split()) for line in str(error).splitlines()[1:]] or [first_line(error)]
            raise CheckpointError(
                f"The weights file '{path}' is not that of torch-fidelity's Inception",
                got=f"{len(lines)} differences: {lines[0][:200].rstrip('.')}",
                want=f"the tensors of {next(iter(INCEPTION_FILES))}",
                do=f"Run `{_download()}`",
            ) from error
    return FidelityInception(net)


def _plain_tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path) if path.suffix == ".safetensors" else read_state_dict(path)
    except (CheckpointError, SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The weights file '{path}' is not a readable file of plain tensors",
            got=first_line(error),
            do=f"Run `{_download()}`",
        ) from error


def _torch_fidelity() -> Callable[..., nn.Module]:
    instead = f"or use NVIDIA's file, which needs torch alone: `{_download('inception-2015-12-05.pt')}`"
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ConfigError(
            "This Inception file needs torch-fidelity, which is not installed", do=f"{INSTALL}, {instead}"
        )
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # a torchvision built for another torch raises RuntimeError, OSError, ...
        raise ConfigError(
            f"torch-fidelity is installed, but cannot be imported with torch {torch.__version__}",
            got=first_line(error),
            want="a torchvision that was built for this torch",
            do=f"Install it from the index that torch came from (https://pytorch.org/get-started), {instead}",
        ) from error
    return FeatureExtractorInceptionV3
