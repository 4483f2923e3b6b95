"""Both gradients of a 1x1 convolution in one op: implementation x case x dtype, layouts, bits."""

from __future__ import annotations

import pytest
import torch
from matrix import EXACT, FUSED, bound_options, cells, random_layer, repeats

from resnet_fused import cases, numerics
from resnet_fused.ops import _grad1x1
from resnet_fused.ops._library import overload
from resnet_fused.triton import _grad1x1 as rule
from resnet_fused.triton import _limits

OP = _grad1x1.OP
SERVED = cases.ConvCase("served", 3, 72, 7, 6, 56)
CASES = (
    SERVED,
    *(
        case
        for case in cases.CONV_CASES
        if _grad1x1.fits_geometry(case.weight_shape, case.stride, case.padding, case.groups)
    ),
)


def serves(entry, dtype, case):
    """Whether an implementation takes a case; what a kernel does not take goes to two ops."""
    if entry.name == "reference":
        return True
    if entry.name == "triton":
        limits = _limits.limits(torch.device("cpu"))
        return rule.serves(case.k, case.c, dtype.itemsize, limits) is not None
    return case.k % 8 == case.c % 8 == 0 and case.k <= 256


def run(entry, layer, *, addend=0, mask=True, affine=True, parameter=None):
    """dx, sums, dweight; `addend` is its stride, 0 for none."""
    shortcut = {0: None, 1: layer.x.flip(0), 2: layer.addend}[addend]
    given = (
        layer.dz, layer.y if affine else None, layer.coefficients if affine else None, layer.x,
        layer.norm if mask else None, layer.weight, shortcut,
    )  # fmt: skip
    parameter = layer.weight if parameter is None else parameter
    return overload(OP, entry.name)(*given, parameter, False, max(1, addend)), given


def check(entry, layer, *, addend=0, **options):
    """Every result within its bound; the results."""
    got, (dz, y, coefficients, x, norm, weight, shortcut) = run(
        entry, layer, addend=addend, **options
    )
    dx, sums, dweight = got
    image = (dz, y, coefficients, weight, shortcut, None if norm is None else x, norm)
    factors, how = (dz, y, coefficients, x, norm), {"addend_stride": max(1, addend)}
    tf32 = bound_options(entry, dz.dtype)["tf32"]
    wanted = numerics.conv_bn_dgrad_oracle(*image, input_size=list(x.shape), **how)
    bounds = [numerics.conv_bn_dgrad_bound(*image, wanted, **how, tf32=tf32)]
    oracles = [wanted, numerics.conv_bn_wgrad_oracle(*factors, dweight)]
    bounds.append(numerics.conv_bn_wgrad_bound(*factors, dweight, oracles[1], tf32=tf32))
    if norm is not None:
        oracles.append(numerics.reductions_oracle(dx, (x, norm)))
        bounds.append(numerics.reductions_bound(dx, (x, norm)))
    else:
        assert sums.shape == (0, x.shape[1])
    for one, oracle, bound in zip((dx, dweight, sums), oracles, bounds, strict=False):
        found = numerics.check_bound(one, oracle, bound)
        assert found.ok, found
    return got, oracles


@pytest.mark.op_matrix
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, EXACT))
def test_exact_on_integers(entry, dtype, case):
    layer = random_layer(case, dtype, exact=True).lay_out("nhwc")
    if not serves(entry, dtype, case):
        with pytest.raises((LookupError, ValueError)):
            run(entry, layer)
        return
    for addend, mask in ((0, True), (2, True), (1, False)):
        (dx, sums, dweight), oracles = check(entry, layer, addend=addend, mask=mask)
        assert torch.equal(dx, oracles[0].to(dtype))
        assert torch.equal(dweight, oracles[1].to(dtype))
        assert not mask or torch.equal(sums.double(), oracles[2].double())


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced", "unaligned"])
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, FUSED))
def test_any_layout_within_the_bound(entry, dtype, layout):
    if not serves(entry, dtype, SERVED):
        pytest.skip(f"{entry.name} has no kernel for {dtype}")
    layer = random_layer(SERVED, dtype).lay_out(layout)
    before = [t.clone() for t in vars(layer).values()]
    for addend, affine in ((2, True), (1, False), (0, True)):
        parameter = torch.empty(SERVED.weight_shape, dtype=torch.float32)
        (dx, _, dweight), _ = check(entry, layer, addend=addend, affine=affine, parameter=parameter)
        assert dx.is_contiguous() and dweight.dtype is torch.float32
    for t, old in zip(vars(layer).values(), before, strict=True):
        assert torch.equal(t, old), "an input was written"


@pytest.mark.op_matrix
@pytest.mark.parametrize(("entry", "dtype"), cells(OP, FUSED))
def test_repeats_bit_for_bit(entry, dtype):
    if not serves(entry, dtype, SERVED):
        pytest.skip(f"{entry.name} has no kernel for {dtype}")
    layer = random_layer(SERVED, dtype).lay_out("nhwc")
    first, _ = run(entry, layer, addend=2)
    for _ in range(repeats(entry)):
        assert all(map(torch.equal, run(entry, layer, addend=2)[0], first))
