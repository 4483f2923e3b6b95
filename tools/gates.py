"""Compile gates: reads the machine code of the built extension and fails on what slows it down.

For every architecture in the binary and every kernel: no spill and no local memory (neither in the
resource table nor as LDL or STL instructions), no more registers and shared memory than the
occupancy that it declares allows, the matrix and wide memory instructions that its source means,
and before it waits for the kernel ahead no access to memory but to constants. What ptxas says in
passing fails the build itself (tools/strict_nvcc.py). Needs no GPU, only cuobjdump: of the CUDA
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
from pathlib import Path

import toolchain
from _cuda_block_end import block_end_of
from _cuda_chain_rules import chain_tma_tile_of
from _cuda_cluster import cluster_of
from _cuda_dgrad_rules import dgrad_of, dgrad_window_of
from _cuda_early import PARAMETERS, Instruction, instruction, read, rule_of
from _cuda_grad1x1_rules import grad1x1_tile_of
from _cuda_network import network_of
from _cuda_rules import Kernel, short_name, tile_of, tma_tile_of
from _cuda_stationary import stationary_of
from _cuda_stem_rules import stem_wgmma_tile_of
from _cuda_stream_rules import dgrad_stream_of, stream_of
from _cuda_wgrad_rules import wgrad_of, wgrad_window_of
from _cuda_window import chain_stream_of, chain_window_of, window_of

EXTENSION = Path(__file__).resolve().parent.parent / "resnet_fused" / "_C.abi3.so"


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
    code: list[Instruction] = []
    for line in _dump(program, "-sass", extension).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\w+)", line):
            _note_early(current, code)
            current = kernels.setdefault((arch, match.group(1)), Kernel(match.group(1), arch))
            code = []
        elif current and (one := instruction(line)):
            code.append(one)
            current.instructions[one.opcode] = current.instructions.get(one.opcode, 0) + 1
    _note_early(current, code)
    return list(kernels.values())


def _note_early(kernel: Kernel | None, code: list[Instruction]) -> None:
    """What a kernel does before the one ahead has ended, where it may run then."""
    rule = rule_of(kernel.name) if kernel else None
    if kernel and rule and kernel.arch in PARAMETERS:
        kernel.early = read(code, kernel.arch, rule)


def row(kernel: Kernel) -> str:
    """A kernel's line of the table."""
    tile = tile_of(kernel.name)
    of = tma_tile_of, chain_tma_tile_of, window_of, chain_window_of, chain_stream_of
    of = *of, stem_wgmma_tile_of, cluster_of, dgrad_of, grad1x1_tile_of, wgrad_of, wgrad_window_of
    of = *of, dgrad_window_of, stream_of, dgrad_stream_of, stationary_of, block_end_of, network_of
    by_wgmma = next((found for find in of if (found := find(kernel.name))), None)
    shared, blocks = (tile.shared, tile.blocks) if tile else (0, 0)
    if by_wgmma:
        twice = cluster_of(kernel.name) or network_of(kernel.name)
        shared, blocks = by_wgmma.shared, 2 if twice else 1
    return (
        f"{kernel.arch:>5} {kernel.registers:>4} {kernel.stack:>5} {kernel.local:>5} "
        f"{shared:>7} {blocks:>6} "
        f"{kernel.count('HMMA.*'):>5} {kernel.count('[HQ]GMMA.*'):>5} "
        f"{kernel.count('UTMALDG.*'):>7} {kernel.wide('LDGSTS'):>10} {kernel.count('LDSM.*'):>5} "
        f"{kernel.wide('LDG'):>7} {kernel.wide('STG'):>7}  {short_name(kernel.name)}"
    )


HEADINGS = (
    " arch regs stack local  shared blocks  HMMA HGMMA UTMALDG LDGSTS.128  LDSM LDG.128 STG.128  "
    "kernel"
)


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
    print(HEADINGS)
    failed = 0
    for kernel in sorted(kernels, key=lambda kernel: (kernel.arch.zfill(4), kernel.name)):
        failures = kernel.failures()
        failed += bool(failures)
        print(row(kernel) + (f"  FAILED: {'; '.join(failures)}" if failures else ""))
    for arch in sorted(missing):
        print(f"FAILED: sm_{arch} has no machine code in {options.extension.name}")
    print(f"gates: {len(kernels)} kernels, {failed} failed, {len(missing)} architectures missing")
    return 1 if failed or missing or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
