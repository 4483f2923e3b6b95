"""NaN, Inf and overflow through fused networks, in which oneDNN's ReLU would lose a NaN."""

from __future__ import annotations

import pytest
import torch
from nets import images, stir, tiny_resnet
from torch import nn
from torchvision.models import resnet

import resnet_fused as rf


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def _stage(blocks=5):
    torch.manual_seed(3)
    return stir(nn.Sequential(*(resnet.Bottleneck(32, 8) for _ in range(blocks)))).eval()


def _same_specials(ours, theirs):
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("gain", [1e4, 1e9, 1e15])
def test_overflow_deep_in_a_stage_is_as_in_torch(gain):
    """Bounds are carried from block to block: where they grow too far, the values are looked at."""
    plain = _stage()
    with torch.no_grad():
        for block in plain:
            block.bn3.weight.mul_(gain)
    fused = rf.fuse(plain)
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        _same_specials(outputs(fused, x), outputs(plain, x))
    theirs = outputs(plain, x)
    assert (gain < 1e15) == bool(theirs.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_value_that_a_hook_plants_between_blocks_is_not_lost(value):
    plain = _stage()
    fused = rf.fuse(plain)
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        outputs(fused, x)

    def plant(module, args, y):
        y[0, 3, 2, 2] = value

    for model in (plain, fused):
        model[2].register_forward_hook(plant)
    ours, theirs = outputs(fused, x), outputs(plain, x)
    _same_specials(ours, theirs)
    if value != value:
        assert theirs.isnan().any()


def test_nan_in_the_image_reaches_the_output():
    plain = tiny_resnet()
    fused = rf.fuse(plain)
    x = images(2)
    for _ in range(3):
        outputs(fused, x)
    x[1, 0, 5, 5] = float("nan")
    ours = outputs(fused, x)
    _same_specials(ours, outputs(plain, x))
    assert ours[1].isnan().all()
    assert ours[0].isfinite().all()


def test_what_others_can_see_is_never_overwritten():
    """Within a stage a block may use its input's memory for its output; nowhere else."""
    plain = _stage()
    fused = rf.fuse(plain)
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    before, expected = x.clone(), outputs(plain, x)
    for _ in range(3):
        torch.testing.assert_close(outputs(fused, x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(x, before)
    for watched in (fused[1], fused[1].relu):
        seen = []
        handle = watched.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        copies = []
        second = watched.register_forward_hook(
            lambda m, i, o, copies=copies: copies.append(o.clone())
        )
        outputs(fused, x)
        handle.remove()
        second.remove()
        assert seen
        assert all(torch.equal(a, b) for a, b in zip(seen[-1:], copies[-1:], strict=True))


def test_an_input_that_a_hook_keeps_is_never_overwritten():
    fused = rf.fuse(_stage())
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        outputs(fused, x)
    kept = []
    fused[2].conv1.register_forward_pre_hook(
        lambda m, args: kept.append((args[0], args[0].clone()))
    )
    outputs(fused, x)
    assert torch.equal(*kept[0])


def test_a_block_within_a_stage_reuses_memory():
    fused = rf.fuse(_stage())
    x = torch.randn(2, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    seen = []
    real = type(fused[0]).run

    def run(self, x, bound=None, prepared=None, give=False):
        y, bound = real(self, x, bound, prepared, give)
        seen.append((give, x.data_ptr() == y.data_ptr()))
        return y, bound

    for _ in range(3):
        outputs(fused, x)
    type(fused[0]).run = run
    try:
        outputs(fused, x)
    finally:
        type(fused[0]).run = real
    assert seen == [(False, False)] + [(True, True)] * 4
