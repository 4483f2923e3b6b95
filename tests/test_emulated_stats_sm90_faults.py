"""Every fault that the emulator can plant in what conv_bn_stats for sm_90a adds is noticed.

Its main loop is conv_bn_act's, whose faults are tests/test_emulated_conv_sm90_faults.py's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import emulated
import emulated_shapes
import mutants
import pytest
import torch
from emulated import Schedule
from matrix import conv_arguments
from mutants import HOSTILE, Mutant, Trial

from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload
from resnet_fused.ops._training_checks_stats import exact_operands

pytestmark = pytest.mark.emulated

CHUNKS = 4
OP = "conv_bn_stats"
ONE, MANY = (1, *emulated.H200[1:]), (70, *emulated.H200[1:])
# (configuration, case, GPU, whether x is read through a BatchNorm): a block with three tiles of its
# own, in turns and together; parts of two chunks, one tile each, in two columns.
TURNS = ConvCase("turns", 2, 40, 13, 15, 72, 3, 3, (1, 1), (1, 1))
WAYS = (
    ("tma_s128x64_6s_t", TURNS, ONE, False),
    ("tma_s192x128_4s", ConvCase("together", 3, 72, 12, 13, 136), ONE, False),
    ("tma_s128x64_6s_t", ConvCase("chunks", 1, 8, 95, 94, 72), MANY, False),
    ("tma_s128x64_6s_t", TURNS, ONE, True),
    ("tma_s192x128_4s", ConvCase("together", 3, 72, 12, 13, 136), ONE, True),
)
FILES = (
    "walk_moments.h", "merge_chunks.h", "merge_moments.h", "warpgroup_epilogue.h",
    "transform_ring.h", "normed_rows.h", "channel_lanes.h",
)  # fmt: skip
FENCE = "ptx::fence_acq_rel_gpu();"
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("merge_chunks.h", FENCE, "fence.acq_rel", "no_fence"): (
        "the counter's addition releases and acquires as well"
    ),
}
HARMLESS |= {
    (name, "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes did"
    )
    for name in ("walk_moments.h", "warpgroup_epilogue.h")
}


def trials(ways: Iterable[tuple[str, ConvCase, tuple[int, ...], bool]]) -> list[Trial]:
    """On integers, under hostile schedules; who arrives when is a matter of luck.

    Args:
        ways: as `WAYS`.
    """
    made = []
    index = {tile["name"]: i for i, tile in enumerate(emulated_shapes.tiles(OP))}
    for name, case, gpu, normed in ways:
        generator = torch.Generator().manual_seed(5)
        x, norm, weight = exact_operands(case, torch.bfloat16, generator)
        norm[2:] = 0  # not NaN, which no comparison finds unchanged
        x, weight = (emulated_shapes.lay_out(t, "nhwc") for t in (x, weight))
        given = (x, norm if normed else None, weight)
        luck = tuple(Schedule("eager", "shuffled", seed=seed) for seed in range(4))
        for schedule in (*HOSTILE, *luck):
            made.append(
                Trial(
                    f"{name} {case.name} {normed} {schedule}",
                    functools.partial(overload(OP, emulated.NAME), *given, *conv_arguments(case)),
                    given,
                    mutants._measured(case, given, True),
                    {
                        "schedule": schedule, "configuration": index[name], "splits": 1,
                        "gpu": gpu, "resident_blocks": 4,
                    },
                )
            )  # fmt: skip
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
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
        ("atom.acq_rel.add.u32", "no_fence"), ("shfl.sync.bfly", "wrong_lane"),
        ("mbarrier.init", "wrong_count"), ("mbarrier.arrive", "skip"), ("st.shared", "skip"),
    ):  # fmt: skip
        assert wanted in planted, planted
