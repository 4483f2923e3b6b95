"""Which layers train as a node on the CPU by themselves: those large enough for it to be faster."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_nets import NODE, SERVED, assert_same, build, kept_bytes, steps

import resnet_fused as rf
from resnet_fused.nn import _training_route
from resnet_fused.ops import _training

SHIPPED = _training_route.FEWEST_ELEMENTS
pytestmark = SERVED


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch, _training_nodes_of_any_size):
    monkeypatch.setattr(_training_route, "FEWEST_ELEMENTS", SHIPPED)


def nodes(y):
    """How many nodes made a tensor."""
    seen, ahead = set(), [y.grad_fn]
    while ahead:
        found = ahead.pop()
        if found is None or found in seen:
            continue
        seen.add(found)
        ahead += [function for function, _ in found.next_functions]
    return sum(found.name() == NODE for found in seen)


def layer(channels=64):
    return rf.nn.ConvBNAct(channels, channels).train()


def test_a_layer_of_few_elements_runs_its_modules():
    """The last size that is too small, and the first that is not."""
    rows = SHIPPED // (64 * 32)
    for height, found in ((rows - 1, "modules"), (rows, "cpu")):
        x = torch.randn(1, 64, height, 32)
        table = rf.explain(layer(), x)
        assert table.counts() == {found: 1}
        assert nodes(layer()(x)) == (found == "cpu")
        assert ("faster on the CPU below" in str(table)) == (found == "modules")
        assert ('rf.backend("cpu")' in str(table)) == (found == "modules")


def test_who_asks_by_name_gets_a_node_of_any_size():
    x = torch.randn(2, 8, 4, 4)
    for backend in ("cpu", "reference"):
        with rf.backend(backend):
            assert nodes(layer(8)(x)) == 1
    assert nodes(layer(8)(x)) == 0


def test_the_layers_of_a_small_block_are_no_nodes_either():
    """Its last convolution alone would be large enough."""
    channels = 32
    block = rf.nn.Bottleneck(4 * channels, channels).train()
    pixels = SHIPPED // (4 * channels)
    x = torch.randn(1, 4 * channels, 32, pixels // 32)
    assert x.numel() >= SHIPPED
    assert nodes(block(x)) == 0
    assert rf.explain(block, x).counts() == {"modules": 3}
    twice = torch.cat((x, x), 3)
    assert nodes(block(twice)) == 1


@pytest.mark.parametrize("name", ["torchvision basic", "torchvision bottleneck halved"])
def test_a_small_block_is_eagers_bit_for_bit(name):
    block, x = build(name, torch.float32)
    ours, theirs = steps(block, x, None)
    assert_same(ours, theirs, 0)


def test_synchronised_statistics_have_a_node_of_any_size():
    """PyTorch's SyncBatchNorm takes no tensors that are on the CPU."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer(8)))
    assert nodes(block(torch.randn(2, 8, 4, 4))) == 1


def test_networks_keep_at_224_pixels_what_nodes_keep():
    """`test_what_is_kept_for_backward` says how much that is; no block here is too small."""
    model = rf.fuse(torchvision.models.resnet50(num_classes=10)).train()
    x = torch.randn(4, 3, 224, 224)
    with rf.backend("cpu"):
        nodes_keep = kept_bytes(model, x)
    assert kept_bytes(model, x) == nodes_keep


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_bodies_are_called_where_nobody_watches():
    y = torch.randn(2, 3, 4, 4)
    assert _training.table(y).is_body("bn_add_act")
    with Watching():
        assert not _training.table(y).is_body("bn_add_act")
    with torch.device("cpu"):  # a mode for functions
        assert not _training.table(y).is_body("bn_add_act")
    with rf.backend("reference"):
        assert not _training.table(y).is_body("bn_add_act")
    before = _training.table(y)
    assert before.is_body("bn_add_act")
    assert _training.table(y + 1) is before
    rf.backends.forget_choices()
    assert _training.table(y) is not before
