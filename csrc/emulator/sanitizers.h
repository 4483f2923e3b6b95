// What the runtime tells ThreadSanitizer. In other builds it tells the launch's own record of
// global memory who has released and acquired what (global_order.h).
//
// The runtime's own data is touched by every fiber in turn and would look like one big race, so
// each of its public functions is Quiet; what the kernel reads and writes, and what orders it, is
// told by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define RF_EMULATOR_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define RF_EMULATOR_TSAN 1
#endif
#endif

#if defined(RF_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
}
#endif

namespace resnet_fused::emulator {

#if defined(RF_EMULATOR_TSAN)
constexpr bool kThreadSanitizer = true;
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
// Inside of a Quiet: the accesses of the kernel itself.
struct Heard {
  Heard() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  ~Heard() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
};
inline void tell_read(const void* address, size_t bytes) {
  Heard heard;
  __tsan_read_range(const_cast<void*>(address), bytes);
}
inline void tell_write(void* address, size_t bytes) {
  Heard heard;
  __tsan_write_range(address, bytes);
}
inline void tell_release(const void* token) { __tsan_release(const_cast<void*>(token)); }
inline void tell_acquire(const void* token) { __tsan_acquire(const_cast<void*>(token)); }
inline void tell_fence(std::vector<uint32_t>&) {}
inline void tell_fenced_release(const void* token, const std::vector<uint32_t>&) {
  tell_release(token);
}
#else
constexpr bool kThreadSanitizer = false;
struct Quiet {
  Quiet() {}  // not trivial, so that no compiler calls the variable unused
};
inline void tell_read(const void*, size_t) {}
inline void tell_write(void*, size_t) {}
void tell_release(const void* token);
void tell_acquire(const void* token);
// A fence, and a relaxed write behind it: that releases what was known at the fence, and no more.
// ThreadSanitizer knows the running thread alone.
void tell_fence(std::vector<uint32_t>& known);
void tell_fenced_release(const void* token, const std::vector<uint32_t>& known);
#endif

}  // namespace resnet_fused::emulator
