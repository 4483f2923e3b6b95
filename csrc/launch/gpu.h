// What the plans of the launches depend on of a GPU. Knows no framework.
#pragma once

#include <cstdint>

extern "C" {

// cudaDeviceProp: multiProcessorCount, sharedMemPerBlockOptin, sharedMemPerMultiprocessor; bytes.
struct RfGpu {
  int32_t multiprocessors;
  int32_t shared_per_block;
  int32_t shared_per_multiprocessor;
  int32_t capability = 0;  // 10 major + minor; 0: unknown, and no kernel for one of them is chosen
};

// Asks the driver about a device; 0, or a cudaError_t. Absent where the kernels are emulated: there
// the caller says which GPU it is.
int rf_gpu(int device, RfGpu* gpu);

}  // extern "C"
