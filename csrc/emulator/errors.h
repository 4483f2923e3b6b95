// Where a kernel calls an instruction, and the exception that every check of the emulator throws.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "thread.h"

namespace resnet_fused::emulator {

// A line of the kernel: wrappers take it as a defaulted argument, which the caller's line fills.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

enum class ErrorKind {
  kUsage,       // an operand that the instruction does not accept
  kAddress,     // out of bounds or misaligned
  kState,       // bytes that nobody has written, or that a copy in flight will write
  kRace,        // two threads, one of them writing, with no barrier between them
  kDivergence,  // lanes of a warp meet in different instructions
  kDeadlock,    // nobody can go on
  kLimit,       // a launch that the hardware would refuse
  kStopped,     // the session asked to stop here
};

const char* name_of(ErrorKind kind);

// "csrc/kernels/x.cuh" for "csrc/launch/../kernels/x.cuh", which is what the compiler says.
std::string normal_path(const char* file);

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message, Site site, const char* instruction,
        uint3 block_index, int thread)
      : std::runtime_error(message),
        kind(kind),
        file(normal_path(site.file)),
        line(site.line),
        instruction(instruction),
        block_index(block_index),
        thread(thread) {}

  ErrorKind kind;
  std::string file;
  int line;
  std::string instruction;
  uint3 block_index;
  int thread;  // in the block, x fastest; -1: no single thread
};

// Throws an Error that names the running block and thread, the instruction and file:line.
[[noreturn]] void fail(ErrorKind kind, Site site, const char* instruction, const std::string& what);
[[noreturn]] inline void fail(Site site, const char* instruction, const std::string& what) {
  fail(ErrorKind::kUsage, site, instruction, what);
}

// "conv.cuh:12", without the folders.
std::string describe(Site site);
// "thread 37 (5, 1, 0)"
std::string describe_thread(int linear, dim3 block_size);
std::string hex(uint64_t value);

}  // namespace resnet_fused::emulator
