"""What the machine code of the head's kernels is held to."""

from __future__ import annotations

import re
from typing import Any

REGISTERS = 65536  # of a multiprocessor


def _head_mean(kernel: Any) -> dict[str, bool]:
    # 256 threads a block: 80 registers leave three blocks. Four vectors are in flight where
    # channels lie together.
    loads = 4 if "Lb1E" in kernel.name else 0
    return {
        f"{kernel.registers} registers, at most 80": kernel.registers <= 80,
        f"{kernel.wide('LDG')} LDG.128, at least {loads}": kernel.wide("LDG") >= loads,
        f"{kernel.wide('STG')} STG.128, at least 1": kernel.wide("STG") >= 1,
    }


def _head_linear(kernel: Any) -> dict[str, bool]:
    shape = re.search(r"HeadShapeI" + 3 * r"Li(\d+)E" + "E", kernel.name)
    if shape is None:
        return {"its name spells no configuration": False}
    tiles_m, tiles_n, warps = map(int, shape.groups())
    blocks = 2 if tiles_n == 1 else 1  # that are to share a multiprocessor
    most = min(255, REGISTERS // (32 * warps * blocks))
    products, loads = kernel.count("HMMA.*"), kernel.wide("LDG")
    wanted = 2 * tiles_m + (tiles_n if "Lb1E" in kernel.name else 0)
    return {
        f"{kernel.registers} registers, at most {most}": kernel.registers <= most,
        f"{products} HMMA, at least {2 * tiles_m * tiles_n}": products >= 2 * tiles_m * tiles_n,
        f"{loads} LDG.128, at least {wanted}": loads >= wanted,
    }


RULES = {"head_mean_kernel": _head_mean, "head_linear_kernel": _head_linear}
"""By what the mangled name holds."""
