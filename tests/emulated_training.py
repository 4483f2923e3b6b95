"""Training's passes by the emulated CUDA kernels: one more implementation beside `emulated`'s."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import emulated
import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.ops import _library, _results

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERANDS = {
    "bn_add_act": {"y": "y", "residual": "residual"},
    "bn_add_act_backward": {"dout": "gradient", "out": "passed", "y": "y", "residual": "residual"},
    "bn_backward_apply": {"dz": "gradient", "y": "y"},
    "bn_act_pool": {"y": "y"},
    "bn_act_pool_backward": {"dout": "gradient", "y": "y"},
}
"""Op -> its activations, and what the launch calls them."""
SUMMED = ("bn_add_act_backward", "bn_act_pool_backward")
"""Ops that write sums beside an activation."""


OPTIONS = {
    "bn_add_act": ("offset", "act"),
    "bn_add_act_backward": ("act",),
    "bn_backward_apply": (),
    "bn_act_pool": ("kernel", "stride", "padding"),
    "bn_act_pool_backward": ("kernel", "stride", "padding"),
}
RESULTS = dict.fromkeys(SUMMED, ("result", "sums")) | {
    "bn_add_act": ("result",),
    "bn_backward_apply": ("result",),
    "bn_act_pool": ("result", "taps"),
}


def problem_of(op: str, given: dict[str, Any], results: dict[str, Tensor]) -> Any:
    """The launch's problem.

    Args:
        op: a key of `OPERANDS`.
        given: operands and options by their names in the schema.
        results: by the names of `RESULTS`.
    """
    images = {place: given[name] for name, place in OPERANDS[op].items()}
    images["result"] = results["result"]
    residual, sums = given.get("residual"), results.get("sums")
    norm = given["coefficients"] if op == "bn_backward_apply" else given["norm"]
    more = {}
    if "kernel" in given:
        taps = given["taps"] if op.endswith("backward") else results["taps"]
        window = [given["kernel"], given["stride"], given["padding"], taps.shape[2:]]
        more = {"window": window, "taps": (taps.data_ptr(), taps.stride())}
    return emulated.load().BnPass(
        op=op,
        dtype=emulated.TYPE_NAMES[given["y"].dtype],
        relu=given.get("act", "relu") == "relu",
        size=tuple(given["y"].shape),
        operands={
            place: (t.data_ptr(), t.stride()) for place, t in images.items() if t is not None
        },
        norm=emulated._address(norm),
        residual_norm=emulated._address(given.get("residual_norm")),
        sums=emulated._address(sums),
        rows=0 if sums is None else sums.shape[0],
        offset=given.get("offset", 0),
        held=0 if residual is None else residual.shape[1],
        **more,
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
    count, results = len(_results.FORMS[op].operands), len(RESULTS[op])
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
    options = dict(zip(OPTIONS[op], arguments[form.options :], strict=True))
    like = [t.to("meta") if isinstance(t, Tensor) else t for t in arguments]
    made = form.empty(*like)
    results = made if isinstance(made, tuple) else (made,)
    if dense:
        results = tuple(
            torch.empty(t.shape, dtype=t.dtype, device="meta", memory_format=torch.channels_last)
            if t.dim() == 4 else t
            for t in results
        )  # fmt: skip
    guarded = [emulated.Guarded(t) for t in results]
    outputs = dict(zip(RESULTS[op], (one.tensor for one in guarded), strict=True))
    problem = problem_of(op, inputs | options, outputs)
    plan = emulated.load().bn_pass_plan(problem)
    # In any state, between guard bands of its own.
    memory = emulated.Guarded(torch.empty(plan["workspace_bytes"] // 4 + 64))
    workspace = memory.tensor[-memory.tensor.data_ptr() % 256 // 4 :]
    layout = [(tuple(t.shape), t.stride()) for t in inputs.values() if t is not None]
    key = (op, *layout, results[0].dtype, *options.values())
    settings = emulated.settings(key, inputs, outputs | {"workspace": workspace})
    report = emulated.load().bn_pass(settings, op, problem, workspace.data_ptr())
    memory.result()
    emulated.reported(report | {"plan": plan})
    found = tuple(one.result() for one in guarded)
    return found if isinstance(made, tuple) else found[0]


def _register(op: str) -> None:
    """Ops of one module have schemas of their own."""
    if op != "bn_act_pool_backward":
        return emulated._register(op, functools.partial(run, op))
    schema = importlib.import_module("resnet_fused.ops.bn_act_pool").BACKWARD_SCHEMA
    body, empty = functools.partial(run, op), _results.FORMS[op].empty
    _library.define(f"{op}.{emulated.NAME}", schema, body, empty)
    about = "the CUDA kernel on the CPU"
    reason = "the emulator serves the tests alone"
    backends.register(
        backends.Implementation(op, emulated.NAME, (), about, lambda call: reason, "fused")
    )


for _op in OPERANDS:
    emulated.DTYPES[_op] = DTYPES
    _register(_op)
