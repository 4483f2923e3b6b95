"""The driver's network: a ResNet's convolutions in one launch beside the same ones one by one."""

from __future__ import annotations

import json

import pytest
from test_driver import FOUND, raced, run, sites

pytestmark = pytest.mark.emulated

SMALL = ("--op", "network", "--n", 1, "--h", 5, "--w", 5, "--blocks", 6)
PARTS = (*SMALL, "--c", 64, "--k", 64, "--depths", 1, "--splits", 2)
"""Of each layer, parts that are handed over; no layer of it is without."""
CLUSTERS = (*PARTS, "--blocks", 8, "--cluster", 8)
"""Likewise, in shared memory."""
WHOLE = (*SMALL, "--c", 16, "--k", 8)


def planted(file, instruction, name, options=PARTS):
    """A fault of some options in a file, at the first call of an instruction."""
    found = (s for s in sites(*options) if s[0].endswith(file))
    return ":".join(next(s for s in found if s[2].startswith(instruction) and s[3] == name))


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options",
    [
        PARTS,
        (*PARTS, "--blocks", 1, "--asynchrony", "lazy", "--order", "reverse"),
        (*WHOLE, "--depths", "2,1,1", "--h", 12, "--n", 2),
        (*WHOLE, "--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled"),
        (*CLUSTERS, "--blocks", 16, "--pixels", 32, "--asynchrony", "lazy", "--order", "reverse"),
        (*CLUSTERS, "--cluster", 4, "--pixels", 64, "--asynchrony", "random"),
    ],
    ids=["parts", "one block", "three stages", "toward zero", "clusters of 8", "clusters of 4"],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_has_the_bits_of_its_layers_alone(dtype, options, data):
    found = run(*options, "--dtype", dtype, "--data", data)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record["differing"] == record["wrong"] == 0
    assert record["reference"] and record["counters_are_zeros"]
    assert record["elements"] > 0 and 0.1 < record["worst"] <= 1


def test_it_is_as_deep_as_it_is_told():
    record = json.loads(run(*WHOLE, "--depths", "3,4,6,3", "--h", 8, "--w", 8).stdout)
    assert record["layers"] == 52
    assert record["plan"].startswith("52 layers, 47 meetings of 6 blocks")


@pytest.mark.parametrize(
    ("file", "instruction", "name", "code"),
    [
        ("split_shares.h", "st.global", "skip", 1),  # sums: NaN of the workspace
        ("split_shares.h", "ld.global", "chunk_off", 1),
        ("split_shares.h", "red.release", "no_fence", 3),
        ("split_shares.h", "red.release", "skip", 3),
        ("network_walk.h", "ld.acquire", "no_fence", 3),
        ("network_walk.h", "st.global", "skip", 3),  # the next run finds old counts
        ("", "mma", "stale_accumulator", 1),  # both ways err alike: the reference sees it
    ],
)
def test_faults_are_told(file, instruction, name, code):
    found = run(*PARTS, "--fault", planted(file, instruction, name), timeout=20)
    assert found.returncode == code, found
    if code == 1:
        record = json.loads(found.stdout)
        assert record["wrong"] > 0
        assert (record["differing"] > 0) == bool(file)


@pytest.mark.parametrize(
    ("instruction", "name", "code"),
    [
        ("mapa", "wrong_lane", 1),
        ("st.shared", "skip", 3),  # sums that nobody has written
        ("barrier.cluster.arrive", "skip", 3),
        ("barrier.cluster.wait", "skip", 3),
    ],
)
def test_faults_of_clusters_are_told(instruction, name, code):
    fault = planted("split_cluster.h", instruction, name, CLUSTERS)
    found = run(*CLUSTERS, "--fault", fault, timeout=20)
    assert found.returncode == code, found
    if code == 1:
        record = json.loads(found.stdout)
        assert record["wrong"] > 0 and record["differing"] > 0


def test_it_goes_through_memory_or_by_clusters_as_it_is_told():
    for options, words in (
        (CLUSTERS, "of 8 blocks in clusters of 8 in 1"),
        ((*CLUSTERS, "--cluster", 1), "of 8 blocks in 1"),
        ((*CLUSTERS, "--cluster", 4), "of 8 blocks in clusters of 4"),
    ):
        assert words in json.loads(run(*options).stdout)["plan"]
    found = run(*CLUSTERS, "--cluster", 16)
    assert found.returncode == 2 and "clusters of 16 blocks; 4 and 8 are built" in found.stderr


def test_address_sanitizer_names_the_line_of_a_share_out_of_bounds():
    fault = planted("split_shares.h", "st.global", "row_off")
    assert run(*PARTS, variant="asan").returncode == 0
    found = run(*PARTS, "--fault", fault, variant="asan")
    assert found.returncode == FOUND
    assert "heap-buffer-overflow" in found.stderr


@pytest.mark.parametrize("options", [PARTS, CLUSTERS], ids=["memory", "clusters"])
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_thread_sanitizer_is_content(order, options):
    found = run(*options, "--order", order, variant="tsan", timeout=170)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "instruction", "name"),
    [
        ("split_shares.h", "red.release", "no_fence"),
        ("split_shares.h", "bar.sync", "skip"),
        ("network_walk.h", "ld.acquire", "no_fence"),
    ],
)
def test_thread_sanitizer_finds_blocks_that_do_not_wait(file, instruction, name):
    found = raced(*PARTS, "--fault", planted(file, instruction, name))
    assert "ThreadSanitizer: data race" in found
