"""The gates of the kernels that measure: each bites where what is measured is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import _cuda_rules as rules

READS = (
    "_ZN12resnet_fused21ceilings_reads_kernelILNS_7BroughtE{}ELi{}EEEvNS_20CeilingReadArgumentsE"
)
LOADS = "_ZN12resnet_fused21ceilings_loads_kernelENS_20CeilingLoadArgumentsE"
PRODUCTS = (
    "_ZN12resnet_fused24ceilings_products_kernelILi{}ELNS_8LeftSideE{}EEEvNS_"
    "23CeilingProductArgumentsE"
)
MEETINGS = (
    "_ZN12resnet_fused24ceilings_meetings_kernelILNS_7MeetingE{}EEEvNS_23CeilingMeetingArgumentsE"
)
READ = {"CS2R": 3, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 4, "LDS.128": 35}
CLUSTER = {"UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}
PRODUCT = {
    "CS2R": 67,
    "UTMALDG.2D": 13,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": 6,
    "USETMAXREG.DEALLOC.CTAPOOL": 2,
    "HGMMA.64x256x16.F32.BF16": 4,
    "WARPGROUP.DEPBAR.LE": 2,
}
CASES = {
    "ceilings_reads<rows>": (READS.format(0, 1), 38, READ | {"UTMALDG.2D": 1}),
    "ceilings_reads<rows for clusters of 4>": (
        READS.format(0, 4), 40, READ | CLUSTER | {"UTMALDG.2D.MULTICAST": 1},
    ),
    "ceilings_reads<piece>": (READS.format(1, 1), 38, READ | {"UBLKCP.S.G": 1}),
    "ceilings_loads": (LOADS, 31, {"CS2R": 2, "LDG.E.128": 4}),
    "ceilings_products<64x256 left in shared memory>": (PRODUCTS.format(256, 0), 168, PRODUCT),
    "ceilings_products<64x256 left in registers>": (
        PRODUCTS.format(256, 1), 168, PRODUCT | {"LDG.E": 16},
    ),
    "ceilings_meetings<grid>": (
        MEETINGS.format(0), 20,
        {"CS2R": 3, "REDG.E.ADD.STRONG.GPU": 1, "LDG.E.STRONG.GPU": 2, "NANOSLEEP": 1},
    ),
    "ceilings_meetings<cluster>": (
        MEETINGS.format(1), 16, {"CS2R": 2, "UCGABAR_ARV": 3, "UCGABAR_WAIT": 3},
    ),
}  # fmt: skip
"""What ptxas 13.0 makes of them."""


@pytest.mark.parametrize("short", CASES)
def test_what_is_measured_is_there(short):
    name, registers, code = CASES[short]
    assert rules.short_name(name) == short
    assert rules.Kernel(name, "90a", registers, instructions=dict(code)).failures() == []
    assert rules.Kernel(name, "80", registers, instructions=dict(code)).failures()
    (failure,) = rules.Kernel(name, "90a", 200, instructions=dict(code)).failures()
    assert "200 registers, at most" in failure
    for opcode in code:
        found = rules.Kernel(name, "90a", registers, instructions=code | {opcode: 0}).failures()
        assert found and all(sentence.startswith("0 ") for sentence in found), opcode


def test_products_that_are_made_twice_or_names_that_say_nothing_are_told():
    name, registers, code = CASES["ceilings_products<64x256 left in shared memory>"]
    twice = rules.Kernel(
        name, "90a", registers, instructions=code | {"HGMMA.64x256x16.F32.BF16": 8}
    )
    assert any(sentence.startswith("8 ") for sentence in twice.failures())
    for odd in (READS, PRODUCTS, MEETINGS):
        mangled = odd.format("x", "y")
        assert "its name spells no" in rules.Kernel(mangled, "90a", 8).failures()[0]


LAUNCH = "_ZN12resnet_fused22ceilings_launch_kernelEPj"


def test_a_kernel_of_the_chain_waits_for_the_one_ahead():
    rule = rules.rule_of(LAUNCH)
    assert rule is not None and not rule.brings and not rule.constants
