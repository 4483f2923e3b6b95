// The launches of bn_add_act.
#include "../kernels/bn_add_act_sm80.cuh"
#include "bn_pass_launch.cuh"

namespace resnet_fused {
namespace {

template <Shortcut kShortcut>
int launch(const BnTrainingCall& call, const RfBnPassPlan& plan, void* stream) {
  const float floor = call.relu ? 0.0f : -__builtin_huge_valf();
  const BnAddActArguments arguments{values(call.norm), values(call.residual_norm), floor};
  return with_pass_type(call, plan, [&]<class T>(T, auto width, auto dense) {
    return launch_pass(call, plan, bn_add_act_kernel<T, width(), dense(), kShortcut>, arguments, 0,
                       stream);
  });
}

}  // namespace
}  // namespace resnet_fused

extern "C" int rf_bn_add_act_cuda(const resnet_fused::BnTrainingCall* call,
                                  const RfBnPassPlan* plan, void* /*workspace*/, void* stream) {
  using namespace resnet_fused;
  if (plan->parts == 0) return cudaSuccess;
  if (call->operand[kResidual].data == nullptr || call->residual_channels == 0) {
    return launch<Shortcut::kNone>(*call, *plan, stream);
  }
  if (call->residual_norm != nullptr) return launch<Shortcut::kNormalised>(*call, *plan, stream);
  return is_partial(*call) ? launch<Shortcut::kPart>(*call, *plan, stream)
                           : launch<Shortcut::kPlain>(*call, *plan, stream);
}
