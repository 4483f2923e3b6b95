// Sixteen bytes of a storage type: what one memory instruction of a thread moves.
#pragma once

#include "scalar.h"

RF_NAMESPACE_BEGIN

constexpr int kVectorBytes = 16;

template <class T>
constexpr int kVectorLength = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
struct alignas(kVectorBytes) Vector {
  T lane[kVectorLength<T>];
};

// `address` must be a multiple of 16; whoever picks the kernel checks the pointer. What it points
// to must not change while the kernel runs. The device's load names global memory: from a plain
// dereference ptxas makes the generic load, which resolves the address space first, on sm_100.
template <class T>
RF_HOST_DEVICE Vector<T> load_vector(const T* address) {
#if defined(__CUDA_ARCH__)
  return __builtin_bit_cast(Vector<T>, __ldg(reinterpret_cast<const uint4*>(address)));
#else
  return *reinterpret_cast<const Vector<T>*>(address);
#endif
}

template <class T>
RF_HOST_DEVICE void store_vector(T* address, const Vector<T>& value) {
  *reinterpret_cast<Vector<T>*>(address) = value;
}

RF_NAMESPACE_END
