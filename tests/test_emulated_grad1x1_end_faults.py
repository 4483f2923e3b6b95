"""Every fault that the emulator can plant in conv_bn_grad1x1_end by TMA and wgmma is noticed."""

from __future__ import annotations

import functools

import mutants
import mutants_grad1x1_end as trials
import pytest
import torch
from mutants import Mutant, Trial
from test_emulated_grad1x1_sm90_faults import HARMLESS

from resnet_fused.cases import ConvCase

pytestmark = pytest.mark.emulated

CHUNKS = 4
# More steps than the ring has stages, twice round for both consumers, the last one cut; two tiles
# of channels, the second one and the filters cut.
LONG = ConvCase("long", 5, 136, 7, 9, 56)
WIDE = ConvCase("wide", 3, 136, 7, 7, 120)
# Sums of one term: no average hides an operand that was cut instead of rounded.
SHALLOW = ConvCase("shallow", 1, 8, 1, 1, 8)
RUNS: tuple[trials.Run, ...] = (
    (LONG, 0, torch.bfloat16, True, trials.WHOLE),
    (WIDE, 1, torch.float16, True, trials.BARE),
    (WIDE, 1, torch.float16, False, trials.WHOLE),
    (SHALLOW, 0, torch.bfloat16, False, trials.WHOLE),
)
# In two parts: what adds them has not zeros alone.
PARTED: tuple[trials.Run, ...] = ((LONG, 0, torch.float16, True, trials.THINNED),)
# What the maps, the plan and the launch do is the host's; here is what the kernel is made of.
FILES = {
    "conv_bn_grad1x1_merge_sm80.cuh",
    "conv_bn_grad1x1_sm90.cuh",
    "grad1x1_end.h",
    "grad1x1_sums.h",
    "pipeline.h",
    "warpgroup_epilogue.h",
}


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """Every mutant, with the trials that reach it. Clean runs pass."""
    return mutants.reached((*trials.trials_of(RUNS), *trials.trials_of(PARTED, 2)))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_fault_is_noticed(chunk):
    mutants.check(found(), HARMLESS, chunk, CHUNKS)


def test_every_file_takes_part_with_what_it_is_made_of():
    assert {key[0] for key in (mutant.key for mutant in found())} == FILES
    planted = {(mutant.instruction, mutant.fault) for mutant in found()}
    for wanted in (
        ("mbarrier.arrive.expect_tx", "wrong_bytes"), ("wgmma.a", "stride_off"),
        ("wgmma.b", "chunk_off"), ("fence.proxy.async", "no_fence"), ("bar.sync", "skip"),
        ("cp.async.wait_group", "skip"),
    ):  # fmt: skip
        assert wanted in planted, wanted
    at_the_end = {m.key[2:] for m in found() if m.key[0] == "grad1x1_end.h"}
    assert ("cp.async.bulk.tensor.tile", "coordinate_off") in at_the_end
    assert len(found()) > 80
