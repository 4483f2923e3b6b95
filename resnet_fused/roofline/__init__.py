"""FLOPs and bytes of ops and whole models, and the time that a machine needs for them at least."""

from .chains import conv_chain_cost
from .inference import (
    ConvShape,
    Cost,
    LayerCost,
    ModelCost,
    bn_act_cost,
    conv_cost,
    conv_dgrad_cost,
    conv_wgrad_cost,
    model_cost,
)
from .stem import head_cost, stem_cost
from .training import (
    Kernel,
    bn_act_pool_backward_cost,
    bn_act_pool_cost,
    bn_add_act_backward_cost,
    bn_add_act_conv_stats_cost,
    bn_add_act_cost,
    bn_backward_apply_cost,
    conv_bn_dgrad_cost,
    conv_bn_dgrad_end_cost,
    conv_bn_grad1x1_cost,
    conv_bn_stats_cost,
    conv_bn_wgrad_cost,
    node_kernels,
)

__all__ = [
    "ConvShape",
    "Cost",
    "Kernel",
    "LayerCost",
    "ModelCost",
    "bn_act_cost",
    "bn_act_pool_backward_cost",
    "bn_act_pool_cost",
    "bn_add_act_backward_cost",
    "bn_add_act_conv_stats_cost",
    "bn_add_act_cost",
    "bn_backward_apply_cost",
    "conv_bn_dgrad_cost",
    "conv_bn_dgrad_end_cost",
    "conv_bn_grad1x1_cost",
    "conv_bn_stats_cost",
    "conv_bn_wgrad_cost",
    "conv_chain_cost",
    "conv_cost",
    "conv_dgrad_cost",
    "conv_wgrad_cost",
    "head_cost",
    "model_cost",
    "node_kernels",
    "stem_cost",
]
