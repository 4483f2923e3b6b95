#include "tensor_map.h"

#if defined(RF_EMULATED)
#include <cstring>

#include "../emulator/cuda.h"
#include "../emulator/tensor_map.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#endif

namespace resnet_fused {

#if defined(RF_EMULATED)

int encode_tensor_map(const TensorMapRequest& request, ptx::TensorMap* map) {
  if (!tensor_map_fault(request).empty()) return cudaErrorInvalidValue;
  emulator::TensorMapFields fields{};
  fields.magic = emulator::TensorMapFields::kMagic;
  fields.rank = static_cast<uint8_t>(request.rank);
  switch (request.element) {
    case TensorElement::kUint8:
      fields.element_bytes = 1;
      break;
    case TensorElement::kFloat16:
    case TensorElement::kBfloat16:
      fields.element_bytes = 2;
      break;
    case TensorElement::kUint32:
    case TensorElement::kFloat32:
    case TensorElement::kTfloat32:
      fields.element_bytes = 4;
      break;
  }
  fields.swizzle = static_cast<uint8_t>(request.swizzle);
  fields.rounds = request.element == TensorElement::kTfloat32;
  fields.im2col = request.pixels > 0;
  fields.address = static_cast<uint8_t*>(request.address);
  for (int d = 0; d < request.rank; ++d) {
    fields.last[d] = static_cast<uint32_t>(request.sizes[d] - 1);
    fields.box[d] = static_cast<uint16_t>(request.box[d]);
    fields.element_strides[d] = static_cast<uint8_t>(request.steps[d]);
  }
  for (int d = 0; d + 1 < request.rank; ++d) {
    fields.strides[d] = static_cast<uint64_t>(request.strides[d]);
  }
  if (fields.im2col) {
    fields.box[1] = static_cast<uint16_t>(request.pixels);
    for (int d = 0; d + 2 < request.rank; ++d) {
      fields.lower[d] = static_cast<int16_t>(request.lower[d]);
      fields.upper[d] = static_cast<int16_t>(request.upper[d]);
    }
  }
  *map = {};
  std::memcpy(map, &fields, sizeof(fields));
  return cudaSuccess;
}

#else

namespace {

static_assert(sizeof(ptx::TensorMap) == sizeof(CUtensorMap));
static_assert(alignof(ptx::TensorMap) >= alignof(CUtensorMap));

CUtensorMapDataType element_of(TensorElement element) {
  switch (element) {
    case TensorElement::kUint8:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case TensorElement::kUint32:
      return CU_TENSOR_MAP_DATA_TYPE_UINT32;
    case TensorElement::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case TensorElement::kBfloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case TensorElement::kTfloat32:
      return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
    case TensorElement::kFloat32:
      break;
  }
  return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

CUtensorMapSwizzle swizzle_of(TensorSwizzle swizzle) {
  switch (swizzle) {
    case TensorSwizzle::kNone:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
    case TensorSwizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case TensorSwizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case TensorSwizzle::k128:
      break;
  }
  return CU_TENSOR_MAP_SWIZZLE_128B;
}

// A function of the driver, found at run time, once: programs are not linked with it, so that they
// load where there is none. Each has a type of its own.
template <class Function>
cudaError_t driver_function(const char* name, Function** found) {
  static std::atomic<Function*> known = nullptr;
  *found = known;
  if (*found != nullptr) return cudaSuccess;
  void* address = nullptr;
  cudaDriverEntryPointQueryResult result{};
  constexpr unsigned int kSince = 12000;  // both came with CUDA 12.0
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &address, kSince, cudaEnableDefault, &result);
  if (error != cudaSuccess) return error;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  known = *found = reinterpret_cast<Function*>(address);
  return cudaSuccess;
}

// Calls a function of the driver, which wants a context that is current to the thread. Autograd's
// threads, and others that have launched nothing yet, have none: cudaSetDevice binds the device's.
template <class Function, class... Arguments>
int call_driver(const char* name, const Arguments&... arguments) {
  Function* function = nullptr;
  cudaError_t error = driver_function(name, &function);
  if (error != cudaSuccess) return error;
  CUresult result = function(arguments...);
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    int device = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    result = function(arguments...);
  }
  return static_cast<int>(result);  // the driver's codes are the runtime's
}

}  // namespace

int encode_tensor_map(const TensorMapRequest& request, ptx::TensorMap* map) {
  if (!tensor_map_fault(request).empty()) return cudaErrorInvalidValue;
  cuuint64_t sizes[kMostDimensions], strides[kMostDimensions];
  cuuint32_t box[kMostDimensions], steps[kMostDimensions];
  for (int d = 0; d < kMostDimensions; ++d) {
    sizes[d] = static_cast<cuuint64_t>(request.sizes[d]);
    strides[d] = d + 1 < kMostDimensions ? static_cast<cuuint64_t>(request.strides[d]) : 0;
    box[d] = static_cast<cuuint32_t>(request.box[d]);
    steps[d] = static_cast<cuuint32_t>(request.steps[d]);
  }
  auto* const to = reinterpret_cast<CUtensorMap*>(map);
  const auto rank = static_cast<cuuint32_t>(request.rank);
  const CUtensorMapDataType element = element_of(request.element);
  const CUtensorMapSwizzle swizzle = swizzle_of(request.swizzle);
  if (request.pixels == 0) {
    return call_driver<decltype(cuTensorMapEncodeTiled)>(
        "cuTensorMapEncodeTiled", to, element, rank, request.address, sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
  return call_driver<decltype(cuTensorMapEncodeIm2col)>(
      "cuTensorMapEncodeIm2col", to, element, rank, request.address, sizes, strides,
      request.lower.data(), request.upper.data(), box[0], static_cast<cuuint32_t>(request.pixels),
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

#endif

}  // namespace resnet_fused
