"""From a model to an engine: tracing, checking the trace, rewriting, freezing the values."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..convert import fuse, unfuse
from . import _calls, _fp8, _rules, _trace
from ._ir import Const, Graph, Ref, Step, fill
from .engine import Engine

logger = logging.getLogger("resnet_fused")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def freeze(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    input_norm: Tensor | None = None,
    max_shapes: int = 8,
    fp8: _fp8.Fp8Calibration | None = None,
) -> Engine:
    """Makes an inference engine of a model.

    The engine holds copies of the model's values as they are now: later changes of the model do not
    reach it. It serves any batch and image size; each shape that comes again gets weights packed
    for it, on a GPU a CUDA graph. What could not be traced or fused runs as the model's own modules
    do, and `engine.report()` names it.

    Args:
        model: in evaluation mode, plain or fused, on one device, in one floating-point dtype.
        example: an input [N, C, H, W] of that dtype and device, or a tuple of the positional
            arguments. Its shape is prepared at once. With `input_norm` it may be uint8 or float32
            whatever the model's dtype is, and so are the engine's inputs then.
        input_norm: [2, C] float32, a factor and a summand a channel that make the model's input of
            the engine's: `rf.ops.stem_input_norm(mean, std)` for images of bytes.
        max_shapes: how many input shapes are kept prepared, the last used ones.
        fp8: what `calibrate_fp8` found: the layers then run in e4m3, but for the first convolution
            and the classifier, with float32 sums and epilogues. The results are other ones, as
            good as the calibration and the network allow: docs/fp8.md.

    Returns:
        The engine, an `nn.Module` without parameters: `engine(x)` gives what `model(x)` gives.

    Raises:
        TypeError: model is no module, or example holds something else than tensors.
        ValueError: the model is in training mode; its dtype or device is not the example's;
            input_norm has another shape; max_shapes is below 1; fp8 is of another model, or
            torch.fx cannot follow this one.
    """
    given = args = _checked(model, example, input_norm, max_shapes)
    plain = unfuse(model)
    place = _rules.Place(args[0].device, _dtype_of(model, args[0], input_norm))
    if fp8 is not None:
        _fp8.check(fp8, place.dtype)
    images = None if input_norm is None else _images(input_norm, args[0], place)
    notes: list[_rules.Note] = []
    with torch.no_grad(), torch.autocast(place.device.type, enabled=False):
        if images is not None:
            args = (_calls.run(images, args),)
        try:
            graph = _trace.trace(plain, len(args))
            graph = _checked_trace(plain, graph, args)
            graph, notes = _rules.apply(_rules.PLAIN, graph, place)
            if fp8 is not None:
                graph, more = _fp8.quantised(graph, fp8, place)
                notes = [*notes, *more]
        except _trace.NotTakenError as error:
            if fp8 is not None:
                raise ValueError(
                    f"freeze: fp8: {type(model).__name__} runs as its modules do: {error}"
                ) from error
            logger.warning("freeze: %s runs as its modules do: %s", type(model).__name__, error)
            notes = [_rules.Note("trace", type(model).__name__, False, str(error))]
            graph = _whole(plain, len(args), str(error))
        graph = replace(graph, steps=tuple(_frozen(step) for step in graph.steps))
        if images is not None:
            graph = _behind(images, graph)
        return Engine(graph, notes, given, max_shapes, place.dtype, type(plain).__name__)


def _checked(model: Any, example: Any, input_norm: Any, max_shapes: Any) -> tuple[Tensor, ...]:
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
    if input_norm is not None:
        _check_input_norm(input_norm, args)
    _check_dtypes(model, args[0], input_norm)
    return args


def _check_input_norm(input_norm: Any, args: Sequence[Tensor]) -> None:
    if not isinstance(input_norm, Tensor):
        raise TypeError(f"freeze: input_norm must be a tensor, got {type(input_norm).__name__}")
    if len(args) != 1 or args[0].dim() != 4:
        raise ValueError("freeze: input_norm goes with one example [N, C, H, W]")
    wanted = (2, args[0].shape[1])
    if tuple(input_norm.shape) != wanted or input_norm.dtype != torch.float32:
        raise ValueError(
            f"freeze: input_norm has shape {tuple(input_norm.shape)} of {input_norm.dtype}; "
            f"accepted is {wanted} of torch.float32, for the channels of the example"
        )


def _dtype_of(model: nn.Module, x: Tensor, input_norm: Tensor | None) -> torch.dtype:
    """The dtype of the activations."""
    if input_norm is None:
        return x.dtype
    found = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(found, torch.float32)


def _check_dtypes(model: nn.Module, x: Tensor, input_norm: Tensor | None) -> None:
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"freeze: example is on {x.device}; accepted are cpu and cuda")
    wanted = _dtype_of(model, x, input_norm)
    accepted = _DTYPES if input_norm is None else (torch.uint8, torch.float32, wanted)
    if x.dtype not in accepted:
        names = ", ".join(str(dtype) for dtype in dict.fromkeys(accepted))
        hint = "" if input_norm is not None else " (uint8 with input_norm)"
        raise ValueError(f"freeze: example has dtype {x.dtype}; accepted are {names}{hint}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device != x.device:
            raise ValueError(
                f"freeze: example is on {x.device} and the model's {name} on {tensor.device}; "
                "accepted is one device"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != wanted:
            raise ValueError(
                f"freeze: example has dtype {wanted} and the model's {name} {parameter.dtype}; "
                "accepted is one dtype: cast the model or the example"
            )


def _images(input_norm: Tensor, x: Tensor, place: _rules.Place) -> Step:
    """The step that makes the model's input of images."""
    tensors = {"input_norm": input_norm.detach().to(x.device, copy=True)}
    why = "factor and summand of each channel, by PyTorch"
    return Step("images", "input", (0,), (1,), tensors, {"dtype": place.dtype}, why)


def _behind(first: Step, graph: Graph) -> Graph:
    """A graph of one input with a step in front of it."""
    value = 1 + max([*graph.inputs, *graph.makers()])
    step = replace(first, inputs=(value,), outputs=graph.inputs)
    return Graph((step, *graph.steps), (value,), graph.output)


def _checked_trace(plain: nn.Module, graph: Graph, args: Sequence[Tensor]) -> Graph:
    """A trace must give what the model gives: Python code that ran while tracing may not.

    Returns:
        The graph, its output in the model's containers: fx makes plain dicts of ordered ones.
    """
    expected = plain(*(arg.clone() for arg in args))
    graph = replace(graph, output=_in_containers(graph.output, expected))
    found = _run(graph, [arg.clone() for arg in args])
    left, shape = _pytree.tree_flatten(expected)
    right, other = _pytree.tree_flatten(found)
    if shape != other:
        raise _trace.NotTakenError(f"its trace gives {other}, the model {shape}")
    for a, b in zip(left, right, strict=True):
        if not _same(a, b):
            raise _trace.NotTakenError("its trace gives another result than the model")
    return graph


def _in_containers(output: Any, expected: Any) -> Any:
    if isinstance(output, dict) and type(expected) in (dict, OrderedDict):
        if list(output) == list(expected):
            return type(expected)(
                (name, _in_containers(part, expected[name])) for name, part in output.items()
            )
    elif type(output) in (list, tuple) and type(output) is type(expected):
        pairs = zip(output, expected, strict=False)
        inside = type(output)(_in_containers(*pair) for pair in pairs)
        return inside if len(output) == len(expected) else output
    return output


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # The same calls in the same order, which may sum in another order each time: what is looked for
    # is a trace that computes something else.
    loose = 1e-3 if a.dtype.itemsize > 2 and a.device.type == "cpu" else 2e-2
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
    source = fuse(step.module) if next(step.module.children(), None) else step.module
    module = copy.deepcopy(source).requires_grad_(False)
    why = step.why or f"a {type(step.module).__name__} is called as it is"
    return replace(step, kind="module", module=module, why=why)
