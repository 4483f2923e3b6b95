"""The gates of a whole network's kernel in clusters: what they catch in its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import _cuda_network
import _cuda_rules as rules
import gates

# As ptxas 13.0 makes it.
NAME = (
    "_ZN12resnet_fused22network_cluster_kernelINS_8BFloat16ENS_12NetworkTilesINS_9TileShapeILi64E"
    "Li64ELi2ELi2ELi12ELi2EEEJNS3_ILi32ELi64ELi2ELi2ELi14ELi2EEEEEELNS_9LoadWidthE0EEEvNS_16"
    "NetworkArgumentsE"
)
CODE = {
    "HMMA.16816.F32.BF16": 24, "STS.64": 24, "LD.E.128": 40, "UCGABAR_ARV": 4, "UCGABAR_WAIT": 7,
    "LDGSTS.E.BYPASS.128": 26, "LDSM.16.M88.4": 19, "REDG.E.ADD.STRONG.GPU": 1,
    "LDG.E.STRONG.GPU": 6, "NANOSLEEP": 3, "CCTL.E.PF2": 3,
}  # fmt: skip


def failures(name=NAME, arch="90a", registers=255, **code):
    counts = CODE | {key.replace("__", "."): count for key, count in code.items()}
    return rules.Kernel(name, arch, registers, instructions=counts).failures()


def test_its_name_spells_both_tiles():
    network = _cuda_network.network_of(NAME)
    assert [(one.m, one.n, one.stages) for one in network.tiles] == [(64, 64, 12), (32, 64, 14)]
    assert network.shared == 12 * 128 * 64 + 64 * 64 * 4 == 114688
    assert rules.tile_of(NAME) is None
    assert rules.short_name(NAME) == "network_cluster<BFloat16, 64x64 12 stages, 32x64 14 stages>"
    assert "114688      2" in gates.row(rules.Kernel(NAME, "90a", 255, instructions=CODE))


def test_what_ptxas_makes_passes():
    assert failures() == []


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ({"arch": "100"}, "it is built for nothing else"),
        ({"registers": 256}, "256 registers, at most 256"),
        ({"name": NAME.replace("Li12E", "Li13E")}, "247808 bytes of shared memory for 2 blocks"),
        ({"name": "_ZN12resnet_fused22network_cluster_kernelIv"}, "spells no configuration"),
        ({"HMMA__16816__F32__BF16": 40}, "40 HMMA.*, expected 24"),
        ({"STS__64": 16}, "expected 24"),
        ({"LD__E__128": 24}, "expected 40"),
        ({"UCGABAR_ARV": 3}, "3 UCGABAR_ARV, expected 4"),
        ({"UCGABAR_WAIT": 4}, "4 UCGABAR_WAIT, at least 5"),
        ({"LDGSTS__E__BYPASS__128": 7}, "7 LDGSTS.128, at least 8"),
        ({"LDSM__16__M88__4": 3}, "at least 4"),
        ({"REDG__E__ADD__STRONG__GPU": 0}, "0 RED"),
        ({"LDG__E__STRONG__GPU": 0}, "0 LDG"),
        ({"NANOSLEEP": 0}, "0 NANOSLEEP"),
        ({"CCTL__E__PF2": 0}, "0 CCTL"),
    ],
    ids=str,
)
def test_its_gates_bite(planted, words):
    found = failures(**planted)
    assert any(words in said for said in found), found
