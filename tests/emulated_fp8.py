"""Ops on e4m3 operands by the emulated CUDA kernels: more implementations beside `emulated`'s."""

from __future__ import annotations

from typing import Any

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _cuda_chain, _cuda_chain_fp8, _cuda_fp8, _results

OP, CHAIN = _cuda_fp8.OP, _cuda_chain_fp8.OP
FACTORS = ("residual_factor", "projection_factor", "out_factor", "next_factor")
"""Of a chain."""
E4M3 = torch.float8_e4m3fn
OUTS = (E4M3, torch.bfloat16, torch.float16)
"""Dtypes of a result that the kernel writes."""


def takes(case: Any, out: torch.dtype, residual: torch.dtype | None = None) -> bool:
    """Whether the CUDA kernel of `conv_bn_act_fp8` serves a case: TMA moves 16 bytes of channels.

    Args:
        case: sizes and options.
        out: dtype of the result.
        residual: dtype of the shortcut, if there is one.
    """
    if out not in OUTS or residual not in (None, E4M3):
        return False
    whole = case.c % 16 == 0 and case.k % (16 // out.itemsize * case.groups) == 0
    whole = whole and (residual is None or case.k % 16 == 0)
    grouped = case.groups == 1 or (case.c // case.groups) % 128 == 0
    return (whole and grouped) or 0 in case.output_shape


def conv_bn_act_fp8(*arguments: Any) -> Tensor:
    """The op, by the emulated kernel, copied to channels_last and back as a launch does."""
    x, weight, scale, shift, residual, *geometry, act, residual_scale, out_scale, _ = arguments
    result = _results.FORMS[OP].empty(*arguments)
    made = _cuda_fp8.problem_of((x, weight, residual), geometry, result)
    x, weight, residual = made.operands
    like = torch.empty_strided(made.out.shape, made.out.stride(), dtype=result.dtype, device="meta")
    guarded = emulated.Guarded(like)
    inputs = {"x": x, "weight": weight, "scale": scale, "shift": shift, "residual": residual}
    layout = [emulated._strides(t) for t in (*made.operands, like)]
    key = (OP, tuple(x.shape), tuple(weight.shape), *geometry, act, *layout)
    key = (*key, result.dtype, x.data_ptr() % 16)
    reverse = emulated._run.reverse
    problem = problem_of(
        *inputs.values(), guarded.tensor, *geometry, act, residual_scale, out_scale,
        reverse=emulated.drawn("flow", *key) % 2 == 1 if reverse is None else reverse,
    )  # fmt: skip
    got = emulated._run_planned(OP, problem, key, inputs, {"out": guarded})[0]
    return result.copy_(got)


def problem_of(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *options: Any,
    reverse: bool = False,
) -> Any:
    """The launch's problem; options as of the op, up to out_scale."""
    *geometry, act, residual_scale, out_scale = options
    images = {"x": x, "weight": weight, "residual": residual, "out": out}
    conv = emulated.load().ConvBnAct(
        dtype="bfloat16",
        relu=act == "relu",
        allow_tf32=False,
        x_size=x.shape,
        weight_size=weight.shape,
        **dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True)),
        **{f"{name}_stride": emulated._strides(t) for name, t in images.items()},
        **{name: emulated._address(t) for name, t in images.items()},
        scale=emulated._address(scale),
        shift=emulated._address(shift),
        reverse=reverse,
        arrivals=0,
        arrivals_count=0,
        **emulated._flow(),
    )
    return emulated.load().ConvBnActFp8(
        conv=conv,
        residual_dtype=emulated.TYPE_NAMES[(x if residual is None else residual).dtype],
        out_dtype=emulated.TYPE_NAMES[out.dtype],
        residual_factor=residual_scale,
        out_factor=1.0 / out_scale,
    )


def conv_chain_fp8(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op, by the emulated kernel, copied to channels_last and back as a launch does."""
    form = _results.FORMS[CHAIN]
    given = dict(zip(form.operands, arguments, strict=False))
    options = arguments[form.options :]
    strides = options[: _cuda_chain_fp8.PLANNED]
    results = form.empty(*arguments)
    last = [
        torch.empty(t.shape, dtype=t.dtype, device="meta", memory_format=torch.channels_last)
        for t in results
    ]
    made = _cuda_chain.problem_of(given, *last, strides, op=CHAIN)
    names = ("out", "following")
    guarded = {name: emulated.Guarded(t) for name, t in zip(names, last, strict=True)}
    inputs = given | dict(zip(_cuda_chain.OPERANDS, made.operands, strict=False))
    tensors = inputs | {name: one.tensor for name, one in guarded.items()}
    problem = chain_problem(tensors, options)
    layout = [t.stride() for t in tensors.values() if t is not None and t.dim() == 4]
    key = (CHAIN, *layout, *(tuple(t.shape) for t in results), options)
    written = emulated._run_planned(CHAIN, problem, key, inputs, guarded)
    out, following = (t.copy_(one) for t, one in zip(results, written, strict=True))
    return out, following


def chain_problem(tensors: dict[str, Tensor | None], options: Any, **changes: Any) -> Any:
    """The launch's problem; options as of the op."""
    strides = options[: _cuda_chain_fp8.PLANNED]
    reverse = bool(emulated._run.reverse)
    chain = emulated.chain_problem(tensors, (*strides, reverse), **{"dtype": "bfloat16", **changes})
    factors = _cuda_chain_fp8.told(options)[len(strides) :]
    return emulated.load().ConvChainFp8(chain=chain, **dict(zip(FACTORS, factors, strict=True)))


emulated.DTYPES[OP] = emulated.DTYPES[CHAIN] = (E4M3,)
emulated.TYPE_NAMES[E4M3] = "float8_e4m3fn"
emulated._register(OP, conv_bn_act_fp8)
emulated._register(CHAIN, conv_chain_fp8)
