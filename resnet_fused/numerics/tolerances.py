"""Every tolerance of the project. Loosening one needs a measured reason beside it."""

from __future__ import annotations

import math

import torch

ROUNDOFF: dict[torch.dtype, float] = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
    torch.float8_e4m3fn: 2.0**-4,
}
# Roundings of the epilogue and of the sum's last steps, in units of the accumulator's 2u.
EPILOGUE_STEPS = 8.0
# bn_act has no sum: product, shift and residual round at most once each, 1.5 units of 2u; 2 covers
# their second order and an implementation without fma.
BN_ACT_STEPS = 2.0
# BatchNorm's statistics, in units of u of the accumulator: |mean error| <= 8 (|mean| + std), and
# |M2 error| <= (32 + 12 kappa / sqrt(tiles)) M2 with kappa = |mean| / std. Measured over 1 to 6272
# tiles of 128 rows and kappa of 0 to 1e4, on independent values, ramps, drifts and tiles far apart:
# two passes within a tile and a closed form between tiles use 0.37 and 0.52 of this at most. The
# part with kappa is what rounding each tile's mean to float32 costs. Chan's merge of one tile after
# the other needs 4 to 20 times the mean's bound.
STATS_MEAN = 8.0
STATS_VARIANCE = 32.0
STATS_SPREAD = 12.0
# What is per channel is computed in float64 and rounded once. This is for the steps inside, a root
# and a division of a unit or two among them, in units of float64's 2u.
FINALIZE_STEPS = 8.0
# Folding rounds each weight once. The n errors are independent, with a standard deviation of 0.41 u
# (mantissas spread evenly), so their sum over a window is close to normal with 0.41 u |scale|
# sqrt(conv(x^2, w^2)). 1.5% of the outputs exceed that root, and a tensor of 1e7 reaches 5.4
# deviations, 2.2 roots. Measured worst beyond u |R|: 2.0 roots, in 1e6 to 1e7 outputs
# for each n of 9, 64, 576, 4608, in bfloat16 and float16. Weights that are all alike, whose errors
# are not independent, are outside of this model.
FOLD_DEVIATIONS = 3.0
# Rounding to nearest, mantissas spread evenly: root mean square of the relative error, in u.
ROUNDING_DEVIATION = 0.41
# Products of e4m3 on tensor cores. wgmma multiplies 32 of them at a time; users of Hopper GPUs
# report that it keeps some 14 bits of a sum (DeepSeek-V3 Technical Report, 2024, section 3.3.2), so
# that kernels here add to float32 after each step of 128. Not measured here yet.
E4M3_DEPTH = 32
E4M3_CHUNK = 128
E4M3_SUM_ROUNDOFF = 2.0**-13
# The relative tier: a fused chain in 16 bits rounds less often than the unfused one and must be no
# worse; in float32 both are at the mercy of the order of sums.
RMS_LIMIT_16BIT = 1.0
MAX_LIMIT_16BIT = 1.25
# Folding trades the rounding of the convolution's output for that of the weights, whose errors are
# the same at every pixel and thus uneven from block to block. Measured with oneDNN in bfloat16 on
# some 90 blocks (ResNet-18, 34, 50, ResNeXt-50; two seeds; gamma of both signs): 0.94 to 1.15 times
# eager's rms, median 0.99; the maximum passed 1.25 in three of them.
RMS_LIMIT_FOLDED = 1.25
RMS_LIMIT_FLOAT32 = 1.5
GRADIENT_LIMIT = 1.5
# A whole network's output is a few numbers in which the errors of all layers mix: two right
# implementations differ by chance there, in every dtype. Measured 0.90 to 1.03 on ResNets with 1000
# classes; 1.83 on a network with 30 outputs, for which the limit with SAMPLING is 2.6. The blocks
# are what is judged sharply.
END_TO_END_LIMIT = 1.5
# The ratio of two rms errors over n elements scatters by 1 / sqrt(n), and somewhat more where the
# elements share the roundings of the layers before: limits are raised by this over sqrt(n). That is
# 0.4 to 1.3% for a block of ResNet-50 on one image, and 20% for 400 elements, where a right float32
# block was measured at 1.58 times eager's error.
SAMPLING = 4.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding to nearest.

    Raises:
        TypeError: if ``dtype`` is not bfloat16, float16, float32, float64 or float8_e4m3fn.
    """
    if dtype not in ROUNDOFF:
        accepted = ", ".join(str(d) for d in ROUNDOFF)
        raise TypeError(f"dtype is {dtype}; accepted are {accepted}")
    return ROUNDOFF[dtype]


def chance(elements: int) -> float:
    """By how much the limit of a ratio of two norms over so many elements is raised."""
    return 1.0 + SAMPLING / math.sqrt(max(1, elements))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums, scale and shift of tensors of ``dtype`` are kept."""
    unit_roundoff(dtype)
    return torch.float64 if dtype is torch.float64 else torch.float32
