"""Training's passes by the emulated CUDA kernels: one more implementation beside `emulated`'s."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import emulated
import torch
from torch import Tensor

from resnet_fused.ops import _results

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERANDS = {
    "bn_add_act": {"y": "y", "residual": "residual"},
    "bn_add_act_backward": {"dout": "gradient", "out": "passed", "y": "y", "residual": "residual"},
    "bn_backward_apply": {"dz": "gradient", "y": "y"},
}
"""Op -> its activations, and what the launch calls them."""
SUMMED = ("bn_add_act_backward",)
"""Ops that write sums beside an activation."""


def problem_of(
    op: str,
    given: dict[str, Tensor | None],
    result: Tensor,
    sums: Tensor | None = None,
    offset: int = 0,
    act: str = "relu",
) -> Any:
    """The launch's problem.

    Args:
        op: a key of `OPERANDS`.
        given: operands by their names in the schema.
        result: what an activation is written to.
        sums: [2 or 3, K] that is written beside it.
        offset: the channel that the shortcut's first one is added to.
        act: "relu" or "none".
    """
    images = {place: given[name] for name, place in OPERANDS[op].items()} | {"result": result}
    residual = given.get("residual")
    norm = given["coefficients"] if op == "bn_backward_apply" else given["norm"]
    return emulated.load().BnPass(
        op=op,
        dtype=emulated.TYPE_NAMES[result.dtype],
        relu=act == "relu",
        size=tuple(result.shape),
        operands={
            place: (t.data_ptr(), t.stride()) for place, t in images.items() if t is not None
        },
        norm=emulated._address(norm),
        residual_norm=emulated._address(given.get("residual_norm")),
        sums=emulated._address(sums),
        rows=0 if sums is None else sums.shape[0],
        offset=offset,
        held=0 if residual is None else residual.shape[1],
    )


class Launched(NamedTuple):
    """A launch's arguments, taken apart."""

    arguments: tuple[Any, ...]  # in the order of the op's schema
    results: tuple[Tensor, ...]


def results_of(op: str, given: tuple[Any, ...]) -> Launched:
    """The arguments of a launch: operands, results, options.

    Args:
        op: a key of `OPERANDS`.
        given: as `_results.body` calls a launch.
    """
    count = len(_results.FORMS[op].operands)
    results = 2 if op in SUMMED else 1
    return Launched(given[:count] + given[count + results :], given[count : count + results])


def run(op: str, *arguments: Any, dense: bool = False) -> Any:
    """An op of `OPERANDS`, by the emulated kernel, in the order of its schema.

    Args:
        op: its name.
        arguments: of its schema.
        dense: results in channels_last memory, wherever the operands lie.
    """
    form = _results.FORMS[op]
    inputs = {name: arguments[place] for name, place in form.operands.items()}
    like = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    made = form.empty(*like)
    results = made if isinstance(made, tuple) else (made,)
    if dense:
        form_of = {"memory_format": torch.channels_last}
        first = torch.empty(results[0].shape, dtype=results[0].dtype, device="meta", **form_of)
        results = (first, *results[1:])
    guarded = [emulated.Guarded(t) for t in results]
    tensors = [one.tensor for one in guarded]
    options = dict(zip(("act",) if len(tensors) > 1 else ("offset", "act"),
                       arguments[form.options :], strict=False))  # fmt: skip
    problem = problem_of(op, inputs, *tensors, **options)
    plan = emulated.load().bn_pass_plan(problem)
    # In any state, between guard bands of its own.
    memory = emulated.Guarded(torch.empty(plan["workspace_bytes"] // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :]
    outputs = dict(zip(("result", "sums"), tensors, strict=False)) | {"workspace": workspace}
    layout = [(tuple(t.shape), t.stride()) for t in inputs.values() if t is not None]
    key = (op, *layout, results[0].dtype, *arguments[form.options :])
    settings = emulated.settings(key, inputs, outputs)
    report = emulated.load().bn_pass(settings, op, problem, workspace.data_ptr())
    memory.result()
    emulated.reported(report | {"plan": plan})
    found = tuple(one.result() for one in guarded)
    return found if isinstance(made, tuple) else found[0]


for _op in OPERANDS:
    emulated.DTYPES[_op] = DTYPES
    emulated._register(_op, functools.partial(run, _op))
