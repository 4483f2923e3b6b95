"""cuDNN's graph API through nvidia-cudnn-frontend: fused graphs of convolution and BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers import _cudnn_patterns as patterns
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_capability,
    for_device,
    for_dtypes,
    for_ops,
    installed,
)

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work


class CudnnGraph:
    """The graphs of `_cudnn_patterns`, each as the first plan that cuDNN's heuristics build."""

    name = "cudnn_graph"
    isolated = True  # a plan may end in a fault of the driver
    limit_s = 180.0

    def why_not(self, subject: Subject) -> str | None:
        """Kernels in 16 bits, from Ampere on."""
        return first_reason(
            for_device(subject, "cuda"),
            for_ops(subject, {"kernel": patterns.OPS}),
            installed("cudnn", "nvidia-cudnn-frontend"),
            for_dtypes(subject, ("float16", "bfloat16")),
            for_capability(subject, 8),
        )

    def prepare(self, work: Work) -> Prepared:
        """Builds the graphs: fused if an engine takes them, else one after the other.

        Raises:
            NoPeerError: no engine takes any of them.
        """
        import cudnn

        refused = []
        for way in patterns.ways(work.subject.op, work.case, work.subject.torch_dtype):
            try:
                return _prepared(cudnn, way, work)
            except Exception as error:  # the frontend's errors share no base class
                refused.append(first_line(error))
        raise NoPeerError(f"cuDNN refuses the graph: {'; '.join(refused)}")


def _prepared(cudnn: Any, way: patterns.Way, work: Work) -> Prepared:
    handle = cudnn.create_handle()
    plans = [_Plan(cudnn, graph, work, handle) for graph in way]
    runs = []
    for operands in work.sets:
        given, steps = patterns.bound(work.subject.op, operands), []
        for plan in plans:
            step = plan.bind(given)
            steps.append(step)
            # A later graph reads what an earlier one wrote.
            given = {**given, "g": step.outputs[0]}
        runs.append(_in_turn(cudnn, handle, steps))
    call = _calls.over_variants(work, runs)
    call(0)

    def kernels() -> list[str]:
        return [*(plan.name for plan in plans), *_kernels.traced(call, work.subject.device)]

    return Prepared(call, kernels, lambda: cudnn.destroy_handle(handle))


def _in_turn(cudnn: Any, handle: Any, steps: list[_Step]) -> Callable[[Any], Tensor]:
    def run(_operands: Any) -> Tensor:
        # The sampler captures on a stream of its own.
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        for step in steps:
            step()
        return steps[-1].outputs[0]

    return run


class _Plan:
    """One graph, built."""

    def __init__(self, cudnn: Any, how: patterns.Graph, work: Work, handle: Any) -> None:
        draft = patterns.Draft(cudnn, work.subject.torch_dtype, how.narrow, handle=handle)
        how.pattern(draft, work.case)
        graph = draft.graph
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.draft, self.graph, self.handle = draft, graph, handle
        self.device = torch.device(work.subject.device)
        size = max(1, graph.get_workspace_size())
        self.workspace = torch.empty(size, device=self.device, dtype=torch.uint8)
        self.name = f"{how.pattern.__name__}: {graph.get_plan_name_at_index(0)}"

    def bind(self, given: dict[str, Tensor]) -> _Step:
        """Binds operands by their names, and outputs that the step owns."""
        pack, outputs = {}, []
        for name, slot in self.draft.inputs.items():
            pack[slot.handle] = fitted(given[name], slot)
        for slot in self.draft.outputs:
            made = torch.empty(slot.shape, dtype=slot.dtype, device=self.device)
            outputs.append(made.contiguous(memory_format=torch.channels_last))
            pack[slot.handle] = outputs[-1]
        return _Step(self, pack, outputs)


class _Step:
    """A plan with its tensors."""

    def __init__(self, plan: _Plan, pack: dict[Any, Tensor], outputs: list[Tensor]) -> None:
        self.plan, self.pack, self.outputs = plan, pack, outputs

    def __call__(self) -> None:
        self.plan.graph.execute(self.pack, self.plan.workspace, handle=self.plan.handle)


def fitted(t: Tensor, slot: patterns.Slot) -> Tensor:
    """A tensor as a slot wants it: a channel's values as [1, C, 1, 1], channels_last.

    An activation that fits is bound as it is, without a copy.
    """
    shaped = t.reshape(slot.shape) if t.dim() == 1 else t
    return shaped.to(slot.dtype).contiguous(memory_format=torch.channels_last)
