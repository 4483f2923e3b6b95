"""BatchNorm's arithmetic in Triton: what every kernel of training applies as it reads.

Always fused multiply-adds: the sign of scale * y + shift is then that of the exact value, and the
ReLU masks of forward and backward, and of every implementation, agree.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(y, scale, shift):
    """Computes relu(scale * y + shift) in float32; NaN stays NaN, as in torch."""
    z = tl.math.fma(scale, y.to(tl.float32), shift)
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def affine_gradient(dz, y, a, b, c):
    """Computes a dz + (b y + c) in float32, two fused multiply-adds."""
    return tl.math.fma(a, dz.to(tl.float32), tl.math.fma(b, y.to(tl.float32), c))
