"""A projection's gradient is that of the pixels that it reads, and added there alone."""

from __future__ import annotations

import pytest
import torch
import torchvision.models.resnet as tv
from torch import nn
from training_nets import assert_same, steps

from resnet_fused import backends
from resnet_fused.cases import ConvCase
from resnet_fused.ops import _training, _training_cpu
from resnet_fused.roofline.training import conv_bn_dgrad_cost, thins


@pytest.fixture
def ran(monkeypatch):
    """The gradients of inputs that nodes make: sizes, the addend's and its stride, geometry."""
    found, real = [], _training.overload

    def overload(op, name):
        def run(*arguments):
            if op in ("conv_bn_dgrad", "conv_bn_grad1x1"):
                one = op == "conv_bn_grad1x1"  # of a stride of 1
                addend, step = (arguments[i] for i in ((6, 9) if one else (4, 9)))
                size = arguments[3].shape if one else arguments[7]
                geometry = ((1, 1), (0, 0)) if one else map(tuple, arguments[10:12])
                shape = None if addend is None else tuple(addend.shape)
                found.append((tuple(size), shape, step, *geometry))
            return real(op, name)(*arguments)

        return run

    monkeypatch.setattr(_training, "overload", overload)
    backends.forget_choices()  # nodes keep the overloads that they have found
    yield found
    backends.forget_choices()


def block(kind, stride, conv):
    torch.manual_seed(2)
    down = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
    width = conv.out_channels // kind.expansion
    return kind(conv.in_channels, width, stride, down).double().train()


def projection(stride=2, kernel=1, padding=0):
    return nn.Conv2d(8, 16, kernel, stride, padding, bias=False)


@pytest.mark.parametrize("kind", [tv.BasicBlock, tv.Bottleneck])
@pytest.mark.parametrize("size", [(7, 5), (8, 6), (1, 9)], ids=str)
def test_the_pixels_that_it_reads(ran, kind, size):
    model, x = block(kind, 2, projection()), torch.randn(3, 8, *size).double()
    assert_same(*steps(model, x, "reference"))
    read = (3, 8, *(-(-side // 2) for side in size))
    assert ran[0] == (read, None, 1, (1, 1), (0, 0))
    # The block's first convolution reads all of x, and adds what comes at every second pixel.
    assert ran[-1][:3] == ((3, 8, *size), read, 2)
    assert len(ran) == 1 + (3 if kind is tv.Bottleneck else 2)


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (projection(kernel=3, padding=1), (7, 5)),
        (projection((2, 1), 1), (7, 3)),
        (projection(1), (4, 3)),
    ],
    ids=["3x3", "2x1", "1"],
)
def test_where_all_pixels_are_computed(ran, conv, size):
    """By taps that read others, by strides that differ, and where all are read."""
    model = block(tv.BasicBlock, 1, conv)
    model.conv1.stride = conv.stride
    x = torch.randn(2, 8, *size).double()
    assert_same(*steps(model, x, "reference"))
    assert ran[0][:3] == ((2, 8, *size), None, 1) and ran[-1][1:3] == ((2, 8, *size), 1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_cpus_one_call_of_both_gradients(monkeypatch, layout):
    """PyTorch's convolution is told of the pixels alone, as a convolution of stride 1."""
    seen, real = [], _training_cpu.gradients

    def gradients(dz, x, norm, *rest):
        seen.append((tuple(x.shape), tuple(rest[-4])))
        return real(dz, x, norm, *rest)

    monkeypatch.setattr(_training_cpu, "gradients", gradients)
    model = block(tv.Bottleneck, 2, projection()).to(memory_format=layout)
    x = torch.randn(3, 8, 7, 6).double().contiguous(memory_format=layout)
    assert_same(*steps(model, x, "cpu"))
    assert seen[0] == ((3, 8, 4, 3), (1, 1))
    assert ((3, 4, 7, 6), (2, 2)) in seen  # the 3x3 of the block's stride


def test_a_frozen_projection_and_an_input_without_a_gradient(ran):
    model, x = block(tv.BasicBlock, 2, projection()), torch.randn(2, 8, 6, 6).double()
    for p in model.downsample.parameters():
        p.requires_grad_(False)
    assert_same(*steps(model, x, "reference"))
    assert ran[0][0] == (2, 8, 3, 3)
    ran.clear()
    for p in model.parameters():
        p.requires_grad_(True)
    from resnet_fused import backend, fuse

    with backend("reference"):
        fuse(model)(x).sum().backward()
    assert [call[0] for call in ran] == [(2, 16, 3, 3)]  # nobody asks for the input's


def test_what_the_roofline_counts():
    case = ConvCase("projection", 2, 8, 8, 6, 16, stride=(2, 2))
    assert thins(case)
    whole = conv_bn_dgrad_cost(case, torch.bfloat16)
    thinned = conv_bn_dgrad_cost(case, torch.bfloat16, thinned=True)
    assert whole.bytes - thinned.bytes == 2 * 2 * 8 * (8 * 6 - 4 * 3)
    others = (
        ConvCase("3x3", 2, 8, 8, 6, 16, 3, 3, (2, 2), (1, 1)),
        ConvCase("2x1", 2, 8, 8, 6, 16, stride=(2, 1)),
        ConvCase("padded", 2, 8, 8, 6, 16, stride=(2, 2), padding=(1, 1)),
    )
    assert not any(map(thins, others))
