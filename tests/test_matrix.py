"""The matrix itself: nothing may drop out of it unnoticed."""

from __future__ import annotations

import emulated
import pytest
import torch
from matrix import DTYPES, cells, runs_interpreted

from resnet_fused import _extension, backends
from resnet_fused.ops import onednn

EXPECTED = {
    ("conv_bn_act", "cpu"): {torch.float32, torch.bfloat16},
    ("conv_bn_act", "cpu32"): {torch.float16},
    ("conv_bn_act", "split"): set(DTYPES),
    ("conv_bn_act", "reference"): set(DTYPES),
    ("conv_bn_act", "triton"): set(),
    ("conv_bn_act", "cuda"): set(),
    ("conv_bn_act", "cuda_emulated"): set(),
    ("conv_dgrad", "triton"): set(),
    ("conv_dgrad", "cuda"): set(),
    ("conv_dgrad", "cuda_emulated"): set(),
    ("conv_dgrad", "reference"): set(DTYPES),
    ("conv_wgrad", "triton"): set(),
    ("conv_wgrad", "cuda"): set(),
    ("conv_wgrad", "cuda_emulated"): set(),
    ("conv_wgrad", "reference"): set(DTYPES),
    ("bn_act", "cpu"): set(DTYPES),
    ("bn_act", "triton"): set(),
    ("bn_act", "cuda"): set(),
    ("bn_act", "reference"): set(DTYPES),
    ("bn_act", "cuda_emulated"): set(),
}
TRAINING = (
    "conv_bn_stats",
    "bn_finalize",
    "bn_update_stats",
    "bn_add_act",
    "bn_add_act_backward",
    "bn_backward_finalize",
    "bn_backward_apply",
    "conv_bn_dgrad",
    "conv_bn_wgrad",
    "bn_act_pool",
    "bn_act_pool_backward",
)
for op in TRAINING:
    EXPECTED[op, "reference"] = set(DTYPES)
    EXPECTED[op, "triton"] = set()
    EXPECTED[op, "cpu"] = set(DTYPES)
    if not op.startswith("conv"):
        EXPECTED[op, "cuda"] = EXPECTED[op, "cuda_emulated"] = set()
MERGED = ("bn_add_act_conv_stats", "conv_bn_grad1x1")
for op in ("conv_bn_stats", "conv_bn_dgrad", "conv_bn_wgrad", "conv_bn_dgrad_end", *MERGED):
    EXPECTED[op, "cuda"] = EXPECTED[op, "cuda_emulated"] = set()
for op in (*MERGED, "conv_bn_dgrad_end"):
    EXPECTED[op, "reference"] = set(DTYPES)
    EXPECTED[op, "triton"] = set()
EXPECTED["conv_bn_grad1x1_end", "reference"] = set(DTYPES)
for name in ("triton", "cuda", "cuda_emulated"):
    EXPECTED["conv_bn_grad1x1_end", name] = set()
for name in ("cuda", "cuda_emulated", "parts", "reference"):
    EXPECTED["conv_bn_stats_finalize", name] = set() if name.startswith("cuda") else set(DTYPES)
EXPECTED["conv_chain", "cuda"] = EXPECTED["conv_chain", "cuda_emulated"] = set()
for op in ("conv_chain", "stem", "head"):
    EXPECTED[op, "triton"] = set()
    EXPECTED[op, "parts"] = set(DTYPES)
    EXPECTED[op, "reference"] = set(DTYPES)
for name in ("triton", "cuda", "cuda_emulated", "reference"):
    EXPECTED["conv_bn_act_fp8", name] = set()  # e4m3
for name in ("cuda", "cuda_emulated", "parts", "reference"):
    EXPECTED["conv_chain_fp8", name] = set()
for op in ("stem", "head"):
    EXPECTED[op, "cuda"] = EXPECTED[op, "cuda_emulated"] = set()


@pytest.mark.op_matrix
def test_matrix_is_whole():
    """Each implementation serves on the CPU the dtypes that it is meant to."""
    served = {
        (entry.op, entry.name): {
            dtype
            for dtype in DTYPES
            if entry.supports(backends.Call(entry.op, "cpu", dtype)) is None
        }
        for entry in backends.implementations()
    }
    expected = dict(EXPECTED)
    if not _extension.available():
        compiled = [(op, name) for op, name in expected if name == "cpu" and op != "conv_bn_act"]
        for key in (*compiled, ("conv_bn_act", "split")):
            expected[key] = set()
    if not onednn.native_bfloat16():
        expected[("conv_bn_act", "cpu")] = {torch.float32}
        expected[("conv_bn_act", "cpu32")] = {torch.float16, torch.bfloat16}
    assert served == expected


@pytest.mark.interpreter
@pytest.mark.op_matrix
@pytest.mark.parametrize(
    "op",
    [
        "bn_act",
        "conv_bn_act",
        "conv_dgrad",
        "conv_wgrad",
        "conv_bn_dgrad_end",
        "conv_bn_grad1x1_end",
        *MERGED,
        *TRAINING,
    ],
)
def test_the_interpreter_takes_part(op):
    """In float32 and float16 (its bfloat16 is wrong), and only when it is asked for by name."""
    entry = next(entry for entry in backends.implementations(op) if entry.name == "triton")
    assert {d for d in DTYPES if runs_interpreted(entry, d)} == {torch.float32, torch.float16}
    assert sum(cell.values[0] is entry for cell in cells(op)) == 2
    reason = entry.supports(backends.Call(op, "cpu", torch.bfloat16))
    assert reason is not None
    assert backends.choose(backends.Call(op, "cpu", torch.float32)).implementation is not entry


@pytest.mark.op_matrix
@pytest.mark.parametrize("op", emulated.DTYPES)
def test_the_emulator_takes_part(op):
    """In every dtype of the CUDA kernels, and never in a user's call."""
    entry = next(e for e in backends.implementations(op) if e.name == emulated.NAME)
    known = (*DTYPES, torch.float8_e4m3fn)
    served = [cell.values[1] for cell in cells(op, known) if cell.values[0] is entry]
    assert tuple(served) == tuple(d for d in known if d in emulated.DTYPES[op]) != ()
    dtype = torch.float32 if served[0] in DTYPES else served[0]
    for word in backends.BACKENDS:
        with backends.backend(word):
            assert backends.choose(backends.Call(op, "cpu", dtype)).implementation != entry


@pytest.mark.op_matrix
def test_the_extension_is_there():
    """The suite is meant to run with the extension; without it half of the matrix is missing."""
    assert _extension.available(), _extension.why_not()


def test_every_refusal_has_a_reason():
    for entry in backends.implementations():
        for device in ("cpu", "cuda"):
            for dtype in (*DTYPES, torch.int8):
                reason = entry.supports(backends.Call(entry.op, device, dtype, grad=True))
                assert reason is None or len(reason) > 5


def test_a_second_implementation_of_the_same_name_is_refused():
    entry = next(e for e in backends.implementations("bn_act") if e.name == "reference")
    with pytest.raises(ValueError, match="bn_act has an implementation 'reference'"):
        backends.register(entry)
