#include "../kernels/ceilings_reads_sm90.cuh"

#include "ceilings_arguments.h"
#include "launch.h"

namespace resnet_fused {
namespace {

template <Brought kBrought, int kSharing>
int launch_reads(const CeilingReadArguments& arguments, int32_t blocks, cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(blocks));
  if constexpr (kSharing > 1) {
    return RF_LAUNCH_CLUSTERS((ceilings_reads_kernel<kBrought, kSharing>), grid, dim3(kReadThreads),
                              dim3(kSharing), kReadSharedBytes, stream, arguments);
  } else {
    return RF_LAUNCH((ceilings_reads_kernel<kBrought, kSharing>), grid, dim3(kReadThreads),
                     kReadSharedBytes, stream, arguments);
  }
}

}  // namespace

int launch_ceiling_reads(const RfCeiling& ceiling, const RfCeilingRun& run, void* stream) {
  CeilingReadArguments arguments{};
  const int error =
      encode_tensor_map(set_request(run, kCeilingBoxRows / ceiling.sharing), &arguments.rows);
  if (error != 0) return error;
  arguments.set = static_cast<const unsigned char*>(run.set);
  arguments.path = path_of(ceiling, run, 1);
  arguments.sums = run.judged;
  arguments.sum = static_cast<uint32_t*>(run.out);
  arguments.cycles = run.cycles;
  const auto at = static_cast<cudaStream_t>(stream);
  if (ceiling.way == RF_WAY_PIECE) {
    return launch_reads<Brought::kPiece, 1>(arguments, run.blocks, at);
  }
  switch (ceiling.sharing) {
    case 4:
      return launch_reads<Brought::kRows, 4>(arguments, run.blocks, at);
    case 2:
      return launch_reads<Brought::kRows, 2>(arguments, run.blocks, at);
    default:
      return launch_reads<Brought::kRows, 1>(arguments, run.blocks, at);
  }
}

}  // namespace resnet_fused
