// One small kernel for each function of csrc/ptx, over given words: what the hardware and the
// emulator are compared on. A case is one block; its input and output are words in an order that
// the kernel's comment states. Pads make both multiples of 16 bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "../launch/launch.h"
#include "../ptx/ptx.h"

namespace resnet_fused::conformance {

struct Instruction {
  const char* name;
  int input_words;   // of a case
  int output_words;  // of a case; zeros before the launch
  int threads;       // of a block
  int oldest_sm;     // 80, or 90 where the instruction came with it
  // Starts one block a case; 0 or a cudaError_t.
  int (*launch)(int cases, const uint32_t* input, uint32_t* output);
  bool of_sm90a = false;  // no GPU runs it but those of capability 9.0

  bool runs_on(int sm) const { return of_sm90a ? sm == 90 : sm >= oldest_sm; }
};

inline Instruction of_sm90a(Instruction instruction) {
  instruction.of_sm90a = true;
  return instruction;
}

std::vector<Instruction> matrix_instructions();
std::vector<Instruction> warp_instructions();
std::vector<Instruction> memory_instructions();
std::vector<Instruction> atomic_instructions();
std::vector<Instruction> wgmma_instructions();
std::vector<Instruction> copy_instructions();
std::vector<Instruction> cluster_instructions();

// A Body has the constants of an Instruction and run(input, output) for a thread of its block.
template <class Body>
__global__ void __launch_bounds__(Body::kThreads, 1)
    conformance_kernel(const uint32_t* input,  // [cases, kInputWords]
                       uint32_t* output) {     // [cases, kOutputWords]
  Body::run(input + blockIdx.x * Body::kInputWords, output + blockIdx.x * Body::kOutputWords);
}

template <class Body>
int launch_body(int cases, const uint32_t* input, uint32_t* output) {
  return RF_LAUNCH(conformance_kernel<Body>, dim3(static_cast<uint32_t>(cases)),
                   dim3(Body::kThreads), Body::kSharedBytes, nullptr, input, output);
}

// What most bodies are: one warp, no shared memory, any architecture.
struct WarpBody {
  static constexpr int kThreads = 32;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr int kOldestSm = 80;
};

template <class Body>
Instruction describe(const char* name) {
  static_assert(Body::kInputWords % 4 == 0 && Body::kOutputWords % 4 == 0);
  return {name,           Body::kInputWords, Body::kOutputWords,
          Body::kThreads, Body::kOldestSm,   launch_body<Body>};
}

// This thread's word of `words` (global).
RF_DEVICE uint32_t load_word(const uint32_t* words, uint32_t index) {
  return ptx::load_global(words + index);
}

RF_DEVICE ptx::SharedAddress shared_base() { return ptx::shared_address(ptx::dynamic_shared()); }

}  // namespace resnet_fused::conformance
