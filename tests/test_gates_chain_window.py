"""The gates' rules for chains behind windows, on machine code that somebody has planted."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import _cuda_rules as rules

CHAIN_WINDOW = (
    "_ZN12resnet_fused24conv_chain_window_kernelINS_8BFloat16ENS_16ChainWindowShape"
    "ILi64ELi4ELi3ELNS_11NextFiltersE0ELi0EEEEEvNS_20ChainWindowArgumentsE"
)
CHAIN_WINDOW_CODE = {
    "HGMMA.64x64x16.F32.BF16": 52, "UTMALDG.4D": 9, "UTMALDG.2D": 10, "UTMALDG.4D.IM2COL": 4,
    "STG.E.128": 12, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 14, "STSM.16.M88.4": 12, "LDSM.16.M88.4": 8,
    "WARPGROUP.DEPBAR.LE": 4, "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip


def chain_by_window(name=CHAIN_WINDOW, arch="90a", registers=168, **code):
    counts = CHAIN_WINDOW_CODE | {key.replace("_", "."): count for key, count in code.items()}
    one = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, arch, registers, instructions=counts, early=one).failures()


def test_a_chain_behind_windows_is_held_to_its_instructions():
    assert chain_by_window() == []
    short = "conv_chain_window<BFloat16, windows, 64 to 64 3 stages behind 64>"
    assert rules.short_name(CHAIN_WINDOW) == short
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": CHAIN_WINDOW.replace("Li3E", "Li4E")}, "240640 bytes of shared memory, at most"),
        ({"HGMMA_64x64x16_F32_BF16": 51}, "51 HGMMA of 64 columns, expected 52"),
        ({"WARPGROUP_DEPBAR_LE": 5}, "5 waits for products, expected 4"),
        ({"UTMALDG_4D_IM2COL": 1}, "1 UTMALDG"),
        ({"UTMALDG_2D": 1}, "1 UTMALDG"),
        ({"STG_E_128": 11}, "11 STG.128, expected 12"),
        ({"STSM_16_M88_4": 11}, "11 STSM"),
        ({"LDSM_16_M88_4": 9}, "9 LDSM"),
        ({"SYNCS_PHASECHK_TRANS64_TRYWAIT": 5}, "5 SYNCS"),
        (
            {"name": CHAIN_WINDOW.replace("WindowShape", "Shape")},
            "its name spells no configuration",
        ),
    ):
        said = chain_by_window(**planted)
        assert any(words in one for one in said), (planted, said)


CHAIN_WINDOW_BROAD = CHAIN_WINDOW.replace("Li64ELi4ELi3E", "Li128ELi4ELi2E").replace("E0E", "E1E")
CHAIN_WINDOW_PROJECTING = CHAIN_WINDOW.replace(
    "Li3ELNS_11NextFiltersE0ELi0", "Li2ELNS_11NextFiltersE1ELi64"
)


def test_chains_behind_windows_that_stream_filters():
    """What differs: products, waits, and what is staged."""
    broad = {
        "name": CHAIN_WINDOW_BROAD, "HGMMA_64x64x16_F32_BF16": 44, "HGMMA_64x128x16_F32_BF16": 8,
        "WARPGROUP_DEPBAR_LE": 5, "STG_E_128": 16, "STSM_16_M88_4": 16,
    }  # fmt: skip
    projecting = {
        "name": CHAIN_WINDOW_PROJECTING, "HGMMA_64x64x16_F32_BF16": 60, "WARPGROUP_DEPBAR_LE": 5,
        "LDSM_16_M88_4": 0,
    }  # fmt: skip
    assert chain_by_window(**broad) == chain_by_window(**projecting) == []
    names = [rules.short_name(of["name"]) for of in (broad, projecting)]
    assert names == [
        "conv_chain_window<BFloat16, windows, 64 to 128 2 stages behind 64>",
        "conv_chain_window<BFloat16, windows, 64 to 64 2 stages behind 64 projecting 64>",
    ]
    for of, planted, words in (
        (broad, {"HGMMA_64x128x16_F32_BF16": 7}, "7 HGMMA of 128 columns, expected 8"),
        (broad, {"WARPGROUP_DEPBAR_LE": 4}, "4 waits for products, expected 5"),
        (broad, {"STG_E_128": 12}, "12 STG.128, expected 16"),
        (broad, {"name": broad["name"].replace("Li2E", "Li3E")}, "240640 bytes of shared memory"),
        (projecting, {"HGMMA_64x64x16_F32_BF16": 52}, "52 HGMMA of 64 columns, expected 60"),
        (projecting, {"LDSM_16_M88_4": 8}, "8 LDSM"),
        (projecting, {"UTMALDG_2D": 2}, "2 UTMALDG"),
        (projecting, {"name": projecting["name"].replace("Li2E", "Li3E")}, "234496 bytes"),
    ):
        said = chain_by_window(**of | planted)
        assert any(words in one for one in said), (planted, said)


CHAIN_STREAM = (
    "_ZN12resnet_fused24conv_chain_stream_kernelINS_8BFloat16ENS_16ChainStreamShape"
    "ILi128ELi8ELi7ELi3EEEEEvNS_20ChainWindowArgumentsE"
)
CHAIN_STREAM_CODE = {
    "HGMMA.64x64x16.F32.BF16": 16, "HGMMA.64x128x16.F32.BF16": 16, "UTMALDG.4D.MULTICAST": 8,
    "UTMALDG.2D.MULTICAST": 3, "UTMALDG.4D.IM2COL": 8, "STG.E.128": 16, "STSM.16.M88.4": 16,
    "LDSM.16.M88.4": 8, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 47, "WARPGROUP.DEPBAR.LE": 7,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "UCGABAR_ARV": 2,
    "UCGABAR_WAIT": 2,
}  # fmt: skip


def chain_by_stream(name=CHAIN_STREAM, arch="90a", registers=168, code=()):
    counts = CHAIN_STREAM_CODE | dict(code)
    one = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, arch, registers, instructions=counts, early=one).failures()


def test_chains_whose_filters_two_blocks_share():
    assert chain_by_stream() == []
    assert rules.short_name(CHAIN_STREAM) == (
        "conv_chain_stream<BFloat16, windows, 128 to 128 7 stages behind 128 shared filters>"
    )
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": CHAIN_STREAM.replace("Li7E", "Li8E")}, "236544 bytes of shared memory, at most"),
        ({"name": CHAIN_STREAM.replace("StreamShape", "Shape")}, "its name spells no"),
    ):
        assert any(words in one for one in chain_by_stream(**planted)), planted
    for opcode in CHAIN_STREAM_CODE:
        least = {"UTMALDG.4D.MULTICAST": 1, "UTMALDG.2D.MULTICAST": 2, "UTMALDG.4D.IM2COL": 1}
        fewer = least.get(opcode, min(CHAIN_STREAM_CODE[opcode] - 1, 8))
        said = chain_by_stream(code={opcode: fewer})
        assert len(said) == 1, (opcode, said)
