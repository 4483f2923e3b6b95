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
  // Clusters of so many blocks that run at once, a multiprocessor for each block: GPCs differ from
  // GPU to GPU of one kind. 0: nobody has asked.
  int32_t clusters_of_4 = 0;
  int32_t clusters_of_8 = 0;
};

// Asks the driver about the current device; 0, or a cudaError_t. Absent where the kernels are
// emulated: there the caller says which GPU it is.
int rf_gpu(int device, RfGpu* gpu);

// Clusters of blocks of so much shared memory that run at once there; 0 without kernels for sm_90a.
int rf_gpu_clusters(int32_t cluster, int32_t shared_bytes, int32_t* clusters);

}  // extern "C"
