"""Training's and sm_90a's CUDA kernels by the driver, without torch: right, then how fast.

compute-sanitizer goes over the same small calls where there is a driver (`driver.CALLS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu import driver
from gpu.device import is_cuda

REPEATS = 20
LIMIT_S = 60.0
"""Of one call: the reference in double runs on the CPU."""


class Timed(NamedTuple):
    """A call of ResNet-50's size.

    Attributes:
        words: of the driver, beside the op and the data.
        moved: bytes that it cannot but read and write, values of channels left out.
    """

    words: tuple[str, ...]
    moved: int


def _sized(n: int, c: int, side: int) -> tuple[str, ...]:
    return ("--n", str(n), "--c", str(c), "--h", str(side), "--w", str(side))


BLOCK, STEM, CONV = 32 * 256 * 56 * 56, 32 * 64 * 112 * 112, 8 * 64 * 56 * 56
"""Elements: of a block's end in the first stage, of the stem's result, of a 3x3's operands."""
TIMED = {
    "conv_bn_stats": Timed((*_sized(8, 64, 56), "--k", "64", "--normed"), 2 * CONV * 2),
    # A block's end in the first stage: the raw output, the shortcut and out of 256 channels.
    "bn_add_act_conv_stats": Timed(
        (*_sized(8, 256, 56), "--k", "64", *driver.A_1X1), (3 * 4 * CONV + CONV) * 2
    ),
    # Random numbers: sums of so many integers would not be exact.
    "conv_bn_dgrad": Timed(
        (*_sized(8, 64, 56), "--k", "64", "--affine", "--normed", "--data", "normals"), 4 * CONV * 2
    ),
    "conv_bn_wgrad": Timed(
        (*_sized(8, 64, 56), "--k", "64", "--affine", "--normed", "--data", "normals"), 3 * CONV * 2
    ),
    # The expansion of the first stage: dz and y of 256 channels, x and its gradient of 64.
    "conv_bn_grad1x1": Timed(
        (
            *(*_sized(8, 64, 56), "--k", "256", *driver.A_1X1),
            *("--affine", "--normed", "--data", "normals"),
        ),
        (2 * 4 * CONV + 2 * CONV) * 2,
    ),
    "bn_add_act": Timed((*_sized(32, 256, 56), "--residual"), 3 * BLOCK * 2),
    "bn_add_act_backward": Timed((*_sized(32, 256, 56), "--residual"), 4 * BLOCK * 2),
    "bn_backward_apply": Timed(_sized(32, 256, 56), 3 * BLOCK * 2),
    # Windows are a quarter of the pixels; of each a result and a tap.
    "bn_act_pool": Timed((*_sized(32, 64, 112), "--stride", "2"), STEM * 2 + STEM // 4 * 3),
    "bn_act_pool_backward": Timed(
        (*_sized(32, 64, 112), "--stride", "2"), 2 * STEM * 2 + STEM // 4 * 3
    ),
}
"""In bfloat16, with a cold L2."""
ASKED = {"bn_add_act": 0.9, "bn_add_act_backward": 0.9}
"""Of a copy's rate, what passes that only move memory are to reach."""


CHECKED = {"training": driver.TRAINING, "sm90a": driver.SM90A_CALLS}
"""Small calls by what they are of; the latter are for GPUs of capability 9.0 alone."""


def check(device: str, program: str | None = None, of: str = "training") -> dict[str, Any]:
    """Every small call on integers and on random data, against double.

    Args:
        device: where; the driver itself knows whether it is emulated.
        program: the driver; None for one that is built.
        of: a key of `CHECKED`.
    """
    if of == "sm90a" and is_cuda(device) and torch.cuda.get_device_capability(device) != (9, 0):
        return {"ok": None, "skipped": "these kernels are for GPUs of capability 9.0"}
    worst: dict[str, float] = {}
    for words in CHECKED[of]:
        for data in ("integers", "normals"):
            one = driver.called((*words, "--data", data), program, LIMIT_S)
            if not one["ok"]:
                return one
            worst[one["op"]] = max(worst.get(one["op"], 0.0), one["worst"])
    return {"ok": True, "worst": max(worst.values()), "ops": worst}


def time(device: str, op: str, bandwidth: float, program: str | None = None) -> dict[str, Any]:
    """One call of ResNet-50's size, checked and timed; off a GPU a small one, without a time.

    Args:
        device: where.
        op: of `TIMED`.
        bandwidth: bytes a second of a copy on this device.
        program: the driver; None for one that is built.
    """
    timed = TIMED[op]
    real = (*timed.words, "--repeats", str(REPEATS))
    words = real if is_cuda(device) else (*timed.words, "--n", "1", "--h", "8", "--w", "8")
    one = driver.called(("--op", op, *words), program, LIMIT_S)
    if not one["ok"]:
        return one
    found: dict[str, Any] = {"ok": True, "plan": one["plan"], "moved": timed.moved}
    if "milliseconds" in one:
        seconds = 1e-3 * one["milliseconds"]
        found |= {"microseconds": 1e6 * seconds, "of_floor": timed.moved / bandwidth / seconds}
        if op in ASKED:
            found["asked"] = ASKED[op]
    return found


def line(one: Mapping[str, Any]) -> str:
    """The time in words."""
    if "microseconds" not in one:
        return ""
    said = f"{one['microseconds']:.1f} us, {100 * one['of_floor']:.0f}% of a copy's rate"
    below = one["of_floor"] < one.get("asked", 0)
    return said + (f", BELOW the {100 * one['asked']:.0f}% that are asked for" if below else "")
