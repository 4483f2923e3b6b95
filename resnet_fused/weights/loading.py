"""Filling a model with weights: everything is compared first, then all of it is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from resnet_fused.weights.files import read
from resnet_fused.weights.released import Architecture, Preprocessing, Weights, WeightsError

_SHOWN = 8  # names of one kind that a message has room for; the exception has them all
_COUNTER = "num_batches_tracked"  # files older than 2018 have none, and torch accepts that


class MismatchError(WeightsError):
    """Weights of another network.

    Attributes:
        missing: tensors of the model that the file lacks.
        unexpected: tensors of the file that the model lacks.
        misshapen: name -> what the file has, and what the model wants.
    """

    def __init__(
        self, source: str, missing: list[str], unexpected: list[str], misshapen: dict[str, str]
    ) -> None:
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen
        shapes = [f"{name} ({difference})" for name, difference in misshapen.items()]
        self.details = "; ".join(
            f"{len(names)} {what}: {_listed(names)}"
            for names, what in (
                (missing, "tensors are missing"),
                (unexpected, "are not in the model"),
                (shapes, "have another shape"),
            )
            if names
        )
        super().__init__(f"'{source}' is of another network than the model: {self.details}")


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        format: of `FORMATS`.
        preprocessing: of images for this model; None where the file does not say.
        version: "v1" or "v1.5", the place of the strides; None where the file does not say.
        missing: tensors of the model that keep what they had (`strict=False`).
        unused: tensors of the file that the model has no place for (`strict=False`).
        adapted: what was changed in the model besides its tensors (`adapt=True`).
        differs: what is left of the model that differs from the network of the weights.
    """

    format: str
    preprocessing: Preprocessing | None
    version: str | None
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    adapted: tuple[str, ...]
    differs: tuple[str, ...]


def load(
    model: nn.Module,
    weights: str | os.PathLike[str] | Weights,
    format: str = "auto",
    *,
    strict: bool = True,
    adapt: bool = False,
) -> Loaded:
    """Fills a model from a file of weights, completely or not at all.

    Args:
        model: fused or not, anywhere, of any floating-point dtype and layout; its tensors' names
            are torchvision's.
        weights: a file, or what `read` returned.
        format: of `FORMATS`, for a file.
        strict: the model and the file name the same tensors; counters of batches may be missing.
            False: those of both are loaded, and the rest is reported.
        adapt: set the model's strides, eps and first pooling to those that the weights were trained
            with, where the format says. Parameters stay the same objects.

    Returns:
        What was loaded, and how images have to be prepared.

    Raises:
        MismatchError: weights of another network; every tensor that does not fit is listed.
        WeightsError: a file that `read` refuses, or strides or eps that differ without `adapt`.
        ValueError: a model on the meta device.

    Example:
        >>> net = rf.models.resnet50()
        >>> rf.weights.load(net, "ResNet-50-model.caffemodel", adapt=True).preprocessing.mean
        (0.4829..., 0.4545..., 0.4041...)
    """
    found = weights if isinstance(weights, Weights) else read(weights, format)
    own = model.state_dict()
    bare = [name for name, value in own.items() if value.is_meta]
    if bare:
        raise ValueError(f"model: {bare[0]} is on the meta device; give it memory by to_empty()")
    missing = [name for name in own if name not in found and not name.endswith(_COUNTER)]
    unused = [name for name in found if name not in own and not name.endswith(_COUNTER)]
    unused += found.foreign
    misshapen = {
        name: difference
        for name, value in own.items()
        if name in found and (difference := _difference(found[name], value)) is not None
    }
    if misshapen or (strict and (missing or unused)):
        raise MismatchError(found.source, missing, unused, misshapen)
    changes = list(_changes(model, found.architecture))
    if not adapt:
        _refuse([change for change in changes if change.needed], found)
    else:
        for change in changes:
            for module, attribute, value in change.settings:
                setattr(module, attribute, value)
    model.load_state_dict({name: found[name] for name in own if name in found}, strict=False)
    texts = tuple(change.text for change in changes)
    return Loaded(
        found.format,
        found.preprocessing,
        None if found.architecture is None else found.architecture.version,
        tuple(missing),
        tuple(unused),
        texts if adapt else (),
        () if adapt else texts,
    )


def _difference(given: Tensor, wanted: Tensor) -> str | None:
    if given.shape != wanted.shape:
        return f"{_shape(given)}, the model's is {_shape(wanted)}"
    if given.is_floating_point() != wanted.is_floating_point():
        return f"{given.dtype}, the model's is {wanted.dtype}"
    return None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class _Change(NamedTuple):
    """What has to be set in a model for weights to mean what they meant.

    Attributes:
        text: for a person.
        settings: module, attribute, value.
        needed: without it the model computes something else, not nearly the same.
    """

    text: str
    settings: tuple[tuple[nn.Module, str, Any], ...]
    needed: bool


def _changes(model: nn.Module, wanted: Architecture | None) -> Iterator[_Change]:
    if wanted is None:
        return
    yield from _strides(model, wanted)
    # Frozen ones count too, whatever class they are of.
    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    other = [norm for norm in norms if getattr(norm, "eps", wanted.eps) != wanted.eps]
    if other:
        settings = tuple((norm, "eps", wanted.eps) for norm in other)
        yield _Change(f"eps of {len(other)} BatchNorms: {wanted.eps}", settings, True)
    pool = getattr(model, "maxpool", None)
    if isinstance(pool, nn.MaxPool2d):
        own = (_pair(pool.padding), pool.ceil_mode)
        if own != (_pair(wanted.pool_padding), wanted.pool_ceil_mode):
            yield _Change(
                f"maxpool: padding={wanted.pool_padding}, ceil_mode={wanted.pool_ceil_mode}",
                ((pool, "padding", wanted.pool_padding),
                 (pool, "ceil_mode", wanted.pool_ceil_mode)),
                False,
            )  # fmt: skip


def _strides(model: nn.Module, wanted: Architecture) -> Iterator[_Change]:
    """Bottlenecks that halve the resolution elsewhere."""
    says = ((model, "version", wanted.version),) if hasattr(model, "version") else ()
    for name, module in model.named_modules():
        convs = [getattr(module, f"conv{number}", None) for number in (1, 2, 3)]
        if not all(isinstance(conv, nn.Conv2d) for conv in convs):
            continue
        strides = [_pair(conv.stride) for conv in convs[:2]]
        total = strides[0][0] * strides[1][0], strides[0][1] * strides[1][1]
        right = [total, (1, 1)] if wanted.version == "v1" else [(1, 1), total]
        if strides != right:
            place = 1 if wanted.version == "v1" else 2
            settings = [(c, "stride", step) for c, step in zip(convs, right, strict=False)]
            yield _Change(f"{name}: stride {total} in conv{place}", (*settings, *says), True)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _refuse(changes: Iterable[_Change], found: Weights) -> None:
    texts = [change.text for change in changes]
    if not texts:
        return
    version = found.architecture.version if found.architecture else None
    raise WeightsError(
        f"'{found.source}' was trained in a {version} network, from which the model differs: it "
        f"would need {_listed(texts)}; give adapt=True to rf.weights.load, which sets that, or "
        f"build it so: rf.models.resnet50(version={version!r})"
    )
