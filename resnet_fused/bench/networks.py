"""The networks that can be named: this package's, torchvision's ("mobilenet_v2"), "timm:NAME"."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fused import models

SOURCES = ("", "timm", "rf")
"""What may stand before a colon; torchvision's names have nothing there."""


def names(source: str) -> list[str]:
    """The names of a source's networks, without its prefix.

    Args:
        source: of `SOURCES`.
    """
    if source == "timm":
        import timm

        return timm.list_models()
    if source == "rf":
        return models.list_models()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def canonical(name: str) -> str:
    """A benchmark's name of a network: "resnet50" for "rf:resnet50", which is the same one."""
    return name.removeprefix("rf:")


def is_own(name: str) -> bool:
    """Whether a network for photographs is one of `resnet_fused.models`, with or without "rf:".

    Of these the parts are known, and what a training step of theirs gives.
    """
    return canonical(name) in models.ARCHITECTURES


def build(name: str, **arguments: Any) -> nn.Module:
    """Makes a network without trained weights, from the global random state.

    Args:
        name: with its prefix, if any.
        arguments: of the source's own maker, such as num_classes.

    Raises:
        ValueError: unknown source or network, or arguments that this package does not take.
        ModuleNotFoundError: the source is not installed.
    """
    source, _, short = name.rpartition(":")
    if source not in SOURCES or short not in names(source):
        raise ValueError(
            f"name is {name!r}; accepted is a network of torchvision, timm:NAME, or one of "
            f"rf:NAME of {', '.join(names('rf'))}"
        )
    if source == "rf":
        return models.get_model(short, **arguments)
    if source == "timm":
        import timm

        return timm.create_model(short, pretrained=False, **arguments)
    import torchvision

    # GoogLeNet and Inception would warn about, and return, what inference has no use for.
    if short in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": True, "aux_logits": True}
    return torchvision.models.get_model(short, weights=None, **arguments)
