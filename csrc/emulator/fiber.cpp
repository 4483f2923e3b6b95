// The context switch: the registers that the platform's calling convention preserves, and nothing
// else (System V x86-64 ABI, table "Register Usage"; AAPCS64, "General-purpose Registers" and "SIMD
// and Floating-Point Registers"). Other machines take ucontext, which also saves the signal mask.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RF_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define RF_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define RF_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define RF_TSAN 1
#endif

#if defined(RF_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(RF_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#define RF_UCONTEXT 1
#include <ucontext.h>
#endif

// Across a switch ThreadSanitizer already counts for one fiber what another one is still doing.
#define RF_UNTRACED __attribute__((no_sanitize("thread")))

namespace resnet_fused::emulator {
namespace {

#if defined(RF_ASAN) || defined(RF_TSAN)
constexpr size_t kStackBytes = 256 * 1024;  // instrumented frames are several times larger
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

// Stacks are kept for the next block: a mapping costs more than a small block's run.
struct StackPool {
  std::vector<char*> free;

  ~StackPool() {
    for (char* stack : free) munmap(stack - guard_bytes(), kStackBytes + guard_bytes());
  }
  static size_t guard_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  char* take() {
    if (!free.empty()) {
      char* stack = free.back();
      free.pop_back();
      return stack;
    }
    const size_t guard = guard_bytes();
    void* memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // An overflow then faults here instead of writing into the neighbour's stack.
    if (mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(memory) + guard;
  }
};

thread_local StackPool pool;
thread_local Fiber* switched_from = nullptr;  // read by the fiber that has just begun to run
thread_local Fiber* running = nullptr;

#if defined(RF_UCONTEXT)
RF_UNTRACED void ucontext_entry() { running->entry(running->argument); }
#endif

}  // namespace

#if !defined(RF_UCONTEXT)
extern "C" {
void rf_emulator_switch(void** save_stack_pointer, void* stack_pointer);
void rf_emulator_enter();
RF_UNTRACED __attribute__((used, visibility("hidden"))) void rf_emulator_start() {
  running->entry(running->argument);
}
}
#endif

#if defined(__x86_64__)
// rdi: where to save the stack pointer, rsi: the one to go on with.
asm(R"(
.text
.globl rf_emulator_switch
.hidden rf_emulator_switch
.type rf_emulator_switch, @function
rf_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rf_emulator_switch, .-rf_emulator_switch
.globl rf_emulator_enter
.hidden rf_emulator_enter
.type rf_emulator_enter, @function
rf_emulator_enter:
  xorl %ebp, %ebp
  call rf_emulator_start
  ud2
.size rf_emulator_enter, .-rf_emulator_enter
)");
constexpr int kSavedWords = 6;
#elif defined(__aarch64__)
// x0: where to save the stack pointer, x1: the one to go on with.
asm(R"(
.text
.globl rf_emulator_switch
.hidden rf_emulator_switch
.type rf_emulator_switch, %function
rf_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size rf_emulator_switch, .-rf_emulator_switch
.globl rf_emulator_enter
.hidden rf_emulator_enter
.type rf_emulator_enter, %function
rf_emulator_enter:
  mov x29, xzr
  bl rf_emulator_start
  brk #0
.size rf_emulator_enter, .-rf_emulator_enter
)");
#endif

Fiber::~Fiber() {
#if defined(RF_UCONTEXT)
  delete static_cast<ucontext_t*>(stack_pointer);
#endif
  release();
}

void Fiber::prepare(void (*entry_)(void*), void* argument_) {
  if (stack_ == nullptr) stack_ = pool.take();
  entry = entry_;
  argument = argument_;
  known_bottom_ = stack_;
  known_size_ = kStackBytes;
  fake_stack_ = nullptr;
#if defined(RF_ASAN)
  // A fiber that was abandoned, or that a longer frame used before, has left its redzones behind.
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
#endif
#if defined(RF_TSAN)
  sanitizer_ = __tsan_create_fiber(0);
#endif
#if defined(RF_UCONTEXT)
  if (stack_pointer == nullptr) stack_pointer = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(stack_pointer);
  getcontext(context);
  context->uc_stack = {stack_, 0, kStackBytes};
  context->uc_link = nullptr;
  makecontext(context, ucontext_entry, 0);
#elif defined(__x86_64__)
  // `ret` pops rf_emulator_enter and leaves the stack 16-byte aligned, which its call needs.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStackBytes) - 3;
  *top = reinterpret_cast<uint64_t>(&rf_emulator_enter);
  std::memset(top - kSavedWords, 0, kSavedWords * sizeof(uint64_t));
  stack_pointer = top - kSavedWords;
#else
  char* top = stack_ + kStackBytes - 160;
  std::memset(top, 0, 160);
  auto address = reinterpret_cast<uint64_t>(&rf_emulator_enter);
  std::memcpy(top + 88, &address, sizeof address);  // x30
  stack_pointer = top;
#endif
}

void Fiber::release() {
  if (stack_ == nullptr) return;
#if defined(RF_TSAN)
  // A fiber that an error has left hanging inside of the runtime ignores its accesses for ever,
  // which ThreadSanitizer takes amiss when it ends; so it does not end.
  if (finished_) __tsan_destroy_fiber(sanitizer_);
  sanitizer_ = nullptr;
  // Unmapped rather than kept, or the next fiber's frames would race with this one's.
  munmap(stack_ - StackPool::guard_bytes(), kStackBytes + StackPool::guard_bytes());
#else
  pool.free.push_back(stack_);
#endif
  stack_ = nullptr;
}

RF_UNTRACED void Fiber::switch_to(Fiber& from, Fiber& to, bool last) {
  switched_from = &from;
  running = &to;
  from.finished_ = last;
#if defined(RF_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack_, to.known_bottom_,
                                 to.known_size_);
#endif
#if defined(RF_TSAN)
  if (from.sanitizer_ == nullptr) from.sanitizer_ = __tsan_get_current_fiber();
  // No synchronisation: that one fiber runs after another orders nothing in the kernel.
  __tsan_switch_to_fiber(to.sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(RF_UCONTEXT)
  if (from.stack_pointer == nullptr) from.stack_pointer = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
              static_cast<ucontext_t*>(to.stack_pointer));
#else
  rf_emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(RF_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

RF_UNTRACED void Fiber::entered() {
#if defined(RF_ASAN)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  // The host thread's own stack becomes known when it is left for the first time.
  if (switched_from->stack_ == nullptr) {
    switched_from->known_bottom_ = bottom;
    switched_from->known_size_ = size;
  }
#endif
}

}  // namespace resnet_fused::emulator
