// The emulated conv_bn_grad1x1_end, for the module.
#pragma once

#include "emulated.h"

namespace resnet_fused::emulated {

void define_conv_bn_grad1x1_end(py::module_& module);

}  // namespace resnet_fused::emulated
