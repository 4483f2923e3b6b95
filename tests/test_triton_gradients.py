"""Every configuration of conv_dgrad and conv_wgrad, bit for bit, and each access they make."""

from __future__ import annotations

import pytest
import torch
from triton_trace import PROOF, needs_interpreter, watch

from resnet_fused import cases, numerics
from resnet_fused.triton import _tiles

pytestmark = needs_interpreter

DTYPES = {"float16": torch.float16, "float32": torch.float32}
NAN = float("nan")
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
    """(gradient, launches, the argument that it was written to)."""
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
    # The merge of dgrad's parts is the forward kernel's, and calls it out.
    names = {"dx", "dweight", "out"} & launches[-1].accesses.keys()
    return result, launches, names.pop()


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


@pytest.mark.parametrize("op", ["conv_dgrad", "conv_wgrad"])
@pytest.mark.parametrize(("p", "dtype", "turns"), cells())
def test_every_configuration(op, p, dtype, turns):
    for case in turns:
        operands = inputs(case, dtype)
        wanted = (op == "conv_dgrad", op == "conv_wgrad")
        oracle = numerics.conv_gradients_oracle(*operands, **case.geometry, wanted=wanted)
        expected = oracle[0 if op == "conv_dgrad" else 1].to(dtype)
        result, launches, argument = launch(op, case, operands, p)
        assert torch.equal(result, expected), case.name
        # Each element written once; partial sums, where there are any, written and read once.
        assert (launches[-1][argument].stores == 1).all()
        if p.splits > 1:
            assert (launches[0]["partial"].stores == 1).all()
            assert (launches[1]["partial"].loads == 1).all()


@pytest.mark.parametrize("op", ["conv_dgrad", "conv_wgrad"])
def test_a_gradient_passes_where_the_result_is_nan(op):
    """The mask is not (y <= 0): as torch's ReLU, whose gradient passes at NaN."""
    case = CASES[0]
    operands = inputs(case, torch.float32)
    operands[1][0, :, 0, 0] = NAN
    p = _tiles.Plan(_tiles.BY_NAME["64x64_4w4s"], 1, True, "for the test")
    result, _, _ = launch(op, case, operands, p)
    oracle = numerics.conv_gradients_oracle(*operands, **case.geometry)
    assert torch.equal(result, oracle[0 if op == "conv_dgrad" else 1].float())
