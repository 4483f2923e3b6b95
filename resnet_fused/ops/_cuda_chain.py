"""`conv_chain` by the compiled extension: what its CUDA kernel takes, and what a launch does.

The kernel moves activations and filters 16 bytes at a time: what lies otherwise is copied to
channels_last, and a result that does is written by way of a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..cases import ChainCase, ConvCase
from . import _cuda_fp8, _cuda_plan, _e4m3, _results, _tuned_calls

OP = "conv_chain"
OPERANDS = (
    "x", "weight", "residual", "projected", "projection_weight", "next_weight", "front_weight",
)  # fmt: skip
"""What a plan depends on, beside the results and the options."""
FP8 = "conv_chain_fp8"
"""The same on e4m3 operands, whose parts are conv_bn_act_fp8's."""


def supports_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernel can't take activations of a dtype, or None."""
    if dtype is torch.float32:
        return "sums in float32 can't be multiplied on as they lie in registers"
    return None


def unfit(arguments: Sequence[Any], op: str = OP, planned: int | None = None) -> str | None:
    """Why no configuration that may be used takes a call, or None.

    Args:
        arguments: checked, in the schema's order; x is on the GPU.
        op: `OP` or `FP8`.
        planned: how many of the options a plan depends on; None for all.
    """
    given = dict(zip(_results.FORMS[OP].operands, arguments, strict=False))
    x = given["x"]
    out, following = _results_like(*arguments)
    options = arguments[len(given) :][:planned]
    made = problem_of(given, out, following, options, real=False, op=op)
    return _cuda_plan.refused(made, x.device)


def _results_like(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The results on the meta device, as a launch hands them to the kernel: in channels_last."""
    x = torch.empty(arguments[0].shape, dtype=arguments[0].dtype, device="meta")
    out, following = _results.FORMS[OP].empty(x, *arguments[1:])
    return _channels_last(out), _channels_last(following)


def _channels_last(t: Tensor) -> Tensor:
    """An uninitialised tensor like `t` whose channels lie side by side."""
    last = torch.channels_last
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=last)


def problem_of(
    given: dict[str, Any],
    out: Tensor,
    following: Tensor,
    options: Sequence[Any],
    *,
    real: bool = True,
    op: str = OP,
) -> _cuda_plan.Problem:
    """What a plan depends on; operands are copied to channels_last where they lie otherwise.

    Args:
        given: the op's operands by name.
        out: a result that the kernel can write, or a tensor like it.
        following: likewise.
        options: projection_stride, out_stride and, of `OP`, reverse.
        real: False makes no copies, but what a plan takes for them.
        op: `OP` or `FP8`.
    """
    made, notes = [], []
    for name in OPERANDS:
        t = given[name]
        if t is not None:
            adjacent = _cuda_plan.adjacent if real else _cuda_plan.adjacent_like
            moved = adjacent(t, t.shape[1])
            if moved is not t:
                notes.append(f"{name} is copied to channels_last")
            t = moved
        made.append(t)
    return _cuda_plan.Problem(op, (*made, following), tuple(options), out, tuple(notes))


def launch(
    *arguments: Any,
    wish: tuple[int, int] | None = None,
    dependent: bool = False,
    follows: bool = False,
) -> bool:
    """Runs the kernel into given results.

    Args:
        arguments: operands as of `_results.FORMS`, out, following, and the options.
        wish: a configuration and splits in place of a choice among the admitted ones.
        dependent: as of `_cuda.launch_conv_bn_act`.
        follows: likewise.

    Returns:
        Whether a result was copied, by a kernel behind this one that does not wait.

    Raises:
        LookupError: no admitted configuration takes it.
        RuntimeError: the launch failed, or refused the wish.
    """
    names = _results.FORMS[OP].operands
    given = dict(zip(names, arguments, strict=False))
    out, following, *options = arguments[len(names) :]
    case = _tuned_calls.case_of((*given.values(), *options))
    call = _tuned_calls.chain_call(case, given["x"].dtype)
    how = {"call": call, "wish": wish, "dependent": dependent, "follows": follows}
    return run(OP, given, (out, following), options, options, **how)


def run(
    op: str,
    given: dict[str, Any],
    results: tuple[Tensor, Tensor],
    planned: Sequence[Any],
    options: Sequence[Any],
    *,
    call: Any = None,
    wish: tuple[int, int] | None = None,
    dependent: bool = False,
    follows: bool = False,
) -> bool:
    """A launch of `OP` or `FP8`.

    Args:
        op: which.
        given: the op's operands by name.
        results: out and following.
        planned: what of the options a plan depends on.
        options: what the kernel is told behind its operands.
        call: what tuning's entry is found by.
        wish: as of `launch`, like what follows and is returned and raised.
        dependent: see there.
        follows: see there.
    """
    out, following = results
    target, last = (
        _channels_last(t) if _cuda_plan.misses_channels(t, t.shape[1]) else t for t in results
    )
    made = problem_of(given, target, last, planned, op=op)._replace(call=call)
    x, weight, residual, projected, projection_weight, next_weight, front_weight, _ = made.operands
    # Behind a copy no kernel follows another: what it copies may be what is taken for constant.
    copied = any(given[name] is not t for name, t in zip(OPERANDS, made.operands, strict=False))
    _cuda_plan.raw(op, "out")(
        x, weight, given["scale"], given["shift"], residual, projected, projection_weight,
        given["projection_scale"], given["projection_shift"], next_weight, given["next_scale"],
        given["next_shift"], front_weight, given["front_scale"], given["front_shift"], *options,
        dependent, follows and not copied, *(wish or _cuda_plan.wanted(made)), target, last,
    )  # fmt: skip
    for written, result in ((target, out), (last, following)):
        if written is not result:
            result.copy_(written)
    return target is not out or last is not following


def predict(
    case: ChainCase, dtype: torch.dtype, about: Sequence[int], names: frozenset[str] | None
) -> tuple[float, list[float], str] | str:
    """What the kernel and the kernels that it stands for are predicted to take.

    Both by the launches' own model: cycles of one multiprocessor.

    Args:
        case: sizes, at least one pixel.
        dtype: of its activations, 16 bits or e4m3.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        names: of the configurations that may be used; None for all.

    Returns:
        Cycles of the kernel and of the convolution's own op for each of `case.parts`, and its
        configuration; or why none takes it.
    """
    image = functools.partial(_image, dtype)
    plain = (case.n, case.c, case.h, case.w)
    given = {
        "x": image(*case.input_shape),
        "weight": image(case.c, case.k, 1, 1),
        "residual": None if case.projected else image(*plain),
        "projected": image(*case.projected_shape) if case.projected else None,
        "projection_weight": image(case.c, case.projected, 1, 1) if case.projected else None,
        "next_weight": image(case.m, case.c, 1, 1) if case.m else None,
        "front_weight": image(case.k, case.front, 3, 3) if case.front else None,
    }
    following = image(case.n, case.m, case.h, case.w)
    strides = case.projection_stride, case.out_stride
    op, options = (FP8, strides) if dtype is _e4m3.E4M3 else (OP, (*strides, False))
    made = problem_of(given, image(*case.stored_shape), following, options, real=False, op=op)
    found = _cuda_plan.choose(made, about, names)
    if found.configuration < 0:
        return found.why
    parts = [_part(part, dtype, about) for part in case.parts]
    return found.cycles, parts, found.name


def _image(dtype: torch.dtype, *shape: int) -> Tensor:
    last = torch.channels_last
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)


def _part(case: ConvCase, dtype: torch.dtype, about: Sequence[int]) -> float:
    """Cycles of one convolution by the launch of its own op."""
    image = functools.partial(_image, dtype)
    out = image(*case.output_shape)
    operands = image(*case.input_shape), image(*case.weight_shape), out if case.residual else None
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    if dtype is _e4m3.E4M3:
        made = _cuda_fp8.problem_of(operands, geometry, out, real=False)
    else:
        made = _cuda_plan.problem_of("conv_bn_act", operands, geometry, out, real=False)
    return _cuda_plan.plan(made, about).cycles


def supports(call: backends.Call) -> str | None:
    """Why the kernel can't serve a call, or None."""
    from . import _cuda

    return supports_dtype(call.dtype) or _cuda.supports(call)
