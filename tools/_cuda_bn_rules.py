"""What the machine code of training's passes over activations is held to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

WIDE_BLOCKS = 2  # of 256 threads, that are to share a multiprocessor
SHORTCUTS = ("none", "plain", "part", "normalised")


@dataclass(frozen=True)
class Pass:
    """A pass, as its kernel's name spells it.

    Attributes:
        wide: whether it moves 16 bytes at a time.
        dense: whether its pixels lie in one loop.
        reads: activations that it reads.
        more: whether fewer pixels are in flight than two reads allow; csrc/device/channel_walk.h.
        values: rows of per-channel values that it loads.
        about: its options, in words.
    """

    wide: bool
    dense: bool
    reads: int
    more: bool
    values: int
    about: str

    @property
    def ahead(self) -> int:
        """Pixels that a thread has in flight."""
        if self.reads <= 2:
            return 4 if self.more or not self.dense else 8
        return 4 if self.reads == 3 else 2


@functools.cache
def pass_of(mangled: str) -> Pass | None:
    """The pass in a kernel's mangled name, or None."""
    found = re.search(
        r"(bn_add_act|bn_add_act_backward|bn_backward_apply)_kernelI\w*?Li(\d)ELb([01])E"
        r"(?:LNS_8ShortcutE(\d)E|Lb([01])ELb([01])E)?",
        mangled,
    )
    if found is None:
        return None
    op, width, dense, shortcut, from_out, projected = found.groups()
    if op == "bn_add_act":
        kind = SHORTCUTS[int(shortcut)]
        reads, values = 1 + (kind != "none"), 4 if kind == "normalised" else 2
        return Pass(width != "1", dense == "1", reads, kind == "part", values, kind)
    if op == "bn_backward_apply":
        return Pass(width != "1", dense == "1", 2, False, 3, "")
    out, other = from_out == "1", projected == "1"
    about = "projected" if other else "from out" if out else "from y"
    values = (1 if out else 3) + other
    return Pass(width != "1", dense == "1", 2 + out + other, True, values, about)


def name_of(mangled: str) -> list[str] | None:
    """What a kernel's readable name says of its pass; None of other kernels."""
    found = pass_of(mangled)
    pool = re.search(r"bn_act_pool\w*?_kernelI\w*?Li(\d)E(?:LNS_10PoolKernelE(\d)E)?", mangled)
    if pool is not None:
        width, taps = pool.groups()
        return [*(["3x3"] if taps == "0" else []), *(["narrow"] if width == "1" else [])]
    if found is None:
        return None
    words = [found.about, "" if found.wide else "narrow", "" if found.dense else "strided"]
    return [word for word in words if word]


def passes(kernel: Kernel) -> dict[str, bool]:
    """Registers for two blocks a multiprocessor; every read of every pixel in flight is wide."""
    found = pass_of(kernel.name)
    if found is None:
        return {"its name spells no pass": False}
    most = 65536 // (256 * WIDE_BLOCKS)
    checks = {f"{kernel.registers} registers, at most {most}": kernel.registers <= most}
    if not found.wide:
        return checks
    pieces = 1 if "kernelIf" in kernel.name else 2
    loads = found.reads * found.ahead + found.values * pieces
    stores = found.ahead
    return checks | {
        f"{kernel.wide('LDG')} LDG.128, at least {loads}": kernel.wide("LDG") >= loads,
        f"{kernel.wide('STG')} STG.128, at least {stores}": kernel.wide("STG") >= stores,
    }


def pooling(kernel: Kernel) -> dict[str, bool]:
    """As `passes`: taps of 3x3 in flight forward, two windows of a row and the pixel backward."""
    found = re.search(
        r"bn_act_pool(_backward)?_kernelI\w*?Li(\d)E(?:LNS_10PoolKernelE(\d)E)?", kernel.name
    )
    if found is None:
        return {"its name spells no pooling": False}
    backward, width, taps = found.groups()
    most = 65536 // (256 * WIDE_BLOCKS)
    checks = {f"{kernel.registers} registers, at most {most}": kernel.registers <= most}
    if width == "1":
        return checks
    loads = 3 if backward else 9 if taps == "0" else 1
    return checks | {
        f"{kernel.wide('LDG')} LDG.128, at least {loads}": kernel.wide("LDG") >= loads,
        f"{kernel.wide('STG')} STG.128, at least 1": kernel.wide("STG") >= 1,
    }


def values(kernel: Kernel) -> dict[str, bool]:
    """A channel a thread: what little there is, in double."""
    return {f"{kernel.registers} registers, at most 64": kernel.registers <= 64}


RULES = {
    "bn_act_pool_kernel": pooling,
    "bn_act_pool_backward_kernel": pooling,
    "bn_finalize_kernel": values,
    "bn_update_stats_kernel": values,
    "bn_backward_finalize_kernel": values,
    "bn_add_act_kernel": passes,
    "bn_add_act_backward_kernel": passes,
    "bn_backward_apply_kernel": passes,
}
