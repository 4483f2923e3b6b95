"""tools/gates.py on conv_bn_stats of an image: what it catches in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import _cuda_rules as rules

NAME = (
    "_ZN12resnet_fused26conv_bn_stats_image_kernelINS_8BFloat16ENS_16ImageWindowShapeILi128ELi64E"
    "Li2ELi2ELi4EEEEEvNS_19ImageStatsArgumentsE"
)
CODE = {
    "HMMA.16816.F32.BF16": 32, "LDSM.16.M88.4": 12, "LDG.E.U16.CONSTANT": 56, "STS.128": 7,
    "SHFL.BFLY": 48, "ATOM.E.ADD.STRONG.GPU": 2, "DFMA": 2,
}  # fmt: skip


def failures(name=NAME, arch="80", registers=128, **code):
    counts = CODE | {key.replace("_", "."): count for key, count in code.items()}
    return rules.Kernel(name, arch, registers, instructions=counts).failures()


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"registers": 129}, "129 registers, at most 128"),
        ({"name": NAME.replace("Li4E", "Li5E")}, "128 registers, at most 96"),
        ({"name": NAME.replace("WindowShape", "Shape")}, "its name spells no configuration"),
        ({"HMMA_16816_F32_BF16": 31}, "31 HMMA"),
        ({"LDSM_16_M88_4": 11}, "11 LDSM"),
        ({"LDG_E_U16_CONSTANT": 55}, "55 LDG"),
        ({"STS_128": 6}, "6 STS"),
        ({"SHFL_BFLY": 47}, "47 SHFL"),
        ({"ATOM_E_ADD_STRONG_GPU": 1}, "1 ATOM"),
        ({"DFMA": 1}, "1 DFMA"),
        ({"STL": 1}, "1 LDL or STL"),
    ],
    ids=str,
)
def test_it_is_held_to_its_instructions(planted, words):
    assert failures() == [] and failures(arch="90a") == []
    (failure,) = failures(**planted)
    assert words in failure


def test_its_name_in_words():
    assert rules.short_name(NAME) == "conv_bn_stats_image<BFloat16>"
