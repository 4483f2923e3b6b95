"""How ops that span layers are tuned: their options, their launches, what an entry is found by.

A chain's options are the kernel's configurations and "parts", the convolutions one after the other:
what wins decides which of both a graph is rewritten to.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.work import Work
from resnet_fused.ops import (
    _chain_plan,
    _cuda,
    _cuda_chain,
    _cuda_plan,
    _cuda_stem,
    _results,
    _triton,
    _tuned_calls,
)
from resnet_fused.ops._library import overload
from resnet_fused.ops.conv_bn_act import _call as call_of_conv
from resnet_fused.ops.conv_bn_act import _choose as choose_conv
from resnet_fused.triton import _chain_tiles, _limits, _stem_tiles
from resnet_fused.triton._launch import precision
from resnet_fused.triton._tiles import cdiv

Names = frozenset[str] | None
Way = tuple[str, int, float, Any]
"""Configuration, splits, predicted cycles, keyword arguments of a launch."""
STRIPS = (1, 2, 4, 8)  # parts of an image's rows, beside what the chooser would take
_LAUNCHES: dict[str, Callable[..., None]] = {"triton": _triton._launch, "cuda": _cuda._launch}


@dataclass(frozen=True)
class Op:
    """An op that stands for several layers.

    Attributes:
        ways: (case, arguments, admitted names) -> the Triton kernel's, the chooser's pick first,
            then the others; None where it has one configuration.
        problem: arguments -> what a plan of the CUDA kernel depends on.
    """

    ways: Callable[[Any, tuple[Any, ...], Names], list[Way]] | None
    problem: Callable[[tuple[Any, ...]], _cuda_plan.Problem]


def arguments(work: Work, i: int = 0) -> tuple[Any, ...]:
    """Of the op on operand set i, in the schema's order."""
    function = KINDS[work.subject.op].arguments
    assert function is not None
    return function(work.case)(work.sets[i])


def outputs(work: Work) -> tuple[Tensor, ...]:
    """Empty results of the op, those that are there."""
    found = KINDS[work.subject.op].whole(_results.FORMS[work.subject.op].empty(*arguments(work)))
    return found if isinstance(found, tuple) else (found,)


def launch(work: Work, i: int, outs: tuple[Tensor, ...], implementation: str, wish: Any) -> None:
    """Runs operand set i into `outs`.

    Args:
        work: the subject.
        i: the set.
        outs: as of `outputs`.
        implementation: "triton" or "cuda".
        wish: keyword arguments of the implementation's launch, or "parts"; None as the op itself
            would.
    """
    op, given = work.subject.op, arguments(work, i)
    if wish == _tuned_calls.PARTS:
        _chain_by_parts(work.case, work.sets[i], outs)
        return
    form = _results.FORMS[op]
    operands = [given[place] for place in form.operands.values()]
    results = list(outs)
    if op == "conv_chain" and len(outs) == 1:  # there is no next: an empty one
        results.append(outs[0].new_empty((outs[0].shape[0], 0, *given[0].shape[2:])))
    start = _LAUNCHES[implementation]
    if implementation == "triton" and wish is not None:
        start = functools.partial(_triton_launch, op)
        start(*operands, *results, *given[form.options :], **wish)
        return
    start(op, *operands, *results, *given[form.options :], **(wish or {}))


def _triton_launch(op: str, *arguments: Any, **wish: Any) -> None:
    """The kernel's own launch, which takes a configuration whatever tuning found before."""
    module: Any = importlib.import_module(f"resnet_fused.triton.{op}")
    module.launch(*arguments, **wish)


def _chain_by_parts(case: Any, o: Any, outs: tuple[Tensor, ...]) -> None:
    """Convolution after convolution, each by what serves it, the last ones into `outs`."""
    parts = {part.name: part for part in case.parts}

    def conv(name: str, x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        part = parts[name]
        weight, scale, shift = o.convolution(name)
        geometry = [list(pair) for pair in (part.stride, part.padding, part.dilation)]
        choice = choose_conv(x, weight, call_of_conv(x, residual, part.act), (*geometry, 1))
        operands = (x, weight, scale, shift, residual)
        name = choice.implementation.name
        if name in _LAUNCHES:
            form = torch.channels_last
            out = x.new_empty(part.output_shape).to(memory_format=form) if out is None else out
            _LAUNCHES[name](part_op, *operands, out, *geometry, 1, part.act)
            return out
        y = overload(part_op, name)(*operands, *geometry, 1, part.act)
        return y if out is None else out.copy_(y)

    part_op = "conv_bn_act"
    t = conv("front", o.x, None, None) if case.front else o.x
    shortcut = conv("projection", o.projected, None, None) if case.projected else o.residual
    whole = case.out_stride == 1
    out = conv("first", t, shortcut, outs[0] if whole else None)
    if case.m:
        conv("next", out, None, outs[1])
    if not whole:
        outs[0].copy_(out[:, :, :: case.out_stride, :: case.out_stride])


def _stem_ways(case: Any, given: tuple[Any, ...], names: Names) -> list[Way]:
    x, weight, *_ = given
    stride, padding, *pool = given[5:]
    limits = _limits.limits(weight.device)
    sizes = _stem_tiles.sizes_of(
        x.shape, weight, stride, padding, pool, precision(weight.dtype), _stem_tiles.is_dense(x)
    )
    if isinstance(sizes, str):
        raise LookupError(sizes)
    pick = _stem_tiles.choose(sizes, limits, names)
    if isinstance(pick, str):
        raise LookupError(pick)

    def way(tile: Any, strips: int) -> Way:
        rows = cdiv(sizes.rows, strips)
        plan = _stem_tiles.Plan(tile, rows, "tuning asks for it")
        cycles = _stem_tiles.cost(sizes, tile, rows, limits)
        return tile.name, cdiv(sizes.rows, rows), cycles, {"plan": plan}

    chosen = cdiv(sizes.rows, pick.rows)
    found = [way(pick.tile, chosen)]
    for tile in _stem_tiles.TILES:
        if (names is None or tile.name in names) and _stem_tiles.fits(sizes, tile, limits):
            found += [way(tile, n) for n in {chosen, *STRIPS} if n <= sizes.rows]
    return found


def _chain_ways(case: Any, given: tuple[Any, ...], names: Names) -> list[Way]:
    x = given[0]
    limits = _limits.limits(x.device)
    sizes = _chain_plan.sizes_of(case, x.element_size(), precision(x.dtype))
    pick = _chain_tiles.choose(sizes, limits, names)
    if isinstance(pick, str):
        raise LookupError(pick)
    found = [
        (one.name, 1, _chain_tiles.cost(one, sizes, limits), {"config": one})
        for one in _chain_tiles.CONFIGS
        if (names is None or one.name in names) and _chain_tiles.unfit(one, sizes, limits) is None
    ]
    cycles = sum(_chain_plan.part_cost(part, x.dtype, limits) for part in case.parts)
    found.append((_tuned_calls.PARTS, 1, cycles, _tuned_calls.PARTS))
    # What a graph is rewritten to without tuning: the faster one, as it is predicted.
    return sorted(found, key=lambda one: one[2])


def cuda_parts(work: Work, pick: _cuda_plan.Plan, names: Names) -> Way | None:
    """The convolutions of a chain one after the other, beside its CUDA kernel's pick.

    Args:
        work: a subject.
        pick: of its kernel.
        names: of the configurations that were admitted.

    Returns:
        The way, its cycles in the prediction's proportion to the pick's; None of another op.
    """
    if work.subject.op != "conv_chain":
        return None
    about = _cuda_plan.gpu(work.sets[0].x.device)
    found = _chain_plan.predict_cuda(work.case, work.sets[0].x.dtype, about, names)
    if isinstance(found, str):
        raise LookupError(found)
    cycles = pick.cycles * found.parts / found.chain
    return _tuned_calls.PARTS, 1, cycles, _tuned_calls.PARTS


def _stem_problem(given: tuple[Any, ...]) -> _cuda_plan.Problem:
    out = _results.FORMS["stem"].empty(*_meta(given))
    return _cuda_stem.stem_problem(given[0], given[1], given[5:10], out, given[4])


def _head_problem(given: tuple[Any, ...]) -> _cuda_plan.Problem:
    out = _results.FORMS["head"].empty(*_meta(given))
    return _cuda_stem.head_problem(given[0], given[1], out, given[2])


def _chain_problem(given: tuple[Any, ...]) -> _cuda_plan.Problem:
    form = _results.FORMS["conv_chain"]
    named = dict(zip(form.operands, given, strict=False))
    results = _cuda_chain._results_like(*given)
    return _cuda_chain.problem_of(named, *results, given[form.options :], real=False)


def _meta(given: tuple[Any, ...]) -> list[Any]:
    return [one.to("meta") if isinstance(one, Tensor) else one for one in given]


OPS: dict[str, Op] = {
    "stem": Op(_stem_ways, _stem_problem),
    "conv_chain": Op(_chain_ways, _chain_problem),
    "head": Op(None, _head_problem),
}
"""Op -> how it is tuned."""
