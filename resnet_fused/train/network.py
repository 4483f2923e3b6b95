"""The network of a run: named, with as many classes and channels as the data has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from resnet_fused.bench import networks
from resnet_fused.convert import fuse, unfuse
from resnet_fused.data.sources import Source
from resnet_fused.train.settings import Settings, TrainingError


class Normalised(nn.Module):
    """Bytes of images as a network wants them: mean subtracted, divided by the deviation.

    Args:
        source: whose mean and deviation.
        channels: that the network wants; one of grey images becomes so many.
        device: of the images.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: Source, channels: int, device: torch.device) -> None:
        super().__init__()
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (source.mean, source.std))
        scale, shift = 1 / (255 * std), -mean / std
        self.channels = channels
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, value.float().view(1, -1, 1, 1).to(device))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, channels, H, W], channels_last."""
        values = torch.addcmul(self.shift, images.float(), self.scale)
        if values.shape[1] != self.channels:
            values = values.expand(-1, self.channels, -1, -1)
        return values.contiguous(memory_format=torch.channels_last)


def channels_of(name: str, source: Source) -> int:
    """How many channels the network takes: the data's, where its maker can be told."""
    own = name.startswith(("rf:cifar_", "timm:"))
    return source.channels if own else 3


def build(settings: Settings, source: Source, device: torch.device) -> nn.Module:
    """Makes the network, with its first weights.

    Args:
        settings: of the run.
        source: its data.
        device: where to put it.

    Raises:
        ValueError: no such network.
        TrainingError: the weights to begin with do not fit.
    """
    name = settings.model
    arguments: dict[str, int] = {"num_classes": len(source.classes)}
    if name.startswith("rf:cifar_"):
        arguments["in_channels"] = source.channels
    if name.startswith("timm:"):
        arguments["in_chans"] = source.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = networks.build(name, **arguments)
    model = fuse(model) if settings.impl == "fused" else unfuse(model)
    return model.to(device).to(memory_format=torch.channels_last)


def begin_with(
    model: nn.Module, state: Mapping[str, Tensor], name: str, *, new_head: bool | None = None
) -> None:
    """Fills a network from weights of its architecture.

    Args:
        model: of `build`.
        state: a state_dict.
        name: of the file, for messages.
        new_head: leave out what belongs to the classifier; None where that cannot be asked for.

    Raises:
        TrainingError: weights of another architecture, or of other classes.
    """
    own = model.state_dict()
    head = _head(model)
    taken = {key: value for key, value in state.items() if not (new_head and key.startswith(head))}
    shapes = [key for key in own if key in taken and own[key].shape != taken[key].shape]
    if shapes and all(key.startswith(head) for key in shapes):
        hint = "" if new_head is None else "; --new-head begins with a new one"
        raise TrainingError(
            f"--weights: '{name}' has a classifier of {len(state[shapes[0]])} classes, the data "
            f"has {len(own[shapes[0]])}{hint}"
        )
    missing = [
        key for key in own
        if key not in taken
        and not key.endswith("num_batches_tracked")
        and not (new_head and key.startswith(head))
    ]  # fmt: skip
    foreign = [key for key in taken if key not in own]
    wrong = shapes or missing or foreign
    if wrong:
        raise TrainingError(
            f"--weights: '{name}' is of another network: {wrong[0]!r} does not fit "
            f"({len(shapes)} shapes differ, {len(missing)} tensors are missing, {len(foreign)} are "
            "unknown)"
        )
    model.load_state_dict(taken, strict=False)


def _head(model: nn.Module) -> str:
    """The name of the classifier, the last linear layer, with a dot behind it."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return f"{names[-1]}." if names else "\0"
