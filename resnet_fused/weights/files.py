"""Which of the formats a file is in, and the one way to read them all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from resnet_fused.weights import caffe, detectron, tensors
from resnet_fused.weights.released import Weights, WeightsError

_READERS: dict[str, Callable[[Path], Weights]] = {
    "torch": tensors.read_torch,
    "safetensors": tensors.read_safetensors,
    "caffe": caffe.read,
    "detectron": detectron.read,
}

FORMATS = ("auto", *_READERS)
"""What `format` may be: found out, `torch.save`'s, safetensors, Caffe's, Detectron's pickles."""

SUFFIXES = {
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".tar": "torch",
    ".safetensors": "safetensors",
    ".caffemodel": "caffe",
    ".pkl": "detectron",
}
"""What a suffix promises, where a file's first bytes do not tell."""

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
# torch.save before 1.6: a pickle of this number comes first.
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = b"\x80"
_HEAD_BYTES = 16


def read(path: str | os.PathLike[str], format: str = "auto") -> Weights:
    """Reads a file of weights as a state_dict in torchvision's names.

    Args:
        path: of the file.
        format: of `FORMATS`; "auto" goes by the first bytes, then by the suffix.

    Returns:
        The tensors, on the CPU (Caffe's and Detectron's in float32, their first convolution turned
        from BGR to RGB), and what the format says of the network and its images.

    Raises:
        WeightsError: no such file, a broken one, one in another format, or one that would run code;
            and a network by Caffe's or Detectron's names of which something is missing.
        ValueError: an unknown format.
        ModuleNotFoundError: what reads the format is not installed (protobuf, safetensors).

    Example:
        >>> model.load_state_dict(rf.weights.read("resnet50.safetensors"))
    """
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}, accepted is one of {', '.join(FORMATS)}")
    file = Path(path)
    if file.is_dir():
        raise WeightsError(f"'{file}' is a directory; give a file")
    try:
        with open(file, "rb") as opened:
            head = opened.read(_HEAD_BYTES)
        return _READERS[_found(file, head) if format == "auto" else format](file)
    except FileNotFoundError:
        raise WeightsError(f"no such file: '{file}'") from None
    except PermissionError:
        raise WeightsError(f"no permission to read '{file}'") from None
    except OSError as error:
        raise WeightsError(f"'{file}' cannot be read ({error.strerror or error})") from error


def _found(file: Path, head: bytes) -> str:
    """The format of a file that begins so."""
    if not head:
        raise WeightsError(f"'{file}' is corrupt or no file of weights: it is empty")
    if head.startswith(_HDF5):
        raise WeightsError(
            f"'{file}' is an HDF5 file; accepted of Caffe's is the binary .caffemodel"
        )
    if head.startswith((_ZIP, _TORCH_MAGIC)):
        return "torch"
    promised = SUFFIXES.get(file.suffix.lower())
    if head[8:9] == b"{" and promised in (None, "safetensors"):
        return "safetensors"
    if head.startswith(_PICKLE) and promised in (None, "detectron"):
        return "detectron"
    if promised is None:
        raise WeightsError(
            f"'{file}' begins as no format that is read; give format=..., one of "
            f"{', '.join(FORMATS[1:])}, or a file that ends in {', '.join(SUFFIXES)}"
        )
    return promised
