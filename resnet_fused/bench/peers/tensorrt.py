"""TensorRT by torch_tensorrt, which compiles a module into one engine."""

from __future__ import annotations

import copy
import importlib
from typing import TYPE_CHECKING, Any

import torch

from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_device,
    for_ops,
    installed,
)

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work


class TensorRt:
    """Inference of blocks and models, and of kernels as modules of one layer."""

    name = "tensorrt"
    isolated = True
    limit_s = 600.0

    def why_not(self, subject: Subject) -> str | None:
        """Inference on a GPU, with torch_tensorrt beside torch."""
        return first_reason(
            for_device(subject, "cuda"),
            for_ops(subject, _calls.INFERENCE),
            installed("torch_tensorrt", "torch-tensorrt"),
        )

    def prepare(self, work: Work) -> Prepared:
        """Builds the engine of a module, or one for each operand set of a kernel.

        Raises:
            NoPeerError: it cannot be built, or PyTorch would run a part of it.
        """
        try:
            with torch.inference_mode(False), torch.no_grad():
                engines = _engines(work)
            runs = [_on_operands(engines[i % len(engines)]) for i in range(len(work.sets))]
            call = _calls.over_variants(work, runs)
            call(0)
        except NoPeerError:
            raise
        except Exception as error:  # builders fail in many ways
            raise NoPeerError(f"torch_tensorrt refuses it: {first_line(error)}") from error
        return Prepared(call, lambda: _kernels.traced(call, work.subject.device))


def _engines(work: Work) -> list[Any]:
    compile_engine = importlib.import_module("torch_tensorrt").compile

    if work.module is None:
        modules = [_calls.Layer(work, i) for i in range(len(work.sets))]
    else:
        modules = [copy.deepcopy(work.module)]
    return [
        compile_engine(
            module, ir="dynamo", inputs=_calls.inputs_of(work.sets[i]), min_block_size=1,
            use_explicit_typing=True, require_full_compilation=True,
        )
        for i, module in enumerate(modules)
    ]  # fmt: skip


def _on_operands(engine: Any) -> Any:
    return lambda operands: engine(*_calls.inputs_of(operands))
