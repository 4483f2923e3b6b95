"""What the machine code of the kernels that measure a GPU's ceilings is held to.

Each is what its source says: the copies, loads and products that are measured are there, in a loop
that nothing else slows down, between two looks at the clock.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _cuda_rules import Kernel

STEP_PRODUCTS = 4  # instructions in a step of 64
CLOCK = r"CS2R.*"
"""What reads %clock64, or clears a pair of registers."""


def _held(
    kernel: Kernel, registers: int, least: dict[str, int], exactly: dict[str, int] | None = None
) -> dict[str, bool]:
    counted = {
        f"{kernel.count(pattern)} {pattern}, at least {count}": kernel.count(pattern) >= count
        for pattern, count in least.items()
    }
    counted |= {
        f"{kernel.count(pattern)} {pattern}, expected {count}": kernel.count(pattern) == count
        for pattern, count in (exactly or {}).items()
    }
    few = f"{kernel.registers} registers, at most {registers}"
    return {
        "it is built for sm_90a alone": kernel.arch == "90a",
        few: kernel.registers <= registers,
        **counted,
    }


def reads(kernel: Kernel) -> dict[str, bool]:
    """A box by rows or in one piece, for one block or for a cluster; sums of what has come."""
    found = re.search(r"BroughtE(\d)ELi(\d+)E", kernel.name)
    if found is None:
        return {"its name spells no way": False}
    in_one_piece, sharing = found.group(1) == "1", int(found.group(2))
    copy = (
        r"UBLKCP.*" if in_one_piece
        else r"UTMALDG\.2D\.MULTICAST.*" if sharing > 1
        else r"UTMALDG\.2D"
    )  # fmt: skip
    least = {CLOCK: 2, "SYNCS.*TRYWAIT.*": 2, r"LDS\.128": 1}
    if sharing > 1:
        least |= {"UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}
    return _held(kernel, 128, least, {copy: 1})


def loads(kernel: Kernel) -> dict[str, bool]:
    """Four loads of 16 bytes a thread at once; two blocks' threads fill a multiprocessor."""
    return _held(kernel, 64, {CLOCK: 2}, {r"LDG\.E\.128": 4})


def products(kernel: Kernel) -> dict[str, bool]:
    """A step's products and no more, beside copies of operands and traffic."""
    found = re.search(r"kernelILi(\d+)ELNS_8LeftSideE(\d)E", kernel.name)
    if found is None:
        return {"its name spells no product": False}
    exactly = {
        rf"HGMMA\.64x{found.group(1)}x16\.F32\.BF16.*": STEP_PRODUCTS,
        r"HGMMA.*": STEP_PRODUCTS,
        r"WARPGROUP\.DEPBAR.*": 2,
        r"LDG\.E": 16 * int(found.group(2)),
    }
    cleared = int(found.group(1)) // 4  # the sums, by pairs
    least = {CLOCK: cleared + 2, r"UTMALDG\.2D": 2, "SYNCS.*TRYWAIT.*": 3, "USETMAXREG.*": 2}
    return _held(kernel, 168, least, exactly)


def meetings(kernel: Kernel) -> dict[str, bool]:
    """By a counter, or by a cluster's barrier."""
    found = re.search(r"MeetingE(\d)E", kernel.name)
    if found is None:
        return {"its name spells no meeting": False}
    by_cluster = {"UCGABAR_ARV": 3, "UCGABAR_WAIT": 3}
    by_counter = {"RED.*STRONG.GPU": 1, "LDG.*STRONG.GPU": 1, "NANOSLEEP.*": 1}
    ways = by_cluster if found.group(1) == "1" else by_counter
    return _held(kernel, 64, {CLOCK: 2, **ways})


def name_of(mangled: str) -> str | None:
    """What a kernel measures, in words; None of what is none of these, or has one form alone."""
    if read := re.search(r"ceilings_reads_kernelILNS_7BroughtE(\d)ELi(\d+)E", mangled):
        shared = f" for clusters of {read.group(2)}" if read.group(2) != "1" else ""
        return f"{('rows', 'piece')[int(read.group(1))]}{shared}"
    if product := re.search(r"ceilings_products_kernelILi(\d+)ELNS_8LeftSideE(\d)E", mangled):
        return (
            f"64x{product.group(1)} left in {('shared memory', 'registers')[int(product.group(2))]}"
        )
    if meeting := re.search(r"ceilings_meetings_kernelILNS_7MeetingE(\d)E", mangled):
        return ("grid", "cluster")[int(meeting.group(1))]
    return None


RULES = {
    "ceilings_reads_kernel": reads,
    "ceilings_loads_kernel": loads,
    "ceilings_products_kernel": products,
    "ceilings_meetings_kernel": meetings,
    "ceilings_launch_kernel": lambda kernel: _held(kernel, 32, {}),
}
