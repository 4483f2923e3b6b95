"""The implementations that are tuned: which ways there are to run a convolution, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from resnet_fused import _platform, _tuned, admission, backends
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.work import Work
from resnet_fused.ops import _cuda, _cuda_plan
from resnet_fused.triton import _limits, _tiles

TRIED_SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Option:
    """One way to run a convolution.

    Attributes:
        configuration: its name, "128x64_4w4s".
        splits: parts of the reduction.
        predicted: cycles, good for comparisons alone.
        wish: what the launch takes: a `_tiles.Plan`, or index and splits of a CUDA configuration.
    """

    configuration: str
    splits: int
    predicted: float = math.nan
    wish: Any = None

    @property
    def name(self) -> str:
        """As tables show it, "128x64_4w4s/2"."""
        return f"{self.configuration}/{self.splits}"


class Kernel(Protocol):
    """An implementation whose configurations are tuned.

    Attributes:
        name: "triton" or "cuda".
    """

    name: str

    def why_not(self, subject: Subject) -> str | None:
        """Why it does not take part, or None."""

    def options(self, work: Work) -> tuple[Option, list[Option]]:
        """The chooser's pick, and the other admitted ones, the best predicted first."""

    def launch(self, work: Work, i: int, out: Tensor, option: Option) -> None:
        """Runs operand set i into `out`."""


class TritonKernel:
    """The Triton kernels: tiles x splits."""

    name = "triton"

    def why_not(self, subject: Subject) -> str | None:
        """Asks the registry and admission."""
        return _why_not(subject, self.name)

    def options(self, work: Work) -> tuple[Option, list[Option]]:
        """The best predicted split of each tile, then second-best ones."""
        given, case, op = work.sets[0], _case(work), work.subject.op
        module: Any = import_module(f"resnet_fused.triton.{op}")
        if op == "conv_bn_act":
            out = torch.empty(case.output_shape, device="meta")
            product = module.product_of(given.x, given.weight, out, case.groups)
        elif op == "conv_dgrad":
            dx = torch.empty(case.input_shape, dtype=given.dy.dtype, device="meta")
            product = module.product_of(dx, given.weight, case.stride, case.groups)
        else:
            product = module.product_of(given.dy, given.weight, case.groups)
        limits = _limits.limits(given.weight.device)
        allowed = admitted(op, self.name, work.subject.device)
        plan = _tiles.choose(product, limits, allowed)
        pick = Option(plan.tile.name, plan.splits, wish=plan)
        others = [
            Option(tile.name, splits, cost, _tiles.Plan(tile, splits, flat, "tuning asks for it"))
            for cost, tile, splits, flat in _tiles.candidates(product, limits, allowed)
        ]
        return pick, spread_out(pick, others)

    def launch(self, work: Work, i: int, out: Tensor, option: Option) -> None:
        """Runs the kernel as the option's plan says."""
        module: Any = import_module(f"resnet_fused.triton.{work.subject.op}")
        module.launch(*arguments(work, i, out), plan=option.wish)


class CudaKernel:
    """The CUDA kernels of the extension: configurations x splits."""

    name = "cuda"

    def why_not(self, subject: Subject) -> str | None:
        """Asks the registry and admission."""
        return _why_not(subject, self.name)

    def options(self, work: Work) -> tuple[Option, list[Option]]:
        """Each configuration with its own choice of splits, then with others."""
        given, case, op = work.sets[0], _case(work), work.subject.op
        operands = {
            "conv_bn_act": (given.x, given.weight, given.residual),
            "conv_dgrad": (given.dy, given.y, given.weight),
            "conv_wgrad": (given.dy, given.y, given.x),
        }[op]
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        problem = _cuda_plan.problem_of(op, operands, geometry, output(work), real=False)
        about = _cuda_plan.gpu(given.weight.device)
        allowed = admitted(op, self.name, work.subject.device)
        plan = _cuda_plan.choose(problem, about, allowed)
        if plan.configuration < 0:
            raise LookupError(plan.why)
        pick = _option_of(plan)
        found = []
        for index, name in enumerate(_cuda_plan.configurations(op)):
            if allowed is None or name in allowed:
                wishes = (0, *TRIED_SPLITS)
                found += [_cuda_plan.plan(problem, about, index, splits) for splits in wishes]
        narrow = pick.configuration.startswith(_cuda_plan.NARROW)
        others = [
            _option_of(one)
            for one in found
            if one.configuration >= 0
            # Element by element is for what nothing else serves.
            and (narrow or not one.name.startswith(_cuda_plan.NARROW))
        ]
        return pick, spread_out(pick, others)

    def launch(self, work: Work, i: int, out: Tensor, option: Option) -> None:
        """Runs the kernel in the option's configuration."""
        getattr(_cuda, f"launch_{work.subject.op}")(*arguments(work, i, out), wish=option.wish)


KERNELS: tuple[Kernel, ...] = (TritonKernel(), CudaKernel())


def _option_of(plan: _cuda_plan.Plan) -> Option:
    return Option(plan.name, plan.splits, plan.cycles, (plan.configuration, plan.splits))


def spread_out(pick: Option, options: Iterable[Option]) -> list[Option]:
    """The best of each configuration, then the second of each and so on; without the pick."""
    ranks: dict[str, int] = {}
    seen, found = {pick.name}, []
    for option in sorted(options, key=lambda one: one.predicted):
        if option.name in seen:
            continue
        seen.add(option.name)
        rank = ranks[option.configuration] = ranks.get(option.configuration, -1) + 1
        found.append((rank, option))
    return [option for _, option in sorted(found, key=lambda one: (one[0], one[1].predicted))]


def admitted(op: str, implementation: str, device: str) -> frozenset[str] | None:
    """The configurations that were admitted, also where a backend is asked for by name."""
    if device == "cpu":  # the interpreter: tests alone
        return None
    found = admission.verdict(op, implementation, _platform.current_device())
    return found.configurations


def _why_not(subject: Subject, implementation: str) -> str | None:
    known = {entry.name: entry for entry in backends.implementations(subject.op)}
    if implementation not in known:
        return backends.absent(subject.op, implementation)
    case: Any = subject.case
    call = backends.Call(
        subject.op, subject.device, subject.torch_dtype, residual=case.residual, act=case.act
    )
    reason = known[implementation].supports(call)
    if reason is None and subject.device == "cuda":
        reason = admission.verdict(subject.op, implementation, _platform.current_device()).reason
    return reason


def _case(work: Work) -> Any:
    return work.case


def output(work: Work) -> Tensor:
    """An empty result of the op, channels_last."""
    case = _case(work)
    shapes = {"conv_bn_act": case.output_shape, "conv_dgrad": case.input_shape}
    return torch.empty(
        shapes.get(work.subject.op, case.weight_shape), dtype=work.subject.torch_dtype,
        device=work.subject.device, memory_format=torch.channels_last,
    )  # fmt: skip


def arguments(work: Work, i: int, out: Tensor) -> tuple[Any, ...]:
    """Of a launch into `out`, for either implementation."""
    given, case = work.sets[i], _case(work)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    if work.subject.op == "conv_bn_act":
        vectors = (given.scale, given.shift, given.residual)
        return (given.x, given.weight, *vectors, out, *geometry, case.act)
    if work.subject.op == "conv_dgrad":
        return (given.dy, given.y, given.weight, given.scale, out, *geometry)
    return (given.dy, given.y, given.x, given.scale, out, *geometry)


def key_of(work: Work, implementation: str) -> _tuned.Key:
    """What the choosers find the entry by."""
    given, case = work.sets[0], _case(work)
    third = given.residual if work.subject.op == "conv_bn_act" else given.y
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    return _tuned.key(
        implementation, work.subject.op, work.subject.torch_dtype, case.input_shape,
        case.weight_shape, geometry, third is not None,
    )  # fmt: skip
