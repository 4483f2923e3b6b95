"""The exact tier: integers on which no order of sums rounds, so that every bit is known."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from resnet_fused.numerics.bounds import ROUNDINGS
from resnet_fused.numerics.oracle import bn_act_oracle, check_choice, finish
from resnet_fused.numerics.tolerances import accumulator_dtype


class ConvShape(Protocol):
    """What `exact_inputs` reads of a case (see `resnet_fused.cases.ConvCase`)."""

    @property
    def n(self) -> int: ...  # noqa: D102
    @property
    def c(self) -> int: ...  # noqa: D102
    @property
    def h(self) -> int: ...  # noqa: D102
    @property
    def w(self) -> int: ...  # noqa: D102
    @property
    def k(self) -> int: ...  # noqa: D102
    @property
    def r(self) -> int: ...  # noqa: D102
    @property
    def s(self) -> int: ...  # noqa: D102
    @property
    def groups(self) -> int: ...  # noqa: D102
    @property
    def residual(self) -> bool: ...  # noqa: D102
    @property
    def output_shape(self) -> tuple[int, int, int, int]: ...  # noqa: D102


class ExactInputs(NamedTuple):
    """Operands on which every implementation must be exact; see `exact_inputs`."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None


def exact_inputs(
    case: ConvShape, dtype: torch.dtype, generator: torch.Generator | None = None
) -> ExactInputs:
    """Operands whose products and partial sums are exact in float32, in any order.

    x, weight, shift and residual are integers in -4 .. 4; scale is +-2^-3 .. 2^1, per channel.
    So is scale * weight exact in every dtype: folding loses nothing here.

    Args:
        case: sizes; n C R S 16 must stay below 2^24 / 16, which every case does.
        dtype: of x, weight and residual. scale and shift are float32 (float64 for float64).
        generator: torch's own by default.

    Raises:
        ValueError: for a reduction too long to be exact.
    """
    taps = (case.c // case.groups) * case.r * case.s
    if taps * 16 >= 2**20:
        raise ValueError(f"case reduces over {taps} taps; exact sums allow fewer than {2**16}")

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator)

    acc = accumulator_dtype(dtype)
    power = torch.randint(-3, 2, (case.k,), generator=generator)
    sign = torch.randint(0, 2, (case.k,), generator=generator) * 2 - 1
    return ExactInputs(
        integers(case.n, case.c, case.h, case.w).to(dtype),
        integers(case.k, case.c // case.groups, case.r, case.s).to(dtype),
        torch.ldexp(sign.to(acc), power).to(acc),
        integers(case.k).to(acc),
        integers(*case.output_shape).to(dtype) if case.residual else None,
    )


def exact_expected(
    oracle: Tensor,
    dtype: torch.dtype,
    rounding: str = "fused",
    *,
    conv: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "relu",
) -> Tensor:
    """What every implementation must return, bit for bit, on `exact_inputs`.

    Args:
        oracle: `conv_bn_act_oracle` of those inputs.
        dtype: of the output.
        rounding: for "fused" and "folded" the oracle rounded once, to nearest even. "stored_conv"
            and "modules" round the convolution first and so need all of the following.
        conv: the bare convolution in float64 (`conv_bn_act_oracle` with scale 1, shift 0, "none").
        scale: [K].
        shift: [K].
        residual: as the inputs'.
        act: as the oracle's.

    Raises:
        ValueError: for an unknown rounding, or if conv, scale or shift is missing for it.
    """
    check_choice("rounding", rounding, ROUNDINGS)
    if rounding in ("fused", "folded"):
        return oracle.to(dtype)
    if conv is None or scale is None or shift is None:
        raise ValueError(f"rounding {rounding!r} needs conv, scale and shift; one of them is None")
    stored = bn_act_oracle(conv.to(dtype), scale, shift, None, "none")
    if rounding == "modules":
        stored = stored.to(dtype).double()
    return finish(stored, residual, act).to(dtype)
