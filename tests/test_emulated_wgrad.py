"""conv_bn_wgrad in CUDA, emulated: configurations, prologues, splits, costs, the plan."""

from __future__ import annotations

import dataclasses

import emulated
import emulated_wgrad
import pytest
import torch
from emulated import Schedule
from matrix import conv_arguments

from resnet_fused import cases, numerics, roofline
from resnet_fused.ops import _cuda_plan, _cuda_wgrad, _cuda_wgrad_checks
from resnet_fused.ops import _training_checks_wgrad as checks
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

DTYPES = emulated_wgrad.DTYPES
PROLOGUES = ((True, True), (True, False), (False, True), (False, False))
SMALL = cases.ConvCase("small", 2, 72, 7, 6, 72, 3, 3, (1, 1), (1, 1))
# More than a tile of every configuration along M and N, and nothing a multiple of a tile.
LARGE = cases.ConvCase("large", 2, 40, 9, 7, 136, 3, 3, (1, 1), (1, 1))
STRIDED = cases.ConvCase("strided", 2, 24, 11, 9, 40, 3, 3, (2, 2), (1, 1))
POINTWISE = cases.ConvCase("pointwise", 3, 64, 5, 5, 72)
NARROW = 6


def configurations() -> list[dict]:
    return emulated.load().conv_bn_wgrad_configurations()


def by_mma(case, dtype=torch.bfloat16) -> list[tuple[int, dict]]:
    """Index and entry of those for a case that any GPU runs on.

    test_emulated_bn_wgrad_sm90.py, test_emulated_wgrad_image.py and test_emulated_wgrad_halo.py
    have the others, and why they are for no other case.
    """
    run = (case.r, case.s, case.stride, case.padding, case.dilation)
    window = run == (3, 3, (1, 1), (1, 1), (1, 1)) and case.c // case.groups % 16 == 0
    window = window and dtype != torch.float32
    return [
        (i, tile)
        for i, tile in enumerate(configurations())
        if not tile["tma"] and not tile["image"] and (window or not tile["window"])
    ]


def laid_out(operands, layout=torch.channels_last):
    return checks.Operands(
        *(t if t is None or t.dim() == 2 else t.contiguous(memory_format=layout) for t in operands)
    )


def exact(case, dtype, affine=True, norm=True, layout=torch.channels_last):
    return laid_out(checks.exact_operands(case, dtype, affine=affine, norm=norm), layout)


def noise(case, dtype):
    dz, y, x = (
        torch.randn(shape).to(dtype)
        for shape in (case.output_shape, case.output_shape, case.input_shape)
    )
    return laid_out(checks.Operands(dz, y, torch.randn(3, case.k), x, torch.randn(4, case.c)))


def call(case, operands, weight=None, **settings):
    """The gradient, and the report of the kernel that multiplies."""
    weight = torch.empty(case.weight_shape, dtype=operands.dz.dtype) if weight is None else weight
    with emulated.using(**settings) as runs:
        got = overload("conv_bn_wgrad", emulated.NAME)(*operands, weight, *conv_arguments(case))
    return got, runs.reports[0]


def require(case, operands, got):
    """Every bit."""
    assert torch.equal(got, checks.expected_wgrad(operands, case).to(got.dtype)), case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_and_split_is_exact(dtype):
    given = exact(SMALL, dtype)
    for index, _ in by_mma(SMALL, dtype):
        for splits in (1, 3):
            schedule = Schedule("lazy", "shuffled", seed=index)
            weight = torch.empty(SMALL.weight_shape, dtype=(dtype, torch.float32)[index % 2])
            got, report = call(
                SMALL, given, weight, configuration=index, splits=splits, schedule=schedule
            )
            assert report["plan"]["configuration"] == index
            assert report["plan"]["splits"] == splits
            require(SMALL, given, got)


@pytest.mark.parametrize(("affine", "norm"), PROLOGUES)
def test_every_prologue_is_exact(affine, norm):
    for dtype, index in zip(DTYPES, (1, 4, NARROW), strict=True):
        given = exact(STRIDED, dtype, affine, norm)
        require(STRIDED, given, call(STRIDED, given, configuration=index, splits=2)[0])


def test_tiles_beside_each_other():
    """More than one tile along each axis, and tiles that are cut."""
    given = exact(LARGE, torch.bfloat16)
    for index, tile in by_mma(LARGE):
        got, report = call(LARGE, given, configuration=index, splits=2, resident_blocks=5)
        assert report["plan"]["blocks"] >= 2 * 4, tile["name"]
        require(LARGE, given, got)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_groups_and_layouts(layout):
    case = cases.ConvCase("groups", 2, 48, 7, 6, 96, 3, 3, (2, 1), (1, 2), (1, 2), 6)
    given = exact(case, torch.float16, layout=layout)
    for index, tile in by_mma(case):
        if tile["wide"] and layout is torch.contiguous_format:
            continue
        require(case, given, call(case, given, configuration=index, splits=1)[0])


@pytest.mark.parametrize("name", ["dz", "y", "x"])
def test_what_lies_askew_is_read_element_by_element(name):
    given = exact(SMALL, torch.bfloat16)
    t = getattr(given, name)
    n, c, h, w = t.shape
    moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    given = given._replace(**{name: moved.copy_(t)})
    with pytest.raises(ValueError, match="16 bytes at a time"):
        call(SMALL, given, configuration=0, splits=1)
    got, report = call(SMALL, given, configuration=-1, splits=0)
    assert report["plan"]["configuration"] == NARROW
    require(SMALL, given, got)


@pytest.mark.parametrize("index", [0, 1, NARROW])
def test_pixels_that_do_not_exist_are_zeros_and_not_c_or_the_shift(index):
    """Behind the last pixel, where both operands would be constants that are not zero."""
    case = dataclasses.replace(POINTWISE, n=1)  # 25 pixels: less than a step
    given = exact(case, torch.float16)
    given.norm[0].abs_()
    given.x.abs_().add_(1)
    given.coefficients[2, 1] = float("inf")  # times zeros it would be NaN
    got, _ = call(case, given, configuration=index, splits=1)
    expected = checks.expected_wgrad(given, case).half()
    assert torch.equal(got, expected) or torch.equal(got.isnan(), expected.isnan())
    assert not got.isnan()[[0, *range(2, case.k)]].any()
    kept = [0, *range(2, case.k)]
    assert torch.equal(got[kept], expected[kept])
    assert torch.equal(got[1].isinf(), expected[1].isinf())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bank_conflicts(dtype):
    """Of 16-byte loads, ldmatrix, and what is turned in place."""
    for index, tile in by_mma(STRIDED, dtype):
        _, report = call(
            STRIDED, noise(STRIDED, dtype), configuration=index, splits=1, counting=True
        )
        assert report["counters"]["shared_wavefronts"] > 0
        costly = {
            (site["file"], site["line"], site["instruction"]): site["counters"]["bank_conflicts"]
            for site in report["sites"]
            if site["counters"]["bank_conflicts"]
        }
        assert not costly, (tile["name"], costly)


def test_splits_are_added_in_one_order():
    given, results = noise(LARGE, torch.float32), []
    for order in (Schedule(), Schedule("lazy", "reverse"), Schedule("random", "shuffled")):
        results.append(
            call(LARGE, given, configuration=4, splits=3, schedule=order, resident_blocks=6)[0]
        )
    assert all(torch.equal(one, results[0]) for one in results[1:])


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_within_the_bound_in_either_rounding_of_sums(rounding, splits):
    given = noise(LARGE, torch.bfloat16)
    weight = torch.empty(LARGE.weight_shape)
    got, _ = call(
        LARGE, given, weight, configuration=1, splits=splits, schedule=Schedule(rounding=rounding)
    )
    oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **LARGE.geometry)
    accumulation = "nearest" if rounding == "nearest" else "truncate"
    bound = numerics.conv_bn_wgrad_bound(
        *given, weight, oracle, **LARGE.geometry, accumulation=accumulation, k=16
    )
    found = numerics.check_bound(got, oracle, bound)
    assert found.ok, str(found)


@pytest.mark.parametrize("case", [POINTWISE, LARGE], ids=str)
def test_every_byte_comes_from_memory_once(case):
    """Unique bytes are the operands' and the result's: those that the roofline counts."""
    given = noise(case, torch.bfloat16)
    weight = torch.empty(case.weight_shape)
    got, report = call(case, given, weight, configuration=0, splits=1, counting=True)
    tensors = report["tensors"]
    for name in ("dz", "y", "coefficients", "x"):
        assert tensors[name]["unique_bytes_read"] == getattr(given, name).nbytes, name
    # Two of its four rows.
    assert tensors["norm"]["unique_bytes_read"] == given.norm.nbytes // 2
    assert tensors["weight"]["unique_bytes_written"] == got.nbytes
    read = sum(tensors[name]["unique_bytes_read"] for name in given._fields)
    cost = roofline.conv_bn_wgrad_cost(
        case, torch.bfloat16, affine=True, prologue=True, parameter=torch.float32
    )
    assert read + got.nbytes <= 1.1 * cost.bytes


def test_a_float_parameter_gets_the_sums_unrounded():
    case = cases.ConvCase("sums", 5, 16, 7, 9, 24, 1, 2, padding=(0, 1))
    given = exact(case, torch.float16)
    expected = checks.expected_wgrad(given, case)
    assert not torch.equal(expected.half().double(), expected)
    for splits in (1, 2):
        got, _ = call(case, given, torch.empty(case.weight_shape), configuration=2, splits=splits)
        assert got.dtype is torch.float32 and torch.equal(got.double(), expected)


@pytest.mark.parametrize("operand", checks.Operands._fields)
def test_nan_stays_with_its_filter_or_column(operand):
    given = noise(STRIDED, torch.float16)
    t = getattr(given, operand)
    t[(0, 3) if t.dim() == 2 else (0, 3, 1, 1)] = float("nan")
    got, _ = call(STRIDED, given, configuration=1, splits=2)
    weight = torch.empty(STRIDED.weight_shape)
    oracle = numerics.conv_bn_wgrad_oracle(*given, weight, **STRIDED.geometry)
    assert torch.equal(got.isnan(), oracle.isnan())
    assert oracle.isnan().any() and not oracle.isnan().all()


def test_nothing_is_launched_for_nothing():
    case = dataclasses.replace(POINTWISE, n=0)
    got, report = call(case, noise(case, torch.bfloat16), configuration=-1, splits=0)
    assert report["plan"]["launches"] == 0 and not got.any()


# The plan.


def problem(case, dtype=torch.bfloat16, affine=True, prologue=True, **changes):
    """A channels_last problem in memory that the plan never touches."""

    def strides(shape):
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c)

    values = {
        "dtype": emulated.TYPE_NAMES[dtype],
        "weight_dtype": "float32",
        "allow_tf32": True,
        **dict.fromkeys(("dz", "x", "weight"), 4096),
        "y": 4096 if affine else 0,
        "coefficients": 4096 if affine else 0,
        "norm": 4096 if prologue else 0,
        "x_size": case.input_shape,
        "weight_size": case.weight_shape,
        "dz_stride": strides(case.output_shape),
        "y_stride": strides(case.output_shape),
        "x_stride": strides(case.input_shape),
        "weight_stride": strides(case.weight_shape),
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
    }
    return emulated.load().ConvBnWgrad(**(values | changes))


def planned(*arguments, gpu=emulated.H200, configuration=-1, splits=0, **more):
    return emulated.load().conv_bn_wgrad_plan(
        problem(*arguments, **more), gpu, configuration, splits
    )


def name_of(plan) -> str:
    return configurations()[plan["configuration"]]["name"]


LAYER1 = cases.ConvCase("layer1", 256, 64, 56, 56, 64, 3, 3, (1, 1), (1, 1))
EXPANDING = cases.ConvCase("expanding", 256, 64, 56, 56, 256)
LAYER4 = cases.ConvCase("layer4", 256, 512, 7, 7, 512, 3, 3, (1, 1), (1, 1))


def test_the_plan_follows_the_shape():
    gpu = emulated.A100
    strided = dataclasses.replace(LAYER4, stride=(2, 2))
    assert name_of(planned(strided, gpu=gpu)) == "128x256_8w3s"
    assert name_of(planned(EXPANDING, gpu=gpu)) == "128x64_4w3s"
    assert name_of(planned(LAYER1, gpu=gpu)) == "halo_64x288_4w3s"
    assert name_of(planned(dataclasses.replace(LAYER1, stride=(2, 2)), gpu=gpu)) == "64x128_4w3s"
    assert planned(LAYER1, gpu=gpu)["splits"] > 4
    odd = dataclasses.replace(LAYER4, c=511)
    assert name_of(planned(odd, gpu=gpu)).startswith("narrow_")
    # Rows that lie askew are read element by element, and so is everything.
    for name in ("norm", "coefficients"):
        assert name_of(planned(LAYER4, gpu=gpu, **{name: 4100})).startswith("narrow_")


@pytest.mark.parametrize("case", [LAYER1, EXPANDING, LAYER4], ids=str)
def test_what_is_turned_costs_more(case):
    cycles = [
        planned(case, affine=affine, prologue=norm, configuration=1, splits=8)["cycles"]
        for affine, norm in ((False, False), (False, True), (True, False), (True, True))
    ]
    assert cycles[0] < cycles[1] < cycles[3] and cycles[0] < cycles[2] < cycles[3]


def test_every_part_leaves_its_sums():
    for splits in (1, 7):
        plan = planned(LAYER4, configuration=1, splits=splits)
        assert plan["workspace_bytes"] == splits * 4 * 36 * 128 * 128 * 4
        assert plan["blocks"] == splits * 4 * 36


@pytest.mark.parametrize("gpu", [emulated.H200, emulated.A100, emulated.RTX3080], ids=str)
def test_every_layer_of_resnet50_has_a_plan_that_fits(gpu):
    for layer in cases.RESNET50_LAYERS:
        for dtype in DTYPES:
            plan = planned(layer, dtype, gpu=gpu)
            tile = configurations()[plan["configuration"]]
            assert tile["shared_bytes"] <= gpu[1]
            assert tile["blocks"] * tile["warps"] <= 16, "255 registers a thread, 64 K each"
            assert plan["blocks"] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "dtype 1"),
        ({"weight_dtype": "float16"}, "dtype 2 of the gradient; that of dz, 3, and float32"),
        ({"weight_size": (64, 64, 16, 3)}, "at most 15 x 15"),
        ({"groups": 3}, "groups do not divide"),
        ({"stride": (0, 1)}, "strides"),
    ],
)
def test_what_no_launch_takes_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        planned(LAYER1, **changes)


def test_wishes_that_nobody_can_fulfil_are_refused():
    with pytest.raises(ValueError, match="TF32 is not allowed"):
        planned(LAYER1, torch.float32, allow_tf32=False)
    with pytest.raises(ValueError, match="there are 0 to 17"):
        planned(LAYER1, configuration=18)
    with pytest.raises(ValueError, match="no such parts with work for each"):
        planned(POINTWISE, configuration=1, splits=2000)
    with pytest.raises(ValueError, match="too much shared memory"):
        planned(LAYER1, gpu=(80, 48 * 1024, 96 * 1024), configuration=0)


# The launch in Python, and the self-check, on the emulator.


def launch(dz, y, coefficients, x, norm, dweight, *geometry, wish=None):
    """In the place of `_cuda_wgrad.launch`."""
    wished = {} if wish is None else dict(zip(("configuration", "splits"), wish, strict=True))
    with emulated.using(**wished):
        found = overload("conv_bn_wgrad", emulated.NAME)(
            dz, y, coefficients, x, norm, dweight, *map(list, geometry[:3]), geometry[3]
        )
    dweight.copy_(found)


def plan_index(made, index, splits):
    given = emulated_wgrad.problem_of(*made.operands, made.out, *made.geometry[:4])
    try:
        return emulated.load().conv_bn_wgrad_plan(given, emulated.H200, index, splits)[
            "configuration"
        ]
    except ValueError:
        return -1


NAMES = (
    "128x256_8w3s", "128x128_4w3s", "128x64_4w3s", "64x128_4w3s", "64x64_4w3s", "halo_64x288_4w3s",
    "narrow_64x64_4w3s", "image_64x224_4w3s",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_self_check_passes(name):
    assert tuple(tile["name"] for tile in configurations() if not tile["tma"]) == NAMES
    _cuda_wgrad_checks.check(name, "cpu", launch, plan_index, NAMES)


def test_the_self_check_notices_faults():
    def coefficients(dz, y, rows, *rest, **more):
        launch(dz, y, rows.roll(1, 1), *rest, **more)

    def prologue(*arguments, **more):
        launch(*arguments[:4], None, *arguments[5:], **more)

    def last(*arguments, **more):
        launch(*arguments, **more)
        arguments[5][-1, -1, -1, -1] += 1

    def silent(*arguments, **more):
        pass

    for fault in (coefficients, prologue, last, silent):
        with pytest.raises(ArithmeticError):
            _cuda_wgrad_checks.check(NAMES[4], "cpu", fault, plan_index, NAMES)
    with pytest.raises(ArithmeticError, match="no case"):
        _cuda_wgrad_checks.check(NAMES[4], "cpu", launch, lambda *_: -1, NAMES)
    with pytest.raises(ValueError, match="accepted are"):
        _cuda_wgrad_checks.check("other", "cpu", launch, plan_index, NAMES)


def test_what_no_configuration_takes_is_plain_pytorchs(monkeypatch):
    case = cases.ConvCase("long", 1, 8, 1, 32, 8, 1, 17, padding=(0, 8))
    given = exact(case, torch.float32)
    refused = _cuda_plan.Plan(-1, "", 0, 0, 0.0, "a filter of 1 x 17")
    monkeypatch.setattr(_cuda_plan, "gpu", lambda device: emulated.H200)
    monkeypatch.setattr(_cuda_plan, "plan", lambda *_: refused)
    dweight = torch.full(case.weight_shape, torch.nan)
    with pytest.warns(UserWarning, match="a filter of 1 x 17; plain PyTorch computes it"):
        _cuda_wgrad.launch(*given, dweight, *conv_arguments(case))
    require(case, given, dweight)
    nothing = given._replace(dz=given.dz[:0], y=given.y[:0], x=given.x[:0])
    _cuda_wgrad.launch(*nothing, dweight, *conv_arguments(case))
    assert not dweight.any()
