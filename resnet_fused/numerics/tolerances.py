"""Every tolerance of the project. Loosening one needs a measured reason beside it."""

from __future__ import annotations

import torch

ROUNDOFF: dict[torch.dtype, float] = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
# Roundings of the epilogue and of the sum's last steps, in units of the accumulator's 2u.
EPILOGUE_STEPS = 8.0
# bn_act has no sum: product, shift and residual round at most once each, 1.5 units of 2u; 2 covers
# their second order and an implementation without fma.
BN_ACT_STEPS = 2.0
# Folding rounds each weight once. The n errors are independent, with a standard deviation of 0.41 u
# (mantissas spread evenly), so their sum over a window is close to normal with 0.41 u |scale|
# sqrt(conv(x^2, w^2)). 1.5% of the outputs exceed that root, and a tensor of 1e7 reaches 5.4
# deviations, 2.2 roots. Measured worst beyond u |R|: 2.0 roots, in 1e6 to 1e7 outputs
# for each n of 9, 64, 576, 4608, in bfloat16 and float16. Weights that are all alike, whose errors
# are not independent, are outside of this model.
FOLD_DEVIATIONS = 3.0
# The relative tier: a fused chain in 16 bits rounds less often than the unfused one and must be no
# worse; in float32 both are at the mercy of the order of sums.
RMS_LIMIT_16BIT = 1.0
MAX_LIMIT_16BIT = 1.25
RMS_LIMIT_FLOAT32 = 1.5
GRADIENT_LIMIT = 1.5
# A whole network's output is a few numbers in which the errors of all layers mix: two right
# implementations differ by chance there, in every dtype. The blocks are what is judged sharply.
END_TO_END_LIMIT = 1.5


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding to nearest.

    Raises:
        TypeError: if ``dtype`` is not bfloat16, float16, float32 or float64.
    """
    if dtype not in ROUNDOFF:
        accepted = ", ".join(str(d) for d in ROUNDOFF)
        raise TypeError(f"dtype is {dtype}; accepted are {accepted}")
    return ROUNDOFF[dtype]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums, scale and shift of tensors of ``dtype`` are kept."""
    unit_roundoff(dtype)
    return torch.float64 if dtype is torch.float64 else torch.float32
