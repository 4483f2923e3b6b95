"""The emulator's products of warpgroups (wgmma): sound kernels, and kernels with one mistake each.

The kernels are in tests/emulator/products.cpp; what the products compute is held against the manual
in tests/test_conformance.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import wgmma_tables
from emulator_probes import (
    ASYNCHRONY,
    ORDER,
    SCHEDULES,
    error_of,
    load,
    marked,
    plantable,
)

pytestmark = pytest.mark.emulated

COLUMNS = 16
WORDS = 64 * COLUMNS


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    """The module of probes."""
    return load()


def chunk(first: int, period: int) -> list[int]:
    """Eight elements of a row, as the probes write them."""
    return [(first + i) % period for i in range(8)]


A = np.array([chunk(2 * i, 29) + chunk(2 * i + 8, 29) for i in range(64)], float)
B = np.array([chunk(3 * j, 7) + chunk(3 * j + 8, 7) for j in range(COLUMNS)], float)


def sums(words: list[int]) -> np.ndarray:
    """The first words of `out`, by thread -> D [64, 16]."""
    registers = np.array(words[:WORDS], np.uint32).view(np.float32).reshape(128, -1)
    found = np.full((64, COLUMNS), np.nan)
    found[wgmma_tables.accumulators(COLUMNS)] = registers
    return found


def left_side_in_registers() -> np.ndarray:
    """What the chain's last product has on its left, [64, 16]."""
    thread, register, half = np.indices((128, 4, 2))
    found = np.full((64, 16), np.nan)
    found[wgmma_tables.fragment("bf16")] = ((thread + register + half) % 3).reshape(128, 8)
    return found


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("product", A),
        ("product_chain", 2 * A + left_side_in_registers()),
        ("product_two_sums", A),
        ("product_two_groups", A),
        ("product_peek", A),
        ("product_peek_behind_two", 2 * A),
        ("others_overwrite_later", A),
    ],
)
def test_a_sound_kernel_computes_its_product(probes, name, left, asynchrony, order):
    for seed in range(2):
        out = probes.run(name, asynchrony=asynchrony, order=order, seed=seed)["out"]
        assert (sums(out) == left @ B.T).all()
        if name == "product_two_sums":
            assert out[WORDS : 2 * WORDS] == out[:WORDS]


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
def test_tiles_that_tma_brings_are_multiplied(probes, asynchrony, order):
    words = np.arange(16384, dtype=np.uint32).view(np.float16).astype(np.float64).reshape(-1, 64)
    for seed in range(2):
        run = probes.run("product_ring", asynchrony=asynchrony, order=order, seed=seed)
        got = np.array(run["out"], np.uint32).view(np.float32).reshape(4, 128, 4)
        for tile in (1, 2, 3, 4):  # the last one lies where the first one was
            rows = words[4 * tile :]
            expected = (rows[:64] @ rows[:8].T)[wgmma_tables.accumulators(8)]
            np.testing.assert_allclose(got[tile % 4], expected, rtol=1e-5)
        products = [s for s in run["sites"] if s["instruction"] == "wgmma.f16"]
        assert [s["counters"]["bank_conflicts"] for s in products] == [0]
        assert products[0]["counters"]["shared_bytes"] == 5 * 4 * (64 + 8) * 32


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize("name", ["product_ring_early_release", "product_ring_no_full_wait"])
def test_a_ring_without_its_waits_is_noticed(probes, name, asynchrony, order):
    error = error_of(probes, name, asynchrony=asynchrony, order=order, seed=3)
    # A slot that comes back too early may also lap the warps that have not used it yet.
    assert error.kind in ("state", "race", "deadlock")
    if error.kind != "deadlock":
        assert (Path(error.file).name, error.line) in [marked("a tile"), marked("a tile's product")]


# What each mistake is called, the line that is named and words of the message.
MISTAKES = {
    "operands_unpublished": ("state", "operands", "no fence.proxy.async since"),
    "operands_unmet": ("state", "operands", "no barrier between"),
    "operands_overwritten": ("race", "overwritten", "read asynchronously"),
    "operands_outside": ("address", "descriptor's product", "outside of the block's 2560 bytes"),
    "operands_unwritten": ("state", "descriptor's product", "byte 2560 of dynamic shared memory"),
    "descriptor_misaligned": ("address", "descriptor", "start 0x408 is not a multiple of 16"),
    "descriptor_invalid": ("usage", "descriptor", "leading 1024, stride 136"),
    "sums_unpinned": ("state", "registers", "no wgmma_pin and wgmma_fence"),
    "sums_unfenced": ("state", "registers", "no wgmma_fence since the accumulators were pinned"),
    "sums_late": ("state", "registers", "the accumulators were written after they were pinned"),
    "sums_overlapping": ("state", "overlapping", "overlap those of another shape"),
    "sums_unread": ("usage", "registers' wait", "has not pinned the results"),
    "fragments_unpinned": ("state", "fragments", "accesses of the registers of a"),
    "no_commit": ("state", "groups", "no wgmma_wait_group has waited for"),
    "no_wait": ("state", "groups", "no wgmma_wait_group has waited for"),
    "wait_one_short": ("state", "groups", "no wgmma_wait_group has waited for"),
    "product_left": ("state", "leave", "has not waited for it"),
    "unlike_warps": ("divergence", "unlike", "the descriptors and `accumulate` must agree"),
    "unlike_lanes": ("divergence", "unlike", "the descriptors and `accumulate` must agree"),
    "absent_warp": ("deadlock", "absent_warp", "threads 0-95 wait in wgmma.wait_group"),
    "no_warpgroup": ("usage", "product", "no whole warpgroup of 128 threads"),
    "too_many_registers": ("limit", "too_many_registers", "69120 registers in the block"),
    "fewer_registers_up": ("usage", "fewer_registers_up", "48 registers, from 40"),
}


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_line(probes, name, asynchrony, order):
    kind, mark, words = MISTAKES[name]
    error = error_of(probes, name, asynchrony=asynchrony, order=order, seed=3)
    assert (error.kind, Path(error.file).name, error.line) == (kind, *marked(mark))
    assert words in str(error)


@pytest.mark.parametrize(("asynchrony", "order"), SCHEDULES)
@pytest.mark.parametrize(
    ("name", "marks", "words"),
    [
        # Where it is noticed is a matter of when the product takes effect.
        ("sums_touched", ["registers", "registers' wait"], "accumulators were written while"),
        ("fragments_touched", ["fragments", "fragments' wait"], "registers of a were written"),
        # The writer comes before the product or after.
        ("others_overwrite", ["overwritten by others", "their product"], ""),
        ("unlike_groups", ["unlike groups, one side", "unlike groups, the other"], "group 0 ends"),
        ("three_warps", ["three warps"], "group 0 ends behind product"),
    ],
)
def test_a_mistake_is_noticed_in_every_order(probes, name, marks, words, asynchrony, order):
    error = error_of(probes, name, asynchrony=asynchrony, order=order, seed=3)
    assert error.kind in ("state", "race", "divergence")
    assert (Path(error.file).name, error.line) in [marked(mark) for mark in marks]
    assert words in str(error)


def test_accumulators_hold_nothing_until_the_schedule_says(probes):
    def before(asynchrony: str) -> np.ndarray:
        """The first accumulator of each thread, read in front of the wait."""
        out = probes.run("product_peek", asynchrony=ASYNCHRONY[asynchrony])["out"]
        return np.array(out[1024:1152], np.uint32).view(np.float32)

    row, column = wgmma_tables.accumulators(COLUMNS)
    expected = (A @ B.T)[row[:, 0], column[:, 0]]
    assert (before("eager") == expected).all()
    assert np.isnan(before("lazy")).all()


def test_a_random_product_may_be_late_and_shows_no_sum_of_its_chain(probes):
    row, column = wgmma_tables.accumulators(COLUMNS)
    sum_of_one = (A @ B.T)[row[:, 0], column[:, 0]]
    late = 0
    for seed in range(24):
        settings = {"asynchrony": ASYNCHRONY["random"], "order": ORDER["shuffled"], "seed": seed}
        for name, expected in (
            ("product_peek", sum_of_one),
            ("product_peek_behind_two", 2 * sum_of_one),
        ):
            out = probes.run(name, **settings)["out"]
            seen = np.array(out[1024:1152], np.uint32).view(np.float32)
            assert (np.isnan(seen) | (seen == expected)).all()
            late += name == "product_peek" and bool(np.isnan(seen).any())
    assert 4 <= late <= 20  # neither as eager does nor as lazy


def test_a_product_s_reads_are_counted(probes):
    for order in ORDER.values():
        sites = probes.run("product", order=order)["sites"]
        (counters,) = [s["counters"] for s in sites if s["instruction"] == "wgmma.bf16"]
        # Core matrices of 8 x 16 bytes: 64 rows and 16 columns, 32 bytes of K each.
        assert counters["shared_requests"] == (64 + COLUMNS) // 8 * 2
        assert counters["shared_wavefronts"] == counters["shared_requests"]
        assert counters["shared_bytes"] == (64 + COLUMNS) * 32
        assert counters["bank_conflicts"] == 0


@pytest.mark.parametrize(
    ("name", "harmless"),
    [
        # The first product of a chain ignores the accumulator.
        ("product_chain", {("first of a chain", "wgmma.bf16", "stale_accumulator")}),
        (
            "product_two_sums",
            {
                ("first sum", "wgmma.bf16", "stale_accumulator"),
                ("second sum", "wgmma.bf16", "stale_accumulator"),
                # Nobody reads what it writes.
                ("at last", "st.shared", "skip"),
                ("at last", "st.shared", "row_off"),
                ("at last", "st.shared", "chunk_off"),
            },
        ),
    ],
)
def test_every_fault_is_noticed(probes, name, harmless):
    right = probes.run(name)["out"]
    survivors = set()
    for fault in plantable(probes, name):
        seen = False
        for asynchrony, order in SCHEDULES:
            settings = {"asynchrony": asynchrony, "order": order, "seed": 1}
            try:
                seen |= probes.run(name, fault=fault, **settings)["out"] != right
            except probes.Error:
                seen = True
        if not seen:
            survivors.add(fault[1:])
    assert survivors == {(marked(mark)[1], *rest) for mark, *rest in harmless}


def test_the_faults_of_products_are_offered(probes):
    offered = {fault[2:] for fault in plantable(probes, "product_chain")}
    for operand in ("wgmma.a", "wgmma.b"):
        for kind in ("row_off", "chunk_off", "wrong_swizzle", "transposed", "lead_off"):
            assert (operand, kind) in offered
    expected = {
        ("wgmma.a", "stride_off"),
        ("wgmma.a", "swap_operands"),
        ("wgmma.bf16", "skip"),
        ("wgmma.bf16", "truncate"),
        ("wgmma.fence", "skip"),
        ("wgmma.commit_group", "skip"),
        ("wgmma.wait_group", "skip"),
        ("wgmma.wait_group", "wait_one_fewer"),
        ("fence.proxy.async", "no_fence"),
    }
    assert expected <= offered
