"""Ten telling layers of ResNet-50: ours, eager's four passes, cuDNN's own fused convolution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu import operands
from gpu.device import Samples, capture, free_bytes, interleaved, is_cuda, l2_bytes, synchronize
from gpu.operands import Operands, find
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda_plan
from resnet_fused.roofline import conv_cost
from resnet_fused.triton import _tiles

LAYERS = {
    "1x1_64_256_at56": "expansion with a shortcut in the first stage: the most bytes a FLOP",
    "1x1_256_64_at56": "reduction in the first stage: memory-bound, one narrow tile of columns",
    "3x3_64_64_at56": "the first stage's 3x3: many pixels, 64 channels, short loops over channels",
    "1x1_128_512_at28": "expansion with a shortcut in the second stage",
    "3x3_128_128_at28": "the second stage's 3x3: near the roofline's ridge",
    "1x1s2_256_512_at56": "projection with stride 2: reads every other pixel",
    "3x3_256_256_at14": "the most frequent 3x3: bound by arithmetic",
    "1x1_256_1024_at14": "the most frequent layer of all",
    "3x3_512_512_at7": "49 pixels an image: few tiles, the longest reduction",
    "7x7s2_3_64_at224": "the stem: 3 channels, 49 taps",
}
"""Why each of them tells something that the others do not."""

BATCHES = (256, 32, 1)
MEMORY_BOUND = ("at56", "at28")
MOST_SETS = 32
EPS = 1e-5  # PyTorch takes no 0
PEER_ERROR = 2e-2
"""Relative rms error at which another library's output is no fair peer."""


def dtype_of(device: str) -> torch.dtype:
    """bfloat16; where Triton's interpreter runs, float32."""
    return torch.bfloat16 if is_cuda(device) else torch.float32


def layer_case(name: str, batch: int, device: str) -> ConvCase:
    """The layer at a batch size; its small stand-in on the CPU."""
    return operands.shrunk(find(name, batch), device)


def sets_of(case: ConvCase, dtype: torch.dtype, device: str) -> int:
    """How many sets of operands to rotate among, so that none is found in L2 again."""
    moved = conv_cost(case, dtype).bytes
    wanted = max(2, math.ceil(3 * l2_bytes(device) / max(1, moved)))
    free = free_bytes(device)
    if free is not None:
        # dy and y are not needed here; eager's intermediates are.
        wanted = min(wanted, max(1, int(0.5 * free / (6 * moved))))
    return min(wanted, MOST_SETS if is_cuda(device) else 2)


def make_set(case: ConvCase, dtype: torch.dtype, device: str, number: int) -> Operands:
    """Random operands made on the device; no gradients."""
    generator = torch.Generator(device).manual_seed(number)

    def image(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        return made.normal_(generator=generator)

    fan_in = case.c // case.groups * case.r * case.s
    scale = 0.5 + torch.rand(case.k, generator=generator, device=device)
    shift = torch.randn(case.k, generator=generator, device=device)
    residual = image(*case.output_shape) if case.residual else None
    weight = image(*case.weight_shape).mul_(fan_in**-0.5)
    nothing = torch.empty(0, device=device)
    return Operands(image(*case.input_shape), weight, scale, shift, residual, nothing, None)


def eager(case: ConvCase, given: Operands) -> Callable[[], Tensor]:
    """What PyTorch's modules do in inference: convolution, BatchNorm, add, ReLU."""
    normalised = batch_norm(given)

    def call() -> Tensor:
        y = normalised(F.conv2d(given.x, given.weight, None, *operands.geometry(case)))
        if given.residual is not None:
            y += given.residual
        return F.relu_(y) if case.act == "relu" else y

    return call


def batch_norm(given: Operands) -> Callable[[Tensor], Tensor]:
    """A BatchNorm in inference that is the operands' scale and shift."""
    mean, var = torch.zeros_like(given.scale), torch.ones_like(given.scale) - EPS
    return lambda y: F.batch_norm(y, mean, var, given.scale, given.shift, False, 0.0, EPS)


def cudnn_fused(case: ConvCase, given: Operands) -> Callable[[], Tensor]:
    """cuDNN's convolution with bias, shortcut and ReLU; BatchNorm folded beforehand."""
    weight = (given.weight.float() * given.scale.view(-1, 1, 1, 1)).to(given.weight.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = given.shift.to(given.weight.dtype)
    stride, padding, dilation, groups = operands.geometry(case)
    if given.residual is not None:
        return lambda: torch.cudnn_convolution_add_relu(
            given.x, weight, given.residual, 1.0, bias, stride, padding, dilation, groups
        )
    return lambda: torch.cudnn_convolution_relu(
        given.x, weight, bias, stride, padding, dilation, groups
    )


def warm(device: str, layer: str, batch: int, tile: str | None = None) -> dict[str, Any]:
    """Compiles what `time_layer` will launch, into Triton's cache, and checks its result.

    Args:
        device: where.
        layer: its name.
        batch: images that the configuration is chosen for; a few are computed and judged.
        tile: a configuration in place of the chosen one.
    """
    case, dtype = layer_case(layer, batch, device), dtype_of(device)
    given = make_set(case, dtype, device, 0)
    plan = _plan(case, given, tile)
    if plan is None:
        return {"ok": None, "skipped": "the configuration is never used for this product"}
    found = _check(case, given, plan, dtype, device)
    return {**found, "plan": plan.name, "configuration": plan.tile.name}


def _plan(case: ConvCase, given: Operands, tile: str | None) -> _tiles.Plan | None:
    product = operands.product_of("conv_bn_act", case, given)
    if tile is None:
        return operands.plan_of("conv_bn_act", case, given)
    limits = operands.limits_of(str(given.x.device))
    try:
        return _tiles.choose(product, limits, frozenset({tile}))
    except LookupError:
        return None


def _check(
    case: ConvCase, given: Operands, plan: _tiles.Plan, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    out = torch.empty(
        case.output_shape, dtype=dtype, device=device, memory_format=torch.channels_last
    ).fill_(math.nan)
    operands.launch("conv_bn_act", case, given, out, plan)
    return judge(case, given, out)


def judge(case: ConvCase, given: Operands, out: Tensor) -> dict[str, Any]:
    """The first and the last image of an output against float64, every element for being finite."""
    picked = sorted({0, case.n - 1})
    few = dataclasses.replace(case, n=len(picked))
    part = dataclasses.replace(
        given,
        x=given.x[picked],
        residual=None if given.residual is None else given.residual[picked],
    )
    found = operands.judge("conv_bn_act", few, part, out[picked], operands.mode_of(out.dtype))
    if not bool(torch.isfinite(out.sum(dtype=torch.float32))):
        found |= {"ok": False, "error": "elements were not written"}
    return found


def _peer_ok(case: ConvCase, given: Operands, y: Tensor) -> bool:
    few = dataclasses.replace(case, n=1)
    part = dataclasses.replace(
        given, x=given.x[:1], residual=None if given.residual is None else given.residual[:1]
    )
    oracle, _ = operands.oracle_and_bounds("conv_bn_act", few, part, operands.mode_of(y.dtype))
    error = (y[:1].double() - oracle).norm() / oracle.norm()
    return bool(error < PEER_ERROR)


def time_layer(
    device: str,
    layer: str,
    batch: int,
    flops: float,
    bandwidth: float,
    tiles: tuple[str, ...] = (),
    peers: bool = True,
    cuda: tuple[str, ...] = (),
    rounds: int = 11,
) -> dict[str, Any]:
    """Times one layer: every variant as a graph over several sets of operands, in turns.

    Args:
        device: where.
        layer: its name.
        batch: images.
        flops: FLOP/s that the device reaches.
        bandwidth: bytes/s that it moves.
        tiles: further configurations, for tuning.
        peers: whether to time eager and cuDNN.
        cuda: configurations of the CUDA kernel, "" for its own choice.
        rounds: samples of each variant.
    """
    case, dtype = layer_case(layer, batch, device), dtype_of(device)
    count = sets_of(case, dtype, device)
    sets = [make_set(case, dtype, device, number) for number in range(count)]
    outs = [
        torch.empty(case.output_shape, dtype=dtype, device=device,
                    memory_format=torch.channels_last)
        for _ in sets
    ]  # fmt: skip
    plan = operands.plan_of("conv_bn_act", case, sets[0])
    found: dict[str, Any] = {"sets": count, "plan": plan.name, "why": plan.why, "omitted": {}}
    variants: dict[str, Callable[[], Any]] = {}
    plans: dict[str, Any] = {"ours": plan, "ours_again": plan}
    for tile in tiles:
        other = _plan(case, sets[0], tile)
        if other is not None and other.name != plan.name:
            plans[tile] = other
    found["plans"] = {name: {"name": one.name, "one_loop": one.flat} for name, one in plans.items()}
    _add_cuda(case, sets[0], device, cuda, plans, found)
    for name, one in plans.items():
        replay = None
        try:
            replay = capture(_over(case, sets, outs, one), device)
            for out in outs:
                out.fill_(math.nan)
            replay()
            synchronize(device)
            judged = judge(case, sets[-1], outs[-1])
        except Exception as error:
            judged = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        if judged["ok"] and replay is not None:
            variants[name] = replay
            found.setdefault("truncate", judged["truncate"])
        elif name == "ours":
            return {**found, "ok": False, "error": judged["error"], "configuration": plan.tile.name}
        else:
            found["omitted"][name] = judged["error"]
    if peers:
        _add_peers(case, sets, device, variants, found["omitted"])
    timed = interleaved(variants, device, rounds)
    found |= _report(case, dtype, timed, count, flops, bandwidth)
    return {"ok": True, **found, "configuration": plan.tile.name, "samples": rounds}


def _add_cuda(
    case: ConvCase,
    given: Operands,
    device: str,
    names: tuple[str, ...],
    plans: dict[str, Any],
    found: dict[str, Any],
) -> None:
    """Adds variants of the CUDA kernel: "cuda" is its own choice, "cuda NAME" another one."""
    why = operands.why_no_cuda(device)
    for name in names:
        variant = f"cuda {name}".strip()
        if why is not None:
            found["omitted"][variant] = why
            continue
        known = _cuda_plan.configurations("conv_bn_act")
        wish = known.index(name) if name else -1
        plan = operands.plan_of("conv_bn_act", case, given, "cuda", wish)
        if plan.configuration < 0:
            if not name:
                found["omitted"][variant] = plan.why
            continue  # it is never used for this product
        plans[variant] = plan
        found["plans"][variant] = {"name": operands.title(plan), "why": plan.why}
        if not name:
            found["cuda_configuration"] = plan.name


def _over(
    case: ConvCase, sets: list[Operands], outs: list[Tensor], plan: Any
) -> Callable[[], None]:
    kind = "triton" if isinstance(plan, _tiles.Plan) else "cuda"

    def call() -> None:
        for given, out in zip(sets, outs, strict=True):
            operands.launch("conv_bn_act", case, given, out, plan, kind)

    return call


def _add_peers(
    case: ConvCase,
    sets: list[Operands],
    device: str,
    variants: dict[str, Callable[[], Any]],
    omitted: dict[str, str],
) -> None:
    """Adds eager and cuDNN's fused convolution, each with cuDNN's own search for algorithms."""
    makers: dict[str, Callable[[Operands], Callable[[], Tensor]]] = {
        "eager": lambda given: eager(case, given),
        "cudnn": lambda given: cudnn_fused(case, given),
    }
    torch.backends.cudnn.benchmark = True
    for name, maker in makers.items():
        if name == "cudnn" and not is_cuda(device):
            omitted[name] = "no cuDNN on the CPU"
            continue
        try:
            calls = [maker(given) for given in sets]
            if not _peer_ok(case, sets[0], calls[0]()):
                omitted[name] = f"its relative error is above {PEER_ERROR}"
                continue
            variants[name] = capture(lambda calls=calls: [call() for call in calls], device)
        except Exception as error:
            omitted[name] = f"{type(error).__name__}: {error}"


def _report(
    case: ConvCase,
    dtype: torch.dtype,
    timed: Samples,
    count: int,
    flops: float,
    bandwidth: float,
) -> dict[str, Any]:
    cost = conv_cost(case, dtype)
    floor = cost.seconds(flops, bandwidth)
    best = timed.median("ours") / count
    found: dict[str, Any] = {
        "us": timed.to_dict(count),
        "floor_us": 1e6 * floor,
        "tflops": 1e-12 * cost.flops / best,
        "gbs": 1e-9 * cost.bytes / best,
        "of_floor": floor / best,
        "noise": timed.ratio("ours", "ours_again"),
        "ratios": {},
    }
    for peer in ("eager", "cudnn"):
        if peer in timed.seconds:
            found["ratios"][f"over_{peer}"] = timed.ratio(peer, "ours")
            if "cuda" in timed.seconds:
                found["ratios"][f"cuda_over_{peer}"] = timed.ratio(peer, "cuda")
    return found


def time_bn_act(device: str, batch: int, bandwidth: float) -> dict[str, Any]:
    """`bn_act` with a shortcut on the first stage's output: Triton, CUDA, eager's three passes."""
    from gpu.bounds import _bn_act_launch
    from resnet_fused import _extension, numerics

    dtype = dtype_of(device)
    shape = (batch, 256, 56, 56) if is_cuda(device) else (2, 16, 6, 6)
    case = ConvCase("bn_act", *shape, k=shape[1], residual=True)
    sets = [make_set(case, dtype, device, number) for number in range(2)]
    outs = [torch.empty_like(given.x) for given in sets]
    variants: dict[str, Callable[[], Any]] = {}
    omitted: dict[str, str] = {}
    names = ["triton", "cuda"]
    if is_cuda(device) and not _extension.has_cuda_kernels():
        omitted[names.pop()] = _extension.why_not() or "the extension was built without nvcc"
    for name in names:
        launch = _bn_act_launch(name)
        if launch is None:
            omitted[name] = str(_extension.why_not())
            continue

        def call(launch: Callable[..., None] = launch) -> None:
            for given, out in zip(sets, outs, strict=True):
                launch(given.x, given.scale, given.shift, given.residual, out, "relu")

        replay = capture(call, device)
        for out in outs:
            out.fill_(math.nan)
        replay()
        first = [t[:1] for t in (sets[0].x, sets[0].residual, outs[0]) if t is not None]
        terms = (first[0], sets[0].scale, sets[0].shift, first[1])
        oracle = numerics.bn_act_oracle(*terms, "relu")
        check = numerics.check_bound(first[2], oracle, numerics.bn_act_bound(*terms, oracle))
        if not check.ok:
            return {"ok": False, "error": f"{name}: {check}"}
        variants[name] = replay
    passes = [_eager_bn_act(given) for given in sets]
    variants["eager"] = capture(lambda: [call() for call in passes], device)
    timed = interleaved(variants, device)
    moved = 3 * math.prod(shape) * dtype.itemsize
    return {
        "ok": True, "us": timed.to_dict(2), "floor_us": 1e6 * moved / bandwidth,
        "gbs": {name: 1e-9 * moved * 2 / timed.median(name) for name in variants},
        "ratios": {f"{n}_over_eager": timed.ratio("eager", n) for n in variants if n != "eager"},
        "omitted": omitted,
    }  # fmt: skip


def _eager_bn_act(given: Operands) -> Callable[[], Tensor]:
    normalised = batch_norm(given)

    def call() -> Tensor:
        y = normalised(given.x)
        y += given.residual
        return F.relu_(y)

    return call
