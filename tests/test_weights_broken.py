"""Broken, foreign and malicious files of weights: a clear error, and a model as it was."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import weight_files as files
from safetensors.torch import save_file

import resnet_fused as rf

LAYERS = files.caffe_layers()
BLOBS = files.detectron_blobs()
PIECE = files.by_hand(LAYERS)
WHOLE_PROOF = os.environ.get("HYPOTHESIS_PROFILE") == "proof"
MODEL = files.network()
BEFORE = {key: value.clone() for key, value in MODEL.state_dict().items()}
STRIDES = [tuple(m.stride) for m in MODEL.modules() if isinstance(m, torch.nn.Conv2d)]


def refused(file: Path, match: str | None = None, **options: Any) -> str:
    """The message with which a file is refused; the model is as it was."""
    with pytest.raises(rf.weights.WeightsError, match=match) as caught:
        rf.weights.load(MODEL, file, adapt=True, **options)
    after = MODEL.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in BEFORE.items())
    assert [tuple(m.stride) for m in MODEL.modules() if isinstance(m, torch.nn.Conv2d)] == STRIDES
    assert str(file) in str(caught.value)
    return str(caught.value)


def torch_file(content: Any = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(MODEL.state_dict() if content is None else content, buffer)
    return buffer.getvalue()


def safetensors_file(folder: Path) -> bytes:
    save_file(MODEL.state_dict(), folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


WHOLE: dict[str, Callable[[Path], bytes]] = {
    "n.caffemodel": lambda _: PIECE.raw,
    "n.pkl": lambda _: files.python2_pickle(BLOBS),
    "p5.pkl": lambda _: pickle.dumps({"blobs": BLOBS}, 5),
    "n.pth": lambda _: torch_file(),
    "n.safetensors": safetensors_file,
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_cut_short(tmp_path: Path, name: str) -> None:
    whole = WHOLE[name](tmp_path)
    step = 997 if name == "n.caffemodel" else max(len(whole) // 23, 1)
    for length in (*range(0, 40, 3), *range(40, len(whole) - 1, step), len(whole) - 1):
        refused(files.write(tmp_path, name, whole[:length]))


def test_a_caffemodel_that_is_cut_between_layers(tmp_path: Path) -> None:
    """Protocol buffers have no end: what is left is a whole message."""
    for count in range(len(LAYERS)):
        file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS[:count]).raw)
        refused(file, r"cut short|it has no layers|tensors are missing")
    last = next(i for i, layer in enumerate(LAYERS) if layer.name == "res2b_branch2b")
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS[:last]).raw)
    with pytest.raises(rf.weights.WeightsError, match=r"lacks layer1\.1\.conv2, layer1\.1\.conv3"):
        rf.weights.read(file)
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(LAYERS[:2]).raw)
    with pytest.raises(rf.weights.WeightsError, match="of conv1 it lacks weight, bias"):
        rf.weights.read(file)
    without = [layer for layer in LAYERS if "2a_branch" not in layer.name]
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(without).raw)
    with pytest.raises(rf.weights.WeightsError, match=r"layer1\.0\.conv1"):
        rf.weights.read(file)


@pytest.mark.timeout(900)
def test_a_caffemodel_with_a_bit_flipped(tmp_path: Path) -> None:
    """Of every byte that is no tensor's number; a number has nothing to tell it by."""
    expected = rf.weights.read(files.write(tmp_path, "whole.caffemodel", PIECE.raw))
    places = [place for place, number in enumerate(PIECE.numbers) if not number]
    flips = [(place, 1 << index % 8) for index, place in enumerate(places)][::3]
    if WHOLE_PROOF:
        flips = [(place, 1 << bit) for place in places for bit in range(8)]
    noticed = 0
    for place, bit in flips:
        raw = bytearray(PIECE.raw)
        raw[place] ^= bit
        file = files.write(tmp_path, "n.caffemodel", bytes(raw))
        try:
            found = rf.weights.read(file)
        except rf.weights.WeightsError:
            noticed += 1
            continue
        if set(found) == set(expected) and not found.foreign:
            assert all(torch.equal(found[key], value) for key, value in expected.items()), place
        else:
            refused(file)
            noticed += 1
    assert noticed > 0.8 * len(flips)


def test_a_pickle_with_a_byte_changed(tmp_path: Path) -> None:
    blobs = {"conv1_w": BLOBS["conv1_w"][:1, :1, :1, :1]}
    whole = files.python2_pickle(blobs)
    for place in range(len(whole)):
        for value in (0, ord("."), ord("R"), 0xFF):
            raw = bytearray(whole)
            raw[place] = value
            refused(files.write(tmp_path, "n.pkl", bytes(raw)))


@pytest.mark.parametrize("name", ["n.pth", "n.safetensors"])
def test_a_byte_of_the_header_changed(tmp_path: Path, name: str) -> None:
    whole, noticed = WHOLE[name](tmp_path), 0
    for place in range(64):
        raw = bytearray(whole)
        raw[place] ^= 0xFF
        model = files.network(5)
        try:
            rf.weights.load(model, files.write(tmp_path, name, bytes(raw)))
        except rf.weights.WeightsError:
            noticed += 1
        else:  # a date, a checksum that nobody reads
            assert all(torch.equal(v, BEFORE[key]) for key, v in model.state_dict().items()), place
    assert noticed > 5


@pytest.mark.parametrize(
    ("layer", "blobs", "match"),
    [
        ("conv1", lambda w, b: (w,), "conv1' has 1 blobs, expected 2"),
        ("conv1", lambda w, b: (w[0], b), "3, 7, 7.*expected 4 dimensions"),
        ("bn_conv1", lambda m, v, f: (m, -v, f), "variance of bn1 is negative or no number"),
        ("bn_conv1", lambda m, v, f: (m, v * np.nan, f), "negative or no number"),
        ("bn_conv1", lambda m, v, f: (m, v), "has 2 blobs, expected 3"),
        ("bn_conv1", lambda m, v, f: (m, v, m), "factor of 'bn_conv1' has 4 values"),
        ("scale2a_branch1", lambda g, b: (g[:3], b), "layer1.0.downsample.0 has 8 channels"),
        ("fc1000", lambda w, b: (w,), "fc1000' has 1 blobs"),
    ],
)
def test_a_layer_that_is_not_what_it_says(
    tmp_path: Path, layer: str, blobs: Any, match: str
) -> None:
    layers = [
        each._replace(blobs=blobs(*each.blobs)) if each.name == layer else each for each in LAYERS
    ]
    refused(files.write(tmp_path, "n.caffemodel", files.by_hand(layers).raw), match)


@pytest.mark.parametrize(
    ("name", "said", "match"),
    [("conv1", False, "2 blobs, expected 1"), ("res2a_branch1", True, "1 blobs, expected 2"),
     ("res2a_branch1", None, "1 blobs, expected 2")],
)  # fmt: skip
def test_a_bias_that_is_there_against_what_the_layer_says(
    tmp_path: Path, name: str, said: bool | None, match: str
) -> None:
    layers = [layer._replace(bias_term=said) if layer.name == name else layer for layer in LAYERS]
    refused(
        files.write(tmp_path, "n.caffemodel", files.by_hand(layers).raw), f"{name}' has {match}"
    )


def test_a_layer_twice_or_of_another_type(tmp_path: Path) -> None:
    twice = files.by_hand([*LAYERS, LAYERS[3]]).raw
    refused(files.write(tmp_path, "n.caffemodel", twice), "two tensors for 'conv.weight'")
    layers = [LAYERS[0]._replace(type="Deconvolution"), *LAYERS[1:]]
    file = files.write(tmp_path, "n.caffemodel", files.by_hand(layers).raw)
    refused(file, "'conv1' is of type 'Deconvolution', expected 'Convolution'")


def test_numbers_that_are_fewer_than_the_shape_says(tmp_path: Path) -> None:
    raw = PIECE.raw.replace(struct.pack("<4f", *LAYERS[0].blobs[1]), b"\0" * 16)
    assert len(raw) == len(PIECE.raw)
    # A packed string of 16 bytes becomes one of 12 and an unknown field of two bytes twice.
    at = PIECE.raw.index(struct.pack("<4f", *LAYERS[0].blobs[1])) - 1
    changed = PIECE.raw[:at] + b"\x0c" + PIECE.raw[at + 1 : at + 13] + b"\x78\0\x78\0"
    changed += PIECE.raw[at + 17 :]
    match = r"'conv1' has a blob of shape \(4,\) with 12 bytes of numbers, expected 16"
    refused(files.write(tmp_path, "n.caffemodel", changed), match)


def test_another_network(tmp_path: Path) -> None:
    state = dict(MODEL.state_dict())
    del state["layer1.0.conv1.weight"], state["bn1.bias"]
    state |= {"extra.weight": torch.ones(2), "fc.weight": torch.ones(3, 16),
              "bn1.weight": torch.ones(4, dtype=torch.int64)}  # fmt: skip
    torch.save(state, tmp_path / "n.pth")
    message = refused(tmp_path / "n.pth")
    assert "2 tensors are missing: bn1.bias, layer1.0.conv1.weight" in message
    assert "1 are not in the model: extra.weight" in message
    assert "fc.weight (3x16, the model's is 5x16)" in message
    assert "bn1.weight (torch.int64, the model's is torch.float32)" in message

    model = files.network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(rf.weights.MismatchError, match="fc.weight"):
        rf.weights.load(model, tmp_path / "n.pth", strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    del state["fc.weight"], state["bn1.weight"]
    torch.save(state, tmp_path / "n.pth")
    model = files.network()
    loaded = rf.weights.load(model, tmp_path / "n.pth", strict=False)
    assert set(loaded.missing) == {"bn1.bias", "layer1.0.conv1.weight", "fc.weight", "bn1.weight"}
    assert loaded.unused == ("extra.weight",)


def test_layers_that_nobody_knows_are_named(tmp_path: Path) -> None:
    extra = files.CaffeLayer("rpn_conv", "Convolution", (np.ones((1, 1, 1, 1), np.float32),))
    file = files.write(tmp_path, "n.caffemodel", files.by_hand([*LAYERS, extra]).raw)
    refused(file, "1 are not in the model: rpn_conv")
    assert rf.weights.load(files.network(), file, strict=False, adapt=True).unused == ("rpn_conv",)
    blobs = {**BLOBS, "res2_0_branch2a_gn_s": np.ones(3), "fpn_w": np.ones(3)}
    file = files.write(tmp_path, "n.pkl", pickle.dumps(blobs))
    refused(file, "2 are not in the model: res2_0_branch2a_gn_s, fpn_w")


def test_a_block_with_an_absurd_number_is_no_layer(tmp_path: Path) -> None:
    one = np.ones((1, 1, 1, 1), np.float32)
    for number in ("1" * 12, "9" * 5000):  # what a range or an int would choke on
        layer = files.CaffeLayer(f"res4b{number}_branch2a", "Convolution", (one,))
        file = files.write(tmp_path, "n.caffemodel", files.by_hand([*LAYERS, layer]).raw)
        refused(file, f"1 are not in the model: res4b{number}")
        blobs = {**BLOBS, f"res4_{number}_branch2a_w": one}
        file = files.write(tmp_path, "n.pkl", pickle.dumps(blobs))
        refused(file, f"1 are not in the model: res4_{number}")


def test_files_of_something_else(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> Path:
        return files.write(tmp_path, name, content)

    refused(write("n.caffemodel", b""), "it is empty")
    refused(write("n.caffemodel.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 50), "HDF5")
    refused(write("n.txt", b"layer { name: 'conv1' }"), "begins as no format that is read")
    refused(write("n.pth", b"no tensors"), "corrupt or no file of weights")
    refused(write("n.pkl", b"no pickle"), "corrupt or no file of weights")
    vgg = files.by_hand([files.CaffeLayer("conv1_1", "Convolution", LAYERS[0].blobs)]).raw
    refused(write("n.caffemodel", vgg), "holds no ResNet .*conv1_1")
    refused(write("n.pkl", pickle.dumps([1, 2])), "holds no dict of arrays")
    refused(write("n.pkl", pickle.dumps({"blobs": [1, 2]})), "holds no dict of arrays")
    refused(write("n.pkl", pickle.dumps({"model": {"a": 1}})), "detectron2.s own names.*MSRA")
    refused(write("n.pth", torch_file([torch.ones(1)])), "holds no state_dict")
    refused(write("n.pth", torch_file({"epoch": 3})), "holds no state_dict")
    refused(tmp_path / "absent.pth", "no such file")
    refused(tmp_path, "is a directory")
    with pytest.raises(ValueError, match=r"format: got 'onnx', accepted is one of auto, torch"):
        rf.weights.read(write("n.pth", b"x"), format="onnx")


# Pickles that would do something


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


ARRAY = BLOBS["conv1_w"]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {ran}",), r"(posix|nt)\.system"),
        (os.mkdir, ("{ran}",), r"(posix|nt)\.mkdir"),
        (builtins.eval, ("open('{ran}', 'w')",), r"(builtins|__builtin__)\.eval"),
        (builtins.getattr, (ARRAY, "tofile"), r"(builtins|__builtin__)\.getattr"),
        (np.load, ("{ran}",), r"numpy\.load"),
        (np.save, ("{ran}", [1]), r"numpy\.save"),
        (pickle.loads, (b"cos\nsystem\n.",), r"_?pickle\.loads"),
        (torch.load, ("{ran}",), r"torch\.serialization\.load"),
    ],
)
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, function: Any, arguments: tuple[Any, ...], name: str, protocol: int,
    inside: bool,
) -> None:  # fmt: skip
    ran = tmp_path / "ran"
    arguments = tuple(a.format(ran=ran) if isinstance(a, str) else a for a in arguments)
    evil = Calls(function, *arguments)
    content = {"blobs": {**BLOBS, "conv1_w": evil}} if inside else evil
    file = files.write(tmp_path, "n.pkl", pickle.dumps(content, protocol))
    refused(file, rf"is refused: it asks for {name}.*nothing of it was run", format="detectron")
    assert not ran.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_file_that_runs_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    ran, file = tmp_path / "ran", tmp_path / "n.pth"
    content = {**MODEL.state_dict(), "bn1.weight": Calls(os.mkdir, str(ran))}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    refused(file, "is corrupt or no file of weights")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        # numpy.ndarray called: an array of 8 PB.
        (b"\x80\x02cnumpy\nndarray\nJ\0\0\0\x7f\x85R.", "makes an array of no numbers"),
        # An array of objects.
        (pickle.dumps({"conv1_w": np.array([{}, None])}, 2), "dtype 'O8', which is no plain"),
        # A codec that unpacks.
        (b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R.", "_codecs.encode with 'hex'"),
        # BUILD: the state of a function, which later calls would see.
        (b"\x80\x02c_codecs\nencode\n}b.", "changes what it may only call"),
        (b"\x80\x02c_codecs\nencode\nN}X\1\0\0\0ac_codecs\nencode\ns\x86b.", "changes what it may"),
        # An object kept elsewhere.
        (b"\x80\x02X\1\0\0\0aQ.", "corrupt .*persistent"),
        # A class made without being called.
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "corrupt .*must be a type"),
    ],
)
def test_what_else_a_pickle_may_not_do(tmp_path: Path, content: bytes, match: str) -> None:
    refused(files.write(tmp_path, "n.pkl", content), match)


def test_dicts_of_python_are_no_danger(tmp_path: Path) -> None:
    content = {"blobs": collections.OrderedDict(BLOBS), "epoch": 3, "lr": np.float64(0.1)}
    for protocol in (0, 2, 4, 5):
        file = files.write(tmp_path, "n.pkl", pickle.dumps(content, protocol))
        assert rf.weights.read(file, format="detectron").foreign == ()
