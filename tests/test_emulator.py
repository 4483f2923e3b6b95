"""The emulator's runtime: tiny kernels with one hazard, or one known cost, each.

The kernels are in tests/emulator; a mark behind a line (`// <- name`) is what an error must name.
"""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import pytest
from emulator_probes import (
    ASYNCHRONY,
    ORDER,
    SCHEDULES,
    error_of,
    load,
    marked,
    noticed,
    plantable,
)

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    """The module of probes."""
    return load()


# What each hazard is called and the line that is named. Only hazards that every schedule shows.
HAZARDS = {
    "copy_no_wait": ("state", "the copy's reader"),
    "two_groups_one_short": ("state", "two_groups"),
    "two_writers": ("race", "two_writers"),
    "unwritten": ("state", "unwritten"),
    "out_of_bounds": ("address", "out_of_bounds"),
    "offset_for_address": ("address", "offset_for_address"),
    "misaligned": ("address", "misaligned"),
    "misaligned_global": ("address", "misaligned_global"),
    "null": ("address", "null"),
    "leaves_early": ("divergence", "leaves_early"),
    "outside_its_mask": ("usage", "outside_its_mask"),
    "lane_that_is_not_there": ("divergence", "lane_that_is_not_there"),
    "crossed_barriers": ("deadlock", "crossed_barriers"),
    "barrier_in_one_warp": ("deadlock", "barrier_in_one_warp"),
    "two_counts": ("usage", "two_counts"),
    "odd_count": ("usage", "odd_count"),
    "barrier_16": ("usage", "barrier_16"),
    "split_warp": ("divergence", "split_warp"),
    "flag_never": ("deadlock", "wait_for_flag"),
}
SOUND = (
    *("copy", "two_groups", "overwrite", "within_warp", "producer", "neighbouring_bytes"),
    *("neighbouring_reads", "half_masks", "early_exit", "grid", "last_block", "flag"),
    *("rows", "rows_swizzled", "vectors", "ragged"),
)


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_is_named_with_its_line(probes, name, asynchrony, order):
    kind, mark = HAZARDS[name]
    error = error_of(probes, name, asynchrony=asynchrony, order=order, seed=3)
    assert (error.kind, Path(error.file).name, error.line) == (kind, *marked(mark))
    assert f"{Path(error.file).name}:{error.line}: {error.instruction}: " in str(error)
    assert f"block ({error.block[0]}, 0, 0), thread {error.thread} " in str(error)


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_passes(probes, name, asynchrony, order):
    for seed in range(3):
        probes.run(name, asynchrony=asynchrony, order=order, seed=seed, checking_tensors=True)


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("early_load", "a load before griddepcontrol.wait of what is no constant"),
        ("early_copy", "a load before griddepcontrol.wait of what is no constant"),
        ("early_bulk", "a load before griddepcontrol.wait of what is no constant"),
        ("early_prefetch", "a load before griddepcontrol.wait of what is no constant"),
        ("early_store", "a store before griddepcontrol.wait"),
        ("early_count", "a store before griddepcontrol.wait"),
        ("early_stale", "not by the read-only path"),
    ],
)
def test_what_a_launch_that_begins_early_must_not_touch(probes, name, said, asynchrony, order):
    error = error_of(probes, name, asynchrony=asynchrony, order=order)
    assert (error.kind, error.line, said in str(error)) == ("race", marked(name)[1], True)


@pytest.mark.parametrize("order", ORDER.values())
def test_every_thread_of_a_launch_that_begins_early_waits(probes, order):
    for name in ("early", "late", "early_bulk_constant"):
        probes.run(name, order=order, checking_tensors=True)
    for name in ("early_leaves", "early_no_wait"):
        error = error_of(probes, name, order=order)
        assert error.kind == "race" and "leaves without griddepcontrol.wait" in str(error)
    sites = probes.run("early")["sites"]
    waits = [one for one in sites if one["instruction"] == "griddepcontrol.wait"]
    assert [(one["line"], one["faults"]) for one in waits] == [(marked("early_wait")[1], ["skip"])]
    error = error_of(
        probes, "early", fault=("early.cpp", waits[0]["line"], "griddepcontrol.wait", "skip")
    )
    assert "before griddepcontrol.wait" in str(error)


@pytest.mark.parametrize("order", ORDER.values())
@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("copy_no_barrier", ["the copy's reader"]),
        ("overwrite_no_barrier", ["overwrite"]),
        ("within_warp_no_sync", ["within_warp"]),
        ("producer_late", ["producer_late", "producer_late's reader"]),
        ("divergent", ["divergent, one side", "divergent, the other"]),
    ],
)
def test_a_missing_meeting_is_noticed_in_every_order(probes, name, marks, order):
    error = error_of(probes, name, order=order, seed=1)
    assert error.kind in ("race", "state", "divergence")
    lines = [marked(mark) for mark in marks]
    if name == "overwrite_no_barrier":  # the reader comes second, or the writer
        lines.append((lines[0][0], lines[0][1] + 4))
    assert (Path(error.file).name, error.line) in lines


def test_both_sides_of_a_hazard_are_named(probes):
    message = str(error_of(probes, "copy_no_wait"))
    file, line = marked("the copy")
    assert re.search(
        rf"a copy in flight .* thread \d+ \(.*\) at {file}:{line} \(cp.async.cg\)", message
    )
    message = str(error_of(probes, "two_writers"))
    file, line = marked("two_writers")
    assert f"written by thread 0 (0, 0, 0) at {file}:{line} (st.shared)" in message


def test_a_deadlock_says_who_waits_for_what_at_once(probes):
    start = time.perf_counter()
    message = str(error_of(probes, "crossed_barriers"))
    file, line = marked("crossed_barriers")
    for warp, barrier in (("0-31", 1), ("32-63", 2)):
        expected = (
            f"threads {warp} wait in bar.sync, barrier {barrier} "
            f"(32 of 64 threads have come) at {file}:{line}"
        )
        assert expected in message
    assert "threads 32-63 have left" in str(error_of(probes, "barrier_in_one_warp"))
    error_of(probes, "flag_never")
    assert time.perf_counter() - start < 1


def test_a_launch_that_the_hardware_refuses_is_refused(probes):
    assert "2048 threads a block: expected 1 to 1024" in str(error_of(probes, "nobody"))
    error = error_of(probes, "greedy")
    assert error.kind == "limit"
    assert "233472 bytes of dynamic shared memory: expected at most 232448" in str(error)
    assert "not cooperative" in str(error_of(probes, "grid_not_cooperative"))


def test_checks_can_be_left_out(probes):
    assert noticed(probes, "unwritten", checking_unwritten=False) is None
    assert noticed(probes, "two_writers", checking_races=False) is None
    assert probes.run("unwritten", checking_unwritten=False)["out"][0] == 0xFFFFFFFF  # poison


def test_copies_take_effect_when_the_schedule_says(probes):
    expected = list(range(100, 164))
    for order in ORDER.values():
        eager = probes.run("landing", asynchrony=ASYNCHRONY["eager"], order=order)["out"]
        lazy = probes.run("landing", asynchrony=ASYNCHRONY["lazy"], order=order)["out"]
        some = probes.run("landing", asynchrony=ASYNCHRONY["random"], order=order)["out"]
        assert eager[:64] == expected
        assert lazy[:64] == [0xFFFFFFFF] * 64
        assert 0 < sum(value == 0xFFFFFFFF for value in some[:64]) < 64
        assert eager[64:128] == lazy[64:128] == some[64:128] == expected


def turns(probes: ModuleType, **settings: Any) -> list[int]:
    """Which thread of which block came when."""
    return probes.run("order", **settings)["out"][1:385]


def test_threads_and_blocks_run_in_the_schedule_s_order(probes):
    forward = [1000 * block + thread for block in range(4) for thread in range(96)]
    assert turns(probes, order=ORDER["forward"]) == forward
    assert turns(probes, order=ORDER["reverse"]) == forward[::-1]
    shuffled = turns(probes, order=ORDER["shuffled"], seed=5)
    assert sorted(shuffled) == forward
    assert shuffled not in (forward, forward[::-1])


def test_a_seed_names_one_run(probes):
    same = [turns(probes, order=ORDER["shuffled"], seed=5) for _ in range(2)]
    assert same[0] == same[1] != turns(probes, order=ORDER["shuffled"], seed=6)
    landing = [probes.run("landing", asynchrony=2, seed=seed)["out"] for seed in (5, 5, 6)]
    assert landing[0] == landing[1] != landing[2]


def test_resident_blocks_interleave(probes):
    apart = turns(probes, order=ORDER["shuffled"], seed=2)
    together = turns(probes, order=ORDER["shuffled"], seed=2, resident_blocks=4)

    def changes(order: list[int]) -> int:
        return sum(a // 1000 != b // 1000 for a, b in itertools.pairwise(order))

    assert changes(apart) == 3
    assert changes(together) > 3


def test_only_the_chosen_blocks_run(probes):
    report = probes.run("order", first_block=1, last_block=2)
    assert report["blocks"] == 2
    assert report["out"][0] == 2 * 96
    assert {value // 1000 for value in report["out"][1 : 1 + 2 * 96]} == {1, 2}


@pytest.mark.parametrize("order", ORDER.values())
def test_a_grid_meets_at_its_barrier(probes, order):
    def exchanged(name: str, **settings: bool) -> list[int]:
        return probes.run(name, order=order, **settings)["out"][1024:1280]

    expected = [(thread + 192) % 256 + 1 for thread in range(256)]
    assert exchanged("grid") == expected
    assert noticed(probes, "grid_no_barrier", order=order) == "race"
    assert exchanged("grid_no_barrier", checking_races=False) != expected


@pytest.mark.parametrize("order", ORDER.values())
@pytest.mark.parametrize("resident_blocks", [1, 3, 8])
def test_the_last_block_sees_all_others(probes, order, resident_blocks):
    out = probes.run("last_block", order=order, resident_blocks=resident_blocks)["out"]
    assert out[1000] == sum(range(10, 18))


# Two requests each (a store, a load), and by arithmetic gcd(stride, 32) lanes in one bank.
@pytest.mark.parametrize(
    ("name", "wavefronts", "conflicts"),
    [
        ("stride_1", 2, 0),
        ("stride_2", 4, 2),
        ("stride_3", 2, 0),
        ("stride_8", 16, 14),
        ("stride_32", 64, 62),
        ("broadcast", 2, 0),
        ("vectors", 4 + 2, 0),  # 16 bytes by quarters of the warp, 8 by halves
        ("rows", 4 + 16, 12),  # ldmatrix: rows of 64 bytes lie two to a line of 32 banks
        ("rows_swizzled", 4 + 4, 0),
    ],
)
def test_bank_conflicts(probes, name, wavefronts, conflicts):
    for asynchrony, order in SCHEDULES:
        counters = probes.run(name, asynchrony=asynchrony, order=order)["counters"]
        assert counters["shared_requests"] == 2
        assert counters["shared_wavefronts"] == wavefronts
        assert counters["bank_conflicts"] == conflicts


@pytest.mark.parametrize(
    ("name", "sectors", "lines"),
    [("global_1", 4, 1), ("global_2", 8, 2), ("global_8", 32, 8), ("global_64", 32, 32)],
)
def test_sectors_and_lines(probes, name, sectors, lines):
    counters = probes.run(name)["counters"]
    assert counters["global_load_requests"] == 1
    assert counters["global_load_sectors"] == sectors
    assert counters["global_load_lines"] == lines
    assert counters["global_load_bytes_asked"] == counters["global_store_bytes_asked"] == 128
    assert counters["global_store_sectors"] == 4


def test_requests_gather_the_nth_turns_of_all_lanes(probes):
    counters = probes.run("ragged", order=ORDER["shuffled"])["counters"]
    assert counters["global_load_requests"] == 32
    assert counters["global_load_bytes_asked"] == 4 * sum(range(1, 33))
    # Turn i has the lanes i to 31, next to each other in one line.
    assert counters["global_load_lines"] == 32
    assert counters["global_load_sectors"] == sum(4 - i // 8 for i in range(32))


def test_counters_belong_to_their_site(probes):
    report = probes.run("rows")
    costly = [site for site in report["sites"] if site["counters"]["bank_conflicts"]]
    assert [(site["instruction"], site["counters"]["bank_conflicts"]) for site in costly] == [
        ("ldmatrix.x4", 12)
    ]


def test_unique_bytes_of_a_tensor(probes):
    assert probes.run("global_2")["tensors"] == {"in": (128, 0), "out": (0, 128)}
    assert probes.run("grid")["tensors"]["out"] == (1024, 2048)
    report = probes.run("ragged")  # 528 lanes' turns, each on a word of its own
    assert report["tensors"]["in"] == (4 * 528, 0)


def test_memory_of_no_tensor_is_not_touched(probes):
    for name, word in (("beyond", "byte 65536 of 65536"), ("read_only", "may only read")):
        error = error_of(probes, name, checking_tensors=True)
        assert (error.kind, Path(error.file).name, error.line) == ("address", *marked(name))
        assert word in str(error)


def test_a_run_lists_its_sites_and_their_faults(probes):
    found = {(s["instruction"], s["line"]): s["faults"] for s in probes.run("copy")["sites"]}
    instructions = {instruction for instruction, _ in found}
    assert {"cp.async.cg", "cp.async.wait_group", "bar.sync 0", "ld.shared"} <= instructions
    assert found["cp.async.cg", marked("the copy")[1]] != []
    assert sorted(plantable(probes, "copy")) == sorted(plantable(probes, "copy", order=1))


def test_a_planted_fault_is_hit_and_noticed(probes):
    clean = probes.run("copy")["out"]
    survivors = []
    for fault in plantable(probes, "copy"):
        seen = False
        for asynchrony, order in SCHEDULES:
            settings = {"asynchrony": asynchrony, "order": order, "checking_tensors": True}
            try:
                report = probes.run("copy", fault=fault, **settings)
            except probes.Error:
                seen = True
                break
            assert sum(site["hits"] for site in report["sites"]) == 64
            seen = seen or report["out"] != clean
        if not seen:
            survivors.append(fault[2:])
    assert survivors == [("cp.async.cg", "ignore_predicate")]  # the copy's predicate is true


def test_a_fault_elsewhere_changes_nothing(probes):
    clean = probes.run("copy")
    _, line = marked("the copy")
    for fault in [
        ("hazards.cpp", line + 1, "cp.async.cg", "skip"),
        ("costs.cpp", line, "cp.async.cg", "skip"),
        ("hazards.cpp", line, "ldmatrix.x4", "skip"),
        ("hazards.cpp", line, "cp.async.cg", "no_fence"),  # not one that cp.async knows
    ]:
        report = probes.run("copy", fault=fault)
        assert report["out"] == clean["out"]
        assert all(site["hits"] == 0 for site in report["sites"])


def test_an_unknown_fault_is_refused_with_the_list(probes):
    with pytest.raises(ValueError, match=r"unknown fault 'oops': expected one of none, skip, .*"):
        probes.run("copy", fault=("hazards.cpp", 1, "cp.async", "oops"))


def test_the_list_of_faults_is_complete(probes):
    """Each has a name of its own, is planted by some wrapper, and is described."""
    source = (emulated.builder.ROOT / "csrc/emulator/faults.h").read_text()
    declared = re.findall(r"^  k(\w+),", source.partition("enum class Fault")[2], re.MULTILINE)
    snake = [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in declared]
    assert probes.faults() == snake
    wrappers = "".join(
        path.read_text() for path in (emulated.builder.ROOT / "csrc/ptx").glob("*.h")
    )
    guide = (emulated.builder.ROOT / "docs/emulator.md").read_text()
    for name, word in zip(declared[1:], snake[1:], strict=True):
        assert f"Fault::k{name}" in wrappers, f"no wrapper plants k{name}"
        assert f"`{word}`" in guide, f"docs/emulator.md does not describe {word}"


def test_a_run_stops_at_a_thread_and_prints_a_tile(probes):
    _, line = marked("tile")
    error = error_of(probes, "tile", stop=(1, 33, line, 0))
    assert (error.kind, error.block, error.thread, error.line) == ("stopped", (1, 0, 0), 33, line)
    rows = [row.split() for row in str(error).splitlines()[1:3]]
    assert rows == [["0:", "0", "1.5", "3", "4.5"], ["16:", "~", "-", "-", "-"]]
    assert noticed(probes, "tile", stop=(1, 33, line, 1)) is None  # it comes by once only
    assert noticed(probes, "tile", stop=(2, 33, line, 0)) is None


def test_switching_is_fast(probes):
    """Some tens of nanoseconds; the limit leaves room for a busy machine."""
    assert min(probes.nanoseconds_of_a_collective() for _ in range(5)) < 1000
