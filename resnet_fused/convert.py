"""`fuse` and `unfuse`: a whole model at once, in a new tree or in place.

A fused class differs from the plain one in its methods alone. Conversion therefore changes a
module's class and nothing else: children, parameters, buffers, hooks and attributes are the same
objects. In a new tree each container on the way to a changed module is a shallow copy; everything
else, the Conv2d and BatchNorm2d modules above all, is shared with the old tree.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from .nn import _blocks, blocks

logger = logging.getLogger("resnet_fused")
M = TypeVar("M", bound=nn.Module)

# Top-level package of a module's class -> where its fused classes are.
_ADAPTERS = {
    "torchvision": "resnet_fused.nn._torchvision",
    "timm": "resnet_fused.nn._timm",
}
_OWN = (
    blocks.BasicBlock, blocks.Bottleneck, blocks.ConvBNAct, blocks.ResidualBlock, blocks.Stem,
    _blocks.Sequential,
)  # fmt: skip


@functools.cache
def _fused_classes(package: str) -> dict[type[nn.Module], type[nn.Module]]:
    """Plain class -> fused class, of one package."""
    if package in _ADAPTERS:
        classes = importlib.import_module(_ADAPTERS[package]).CLASSES
    elif package == "resnet_fused":
        from . import models

        classes = (*_OWN, *models.CLASSES)
    elif package == "torch":
        classes = (_blocks.Sequential,)
    else:
        classes = ()
    return {cls.plain_class: cls for cls in classes}


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class to give a module so that it runs fused, or None to leave it alone."""
    kind = type(module)
    fused = _fused_classes(kind.__module__.partition(".")[0]).get(kind)
    if fused is None or "forward" in module.__dict__:
        return None
    if issubclass(fused, _blocks.FusedSequential) and not _has_layer(module):
        return None
    if issubclass(fused, _blocks.FusedBlock):
        names = [name for step in fused.steps_of(module) for name in step]
        missing = [name for name in (*names, "downsample") if not hasattr(module, name)]
        if missing:
            logger.info("%s is left alone: it lacks %s", kind.__name__, ", ".join(missing))
            return None
        if any(
            getattr(module, name, None) is not None and not _inert(getattr(module, name))
            for name in fused.extras
        ):
            return None
    return fused


def _inert(extra: nn.Module) -> bool:
    """Whether an extra of a block is nothing now, or nothing in inference."""
    return type(extra) is nn.Identity or type(extra).__name__ in ("DropPath", "DropBlock2d")


def _has_layer(container: nn.Module) -> bool:
    """Whether a container holds a block, or a convolution with a known BatchNorm behind it."""
    children = list(container.children())
    return any(
        type(first) is nn.Conv2d and _blocks.is_norm(second)
        for first, second in itertools.pairwise(children)
    ) or any(is_block(child) for child in children)


def is_block(module: nn.Module) -> bool:
    """Whether a module is a residual block, fused or about to be."""
    kind = type(module)
    fused = _fused_classes(kind.__module__.partition(".")[0]).get(kind)
    return isinstance(module, _blocks.FusedBlock) or (
        fused is not None and issubclass(fused, _blocks.FusedBlock)
    )


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    kind = type(module)
    return kind.plain_class if issubclass(kind, _blocks.Fused) else None


def _swap_in_place(
    model: nn.Module, new_class: Callable[[nn.Module], type[nn.Module] | None]
) -> int:
    count = 0
    for module in model.modules():
        kind = new_class(module)
        if kind is not None:
            module.__class__ = kind
            count += 1
    return count


def _swap_in_copy(
    module: nn.Module,
    new_class: Callable[[nn.Module], type[nn.Module] | None],
    done: dict[int, nn.Module],
) -> nn.Module:
    """The module with its class swapped, or a container that holds such ones, or itself."""
    if id(module) in done:
        return done[id(module)]
    kind = new_class(module)
    children = {
        name: child if child is None else _swap_in_copy(child, new_class, done)
        for name, child in module._modules.items()
    }
    same = all(children[name] is child for name, child in module._modules.items())
    result = module
    if kind is not None or not same:
        result = object.__new__(kind or type(module))
        # The very dictionaries of parameters, buffers and hooks: both trees see a change in either.
        result.__dict__.update(module.__dict__)
        result.__dict__["_modules"] = children
    done[id(module)] = result
    return result


def _convert(
    name: str,
    model: M,
    inplace: bool,
    new_class: Callable[[nn.Module], type[nn.Module] | None],
) -> M:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
    if inplace:
        _swap_in_place(model, new_class)
        return model
    return _swap_in_copy(model, new_class, {})  # type: ignore[return-value]


def fuse(model: M, *, inplace: bool = False) -> M:
    """Makes a model's residual blocks and conv-BN(-ReLU) layers run fused.

    It finds them wherever they stand: torchvision's and timm's ResNets, the backbones of
    torchvision's detection and segmentation models, `nn.Sequential`s that hold a Conv2d with a
    BatchNorm2d behind it. What it does not know it leaves alone; `rf.explain` shows which is which.
    The choice is made anew in each forward, so training mode, hooks, parametrizations and tracing
    are respected.

    Args:
        model: any module. It stays usable.
        inplace: change the classes of the model's own modules instead of making a new tree.

    Returns:
        A tree that shares every parameter, buffer and leaf module with `model`, with the same
        state_dict keys; `model` itself if `inplace`, or where there is nothing to fuse. Training
        flags of the containers are each tree's own.

    Raises:
        TypeError: model is no `nn.Module`.
    """
    fused = _convert("fuse", model, inplace, _fused_class)
    if not any(isinstance(module, _blocks.Fused) for module in fused.modules()):
        logger.warning("fuse: %s holds no block or conv-BN that is known", type(model).__name__)
    return fused


def unfuse(model: M, *, inplace: bool = False) -> M:
    """Gives a fused model's modules their plain classes back.

    Args:
        model: any module. It stays usable.
        inplace: change the model itself instead of making a new tree.

    Returns:
        A tree of plain modules that shares every parameter, buffer and leaf module with `model`.

    Raises:
        TypeError: model is no `nn.Module`.
    """
    return _convert("unfuse", model, inplace, _plain_class)
