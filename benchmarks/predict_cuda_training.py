"""Predicts ResNet-50's training step by the CUDA kernels on an H200, in bf16, kernel by kernel.

Each convolution takes what its own plan predicts for the configuration that it picks, each pass its
bytes through memory; no kernel is faster than memory or the tensor cores at the rates of
`predict_triton.py`, which is its limit here, and each has a launch. Both gradients of a 1x1
convolution come from one kernel where a node would take it; so do a block's end and the first
convolution of the block behind it, and that one's gradient and the pass behind the block's end.
Needs the extension built with nvcc, which holds the plans.

    python benchmarks/predict_cuda_training.py            # the tables
    python benchmarks/predict_cuda_training.py --write    # into the docs, its calls as JSON
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from predict_block_end import in_a_row
from predict_training import BATCHES
from predict_triton import LAUNCH, MEMORY, PAGE, TENSOR, record

from resnet_fused import models
from resnet_fused.bench.nodes import Node, merges, nodes
from resnet_fused.cases import ConvCase
from resnet_fused.ops import (
    _chain_plan,
    _cuda_block_end,
    _cuda_bn_dgrad,
    _cuda_bn_dgrad_end,
    _cuda_grad1x1,
    _cuda_grad1x1_end,
    _cuda_plan,
    _cuda_stats,
    _cuda_wgrad,
)
from resnet_fused.roofline import (
    Cost,
    Kernel,
    bn_add_act_conv_stats_cost,
    conv_bn_dgrad_cost,
    conv_bn_dgrad_end_cost,
    conv_bn_grad1x1_cost,
    conv_bn_grad1x1_end_cost,
)

BEGIN, END = "<!-- cuda training: begin -->", "<!-- cuda training: end -->"
ABOUT = (132, 232448, 233472, 90)
"""An H200's multiprocessors, shared memory of a block and of a multiprocessor, capability."""
A100 = (108, 166912, 167936, 80)
DTYPE = torch.bfloat16
SMALL = 1
"""Kernels of a layer's step that work on vectors alone: backward finalize. The convolution itself
finalizes its output's BatchNorm and updates the running statistics (`conv_bn_stats_finalize`)."""
APART = 3
"""Likewise where the convolution is made with the block's end before it, which does neither."""
ENDING = 1500
"""Cycles that finalizing takes behind the last merge: three divisions and a root in double one
after the other, two rounds of loads, the columns' counter. By arithmetic, as everything here."""
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WORST = 8
"""Rows of the table of what loses most."""


@dataclass(frozen=True)
class Predicted:
    """One kernel of the step; times in microseconds, launches left aside.

    Attributes:
        op: its name.
        kind: "3x3" of a convolution by its filter; "" of a pass.
        call: the sizes.
        plan: the configuration and its splits; "" of a pass.
        us: by its plan and memory.
        memory: of its bytes alone.
        tensor: of its products alone.
        gb: bytes that must move through memory.
    """

    op: str
    kind: str
    call: str
    plan: str
    us: float
    memory: float
    tensor: float
    gb: float

    @property
    def limit(self) -> float:
        """What no kernel that moves these bytes and multiplies these numbers gets below."""
        return max(self.memory, self.tensor)

    @property
    def lost(self) -> float:
        """What it takes beside its limit."""
        return self.us - self.limit


def _image(*shape: int) -> Tensor:
    made = torch.empty(shape, dtype=DTYPE, device="meta")
    return made.contiguous(memory_format=torch.channels_last)


def _vectors(rows: int, channels: int) -> Tensor:
    return torch.empty(rows, channels, device="meta")


def _stats(case: ConvCase, geometry: Any, inner: bool, added: int) -> _cuda_plan.Problem:
    norm = _vectors(4, case.c) if inner else None
    operands = _image(*case.input_shape), norm, _image(*case.weight_shape)
    return _cuda_stats.problem_of(*operands, _image(*case.output_shape), geometry, real=False)


def _addend(case: ConvCase, step: int) -> Tensor | None:
    return _image(case.n, case.c, -(-case.h // step), -(-case.w // step)) if step else None


def _dgrad(case: ConvCase, geometry: Any, inner: bool, added: int) -> _cuda_plan.Problem:
    dz, x = _image(*case.output_shape), _image(*case.input_shape)
    below = (x, _vectors(4, case.c)) if inner else (None, None)
    weight, addend = _image(*case.weight_shape), _addend(case, added)
    operands = dz, dz, _vectors(3, case.k), weight, addend, *below
    return _cuda_bn_dgrad.problem_of(operands, x, max(1, added), geometry, real=False)


def _dgrad_end(case: ConvCase, geometry: Any, projected: bool, added: int) -> _cuda_plan.Problem:
    dz, x, norm = _image(*case.output_shape), _image(*case.input_shape), _vectors(4, case.c)
    first = dz, dz, _vectors(3, case.k), _image(*case.weight_shape), _addend(case, added)
    rest = (x, norm) if projected else (None, None)
    operands = (*first, x, x, norm, *rest)
    return _cuda_bn_dgrad_end.problem_of(operands, x, max(1, added), geometry, real=False)


def _grad1x1_end(case: ConvCase, geometry: Any, projected: bool, added: int) -> _cuda_plan.Problem:
    made = _dgrad_end(case, geometry, projected, added)
    return _cuda_grad1x1_end.problem_of(made.operands, made.out, max(1, added), real=False)


def _wgrad(case: ConvCase, geometry: Any, inner: bool, added: int) -> _cuda_plan.Problem:
    dz, norm = _image(*case.output_shape), _vectors(4, case.c) if inner else None
    operands = dz, dz, _vectors(3, case.k), _image(*case.input_shape), norm
    return _cuda_wgrad.problem_of(*operands, _image(*case.weight_shape), geometry, real=False)


def _grad1x1(case: ConvCase, geometry: Any, inner: bool, added: int) -> _cuda_plan.Problem:
    dz, x = _image(*case.output_shape), _image(*case.input_shape)
    norm, addend = _vectors(4, case.c) if inner else None, _addend(case, added)
    operands = dz, dz, _vectors(3, case.k), x, norm, _image(*case.weight_shape), addend
    return _cuda_grad1x1.problem_of(operands, x, max(1, added), real=False)


def _end(case: ConvCase, geometry: Any, inner: bool, added: int) -> _cuda_plan.Problem:
    y, z, norm = _image(*case.input_shape), _image(*case.output_shape), _vectors(4, case.c)
    operands = y, norm, y, norm if added else None, _image(*case.weight_shape), y, z
    return _cuda_block_end.problem_of(*operands, real=False)


PROBLEMS: dict[str, Callable[..., _cuda_plan.Problem]] = {
    _cuda_stats.OP: _stats,
    _cuda_block_end.OP: _end,
    _cuda_bn_dgrad.OP: _dgrad,
    _cuda_bn_dgrad_end.OP: _dgrad_end,
    _cuda_wgrad.OP: _wgrad,
    _cuda_grad1x1.OP: _grad1x1,
    _cuda_grad1x1_end.OP: _grad1x1_end,
}
ALONE: dict[str, Callable[..., Cost]] = {
    _cuda_block_end.OP: lambda case, dtype, masked: bn_add_act_conv_stats_cost(case, dtype),
    _cuda_bn_dgrad.OP: conv_bn_dgrad_cost,
    _cuda_bn_dgrad_end.OP: lambda case, dtype, masked: conv_bn_dgrad_end_cost(case, dtype),
    _cuda_grad1x1.OP: conv_bn_grad1x1_cost,
    _cuda_grad1x1_end.OP: lambda case, dtype, masked: conv_bn_grad1x1_end_cost(case, dtype),
}
ENDS: dict[str, Callable[..., Cost]] = {
    _cuda_bn_dgrad_end.OP: conv_bn_dgrad_end_cost,
    _cuda_grad1x1_end.OP: conv_bn_grad1x1_end_cost,
}
"""What an input's gradient moves without a shortcut's, a block's end without a projection."""


def problem(node: Node, kernel: Kernel) -> _cuda_plan.Problem:
    """What a convolution's plan is asked: a call as the node makes it.

    Args:
        node: with the layer's sizes.
        kernel: one of its convolutions.
    """
    case, inner = node.case_of(kernel), node.inner(kernel.layer)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    # The shortcut's gradient, or the projection, where the roofline counts it.
    alone = ALONE.get(kernel.op)
    added = alone is not None and kernel.cost.bytes > alone(case, DTYPE, masked=inner).bytes
    step = node.addend_stride if added else 0
    if (ends := ENDS.get(kernel.op)) is not None:
        # Blocks of ResNets all have a shortcut; what is more is the projection of the one before.
        shared = (
            0
            if not step
            else math.prod(case.input_shape[:2])
            * math.prod(-(-side // step) for side in case.input_shape[2:])
        )
        inner = kernel.cost.bytes > ends(case, DTYPE, addend=shared).bytes
    return PROBLEMS[kernel.op](case, geometry, inner, step)


def _predicted(node: Node, kernel: Kernel, about: tuple[int, ...]) -> Predicted:
    case = node.case_of(kernel)
    memory, tensor = 1e6 * kernel.cost.bytes / MEMORY, 1e6 * kernel.cost.flops / TENSOR
    us, kind, plan = max(memory, tensor), "", ""
    name = f"{case.k} at {case.p}"
    if kernel.op in PROBLEMS:
        found = _cuda_plan.plan(problem(node, kernel), about)
        us, kind = max(us, 1e6 * found.cycles / _chain_plan.CLOCK), f"{case.r}x{case.s}"
        step = f"/{case.stride[0]}" if case.stride[0] > 1 else ""
        name = f"{kind}{step} {case.c} to {case.k} at {case.h}"
        plan = found.name + (f"/{found.splits}" if found.splits > 1 else "")
    return Predicted(kernel.op, kind, name, plan, us, memory, tensor, kernel.cost.bytes / 1e9)


def merging(case: ConvCase, inner: bool, about: tuple[int, ...] = ABOUT) -> bool:
    """Whether the CUDA kernel of both gradients is taken: as a node decides on that GPU."""
    given = DTYPE, case.input_shape, case.k, about
    return _cuda_grad1x1.choose(*given, masked=inner).merged


def uniting(case: ConvCase, projected: bool, added: int, about: tuple[int, ...] = ABOUT) -> bool:
    """Whether the CUDA kernel of all three gradients is taken where two blocks meet, likewise."""
    return _cuda_grad1x1_end.choose(
        DTYPE, case.input_shape, case.weight_shape, about, projected=projected, added=added
    ).ended


def ending(case: ConvCase, projected: bool, added: int, about: tuple[int, ...] = ABOUT) -> bool:
    """Whether a CUDA kernel makes the gradient between two blocks behind a ReLU, likewise."""
    plain = (case.r, case.s, case.stride, case.padding, case.groups) == (1, 1, (1, 1), (0, 0), 1)
    if plain and uniting(case, projected, added, about):
        return True
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    merged = merges(case, functools.partial(merging, about=about), inner=False)
    return _cuda_bn_dgrad_end.choose(
        DTYPE, case.input_shape, case.weight_shape, geometry, about, projected=projected,
        added=added, merged=merged,
    ).ended  # fmt: skip


@functools.cache
def step(batch: int, about: tuple[int, ...] = ABOUT, network: str = "resnet50") -> tuple[Node, ...]:
    """A network's nodes.

    Args:
        batch: images.
        about: the GPU that plans and choices are for.
        network: of `rf.models`.
    """
    taken = functools.partial(merging, about=about)
    ends = functools.partial(ending, about=about)
    unites = functools.partial(uniting, about=about)
    module = getattr(models, network)()
    shape = batch, 3, 224, 224
    return tuple(nodes(module, shape, DTYPE, merging=taken, ending=ends, uniting=unites))


def _projected(block: Node) -> bool:
    return len(block.layers) > block.chain


def folding(
    batch: int, about: tuple[int, ...] = ABOUT, network: str = "resnet50"
) -> list[tuple[Node, Node, bool]]:
    """Blocks with the one behind them, and whether one CUDA kernel makes the one's end and the
    other's first convolution, which has to be a 1x1: as a node decides on that GPU."""
    found = []
    for block, behind in in_a_row(step(batch, about, network)):
        first = behind.cases[0]
        if first.r > 1:
            continue
        given = DTYPE, first.input_shape, first.k, about
        one = _cuda_block_end.choose(*given, projected=_projected(block)).folded
        found.append((block, behind, one))
    return found


def _calls(batch: int, about: tuple[int, ...], network: str) -> Iterator[tuple[Node, Kernel]]:
    """The step's kernels; one that makes a block's end is the convolution's node's."""
    before = {behind.name: block for block, behind, one in folding(batch, about, network) if one}
    ended = {block.name for block in before.values()}
    for node in step(batch, about, network):
        for kernel in node.kernels:
            first = (kernel.op, kernel.layer) == (_cuda_stats.OP, 0)
            if first and node.name in before:
                block = before[node.name]
                cost = bn_add_act_conv_stats_cost(node.cases[0], DTYPE, projected=_projected(block))
                yield node, Kernel(0, _cuda_block_end.OP, cost, backward=False)
            elif kernel.op != "bn_add_act" or node.name not in ended:
                yield node, kernel


@functools.cache
def kernels(
    batch: int, about: tuple[int, ...] = ABOUT, network: str = "resnet50"
) -> tuple[Predicted, ...]:
    """Every kernel of the step that does more than work on vectors.

    Args:
        batch: images.
        about: the GPU that plans and choices are for; memory and tensor cores are an H200's.
        network: of `rf.models`.

    Raises:
        RuntimeError: the extension was built without the kernels.
    """
    missing = [op for op in PROBLEMS if not _cuda_plan.exists(op)]
    if missing:
        raise RuntimeError(f"the extension holds no CUDA kernel of {missing[0]}: make run")
    return tuple(_predicted(*call, about) for call in _calls(batch, about, network))


def step_us(batch: int, network: str = "resnet50") -> tuple[float, float]:
    """The whole step, predicted and at its kernels' limits, launches counted in both.

    So is what finalizing takes at a convolution's end: no kernel's plan knows of it.
    """
    found = kernels(batch, network=network)
    layers = sum(one.op == _cuda_stats.OP for one in found)
    ends = sum(one.op == _cuda_block_end.OP for one in found)
    launches = 1e6 * LAUNCH * (len(found) + SMALL * layers + APART * ends)
    launches += 1e6 * ENDING / _chain_plan.CLOCK * layers
    return sum(one.us for one in found) + launches, sum(one.limit for one in found) + launches


def reached(batch: int) -> float:
    """What part of their predicted time the convolutions' limits are."""
    found = [one for one in kernels(batch) if one.kind]
    return math.fsum(one.limit for one in found) / math.fsum(one.us for one in found)


def _by(found: Iterable[Predicted], key: Callable[[Predicted], Any]) -> dict[Any, list[Predicted]]:
    groups: dict[Any, list[Predicted]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return groups


def worst(found: Iterable[Predicted]) -> list[list[Predicted]]:
    """Calls that are alike, those that lose most beside their limits first."""
    groups = _by(found, lambda one: one).values()
    return sorted(groups, key=lambda group: -sum(one.lost for one in group))


def _ms(group: Iterable[Predicted], name: str) -> str:
    return f"{math.fsum(getattr(one, name) for one in group) / 1e3:.2f}"


def _ops(batch: int) -> list[str]:
    lines = [
        f"| batch {batch} | kernels | GB | ms | of memory | of tensor cores | the limit | lost |",
        "| --- " * 8 + "|",
    ]
    groups = _by(kernels(batch), lambda one: (one.op, one.kind))
    for (op, kind), group in sorted(groups.items()):
        times = " | ".join(_ms(group, name) for name in ("us", "memory", "tensor", "limit", "lost"))
        gb = sum(one.gb for one in group)
        lines.append(f"| {op} {kind} | {len(group)} | {gb:.2f} | {times} |".replace("  ", " "))
    us, limit = step_us(batch)
    return [
        *lines,
        "",
        f"Sum at batch {batch}, with launches and small kernels: {us / 1e3:.2f} ms, "
        f"{1e6 * batch / us:,.0f} images/s; at the limits {limit / 1e3:.2f} ms, "
        f"{1e6 * batch / limit:,.0f} images/s. Without the classifier and the optimiser. The "
        f"convolutions are predicted at {reached(batch):.2f} of their limit; passes are taken to "
        "be at theirs.",
        "",
    ]


def _worst(batch: int) -> list[str]:
    lines = [
        f"| what loses most, batch {batch} | plan | calls | us each | its limit | ms lost |",
        "| --- " * 6 + "|",
    ]
    ranked = worst(kernels(batch))
    for group in ranked[:WORST]:
        one = group[0]
        bound = "memory" if one.memory > one.tensor else "tensor cores"
        lines.append(
            f"| {one.op} {one.call} | {one.plan} | {len(group)} | {one.us:.0f} | "
            f"{one.limit:.0f} ({bound}) | {_ms(group, 'lost')} |"
        )
    first = _ms([one for group in ranked[:WORST] for one in group], "lost")
    return [*lines, "", f"Together {first} of {_ms(kernels(batch), 'lost')} ms that are lost."]


def _depths() -> list[str]:
    """ResNets of each depth."""
    columns = " | ".join(f"batch {batch}: kernels | ms | images/s" for batch in BATCHES)
    lines = [f"| the whole step | {columns} |", "| --- " * (1 + 3 * len(BATCHES)) + "|"]
    for network in DEPTHS:
        cells = []
        for batch in BATCHES:
            us, _ = step_us(batch, network)
            count = str(len(kernels(batch, network=network)))
            cells += [count, f"{us / 1e3:.2f}", f"{1e6 * batch / us:,.0f}"]
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return lines


def _ends() -> str:
    """At how many places a block's end is folded."""
    said = []
    for name, about in (("an H200", ABOUT), ("an A100", A100)):
        taken = [[one for *_, one in folding(batch, about)] for batch in BATCHES]
        counts = " and ".join(str(sum(ones)) for ones in taken)
        said.append(f"{counts} of {len(taken[-1])} on {name}")
    return (
        "A block's end and the first convolution of the block behind it are one kernel "
        f"(`{_cuda_block_end.OP}`) where its plan is predicted a tenth ahead: at batch "
        f"{' and '.join(map(str, BATCHES))} at {', '.join(said)}."
    )


def text() -> str:
    """The tables as Markdown."""
    assumed = (
        f"Assumed: the plans' cycles at {_chain_plan.CLOCK / 1e6:,.0f} MHz, memory "
        f"{MEMORY / 1e12:.2f} TB/s, tensor cores {TENSOR / 1e12:.0f} TFLOP/s, {LAUNCH * 1e6:.0f} "
        f"us a launch, {SMALL} small kernel a layer beside these, {APART} of a layer that is made "
        f"with a block's end; {ENDING:,} cycles for finalizing as a convolution ends. ResNet-50, "
        "224x224, bfloat16."
    )
    tables = [line for batch in BATCHES for line in _ops(batch)]
    return "\n".join([assumed, "", *tables, *_worst(BATCHES[-1]), "", _ends(), "", *_depths()])


@click.command()
@click.option("--write", is_flag=True, help="Into docs/measured_facts.md and predictions.json.")
def main(write: bool) -> None:
    """Predict the CUDA kernels' training step."""
    said = text()
    click.echo(said)
    if write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{said}\n{END}{rest.split(END)[1]}", encoding="utf-8")
        import predict_cuda_calls

        record(cuda_training=predict_cuda_calls.of_training())


if __name__ == "__main__":
    main()
