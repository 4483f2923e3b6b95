"""What a result may not depend on: repetition, streams, graphs, threads, the size of a tensor."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import torch
from torch import Tensor

import resnet_fused as rf
from gpu import operands
from gpu.device import capture, free_bytes, is_cuda, same_bits, side_stream, synchronize
from gpu.operands import find, kernel_of
from resnet_fused import numerics
from resnet_fused.cases import ConvCase
from resnet_fused.triton import _tiles

SPLIT_LAYERS = ("1x1_2048_512_at7", "3x3_512_512_at7")
REPEATS = 250


def determinism(
    device: str, op: str, case: str, repeats: int = REPEATS, implementation: str = "triton"
) -> dict[str, Any]:
    """A split reduction, many times over: the same bits each time."""
    if implementation == "cuda" and (why := operands.why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    made = find(case, 8 if op == "conv_wgrad" else 1)
    if not is_cuda(device):
        depth = {"conv_bn_act": {"c": 160}, "conv_dgrad": {"k": 160}}.get(op, {})
        made = dataclasses.replace(made, **{"n": 1, "c": 32, "k": 32, "h": 12, "w": 12, **depth})
    dtype = torch.bfloat16 if is_cuda(device) else torch.float16
    given = operands.make(made, dtype, device)
    plan = operands.plan_of(op, made, given, implementation)
    depth = operands.product_of(op, made, given).depth
    if plan.splits == 1 and depth * dtype.itemsize >= 2 * _tiles.DEPTH_BYTES:
        plan = _in_two(plan)
    if plan.splits == 1:
        return {"ok": None, "skipped": f"{depth} is too short a reduction to be split"}
    _, first = operands.poisoned(op, made, dtype, device)
    operands.launch(op, made, given, first, plan, implementation)
    differ = torch.zeros((), dtype=torch.int64, device=device)
    again = torch.empty_like(first)
    repeats = repeats if is_cuda(device) else 2
    for _ in range(repeats):
        again.fill_(math.nan)
        operands.launch(op, made, given, again, plan, implementation)
        differ += (again.view(torch.int16) != first.view(torch.int16)).sum()
    count = int(differ)
    found = {
        "ok": count == 0,
        "plan": operands.title(plan),
        "splits": plan.splits,
        "repeats": repeats,
    }
    if count:
        found["error"] = f"{count} elements differed from the first run's"
    elif not bool(torch.isfinite(first).all()):
        found |= {"ok": False, "error": "elements were not written"}
    return found


def _in_two(plan: Any) -> Any:
    """The same plan with its reduction split."""
    if isinstance(plan, _tiles.Plan):
        return dataclasses.replace(plan, splits=2)
    return plan._replace(splits=2)


def _tensors(device: str) -> tuple[ConvCase, operands.Operands]:
    case = find("3x3_residual")
    if is_cuda(device):
        case = dataclasses.replace(case, c=96, k=200, h=28, w=28)
    return case, operands.make(case, torch.bfloat16 if is_cuda(device) else torch.float16, device)


def _forward(case: ConvCase, given: operands.Operands, implementation: str = "triton") -> Tensor:
    with rf.backend(implementation):
        return rf.ops.conv_bn_act(
            given.x, given.weight, given.scale, given.shift, given.residual,
            **case.geometry, act=case.act,
        )  # fmt: skip


def stream(device: str, implementation: str = "triton") -> dict[str, Any]:
    """On a side stream, behind work that is still under way there: as on the default stream."""
    if implementation == "cuda" and (why := operands.why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    case, given = _tensors(device)
    expected = _forward(case, given, implementation)
    again = operands.make(case, given.x.dtype, device, salt="other")
    with side_stream(device):
        if is_cuda(device):
            torch.cuda._sleep(20_000_000)  # a kernel on another stream would read the old data
        again.x.copy_(given.x)
        for name in ("weight", "scale", "shift", "residual"):
            getattr(again, name).copy_(getattr(given, name))
        y = _forward(case, again, implementation)
    synchronize(device)
    return {"ok": same_bits(y, expected)}


def graph(device: str, implementation: str = "triton") -> dict[str, Any]:
    """Captured once, replayed with new data in the same tensors."""
    if implementation == "cuda" and (why := operands.why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    case, given = _tensors(device)
    kept: list[Tensor] = []

    def call() -> None:
        kept[:] = [_forward(case, given, implementation)]

    replay = capture(call, device)
    worst = True
    for number in range(3):
        fresh = operands.make(case, given.x.dtype, device, salt=str(number))
        for name in ("x", "weight", "scale", "shift", "residual"):
            getattr(given, name).copy_(getattr(fresh, name))
        replay()
        synchronize(device)
        worst = worst and same_bits(kept[0], _forward(case, fresh, implementation))
    return {"ok": worst}


def threads(device: str, count: int = 2, implementation: str = "triton") -> dict[str, Any]:
    """Two threads at once, each with its own data: what each gets alone."""
    if implementation == "cuda" and (why := operands.why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    made = [_tensors(device)[0]] * count
    given = [
        operands.make(case, _tensors(device)[1].x.dtype, device, salt=str(number))
        for number, case in enumerate(made)
    ]
    expected = [_forward(case, one, implementation) for case, one in zip(made, given, strict=True)]
    synchronize(device)
    wrong: list[str] = []

    def work(number: int) -> None:
        try:
            for _ in range(20 if is_cuda(device) else 2):
                y = _forward(made[number], given[number], implementation)
                if not same_bits(y, expected[number]):
                    wrong.append(f"thread {number} got another result")
                    return
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
        if not is_cuda(device):
            worker.join()  # Triton's interpreter serves one thread at a time
    for worker in workers:
        worker.join()
    return {"ok": not wrong, **({"error": "; ".join(wrong)} if wrong else {})}


def large(device: str, op: str, implementation: str = "triton") -> dict[str, Any]:
    """More than 2^31 elements, bfloat16: the first, the crossing and the last images are judged.

    The gradient of the weight sums over all images; those that are not judged are zero there.
    """
    if implementation == "cuda" and (why := operands.why_no_cuda(device)) is not None:
        return {"ok": None, "skipped": why}
    channels, size = 64, 224
    images = 2**31 // (channels * size * size) + 4 if is_cuda(device) else 5
    size = size if is_cuda(device) else 4
    shape = (images, channels, size, size)
    elements = math.prod(shape)
    free = free_bytes(device)
    tensors = 3 if op in ("conv_wgrad", "bn_act") else 2
    if free is not None and free < 2.3 * tensors * elements:
        return {"ok": None, "skipped": f"needs {2.3 * tensors * elements / 1e9:.0f} GB free"}
    dtype = torch.bfloat16 if is_cuda(device) else torch.float16
    crossing = min(images - 2, 2**31 // (channels * size * size))
    judged = [0, crossing, images - 1]
    case = ConvCase("large", images, channels, size, size, channels)
    small = dataclasses.replace(case, n=len(judged))
    few = operands.make(small, dtype, device)

    def spread(t: Tensor) -> Tensor:
        whole = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        whole.zero_()
        for place, image in zip(judged, t, strict=True):
            whole[place] = image
        return whole

    if op == "bn_act":
        x, out = spread(few.x), spread(few.dy)
        kernel_of("bn_act").launch(x, few.scale, few.shift, None, out, "relu")
        oracle = numerics.bn_act_oracle(few.x, few.scale, few.shift, None, "relu")
        bound = numerics.bn_act_bound(few.x, few.scale, few.shift, None, oracle)
        check = numerics.check_bound(out[judged], oracle, bound)
        found: dict[str, Any] = {"ok": check.ok, "truncate": check.worst}
        return {**found, "elements": elements, **({} if check.ok else {"error": str(check)})}
    given = dataclasses.replace(few, y=None)
    mode = "bf16" if dtype is torch.bfloat16 else "fp16"
    if op == "conv_bn_act":
        given.x = spread(few.x)
    elif op == "conv_dgrad":
        given.dy, given.x = spread(few.dy), torch.empty(shape, device="meta")
    else:
        given.x, given.dy = spread(few.x), spread(few.dy)
    form = operands.output_shape(op, case)
    out = torch.empty(form, dtype=dtype, device=device, memory_format=torch.channels_last)
    out.fill_(math.nan)
    if op == "conv_dgrad":
        given.x = out
    operands.launch(op, case, given, out, implementation=implementation)
    part = out if op == "conv_wgrad" else out[judged]
    found = operands.judge(op, small, dataclasses.replace(few, y=None), part, mode)
    return {**found, "elements": elements}
