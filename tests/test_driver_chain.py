"""The driver's chains of convolutions, in 16 bits and in e4m3."""

from __future__ import annotations

import json

import pytest
from test_driver import CHAIN, CHAIN_FP8, FOUND, fault, raced, run, with_lines

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--projected", 24, "--stride", 2, "--reverse"),
        ("--out-stride", 2, "--asynchrony", "lazy", "--order", "reverse"),
        ("--next", 0, "--configuration", "64x64_4w3s"),
        ("--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled"),
        ("--front", 40, "--asynchrony", "lazy"),
        ("--front", 8, "--projected", 24, "--out-stride", 2, "--next", 0),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conv_chain_is_right(dtype, options, data):
    found = run(*CHAIN, "--dtype", dtype, "--data", data, *options)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record["elements"] > 2 * 9 * 9 * 10
    assert record["wrong"] == 0
    assert record["worst"] == 0 if data == "integers" else 0.005 < record["worst"] <= 1


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options",
    [
        ("--n", 3, "--resident-blocks", 2),
        ("--projected", 48, "--reverse"),
        ("--out-stride", 2, "--asynchrony", "lazy", "--order", "reverse"),
        ("--k", 144, "--next", 112, "--act", "none"),
        ("--c", 128, "--next", 16, "--configuration", "tma_128x128_6s_k128"),
        ("--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled"),
    ],
)
def test_conv_chain_fp8_is_right(options, data):
    found = run(*CHAIN_FP8, "--data", data, *options)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record["out"] == "float8_e4m3fn"
    assert record["elements"] > 2 * 9 * 9 * 40
    assert record["wrong"] == 0
    assert record["worst"] == 0 if data == "integers" else 0.5 < record["worst"] <= 1


def test_a_fault_in_a_chain_is_told():
    planted = fault("mma", "stale_accumulator", *CHAIN)
    found = run(*CHAIN, "--fault", planted)
    assert found.returncode == 1 and json.loads(found.stdout)["wrong"] > 0


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    ("instruction", "name", "options"),
    [
        ("wgmma.e4m3", "stale_accumulator", ()),
        ("wgmma.e4m3", "stale_accumulator", ("--projected", 48)),
        ("wgmma.b", "chunk_off", ()),
        ("st.global", "skip", ("--out-stride", 2)),
        ("cp.async.bulk.tensor.store", "skip", ()),
    ],
)
def test_wrong_numbers_of_a_chain_in_e4m3_are_counted(instruction, name, options, data):
    options = (*CHAIN_FP8, *options, "--data", data)
    found = run(*options, "--fault", fault(instruction, name, *options))
    record = json.loads(found.stdout)
    assert found.returncode == 1
    assert record["wrong"] > 0
    assert record["worst"] is None or record["worst"] > 1


@pytest.mark.parametrize("options", [(), ("--projected", 48), ("--out-stride", 2)], ids=str)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_are_content_with_chains_in_e4m3(options, variant):
    found = run(*CHAIN_FP8, "--k", 80, *options, variant=variant, timeout=170)
    assert (found.returncode, found.stderr) == (0, "")


def test_address_sanitizer_names_the_line_of_a_chains_store_out_of_bounds():
    options = (*CHAIN_FP8, "--out-stride", 2)
    planted = fault("st.global", "row_off", *options)
    file, line, *_ = planted.split(":")
    found = run(*options, "--fault", planted, variant="asan")
    assert found.returncode == FOUND
    assert "heap-buffer-overflow" in found.stderr
    assert f"{file.rsplit('/', 1)[-1]}:{line}" in with_lines(found.stderr)


def test_thread_sanitizer_finds_a_chains_missing_barrier():
    planted = fault("bar.sync", "skip", *CHAIN_FP8)
    found = raced(*CHAIN_FP8, "--fault", planted, "--order", "reverse")
    assert "ThreadSanitizer: data race" in found or "error: " in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--c", 40), "error: no plan: x cannot be moved 16 bytes at a time"),
        (
            ("--c", 144, "--configuration", "tma_128x128_6s_k128"),
            "144 channels of x, at most 128 fit",
        ),
        (("--layout", "nchw"), "error: no plan: x cannot be moved 16 bytes at a time"),
        (("--projected", 16, "--stride", 2), "a projection of stride 2"),
    ],
)
def test_what_no_chain_in_e4m3_takes_is_named(options, message):
    found = run(*CHAIN_FP8, *options)
    assert found.returncode == 2
    assert message in found.stderr
