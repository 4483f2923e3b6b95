"""The list of shapes: names are unique, every telling situation is in it, ResNet-50 is whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import torchvision

from resnet_fused.cases import BN_ACT_CASES, CONV_CASES, RESNET50_LAYERS, BnActCase, ConvCase

REQUIRED = {
    "1x1": lambda c: (c.r, c.s) == (1, 1),
    "3x3": lambda c: (c.r, c.s) == (3, 3),
    "7x7": lambda c: (c.r, c.s) == (7, 7),
    "strided": lambda c: max(c.stride) > 1,
    "dilated": lambda c: max(c.dilation) > 1,
    "grouped": lambda c: c.groups > 1,
    "depthwise": lambda c: c.groups == c.c > 1,
    "odd": lambda c: c.c % 2 == 1 or c.k % 2 == 1,
    "k65": lambda c: c.k == 65,
    "c1": lambda c: c.c == 1,
    "k1": lambda c: c.k == 1,
    "1x1_spatial": lambda c: (c.p, c.q) == (1, 1),
    "nc11": lambda c: (c.h, c.w) == (1, 1),
    "n1hw": lambda c: c.c == c.k == 1,
    "n0": lambda c: c.n == 0,
    "stem": lambda c: c.c == 3 and c.r == 7 and c.stride == (2, 2),
    "all_equal": lambda c: c.n == c.c == c.h == c.w == c.k,
    "residual": lambda c: c.residual,
    "rectangular": lambda c: c.r != c.s,
    "no_padding": lambda c: c.padding == (0, 0) and c.r > 1,
    "deep": lambda c: c.c * c.r * c.s > 4096,
}


@pytest.mark.parametrize("tag", REQUIRED)
def test_every_situation_has_a_case(tag: str) -> None:
    tagged = [case for case in CONV_CASES if tag in case.tags]
    assert tagged, f"no case is tagged {tag}"
    for case in tagged:
        assert REQUIRED[tag](case), f"{case} is not {tag}"


@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_epilogue_has_a_case(residual: bool, act: str) -> None:
    for cases in (CONV_CASES, BN_ACT_CASES):
        assert any(case.residual == residual and case.act == act for case in cases)


def test_tags_are_known_and_names_unique() -> None:
    assert {tag for case in CONV_CASES for tag in case.tags} <= {
        *REQUIRED, "shortcut", "empty", "5x5",
    }  # fmt: skip
    for cases in (CONV_CASES, BN_ACT_CASES, RESNET50_LAYERS):
        names = [str(case) for case in cases]
        assert len(set(names)) == len(names)
    assert {case.layout for case in BN_ACT_CASES} == {
        "nchw", "nhwc", "sliced", "expanded", "unaligned",
    }  # fmt: skip


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_sizes_are_those_of_torch(case: ConvCase) -> None:
    y = F.conv2d(torch.zeros(case.input_shape), torch.zeros(case.weight_shape), **case.geometry)
    assert tuple(y.shape) == case.output_shape
    assert case.macs == y.numel() * torch.zeros(case.weight_shape)[0].numel()


def test_cases_are_values() -> None:
    case: ConvCase | BnActCase
    for case in (*CONV_CASES, *BN_ACT_CASES):
        assert case == dataclasses.replace(case) and hash(case) == hash(dataclasses.replace(case))
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONV_CASES[0].n = 3  # type: ignore[misc]


def test_cases_are_small() -> None:
    for case in CONV_CASES:
        assert case.macs < 5_000_000, f"{case} is slow under an interpreter"


def test_resnet50_is_torchvisions() -> None:
    model = torchvision.models.resnet50()
    seen: dict[tuple[object, ...], int] = {}

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        assert isinstance(module, torch.nn.Conv2d)
        key = (args[0].shape[1:], y.shape[1:], module.kernel_size, module.stride, module.padding)
        seen[key] = seen.get(key, 0) + 1

    model = model.to("meta")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    listed = {
        (
            case.input_shape[1:],
            case.output_shape[1:],
            (case.r, case.s),
            case.stride,
            case.padding,
        ): (case.count)
        for case in RESNET50_LAYERS
    }
    assert listed == seen
    assert len(RESNET50_LAYERS) == 23 and sum(case.count for case in RESNET50_LAYERS) == 53
    outputs = sum(case.count * case.k * case.p * case.q for case in RESNET50_LAYERS)
    assert round(outputs / 1e6, 2) == 11.11
