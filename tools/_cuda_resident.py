"""How many blocks share a multiprocessor, by its shared memory and its registers."""

from __future__ import annotations

REGISTERS = 65536  # of a multiprocessor, on every architecture here
REGISTER_UNIT = 8  # they are given out in such steps a thread
RESERVED_SHARED = 1024  # bytes that the driver takes of each block's
# Bytes of shared memory that a block may ask for, and that a multiprocessor has (CUDA C++
# Programming Guide, Technical Specifications per Compute Capability).
SHARED = {
    "80": (163 * 1024, 164 * 1024),
    "86": (99 * 1024, 100 * 1024),
    "89": (99 * 1024, 100 * 1024),
    "90a": (227 * 1024, 228 * 1024),
    "100": (227 * 1024, 228 * 1024),
    "120": (99 * 1024, 100 * 1024),
}
# Where every block that a configuration asks for must find shared memory too; elsewhere fewer share
# a multiprocessor, which the chooser counts with, and have its registers to themselves.
FULL_OCCUPANCY = ("80", "90a", "100")


def most_registers(threads: int, blocks: int, shared: int, arch: str) -> int:
    """Of a thread, so that its block and those beside it find room.

    Args:
        threads: of a block.
        blocks: that a configuration wants on a multiprocessor.
        shared: bytes of a block's shared memory.
        arch: such as "90a".
    """
    if arch not in FULL_OCCUPANCY:
        _, multiprocessor = SHARED[arch]
        blocks = min(blocks, max(1, multiprocessor // (shared + RESERVED_SHARED)))
    return REGISTERS // (threads * blocks) // REGISTER_UNIT * REGISTER_UNIT
