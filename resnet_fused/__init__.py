"""ResNet layers in one pass over memory: convolution, BatchNorm, ReLU and the shortcut, fused.

import resnet_fused as rf

model = rf.fuse(torchvision.models.resnet50(weights="DEFAULT").eval())
print(rf.explain(model, x))
print(rf.verify(model, x))
"""

from . import backends, cases, models, nn, numerics, ops, roofline
from .backends import backend
from .convert import fuse, unfuse
from .explain import Explanation, explain
from .nn import refresh
from .verify import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "Verification",
    "backend",
    "backends",
    "cases",
    "explain",
    "fuse",
    "models",
    "nn",
    "numerics",
    "ops",
    "refresh",
    "roofline",
    "unfuse",
    "verify",
]
