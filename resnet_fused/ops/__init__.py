"""The fused ops: functional, with autograd, autocast and fakes; see `rf.backend` for who serves."""

from .bn_act import bn_act
from .conv_bn_act import conv_bn_act

__all__ = ["bn_act", "conv_bn_act"]
