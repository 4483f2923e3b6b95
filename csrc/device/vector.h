// Sixteen bytes of a storage type: what one memory instruction of a thread moves.
#pragma once

#include "../ptx/memory.h"
#include "scalar.h"

namespace resnet_fused {

constexpr int kVectorBytes = 16;

template <class T>
constexpr int kVectorLength = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(kVectorBytes) Vector {
  T lane[kVectorLength<T>];
};

// `address` must be a multiple of 16; whoever picks the kernel checks the pointer. What it points
// to must not change while the kernel runs. The load names global memory: from a plain dereference
// ptxas makes the generic load, which resolves the address space first, on sm_100.
template <class T>
RF_DEVICE Vector<T> load_vector(const T* address RF_SITE_PARAMETER) {
  return ptx::load_global_read_only(reinterpret_cast<const Vector<T>*>(address) RF_SITE);
}

// Values of the channels of a unit, side by side at a multiple of 16 bytes.
template <int kCount>
RF_DEVICE void load_channels(float (&values)[kCount], const float* from RF_SITE_PARAMETER) {
#pragma unroll
  for (int i = 0; i < kCount; i += kVectorLength<float>) {
    const auto part = load_vector(from + i RF_SITE);
#pragma unroll
    for (int e = 0; e < kVectorLength<float>; ++e) values[i + e] = part.lane[e];
  }
}

template <class T>
RF_DEVICE void store_vector(T* address, const Vector<T>& value RF_SITE_PARAMETER) {
  ptx::store_global(reinterpret_cast<Vector<T>*>(address), value RF_SITE);
}

}  // namespace resnet_fused
