#include "../kernels/ceilings_launches_sm90.cuh"
#include "../kernels/ceilings_meetings_sm90.cuh"
#include "ceilings_arguments.h"
#include "launch.h"

int resnet_fused::launch_ceiling_meetings(const RfCeiling& ceiling, const RfCeilingRun& run,
                                          void* stream) {
  constexpr uint32_t kWords = 16;  // of a cluster's block
  const CeilingMeetingArguments arguments{
      run.counters, run.words, run.count, run.judged, static_cast<uint32_t*>(run.out), run.cycles};
  const dim3 grid(static_cast<uint32_t>(run.blocks)), block(kMeetingThreads);
  const auto at = static_cast<cudaStream_t>(stream);
  if (ceiling.cluster == 0) {
    return RF_LAUNCH_COOPERATIVE(ceilings_meetings_kernel<Meeting::kGrid>, grid, block, 0, at,
                                 arguments);
  }
  return RF_LAUNCH_CLUSTERS(ceilings_meetings_kernel<Meeting::kCluster>, grid, block,
                            dim3(static_cast<uint32_t>(ceiling.cluster)), kWords, at, arguments);
}

extern "C" int rf_ceiling_launch_cuda(int32_t follows, int32_t blocks, uint32_t* count,
                                      void* stream) {
  using namespace resnet_fused;
  return RF_LAUNCH_EARLY(follows != 0, ceilings_launch_kernel, dim3(static_cast<uint32_t>(blocks)),
                         dim3(kMeetingThreads), 0, static_cast<cudaStream_t>(stream), count);
}
