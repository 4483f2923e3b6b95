"""conv_bn_act_fp8 by windows of the input, emulated: its numbers, its costs, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import random

import emulated
import emulated_shapes
import pytest
import torch
from conv_fp8_by_tma import FEW, OP, operands, run, table, windows, wrong
from emulated import Schedule
from emulated_fp8 import OUTS, problem_of
from emulated_shapes import lay_out
from fp8_operands import E4M3, Fp8Operands
from test_emulated_conv_window import CASES, NAMED, STAGE, conv3x3, loaded_of_x, positions

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CONFIGURATIONS = 3
every = pytest.mark.parametrize("place", range(CONFIGURATIONS))


def index_of(place: int) -> int:
    return list(windows())[place]


def pixels_of(place: int) -> int:
    return windows()[index_of(place)]["m"]


def planned(case, index=-1, gpu=emulated.H200, **changes):
    """The plan of a case, some of its operands changed."""
    given = dataclasses.replace(operands(case, E4M3), **changes)
    out = lay_out(torch.zeros(case.output_shape).to(given.out_dtype), "nhwc")
    return planned_for(case, given.tuple(), out, index, gpu)


def planned_for(case, given, out, index=-1, gpu=emulated.H200):
    geometry = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
    made = problem_of(*given, out, *geometry, case.act, 1.0, 1.0)
    return getattr(emulated.load(), f"{OP}_plan")(made, gpu, index, 0)


def run_into(case, given, out, index):
    """Runs a configuration into an output of any strides."""
    names = ("x", "weight", "scale", "shift", "residual")
    inputs = dict(zip(names, given.tuple(), strict=True))
    geometry = (list(case.stride), list(case.padding), list(case.dilation), case.groups)
    scales = given.residual_scale, given.out_scale
    made = problem_of(*given.tuple(), out, *geometry, case.act, *scales)
    with emulated.using(schedule=Schedule()):
        settings = emulated.settings(("into",), inputs, {"out": out})
    getattr(emulated.load(), OP)(settings, made, emulated.H200, index, 1, 0)


def layer(case, batch, index=-1, out=E4M3):
    """The plan of a layer at a batch size, with no memory and no shortcut."""
    shapes = (batch, *case.input_shape[1:]), case.weight_shape, (batch, *case.output_shape[1:])
    x, weight, result = (
        torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
        for shape, dtype in zip(shapes, (E4M3, E4M3, out), strict=True)
    )
    vector = torch.empty(case.k, device="meta")
    return planned_for(case, (x, weight, vector, vector, None), result, index)


def test_each_configuration_has_a_test_and_fits():
    names = [tile["name"] for tile in windows().values()]
    assert names == ["tma_win192x64_2w", "tma_win160x64_2w", "tma_win96x64_2w"]
    for tile in windows().values():
        assert tile["tma"] and tile["step_bytes"] == 64
        assert tile["shared_bytes"] == emulated.H200[1]


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    """On integers; the result's type, schedule, walk and blocks change from case to case."""
    number = CASES.index(case) * CONFIGURATIONS + place
    for turn in range(2):
        given = operands(case, OUTS[(number + turn) % 3])
        schedule = dataclasses.replace(emulated.SCHEDULES[(number + turn) % 9], seed=number)
        few = (number + turn) % 4 != 0
        y, report = run(
            case, given, index_of(place), schedule=schedule, reverse=number // 2 % 2 == 1,
            gpu=FEW if few else emulated.H200, resident_blocks=2,
        )  # fmt: skip
        assert wrong(case, given, y) is None
        tiles, columns = -(-positions(case) // pixels_of(place)), case.k // 64
        of_column = max(1, (2 if few else 132) // columns)
        assert report["plan"]["blocks"] == columns * min(of_column, tiles)


def test_the_cases_round_and_saturate():
    oracles = [(case, operands(case, E4M3)) for case in CASES]
    assert any((given.oracle(case).abs() > 448).any() for case, given in oracles)
    for case, given in oracles:
        assert (given.expected(case).double() != given.oracle(case)).any(), case.name


@every
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_noise_is_within_the_bound(place, rounding):
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    for out, name in itertools.product(OUTS, ("images", "narrow")):
        given = operands(NAMED[name], out, exact=False)
        schedule = Schedule("random", "shuffled", rounding, seed=place)
        y, _ = run(NAMED[name], given, index_of(place), schedule=schedule, gpu=FEW)
        found = given.check(NAMED[name], y, accumulation=accumulation)
        assert found.ok, (out, name, found)


@every
@pytest.mark.parametrize("small", [(2, 4, 6, 8), (3, 5, 7)])
def test_two_taps_are_added_up_by_themselves(place, small):
    """A unit that cuts its sums drops 0.75 beside 2^23; what the threads add is rounded."""
    case = conv3x3("parts", 1, 3, 3, act="none")
    x, weight = torch.full(case.input_shape, 448.0), torch.zeros(case.weight_shape)
    weight[:, 1:, 0, 0] = 448.0
    x[:, 0] = 0.75
    for tap in small:  # of other parts than the first one, of which they have one tap or the other
        weight[:, 0, tap // 3, tap % 3] = 1.0
    one = torch.ones(case.k)
    x, weight = (lay_out(t.to(E4M3), "nhwc") for t in (x, weight))
    given = Fp8Operands(x, weight, one, -63 * 448.0**2 * one, None, 1.0, 1.0, torch.float16)
    y, _ = run(case, given, index_of(place), schedule=Schedule(rounding="toward_zero"))
    assert (y[:, :, 1, 1].float() == len(small)).all(), "not added up in parts of two taps"


@every
@pytest.mark.parametrize("out", OUTS, ids=str)
def test_nan_and_infinity_stay_where_torch_has_them(place, out):
    """At the ends of rows and images, in the shortcut, and in memory that nobody may read."""
    case = NAMED["images"]
    given = operands(case, out, layout="padded")
    x, residual = given.x.float(), given.residual.float()
    x[0, 3, 1, 5], x[2, 0, 3, 0] = torch.nan, torch.nan  # beside a row's end, before one
    x[4, 7, 4, 2], x[8, 2, 4, 5] = torch.nan, torch.nan  # an image's last row, the last pixel
    residual[1, 9, 4, 5], residual[7, 40, 0, 0] = torch.nan, torch.nan
    shift = given.shift.clone()
    shift[5], shift[6] = torch.inf, -torch.inf
    given = dataclasses.replace(
        given, x=lay_out(x.to(E4M3), "padded"), residual=lay_out(residual.to(E4M3), "nhwc"),
        shift=shift,
    )  # fmt: skip
    y, _ = run(case, given, index_of(place), schedule=Schedule("lazy", "reverse"), gpu=FEW)
    oracle = given.oracle(case)
    assert oracle.isnan().any() and oracle.isinf().any()
    assert 0.5 < (~oracle.isnan()).float().mean() < 1
    assert torch.equal(y.float().isnan(), oracle.isnan())
    assert given.check(case, y).ok


@every
@pytest.mark.parametrize("out", OUTS[:2], ids=str)
def test_what_it_costs(place, out):
    """No bank conflict, each byte once; L2 is asked for a window's rows, not for nine taps."""
    given = operands(STAGE, out)
    y, report = run(STAGE, given, index_of(place), counting=True)
    assert wrong(STAGE, given, y) is None
    assert report["counters"]["bank_conflicts"] == 0
    roof = sum(t.nbytes for t in (*given.tuple(), y) if t is not None)
    moved = sum(t["unique_bytes_read"] for t in report["tensors"].values())
    moved += sum(t["unique_bytes_written"] for t in report["tensors"].values())
    assert 0.999 * roof <= moved <= 1.1 * roof, report["tensors"]
    assert report["counters"]["global_store_bytes_asked"] == y.nbytes
    assert report["counters"]["global_store_sectors"] == y.nbytes // 32
    # Of a window of two rows, two pixels and the tile's own, in parts of whole patterns.
    factor = {192: 312 / 192, 160: 288 / 160, 96: 216 / 96}[pixels_of(place)]
    assert 0.95 * factor <= loaded_of_x(report) / given.x.nbytes <= factor


@pytest.mark.parametrize("name", ["x", "weight", "residual", "out"])
@pytest.mark.parametrize("layout", ["nchw", "unaligned"])
def test_a_tensor_that_it_cannot_take_is_named(name, layout):
    case, given = NAMED["images"], operands(NAMED["images"], E4M3)
    names = ("x", "weight", "scale", "shift", "residual")
    tensors = dict(zip(names, given.tuple(), strict=True))
    tensors["out"] = lay_out(torch.zeros(case.output_shape).to(E4M3), "nhwc")
    tensors[name] = lay_out(tensors[name], layout)
    *inputs, out = tensors.values()
    said = f"{name}: its channels are not adj" if layout == "nchw" else f"{name}: address is "
    for index in windows():
        with pytest.raises(ValueError, match=said) as error:
            planned_for(case, inputs, out, index)
        assert windows()[index]["name"] in str(error.value)


REFUSED = (
    (conv3x3("k", 1, 5, 5, 80), "channels: 80 of the output; a multiple of 64"),
    (dataclasses.replace(conv3x3("c", 1, 5, 5), c=128), "windows are for 64 in one group"),
    (dataclasses.replace(conv3x3("s", 1, 9, 9), stride=(2, 2)), "3x3, stride, padding and dil"),
    (dataclasses.replace(conv3x3("p", 1, 9, 9), padding=(0, 1)), "3x3, stride, padding and dil"),
    (ConvCase("1x1", 1, 64, 5, 5, 64), "windows are for filters of 3x3"),
    (conv3x3("w", 1, 2, 600), "x: rows of 600 pixels take .* of shared memory"),
)


@pytest.mark.parametrize(("case", "said"), REFUSED, ids=[case.name for case, _ in REFUSED])
def test_a_problem_that_it_is_not_for_is_refused_in_words(case, said):
    for index in windows():
        with pytest.raises(ValueError, match=said):
            planned(case, index)
    # Left to the chooser, another kernel serves it, and nothing is said of windows.
    found = planned(case)
    assert found["configuration"] not in windows() and "window" not in found["why"]


def test_the_widest_rows_that_fit():
    widest = {}
    for index, tile in windows().items():
        for width in range(640, 0, -1):
            case = conv3x3("w", 1, 1, width)
            try:
                layer(case, 1, index)
            except ValueError:
                continue
            widest[tile["m"]] = width
            break
        given = operands(case, E4M3)
        y, _ = run(case, given, index, schedule=Schedule("random", "shuffled"))
        assert wrong(case, given, y) is None
    assert widest == {192: 462, 160: 518, 96: 598}


def test_strided_images_and_outputs_are_right():
    """x within a wider and longer image, shortcut and output with gaps behind rows and images."""
    case = dataclasses.replace(NAMED["narrow"], residual=True)
    given = operands(case, E4M3)
    room = torch.full((5, 15, 6, 96), torch.nan).to(E4M3).permute(0, 3, 1, 2)
    x = room[:, 16:80, 1:14, 1:5:2].copy_(given.x)
    wide = torch.full((5, 16, 5, 144), torch.nan).to(E4M3).permute(0, 3, 1, 2)
    residual = wide[:, :128, :13, :2].copy_(given.residual)
    for place, dtype in itertools.product(range(CONFIGURATIONS), OUTS[:2]):
        given = dataclasses.replace(given, x=x, residual=residual, out_dtype=dtype)
        y, _ = run(case, given, index_of(place))
        assert wrong(case, given, y) is None
        out = torch.full((5, 16, 5, 160), torch.nan).to(dtype).permute(0, 3, 1, 2)
        inside = out[:, 16:144, 2:15, 1:5:2]
        run_into(case, given, inside, index_of(place))
        assert torch.equal(inside.float(), y.float())
        assert int((~out.float().isnan()).sum()) == inside.numel()


def test_of_what_cannot_be_stored_16_bytes_at_a_time_the_strides_are_said():
    case = NAMED["narrow"]
    given = operands(case, E4M3)
    for dtype, room in ((E4M3, 136), (torch.float16, 132)):
        out = torch.zeros(5, 13, 2, room).to(dtype).permute(0, 3, 1, 2)[:, :128]
        with pytest.raises(ValueError, match=f"out: strides of {room * dtype.itemsize} bytes"):
            planned_for(case, dataclasses.replace(given, out_dtype=dtype).tuple(), out, index_of(0))


@pytest.mark.parametrize("gpu", [emulated.A100, emulated.H200[:3], (*emulated.H200[:3], 100)])
def test_no_other_gpu_gets_them(gpu):
    for index in (-1, *windows()):
        with pytest.raises(ValueError, match="for GPUs of capability 9.0"):
            planned(STAGE, index, gpu=gpu)


def test_the_first_stage_is_served_by_them():
    """By what is predicted; at a batch of 32 by the tile that leaves no short last round."""
    chosen = {}
    for batch in (256, 32, 1):
        found = layer(conv3x3("layer1.conv2", 1, 56, 56), batch)
        chosen[batch] = windows()[found["configuration"]]["name"]
    assert chosen == {256: "tma_win192x64_2w", 32: "tma_win160x64_2w", 1: "tma_win96x64_2w"}


def test_they_are_predicted_to_halve_the_products():
    """Of 16 bits' windows, and a third of what steps of 128 bytes take, half of each empty."""
    case = conv3x3("layer1.conv2", 1, 56, 56)
    cycles = {index: layer(case, 256, index)["cycles"] for index in range(len(table()))}
    best = min(cycles[index] for index in windows())
    by_steps = min(cycles[index] for index in cycles if index not in windows())
    assert best < by_steps / 3


def test_a_launch_counts_its_positions_in_31_bits():
    made = layer(conv3x3("huge", 1, 56, 56), 1_000_000, index_of(0))
    assert made["launches"] == 2 and made["blocks"] == 132


def test_random_shapes():
    for number in range(9):
        rng = random.Random(number)
        case = conv3x3(
            "random", rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 24),
            64 * rng.randint(1, 3), rng.random() < 0.5, rng.choice(("relu", "none")),
        )  # fmt: skip
        given = operands(case, rng.choice(OUTS), layout=rng.choice(("nhwc", "padded")))
        schedule = dataclasses.replace(rng.choice(emulated_shapes.SCHEDULES), seed=number)
        y, _ = run(
            case, given, index_of(number % CONFIGURATIONS), schedule=schedule,
            gpu=rng.choice((FEW, (5, *emulated.H200[1:]))), reverse=rng.random() < 0.5,
        )  # fmt: skip
        assert wrong(case, given, y) is None, case
