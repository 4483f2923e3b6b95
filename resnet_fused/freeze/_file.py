"""Saved engines: the plain graph with its constants, and what it was made with.

A file holds tensors and one JSON text, no code; it is read with `weights_only=True`, and the
functions that it may name are a fixed list. What is packed or captured for a machine is not in it:
an engine is always rebuilt from the plain constants where it is loaded, so that another
architecture or library version gives a slower start and never a wrong answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from . import _calls, _rules
from ._ir import FUSED, Const, Graph, Ref, Step

logger = logging.getLogger("resnet_fused")
FORMAT = "resnet_fused engine"
VERSION = 1


class Content(NamedTuple):
    """What is saved.

    Attributes:
        graph: before the rules that depend on a device.
        notes: of the rules that were applied.
        examples: an input each, of which shape, dtype and layout are kept.
        dtype: of the activations.
        device: where the engine ran.
        max_shapes: of the engine.
        name: of the model.
    """

    graph: Graph
    notes: Sequence[_rules.Note]
    examples: Sequence[Tensor]
    dtype: torch.dtype
    device: torch.device
    max_shapes: int
    name: str


def made_with(device: torch.device) -> dict[str, str]:
    """Device kind, architecture and library versions that an engine is made with."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = f"sm_{major}{minor}"
    else:
        architecture = torch.backends.cpu.get_cpu_capability()
    return {
        "device": device.type,
        "architecture": architecture,
        "torch": str(torch.__version__),
        "resnet_fused": __version__,
    }


def _encoded(part: Any, where: str) -> Any:
    """Arguments as what JSON holds."""
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, Ref):
        return {"$": "ref", "is": part.value}
    if isinstance(part, Const):
        return {"$": "const", "is": part.name}
    if isinstance(part, torch.dtype | torch.memory_format | torch.layout):
        return {"$": "torch", "is": str(part).removeprefix("torch.")}
    if part is ...:
        return {"$": "ellipsis", "is": None}
    if isinstance(part, slice):
        ends = [part.start, part.stop, part.step]
        return {"$": "slice", "is": [_encoded(end, where) for end in ends]}
    if isinstance(part, list):
        return [_encoded(one, where) for one in part]
    if type(part) in (tuple, torch.Size):
        return {"$": "tuple", "is": [_encoded(one, where) for one in part]}
    if type(part) in (dict, OrderedDict) and all(isinstance(name, str) for name in part):
        kind = "dict" if type(part) is dict else "ordered"
        return {"$": kind, "is": [[name, _encoded(one, where)] for name, one in part.items()]}
    raise ValueError(f"save: {where} holds a {type(part).__name__}, which a file cannot hold")


def _torch_value(name: str) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        raise ValueError(f"the file names torch.{name}, which is no dtype, layout or memory format")
    return value


def _decoded(part: Any) -> Any:
    if isinstance(part, list):
        return [_decoded(one) for one in part]
    if not isinstance(part, dict):
        return part
    kind, value = part["$"], part["is"]
    if kind == "ref":
        return Ref(value)
    if kind == "const":
        return Const(value)
    if kind == "torch":
        return _torch_value(value)
    if kind == "ellipsis":
        return ...
    if kind == "slice":
        return slice(*(_decoded(end) for end in value))
    if kind == "tuple":
        return tuple(_decoded(one) for one in value)
    pairs = [(name, _decoded(one)) for name, one in value]
    return OrderedDict(pairs) if kind == "ordered" else dict(pairs)


def _target(step: Step) -> str | None:
    if step.target is None:
        return None
    if isinstance(step.target, str):
        known = step.target in _calls.METHODS
        name = f"method {step.target}"
    else:
        found = _calls.NAMES.get(step.target)
        known, name = found is not None, f"function {found or step.target}"
    if not known:
        raise ValueError(
            f"save: {step.name} calls the {name}, which a saved engine may not name; "
            "make the engine anew by rf.freeze where it is needed"
        )
    return name


def _step(step: Step, at: int) -> dict[str, Any]:
    if step.module is not None:
        layer = step.name or "the whole model"
        raise ValueError(
            f"save: {layer} runs as a module ({step.why}), and a file holds no code; make the "
            "engine anew by rf.freeze where it is needed"
        )
    return {
        "kind": step.kind,
        "name": step.name,
        "inputs": list(step.inputs),
        "outputs": list(step.outputs),
        "tensors": sorted(step.tensors),
        "options": _encoded(step.options, step.name),
        "why": step.why,
        "target": _target(step),
        "pattern": step.pattern,
    }


def _restored(saved: dict[str, Any], at: int, tensors: dict[str, Tensor]) -> Step:
    target: Any = saved["target"]
    if target is not None:
        kind, _, name = target.partition(" ")
        if kind == "method" and name not in _calls.METHODS:
            raise ValueError(f"the file names the method {name!r}, which is not known here")
        target = name if kind == "method" else _calls.function(name)
    return Step(
        saved["kind"],
        saved["name"],
        tuple(saved["inputs"]),
        tuple(saved["outputs"]),
        {name: tensors[f"{at}.{name}"] for name in saved["tensors"]},
        _decoded(saved["options"]),
        saved["why"],
        target,
        pattern=saved["pattern"],
    )


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} {t.stride()}".encode())
        digest.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _layout(x: Tensor) -> dict[str, Any]:
    nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return {
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "channels_last": nhwc and not x.is_contiguous(),
    }


def _example(saved: dict[str, Any], device: torch.device) -> Tensor:
    x = torch.zeros(saved["shape"], dtype=_torch_value(saved["dtype"]), device=device)
    return x.contiguous(memory_format=torch.channels_last) if saved["channels_last"] else x


def write(content: Content, stream: BinaryIO) -> None:
    """Writes an engine.

    Raises:
        ValueError: it holds modules or functions that a file cannot hold; named.
    """
    graph = content.graph
    steps = [_step(step, at) for at, step in enumerate(graph.steps)]
    tensors = {
        f"{at}.{name}": t.cpu()
        for at, step in enumerate(graph.steps)
        for name, t in step.tensors.items()
    }
    text = json.dumps(
        {
            "version": VERSION,
            "made_with": made_with(content.device),
            "dtype": str(content.dtype).removeprefix("torch."),
            "name": content.name,
            "max_shapes": content.max_shapes,
            "examples": [_layout(x) for x in content.examples],
            "steps": steps,
            "inputs": list(graph.inputs),
            "output": _encoded(graph.output, "the output"),
            "notes": [list(note) for note in content.notes],
        }
    )
    saved = {"format": FORMAT, "text": text, "tensors": tensors, "hash": _digest(text, tensors)}
    torch.save(saved, stream)


def save(content: Content, path: str | os.PathLike[str]) -> None:
    """Writes an engine to a file that is whole or not there: a temporary one takes its name.

    Raises:
        ValueError: see `write`; nothing is written then.
        OSError: the file cannot be written.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    with contextlib.suppress(OSError):  # not every file system has it for a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(source: Any, device: torch.device | None, what: str) -> Content:
    """Reads an engine.

    Args:
        source: a path or an open file.
        device: where it is to run; None is where it ran.
        what: what to call the source in a message.

    Raises:
        ValueError: it is no engine, damaged, of a newer version, or made for a device that is not
            there.
    """
    try:
        saved = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        line = str(error).partition("\n")[0]
        raise ValueError(f"{what} is no saved engine, or damaged: {line}") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{what} is no saved engine; accepted is what Engine.save has written")
    text, tensors = saved["text"], saved["tensors"]
    if _digest(text, tensors) != saved["hash"]:
        raise ValueError(f"{what} is damaged: its hash is not that of its content")
    plain = json.loads(text)
    if plain["version"] != VERSION:
        raise ValueError(
            f"{what} is of version {plain['version']}; this resnet_fused reads {VERSION}"
        )
    kind = plain["made_with"]["device"]
    where = torch.device(kind) if device is None else device
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{what} was made for cuda, and no GPU is here; give device='cpu'")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    now = made_with(where)
    other = [f"{name} {plain['made_with'][name]}, now {now[name]}" for name in now
             if plain["made_with"].get(name) != now[name]]  # fmt: skip
    if other:
        logger.info("%s was made with %s: it is built anew", what, "; ".join(other))
    tensors = {name: t.to(where) for name, t in tensors.items()}
    return _content(plain, tensors, where)


def _content(plain: dict[str, Any], tensors: dict[str, Tensor], where: torch.device) -> Content:
    unknown = {step["kind"] for step in plain["steps"]}.difference(_calls.KINDS, FUSED)
    if unknown:
        raise ValueError(f"the file has steps that are not known here: {', '.join(unknown)}")
    steps = tuple(_restored(step, at, tensors) for at, step in enumerate(plain["steps"]))
    graph = Graph(steps, tuple(plain["inputs"]), _decoded(plain["output"]))
    return Content(
        graph,
        [_rules.Note(*note) for note in plain["notes"]],
        [_example(one, where) for one in plain["examples"]],
        _torch_value(plain["dtype"]),
        where,
        plain["max_shapes"],
        plain["name"],
    )
