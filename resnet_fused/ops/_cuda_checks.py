"""Self-checks of the CUDA convolutions: a configuration at a time, on integers, every bit known.

They run in the child process of `resnet_fused._selfcheck`, and as the first stage of `gpu-check`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..cases import ConvCase
from . import _cuda, _cuda_plan
from ._selfchecks import CONV_CASES, channels_last, gradient_inputs, guarded, require_exact

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPLITS = {"conv_bn_act": (1, 2), "conv_dgrad": (1, 2), "conv_wgrad": (1, 3)}
"""Of the case "3x3"; the other ones are not split."""
CLUSTERS = (2, 4, 8)
"""Splits of configurations by clusters, which do nothing else, and of every case."""

BELOW = 1 - 2.0**-13
"""Times this an integer of float32 is what TF32 has only rounded: cut it would be another one."""

WINDOW = ConvCase("window", 3, 64, 19, 15, 128, 3, 3, (1, 1), (1, 1), residual=True)
"""For configurations that take 3x3 filters over 64 channels alone: tiles that end in rows, several
images in one, two columns of channels."""
SLICED = dataclasses.replace(WINDOW, name="window_slices", c=192)
"""For those that take more channels, 64 at a time."""


def _names(op: str) -> tuple[str, ...]:
    names = _cuda_plan.configurations(op)
    if not names:
        raise ImportError(f"the extension holds no CUDA kernel of {op}")
    return names


def index_of(op: str, configuration: str) -> int:
    """The index of one of an op's configurations.

    Raises:
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    return place_of(configuration, _names(op))


def place_of(configuration: str, names: Sequence[str]) -> int:
    """The index of a configuration among the names of all.

    Raises:
        ValueError: it is none of them.
    """
    if configuration not in names:
        raise ValueError(
            f"configuration is {configuration!r}; accepted are {', '.join(map(repr, names))}"
        )
    return names.index(configuration)


conv_bn_act_configurations = functools.partial(_names, "conv_bn_act")
conv_dgrad_configurations = functools.partial(_names, "conv_dgrad")
conv_wgrad_configurations = functools.partial(_names, "conv_wgrad")


@contextlib.contextmanager
def _allowing_tf32() -> Iterator[None]:
    """Float32 products in TF32: exact on integers of up to 11 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def by_the_extension(
    op: str,
    configuration: str,
    device: str,
    check: Callable[..., None],
    launch: Callable[..., None],
) -> None:
    """Runs an op's own check on a GPU: the extension plans, and multiplies float32 in TF32.

    Args:
        op: name.
        configuration: its name.
        device: where.
        check: takes the configuration, the device, the launch, what plans (of a problem,
            configuration and splits: the configuration, or -1), and the names of all
            configurations.
        launch: the op's.

    Raises:
        ImportError: the extension has no such kernel.
    """

    def plan(problem: _cuda_plan.Problem, index: int, splits: int) -> int:
        return _cuda_plan.plan(problem, about, index, splits).configuration

    with _allowing_tf32():
        about = _cuda_plan.gpu(torch.device(device))
        check(configuration, device, launch, plan, _names(op))


def check(
    op: str,
    configuration: str,
    device: str,
    inputs: Callable[[ConvCase, torch.dtype, torch.Generator], tuple[Any, ...]],
    launch: Callable[..., None],
    about: Sequence[int],
) -> None:
    """Checks one configuration of an op on every case and dtype that it serves.

    One that is for another kind of GPU passes unseen: no plan takes it here.

    Args:
        op: a key of `SPLITS`.
        configuration: its name.
        device: where.
        inputs: makes the operands on the device, the launch's further arguments, and the expected
            result [N, C, H, W] on the CPU.
        launch: takes operands, further arguments, the output, the geometry, and configuration and
            splits.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    index, count = index_of(op, configuration), 0
    if not _cuda_plan.runs(configuration, about):
        return  # no plan takes it on this GPU: there is nothing that it could do wrong
    generator = torch.Generator().manual_seed(0)
    for case in (*CONV_CASES, WINDOW) if _cuda_plan.WINDOW in configuration else CONV_CASES:
        geometry = (case.stride, case.padding, case.dilation, case.groups)
        for dtype in DTYPES:
            operands, more, expected = inputs(case, dtype, generator)
            operands = [channels_last(t, device) for t in operands]
            buffer, out = guarded(tuple(expected.shape), dtype, device)
            problem = _cuda_plan.problem_of(op, operands, geometry, out)
            for splits in _splits(op, configuration, case):
                if _cuda_plan.plan(problem, about, index, splits).configuration < 0:
                    continue  # it is never used for this
                out.fill_(math.nan)
                launch(operands, more, out, geometry, (index, splits))
                what = f"{case.name}, {dtype}, {configuration}/{splits}"
                require_exact(what, buffer, out, expected)
                count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def _splits(op: str, configuration: str, case: ConvCase) -> tuple[int, ...]:
    if _cuda_plan.CLUSTER in configuration:
        return CLUSTERS
    return SPLITS[op] if case.name == "3x3" else (1,)


def _forward_inputs(
    case: ConvCase, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    x, weight, scale, shift, residual = numerics.exact_inputs(case, dtype, generator)
    oracle = numerics.conv_bn_act_oracle(
        x, weight, scale, shift, residual, **case.geometry, act=case.act
    )
    expected = numerics.exact_expected(oracle, dtype)
    if dtype is torch.float32:
        x, weight = (t * BELOW for t in (x, weight))
    return (x, weight, residual), (scale, shift, case.act), expected


def _dgrad_inputs(
    case: ConvCase, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    dy, y, x, weight, scale = gradient_inputs(case, dtype, generator)
    expected, _ = numerics.conv_gradients_oracle(
        dy, y, x, weight, scale, **case.geometry, wanted=(True, False)
    )
    return (dy, y, weight), (scale,), expected.to(dtype)


def _wgrad_inputs(
    case: ConvCase, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Any, ...]:
    dy, y, x, weight, scale = gradient_inputs(case, dtype, generator)
    _, expected = numerics.conv_gradients_oracle(
        dy, y, x, weight, scale, **case.geometry, wanted=(False, True)
    )
    return (dy, y, x), (scale,), expected.to(dtype)


INPUTS = {"conv_bn_act": _forward_inputs, "conv_dgrad": _dgrad_inputs, "conv_wgrad": _wgrad_inputs}


def launch_on(device: str, op: str) -> Callable[..., None]:
    """The op's own launch on a GPU, as `check` calls it."""

    def launch(
        operands: Sequence[Tensor | None],
        more: Sequence[Any],
        out: Tensor,
        geometry: Sequence[Any],
        wish: tuple[int, int],
    ) -> None:
        scale = more[0].to(device)
        stride, padding, dilation, groups = geometry
        with _allowing_tf32():
            if op == "conv_bn_act":
                x, weight, residual = operands
                shift, act = more[1].to(device), more[2]
                _cuda.launch_conv_bn_act(
                    x, weight, scale, shift, residual, out, stride, padding, dilation, groups, act,
                    wish=wish,
                )  # fmt: skip
            else:
                run = _cuda.launch_conv_dgrad if op == "conv_dgrad" else _cuda.launch_conv_wgrad
                run(*operands, scale, out, *geometry, wish=wish)

    return launch


def _check_on_gpu(op: str, configuration: str, device: str) -> None:
    with _allowing_tf32():
        about = _cuda_plan.gpu(torch.device(device))
        check(op, configuration, device, INPUTS[op], launch_on(device, op), about)


def conv_bn_act(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_bn_act`, without and with a split reduction.

    Args:
        configuration: "128x64_4w4s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    _check_on_gpu("conv_bn_act", configuration, device)


def conv_dgrad(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_dgrad`; arguments and errors as `conv_bn_act`'s."""
    _check_on_gpu("conv_dgrad", configuration, device)


def conv_wgrad(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_wgrad`; arguments and errors as `conv_bn_act`'s."""
    _check_on_gpu("conv_wgrad", configuration, device)
