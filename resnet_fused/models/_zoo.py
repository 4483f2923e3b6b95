"""One table of architectures, one factory per row.

For the sources see `resnet` and `cifar`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ..nn import BasicBlock, Bottleneck
from . import cifar
from .cifar import CifarResNet
from .resnet import Block, ResNet


@dataclass(frozen=True)
class Architecture:
    """One row of the table of networks.

    Attributes:
        block: the residual block.
        layers: blocks per stage.
        weights: name of torchvision's enum of trained weights, or None.
        source: where the architecture is defined.
        groups: groups of the 3x3 convolutions, None where the caller may choose.
        width_per_group: channels of a group at 64 planes, None where the caller may choose.
        shortcut: option of [He15] section 3.3, None where the caller may choose.
    """

    block: Block
    layers: tuple[int, int, int, int]
    weights: str | None
    source: str
    groups: int | None = None
    width_per_group: int | None = None
    shortcut: str | None = None


_WIDE = "[Zagoruyko16]: bottlenecks of twice the inner width, the same outer one; v1.5 stride"

ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(
        BasicBlock, (2, 2, 2, 2), "ResNet18_Weights", "[He15] Table 1, 18-layer"
    ),
    "resnet34": Architecture(
        BasicBlock, (3, 4, 6, 3), "ResNet34_Weights", "[He15] Table 1, 34-layer"
    ),
    "resnet50": Architecture(
        Bottleneck, (3, 4, 6, 3), "ResNet50_Weights", "[He15] Table 1, 50-layer; v1.5 stride"
    ),
    "resnet101": Architecture(
        Bottleneck, (3, 4, 23, 3), "ResNet101_Weights", "[He15] Table 1, 101-layer; v1.5 stride"
    ),
    "resnet152": Architecture(
        Bottleneck, (3, 8, 36, 3), "ResNet152_Weights", "[He15] Table 1, 152-layer; v1.5 stride"
    ),
    "resnext50_32x4d": Architecture(
        Bottleneck, (3, 4, 6, 3), "ResNeXt50_32X4D_Weights", "[Xie16] Table 1; v1.5 stride", 32, 4
    ),
    "resnext101_32x8d": Architecture(
        Bottleneck,
        (3, 4, 23, 3),
        "ResNeXt101_32X8D_Weights",
        "[Xie16] section 3.1, 32 groups of 8; v1.5 stride",
        32,
        8,
    ),
    "resnext101_64x4d": Architecture(
        Bottleneck, (3, 4, 23, 3), "ResNeXt101_64X4D_Weights", "[Xie16] Table 4; v1.5 stride", 64, 4
    ),
    "wide_resnet50_2": Architecture(
        Bottleneck, (3, 4, 6, 3), "Wide_ResNet50_2_Weights", _WIDE, None, 128
    ),
    "wide_resnet101_2": Architecture(
        Bottleneck, (3, 4, 23, 3), "Wide_ResNet101_2_Weights", _WIDE, None, 128
    ),
    "plain18": Architecture(
        BasicBlock, (2, 2, 2, 2), None, "[He15] section 4.1, without shortcuts", shortcut="none"
    ),
    "plain34": Architecture(
        BasicBlock, (3, 4, 6, 3), None, "[He15] figure 3, middle, without shortcuts",
        shortcut="none",
    ),
}  # fmt: skip


class Factory(Protocol):
    """What every factory of this module accepts; the arguments are torchvision's."""

    __name__: str

    def __call__(
        self,
        *,
        weights: Any = None,
        progress: bool = True,
        num_classes: int | None = None,
        zero_init_residual: bool = False,
        groups: int | None = None,
        width_per_group: int | None = None,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        version: str = "v1.5",
        shortcut: str | None = None,
    ) -> ResNet:
        """Build the network."""
        ...


_FACTORY_DOC = """Build {name}: {source}.

Args:
    weights: {weights}
    progress: show the download's progress on stderr.
    num_classes: outputs of the classifier; None takes that of the weights, else 1000.
    zero_init_residual, groups, width_per_group, replace_stride_with_dilation, norm_layer: see
        :class:`PlainResNet`; None is this network's own value.

Returns:
    A :class:`ResNet` in training mode, as torchvision's factory returns.

Raises:
    ValueError: unknown weights, or a num_classes, groups or width_per_group that contradicts the
        weights or the network.
    TypeError: weights of another network, or something that is no weights at all.
    ImportError: weights asked for and torchvision is missing.
"""


_WEIGHTS_DOC = """trained weights, as a member of torchvision's ``{weights}``, its name
        ("DEFAULT", "IMAGENET1K_V1", ...), or None for random ones. torchvision is imported, and
        the file downloaded to its cache, only when they are asked for."""


def _factory(name: str) -> Factory:
    """The factory for one row of the table, named and documented after it."""
    row = ARCHITECTURES[name]

    def build(
        *,
        weights: Any = None,
        progress: bool = True,
        num_classes: int | None = None,
        zero_init_residual: bool = False,
        groups: int | None = None,
        width_per_group: int | None = None,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        version: str = "v1.5",
        shortcut: str | None = None,
    ) -> ResNet:
        trained = None if weights is None else _resolve_weights(name, weights)
        option = _settled(name, "shortcut", shortcut, row.shortcut, "B")
        if trained is not None and (version, option) != ("v1.5", "B"):
            raise ValueError(
                f"weights: torchvision's are of version 'v1.5' with shortcut 'B', not of "
                f"version {version!r} with shortcut {option!r}"
            )
        classes = None if trained is None else len(trained.meta["categories"])
        model = ResNet(
            row.block,
            row.layers,
            num_classes=_settled(name, "num_classes", num_classes, classes, 1000),
            zero_init_residual=zero_init_residual,
            groups=_settled(name, "groups", groups, row.groups, 1),
            width_per_group=_settled(
                name, "width_per_group", width_per_group, row.width_per_group, 64
            ),
            replace_stride_with_dilation=replace_stride_with_dilation,
            norm_layer=norm_layer,
            version=version,
            shortcut=option,
        )
        if trained is not None:
            model.load_state_dict(trained.get_state_dict(progress=progress, check_hash=True))
        return model

    build.__name__ = build.__qualname__ = name
    weights_doc = "None; nobody has published any."
    if row.weights is not None:
        weights_doc = _WEIGHTS_DOC.format(weights=row.weights)
    build.__doc__ = _FACTORY_DOC.format(name=name, source=row.source, weights=weights_doc)
    return build


def _settled(name: str, argument: str, given: Any, fixed: Any, default: Any) -> Any:
    """The value of an argument that the network or its weights may fix."""
    if given is not None and fixed is not None and given != fixed:
        why = "these weights have" if argument == "num_classes" else "the network's own is"
        raise ValueError(f"{argument}: {name} got {given!r}, {why} {fixed}")
    if given is not None:
        return given
    return default if fixed is None else fixed


def get_model_weights(name: str) -> Any:
    """Look up torchvision's enum of trained weights for one network (``ResNet50_Weights``).

    Raises:
        ValueError: unknown network, or one that has no published weights.
        ImportError: torchvision is missing.
    """
    if name not in list_models():
        raise ValueError(f"name: got {name!r}, accepted are {', '.join(list_models())}")
    enum = ARCHITECTURES[name].weights if name in ARCHITECTURES else None
    if enum is None:
        raise ValueError(f"weights: nobody has published any of {name}; accepted is None")
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(
            f"weights: {name} takes its trained weights from torchvision, which cannot be "
            f"imported ({error}); install it with: pip install torchvision"
        ) from error
    return getattr(models, enum)


def _resolve_weights(name: str, weights: object) -> Any:
    """The member of torchvision's enum that ``weights`` stands for."""
    enum = get_model_weights(name)
    if isinstance(weights, enum):
        return weights
    accepted = ", ".join(repr(member) for member in enum.__members__)
    if isinstance(weights, str):
        member = enum.__members__.get(weights.removeprefix(f"{enum.__name__}."))
        if member is not None:
            return member
        raise ValueError(f"weights: {name} got {weights!r}, accepted are None, {accepted}")
    raise TypeError(
        f"weights: {name} got {weights!r}, accepted are None, a member of {enum.__name__}, "
        f"or one of the names {accepted}"
    )


def list_models() -> list[str]:
    """The names of all networks: for photographs in the order of the table, then for small images.

    Those in `ARCHITECTURES` take photographs.
    """
    return [*ARCHITECTURES, *cifar.DEPTHS]


def get_model(name: str, **arguments: Any) -> ResNet | CifarResNet:
    """Build a network by name; the arguments are its factory's.

    Raises:
        ValueError: unknown name, or an argument that the factory refuses.
    """
    if name in cifar.DEPTHS:
        return getattr(cifar, name)(**arguments)
    if name not in ARCHITECTURES:
        raise ValueError(f"name: got {name!r}, accepted are {', '.join(list_models())}")
    factory: Factory = globals()[name]
    return factory(**arguments)


resnet18 = _factory("resnet18")
resnet34 = _factory("resnet34")
resnet50 = _factory("resnet50")
resnet101 = _factory("resnet101")
resnet152 = _factory("resnet152")
resnext50_32x4d = _factory("resnext50_32x4d")
resnext101_32x8d = _factory("resnext101_32x8d")
resnext101_64x4d = _factory("resnext101_64x4d")
wide_resnet50_2 = _factory("wide_resnet50_2")
wide_resnet101_2 = _factory("wide_resnet101_2")
plain18 = _factory("plain18")
plain34 = _factory("plain34")
