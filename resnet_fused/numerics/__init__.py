"""The float64 oracle and the error bounds that every implementation of an op is held to.

All tolerances of the project live in `tolerances`; loosening one needs a measured reason there.
Three tiers judge an output ``y`` in a dtype of unit roundoff ``u`` against the oracle ``R``, the
unfused computation in float64 on the very values that the op was given:

1. *exact*: on small integers every sum is exact, so ``y`` must be ``R`` rounded once, bit for bit;
2. *bound*: every element obeys a bound made of its own operands (`conv_bn_act_bound`);
3. *relative*: the error's norm is compared with that of the unfused chain in the same dtype.

A whole-tensor tolerance would not do: a default ``assert_close`` rejects a correct fused kernel in
bfloat16, while a norm of the difference passes truncation, low-precision sums and a zeroed channel.
The model of rounding is Higham, Accuracy and Stability of Numerical Algorithms, chapters 2 and 3.
"""

from resnet_fused.numerics.bounds import (
    ACCUMULATIONS,
    ROUNDINGS,
    bn_act_bound,
    conv_bn_act_bound,
)
from resnet_fused.numerics.chains import (
    CHAIN_ROUNDINGS,
    ChainOperands,
    chain_operands,
    conv_chain_bound,
    conv_chain_expected,
    conv_chain_fp8_expected,
    conv_chain_oracle,
)
from resnet_fused.numerics.checks import (
    BoundCheck,
    RelativeCheck,
    check_bound,
    gradient_check,
    relative_check,
)
from resnet_fused.numerics.exact import ExactInputs, exact_expected, exact_inputs
from resnet_fused.numerics.fp8 import (
    FP8_ACCUMULATIONS,
    conv_bn_act_fp8_bound,
    conv_bn_act_fp8_expected,
    conv_bn_act_fp8_oracle,
    fp8_noise,
)
from resnet_fused.numerics.gradients import conv_gradients_bound, conv_gradients_oracle
from resnet_fused.numerics.oracle import bn_act_oracle, conv_bn_act_oracle
from resnet_fused.numerics.stem import (
    exact_stem_inputs,
    head_bound,
    head_oracle,
    stem_bound,
    stem_oracle,
)
from resnet_fused.numerics.tolerances import (
    END_TO_END_LIMIT,
    accumulator_dtype,
    chance,
    unit_roundoff,
)
from resnet_fused.numerics.training import (
    affine_gradient,
    bn_add_act_bound,
    bn_add_act_oracle,
    bn_backward_apply_bound,
    bn_backward_apply_oracle,
    bn_backward_finalize_bound,
    bn_backward_finalize_oracle,
    bn_finalize_bound,
    bn_finalize_oracle,
    bn_update_stats_bound,
    bn_update_stats_oracle,
    masked,
    normalised,
    reductions_bound,
    reductions_oracle,
    stats_bound,
    stats_oracle,
)
from resnet_fused.numerics.training_convolutions import (
    bn_act_pool_backward_oracle,
    bn_act_pool_oracle,
    conv_bn_dgrad_bound,
    conv_bn_dgrad_end_bound,
    conv_bn_dgrad_end_oracle,
    conv_bn_dgrad_oracle,
    conv_bn_stats_bound,
    conv_bn_stats_oracle,
    conv_bn_wgrad_bound,
    conv_bn_wgrad_oracle,
)

__all__ = [
    "ACCUMULATIONS",
    "CHAIN_ROUNDINGS",
    "END_TO_END_LIMIT",
    "FP8_ACCUMULATIONS",
    "ROUNDINGS",
    "BoundCheck",
    "ChainOperands",
    "ExactInputs",
    "RelativeCheck",
    "accumulator_dtype",
    "affine_gradient",
    "bn_act_bound",
    "bn_act_oracle",
    "bn_act_pool_backward_oracle",
    "bn_act_pool_oracle",
    "bn_add_act_bound",
    "bn_add_act_oracle",
    "bn_backward_apply_bound",
    "bn_backward_apply_oracle",
    "bn_backward_finalize_bound",
    "bn_backward_finalize_oracle",
    "bn_finalize_bound",
    "bn_finalize_oracle",
    "bn_update_stats_bound",
    "bn_update_stats_oracle",
    "chain_operands",
    "chance",
    "check_bound",
    "conv_bn_act_bound",
    "conv_bn_act_fp8_bound",
    "conv_bn_act_fp8_expected",
    "conv_bn_act_fp8_oracle",
    "conv_bn_act_oracle",
    "conv_bn_dgrad_bound",
    "conv_bn_dgrad_end_bound",
    "conv_bn_dgrad_end_oracle",
    "conv_bn_dgrad_oracle",
    "conv_bn_stats_bound",
    "conv_bn_stats_oracle",
    "conv_bn_wgrad_bound",
    "conv_bn_wgrad_oracle",
    "conv_chain_bound",
    "conv_chain_expected",
    "conv_chain_fp8_expected",
    "conv_chain_oracle",
    "conv_gradients_bound",
    "conv_gradients_oracle",
    "exact_expected",
    "exact_inputs",
    "exact_stem_inputs",
    "fp8_noise",
    "gradient_check",
    "head_bound",
    "head_oracle",
    "masked",
    "normalised",
    "reductions_bound",
    "reductions_oracle",
    "relative_check",
    "stats_bound",
    "stats_oracle",
    "stem_bound",
    "stem_oracle",
    "unit_roundoff",
]
