"""Caffe's .caffemodel: a NetParameter of protocol buffers, layer by layer.

Field numbers and types are those of Caffe's published format (src/caffe/proto/caffe.proto); what is
not read here stays unknown to the parser. Arithmetic as in its BatchNorm layer: mean and variance
are kept times a factor, which is divided out, and a factor of zero makes both zero.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnet_fused.weights import released
from resnet_fused.weights.names import HEAD, STEM, Layer, Parts
from resnet_fused.weights.released import EPS, Weights, WeightsError

# message -> (field, number, type, repeated). The numbers of a blob are packed, so on the wire they
# are one string of bytes: read as such they need no Python object each.
_SCHEMA: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    "BlobShape": (("dim", 1, "int64", True),),
    "BlobProto": (
        ("num", 1, "int64", False),
        ("channels", 2, "int64", False),
        ("height", 3, "int64", False),
        ("width", 4, "int64", False),
        ("data", 5, "bytes", True),
        ("shape", 7, "BlobShape", False),
        ("double_data", 8, "bytes", True),
    ),
    "BatchNormParameter": (("eps", 3, "float", False),),
    "ConvolutionParameter": (("bias_term", 2, "bool", False),),
    "LayerParameter": (
        ("name", 1, "bytes", False),
        ("type", 2, "bytes", False),
        ("blobs", 7, "BlobProto", True),
        ("convolution_param", 106, "ConvolutionParameter", False),
        ("batch_norm_param", 139, "BatchNormParameter", False),
    ),
    # The older format of a layer: its type is a number.
    "V1LayerParameter": (
        ("name", 4, "bytes", False),
        ("type", 5, "int32", False),
        ("blobs", 6, "BlobProto", True),
    ),
    "NetParameter": (
        ("layers", 2, "V1LayerParameter", True),
        ("layer", 100, "LayerParameter", True),
    ),
}
_V1_TYPES = {4: "Convolution", 14: "InnerProduct"}

_NAME = re.compile(
    r"(?P<kind>res|bn|scale)(?P<stage>[2-5])(?P<block>b\d{1,3}|[a-z])_branch(?P<branch>1|2[abc])"
)
_STEM_KINDS = {"conv1": "res", "bn_conv1": "bn", "scale_conv1": "scale"}
_TYPES = {"res": "Convolution", "bn": "BatchNorm", "scale": "Scale", "head": "InnerProduct"}


class _CaffeLayer(NamedTuple):
    """A layer that has blobs.

    Attributes:
        name: by which it is known.
        type: "" where the file gives none, or an unknown number.
        blobs: BlobProto.
        eps: of a BatchNorm.
        bias: whether a convolution has one; None where the format does not say.
    """

    name: str
    type: str
    blobs: Sequence[Any]
    eps: float = EPS
    bias: bool | None = None


def read(file: Path) -> Weights:
    """Reads the weights of a ResNet.

    Needs about twice the file's bytes of memory.

    Raises:
        WeightsError: no protocol buffer, no ResNet, or one that is not whole.
        ModuleNotFoundError: protobuf is not installed.
    """
    from google.protobuf.message import DecodeError

    source = f"'{file}'"
    try:
        # The bytes are gone before the tensors are made.
        net = _messages()["NetParameter"].FromString(file.read_bytes())
    except DecodeError as error:
        raise WeightsError(
            f"{source} is corrupt or no file of weights (protobuf: {error}); accepted: a "
            ".caffemodel in Caffe's binary format"
        ) from error
    parts, foreign = Parts(source), []
    for layer in _layers(net):
        if not _take(layer, parts):
            foreign.append(layer.name)
    if not len(parts):
        what = f"its layers are {', '.join(foreign[:5])}" if foreign else "it has no layers"
        raise WeightsError(
            f"{source} holds no ResNet by the names of Caffe's release, such as res2a_branch2a "
            f"({what})"
        )
    return Weights(
        parts.state_dict(), "caffe", str(file), released.MSRA, released.V1, tuple(foreign)
    )


def _layers(net: Any) -> Iterator[_CaffeLayer]:
    for layer in net.layers:
        if layer.blobs:
            yield _CaffeLayer(_text(layer.name), _V1_TYPES.get(layer.type, ""), layer.blobs)
    for layer in net.layer:
        if layer.blobs:
            conv, norm = layer.convolution_param, layer.batch_norm_param
            eps = norm.eps if norm.HasField("eps") else EPS
            bias = conv.bias_term or not conv.HasField("bias_term")  # Caffe's default: true
            yield _CaffeLayer(_text(layer.name), _text(layer.type), layer.blobs, eps, bias)


def _text(name: bytes) -> str:
    # As a string field a name that is no UTF-8 would come as bytes, and a good one as text.
    return name.decode(errors="replace")


def _take(layer: _CaffeLayer, parts: Parts) -> bool:
    """Hands a layer's tensors over; False if it is none of a ResNet."""
    found = _NAME.fullmatch(layer.name)
    if layer.name in _STEM_KINDS:
        kind, place = _STEM_KINDS[layer.name], STEM
    elif found is not None:
        letter = found["block"]
        block = int(letter[1:]) if letter[1:] else ord(letter) - ord("a")
        kind, place = found["kind"], parts.block(int(found["stage"]), block, found["branch"])
    elif layer.type == _TYPES["head"]:
        kind, place = "head", HEAD
    else:
        return False
    if layer.type not in ("", _TYPES[kind]):
        raise WeightsError(
            f"{parts.source}: layer {layer.name!r} is of type {layer.type!r}, expected "
            f"{_TYPES[kind]!r}"
        )
    {"res": _conv, "bn": _norm, "scale": _scale, "head": _head}[kind](layer, place, parts)
    return True


def _conv(layer: _CaffeLayer, place: Layer, parts: Parts) -> None:
    has_bias = len(layer.blobs) == 2 if layer.bias is None else layer.bias
    values = _tensors(layer, (4, 1) if has_bias else (4,), parts)
    for part, value in zip(("conv.weight", "conv.bias"), values, strict=False):
        parts.put(place, part, value)


def _head(layer: _CaffeLayer, place: Layer, parts: Parts) -> None:
    weight, bias = _tensors(layer, (2, 1), parts)
    parts.put(place, "conv.weight", weight)
    parts.put(place, "conv.bias", bias)


def _norm(layer: _CaffeLayer, place: Layer, parts: Parts) -> None:
    mean, variance, factor = _tensors(layer, (1, 1, 1), parts)
    if factor.numel() != 1:
        raise WeightsError(
            f"{parts.source}: the factor of {layer.name!r} has {factor.numel()} values"
        )
    divisor = float(factor)
    inverse = 1 / divisor if divisor else 0.0
    parts.put(place, "running_mean", (mean.double() * inverse).float())
    variance = variance.double() * inverse
    # The model adds its own EPS. Caffe keeps its in float32.
    if layer.eps != EPS and np.float32(layer.eps) != np.float32(EPS):
        variance += layer.eps - EPS
    parts.put(place, "running_var", variance.float())


def _scale(layer: _CaffeLayer, place: Layer, parts: Parts) -> None:
    weight, bias = _tensors(layer, (1, 1), parts)
    parts.put(place, "weight", weight)
    parts.put(place, "bias", bias)


def _tensors(layer: _CaffeLayer, dims: Sequence[int], parts: Parts) -> list[Tensor]:
    """The layer's blobs as float32, of so many dimensions each."""
    where = f"{parts.source}: layer {layer.name!r}"
    if len(layer.blobs) != len(dims):
        raise WeightsError(f"{where} has {len(layer.blobs)} blobs, expected {len(dims)}")
    return [_tensor(blob, dim, where) for blob, dim in zip(layer.blobs, dims, strict=True)]


def _tensor(blob: Any, dims: int, where: str) -> Tensor:
    chunks, kind = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
    raw = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
    # Old files give every blob four dimensions: a bias is [1, 1, 1, K].
    while len(shape) > dims and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != dims or any(size < 1 for size in shape):
        raise WeightsError(f"{where} has a blob of shape {shape}, expected {dims} dimensions")
    bytes_each = np.dtype(kind).itemsize
    if len(raw) != math.prod(shape) * bytes_each:
        raise WeightsError(
            f"{where} has a blob of shape {shape} with {len(raw)} bytes of numbers, expected "
            f"{math.prod(shape) * bytes_each}: the file is corrupt"
        )
    return torch.from_numpy(np.frombuffer(raw, kind).astype(np.float32).reshape(shape))


@functools.cache
def _messages() -> dict[str, Any]:
    """The classes of the messages of `_SCHEMA`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    types = {
        "int32": field.TYPE_INT32, "int64": field.TYPE_INT64, "float": field.TYPE_FLOAT,
        "bytes": field.TYPE_BYTES, "bool": field.TYPE_BOOL,
    }  # fmt: skip
    package = "resnet_fused.caffe"
    content = descriptor_pb2.FileDescriptorProto(
        name="resnet_fused/caffe.proto", package=package, syntax="proto2"
    )
    for name, fields in _SCHEMA.items():
        message = content.message_type.add(name=name)
        for title, number, kind, repeated in fields:
            made = message.field.add(name=title, number=number)
            made.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            made.type = types.get(kind, field.TYPE_MESSAGE)
            if kind not in types:
                made.type_name = f".{package}.{kind}"
    # A pool of its own: Caffe's Python module may have registered the same messages.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(content.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _SCHEMA
    }
