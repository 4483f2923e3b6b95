"""The pure chooser of configurations: no GPU, no Triton."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_fused import cases
from resnet_fused.triton import _tiles, _traffic
from resnet_fused.triton._tiles import Limits, Product, Tile, cdiv, choose

# Multiprocessors and bytes of shared memory a block: CUDA C++ Programming Guide, data sheets.
GPUS = {
    80: Limits(108, 166912, 80, "A100"),
    86: Limits(82, 101376, 86, "RTX 3090"),
    89: Limits(128, 101376, 89, "RTX 4090"),
    90: Limits(132, 232448, 90, "H100"),
    100: Limits(148, 232448, 100, "B200"),
    120: Limits(170, 101376, 120, "RTX 5090"),
}
BATCHES = (1, 32, 256)
RESNEXT = tuple(
    cases.ConvCase(f"resnext_{width}", 1, width, size, size, width, 3, 3, (1, 1), (1, 1), groups=32)
    for width, size in ((128, 56), (256, 28), (512, 14), (1024, 7))
)
CIFAR = tuple(
    cases.ConvCase(f"cifar_{c}", 1, c, size, size, c, 3, 3, padding=(1, 1))
    for c, size in ((16, 32), (32, 16), (64, 8))
)
LAYERS = (*cases.RESNET50_LAYERS, *RESNEXT, *CIFAR)
DTYPES = {"16": (2, "ieee"), "tf32": (4, "tf32"), "tf32x3": (4, "tf32x3")}


def forward(case, itemsize, precision):
    return _traffic.product_of(case, itemsize, precision)


def dgrad(case, itemsize, precision):
    """As conv_dgrad.product_of, which needs Triton."""
    side = _tiles.side_by_side(case.c // case.groups, case.groups) if itemsize == 2 else 1
    phases = case.stride[0] * case.stride[1]
    return Product(
        rows=case.n * cdiv(case.h, case.stride[0]) * cdiv(case.w, case.stride[1]),
        columns=side * (case.c // case.groups),
        copies=cdiv(case.groups, side) * phases,
        depth=side * (case.k // case.groups),
        taps=cdiv(case.r, case.stride[0]) * cdiv(case.s, case.stride[1]),
        itemsize=itemsize,
        side=side,
        runtime_taps=True,
        precision=precision,
        gathered=2,
        ragged=_tiles.is_ragged(itemsize, case.c, case.k),
    )


def wgrad(case, itemsize, precision):
    """As conv_wgrad.product_of, which needs Triton."""
    side = _tiles.side_by_side(case.c // case.groups, case.groups)
    span = side * (case.c // case.groups)
    narrow = _tiles.is_narrow(span, case.s)
    return Product(
        rows=side * (case.k // case.groups),
        columns=span * case.s if narrow else span,
        copies=cdiv(case.groups, side) * (case.r if narrow else case.r * case.s),
        depth=case.n * case.p * case.q,
        taps=1,
        itemsize=itemsize,
        side=side,
        precision=precision,
        gathered=2,
        ragged=_tiles.is_ragged(itemsize, case.c, case.k),
    )


KERNELS = {"conv_bn_act": forward, "conv_dgrad": dgrad, "conv_wgrad": wgrad}


def products(batches=BATCHES):
    for case in LAYERS:
        for n in batches:
            for itemsize, precision in DTYPES.values():
                for kernel, product_of in KERNELS.items():
                    product = product_of(dataclasses.replace(case, n=n), itemsize, precision)
                    yield f"{kernel} {case.name} n{n} {precision}", product


def check(product, limits, plan):
    """What holds for every plan of every product."""
    tile = plan.tile
    steps = product.steps
    assert tile in _tiles.TILES
    assert _tiles.fits(product, tile, limits)
    assert _tiles.shared_memory(product, tile) <= limits.shared_memory
    assert plan.why
    if plan.flat:
        assert tile.warps == 4
        assert product.taps > 1
    if product.taps > 1 and not plan.flat:
        assert product.taps <= _tiles.MAX_UNROLLED_TAPS
        assert not product.runtime_taps
    # Every part has work: the last one begins before the end.
    assert plan.splits >= 1
    assert (plan.splits - 1) * cdiv(steps, plan.splits) < max(1, steps)
    tiles = cdiv(product.rows, tile.m) * cdiv(product.columns, tile.n) * product.copies
    assert plan.splits == 1 or product.splittable
    return tiles * plan.splits


@pytest.mark.parametrize("limits", GPUS.values(), ids=[f"sm_{c}" for c in GPUS])
def test_layers_of_resnets(limits):
    for name, product in products():
        plan = choose(product, limits)
        try:
            check(product, limits, plan)
        except AssertionError as error:
            raise AssertionError(f"{name}: {plan}") from error


@pytest.mark.parametrize("limits", GPUS.values(), ids=[f"sm_{c}" for c in GPUS])
def test_a_full_batch_fills_the_gpu(limits):
    """256 images: a program for every multiprocessor."""
    for case in cases.RESNET50_LAYERS:
        product = forward(dataclasses.replace(case, n=256), 2, "ieee")
        assert check(product, limits, choose(product, limits)) >= limits.multiprocessors


@pytest.mark.parametrize(
    ("c", "k", "wide"), [(64, 64, 64), (64, 256, 256), (256, 64, 64), (512, 128, 128)]
)
def test_the_large_operand_is_read_once(c, k, wide):
    """Memory-bound 1x1 layers of many pixels: a tile holds all columns, and no more."""
    case = next(i for i in cases.RESNET50_LAYERS if (i.c, i.k, i.r) == (c, k, 1))
    product = forward(dataclasses.replace(case, n=256), 2, "ieee")
    assert choose(product, GPUS[90]).tile.n == wide


def test_small_batches_use_small_tiles_and_splits():
    case = next(i for i in cases.RESNET50_LAYERS if (i.c, i.r, i.h) == (512, 3, 7))
    plan = choose(forward(case, 2, "ieee"), GPUS[90])
    assert plan.splits > 1
    assert plan.tile.m * plan.tile.n <= 64 * 64


def test_a_step_is_no_longer_than_the_reduction():
    stem = forward(cases.RESNET50_LAYERS[0], 2, "ieee")
    assert (stem.depth, stem.taps, stem.step, stem.steps) == (21, 7, 32, 1)
    assert dataclasses.replace(stem, depth=64).step == 64
    assert dataclasses.replace(stem, depth=65).step == 64
    assert dataclasses.replace(stem, depth=3).step == 16
    assert dataclasses.replace(stem, depth=100, itemsize=4).step == 32


def chosen(gpus):
    return {choose(p, limits).tile.name for limits in gpus for _, p in products()}


def test_every_configuration_is_chosen_by_some_layer():
    assert chosen(GPUS.values()) == set(_tiles.BY_NAME)


def test_the_table_of_configurations():
    assert len(_tiles.TILES) <= 12
    assert len(_tiles.BY_NAME) == len(_tiles.TILES)
    for tile in _tiles.TILES:
        assert tile.why
        assert all(v & (v - 1) == 0 for v in (tile.m, tile.n, tile.warps, tile.slices))
        assert tile.sums // tile.slices <= 64
        assert tile.stages * (tile.m + tile.n) * 128 <= max(i.shared_memory for i in GPUS.values())


def test_names():
    tile = Tile(128, 64, 4, 4, "for the test")
    assert tile.name == "128x64_4w4s"
    product = Product(1000, 64, 1, 256, 9, 2)
    assert _tiles.shared_memory(product, tile) == 4 * (128 + 64) * 128
    both = dataclasses.replace(product, gathered=2)
    assert _tiles.shared_memory(both, tile) == 4 * (2 * 128 + 64) * 128
    assert _tiles.fits(product, tile, GPUS[90])
    assert not _tiles.fits(both, tile, GPUS[90])
    assert not _tiles.fits(dataclasses.replace(product, ragged=True), tile, GPUS[90])
    assert tile.sums == 64
    assert _tiles.Plan(tile, 1, False, "").name == "128x64_4w4s"
    assert _tiles.Plan(tile, 4, False, "").name == "128x64_4w4s/4"


def test_groups_side_by_side():
    assert _tiles.side_by_side(64, 1) == 1
    assert _tiles.side_by_side(4, 32) == 16
    assert _tiles.side_by_side(4, 5) == 5
    assert _tiles.side_by_side(1, 70) == 64
    assert _tiles.side_by_side(70, 2) == 1


@pytest.mark.parametrize("name", _tiles.BY_NAME)
def test_only_allowed_configurations_are_chosen(name):
    for label, product in products((32,)):
        limits = GPUS[90]
        try:
            plan = choose(product, limits, frozenset([name]))
        except LookupError:
            tile = _tiles.BY_NAME[name]
            # An 8-warp tile runs no loop that must be flat.
            short = tile.warps > 4 and product.taps > 1
            assert short or not _tiles.fits(product, tile, limits), label
        else:
            assert plan.tile.name == name
            check(product, limits, plan)


def test_the_refusal_says_what_was_missing():
    product = forward(cases.RESNET50_LAYERS[1], 2, "ieee")
    with pytest.raises(LookupError, match=r"none of the \d+ configurations .* 16384 bytes"):
        choose(product, Limits(10, 16384, 75))
    with pytest.raises(LookupError, match="none of"):
        choose(product, GPUS[90], frozenset())


@st.composite
def any_product(draw):
    itemsize, precision = draw(st.sampled_from(list(DTYPES.values())))
    side = draw(st.sampled_from([1, 1, 2, 16, 64]))
    return Product(
        rows=draw(st.integers(1, 2**24)),
        columns=draw(st.integers(1, 64 if side > 1 else 4096)),
        copies=draw(st.integers(1, 64)),
        depth=draw(st.integers(1, 2**20)),
        taps=draw(st.integers(1, 49)),
        itemsize=itemsize,
        splittable=draw(st.booleans()),
        side=side,
        runtime_taps=draw(st.booleans()),
        precision=precision,
        gathered=draw(st.sampled_from([0, 2])),
        ragged=draw(st.booleans()),
    )


@given(product=any_product(), limits=st.sampled_from(list(GPUS.values())))
def test_any_product_has_a_sound_plan(product, limits):
    plan = choose(product, limits)
    check(product, limits, plan)
    assert choose(product, limits, frozenset(_tiles.BY_NAME)) == plan
    assert choose(product, limits, frozenset([plan.tile.name])).tile is plan.tile


@st.composite
def small_products(draw):
    """Few enough tiles that the reduction may be split."""
    return Product(
        rows=draw(st.integers(1, 1000)),
        columns=draw(st.integers(1, 512)),
        copies=draw(st.integers(1, 3)),
        depth=draw(st.integers(1, 4096)),
        taps=draw(st.sampled_from([1, 3, 9])),
        itemsize=2,
    )


@given(product=small_products(), limits=st.sampled_from(list(GPUS.values())))
def test_nothing_is_predicted_to_be_quicker(product, limits):
    plan = choose(product, limits)
    least = _tiles.cost(product, plan.tile, plan.splits, limits)
    whole = choose(dataclasses.replace(product, splittable=False), limits)
    assert least <= _tiles.cost(product, whole.tile, 1, limits)
    for tile in _tiles.TILES:
        try:
            other = choose(product, limits, frozenset([tile.name]))
        except LookupError:
            continue
        assert least <= _tiles.cost(product, tile, other.splits, limits), other


@given(product=small_products(), limits=st.sampled_from(list(GPUS.values())))
def test_more_work_takes_longer(product, limits):
    plan = choose(product, limits)
    least = _tiles.cost(product, plan.tile, plan.splits, limits)
    for more in ({"taps": product.taps + 8}, {"rows": product.rows * 100_000}):
        larger = dataclasses.replace(product, **more)
        assert _tiles.cost(larger, plan.tile, plan.splits, limits) > least


def test_the_chooser_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
from resnet_fused.triton import _limits, _tiles, _traffic
product = _tiles.Product(100, 64, 1, 64, 1, 2)
print(_tiles.choose(product, _limits.INTERPRETER_LIMITS).name)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() in _tiles.BY_NAME


def test_products_without_tensors_are_those_of_the_launches():
    pytest.importorskip("triton", reason="the kernels' files import it")
    from resnet_fused.triton import _launch, conv_bn_act, conv_dgrad, conv_wgrad

    for case in (*LAYERS, *cases.CONV_CASES):
        for dtype in (torch.float16, torch.float32):
            x, weight, y = (
                torch.empty(shape, dtype=dtype, device="meta")
                for shape in (case.input_shape, case.weight_shape, case.output_shape)
            )
            sizes = dtype.itemsize, _launch.precision(dtype)
            expected = {
                "conv_bn_act": conv_bn_act.product_of(x, weight, y, case.groups),
                "conv_dgrad": conv_dgrad.product_of(x, weight, case.stride, case.groups),
                "conv_wgrad": conv_wgrad.product_of(y, weight, case.groups),
            }
            assert {name: of(case, *sizes) for name, of in KERNELS.items()} == expected
