"""The fused ops: functional, with autograd, autocast and fakes; see `rf.backend` for who serves."""

from . import _cuda_network as _cuda_network  # it enters its kernel for admission
from ._e4m3 import quantize_e4m3, quantize_weight_e4m3
from .bn_act import bn_act
from .bn_act_pool import bn_act_pool
from .bn_add_act import bn_add_act
from .bn_add_act_backward import bn_add_act_backward
from .bn_add_act_conv_stats import bn_add_act_conv_stats
from .bn_backward_apply import bn_backward_apply
from .bn_backward_finalize import bn_backward_finalize
from .bn_finalize import bn_finalize, bn_update_stats
from .conv_bn_act import conv_bn_act
from .conv_bn_act_fp8 import conv_bn_act_fp8
from .conv_bn_dgrad import conv_bn_dgrad
from .conv_bn_dgrad_end import conv_bn_dgrad_end
from .conv_bn_grad1x1 import conv_bn_grad1x1
from .conv_bn_grad1x1_end import conv_bn_grad1x1_end
from .conv_bn_stats import conv_bn_stats
from .conv_bn_stats_finalize import conv_bn_stats_finalize
from .conv_bn_wgrad import conv_bn_wgrad
from .conv_chain import conv_chain
from .conv_chain_fp8 import conv_chain_fp8
from .conv_dgrad import conv_dgrad
from .conv_wgrad import conv_wgrad
from .head import head
from .stem import stem, stem_input_norm

__all__ = [
    "bn_act",
    "bn_act_pool",
    "bn_add_act",
    "bn_add_act_backward",
    "bn_add_act_conv_stats",
    "bn_backward_apply",
    "bn_backward_finalize",
    "bn_finalize",
    "bn_update_stats",
    "conv_bn_act",
    "conv_bn_act_fp8",
    "conv_bn_dgrad",
    "conv_bn_dgrad_end",
    "conv_bn_grad1x1",
    "conv_bn_grad1x1_end",
    "conv_bn_stats",
    "conv_bn_stats_finalize",
    "conv_bn_wgrad",
    "conv_chain",
    "conv_chain_fp8",
    "conv_dgrad",
    "conv_wgrad",
    "head",
    "quantize_e4m3",
    "quantize_weight_e4m3",
    "stem",
    "stem_input_norm",
]
