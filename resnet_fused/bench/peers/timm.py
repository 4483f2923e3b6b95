"""timm's own network of the same name, with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from resnet_fused.bench.peers import _calls, _kernels
from resnet_fused.bench.peers._base import (
    NoPeerError,
    Prepared,
    first_line,
    first_reason,
    for_ops,
    installed,
)
from resnet_fused.bench.subject import MODEL_OPS

if TYPE_CHECKING:
    from resnet_fused.bench.subject import Subject
    from resnet_fused.bench.work import Work


class Timm:
    """`timm.create_model`, eager, channels_last."""

    name = "timm"
    isolated = False
    limit_s = 60.0

    def why_not(self, subject: Subject) -> str | None:
        """It has models, no parts of them."""
        own = "the subject is timm's own" if subject.name.startswith("timm:") else None
        return first_reason(for_ops(subject, {"model": MODEL_OPS}), own, installed("timm", "timm"))

    def prepare(self, work: Work) -> Prepared:
        """Makes timm's model and fills it with the subject's weights.

        Raises:
            NoPeerError: timm has no model of the name, or one with other parameters.
        """
        import timm

        assert work.module is not None
        name = work.subject.name
        if not timm.is_model(name):
            raise NoPeerError(f"timm {timm.__version__} has no model {name!r}")
        module = same_weights(timm.create_model(name, pretrained=False), work.module)
        call = _calls.over_module(work, module)
        return Prepared(call, lambda: _kernels.traced(call, work.subject.device))


def same_weights(module: nn.Module, source: Any) -> nn.Module:
    """Gives a module another one's weights, statistics, mode, device, dtype and wish for gradients.

    Raises:
        NoPeerError: their parameters differ in name or shape.
    """
    try:
        module.load_state_dict(source.state_dict())
    except RuntimeError as error:
        raise NoPeerError(f"its parameters are other ones: {first_line(error)}") from error
    some = next(source.parameters())
    module.to(some.device, some.dtype).to(memory_format=torch.channels_last)
    wishes = {name: p.requires_grad for name, p in source.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(wishes[name])
    return module.train(source.training)
