"""Every fault that the emulator can plant in conv_bn_grad1x1 by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import mutants
import mutants_grad1x1 as trials
import pytest
import torch
from mutants import Mutant, Trial
from test_emulated_grad1x1 import NAMES

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 4
# More steps than the ring has stages, twice round for both consumers, the last one cut; two tiles
# of channels, the second one and the filters cut.
LONG = ConvCase("long", 5, 136, 7, 9, 120)
# One consumer has a step more than the other one.
SMALL = ConvCase("small", 3, 72, 7, 9, 56)
WIDE, NARROW = NAMES.index("tma_128x128_4s"), NAMES.index("tma_64x64_6s")
RUNS: tuple[trials.Run, ...] = (
    (LONG, WIDE, torch.bfloat16, True, trials.WHOLE, 1),
    (LONG, WIDE, torch.float16, True, trials.THINNED, 2),  # what adds them has not zeros alone
    (SMALL, NARROW, torch.float16, True, trials.BARE, 1),
    (SMALL, NARROW, torch.float16, False, trials.WHOLE, 1),
    (trials.SHALLOW, NARROW, torch.bfloat16, False, trials.WHOLE, 1),
)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_bn_grad1x1_merge_sm80.cuh",
    "conv_bn_grad1x1_sm90.cuh",
    "grad1x1_finish.h",
    "grad1x1_sums.h",
    "pipeline.h",
    "warpgroup_epilogue.h",
}
# (file, the line's text, instruction, fault) -> why the fault does no harm there.
HARMLESS: dict[tuple[str, str, str, str], str] = {
    ("conv_bn_grad1x1_sm90.cuh", "ptx::sync_warp();", "bar.warp.sync", "skip"): (
        "the warp meets again behind what one of its lanes does; fibers wait for each other at the "
        "next instruction of the warp in any case"
    ),
}


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached(trials.trials_of(RUNS))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    assert set(HARMLESS) <= {mutant.key for mutant in found()}
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.try_wait.parity", "skip"), ("fence.proxy.async", "no_fence"),
        ("fence.mbarrier_init", "no_fence"), ("mbarrier.arrive.expect_tx", "wrong_bytes"),
        ("wgmma.a", "stride_off"), ("wgmma.b", "stride_off"), ("wgmma.b", "chunk_off"),
        ("wgmma.wait_group", "wait_one_fewer"), ("bar.sync", "skip"),
        ("cp.async.bulk.wait_group.read", "skip"), ("cp.async.wait_group", "skip"),
        ("cp.async.bulk.tensor.tile", "coordinate_off"),
    ):  # fmt: skip
        assert wanted in planted, wanted
    assert len(found()) > 80
