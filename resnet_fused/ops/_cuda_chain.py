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
from . import _admitted, _cuda_plan, _results, _tuned_calls

OP = "conv_chain"
OPERANDS = (
    "x", "weight", "residual", "projected", "projection_weight", "next_weight", "front_weight",
)  # fmt: skip
"""What a plan depends on, beside the results and the options."""


def supports_dtype(dtype: torch.dtype) -> str | None:
    """Why the kernel can't take activations of a dtype, or None."""
    if dtype is torch.float32:
        return "sums in float32 can't be multiplied on as they lie in registers"
    return None


def unfit(arguments: Sequence[Any]) -> str | None:
    """Why no configuration that may be used takes a call, or None.

    Args:
        arguments: checked, in the schema's order; x is on the GPU.
    """
    given = dict(zip(_results.FORMS[OP].operands, arguments, strict=False))
    x = given["x"]
    out, following = _results_like(*arguments)
    made = problem_of(given, out, following, arguments[len(given) :], real=False)
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
) -> _cuda_plan.Problem:
    """What a plan depends on; operands are copied to channels_last where they lie otherwise.

    Args:
        given: the op's operands by name.
        out: a result that the kernel can write, or a tensor like it.
        following: likewise.
        options: projection_stride, out_stride, reverse.
        real: False makes no copies, but what a plan takes for them.
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
    return _cuda_plan.Problem(OP, (*made, following), tuple(options), out, tuple(notes))


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
    target, last = (
        _channels_last(t) if _cuda_plan.misses_channels(t, t.shape[1]) else t
        for t in (out, following)
    )
    made = problem_of(given, target, last, options)
    case = _tuned_calls.case_of((*given.values(), *options))
    made = made._replace(call=_tuned_calls.chain_call(case, given["x"].dtype))
    x, weight, residual, projected, projection_weight, next_weight, front_weight, _ = made.operands
    # Behind a copy no kernel follows another: what it copies may be what is taken for constant.
    copied = any(given[name] is not t for name, t in zip(OPERANDS, made.operands, strict=False))
    _cuda_plan.raw(OP, "out")(
        x, weight, given["scale"], given["shift"], residual, projected, projection_weight,
        given["projection_scale"], given["projection_shift"], next_weight, given["next_scale"],
        given["next_shift"], front_weight, given["front_scale"], given["front_shift"], *options,
        dependent, follows and not copied, *(wish or wanted(made)), target, last,
    )  # fmt: skip
    for written, result in ((target, out), (last, following)):
        if written is not result:
            result.copy_(written)
    return target is not out or last is not following


def wanted(problem: _cuda_plan.Problem) -> tuple[int, int]:
    """Configuration and splits to ask for: the launch's own choice wherever that may be taken.

    Raises:
        LookupError: no admitted configuration takes it.
    """
    device = problem.out.device
    if (one := _cuda_plan.tuned(problem, device)) is not None:
        return one.configuration, one.splits
    if _cuda_plan.complete(OP, device):
        return -1, 0
    names = _admitted.names(OP, "cuda", device)
    found = _cuda_plan.choose(problem, _cuda_plan.gpu(device), names)
    if found.configuration < 0:
        raise LookupError(f"{OP}.cuda: {found.why}")
    return found.configuration, found.splits


def predict(
    case: ChainCase, dtype: torch.dtype, about: Sequence[int], names: frozenset[str] | None
) -> tuple[float, list[float], str] | str:
    """What the kernel and the kernels that it stands for are predicted to take.

    Both by the launches' own model: cycles of one multiprocessor.

    Args:
        case: sizes, at least one pixel.
        dtype: of its activations, 16 bits.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.
        names: of the configurations that may be used; None for all.

    Returns:
        Cycles of the kernel and of conv_bn_act for each of `case.parts`, and its configuration;
        or why none takes it.
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
    options = (case.projection_stride, case.out_stride, False)
    made = problem_of(given, image(*case.stored_shape), following, options, real=False)
    found = _cuda_plan.choose(made, about, names)
    if found.configuration < 0:
        return found.why
    parts = [_part(part, dtype, about) for part in case.parts]
    return found.cycles, parts, found.name


def _image(dtype: torch.dtype, *shape: int) -> Tensor:
    last = torch.channels_last
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=last)


def _part(case: ConvCase, dtype: torch.dtype, about: Sequence[int]) -> float:
    """Cycles of one convolution by the launch of conv_bn_act."""
    image = functools.partial(_image, dtype)
    out = image(*case.output_shape)
    operands = image(*case.input_shape), image(*case.weight_shape), out if case.residual else None
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    made = _cuda_plan.problem_of("conv_bn_act", operands, geometry, out, real=False)
    return _cuda_plan.plan(made, about).cycles


def supports(call: backends.Call) -> str | None:
    """Why the kernel can't serve a call, or None."""
    from . import _cuda

    return supports_dtype(call.dtype) or _cuda.supports(call)
