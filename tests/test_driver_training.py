"""The driver's ops of training: BatchNorm's passes, its values of channels, the convolutions."""

from __future__ import annotations

import json

import pytest
from test_driver import FOUND, raced, run, sites, with_lines

pytestmark = pytest.mark.emulated

IMAGES = ("--c", 24, "--h", 5, "--w", 8)
STATS = ("--op", "conv_bn_stats", "--h", 9, "--w", 9)
A_1X1 = ("--r", 1, "--s", 1, "--padding", 0)
END = ("--op", "bn_add_act_conv_stats", "--h", 9, "--w", 9, *A_1X1)
PASSES = ("bn_add_act", "bn_add_act_backward", "bn_backward_apply")
POOLS = ("bn_act_pool", "bn_act_pool_backward")
SUMMED = ("bn_add_act_backward", "bn_act_pool_backward")
VALUES = ("bn_finalize", "bn_update_stats", "bn_backward_finalize")
GRADIENTS = ("conv_bn_dgrad", "conv_bn_wgrad")
BEHIND = ("conv_bn_dgrad", "conv_bn_dgrad_end")
CONVOLUTIONS = (
    "conv_bn_stats", "bn_add_act_conv_stats", *GRADIENTS, "conv_bn_dgrad_end", "conv_bn_grad1x1",
    "conv_bn_grad1x1_end",
)  # fmt: skip
FLOATS = ("float32", "float16", "bfloat16")
both = pytest.mark.parametrize("data", ["integers", "normals"])
# The faults of the kernel by wgmma are tests/test_emulated_grad1x1_sm90_faults.py's.
BY_MMA = ("--configuration", "64x64_8w3s")
UNITED_BY_TMA = ("--configuration", "tma_64x128_4s")


def small(op):
    """A call of an op that every fault is planted in."""
    if op == "conv_bn_stats":
        return (*STATS, "--normed", "--splits", 1)
    if op == "bn_add_act_conv_stats":
        return (*END, "--normed", "--splits", 1)
    if op in CONVOLUTIONS:
        added = ("--addend", 1) if op != "conv_bn_wgrad" else ()
        tile = BY_MMA if op == "conv_bn_grad1x1" else ()
        tile = ("--residual",) if op.endswith("_end") else tile
        tile = (*tile, *UNITED_BY_TMA) if op == "conv_bn_grad1x1_end" else tile
        return (*gradient(op), "--affine", "--normed", "--splits", 1, *added, *tile)
    return ("--op", op, *IMAGES, *(("--dtype", "float32") if op in VALUES else ()))


def gradient(op):
    """A call of one gradient of a 3x3, or of both of a 1x1."""
    taps = A_1X1 if op.startswith("conv_bn_grad1x1") else ()
    return ("--op", op, "--h", 9, "--w", 9, *taps)


WINDOWS = ("--configuration", "halo_64x64_4w4s")
# conv_bn_wgrad by the configuration whose window goes along the pixels.
WINDOW = (
    *gradient("conv_bn_wgrad"), "--affine", "--normed", "--splits", 2, "--configuration",
    "halo_64x288_4w3s",
)  # fmt: skip


def right(*options, **more):
    """The record of a run that has to pass."""
    found = run(*options, **more)
    assert (found.returncode, found.stderr) == (0, ""), found
    record = json.loads(found.stdout)
    assert record["wrong"] == 0 and record["elements"] > 0
    assert record["worst"] <= 1
    return record


@both
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("bn_add_act", ()),
        ("bn_add_act", ("--residual", "--layout", "nchw")),
        ("bn_add_act", ("--residual", "--normed", "--act", "none")),
        ("bn_add_act", ("--residual", "--part", 8)),
        ("bn_add_act", ("--residual", "--part", 8, "--c", 21)),
        ("bn_add_act_backward", ("--layout", "nchw")),
        ("bn_add_act_backward", ("--residual",)),
        ("bn_add_act_backward", ("--residual", "--normed", "--c", 21)),
        ("bn_add_act_backward", ("--act", "none")),
        ("bn_backward_apply", ()),
        ("bn_backward_apply", ("--layout", "nchw")),
        ("bn_act_pool", ("--stride", 2)),
        ("bn_act_pool", ("--r", 2, "--s", 5, "--layout", "nchw")),
        ("bn_act_pool_backward", ("--stride", 2)),
        ("bn_act_pool_backward", ("--r", 2, "--s", 5, "--layout", "nchw")),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_passes_are_right(dtype, op, options, data):
    record = right("--op", op, *IMAGES, *options, "--dtype", dtype, "--data", data)
    if op not in POOLS:
        channels = 21 if 21 in options else 24
        rows = 3 if "--normed" in options else 2
        sums = rows * channels if op in SUMMED else 0
        assert record["elements"] == 2 * channels * 5 * 8 + sums
    # Nothing of a gradient that is passed on is rounded, but for its sums.
    assert record["worst"] == 0 if data == "integers" else 0.002 < record["worst"] <= 1


@both
@pytest.mark.parametrize(
    "options",
    [
        ("--stride", 2, "--normed"),
        ("--groups", 4, "--dilation", 2, "--padding", 2),
        ("--r", 1, "--s", 1, "--padding", 0, "--configuration", "64x64_4w4s", "--normed"),
        ("--c", 3, "--k", 5, "--layout", "nchw", "--normed"),
        ("--c", 64, "--splits", 3, "--normed", "--asynchrony", "lazy", "--order", "reverse"),
        ("--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled"),
        ("--c", 64, "--splits", 2, "--configuration", "halo_64x64_4w4s", "--normed"),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_conv_bn_stats_is_right(dtype, options, data):
    k = 5 if 5 in options else 32
    record = right(*STATS, "--dtype", dtype, "--data", data, *options)
    side = 5 if "--stride" in options else 9
    assert record["elements"] == 2 * k * side * side + 2 * k
    assert record["worst"] > (0.005 if data == "integers" else 0.05)  # of the statistics


@both
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--normed",),
        ("--c", 64, "--splits", 2, "--asynchrony", "lazy", "--order", "reverse"),
        ("--k", 136, "--normed", "--asynchrony", "random", "--order", "shuffled"),
        ("--k", 136, "--configuration", "64x64_4w3s", "--rounding", "toward_zero"),
        ("--k", 136, "--configuration", "128x128_4w3s", "--normed"),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_blocks_end_is_right(dtype, options, data):
    record = right(*END, "--dtype", dtype, "--data", data, *options)
    c, k = 64 if "--c" in options else 32, 136 if "--k" in options else 32
    assert record["elements"] == 2 * (c + k) * 81 + 2 * k
    # Of the statistics; on random data of the results' own rounding.
    least = 0.05 if dtype == "float32" else 0.8
    assert record["worst"] > (0.005 if data == "integers" else least)


@both
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--affine",),
        ("--affine", "--normed", "--stride", 2),
        ("--affine", "--normed", "--groups", 4, "--dilation", 2, "--padding", 2),
        ("--r", 1, "--s", 1, "--padding", 0, "--configuration", "64x64_4w3s", "--affine"),
        ("--c", 3, "--k", 5, "--layout", "nchw", "--affine", "--normed"),
        ("--k", 64, "--splits", 3, "--normed", "--asynchrony", "lazy", "--order", "reverse"),
        ("--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled", "--affine"),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", GRADIENTS)
def test_gradients_are_right(op, dtype, options, data):
    record = right(*gradient(op), "--dtype", dtype, "--data", data, *options)
    c, k = (3, 5) if "--layout" in options else (32, 64 if 64 in options else 32)
    groups, taps = 4 if "--groups" in options else 1, 1 if "--r" in options else 9
    sums = 2 * c if "--normed" in options else 0
    elements = {"conv_bn_dgrad": 2 * c * 81 + sums, "conv_bn_wgrad": k * c // groups * taps}
    assert record["elements"] == elements[op]
    # In 16 bits the bound is the result's own rounding.
    least = 0.02 if dtype == "float32" else 0.8
    assert record["worst"] == 0 if data == "integers" else record["worst"] > least


@both
@pytest.mark.parametrize(
    "options",
    [
        ("--addend", 1),
        ("--addend", 2, "--affine", "--normed"),
        ("--addend", 2, "--affine", "--r", 1, "--s", 1, "--padding", 0, "--stride", 2),
        ("--addend", 3, "--c", 5, "--layout", "nchw"),
        ("--addend", 1, "--affine", "--normed", "--k", 72, "--splits", 2, *WINDOWS),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", BEHIND)
def test_a_shortcuts_gradient_is_added(op, dtype, options, data):
    """In front of a block with a projection, or without one by an addend at every pixel."""
    projected = op == "conv_bn_dgrad_end" and options != ("--addend", 1)
    more = ("--residual",) if projected else ()
    record = right(*gradient(op), "--dtype", dtype, "--data", data, *options, *more)
    c, side = 5 if "--c" in options else 32, 9
    if op == "conv_bn_dgrad_end":
        assert record["elements"] == 2 * c * side**2 + (2 + projected) * c


@both
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--affine",),
        ("--normed", "--splits", 3, "--asynchrony", "lazy", "--order", "reverse"),
        ("--affine", "--normed", "--addend", 1, *BY_MMA),
        ("--affine", "--normed", "--addend", 1, "--configuration", "tma_64x64_6s"),
        ("--affine", "--normed", "--addend", 2, "--c", 72, "--k", 40, "--splits", 2),
        ("--affine", "--k", 72, "--addend", 3, "--asynchrony", "random", "--order", "shuffled"),
        ("--affine", "--normed", "--rounding", "toward_zero"),
        ("--affine", "--normed", "--float-weight"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_gradients_of_a_1x1_are_right(dtype, options, data):
    record = right(*gradient("conv_bn_grad1x1"), "--dtype", dtype, "--data", data, *options)
    c = 72 if "--c" in options else 32
    k = 40 if 40 in options else 72 if "--k" in options else 32
    sums = 2 * c if "--normed" in options else 0
    assert record["elements"] == 2 * c * 81 + sums + k * c
    # The bound is the results' own rounding.
    assert record["worst"] == 0 if data == "integers" else record["worst"] > 0.8


@both
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weights_gradient_in_float32(dtype, data):
    """It is not rounded to 16 bits, whose bound would be some thousand times as wide."""
    options = (*gradient("conv_bn_wgrad"), "--affine", "--normed", "--dtype", dtype, "--data", data)
    found = right(*options, "--float-weight")
    assert found["worst"] == 0 if data == "integers" else 0.01 < found["worst"] < 0.9


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_weights_gradient_by_a_window_is_right(dtype, data):
    record = right(*WINDOW, "--dtype", dtype, "--data", data)
    assert record["plan"].startswith("halo_64x288_4w3s, 2 splits")
    assert record["worst"] == 0 if data == "integers" else record["worst"] > 0.5


@both
@pytest.mark.parametrize(
    ("op", "configuration", "options"),
    [
        ("conv_bn_wgrad", "tma_win64x576_3s", ("--normed", "--splits", 2)),
        ("conv_bn_wgrad", "tma_64x128_6s", ("--normed", "--stride", 2)),
        ("conv_bn_dgrad", "tma_win96x64_2w", ("--normed", "--addend", 1)),
        ("conv_bn_dgrad", "tma_win192x64_2w", ("--c", 128, "--asynchrony", "lazy")),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_by_tma_are_right(dtype, op, configuration, options, data):
    given = (*gradient(op), "--affine", "--c", 64, "--k", 64, "--configuration", configuration)
    record = right(*given, *options, "--dtype", dtype, "--data", data)
    assert record["plan"].startswith(f"{configuration}, ")
    assert record["worst"] == 0 if data == "integers" else record["worst"] > 0.5


@both
@pytest.mark.parametrize(
    "options",
    [
        ("--configuration", "tma_s128x64_6s_t", "--stride", 2),
        ("--configuration", "tma_s192x128_4s", "--c", 64, "--k", 136, "--order", "shuffled"),
        ("--configuration", "tma_s256x128_3s_2c", "--r", 1, "--s", 1, "--padding", 0),
        ("--configuration", "tma_stay128x128_8s", "--r", 1, "--s", 1, "--padding", 0, "--normed"),
        ("--configuration", "tma_win96x64_2w", "--c", 64, "--k", 128, "--normed"),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conv_bn_stats_by_tma_is_right(dtype, options, data):
    record = right(*STATS, "--dtype", dtype, "--data", data, *options)
    assert record["plan"].startswith(f"{options[1]}, 1 splits")
    assert record["worst"] > (0.005 if data == "integers" else 0.05)  # of the statistics


@both
@pytest.mark.parametrize(
    "options",
    [
        ("--configuration", "tma_s64x128_6s", "--c", 72, "--k", 136, "--normed"),
        ("--configuration", "tma_s128x256_3s", "--k", 200, "--order", "shuffled"),
    ],
)
def test_a_blocks_end_by_tma_is_right(options, data):
    record = right(*END, "--data", data, *options)
    assert record["plan"].startswith(f"{options[1]}, 1 splits")
    assert record["worst"] > (0.005 if data == "integers" else 0.05)  # of the statistics


@both
@pytest.mark.parametrize(
    "options",
    [
        ("--configuration", "64x64_4w4s", "--splits", 2, "--normed"),
        ("--configuration", "halo_64x64_4w4s", "--tracked", "int32"),
        ("--configuration", "tma_s128x64_6s_t", "--tracked", "int64", "--cumulative"),
        ("--configuration", "tma_win96x64_2w", "--c", 64, "--k", 64, "--normed"),
    ],
)
def test_conv_bn_stats_that_finalizes_is_right(options, data):
    record = right(*STATS, "--data", data, "--finalize", *options)
    k = 64 if "--k" in options else 32
    # y, mean and M2; scale, shift, mean, invstd; both running ones, and as they were; the count.
    assert record["elements"] == 2 * k * 81 + 2 * k + 4 * k + 2 * k + 2 * k + 1
    assert record["worst"] > (0.005 if data == "integers" else 0.05)


@both
@pytest.mark.parametrize("total", [(), ("--total",)], ids=["count", "total"])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("bn_finalize", ()),
        ("bn_update_stats", ()),
        ("bn_update_stats", ("--tracked", "int32")),
        ("bn_update_stats", ("--tracked", "int64", "--cumulative", "--c", 600)),
        ("bn_backward_finalize", ()),
        ("bn_backward_finalize", ("--residual",)),
        ("bn_backward_finalize", ("--frozen", "--c", 600)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_of_channels_are_right(dtype, op, options, total, data):
    shape = (*IMAGES, *options, *total)
    right("--op", op, *shape, "--dtype", dtype, "--data", data)


@pytest.mark.parametrize("op", [*PASSES, *POOLS, *CONVOLUTIONS])
def test_no_images(op):
    """Nothing is launched; sums are zeros, statistics the caller's."""
    found = run(*small(op), "--n", 0)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record["wrong"] == 0
    assert record["elements"] == (2 * 24 if op in SUMMED else 0)


@both
@pytest.mark.parametrize("op", [*PASSES, *POOLS, *VALUES, *CONVOLUTIONS])
def test_wrong_numbers_are_counted(op, data):
    """Every store to global memory left out, every load from it beside its place."""
    options = (*small(op), "--data", data)
    kinds = {("st.global", "skip"), ("ld.global", "chunk_off"), ("ld.global.nc", "chunk_off")}
    planted = [":".join(s) for s in sites(*options) if s[2:] in kinds]
    assert len(planted) >= 2
    for one in planted:
        found = run(*options, "--fault", one)
        assert found.returncode == 1, (one, found)
        assert json.loads(found.stdout)["wrong"] > 0, one


@pytest.mark.parametrize("op", SUMMED)
def test_sums_that_are_not_merged_are_counted(op):
    """The workspace holds NaN before a call, and many blocks leave theirs there."""
    options = (*small(op), "--h", 40, "--w", 40)
    assert " x 1 blocks" not in right(*options)["plan"]
    for instruction in ("st.global", "ld.global"):
        listed = [s for s in sites(*options) if s[0].endswith("channel_sums.h")]
        one = next(s for s in listed if s[2] == instruction)
        assert run(*options, "--fault", ":".join(one)).returncode == 1, one


@pytest.mark.parametrize("op", [*PASSES, *POOLS, *VALUES, *CONVOLUTIONS])
def test_address_sanitizer_names_the_line_of_a_store_out_of_bounds(op):
    # A row of floats is 128 bytes off. Vectors are longer: no store misses the end of its own one.
    options = (*small(op), *(("--c", 40) if op in VALUES else ()))
    right(*options, variant="asan")
    stores = [s for s in sites(*options) if s[2].startswith("st.global") and s[3] == "row_off"]
    # What lies behind conv_bn_grad1x1_end's first stores is its workspace's, too.
    file, line, *_ = one = stores[-1 if op == "conv_bn_grad1x1_end" else 0]
    found = run(*options, "--fault", ":".join(one), variant="asan")
    assert found.returncode == FOUND
    assert "heap-buffer-overflow" in found.stderr and "WRITE of size " in found.stderr
    assert f"{file.rsplit('/', 1)[-1]}:{line}" in with_lines(found.stderr)


MERGING = {
    "bn_add_act_backward": ("--op", "bn_add_act_backward", "--residual", "--h", 40, "--w", 40),
    "bn_act_pool_backward": ("--op", "bn_act_pool_backward", "--c", 8, "--h", 20, "--w", 20),
    "conv_bn_stats": (
        *STATS, "--c", 8, "--k", 8, "--splits", 2, "--configuration", "64x64_4w4s", "--normed",
    ),
    "bn_add_act_conv_stats": (*END, "--c", 40, "--k", 8, "--splits", 2, "--normed"),
    "conv_bn_dgrad": (
        *gradient("conv_bn_dgrad"), "--c", 8, "--k", 8, "--splits", 2, "--affine", "--normed",
        "--configuration", "64x64_4w3s",
    ),
    "conv_bn_dgrad by windows": (
        *gradient("conv_bn_dgrad"), "--c", 8, "--k", 40, "--splits", 2, "--affine", "--normed",
        *WINDOWS,
    ),
    "conv_bn_dgrad_end": (
        *gradient("conv_bn_dgrad_end"), "--c", 8, "--k", 8, "--splits", 2, "--affine",
        "--residual", "--configuration", "64x64_4w3s",
    ),
    "halo": (
        *STATS, "--c", 40, "--k", 8, "--splits", 2, "--configuration", "halo_64x64_4w4s",
        "--normed",
    ),
}  # fmt: skip
"""Calls in which blocks leave sums to the last of them."""


# Its faults are tests/test_emulated_stats_sm90_faults.py's.
BY_TMA = (
    *STATS, "--dtype", "bfloat16", "--c", 8, "--k", 72, "--configuration", "tma_s128x64_6s_t",
    "--n", 6,
)  # fmt: skip


# Their blocks leave sums to a second kernel.
BOTH = (
    *gradient("conv_bn_grad1x1"), "--affine", "--normed", "--addend", 1, "--splits", 3, *BY_MMA,
)  # fmt: skip
UNITED = (
    *gradient("conv_bn_grad1x1_end"), "--affine", "--residual", "--addend", 2, "--splits", 3,
)  # fmt: skip
SECOND = {
    "both": BOTH,
    "united": (*UNITED, *BY_MMA),
    "united_by_tma": (*UNITED, *UNITED_BY_TMA),
    "window": (*WINDOW, "--dtype", "bfloat16"),
}


@pytest.mark.parametrize("resident", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [*MERGING.values(), BY_TMA, *SECOND.values()],
    ids=[*MERGING, "by_tma", *SECOND],
)
def test_thread_sanitizer_is_content(options, resident):
    right(*options, "--resident-blocks", resident, variant="tsan", timeout=170)


@pytest.mark.parametrize("options", MERGING.values(), ids=MERGING)
def test_the_emulator_names_a_merge_without_order(options):
    """Every counter's arrival that releases and acquires nothing."""
    planted = [s for s in sites(*options) if s[2].startswith("atom.acq_rel") and s[3] == "no_fence"]
    assert planted
    for one in planted:
        found = run(*options, "--resident-blocks", 2, "--fault", ":".join(one))
        assert found.returncode == 3, (one, found)
        assert "with no release and acquire" in found.stderr


@pytest.mark.parametrize("options", MERGING.values(), ids=MERGING)
def test_thread_sanitizer_finds_a_merge_without_order(options):
    for instruction in ("atom.acq_rel", "bar.sync"):
        name = "skip" if instruction == "bar.sync" else "no_fence"
        files = ("channel_sums.h", "split_reduction.h")
        merging = [s for s in sites(*options) if s[0].endswith(files) and s[3] == name]
        one = next(s for s in merging if s[2].startswith(instruction))
        found = raced(*options, "--resident-blocks", 2, "--fault", ":".join(one))
        assert "ThreadSanitizer: data race" in found or "error: " in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["bn_add_act", "--normed"], "error: --normed and --part are the shortcut's"),
        (["bn_add_act", "--residual", "--part", 33], "error: --part: from 1 to --c channels"),
        (["bn_add_act_backward", "--normed"], "error: --normed is the shortcut's; give --residual"),
        (["bn_backward_apply", "--residual"], "error: --residual: bn_backward_apply takes none"),
        (["bn_act_pool", "--residual"], "error: --residual: bn_act_pool takes none"),
        (["bn_act_pool", "--r", 17], "error: the window is larger than the image"),
        (["bn_act_pool", "--padding", 2], "error: --padding: more than half of the window"),
        (["bn_act_pool_backward", "--r", 16, "--s", 16], "error: --r and --s: at most 255 taps"),
        (["conv_bn_stats", "--residual"], "error: --residual: conv_bn_stats takes none"),
        (["conv_bn_stats", "--cumulative"], "error: --tracked and --cumulative are for --finalize"),
        (["conv_bn_stats", "--finalize", "--cumulative"], "give --tracked, too"),
        (["conv_bn_stats", "--early"], "error: --early: conv_bn_stats does not begin early"),
        (["conv_bn_dgrad", "--residual"], "error: --residual: conv_bn_dgrad takes none"),
        (["conv_bn_wgrad", "--residual"], "error: --residual: conv_bn_wgrad takes none"),
        (["conv_bn_grad1x1", "--residual"], "error: --residual: conv_bn_grad1x1 takes none"),
        (["conv_bn_dgrad", "--addend", -1], "error: --addend"),
        (["bn_add_act_conv_stats"], "no plan: a 1x1 convolution of stride 1 in one group is"),
        ([*END[1:], "--layout", "nchw"], "no plan: y: its channels do not lie side by side"),
        ([*END[1:], "--early"], "error: --early: bn_add_act_conv_stats does not begin early"),
        (["conv_bn_grad1x1"], "no plan: a 1x1 convolution of stride 1 in one group is served"),
        ([*gradient("conv_bn_grad1x1")[1:], "--dtype", "float32"], "no plan: float32; bfloat16"),
        (["conv_bn_wgrad", "--early"], "error: --early: conv_bn_wgrad does not begin early"),
        (["conv_bn_dgrad", "--dtype", "float64"], "conv_bn_dgrad serves float32, float16 and"),
        (["bn_add_act", "--dtype", "float64"], "bn_add_act serves float32, float16 and bfloat16"),
        (["bn_finalize"], "error: --dtype: bn_finalize serves float32 and float64"),
        (["bn_update_stats", "--dtype", "float32", "--cumulative"], "give --tracked, too"),
        (
            ["bn_update_stats", "--dtype", "float32", "--n", 1, "--h", 1, "--w", 1],
            "error: one value a channel has no variance",
        ),
    ],
)
def test_a_bad_command_line_is_named(options, message):
    found = run("--op", *options)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stdout == ""
