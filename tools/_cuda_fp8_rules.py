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
    in_bytes = out_of(mangled) == "Float8E4M3"
    stores = columns // 64 if pixels_left and not in_bytes else 1
    # Two bytes at a time with pixels on the left, else one; results with and without a shortcut.
    width, each = ("U16", 2) if pixels_left else ("U8", 1)
    found = {
        # Weights twice, before the wait and behind it; pixels by both ways; the shortcut.
        "UTMALDG.*": 5,
        r"UTMALDG\.4D\.IM2COL": 1,
        "UTMASTG.*": stores,
        "FADD.*": columns // 2,  # a step's sums to the tile's
        rf"LDS\.{width}.*": columns // 2 // each,
    }
    if in_bytes:
        return found | {rf"STS\.{width}.*": columns // each, "F2FP.SATFINITE.E4M3.*": columns // 2}
    return found | {r"STSM\b.*": columns // 8}
