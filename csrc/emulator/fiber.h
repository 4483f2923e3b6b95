// A thread of control with a stack of its own, switched by hand: one for each CUDA thread.
#pragma once

#include <cstddef>

namespace resnet_fused::emulator {

class Fiber {
 public:
  // The host thread's own stack: what a launch returns to.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Takes a stack and prepares it so that the first switch calls entry(argument), which must leave
  // by switching for good (`last`) and never return. Throws std::bad_alloc without memory.
  void prepare(void (*entry)(void*), void* argument);
  // Gives the stack back; the fiber must not run.
  void release();

  // Leaves `from`, which must be running, and goes on where `to` left off. `last`: `from` will not
  // run again.
  static void switch_to(Fiber& from, Fiber& to, bool last = false);
  // Every prepared fiber calls this first.
  static void entered();

  void* stack_pointer = nullptr;  // for the assembly
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;

 private:
  char* stack_ = nullptr;  // its lowest byte, above the guard page
  const void* known_bottom_ = nullptr;
  size_t known_size_ = 0;
  bool finished_ = false;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* sanitizer_ = nullptr;   // ThreadSanitizer's
};

}  // namespace resnet_fused::emulator
