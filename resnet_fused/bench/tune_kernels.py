"""The implementations that are tuned: which ways there are to run a convolution, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from resnet_fused import _platform, _tuned, admission, backends
from resnet_fused.bench import tune_spanning
from resnet_fused.bench.subject import Subject
from resnet_fused.bench.tune_ops import OPS, arguments, geometry_of, outputs
from resnet_fused.bench.work import Work
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda, _cuda_plan, _tuned_calls
from resnet_fused.triton import _limits, _tiles

TRIED_SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Option:
    """One way to run a convolution.

    Attributes:
        configuration: its name, "128x64_4w4s".
        splits: parts of the reduction.
        predicted: cycles, good for comparisons alone.
        wish: what the launch takes: a `_tiles.Plan`, index and splits of a CUDA configuration, or
            what `tune_spanning.launch` does.
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

    def launch(self, work: Work, i: int, outs: tuple[Tensor, ...], option: Option) -> None:
        """Runs operand set i into `outs`, as `outputs_of` makes them."""


class TritonKernel:
    """The Triton kernels: tiles x splits."""

    name = "triton"

    def why_not(self, subject: Subject) -> str | None:
        """Asks the registry and admission."""
        op = subject.op
        if op in tune_spanning.OPS and tune_spanning.OPS[op].ways is None:
            return f"{op}'s Triton kernel has one configuration"
        return _why_not(subject, self.name)

    def options(self, work: Work) -> tuple[Option, list[Option]]:
        """The best predicted split of each tile, then second-best ones."""
        given, case, op = work.sets[0], work.case, work.subject.op
        if op in tune_spanning.OPS:
            names = admitted(op, self.name, work.subject.device)
            ways = tune_spanning.OPS[op].ways
            assert ways is not None
            found = ways(case, tune_spanning.arguments(work), names)
            every = [Option(*way) for way in found]
            return every[0], spread_out(every[0], every[1:])
        module: Any = import_module(f"resnet_fused.triton.{op}")
        product = OPS[op].product(module, given, case)
        limits = _limits.limits(given.weight.device)
        names = admitted(op, self.name, work.subject.device)
        allowed = OPS[op].offered(module, given, product, names)
        plan = _tiles.choose(product, limits, allowed)
        pick = Option(plan.tile.name, plan.splits, wish=plan)
        others = [
            Option(tile.name, splits, cost, _tiles.Plan(tile, splits, flat, "tuning asks for it"))
            for cost, tile, splits, flat in _tiles.candidates(product, limits, allowed)
        ]
        return pick, spread_out(pick, others)

    def launch(self, work: Work, i: int, outs: tuple[Tensor, ...], option: Option) -> None:
        """Runs the kernel as the option's plan says."""
        if work.subject.op in tune_spanning.OPS:
            tune_spanning.launch(work, i, outs, self.name, option.wish)
            return
        module: Any = import_module(f"resnet_fused.triton.{work.subject.op}")
        module.launch(*arguments(work, i, outs), plan=option.wish)


class CudaKernel:
    """The CUDA kernels of the extension: configurations x splits."""

    name = "cuda"

    def why_not(self, subject: Subject) -> str | None:
        """Asks the registry and admission."""
        return _why_not(subject, self.name)

    def _problem(self, work: Work) -> _cuda_plan.Problem:
        given, op = work.sets[0], work.subject.op
        if op in tune_spanning.OPS:
            return tune_spanning.OPS[op].problem(tune_spanning.arguments(work))
        operands = OPS[op].cuda
        assert operands is not None
        geometry = geometry_of(work.case)
        return _cuda_plan.problem_of(op, operands(given), geometry, outputs(work)[0], real=False)

    def options(self, work: Work) -> tuple[Option, list[Option]]:
        """Each configuration with its own choice of splits, then with others."""
        given, op, problem = work.sets[0], work.subject.op, self._problem(work)
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
        parts = tune_spanning.cuda_parts(work, plan, allowed)
        if parts is not None:
            others.append(Option(*parts))
            # What a graph is rewritten to without tuning: the faster one, as it is predicted.
            if others[-1].predicted < pick.predicted:
                pick, others[-1] = others[-1], pick
        return pick, spread_out(pick, others)

    def launch(self, work: Work, i: int, outs: tuple[Tensor, ...], option: Option) -> None:
        """Runs the kernel in the option's configuration."""
        if work.subject.op in tune_spanning.OPS:
            wish = option.wish
            if isinstance(wish, tuple):
                wish = {"wish": wish}
            tune_spanning.launch(work, i, outs, self.name, wish)
            return
        getattr(_cuda, f"launch_{work.subject.op}")(*arguments(work, i, outs), wish=option.wish)


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


def _implementations(op: str) -> dict[str, backends.Implementation]:
    return {entry.name: entry for entry in backends.implementations(op)}


def _why_not(subject: Subject, implementation: str) -> str | None:
    known = _implementations(subject.op)
    if implementation not in known:
        return backends.absent(subject.op, implementation)
    reason = known[implementation].supports(subject.call)
    if reason is None and subject.device == "cuda":
        reason = admission.verdict(subject.op, implementation, _platform.current_device()).reason
    return reason


def key_of(work: Work, implementation: str) -> _tuned.Key:
    """What the choosers find the entry by."""
    op, case = work.subject.op, work.case
    if op in tune_spanning.OPS:
        found = _tuned_calls.CALLS[op](tune_spanning.arguments(work))
        return _tuned.key(implementation, op, *found)
    assert isinstance(case, ConvCase)
    third = OPS[op].third(work.sets[0])
    return _tuned.key(
        implementation, op, work.subject.torch_dtype, case.input_shape, case.weight_shape,
        geometry_of(case), third is not None,
    )  # fmt: skip


def outputs_of(work: Work) -> tuple[Tensor, ...]:
    """Empty results of the subject's op, for a launch."""
    made = tune_spanning.outputs if work.subject.op in tune_spanning.OPS else outputs
    return made(work)
