"""Which layers and blocks train as one autograd node, and why others do not.

Each forward decides anew, as `_route` does for inference: anything out of the ordinary about the
modules leaves them to PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..ops import _autocast, _block_end, _end_gradient, _finalize, _grad1x1, _triton
from . import _prepared
from . import _training as node
from ._modules import call_reason, has_hooks, is_frozen_type, pattern_of, structure

OPS = (
    "conv_bn_stats",
    "bn_finalize",
    "bn_add_act",
    "bn_add_act_backward",
    "bn_backward_finalize",
    "bn_backward_apply",
    "conv_bn_dgrad",
    "conv_bn_wgrad",
)
NO_WAY = _block_end.Way(False, "")
"""Of a block's end that no convolution could be folded into."""
NO_GRADIENT = _end_gradient.Way(False, "")
"""Likewise of the gradient behind it."""
POOL_OPS = ("bn_act_pool", "bn_act_pool_backward")
FEWEST_ELEMENTS = 196_608
"""Of a layer's output, on average, for a node on the CPU where nobody asks for one by name.

Between the sizes at which a node was measured to lose and to win ("A training step on the CPU" in
docs/measured_facts.md).
"""


class Pair(NamedTuple):
    """A convolution and its normalisation."""

    conv: nn.Module
    bn: nn.Module


def is_live(bn: nn.Module) -> bool:
    """Whether a normalisation uses the batch's statistics in this call."""
    if is_frozen_type(type(bn)):
        return False
    buffers = bn._buffers
    return bn.training or buffers["running_mean"] is None or buffers["running_var"] is None


def _pair_reason(conv: nn.Module, bn: nn.Module) -> str | None:
    reason = structure(conv, bn, live=True)
    if reason is None and conv._parameters["bias"] is not None:
        reason = "the convolution has a bias, which live statistics cancel: left to PyTorch"
    return reason


def _tensors_reason(x: Tensor, dtype: torch.dtype, pairs: list[Pair]) -> str | None:
    """Why the layers' own tensors are none that a node takes, or None."""
    for conv, bn in pairs:
        weight = conv._parameters["weight"]
        if type(weight) is not Tensor and type(weight) is not nn.Parameter:
            return f"a convolution's weight is a {type(weight).__name__}"
        if weight.dtype != dtype and torch.float64 in (weight.dtype, dtype):
            return f"a weight is {weight.dtype}, the arithmetic {dtype}: PyTorch reports it"
        if dtype == x.dtype != weight.dtype and _autocast.dtype_for(x.device.type) is None:
            return f"input {dtype}, a weight {weight.dtype}: PyTorch reports it"
        vectors = {**bn._parameters, **bn._buffers}
        for t in (weight, *vectors.values()):
            if t is not None and t.device != x.device:
                return f"input on {x.device}, a layer's tensors on {t.device}: PyTorch reports it"
    return None


def _shape_after(shape: torch.Size, pairs: list[Pair]) -> torch.Size | None:
    """The shape behind layers that follow each other; None where something does not fit.

    Raises:
        ValueError: a live BatchNorm would see one value a channel; nothing has been computed.
    """
    too_few = None
    for conv, bn in pairs:
        weight, groups = conv._parameters["weight"], conv.groups
        n, channels, *sizes = shape
        outputs, inputs, *window = weight.shape
        vectors = [
            t for name, t in (*bn._parameters.items(), *bn._buffers.items())
            if t is not None and name != "num_batches_tracked"
        ]  # fmt: skip
        if channels != inputs * groups or outputs % groups:
            return None
        if any(t.shape != (outputs,) for t in vectors):
            return None
        sizes = [
            (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
            for size, pad, dil, kernel, step in zip(
                sizes, conv.padding, conv.dilation, window, conv.stride, strict=True
            )
        ]
        if min(sizes) < 1:
            return None
        shape = torch.Size([n, outputs, *sizes])
        if n * sizes[0] * sizes[1] == 1 and is_live(bn) and _process_group(bn) is None:
            too_few = too_few or shape
    if too_few is not None:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {too_few}"
        )
    return shape


UNFIT = "the shapes do not fit: PyTorch reports it"


class TooSmall(str):
    """A reason: the modules of all layers are to run, none of them as a node of its own."""

    __slots__ = ()


def too_small(x: Tensor, pairs: Sequence[tuple[Any, ...]]) -> TooSmall | None:
    """Why PyTorch's modules are faster on the CPU, or None.

    What a node costs is the same for every layer; what it saves grows with the layer's output.

    Args:
        x: the input.
        pairs: convolution and normalisation of each layer, and whatever else.
    """
    if not FEWEST_ELEMENTS or x.device.type != "cpu" or backends.requested()[0] != "auto":
        return None
    if x.dim() != 4:
        return None
    n, _, height, width = x.shape
    pixels, elements = n * height * width, 0
    for conv, bn, *_ in pairs:
        # PyTorch's SyncBatchNorm takes nothing that is on the CPU.
        if type(conv) is not nn.Conv2d or type(bn) is nn.SyncBatchNorm:
            return None
        pixels //= conv.stride[0] * conv.stride[1]
        elements += pixels * conv.out_channels
    elements //= len(pairs)
    if elements >= FEWEST_ELEMENTS:
        return None
    return TooSmall(
        f"training: {elements:,} elements a layer; PyTorch's modules are faster on the CPU below "
        f'{FEWEST_ELEMENTS:,} (rf.backend("cpu") takes the node)'
    )


def _forget(pairs: list[Pair]) -> None:
    """Drops weights prepared for inference: a step is likely to follow.

    PyTorch's fused optimisers write parameters without leaving a new version behind.
    """
    if torch.is_grad_enabled():
        for conv, _ in pairs:
            conv.__dict__.pop(_prepared.ATTRIBUTE, None)
            _prepared.before_a_step(conv, conv._parameters["weight"])


def _process_group(bn: nn.Module) -> Any:
    """The processes that a SyncBatchNorm shares its batch with, or None for this one alone."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


def _layer(conv: nn.Module, bn: nn.Module) -> node.Layer:
    geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    live = is_live(bn)
    return node.Layer(geometry, bn, live, _process_group(bn) if live else None)


def serving(
    x: Tensor, dtype: torch.dtype, pool: bool = False
) -> tuple[backends.Choice, str | None]:
    """The choice for the convolutions of such a call, and why training is left to PyTorch, or None.

    Plain PyTorch's references are for those who ask for them: they are no faster than the modules.
    """
    ops = (*OPS, *POOL_OPS) if pool else OPS
    index, kind = x.device.index, x.device.type
    first = backends.choose(backends.Call(OPS[0], kind, dtype, True, index=index))
    asked = backends.requested()[0]
    if asked == "reference":
        return first, None
    for op in ops:
        choice = backends.choose(backends.Call(op, kind, dtype, True, index=index))
        # Vectors alone are PyTorch's on the CPU: those references serve it by name.
        plain = choice.implementation.name == "reference"
        if plain and kind not in choice.implementation.backends:
            refused = "; ".join(f"{name}: {reason}" for name, reason in choice.refused)
            return first, f"no kernel serves {op} in training ({refused or choice.why})"
    if kind == "cuda":
        # Backward asks for it: a self-check that is due belongs here, not into a backward pass.
        backends.choose(backends.Call(_grad1x1.OP, kind, dtype, index=index))
    return first, None


def _parameters(pairs: list[Pair]) -> tuple[Tensor | None, ...]:
    """Weight, gamma and beta of each layer; frozen ones' gamma and beta are no parameters."""
    found: list[Tensor | None] = []
    for conv, bn in pairs:
        affine = bn._parameters
        found += [conv._parameters["weight"], affine.get("weight"), affine.get("bias")]
    return tuple(found)


def _record(
    pairs: list[Pair],
    acts: list[nn.Module | None],
    choice: backends.Choice,
    added: int | None,
    x: Tensor,
    dtype: torch.dtype,
    before: _block_end.Way = NO_WAY,
    gradient: _end_gradient.Way = NO_GRADIENT,
) -> None:
    """Notes what each layer took.

    Args:
        pairs: the layers, in a row.
        acts: their activations.
        choice: of the convolutions.
        added: the one that the shortcut is added behind.
        x: what the first one reads.
        dtype: of the arithmetic.
        before: how the end of the block before, which the first one reads, is made.
        gradient: how the gradient behind that end is made.
    """
    if not backends.is_recording():
        return
    shape = x.shape
    for index, (pair, act) in enumerate(zip(pairs, acts, strict=True)):
        why = f"training, one autograd node: {choice.why}"
        ended = index == 0 and gradient.ended
        how = "" if ended else _gradients(pair.conv, shape, x, dtype, choice, index > 0)
        more = [how] if how else []
        if index == 0 and gradient.why:
            more.append(
                f"gradient of the end of the block before it by {gradient.how}: {gradient.why}"
            )
        if index == 0 and before.why:
            more.append(f"with the end of the block before it by {before.how}: {before.why}")
        if said := _finalizing(pair, choice, x.device, dtype, index == 0 and before.folded):
            more.append(said)
        if choice.implementation.name == "triton":
            image = gradient.op if ended else "conv_bn_dgrad"
            more += _tuned(pair.conv, shape, x.device, dtype, index > 0, image)
        backends.record(
            backends.Route(
                pair.conv,
                pair.bn,
                act,
                pattern_of(act, index == added),
                "conv_bn_stats",
                choice.implementation.name,
                "; ".join([why, *more]),
                choice.refused,
                choice.implementation.rounding,
            )
        )
        shape = _shape_after(shape, [pair]) or shape


def _tuned(
    conv: nn.Module,
    shape: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
    inner: bool,
    image: str,
) -> list[str]:
    """Which configurations of a convolution and its gradients, `image` among them, tuning chose."""
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    call = device, dtype, shape, conv._parameters["weight"].shape, geometry
    said = (
        (op, _triton.tuned(op, *call, third))
        for op, third in (
            ("conv_bn_stats", inner), (image, True), ("conv_bn_wgrad", True)
        )
    )  # fmt: skip
    return [f"{op} {why}" for op, why in said if why]


def _finalizing(
    pair: Pair, choice: backends.Choice, device: torch.device, dtype: torch.dtype, made: bool
) -> str:
    """By what a convolution's BatchNorm is finalized, where that could be its own launch."""
    way = _finalize.way(choice, device, dtype)
    if not way.why or not is_live(pair.bn):
        return ""
    if way.merged and (made or _process_group(pair.bn) is not None):
        other = "the block before made the convolution" if made else "statistics are exchanged"
        way = _finalize.Way(False, other)
    return f"BatchNorm finalized by {way.how}: {way.why}"


def _gradients(
    conv: nn.Module,
    shape: torch.Size,
    x: Tensor,
    dtype: torch.dtype,
    choice: backends.Choice,
    inner: bool,
) -> str:
    """Which way a 1x1 convolution's gradients will take, where both are wanted."""
    weight = conv._parameters["weight"]
    if not torch.is_grad_enabled() or not weight.requires_grad or not (inner or x.requires_grad):
        return ""
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    way = _grad1x1.way(
        x.device, dtype, shape, weight.shape, geometry,
        folds=choice.implementation.name in backends.GPU_BACKENDS, masked=inner,
    )  # fmt: skip
    return f"both gradients by {way.how}: {way.why}" if way.why else ""


def _act_reason(act: nn.Module | None) -> str | None:
    if act is None or (type(act) is nn.ReLU and not has_hooks(act)):
        return None
    return f"the activation is a {type(act).__name__}, or has a hook"


def run_layer(
    x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module | None, residual: Tensor | None
) -> tuple[Tensor | None, str]:
    """One conv-BN(-add)(-ReLU) with a live BatchNorm.

    Returns:
        [N, K, P, Q] and "", or None and why the modules are to run.
    """
    reason = _pair_reason(conv, bn) or call_reason(x, conv, residual)
    pairs = [Pair(conv, bn)]
    reason = reason or too_small(x, pairs)
    if reason is not None:
        return None, reason
    dtype = _autocast.arithmetic(x)
    choice, reason = serving(x, dtype)
    reason = reason or _tensors_reason(x, dtype, pairs)
    if reason is not None:
        return None, reason
    shape = _shape_after(x.shape, pairs)
    if shape is None or (residual is not None and residual.shape != shape):
        return None, UNFIT
    _forget(pairs)
    plan = node.Plan(
        (_layer(conv, bn),),
        shortcut="none" if residual is None else "given",
        act="none" if act is None else "relu",
        folds=choice.implementation.name in backends.GPU_BACKENDS,
        finalizes=_finalize.way(choice, x.device, dtype).merged,
    )
    _record(pairs, [act], choice, None if residual is None else 0, x, dtype)
    given = None if residual is None else residual.to(dtype)
    return node.run(plan, x.to(dtype), given, _parameters(pairs)), ""


def run_stem(
    x: Tensor, conv: nn.Module, bn: nn.Module, act: nn.Module, pool: nn.Module
) -> tuple[Tensor | None, str]:
    """A convolution, live BatchNorm, ReLU and max pooling: as `run_layer`."""
    reason = _pair_reason(conv, bn) or call_reason(x, conv, None) or _act_reason(act)
    pairs = [Pair(conv, bn)]
    reason = reason or too_small(x, pairs)
    if reason is not None:
        return None, reason
    dtype = _autocast.arithmetic(x)
    choice, reason = serving(x, dtype, pool=True)
    reason = reason or _tensors_reason(x, dtype, pairs)
    if reason is not None:
        return None, reason
    if _shape_after(x.shape, pairs) is None:
        return None, UNFIT
    _forget(pairs)
    plan = node.Plan(
        (_layer(conv, bn),),
        window=pooling_window(pool),
        folds=choice.implementation.name in backends.GPU_BACKENDS,
        finalizes=_finalize.way(choice, x.device, dtype).merged,
    )
    _record(pairs, [act], choice, None, x, dtype)
    return node.run(plan, x.to(dtype), None, _parameters(pairs)), ""


def pooling_window(pool: nn.Module) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel, stride and padding of a max pooling that follows a stem, or None for others."""
    if type(pool) is not nn.MaxPool2d or has_hooks(pool) or pool.return_indices or pool.ceil_mode:
        return None
    sizes = [_two(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    kernel, stride, padding, dilation = sizes
    return (kernel, stride, padding) if dilation == [1, 1] and max(kernel) <= 15 else None


def _two(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
