"""The house rules: who may know whom, where asm may stand, how long files and functions are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resnet_fused"
CSRC = ROOT / "csrc"

# A room may know the rooms of its own line and of the lines before it.
PYTHON_ROOMS = (
    ("numerics", "roofline", "cases", "_stem_cases", "_shapes"),
    (
        "backends",
        "admission",
        "_platform",
        "_selfcheck",
        "_verdicts",
        "_tuned",
        "_extension",
        "_C",
        "triton",
    ),
    ("ops",),
    ("nn",),
    ("models", "convert"),
    ("explain", "verify", "_verification", "agreement", "calibrate", "freeze"),
    ("report", "data", "weights"),
    ("bench", "train"),
    ("paper",),
    ("cli",),
    ("__init__", "__main__"),
)
CSRC_ROOMS = (
    ("emulator",),
    ("ptx",),
    ("device",),
    ("kernels",),
    ("launch",),
    ("bindings", "driver", "emulated"),  # leaves: none knows another
)
# Instructions of the GPU, and the emulator's switch from one thread's stack to another's.
ASM = re.compile(r"ptx/.*|emulator/fiber\..*")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def rank(room: str) -> int:
    """The line of PYTHON_ROOMS that a room stands on."""
    for line, rooms in enumerate(PYTHON_ROOMS):
        if room in rooms:
            return line
    raise AssertionError(f"resnet_fused/{room} is in no line of PYTHON_ROOMS: give it its place")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_nodes(tree: ast.AST):
    """All nodes but those under `if TYPE_CHECKING:`, which nothing executes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imported_modules(source: str, package: tuple[str, ...]):
    """The full dotted names that a module of `package` imports, wherever in its code."""
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(source: str, path: Path) -> list[str]:
    """What a module of the package imports against the rules."""
    relative = path.relative_to(ROOT)
    package = relative.parent.parts
    room, found = room_of(path), []
    for name in imported_modules(source, package):
        first, _, rest = name.partition(".")
        if first in ("tests", "benchmarks"):
            found.append(f"{relative} imports {name}")
        if first != "resnet_fused" or rest in ("", "__version__"):  # the version is a constant
            continue
        other = rest.split(".")[0]
        known = (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").is_file() or other == "_C"
        other = other if known else "__init__"  # from resnet_fused import <a public name>
        if rank(other) > rank(room):
            found.append(f"{relative} imports {name}, a later room")
    return found


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CSRC_FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_python_room_knows_no_later_room(path):
    assert violations(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("numerics/bounds.py", "from resnet_fused import ops"),
        ("numerics/bounds.py", "from ..ops import bn_act"),
        ("ops/bn_act.py", "def f():\n    import resnet_fused.nn.blocks"),
        ("nn/blocks.py", "from resnet_fused import fuse"),
        ("models/resnet.py", "from ..cli import main"),
        ("cli/info.py", "import tests.matrix"),
    ],
)
def test_the_python_rule_bites(file, line):
    assert len(violations(line, PACKAGE / file)) == 1


def test_the_python_rule_lets_earlier_rooms_through():
    for line in ("from ..ops import bn_act", "import torch", "from . import _route"):
        assert violations(line, PACKAGE / "nn" / "blocks.py") == []
    lazy = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from resnet_fused.cli import main"
    )
    assert violations(lazy, PACKAGE / "ops" / "bn_act.py") == []


def csrc_rank(room: str) -> int:
    """The line of CSRC_ROOMS that a room stands on."""
    for line, rooms in enumerate(CSRC_ROOMS):
        if room in rooms:
            return line
    raise AssertionError(f"csrc/{room} is in no line of CSRC_ROOMS: give it its place")


def include_violations(source: str, path: Path) -> list[str]:
    """What a C++ file includes against the rules."""
    room, found = path.relative_to(CSRC).parts[0], []
    place = csrc_rank(room)
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.MULTILINE):
        torch = re.match(r"(torch|ATen|c10|aten)/", name) or name == "Python.h"
        if torch and room != "bindings":
            found.append(f"{room}/{path.name} includes {name}: only bindings may see torch")
        target = (path.parent / name).resolve()
        if target.is_relative_to(CSRC):
            other = target.relative_to(CSRC).parts[0]
            beside = csrc_rank(other) == place and other != room
            if beside or csrc_rank(other) > place:
                found.append(f"{room}/{path.name} includes {name}, a later room")
    return found


def has_asm(source: str) -> bool:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    return re.search(r"\b(__asm__|asm)\b", code) is not None


@pytest.mark.parametrize("path", CSRC_FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_a_csrc_room_knows_no_later_room(path):
    source = path.read_text()
    assert include_violations(source, path) == []
    if not ASM.fullmatch(path.relative_to(CSRC).as_posix()):
        assert not has_asm(source), "asm stands in csrc/ptx only"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("kernels", '#include "../launch/bn_act.h"'),
        ("launch", "#include <torch/csrc/stable/tensor.h>"),
        ("device", '#  include "../kernels/bn_act_cpu.h"'),
        ("emulator", '#include "../ptx/ptx.h"'),
        ("driver", '#include "../emulated/module.h"'),
        ("emulated", "#include <torch/extension.h>"),
    ],
)
def test_the_csrc_rule_bites(room, line):
    assert len(include_violations(line, CSRC / room / "x.cpp")) == 1
    assert include_violations('#include "../device/bn_act.h"', CSRC / "kernels" / "x.cpp") == []


def test_the_asm_rule_bites():
    assert has_asm('asm volatile("ret;");')
    assert not has_asm("// asm is elsewhere\nint awesome;")


def test_every_kernel_file_is_launched_and_named_by_its_op():
    """<op>_<arch>.cuh or <op>_cpu.h; launch/<op>.cu or .cpp includes it."""
    kernels = {path.name for path in (CSRC / "kernels").iterdir()}
    assert all(re.fullmatch(r"[a-z0-9_]+_(sm\d+a?\.cuh|cpu\.h)", name) for name in kernels)
    launches = "".join(path.read_text() for path in (CSRC / "launch").iterdir())
    assert {name for name in kernels if f"kernels/{name}" not in launches} == set()


ALL_FILES = [
    *PYTHON_FILES,
    *CSRC_FILES,
    *(
        path
        for folder in ("tests", "tools", "benchmarks", "examples")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ),
    ROOT / "setup.py",
]


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton's kernels and their parts, which are inlined into them, may be longer."""
    names = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
    return "triton.jit" in names


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name}: {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not is_kernel(node)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    if path.suffix == ".py":
        assert long_functions(source) == []


def test_the_length_rule_bites():
    body = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert long_functions(body) == ["f: 81 lines"]
    assert long_functions(f"@other.jit\n{body}") == ["f: 81 lines"]
    assert long_functions(f"@triton.jit\n{body}") == []
    assert long_functions(f"@triton.jit(do_not_specialize=['n'])\n{body}") == []
