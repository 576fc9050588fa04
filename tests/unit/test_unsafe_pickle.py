"""Hostile and damaged pickles: refused with one clear sentence, and nothing in them runs.

Pickles are put together opcode by opcode. ``test_the_minimal_snapshot_reads`` is the control: the same
assembler makes a file that is accepted, so a refusal below is due to the one thing that differs.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.checkpoint.edm_pickle import read_network, read_pickle
from fewstep.checkpoint.inert import Limits, Opaque
from fewstep.errors import CheckpointError, UnsafePickleError

FORBIDDEN_EVENTS = (
    "exec",
    "compile",
    "import",
    "os.system",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
)
WATCH: list[list[str]] = []


def _listen(event: str, _arguments: object) -> None:
    if WATCH and event in FORBIDDEN_EVENTS:
        WATCH[-1].append(event)


sys.addaudithook(_listen)


@dataclass(frozen=True)
class Call:
    """``module.name(*args)`` as a pickle writes it: a name, arguments, REDUCE."""

    module: str
    name: str
    args: tuple[object, ...] = ()


@dataclass(frozen=True)
class Raw:
    """Opcodes put in as they are."""

    code: bytes


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def code(value: object) -> bytes:
    """Opcodes (protocol 2 to 4) that push ``value``."""
    match value:
        case Raw(opcodes):
            return opcodes
        case Call(module, name, args):
            return text(module) + text(name) + b"\x93" + code(args) + b"R"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return text(value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(k) + code(v) for k, v in value.items()) + b"u"
    raise AssertionError(f"the assembler cannot write {value!r}")


def pickled(value: object) -> bytes:
    return b"\x80\x04" + code(value) + b"."


def storage(values: torch.Tensor) -> Call:
    """A storage in torch's legacy layout, as torch itself pickles it."""
    buffer = io.BytesIO()
    torch.save(values.untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    return Call("torch.storage", "_load_from_bytes", (buffer.getvalue(),))


def tensor(size: object = (2, 3), stride: object = (3, 1), offset: object = 0, of: object = None) -> Call:
    held = storage(torch.arange(24, dtype=torch.uint8)) if of is None else of
    hooks = Call("collections", "OrderedDict")
    return Call("torch._utils", "_rebuild_tensor_v2", (held, offset, size, stride, False, hooks))


def persistent(class_name: str, state: object, source: str = "open('/tmp/fewstep_pwned', 'w')") -> Call:
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", (meta,))


def module(class_name: str, parameters: object, modules: object, **attributes: object) -> Call:
    state = {"_parameters": parameters, "_buffers": {}, "_modules": modules, **attributes}
    return persistent(class_name, state)


def snapshot(weight: object, kwargs: object = None, modules: object = None, **more: object) -> dict[str, object]:
    inner = module("SongUNet", {"w": weight}, modules or {}, _init_args=(), _init_kwargs=kwargs or {"k": (1, 2)})
    sizes = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "sigma_data": 0.5}
    return {"ema": module("EDMPrecond", {}, {"model": inner}, **sizes), **more}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def written(raw: bytes) -> Path:
        path = tmp_path / "file.pkl"
        path.write_bytes(raw)
        return path

    return written


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hostile payloads below create ``pwned`` in the working directory; none may."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "pwned").exists()
    assert not Path("/tmp/fewstep_pwned").exists()


def refusal(path: Path, which: str = "ema") -> CheckpointError:
    """The error of reading ``path``: one sentence with the file and a remedy; watched for executions."""
    with pytest.raises(CheckpointError) as caught:
        read_network(path, which=which)
    WATCH.append([])
    try:
        with pytest.raises(CheckpointError):  # the second time, when nothing is imported any more
            read_network(path, which=which)
    finally:
        events = WATCH.pop()
    assert events == []
    message = str(caught.value)
    assert path.name in message
    assert message.isprintable()
    assert len(message) < 700
    return caught.value


def refused(path: Path, name: str) -> None:
    error = refusal(path)
    assert isinstance(error, UnsafePickleError), error
    assert name in str(error)
    assert "nothing was executed" in str(error)
    assert "original .pkl" in str(error)


class Payload:
    """Pickles as a call of ``function``, by Python's own pickler."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_the_minimal_snapshot_reads(write: Callable[[bytes], Path]) -> None:
    record = read_network(write(pickled(snapshot(tensor()))))
    assert torch.equal(record.state["w"], torch.arange(6, dtype=torch.uint8).view(2, 3))
    assert (record.model_class, record.model_kwargs) == ("SongUNet", {"k": [1, 2]})


def test_plain_values_equal_pickles_own_reading(write: Callable[[bytes], Path]) -> None:
    value = [
        {"a": [1, -2, 2**40, 2.5, None, True, "ü\n\\"], "b": ((), (1,), (1, 2, 3, 4))},
        {"x", "y"},
        [],
        {},
    ]
    for protocol in range(6):
        assert read_pickle(write(pickle.dumps(value, protocol=protocol))) == value


# Names.

PAYLOADS = {
    "posix.system": (os.system, "touch pwned"),
    "builtins.eval": (eval, "open('pwned', 'w')"),
    "builtins.exec": (exec, "open('pwned', 'w')"),
    "builtins.__import__": (__import__, "os"),
    "builtins.open": (open, "pwned", "w"),
    "torch.serialization.load": (torch.load, "x"),
    "_io.open": (io.open, "pwned", "w"),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_forbidden_name_is_refused(write: Callable[[bytes], Path], name: str, protocol: int) -> None:
    function, *args = PAYLOADS[name]
    raw = pickle.dumps({"ema": Payload(function, *args)}, protocol=protocol)
    refused(write(raw), function.__module__.removeprefix("_") if name == "_io.open" else name.split(".")[-1])


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"cos\nsystem\n(S'touch pwned'\ntR.", "os.system"),
        (b"(S'touch pwned'\nios\nsystem\n.", "unknown"),
        (b"(Vtouch pwned\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nVtouch pwned\no.", "os.system"),
        (b"(ccollections\nOrderedDict\no.", "opcode OBJ"),
        (b"ccopyreg\n_reconstructor\n(c__main__\nX\nc__builtin__\nobject\nNtR.", "copyreg._reconstructor"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02\x83\x01\x00.", "opcode EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4"),
        (b"\x80\x02Vkey\nQ.", "persistent id"),
        (b"Pkey\n.", "persistent id"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x04" + text("os") + text("system") + b"\x93)}\x92.", "os.system"),
        (b"\x80\x04" + text("dnnlib.util") + text("EasyDict") + b"\x93)}\x92.", "NEWOBJ_EX"),
        (b"\x80\x04" + text("os.path") + text("join") + b"\x93.", "os.path.join"),
        (b"\x80\x04" + text("builtins") + text("getattr.__self__") + b"\x93.", "builtins.getattr.__self__"),
        (pickled(Call("torch.nn.modules.conv", "Conv2d")), "torch.nn.modules.conv.Conv2d"),
        (b"\x80\x04" + code("text") + b")R.", "a call of str"),
        (b"\x80\x04" + code({}) + b")\x81.", "a call of dict"),
        (b"\x80\x04" + code(persistent("A", {})) + b"}b.", "change of the state of Persistent"),
        (b"\x80\x04" + text("builtins") + text("getattr") + b"\x93}b.", "change of the state of StandIn"),
        (pickled(Call("numpy", "dtype", ("O8", False, True))), "numpy.dtype('O8')"),
        (pickled(Call("numpy", "dtype", ("V8", False, True))), "numpy.dtype('V8')"),
        (pickled(Call("_codecs", "encode", ("x", "rot13"))), "_codecs.encode"),
    ],
)
def test_a_handmade_attack_is_refused(write: Callable[[bytes], Path], raw: bytes, name: str) -> None:
    if name == "unknown":  # Python 2's text opcode is not read at all
        assert "not a pickle" in str(refusal(write(raw)))
    elif raw.startswith(b"cos"):
        refused(write(raw), "os.system")
    else:
        refused(write(raw), name)


def test_getattr_is_a_record_and_cannot_be_called(write: Callable[[bytes], Path]) -> None:
    chain = Call("builtins", "getattr", (persistent("A", {}), "__class__"))
    tree = read_pickle(write(pickled({"m": chain})))
    assert isinstance(tree, dict)
    assert isinstance(tree["m"], Opaque)
    assert tree["m"].args[1] == "__class__"
    longer = Call("builtins", "getattr", (chain, "__import__"))
    refused(write(b"\x80\x04" + code(longer) + code(("os",)) + b"R."), "a call of builtins.getattr")


def test_a_structured_numpy_dtype_is_refused(write: Callable[[bytes], Path]) -> None:
    made = code(Call("numpy", "dtype", ("f8", False, True)))
    fields = made + code((3, "<", None, ("a",), {"a": 1}, -1, -1, 0)) + b"b"
    refused(write(pickled(Call("numpy.core.multiarray", "scalar", (Raw(fields), b"8bytes!!")))), "numpy scalar")


@pytest.mark.parametrize(("order", "packed"), [("<", "<d"), (">", ">d")])
def test_a_numpy_scalar_becomes_its_number(write: Callable[[bytes], Path], order: str, packed: str) -> None:
    made = code(Call("numpy", "dtype", ("f8", False, True)))
    plain = Raw(made + code((3, order, None, None, None, -1, -1, 0)) + b"b")
    value = struct.pack(packed, 0.7071)
    for module_name in ("numpy.core.multiarray", "numpy._core.multiarray"):
        assert read_pickle(write(pickled(Call(module_name, "scalar", (plain, value))))) == 0.7071
    refusal(write(pickled(Call("numpy.core.multiarray", "scalar", (plain, value[:4])))))


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_a_numpy_array_is_a_record(write: Callable[[bytes], Path], core: bytes) -> None:
    """EDM2's encoder of latents keeps its scales in two, as numpy 1 or 2 names them; nothing is made of them."""
    opcodes = pickle.dumps(np.ones(4, np.float32), protocol=2)[2:-1]
    array = Raw(opcodes.replace(b"cnumpy._core.multiarray\n", b"cnumpy." + core + b".multiarray\n"))
    encoder = module("StabilityVAEEncoder", {}, {}, scale=array)
    path = write(pickled(snapshot(tensor(), encoder=encoder)))
    tree = read_pickle(path)
    assert isinstance(tree, dict)
    scale = tree["encoder"].state["scale"]
    assert isinstance(scale, Opaque)
    assert scale.name == f"numpy.{core.decode()}.multiarray._reconstruct"
    assert read_network(path).encoder_class == "StabilityVAEEncoder"


def test_terminal_escapes_in_a_name_are_not_printed(write: Callable[[bytes], Path]) -> None:
    error = refusal(write(b"\x80\x04" + text("\x1b[2J" + "x" * 5000) + text("y") + b"\x93."))
    assert "\\x1b[2J" in str(error)
    assert "\x1b" not in str(error)


# Nested torch files.


def nested(raw: bytes) -> bytes:
    return pickled(snapshot(tensor(of=Call("torch.storage", "_load_from_bytes", (raw,)))))


def test_a_nested_file_cannot_call_either(write: Callable[[bytes], Path]) -> None:
    whole = storage(torch.arange(24, dtype=torch.uint8)).args[0]
    assert isinstance(whole, bytes)
    read_network(write(nested(whole)))
    attack = pickle.dumps(Payload(os.system, "touch pwned"), protocol=2)
    refused(write(nested(attack)), "posix.system")
    ends = [i + 1 for i, byte in enumerate(whole[:-32]) if byte == ord(".")]
    for end in ends[:3]:
        refused(write(nested(whole[:end] + attack)), "posix.system")
    again = pickled(Call("torch.storage", "_load_from_bytes", (whole,)))
    refused(write(nested(again)), "torch.storage._load_from_bytes")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_nested_file_of_anything_else_is_refused(write: Callable[[bytes], Path], zipped: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=zipped)
    refusal(write(nested(buffer.getvalue())))


def test_a_nested_file_cut_off_or_lying_about_its_length(write: Callable[[bytes], Path]) -> None:
    whole = storage(torch.arange(24, dtype=torch.uint8)).args[0]
    assert isinstance(whole, bytes)
    for length in range(0, len(whole), 7):
        refusal(write(nested(whole[:length])))
    longer = whole.replace(b"K\x18", b"K\xff").replace(b"\x18" + bytes(7), b"\xff" + bytes(7))
    assert longer != whole
    assert "255 numbers" in str(refusal(write(nested(longer))))


# Sizes.


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x",
        b"\x80\x04B" + struct.pack("<I", 0xFFFFFFFF) + b"x",
        b"\x80\x04\x8b" + struct.pack("<I", 0x7FFFFFFF) + b"x",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04I" + b"9" * 100_000 + b"\n.",
        b"\x80\x04F" + b"9" * 100_000,
    ],
)
def test_a_declared_size_beyond_the_file_allocates_nothing(write: Callable[[bytes], Path], raw: bytes) -> None:
    path = write(raw)
    tracemalloc.start()
    try:
        refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


BEYOND, NOT_WHOLE, DAMAGED = (
    "reaches beyond its storage",
    "not a whole number from 0",
    "damaged or not a pickle",
)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (tensor(size=(5, 5), stride=(5, 1)), BEYOND),
        (tensor(offset=19), BEYOND),
        (tensor(size=(2, 3), stride=(30, 1)), BEYOND),
        (tensor(size=(1 << 40,), stride=(0,)), BEYOND),
        (tensor(size=(25,), stride=(0,)), BEYOND),
        (tensor(size=(1 << 61, 1 << 61), stride=(0, 0)), BEYOND),
        (tensor(size=(1,) * 20, stride=(1,) * 20), BEYOND),
        (tensor(size=(0, 1 << 62, 1 << 62), stride=(1, 1, 1)), DAMAGED),
        (tensor(size=(2, 3), stride=(1,)), DAMAGED),
        (tensor(of="storage"), DAMAGED),
        (Call("torch._utils", "_rebuild_parameter", ("tensor", True, {})), DAMAGED),
        (tensor(offset=-1), NOT_WHOLE),
        (tensor(stride=(-3, 1)), NOT_WHOLE),
        (tensor(size=(-2, 3)), NOT_WHOLE),
        (tensor(size=(True, 3)), NOT_WHOLE),
        (tensor(size=(2.0, 3)), NOT_WHOLE),
        (tensor(size=[2, 3]), NOT_WHOLE),
    ],
)
def test_a_tensor_outside_of_its_storage(write: Callable[[bytes], Path], bad: Call, says: str) -> None:
    assert says in str(refusal(write(pickled(snapshot(bad)))))


def test_a_number_of_a_hundred_bytes(write: Callable[[bytes], Path]) -> None:
    for raw in (b"\x80\x04\x8b" + struct.pack("<I", 100) + b"\x01" * 100 + b".", b"L" + b"9" * 100 + b"L\n."):
        assert DAMAGED in str(refusal(write(raw)))


def test_a_view_inside_its_storage_is_kept(write: Callable[[bytes], Path]) -> None:
    record = read_network(write(pickled(snapshot(tensor(size=(2, 3), stride=(1, 8), offset=6)))))
    wanted = torch.arange(24, dtype=torch.uint8).as_strided((2, 3), (1, 8), 6)
    assert torch.equal(record.state["w"], wanted)
    assert record.state["w"].is_contiguous()


# Depth and bombs.

DEEP = 100_000


PUSH_DEVICE = text("torch") + text("device") + b"\x93"
PUSH_LIST = text("torch.nn.modules.container") + text("ModuleList") + b"\x93)\x81"
PUSH_OBJECT = text("torch_utils.persistence") + text("_reconstruct_persistent_obj") + b"\x93}"
PUSH_OBJECT += text("type") + text("class") + b"s" + text("class_name") + text("A") + b"s"
PUSH_OBJECT += text("module_src") + text("") + b"s" + text("state") + b"}" + text("x")


@pytest.mark.parametrize(
    "raw",
    [
        b"N" + b"\x85" * DEEP,
        b"(" * DEEP + b"t" * DEEP,
        b"(" * DEEP + b"l" * DEEP,
        b"]" * DEEP + b"a" * (DEEP - 1),
        b"}N" * DEEP + b"}" + b"s" * DEEP,
        b"}N" + b"\x85" * DEEP + b"Ns",
        b"\x8f(N" + b"\x85" * DEEP + b"\x90",
        b"(N" + b"\x85" * DEEP + b"\x91",
        PUSH_DEVICE * DEEP + b")" + b"R\x85" * (DEEP - 1) + b"R",
        PUSH_LIST * DEEP + b"b" * (DEEP - 1),
        PUSH_OBJECT * 20_000 + b"N" + b"ss\x85R" * 20_000,
    ],
)
def test_deep_nesting_is_an_error_not_a_crash(write: Callable[[bytes], Path], raw: bytes) -> None:
    message = str(refusal(write(b"\x80\x04" + raw + b".")))
    assert "nested more than 200 deep" in message or "damaged or not a pickle" in message


def test_a_network_nested_too_deeply(write: Callable[[bytes], Path]) -> None:
    child: object = module("A", {}, {})
    for _ in range(60):
        child = module("A", {}, {"c": child})
    assert "nested more than" in str(refusal(write(pickled(snapshot(tensor(), modules={"c": child})))))


def doubling(levels: int, double: bytes) -> Raw:
    """A value, then ``levels`` times a pair of it with itself: 2^levels leaves in a few bytes."""
    return Raw(b"N" + double * levels)


def test_billion_laughs_in_arguments(write: Callable[[bytes], Path]) -> None:
    refusal(write(pickled(snapshot(tensor(), kwargs={"k": doubling(60, b"2\x86")}))))
    lists = Raw(b"](" + code("x" * 50) * 3 + b"eq\x00" + (b"0](" + b"h\x00" * 300 + b"eq\x00") * 6)
    refusal(write(pickled(snapshot(tensor(), kwargs={"k": lists}))))


def test_the_same_bytes_loaded_again_and_again(write: Callable[[bytes], Path]) -> None:
    held = storage(torch.zeros(200_000, dtype=torch.uint8))
    load = text("torch.storage") + text("_load_from_bytes") + b"\x93q\x01" + b"0" + code(held.args[0]) + b"q\x020"
    raw = b"\x80\x04" + load + b"](" + b"h\x01h\x02\x85R" * 500 + b"e."
    assert "more bytes than the file holds" in str(refusal(write(raw)))


def test_one_storage_seen_by_many_tensors(write: Callable[[bytes], Path]) -> None:
    view = tensor(size=(20_000,), stride=(1,), of=storage(torch.zeros(20_000, dtype=torch.uint8)))
    many = {"w": view} | {f"w{i}": Raw(b"h\x00") for i in range(100)}
    shared = code(view) + b"q\x00"
    inner = module("SongUNet", {**many, "w": Raw(shared)}, {}, _init_args=(), _init_kwargs={})
    sizes = {"img_resolution": 8, "img_channels": 3, "label_dim": 0}
    raw = pickled({"ema": module("EDMPrecond", {}, {"model": inner}, **sizes)})
    assert "more bytes than the file holds" in str(refusal(write(raw)))


def test_modules_that_share_their_children_exponentially(write: Callable[[bytes], Path]) -> None:
    child: Raw = Raw(code(module("A", {}, {})) + b"q\x00")
    for _ in range(25):
        child = Raw(code(module("A", {}, {"a": child, "b": Raw(b"h\x00")})) + b"q\x00")
    assert "more than 20000 modules" in str(refusal(write(pickled(snapshot(tensor(), modules={"c": child})))))


def test_a_network_that_contains_itself(write: Callable[[bytes], Path]) -> None:
    loop = b"}q\x00" + b"(" + b"".join(text(k) + b"}" for k in ("_parameters", "_buffers"))
    loop += text("_modules") + b"}" + text("self") + code(persistent("A", Raw(b"h\x00"))) + b"s" + b"u"
    refusal(write(pickled(snapshot(tensor(), modules={"c": persistent("A", Raw(loop))}))))


def test_the_limits_can_be_set(write: Callable[[bytes], Path]) -> None:
    path = write(pickled(snapshot(tensor())))
    with pytest.raises(CheckpointError, match="larger than a checkpoint may be"):
        read_network(path, limits=Limits(file_bytes=100))
    with pytest.raises(CheckpointError, match="more than 50 operations"):
        read_network(path, limits=Limits(operations=50))
