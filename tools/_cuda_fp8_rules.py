"""What the machine code of conv_bn_act_fp8 for sm_90a holds, beside what all kernels by TMA do."""

from __future__ import annotations

import re

OUT = re.compile(r"E4M3ToINS_\d+(Float8E4M3|B?Float16)EEE")


def out_of(mangled: str) -> str | None:
    """The result's type in the mangled name of a kernel on e4m3 operands; None in another."""
    found = OUT.search(mangled)
    return found.group(1) if found else None


def product(columns: int) -> str:
    """The instruction that multiplies, as a pattern."""
    return rf"QGMMA\.64x{columns}x32\.F32\.E4M3\.E4M3.*"


def counts(mangled: str, *, pixels_left: bool, columns: int) -> dict[str, int]:
    """Instructions of the epilogue and the loads, with how many there are at least.

    Args:
        mangled: the kernel's name.
        pixels_left: of its tile.
        columns: of its products.
    """
    stores = columns // 64 if pixels_left and not in_bytes(mangled) else 1
    return {
        # Weights twice, before the wait and behind it; pixels by both ways; the shortcut.
        "UTMALDG.*": 5,
        r"UTMALDG\.4D\.IM2COL.*": 1,
        "UTMASTG.*": stores,
        "FADD.*": columns // 2,  # a step's sums to the tile's
        **epilogue(mangled, pixels_left=pixels_left, columns=columns),
    }


def in_bytes(mangled: str) -> bool:
    """Whether a kernel's results are e4m3."""
    return out_of(mangled) == "Float8E4M3"


def epilogue(mangled: str, *, pixels_left: bool, columns: int) -> dict[str, int]:
    """Instructions that read the shortcut and write results to the staging, with and without one.

    Args:
        mangled: the kernel's name.
        pixels_left: of its tile.
        columns: of a warpgroup's sums.
    """
    # Two bytes at a time with pixels on the left, else one.
    width, each = ("U16", 2) if pixels_left else ("U8", 1)
    found = {rf"LDS\.{width}.*": columns // 2 // each}
    if in_bytes(mangled):
        return found | {rf"STS\.{width}.*": columns // each, "F2FP.SATFINITE.E4M3.*": columns // 2}
    return found | {r"STSM\b.*": columns // 8}
