"""Shortcuts of residual blocks ([He15], section 3.3, options A, B and C).

[He15] is "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

Norm = Callable[[int], nn.Module]
SHORTCUTS = ("A", "B", "C", "none")
"""A: the identity, zero-padded where channels increase; B: a projection where dimensions change;
C: a projection everywhere; none: no shortcut, as in a plain network."""


def make_shortcut(
    option: str,
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    norm_layer: Norm | None = None,
) -> nn.Module | None:
    """The module that a block's shortcut goes through ([He15], section 3.3).

    Args:
        option: of `SHORTCUTS`.
        in_channels: channels of the block's input.
        out_channels: of its output.
        stride: of the block.
        norm_layer: makes a projection's normalisation; None is `nn.BatchNorm2d`.

    Returns:
        A `PaddedShortcut`; a Sequential of a 1x1 convolution and its normalisation; or None for the
        identity, and for "none".

    Raises:
        ValueError: an unknown option, or A where channels become fewer.
    """
    if option not in SHORTCUTS:
        raise ValueError(f"shortcut: got {option!r}, accepted are {', '.join(SHORTCUTS)}")
    same = stride == 1 and in_channels == out_channels
    if option == "none" or (same and option != "C"):
        return None
    if option == "A":
        return PaddedShortcut(in_channels, out_channels, stride)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        (nn.BatchNorm2d if norm_layer is None else norm_layer)(out_channels),
    )


class PaddedShortcut(nn.Module):
    """The identity where dimensions increase: every stride-th pixel, extra channels of zeros.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out, at least as many.
        stride: distance of the pixels that are kept.
        before: how many of the extra channels stand in front; [He15] puts none there.

    Raises:
        ValueError: the numbers do not fit.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, before: int = 0
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < in_channels:
            raise ValueError(
                f"PaddedShortcut: out_channels is {out_channels}; at least in_channels="
                f"{in_channels} is needed"
            )
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f"PaddedShortcut: stride is {stride!r}; 1 or more is accepted")
        if not 0 <= before <= out_channels - in_channels:
            raise ValueError(
                f"PaddedShortcut: before is {before}; 0 to {out_channels - in_channels} is accepted"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        """Computes the shortcut of x [N, in_channels, H, W]."""
        after = self.out_channels - self.in_channels - self.before
        kept = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, self.before, after))

    def extra_repr(self) -> str:
        """The arguments."""
        text = f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
        return text + (f", before={self.before}" if self.before else "")
