"""Training's ops: schemas, fakes, bad input."""

from __future__ import annotations

import pytest
import torch
from matrix import ACTIVATION, cells, conv_arguments, lay_out, norm_values, random_layer

import resnet_fused as rf
from resnet_fused import cases, numerics
from resnet_fused.ops._library import overload

CASES = {case.name: case for case in cases.CONV_CASES}
WIDE = torch.float64


def raw_calls(dtype=torch.float32, layout="nhwc"):
    """Arguments of every overload, by op."""
    case = CASES["3x3_groups4"]
    layer = random_layer(case, dtype).lay_out(layout)
    y, norm = layer.y, norm_values(case.k, dtype)
    k, geometry = case.k, conv_arguments(case)
    sums = torch.randn(2, k).to(norm.dtype)
    stats = sums.abs()
    window = [[3, 3], [2, 2], [1, 1]]
    out, taps = numerics.bn_act_pool_oracle(y, norm, *window)
    taps = taps.contiguous(memory_format=ACTIVATION[layout])
    pair = (layer.dz, layer.y, layer.coefficients)
    running = (torch.zeros(k), torch.ones(k), torch.tensor(3))
    return {
        "conv_bn_stats": (layer.x, layer.norm, layer.weight, *geometry),
        "conv_bn_stats_finalize": (
            layer.x, layer.norm, layer.weight, norm[0], norm[1], *running, *geometry, 1e-5, 0.1,
        ),
        "bn_finalize": (stats, None, norm[0], norm[1], 98, 1e-5),
        "bn_update_stats": (stats, None, *running, 98, 0.1),
        "bn_add_act": (y, norm, layer.dz, norm, 0, "relu"),
        "bn_add_act_backward": (layer.dz, layer.dz, y, norm, y, norm, "relu"),
        "bn_backward_finalize": (sums, None, None, norm, 98, 1, False),
        "bn_backward_apply": pair,
        "conv_bn_dgrad": (
            *pair, layer.weight, layer.addend, layer.x, layer.norm, list(layer.x.shape),
            layout == "nhwc", 2, *geometry,
        ),
        "conv_bn_dgrad_end": (
            *pair, layer.weight, layer.addend, layer.x, layer.x, layer.norm, layer.x, layer.norm, 2,
            *geometry,
        ),
        "conv_bn_wgrad": (*pair, layer.x, layer.norm, layer.weight, *geometry),
        "bn_act_pool": (y, norm, *window),
        "bn_act_pool_backward": (lay_out(out, layout), taps, y, norm, *window),
    }  # fmt: skip


OPCHECKED = [
    pytest.param(op, cell.values[0], id=f"{op}-{cell.id}", marks=cell.marks)
    for op in raw_calls()
    for cell in cells(op, (torch.float32,))
]


@pytest.mark.op_matrix
@pytest.mark.parametrize(("op", "entry"), OPCHECKED)
def test_opcheck(op, entry):
    """Not test_autograd_registration: gradients come from an autograd.Function outside the op."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = raw_calls()[op]
    torch.library.opcheck(overload(op, entry.name), arguments, test_utils=tests)


@pytest.mark.op_matrix
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize(("op", "entry"), OPCHECKED)
def test_results_are_shaped_as_the_fake_says(op, entry, layout):
    """Shape, dtype and strides of every result, and memory of its own."""
    arguments = raw_calls(layout=layout)[op] if layout != "sliced" else sliced_call(op)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        shaped = overload(op, "reference")(*fakes)
    found = overload(op, entry.name)(*arguments)
    as_tuple = found if isinstance(found, tuple) else (found,)
    shaped = shaped if isinstance(shaped, tuple) else (shaped,)
    given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
    for real, fake in zip(as_tuple, shaped, strict=True):
        if real is None:
            continue
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        assert real.stride() == fake.stride()
        assert not real.numel() or real.untyped_storage().data_ptr() not in given


def sliced_call(op):
    return tuple(
        lay_out(a, "sliced")
        if isinstance(a, torch.Tensor) and a.dim() == 4 and a.dtype != torch.uint8
        else a
        for a in raw_calls()[op]
    )


# Bad input


def good_calls():
    """A right call of every public function by keyword."""
    t, k = torch.ones(2, 8, 5, 5), 8
    norm, sums, rows = torch.ones(4, k), torch.ones(2, k), torch.ones(3, k)
    weight = torch.ones(8, 8, 3, 3)
    conv = {"weight": weight, "padding": 1}
    running = {"running_mean": torch.zeros(k), "running_var": torch.ones(k)}
    return {
        "conv_bn_stats": {"x": t, "norm": norm, **conv},
        "bn_finalize": {"stats": sums, "count": 50, "gamma": norm[0], "beta": norm[0], **running},
        "bn_update_stats": {"stats": sums, "count": 50, **running},
        "bn_add_act": {"y": t, "norm": norm, "residual": t, "residual_norm": norm},
        "bn_add_act_backward": {
            "dout": t, "out": t, "y": t, "norm": norm, "residual": t, "residual_norm": norm,
        },
        "bn_backward_finalize": {"sums": sums, "norm": norm, "count": 50},
        "bn_backward_apply": {"dz": t, "y": t, "coefficients": rows},
        "conv_bn_dgrad": {
            "dz": t, "y": t, "coefficients": rows, "input_size": (2, 8, 5, 5), "addend": t,
            "raw": t, "norm": norm, **conv,
        },
        "conv_bn_dgrad_end": {
            "dz": t, "y": t, "coefficients": rows, "out": t, "addend": t, "raw": t, "norm": norm,
            "residual": t, "residual_norm": norm, **conv,
        },
        "conv_bn_wgrad": {"dz": t, "y": t, "coefficients": rows, "x": t, "norm": norm, **conv},
        "bn_act_pool": {"y": t, "norm": norm},
    }  # fmt: skip


ACTIVATIONS = {
    "conv_bn_stats": ("x", "weight"),
    "bn_add_act": ("y", "residual"),
    "bn_add_act_backward": ("y", "dout", "out", "residual"),
    "bn_backward_apply": ("dz", "y"),
    "conv_bn_dgrad": ("dz", "y", "weight", "addend", "raw"),
    "conv_bn_dgrad_end": ("dz", "y", "weight", "addend", "out", "raw", "residual"),
    "conv_bn_wgrad": ("dz", "x", "weight", "y"),
    "bn_act_pool": ("y",),
}
VECTORS = {
    "conv_bn_stats": ("norm",),
    "bn_finalize": ("stats", "gamma", "beta", "running_mean", "running_var"),
    "bn_update_stats": ("stats", "running_mean", "running_var"),
    "bn_add_act": ("norm", "residual_norm"),
    "bn_add_act_backward": ("norm", "residual_norm"),
    "bn_backward_finalize": ("sums", "norm"),
    "bn_backward_apply": ("coefficients",),
    "conv_bn_dgrad": ("coefficients", "norm"),
    "conv_bn_dgrad_end": ("coefficients", "norm", "residual_norm"),
    "conv_bn_wgrad": ("coefficients", "norm"),
    "bn_act_pool": ("norm",),
}
T = torch.ones
# op, changes, what the message says
BAD = [
    ("conv_bn_stats", {"x": T(2, 7, 5, 5), "norm": None}, "x has 7 channels"),
    ("conv_bn_stats", {"weight": T(8, 8, 9, 9)}, "weight spans 9 pixels"),
    ("conv_bn_stats", {"groups": 0}, "groups is 0"),
    ("conv_bn_stats", {"stride": 0}, "stride is 0"),
    ("conv_bn_stats", {"padding": -1}, "padding is -1"),
    ("conv_bn_stats", {"dilation": (1, 2, 3)}, r"dilation is \(1, 2, 3\)"),
    ("bn_finalize", {"count": 1}, "expected more than 1 value per channel.*count=1"),
    ("bn_finalize", {"count": -3}, "count is -3"),
    ("bn_finalize", {"count": 2.5}, "count is 2.5"),
    ("bn_finalize", {"eps": "no"}, "eps is 'no'"),
    ("bn_finalize", {"momentum": "no"}, "momentum is 'no'"),
    ("bn_finalize", {"running_var": None}, "running_mean and running_var are given together"),
    ("bn_finalize", {"total": 50.0}, "total is 50.0"),
    ("bn_finalize", {"total": T(2, dtype=WIDE)}, "total is .*float64 tensor"),
    ("bn_finalize", {"num_batches_tracked": 3}, "num_batches_tracked"),
    ("bn_finalize", {"num_batches_tracked": T(2, dtype=torch.int64)}, "num_batches_tracked"),
    ("bn_update_stats", {"count": 1}, "expected more than 1 value per channel.*count=1"),
    ("bn_update_stats", {"momentum": [0.1]}, r"momentum is \[0.1\]"),
    ("bn_update_stats", {"running_mean": None}, "running_mean"),
    ("bn_update_stats", {"num_batches_tracked": T(())}, "num_batches_tracked"),
    ("bn_add_act", {"residual": T(2, 4, 5, 5)}, "residual_norm is given"),
    ("bn_add_act", {"residual": T(2, 9, 5, 5), "residual_norm": None}, "residual has shape"),
    ("bn_add_act", {"offset": 1, "residual_norm": None}, "residual has .* at offset 1"),
    ("bn_add_act", {"offset": "1"}, "offset"),
    ("bn_add_act", {"act": "silu"}, "act is 'silu'"),
    ("bn_add_act_backward", {"act": "silu"}, "act is 'silu'"),
    ("bn_add_act_backward", {"out": None}, "out is needed"),
    ("bn_add_act_backward", {"residual": None}, "residual and residual_norm are given together"),
    ("bn_backward_finalize", {"row": 2}, "row is 2; 1 to 1"),
    ("bn_backward_finalize", {"row": 0}, "row is 0"),
    ("bn_backward_finalize", {"row": "1"}, "row is '1'"),
    ("bn_backward_finalize", {"count": -1}, "count is -1"),
    ("bn_backward_finalize", {"all_sums": T(3, 8)}, "all_sums has shape"),
    ("bn_backward_finalize", {"total": 3}, "total is 3"),
    ("conv_bn_dgrad", {"input_size": (2, 8, 5)}, r"input_size is \(2, 8, 5\)"),
    ("conv_bn_dgrad", {"input_size": (2, 8, 6, 6)}, "dz has shape"),
    ("conv_bn_dgrad", {"addend_stride": 0}, "addend_stride is 0"),
    ("conv_bn_dgrad", {"addend_stride": 2}, "addend has shape"),
    ("conv_bn_dgrad", {"y": None}, "y and coefficients are given together"),
    ("conv_bn_dgrad", {"norm": None}, "raw and norm are given together"),
    ("conv_bn_dgrad_end", {"out": T(2, 8, 6, 6)}, "dz has shape"),
    ("conv_bn_dgrad_end", {"out": T(2, 7, 5, 5)}, "x has 7 channels"),
    ("conv_bn_dgrad_end", {"addend_stride": 0}, "addend_stride is 0"),
    ("conv_bn_dgrad_end", {"addend_stride": 2}, "addend has shape"),
    ("conv_bn_dgrad_end", {"coefficients": None}, "y and coefficients are given together"),
    ("conv_bn_dgrad_end", {"residual": None}, "residual and residual_norm are given together"),
    ("conv_bn_dgrad_end", {"residual_norm": None}, "residual and residual_norm are given"),
    ("conv_bn_wgrad", {"coefficients": None}, "y and coefficients are given together"),
    ("conv_bn_wgrad", {"weight": T(8, 8, 3, 3).half()}, "weight has dtype torch.float16"),
    ("conv_bn_wgrad", {"stride": 2}, "dz has shape"),
    ("bn_act_pool", {"kernel": 16}, "kernel is .*255 taps"),
    ("bn_act_pool", {"kernel": 9, "padding": 0}, "kernel .* is larger"),
    ("bn_act_pool", {"padding": 2}, "padding is .*half of kernel"),
    ("bn_act_pool", {"stride": 0}, "stride is 0"),
]


def refused(op, changes, message):
    call = good_calls()[op]
    written = [call[name].clone() for name in ("running_mean", "running_var") if name in call]
    with pytest.raises((TypeError, ValueError), match=f"^{op}: .*{message}"):
        getattr(rf.ops, op)(**{**call, **changes})
    names = [name for name in ("running_mean", "running_var") if name in call]
    for name, before in zip(names, written, strict=True):
        assert torch.equal(call[name], before), "written before the arguments were checked"


@pytest.mark.parametrize(("op", "changes", "message"), BAD, ids=[f"{o}-{m}" for o, _, m in BAD])
def test_bad_input_is_named(op, changes, message):
    refused(op, changes, message)


@pytest.mark.parametrize("op", good_calls())
def test_bad_tensors_are_named(op):
    """Type, rank, dtype, device, shape; the first tensor is what the others are held against."""
    call = good_calls()[op]
    getattr(rf.ops, op)(**call)
    for first, name in [(name == ACTIVATIONS[op][0], name) for name in ACTIVATIONS.get(op, ())]:
        t = call[name]
        for bad in (3.0, t[0], t.long()):
            refused(op, {name: bad}, f"{name} .*(must|dtype)")
        if op == "bn_act_pool":
            refused(op, {name: t.to("meta")}, "norm is on cpu")
            continue
        for bad in (t.to("meta"), t.bfloat16()):
            refused(op, {name: bad}, "(on|dtype)" if first else f"{name} (is on|has dtype)")
        if not first:  # which of two shapes is wrong nobody knows
            refused(op, {name: t[:1, :3, :, :1]}, "(shape|channels|weight spans)")
    for name in VECTORS[op]:
        t, first = call[name], name in ("stats", "sums")
        for bad in (3.0, t.long(), t[None]):
            refused(op, {name: bad}, name)
        for bad in (t.to("meta"), t[..., :3]):
            refused(op, {name: bad}, "(on|shape|needed)" if first else name)
    if op not in (
        "conv_bn_stats",
        "conv_bn_dgrad",
        "conv_bn_dgrad_end",
        "conv_bn_wgrad",
        "bn_add_act",
    ):
        for name in {"norm", "stats", "sums", "coefficients"} & call.keys():
            refused(op, {name: None}, name)


@pytest.mark.parametrize("op", ["bn_add_act_backward", "bn_backward_finalize", "bn_backward_apply",
                                "conv_bn_dgrad", "conv_bn_dgrad_end", "conv_bn_wgrad"])  # fmt: skip
def test_gradients_have_no_derivative_of_their_own(op):
    call = good_calls()[op]
    name = next(iter(call))
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op} has no derivative"):
        getattr(rf.ops, op)(**call)
    with torch.no_grad():
        getattr(rf.ops, op)(**call)
