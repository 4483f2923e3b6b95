"""Every configuration of conv_dgrad and conv_wgrad, bit for bit, and each access they make."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton_trace import PROOF, issued_bytes, needs_interpreter, unique_bytes, watch

from resnet_fused import cases, numerics, roofline
from resnet_fused.triton import _tiles, _traffic

pytestmark = needs_interpreter

DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAN = float("nan")
OPS = ("conv_dgrad", "conv_wgrad")
ALLOWED = 1.1  # times the roofline's bytes
H200 = _tiles.Limits(132, 232448, 90)
CASES = (
    # 72 filters, 36 channels, strides that leave phases of unequal size and one without taps.
    cases.ConvCase("odd", 2, 36, 7, 5, 72, 2, 1, (3, 2), (1, 0)),
    cases.ConvCase("dilated", 1, 20, 6, 7, 33, 3, 3, (1, 1), (2, 1), (2, 1), act="none"),
    cases.ConvCase("grouped", 1, 80, 4, 4, 80, 2, 2, (1, 2), (1, 0), groups=20),
    cases.ConvCase("stem", 1, 3, 9, 8, 33, 7, 7, (2, 2), (3, 3)),
)


def inputs(case, dtype):
    """dy, y, x, weight, scale: every sum is exact, and so is scale * dy."""
    x, weight, scale, _, _ = numerics.exact_inputs(case, dtype)
    dy, y = (torch.randint(-4, 5, case.output_shape).to(dtype) for _ in range(2))
    form = torch.channels_last
    given = [t.contiguous(memory_format=form) for t in (dy, y, x, weight)]
    return given[0], given[1] if case.act == "relu" else None, given[2], given[3], scale


def launch(op, case, operands, p):
    """(gradient, launches)."""
    from resnet_fused.triton import conv_dgrad, conv_wgrad

    dy, y, x, weight, scale = operands
    geometry = case.stride, case.padding, case.dilation, case.groups
    like = x if op == "conv_dgrad" else weight
    result = torch.full_like(like, NAN, memory_format=torch.channels_last)
    with watch() as launches:
        if op == "conv_dgrad":
            conv_dgrad.launch(dy, y, weight, scale, result, *geometry, plan=p)
        else:
            conv_wgrad.launch(dy, y, x, scale, result, *geometry, plan=p)
    return result, launches


def product_of(op, case, dtype):
    from resnet_fused.triton import conv_dgrad, conv_wgrad

    shapes = case.input_shape, case.weight_shape, case.output_shape
    x, weight, y = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    if op == "conv_dgrad":
        return conv_dgrad.product_of(x, weight, case.stride, case.groups)
    return conv_wgrad.product_of(y, weight, case.groups)


def check_issued(op, case, dtype, launches, p):
    """Each operand's loads and stores, and all of them, are what is predicted."""
    product = product_of(op, case, dtype)
    first, last = launches[0], launches[-1]
    dgrad = op == "conv_dgrad"
    issued = _traffic.dgrad_issued_bytes if dgrad else _traffic.wgrad_issued_bytes
    predicted = issued(case, product, p)
    assert first["dy"].loaded == predicted.dy
    assert (first["y"].loaded if case.act == "relu" else 0) == predicted.y
    assert first["weight" if dgrad else "x"].loaded == predicted.other
    assert sum(launch["scale"].loaded for launch in launches) == predicted.scale
    assert last[written(last)].stored == predicted.gradient
    split = len(launches) == 2
    assert (first["partial"].stored if split else 0) == predicted.partial_stored
    assert (last["partial"].loaded if split else 0) == predicted.partial_loaded
    assert issued_bytes(launches) == predicted.total


def needed(op, case):
    """Which pixels some tap meets: of dy [P, Q] in dgrad, of x [H, W] in wgrad."""
    image = torch.ones(1, 1, case.h, case.w, requires_grad=True)
    filters = torch.ones(1, 1, case.r, case.s)
    met = F.conv2d(image, filters, **{**case.geometry, "groups": 1})
    met.sum().backward()
    return ((met if op == "conv_dgrad" else image.grad)[0, 0] > 0).numpy()


def check_unique(op, case, dtype, launches, p):
    """Written once, nothing that is needed unread, and no more than the roofline counts."""
    product = product_of(op, case, dtype)
    first, last = launches[0], launches[-1]
    # Each element written once; partial sums, where there are any, written and read once.
    assert (last[written(last)].stores == 1).all()
    if p.splits > 1:
        assert (first["partial"].stores == 1).all()
        assert (last["partial"].loads == 1).all()
    if op == "conv_dgrad":
        gathered, shape = "dy", (case.n, case.p, case.q, case.k)
        assert (first["weight"].loads == _tiles.cdiv(product.rows, p.tile.m)).all()
    else:
        gathered, shape = "x", (case.n, case.h, case.w, case.c)
        assert (first["dy"].loads == first["dy"].loads[0]).all() and first["dy"].loads[0]
    if case.act == "relu":
        assert (first["y"].loads == first["dy"].loads).all()
    seen = first[gathered].loads.reshape(shape) > 0
    assert (seen == np.broadcast_to(needed(op, case)[None, :, :, None], shape)).all()
    cost = roofline.conv_dgrad_cost if op == "conv_dgrad" else roofline.conv_wgrad_cost
    assert unique_bytes(launches) <= ALLOWED * cost(case, dtype).bytes


def written(launch):
    """The argument that a launch wrote; the merge of dgrad's parts is the forward kernel's."""
    return ({"dx", "dweight", "out"} & launch.accesses.keys()).pop()


def cells():
    found = []
    for i, tile in enumerate(_tiles.TILES):
        for j, splits in enumerate((1, 3)):
            for k, name in enumerate(DTYPES):
                if PROOF or k == (i + j) % 2:
                    turns = CASES if PROOF else (CASES[(i + 2 * j) % len(CASES)],)
                    p = _tiles.Plan(tile, splits, tile.warps == 4, "for the test")
                    label = f"{p.name.replace('/', '-')}-{name}"
                    found.append(pytest.param(p, DTYPES[name], turns, id=label))
    return found


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("p", "dtype", "turns"), cells())
def test_every_configuration(op, p, dtype, turns):
    for case in turns:
        operands = inputs(case, dtype)
        wanted = (op == "conv_dgrad", op == "conv_wgrad")
        oracle = numerics.conv_gradients_oracle(*operands, **case.geometry, wanted=wanted)
        expected = oracle[0 if op == "conv_dgrad" else 1].to(dtype)
        result, launches = launch(op, case, operands, p)
        assert torch.equal(result, expected), case.name
        check_issued(op, case, dtype, launches, p)
        check_unique(op, case, dtype, launches, p)


LAYERS = {case.name: case for case in cases.RESNET50_LAYERS}
SAMPLE = ("1x1s2_512_1024_at28", "3x3s2_256_256_at28", "3x3_512_512_at7")


def layers():
    """Convolutions of ResNet-50, its stem on half the image; in CI three, on fewer channels."""
    if PROOF:
        stem, *others = cases.RESNET50_LAYERS
        return [dataclasses.replace(stem, h=stem.h // 2, w=stem.w // 2), *others]
    some = (LAYERS[name] for name in SAMPLE)
    return [dataclasses.replace(case, c=case.c // 8, k=case.k // 8) for case in some]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", layers(), ids=str)
def test_layers_touch_what_the_roofline_says(op, case):
    """With the configuration that an H200 gets, splits included."""
    p = _tiles.choose(product_of(op, case, torch.float16), H200)
    _, launches = launch(op, case, inputs(case, torch.float16), p)
    check_issued(op, case, torch.float16, launches, p)
    check_unique(op, case, torch.float16, launches, p)


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_passes_where_the_result_is_nan(op):
    """The mask is not (y <= 0): as torch's ReLU, whose gradient passes at NaN."""
    case = CASES[0]
    operands = inputs(case, torch.float32)
    operands[1][0, :, 0, 0] = NAN
    p = _tiles.Plan(_tiles.BY_NAME["64x64_4w4s"], 1, True, "for the test")
    result, _ = launch(op, case, operands, p)
    oracle = numerics.conv_gradients_oracle(*operands, **case.geometry)
    assert torch.equal(result, oracle[0 if op == "conv_dgrad" else 1].float())
