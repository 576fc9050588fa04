"""An export on its way to the Hugging Face hub (extra ``hf``); nothing is sent until :func:`push`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.checkpoint.hub import first_line, is_offline
from fewstep.errors import ConfigError
from fewstep.exports.origin import UNKNOWN, licence_of

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Upload:
    """What would be sent: ``files`` are (name, bytes), in order."""

    folder: Path
    repository: str
    files: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Bytes in total."""
        return sum(size for _, size in self.files)


def plan_push(folder: Path, repository: str) -> Upload:
    """The files of an export and where they would go.

    Raises:
        ConfigError: the name is not ``owner/name``, or the folder is no export.
    """
    if REPOSITORY.fullmatch(repository) is None:
        raise ConfigError("This is not the name of a repository on the hub", got=repository, want="OWNER/NAME")
    if not is_export(folder):
        raise ConfigError(f"'{folder}' is not an export", do=f"Run: fewstep export RUN --out {folder}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Upload(folder, repository, tuple((p.relative_to(folder).as_posix(), p.stat().st_size) for p in files))


def is_export(folder: Path) -> bool:
    """Whether :func:`fewstep.export` wrote this folder."""
    return (folder / "fewstep.json").is_file() and (folder / "README.md").is_file()


def push(upload: Upload, *, private: bool = False, api: Any = None) -> str:
    """Send it; creates the repository if it does not exist. Returns its address.

    Args:
        private: of a new repository.
        api: in place of ``huggingface_hub.HfApi()``.

    Raises:
        ConfigError: offline, no token, an unknown licence for a public repository, or the hub refused.
    """
    if is_offline():
        raise ConfigError(
            "Nothing can be pushed: this process is offline (HF_HUB_OFFLINE or FEWSTEP_OFFLINE is set)",
            do="Run: unset HF_HUB_OFFLINE FEWSTEP_OFFLINE",
        )
    if not private and licence_of(upload.folder) in (None, UNKNOWN):
        raise ConfigError(
            "Nothing was pushed: nobody has said under which licence the weights are",
            do="Export again with --licence, for example --licence apache-2.0, or add --private",
        )
    api = api if api is not None else _api()
    try:
        address = api.create_repo(upload.repository, exist_ok=True, private=private)
        api.upload_folder(
            repo_id=upload.repository, folder_path=str(upload.folder), commit_message="Export from fewstep"
        )
    except Exception as error:  # no access, connection lost, whatever the hub's library calls it
        raise ConfigError(
            f"The hub did not take '{upload.repository}'", got=first_line(error), do="Check the token: hf auth whoami"
        ) from error
    return str(address)


def _api() -> Any:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ConfigError(
            "Pushing needs huggingface_hub, which is not installed", do="Run: pip install 'fewstep[hf]'"
        ) from error
    token = hub.get_token()
    if not token:
        raise ConfigError("There is no token for the hub", do="Run: hf auth login, or set HF_TOKEN")
    return hub.HfApi(token=token)
