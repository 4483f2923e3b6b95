"""conv_dgrad and conv_wgrad in CUDA, emulated: configurations, splits, costs, and the choice."""

from __future__ import annotations

import emulated
import pytest
import torch
from emulated import Schedule
from test_ops_conv_gradients import OPS, gradient_operands, run
from torch.testing import assert_close

from resnet_fused import cases, numerics

pytestmark = pytest.mark.emulated

TYPES = emulated.DTYPES["conv_dgrad"]
# More than a tile of the largest configuration along M or N, nothing a multiple of a tile.
LARGE = cases.ConvCase("large", 2, 136, 9, 9, 136, 3, 3, (1, 1), (1, 1))
STRIDED = cases.ConvCase("strided", 2, 24, 11, 9, 40, 3, 3, (2, 2), (1, 1))


def configurations(op: str) -> list[dict]:
    """The table of an op's kernel."""
    return getattr(emulated.load(), f"{op}_configurations")()


def by_mma(op: str) -> list[tuple[int, dict]]:
    """Index and entry of those that any GPU runs; test_emulated_dgrad_sm90.py has the others."""
    return [(i, tile) for i, tile in enumerate(configurations(op)) if not tile["tma"]]


def channels_last(operands):
    return [
        t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t
        for t in operands
    ]


def wrong(op, operands, case, got):
    """Which elements of an exact result are not the oracle's."""
    expected = numerics.conv_gradients_oracle(*operands, **case.geometry)[OPS.index(op)]
    return (got != expected.to(got.dtype)).nonzero()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_and_split_is_exact(op, dtype):
    case = cases.ConvCase("small", 2, 72, 7, 6, 72, 3, 3, (1, 1), (1, 1))
    operands = channels_last(gradient_operands(case, dtype, exact=True))
    for index, tile in by_mma(op):
        for splits in (1, 3):
            schedule = Schedule("lazy", "shuffled", seed=index)
            with emulated.using(configuration=index, splits=splits, schedule=schedule) as found:
                got = run(op, emulated.NAME, operands, case, True)
            assert found.reports[0]["plan"]["configuration"] == index
            assert found.reports[0]["plan"]["splits"] == splits
            assert not len(wrong(op, operands, case, got)), (tile["name"], splits)


@pytest.mark.parametrize("op", OPS)
def test_tiles_beside_each_other(op):
    """More than one tile along each axis, and tiles that are cut."""
    operands = channels_last(gradient_operands(LARGE, torch.bfloat16, exact=True))
    with emulated.using(configuration=0, splits=2) as found:
        got = run(op, emulated.NAME, operands, LARGE, True)
    assert found.reports[0]["plan"]["blocks"] >= 2 * 4
    assert not len(wrong(op, operands, LARGE, got))


def test_pixels_that_no_tap_reaches_are_zeros():
    case = cases.ConvCase("sparse", 1, 8, 9, 9, 8, 1, 1, (3, 2))
    operands = channels_last(gradient_operands(case, torch.bfloat16, exact=True))
    got = run("conv_dgrad", emulated.NAME, operands, case, True)
    assert not len(wrong("conv_dgrad", operands, case, got))
    reached = torch.zeros(9, 9, dtype=torch.bool)
    reached[::3, ::2] = True
    assert (got[..., ~reached] == 0).all()
    assert (got[..., reached] != 0).any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_bank_conflicts_in_main_loops(op, dtype):
    """Nor elsewhere: of 16-byte loads, ldmatrix, masks and the output's tile."""
    for index, tile in by_mma(op):
        operands = channels_last(gradient_operands(STRIDED, dtype))
        with emulated.using(configuration=index, splits=1, counting=True) as found:
            run(op, emulated.NAME, operands, STRIDED, True)
        report = found.reports[0]
        assert report["counters"]["shared_wavefronts"] > 0
        costly = {
            (site["file"], site["line"], site["instruction"]): site["counters"]["bank_conflicts"]
            for site in report["sites"]
            if site["counters"]["bank_conflicts"]
        }
        assert not costly, (tile["name"], costly)


@pytest.mark.parametrize("op", OPS)
def test_splits_are_added_in_one_order(op):
    """The same bits, whichever block comes last and whenever its copies land."""
    case = cases.ConvCase("noise", 2, 16, 9, 9, 64, 3, 3, (1, 1), (1, 1))
    operands = channels_last(gradient_operands(case, torch.float32))
    results = []
    for schedule in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled")):
        with emulated.using(configuration=2, splits=5, schedule=schedule):
            results.append(run(op, emulated.NAME, operands, case, True))
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert_close(results[2], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_every_byte_is_read_from_memory_once(op):
    """What lies outside, or in no tap, is not read: unique bytes are the operands' at most."""
    operands = channels_last(gradient_operands(STRIDED, torch.bfloat16))
    dy, y, x, weight, scale = operands
    with emulated.using(configuration=0, splits=1, counting=True) as found:
        run(op, emulated.NAME, operands, STRIDED, True)
    tensors = found.reports[0]["tensors"]
    written, read = ("x", "weight") if op == "conv_dgrad" else ("weight", "x")
    sizes = {"dy": dy, "y": y, "scale": scale, "x": x, "weight": weight}
    for name in ("dy", "y", read, "scale"):
        assert tensors[name]["unique_bytes_read"] <= sizes[name].nbytes
    assert tensors["dy"]["unique_bytes_read"] == dy.nbytes
    assert tensors[written]["unique_bytes_written"] == sizes[written].nbytes


def problem(op, case, dtype=torch.bfloat16, **changes):
    """A channels_last problem in memory that the plan never touches."""

    def strides(shape):
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c)

    values = {
        "dtype": str(dtype).removeprefix("torch."),
        "allow_tf32": True,
        **dict.fromkeys(("dy", "y", "x", "weight", "scale"), 4096),
        "x_size": case.input_shape,
        "weight_size": case.weight_shape,
        "dy_stride": strides(case.output_shape),
        "y_stride": strides(case.output_shape),
        "x_stride": strides(case.input_shape),
        "weight_stride": strides(case.weight_shape),
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }
    return emulated.load().ConvGradient(**(values | changes))


def plan(op, made, gpu=emulated.H200, configuration=-1, splits=0):
    return getattr(emulated.load(), f"{op}_plan")(made, gpu, configuration, splits)


@pytest.mark.parametrize("op", OPS)
def test_refusals_say_why(op):
    count = len(configurations(op))
    with pytest.raises(ValueError, match="TF32 is not allowed"):
        plan(op, problem(op, LARGE, torch.float32, allow_tf32=False))
    with pytest.raises(ValueError, match="dtype 1; bfloat16, float16 and float32"):
        plan(op, problem(op, LARGE, torch.float64))
    with pytest.raises(ValueError, match=f"configuration {count}; there are 0 to {count - 1}"):
        plan(op, problem(op, LARGE), configuration=count)
    with pytest.raises(ValueError, match=r"configuration 0 \(128x128_4w3s\).*16 bytes at a time"):
        plan(op, problem(op, LARGE, dy=4098), configuration=0)
    with pytest.raises(ValueError, match="no such parts with work for each"):
        plan(op, problem(op, LARGE), configuration=0, splits=2000)
    with pytest.raises(ValueError, match="too much shared memory"):
        plan(op, problem(op, LARGE), (80, 48 * 1024, 96 * 1024), configuration=0)
    with pytest.raises(ValueError, match="3 groups do not divide"):
        plan(op, problem(op, LARGE, groups=3))


@pytest.mark.parametrize("op", OPS)
def test_the_choice(op):
    """Narrow only where nothing else can read; parts where tiles are few; nothing for nothing."""
    tiles = configurations(op)
    made = plan(op, problem(op, LARGE))
    assert tiles[made["configuration"]]["wide"]
    for name in ("dy", "y", "weight" if op == "conv_dgrad" else "x"):
        odd = plan(op, problem(op, LARGE, **{name: 4098}))
        assert not tiles[odd["configuration"]]["wide"], name
    # One image of layer 4's 3x3, many pixels of layer 1's: one tile or a few, a long reduction.
    size = (1, 512, 7) if op == "conv_dgrad" else (8, 64, 56)
    few = cases.ConvCase("few", *size, size[2], size[1], 3, 3, (1, 1), (1, 1))
    assert plan(op, problem(op, few))["splits"] > 4
    empty = cases.ConvCase("empty", 0, 64, 7, 7, 64)
    assert plan(op, problem(op, empty))["launches"] == 0


@pytest.mark.parametrize("gpu", [emulated.H200, emulated.A100, emulated.RTX3080], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_layer_of_resnet50_has_a_plan_that_fits(op, gpu):
    for layer in cases.RESNET50_LAYERS:
        for dtype in TYPES:
            made = plan(op, problem(op, layer, dtype), gpu)
            tile = configurations(op)[made["configuration"]]
            assert tile["shared_bytes"] <= gpu[1]
            assert tile["blocks"] * tile["warps"] <= 16, "255 registers a thread, 64 K each"
            assert made["blocks"] > 0


def test_a_long_filter_is_refused():
    """Both kernels' plans share the check, and conv_dgrad keeps a bit for each tap."""
    long = cases.ConvCase("long", 1, 8, 1, 32, 8, 1, 16, padding=(0, 8))
    for op in OPS:
        with pytest.raises(ValueError, match="a filter of 1 x 16; at most 15 x 15"):
            plan(op, problem(op, long))
    fits = cases.ConvCase("fits", 1, 8, 1, 32, 8, 1, 15, padding=(0, 7))
    operands = channels_last(gradient_operands(fits, torch.float16, exact=True))
    assert not len(
        wrong("conv_dgrad", operands, fits, run("conv_dgrad", emulated.NAME, operands, fits))
    )
