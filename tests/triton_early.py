"""Run as a child: kernels that begin before the one ahead has ended, compiled without a GPU.

    python tests/triton_early.py

prints one JSON object: what the gates say of the kernels that ship and of planted ones, and how the
kernels of a frozen ResNet-50 of one image are launched. Kernels here must not be interpreted.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import _triton_aot as aot
import _triton_cases as cases
import triton_gates

from resnet_fused import backends
from resnet_fused.freeze import _gpu, _kernels
from resnet_fused.freeze._ir import Ref
from resnet_fused.ops import _results
from resnet_fused.triton import _launch
from resnet_fused.triton._dependent import prefetch, wait

ROOT = Path(__file__).resolve().parent.parent


def planted(body: Any) -> Any:
    """A kernel under a name that the gates know, of one without matrices."""
    body.__name__ = body.__qualname__ = "mean_kernel"
    return triton.jit(body)


def right(x, out, limit, PDL: tl.constexpr):
    lane = tl.arange(0, 128)
    prefetch(out, 4096, 256)
    wait(PDL)
    tl.store(out + lane, tl.load(x + lane))


def without_wait(x, out, limit, PDL: tl.constexpr):
    lane = tl.arange(0, 128)
    tl.store(out + lane, tl.load(x + lane))


def behind_a_load(x, out, limit, PDL: tl.constexpr):
    lane = tl.arange(0, 128)
    value = tl.load(x + lane)
    wait(PDL)
    tl.store(out + lane, value)


def behind_a_store(x, out, limit, PDL: tl.constexpr):
    lane = tl.arange(0, 128)
    tl.store(out + lane, lane.to(tl.float32))
    wait(PDL)
    tl.store(out + lane + 128, tl.load(x + lane))


def in_some_programs(x, out, limit, PDL: tl.constexpr):
    lane = tl.arange(0, 128)
    if tl.program_id(0) < limit:
        wait(PDL)
    tl.store(out + lane, tl.load(x + lane))


def behind_an_end(x, out, limit, PDL: tl.constexpr):
    lane = tl.arange(0, 128)
    if tl.program_id(0) >= limit:
        return
    wait(PDL)
    tl.store(out + lane, tl.load(x + lane))


def waits_twice(x, out, limit, PDL: tl.constexpr):
    lane = tl.arange(0, 128)
    wait(PDL)
    value = tl.load(x + lane)
    wait(PDL)
    tl.store(out + lane, value)


PLANTS = (
    right, without_wait, behind_a_load, behind_a_store, in_some_programs, behind_an_end, waits_twice
)  # fmt: skip


def verdict(body: Any, capability: int = 90) -> list[str]:
    """What the gates say of a planted kernel, launched before the one ahead has ended."""
    given = torch.empty(4096, device="meta")
    kernel, name = planted(body), body.__name__
    module = sys.modules[__name__]
    early = capability >= 90
    with (
        aot.recording(aot.ARCHITECTURES[capability].limits) as launches,
        mock.patch.object(module, "mean_kernel", kernel, create=True),
    ):
        _launch.traceable(kernel, given)[(7,)](given, given, 5, PDL=early, launch_pdl=early)
        entry = cases.Recorded(launches[0].variant, [])
        try:
            return next(r.failures for r in triton_gates.compiled([entry], workers=0))
        finally:
            body.__name__ = body.__qualname__ = name


def shipped(capability: int, *names: str) -> list[dict[str, Any]]:
    """Kernels of the gates' sample, as a step of an engine launches them.

    Args:
        capability: of the GPU.
        names: of the shapes.
    """
    found = []
    chosen = [
        call
        for call in cases.calls()
        if call.form == "early" and call.sample and call.shape.name in names
    ]
    for result in triton_gates.compiled(cases.record(chosen, capability)[0], workers=0):
        variant, code = result.recorded.variant, result.code
        assert code is not None, result.error
        found.append(
            {
                "kernel": variant.kernel,
                "early": bool(variant.constant("PDL")),
                "option": variant.options["launch_pdl"],
                "prefetch": variant.constant("PREFETCH", 0),
                "reverse": bool(variant.constant("REVERSE")),
                "waits": code.dependence.waits,
                "triggers": code.dependence.triggers,
                "machine": [code.count(aot.WAITS), code.count(aot.TRIGGERS)],
                "prefetches": code.count("CCTL"),
                "failures": result.failures,
            }
        )
    return found


def _on_meta(step: Any) -> Any:
    """A step with constants that have no memory, in an H200's types."""
    tensors = {
        name: torch.empty_like(
            t, device="meta", dtype=torch.bfloat16 if name.endswith(("weight", "bias")) else None
        )
        for name, t in step.tensors.items()
    }
    return dataclasses.replace(step, tensors=tensors)


def predictions() -> Any:
    """benchmarks/predict_batch1.py as a module."""
    path = ROOT / "benchmarks" / "predict_batch1.py"
    spec = importlib.util.spec_from_file_location("predict_batch1", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["predict_batch1"] = found
    spec.loader.exec_module(found)
    return found


def engine(graph: Any, foreign: str = "", *, reverse: str = "") -> list[list[dict[str, Any]]]:
    """How a frozen network launches its kernels, the first time and then.

    Args:
        graph: after all rules.
        foreign: a step by its name that something else than Triton serves.
        reverse: a step that walks the batch backwards.
    """

    def chosen(step: Any, arguments: Any) -> backends.Choice:
        name = "reference" if step.name == foreign else "triton"
        found = backends.implementations(step.kind)
        return backends.Choice(next(one for one in found if one.name == name), "asked for")

    def made(self: Any, values: Any) -> Any:
        return _results.FORMS[self._step.kind].empty(*self._kind.arguments(self._step, values))

    steps = tuple(
        dataclasses.replace(step, options={**step.options, "reverse": True})
        if step.name == reverse
        else step
        for step in map(_on_meta, graph.steps)
    )
    graph = _gpu.laid_out(dataclasses.replace(graph, steps=steps))
    kinds = {kind: one._replace(choose=chosen) for kind, one in _kernels.KINDS.items()}
    x = torch.empty(1, 224, 224, 3, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
    with (
        mock.patch.object(_kernels, "KINDS", kinds),
        mock.patch.object(_kernels.Kernel, "__call__", made),
        mock.patch.object(_kernels, "overload", return_value=None),
        aot.recording(aot.ARCHITECTURES[90].limits) as launches,
    ):
        program = _gpu.Steps(graph, [x])
        arena = program.arena(torch.device("meta"))
        program.run_in([x], arena)
        first = len(launches)
        program.run_in([x], arena)
    said = [
        {
            "kernel": launch.variant.kernel,
            "early": bool(launch.variant.constant("PDL")),
            "option": launch.variant.options["launch_pdl"],
            "reverse": bool(launch.variant.constant("REVERSE")),
            "prefetch": bool(launch.variant.constant("PREFETCH", 0)),
            "programs": functools.reduce(int.__mul__, launch.grid),
        }
        for launch in launches
    ]
    why = [{"step": graph.steps[at].name, "why": why} for at, (_, why) in program.served.items()]
    return [said[:first], said[first:], why]


def main() -> None:
    predict = predictions()
    graph, _ = predict.graph_of(1)  # kept: tracing a network takes seconds
    rows = predict.rows()
    # Up to the third block of the second stage, whose first convolution walks backwards.
    part = dataclasses.replace(graph, steps=graph.steps[:12], output=Ref(graph.steps[11].output))
    third = graph.steps[11].name
    print(
        json.dumps(
            {
                "plants": {body.__name__: verdict(body) for body in PLANTS},
                "older": verdict(right, 80),
                "shipped": {
                    "80": shipped(80, "3x3_split"),
                    "90": shipped(90, "3x3_split", "one_image"),
                },
                "engine": engine(graph),
                "foreign": engine(part, graph.steps[6].name, reverse=third),
                "predicted": [[row.name, row.kernels, row.programs] for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()
