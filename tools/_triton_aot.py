"""Compiles the Triton kernels for GPUs that are not there, and reads the machine code.

The launches of `resnet_fused.triton` run as they are, on tensors without memory, up to the point
where Triton would compile: what a GPU would be given is recorded there, with Triton's own rules for
types, divisibility and constants. It is then compiled for a compute capability by number. Triton's
interpreter (TRITON_INTERPRET) must be off: kernels that it has taken can't be compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _triton_early as early
import torch

try:
    import triton
except ImportError as error:
    raise SystemExit("error: the triton package is not installed; the gates need it") from error
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet_fused.triton import _launch, _limits
from resnet_fused.triton._tiles import Limits

# Triton 3.9 announces another default for a later version; what it does today is what is gated.
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

REGISTERS = 65536  # of 32 bits on a multiprocessor, on every architecture here
WARP = 32
RESERVED = 1024  # bytes of shared memory that the system takes for each block


@dataclass(frozen=True)
class Architecture:
    """An architecture as one GPU has it (CUDA C++ Programming Guide, compute capabilities).

    Attributes:
        limits: what the launch code asks the driver for.
        shared_memory: bytes of a multiprocessor, for all of its blocks.
        threads: of a multiprocessor.
    """

    limits: Limits
    shared_memory: int
    threads: int


def _architecture(
    capability: int, name: str, multiprocessors: int, block_kb: int, threads: int
) -> Architecture:
    limits = Limits(multiprocessors, block_kb * 1024, capability, name)
    return Architecture(limits, (block_kb + 1) * 1024, threads)


ARCHITECTURES = {
    found.limits.capability: found
    for found in (
        _architecture(80, "A100", 108, 163, 2048),
        _architecture(86, "RTX A6000", 84, 99, 1536),
        _architecture(89, "L40S", 142, 99, 1536),
        _architecture(90, "H200", 132, 227, 2048),
        _architecture(100, "B200", 148, 227, 2048),
        _architecture(120, "RTX 5090", 170, 99, 1536),
    )
}


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that its machine code depends on.

    Attributes:
        module: where the kernel is defined.
        kernel: its name there.
        signature: type of each parameter, as Triton writes them.
        constants: values known at compile time, by the parameter's position.
        attributes: what is known of others, such as divisibility, likewise.
        options: num_warps, num_stages and the rest.
        capability: the architecture.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    capability: int

    @property
    def key(self) -> str:
        """Equal for variants that compile to the same code."""
        return repr(
            (
                self.module, self.kernel, self.capability, sorted(self.signature.items()),
                sorted(self.constants.items()), sorted(self.attributes.items()),
                sorted(self.options.items()),
            )
        )  # fmt: skip

    def constant(self, name: str, default: Any = None) -> Any:
        """The value of a parameter that is known at compile time."""
        if name not in self.signature:
            return default
        return self.constants.get((list(self.signature).index(name),), default)

    def known(self, name: str) -> bool:
        """Whether a parameter is known to be a multiple of 16 (elements; bytes for pointers)."""
        place = (list(self.signature).index(name),)
        return bool(self.attributes.get(place)) and place not in self.constants


@dataclass(frozen=True)
class Launch:
    """A variant, the grid that it was launched on and what it was called with, in order."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


class _Driver:
    """Answers for a GPU of one architecture where Triton asks the driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        # Triton keeps what it derived from the target under this number.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorded:
    """Stands for a kernel in `kernel[grid](...)`: notes the grid, and nothing is launched."""

    def __init__(self, kernel: Any, launches: list[Launch], capability: int) -> None:
        self.kernel, self.launches, self.capability = kernel, launches, capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            def note(key, signature, device, constants, options, attributes, warmup) -> None:
                # None tells Triton that a hook has taken the compilation over.
                variant = Variant(
                    self.kernel.fn.__module__, self.kernel.fn.__name__, dict(signature),
                    dict(constants), dict(attributes), dict(options.__dict__), self.capability,
                )  # fmt: skip
                self.launches.append(Launch(variant, tuple(grid), arguments))

            self.kernel._do_compile = note
            try:
                self.kernel.run(*arguments, grid=grid, warmup=True, **options)
            finally:
                del self.kernel._do_compile

        return run


@contextlib.contextmanager
def recording(limits: Limits, *, tf32: bool = False) -> Iterator[list[Launch]]:
    """Collects what launches inside would compile on a GPU with these limits; nothing runs.

    Args:
        limits: the GPU's.
        tf32: torch's switch for float32 convolutions.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    if _limits.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set; kernels can't be compiled in this process")
    launches: list[Launch] = []
    kept = _launch.wrap_triton, _limits.limits, torch.backends.cudnn.allow_tf32
    active = driver._active
    _launch.wrap_triton = lambda kernel: _Recorded(kernel, launches, limits.capability)
    _limits.limits = lambda device: limits
    torch.backends.cudnn.allow_tf32 = tf32
    driver.set_active(_Driver(limits.capability))
    try:
        yield launches
    finally:
        _launch.wrap_triton, _limits.limits, torch.backends.cudnn.allow_tf32 = kept
        driver._active = active


@dataclass
class Code:
    """What one variant's machine code needs and holds.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        shared: bytes of shared memory of a block.
        warps: of a block.
        counts: how many instructions of each opcode there are, with modifiers.
        loop: likewise, inside the innermost loops that hold matrix instructions.
        loops: how many such loops there are.
        ahead: what touches memory, or ends, before the wait for the kernel ahead: likewise counted.
        dependence: what the PTX says of the kernels around it.
    """

    registers: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)
    loops: int = 0
    ahead: dict[str, int] = field(default_factory=dict)
    dependence: early.Dependence = field(default_factory=early.Dependence)

    def count(self, pattern: str, *, loop: bool = False) -> int:
        """How many instructions match the pattern, from their first letter on."""
        found = self.loop if loop else self.counts
        whole = re.compile(rf"(?:{pattern})(?![A-Z0-9])")
        return sum(n for opcode, n in found.items() if whole.match(opcode))

    def wide(self, pattern: str, *, loop: bool = False) -> int:
        """How many of them move 16 bytes a thread."""
        return self.count(rf"(?:{pattern})[\w.]*\.128", loop=loop)

    def matrix(self, *, loop: bool = False) -> dict[str, int]:
        """How many matrix instructions of each kind there are."""
        kinds = {name: self.count(name, loop=loop) for name in MATRIX}
        return {name: n for name, n in kinds.items() if n}

    @property
    def registers_of_block(self) -> int:
        """Registers that a block takes; a warp gets them in units of 256."""
        return -(-self.registers // 8) * 8 * WARP * self.warps

    def blocks(self, architecture: Architecture) -> int:
        """Blocks that a multiprocessor holds at one time."""
        return min(
            REGISTERS // max(1, self.registers_of_block),
            architecture.shared_memory // (self.shared + RESERVED),
            architecture.threads // (WARP * self.warps),
        )


WAITS, TRIGGERS = "ACQBULK", "PREEXIT"
"""griddepcontrol.wait and .launch_dependents."""

TOUCHES = re.compile(r"(?:(?:LD|ST)G?|LDGSTS|ATOMG?|REDG?|UBLKCP|UTMA\w+|EXIT|RET)(?:\.|$)")
"""What must not stand before that wait."""

MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "QGMMA", "UTCQMMA")
"""mma.sync, wgmma (sm_90) and tcgen05 (sm_100), in 16 bits and tf32; then of e4m3."""


def parse(listing: str) -> Code:
    """Reads the output of `cuobjdump -res-usage -sass` for a file with one kernel.

    Raises:
        ValueError: there is no resource line or no instruction in it.
    """
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    found = re.findall(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;\n]*)", listing, re.M
    )
    if usage is None or not found:
        raise ValueError("no resource usage or no instructions in cuobjdump's output")
    code = Code(int(usage[1]), int(usage[2]))
    addresses = [int(address, 16) for address, _, _ in found]
    opcodes = [opcode for _, opcode, _ in found]
    code.counts = _counted(opcodes)
    if WAITS in opcodes:
        ahead = opcodes[: opcodes.index(WAITS)]
        code.ahead = _counted(opcode for opcode in ahead if TOUCHES.match(opcode))
    loops = []
    for address, (_, opcode, operands) in zip(addresses, found, strict=True):
        target = re.findall(r"0x([0-9a-f]+)", operands)
        if opcode.split(".")[0] == "BRA" and target and int(target[-1], 16) < address:
            loops.append((int(target[-1], 16), address))
    matrix = [a for a, o in zip(addresses, opcodes, strict=True) if o.split(".")[0] in MATRIX]
    # A wait's slow path lies behind the end and jumps back: unlike a loop it spans an EXIT.
    ends = [a for a, o in zip(addresses, opcodes, strict=True) if o == "EXIT"]
    loops = [
        (a, b)
        for a, b in loops
        if any(a <= place <= b for place in matrix) and not any(a <= end <= b for end in ends)
    ]
    inner = [
        (a, b)
        for a, b in loops
        if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)
    ]
    code.loops = len(inner)
    code.loop = _counted(
        opcode
        for address, opcode in zip(addresses, opcodes, strict=True)
        if any(a <= address <= b for a, b in inner)
    )
    return code


def _counted(opcodes: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for opcode in opcodes:
        counts[opcode] = counts.get(opcode, 0) + 1
    return counts


@functools.cache
def cuobjdump() -> str:
    """Triton's own, which knows every architecture that Triton compiles for."""
    from triton import knobs

    return knobs.nvidia.cuobjdump.path


def kernel_of(variant: Variant) -> JITFunction:
    """The kernel that a variant names."""
    return getattr(importlib.import_module(variant.module), variant.kernel)


def compile_variant(variant: Variant) -> Code:
    """Compiles a variant and reads its machine code.

    Raises:
        RuntimeError: Triton does not compile it; the cause is chained.
    """
    source = ASTSource(kernel_of(variant), variant.signature, variant.constants, variant.attributes)
    target = GPUTarget("cuda", variant.capability, WARP)
    try:
        compiled = triton.compile(source, target=target, options=dict(variant.options))
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {str(error).strip()[:300]}") from error
    code = _read(compiled.asm["cubin"])
    code.dependence = early.dependence(compiled.asm["ptx"])
    code.shared, code.warps = compiled.metadata.shared, compiled.metadata.num_warps
    return code


def _read(cubin: bytes) -> Code:
    """Reads a cubin, or what an earlier run read out of the same one."""
    key = hashlib.sha256(cubin + Path(__file__).read_bytes()).hexdigest()
    known = Path(triton.knobs.cache.dir) / f"{key}.code.json"
    if known.is_file():
        return Code(**json.loads(known.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [cuobjdump(), "-res-usage", "-sass", str(file)]
        code = parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    written = known.with_suffix(f".{os.getpid()}")
    read = {name: value for name, value in asdict(code).items() if name != "dependence"}
    written.write_text(json.dumps(read))
    written.replace(known)
    return code
