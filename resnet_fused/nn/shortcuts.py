"""Shortcuts of residual blocks that have no parameters ([He15], section 3.3, option A).

[He15] is "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


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
