#include "../kernels/ceilings_loads_sm80.cuh"

#include "ceilings_arguments.h"
#include "launch.h"

int resnet_fused::launch_ceiling_loads(const RfCeiling& ceiling, const RfCeilingRun& run,
                                       void* stream) {
  const CeilingLoadArguments arguments{static_cast<const uint4*>(run.set), path_of(ceiling, run, 1),
                                       static_cast<uint32_t*>(run.out), run.cycles};
  return RF_LAUNCH(ceilings_loads_kernel, dim3(static_cast<uint32_t>(run.blocks)),
                   dim3(kLoadThreads), 0, static_cast<cudaStream_t>(stream), arguments);
}
