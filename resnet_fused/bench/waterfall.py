"""Where a training step's time goes, by kind of kernel: measured, and the least by the roofline.

A profile is a forest of operators, with the kernels that each launched on a GPU. The outermost one
whose name is known takes all that is below it, so that a fused op's own copies are its own. On a
GPU the kernels' time counts, on the CPU that of the operators; what a step takes beyond their sum
are gaps: launches, Python, waiting.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from resnet_fused.bench.ceilings import Ceilings
from resnet_fused.bench.nodes import by_triton, nodes
from resnet_fused.bench.work import Work
from resnet_fused.roofline import Cost, model_cost
from resnet_fused.triton import _limits

FORWARD, DGRAD, WGRAD = "convolution", "dgrad", "wgrad"
BOTH = "dgrad and wgrad"
"""Of an op that makes both: one of ours for 1x1, PyTorch's on the CPU for all."""
NORM, POOL, HEAD = "BatchNorm, ReLU, add", "pooling", "classifier and loss"
OPTIMIZER, COMPILED, OTHER, GAPS = "optimizer", "compiled by Inductor", "copies and others", "gaps"
GROUPS = (
    FORWARD, NORM, POOL, HEAD, DGRAD, WGRAD, BOTH, COMPILED, OTHER, OPTIMIZER, GAPS,
)  # fmt: skip

OPS = ("training", "train")
"""Steps whose kernels are known: with batch statistics."""

# The first that is found in an operator's name decides.
_OPERATORS = tuple(
    (group, re.compile(pattern))
    for group, pattern in (
        (OPTIMIZER, r"^Optimizer\.|::_fused_(sgd|adamw?)_?$|::_amp_"),
        (BOTH, r"^resnet_fused::conv_bn_grad1x1"),
        (DGRAD, r"^resnet_fused::conv_(bn_)?dgrad"),
        (WGRAD, r"^resnet_fused::conv_(bn_)?wgrad"),
        (FORWARD, r"^resnet_fused::(conv_bn_|bn_add_act_conv_)"),
        (POOL, r"^resnet_fused::bn_act_pool|^aten::\w*(max|avg)_pool|^aten::mean$"),
        (NORM, r"^resnet_fused::bn_"),
        (COMPILED, r"^(Torch-Compiled|CompiledFunction)|Inductor|^graph_\d+"),
        (BOTH, r"^aten::(\w+_)?convolution_backward"),
        (FORWARD, r"^aten::(\w*convolution\w*|conv2d)$"),
        (NORM, r"^aten::(\w*batch_norm\w*|relu_?|threshold_backward|add_?|clamp_min_?)$"),
        (HEAD, r"^aten::(linear|addmm|mm|\w*log_softmax\w*|\w*nll_loss\w*|cross_entropy_loss)$"),
    )
)
# A kernel's own name tells the gradients of a library's convolution apart.
_KERNELS = ((DGRAD, re.compile(r"dgrad|bwd_data")), (WGRAD, re.compile(r"wgrad|bwd_filter")))


def group_of(operator: str) -> str | None:
    """The group of an operator's name, or None where it says nothing."""
    return next((group for group, name in _OPERATORS if name.search(operator)), None)


def spent(events: Iterable[Any], device: str) -> Iterator[tuple[str, float]]:
    """Shares a profile's time out among the groups.

    Args:
        events: outermost ones of torch's profiler.
        device: "cpu" or "cuda".

    Yields:
        (group, seconds), many a group. What no known operator holds is `OTHER` on a GPU; on the
        CPU it is the host's own, part of the gaps.
    """
    pending: list[tuple[Any, str | None]] = [(event, None) for event in events]
    while pending:
        event, above = pending.pop()
        group = above or group_of(event.name)
        if device == "cuda":
            for kernel in event.kernels:
                yield _of_kernel(group, kernel.name), 1e-6 * kernel.duration
        elif group is not None or event.name.startswith("aten::"):
            yield group or OTHER, 1e-6 * event.self_cpu_time_total
        pending += [(child, group) for child in event.cpu_children]


def _of_kernel(group: str | None, kernel: str) -> str:
    if group == BOTH:
        found = (own for own, name in _KERNELS if name.search(kernel))
        return next(found, BOTH)
    return group or (COMPILED if kernel.startswith("triton_") else OTHER)


def op_seconds(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Seconds of each group in one call under torch's profiler, without the gaps.

    Args:
        call: what to run, once.
        device: "cpu" or "cuda".
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as taken:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    host = torch.autograd.DeviceType.CPU
    outermost = [
        event
        for event in taken.events() or ()
        if event.cpu_parent is None and event.device_type == host
    ]
    found: dict[str, float] = {}
    for group, seconds in spent(outermost, device):
        found[group] = found.get(group, 0.0) + seconds
    return {group: found[group] for group in GROUPS if found.get(group)}


def with_gaps(found: dict[str, float], median: float) -> dict[str, float]:
    """The groups, and what a step takes beyond their sum."""
    return {**found, GAPS: max(0.0, median - sum(found.values()))}


_OPS = {
    "conv_bn_stats": FORWARD,
    "conv_bn_stats_finalize": FORWARD,
    "conv_bn_dgrad": DGRAD,
    "conv_bn_dgrad_end": DGRAD,
    "conv_bn_wgrad": WGRAD,
    "conv_bn_grad1x1": BOTH,
    "conv_bn_grad1x1_end": BOTH,
    "bn_act_pool": POOL,
    "bn_act_pool_backward": POOL,
}
"""Of a node's kernels; the others are BatchNorm's passes."""
TOUCHED = 5
"""Times that SGD with momentum moves a parameter: weight, gradient and momentum in, two out."""


def least(work: Work, rates: Ceilings) -> dict[str, float]:
    """The least seconds of each group of a fused step: each kernel's roofline, added up.

    Args:
        work: a model's training.
        rates: the machine's ceilings.
    """
    subject, module = work.subject, work.module
    assert module is not None
    shape, dtype = tuple(work.sets[0].x.shape), subject.torch_dtype
    on_gpu = subject.device == "cuda"
    merging = None
    if on_gpu:
        merging = by_triton(dtype, _limits.limits(torch.device(subject.device)))
    weights = [p for p in module.parameters() if p.requires_grad]
    found = dict.fromkeys(GROUPS, 0.0)

    def add(group: str, cost: Cost) -> None:
        # On the CPU one call of PyTorch's makes both gradients, and a profile has them as one.
        own = BOTH if group in (DGRAD, WGRAD) and not on_gpu else group
        found[own] += cost.seconds(rates.flops, rates.bandwidth)

    parameter = subject.storage_dtype
    for node in nodes(module, shape, dtype, folds=on_gpu, parameter=parameter, merging=merging):
        for kernel in node.kernels:
            add(_OPS.get(kernel.op, NORM), kernel.cost)
    for layer in model_cost(module, shape, dtype=dtype).layers:
        if layer.kind == "linear" or (layer.kind == "pool" and set(layer.shape[2:]) <= {1}):
            for _ in range(3):  # forward, and two gradients
                add(HEAD, layer.fused)
    if subject.optimizes:
        moved = TOUCHED * sum(p.numel() * p.element_size() for p in weights)
        found[OPTIMIZER] += moved / rates.bandwidth
    return {group: seconds for group, seconds in found.items() if seconds}
