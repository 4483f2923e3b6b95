// The launches of bn_add_act_backward.
#include "../kernels/bn_add_act_backward_sm80.cuh"
#include "bn_pass_launch.cuh"

namespace resnet_fused {
namespace {

template <bool kFromOut, bool kProjected>
int launch(const BnTrainingCall& call, const RfBnPassPlan& plan,
           const BnAddActBackwardArguments& arguments, void* stream) {
  constexpr int kSums = kProjected ? 3 : 2;
  return with_pass_type(call, plan, [&]<class T>(T, auto width, auto dense) {
    return launch_pass(call, plan,
                       bn_add_act_backward_kernel<T, width(), dense(), kFromOut, kProjected>,
                       arguments, sums_shared_bytes(kSums, width()), stream);
  });
}

}  // namespace
}  // namespace resnet_fused

extern "C" int rf_bn_add_act_backward_cuda(const resnet_fused::BnTrainingCall* call,
                                           const RfBnPassPlan* plan, void* workspace,
                                           void* stream) {
  using namespace resnet_fused;
  if (plan->parts == 0) return clear_sums(*call, stream);
  const float limit = call->relu ? 0.0f : __builtin_nanf("");
  BnAddActBackwardArguments arguments{values(call->norm), values(call->residual_norm), limit, {}};
  const int error = sums_of(*call, *plan, workspace, stream, &arguments.sums);
  if (error != cudaSuccess) return error;
  if (call->operand[kResidual].data != nullptr) {
    return launch<true, true>(*call, *plan, arguments, stream);
  }
  return reads_result(*call) ? launch<true, false>(*call, *plan, arguments, stream)
                             : launch<false, false>(*call, *plan, arguments, stream);
}
