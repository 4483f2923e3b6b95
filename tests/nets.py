"""Small networks for the tests, with BatchNorm statistics under which a wrong eps would show."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import resnet as tv


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm telling values: means, small variances, gammas of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        mean = getattr(module, "running_mean", None)
        if mean is None:
            continue
        with torch.no_grad():
            mean.copy_(torch.randn(mean.shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(mean.shape, generator=generator) + 0.05)
            if module.weight is not None:
                module.weight.copy_(torch.rand(mean.shape, generator=generator) * 1.2 - 0.2)
                module.bias.copy_(torch.randn(mean.shape, generator=generator) * 0.2)
    return model


def tiny_resnet(block: type = tv.Bottleneck, **options: object) -> tv.ResNet:
    """A torchvision ResNet of four blocks for 32x32 images, in eval mode."""
    torch.manual_seed(0)
    return stir(tv.ResNet(block, [1, 1, 1, 1], num_classes=7, **options)).eval()


def images(n: int = 2, size: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images [n, 3, size, size] in channels_last."""
    x = torch.randn(n, 3, size, size, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)
