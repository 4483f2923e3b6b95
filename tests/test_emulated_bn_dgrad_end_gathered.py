"""conv_bn_dgrad_end by TMA and wgmma behind a projection of the next block, emulated.

Its gradient is of every other pixel, and threads bring it: in place, in time, and once.
"""

from __future__ import annotations

import functools

import emulated
import ended_by_tma
import mutants
import pytest
import torch
from emulated import Schedule
from ended_by_tma import WAYS
from mutants import HOSTILE, Mutant, Trial
from test_emulated_bn_dgrad_end_sm90 import call, every, index_of, require
from test_emulated_bn_dgrad_end_sm90_faults import HARMLESS

from resnet_fused.cases import ConvCase
from resnet_fused.ops._library import overload

pytestmark = pytest.mark.emulated

FEW = (2, *emulated.H200[1:])
CASES = (
    # Tiles that are cut along every side, rows of images of odd sizes; groups; a single pixel.
    ConvCase("1x1", 2, 136, 9, 9, 72),
    ConvCase("many", 2, 64, 18, 15, 64),
    ConvCase("groups", 2, 144, 6, 7, 128, groups=2),
    ConvCase("pixel", 1, 8, 1, 1, 16),
)
# Three tiles of one block: what a tile gathers must wait for the store of the one before.
TRIED = ConvCase("gathered", 3, 72, 12, 11, 72)
FILE = "gathered_addend.h"
"""Whose faults are planted; `bn_dgrad_end_store.h` has the waits for it."""


@every
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_bit_is_right(place, case):
    for dtype, way, step in (
        (torch.bfloat16, "all", 2), (torch.float16, "identity", 3), (torch.bfloat16, "all", 5),
    ):  # fmt: skip
        given = ended_by_tma.operands(case, dtype, **(WAYS[way] | {"addend": step}))
        for schedule in (Schedule("lazy", "reverse"), Schedule("random", "shuffled", seed=place)):
            found = call(
                case, given, step, configuration=index_of(place), schedule=schedule, gpu=FEW,
                resident_blocks=4,
            )  # fmt: skip
            require(case, given, *found[:2], step)


@every
def test_it_is_read_once(place):
    case = ConvCase("layer", 1, 256, 16, 16, 64)
    given = ended_by_tma.operands(case, torch.bfloat16, addend=2)
    dx, sums, report = call(case, given, 2, configuration=index_of(place), counting=True)
    require(case, given, dx, sums, 2)
    assert report["counters"]["bank_conflicts"] == 0
    asked = [s for s in report["sites"] if s["file"].endswith(FILE)]
    read = sum(site["counters"]["global_load_bytes_asked"] for site in asked)
    assert read == given.addend.nbytes == dx.nbytes // 4


def trials() -> list[Trial]:
    made = []
    index = {tile["name"]: i for i, tile in ended_by_tma.tiles().items()}
    for way in ("all", "identity"):
        given = ended_by_tma.operands(TRIED, torch.bfloat16, **(WAYS[way] | {"addend": 2}))
        norms = {n: getattr(given, n) for n in ("norm", "residual_norm")}
        given = given._replace(
            **{n: None if t is None else torch.nan_to_num(t) for n, t in norms.items()}
        )
        geometry = (TRIED.stride, TRIED.padding, TRIED.dilation, TRIED.groups)
        run = functools.partial(overload(ended_by_tma.OP, emulated.NAME), *given, 2, *geometry)
        for schedule in HOSTILE:
            settings = {
                "schedule": schedule, "configuration": index["tma_p128x64_4s"], "splits": 1,
                "gpu": (1, *emulated.H200[1:]), "resident_blocks": 2,
            }  # fmt: skip
            made.append(Trial(
                f"{way} {schedule}", run, tuple(given),
                lambda got, given=given: ended_by_tma.wrong(TRIED, given, *got, 2), settings,
            ))  # fmt: skip
    return made


@functools.cache
def found() -> dict[Mutant, list[Trial]]:
    """The mutants of what gathers and of who waits for it, with the trials that reach them."""
    files = {FILE, "bn_dgrad_end_store.h"}
    return {
        mutant: tried for mutant, tried in mutants.reached(trials()).items()
        if mutant.key[0] in files
    }  # fmt: skip


def test_every_fault_is_noticed():
    mutants.check(found(), HARMLESS, 0, 1)
    assert sum(mutant.key[0] == FILE for mutant in found()) >= 2
