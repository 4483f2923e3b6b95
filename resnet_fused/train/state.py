"""Everything of a run that changes: network, optimizer, average, scaler, counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_fused.train import checkpoint, optimizers
from resnet_fused.train.processes import Processes, spread
from resnet_fused.train.settings import Settings, TrainingError

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FULL = StateDictOptions(full_state_dict=True)


class State:
    """A run's state, and how it goes into a checkpoint and out of one.

    Args:
        model: of `network.build`.
        settings: of the run.
        processes: that run it.

    Attributes:
        model: the network itself.
        spread: the same as it is called in training.
        ema: the average of its weights, or None.
        optimizer: of its parameters.
        plateau: of a schedule that asks for tests, or None.
        scaler: of the loss; it does nothing but in float16.
        autocast: dtype of autocast, or None.
        step: steps that were taken.
    """

    def __init__(self, model: nn.Module, settings: Settings, processes: Processes) -> None:
        recipe = settings.recipe
        self.autocast = DTYPES[recipe.precision]
        joined = recipe.sync_batchnorm and processes.world > 1
        self.sharded = settings.parallel == "fsdp" and processes.world > 1
        if joined and self.sharded:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.ema = (
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
            if recipe.ema is not None
            else None
        )
        self.model = model
        self.spread = spread(model, processes, settings.parallel, self.autocast)
        if joined and not self.sharded:
            # DistributedDataParallel would refuse such modules on the CPU, where PyTorch's do not
            # run; the fused layers do. The new modules hold the same parameters and buffers.
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.optimizer: Optimizer = optimizers.build(model, recipe.optimizer, fused=recipe.capture)
        self.plateau = (
            optimizers.Plateau(recipe.schedule) if recipe.schedule.name == "plateau" else None
        )
        self.scaler = torch.amp.GradScaler(
            processes.device.type, enabled=recipe.precision == "float16"
        )
        self.step = 0

    @property
    def tested(self) -> nn.Module:
        """The network that is tested, and whose weights are the result."""
        return self.model if self.ema is None else self.ema.module

    def weights(self) -> dict[str, Tensor]:
        """The state_dict of `tested`; with "fsdp" all processes have to ask."""
        if self.sharded:
            return dict(get_model_state_dict(self.model, options=_WHOLE))
        return dict(self.tested.state_dict())

    def take_down(self, counters: Mapping[str, Any]) -> checkpoint.Checkpoint:
        """What a checkpoint holds; with "fsdp" all processes have to ask.

        Args:
            counters: of the loop: plain values and tensors.
        """
        if self.sharded:
            model = dict(get_model_state_dict(self.model, options=_WHOLE))
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
        else:
            model, optimizer = dict(self.model.state_dict()), self.optimizer.state_dict()
        state: dict[str, Any] = {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "counters": dict(counters),
        }
        if self.plateau is not None:
            state["plateau"] = self.plateau.state_dict()
        average = None
        if self.ema is not None:
            average = dict(self.ema.module.state_dict())
            state["averaged"] = int(self.ema.n_averaged)
        return checkpoint.Checkpoint(self.step, model, average, state)

    def restore(self, found: checkpoint.Checkpoint) -> dict[str, Any]:
        """Takes over what a checkpoint holds.

        Returns:
            The counters.

        Raises:
            TrainingError: it is of another network.
        """
        state = dict(found.state)
        try:
            if self.sharded:
                set_model_state_dict(self.model, dict(found.model), options=_FULL)
                set_optimizer_state_dict(
                    self.model, self.optimizer, state["optimizer"], options=_FULL
                )
            else:
                self.model.load_state_dict(found.model)
                self.optimizer.load_state_dict(state["optimizer"])
                self._lay_out()
            if self.ema is not None and found.ema is not None:
                self.ema.module.load_state_dict(found.ema)
                self.ema.n_averaged.fill_(state["averaged"])
            if self.plateau is not None:
                self.plateau.load_state_dict(state["plateau"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise TrainingError(
                f"checkpoint: '{found.path}' is of another network or optimizer "
                f"({str(error).partition(chr(10))[0]})"
            ) from error
        self.step = found.step
        return state["counters"]

    def _lay_out(self) -> None:
        """A file has no strides: the optimizer's tensors lie as their parameters do again."""
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
