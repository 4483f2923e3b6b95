"""Loads the compiled extension `resnet_fused._C`, and remembers why it could not.

The package works without it: every op has a plain PyTorch implementation. Importing the extension
registers its kernels with PyTorch's dispatcher; nothing else is taken from it but `build_info`.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
from typing import Any

logger = logging.getLogger("resnet_fused")


@functools.cache
def _load() -> tuple[Any | None, str | None]:
    import torch  # noqa: F401  (its libraries, which the extension names, are in the process then)

    try:
        return importlib.import_module("resnet_fused._C"), None
    except ModuleNotFoundError:
        reason = "it was not built: `pip install --no-build-isolation -e .` with a C++20 compiler"
    except ImportError as error:
        reason = f"it does not load: {error}"
    logger.info("resnet_fused._C is not used: %s", reason)
    return None, reason


def available() -> bool:
    """Whether the compiled extension is loaded."""
    return _load()[0] is not None


def why_not() -> str | None:
    """Why the extension is not loaded, or None when it is."""
    return _load()[1]


def build_info() -> dict[str, Any]:
    """What the extension was built with: compiler, CUDA or not, architectures; {} without it."""
    module = _load()[0]
    return {} if module is None else json.loads(module.build_info())


def has_cuda_kernels() -> bool:
    """Whether the extension holds CUDA kernels."""
    return bool(build_info().get("cuda", False))
