// The launches of bn_act_pool_backward.
#include "../kernels/bn_act_pool_backward_sm80.cuh"
#include "bn_pass_launch.cuh"

extern "C" int rf_bn_act_pool_backward_cuda(const resnet_fused::BnTrainingCall* call,
                                            const RfBnPassPlan* plan, void* workspace,
                                            void* stream) {
  using namespace resnet_fused;
  if (plan->parts == 0) return clear_sums(*call, stream);
  BnActPoolBackwardArguments arguments{values(call->norm), pool_windows(*call), {}};
  const int error = sums_of(*call, *plan, workspace, stream, &arguments.sums);
  if (error != cudaSuccess) return error;
  return with_pass_type(*call, *plan, [&]<class T>(T, auto width, auto /*dense*/) {
    return launch_pass(*call, *plan, bn_act_pool_backward_kernel<T, width()>, arguments,
                       sums_shared_bytes(2, width()), stream);
  });
}
