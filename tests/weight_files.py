"""Files of weights as others write them: by protobuf, by hand, by Python 2; and Caffe's arithmetic.

The network is a bottleneck ResNet of two stages and a few channels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

Array = NDArray[Any]
CLASSES = 5
BLOCKS, PLANES = (2, 2), (2, 4)
MEAN_BGR = (103.06262, 115.90288, 123.15163)  # of the release's mean image
DETECTRON_MEAN_BGR = (103.53, 116.28, 123.675)  # PIXEL_MEAN of detectron2's configurations
_CAFFE_BLOCKS = ({0: "a", 1: "b"}, {0: "a", 1: "b1"})  # as ResNet-50 counts, and as ResNet-101


class Network(nn.Module):
    """torchvision's blocks and names, strides in the 3x3."""

    def __init__(self, block: Callable[..., nn.Module] = Bottleneck) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inplanes = 4
        for stage, (count, planes) in enumerate(zip(BLOCKS, PLANES, strict=True), start=1):
            stride, outplanes = 1 if stage == 1 else 2, 4 * planes
            downsample = nn.Sequential(
                nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False),
                nn.BatchNorm2d(outplanes),
            )
            blocks = [block(inplanes, planes, stride, downsample)]
            blocks += [block(outplanes, planes) for _ in range(1, count)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inplanes = outplanes
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inplanes, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layer2(self.layer1(x))).flatten(1))


def network(seed: int = 7) -> Network:
    torch.manual_seed(seed)
    return Network().eval()


class CaffeLayer(NamedTuple):
    name: str
    type: str
    blobs: tuple[Array, ...]
    bias_term: bool | None = False  # None: not said, which is True


def caffe_layers(seed: int = 0, factor: float = 999.98) -> list[CaffeLayer]:
    """Every layer with weights, in the release's order and names; conv1 has a bias."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return random.normal(0, 0.7, shape).astype(np.float32)

    layers: list[CaffeLayer] = []

    def conv_bn_scale(name: str, place: str, out: int, of: int, size: int, bias: bool) -> None:
        blobs = (normal(out, of, size, size), *((normal(out),) if bias else ()))
        layers.append(CaffeLayer(name, "Convolution", blobs, bias))
        variance = random.uniform(0.5, 2, out).astype(np.float32)
        statistics = (normal(out) * np.float32(factor), variance * np.float32(factor))
        layers.append(CaffeLayer(f"bn{place}", "BatchNorm", (*statistics, np.float32([factor]))))
        layers.append(CaffeLayer(f"scale{place}", "Scale", (normal(out), normal(out))))

    conv_bn_scale("conv1", "_conv1", 4, 3, 7, bias=True)
    inplanes = 4
    for stage, (names, planes) in enumerate(zip(_CAFFE_BLOCKS, PLANES, strict=True), start=2):
        for block, letter in names.items():
            place, out = f"{stage}{letter}_branch", 4 * planes
            shapes = [("1", out, inplanes, 1)] if block == 0 else []
            shapes += [
                ("2a", planes, inplanes, 1),
                ("2b", planes, planes, 3),
                ("2c", out, planes, 1),
            ]
            for branch, *shape in shapes:
                conv_bn_scale(f"res{place}{branch}", f"{place}{branch}", *shape, bias=False)
            inplanes = out
    layers.append(
        CaffeLayer("fc1000", "InnerProduct", (normal(CLASSES, inplanes), normal(CLASSES)))
    )
    return layers


def named_layers(depths: Sequence[int], out: int = 1, of: int = 1) -> list[CaffeLayer]:
    """Every layer of a release by name.

    Args:
        depths: blocks of each stage; of more than six the release counts with b1, b2, ...
        out: channels of each.
        of: channels that it reads.
    """
    ones, one = np.ones(out, np.float32), np.ones(1, np.float32)
    weight = np.ones((out, of, 1, 1), np.float32)
    places = ["_conv1"]
    for stage, depth in enumerate(depths, start=2):
        counted = depths[2] > 6 and stage in (3, 4)
        for block in range(depth):
            letter = f"b{block}" if counted and block else "abcdef"[block]
            branches = (*(("1",) if block == 0 else ()), "2a", "2b", "2c")
            places += [f"{stage}{letter}_branch{branch}" for branch in branches]
    layers = []
    for place in places:
        conv = "conv1" if place == "_conv1" else f"res{place}"
        layers += [
            CaffeLayer(conv, "Convolution", (weight,)),
            CaffeLayer(f"bn{place}", "BatchNorm", (ones, ones, one)),
            CaffeLayer(f"scale{place}", "Scale", (ones, ones)),
        ]
    return [*layers, CaffeLayer("fc1000", "InnerProduct", (weight[:, :, 0, 0], ones))]


def caffe_forward(
    layers: Iterable[CaffeLayer],
    images: Tensor,
    mean: Sequence[float] = MEAN_BGR,
    eps: float = 1e-5,
) -> Tensor:
    """What Caffe computes, in float64.

    Args:
        layers: of `caffe_layers`.
        images: uint8 [N, 3, H, W], RGB.
        mean: of blue, green, red, of bytes.
        eps: of each BatchNorm.
    """
    blobs = {layer.name: [torch.from_numpy(b).double() for b in layer.blobs] for layer in layers}
    x = images.flip(1).double() - torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)

    def layer(x: Tensor, conv: str, place: str, stride: int = 1, padding: int = 0) -> Tensor:
        y = F.conv2d(x, *blobs[conv], stride=stride, padding=padding)
        mean, variance, factor = blobs[f"bn{place}"]
        by = 0.0 if factor.item() == 0 else 1 / factor.item()
        rows = [value.view(1, -1, 1, 1) for value in (mean * by, variance * by)]
        y = (y - rows[0]) / (rows[1] + eps).sqrt()
        gamma, beta = (value.view(1, -1, 1, 1) for value in blobs[f"scale{place}"])
        return y * gamma + beta

    x = _caffe_pool(F.relu(layer(x, "conv1", "_conv1", 2, 3)))
    for stage, names in enumerate(_CAFFE_BLOCKS, start=2):
        for block, letter in names.items():
            place, stride = f"{stage}{letter}_branch", 2 if stage > 2 and block == 0 else 1
            shortcut = x
            if block == 0:
                shortcut = layer(x, f"res{place}1", f"{place}1", stride)
            y = F.relu(layer(x, f"res{place}2a", f"{place}2a", stride))
            y = F.relu(layer(y, f"res{place}2b", f"{place}2b", 1, 1))
            x = F.relu(layer(y, f"res{place}2c", f"{place}2c") + shortcut)
    return F.linear(x.mean((2, 3)), *blobs["fc1000"])


def _caffe_pool(x: Tensor) -> Tensor:
    """3x3/2 without padding; windows that reach over the edge are cut."""
    rows, columns = (-(-(size - 3) // 2) + 1 for size in x.shape[2:])
    windows = [
        [x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((2, 3)) for j in range(columns)]
        for i in range(rows)
    ]
    return torch.stack([torch.stack(row, -1) for row in windows], -2)


def by_protobuf(layers: Sequence[CaffeLayer], *, double: bool = False) -> bytes:
    """A .caffemodel by the protobuf library, by a list of fields of its own."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    fields: dict[str, list[tuple[str, int, Any, int]]] = {
        "Shape": [("dim", 1, field.TYPE_INT64, many)],
        "Blob": [("data", 5, field.TYPE_FLOAT, many), ("diff", 6, field.TYPE_FLOAT, many),
                 ("shape", 7, "Shape", one), ("double_data", 8, field.TYPE_DOUBLE, many)],
        "Conv": [("num_output", 1, field.TYPE_UINT32, one), ("bias_term", 2, field.TYPE_BOOL, one)],
        "Layer": [("name", 1, field.TYPE_STRING, one), ("type", 2, field.TYPE_STRING, one),
                  ("bottom", 3, field.TYPE_STRING, many), ("blobs", 7, "Blob", many),
                  ("phase", 10, field.TYPE_INT32, one), ("convolution_param", 106, "Conv", one)],
        "Net": [("name", 1, field.TYPE_STRING, one), ("layer", 100, "Layer", many)],
    }  # fmt: skip
    content = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto2")
    for name, rows in fields.items():
        message = content.message_type.add(name=name)
        for title, number, kind, label in rows:
            made = message.field.add(name=title, number=number, label=label)
            if isinstance(kind, str):
                made.type, made.type_name = field.TYPE_MESSAGE, f".t.{kind}"
            else:
                made.type = kind
            if label == many and kind in (field.TYPE_INT64, field.TYPE_FLOAT, field.TYPE_DOUBLE):
                made.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(content.SerializeToString())
    net = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Net"))(name="ResNet-14")
    net.layer.add(name="input", type="Input")
    for layer in layers:
        made = net.layer.add(name=layer.name, type=layer.type, bottom=["x"], phase=1)
        if layer.type == "Convolution":
            made.convolution_param.num_output = len(layer.blobs[0])
            made.convolution_param.bias_term = layer.bias_term
        for blob in layer.blobs:
            values = blob.ravel().tolist()
            row = made.blobs.add(**{"double_data" if double else "data": values})
            row.shape.dim.extend(blob.shape)
    return net.SerializeToString()


class Piece(NamedTuple):
    """Bytes of a message, and which of them are numbers of a tensor."""

    raw: bytes
    numbers: bytes

    def __add__(self, other: Any) -> Piece:
        return Piece(self.raw + other.raw, self.numbers + other.numbers)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _plain(raw: bytes) -> Piece:
    return Piece(raw, bytes(len(raw)))


def _field(number: int, content: Piece | bytes) -> Piece:
    content = _plain(content) if isinstance(content, bytes) else content
    return _plain(_varint(number << 3 | 2) + _varint(len(content.raw))) + content


def _joined(pieces: Iterable[Piece]) -> Piece:
    every = list(pieces)
    return Piece(b"".join(p.raw for p in every), b"".join(p.numbers for p in every))


def by_hand(
    layers: Sequence[CaffeLayer], *, v1: bool = False, eps: float | None = None, chunks: int = 1
) -> Piece:
    """A .caffemodel byte by byte, by the wire format of protocol buffers.

    Args:
        layers: of `caffe_layers`.
        v1: the older format: `layers`, types by number, blobs of four dimensions.
        eps: of each BatchNorm.
        chunks: strings that a blob's numbers come in; a reader has to join them.
    """
    return _field(1, b"ResNet-14") + _joined(
        _v1_layer(layer) if v1 else _layer(layer, eps, chunks) for layer in layers
    )


def _numbers(blob: Array, chunks: int = 1) -> Piece:
    parts = [part.astype("<f4").tobytes() for part in np.array_split(blob.ravel(), chunks)]
    return _joined(_field(5, Piece(raw, b"\1" * len(raw))) for raw in parts)


def _layer(layer: CaffeLayer, eps: float | None, chunks: int) -> Piece:
    content = _field(1, layer.name.encode()) + _field(2, layer.type.encode())
    for blob in layer.blobs:
        shape = _field(1, b"".join(map(_varint, blob.shape)))
        content += _field(7, _field(7, shape) + _numbers(blob, chunks))
    if layer.type == "Convolution":
        said = b"" if layer.bias_term is None else _varint(2 << 3) + _varint(layer.bias_term)
        content += _field(106, _varint(1 << 3) + _varint(len(layer.blobs[0])) + said)
    if layer.type == "BatchNorm" and eps is not None:
        content += _field(139, _varint(3 << 3 | 5) + struct.pack("<f", eps))
    return _field(100, content)


def _v1_layer(layer: CaffeLayer) -> Piece:
    number = {"Convolution": 4, "InnerProduct": 14}.get(layer.type, 77)  # a fork's own
    content = _field(4, layer.name.encode()) + _plain(_varint(5 << 3) + _varint(number))
    for blob in layer.blobs:
        sizes = (1,) * (4 - blob.ndim) + blob.shape
        dims = b"".join(_varint(i << 3) + _varint(n) for i, n in enumerate(sizes, start=1))
        content += _field(6, _plain(dims) + _numbers(blob))
    return _field(2, content)


def detectron_blobs(seed: int = 0, *, affine: bool = False) -> dict[str, Array]:
    """The network of `caffe_layers` by Detectron's names.

    Args:
        seed: of the numbers.
        affine: a scale and a shift in the place of each BatchNorm, as Detectron's conversion makes
            them; else as detectron2's keeps it.
    """
    places = {"_conv1": "res_conv1"}
    for stage, names in enumerate(_CAFFE_BLOCKS, start=2):
        for block, letter in names.items():
            for branch in ("1", "2a", "2b", "2c"):
                places[f"{stage}{letter}_branch{branch}"] = f"res{stage}_{block}_branch{branch}"
    blobs: dict[str, Array] = {}
    for layer in caffe_layers(seed):
        if layer.type == "BatchNorm":
            place = places[layer.name.removeprefix("bn")]
            mean, variance, factor = layer.blobs
            blobs[f"{place}_bn_running_mean"] = mean / factor
            blobs[f"{place}_bn_running_var"] = variance / factor
        elif layer.type == "Scale":
            place = places[layer.name.removeprefix("scale")]
            blobs[f"{place}_bn_gamma"], blobs[f"{place}_bn_beta"] = layer.blobs
        else:
            place = places.get(layer.name.removeprefix("res"), layer.name)
            for part, blob in zip("wb", layer.blobs, strict=False):
                blobs[f"{place}_{part}"] = blob
    return _folded(blobs) if affine else blobs


def _folded(blobs: dict[str, Array]) -> dict[str, Array]:
    result = {}
    for name, value in blobs.items():
        place, _, part = name.rpartition("_bn_")
        if part == "gamma":
            mean, variance = (blobs[f"{place}_bn_running_{what}"] for what in ("mean", "var"))
            scale = value / np.sqrt(variance + 1e-5)
            result[f"{place}_bn_s"] = scale
            result[f"{place}_bn_b"] = blobs[f"{place}_bn_beta"] - mean * scale
        elif not place:
            result[name] = value
    return result


def python2_pickle(blobs: dict[str, Array]) -> bytes:
    """{"blobs": blobs} as Python 2's cPickle wrote it, protocol 2: bytes are strings there."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value  # BINSTRING

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)  # BININT

    out = [b"\x80\x02}", text(b"blobs"), b"}("]
    for name, array in blobs.items():
        sizes = b"(" + b"".join(map(number, array.shape)) + b"t"
        dtype = b"cnumpy\ndtype\n" + text(b"f4") + number(0) + number(1) + b"\x87R"
        dtype += b"(" + number(3) + text(b"<") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        out += [
            text(name.encode()), b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n",
            number(0), b"\x85", text(b"b"), b"\x87R",
            b"(", number(1), sizes, dtype, b"\x89", text(raw), b"tb",
        ]  # fmt: skip
    return b"".join([*out, b"us."])


def images(count: int = 2, size: int = 37, seed: int = 3) -> Tensor:
    """uint8 [count, 3, size, size], RGB; an odd size shows which way a pooling rounds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def write(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file
