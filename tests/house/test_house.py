"""The habits of the house: sizes, names, docstrings, import order, no unpickling, README commands that exist."""

from __future__ import annotations

import ast
import configparser
import copy
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep
from fewstep.cli import app
from fewstep.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "fewstep"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST_FILE, LONGEST_BODY = 400, 60
UNDOCUMENTED = {"forward", "render"}
"""Methods whose contract is torch's or rich's."""
SHARED = (
    "base", "pairs", "two_point", "bridges", "aims",
    "levers", "anchor", "couplings", "feature_distance", "adaptive",
)  # fmt: skip
"""Modules that objectives are made of; all others in that folder are objectives, one each."""


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines after signature and docstring: a verb's options and a formula's explanation are not counted."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def test_there_is_something_to_check() -> None:
    assert len(TREES) > 50
    assert "cli/tune.py" in TREES


def test_no_file_above_400_lines() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > LONGEST_FILE}
    assert long == {}


def test_no_function_above_60_lines() -> None:
    long = {
        f"{name}:{f.name}": n for name, t in TREES.items() for f in functions(t) if (n := body_lines(f)) > LONGEST_BODY
    }
    assert long == {}


def test_no_module_without_a_noun() -> None:
    parts = {part.removesuffix(".py") for name in TREES for part in name.split("/")}
    assert parts & {"utils", "util", "helpers", "helper", "common", "misc", "core", "tools"} == set()


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in FILES}
    assert [str(f) for f in folders if not (f / "__init__.py").is_file()] == []


def test_public_names_have_docstrings() -> None:
    """Modules, public functions and classes; a method may be documented where another class declares it first."""
    documented = {f.name for t in TREES.values() for f in functions(t) if ast.get_docstring(f)} | UNDOCUMENTED
    missing = [name for name, tree in TREES.items() if ast.get_docstring(tree) is None]
    for name, tree in TREES.items():
        for node in tree.body:
            if not isinstance(node, (*Function.__args__, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                missing.append(f"{name}:{node.name}")
            if isinstance(node, ast.ClassDef):
                methods = [m for m in node.body if isinstance(m, Function) and not m.name.startswith("_")]
                missing += [f"{name}:{node.name}.{m.name}" for m in methods if m.name not in documented]
    assert missing == []


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_unpickles_or_evaluates() -> None:
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "pickle.load", "pickle.loads",
                 "pickle.Unpickler", "yaml.load", "yaml.unsafe_load",
                 "numpy.load", "dill.load", "os.system", "torch.hub.load"}  # fmt: skip
    found = {(name, call) for name, tree in TREES.items() for call in calls(tree) if call in forbidden}
    assert found == set()
    imported = [
        (name, i) for name, tree in TREES.items() for i in imports(tree) if i.split(".")[0] in ("pickle", "dill")
    ]
    assert imported == []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("allow_pickle") == "False", f"{name}:{node.lineno}"


def test_only_training_and_the_world_know_of_other_processes() -> None:
    found = {
        name
        for name, tree in TREES.items()
        for used in [*imports(tree), *(ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))]
        if used.startswith(("torch.distributed", "torch.nn.parallel"))
    }
    assert found
    assert {name for name in found if not name.startswith("training/")} == {"world.py"}


def test_no_objective_imports_another() -> None:
    """Every module beside them is either one objective of the registry or named in SHARED."""
    methods = {objective.__module__.rpartition(".")[2] for objective in OBJECTIVES.values()}
    modules = {Path(name).stem for name in TREES if name.startswith("objectives/")} - {"__init__"}
    assert len(methods) == len(OBJECTIVES), "one file each"
    assert modules - methods == set(SHARED)
    for module in modules:
        used = {".".join(name.split(".")[:3]) for name in imports(TREES[f"objectives/{module}.py"])}
        assert not used & {f"fewstep.objectives.{other}" for other in methods - {module}}, module
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    listed = parser["importlinter:contract:objectives"]["modules"].split()
    assert sorted(listed) == sorted(f"fewstep.objectives.{method}" for method in methods)


def rooms() -> list[list[str]]:
    """The layers of .importlinter, top first."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    lines = parser["importlinter:contract:rooms"]["layers"].split("\n")
    return [[room.strip() for room in line.split("|")] for line in lines if line.strip()]


def test_imports_go_downward_only() -> None:
    """Also without import-linter; imports inside functions count, those under TYPE_CHECKING do not."""
    level = {room: i for i, line in enumerate(rooms()) for room in line}
    tops = {f"fewstep.{Path(name).parts[0].removesuffix('.py')}" for name in TREES} - {
        "fewstep.__init__",
        "fewstep.__main__",
    }
    assert set(level) == tops, "every room has its place"
    upward = []
    for name, tree in TREES.items():
        here = f"fewstep.{Path(name).parts[0].removesuffix('.py')}"
        runtime = copy.deepcopy(tree)
        for block in ast.walk(runtime):
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test):
                block.body = [ast.Pass()]
        for used in imports(runtime):
            there = ".".join(used.split(".")[:2])
            if here in level and there in level and there != here and level[there] <= level[here]:
                upward.append(f"{name} -> {used}")
    assert upward == []


def test_import_linter_agrees() -> None:
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_public_names_can_be_imported() -> None:
    for name in fewstep.__all__:
        value = getattr(fewstep, name)
        assert value is not None, name
        home = importlib.import_module(f"fewstep.{fewstep._HOMES[name]}")
        assert getattr(home, name) is value
    assert set(fewstep.__all__) == set(fewstep._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'tunes'"):
        _ = fewstep.tunes


def commands() -> list[str]:
    """``fewstep ...`` and ``python -m fewstep ...`` lines of the bash blocks of README and docs."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [
        b for p in pages if p.is_file() for b in re.findall(r"```(?:bash|sh)\n(.*?)```", p.read_text(), re.DOTALL)
    ]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return sorted({m.group(1) for line in lines if (m := re.search(r"(?:^|[ &])fewstep (.*)", line))})


@pytest.mark.parametrize("command", commands() or [pytest.param("", marks=pytest.mark.skip("README has no commands"))])
def test_documented_commands_exist(command: str) -> None:
    """Every verb, option and type; the files they name need not be there."""
    words = shlex.split(command, comments=True)
    for stop in (">", "|", "&&", ";"):
        words = words[: words.index(stop)] if stop in words else words
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_a_command_that_does_not_exist_is_found() -> None:
    for wrong in ("tunne x", "tune x --data digits --out y --recipee fast", "sample x --out y --steps two"):
        with pytest.raises(Exception, match=r"Unknown|convert|Did you mean"):
            app.parse_args(wrong.split(), exit_on_error=False, print_error=False)
