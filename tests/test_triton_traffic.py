"""What conv_bn_act and bn_act load and store, access by access: nothing twice that need not be,
nothing missing, and exactly what the plan predicts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrix import geometry_args, random_operands
from test_ops_bn_act import normals
from test_ops_bn_act import operands as bn_act_operands
from triton_trace import PROOF, issued_bytes, needs_interpreter, unique_bytes, watch

from resnet_fused import cases, roofline
from resnet_fused.triton import _limits, _tiles, _traffic

pytestmark = needs_interpreter

LAYERS = {case.name: case for case in cases.RESNET50_LAYERS}
WHOLE = (
    "1x1_64_64_at56",
    "1x1_64_256_at56",
    "1x1s2_256_512_at56",
    "1x1_512_128_at28",
    "1x1_256_1024_at14",
)
HALVED = (
    "7x7s2_3_64_at224",
    "3x3_64_64_at56",
    "3x3s2_128_128_at56",
    "3x3_256_256_at14",
    "1x1_512_2048_at7",
)
SMALL = tuple(case for case in cases.CONV_CASES if case.n)
DTYPES = {"float16": torch.float16, "float32": torch.float32}
ALLOWED = 1.1  # times the roofline's bytes

H200 = _tiles.Limits(132, 232448, 90)


def traced(case, dtype, plan=None):
    """The launches of one call, the plan that it ran under, and the plan's prediction."""
    from resnet_fused.triton import conv_bn_act

    operands = random_operands(case, dtype).to_layout("nhwc")
    # A size-1 dimension would leave the layout in doubt.
    out = torch.empty(case.n, case.p, case.q, case.k, dtype=dtype).permute(0, 3, 1, 2)
    weight = operands.weight.contiguous(memory_format=torch.channels_last)
    product = conv_bn_act.product_of(operands.x, weight, out, case.groups)
    plan = plan or _tiles.choose(product, _limits.INTERPRETER_LIMITS)
    with watch() as launches:
        conv_bn_act.launch(
            operands.x, weight, *operands.tuple()[2:], out, *geometry_args(case), plan=plan
        )
    return launches, plan, _traffic.issued_bytes(case, product, plan)


def check_issued(case, launches, predicted):
    first, last = launches[0], launches[-1]
    assert first["x"].loaded == predicted.x
    assert first["weight"].loaded == predicted.weight
    vectors = sum(launch[v].loaded for launch in launches for v in ("scale", "shift"))
    assert vectors == predicted.vectors
    assert last["out"].stored == predicted.out
    assert (last["residual"].loaded if case.residual else 0) == predicted.residual
    split = len(launches) == 2
    assert (first["partial"].stored if split else 0) == predicted.partial_stored
    assert (last["partial"].loaded if split else 0) == predicted.partial_loaded
    assert issued_bytes(launches) == predicted.total


def needed(case):
    """Which pixels [H, W] of the input some output reads."""
    image = torch.zeros(1, 1, case.h, case.w, requires_grad=True)
    ones = torch.ones(1, 1, case.r, case.s)
    geometry = {**case.geometry, "groups": 1}
    F.conv2d(image, ones, **geometry).sum().backward()
    return (image.grad[0, 0] > 0).numpy()


def check_unique(case, launches, plan):
    first, last = launches[0], launches[-1]
    assert (last["out"].stores == 1).all()
    if case.residual:
        assert (last["residual"].loads == 1).all()
    if plan.splits > 1:
        assert (first["partial"].stores == 1).all()
        assert (last["partial"].loads == 1).all()
    rows = _tiles.cdiv(case.n * case.p * case.q, plan.tile.m)
    assert (first["weight"].loads == rows).all()
    seen = first["x"].loads.reshape(case.n, case.h, case.w, case.c) > 0
    expected = np.broadcast_to(needed(case)[None, :, :, None], seen.shape)
    # Every column of tiles reads all channels of its groups, so one that is needed is read.
    assert (seen == expected).all()


def halved(case):
    """Half of the channels, or for the stem of the pixels."""
    if case.c == 3:
        return dataclasses.replace(case, h=case.h // 2, w=case.w // 2)
    return dataclasses.replace(case, c=case.c // 2, k=case.k // 2)


def layers():
    if PROOF:
        return [pytest.param(case, id=case.name) for case in cases.RESNET50_LAYERS]
    whole = [pytest.param(LAYERS[name], id=name) for name in WHOLE]
    return whole + [pytest.param(halved(LAYERS[name]), id=f"half_{name}") for name in HALVED]


@pytest.mark.parametrize("case", layers())
def test_layers_of_a_full_batch_touch_what_the_roofline_says(case):
    """One image, with the configuration that 32 of them choose."""
    batch = dataclasses.replace(case, n=32)
    plan = _tiles.choose(_traffic.product_of(batch, 2), H200)
    launches, plan, predicted = traced(case, torch.float16, plan)
    assert len(launches) == (2 if plan.splits > 1 else 1)  # and the merge of the splits
    check_issued(case, launches, predicted)
    check_unique(case, launches, plan)
    assert unique_bytes(launches) <= ALLOWED * roofline.conv_cost(case, torch.float16).bytes


def test_a_split_layer_of_one_image_still_touches_its_operands_once():
    case = halved(LAYERS["1x1_2048_512_at7"])
    plan = _tiles.choose(_traffic.product_of(case, 2), H200)
    launches, plan, predicted = traced(case, torch.float16, plan)
    assert plan.splits > 1
    check_issued(case, launches, predicted)
    check_unique(case, launches, plan)
    assert unique_bytes(launches) <= ALLOWED * roofline.conv_cost(case, torch.float16).bytes


def cells():
    """Every case; both dtypes of each in `make proof`, else by turns."""
    return [
        pytest.param(case, dtype, id=f"{case}-{name}")
        for i, case in enumerate(SMALL)
        for j, (name, dtype) in enumerate(DTYPES.items())
        if PROOF or i % 2 == j
    ]


@pytest.mark.parametrize(("case", "dtype"), cells())
def test_every_access_is_predicted_and_none_is_missing(case, dtype):
    launches, plan, predicted = traced(case, dtype)
    check_issued(case, launches, predicted)
    check_unique(case, launches, plan)


ODD = cases.ConvCase("odd", 3, 70, 9, 11, 139, 2, 1, (1, 2), (1, 0), residual=True)
GROUPED = cases.ConvCase("grouped", 1, 80, 9, 9, 80, 2, 2, padding=(1, 1), groups=20)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("tile", _tiles.TILES, ids=lambda tile: tile.name)
def test_every_configuration_is_predicted(tile, splits):
    case = ODD if splits == 1 else GROUPED
    plan = _tiles.Plan(tile, splits, tile.warps == 4, "for the test")
    launches, plan, predicted = traced(case, torch.float16, plan)
    check_issued(case, launches, predicted)
    check_unique(case, launches, plan)


def bn_act_cells():
    return [
        pytest.param(case, dtype, id=f"{case}-{name}")
        for i, case in enumerate(case for case in cases.BN_ACT_CASES if case.n)
        for j, (name, dtype) in enumerate(DTYPES.items())
        if PROOF or i % 2 == j
    ]


@pytest.mark.parametrize(("case", "dtype"), bn_act_cells())
def test_bn_act_touches_each_activation_once(case, dtype):
    from resnet_fused.triton import bn_act

    x, scale, shift, residual = bn_act_operands(case, dtype, normals)
    form = torch.contiguous_format if case.layout == "nchw" else torch.channels_last
    out = torch.full(case.shape, float("nan"), dtype=dtype).contiguous(memory_format=form)
    with watch() as launches:
        bn_act.launch(x, scale, shift, residual, out, case.act)
    (launch,) = launches
    block = launch.values["BLOCK_M"], launch.values["BLOCK_N"]
    by_channel = out.stride(1) == 1 and case.c > 1
    predicted = _traffic.bn_act_issued_bytes(case, dtype.itemsize, by_channel, block)
    assert launch["x"].loaded == predicted.x
    assert launch["scale"].loaded + launch["shift"].loaded == predicted.vectors
    assert (launch["residual"].loaded if case.residual else 0) == predicted.residual
    assert launch["out"].stored == predicted.out
    assert issued_bytes(launches) == predicted.total
    assert (launch["out"].stores == 1).all()
    most = roofline.bn_act_cost(case.shape, dtype, residual=case.residual).bytes
    assert unique_bytes(launches) <= ALLOWED * most


def test_a_lane_outside_all_arguments_is_caught(monkeypatch):
    """The watch itself: a kernel that believes in one pixel more than there is."""
    from resnet_fused.triton import conv_bn_act

    original = conv_bn_act.traceable

    def one_more(kernel, out):
        launcher = original(kernel, out)

        class Wrong:
            def __getitem__(self, grid):
                return lambda *args, **kwargs: launcher[grid](
                    *args[:7], args[7] + 1, *args[8:], **kwargs
                )

        return Wrong()

    monkeypatch.setattr(conv_bn_act, "traceable", one_more)
    case = cases.ConvCase("small", 1, 8, 4, 4, 8)
    with pytest.raises(Exception, match="is in no argument"):
        traced(case, torch.float32)
