"""Stages in a row: what blocks hand on across the end of a stage, and when they do not."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from test_training_row import OP, same, step, watched
from torch import nn
from torchvision.models.resnet import Bottleneck

import resnet_fused as rf
from resnet_fused import models
from resnet_fused.models.resnet import PlainResNet
from resnet_fused.nn import _blocks

BLOCKS = (2, 1, 2, 1)
ENDS = sum(BLOCKS) - 1
WITHIN = ENDS - 3


def ours():
    """rf's own network of small bottlenecks."""
    torch.manual_seed(3)
    return rf.fuse(PlainResNet(rf.nn.Bottleneck, BLOCKS, width_per_group=8, num_classes=5).train())


def torchvisions():
    torch.manual_seed(3)
    made = torchvision.models.ResNet(Bottleneck, BLOCKS, width_per_group=8, num_classes=5)
    return rf.fuse(made.train())


def timms():
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    block = timm.models.resnet.Bottleneck
    return rf.fuse(timm.models.resnet.ResNet(block, BLOCKS, base_width=8, num_classes=5).train())


def images():
    return torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(1))


def stage_by_stage(model, x):
    """Its forward with each stage called by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks.FusedStem, "_stage_views", lambda self, x: {})
        return model(x)


def folded(model, x, call=None):
    """The ends that a step of a copy makes with a convolution; output, gradients and buffers."""
    results, ran = step(model, x, call)
    return ran.count(OP), results


@pytest.mark.parametrize("make", [ours, torchvisions, timms], ids=lambda make: make.__name__)
def test_a_networks_stages_are_one_row(make):
    model, x = make(), images()
    ends, results = folded(model, x)
    assert ends == ENDS
    apart, other = folded(model, x, stage_by_stage)
    assert apart == WITHIN
    assert same(results, other)


def test_stages_for_small_images():
    torch.manual_seed(3)
    plain = models.cifar.PlainCifarResNet(20, num_classes=3).train()
    model, x = rf.fuse(plain), torch.randn(2, 3, 16, 16)
    assert folded(model, x)[0] == 0  # 3x3 convolutions fold no end
    with rf.backend("reference"):
        assert torch.allclose(model(x), plain(x), atol=1e-4)


def test_a_stage_that_is_watched_is_called():
    model, x, seen = ours(), images(), []
    _, results = folded(model, x)
    model.layer2.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    ends, other = folded(model, x)
    # Neither in front of it nor behind it.
    assert ends == ENDS - 2 and len(seen) == 1
    assert same(results, other)


def test_a_hook_on_all_modules_parts_them():
    model, x, seen = ours(), images(), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(module) if isinstance(module, nn.Sequential) else None
    )
    try:
        ends, _ = folded(model, x)
    finally:
        handle.remove()
    assert ends == 0 and len(seen) >= 4


class Doubled(nn.Sequential):
    """A stage of the user's own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_stage_of_the_users_own_is_left_alone():
    model, x = ours(), images()
    model.layer3 = Doubled(*model.layer3)
    ends, results = folded(model, x)
    apart, other = folded(model, x, stage_by_stage)
    # Of its own two blocks none is in a row.
    assert (ends, apart) == (WITHIN, WITHIN - 1)
    assert same(results, other)


def test_a_stage_whose_forward_is_replaced_is_left_alone():
    model, x = ours(), images()
    inner = model.layer2.forward
    model.layer2.forward = lambda y: inner(y).neg()
    with rf.backend("reference"), watched() as ran:
        out = model(x)
        assert ran.count(OP) == ENDS - 2
        torch.testing.assert_close(out, stage_by_stage(model, x))


def test_what_a_stage_shows_is_not_handed_on():
    """Feature maps that the caller gets: each stage by itself."""
    timm = pytest.importorskip("timm")
    assert timm
    model, x = timms(), images()
    with rf.backend("reference"), watched() as ran:
        model.forward_intermediates(x)
        assert ran.count(OP) == WITHIN
        model.set_grad_checkpointing()
        ran.clear()
        model(x.requires_grad_())
        assert ran.count(OP) <= WITHIN


def test_a_forward_that_fails_leaves_nothing_behind():
    """What the stage before has handed on is gone with the call."""
    model, x = ours(), images()
    broken = copy.deepcopy(model)
    good, broken.layer3[0].conv2.weight = broken.layer3[0].conv2.weight, nn.Parameter(x)
    with rf.backend("reference"):
        with pytest.raises(RuntimeError):
            broken(x)
        broken.layer3[0].conv2.weight = good
        broken.load_state_dict(model.state_dict())
        assert torch.equal(broken(x), model(x))


def test_evaluation_is_stage_by_stage():
    model, x = ours().eval(), images()
    with torch.no_grad():
        assert torch.equal(model(x), stage_by_stage(model, x))
    with rf.backend("reference"), watched() as ran:
        model(x.requires_grad_()).sum().backward()
    assert OP not in ran
