"""Files of ``torch.save`` in its zip layout, read with the inert machine: a pickle and raw storages.

Source: torch's serialization notes: ``<root>/data.pkl``, ``<root>/data/<key>`` (uncompressed bytes),
``<root>/byteorder``.
"""

from __future__ import annotations

import io
import re
import zipfile

from fewstep.checkpoint.inert import Ledger
from fewstep.checkpoint.machine import MALFORMED, Machine
from fewstep.checkpoint.stand_ins import StandIns, Storage, declared, storage_from

ZIP_START = b"PK"
MOST_MEMBERS = 100_000
UNREADABLE = (*MALFORMED, zipfile.BadZipFile, EOFError, OSError, NotImplementedError)


class Archive:
    """The members of one zip; nothing is ever written to disk.

    Raises:
        CheckpointError: not a zip of torch.save, compressed, encrypted, or larger inside than outside.
    """

    def __init__(self, raw: bytes, ledger: Ledger) -> None:
        self._ledger = ledger
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(raw))
        except UNREADABLE as error:
            raise ledger.damaged("its zip directory is missing or damaged (cut off?)") from error
        members = self._zip.infolist()
        self._check(members, len(raw))
        roots = {m.filename.removesuffix("/data.pkl") for m in members if m.filename.endswith("/data.pkl")}
        if len(roots) != 1:
            raise ledger.damaged("it is a zip file without exactly one data.pkl")
        (self._root,) = roots
        self._present = {m.filename for m in members}
        self._storages: dict[str, Storage] = {}

    def _check(self, members: list[zipfile.ZipInfo], size: int) -> None:
        names = [member.filename for member in members]
        for member in members:
            parts = re.split(r"[/\\]", member.orig_filename)
            if ".." in parts or parts[0] == "" or "\\" in member.orig_filename or ":" in parts[0]:
                raise self._ledger.damaged("a member of its zip has a path that leads outside of it")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1:
                raise self._ledger.damaged("a member of its zip is compressed or encrypted; torch writes neither")
        if len(names) > MOST_MEMBERS or len(set(names)) != len(names):
            raise self._ledger.damaged("its zip has too many members or two of the same name")
        if sum(max(member.file_size, member.compress_size) for member in members) > size:
            raise self._ledger.damaged("the members of its zip are larger than the file")

    def member(self, name: str) -> bytes:
        """The bytes of ``<root>/<name>``, checksum verified."""
        try:
            return self._zip.read(f"{self._root}/{name}")
        except UNREADABLE as error:
            raise self._ledger.damaged("a member of its zip is missing or damaged") from error

    def storage(self, pid: object) -> Storage:
        """The storage a persistent id announces."""
        wanted = declared(pid, self._ledger)
        if not re.fullmatch(r"[0-9]{1,9}", wanted.key):
            raise self._ledger.damaged("a tensor's storage has a name that is not a number")
        known = self._storages.get(wanted.key)
        if known is None:
            known = storage_from(self.member(f"data/{wanted.key}"), wanted, self._ledger)
            self._storages[wanted.key] = known
        if known.flat.dtype is not wanted.dtype or known.flat.numel() != wanted.count:
            raise self._ledger.damaged("a tensor's storage is announced twice, differently")
        return known

    def tree(self) -> object:
        """The inert tree of ``data.pkl``, its tensors read from the archive."""
        if f"{self._root}/byteorder" in self._present and self.member("byteorder") != b"little":
            raise self._ledger.damaged("it was written on a big-endian machine")
        data = memoryview(self.member("data.pkl"))
        return Machine(data, StandIns(self._ledger).names(), self._ledger, persistent=self.storage).run()
