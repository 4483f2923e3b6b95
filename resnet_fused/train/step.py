"""One step of training: forward, loss, backward, optimizer, by PyTorch's own calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Optimizer

Loss = Callable[[Tensor, Tensor], Tensor]
Phase = Callable[[str], AbstractContextManager[object]]


class Taken(NamedTuple):
    """What a step computed.

    Attributes:
        losses: [accumulate], of each part of the batch, in the dtype of the loss.
        output: [N, ...] of the model.
    """

    losses: Tensor
    output: Tensor


class Step:
    """A step of training by PyTorch's own calls.

    Args:
        model: called with a part's images; its parameters' gradients are clipped together.
        loss: loss(output, targets) is the mean over a part's images, [].
        optimizer: of the model's parameters.
        scaler: of the loss; None does not scale it.
        autocast: dtype of autocast in forward; None: no autocast, whatever is around.
        accumulate: equal parts of a batch, one after the other, whose gradients are added.
        clip_norm: largest norm of all gradients together; None: any.
        together: makes the context of a part; told whether it is the last one.
        phase: makes the context of "forward", "backward", "optimizer".
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        scaler: GradScaler | None = None,
        *,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        together: Callable[[bool], AbstractContextManager[object]] = nullcontext,
        phase: Phase = nullcontext,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate!r}; accepted is an integer of at least 1")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.scaler = GradScaler(enabled=False) if scaler is None else scaler
        self.autocast, self.accumulate, self.clip_norm = autocast, accumulate, clip_norm
        self._together, self._phase = together, phase

    def __call__(self, images: Tensor, targets: Tensor) -> Taken:
        """Takes a step.

        Args:
            images: [N, ...], N a multiple of `accumulate`.
            targets: [N, ...].

        Raises:
            ValueError: the batch cannot be divided.
        """
        parts = self.accumulate
        if len(images) % parts or len(images) != len(targets):
            raise ValueError(
                f"images and targets: {len(images)} and {len(targets)}; accepted are as many of "
                f"each, a multiple of accumulate={parts}"
            )
        start_momentum(self.optimizer)
        return self._take(images, targets)

    def _take(self, images: Tensor, targets: Tensor) -> Taken:
        return self._run(images, targets, self._phase)

    def _run(self, images: Tensor, targets: Tensor, phase: Phase) -> Taken:
        parts, losses, outputs = self.accumulate, [], []
        self.optimizer.zero_grad(set_to_none=True)
        pairs = zip(images.chunk(parts), targets.chunk(parts), strict=True)
        for part, (some, wanted) in enumerate(pairs):
            with self._together(part == parts - 1):
                with phase("forward"):
                    enabled = self.autocast is not None
                    with torch.autocast(images.device.type, self.autocast, enabled=enabled):
                        output = self.model(some)
                    loss = self.loss(output, wanted)
                with phase("backward"):
                    self.scaler.scale(loss / parts).backward()
            losses.append(loss.detach())
            outputs.append(output.detach())
        with phase("optimizer"):
            if self.clip_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return Taken(torch.stack(losses), outputs[0] if parts == 1 else torch.cat(outputs))


def start_momentum(optimizer: Optimizer) -> None:
    """Gives PyTorch's fused SGD momentum of zero to begin with, where it has none yet.

    It allocates momentum in the first step, and leaves it unset if that step is skipped because a
    gradient is Inf or NaN, as the first ones in float16 often are; the second step reads it.
    """
    if type(optimizer) is not SGD:
        return
    for group in optimizer.param_groups:
        # With dampening the first step adds all of the gradient, the others a share of it.
        if not (group["fused"] and group["momentum"]) or group["dampening"]:
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
