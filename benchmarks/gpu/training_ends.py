"""The gradient between two blocks on the device: rows of blocks that take it, and the two ways."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf
from gpu.device import capture, interleaved, is_cuda
from gpu.network import dtype_of
from gpu.training import BATCH, HOPPER, kernels
from resnet_fused import backends, numerics, ops
from resnet_fused.bench import work
from resnet_fused.bench.subject import Subject, conv_case
from resnet_fused.bench.training_kernels import KINDS
from resnet_fused.ops import _end_gradient, _grad1x1
from resnet_fused.triton._grad1x1 import serves

OP = _end_gradient.OP
BLOCKS = 3


def ends() -> list[str]:
    """The calls of the op in ResNet-50, the heaviest first."""
    return kernels(OP, 99)


def _row(dtype: torch.dtype, device: str) -> tuple[nn.Module, Tensor]:
    """Three bottlenecks, the first one projected, and images; with what 16 bits see of them."""
    torch.manual_seed(4)
    down = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    blocks = [
        rf.nn.Bottleneck(32, 16, 2, down), *(rf.nn.Bottleneck(64, 16) for _ in range(BLOCKS - 1)),
    ]  # fmt: skip
    row = rf.unfuse(nn.Sequential(*blocks)).to(device)
    x = torch.randn(BATCH, 32, 15, 13, device=device)
    with torch.no_grad():
        for t in (*row.parameters(), x):
            t.copy_(t.to(dtype))
    return row.train(), x


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of a step."""
    x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    out = model(x)
    generator = torch.Generator().manual_seed(7)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    assert x.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, **found}


def row(device: str) -> dict[str, Any]:
    """A row's step with the gradients between its blocks by one op, beside the step by two.

    Both are held against float64: each gradient's error may be as large as the other way's is, but
    for chance.

    Args:
        device: where.
    """
    dtype = dtype_of(device)
    model, x = _row(dtype, device)
    oracle = _step(copy.deepcopy(model).double(), x.double())
    found, ended = {}, 0
    for word in ("always", "never"):
        fused = rf.fuse(copy.deepcopy(model).to(dtype))
        with (
            backends.backend("triton"), backends.recording() as routes,
            _end_gradient.preferring(word), _grad1x1.preferring("never"),
        ):  # fmt: skip
            found[word] = _step(fused, x.to(dtype))
        ended += sum(f"before it by one op ({OP})" in route.why for route in routes)
    wrong, worst = [], 0.0
    for name, grad in found["always"].items():
        check = numerics.gradient_check(grad, found["never"][name], oracle[name])
        of_limit = check.ratio / (check.limit * numerics.chance(grad.numel()))
        worst = max(worst, of_limit)
        if not of_limit <= 1:
            wrong.append(f"{name}: {check}")
    ok = not wrong and ended == BLOCKS - 1
    result: dict[str, Any] = {"ok": ok, "worst": worst, "ended": ended}
    if not ok:
        result["error"] = f"{ended} of {BLOCKS - 1} by one op; {'; '.join(wrong[:3])}"
    return result


def _ways(case: Any) -> dict[str, Callable[[Any], tuple[Tensor, ...]]]:
    """Both gradients of a convolution and the end of the block before: (dz, sums, dweight)."""
    weight, behind = KINDS["conv_bn_wgrad"].ours(case), KINDS[OP].ours(case)

    def passed(dout: Tensor, given: Any) -> tuple[Tensor, Tensor]:
        return ops.bn_add_act_backward(dout, given.h, given.x, given.norm)

    def reading(given: Any) -> Any:
        """The operands of the weights' gradient, which reads the block's output."""
        return dataclasses.replace(given, x=given.h, norm=None)

    def one(given: Any) -> tuple[Tensor, ...]:
        return *behind(given), weight(reading(given))

    def two(given: Any) -> tuple[Tensor, ...]:
        dout, _ = ops.conv_bn_dgrad(
            given.dz, given.weight, given.y, given.coefficients, input_size=given.h.shape,
            addend=given.addend, **case.geometry,
        )  # fmt: skip
        return *passed(dout, given), weight(reading(given))

    def merged(given: Any) -> tuple[Tensor, ...]:
        dout, _, dweight = ops.conv_bn_grad1x1(
            given.dz, given.h, given.weight, given.y, given.coefficients, addend=given.addend
        )
        return *passed(dout, given), dweight

    plain = _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups)
    found = {"one": one, "two": two}
    if plain and serves(case.k, case.c, 2, HOPPER) is not None:
        found["merged"] = merged
    return found


def time(device: str, name: str, batch: int) -> dict[str, Any]:
    """Times the ways to both gradients of a convolution and the end before it, each checked.

    Args:
        device: where.
        name: of a call, as `ends` has them.
        batch: images.

    Returns:
        "us" of each way; "ratios" over the one op's; "expected": whether nodes take that one, why.
    """
    kind = "cuda" if is_cuda(device) else "cpu"
    precision = "bfloat16" if is_cuda(device) else "float16"
    made = work.build(Subject("kernel", OP, name, batch, precision, kind))
    case: Any = conv_case(name, batch)
    with torch.inference_mode(), backends.backend("triton"):
        ways = _ways(case)
        for way, run in ways.items():
            judged = made.judge(run(made.sets[0])[:2])
            if not judged.ok:
                return {"ok": False, "error": f"{name}, {way}: {judged.text}"}
        variants = {
            way: capture(lambda run=run: [run(one) for one in made.sets], device)
            for way, run in ways.items()
        }
        timed = interleaved(variants, device)
        given = made.sets[0]
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        place = _end_gradient.Place(
            given.h.device, given.h.dtype, case.input_shape, case.weight_shape, geometry,
            projected=False, added=1,
        )  # fmt: skip
        expected = _end_gradient.way(place, folds=True)
    return {
        "ok": True, "us": timed.to_dict(len(made.sets)),
        "ratios": {f"{way}_over_one": timed.ratio(way, "one") for way in ways if way != "one"},
        "expected": {"ended": expected.ended, "why": expected.why}, "omitted": {},
    }  # fmt: skip
