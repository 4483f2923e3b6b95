"""`conv_chain_fp8` by the compiled extension: what a launch of its CUDA kernel is told.

For GPUs of capability 9.0 alone. What does not lie in channels_last is copied there, and a result
that does not is written by way of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import _cuda_chain, _results

OP = _cuda_chain.FP8
PLANNED = 2
"""Of the options those that a plan depends on: projection_stride, out_stride."""


def unfit(arguments: Sequence[Any]) -> str | None:
    """Why no configuration that may be used takes a call, or None.

    Args:
        arguments: checked, in the schema's order; x is on the GPU.
    """
    return _cuda_chain.unfit(arguments, OP, PLANNED)


def launch(
    *arguments: Any,
    wish: tuple[int, int] | None = None,
    dependent: bool = False,
    follows: bool = False,
) -> bool:
    """Runs the kernel into given results.

    Args:
        arguments: operands as of `_results.FORMS`, out, following, and the options:
            projection_stride, out_stride, residual_scale, out_scale, next_out_scale,
            front_out_scale.
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
    strides = options[:PLANNED]
    how = {"wish": wish, "dependent": dependent, "follows": follows}
    return _cuda_chain.run(OP, given, (out, following), strides, told(options), **how)


def told(options: Sequence[Any]) -> tuple[Any, ...]:
    """The options as the kernel has them: strides and factors, of which it multiplies by each.

    Args:
        options: as of `launch`.
    """
    *strides, residual, out, following, _ = options
    return *strides, residual, 1.0 / residual, 1.0 / out, 1.0 / following
