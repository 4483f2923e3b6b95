"""The driver's op that measures ceilings, emulated: what it reads, multiplies and meets is right.

Its rates have no meaning here; that each stands beside what the plans count with has.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_driver import FOUND, run

pytestmark = pytest.mark.emulated

ROOT = Path(__file__).resolve().parent.parent
OP = ("--op", "ceilings")
SCHEDULES = [
    (),
    ("--asynchrony", "lazy", "--order", "reverse"),
    ("--asynchrony", "random", "--order", "shuffled", "--schedule-seed", 3),
    ("--resident-blocks", 4, "--asynchrony", "lazy", "--order", "shuffled"),
]
KINDS = {"l2": 12, "set": 6, "memory": 2, "wgmma": 24, "grid": 1, "cluster": 2, "graph": 2}


def rates(*options, **more):
    """What a call says of each ceiling."""
    found = run(*OP, *options, **more)
    assert (found.returncode, found.stderr) == (0, ""), found
    record = json.loads(found.stdout)
    assert record["wrong"] == 0 and record["worst"] == 0
    return record["rates"]


def constants():
    """The rates of csrc/launch/conv_plan.h."""
    text = (ROOT / "csrc/launch/conv_plan.h").read_text()
    found = re.findall(r"^constexpr double (k\w+) = ([\d. *]+);", text, re.M)
    return {name: eval(value) for name, value in found}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda words: " ".join(map(str, words)))
def test_every_ceiling_is_right(schedule):
    found = rates(*schedule)
    for kind, count in KINDS.items():
        assert sum(re.match(rf"{kind}\d*(mb)?_", name) is not None for name in found) == count
    assert len(found) == sum(KINDS.values())
    for one in found.values():
        assert one["elements"] > 0 and one["wrong"] == 0
        assert "rate" not in one  # the emulator has no time
    assert found["l2_own_rows"]["elements"] == 4 * (128 + 1) + 4  # sums, cycles, counters


def test_predictions_are_the_plans_rates():
    rate, found = constants(), rates()
    alone = {
        "l2_own_rows": "kCacheBytes",
        "l2_pairs_rows": "kCacheBytes",
        "l2_same_loads": "kSameLines",
        "memory_rows": "kMemoryBytes",
        "wgmma_n256_shared_2w": "kWarpgroupUnit",
        "grid_meeting": "kMeeting",
        "cluster4_meeting": "kClusterMeeting",
    }
    for name, constant in alone.items():
        assert found[name]["constant"] == constant
        assert found[name]["predicted"] == pytest.approx(rate[constant], rel=1e-5), name
    # What a cluster shares comes to each of its blocks; shared memory's width is the most.
    assert found["l2_cluster2_rows"]["predicted"] == 2 * rate["kCacheBytes"]
    assert found["l2_same_cluster4_rows"]["predicted"] == rate["kSharedBytes"]
    # Two warpgroups' steps of 64 rows: both sides read, and 8 KB written.
    products, bytes_moved = 2 * 64 * 64 * 64, 2 * (64 + 64) * 128 + 8192
    beside = found["wgmma_n64_shared_2w_8kb"]
    assert beside["constant"] == "kSharedBytes"
    assert beside["predicted"] == pytest.approx(products * rate["kSharedBytes"] / bytes_moved)
    brought = found["wgmma_n64_registers_2w_24kb"]
    assert brought["constant"] == "kSameLines"
    assert brought["predicted"] == pytest.approx(products * rate["kSameLines"] / (24 * 1024))
    assert "constant" not in found["graph_kernel"]


def test_some_are_asked_for_by_how_they_begin():
    assert set(rates("--ceiling", "cluster")) == {"cluster2_meeting", "cluster4_meeting"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ceiling", "wgmma_n512"), "--ceiling is 'wgmma_n512'; accepted are all or how one"),
        (("--dtype", "float16"), "--dtype is 'float16'; ceilings measure bfloat16"),
        (("--data", "normals"), "--data is 'normals'; ceilings are judged on integers"),
        (("--early",), "--early: ceilings does not begin early"),
    ],
)
def test_what_is_refused_is_named(words, says):
    found = run(*OP, *words)
    assert found.returncode == 2 and says in found.stderr


JUDGED = (
    "l2_own_rows",
    "l2_own_piece",
    "l2_own_loads",
    "l2_cluster4_rows",
    "wgmma_n64_shared_2w_8kb",
    "wgmma_n128_registers_1w",
    "grid_meeting",
    "cluster2_meeting",
    "graph_kernel_early",
)
HARMLESS = {
    # Which lane of a warp arrives at which block's barrier; all do.
    ("ceilings_reads_sm90.cuh", "mapa", "wrong_lane"),
    # Nobody reads the traffic: where it lies is all one, that it comes is not.
    *(
        ("bring_traffic", "cp.async.bulk.tensor.tile", name)
        for name in ("row_off", "coordinate_off", "wrong_swizzle")
    ),
    # A wait behind it is for all groups, and what is released meanwhile nobody reads.
    *(
        ("ceilings_products_sm90.cuh", "wgmma.wait_group", name)
        for name in ("skip", "wait_one_fewer")
    ),
    # A barrier ahead of a look at the clock, and that of threads of which the first alone writes.
    ("ceilings_loads_sm80.cuh", "bar.sync 0", "skip"),
    ("ceilings_meetings_sm90.cuh", "bar.sync 0", "skip"),
    # The ring of a launch without traffic.
    *(("pipeline.h", "mbarrier.init", name) for name in ("skip", "wrong_count")),
}


def planted(ceiling):
    """(place for HARMLESS, what --fault takes) of each fault that a ceiling's kernel can have."""
    listed = run(*OP, "--ceiling", ceiling, "--sites")
    assert listed.returncode == 0, listed.stderr
    text = (ROOT / "csrc/kernels/ceilings_products_sm90.cuh").read_text().splitlines()
    begins = next(i for i, line in enumerate(text) if "void bring_traffic(" in line)
    ends = next(i for i, line in enumerate(text) if i > begins and line == "}")
    for fault in listed.stdout.splitlines():
        file, line, rest = fault.split(":", 2)
        instruction, name = rest.rsplit(":", 1)
        place = file.rsplit("/", 1)[1]
        if place.startswith("ceilings_products") and begins < int(line) - 1 < ends:
            place = "bring_traffic"
        yield (place, instruction, name), fault


@pytest.mark.parametrize("ceiling", JUDGED)
def test_planted_faults_are_noticed(ceiling):
    quiet, seen = set(), 0
    for place, fault in planted(ceiling):
        found = run(*OP, "--ceiling", ceiling, "--fault", fault)
        assert found.returncode != 2, found.stderr
        seen += found.returncode != 0
        if found.returncode == 0:
            quiet.add(place)
    assert seen >= 4
    assert quiet <= HARMLESS


@pytest.mark.parametrize("ceiling", JUDGED)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_are_content(variant, ceiling):
    rates("--resident-blocks", 4, "--ceiling", ceiling, variant=variant, timeout=170)


def test_address_sanitizer_names_a_sum_out_of_bounds():
    (fault,) = (
        fault
        for place, fault in planted("l2_own_loads")
        if place[1:] == ("st.global", "row_off") and ":36:" in fault
    )
    found = run(*OP, "--ceiling", "l2_own_loads", "--fault", fault, variant="asan")
    assert found.returncode == FOUND and "heap-buffer-overflow" in found.stderr


def test_the_page_says_what_is_predicted():
    page = (ROOT / "docs/gpu_record.md").read_text()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [\w ]+ \| ([\d., ]+) \| ", page, re.M)
    said = {}
    for names, values in rows:
        names, values = names.replace("`", "").split(", "), values.split(", ")
        values *= len(names) if len(values) == 1 else 1
        said |= dict(zip(names, map(float, values), strict=True))
    assert said == {name: one["predicted"] for name, one in rates().items()}
