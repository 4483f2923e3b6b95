"""The CUDA convolutions of the compiled extension: what a launch takes, and why.

`csrc/launch` holds the kernels, their tables of configurations and the functions that choose among
them; `csrc/bindings` makes ops of these: `<op>_out` writes into a tensor it is given, `<op>_plan`
says what it would take, and reads no memory, `<op>_configurations` names them all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _extension, _tuned
from ..triton import _tiles
from . import _admitted

OPERANDS = {
    "conv_bn_act": ("x", "weight", "residual"),
    "conv_dgrad": ("dy", "y", "weight"),
    "conv_wgrad": ("dy", "y", "x"),
}
"""What the ops read beside vectors, in the order of their schemas."""

CHUNK_BYTES = 16
"""What operands are read by where channels lie side by side and there are enough of them."""

TMA = "tma_"
"""How the names of configurations begin that only GPUs of capability 9.0 run."""

WINDOW = "tma_win"
"""How the names of those begin that bring the pixels of all nine taps of a 3x3 at once."""

CLUSTER = "tma_cluster"
"""How the names of those begin whose splits are the blocks of a cluster."""

NARROW = "narrow_"
"""How the names of configurations begin that read operands element by element."""

HOPPER = 90
"""10 times the capability that configurations of `TMA` are for."""

ORDINARY = 1 << 30
"""Elements of a tensor up to which no launch comes near to what it can count."""

ORDINARY_GEOMETRY = 64
"""Strides, paddings and dilations, likewise."""

MOST_TAPS = 15
"""Of a filter, along each side: kMostTaps of csrc/device/conv_geometry.h."""


class Problem(NamedTuple):
    """What a plan depends on.

    Attributes:
        op: a key of `OPERANDS`, or another op whose kernels are planned alike.
        operands: those of `OPERANDS`; of another op what its plan reads.
        geometry: stride, padding, dilation, groups; of another op the options of its plan.
        out: the result; only its shape, strides and alignment count.
        notes: what was done to the operands, for `explain`.
        call: what tuning's entry is found by, of an op that is not in `OPERANDS`.
    """

    op: str
    operands: tuple[Tensor | None, ...]
    geometry: tuple[Any, ...]
    out: Tensor
    notes: tuple[str, ...] = ()
    call: Any = None


class Plan(NamedTuple):
    """What a launch takes.

    Attributes:
        configuration: its index, -1 where none serves the problem.
        name: its name, "128x128_4w4s"; "" where there is none.
        splits: parts of the reduction.
        workspace_bytes: of memory that the splits are merged in.
        cycles: predicted, good for comparisons alone.
        why: the reason of the choice, or what stands against the problem.
    """

    configuration: int
    name: str
    splits: int
    workspace_bytes: int
    cycles: float
    why: str


@functools.cache
def raw(op: str, part: str) -> Any:
    """`torch.ops.resnet_fused.<op>_<part>.default`, "out", "plan" or "configurations"."""
    return getattr(torch.ops.resnet_fused, f"{op}_{part}").default


def exists(op: str) -> bool:
    """Whether the extension holds CUDA kernels of an op."""
    return _extension.available() and hasattr(torch.ops.resnet_fused, f"{op}_out")


@functools.cache
def configurations(op: str) -> tuple[str, ...]:
    """The names of an op's configurations, by index; () where the extension holds none."""
    return tuple(raw(op, "configurations")()) if exists(op) else ()


def tf32() -> bool:
    """Whether float32 products may be rounded to TF32: torch's own switch for convolutions."""
    return torch.backends.cudnn.allow_tf32


def complete(op: str, device: torch.device) -> bool:
    """Whether every configuration may be used, so that the launch may choose by itself."""
    names = _admitted.names(op, "cuda", device)
    return names is None or len(names) == len(configurations(op))


@functools.cache
def _gpu(index: int) -> tuple[int, ...]:
    if _extension.available() and hasattr(torch.ops.resnet_fused, "conv_gpu"):
        with torch.cuda.device(index):  # the launches' own numbers, clusters too
            return tuple(torch.ops.resnet_fused.conv_gpu(index))
    about = torch.cuda.get_device_properties(index)
    return (
        about.multi_processor_count,
        about.shared_memory_per_block_optin,
        about.shared_memory_per_multiprocessor,
        10 * about.major + about.minor,
    )


def gpu(device: torch.device) -> tuple[int, ...]:
    """The numbers of a GPU that plans depend on.

    Returns:
        Multiprocessors, bytes of shared memory of a block and of a multiprocessor, 10 times the
        compute capability; with the extension's kernels also how many clusters of 4 and of 8 blocks
        run at once, each block on a multiprocessor of its own, 0 where there are none.
    """
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def runs(configuration: str, about: Sequence[int]) -> bool:
    """Whether any call on a GPU may come to a configuration.

    Args:
        configuration: its name.
        about: the GPU's numbers, as of `gpu`.
    """
    return not configuration.startswith(TMA) or (len(about) > 3 and about[3] == HOPPER)


def plan(problem: Problem, about: Sequence[int], configuration: int = -1, splits: int = 0) -> Plan:
    """What a launch would take on a GPU; nothing is read or launched, and no GPU is needed.

    Args:
        problem: operands on any device.
        about: the GPU's numbers, as of `gpu`; without the fourth no configuration of `TMA` is
            planned.
        configuration: a wish, or -1.
        splits: a wish, or 0.

    Raises:
        RuntimeError: the operands do not fit together.
    """
    switches = (tf32(),) if problem.op in OPERANDS else ()
    index, *rest = raw(problem.op, "plan")(
        *problem.operands,
        *problem.geometry,
        *switches,
        problem.out,
        list(about),
        configuration,
        splits,
    )
    return Plan(index, configurations(problem.op)[index] if index >= 0 else "", *rest)


def memory_cycles(moved: float, about: Sequence[int]) -> float:
    """Cycles that so many bytes take through memory on a GPU."""
    return moved / (_tiles.MEMORY * about[0])


def predicted(problem: Problem, about: Sequence[int]) -> float:
    """Cycles of a call by its plan, and no less than its bytes take through memory.

    A plan compares configurations of one op, which move the same bytes, so that those by wgmma ask
    for L2's time alone; who compares ops that move more or fewer has to ask for memory's, too.

    Args:
        problem: operands on any device, each of which is read once.
        about: the GPU's numbers.
    """
    moved = sum(t.nbytes for t in (*problem.operands, problem.out) if t is not None)
    return max(plan(problem, about).cycles, memory_cycles(moved, about))


def choose(problem: Problem, about: Sequence[int], names: frozenset[str] | None) -> Plan:
    """The plan among configurations that may be used: of several, the least predicted time.

    Args:
        problem: what is to be computed.
        about: the GPU's numbers.
        names: of those that may be used; None for all.
    """
    known = configurations(problem.op)
    if names is None or len(names) == len(known):
        return plan(problem, about)
    found = [plan(problem, about, index) for index, name in enumerate(known) if name in names]
    able = [one for one in found if one.configuration >= 0]
    # As the launch's own choice does: narrow loads are for what nothing else serves.
    wide = [one for one in able if not one.name.startswith(NARROW)]
    if able:
        return min(wide or able, key=lambda one: one.cycles)
    why = found[0].why if found else "none was admitted"
    return Plan(-1, "", 0, 0, math.inf, f"no admitted configuration serves it: {why}")


def ordinary(*tensors: Tensor | None, geometry: Sequence[Any]) -> bool:
    """Whether sizes are so far from every limit that all plans are known to take them."""
    numbers = (*geometry[0], *geometry[1], *geometry[2])
    return max(numbers) <= ORDINARY_GEOMETRY and all(
        t is None or t.numel() < ORDINARY for t in tensors
    )


def _filters_of(op: str, operands: Sequence[Tensor | None]) -> Tensor:
    found = operands[OPERANDS[op].index("weight")]
    assert found is not None
    return found


def unfit(
    op: str, operands: Sequence[Tensor | None], geometry: Sequence[Any], shape: Sequence[int]
) -> str | None:
    """Why no configuration that may be used takes these very tensors, or None.

    Only unusual sizes, and a GPU on which some configuration has been refused, can come to this.

    Args:
        op: a key of `OPERANDS`.
        operands: as of `Problem`; the first one is on the GPU.
        geometry: stride, padding, dilation, groups.
        shape: of the result.
    """
    first = operands[0]
    assert first is not None
    out = torch.empty(tuple(shape), dtype=first.dtype, device="meta")
    filters = shape if op == "conv_wgrad" else _filters_of(op, operands).shape
    usual = max(filters[2:]) <= MOST_TAPS and ordinary(*operands, out, geometry=geometry)
    if usual and complete(op, first.device):
        return None
    return refused(problem_of(op, operands, geometry, out, real=False), first.device)


def refused(problem: Problem, device: torch.device) -> str | None:
    """Why no configuration that may be used on a device takes a problem, or None."""
    found = choose(problem, gpu(device), _admitted.names(problem.op, "cuda", device))
    return found.why if found.configuration < 0 else None


def misses_channels(t: Tensor, channels: int) -> bool:
    """Whether a copy in channels_last could be read in chunks, and `t` [N, C, H, W] can't.

    The copy costs one pass over it; reading element by element costs ten instructions for each and
    every time that an element is used.

    Args:
        t: an operand.
        channels: of one group of it.
    """
    whole = channels % (CHUNK_BYTES // t.element_size()) == 0
    return whole and t.shape[1] > 1 and t.stride(1) != 1


def adjacent(t: Tensor, channels: int) -> Tensor:
    """`t`, or its copy in channels_last where that `misses_channels`."""
    last = torch.channels_last
    return t.contiguous(memory_format=last) if misses_channels(t, channels) else t


def adjacent_like(t: Tensor, channels: int) -> Tensor:
    """What a plan takes for `adjacent(t)`, without the copy."""
    if not misses_channels(t, channels):
        return t
    return torch.empty(t.shape, dtype=t.dtype, device="meta", memory_format=torch.channels_last)


def tuned(problem: Problem, device: torch.device) -> Plan | None:
    """The plan that was the fastest when this GPU was tuned, or None.

    Args:
        problem: what is to be computed.
        device: where.
    """
    call = _call_of(problem) if problem.op in OPERANDS else problem.call
    found = None if call is None else _tuned.find("cuda", device, problem.op, *call)
    if found is None:
        return None
    names = _admitted.names(problem.op, "cuda", device)
    known = configurations(problem.op)
    if found.configuration not in known or not (names is None or found.configuration in names):
        return None
    # Where the operands lie decides as well: what was tuned may not take these.
    index = known.index(found.configuration)
    made = plan(problem, gpu(device), index, found.splits)
    return None if made.configuration < 0 else made._replace(why=found.why)


def _call_of(problem: Problem) -> tuple[Any, ...]:
    """What tuning's entry of a convolution is found by."""
    first, second, third = problem.operands
    assert first is not None
    if problem.op == "conv_bn_act":
        assert second is not None
        x, weight, more = first.shape, second.shape, third
    elif problem.op == "conv_dgrad":
        assert third is not None
        x, weight, more = problem.out.shape, third.shape, second
    else:
        assert third is not None
        x, weight, more = third.shape, problem.out.shape, second
    return first.dtype, x, weight, problem.geometry, more is not None


def wanted(problem: Problem) -> tuple[int, int]:
    """Configuration and splits to ask for: the launch's own choice wherever that may be taken.

    Raises:
        LookupError: no admitted configuration takes it.
    """
    device = problem.out.device
    if (one := tuned(problem, device)) is not None:
        return one.configuration, one.splits
    if complete(problem.op, device):
        return -1, 0
    names = _admitted.names(problem.op, "cuda", device)
    found = choose(problem, gpu(device), names)
    if found.configuration < 0:
        raise LookupError(f"{problem.op}.cuda: {found.why}")
    return found.configuration, found.splits


def problem_of(
    op: str,
    operands: Sequence[Tensor | None],
    geometry: Sequence[Any],
    out: Tensor,
    *,
    real: bool = True,
) -> Problem:
    """The problem that the kernel is given: operands are copied where that is worth it.

    Args:
        op: a key of `OPERANDS`.
        operands: as of `Problem`, before any copy.
        geometry: stride, padding, dilation, groups.
        out: the result, or a tensor like it.
        real: False makes no copies, but what a plan takes for them.
    """
    stride, padding, dilation, groups = geometry
    made, notes = [], []
    for name, t in zip(OPERANDS[op], operands, strict=True):
        if t is None or name == "residual":  # it is read once, by the epilogue
            made.append(t)
            continue
        channels = t.shape[1] if name == "weight" else t.shape[1] // groups
        given = adjacent(t, channels) if real else adjacent_like(t, channels)
        made.append(given)
        if given is not t:
            notes.append(f"{name} is copied to channels_last")
        elif channels % (CHUNK_BYTES // t.element_size()):
            notes.append(f"{name} is read element by element: {channels} channels a group")
        elif t.data_ptr() % CHUNK_BYTES:
            notes.append(f"{name} is read element by element: its memory is not aligned")
    return Problem(
        op, tuple(made), (list(stride), list(padding), list(dilation), groups), out, tuple(notes)
    )


def describe(problem: Problem, device: torch.device) -> str:
    """One line for `explain`: the configuration, why, and what is not read at full width."""
    names = _admitted.names(problem.op, "cuda", device)
    found = tuned(problem, device) or choose(problem, gpu(device), names)
    return "; ".join((found.why, *problem.notes))
