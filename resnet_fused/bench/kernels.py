"""The ops that can be timed alone, in the order in which the benchmark names them."""

from __future__ import annotations

from resnet_fused.bench import fixed_kernels, spanning_kernels, training_kernels
from resnet_fused.bench.kinds import Kind

KINDS: dict[str, Kind] = {
    **fixed_kernels.KINDS,
    **spanning_kernels.KINDS,
    **training_kernels.KINDS,
}
"""Op -> what the benchmark asks of it."""
