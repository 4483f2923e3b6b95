"""Runs of layers in one launch: which of a shape's steps go together, and how they are launched.

A run are steps that stand one behind the other, each a `conv_bn_act` that the kernel of
docs/network.md takes. The user's word comes first (`ENVIRONMENT`): "always" takes every run that
the kernel serves, "auto" those that it is admitted for and predicted to be faster with than its
layers as kernels of their own.

Values keep the places that the arena's plan gives them, where one may lie in what another one's
last reader has left. That is right in one launch too: the launch's own plan looks at the layers'
addresses, and a layer that writes what one ahead of it in the run still reads, or wrote, begins
behind a meeting of all blocks, in which every read and write ahead of it has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..ops import _cuda_chain, _cuda_network, _cuda_plan, _results
from ..ops._chain_plan import CLOCK
from ..ops._words import Word
from . import _kernels
from ._ir import Step

ENVIRONMENT = "RESNET_FUSED_ONE_LAUNCH"
DEVICE = "cuda"
"""Type of the devices that have it."""
ORDINARY, EARLY = 2.0, 1.2
"""Microseconds of a launch in a graph; where a kernel begins before the one ahead has ended."""
SERVED = {"auto": ("cuda",), "always": ("cuda", "triton")}
"""Word -> by whom a layer may be served whose place the launch takes. A prediction compares cycles
of the CUDA launches' own model, which Triton's kernels have none of."""
KIND = "conv_bn_act"
"""Of the steps that are layers."""
PREDICTED = ("conv_bn_act", "conv_chain")
"""Steps that are compared. The others are the same whatever is in one launch."""
OTHER = "the launch gave another result than its layers one by one"

word = Word(ENVIRONMENT)
preferring = word.preferring

Seen = Mapping[int, tuple[Sequence[Tensor], Sequence[Tensor]]]
"""Position of a step -> its values, and its results in the arena."""
Kernels = Mapping[int, _kernels.Kernel]


class Run:
    """Layers in one launch.

    Attributes:
        positions: of their steps.
        plan: of the launch.
        why: why they are one.
    """

    def __init__(
        self,
        positions: Sequence[int],
        layers: Sequence[_cuda_network.Layer],
        plan: _cuda_network.Plan,
        why: str,
    ) -> None:
        self.positions, self.plan, self.why = tuple(positions), plan, why
        # Zeros before a launch and behind it: replays, one after the other, share it.
        self._memory = _cuda_network.workspace(plan, layers[0].x.device)
        self._waiting: list[_cuda_network.Layer] = []

    def take(self, at: int, layer: _cuda_network.Layer) -> None:
        """Takes a layer in; the last one launches them all."""
        if at == self.positions[0]:
            self._waiting.clear()
        self._waiting.append(layer)
        if at == self.positions[-1]:
            layers, self._waiting = self._waiting, []
            _cuda_network.launch(layers, self.plan, self._memory)

    def alone(self, at: int) -> tuple[int, int]:
        """Configuration and splits in which a single kernel gives a layer's very bits."""
        return _cuda_network.alone(self.plan, self.positions.index(at))

    def __str__(self) -> str:
        others = len(self.positions) - 1
        return f"in one launch with {others} other{'s' * (others > 1)}: {self.why}"


class Found(NamedTuple):
    """What became of a shape's steps.

    Attributes:
        runs: in one launch each.
        refused: position of a step that could have been in one -> why it is not.
        us: predicted, of all steps of `PREDICTED`; None where the CUDA kernels serve not all.
    """

    runs: tuple[Run, ...]
    refused: dict[int, str]
    us: float | None


def asked(device: torch.device) -> bool:
    """Whether runs are looked for at all.

    Raises:
        ValueError: the environment variable holds no word that is accepted.
    """
    return word() != "never" and device.type == DEVICE and _cuda_plan.exists(_cuda_network.OP)


def layer(step: Step, values: Sequence[Tensor], results: Sequence[Tensor]) -> _cuda_network.Layer:
    """A step of `conv_bn_act` as a layer of the launch."""
    given = _kernels.KINDS[step.kind].arguments(step, values)
    return _cuda_network.Layer._make((*given, results[0]))


def find(steps: Sequence[Step], kernels: Kernels, seen: Seen, device: torch.device) -> Found:
    """The runs of a shape's steps that are to be one launch.

    Args:
        steps: in order.
        kernels: of those that are this package's, by position.
        seen: what they read and wrote; the memory is what counts, not what lies there.
        device: where they run.
    """
    wish = word()
    us = {at: _alone(steps[at], kernels[at], *seen[at], device) for at in seen}
    runs: list[Run] = []
    refused: dict[int, str] = {}
    gained = 0.0
    candidates, unfit = _candidates(steps, kernels, seen, device, wish)
    if wish == "always":  # else nobody asked
        refused |= unfit
    for positions in candidates:
        layers = [layer(steps[at], *seen[at]) for at in positions]
        found = _served(layers, [us[at] for at in positions], device, wish)
        if isinstance(found, str):
            refused.update(dict.fromkeys(positions, found))
            continue
        plan, why = found
        runs.append(Run(positions, layers, plan, why))
        gained += sum(us[at] or 0.0 for at in positions) - together(plan)
    alone = [us.get(at) for at, step in enumerate(steps) if step.kind in PREDICTED]
    known = [one for one in alone if one is not None]
    return Found(tuple(runs), refused, sum(known) - gained if len(known) == len(alone) else None)


def _candidates(
    steps: Sequence[Step], kernels: Kernels, seen: Seen, device: torch.device, wish: str
) -> tuple[list[list[int]], dict[int, str]]:
    """Positions of steps that could each be a layer, by runs; why others could not."""
    about = _cuda_plan.gpu(device)
    found: list[list[int]] = []
    refused: dict[int, str] = {}
    for at in sorted(seen):
        if steps[at].kind != KIND or kernels[at].name not in SERVED[wish]:
            continue
        if steps[at].options.get("reverse"):
            refused[at] = "it walks the batch backwards"
            continue
        made = _cuda_network.plan([layer(steps[at], *seen[at])], about)
        if isinstance(made, str):
            refused[at] = made
        elif found and found[-1][-1] == at - 1:
            found[-1].append(at)
        else:
            found.append([at])
    lonely = {at: "no such layer stands beside it" for one in found if one[1:] == [] for at in one}
    return [one for one in found if one[1:]], refused | lonely


def _served(
    layers: Sequence[_cuda_network.Layer],
    us: Sequence[float | None],
    device: torch.device,
    wish: str,
) -> tuple[_cuda_network.Plan, str] | str:
    """The plan of a run and why it is taken; or why it is not.

    What is predicted is asked first: a self-check, which takes seconds, is made where that wins.
    """
    requested, source = backends.requested()
    if requested not in ("auto", "cuda"):
        return f"{source} asks for {requested}"
    about = _cuda_plan.gpu(device)
    seems = _cuda_network.plan(layers, about)
    said = seems if isinstance(seems, str) else _loses(seems, us, wish)
    said = said or _cuda_network.refusal(device, layers[0].x.dtype)
    if said is not None:
        return said
    made = _cuda_network.choose(layers, device)
    said = made if isinstance(made, str) else _loses(made, us, wish)
    if said is not None or isinstance(made, str):
        return said or str(made)
    why = f"{ENVIRONMENT} is {wish}" if wish == "always" else _compared(made, us)
    return made, f"{why}; {made.why}"


def _loses(made: _cuda_network.Plan, us: Sequence[float | None], wish: str) -> str | None:
    """Why a launch is not taken for its predicted time, or None."""
    if wish == "always" or together(made) < sum(one or 0.0 for one in us):
        return None
    return _compared(made, us)


def _compared(made: _cuda_network.Plan, us: Sequence[float | None]) -> str:
    alone = sum(one or 0.0 for one in us)
    return f"predicted {together(made):.0f} us in one launch, {alone:.0f} us one by one"


def together(made: _cuda_network.Plan) -> float:
    """Predicted microseconds; what follows does not begin early."""
    return 1e6 * made.cycles / CLOCK + made.launches * ORDINARY + (ORDINARY - EARLY)


def _alone(
    step: Step,
    kernel: _kernels.Kernel,
    values: Sequence[Tensor],
    results: Sequence[Tensor],
    device: torch.device,
) -> float | None:
    """Predicted microseconds of a step as a kernel of its own, where the model knows it."""
    if step.kind not in PREDICTED or kernel.name != "cuda":
        return None
    arguments = _kernels.KINDS[step.kind].arguments(step, values)
    if step.kind == "conv_bn_act":
        operands, geometry = (arguments[0], arguments[1], arguments[4]), arguments[5:9]
        made = _cuda_plan.problem_of(step.kind, operands, geometry, results[0], real=False)
    else:
        names = _results.FORMS[step.kind].operands
        given = dict(zip(names, arguments, strict=False))
        options = arguments[len(names) :]
        made = _cuda_chain.problem_of(given, results[0], results[1], options, real=False)
    launch = ORDINARY if kernel.late is not None else EARLY
    return 1e6 * _cuda_plan.predicted(made, _cuda_plan.gpu(device)) / CLOCK + launch
