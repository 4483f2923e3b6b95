"""Programmatic dependent launch: a kernel that begins while the one ahead of it still runs.

Launched so, a kernel's programs may start as soon as every program of the kernel ahead has said
that they may (or has ended), and hide their launch, their addresses and the way of their weights
from memory to L2 behind it. What orders the two is then the kernel's own wait, which lasts until
the kernel ahead has ended and all that it wrote can be seen. Hence two rules, which the gates read
from the machine code:

- Before its wait a kernel touches nothing but constants: neither what the kernel ahead writes nor
  what it may still read, such as memory of an arena that is used again.
- Every program waits. That the kernel ahead has ended means only what it waited for itself: one
  that did not wait may end before the kernel ahead of it, and whoever follows it would read what
  is not there yet.

So a kernel waits first and lets the next one begin then: what is two kernels ahead has ended when a
kernel begins, and no more than one kernel sits on a multiprocessor waiting.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import Limits

WAVE = 2
"""Programs a multiprocessor that are taken to run at once: what any configuration allows."""

LANES = 256
"""Lines of 128 bytes that a program asks for at a time: two a thread."""


class Flow(NamedTuple):
    """How a launch stands among those around it, as far as the caller knows.

    Attributes:
        dependent: whether its kernels wait for the one ahead, and let the next one begin early;
            only where `_limits.not_dependent` has nothing against it.
        follows: whether the kernel ahead does so too, so that this one may begin early.
    """

    dependent: bool = False
    follows: bool = False

    def options(self) -> dict[str, bool]:
        """What the first kernel of a launch gets, beside its own arguments."""
        if not self.dependent:
            return {}
        return {"PDL": True, "launch_pdl": self.follows}

    def then(self) -> Flow:
        """How the launch's next kernel stands."""
        return self._replace(follows=self.dependent)


ALONE = Flow()


def prefetched(flow: Flow, programs: int, limits: Limits, *weights: Tensor) -> dict[str, int]:
    """How many lines of their kernel's weights programs ask for at a time, before they wait.

    Only where all of them run at once: later ones find the weights in L2. Each takes its share of
    the memory from the first to the last element, which must be no more than the elements.

    Args:
        flow: of the launch.
        programs: of the kernel.
        limits: the GPU's.
        weights: constants that the kernel reads.

    Returns:
        The kernel's argument PREFETCH; none where it is 0, as by default.
    """
    early = flow.dependent and programs <= WAVE * limits.multiprocessors
    return {"PREFETCH": LANES} if early and all(map(_is_dense, weights)) else {}


def _is_dense(t: Tensor) -> bool:
    """Whether a weight fills the memory that its filters' step says it takes."""
    reach = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return reach + 1 == t.numel() == t.shape[0] * t.stride(0)


@triton.jit
def wait(PDL: tl.constexpr):
    """Waits for the kernel ahead, then lets the next one begin."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(
    constant,  # pointer to a dense tensor's first element
    elements,  # that it has
    LANES: tl.constexpr,
):
    """Asks for this program's share of a constant to come to L2; nothing waits for it."""
    each: tl.constexpr = 1024 // constant.dtype.element_ty.primitive_bitwidth  # a line of L2
    lines = tl.cdiv(elements, each)
    line = tl.program_id(0) * LANES + tl.arange(0, LANES)
    for _ in range(tl.cdiv(lines, LANES * tl.num_programs(0))):
        # Beyond the end the last line again: there are no masks here.
        place = constant + tl.minimum(line, lines - 1) * each
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        line += LANES * tl.num_programs(0)
