#include "../kernels/ceilings_products_sm90.cuh"

#include "ceilings_arguments.h"
#include "launch.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

template <LeftSide kLeftSide>
int launch_products(const RfCeiling& ceiling, const CeilingProductArguments& arguments,
                    int32_t blocks, cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(blocks));
  const dim3 block(static_cast<uint32_t>(1 + ceiling.consumers) * kWarpgroupThreads);
  switch (ceiling.columns) {
    case 64:
      return RF_LAUNCH((ceilings_products_kernel<64, kLeftSide>), grid, block,
                       ProductRoom<64>::kSharedBytes, stream, arguments);
    case 128:
      return RF_LAUNCH((ceilings_products_kernel<128, kLeftSide>), grid, block,
                       ProductRoom<128>::kSharedBytes, stream, arguments);
    default:
      return RF_LAUNCH((ceilings_products_kernel<256, kLeftSide>), grid, block,
                       ProductRoom<256>::kSharedBytes, stream, arguments);
  }
}

}  // namespace

int launch_ceiling_products(const RfCeiling& ceiling, const RfCeilingRun& run, void* stream) {
  CeilingProductArguments arguments{};
  int error = encode_tensor_map(rows_request(TensorElement::kBfloat16, run.operands, kStepElements,
                                             kOperandRows, kStepElements, kOperandBoxRows),
                                &arguments.operands);
  if (error == 0) error = encode_tensor_map(set_request(run, kTrafficRows), &arguments.traffic);
  if (error != 0) return error;
  arguments.words = static_cast<const uint32_t*>(run.operands);
  arguments.path = path_of(ceiling, run, kCeilingBoxRows / kTrafficRows);
  arguments.traffic_boxes = ceiling.traffic / kTrafficBytes;
  arguments.steps = run.count;
  arguments.out = static_cast<float*>(run.out);
  arguments.cycles = run.cycles;
  const auto at = static_cast<cudaStream_t>(stream);
  return ceiling.left_in_registers != 0
             ? launch_products<LeftSide::kRegisters>(ceiling, arguments, run.blocks, at)
             : launch_products<LeftSide::kShared>(ceiling, arguments, run.blocks, at);
}

}  // namespace resnet_fused
