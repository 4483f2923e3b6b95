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


def name_of(mangled: str) -> list[str]:
    """What a kernel's readable name says of its pass; [] of other kernels."""
    found = pass_of(mangled)
    if found is None:
        return []
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


RULES = {
    f"{op}_kernel": passes for op in ("bn_add_act", "bn_add_act_backward", "bn_backward_apply")
}
