"""A network as numbered values and the steps between them: what an engine runs, plans and saves.

A step reads values and constants and writes one value or several. No step changes a value in
place as far as this form is concerned; whether a result may take the memory of a dead one is the
program's business. A graph's steps stand in an order that computes every value before it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

FUSED = ("conv_bn_act", "conv_bn_act_fp8", "stem", "head", "conv_chain", "conv_chain_fp8")
"""Kinds of steps that are ops of this package."""


class Ref(NamedTuple):
    """A value, by its number, among a step's arguments or in the graph's output."""

    value: int


class Const(NamedTuple):
    """A constant tensor of the step, by its name, among its arguments."""

    name: str


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        kind: one of `FUSED`; "quantize", to e4m3; "conv", "bn", "relu", "add", "max_pool",
            "avg_pool", "flatten" and "linear" as PyTorch has them; "call", any other function of
            `_calls.FUNCTIONS` or one that cannot be saved; "module", a module that is called.
        name: the layers of the model that it computes, joined by "+".
        inputs: numbers of the values that it reads.
        outputs: numbers of the values that it writes.
        tensors: its constants, frozen.
        options: plain values: geometry, activation.
        why: for a step that is not this package's own: why.
        target: of a "call": the function.
        module: of a "module": what is called. Of a step fresh from the tracer: its source.
        pattern: what was taken together, as `explain` prints it.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    target: Callable[..., Any] | str | None = None
    module: nn.Module | None = None
    pattern: str = ""

    @property
    def output(self) -> int:
        """The value that it writes, of a step that writes one."""
        return self.outputs[0]


@dataclass(frozen=True)
class Graph:
    """Steps in order.

    Attributes:
        steps: them.
        inputs: the values that the caller gives, one a positional argument.
        output: what the caller gets: `Ref`s within tuples, lists and dicts.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    output: Any

    def results(self) -> tuple[int, ...]:
        """The values that stand in the output."""
        return tuple(ref.value for ref in refs(self.output))

    def readers(self) -> dict[int, list[int]]:
        """Value -> the positions of the steps that read it."""
        found: dict[int, list[int]] = {}
        for position, step in enumerate(self.steps):
            for value in dict.fromkeys(step.inputs):
                found.setdefault(value, []).append(position)
        return found

    def makers(self) -> dict[int, int]:
        """Value -> the position of the step that writes it."""
        return {value: at for at, step in enumerate(self.steps) for value in step.outputs}

    def last_use(self) -> dict[int, int]:
        """Value -> the position of its last reader; the number of steps for what is given back.

        A value that nobody reads dies where it is made; an input that nobody reads, at -1.
        """
        last = dict.fromkeys(self.inputs, -1)
        for position, step in enumerate(self.steps):
            last.update(dict.fromkeys(step.outputs, position))
            last.update(dict.fromkeys(step.inputs, position))
        last.update(dict.fromkeys(self.results(), len(self.steps)))
        return last

    def sole_reader(self, value: int) -> int | None:
        """The position of the only step that reads a value, if nobody else sees it; else None."""
        if value in self.results():
            return None
        found = self.readers().get(value, [])
        return found[0] if len(found) == 1 else None

    def merged(self, merges: Sequence[tuple[Sequence[int], Step]]) -> Graph:
        """The graph with steps in the place of several each: at the last one's position.

        Args:
            merges: (positions of the steps that go, the step that comes).
        """
        comes = {max(positions): step for positions, step in merges}
        gone = {position for positions, _ in merges for position in positions}
        steps = [
            comes.get(position, old)
            for position, old in enumerate(self.steps)
            if position in comes or position not in gone
        ]
        return replace(self, steps=tuple(steps))


def refs(structure: Any) -> Iterator[Ref]:
    """The values in nested arguments, in order."""
    if isinstance(structure, Ref):
        yield structure
    elif isinstance(structure, dict):
        for part in structure.values():
            yield from refs(part)
    elif isinstance(structure, slice):
        yield from refs([structure.start, structure.stop, structure.step])
    elif isinstance(structure, list | tuple) and not isinstance(structure, Const):
        for part in structure:
            yield from refs(part)


def fill(structure: Any, put: Callable[[Ref | Const], Any]) -> Any:
    """Nested arguments with each value and constant replaced by what `put` gives for it."""
    if isinstance(structure, Ref | Const):
        return put(structure)
    if isinstance(structure, dict):
        filled = {name: fill(part, put) for name, part in structure.items()}
        return filled if type(structure) is dict else type(structure)(filled)
    if isinstance(structure, slice):
        return slice(*(fill(p, put) for p in (structure.start, structure.stop, structure.step)))
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(fill(part, put) for part in structure))
    if isinstance(structure, list | tuple):
        return type(structure)(fill(part, put) for part in structure)
    return structure
