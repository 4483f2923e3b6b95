"""This package: `rf.ops.*` for a kernel, `rf.fuse` for blocks and models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import _extension, backends
from resnet_fused.bench.kernels import KINDS
from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_reason,
    for_device,
    for_ops,
    installed,
)
from resnet_fused.convert import fuse, unfuse
from resnet_fused.ops._library import overload

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

WARM_CALLS = 3  # folded weights are packed when a shape comes the second time


class Fused:
    """The package itself, by its own choice of implementation or a forced one.

    Args:
        name: "fused", or the backend to force: "triton" or "cuda".
    """

    isolated = False
    limit_s = 180.0  # Triton compiles, and a GPU that no record knows is checked first

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = None if name == "fused" else name

    def why_not(self, subject: Subject) -> str | None:
        """A forced backend needs a GPU and a kernel of the op."""
        if self.backend is None:
            return None
        return first_reason(for_device(subject, "cuda"), self._absent(), self._unknown(subject))

    def _absent(self) -> str | None:
        if self.backend == "triton":
            return installed("triton", "triton")
        if _extension.has_cuda_kernels():
            return None
        return _extension.why_not() or "the extension was built without CUDA kernels"

    def _unknown(self, subject: Subject) -> str | None:
        assert self.backend is not None
        if subject.level != "kernel":
            return None
        known = {entry.name for entry in backends.implementations(subject.op)}
        return None if self.backend in known else backends.absent(subject.op, self.backend)

    def _asked(self) -> contextlib.AbstractContextManager[Any]:
        if self.backend is None:
            return contextlib.nullcontext()
        return backends.backend(self.backend)

    def prepare(self, work: Work) -> Prepared:
        """Builds the call and warms every cache.

        Raises:
            NoPeerError: the forced backend does not serve this subject's tensors.
        """
        if work.module is None:
            inner = _calls.over_operands(work, KINDS[work.subject.op].ours(work.case))
            warm = range(len(work.sets))  # each set has weights of its own
        else:
            inner = _calls.over_module(work, fuse(unfuse(work.module)))
            # A training step packs nothing, and its first call, which names the routes, has
            # compiled what there is to compile: more of them would only cost their time.
            warm = range(0 if work.subject.training else 1)

        def forced(i: int) -> Any:
            with self._asked():
                return inner(i)

        call = inner if self.backend is None else forced
        routes = _routes(call)
        self._check(work.subject, routes)
        for i in warm:
            for _ in range(WARM_CALLS):
                call(i)
        device = work.subject.device
        return Prepared(call, lambda: [*routes, *_kernels.traced(call, device)])

    def _check(self, subject: Subject, routes: list[str]) -> None:
        """Timing a fallback under a backend's name would be a lie."""
        if self.backend is None or any(name.endswith(f".{self.backend}") for name in routes):
            return
        why = f"it ran {', '.join(routes) or 'no op of the package'}"
        if subject.level == "kernel":
            with self._asked():
                why = f"{why}; {backends.choose(subject.call).why}"
        raise NoPeerError(f"{self.backend} does not serve it: {why}")


class Parts:
    """An op that stands for several layers as the ops that it is put together of: its rival.

    Each of those is served by what is fastest for it.
    """

    name = "parts"
    isolated = False
    limit_s = 180.0  # as above

    def why_not(self, subject: Subject) -> str | None:
        """Most ops are not put together of others."""
        known = tuple(op for op, kind in KINDS.items() if kind.arguments is not None)
        return for_ops(subject, {"kernel": known})

    def prepare(self, work: Work) -> Prepared:
        """Builds the call and warms every cache."""
        arguments = KINDS[work.subject.op].arguments
        assert arguments is not None
        given, run = arguments(work.case), overload(work.subject.op, "parts")
        whole = KINDS[work.subject.op].whole

        call = _calls.over_operands(work, lambda o: whole(run(*given(o))))
        routes = _routes(call)
        for i in range(len(work.sets)):
            for _ in range(WARM_CALLS):
                call(i)
        device = work.subject.device
        return Prepared(call, lambda: [*routes, *_kernels.traced(call, device)])


class _Ops(TorchDispatchMode):
    """Notes the overloads of this package that run: their names say who implements them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if name.startswith("resnet_fused."):
            self.names[name] = None
        return func(*args, **(kwargs or {}))


def _routes(call: Callable[[int], Any]) -> list[str]:
    """Who computed what in one call: "resnet_fused.conv_bn_act.cpu", each once."""
    with backends.recording() as routes, _Ops() as seen:
        call(0)
    names = {
        f"resnet_fused.{route.op}.{route.implementation}"
        if route.op != "-"
        else f"modules: {route.pattern} ({route.why})": None
        for route in routes
    }
    return [*names, *(name for name in seen.names if name not in names)]
