"""Networks of EDM, ECT and EDM2, read from their pickles without running anything in them.

A snapshot (``.pkl``) is a dict with the network under ``ema``; a training state (``.pt``) one with
``net`` and ``optimizer_state``. Each object carries the source text of its module, which ordinary
unpickling executes; here that text stays text.

Source: NVlabs/edm and locuslab/ect, ``torch_utils/persistence.py`` (version 6) and ``training_loop``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fewstep.checkpoint.inert import Ledger, Limits, Opaque, Persistent, printable
from fewstep.checkpoint.machine import Machine
from fewstep.checkpoint.stand_ins import StandIns
from fewstep.checkpoint.torch_zip import ZIP_START, Archive
from fewstep.errors import CheckpointError, nearest

INNER = ("model", "unet")
"""Where a preconditioner keeps its network: EDM and ECT say ``model``, EDM2 ``unet``."""

MISTAKEN = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself (run `git lfs pull`)",
    b"<!DOCTYPE": "it is a web page, not a checkpoint",
    b"<html": "it is a web page, not a checkpoint",
    b"\x89PNG": "it is an image, not a pickle",
}
MOST_MODULES = 20_000


@dataclass(frozen=True, eq=False)
class NetworkRecord:
    """One network of a pickle, as data.

    Attributes:
        precond_class: EDMPrecond, ECMPrecond, VPPrecond, VEPrecond, Precond (EDM2), ...
        precond_kwargs: its plain attributes: img_resolution, img_channels, label_dim, sigma_data, ...
            (sigma_max may be infinite).
        model_class: SongUNet, DhariwalUNet, ...
        model_kwargs: the constructor arguments of the inner model, JSON-able (tuples became lists).
        state: parameters and buffers of the inner model, as stored, named as in its ``state_dict``.
        precond_state: parameters and buffers of the preconditioner outside of the inner model.
        optimizer_state: parameter name (as in ``state``) -> step, exp_avg, exp_avg_sq; None if not stored.
        encoder_class: what made its samples of images, for EDM2 StandardRGBEncoder or StabilityVAEEncoder; None if not
            stored.
        source_sha256: of the whole file.
    """

    precond_class: str
    precond_kwargs: dict[str, object]
    model_class: str
    model_kwargs: dict[str, object]
    state: dict[str, Tensor] = field(repr=False)
    precond_state: dict[str, Tensor] = field(repr=False)
    optimizer_state: dict[str, dict[str, Tensor]] | None = field(repr=False)
    encoder_class: str | None
    source_sha256: str


def read_pickle(path: Path, *, limits: Limits | None = None) -> object:
    """The inert tree of a pickle or torch.save zip: plain values, tensors, Persistent and Opaque records.

    Raises:
        UnsafePickleError: it asks for a name outside the allow-list.
        CheckpointError: it is missing, cut off, too large, nested too deeply, or not a pickle.
    """
    return _tree(*_open(Path(path), limits or Limits()))


def read_network(path: Path, *, which: str = "ema", limits: Limits | None = None) -> NetworkRecord:
    """The network stored under ``which`` ("ema" in snapshots, "net" in training states).

    Raises:
        UnsafePickleError: the file asks for a name outside the allow-list.
        CheckpointError: it cannot be read, or holds no such network.
    """
    raw, ledger = _open(Path(path), limits or Limits())
    root = _tree(raw, ledger)
    precond = _network(root, which, ledger)
    name, inner = _inner(precond, ledger)
    prefix = f"{name}."
    named = list(_tensors(precond, ledger))
    if sum(tensor.nbytes for _, tensor, _ in named) > len(raw):
        raise ledger.damaged("its tensors ask for more bytes than the file holds")
    if inner.init_args != ():
        raise ledger.damaged("its inner network was made with positional arguments, whose names are unknown")
    model_kwargs = _plain(inner.init_kwargs, ledger)
    if not isinstance(model_kwargs, dict):
        raise ledger.damaged("its inner network's arguments are not named")
    return NetworkRecord(
        precond_class=_class_name(precond, ledger),
        precond_kwargs=_attributes(precond, ledger),
        model_class=_class_name(inner, ledger),
        model_kwargs=model_kwargs,
        state={key.removeprefix(prefix): _own(t) for key, t, _ in named if key.startswith(prefix)},
        precond_state={key: _own(t) for key, t, _ in named if not key.startswith(prefix)},
        optimizer_state=_optimizer(root, [(n, t) for n, t, learned in named if learned], prefix, ledger),
        encoder_class=_encoder(root, ledger),
        source_sha256=hashlib.sha256(raw).hexdigest(),
    )


def require_supported(record: NetworkRecord, supported: Collection[str], path: Path) -> None:
    """Raise CheckpointError when ``record.precond_class`` is not one of ``supported``."""
    if record.precond_class not in supported:
        edm2 = " (a network of EDM2)" if record.precond_class == "Precond" else ""
        raise CheckpointError(
            f"'{path}' holds a {record.precond_class}{edm2}, which cannot be converted yet",
            want=" or ".join(sorted(supported)),
        )


# Files.


def _open(path: Path, limits: Limits) -> tuple[bytes, Ledger]:
    if not path.is_file():
        kind = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"'{path}' {kind}", do="Give the path of a .pkl of EDM, ECT or EDM2, or of a .pt of ECT")
    try:
        size = path.stat().st_size
        if size > limits.file_bytes:
            raise CheckpointError(
                f"'{path}' is larger than a checkpoint may be",
                got=f"{size} bytes",
                want=f"at most {limits.file_bytes}",
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be opened: {error.strerror}") from error
    ledger = Ledger(str(path), limits, storage_bytes=len(raw))
    if not raw:
        raise ledger.damaged("it is empty")
    for start, reason in MISTAKEN.items():
        if raw.startswith(start):
            raise ledger.damaged(reason)
    return raw, ledger


def _tree(raw: bytes, ledger: Ledger) -> object:
    if raw.startswith(ZIP_START):
        return Archive(raw, ledger).tree()
    machine = Machine(memoryview(raw), StandIns(ledger).names(), ledger)
    tree = machine.run()
    if machine.position != len(raw):
        raise ledger.damaged(f"it goes on after its end (byte {machine.position} of {len(raw)})")
    return tree


# The network in the tree.


def _network(root: object, which: str, ledger: Ledger) -> Persistent:
    if not isinstance(root, dict):
        raise ledger.damaged("it is a pickle but holds no network")
    networks = {
        key: value
        for key, value in root.items()
        if isinstance(key, str) and isinstance(value, Persistent) and value.state.get("_modules")
    }
    if not networks:
        keys = ", ".join(printable(str(key)) for key in list(root)[:8]) or "nothing"
        raise ledger.damaged(f"it is a pickle but holds no network (it holds: {keys})")
    if which not in networks:
        names = [printable(name) for name in networks]
        raise CheckpointError(
            f"'{ledger.source}' holds no network called '{which}'",
            do=f"Choose another one. {nearest(which, names)}",
        )
    return networks[which]


def _inner(precond: Persistent, ledger: Ledger) -> tuple[str, Persistent]:
    modules = precond.state["_modules"]
    if isinstance(modules, dict):
        for name in INNER:
            if isinstance(modules.get(name), Persistent):
                return name, modules[name]
    raise ledger.damaged(f"its {_class_name(precond, ledger)} has no inner network")


def _encoder(root: object, ledger: Ledger) -> str | None:
    """The class of the encoder that lies beside the networks."""
    encoder = root.get("encoder") if isinstance(root, dict) else None
    return _class_name(encoder, ledger) if isinstance(encoder, Persistent) else None


def _class_name(record: Persistent, ledger: Ledger) -> str:
    if not record.class_name.isidentifier() or len(record.class_name) > 80:
        raise ledger.damaged("the class of its network has no proper name")
    return record.class_name


def _attributes(precond: Persistent, ledger: Ledger) -> dict[str, object]:
    values: dict[str, object] = {
        key: value
        for key, value in precond.state.items()
        if isinstance(key, str) and not key.startswith("_") and key != "training"
        and isinstance(value, bool | int | float | str)
    }  # fmt: skip
    for key, least in (("img_resolution", 1), ("img_channels", 1), ("label_dim", 0)):
        value = values.get(key)
        if type(value) is not int or not least <= value <= 1 << 20:
            raise ledger.damaged(f"its {_class_name(precond, ledger)} has no usable {key}")
    return values


def _plain(value: object, ledger: Ledger, depth: int = 0) -> object:
    ledger.spend_operations(100)  # arguments are few; shared lists can make them exponentially many
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) < 1000):
        return value
    if depth < 8 and isinstance(value, list | tuple):
        return [_plain(item, ledger, depth + 1) for item in value]
    if depth < 8 and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, ledger, depth + 1) for key, item in value.items()}
    raise ledger.damaged("an argument of its network is not a plain value")


def _own(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous and in a storage of its own size."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


# Walking modules in the order of torch's state_dict and parameters().


def _tensors(root: Persistent, ledger: Ledger) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, is it a parameter) for each module in order; no recursion, each module counted."""
    waiting: list[tuple[str, object]] = [("", root)]
    visited = 0
    while waiting:
        prefix, module = waiting.pop()
        visited += 1
        if visited > MOST_MODULES or len(prefix) > 1000:
            raise ledger.damaged(f"its network has more than {MOST_MODULES} modules or modules nested too deeply")
        if module is None:
            continue
        state = _module_state(module, ledger)
        hidden = state.get("_non_persistent_buffers_set") or ()
        for kind, learned in (("_parameters", True), ("_buffers", False)):
            for name, tensor in _entries(state, kind, ledger):
                if tensor is None or (not learned and isinstance(hidden, set) and name in hidden):
                    continue
                if not isinstance(tensor, Tensor):
                    raise ledger.damaged(f"{printable(prefix + name)} in its network is not a tensor")
                yield prefix + name, tensor, learned
        below = [(f"{prefix}{name}.", child) for name, child in _entries(state, "_modules", ledger)]
        waiting.extend(reversed(below))


def _module_state(module: object, ledger: Ledger) -> dict[object, object]:
    if isinstance(module, Persistent | Opaque) and isinstance(module.state, dict):
        return module.state
    raise ledger.damaged("a part of its network is not a module")


def _entries(state: dict[object, object], kind: str, ledger: Ledger) -> list[tuple[str, object]]:
    entries = state.get(kind)
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise ledger.damaged("a module of its network is described in an unknown form")
    return list(entries.items())


# The optimizer.


def _optimizer(
    root: object, learned: list[tuple[str, Tensor]], prefix: str, ledger: Ledger
) -> dict[str, dict[str, Tensor]] | None:
    match root:
        case {"optimizer_state": {"state": dict(slots), "param_groups": list(groups)}}:
            pass
        case _:
            return None
    order = [index for group in groups for index in (group.get("params", []) if isinstance(group, dict) else [])]
    if len(order) != len(learned):
        raise ledger.damaged("its optimizer does not belong to its network (the number of parameters differs)")
    result: dict[str, dict[str, Tensor]] = {}
    for index, (name, parameter) in zip(order, learned, strict=True):
        slot = slots.get(index) if isinstance(index, int) else None
        if isinstance(slot, dict):
            result[name.removeprefix(prefix)] = _slot(slot, parameter, ledger)
    return result


def _slot(slot: dict[object, object], parameter: Tensor, ledger: Ledger) -> dict[str, Tensor]:
    step = slot.get("step")
    values = {"step": torch.tensor(float(step)) if isinstance(step, int | float) else step}
    values |= {key: slot.get(key) for key in ("exp_avg", "exp_avg_sq")}
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    moments = [tensors[key] for key in ("exp_avg", "exp_avg_sq") if key in tensors]
    if len(tensors) < 3 or tensors["step"].numel() != 1 or any(m.shape != parameter.shape for m in moments):
        raise ledger.damaged("its optimizer does not belong to its network (moments are missing or of another shape)")
    return {key: _own(tensor) for key, tensor in tensors.items()}
