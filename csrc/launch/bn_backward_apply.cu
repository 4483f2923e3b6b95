// The launches of bn_backward_apply.
#include "../kernels/bn_backward_apply_sm80.cuh"
#include "bn_pass_launch.cuh"

extern "C" int rf_bn_backward_apply_cuda(const resnet_fused::BnTrainingCall* call,
                                         const RfBnPassPlan* plan, void* /*workspace*/,
                                         void* stream) {
  using namespace resnet_fused;
  if (plan->parts == 0) return cudaSuccess;
  const BnBackwardApplyArguments arguments{values(call->norm)};
  return with_pass_type(*call, *plan, [&]<class T>(T, auto width, auto dense) {
    return launch_pass(*call, *plan, bn_backward_apply_kernel<T, width(), dense()>, arguments, 0,
                       stream);
  });
}
