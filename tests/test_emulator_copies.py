"""mbarriers, bulk copies, the async proxy and clusters: emulator/copies.cpp, clusters.cpp."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_emulator import ASYNCHRONY, ORDER, SCHEDULES, error_of, marked, plantable, probes

__all__ = ["probes"]  # the fixture

pytestmark = pytest.mark.emulated

FILES = ("copies.cpp", "clusters.cpp")
# What each hazard is called, the line that is named and a word of the message; in every schedule.
HAZARDS = {
    "mbarrier_count_0": ("usage", "mbarrier_count_0", "a count of 0: expected 1 to 1048575"),
    "mbarrier_misaligned": ("address", "mbarrier_misaligned", "not a multiple of 8"),
    "mbarrier_none": ("state", "mbarrier_none", "there is no mbarrier at byte 0"),
    "mbarrier_twice": ("state", "mbarrier_twice", "part of an mbarrier: initialised by thread 0"),
    "mbarrier_read": ("state", "mbarrier_read", "part of an mbarrier: initialised by thread 0"),
    "mbarrier_after_the_end": ("state", "mbarrier_after_the_end", "there is no mbarrier"),
    "mbarrier_too_many": ("state", "mbarrier_too_many", "2 of 2 arrivals missing"),
    "mbarrier_many_bytes": ("usage", "mbarrier_many_bytes", "at most 1048575 bytes"),
    "mbarrier_old_state": ("usage", "mbarrier_old_state", "a state of phase 0"),
    "bulk_null": ("address", "bulk_null", "a null pointer"),
    "early_tma_load": ("race", "early tma_load", "a load before griddepcontrol.wait of what is no"),
    "early_tma_store": ("race", "early tma_store", "a store before griddepcontrol.wait"),
    "cast_to_nobody": ("usage", "cast_to_nobody", "a mask of 0x0 for a cluster of 1"),
    "reduce_copied": ("state", "given's copy", "no fence that csrc/ptx has"),
    "mbarrier_never": ("deadlock", "mbarrier_never", "2 of 3 arrivals missing, 48 bytes missing"),
    "ring_no_init_fence": ("state", "ring_tile", "no fence.mbarrier_init"),
    "staged_no_fence": ("state", "the store", "has executed no fence.proxy.async since"),
    "staged_one_fence": ("state", "the store", "has executed no fence.proxy.async since"),
    "staged_early_write": ("race", "early", "which nobody has waited for yet"),
    "staged_no_wait": ("race", "staged", "which nobody has waited for yet"),
    "two_stores_one_short": ("race", "two_stores", "which nobody has waited for yet"),
    "copy_over_no_fence": ("state", "copy_over", "has executed no fence.proxy.async since"),
    "round_trip_no_wait": ("state", "the copy back", "completes on the mbarrier at byte 0"),
    "behind_copies_no_fence": ("state", "handed on", "no fence.proxy.async between the wait for"),
    "behind_copies_one_fence": ("state", "handed on", "no fence.proxy.async between the wait for"),
    "behind_one_alone": ("state", "handed over", "which a copy in flight is writing"),
    "no_map": ("usage", "no_map", "no tensor map"),
    "three_coordinates": ("usage", "three_coordinates", "3 coordinates"),
    "tiled_for_im2col": ("usage", "tiled_for_im2col", "3 coordinates"),
    "box_misaligned": ("address", "box_misaligned", "not a multiple of 128"),
    "box_outside": ("address", "box_outside", "outside of the block's 5120 bytes"),
    "bulk_12_bytes": ("usage", "bulk_12_bytes", "12 bytes: expected a multiple of 16"),
    "cluster_wait_alone": ("usage", "cluster_wait_alone", "has not arrived"),
    "mapa_too_far": ("usage", "mapa_too_far", "rank 2 of a cluster of 2"),
}
# Hazards that show in one way or another, as the order has it.
UNSTEADY = {
    "mbarrier_unordered": {"race", "state"},
    "ring_no_full_wait": {"race", "state"},
    "ring_no_empty_wait": {"race", "state"},
    "ring_wrong_parity": {"race", "state", "deadlock"},
    "ring_no_init_barrier": {"race", "state"},
    "ring_more_bytes": {"deadlock"},
    "ring_fewer_bytes": {"deadlock", "state"},
    "ring_no_arrival": {"deadlock"},
    "staged_no_barrier": {"state", "race"},
    "staged_unordered_write": {"state", "race"},
    "round_trip_leaves": {"state"},
    "mbarrier_remade": {"race", "state"},
    "behind_copies_no_wait": {"race", "state"},
    "behind_copies_no_arrival": {"deadlock"},
    "read_by_others_no_barrier": {"race"},
    "reduce_no_barrier": {"race", "state"},
    "reduce_no_wait": {"race", "state"},
    "reduce_unordered": {"race", "state"},
    "multicast_no_init_fence": {"state"},
    "multicast_no_init_barrier": {"state", "race"},
    "multicast_no_empty_wait": {"state", "race"},
    # The threads read by themselves: only a release and an acquire of the cluster order that.
    "multicast_narrow_wait": {"race"},
    "multicast_relaxed_wait": {"race"},
    "multicast_relaxed_arrival": {"race"},
}
# Of four blocks of a cluster: the sum of their words, and what the block before gives.
REDUCED = [600 + 4 * i + 1000 * ((rank - 1) % 4) for rank in range(4) for i in range(32)]
BEHIND = 2 * list(range(7, 39)) + 2 * list(range(39, 71))
ROWS = list(range(6 * 256))


def im2col_of_a_3x3() -> list[int]:
    """What the probe im2col writes, from the convolution's definition: each word is its index."""
    found = []
    for r, s in itertools.product(range(3), repeat=2):
        pixels = itertools.islice(itertools.product(range(2), range(3), range(3)), 3, 11)
        for n, p, q in pixels:
            h, w = 2 * p - 1 + r, 2 * q - 1 + s
            inside = 0 <= h < 5 and 0 <= w < 6
            found += [4 * (w + 6 * (h + 5 * n)) + c if inside else 0 for c in range(4)]
    return found


SOUND = {
    "ring": ROWS,
    "staged": [1000 * tile + i for tile in range(2) for i in range(256)],
    "two_stores": [7] * 512,
    "stored_in_part": [7] * 128 + [0] * 128,
    "copy_over": list(range(32)),
    "round_trip": [*range(16, 32), 19],
    "mbarrier_phases": [100 * phase + 63 - t for phase in range(5) for t in range(64)],
    "multicast": [*range(512), *range(512)] * 2,
    "mbarrier_late_expect": [0, 1],
    "behind_copies": BEHIND,
    "behind_copies_and_one": BEHIND,
    "reduce": REDUCED,
    "read_by_others": list(range(7, 39)),
    "store_tail": [0] * 256 + list(range(1, 97)) + [0] * 64,
    "im2col": im2col_of_a_3x3(),
}


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazard_is_named_with_its_line(
    probes: ModuleType, name: str, asynchrony: int, order: int
) -> None:
    kind, mark, word = HAZARDS[name]
    error = error_of(probes, name, asynchrony=asynchrony, order=order, seed=3)
    assert (error.kind, Path(error.file).name, error.line) == (kind, *marked(mark))
    assert word in str(error)


@pytest.mark.parametrize("name", UNSTEADY)
def test_a_hazard_is_noticed_in_every_schedule(probes: ModuleType, name: str) -> None:
    for asynchrony, order in SCHEDULES:
        error = error_of(probes, name, asynchrony=asynchrony, order=order, seed=3)
        assert error.kind in UNSTEADY[name]
        assert Path(error.file).name in FILES


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_kernel_gives_its_numbers(
    probes: ModuleType, name: str, asynchrony: int, order: int
) -> None:
    for seed in range(3):
        out = probes.run(
            name, asynchrony=asynchrony, order=order, seed=seed, checking_tensors=True
        )["out"]
        assert out[: len(SOUND[name])] == SOUND[name]


def test_every_probe_is_tried(probes: ModuleType) -> None:
    source = "".join((Path(__file__).parent / "emulator" / name).read_text() for name in FILES)
    named = {n for n in probes.names() if f'"{n}"' in source}
    leaving = {"multicast_leaves", "reduce_leaves"}
    assert named == {*HAZARDS, *UNSTEADY, *SOUND, *leaving, "cluster_of_16"}


def test_a_thread_does_not_take_another_mbarrier_for_its_own(probes: ModuleType) -> None:
    settings = {"order": ORDER["forward"], "checking_races": False}
    error = error_of(probes, "mbarrier_remade", **settings)
    assert error.kind == "state" and "another mbarrier was made there" in str(error)


def test_a_deadlock_says_what_each_mbarrier_lacks(probes: ModuleType) -> None:
    message = str(error_of(probes, "ring_no_arrival"))
    file, line = marked("empty")
    place = r"thread 0 waits in mbarrier.try_wait.parity, mbarrier at byte 24, phase 0 \(parity 0\)"
    assert re.search(rf"{place}: \d of 2 arrivals missing at {file}:{line}", message)
    assert "mbarrier at byte 8, phase 1 (parity 1): 1 of 1 arrivals missing" in message
    assert "16 bytes missing" in str(error_of(probes, "ring_more_bytes"))
    assert "16 bytes more than expected" in str(error_of(probes, "ring_fewer_bytes"))


def test_unpublished_bytes_are_old_where_nobody_checks(probes: ModuleType) -> None:
    poison = 0xFFFFFFFF
    settings = {"checking_proxies": False, "checking_races": False}
    assert probes.run("staged", **settings)["out"][:512] == SOUND["staged"]
    assert probes.run("staged_no_fence", **settings)["out"][:512] == [poison] * 512
    # Thread 0 publishes what it has written itself: words 0, 64, 128 and 192 of a tile.
    tile = [1000 + i if i % 64 == 0 else poison for i in range(256)]
    assert probes.run("staged_one_fence", **settings)["out"][256:512] == tile


def test_loads_land_late_and_stores_read_late(probes: ModuleType) -> None:
    settings = {"checking_races": False, "checking_unwritten": False, "checking_proxies": False}

    def second_tile(asynchrony: str) -> list[int]:
        options = {"asynchrony": ASYNCHRONY[asynchrony], "order": ORDER["reverse"]}
        return probes.run("staged_early_write", **options, **settings)["out"][256:260]

    assert second_tile("eager")[0] == 1000
    assert second_tile("lazy")[0] != 1000  # thread 0 has written there before it was read


@pytest.mark.parametrize("name", ["multicast_leaves", "reduce_leaves"])
def test_leaving_a_cluster_early_is_noticed(probes: ModuleType, name: str) -> None:
    errors = []
    for asynchrony, order in SCHEDULES:
        try:
            probes.run(name, asynchrony=asynchrony, order=order)
        except probes.Error as error:
            errors.append(str(error))
    assert errors
    assert all("which has left the kernel" in error for error in errors)


def test_a_cluster_has_at_most_8_blocks(probes: ModuleType) -> None:
    error = error_of(probes, "cluster_of_16")
    assert error.kind == "limit"
    assert "16 blocks a cluster: expected 1 to 8" in str(error)


def test_copies_are_counted(probes: ModuleType) -> None:
    counters = probes.run("ring")["counters"]
    assert counters["global_load_requests"] == 6
    assert counters["global_load_bytes_asked"] == 6 * 1024
    assert counters["global_load_sectors"] == 6 * 32
    tail = probes.run("store_tail")
    assert tail["counters"]["global_store_bytes_asked"] == 3 * 128
    assert tail["tensors"]["out"] == (0, 3 * 128)


# Faults that change nothing: both blocks take each other for themselves, or all are summed in
# another order.
HARMLESS = {
    "multicast": {("mapa", "wrong_lane")},
    "reduce": {("mapa", "wrong_lane"), ("bar.warp.sync", "skip")},
}
# All copies are of memory that is there.
HARMLESS |= {
    name: {("cp.async.ca", "ignore_predicate")}
    for name in ("behind_copies", "behind_copies_and_one")
}
MUTATED = ["ring", "staged", "multicast", "reduce", "behind_copies", "behind_copies_and_one"]


@pytest.mark.parametrize("name", MUTATED)
def test_every_fault_of_a_sound_kernel_is_noticed(probes: ModuleType, name: str) -> None:
    survivors = []
    for fault in plantable(probes, name):
        for asynchrony, order in SCHEDULES:
            settings = {"asynchrony": asynchrony, "order": order, "checking_tensors": True}
            try:
                out = probes.run(name, fault=fault, **settings)["out"]
            except probes.Error:
                break
            if out[: len(SOUND[name])] != SOUND[name]:
                break
        else:
            survivors.append((fault[2], fault[3]))
    assert set(survivors) == HARMLESS.get(name, set())


# A map of [N, H, W, C] = [2, 9, 8, 64] of 16-bit elements, tiled and for im2col.
TILED = {
    "address": 4096,
    "sizes": [64, 8, 9, 2],
    "strides": [128, 128 * 8, 128 * 72],
    "box": [64, 8, 4, 1],
    "steps": [1, 1, 1, 1],
    "swizzle": 128,
    "pixels": 0,
    "lower": [0, 0],
    "upper": [0, 0],
}
IM2COL = TILED | {"box": [64], "pixels": 128, "lower": [-1, -1], "upper": [-1, -1]}
SOUND_MAPS = [
    TILED,
    IM2COL,
    TILED | {"sizes": [1 << 32], "strides": [], "box": [256], "swizzle": 0, "steps": [1]},
    TILED | {"box": [8, 256, 256, 256], "swizzle": 0},
    TILED | {"box": [16, 1, 1, 1], "swizzle": 32, "steps": [99, 8, 8, 8]},
    TILED | {"strides": [(1 << 40) - 16] * 3},
    IM2COL | {"pixels": 1024, "lower": [-128, -128], "upper": [127, 127]},
    IM2COL | {"lower": [0, 0], "upper": [-7, -8]},
]
FAULTY_MAPS = [
    (TILED, {"sizes": []}, "rank is 0; 1 to 5 is accepted"),
    (TILED, {"sizes": [1] * 6}, "rank is 6; 1 to 5"),
    (TILED, {"address": 0}, "address is null"),
    (TILED, {"address": 4104}, "address is 4104; a multiple of 16"),
    (TILED, {"sizes": [64, 0, 9, 2]}, "sizes[1] is 0; 1 to 4294967296"),
    (TILED, {"sizes": [(1 << 32) + 1, 8, 9, 2]}, "sizes[0] is 4294967297"),
    (TILED, {"strides": [128, 1032, 9216]}, "strides[1] is 1032; a multiple of 16"),
    (TILED, {"strides": [128, 1024, 1 << 40]}, "strides[2] is 1099511627776; 16 to"),
    (TILED, {"box": [64, 257, 1, 1]}, "box[1] is 257; 1 to 256"),
    (TILED, {"box": [64, 8, 0, 1]}, "box[2] is 0; 1 to 256"),
    (TILED, {"box": [12, 8, 1, 1], "swizzle": 0}, "a box's row in bytes is 24; a multiple of 16"),
    (TILED, {"box": [128, 8, 1, 1]}, "a box's row has 256 bytes; 128 is accepted"),
    (TILED, {"box": [32, 8, 1, 1]}, "a box's row has 64 bytes; 128 is accepted"),
    (TILED, {"steps": [1, 9, 1, 1]}, "steps[1] is 9; 1 to 8"),
    (TILED, {"steps": [1, 1, 0, 1]}, "steps[2] is 0; 1 to 8"),
    (IM2COL, {"pixels": 1025}, "pixels is 1025; 1 to 1024"),
    (IM2COL, {"pixels": -1}, "pixels is -1; 1 to 1024"),
    (IM2COL, {"box": [257], "swizzle": 0}, "box[0] is 257; 1 to 256"),
    (IM2COL, {"sizes": [64, 8], "strides": [128]}, "rank of an im2col map is 2; 3 to 5"),
    (IM2COL, {"lower": [-129, -1]}, "lower[0] is -129; -128 to 127"),
    (IM2COL, {"upper": [-1, 128]}, "upper[1] is 128; -128 to 127"),
    (IM2COL, {"lower": [0, 0], "upper": [-8, 0]}, "no pixel is left between lower[0] 0 and"),
]


@pytest.mark.parametrize("request_", SOUND_MAPS)
def test_a_tensor_map_within_the_rules_is_encoded(
    probes: ModuleType, request_: dict[str, Any]
) -> None:
    assert probes.tensor_map(**request_) == ("", 0)


@pytest.mark.parametrize(("base", "change", "words"), FAULTY_MAPS)
def test_a_tensor_map_against_the_rules_is_refused(
    probes: ModuleType, base: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    message, error = probes.tensor_map(**(base | change))
    assert words in message
    assert error == 1  # cudaErrorInvalidValue
