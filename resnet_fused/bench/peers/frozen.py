"""This package's engine: `rf.freeze`, for blocks and models in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers._base import Prepared, for_ops
from resnet_fused.freeze import freeze

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

_OPS = {**_calls.INFERENCE, "kernel": ()}
WARM_CALLS = 3


class Frozen:
    """The engine of a module. On a GPU the sampler's graph holds its steps, not its own graph."""

    name = "frozen"
    isolated = False
    limit_s = 180.0  # as for the fused module: kernels are compiled, and checked first

    def why_not(self, subject: Subject) -> str | None:
        """It is made of modules, for inference."""
        return for_ops(subject, _OPS)

    def prepare(self, work: Work) -> Prepared:
        """Freezes the module for the shape of its input and warms the engine."""
        assert work.module is not None
        engine = freeze(work.module, work.sets[0].x)
        call: Callable[[int], object] = _calls.over_module(work, engine)
        for _ in range(WARM_CALLS):
            call(0)
        names = [
            f"resnet_fused.freeze.{row.pattern} by {row.implementation}"
            for row in engine.report().rows
        ]
        device = work.subject.device
        return Prepared(call, lambda: [*dict.fromkeys(names), *_kernels.traced(call, device)])
