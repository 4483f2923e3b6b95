"""ResNet layers in one pass over memory: convolution, BatchNorm, ReLU and the shortcut, fused.

    import resnet_fused as rf

    model = rf.fuse(torchvision.models.resnet50(weights="DEFAULT").eval())
    print(rf.explain(model, x))
    print(rf.verify(model, x))

The names below are loaded when they are first used, so that `resnet-fused --help` need not wait for
torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import backends, cases, models, nn, numerics, ops, roofline, weights
    from .backends import backend
    from .convert import fuse, unfuse
    from .explain import Explanation, explain
    from .freeze import Engine, Fp8Calibration, calibrate_fp8, freeze, load_engine
    from .nn import refresh
    from .verify import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "Explanation",
    "Fp8Calibration",
    "Verification",
    "backend",
    "backends",
    "calibrate_fp8",
    "cases",
    "explain",
    "freeze",
    "fuse",
    "load_engine",
    "models",
    "nn",
    "numerics",
    "ops",
    "refresh",
    "roofline",
    "unfuse",
    "verify",
    "weights",
]
_HOMES = {
    "Engine": "freeze",
    "Explanation": "explain",
    "Fp8Calibration": "freeze",
    "Verification": "verify",
    "backend": "backends",
    "calibrate_fp8": "freeze",
    "explain": "explain",
    "freeze": "freeze",
    "fuse": "convert",
    "load_engine": "freeze",
    "refresh": "nn",
    "unfuse": "convert",
    "verify": "verify",
}


class _Package(types.ModuleType):
    """This package: a function that is named as its module wins over the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        # Ray and others that send a script's functions along with what they name know plain modules
        # alone; this one goes by its name too.
        return importlib.import_module, (self.__name__,)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


sys.modules[__name__].__class__ = _Package
