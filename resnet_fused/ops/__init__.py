"""The fused ops: functional, with autograd, autocast and fakes; see `rf.backend` for who serves."""

from .bn_act import bn_act
from .conv_bn_act import conv_bn_act
from .conv_dgrad import conv_dgrad
from .conv_wgrad import conv_wgrad

__all__ = ["bn_act", "conv_bn_act", "conv_dgrad", "conv_wgrad"]
