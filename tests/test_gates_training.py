"""The gates' rules for training's passes, on machine code that somebody has planted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

import _cuda_rules as rules

WALK = "EEvNS_11ChannelWalkENS_"
ADD = f"_ZN12resnet_fused17bn_add_act_kernelINS_8BFloat16ELi8ELb1ELNS_8ShortcutE3E{WALK}"
BACK = f"_ZN12resnet_fused26bn_add_act_backward_kernelINS_7Float16ELi8ELb1ELb1ELb1E{WALK}"
AGAIN = f"_ZN12resnet_fused26bn_add_act_backward_kernelIfLi4ELb0ELb0ELb0E{WALK}"
APPLY = f"_ZN12resnet_fused24bn_backward_apply_kernelINS_7Float16ELi8ELb1E{WALK}"
POOL = f"_ZN12resnet_fused18bn_act_pool_kernelINS_8BFloat16ELi8ELNS_10PoolKernelE0E{WALK}"
UNPOOL = f"_ZN12resnet_fused27bn_act_pool_backward_kernelINS_8BFloat16ELi8E{WALK}"
NAMES = {
    ADD: ("bn_add_act<BFloat16, normalised>", 2 * 8 + 4 * 2, 8),
    BACK: ("bn_add_act_backward<Float16, projected>", 4 * 2 + 2 * 2, 2),
    AGAIN: ("bn_add_act_backward<float, from y, strided>", 2 * 4 + 3, 4),
    APPLY: ("bn_backward_apply<Float16>", 2 * 8 + 3 * 2, 8),
    POOL: ("bn_act_pool<BFloat16, 3x3>", 9, 1),
    UNPOOL: ("bn_act_pool_backward<BFloat16>", 3, 1),
}
"""Mangled -> in words, 16-byte loads and stores that it must hold."""


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_is_held_to_its_accesses(name):
    words, loads, stores = NAMES[name]
    code = {"LDG.E.128": loads, "STG.E.128": stores}
    assert rules.short_name(name) == words
    assert rules.Kernel(name, "90a", 128, instructions=dict(code)).failures() == []
    for planted, said in (
        ({"registers": 129}, "129 registers, at most 128"),
        ({"instructions": code | {"LDG.E.128": loads - 1}}, f"{loads - 1} LDG.128"),
        ({"instructions": code | {"STG.E.128": stores - 1}}, f"{stores - 1} STG.128"),
        ({"stack": 8}, "8 bytes of stack"),
    ):
        given = {"registers": 96, "instructions": dict(code)} | planted
        (failure,) = rules.Kernel(name, "80", **given).failures()
        assert said in failure


def test_an_element_at_a_time_is_held_to_registers_alone():
    for name in NAMES:
        narrow = name.replace("Li8E", "Li1E").replace("Li4E", "Li1E")
        assert rules.Kernel(narrow, "80", 60).failures() == []
        assert len(rules.Kernel(narrow, "80", 130).failures()) == 1
        assert "narrow" in rules.short_name(narrow)


@pytest.mark.parametrize("op", ["bn_finalize", "bn_update_stats", "bn_backward_finalize"])
def test_values_are_held_to_registers(op):
    name = f"_ZN12resnet_fused{len(op) + 7}{op}_kernelENS_19BnFinalizeArgumentsE"
    assert rules.Kernel(name, "80", 40).failures() == []
    assert rules.Kernel(name, "80", 65).failures() == ["65 registers, at most 64"]
    assert rules.short_name(name) == op


GRAD1X1 = (
    "_ZN12resnet_fused22conv_bn_grad1x1_kernelINS_8BFloat16ENS_12Grad1x1ShapeI"
    "Li64ELi256ELi2ELi2ELi1EEEEEvNS_16Grad1x1ArgumentsE"
)


def test_merged_gradients_are_held_to_both_products():
    code = {
        "HMMA.16816.F32.BF16": 48,
        "LDSM.16.MT88.4": 20,
        "LDGSTS.E.BYPASS.128": 26,
        "STG.E.128": 4,
        "SHFL.BFLY": 48,
    }
    assert rules.short_name(GRAD1X1) == "conv_bn_grad1x1<BFloat16, 64x256 2 stages>"
    assert rules.Kernel(GRAD1X1, "80", 225, instructions=dict(code)).failures() == []
    for planted, said in (
        ({"registers": 256}, "256 registers, at most 255"),
        ({"instructions": code | {"HMMA.16816.F32.BF16": 47}}, "47 HMMA.*, at least 48"),
        ({"instructions": code | {"STG.E.128": 3}}, "3 STG"),
        ({"instructions": code | {"LDGSTS.E.BYPASS.128": 3}}, "3 LDGSTS"),
        ({"local": 8}, "8 bytes of local memory"),
    ):
        given = {"registers": 225, "instructions": dict(code)} | planted
        (failure,) = rules.Kernel(GRAD1X1, "90a", **given).failures()
        assert said in failure
    two = GRAD1X1.replace("Li2ELi1E", "Li2ELi2E")
    (failure,) = rules.Kernel(two, "80", 129, instructions=dict(code)).failures()
    assert failure == "129 registers, at most 128"
    (failure,) = rules.Kernel(GRAD1X1.replace("Shape", "Other"), "80", 99).failures()
    assert failure == "its name spells no configuration"


def test_behind_a_blocks_end_merged_gradients_read_and_sum_more():
    name = GRAD1X1.replace("22conv_bn_grad1x1_kernel", "26conv_bn_grad1x1_end_kernel")
    name = name.replace("Li64ELi256ELi2ELi2ELi1E", "Li64ELi64ELi2ELi3ELi2E")
    code = {
        "HMMA.16816.F32.BF16": 12, "LDSM.16.MT88.4": 8, "LDGSTS.E.BYPASS.128": 14, "STG.E.128": 1,
        "SHFL.BFLY": 36, "LDG.E.CONSTANT": 20, "LDS": 20,
    }  # fmt: skip
    assert rules.short_name(name) == "conv_bn_grad1x1_end<BFloat16, 64x64 3 stages>"
    assert rules.Kernel(name, "80", 118, instructions=dict(code)).failures() == []
    for planted, said in (
        ({"LDG.E.CONSTANT": 19}, "19 LDG"), ({"SHFL.BFLY": 35}, "35 SHFL"), ({"LDS": 3}, "3 LDS"),
        ({"HMMA.16816.F32.BF16": 11}, "11 HMMA.*, at least 12"),
    ):  # fmt: skip
        (failure,) = rules.Kernel(name, "80", 118, instructions=code | planted).failures()
        assert said in failure
    (failure,) = rules.Kernel(name, "80", 129, instructions=dict(code)).failures()
    assert failure == "129 registers, at most 128"


HALO = (
    "_ZN12resnet_fused20conv_bn_stats_kernelINS_8BFloat16ENS_9HaloShapeILi128ELi64ELi2ELi2ELi4ELi3E"
    "Li2EEELNS_9LoadWidthE0ELNS_11StatsSourceE2EEEvNS_20ConvBnStatsArgumentsE"
)
HALO_CODE = {
    "HMMA.16816.F32.BF16": 32, "LDGSTS.E.BYPASS.LTC128B.128": 7, "LDSM.16.M88.4": 12,
    "SHFL.BFLY": 48, "ATOM.E.INC.STRONG.GPU": 2, "DFMA": 2,
}  # fmt: skip


def test_windows_are_held_to_registers_shared_memory_and_copies():
    kernel = rules.Kernel(HALO, "80", 168, instructions=dict(HALO_CODE))
    assert kernel.failures() == []
    assert rules.short_name(HALO) == "conv_bn_stats<BFloat16, halo 128x64 4 warps 4 stages>"
    tile = rules.tile_of(HALO)
    assert tile is not None
    # Four stages of filters, zeros, two windows of 128 pixels in rows of 56.
    assert tile.shared == 4 * 64 * 64 + 128 + 2 * (128 + 2 * 57) * 64
    more = HALO.replace("Li4ELi3E", "Li4ELi4E")
    for changes, said in (
        ({"registers": 169}, "169 registers, at most 168"),
        ({"instructions": HALO_CODE | {"HMMA.16816.F32.BF16": 31}}, "31 HMMA, at least 32"),
        ({"instructions": HALO_CODE | {"LDGSTS.E.BYPASS.LTC128B.128": 6}}, "at least 7"),
        ({"instructions": HALO_CODE | {"LDSM.16.M88.4": 1}}, "1 LDSM, at least 2"),
        ({"name": more, "registers": 128}, "194048 bytes of shared memory for 4 blocks"),
    ):
        given = {"name": HALO, "arch": "80", "registers": 168, "instructions": dict(HALO_CODE)}
        (failure,) = rules.Kernel(**given | changes).failures()
        assert said in failure


GRADIENT = (
    "_ZN12resnet_fused20conv_bn_dgrad_kernelINS_8BFloat16ENS_9HaloShapeILi128ELi{n}ELi2ELi2ELi4ELi2E"
    "Li3EEELNS_9LoadWidthE0EEEvNS_20ConvBnDgradArgumentsE"
)
GRADIENT_CODE = {
    "HMMA.16816.F32.BF16": 32, "LDGSTS.E.BYPASS.LTC128B.128": 10, "LDSM.16.MT88.4": 12,
    "ATOM.E.INC.STRONG.GPU": 5, "DADD": 8, "LDG.E.128.CONSTANT": 8, "STG.E.128": 4,
}  # fmt: skip


def test_a_gradients_windows_are_held_to_y_and_totals_too():
    name = GRADIENT.format(n=64)
    assert rules.Kernel(name, "80", 255, instructions=dict(GRADIENT_CODE)).failures() == []
    assert rules.short_name(name) == "conv_bn_dgrad<BFloat16, halo 128x64 4 warps 4 stages>"
    few = GRADIENT_CODE | {"LDGSTS.E.BYPASS.LTC128B.128": 9}
    (failure,) = rules.Kernel(name, "80", 255, instructions=few).failures()
    assert "at least 10" in failure
    tile = rules.tile_of(name)
    assert tile is not None and tile.shared == 4 * 64 * 64 + 128 + 3 * (128 + 2 * 57) * 64
    broad = rules.tile_of(GRADIENT.format(n=128))
    assert broad is not None
    assert broad.shared == 4 * 128 * 64 + 128 + 3 * (128 + 2 * 57) * 64 > 128 * 128 * 4
    other = rules.tile_of(name.replace("Li128ELi64ELi2ELi2ELi4E", "Li128ELi256ELi2ELi2ELi3E"))
    assert other is not None and other.shared == 128 * 256 * 4


END = (
    "_ZN12resnet_fused24conv_bn_dgrad_end_kernelINS_8BFloat16ENS_9HaloShapeILi{m}ELi64ELi2ELi2ELi4E"
    "Li{blocks}ELi3EEELNS_9LoadWidthE0EEEvNS_23ConvBnDgradEndArgumentsE"
)
END_CODE = GRADIENT_CODE | {"DADD": 12, "LDG.E.128.CONSTANT": 16}


def test_a_gradient_behind_a_block_s_end_is_held_to_what_it_reads_and_sums():
    name = END.format(m=128, blocks=2)
    assert rules.Kernel(name, "80", 255, instructions=dict(END_CODE)).failures() == []
    assert rules.short_name(name) == "conv_bn_dgrad_end<BFloat16, halo 128x64 4 warps 4 stages>"
    assert rules.tile_of(name).shared == rules.tile_of(GRADIENT.format(n=64)).shared
    for code, few, said in (
        ("LDG.E.128.CONSTANT", 15, "at least 16"),
        ("DADD", 11, "at least 12"),
        ("STG.E.128", 3, "at least 4"),
        ("ATOM.E.INC.STRONG.GPU", 4, "at least 5"),
    ):
        (failure,) = rules.Kernel(name, "80", 255, instructions=END_CODE | {code: few}).failures()
        assert said in failure
    # Beside two other blocks two rows are under way.
    small = END.format(m=64, blocks=3)
    half = END_CODE | {"LDG.E.128.CONSTANT": 8, "STG.E.128": 2}
    assert rules.Kernel(small, "80", 168, instructions=half).failures() == []
    (failure,) = rules.Kernel(small, "80", 168, instructions=half | {"STG.E.128": 1}).failures()
    assert "at least 2" in failure


WEIGHTS = (
    "_ZN12resnet_fused20conv_bn_wgrad_kernelINS_8BFloat16ENS_14HaloWgradShapeILi64ELi2ELi2ELi3ELi2E"
    "EELNS_9LoadWidthE0EEEvNS_20ConvBnWgradArgumentsE"
)


ALONG = {
    "HMMA.16816.F32.BF16": 72, "LDGSTS.E.BYPASS.128": 10, "LDSM.16.MT88.4": 22, "STS.128": 7,
}  # fmt: skip


def test_a_window_along_the_pixels_is_held_to_its_shape():
    def failures(registers=255, **code):
        counts = ALONG | {key.replace("_", "."): count for key, count in code.items()}
        return rules.Kernel(WEIGHTS, "80", registers, instructions=counts).failures()

    assert failures() == []
    assert rules.short_name(WEIGHTS) == "conv_bn_wgrad<BFloat16, halo 64x288 4 warps 3 stages>"
    assert failures(HMMA_16816_F32_BF16=71) == ["71 HMMA, at least 72"]
    for name, few in (("LDGSTS_E_BYPASS_128", 9), ("LDSM_16_MT88_4", 21), ("STS_128", 6)):
        (failure,) = failures(**{name: few})
        assert failure.startswith(f"{few} {name[:3]}") and failure.endswith(f"least {few + 1}")
    tile = rules.tile_of(WEIGHTS)
    # Three stages of dz and y, zeros, a power of two of 114 pixels of the taps and three steps.
    assert tile is not None and tile.shared == 3 * 2 * 64 * 64 + 128 + 256 * 64
    wider = rules.tile_of(WEIGHTS.replace("Li3ELi2E", "Li5ELi2E"))
    assert wider is not None and wider.shared == 5 * 2 * 64 * 64 + 128 + 512 * 64


STATS_BY_TMA = (
    "_ZN12resnet_fused24conv_bn_stats_tma_kernelINS_8BFloat16ENS_14WarpgroupShapeILNS_11OrientationE1"
    "ELNS_9ConsumersE0ELi256ELi128ELi3ELi1ELi1EEEEEvNS_21ConvStatsTmaArgumentsE"
)
STATS_CODE = {
    "HGMMA.64x256x16.F32.BF16": 4, "UTMALDG.4D": 2, "UTMALDG.2D": 1, "UTMALDG.4D.IM2COL": 1,
    "UTMASTG.3D": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 4, "STSM.16.MT88.4": 16,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "SHFL.BFLY": 8,
    "ATOMG.E.ADD.STRONG.GPU": 2, "DFMA": 84,
}  # fmt: skip


def stats_failures(name, counts):
    early = rules.Early(waits=1, triggers=1, constants=1)
    return rules.Kernel(name, "90a", 168, instructions=counts, early=early).failures()


def test_statistics_by_tma_are_held_to_their_instructions():
    name = rules.short_name(STATS_BY_TMA)
    assert name == "conv_bn_stats_tma<BFloat16, channels left 256x128 3 stages>"

    def failures(**code):
        counts = STATS_CODE | {key.replace("_", "."): count for key, count in code.items()}
        return stats_failures(STATS_BY_TMA, counts)

    assert failures() == []
    for planted, words in (
        ({"SHFL_BFLY": 7}, "7 SHFL"),
        ({"ATOMG_E_ADD_STRONG_GPU": 1}, "1 ATOM"),
        ({"DFMA": 3}, "3 DFMA"),
        ({"STSM_16_MT88_4": 15}, "15 STSM"),
        ({"UTMALDG_2D": 0}, "3 UTMALDG"),
        ({"UTMASTG_3D": 0}, "0 UTMASTG"),
    ):
        (failure,) = failures(**planted)
        assert words in failure


def test_what_is_transformed_is_held_to_whole_units_and_pairs():
    shape = STATS_BY_TMA[STATS_BY_TMA.index("NS_14WarpgroupShape") : STATS_BY_TMA.index("EvNS_21")]
    name = STATS_BY_TMA.replace(shape, f"NS_14TransformShapeI{shape}E")
    assert rules.short_name(name).endswith("3 stages transformed>")
    code = STATS_CODE | {
        "LDS.128": 4, "STS.128": 4, "HMNMX2.BF16_V2.NAN": 8, "LDG.E.128.CONSTANT": 4,
        "FENCE.VIEW.ASYNC.S": 3, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 8,
    }  # fmt: skip
    assert stats_failures(name, code) == []
    for planted, words in (
        ({"LDS.128": 3}, "3 LDS"),
        ({"STS.128": 3}, "3 STS"),
        ({"HMNMX2.BF16_V2.NAN": 7}, "7 HMNMX2"),
        ({"LDG.E.128.CONSTANT": 3}, "3 LDG"),
        ({"FENCE.VIEW.ASYNC.S": 2}, "2 FENCE"),
        ({"SYNCS.PHASECHK.TRANS64.TRYWAIT": 7}, "7 SYNCS"),
    ):
        (failure,) = stats_failures(name, code | planted)
        assert words in failure
