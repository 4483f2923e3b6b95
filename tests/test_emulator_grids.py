"""Blocks that wait for one another in one launch: a grid's barrier, and the order that it makes.

The kernels are in tests/emulator/grids.cpp; see test_emulator.py.
"""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from emulator_probes import (
    ASYNCHRONY,
    ORDER,
    error_of,
    load,
    marked,
    noticed,
    plantable,
)

pytestmark = pytest.mark.emulated

BLOCKS, THREADS, TURNS = 4, 64, 3
RUNS = [
    {"order": ORDER["forward"]},
    {"order": ORDER["reverse"]},
    *({"order": ORDER["shuffled"], "seed": seed} for seed in range(4)),
]


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    """The module of probes."""
    return load()


def last_heard() -> list[int]:
    """What each thread has heard in the last turn, by arithmetic."""
    count = BLOCKS * THREADS
    heard = [0] * count
    for _ in range(TURNS):
        said = [heard[i] + i + 1 for i in range(count)]
        heard = [said[(i + THREADS) % count ^ 32] for i in range(count)]
    return heard


def wrong(out: list[int]) -> bool:
    """Whether blocks have heard something else, or the counter is not zero again."""
    return out[1024 : 1024 + BLOCKS * THREADS] != last_heard() or out[0] != 0


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_blocks_that_meet_hear_each_other(probes, run):
    assert not wrong(probes.run("meetings", **run)["out"])


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize(
    "name", ["no_release", "no_block_meet", "no_wait", "skipped", "too_few", "read_only_path"]
)
def test_what_is_not_released_and_acquired_is_a_race(probes, name, run):
    error = error_of(probes, f"meetings_{name}", **run)
    assert error.kind == "race"
    # Who has missed a meeting may come to the end first, and put the counter back too soon.
    marks = ("said", "heard", "heard by the read-only path", "leaves")
    places = [marked(mark)[1] for mark in marks[: 4 if name == "skipped" else 3]]
    assert error.line in places


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("second_hand", ["second hand"]),
        ("fenced", ["behind the fence"]),
        ("copied", ["under way", "written under a copy"]),
    ],
)
def test_what_is_handed_on_by_halves_is_a_race(probes, name, marks, run):
    """A store takes an earlier release's place; a fence does not release what comes behind it; a
    copy reads until it is waited for."""
    for asynchrony in ASYNCHRONY.values():
        error = error_of(probes, name, asynchrony=asynchrony, **run)
        assert error.kind == "race"
        assert error.line in [marked(mark)[1] for mark in marks]
        if name != "second_hand":
            assert noticed(probes, f"{name}_right", asynchrony=asynchrony, **run) is None


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("resident", [2, 3, BLOCKS])
def test_what_the_last_block_takes_is_released_to_it(probes, resident, run):
    """In a plain launch, too, though its blocks do not all run at once."""
    for name in ("ticket", "ticket_fences"):
        out = probes.run(name, resident_blocks=resident, **run)["out"]
        assert out[1024 : 1024 + THREADS] == [BLOCKS * (i + 1) for i in range(THREADS)]
    for name in ("ticket_early_fence", "ticket_no_order", "ticket_no_block_meet"):
        error = error_of(probes, name, resident_blocks=resident, **run)
        assert error.kind == "race"
        assert error.line == marked("taken by the last")[1]
        found = noticed(probes, name, resident_blocks=resident, checking_races=False, **run)
        assert found is None


def test_blocks_of_a_plain_launch_one_after_another_are_not_looked_at(probes):
    assert noticed(probes, "ticket_no_order") is None


def test_a_race_in_global_memory_names_both_sides(probes):
    message = str(error_of(probes, "meetings_no_release"))
    side = r"thread \d+ \(\d+, 0, 0\) of block \d at grids.cpp:\d+ \((ld|st).global\)"
    assert re.search(f"global memory at 0x[0-9a-f]+, (read|written) by {side}", message)
    assert "no release and acquire" in message


def test_a_barrier_that_waits_for_too_many_is_a_deadlock(probes):
    for run in RUNS:
        error = error_of(probes, "meetings_too_many", **run)
        assert error.kind == "deadlock"
        assert (error.file.split("/")[-1], error.line) == marked("the meeting")


def test_blocks_that_are_not_there_at_once_wait_for_ever(probes):
    error = error_of(probes, "meetings_plain", resident_blocks=BLOCKS - 1)
    assert error.kind == "deadlock"
    assert "ld.acquire" in str(error)
    assert not wrong(probes.run("meetings_plain", resident_blocks=BLOCKS)["out"])


def test_a_cooperative_grid_that_does_not_fit_is_refused(probes):
    error = error_of(probes, "meetings", cooperative_blocks=BLOCKS - 1)
    assert error.kind == "limit"
    assert "4 blocks that wait for one another: 3 fit" in str(error)
    assert not wrong(probes.run("meetings", cooperative_blocks=BLOCKS)["out"])


def test_races_between_blocks_can_be_left_out(probes):
    kinds = {noticed(probes, "meetings_no_release", checking_races=False, **run) for run in RUNS}
    assert kinds == {None}


def test_every_fault_of_the_barrier_is_noticed(probes):
    """A launch with a fault ends in an error, in other numbers or with a counter left over."""

    def shows(fault: tuple[str, int, str, str]) -> bool:
        for run in RUNS:
            try:
                out = probes.run("meetings", fault=fault, **run)["out"]
            except probes.Error:
                return True
            if wrong(out):
                return True
        return False

    faults = plantable(probes, "meetings")
    ordering = {(instruction, fault) for _, _, instruction, fault in faults}
    assert ("red.release.add.u32", "no_fence") in ordering
    assert ("ld.acquire", "no_fence") in ordering
    assert len(faults) >= 10
    assert [fault for fault in faults if not shows(fault)] == []
