"""`conv_bn_dgrad_end` by TMA and wgmma, emulated: operands whose sums are exact, one call of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import emulated
import torch
from torch import Tensor

from resnet_fused.cases import ConvCase
from resnet_fused.ops import _training_checks_dgrad as checks
from resnet_fused.ops._library import overload

OP = "conv_bn_dgrad_end"
DTYPES = (torch.bfloat16, torch.float16)
FEW = (2, *emulated.H200[1:])
"""So few multiprocessors that blocks stay for several tiles."""
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "plain": {"affine": False, "addend": 0, "projected": False},
    "affine": {"addend": 0, "projected": False},
    "identity": {"projected": False},
    "projected": {"affine": False, "addend": 0},
}
"""What of the op takes part."""


class Operands(NamedTuple):
    """What the op reads, in the order of its schema."""

    dz: Tensor
    y: Tensor | None
    coefficients: Tensor | None
    weight: Tensor
    addend: Tensor | None
    out: Tensor
    raw: Tensor
    norm: Tensor
    residual: Tensor | None
    residual_norm: Tensor | None


def operands(
    case: ConvCase,
    dtype: torch.dtype,
    *,
    exact: bool = True,
    affine: bool = True,
    addend: int = 1,
    projected: bool = True,
    seed: int = 3,
) -> Operands:
    """In channels_last: integers on which every sum is exact, or noise.

    Of the BatchNorms the mean alone is a number. `out` is below zero, minus zero, zero and above.
    """
    generator = torch.Generator().manual_seed(seed)
    made = checks.exact_operands(case, dtype, generator, affine=affine, addend=addend)
    assert made.raw is not None

    def draw(shape: Any) -> Tensor:
        whole = torch.randint(-2, 3, shape, generator=generator)
        return (whole if exact else torch.randn(shape, generator=generator)).to(dtype)

    def norm() -> Tensor:
        rows = torch.full((4, case.c), math.nan)
        rows[2] = draw((case.c,)).float()
        return rows

    out = draw(case.input_shape)
    out = torch.where(out == -2, torch.full_like(out, -0.0), out)
    given = Operands(
        *(None if t is None else t if exact else draw(t.shape).to(t.dtype) for t in made[:5]),
        out, draw(case.input_shape), norm(),
        draw(case.input_shape) if projected else None, norm() if projected else None,
    )  # fmt: skip
    return Operands(
        *(
            t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t
            for t in given
        )
    )


def call(
    case: ConvCase, given: Operands, step: int = 1, **settings: Any
) -> tuple[Tensor, Tensor, dict]:
    """dz of the block below, its sums, and the report; settings are those of `emulated.using`."""
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    with emulated.using(**{"splits": 1, **settings}) as runs:
        dx, sums = overload(OP, emulated.NAME)(*given, step, *geometry)
    return dx, sums, runs.reports[0]


def reductions(dx: Tensor, given: Operands) -> Tensor:
    """The sums of a stored gradient, where they are exact."""
    pairs = [(given.raw, given.norm), (given.residual, given.residual_norm)]
    terms = [dx.double()]
    for raw, norm in pairs:
        if raw is not None and norm is not None:
            terms.append(dx.double() * (raw.double() - norm[2].double().view(1, -1, 1, 1)))
    return torch.stack([term.sum((0, 2, 3)) for term in terms]).float()


def require(case: ConvCase, given: Operands, dx: Tensor, sums: Tensor, step: int = 1) -> None:
    """Every bit of both results."""
    found = wrong(case, given, dx, sums, step)
    assert found is None, found


def wrong(case: ConvCase, given: Operands, dx: Tensor, sums: Tensor, step: int = 1) -> str | None:
    """What is wrong with exact results, or None."""
    whole, _ = checks.expected_dgrad(checks.Operands(*given[:5], None, None), case, step)
    below = torch.where(given.out <= 0, torch.zeros_like(whole), whole)
    if not torch.equal(dx, below):
        return f"{(dx != below).sum()} of {dx.numel()} elements differ"
    if torch.signbit(dx[(given.out <= 0)]).any():
        return "a masked element is minus zero"
    wanted = reductions(below, given)
    return None if torch.equal(sums, wanted) else f"{(sums != wanted).sum()} sums differ"


def tiles() -> dict[int, dict]:
    """The configurations by TMA, by index."""
    table = emulated.load().conv_bn_dgrad_end_configurations()
    return {i: tile for i, tile in enumerate(table) if tile["tma"]}


def problem(
    case: ConvCase, dtype: torch.dtype = torch.bfloat16, way: Any = "all", **changes: Any
) -> Any:
    """A channels_last problem in memory that the plan never touches."""

    def strides(shape: Any) -> tuple[int, ...]:
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c)

    takes_part = WAYS[way] if isinstance(way, str) else way
    there = {"affine": True, "addend": 1, "projected": True} | takes_part
    of_input = ("x_stride", "out_stride", "raw_stride", "residual_stride", "addend_stride")
    values = {
        "dtype": emulated.TYPE_NAMES[dtype],
        "allow_tf32": True,
        **dict.fromkeys(("dz", "weight", "out", "raw", "norm", "x", "sums"), 4096),
        **dict.fromkeys(("y", "coefficients"), 4096 if there["affine"] else 0),
        **dict.fromkeys(("residual", "residual_norm"), 4096 if there["projected"] else 0),
        "addend": 4096 if there["addend"] else 0,
        "addend_step": max(1, there["addend"]),
        "x_size": case.input_shape,
        "weight_size": case.weight_shape,
        "weight_stride": strides(case.weight_shape),
        **dict.fromkeys(("dz_stride", "y_stride"), strides(case.output_shape)),
        **dict.fromkeys(of_input, strides(case.input_shape)),
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }
    return emulated.load().ConvBnDgradEnd(**(values | changes))


def planned(
    *arguments: Any,
    gpu: tuple[int, ...] = emulated.H200,
    configuration: int = -1,
    splits: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """What would be launched; ValueError says why nothing can be."""
    return emulated.load().conv_bn_dgrad_end_plan(
        problem(*arguments, **more), gpu, configuration, splits
    )
