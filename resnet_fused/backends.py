"""Which implementation serves a call, and why.

A registry: ops enter their implementations themselves, in order of preference. `choose` asks each
one in turn and keeps every refusal with its reason; the user's word comes first, then the
environment variable `RESNET_FUSED_BACKEND`, then the order of preference. `recording` collects what
the layers of a model took, for `explain` and `verify`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import admission

logger = logging.getLogger("resnet_fused")

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
GPU_BACKENDS = ("triton", "cuda")
ENVIRONMENT = "RESNET_FUSED_BACKEND"

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


class Call(NamedTuple):
    """What an implementation is asked to serve: facts about the arguments, no tensors.

    Attributes:
        op: name of the op, such as "conv_bn_act".
        device: device type, "cpu" or "cuda".
        dtype: dtype of the activations.
        grad: whether gradients are wanted.
        residual: whether there is a residual.
        act: "relu" or "none".
        index: of the GPU, for "cuda"; None for the current one.
        scale_grad: whether the gradient of scale is wanted.
    """

    op: str
    device: str
    dtype: torch.dtype
    grad: bool = False
    residual: bool = False
    act: str = "relu"
    index: int | None = None
    scale_grad: bool = False


@dataclass(frozen=True)
class Implementation:
    """One implementation of one op.

    Attributes:
        op: the op that it implements.
        name: overload name and what `explain` prints.
        backends: the words in `BACKENDS` that ask for it.
        about: one line for `info`.
        supports: returns None when it can serve the call, else the reason why not.
        rounding: which error bound of `numerics` it is held to.
    """

    op: str
    name: str
    backends: tuple[str, ...]
    about: str
    supports: Callable[[Call], str | None]
    rounding: str


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a call, why, and what was refused on the way."""

    implementation: Implementation
    why: str
    refused: tuple[tuple[str, str], ...] = ()


@dataclass
class Route:
    """What one conv-BN of a fused module did in one forward pass.

    Attributes:
        conv: the convolution; its name in the model names the layer.
        bn: the normalisation behind it.
        act: the activation that was fused, or None.
        pattern: "conv+bn", "conv+bn+relu", "conv+bn+add" or "conv+bn+add+relu".
        op: the op of `resnet_fused` that ran, or "-" where PyTorch's own modules ran.
        implementation: "cpu", "split", "reference", "triton", "cuda" or "modules".
        why: why this one.
        refused: (implementation, reason) of those preferred over it.
        rounding: "fused", "folded", "stored_conv" or "modules": the error bound that applies.
        x: the layer's input [N, C, H, W], kept by `recording(keep=True)`.
        residual: the tensor added before the activation [N, K, P, Q], likewise.
        y: the layer's output [N, K, P, Q], likewise.
    """

    conv: nn.Module
    bn: nn.Module
    act: nn.Module | None
    pattern: str
    op: str
    implementation: str
    why: str
    refused: tuple[tuple[str, str], ...] = ()
    rounding: str = "modules"
    x: Tensor | None = None
    residual: Tensor | None = None
    y: Tensor | None = None


@dataclass
class _Recorder:
    keep: bool
    routes: list[Route] = field(default_factory=list)


_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)
_registry: dict[str, list[Implementation]] = {}
_forgotten = 0  # how often choices were forgotten


def register(implementation: Implementation) -> None:
    """Enters an implementation; those entered first are preferred.

    Raises:
        ValueError: the op has one of this name already.
    """
    known = _registry.setdefault(implementation.op, [])
    if any(other.name == implementation.name for other in known):
        raise ValueError(f"{implementation.op} has an implementation {implementation.name!r}")
    known.append(implementation)
    forget_choices()


def implementations(op: str | None = None) -> tuple[Implementation, ...]:
    """The implementations of one op, or of all, in order of entry: preferred ones first."""
    if op is not None:
        return tuple(_registry.get(op, ()))
    return tuple(entry for entries in _registry.values() for entry in entries)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        accepted = ", ".join(BACKENDS)
        raise ValueError(f"{source}: unknown backend {name!r}; accepted are {accepted}")
    return name


def requested() -> tuple[str, str]:
    """The backend that is asked for, and who asks: ("auto", "default") if nobody does.

    The environment variable is read once, when it is first needed.

    Raises:
        ValueError: the environment variable holds no backend's name.
    """
    name = _chosen.get()
    if name is not None:
        return name, "rf.backend"
    return _environment()


@functools.cache
def _environment() -> tuple[str, str]:
    # Read once: os.environ takes longer than the rest of a choice.
    name = os.environ.get(ENVIRONMENT)
    if name:
        return _check_name(name, f"environment variable {ENVIRONMENT}"), ENVIRONMENT
    return "auto", "default"


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Asks for a backend within a `with` block, in this thread or task only.

    A call that the backend can't serve runs on PyTorch's own ops, with one warning that says why.

    Args:
        name: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: another name.
    """
    token = _chosen.set(_check_name(name, "backend(name)"))
    try:
        yield
    finally:
        _chosen.reset(token)


def _preferred(call: Call) -> list[Implementation]:
    """An op's implementations; of two GPU kernels that records have timed, the faster one first.

    Over the layers that both were timed on, on this architecture and with these sources, the mean
    of the logarithms of the ratios decides. Without such records the order of entry stands.
    """
    entries = _registry[call.op]
    places = [place for place, entry in enumerate(entries) if entry.name in GPU_BACKENDS]
    if call.device != "cuda" or len(places) < 2:
        return entries
    first, second = places[:2]
    mine, other = (
        admission.timings(call.op, entries[place].name, call.index) for place in (first, second)
    )
    layers = mine.keys() & other.keys()
    if sum(math.log(mine[layer] / other[layer]) for layer in layers) <= 0:
        return entries
    swapped = list(entries)
    swapped[first], swapped[second] = entries[second], entries[first]
    return swapped


@functools.lru_cache(maxsize=4096)
def _choose(
    call: Call, asked: tuple[str, str], onednn: bool, generation: Hashable = None
) -> Choice:
    wanted, source = asked
    refused: list[tuple[str, str]] = []
    entries = _preferred(call)
    for entry in entries:
        if wanted != "auto" and wanted not in entry.backends:
            continue
        reason = entry.supports(call)
        if reason is None:
            if wanted != "auto":
                return Choice(entry, f"{source} asks for it", tuple(refused))
            missing = [
                (name, absent(call.op, name))
                for name in GPU_BACKENDS
                if not any(name == other.name for other in entries)
            ]
            return Choice(entry, f"the fastest that serves {call.device}", (*missing, *refused))
        refused.append((entry.name, reason))
    if wanted in ("auto", "reference"):
        raise RuntimeError(f"no implementation serves {call}: {refused}")
    if not refused:
        refused.append((wanted, absent(call.op, wanted)))
    fallback = next(entry for entry in entries if "reference" in entry.backends)
    why = f"{source} asks for {wanted}, but: {refused[0][1]}"
    logger.warning("%s runs on PyTorch's own ops: %s", call.op, why)
    return Choice(fallback, why, tuple(refused))


def choose(call: Call) -> Choice:
    """Picks the implementation for a call: the user's word, the environment, then preference.

    Args:
        call: the facts of the call.

    Returns:
        The choice, with its reason and every refusal before it. A requested backend that cannot
        serve gives the plain PyTorch implementation and one warning in the log.

    Raises:
        ValueError: the environment variable holds no backend's name.
    """
    asked, onednn, generation, _ = circumstances(call.device, call.index)
    return _choose(call, asked, onednn, generation)


def circumstances(device: str, index: int | None) -> tuple[tuple[str, str], bool, Hashable, int]:
    """What choices for a device depend on beside the call: what keeps choices keeps these too.

    Args:
        device: its type.
        index: of the GPU, as in `Call`.
    """
    # oneDNN can be switched off at any time (torch.backends.mkldnn.flags): part of the key. So are
    # what admission knows, whether it may find out now, and whether convolutions may take TF32; a
    # call on the CPU need not ask.
    name = _chosen.get()  # requested(), without the call
    asked = _environment() if name is None else (name, "rf.backend")
    onednn = torch._C._get_mkldnn_enabled()
    generation = None
    if device == "cuda":
        generation = admission.generation(index), torch._C._get_cudnn_allow_tf32()
    return asked, onednn, generation, _forgotten


def absent(op: str, backend: str) -> str:
    """What to say of a backend that has no implementation of an op."""
    return f"no {backend} kernel of {op} in this version"


def next_choice(call: Call, refused: Choice, reason: str) -> Choice:
    """The choice after one that the call's own tensors spoke against.

    Args:
        call: the facts of the call.
        refused: what was chosen by them.
        reason: why it can't be.
    """
    name = refused.implementation.name
    entries = _preferred(call)
    position = entries.index(refused.implementation)
    following = next(entry for entry in entries[position + 1 :] if entry.supports(call) is None)
    return Choice(following, refused.why, (*refused.refused, (name, reason)))


def forget_choices() -> None:
    """Makes every later call be chosen afresh, warned about again, and the environment be read."""
    global _forgotten
    _forgotten += 1
    _choose.cache_clear()
    _environment.cache_clear()


@contextlib.contextmanager
def recording(*, keep: bool = False) -> Iterator[list[Route]]:
    """Collects the routes of all fused layers that run in the block, in order of execution.

    Args:
        keep: keep each layer's input, residual and output tensors too.

    Yields:
        The list that fills while the block runs.
    """
    recorder = _Recorder(keep)
    token = _recorder.set(recorder)
    try:
        yield recorder.routes
    finally:
        _recorder.reset(token)


def is_recording() -> bool:
    """Whether somebody collects routes: layers skip the bookkeeping otherwise."""
    return _recorder.get() is not None


def record(
    route: Route,
    x: Tensor | None = None,
    residual: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Adds a route to the current recording, with its tensors if those are kept."""
    recorder = _recorder.get()
    if recorder is None:
        return
    if recorder.keep and x is not None and y is not None:
        # Copies: a later module may work in place.
        route.x, route.y = x.detach().clone(), y.detach().clone()
        route.residual = None if residual is None else residual.detach().clone()
    recorder.routes.append(route)
