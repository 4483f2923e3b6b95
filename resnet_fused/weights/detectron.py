"""Detectron's and detectron2's pickles of Caffe2 networks, read without running them.

A pickle is a program. Of what it may call, these files need numpy's three ways to make an array,
text turned into bytes, and OrderedDict; each is a stand-in here that checks its arguments, and
anything else is refused by name. numpy itself is not called by the file.
"""

from __future__ import annotations

import collections
import mmap
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_fused.weights import released
from resnet_fused.weights.names import HEAD, STEM, Layer, Parts
from resnet_fused.weights.released import EPS, Weights, WeightsError

_NAME = re.compile(
    r"(?:res(?P<stage>[2-5])_(?P<block>\d{1,3})_branch(?P<branch>1|2[abc])(?P<bn>_bn)?"
    r"|(?P<stem>conv1)|(?P<stem_bn>res_conv1_bn)|(?P<head>fc1000|pred))_(?P<part>[a-z_]+)"
)
_CONV_PARTS = {"w": "conv.weight", "b": "conv.bias"}
# Caffe2 calls the variance "riv". A scale and a shift alone (s, b) have the statistics folded in.
_NORM_PARTS = {
    "gamma": "weight", "beta": "bias", "running_mean": "running_mean",
    "running_var": "running_var", "s": "weight", "b": "bias", "rm": "running_mean",
    "riv": "running_var",
}  # fmt: skip
_TRAINING = "_momentum"  # of the optimiser, in the files of trained detectors

_NUMBERS = frozenset("fiu")


class Refused(pickle.UnpicklingError):
    """Something that a pickle of weights has no need of."""


def read(file: Path) -> Weights:
    """Reads the weights of a ResNet or ResNeXt.

    Needs about twice the file's bytes of memory.

    Raises:
        WeightsError: no pickle, a pickle that would run code, no ResNet, or one that is not whole.
    """
    source = f"'{file}'"
    try:
        with (
            open(file, "rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            found = _Unpickler(content).load()
    except Refused as error:
        raise WeightsError(f"{source} is refused: {error}; nothing of it was run") from error
    except OSError:
        raise
    except Exception as error:
        # Of a broken pickle the reader raises nearly anything; all of it means the same here.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{source} is corrupt or no file of weights ({reason}); accepted: a pickle of numpy "
            "arrays by Detectron's names"
        ) from error
    blobs = found.get("blobs", found) if isinstance(found, Mapping) else None
    if isinstance(blobs, Mapping) and isinstance(blobs.get("model"), Mapping):
        raise WeightsError(
            f"{source} holds a model by detectron2's own names, which say neither whether it takes "
            "BGR or RGB nor where its strides are; accepted are Caffe2's names, as in MSRA/R-50.pkl"
        )
    if not isinstance(blobs, Mapping):
        raise WeightsError(f"{source} holds no dict of arrays")
    return _weights(blobs, str(file))


def _weights(blobs: Mapping[Any, Any], file: str) -> Weights:
    parts, foreign = Parts(f"'{file}'"), []
    for name, value in blobs.items():
        if not isinstance(value, _Array) or str(name).endswith(_TRAINING):
            continue
        found = _NAME.fullmatch(str(name))
        part = None if found is None else _place(found, parts)
        if part is None:
            foreign.append(str(name))
        else:
            parts.put(*part, value.tensor())
    if not len(parts):
        raise WeightsError(
            f"'{file}' holds no ResNet by Detectron's names, such as res2_0_branch2a_w (it has "
            f"{', '.join(foreign[:5]) or 'no arrays'})"
        )
    _unfold(parts)
    state = parts.state_dict()
    # Which network it is, is not said: Facebook's are the ones with groups, trained elsewhere.
    grouped = any(
        name.endswith(".conv2.weight") and value.shape[0] != value.shape[1]
        for name, value in state.items()
        if value.dim() == 4
    )
    images = released.DETECTRON_SCALED if grouped else released.DETECTRON
    return Weights(
        state, "detectron", file, images, released.V1_5 if grouped else released.V1, tuple(foreign)
    )


def _place(found: re.Match[str], parts: Parts) -> tuple[Layer, str] | None:
    """Where a tensor belongs; None where a name ends in what nobody knows."""
    norm = bool(found["bn"] or found["stem_bn"])
    part = (_NORM_PARTS if norm else _CONV_PARTS).get(found["part"])
    if part is None:
        return None
    if found["head"]:
        return HEAD, part
    if found["stage"] is None:
        return STEM, part
    return parts.block(int(found["stage"]), int(found["block"]), found["branch"]), part


def _unfold(parts: Parts) -> None:
    """Gives a BatchNorm that is a scale and a shift alone the statistics that change nothing."""
    for layer, known in parts.items():
        if layer.norm is not None and "weight" in known and "running_mean" not in known:
            scale = known["weight"]
            parts.put(layer, "running_mean", torch.zeros_like(scale))
            if "running_var" not in known:
                parts.put(layer, "running_var", torch.full_like(scale, 1 - EPS))


class _DType:
    """Stands for numpy.dtype: plain numbers alone."""

    __slots__ = ("value",)

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        value = np.dtype(code) if isinstance(code, str) and len(code) < 4 else None
        if value is None or value.kind not in _NUMBERS:
            raise Refused(f"it holds an array of dtype {code!r}, which is no plain number")
        self.value = value

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise ValueError(f"byte order {order!r}")
        self.value = self.value.newbyteorder(order)


class _Array:
    """Stands for numpy.ndarray."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray[Any, Any] | None = None) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        # Python 2 wrote text, which the reader has taken for latin1.
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")

    def tensor(self) -> Tensor:
        """float32, in C order."""
        if self.value is None:
            raise WeightsError("the pickle has an array without numbers")
        return torch.from_numpy(np.array(self.value, np.float32, order="C"))


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _DType) or not isinstance(raw, bytes | bytearray):
        raise Refused("it holds an array of something else than numbers")
    sizes = tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"an array of shape {sizes}")
    # numpy refuses bytes that are more or fewer than the shape says.
    return np.frombuffer(raw, dtype.value).reshape(sizes, order="F" if order == "F" else "C")


def _empty(*arguments: Any) -> Any:
    # Files name this class, as what _reconstruct is to make; none calls it.
    raise Refused("it makes an array of no numbers")


def _reconstruct(subtype: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(_array(raw, dtype, shape, order))


def _scalar(dtype: Any, raw: Any = b"") -> _Array:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return _Array(_array(raw, dtype, (), "C"))


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"it calls _codecs.encode with {encoding!r}")
    return text.encode("latin1")


class _Callable:
    """What a name in a pickle stands for; without a state that the pickle could change."""

    __slots__ = ("_made",)

    def __init__(self, made: Callable[..., Any]) -> None:
        object.__setattr__(self, "_made", made)

    def __call__(self, *arguments: Any) -> Any:
        return self._made(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"it sets {name!r} of what it may only call")

    def __setstate__(self, state: Any) -> None:
        raise Refused("it changes what it may only call")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _empty,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{
        (f"numpy.{core}.{module}", name): made
        for core in ("core", "_core")
        for module, name, made in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Knows the stand-ins above and nothing else."""

    def __init__(self, content: Any) -> None:
        super().__init__(content, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in.

        Raises:
            Refused: there is none.
        """
        made = _KNOWN.get((module, name))
        if made is None:
            raise Refused(
                f"it asks for {module}.{name}, which weights have no need of (accepted: numpy's "
                "arrays, dict, list, text, numbers)"
            )
        return _Callable(made)
