"""`calibrate_fp8`: runs a network on images and keeps how large its activations are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import unfuse
from . import _calls, _freeze, _gpu, _kernels, _rules, _trace
from ._fp8 import Fp8Calibration, value_names, watched
from ._ir import Graph


def calibrate_fp8(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    percentile: float = 100.0,
    input_norm: Tensor | None = None,
) -> Fp8Calibration:
    """Finds the scales with which `rf.freeze(model, x, fp8=...)` stores activations in e4m3.

    The model runs on the images, its layers fused and in its own dtype, and of each value that a
    layer reads or writes the largest magnitude is kept: it becomes 448. A percentile below 100
    lets a few outliers saturate and gives all other values finer steps near zero; e4m3 is a
    floating-point format, so that this rarely pays.

    Args:
        model: in evaluation mode, plain or fused, in float32, bfloat16 or float16.
        images: [N, C, H, W] of its dtype and device, or several such batches, one after the other:
            some dozens to hundreds of images like those to come.
        percentile: of a batch's magnitudes, above 0, at most 100; of several batches the largest
            counts.
        input_norm: as for `rf.freeze`; images may be uint8 then.

    Returns:
        The calibration, which `save` writes as JSON.

    Raises:
        TypeError: model is no module, or images hold something else than tensors.
        ValueError: there are no images; they don't go with the model or with each other; the model
            is in training mode, or torch.fx cannot follow it; a value is NaN or infinite;
            percentile is out of range.
    """
    if not 0.0 < percentile <= 100.0:
        raise ValueError(
            f"calibrate_fp8: percentile is {percentile!r}; accepted is above 0, at most 100"
        )
    graph: Graph | None = None
    found: dict[int, float] = {}
    wide: dict[str, str] = {}
    count = 0
    for batch in _batches(images):
        _check(model, batch, input_norm)
        place = _rules.Place(batch.device, _freeze._dtype_of(model, batch, input_norm))
        with torch.no_grad(), torch.autocast(place.device.type, enabled=False):
            x = batch
            if input_norm is not None:
                x = _calls.run(_freeze._images(input_norm, batch, place), (batch,))
            graph = graph or _traced(model, x, place)
            for value, largest in _run(graph, x, percentile, wide):
                found[value] = max(found.get(value, 0.0), largest)
        count += len(batch)
    if graph is None:
        raise ValueError("calibrate_fp8: images is empty; give at least one image")
    names = value_names(graph)
    return Fp8Calibration(
        {names[value]: found[value] for value in watched(graph)}, count, float(percentile), wide
    )


def _batches(images: Any) -> Iterator[Tensor]:
    if not isinstance(images, Tensor | Iterable):
        raise TypeError(
            "calibrate_fp8: images must be a tensor or batches of them, got "
            f"{type(images).__name__}"
        )
    first = None
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"calibrate_fp8: images hold a {type(batch).__name__}; accepted are tensors"
            )
        if batch.dim() != 4:
            raise ValueError(
                f"calibrate_fp8: images have shape {tuple(batch.shape)}; accepted is [N, C, H, W]"
            )
        first = batch if first is None else first
        mine, others = ((t.dtype, t.device, t.shape[1]) for t in (batch, first))
        if mine != others:
            raise ValueError(
                f"calibrate_fp8: a batch of images is {batch.dtype} on {batch.device} with "
                f"{batch.shape[1]} channels, the first {first.dtype} on {first.device} with "
                f"{first.shape[1]}; all must agree"
            )
        if batch.numel():
            yield batch


def _check(model: Any, batch: Tensor, input_norm: Tensor | None) -> None:
    """What `freeze` asks of a model and an example, in words about images."""
    try:
        _freeze._checked(model, batch, input_norm, 1)
    except (TypeError, ValueError) as error:
        said = str(error).replace("example has", "images have").replace("example is", "images are")
        raise type(error)(
            said.replace("freeze:", "calibrate_fp8:").replace("the example", "the images")
        ) from None
    if batch.dtype is torch.float64:
        raise ValueError(
            "calibrate_fp8: images have dtype torch.float64; accepted are float32, bfloat16, "
            "float16"
        )


def _traced(model: nn.Module, x: Tensor, place: _rules.Place) -> Graph:
    plain = unfuse(model)
    try:
        graph = _freeze._checked_trace(plain, _trace.trace(plain, 1), (x,))
    except _trace.NotTakenError as error:
        raise ValueError(
            f"calibrate_fp8: {type(model).__name__} can't be frozen but as its modules: {error}"
        ) from error
    graph = _rules.apply(_rules.PLAIN, graph, place)[0]
    if not watched(graph):
        raise ValueError(
            f"calibrate_fp8: {type(model).__name__} has no convolution with a BatchNorm alone "
            "behind it: nothing of it can run in e4m3"
        )
    return graph


def _run(
    graph: Graph, x: Tensor, percentile: float, wide: dict[str, str]
) -> Iterator[tuple[int, float]]:
    """Runs a graph, and gives the size of each value that counts; fills in what must stay wide."""
    names, wanted = value_names(graph), frozenset(watched(graph))
    last = graph.last_use()
    values: dict[int, Any] = dict(zip(graph.inputs, (x,), strict=True))
    for value in wanted & values.keys():
        yield value, _largest(values[value], percentile, "an image")
    for at, step in enumerate(graph.steps):
        given = [values[value] for value in step.inputs]
        if step.kind not in _kernels.KINDS:
            made = _calls.run(step, given)
        elif _gpu._broadcasts(step, given):
            made = _gpu._apart(step, given)
            wide[names[step.output]] = "its shortcut is broadcast: added apart"
        else:
            made = _kernels.Kernel(step, given)(given)
        values[step.output] = made
        if step.output in wanted:
            yield step.output, _largest(made, percentile, f"what {names[step.output]} gives")
        for value in (*step.inputs, *step.outputs):
            if last[value] == at:
                values.pop(value, None)


def _largest(t: Tensor, percentile: float, what: str) -> float:
    size = t.detach().abs().float().flatten()
    place = max(1, round(percentile / 100.0 * size.numel()))
    largest = float(size.max() if place >= size.numel() else size.kthvalue(place).values)
    # max() and kthvalue() put NaN last: a percentile would not see a few of them.
    if not bool(torch.isfinite(size).all()):
        raise ValueError(f"calibrate_fp8: {what} holds NaN or Inf; accepted are finite values")
    return largest
