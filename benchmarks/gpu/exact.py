"""The exact tier: a configuration of a kernel on integers, where every bit is known."""

from __future__ import annotations

from typing import Any


def check(device: str, check: str, configuration: str) -> dict[str, Any]:
    """Runs the check that admission itself would run; an exception is the kernel's failure."""
    from resnet_fused import _selfcheck

    _selfcheck.load(check)(configuration, device)
    return {"ok": True}
