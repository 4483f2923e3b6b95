"""`explain`: which implementation each layer of a model takes, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from . import backends
from .freeze import Engine


@dataclass(frozen=True)
class Row:
    """One convolution of the model.

    Attributes:
        layer: its name in the model.
        pattern: what was taken together, "conv+bn+add+relu" for example; "conv" if nothing was.
        implementation: who ran it; "modules" are PyTorch's own.
        why: why that one; refusals of others included.
    """

    layer: str
    pattern: str
    implementation: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """The table of a model's convolutions in the model's order; `str()` draws it.

    Attributes:
        rows: one a convolution.
        backend: the backend that was asked for.
        source: who asked.
    """

    rows: tuple[Row, ...]
    backend: str
    source: str

    @property
    def fused(self) -> int:
        """How many convolutions ran fused."""
        return sum(row.implementation != "modules" for row in self.rows)

    def counts(self) -> dict[str, int]:
        """Convolutions by implementation."""
        names = [row.implementation for row in self.rows]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return {
            "backend": self.backend,
            "source": self.source,
            "counts": self.counts(),
            "rows": [asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """The table, for rich."""
        table = Table("layer", "pattern", "implementation", "why", title="rf.explain")
        for row in self.rows:
            table.add_row(row.layer, row.pattern, row.implementation, row.why)
        return table

    def summary(self) -> str:
        """One line: how many convolutions ran by what."""
        counts = ", ".join(f"{count} by {name}" for name, count in self.counts().items())
        return f"{self.fused} of {len(self.rows)} convolutions fused ({counts}); {self._asked()}"

    def _asked(self) -> str:
        return f"backend {self.backend} ({self.source})"

    def __str__(self) -> str:
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get() + self.summary()


def _why(route: backends.Route) -> str:
    refused = "; ".join(f"not {name}: {reason}" for name, reason in route.refused)
    return f"{route.why}; {refused}" if refused else route.why


def explain(model: nn.Module, x: Any) -> Explanation:
    """Runs the model once, without gradients unless they are on, and tells what each layer took.

    Args:
        model: any module, fused or not, or what `rf.freeze` made of one.
        x: its input, a tensor or whatever the model takes; a tuple is passed as arguments.

    Returns:
        The table. Convolutions of modules that `rf.fuse` does not know stand in it too.

    Raises:
        TypeError: model is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, Engine):
        return _of_engine(model, x)
    names = {id(module): name for name, module in model.named_modules()}
    with backends.recording() as routes:
        model(*x) if isinstance(x, tuple) else model(x)
    wanted, source = backends.requested()
    rows = [
        Row(names.get(id(route.conv), "?"), route.pattern, route.implementation, _why(route))
        for route in routes
    ]
    # Hooks on convolutions would themselves keep them from fusing, so the others are found after.
    seen = {id(route.conv) for route in routes}
    left = [
        Row(name, "conv", "modules", "in no block or conv-BN pattern that fuse knows")
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd) and id(module) not in seen
    ]
    order = {name: index for index, name in enumerate(names.values())}
    rows = sorted(rows + left, key=lambda row: order.get(row.layer, len(order)))
    return Explanation(tuple(rows), wanted, source)


def _of_engine(engine: Engine, x: Any) -> Explanation:
    """An engine's convolutions, and the modules that it calls."""
    args = x if isinstance(x, tuple) else (x,)
    engine(*args)
    rows = tuple(
        Row(row.layer, row.pattern, row.implementation, row.why)
        for row in engine.report(*args).rows
        if "conv" in row.pattern or row.implementation == "modules"
    )
    return Explanation(rows, *backends.requested())
