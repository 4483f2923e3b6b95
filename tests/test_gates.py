"""tools/gates.py and tools/strict_nvcc.py: what they catch in machine code and in ptxas's words."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

import _cuda_rules as rules  # noqa: E402  (it lies in tools/)
from _cuda_resident import most_registers  # noqa: E402

SHAPE = "NS_9TileShapeILi128ELi64ELi2ELi2ELi4ELi3EEE"
CONV = f"_ZN12resnet_fused18conv_bn_act_kernelINS_8BFloat16E{SHAPE}LNS_9LoadWidthE0EEEvNS_1AE"
THREE = SHAPE.replace("Li4ELi3E", "Li3ELi3E")
MASKED = CONV.replace("18conv_bn_act", "17conv_dgrad").replace(SHAPE, f"NS_11MaskedShapeI{THREE}EE")
BN_ACT = "_ZN12resnet_fused20bn_act_vector_kernelINS_8BFloat16ELb1ELNS_11ChannelAxisE1EEEvNS_9B"
GOOD = {"HMMA.16816.F32.BF16": 32, "LDGSTS.E.BYPASS.128": 6, "LDSM.16.M88.4": 8, "STG.E.128": 4}


def conv(**changes):
    return dataclasses.replace(rules.Kernel(CONV, "80", 168, instructions=dict(GOOD)), **changes)


def test_a_kernel_as_it_should_be_passes():
    assert conv().failures() == []
    assert conv(name=MASKED, arch="90a").failures() == []
    code = {"LDG.E.128.CONSTANT": 8, "STG.E.128": 4}
    assert rules.Kernel(BN_ACT, "80", 64, instructions=code).failures() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"registers": 169}, "169 registers, at most 168"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 16}, "16 bytes of local memory"),
        ({"instructions": GOOD | {"STL.64": 2, "LDL": 1}}, "3 LDL or STL"),
        ({"instructions": GOOD | {"HMMA.16816.F32.BF16": 31}}, "31 HMMA, at least 32"),
        ({"instructions": GOOD | {"LDGSTS.E.BYPASS.128": 0, "LDGSTS.E": 9}}, "0 LDGSTS.128"),
        ({"instructions": GOOD | {"LDSM.16.M88.4": 1}}, "1 LDSM, at least 2"),
        (
            {"name": CONV.replace("Li4ELi3E", "Li6ELi3E")},
            "224256 bytes of shared memory for 3 blocks, at most 167936",
        ),
        ({"name": "_ZN12resnet_fused9my_kernelEv"}, "no rule in tools/_cuda_rules.py names"),
        ({"name": CONV.replace("TileShape", "Shape")}, "its name spells no configuration"),
    ],
)
def test_what_is_planted_is_caught(changes, words):
    (failure,) = conv(**changes).failures()
    assert words in failure


TMA = (
    "_ZN12resnet_fused22conv_bn_act_tma_kernelINS_8BFloat16ENS_14WarpgroupShapeILNS_11OrientationE0"
    "ELNS_9ConsumersE0ELi128ELi256ELi3ELi1ELi1EEEEEvNS_16ConvTmaArgumentsE"
)
TURNS = TMA.replace("OrientationE0", "OrientationE1").replace("ConsumersE0", "ConsumersE1")
TURNS = TURNS.replace("Li128ELi256ELi3E", "Li256ELi64ELi4E")
SHARED = TMA.replace("Li3ELi1E", "Li3ELi2E")
SHARED_PIXELS = TURNS.replace("ELi4ELi1ELi1E", "ELi4ELi1ELi4E")
TMA_CODE = {
    "HGMMA.64x256x16.F32.BF16": 4, "UTMALDG.4D": 2, "UTMALDG.2D": 1, "UTMALDG.4D.IM2COL": 1,
    "UTMALDG.3D": 4, "UTMASTG.3D": 4, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 8, "STSM.16.M88.4": 32,
    "LDSM.16.M88.4": 16, "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip


def by_tma(name=TMA, arch="90a", registers=168, **code):
    counts = TMA_CODE | {key.replace("_", "."): count for key, count in code.items()}
    one = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, arch, registers, instructions=counts, early=one).failures()


def test_a_kernel_for_sm_90a_is_held_to_its_instructions():
    assert by_tma() == []
    assert by_tma(name=TURNS, UTMALDG_3D=1, UTMASTG_3D=1) == []
    shared = {"UTMALDG_4D_MULTICAST": 2, "UTMALDG_4D": 0, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}
    assert by_tma(name=SHARED, **shared) == []
    pixels = {
        "UTMALDG_2D_MULTICAST": 1, "UTMALDG_4D_IM2COL_MULTICAST": 1, "UTMALDG_2D": 0,
        "UTMALDG_4D_IM2COL": 0, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2,
    }  # fmt: skip
    assert by_tma(name=SHARED_PIXELS, **pixels) == []
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": TMA.replace("ELi3E", "ELi4E")}, "266336 bytes of shared memory, at most 232448"),
        ({"UTMALDG_4D_IM2COL": 0}, "0 UTMALDG"),
        ({"UTMASTG_3D": 3}, "3 UTMASTG.*, at least 4"),
        ({"STSM_16_M88_4": 31}, "31 STSM"),
        ({"SYNCS_PHASECHK_TRANS64_TRYWAIT": 3}, "3 SYNCS"),
        ({"name": TMA.replace("Li256E", "Li128E")}, "0 HGMMA of 128 columns, expected 4"),
        ({"name": TMA.replace("Warpgroup", "")}, "its name spells no configuration"),
        ({"name": SHARED}, "0 UTMALDG"),
        ({**pixels, "name": SHARED_PIXELS, "UTMALDG_2D_MULTICAST": 0}, "0 UTMALDG"),
        ({**pixels, "name": SHARED_PIXELS, "UCGABAR_ARV": 1}, "1 UCGABAR.ARV"),
        ({"name": SHARED_PIXELS}, "0 UTMALDG"),
        ({"name": SHARED, "UTMALDG_4D_MULTICAST": 2, "UCGABAR_WAIT": 2}, "0 UCGABAR.ARV"),
    ):
        assert any(words in said for said in by_tma(**planted)), planted


CLUSTER = (
    "_ZN12resnet_fused26conv_bn_act_cluster_kernelINS_8BFloat16ENS_12ClusterShapeILi56ELi6EEELi4E"
    "EEvNS_20ConvClusterArgumentsE"
)
CLUSTER_CODE = {
    "HGMMA.64x56x16.F32.BF16": 4, "UTMALDG.4D": 2, "UTMALDG.2D": 1, "UTMALDG.4D.IM2COL": 1,
    "STS": 28, "LD.E.128": 8, "STG.E.64": 2, "WARPGROUP.DEPBAR.LE": 2, "UCGABAR_ARV": 2,
    "UCGABAR_WAIT": 2, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 6,
}  # fmt: skip


def by_cluster(name=CLUSTER, arch="90a", registers=76, **code):
    one = rules.Early(waits=1, triggers=1, constants=1)
    counts = CLUSTER_CODE | {key.replace("_", "."): count for key, count in code.items()}
    return rules.Kernel(name, arch, registers, instructions=counts, early=one).failures()


def test_the_cluster_kernel_is_held_to_its_instructions():
    assert by_cluster() == []
    said = rules.short_name(CLUSTER)
    assert said == "conv_bn_act_cluster<BFloat16, 56x64 6 stages, clusters of 4>"
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 201}, "201 registers, at most 200"),
        ({"name": CLUSTER.replace("Li6E", "Li8E")}, "123008 bytes of shared memory, at most"),
        ({"name": CLUSTER.replace("Li56E", "Li112E")}, "0 HGMMA"),
        ({"name": CLUSTER.replace("EEELi4E", "EEELi2E")}, "2 STG"),
        ({"HGMMA_64x56x16_F32_BF16": 8}, "8 HGMMA"),
        ({"LD_E_128": 7}, "7 LD"),
        ({"STS": 56}, "56 STS, expected 28"),
        ({"STG_E_64": 1}, "1 STG"),
        ({"UTMALDG_4D_IM2COL": 0}, "0 UTMALDG"),
        ({"SYNCS_PHASECHK_TRANS64_TRYWAIT": 2}, "2 SYNCS"),
        ({"name": CLUSTER.replace("ClusterShape", "Shape")}, "its name spells no configuration"),
    ):
        assert any(words in said for said in by_cluster(**planted)), (
            planted,
            by_cluster(**planted),
        )


STEM = (
    "_ZN12resnet_fused11stem_kernelINS_8BFloat16ENS_9StemShapeILi4ELi2ELi1EEEEEvNS_13StemArgumentsE"
)
MEAN = "_ZN12resnet_fused16head_mean_kernelINS_7Float16ELb1EEEvNS_13HeadArgumentsE"
LINEAR = (
    "_ZN12resnet_fused18head_linear_kernelINS_8BFloat16ENS_9HeadShapeILi4ELi4ELi4EEELb1EEEvNS_"
    "13HeadArgumentsE"
)
STEM_E4M3 = STEM.replace("NS_9Stem", "NS_10Float8E4M3ENS_9Stem")
STEM_CODE = {"HMMA.16816.F32.BF16": 112, "LDSM.16.M88.4": 49}
ENDS = {
    STEM: ("90a", 254, STEM_CODE | {"F2FP.BF16.F32.PACK_AB": 36, "STG.E.128": 2}),
    STEM_E4M3: (
        "90a",
        254,
        STEM_CODE
        | {
            "STG.E.64": 2,
            "F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C": 16,
            "F2FP.F16.E4M3.UNPACK_B": 16,
        },
    ),
    MEAN: ("80", 61, {"LDG.E.128.CONSTANT": 4, "STG.E.128": 1}),
    LINEAR: ("80", 152, {"HMMA.16816.F32.BF16": 96, "LDG.E.128": 36}),
}
SHORT = {
    STEM: "stem<BFloat16, 4x2x1>",
    STEM_E4M3: "stem<BFloat16, to E4M3, 4x2x1>",
    MEAN: "head_mean<Float16, wide>",
    LINEAR: "head_linear<BFloat16, 4x4x4, wide>",
}


@pytest.mark.parametrize("name", ENDS)
def test_the_ends_of_the_network_have_rules_that_bite(name):
    arch, registers, code = ENDS[name]
    assert rules.Kernel(name, arch, registers, instructions=dict(code)).failures() == []
    assert rules.short_name(name) == SHORT[name]
    (failure,) = rules.Kernel(name, arch, 256, instructions=dict(code)).failures()
    assert "256 registers, at most" in failure
    for opcode in code:
        (failure,) = rules.Kernel(name, arch, registers, instructions=code | {opcode: 0}).failures()
        assert f"0 {opcode.split('.')[0]}" in failure
    if "Shape" in name:
        odd = rules.Kernel(name.replace("Shape", "Form"), arch, registers, instructions=dict(code))
        assert odd.failures() == ["its name spells no configuration"]


def test_a_stem_is_empty_where_nothing_converts_to_e4m3():
    for arch in ("80", "86"):
        assert rules.Kernel(STEM_E4M3, arch, 4, instructions={"EXIT": 1}).failures() == []
        assert rules.Kernel(STEM_E4M3, arch, 4, instructions={"STG.E.64": 1}).failures()
    assert rules.Kernel(STEM_E4M3, "89", 4, instructions={"EXIT": 1}).failures()


NETWORK = (
    "_ZN12resnet_fused14network_kernelINS_8BFloat16ENS_9TileShapeILi64ELi64ELi2ELi2ELi4ELi4EEE"
    "LNS_9LoadWidthE0EEEvNS_16NetworkArgumentsE"
)
MEETS = {
    "RED.E.ADD.STRONG.GPU": 1,
    "LDG.E.STRONG.GPU": 4,
    "NANOSLEEP": 2,
    "CCTL.E.PF2": 2,
}


def test_a_network_s_blocks_meet():
    code = GOOD | MEETS
    assert rules.Kernel(NETWORK, "90a", 128, instructions=code).failures() == []
    assert rules.short_name(NETWORK) == "network<BFloat16, 64x64 4 warps 4 stages>"
    for opcode in code:
        if opcode == "STG.E.128":
            continue
        (failure,) = rules.Kernel(NETWORK, "80", 125, instructions=code | {opcode: 0}).failures()
        assert f"0 {opcode.split('.')[0]}" in failure


@pytest.mark.parametrize("op", ["conv_wgrad", "conv_bn_wgrad"])
def test_float_operands_across_the_reduction_are_loaded_plainly(op):
    name = CONV.replace("conv_bn_act_kernelINS_8BFloat16E", f"{op}_kernelIf")
    assert name != CONV
    (failure,) = conv(name=name).failures()
    assert "0 LDS, at least 2" in failure
    assert conv(name=name, instructions=GOOD | {"LDS": 8}).failures() == []


CHAIN = (
    "_ZN12resnet_fused17conv_chain_kernelINS_8BFloat16E"
    "NS_10ChainShapeILi128ELi64ELi4ELi3ELi2ELi0EEEE"
)
CHAINED = {"HMMA.16816.F32.BF16": 64, "LDGSTS.E.BYPASS.128": 9, "LDSM.16.M88.4": 20, "STG.E.128": 8}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"registers": 257}, "257 registers, at most 256"),
        ({"instructions": CHAINED | {"HMMA.16816.F32.BF16": 63}}, "63 HMMA, at least 64"),
        ({"instructions": CHAINED | {"LDGSTS.E.BYPASS.128": 3}}, "3 LDGSTS.128, at least 4"),
        ({"instructions": CHAINED | {"LDSM.16.M88.4": 7}}, "7 LDSM, at least 8"),
        ({"instructions": CHAINED | {"STG.E.128": 3}}, "3 STG.128, at least 4"),
        ({"name": CHAIN.replace("ChainShape", "Shape")}, "its name spells no configuration"),
    ],
)
def test_a_chain_is_held_to_its_products(changes, words):
    good = rules.Kernel(CHAIN, "80", 193, instructions=dict(CHAINED))
    assert good.failures() == []
    assert rules.short_name(CHAIN) == "conv_chain<BFloat16, 128x64 4 warps 3 stages>"
    failures = dataclasses.replace(good, **changes).failures()
    assert any(words in failure for failure in failures)


def test_a_chain_with_a_convolution_in_front_is_held_to_that_too():
    name = CHAIN.replace("Li2ELi0E", "Li2ELi64E")
    kernel = rules.Kernel(name, "80", 193, instructions=dict(CHAINED))
    (products,) = kernel.failures()
    assert "64 HMMA, at least 160" in products
    more = CHAINED | {"HMMA.16816.F32.BF16": 160, "LDSM.16.M88.4": 20}
    assert dataclasses.replace(kernel, instructions=more).failures() == []
    assert rules.short_name(name) == "conv_chain<BFloat16, 128x64 4 warps 3 stages behind 64>"


CHAIN_TMA = (
    "_ZN12resnet_fused21conv_chain_tma_kernelINS_8BFloat16ENS_13ChainTmaShape"
    "ILi64ELi128ELi4ELi0ELi2ELi1EEEEEvNS_17ChainTmaArgumentsE"
)
CHAIN_SHARES = CHAIN_TMA.replace("Li2ELi1E", "Li2ELi2E")
CHAIN_PROJECTS = CHAIN_TMA.replace("Li128ELi4ELi0E", "Li64ELi3ELi64E")
CHAIN_TMA_CODE = {
    "HGMMA.64x64x16.F32.BF16": 4, "HGMMA.64x128x16.F32.BF16": 4, "UTMALDG.2D": 6, "UTMASTG.2D": 3,
    "SYNCS.PHASECHK.TRANS64.TRYWAIT": 10, "STSM.16.M88.4": 12, "LDSM.16.M88.4": 4,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1,
}  # fmt: skip


def chain_by_tma(name=CHAIN_TMA, arch="90a", registers=168, **code):
    counts = CHAIN_TMA_CODE | {key.replace("_", "."): count for key, count in code.items()}
    one = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, arch, registers, instructions=counts, early=one).failures()


def test_a_chain_for_sm_90a_is_held_to_its_instructions():
    assert chain_by_tma() == []
    assert chain_by_tma(CHAIN_PROJECTS, HGMMA_64x64x16_F32_BF16=12, LDSM_16_M88_4=0) == []
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        (
            {"name": CHAIN_TMA.replace("Li4E", "Li5E")},
            "263280 bytes of shared memory, at most 232448",
        ),
        ({"name": CHAIN_PROJECTS}, "4 HGMMA of 64 columns, expected 12"),
        ({"HGMMA_64x128x16_F32_BF16": 3}, "3 HGMMA of 128 columns, expected 4"),
        ({"UTMALDG_2D": 5}, "5 UTMALDG.*, at least 6"),
        ({"UTMASTG_2D": 2}, "2 UTMASTG.*, at least 3"),
        ({"STSM_16_M88_4": 11}, "11 STSM"),
        ({"LDSM_16_M88_4": 3}, "3 LDSM"),
        ({"SYNCS_PHASECHK_TRANS64_TRYWAIT": 3}, "3 SYNCS"),
        ({"name": CHAIN_TMA.replace("ChainTmaShape", "Shape")}, "its name spells no configuration"),
    ):
        assert any(words in said for said in chain_by_tma(**planted)), (
            planted,
            chain_by_tma(**planted),
        )


def test_a_chain_whose_filters_two_blocks_share():
    shares = {"UTMALDG_2D_MULTICAST": 4, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}
    assert chain_by_tma(CHAIN_SHARES, **shares) == []
    assert rules.short_name(CHAIN_SHARES) == (
        "conv_chain_tma<BFloat16, 64 to 128 4 stages shared filters>"
    )
    for opcode, count in shares.items():
        (said,) = chain_by_tma(CHAIN_SHARES, **shares | {opcode: count - 1})
        assert f"{count - 1} {opcode.split('_')[0]}" in said, said


def test_a_chain_whose_parts_of_a_step_have_rings_of_their_own():
    name = CHAIN_TMA.replace(
        "13ChainTmaShapeILi64ELi128ELi4ELi0ELi2ELi1E",
        "15ChainRingsShapeILi128ELi256ELi2ELi2ELi3ELi0E",
    )
    code = {
        "HGMMA_64x64x16_F32_BF16": 8, "HGMMA_64x256x16_F32_BF16": 4, "UTMALDG_2D_MULTICAST": 4,
        "UTMALDG_2D": 2, "UTMASTG_2D": 5, "STSM_16_M88_4": 20, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2,
    }  # fmt: skip
    assert chain_by_tma(name, **code) == []
    short = "conv_chain_tma<BFloat16, 128 to 256 2 stages shared filters>"
    assert rules.short_name(name) == short
    for opcode in code:
        said = chain_by_tma(name, **code | {opcode: code[opcode] - 1})
        assert any(opcode.split("_")[0] in one for one in said), opcode
    (said,) = chain_by_tma(name, **code, SYNCS_PHASECHK_TRANS64_TRYWAIT=7)
    assert "7 SYNCS" in said
    (said,) = chain_by_tma(name.replace("Li3E", "Li4E"), **code)
    assert "239776 bytes of shared memory" in said
    projects = name.replace("Li256ELi2ELi2ELi3ELi0E", "Li128ELi4ELi2ELi1ELi256E")
    assert rules.short_name(projects) == (
        "conv_chain_tma<BFloat16, 128 to 128 2 stages projecting 256 shared filters>"
    )
    code |= {
        "HGMMA_64x64x16_F32_BF16": 24, "HGMMA_64x128x16_F32_BF16": 4, "UTMALDG_4D_IM2COL": 4,
        "LDSM_16_M88_4": 0,
    }  # fmt: skip
    assert chain_by_tma(projects, **code) == []
    (said,) = chain_by_tma(projects, **code | {"UTMALDG_4D_IM2COL": 3})
    assert "3 UTMALDG" in said
    (said,) = chain_by_tma(projects.replace("Li1ELi256E", "Li2ELi256E"), **code)
    assert "bytes of shared memory" in said


STEM_WGMMA = (
    "_ZN12resnet_fused17stem_wgmma_kernelINS_8BFloat16ENS_18StemWarpgroupShapeILi112EEEEEvNS_"
    "13StemArgumentsE"
)
STEM_WGMMA_CODE = {
    "HGMMA.64x112x16.F32.BF16": 42, "STSM.16.MT88.4": 16, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 17,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "SHFL.IDX": 56,
    "STG.E.128": 16, "STS.128": 12, "F2FP.BF16.F32.PACK_AB": 184,
}  # fmt: skip


def stem_by_wgmma(name=STEM_WGMMA, arch="90a", registers=168, **code):
    counts = STEM_WGMMA_CODE | {key.replace("_", "."): count for key, count in code.items()}
    one = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, arch, registers, instructions=counts, early=one).failures()


def test_a_stem_for_sm_90a_is_held_to_its_instructions():
    assert stem_by_wgmma() == []
    assert rules.short_name(STEM_WGMMA) == "stem_wgmma<BFloat16, 112 columns>"
    for planted, words in (
        ({"arch": "80"}, "it is built for nothing else"),
        ({"registers": 160}, "160 registers, expected 168"),
        ({"name": STEM_WGMMA.replace("112", "192")}, "254272 bytes of shared memory, at most"),
        ({"name": STEM_WGMMA.replace("112", "64")}, "0 HGMMA of 64 columns, expected 42"),
        ({"HGMMA_64x112x16_F32_BF16": 41}, "41 HGMMA of 112 columns, expected 42"),
        ({"STSM_16_MT88_4": 7}, "7 STSM"),
        ({"SHFL_IDX": 27}, "27 SHFL"),
        ({"STG_E_128": 7}, "7 STG"),
        ({"name": STEM_WGMMA.replace("ENS_18", "ENS_10Float8E4M3ENS_18")}, "0 STG"),
        ({"STS_128": 3}, "3 STS"),
        ({"USETMAXREG_DEALLOC_CTAPOOL": 0}, "1 USETMAXREG"),
        ({"SYNCS_PHASECHK_TRANS64_TRYWAIT": 1}, "1 SYNCS"),
        ({"name": STEM_WGMMA.replace("Warpgroup", "")}, "its name spells no configuration"),
    ):
        said = stem_by_wgmma(**planted)
        assert any(words in one for one in said), (planted, said)


def test_a_tile_that_a_small_gpu_refuses_is_no_failure_there():
    large = CONV.replace("Li4ELi3E", "Li8ELi3E")
    assert conv(name=large, arch="86").failures() == []
    assert len(conv(name=large, arch="80").failures()) == 1


def test_registers_are_for_the_blocks_that_find_shared_memory():
    """Four blocks of 24 KiB fit everywhere, of 32 not in the 100 KiB of sm_86, 89 and 120."""
    assert (
        most_registers(128, 4, 24 * 1024, "80") == most_registers(128, 4, 24 * 1024, "120") == 128
    )
    assert most_registers(128, 4, 32 * 1024, "80") == 128
    assert most_registers(128, 4, 32 * 1024, "120") == 65536 // (128 * 3) // 8 * 8
    assert most_registers(128, 4, 45 * 1024, "80") == 128
    assert most_registers(128, 4, 45 * 1024, "90a") == 128
    assert most_registers(256, 2, 200 * 1024, "89") == 256


def test_names_are_readable():
    assert rules.short_name(CONV) == "conv_bn_act<BFloat16, 128x64 4 warps 4 stages>"
    turns = "channels left 256x64 4 stages in turns"
    assert rules.short_name(TURNS) == f"conv_bn_act_tma<BFloat16, {turns}>"
    assert rules.short_name(SHARED_PIXELS) == f"conv_bn_act_tma<BFloat16, {turns} shared pixels>"
    chain = "64 to 64 3 stages projecting 64"
    assert rules.short_name(CHAIN_PROJECTS) == f"conv_chain_tma<BFloat16, {chain}>"
    assert rules.short_name(BN_ACT) == "bn_act_vector<BFloat16, residual, row>"
    tile = rules.tile_of(MASKED)
    assert tile is not None
    assert (tile.masked, tile.wide, tile.shared) == (True, True, 3 * (128 + 64 + 128) * 64)


@pytest.mark.parametrize(
    ("printed", "status", "expected"),
    [
        ("ptxas info : Compiling entry function", 0, 0),
        ("ptxas info : (C7510) Potential Performance Loss: wgmma are serialized due to x", 0, 1),
        ("ptxas info : (C7517) wait was injected", 0, 1),
        ("error: no such file", 3, 3),
    ],
)
def test_notes_of_ptxas_end_the_build(printed, status, expected):
    inner = f"import sys; print({printed!r}); sys.exit({status})"
    command = [sys.executable, str(TOOLS / "strict_nvcc.py"), sys.executable, "-c", inner]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == expected
    assert printed in found.stdout
    assert ("not accepted from ptxas" in found.stdout) == (expected == 1)
