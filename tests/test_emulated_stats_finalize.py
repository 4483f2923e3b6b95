"""conv_bn_stats_finalize in CUDA, emulated: every kernel of conv_bn_stats, as it ends.

What the convolution computes is theirs to test (test_emulated_stats*.py). Here: that it is the same
with what is behind it, whose bits are those of bn_finalize and bn_update_stats on its statistics.
"""

from __future__ import annotations

import functools

import emulated
import emulated_finalize
import emulated_stats
import emulated_stats_finalize as finalize
import pytest
import torch
from emulated import Schedule
from matrix import conv_arguments
from test_emulated_conv_window import conv3x3

from resnet_fused.cases import ConvCase
from resnet_fused.ops import _cuda_finalize_checks, _cuda_stats_checks, _passes
from resnet_fused.ops._training_checks_stats import exact_operands

pytestmark = pytest.mark.emulated

ONE, FEW = (1, *emulated.H200[1:]), (5, *emulated.H200[1:])
EPS = 1e-3
# Several columns of tiles and tiles of pixels; a chunk of 64 tiles and more; groups.
TILES = ConvCase("tiles", 2, 40, 13, 11, 136, 3, 3, (1, 1), (1, 1))
CHUNKS = ConvCase("chunks", 6, 8, 38, 37, 8)
GROUPS = ConvCase("groups", 2, 48, 7, 6, 96, 3, 3, (2, 1), (1, 2), (1, 2), 6)
STEM = ConvCase("stem", 2, 3, 23, 29, 72, 7, 7, (2, 2), (3, 3))
TURNS = ConvCase("turns", 2, 40, 13, 15, 136, 3, 3, (1, 1), (1, 1))
SLICES = ConvCase("slices", 2, 128, 9, 11, 128, 3, 3, (1, 1), (1, 1))
# (configuration, case, GPU, splits, whether x is read through a BatchNorm).
WAYS = (
    ("64x64_4w4s", TILES, emulated.H200, 1, True),
    ("64x64_4w4s", TILES, emulated.H200, 3, True),
    ("64x64_4w4s", CHUNKS, emulated.H200, 1, False),
    ("narrow_64x32_4w4s", GROUPS, emulated.H200, 1, True),
    ("halo_64x64_4w4s", TILES, emulated.H200, 1, True),
    ("image_128x64_4w7s", STEM, FEW, 1, False),
    ("tma_s128x64_6s_t", TURNS, ONE, 1, True),
    ("tma_s192x128_4s", TURNS, ONE, 1, False),
    ("tma_s128x64_6s_t", ConvCase("parts", 1, 8, 95, 94, 72), (70, *ONE[1:]), 1, False),
    ("tma_win96x64_2w", conv3x3("window", 3, 12, 11, 128), ONE, 1, True),
    ("tma_win192x64_2w_6s", SLICES, ONE, 1, True),
    ("tma_stay128x128_4s", ConvCase("stays", 2, 72, 13, 11, 136), FEW, 1, True),
    ("tma_image64x64_8s", STEM, FEW, 1, False),
)
IDS = [f"{name}-{case.name}-{splits}" for name, case, _, splits, _ in WAYS]
every_way = pytest.mark.parametrize("way", WAYS, ids=IDS)


@functools.cache
def index_of(name):
    names = [tile["name"] for tile in emulated.load().conv_bn_stats_configurations()]
    return names.index(name)


@functools.cache
def operands(case, normed, dtype=torch.bfloat16):
    """x, norm, weight, gamma, beta."""
    generator = torch.Generator().manual_seed(7)
    x, norm, weight = exact_operands(case, dtype, generator)
    norm[2:] = 0  # not NaN, which no comparison finds unchanged
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x, norm if normed else None, weight, *torch.randn(2, case.k, generator=generator)


def running_of(k, tracked=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(k)
    mean, var = torch.randn(k, generator=generator), torch.rand(k, generator=generator)
    return mean, var.to(dtype), None if tracked is None else tracked.clone()


def run(way, running, momentum=0.1, given=None, **settings):
    """Results by name, and the report. What is in place is left as it was given."""
    name, case, gpu, splits, normed = way
    given = given or operands(case, normed)
    results = finalize.FORM.empty(*given, *running, *conv_arguments(case), EPS, momentum)
    read = _passes.Running.of(*running, momentum)
    settings = {"schedule": Schedule(), "resident_blocks": 4} | settings
    with emulated.using(configuration=index_of(name), splits=splits, gpu=gpu, **settings) as runs:
        found = finalize.finalized(*given, read, results, *conv_arguments(case), EPS, momentum)
    return found, runs.reports[0]


def require(way, found, running, momentum, given=None):
    """Every bit: of the convolution alone, and of the two ops on its statistics."""
    name, case, gpu, splits, normed = way
    x, norm, weight, gamma, beta = given or operands(case, normed)
    settings = {"configuration": index_of(name), "splits": splits, "gpu": gpu}
    with emulated.using(schedule=Schedule(), **settings):
        y, stats = emulated_stats.conv_bn_stats(x, norm, weight, *conv_arguments(case))
    assert torch.equal(found["y"], y)
    assert torch.equal(found["stats"], stats)
    count = y.numel() // case.k
    rows = emulated_finalize.bn_finalize(stats, None, gamma, beta, count, EPS)
    assert torch.equal(found["rows"], rows)
    after = [None if t is None else t.clone() for t in running]
    emulated_finalize.bn_update_stats(stats, None, *after, count, momentum)
    for key, t in zip(("running_mean", "running_var", "tracked"), after, strict=True):
        assert t is None or torch.equal(found[key], t.view(-1)), key
    assert torch.equal(found["kept"], torch.stack([t.double() for t in running[:2]]))


@every_way
def test_the_bits_are_those_of_three_ops(way):
    running = running_of(way[1].k, torch.tensor(3))
    found, report = run(way, running)
    assert report["plan"]["configuration"] == index_of(way[0])
    require(way, found, running, 0.1)
    assert int(found["tracked"]) == 4


@every_way
def test_a_cumulative_average_is_of_all_batches_in_every_column(way):
    """The last column counts the batch when all have read how many there were."""
    counters = (torch.tensor(3), torch.tensor(4, dtype=torch.int32))
    for seed, (tracked, dtype) in enumerate(
        zip(counters, (torch.float64, torch.float32), strict=True)
    ):
        running = running_of(way[1].k, tracked, dtype)
        schedule = Schedule("random", "shuffled", seed=seed)
        found, _ = run(way, running, None, schedule=schedule, resident_blocks=64)
        require(way, found, running, None)
        assert int(found["tracked"]) == int(tracked) + 1


@every_way
@pytest.mark.parametrize("seed", range(3))
def test_the_same_bits_whichever_block_ends(way, seed):
    running = running_of(way[1].k, torch.tensor(3))
    first, _ = run(way, running, None)
    schedule = Schedule("lazy" if seed else "random", "shuffled", seed=seed)
    again, _ = run(way, running, None, schedule=schedule, resident_blocks=64)
    for name, t in first.items():
        assert torch.equal(again[name], t), name


@every_way
def test_without_running_statistics_nothing_is_counted(way):
    found, report = run(way, (None, None, None))
    assert set(found) == {"y", "stats", "rows"}
    whole, _ = run(way, running_of(way[1].k))
    for name, t in found.items():
        assert torch.equal(whole[name], t), name
    assert report["plan"]["launches"] == 1


def test_absent_and_double_vectors():
    way = WAYS[0]
    case = way[1]
    x, norm, weight, gamma, beta = operands(case, True)
    running = running_of(case.k, dtype=torch.float64)
    for vectors in ((None, None), (gamma.double(), beta), (None, beta.double())):
        given = (x, norm, weight, *vectors)
        found, _ = run(way, running, given=given)
        require(way, found, running, 0.1, given)


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 3, 12, 10)])
@pytest.mark.parametrize("way", [WAYS[0], WAYS[6]], ids=["mma.sync", "wgmma"])
def test_an_inf_has_no_statistics_in_any_op(way, place):
    """Of finite filters: all channels are NaN, as those of the two ops are."""
    case = way[1]
    x, _, weight, gamma, beta = operands(case, False)
    x = x.clone()
    x[place] = torch.inf
    given = (x, None, weight.abs() + 1, gamma, beta)
    running = running_of(case.k, torch.tensor(1))
    found, _ = run(way, running, given=given)
    assert found["rows"].isnan().all() and found["running_mean"].isnan().all()
    assert torch.equal(found["kept"], torch.stack(running[:2]).double())


@pytest.mark.parametrize("splits", [1, 2])
def test_launches_of_some_images_finalize_once(splits):
    """What one launch would count too much for is cut: the last one ends all columns."""
    case = ConvCase("images", 5, 24, 9, 7, 72, 3, 3, (1, 1), (1, 1))
    way = ("64x64_4w4s", case, emulated.H200, splits, True)
    given, running = operands(case, True), running_of(case.k, torch.tensor(6))
    whole, _ = run(way, running, None)
    module = emulated.load()
    results = finalize.FORM.empty(*given, *running, *conv_arguments(case), EPS, None)
    found: dict[str, torch.Tensor] = {}

    def cut(op, problem, key, inputs, guarded):
        asked = (problem, emulated.H200, index_of(way[0]), splits, 2)
        memory = torch.full((module.conv_bn_stats_cut_bytes(*asked) // 4 + 64,), torch.nan)
        memory = memory[-memory.data_ptr() % 256 // 4 :]
        outputs = {name: one.tensor for name, one in guarded.items()} | {"workspace": memory}
        emulated.reported(
            module.conv_bn_stats_cut(
                emulated.settings(key, inputs, outputs), *asked, memory.data_ptr()
            )
        )
        found.update({name: one.result() for name, one in guarded.items()})
        return list(found.values())

    before = emulated._run_planned
    try:
        emulated._run_planned = cut
        finalize.finalized(
            *given, _passes.Running.of(*running, None), results, *conv_arguments(case), EPS, None
        )
    finally:
        emulated._run_planned = before
    assert torch.equal(found["y"], whole["y"])
    assert int(found["tracked"]) == 7
    rows = emulated_finalize.bn_finalize(
        found["stats"], None, *given[3:], found["y"].numel() // case.k, EPS
    )
    assert torch.equal(found["rows"], rows)
    after = [t.clone() for t in running]
    emulated_finalize.bn_update_stats(
        found["stats"], None, *after, found["y"].numel() // case.k, None
    )
    assert torch.equal(found["running_var"], after[1])


@pytest.mark.parametrize("name", sorted({way[0] for way in WAYS}))
def test_the_self_check_passes(name):
    """And notices a launch that leaves one step out."""
    names = [tile["name"] for tile in emulated.load().conv_bn_stats_configurations()]

    def plan(problem, index, splits):
        x, norm, weight = problem.operands
        stats = torch.zeros(2, weight.shape[0])
        asked = emulated_stats.problem_of(
            x, norm, weight, problem.out, stats, *problem.geometry[:4]
        )
        try:
            module = emulated.load()
            return module.conv_bn_stats_plan(asked, emulated.H200, index, splits)["configuration"]
        except ValueError:
            return -1

    def launch(*given, wish, wrong=None):
        x, norm, weight, gamma, beta, *running = given[:8]
        written, options = given[8:12], given[12:]
        read = _passes.Running.of(*running, options[-1])
        with emulated.using(configuration=wish[0], splits=wish[1]):
            found = finalize.finalized(
                x, norm, weight, gamma, beta, read, written, *map(_listed, options)
            )
        for name, into in zip(("y", "stats", "rows", "kept"), written, strict=True):
            into.copy_(found[name])
        for name, t in zip(("running_mean", "running_var", "tracked"), read.tensors, strict=True):
            if t is not None and name != wrong:
                t.copy_(found[name].view(t.shape))

    def check(one):
        checked = _cuda_finalize_checks.finalized(one, "cpu")
        _cuda_stats_checks.check(name, "cpu", checked, plan, names)

    check(launch)
    for wrong in ("running_mean", "running_var", "tracked"):
        with pytest.raises(ArithmeticError):
            check(functools.partial(launch, wrong=wrong))


def _listed(option):
    return list(option) if isinstance(option, tuple) else option
