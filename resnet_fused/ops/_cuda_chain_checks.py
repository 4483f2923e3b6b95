"""Self-check of `conv_chain` in CUDA: integers whose products and sums are exact, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import numerics
from ..cases import ChainCase
from . import _cuda_chain, _cuda_plan
from ._chain_checks import on_device
from ._cuda_checks import _names, index_of
from ._selfchecks import guarded, require_exact

OP = _cuda_chain.OP
DTYPES = (torch.bfloat16, torch.float16)


conv_chain_configurations = functools.partial(_names, OP)


def cases_of(configuration: str) -> tuple[ChainCase, ...]:
    """Shapes that a configuration takes: whole tiles, tiles and steps that are cut, a projection.

    Args:
        configuration: "128x64_4w3s", pixels and channels of next; behind it "_front64", channels of
            a convolution in front, where it is made for one. By TMA "tma_128x64_4s_k64", behind it
            channels of x, "_d64", of a projection, where it is made for one, and "_2c", blocks that
            share filters; or "tma_win128x64_3s_front64", by windows of what the convolution in
            front reads, likewise.
    """
    if configuration.startswith(_cuda_plan.TMA):
        return _cases_by_tma(configuration)
    room = int(configuration.split("_")[0].split("x")[1])
    front = int(configuration.partition("_front")[2] or 0)
    if front:
        return (
            ChainCase("whole", 3, front, 8, 8, 128, room, front=64),
            ChainCase("odd", 3, front - 24, 7, 9, 88, room - 24, front=72, out_stride=2),
            ChainCase("projected", 3, front - 8, 7, 9, 72, room - 8, 40, 2, 24),
            ChainCase("no_next", 2, 24, 5, 7, 48, front=104),
        )
    return (
        ChainCase("whole", 3, 64, 8, 8, 128, room),
        ChainCase("odd", 3, 40, 7, 9, 88, room - 24, out_stride=2),
        ChainCase("projected", 3, 48, 7, 9, 72, room - 8, 40, 2),
        ChainCase("no_next", 2, 24, 5, 7, 48),
    )


def _cases_by_tma(configuration: str) -> tuple[ChainCase, ...]:
    """Likewise; in the last one blocks go through several tiles."""
    _, tile, _, inner, *more = configuration.split("_")
    room = int(tile.split("x")[1])
    d = next((int(one[1:]) for one in more if one.startswith("d")), 0)
    cut = d - 24 if d else 0
    if inner.startswith("front"):  # whole steps of channels alone
        k = int(inner.removeprefix("front"))
        return (
            ChainCase("whole", 2, k, 8, 15, 256, room, d, front=k),
            ChainCase("odd", 3, k, 7, 11, 192, room - 24, cut, front=k, out_stride=2),
            ChainCase("many", 3, k, 128, 144, 64, 16, cut, front=k),
        )
    k, by = int(inner[1:]), 2 if d > 64 else 1  # where there is room for them pixels may lie apart
    return (
        ChainCase("whole", 3, k, 8, 16, 128, room, d),
        ChainCase("odd", 3, k - 24, 7, 11, 328, room - 24, cut, by),
        ChainCase("many", 3, 16, 128, 144, 72, 16, cut),
    )


def check(
    configuration: str, device: str, launch: Callable[..., None], about: Sequence[int]
) -> None:
    """Checks one configuration on every case and dtype; one for other GPUs passes unseen.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_chain.launch`.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    index, count = index_of(OP, configuration), 0
    if not _cuda_plan.runs(configuration, about):
        return  # no plan takes it on this GPU: there is nothing that it could do wrong
    generator = torch.Generator().manual_seed(6)
    for case in cases_of(configuration):
        for dtype in DTYPES:
            if isinstance(_cuda_chain.predict(case, dtype, about, frozenset({configuration})), str):
                continue  # it is never used for this
            operands = numerics.chain_operands(case, dtype, generator, exact=True)
            strides = case.projection_stride, case.out_stride
            expected, after = numerics.conv_chain_expected(operands, dtype, *strides)
            buffer, out = guarded(case.stored_shape, dtype, device)
            kept, following = guarded((case.n, case.m, case.h, case.w), dtype, device)
            options = (*strides, case.name == "odd")
            launch(*on_device(operands, device), out, following, *options, wish=(index, 1))
            what = f"{case.name}, {dtype}, {configuration}"
            require_exact(f"{what}, out", buffer, out, expected)
            if after is not None:
                require_exact(f"{what}, next", kept, following, after)
            count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def conv_chain(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_chain`; cases that the GPU has no room for are left out.

    Args:
        configuration: "128x64_4w3s".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    launch: Any = functools.partial(_cuda_chain.launch)
    check(configuration, device, launch, _cuda_plan.gpu(torch.device(device)))
