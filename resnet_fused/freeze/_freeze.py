"""From a model to an engine: tracing, checking the trace, rewriting, freezing the values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..convert import fuse, unfuse
from . import _calls, _rules, _trace
from ._ir import Const, Graph, Ref, Step, fill
from .engine import Engine

logger = logging.getLogger("resnet_fused")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def freeze(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], *, max_shapes: int = 8
) -> Engine:
    """Makes an inference engine of a model.

    The engine holds copies of the model's values as they are now: later changes of the model do not
    reach it. It serves any batch and image size; each shape that comes again gets weights packed
    for it, on a GPU a CUDA graph. What could not be traced or fused runs as the model's own modules
    do, and `engine.report()` names it.

    Args:
        model: in evaluation mode, plain or fused, on one device, in one floating-point dtype.
        example: an input [N, C, H, W] of that dtype and device, or a tuple of the positional
            arguments. Its shape is prepared at once.
        max_shapes: how many input shapes are kept prepared, the last used ones.

    Returns:
        The engine, an `nn.Module` without parameters: `engine(x)` gives what `model(x)` gives.

    Raises:
        TypeError: model is no module, or example holds something else than tensors.
        ValueError: the model is in training mode; its dtype or device is not the example's;
            max_shapes is below 1.
    """
    args = _checked(model, example, max_shapes)
    plain = unfuse(model)
    place = _rules.Place(args[0].device, args[0].dtype)
    notes: list[_rules.Note] = []
    with torch.no_grad(), torch.autocast(place.device.type, enabled=False):
        try:
            graph = _trace.trace(plain, len(args))
            _check_trace(plain, graph, args)
            graph, notes = _rules.apply(_rules.PLAIN, graph, place)
        except _trace.NotTakenError as error:
            logger.warning("freeze: %s runs as its modules do: %s", type(model).__name__, error)
            notes = [_rules.Note("trace", type(model).__name__, False, str(error))]
            graph = _whole(plain, len(args), str(error))
        graph = replace(graph, steps=tuple(_frozen(step) for step in graph.steps))
        return Engine(graph, notes, args, max_shapes, name=type(plain).__name__)


def _checked(model: Any, example: Any, max_shapes: Any) -> tuple[Tensor, ...]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, Engine):
        raise TypeError("freeze: model is an engine already; accepted is the model it was made of")
    args = example if isinstance(example, tuple) else (example,)
    for arg in args:
        if not isinstance(arg, Tensor):
            raise TypeError(
                f"freeze: example holds a {type(arg).__name__}; accepted are tensors, the model's "
                "positional arguments"
            )
    if not args:
        raise TypeError("freeze: example is an empty tuple; accepted is at least one tensor")
    if isinstance(max_shapes, bool) or not isinstance(max_shapes, int) or max_shapes < 1:
        raise ValueError(f"freeze: max_shapes is {max_shapes!r}; accepted is an int of at least 1")
    live = [name or "the model" for name, module in model.named_modules() if module.training]
    if live:
        more = f" and {len(live) - 1} modules more" if len(live) > 1 else ""
        raise ValueError(
            f"freeze: {live[0]}{more} in training mode; accepted is a model in evaluation mode: "
            "model.eval()"
        )
    x = args[0]
    if x.dtype not in _DTYPES:
        accepted = ", ".join(str(dtype) for dtype in _DTYPES)
        raise ValueError(f"freeze: example has dtype {x.dtype}; accepted are {accepted}")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.device != x.device:
            raise ValueError(
                f"freeze: example is on {x.device} and the model's {name} on {tensor.device}; "
                "accepted is one device"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != x.dtype:
            raise ValueError(
                f"freeze: example has dtype {x.dtype} and the model's {name} {parameter.dtype}; "
                "accepted is one dtype: cast the model or the example"
            )
    return args


def _check_trace(plain: nn.Module, graph: Graph, args: Sequence[Tensor]) -> None:
    """A trace must give what the model gives: Python code that ran while tracing may not."""
    expected = plain(*(arg.clone() for arg in args))
    found = _run(graph, [arg.clone() for arg in args])
    left, shape = _pytree.tree_flatten(expected)
    right, other = _pytree.tree_flatten(found)
    if shape != other:
        raise _trace.NotTakenError(f"its trace gives {other}, the model {shape}")
    for a, b in zip(left, right, strict=True):
        if not _same(a, b):
            raise _trace.NotTakenError("its trace gives another result than the model")


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # The same calls in the same order; a GPU's may sum in another order each time.
    loose = 0.0 if a.device.type == "cpu" else 1e-2
    scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=loose, atol=loose * scale, equal_nan=True)


def _run(graph: Graph, args: Sequence[Any]) -> Any:
    """A graph by PyTorch's own ops, the model's own modules among them."""
    values = dict(zip(graph.inputs, args, strict=True))
    for step in graph.steps:
        values[step.output] = _calls.run(step, [values[value] for value in step.inputs])

    def put(part: Ref | Const) -> Any:
        assert isinstance(part, Ref)
        return values[part.value]

    return fill(graph.output, put)


def _whole(plain: nn.Module, count: int, why: str) -> Graph:
    """The model as one step."""
    inputs = tuple(range(count))
    step = Step("module", "", inputs, (count,), why=why, module=plain, options={"guard": False})
    return Graph((step,), inputs, Ref(count))


def _frozen(step: Step) -> Step:
    """A step with copies of what it still shares with the model."""
    if step.module is None:
        return step
    made = _rules.frozen_tensors(step)
    if made is not None:
        return made
    module = copy.deepcopy(fuse(step.module)).requires_grad_(False)
    why = step.why or f"a {type(step.module).__name__} is called as it is"
    return replace(step, kind="module", module=module, why=why)
