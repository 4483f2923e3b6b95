"""Self-check of `conv_chain_fp8` in CUDA: integers whose sums are exact, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from .. import numerics
from ..cases import ChainCase
from . import _cuda_chain, _cuda_chain_fp8, _cuda_plan
from ._chain_checks import on_device
from ._cuda_checks import _names, index_of
from ._e4m3 import E4M3
from ._selfchecks import guarded, require_exact

OP = _cuda_chain_fp8.OP
SCALES = (0.5, 2.0, 16.0, 0.25)
"""Of residual, out, next and front: powers of two, by which results saturate and are rounded."""


conv_chain_fp8_configurations = functools.partial(_names, OP)


def cases_of(configuration: str) -> tuple[ChainCase, ...]:
    """Shapes that a configuration takes: whole tiles, cut ones; last, blocks with several tiles.

    Args:
        configuration: "tma_128x64_8s_k64", pixels and channels of next, and channels of x; behind
            it "_d64", of a projection, where it is made for one, and "_2c", blocks that share
            filters.
    """
    _, tile, _, inner, *more = configuration.split("_")
    room, k = int(tile.split("x")[1]), int(inner[1:])
    d = next((int(word[1:]) for word in more if word[0] == "d"), 0)
    cut = d - 16 if d else 0
    return (
        ChainCase("whole", 3, k, 8, 16, 128, room, d),
        ChainCase("odd", 3, k - 16, 7, 11, 336, room - 16, cut),
        ChainCase("thinned", 3, k, 7, 11, 208, room - 48, d, out_stride=2),
        ChainCase("many", 3, 16, 128, 144, 80, 16, cut),
    )


def operands_of(
    case: ChainCase, generator: torch.Generator | None = None, *, exact: bool = True
) -> numerics.ChainOperands:
    """As of `numerics.chain_operands`, activations and filters in e4m3.

    Args:
        case: sizes.
        generator: torch's own by default.
        exact: integers, whose sums no order of them rounds.
    """
    made = numerics.chain_operands(case, torch.float32, generator, exact=exact)
    return numerics.ChainOperands(*(t if t is None or t.dim() == 1 else t.to(E4M3) for t in made))


def check(
    configuration: str, device: str, launch: Callable[..., object], about: Sequence[int]
) -> None:
    """Checks one configuration on every case; one for other GPUs passes unseen.

    Args:
        configuration: its name.
        device: where.
        launch: as `_cuda_chain_fp8.launch`.
        about: the GPU's numbers, as of `_cuda_plan.gpu`.

    Raises:
        ArithmeticError: a result is wrong, or no case fits the configuration.
        ValueError: another configuration.
    """
    index, count = index_of(OP, configuration), 0
    if not _cuda_plan.runs(configuration, about):
        return  # no plan takes it on this GPU: there is nothing that it could do wrong
    generator = torch.Generator().manual_seed(7)
    for case in cases_of(configuration):
        if isinstance(_cuda_chain.predict(case, E4M3, about, frozenset({configuration})), str):
            continue  # it is never used for this
        operands = operands_of(case, generator)
        strides = case.projection_stride, case.out_stride
        expected, after = numerics.conv_chain_fp8_expected(operands, *strides, SCALES)
        buffer, out = guarded(case.stored_shape, E4M3, device)
        kept, following = guarded((case.n, case.m, case.h, case.w), E4M3, device)
        launch(*on_device(operands, device), out, following, *strides, *SCALES, wish=(index, 1))
        what = f"{case.name}, {configuration}"
        require_exact(f"{what}, out", buffer, out, expected)
        assert after is not None
        require_exact(f"{what}, next", kept, following, after)
        count += 1
    if count == 0:
        raise ArithmeticError(f"{configuration}: no case of the self-check fits it")


def conv_chain_fp8(configuration: str, device: str) -> None:
    """Checks one configuration of `conv_chain_fp8`.

    Args:
        configuration: "tma_128x64_8s_k64".
        device: "cuda:0".

    Raises:
        ArithmeticError: a result is wrong.
        ImportError: the extension has no such kernel.
        ValueError: another configuration.
    """
    check(configuration, device, _cuda_chain_fp8.launch, _cuda_plan.gpu(torch.device(device)))
