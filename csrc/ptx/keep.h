// No instruction, but a word to the compiler.
#pragma once

#include <cstdint>

#include "common.h"

namespace resnet_fused::ptx {

// Keeps a value in its register from here on. A compiler short of registers works values that are
// cheap in its eyes out anew, in every round of a loop; it can't do so with what comes from here.
RF_DEVICE void keep(int32_t& value) {
#if !defined(RF_EMULATED)
  asm volatile("" : "+r"(value));
#else
  static_cast<void>(value);
#endif
}
RF_DEVICE void keep(uint32_t& value) {
#if !defined(RF_EMULATED)
  asm volatile("" : "+r"(value));
#else
  static_cast<void>(value);
#endif
}
template <class V>
RF_DEVICE void keep(const V*& pointer) {
#if !defined(RF_EMULATED)
  asm volatile("" : "+l"(pointer));
#else
  static_cast<void>(pointer);
#endif
}
RF_DEVICE void keep(int64_t& value) {
#if !defined(RF_EMULATED)
  asm volatile("" : "+l"(value));
#else
  static_cast<void>(value);
#endif
}

}  // namespace resnet_fused::ptx
