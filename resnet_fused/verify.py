"""`verify`: a user's own model, fused, against its unfused self in float64.

Three questions, from sharp to blunt. Every fused layer is judged element by element, on the very
input that it got in the fused run, against its own Conv2d and BatchNorm in float64 and the bound of
its roundings (`numerics`, the bound tier). Every block's error is compared with that of the unfused
block in the model's dtype (the relative tier), which also sees a shortcut that was left out. Last
the model's output, in which all errors meet.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, numerics
from ._verification import BlockCheck, EndToEnd, LayerCheck, Verification
from .convert import fuse, unfuse
from .nn import _blocks
from .nn._modules import is_norm

Progress = Callable[[int, int, str], None]

# Elements of a layer's output that are judged at once. Temporaries of 16 MiB come from memory that
# the allocator has at hand; larger ones are mapped anew each time, which took twice as long.
_CHUNK = 1 << 21


class _Steps:
    """Counts what is done for the caller's progress display."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def begin(self, what: str) -> None:
        if self._progress is not None:
            self._progress(min(self._done, self._total - 1), self._total, what)
        self._done += 1

    def end(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total, "done")


@dataclass
class _Block:
    """What is compared with its unfused self: a block, or a layer outside of blocks."""

    name: str
    x: Tensor
    y: Tensor
    plain: nn.Module
    folded: bool = False


def verify(
    model: nn.Module, x: Tensor, *, images: int | None = None, progress: Progress | None = None
) -> Verification:
    """Compares a model's fused inference with the unfused modules in float64.

    The model runs in inference mode, whatever its training flags are; those, its parameters,
    buffers, gradients, hooks and the random state are the same afterwards.

    Args:
        model: fused, or plain: then a fused tree is made beside it.
        x: [N, C, H, W] of the model's dtype and device; a few real images.
        images: how many of them layers and blocks are judged on, the first ones; all by default.
            The model's output is judged on all.
        progress: called as progress(done, total, what) before each step and at the end.

    Returns:
        The checks; its ``ok`` and ``failures`` sum up, ``str()`` is a table.

    Raises:
        TypeError: model is no module, or x is no floating-point tensor.
        ValueError: images is below 1; x has not 4 dimensions, no images, or another dtype than the
            parameters; or the model holds nothing that runs fused.
    """
    _check_arguments(model, x)
    if images is not None and images < 1:
        raise ValueError(f"images is {images}; accepted are 1 or more, or None for all")
    fused = model if _holds_fused(model) else fuse(model)
    if not _holds_fused(fused):
        raise ValueError("model holds no block or conv-BN that rf.fuse knows: nothing to verify")
    plain = unfuse(fused)
    blocks = _block_names(fused)
    convs = sum(isinstance(m, nn.Conv2d) for m in fused.modules())
    steps = _Steps(progress, 3 + convs + len(blocks))
    with _inference(fused), _inference(plain), torch.no_grad():
        steps.begin("the fused model")
        y, routes, parts = _run(fused, x, blocks, plain)
        judged = len(x) if images is None else min(images, len(x))
        _keep_first(judged, len(x), routes, parts)
        names = {id(module): name for name, module in fused.named_modules()}
        layers, skipped = _check_layers(routes, names, parts, steps)
        compared = []
        while parts:
            part = parts.pop(0)
            steps.begin(f"block {part.name}")
            compared.append(_check_block(part))
        steps.begin("the unfused model in float64")
        oracle = _in_float64(plain, x)
        steps.begin("the unfused model")
        for eager in _eager(plain, x):
            end = _check_end(y, eager, oracle, x)
            if end.ok:
                break
    steps.end()
    dtype = str(x.dtype).removeprefix("torch.")
    return Verification(
        tuple(layers), tuple(compared), end, dtype, tuple(x.shape), judged, tuple(skipped)
    )


def _check_arguments(model: nn.Module, x: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted is an nn.Module")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {given}; accepted is a tensor of float32, bfloat16 or float16")
    if x.dim() != 4 or not x.numel():
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted is [N, C, H, W] with images in it"
        )
    if x.dtype is torch.float64:
        raise TypeError(
            "x is torch.float64, the precision of the oracle itself; accepted are float32, "
            "bfloat16 and float16"
        )
    numerics.unit_roundoff(x.dtype)
    own = next((p for p in model.parameters() if p.is_floating_point()), x)
    if own.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x is {x.dtype} and the model's parameters are {own.dtype}; convert one")
    if own.device != x.device:
        raise ValueError(f"x is on {x.device} and the model on {own.device}; move one")


def _holds_fused(model: nn.Module) -> bool:
    return any(isinstance(m, _blocks.Fused) for m in model.modules())


def _block_names(fused: nn.Module) -> list[str]:
    """Blocks, and fused sequences that stand outside of blocks and hold none."""
    taken: list[str] = []
    module: Any
    for name, module in fused.named_modules():
        if any(name.startswith(f"{other}.") or not other for other in taken):
            continue
        holds = any(isinstance(m, _blocks.FusedBlock) for m in module.modules())
        sequence = isinstance(module, _blocks.FusedSequential) and not holds
        if isinstance(module, _blocks.FusedBlock) or sequence:
            taken.append(name)
    return taken


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module's own flag comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _same_random(x: Tensor) -> Iterator[None]:
    """Every run draws the same random numbers, and none of them is missing later."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _run(
    fused: nn.Module, x: Tensor, blocks: list[str], plain: nn.Module
) -> tuple[object, list[backends.Route], list[_Block]]:
    """Runs the fused model; keeps each layer's and each block's tensors."""
    parts: list[_Block] = []
    handles = []

    def keep(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(_module: nn.Module, args: tuple[object, ...], y: object) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(y, Tensor):
                # A copy: what follows may work in place.
                parts.append(_Block(name, args[0], y.clone(), plain.get_submodule(name)))

        return hook

    try:
        for name in blocks:
            handles.append(fused.get_submodule(name).register_forward_hook(keep(name)))
        with backends.recording(keep=True) as routes, _same_random(x):
            y = fused(x)
    finally:
        for handle in handles:
            handle.remove()
    return y, routes, parts


def _keep_first(images: int, given: int, routes: list[backends.Route], parts: list[_Block]) -> None:
    """Drops all but the first images from what was kept, where that has one entry an image."""
    if images == given:
        return
    for kept in (*routes, *parts):
        for name in ("x", "residual", "y"):
            t = getattr(kept, name, None)
            if t is not None and len(t) == given:
                setattr(kept, name, t[:images])


def _check_layers(
    routes: list[backends.Route], names: dict[int, str], parts: list[_Block], steps: _Steps
) -> tuple[list[LayerCheck], list[str]]:
    """Judges each layer; those outside of blocks are entered into ``parts`` as well."""
    checks: list[LayerCheck] = []
    skipped: list[str] = []
    inside = {id(m): part for part in parts for m in part.plain.modules()}
    alone: list[_Block] = []
    calls: dict[str, int] = {}
    while routes:
        route = routes.pop(0)
        name = names.get(id(route.conv), "?")
        calls[name] = calls.get(name, 0) + 1
        if calls[name] > 1:
            name = f"{name} (call {calls[name]})"
        steps.begin(f"layer {name}")
        if route.x is None or route.y is None:
            skipped.append(f"{name}: {route.why}")
            continue
        checks.append(_check_layer(name, route))
        folded = route.rounding == "folded"
        if id(route.conv) in inside:
            inside[id(route.conv)].folded |= folded
        elif route.residual is None:
            chain = nn.Sequential(route.conv, route.bn, *([route.act] if route.act else []))
            alone.append(_Block(name, route.x, route.y, chain, folded))
    parts[:0] = alone
    return checks, skipped


def _check_layer(name: str, route: backends.Route) -> LayerCheck:
    assert route.x is not None
    assert route.y is not None
    about = (name, route.pattern, route.implementation, route.rounding, tuple(route.y.shape))
    conv, bn = _float64(route.conv), _float64(route.bn)
    act = None if route.act is None else _float64(route.act)
    if _has_bound(route):
        return LayerCheck(*about, *_judge(route, conv, bn, act))
    # PyTorch's own modules, of a kind for which there is no bound: their error is measured again.
    oracle = _chain(conv, bn, act, route.x.double(), _double(route.residual))
    own = copy.deepcopy(nn.ModuleList([route.conv, route.bn]))
    eager = _chain(own[0], own[1], copy.deepcopy(route.act), route.x, route.residual)
    check = numerics.relative_check(route.y, eager, oracle)
    return LayerCheck(*about, check.max, check.ratio / check.limit, 0, check.ok)


def _has_bound(route: backends.Route) -> bool:
    """Whether the layer is a plain convolution with known statistics: all that bounds speak of."""
    bn: Any = route.bn
    conv = route.conv
    if type(conv) is not nn.Conv2d or not is_norm(bn) or bn.running_mean is None:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (conv, bn))
    return not hooked and (route.act is None or type(route.act) is nn.ReLU)


def _judge(
    route: backends.Route, conv: Any, bn: Any, act: nn.Module | None
) -> tuple[float, float, int, bool]:
    """(largest error, largest error/bound, elements beyond the bound, ok) of one layer."""
    x, y = route.x, route.y
    assert x is not None
    assert y is not None
    # Under autocast the layer rounded its operands first: those are the values it was given.
    own: Any = route.conv
    x, weight = x.to(y.dtype), own.weight.detach().to(y.dtype)
    residual = None if route.residual is None else route.residual.to(y.dtype)
    conv.weight = nn.Parameter(weight.double(), requires_grad=False)
    scale, shift, magnitude = _affine(conv, bn)
    geometry = {k: getattr(conv, k) for k in ("stride", "padding", "dilation", "groups")}
    images = max(1, _CHUNK // max(1, y[0].numel())) if len(y) else 1
    error = worst = 0.0
    count = 0
    for i in range(0, len(y), images):
        part = slice(i, i + images)
        rest = None if residual is None else residual[part]
        oracle = _chain(conv, bn, act, x[part].double(), _double(rest))
        bound = numerics.conv_bn_act_bound(
            x[part],
            weight,
            scale,
            shift,
            rest,
            oracle,
            **geometry,
            rounding=route.rounding,
            accumulation="truncate" if y.device.type == "cuda" else "nearest",
            shift_magnitude=magnitude,
        )
        check = numerics.check_bound(y[part], oracle, bound)
        error, worst = max(error, check.error), max(worst, check.worst)
        count += check.count
    return error, worst, count, count == 0


def _affine(conv: Any, bn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, shift, and the magnitude of what the shift is the sum of; [K] float64 each."""
    scale = (bn.running_var + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    mean = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
    shift, magnitude = mean * scale, bn.running_mean.abs() * scale.abs()
    if conv.bias is not None:
        magnitude = magnitude + conv.bias.abs() * scale.abs()
    if bn.bias is not None:
        shift, magnitude = shift + bn.bias, magnitude + bn.bias.abs()
    return scale.detach(), shift.detach(), magnitude.detach()


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _float64(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def _chain(
    conv: nn.Module, bn: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False) if x.dtype is torch.float64 else _nothing():
        y = bn(conv(x))
        if residual is not None:
            y = y + residual
        return y if act is None else act(y)


def _nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _in_float64(module: nn.Module, x: Tensor) -> object:
    """A plain module's output in float64."""
    with torch.autocast(x.device.type, enabled=False), _same_random(x):
        return _float64(module)(x.double())


def _eager(module: nn.Module, x: Tensor) -> Iterator[object]:
    """A plain module's output in its own dtype: as given, then in channels_last.

    oneDNN adds in another order there, with 2 to 4 times the error in float32; fused layers may run
    in it whatever layout they are given. Both are eager PyTorch. The module runs on copies, so that
    in-place activations see neither the model's nor our tensors.
    """
    for layout in (torch.preserve_format, torch.channels_last):
        copied = copy.deepcopy(module)
        if layout is torch.channels_last:
            copied = copied.to(memory_format=layout)
        with _same_random(x):
            yield copied(x.clone(memory_format=layout))


def _check_block(part: _Block) -> BlockCheck:
    oracle = _in_float64(part.plain, part.x)
    assert isinstance(oracle, Tensor)
    for eager in _eager(part.plain, part.x):
        assert isinstance(eager, Tensor)
        check = numerics.relative_check(part.y, eager, oracle, folded=part.folded)
        if check.ok:
            break
    return BlockCheck(part.name, check.rms, check.eager_rms, check.ratio, check.limit, check.ok)


def _leaves(y: object) -> list[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(y, Tensor):
        return [y] if y.is_floating_point() else []
    if isinstance(y, dict):
        return [leaf for value in y.values() for leaf in _leaves(value)]
    if isinstance(y, (list, tuple)):
        return [leaf for value in y for leaf in _leaves(value)]
    return []


def _check_end(y: object, eager: object, oracle: object, x: Tensor) -> EndToEnd:
    ours, theirs, exact = _leaves(y), _leaves(eager), _leaves(oracle)
    limit = numerics.END_TO_END_LIMIT * numerics.chance(sum(t.numel() for t in exact))
    if [t.shape for t in ours] != [t.shape for t in exact]:
        return EndToEnd(math.inf, math.nan, math.inf, math.inf, math.nan, limit, None, False)
    flat = [torch.cat([t.double().flatten() for t in ts]) for ts in (ours, theirs, exact)]
    check = numerics.gradient_check(*flat)
    agree = None
    if len(ours) == 1 and ours[0].dim() == 2 and len(ours[0]) == len(x):
        agree = float((ours[0].argmax(1) == exact[0].argmax(1)).double().mean())
    return EndToEnd(
        check.rms, check.eager_rms, check.ratio, check.max, check.eager_max, limit, agree,
        check.ratio <= limit,
    )  # fmt: skip
