"""torch.compile: Inductor as it comes, with max-autotune, and with frozen weights."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_ops,
    installed,
)

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work

# Generated kernels in Inductor's output: "cpp_fused_relu_0 = async_compile.cpp_pybinding(...".
_GENERATED = re.compile(r"^(\w+) = async_compile\.", re.MULTILINE)
_WARM_CALLS = 2
_COMPILERS = ("g++", "clang++", "cl")


class Inductor:
    """A module or kernel through `torch.compile`.

    Args:
        name: of the variant.
        mode: of `torch.compile`. Autotuning is asked for without its CUDA graphs: every variant is
            replayed from a graph that the sampler captures, and a graph cannot hold another.
        freezing: weights become constants, which Inductor folds and packs; inference alone.
        limit_s: seconds for the compilation.
    """

    isolated = True

    def __init__(self, name: str, limit_s: float, mode: str = "default", freezing: bool = False):
        self.name, self.limit_s = name, limit_s
        self.mode, self.freezing = mode, freezing

    def why_not(self, subject: Subject) -> str | None:
        """A GPU needs Triton, the CPU a C++ compiler; gradients know no frozen weights."""
        ops = _calls.INFERENCE if self.freezing else _calls.EVERYTHING
        lacking = installed("triton", "triton") if subject.device == "cuda" else _no_compiler()
        frozen = f"frozen weights are for inference: {self.name}"
        unknown = for_ops(subject, ops)
        return first_reason(unknown and f"{frozen} {unknown}", lacking)

    def prepare(self, work: Work) -> Prepared:
        """Compiles by running the first operand set.

        Raises:
            NoPeerError: the compilation fails; in torch's own first line.
        """
        from torch._inductor.utils import run_and_get_code

        torch._dynamo.reset()
        try:
            with self._settings(work):
                call = self._call(work)
                codes: list[str] = []
                for i in range(len(work.sets) if self._per_set(work) else 1):
                    codes += run_and_get_code(call, i)[1]
                for _ in range(_WARM_CALLS):
                    call(0)
        except Exception as error:  # a compiler may fail in any way
            raise NoPeerError(f"torch.compile failed: {first_line(error)}") from error
        generated = list(dict.fromkeys(name for code in codes for name in _GENERATED.findall(code)))

        def kernels() -> list[str]:
            seen = _kernels.traced(call, work.subject.device)
            return [*seen, *(name for name in generated if name not in seen)]

        return Prepared(call, kernels, torch._dynamo.reset)

    def _per_set(self, work: Work) -> bool:
        return self.freezing and work.module is None

    @contextlib.contextmanager
    def _settings(self, work: Work) -> Iterator[None]:
        from torch._inductor import config

        # Modules with frozen weights share one code object, which is compiled once for each.
        most = max(8, 2 * len(work.sets))
        with config.patch(freezing=self.freezing), torch._dynamo.config.patch(recompile_limit=most):
            yield

    def _call(self, work: Work) -> Callable[[int], Any]:
        mode = None if self.mode == "default" else self.mode
        if work.module is not None:
            # A copy: freezing gives parameters away.
            module = torch.compile(copy.deepcopy(work.module), mode=mode, dynamic=False)
            return _calls.over_module(work, module)
        if not self.freezing:
            run = torch.compile(_calls.kernel_function(work), mode=mode, dynamic=False)
            return _calls.over_operands(work, run)
        layers = [
            torch.compile(_calls.Layer(work, i), mode=mode, dynamic=False)
            for i in range(len(work.sets))
        ]
        return _calls.over_variants(work, [_on_operands(layer) for layer in layers])


def _on_operands(layer: Callable[..., Any]) -> Callable[[Any], Any]:
    return lambda o: layer(*_calls.inputs_of(o))


def _no_compiler() -> str | None:
    """Inductor compiles C++ for the CPU."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else _COMPILERS
    if any(shutil.which(name) for name in names):
        return None
    return f"no C++ compiler for the CPU's code (looked for {', '.join(names)})"
