"""Fixtures for every kind of test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights next to the repository; the test is skipped where it is absent."""
    path = Path(__file__).resolve().parents[1].parent / "shared"
    if not path.is_dir():
        pytest.skip(f"{path} is absent: real images and weights are not part of the repository")
    return path


@pytest.fixture(scope="session", autouse=True)
def no_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is written to the user's cache, not even by fixtures of the session and by other processes."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(root / "session"))
        yield root


@pytest.fixture(autouse=True)
def own_cache(no_user_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts with an empty cache of its own (not made yet)."""
    path = no_user_cache / str(next(_numbers))
    monkeypatch.setenv("FEWSTEP_CACHE", str(path))
    return path
