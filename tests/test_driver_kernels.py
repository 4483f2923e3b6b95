"""Which kernels the driver's calls for capability 9.0 come by: those that sanitizers look at."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from test_driver import sites

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu.driver import SM90A_CALLS  # noqa: E402

pytestmark = pytest.mark.emulated

ADDRESSES = "dynamic_shared|shared_address|tma_prefetch"


def test_every_kernel_by_tma_is_among_them():
    """Of files that are more than a shell around others."""
    called = {Path(place).name for call in SM90A_CALLS for place, *_ in sites(*call)}
    instruction = re.compile(rf"ptx::(?!{ADDRESSES})[a-z]\w+(<.+>)?\(")
    own = {
        path.name
        for path in (ROOT / "csrc/kernels").glob("*_sm90.cuh")
        if instruction.search(path.read_text()) and not path.name.startswith("ceilings_")
    }
    assert {"conv_chain_stream_sm90.cuh", "conv_bn_act_sm90.cuh"} < own
    assert own - called == set()
