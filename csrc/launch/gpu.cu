#include "gpu.h"

#if !defined(RF_EMULATED)
#include <cuda_runtime.h>

extern "C" int rf_gpu(int device, RfGpu* gpu) {
  const auto ask = [device](int32_t* value, cudaDeviceAttr attribute) -> int {
    int found = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&found, attribute, device);
    *value = found;
    return error;
  };
  int error = ask(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) {
    error = ask(&gpu->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  if (error == cudaSuccess) {
    error = ask(&gpu->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
  int32_t major = 0, minor = 0;
  if (error == cudaSuccess) error = ask(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = ask(&minor, cudaDevAttrComputeCapabilityMinor);
  gpu->capability = 10 * major + minor;
  if (error == cudaSuccess && gpu->capability == 90) {
    const auto ask_room = [gpu](int32_t cluster, int32_t* clusters) {
      // With all of the shared memory that it may have a block is alone on a multiprocessor.
      if (rf_gpu_clusters(cluster, gpu->shared_per_block, clusters) == cudaSuccess) return;
      *clusters = 0;
      static_cast<void>(cudaGetLastError());  // plans do without
    };
    ask_room(4, &gpu->clusters_of_4);
    ask_room(8, &gpu->clusters_of_8);
  }
  return error;
}
#endif
