"""What the benchmark asks of an op: one `Kind` each, in the tables of `kernels`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from resnet_fused.bench.names import Case
from resnet_fused.cases import ConvCase
from resnet_fused.roofline import Cost, bn_act_cost

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Layer

Function = Callable[[Any], Any]
AT_ONCE = 1 << 26  # elements of a tensor that are taken to float64 together


@dataclass(frozen=True)
class Result:
    """One tensor that an op returns, and what it is judged by: `bound` or `follows`.

    Attributes:
        name: in a judgement's text.
        bound: (case, operands, how sums are made) -> oracle and bound, of the operands alone.
        follows: (case, operands, the call's first result) -> oracle and bound of what the call
            says about that result; None where it says nothing.
        filters: operands with a dimension of output channels, and which it is, where some output
            channels stand for all of the result; else some images do.
    """

    name: str
    bound: Callable[..., tuple[Tensor, Tensor]] | None = None
    follows: Callable[..., tuple[Tensor, Tensor] | None] | None = None
    filters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What the benchmark asks of an op.

    Attributes:
        form: type of its cases.
        cases: a network's layers in order -> (name of the layer, the op's case there); see `each`.
        make: (maker of tensors, case) -> operands.
        ours: case -> function of operands: `rf.ops`, all results, a tuple if they are several.
        eager: (case, operands of one set) -> function of operands: PyTorch's calls, the results
            with a `bound`. What is no part of a call (a BatchNorm's buffers) is made before.
        results: those with a `bound` first.
        cost: (case, dtype) -> the least work.
        passes: (case, dtype) -> eager's, call by call.
        inference: whether it is a layer in inference, which other libraries have too.
        arguments: case -> function of operands: what the op's overloads take, in the schema's
            order; of ops that can be put together of others ("parts").
    """

    form: type
    cases: Callable[[Sequence[Layer]], list[tuple[str, Case]]]
    make: Callable[[Any, Any], Any]
    ours: Callable[[Any], Function]
    eager: Callable[[Any, Any], Function]
    results: tuple[Result, ...]
    cost: Callable[[Any, torch.dtype], Cost]
    passes: Callable[[Any, torch.dtype], tuple[Cost, ...]]
    inference: bool = False
    arguments: Callable[[Any], Function] | None = None

    def whole(self, out: Any) -> Any:
        """An overload's results without those that are not there, which it returns empty."""
        if not isinstance(out, tuple):
            return out
        there = tuple(t for t in out if t.shape[1])
        return there if len(there) > 1 else there[0]

    def named(self, out: Any) -> dict[str, Tensor] | None:
        """A call's results by name, the first as ""; None if it is none of them.

        A lone tensor is the first one: others' libraries tell the rest in forms of their own.
        """
        several = isinstance(out, tuple) and 1 < len(out) <= len(self.results)
        tensors = out if several else (out,)
        if not all(isinstance(t, Tensor) for t in tensors):
            return None
        names = ("", *(result.name for result in self.results[1:]))
        return dict(zip(names, tensors, strict=False))


def each(of: Callable[[Layer], Any]) -> Callable[[Sequence[Layer]], list[tuple[str, Case]]]:
    """The `cases` of an op that has one at a layer, or none.

    Args:
        of: layer -> its case, or None.
    """

    def cases(layers: Sequence[Layer]) -> list[tuple[str, Case]]:
        found = ((layer.name, of(layer)) for layer in layers)
        return [(name, case) for name, case in found if case is not None]

    return cases


def tensor_pass(shape: tuple[int, ...], dtype: torch.dtype, tensors: int) -> Cost:
    """A pass of BatchNorm or the like, which reads and writes two or three tensors of a shape."""
    return bn_act_cost(shape, dtype, residual=tensors == 3)


def weight(make: Any, case: ConvCase) -> Tensor:
    """A convolution's weight [K, C / groups, R, S] under which its output is of the input's size.

    Args:
        make: maker of tensors.
        case: the convolution.
    """
    return make.image(*case.weight_shape).mul_((case.c // case.groups * case.r * case.s) ** -0.5)


def by_channels(measure: Callable[..., Tensor], t: Tensor, *branches: Any) -> Tensor:
    """Values a channel, measured a few channels at a time: float64 of the whole needs much room.

    Args:
        measure: of [N, few, P, Q] and of branches likewise; returns [rows, few].
        t: [N, K, P, Q].
        branches: pairs of [N, K, P, Q] and [4, K].

    Returns:
        [rows, K].
    """
    few = max(1, AT_ONCE * t.shape[1] // max(1, t.numel()))
    found = []
    for start in range(0, t.shape[1], few):
        part = slice(start, start + few)
        inner = [(other[:, part], rows[:, part]) for other, rows in branches]
        found.append(measure(t[:, part], *inner))
    return torch.cat(found, 1)


def widest(found: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The oracle, and the largest of several bounds around it."""
    pairs = list(found)
    return pairs[0][0], functools.reduce(torch.maximum, (bound for _, bound in pairs))


def elements(shape: tuple[int, ...]) -> int:
    """How many elements a shape has."""
    return math.prod(shape)
