// The one way to launch a kernel: the same line starts it on a GPU and in the emulator.
//
//   int error = RF_LAUNCH((kernel<T, 4>), grid, block, shared_bytes, stream, arguments...);
//   int error = RF_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, arguments...);
//   int error = RF_LAUNCH_EARLY(follows, kernel, grid, block, shared_bytes, stream, arguments...);
//   int error = RF_LAUNCH_CLUSTERS(kernel, grid, block, cluster, shared_bytes, stream,
//                                  arguments...);
//   int error = RF_LAUNCH_CLUSTERS_EARLY(follows, kernel, grid, block, cluster, shared_bytes,
//   stream,
//                                        arguments...);
//
// `kernel` is a __global__ function, in parentheses where it holds a comma. The result is 0 or a
// cudaError_t; an empty grid is an error, as in CUDA, so the caller leaves empty problems out. In
// the emulator the launch has finished when it returns, the thread's Session says how it runs, and
// a fault of the kernel is thrown as emulator::Error.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(RF_EMULATED)
#include <cstring>

#include "../emulator/cuda.h"
#include "../emulator/runtime.h"
#else
#include <cuda_runtime.h>

#include <span>
#endif

#define RF_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::resnet_fused::launch_kernel<false>(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// All blocks are on the device at once, so that they may wait for one another.
#define RF_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::resnet_fused::launch_kernel<true>(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

// `follows`: the kernel may begin before the one ahead of it has ended; flow.h says where that is
// right. Before sm_90 it must be false.
#define RF_LAUNCH_EARLY(follows, kernel, grid, block, shared_bytes, stream, ...) \
  ::resnet_fused::launch_early(follows, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
// In clusters of blocks, of which the grid is a multiple; sm_90 and later.
#define RF_LAUNCH_CLUSTERS(kernel, grid, block, cluster, shared_bytes, stream, ...)          \
  ::resnet_fused::launch_clusters(false, kernel, grid, block, cluster, shared_bytes, stream, \
                                  __VA_ARGS__)
// Both.
#define RF_LAUNCH_CLUSTERS_EARLY(follows, kernel, grid, block, cluster, shared_bytes, stream, ...) \
  ::resnet_fused::launch_clusters(follows, kernel, grid, block, cluster, shared_bytes, stream,     \
                                  __VA_ARGS__)

namespace resnet_fused {

#if defined(RF_EMULATED)

template <bool kCooperative, class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, uint32_t shared_bytes,
                  cudaStream_t /*stream*/, const Arguments&... arguments) {
  emulator::launch(grid, block, shared_bytes, kCooperative, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
int launch_early(bool follows, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                 uint32_t shared_bytes, cudaStream_t /*stream*/, const Arguments&... arguments) {
  emulator::launch(grid, block, shared_bytes, false, [&] { kernel(arguments...); }, follows);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
int launch_clusters(bool follows, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    dim3 cluster, uint32_t shared_bytes, cudaStream_t /*stream*/,
                    const Arguments&... arguments) {
  emulator::launch_clusters(
      grid, block, cluster, shared_bytes, false, [&] { kernel(arguments...); }, follows);
  return cudaSuccess;
}

// Zeros on the device, in the stream's order; 0 or a cudaError_t.
inline int clear_async(void* to, size_t bytes, cudaStream_t /*stream*/) {
  std::memset(to, 0, bytes);
  return cudaSuccess;
}

#else

// More dynamic shared memory than this must be asked for (CUDA C++ Programming Guide, Shared
// Memory, compute capability 7.x and later).
constexpr uint32_t kSharedBytesForTheAsking = 48 * 1024;

template <class Kernel>
cudaError_t allow_shared_bytes(Kernel kernel, uint32_t shared_bytes) {
  if (shared_bytes <= kSharedBytesForTheAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

template <class... Parameters, class... Arguments>
int launch_with(std::span<cudaLaunchAttribute> attributes, void (*kernel)(Parameters...), dim3 grid,
                dim3 block, uint32_t shared_bytes, cudaStream_t stream,
                const Arguments&... arguments) {
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
int launch_clusters(bool follows, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    dim3 cluster, uint32_t shared_bytes, cudaStream_t stream,
                    const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster.x;
  attributes[0].val.clusterDim.y = cluster.y;
  attributes[0].val.clusterDim.z = cluster.z;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  return launch_with(std::span(attributes).first(follows ? 2 : 1), kernel, grid, block,
                     shared_bytes, stream, arguments...);
}

// What the launch itself says: cudaGetLastError would blame it for what an earlier call has left.
template <bool kCooperative, class... Parameters, class... Arguments>
int launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, uint32_t shared_bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
  if constexpr (kCooperative) {
    const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    const void* addresses[] = {&arguments...};
    return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block,
                                       const_cast<void**>(addresses), shared_bytes, stream);
  } else {
    return launch_with({}, kernel, grid, block, shared_bytes, stream, arguments...);
  }
}

template <class... Parameters, class... Arguments>
int launch_early(bool follows, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                 uint32_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (!follows) {
    return launch_kernel<false>(kernel, grid, block, shared_bytes, stream, arguments...);
  }
  cudaLaunchAttribute attributes[1]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  return launch_with(attributes, kernel, grid, block, shared_bytes, stream, arguments...);
}

// Zeros on the device, in the stream's order; 0 or a cudaError_t.
inline int clear_async(void* to, size_t bytes, cudaStream_t stream) {
  return cudaMemsetAsync(to, 0, bytes, stream);
}

#endif

}  // namespace resnet_fused
