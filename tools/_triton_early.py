"""Programmatic dependent launch in the gates: the calls that use it, and what PTX says of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FORM = "early"
"""Form of a call whose kernels may begin before the one ahead has ended, where a GPU can."""

WAIT, TRIGGER = "griddepcontrol.wait", "griddepcontrol.launch_dependents"

_MEMORY = re.compile(
    r"\b(?:(?:ld|st|ldu)\.(?:[\w:]+\.)*global|cp\.async\.(?:c[ag]|bulk)|atom|red|tensormap)\b"
)
"""What reads or writes global memory; `prefetch` does neither."""


@dataclass(frozen=True)
class Dependence:
    """What a kernel's PTX says of the kernels around it.

    Attributes:
        waits: for the kernel ahead.
        triggers: of the next one.
        ahead: what stands before the first wait and must not: accesses to memory, an end.
        around: branches that lead from before the first wait to behind it.
        read_only: loads by the path for memory that nobody writes while a kernel runs.
    """

    waits: int = 0
    triggers: int = 0
    ahead: tuple[str, ...] = ()
    around: int = 0
    read_only: int = 0


def dependence(ptx: str) -> Dependence:
    """Reads a kernel's PTX, line by line."""
    lines = [re.sub(r"//.*", "", line).strip() for line in ptx.splitlines()]
    waits = [at for at, line in enumerate(lines) if WAIT in line]
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\$?\w+:", line)}
    first = waits[0] if waits else 0
    ahead, around = [], 0
    for line in lines[:first]:
        found = _MEMORY.search(line) or re.search(r"\b(?:ret|exit|trap)\s*;", line)
        if found:
            ahead.append(found[0].rstrip(" ;"))
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$?\w+)", line)
        around += bool(jump and labels.get(jump[1], 0) > first)
    return Dependence(
        len(waits),
        sum(TRIGGER in line for line in lines),
        tuple(ahead),
        around,
        sum(bool(re.search(r"\bld\.global(?:\.[\w:]+)*\.nc\b", line)) for line in lines),
    )


def arguments(call: Any) -> dict[str, Any]:
    """What the launch of a `_triton_cases.Call` gets beside its operands.

    Nothing but for form "early": there the kernels begin early, on a GPU that can, and the batch is
    walked backwards where an argument of the launch says so.
    """
    import torch

    from resnet_fused.triton import _limits
    from resnet_fused.triton._dependent import ALONE, Flow

    if call.form != FORM:
        return {}
    early = _limits.not_dependent(torch.device("meta")) is None
    more = {"reverse": True} if call.op == "conv_bn_act" else {}
    return {"flow": Flow(True, True) if early else ALONE, **more}


def packed(call: Any) -> bool:
    """Whether a stem's filters were packed before: as in an engine, whose kernels begin early."""
    return call.form == FORM


Spec = tuple[str, Any, str, str, str | None, bool, str]
"""Of a call: op, shape, type, layout, configuration, whether CI compiles it, form."""


def calls(
    shapes: Sequence[Any], layers: Iterable[Any], chains: Iterable[Any], others: dict[str, Any]
) -> list[Spec]:
    """ResNet-50's kernels at batch 1, and each kind of convolution.

    Args:
        shapes: of convolutions, with many images: programs that do not all run at once.
        layers: of ResNet-50.
        chains: likewise.
        others: op -> its call's shape, with one image.
    """
    found: list[Spec] = []
    for shape in shapes:
        sample = shape.name in ("1x1_residual", "3x3_split")
        found.append(("conv_bn_act", shape, "bf16", "nhwc", None, sample, FORM))
    for layer in layers:
        one = dataclasses.replace(layer, n=1)
        found.append(("conv_bn_act", one, "bf16", "nhwc", None, False, FORM))
    for place, chain in enumerate(chains):
        one = dataclasses.replace(chain, n=1)
        found.append(("conv_chain", one, "bf16", "nhwc", None, place == 1, FORM))
    for op, shape in others.items():
        found.append((op, shape, "bf16", "nhwc", None, True, FORM))
    return found
