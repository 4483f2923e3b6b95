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


STATS_BY_TMA = (
    "_ZN12resnet_fused24conv_bn_stats_tma_kernelINS_8BFloat16ENS_14WarpgroupShapeILNS_11OrientationE1"
    "ELNS_9ConsumersE0ELi256ELi128ELi3ELi1EEEEEvNS_21ConvStatsTmaArgumentsE"
)
STATS_CODE = {
    "HGMMA.64x256x16.F32.BF16": 4, "UTMALDG.4D": 2, "UTMALDG.2D": 1, "UTMALDG.4D.IM2COL": 1,
    "UTMASTG.3D": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 4, "STSM.16.MT88.4": 16,
    "USETMAXREG.DEALLOC.CTAPOOL": 1, "USETMAXREG.TRY_ALLOC.CTAPOOL": 1, "SHFL.BFLY": 8,
    "ATOMG.E.ADD.STRONG.GPU": 2, "DFMA": 84,
}  # fmt: skip


def test_statistics_by_tma_are_held_to_their_instructions():
    name = rules.short_name(STATS_BY_TMA)
    assert name == "conv_bn_stats_tma<BFloat16, channels left 256x128 3 stages>"

    def failures(**code):
        counts = STATS_CODE | {key.replace("_", "."): count for key, count in code.items()}
        early = rules.Early(waits=1, triggers=1, constants=1)
        kernel = rules.Kernel(STATS_BY_TMA, "90a", 168, instructions=counts, early=early)
        return kernel.failures()

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
