"""resnet_fused_driver, emulated: its command line, its checks, and what sanitizers find with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time

import emulated
import pytest

pytestmark = pytest.mark.emulated

FOUND = 66  # a sanitizer's exit status
SLACK = 2  # seconds for a machine that does other things too
WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "proof"


def run(*options, variant="plain", timeout=60):
    """Runs the driver; skips where that variant is not built."""
    reason = emulated.why_not("driver", variant)
    if reason and emulated.required() and (variant == "plain" or WHOLE):
        pytest.fail(reason)
    if reason:
        pytest.skip(f"{reason}, or make proof for {variant}")
    command = [emulated.builder.output("driver", variant), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def sites(*options):
    """(end of the file's path, line, instruction, fault) of every call that can be faulty."""
    listed = run(*options, "--sites")
    assert listed.returncode == 0, listed.stderr
    return [tuple(line.rsplit(":", 3)) for line in listed.stdout.splitlines()]


def fault(instruction, name, *options):
    """The first call of an instruction with a fault, as --fault takes it."""
    return ":".join(
        next(s for s in sites(*options) if s[2].startswith(instruction) and s[3] == name)
    )


BN_ACT = ("--op", "bn_act")
CONV, DGRAD, WGRAD = (
    ("--op", op, "--h", 9, "--w", 9) for op in ("conv_bn_act", "conv_dgrad", "conv_wgrad")
)
CHAIN = ("--op", "conv_chain", "--h", 9, "--w", 9, "--c", 24, "--k", 40)
OPS = {op[1]: op for op in (BN_ACT, CONV, DGRAD, WGRAD)}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
convolutions = pytest.mark.parametrize("op", [CONV, DGRAD, WGRAD], ids=lambda op: op[1])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_bn_act_is_right(dtype, data, layout):
    shape = ("--n", 2, "--c", 24, "--h", 5, "--w", 8)
    found = run(*BN_ACT, "--dtype", dtype, "--data", data, "--layout", layout, "--residual", *shape)
    record = json.loads(found.stdout)
    assert found.returncode == 0, record
    assert record["elements"] == 2 * 24 * 5 * 8
    assert record["wrong"] == 0
    assert record["worst"] == 0 if data == "integers" else 0.05 < record["worst"] <= 1


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options",
    [
        ("--stride", 2, "--residual"),
        ("--groups", 4, "--dilation", 2, "--padding", 2, "--act", "none"),
        ("--r", 1, "--s", 1, "--padding", 0, "--configuration", "64x64_4w4s", "--splits", 1),
        ("--c", 3, "--k", 5, "--layout", "nchw"),
        ("--c", 64, "--splits", 3, "--asynchrony", "lazy", "--order", "reverse"),
        ("--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conv_bn_act_is_right(dtype, options, data):
    found = run(*CONV, "--dtype", dtype, "--data", data, *options)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record["elements"] > 0
    assert record["wrong"] == 0
    assert record["worst"] == 0 if data == "integers" else 0.005 < record["worst"] <= 1


FP8 = ("--op", "conv_bn_act_fp8", "--h", 9, "--w", 9)


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options",
    [
        ("--stride", 2, "--residual"),
        ("--groups", 2, "--c", 256, "--k", 64, "--dilation", 2, "--padding", 2, "--act", "none"),
        ("--residual", "--k", 144, "--configuration", "tma_p128x128_6s"),
        ("--r", 1, "--s", 1, "--padding", 0, "--configuration", "tma_s192x128_4s"),
        ("--c", 160, "--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled"),
        ("--c", 64, "--k", 128, "--residual", "--configuration", "tma_win96x64_2w"),
    ],
)
@pytest.mark.parametrize("out", [("--quantised",), ("--dtype", "float16"), ()])
def test_conv_bn_act_fp8_is_right(out, options, data):
    found = run(*FP8, "--data", data, *out, *options)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record.get("out") == ("float8_e4m3fn" if "--quantised" in out else None)
    assert record["elements"] > 0
    assert record["wrong"] == 0
    assert record["worst"] == 0 if data == "integers" else 0.5 < record["worst"] <= 1


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("wgmma.e4m3", "stale_accumulator"),
        ("wgmma.a", "chunk_off"),
        ("st.shared", "skip"),
        ("cp.async.bulk.tensor.store", "skip"),
    ],
)
def test_wrong_numbers_in_e4m3_are_counted(instruction, name, data):
    options = (*FP8, "--quantised", "--residual", "--data", data)
    found = run(*options, "--fault", fault(instruction, name, *options))
    record = json.loads(found.stdout)
    assert found.returncode == 1
    assert record["wrong"] > 0
    assert record["worst"] is None or record["worst"] > 1


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize("out", [("--quantised",), ()])
def test_sanitizers_are_content_with_e4m3(out, variant):
    found = run(*FP8, "--residual", *out, variant=variant, timeout=170)
    assert (found.returncode, found.stderr) == (0, "")


STEM = ("--op", "stem", "--c", 3, "--r", 7, "--s", 7, "--stride", 2, "--padding", 3)


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options",
    [
        (*STEM, "--h", 15, "--w", 40, "--configuration", "14x64_4w", "--splits", 2),
        (*STEM, "--c", 4, "--k", 5, "--layout", "nchw", "--asynchrony", "lazy"),
        (*STEM, "--rounding", "toward_zero", "--order", "shuffled"),
        (*STEM, "--quantised", "--h", 15, "--w", 40, "--configuration", "14x64_4w"),
        (*STEM, "--quantised", "--k", 45, "--rounding", "toward_zero", "--asynchrony", "lazy"),
        ("--op", "head", "--c", 200, "--k", 45, "--h", 7, "--w", 7),
        ("--op", "head", "--layout", "nchw", "--configuration", "64x32_4w", "--order", "reverse"),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_ends_of_the_network_are_right(dtype, options, data):
    found = run(*options, "--dtype", dtype, "--data", data)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record["elements"] > 0
    assert record["wrong"] == 0
    assert record["worst"] == 0 if data == "integers" else 0.005 < record["worst"] <= 1


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options", [STEM, (*STEM, "--quantised"), ("--op", "head")], ids=["stem", "e4m3", "head"]
)
def test_wrong_numbers_of_the_ends_are_counted(options, data):
    found = run(*options, "--data", data, "--fault", fault("st.global", "skip", *options))
    assert found.returncode == 1
    assert json.loads(found.stdout)["wrong"] > 0
    found = run(*options, "--data", data, "--fault", fault("mma", "stale_accumulator", *options))
    assert found.returncode == 1


CHAIN_FP8 = ("--op", "conv_chain_fp8", "--quantised", "--h", 9, "--w", 9, "--c", 48, "--k", 80)
EARLY = {op[1]: op for op in (CONV, FP8, BN_ACT, CHAIN, CHAIN_FP8, STEM, ("--op", "head"))}
begin_early = pytest.mark.parametrize("op", EARLY.values(), ids=EARLY)


@begin_early
def test_a_launch_that_begins_early_is_right(op):
    for options in ((), ("--data", "normals", "--asynchrony", "lazy", "--order", "reverse")):
        found = run(*op, "--early", *options)
        assert found.returncode == 0, found
        assert json.loads(found.stdout)["wrong"] == 0


@begin_early
def test_a_launch_that_begins_early_and_does_not_wait_is_told(op):
    planted = fault("griddepcontrol.wait", "skip", *op, "--early")
    found = run(*op, "--early", "--fault", planted)
    assert found.returncode == 3 and "griddepcontrol.wait" in found.stderr
    assert run(*op, "--fault", planted).returncode == 0  # it has nothing to wait for


def test_gradients_do_not_begin_early():
    found = run(*DGRAD, "--early")
    assert found.returncode == 2
    chains = ["conv_chain", "conv_chain_fp8"]
    names = ", ".join(["conv_bn_act", "conv_bn_act_fp8", "bn_act", *chains, "stem", "head"])
    assert found.stderr == f"error: --early: conv_dgrad does not begin early; {names} do\n"
    assert names in run("--help").stdout


@pytest.mark.parametrize("data", ["integers", "normals"])
@pytest.mark.parametrize(
    "options",
    [
        ("--stride", 2),
        ("--stride", 3, "--padding", 0, "--act", "none", "--layout", "nchw"),
        ("--groups", 4, "--dilation", 2, "--padding", 2, "--act", "none"),
        ("--r", 1, "--s", 1, "--padding", 0, "--configuration", "64x64_4w3s", "--splits", 1),
        ("--c", 3, "--k", 5, "--layout", "nchw"),
        ("--c", 3, "--k", 5, "--splits", 2, "--resident-blocks", 2),
        ("--splits", 3, "--asynchrony", "lazy", "--order", "reverse", "--resident-blocks", 4),
        ("--rounding", "toward_zero", "--asynchrony", "random", "--order", "shuffled"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("op", [DGRAD, WGRAD], ids=["conv_dgrad", "conv_wgrad"])
def test_gradients_are_right(op, dtype, options, data):
    found = run(*op, "--dtype", dtype, "--data", data, *options)
    assert found.returncode == 0, found
    record = json.loads(found.stdout)
    assert record["elements"] > 0
    assert record["wrong"] == 0
    assert record["worst"] == 0 if data == "integers" else 0.05 < record["worst"] <= 1


def test_no_images():
    """Nothing is launched: dx is empty, and dweight the zeros that the caller writes."""
    for op, elements in ((CONV, 0), (DGRAD, 0), (WGRAD, 32 * 32 * 9)):
        found = run(*op, "--n", 0)
        assert found.returncode == 0, found
        record = json.loads(found.stdout)
        assert (record["elements"], record["wrong"]) == (elements, 0)
        assert "nothing is launched" in record["plan"]


@every_op
def test_wrong_numbers_are_counted(op):
    options = (*op, "--dtype", "float32", "--splits", 1)
    if op is CONV:  # TMA stores what it brings
        options = (*options, "--configuration", "64x64_4w4s")
    found = run(*options, "--fault", fault("st.global", "skip", *options))
    record = json.loads(found.stdout)
    assert found.returncode == 1
    assert record["wrong"] == record["elements"] > 0
    assert record["worst"] is None  # NaN, as the output was filled


@convolutions
def test_partial_sums_that_are_not_written_are_counted(op):
    """The workspace holds NaN before a call, too."""
    options = (*op, "--splits", 2)
    found = run(*options, "--fault", fault("st.global", "skip", *options))
    record = json.loads(found.stdout)
    assert found.returncode == 1
    assert record["wrong"] == record["elements"] > 0
    assert record["worst"] is None


@convolutions
def test_wrong_sums_are_beyond_the_bound(op):
    planted = fault("mma", "stale_accumulator", *op)
    found = run(*op, "--data", "normals", "--fault", planted)
    record = json.loads(found.stdout)
    assert found.returncode == 1
    assert record["wrong"] > record["elements"] // 2
    assert record["worst"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--op", "gemm"],
            "error: --op is 'gemm'; accepted are conv_bn_act, conv_bn_act_fp8, conv_dgrad, "
            "conv_wgrad, bn_act, conv_chain",
        ),
        (
            ["--configuration", "1x1"],
            "error: --configuration is '1x1'; accepted are auto, 256x128_8w4s",
        ),
        (["--op", "stem"], "the kernel is made for 7 x 7 with stride 2"),
        (["--op", "head", "--dtype", "float32"], "the kernels multiply bfloat16 and float16"),
        (
            ["--splits", "9", "--c", "8", "--r", "1", "--s", "1"],
            "error: no plan: no configuration serves it: its reduction has no such parts",
        ),
        *(
            (["--op", op, "--dtype", "float64"], f"{op} serves float32, float16 and bfloat16")
            for op in ("conv_bn_act", "conv_dgrad", "conv_wgrad")
        ),
        *(
            (
                ["--op", op, "--configuration", "1x1"],
                "error: --configuration is '1x1'; accepted are auto, 128x128_4w3s",
            )
            for op in ("conv_dgrad", "conv_wgrad")
        ),
        (
            ["--op", "conv_dgrad", "--splits", "9", "--k", "8", "--r", "1", "--s", "1"],
            "error: no plan: no configuration serves it: its reduction has no such parts",
        ),
        (
            ["--op", "conv_wgrad", "--splits", "9", "--n", "1", "--h", "3", "--w", "3"],
            "error: no plan: no configuration serves it: its reduction has no such parts",
        ),
        (
            ["--op", "conv_chain", "--dtype", "float32"],
            "error: --dtype is 'float32'; conv_chain serves float16 and bfloat16",
        ),
        (["--op", "conv_chain", "--layout", "nchw"], "error: no plan: x cannot be moved 16 bytes"),
        (["--op", "conv_chain", "--next", "264"], "264 channels of next, at most 256 fit"),
        (["--op", "network", "--depths", "1,"], "error: --depths is '1,'; numbers from 1 to 1000"),
        (["--op", "network", "--dtype", "float32"], "network serves float16 and bfloat16"),
        (["--op", "network", "--blocks", "265"], "265 blocks; from 1 to 264 are on this GPU"),
        (["--op", "network", "--c", "12"], "error: no plan: layer 0: "),
        (["--op", "network", "--early"], "error: --early: network does not begin early"),
        (["--op", "conv_bn_act_fp8", "--dtype", "float32"], "out: float32; float8_e4m3fn, "),
        (["--op", "conv_bn_act_fp8", "--c", "24"], "a multiple of 16 is accepted"),
        (["--op", "conv_chain_fp8"], "nothing but e4m3; give --quantised"),
        (["--op", "bn_act", "--quantised"], "error: --quantised: bn_act writes no e4m3"),
        (["--op", "conv_dgrad", "--residual"], "error: --residual: conv_dgrad takes none"),
        (["--op", "conv_wgrad", "--residual"], "error: --residual: conv_wgrad takes none"),
        (["--op", "conv_wgrad", "--r", "17"], "error: the filter is larger than the image"),
        (["--h", "2", "--r", "5", "--stride", "2"], "error: the filter is larger than the image"),
        (["--groups", "3"], "error: --groups divides"),
        (["--resident-blocks", "0"], "error: --resident-blocks is '0'; an integer of at least 1"),
        (["--n", "two"], "error: --n is 'two'; an integer of at least 0 is accepted"),
        (["--c", "0"], "error: --c is '0'; an integer of at least 1 is accepted"),
        (["--dtype=int8"], "accepted are float32, float64, float16, bfloat16"),
        (["--size", "3"], "error: there is no option --size; --help lists them"),
        (["fast"], "error: 'fast' is no option; give --name value"),
        (["--h"], "error: --h needs a value: input height"),
        (["--fault", "x"], "error: --fault is 'x'; FILE:LINE:INSTRUCTION:FAULT is accepted"),
        (["--fault", "x.cuh:1:st.global:typo"], "error: --fault: "),
    ],
)
def test_a_bad_command_line_is_named(options, message):
    found = run(*options)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stdout == ""


def test_help_names_every_option():
    found = run("--help")
    assert found.returncode == 0
    for word in (
        "--op",
        "--dtype",
        "--residual",
        "--asynchrony",
        "--resident-blocks",
        "--fault",
    ):
        assert f"  {word} " in found.stdout


@every_op
def test_address_sanitizer_names_the_line_of_a_store_out_of_bounds(op):
    planted = fault("st.global", "row_off", *op)
    file, line, *_ = planted.split(":")
    assert run(*op, variant="asan").returncode == 0
    found = run(*op, "--fault", planted, variant="asan")
    assert found.returncode == FOUND
    assert "heap-buffer-overflow" in found.stderr
    assert "WRITE of size " in found.stderr
    assert f"{file.rsplit('/', 1)[-1]}:{line}" in with_lines(found.stderr)


def with_lines(stack):
    """A stack of GCC's AddressSanitizer with the lines that its own reader leaves out."""
    program = emulated.builder.output("driver", "asan")
    addresses = re.findall(r"\(\S+/driver\+(0x[0-9a-f]+)\)", stack)
    tool = shutil.which("addr2line")
    assert tool is not None
    # A return address is behind the call.
    calls = [hex(int(address, 16) - 1) for address in addresses]
    command = [tool, "-i", "-e", program, *calls]
    return stack + subprocess.run(command, capture_output=True, text=True, check=True).stdout


def in_parts(op):
    """A tile or two, each in two parts; of few blocks, as fibers cost ThreadSanitizer much."""
    small = ("--c", 8, "--k", 8, "--splits", 2)
    if op is CONV:  # on sm_90 a cluster's blocks would meet in shared memory
        small += ("--configuration", "64x64_4w4s")
    return (*op, *small, "--r", 1, "--s", 1, "--padding", 0) if op is WGRAD else (*op, *small)


def raced(*options):
    """What ThreadSanitizer and the emulator say of a run that must not pass."""
    found = run(*options, variant="tsan", timeout=170)
    assert found.returncode != 0, found.stdout
    return found.stderr


@convolutions
def test_thread_sanitizer_is_content_and_finds_a_missing_barrier(op):
    assert run(*op, variant="tsan", timeout=170).returncode == 0
    planted = fault("bar.sync", "skip", *op)
    found = raced(*op, "--fault", planted, "--order", "reverse")
    assert "ThreadSanitizer: data race" in found or "error: " in found


@pytest.mark.parametrize(
    "schedule",
    [
        (),
        ("--resident-blocks", 2),
        ("--resident-blocks", 2, "--order", "reverse"),
        ("--resident-blocks", 2, "--order", "shuffled", "--asynchrony", "random"),
    ],
    ids=["one after another", "at once", "reversed", "shuffled"],
)
@convolutions
def test_thread_sanitizer_is_content_with_splits(op, schedule):
    found = run(*in_parts(op), *schedule, variant="tsan", timeout=170)
    assert (found.returncode, found.stderr) == (0, "")
    assert "2 splits" in json.loads(found.stdout)["plan"]


@pytest.mark.parametrize("resident", [1, 2])
@pytest.mark.parametrize(
    ("instruction", "name"), [("bar.sync", "skip"), ("atom.acq_rel", "no_fence")]
)
@pytest.mark.parametrize("op", [CONV, DGRAD], ids=["conv_bn_act", "conv_dgrad"])
def test_thread_sanitizer_finds_a_merge_without_order(op, instruction, name, resident):
    """Between the sums that blocks leave and the block that adds them up."""
    merging = [s for s in sites(*in_parts(op)) if s[0].endswith("split_reduction.h")]
    file, line, *planted = next(s for s in merging if s[2].startswith(instruction) and s[3] == name)
    options = ("--resident-blocks", resident, "--fault", ":".join((file, line, *planted)))
    found = raced(*in_parts(op), *options)
    assert "ThreadSanitizer: data race" in found
    assert "split_reduction.h" in found


@convolutions
def test_a_deadlock_is_reported_within_a_second(op):
    planted = fault("bar.sync", "wrong_barrier", *op)
    start = time.monotonic()
    found = run(*op, "--fault", planted, timeout=10)
    assert found.returncode == 3, found
    assert "wait" in found.stderr
    assert time.monotonic() - start < 1 + SLACK
