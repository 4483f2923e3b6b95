// The launches of bn_act_pool.
#include "../kernels/bn_act_pool_sm80.cuh"
#include "bn_pass_launch.cuh"

extern "C" int rf_bn_act_pool_cuda(const resnet_fused::BnTrainingCall* call,
                                   const RfBnPassPlan* plan, void* /*workspace*/, void* stream) {
  using namespace resnet_fused;
  if (plan->parts == 0) return cudaSuccess;
  const BnActPoolArguments arguments{values(call->norm), pool_windows(*call)};
  const bool three = call->pool.kernel[0] == 3 && call->pool.kernel[1] == 3;
  return with_pass_type(*call, *plan, [&]<class T>(T, auto width, auto /*dense*/) {
    const auto kernel = three ? bn_act_pool_kernel<T, width(), PoolKernel::kThree>
                              : bn_act_pool_kernel<T, width(), PoolKernel::kAny>;
    return launch_pass(*call, *plan, kernel, arguments, 0, stream);
  });
}
