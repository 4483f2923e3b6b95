"""Eager PyTorch, one op after the other: the baseline, and what contiguous tensors cost."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers._base import Prepared

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work


class Eager:
    """PyTorch's own modules in one memory format.

    Args:
        name: "eager" or "eager_nchw".
        form: of activations and weights.
    """

    isolated = False
    limit_s = 60.0

    def __init__(self, name: str, form: torch.memory_format) -> None:
        self.name, self.form = name, form

    def why_not(self, subject: Subject) -> str | None:
        """It computes everything."""
        return None

    def prepare(self, work: Work) -> Prepared:
        """Kernels: conv2d, batch_norm, add and relu; blocks and models: the module itself."""
        if self.form is torch.contiguous_format:
            work = _calls.converted(work, lambda t: t.contiguous())
        if work.module is None:
            call = _calls.over_operands(work, _calls.kernel_function(work))
        else:
            module = copy.deepcopy(work.module).to(memory_format=self.form)
            call = _calls.over_module(work, module)
        return Prepared(call, lambda: _kernels.traced(call, work.subject.device))
