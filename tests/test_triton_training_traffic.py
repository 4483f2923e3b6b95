"""What training's Triton kernels touch in memory, access by access, beside the roofline's bytes."""

from __future__ import annotations

import pytest
import torch
from triton_trace import issued_bytes, needs_interpreter, watch

from resnet_fused import backends
from resnet_fused.bench import subject, work
from resnet_fused.bench.training_kernels import KINDS
from resnet_fused.triton import _grad1x1, _limits

pytestmark = needs_interpreter

ALLOWED = 1.1  # times the roofline's bytes
OWN = ("partial", "partials", "workspace", "sums", "tiles", "stats", "counts")
"""Kernels' names for their workspaces and the vectors that they leave, which stay in caches."""
CELLS = [
    ("conv_bn_stats", "3x3_64_64_at14"),
    ("conv_bn_stats", "1x1_64_128_at14"),
    ("conv_bn_stats", "3x3s2_64_64_at14_noact"),
    ("conv_bn_dgrad", "3x3_64_64_at14"),
    ("conv_bn_dgrad", "1x1_128_64_at14_add_noact"),
    ("conv_bn_dgrad", "3x3s2_64_64_at14"),
    ("conv_bn_dgrad_end", "3x3_64_64_at14_add_noact"),
    ("conv_bn_dgrad_end", "1x1_128_64_at14_add_noact"),
    ("conv_bn_wgrad", "3x3_64_64_at14"),
    ("conv_bn_wgrad", "1x1_64_128_at14"),
    ("conv_bn_grad1x1", "1x1_64_256_at14"),
    ("conv_bn_grad1x1", "1x1_256_64_at14_add_noact"),
    ("bn_add_act", "128_at14_add"),
    ("bn_add_act_conv_stats", "1x1_128_32_at14_noact"),
    ("bn_add_act_backward", "128_at14_add"),
]


def touched(launches) -> tuple[int, int]:
    """Bytes of the call's tensors, each once; and of the kernels' own workspaces."""
    seen: dict[int, tuple[int, bool]] = {}
    for launch in launches:
        for name, access in launch.accesses.items():
            if access.unique:
                most, own = seen.get(access.start, (0, False))
                seen[access.start] = max(most, access.unique), own or name in OWN
    sums = [sum(size for size, own in seen.values() if own is wanted) for wanted in (False, True)]
    return sums[0], sums[1]


@pytest.mark.parametrize(("op", "name"), CELLS)
def test_every_byte_once(op, name):
    """Unique bytes within a tenth of the roofline's: nothing is read that need not be."""
    made = work.build(subject.Subject("kernel", op, name, 2, "float16", "cpu"))
    kind = KINDS[op]
    with backends.backend("triton"), torch.inference_mode(), watch() as launches:
        kind.ours(made.case)(made.sets[0])
    assert f"{op}_kernel" in {launch.name for launch in launches}
    found, own = touched(launches)
    expected = kind.cost(made.case, torch.float16).bytes
    assert 0.85 * expected <= found + own
    assert found <= ALLOWED * expected, f"{found / expected:.2f} of the roofline"
    # With 392 pixels a workspace is no small thing; it must not hold activations.
    assert own <= max(2 * expected, 1 << 20)


@pytest.mark.parametrize("name", ["1x1_40_64_at9", "1x1_200_24_at9_add_noact"])
def test_what_the_merged_gradient_asks_of_the_caches(name):
    """Bytes of active lanes, as the prediction counts them: 162 pixels, the last tile not full."""
    op = "conv_bn_grad1x1"
    made = work.build(subject.Subject("kernel", op, name, 2, "float16", "cpu"))
    case = made.case
    with backends.backend("triton"), torch.inference_mode(), watch() as launches:
        KINDS[op].ours(case)(made.sets[0])
    sizes = case.n * case.h * case.w, case.k, case.c, 2
    limits = _limits.INTERPRETER_LIMITS
    config = _grad1x1.serves(*sizes[1:], limits)
    assert config is not None
    masked, addend = case.act == "relu", sizes[0] * case.c * case.residual
    expected = _grad1x1.issued_bytes(*sizes, config, limits, masked=masked, addend=addend)
    first = launches[0]
    for field in ("dz", "y", "x", "weight", "addend"):
        counted = first[field].loaded if field != "addend" or case.residual else 0
        assert counted == getattr(expected, field), field
    assert first["dx"].stored == expected.dx
    assert issued_bytes(launches) == expected.total
