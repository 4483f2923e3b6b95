"""tools/triton_gates.py: what it records, what its gates catch, and the committed table."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resnet_fused import admission
from resnet_fused.ops import _triton

pytest.importorskip("triton", reason="the gates compile with Triton, which is not installed")

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "triton_gates.py"


def environment(cache: Path) -> dict[str, str]:
    """This process's, without Triton's interpreter: interpreted kernels can't be compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def plants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/triton_plants.py found, in one process."""
    command = [sys.executable, str(ROOT / "tests" / "triton_plants.py")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(tmp_path_factory.mktemp("cache")),
        cwd=ROOT,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def aot() -> ModuleType:
    """tools/_triton_aot.py, which defines no kernel."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import _triton_aot
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return _triton_aot


@pytest.mark.slow
def test_types_constants_and_divisibility_are_those_of_the_jit(plants: dict[str, Any]) -> None:
    found = plants["typed"]
    assert found["signature"] == {
        "x": "*bf16",
        "y": "*bf16",
        "out": "*fp32",
        "one": "constexpr",
        "sixteen": "i32",
        "odd": "i32",
        "large": "i64",
        "free": "i32",
        "flag": "constexpr",
        "BLOCK": "constexpr",
    }
    assert found["constants"] == {"one": 1, "flag": True, "BLOCK": 32}
    # y starts 2 bytes off 16; free is a multiple of 16, but must not be specialised.
    assert found["known"] == ["x", "out", "sixteen", "large"]
    assert found["grid"] == [7, 2] and found["warps"] == 8 and found["capability"] == 90


@pytest.mark.slow
def test_real_launches_follow_the_documented_rules(plants: dict[str, Any]) -> None:
    assert plants["derived"] == []


@pytest.mark.slow
def test_equal_variants_are_compiled_once(plants: dict[str, Any]) -> None:
    assert plants["calls_of_one"] == [1, 3]


@pytest.mark.slow
def test_a_shipped_configuration_passes(plants: dict[str, Any]) -> None:
    assert plants["shipped"] == []
    assert plants["registers"] > 32
    # 36 KB of 164 KB and 128 threads of at most 128 registers each: shared memory decides.
    assert plants["blocks"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "gate", "sentence"),
    [
        ("spilling", "stack", r"\d{3,} bytes of stack, \d+ LDL or STL, at most 16"),
        ("spilling", "loop", r"\d+ LDL or STL in the main loop"),
        ("large", "shared memory", r"229376 bytes of shared memory, at most 166912"),
        ("no_dot", "matrix instructions", r"no matrix instructions in 0 loops, HMMA alone"),
        ("no_dot", "rule", r"names parameters that the kernel lacks: channels"),
        ("older", "matrix instructions", r"\d+ HMMA in 1 loops, HGMMA alone expected"),
        ("narrow", "wide stores", r"and 1 narrower ones"),
        ("synchronous", "asynchronous copies", r"no asynchronous copy in the main loop"),
    ],
)
def test_gates_catch_what_is_planted(
    plants: dict[str, Any], plant: str, gate: str, sentence: str
) -> None:
    found = [text for text in plants[plant] if text.startswith(f"{gate}: ")]
    assert len(found) == 1 and re.search(sentence, found[0]), plants[plant]


@pytest.mark.slow
def test_code_that_does_not_compile_and_kernels_without_a_rule_fail(plants: dict[str, Any]) -> None:
    assert len(plants["broken"]) == 1 and plants["broken"][0].startswith("does not compile: ")
    assert plants["nameless"] == ["no rule in _triton_rules.RULES names this kernel"]


@pytest.mark.slow
def test_the_sample_holds_every_configuration_of_every_op(plants: dict[str, Any]) -> None:
    ops = ("conv_bn_act", "conv_dgrad", "conv_wgrad")
    wanted = sorted([op, tile] for op in ops for tile in plants["configurations"])
    assert plants["sampled"] == wanted


@pytest.mark.slow
def test_training_s_passes_are_gated(plants: dict[str, Any]) -> None:
    found = plants["training"]
    assert found["shipped"] == []
    assert [text.split(":")[0] for text in found["narrow"]] == ["wide loads"]
    assert re.search(r"8 loads of 16 bytes and \d+ narrower ones", found["narrow"][0])
    assert [text.split(":")[0] for text in found["spilling"]] == ["stack"]
    assert found["ops"] == found["expected"] and found["kernels"] == []


def imported(module: str) -> set[str]:
    """The modules of resnet_fused.triton that one of them imports, directly or not."""
    tree = ast.parse((ROOT / "resnet_fused" / "triton" / f"{module}.py").read_text("utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found.union(*map(imported, found))


@pytest.mark.parametrize("op", _triton._declared)
def test_a_kernel_s_hash_covers_what_it_imports(op: str) -> None:
    """A record admits the sources that it was made with: a changed helper must withdraw it."""
    sources = next(k.sources for k in admission.kernels() if k.name == f"{op}.triton")
    without_code = {"_limits"}  # what GPUs offer: only the chooser asks
    wanted = {f"triton/{module}.py" for module in imported(op) - without_code}
    assert wanted <= set(sources)


@pytest.mark.slow
def test_every_gate_has_a_reason(plants: dict[str, Any]) -> None:
    assert len(plants["reasons"]) >= 8 and all(len(reason) > 5 for reason in plants["reasons"])


@pytest.mark.slow
def test_the_committed_table_names_what_ships(plants: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "triton_resources.md").read_text(encoding="utf-8")
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    names = [cells[:3] for cells in lines[2:]]
    assert names == plants["rows"], "run python tools/triton_gates.py --write"


LISTING = """
 Function kernel:
  REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 STL [R1], R4 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/                   LDL.LU R4, [R1] ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0080*/                   BRA P1, 0x20 ;
        /*0090*/                   BRA 0x90 ;
"""


def test_a_listing_is_counted_in_whole_and_in_its_inner_loop(aot: ModuleType) -> None:
    code = aot.parse(LISTING)
    assert (code.registers, code.stack, code.loops) == (40, 16, 1)
    assert code.matrix() == {"HMMA": 1}
    assert code.count("LDL|STL") == 2 and code.count("LDL|STL", loop=True) == 0
    # LDG does not count LDGSTS.
    assert code.count("LDG") == 1 and code.wide("LDGSTS|LDG") == 2
    assert code.wide("LDGSTS|LDG", loop=True) == 1
    assert code.count("STG") == 1 and code.wide("STG") == 0


def test_a_spill_inside_the_loop_is_seen(aot: ModuleType) -> None:
    code = aot.parse(LISTING.replace("0x30 ;", "0x20 ;"))
    assert code.count("STL", loop=True) == 1


@pytest.mark.parametrize("listing", ["", "REG:40 STACK:0", "/*0000*/ MOV R1, R2 ;"])
def test_a_listing_that_is_none_is_an_error(aot: ModuleType, listing: str) -> None:
    with pytest.raises(ValueError, match="no resource usage or no instructions"):
        aot.parse(listing)


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "blocks"),
    [(255, 8, 0, 1), (128, 4, 0, 4), (32, 4, 100 * 1024, 1), (16, 8, 0, 8), (169, 4, 0, 2)],
)
def test_blocks_of_a_multiprocessor(
    aot: ModuleType, registers: int, warps: int, shared: int, blocks: int
) -> None:
    code = aot.Code(registers=registers, shared=shared, warps=warps)
    assert code.blocks(aot.ARCHITECTURES[80]) == blocks


def run_tool(*arguments: str, cache: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        env={**environment(cache), **more},
        cwd=ROOT,
        timeout=120,
    )


@pytest.mark.slow
def test_bad_arguments_are_named(tmp_path: Path) -> None:
    done = run_tool("--archs", "80;75", cache=tmp_path)
    assert done.returncode == 2 and '--archs holds "75"; known are 80, 86' in done.stderr
    done = run_tool("--ops", "stem,conv", cache=tmp_path)
    assert done.returncode == 2 and "--ops names conv; known are bn_act, " in done.stderr
    done = run_tool("--archs", "80", cache=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET is set; unset it" in done.stderr
