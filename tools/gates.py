"""Compile gates: reads the machine code of the built extension and fails on what slows it down.

For every architecture in the binary and every kernel: no spill and no local memory (neither in the
resource table nor as LDL or STL instructions), no more registers than its occupancy allows, and
the wide memory instructions that its source means. Needs no GPU, only cuobjdump: of the CUDA
toolkit, or of the Triton package.

    python tools/gates.py --archs "80;90a"
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import toolchain

EXTENSION = Path(__file__).resolve().parent.parent / "resnet_fused" / "_C.abi3.so"


@dataclass(frozen=True)
class Rule:
    """What is asked of the kernels whose (mangled) name holds `name`."""

    name: str
    registers: int  # at most
    rows: int  # vectors of each tensor that a thread has in flight; 0: no wide access is meant

    def wide_loads(self, mangled: str) -> int:
        """128-bit loads: x, the residual, and scale and shift where a channel is a column."""
        columns = "AxisE0" in mangled
        channels = 4 if "Float16" in mangled else 2  # eight floats each, or four, or two doubles
        return self.rows * (2 if "Lb1E" in mangled else 1) + (channels if columns else 0)


# 256 threads a block: 128 registers leave two blocks an SM, 64 leave four.
RULES = (Rule("bn_act_vector_kernel", 128, rows=4), Rule("bn_act_strided_kernel", 64, rows=0))


@dataclass
class Kernel:
    """One kernel's machine code on one architecture."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        """How many instructions match the pattern."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def failures(self) -> list[str]:
        """The gates that it does not pass, as sentences."""
        rule = next((rule for rule in RULES if rule.name in self.name), None)
        if rule is None:
            return ["no rule in tools/gates.py names this kernel"]
        loads = rule.wide_loads(self.name) if rule.rows else 0
        checks = {
            f"{self.stack} bytes of stack": self.stack == 0,
            f"{self.local} bytes of local memory": self.local == 0,
            f"{self.count('(LDL|STL).*')} LDL or STL": self.count("(LDL|STL).*") == 0,
            f"{self.registers} registers, at most {rule.registers}": (
                self.registers <= rule.registers
            ),
            f"{self.wide('LDG')} LDG.128, at least {loads}": self.wide("LDG") >= loads,
            f"{self.wide('STG')} STG.128, at least {rule.rows}": (self.wide("STG") >= rule.rows),
        }
        return [sentence for sentence, passed in checks.items() if not passed]

    def wide(self, opcode: str) -> int:
        """How many 128-bit instructions of that kind there are."""
        return self.count(rf"{opcode}\b.*\.128\b.*")


def cuobjdump() -> str:
    """The program: beside nvcc, on PATH, or inside the Triton package."""
    nvcc, _ = toolchain.find_nvcc()
    beside = Path(nvcc.path).resolve().parent / "cuobjdump" if nvcc else None
    spec = importlib.util.find_spec("triton")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    inside = [folder / "backends" / "nvidia" / "bin" / "cuobjdump" for folder in folders]
    candidates = [beside, *map(Path, filter(None, [shutil.which("cuobjdump")])), *inside]
    for path in candidates:
        if path is not None and path.is_file():
            return str(path)
    raise SystemExit("error: no cuobjdump: install the CUDA toolkit or the triton package")


def _dump(program: str, option: str, extension: Path) -> str:
    command = [program, option, str(extension)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_kernels(program: str, extension: Path) -> list[Kernel]:
    """All kernels of the binary, one entry for each architecture that has machine code."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = ""
    current: Kernel | None = None
    for line in _dump(program, "-res-usage", extension).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (\w+):", line):
            current = kernels.setdefault((arch, match.group(1)), Kernel(match.group(1), arch))
        elif current and (values := dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line))):
            current.registers, current.stack = int(values["REG"]), int(values["STACK"])
            current.shared, current.local = int(values["SHARED"]), int(values["LOCAL"])
            current = None
    current = None
    for line in _dump(program, "-sass", extension).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\w+)", line):
            current = kernels.setdefault((arch, match.group(1)), Kernel(match.group(1), arch))
        elif current and (
            match := re.match(r"\s*/\*\w{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)
        ):
            opcode = match.group(1)
            current.instructions[opcode] = current.instructions.get(opcode, 0) + 1
    return list(kernels.values())


def short_name(mangled: str) -> str:
    """A readable name of a kernel: bn_act_vector<BFloat16, residual, row>."""
    match = re.search(r"resnet_fused\d+(\w+?)_kernelI(.*?)Lb([01])E(?:.*?AxisE([01]))?", mangled)
    if match is None:
        return mangled
    types = {"f": "float", "d": "double"}
    dtype = types.get(match.group(2)) or re.sub(r".*\d(B?Float16)E?.*", r"\1", match.group(2))
    parts = [dtype, "residual" if match.group(3) == "1" else "plain"]
    if match.group(4):
        parts.append("row" if match.group(4) == "1" else "column")
    return f"{match.group(1)}<{', '.join(parts)}>"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 0 when every gate is passed, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--archs", help="architectures that must be there, such as '80;90a'")
    parser.add_argument("--extension", type=Path, default=EXTENSION)
    options = parser.parse_args(arguments)
    if not options.extension.is_file():
        print(f"error: {options.extension} does not exist; build it first (make gates does)")
        return 1
    kernels = read_kernels(cuobjdump(), options.extension)
    wanted = {arch.split("+")[0] for arch in toolchain.architectures(options.archs)}
    missing = wanted - {kernel.arch for kernel in kernels}
    print(
        f"{'arch':>5} {'regs':>4} {'stack':>5} {'local':>5} {'LDG.128':>7} {'STG.128':>7}  kernel"
    )
    failed = 0
    for kernel in sorted(kernels, key=lambda kernel: (kernel.arch.zfill(4), kernel.name)):
        failures = kernel.failures()
        failed += bool(failures)
        print(
            f"{kernel.arch:>5} {kernel.registers:>4} {kernel.stack:>5} {kernel.local:>5} "
            f"{kernel.wide('LDG'):>7} {kernel.wide('STG'):>7}  {short_name(kernel.name)}"
            f"{'  FAILED: ' + '; '.join(failures) if failures else ''}"
        )
    for arch in sorted(missing):
        print(f"FAILED: sm_{arch} has no machine code in {options.extension.name}")
    print(f"gates: {len(kernels)} kernels, {failed} failed, {len(missing)} architectures missing")
    return 1 if failed or missing or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
