"""Every fault that the emulator can plant in conv_bn_stats of a stem for sm_90a is noticed.

How parts meet is tests/test_emulated_stats_sm90_faults.py's.
"""

from __future__ import annotations

import functools

import emulated
import mutants
import pytest
from mutants import Mutant
from test_emulated_stats_sm90_faults import trials

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 2
ONE, MANY = (1, *emulated.H200[1:]), (40, *emulated.H200[1:])
# (configuration, case, GPU, whether x is read through a BatchNorm): a block whose workers have rows
# of two images and of two tiles; runs in two chunks, of two columns of filters.
WAYS = (
    ("tma_image64x64_8s", ConvCase("tiles", 2, 3, 17, 141, 72, 7, 7, (2, 2), (3, 3)), ONE, False),
    ("tma_image112x64_8s", ConvCase("rows", 3, 4, 13, 30, 64, 7, 7, (2, 2), (3, 3)), ONE, False),
    ("tma_image64x64_8s", ConvCase("runs", 4, 3, 40, 9, 72, 7, 7, (2, 2), (3, 3)), MANY, False),
)
FILES = (
    "stem_worker.h", "stem_rows.h", "stem_stage.h", "image_filters.h",
    "conv_bn_stats_stem_sm90.cuh", "walk_moments.h", "warpgroup_epilogue.h", "channel_lanes.h",
)  # fmt: skip
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    (
        "stem_worker.h",
        "const uint32_t warp = ptx::shuffle(ptx::kWholeWarp, thread / 32, 0);",
        "shfl.sync.idx",
        fault,
    ): "all lanes have the same value, which is what the shuffle tells the compiler"
    for fault in ("skip", "wrong_lane")
} | {
    (name, "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did"
    )
    for name in ("walk_moments.h", "warpgroup_epilogue.h")
}


@functools.cache
def found() -> dict[Mutant, list[mutants.Trial]]:
    """Every mutant of those files, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials(WAYS), FILES)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == set(FILES)
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("fence.proxy.async", "no_fence"), ("cp.async.bulk.wait_group.read", "skip"),
        ("bar.sync", "skip"), ("cp.async.bulk.tensor.store", "coordinate_off"),
        ("wgmma.b", "stride_off"), ("wgmma.wait_group", "wait_one_fewer"),
        ("mbarrier.arrive", "skip"), ("st.shared", "skip"), ("shfl.sync.bfly", "wrong_lane"),
    ):  # fmt: skip
        assert wanted in planted, planted
