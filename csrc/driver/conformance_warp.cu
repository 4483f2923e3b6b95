// Shuffles, votes, barriers and the waits of dependent grids.
#include "../ptx/clock.h"
#include "conformance.h"

namespace resnet_fused::conformance {
namespace {

enum class Mode { kIndex, kXor, kDown, kUp };

// input: [32] values, [32] operands by lane, the mask, three unused. Lanes outside of the mask call
// nothing.
// output: [32] results by lane; 0 outside of the mask
template <Mode kMode>
struct Shuffle : WarpBody {
  static constexpr int kInputWords = 68;
  static constexpr int kOutputWords = 32;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const uint32_t value = load_word(input, lane);
    const int operand = static_cast<int>(load_word(input, 32 + lane));
    const uint32_t mask = load_word(input, 64);
    if ((mask >> lane & 1u) == 0) return;
    uint32_t result;
    if constexpr (kMode == Mode::kIndex) {
      result = ptx::shuffle(mask, value, operand);
    } else if constexpr (kMode == Mode::kXor) {
      result = ptx::shuffle_xor(mask, value, operand);
    } else if constexpr (kMode == Mode::kDown) {
      result = ptx::shuffle_down(mask, value, operand);
    } else {
      result = ptx::shuffle_up(mask, value, operand);
    }
    ptx::store_global(output + lane, result);
  }
};

enum class Vote { kBallot, kAny, kAll };

// input: [32] predicates by lane, the mask, three unused
// output: [32] results by lane; 0 outside of the mask
template <Vote kVote>
struct Votes : WarpBody {
  static constexpr int kInputWords = 36;
  static constexpr int kOutputWords = 32;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const bool predicate = load_word(input, lane) != 0;
    const uint32_t mask = load_word(input, 32);
    if ((mask >> lane & 1u) == 0) return;
    uint32_t result;
    if constexpr (kVote == Vote::kBallot) {
      result = ptx::ballot(mask, predicate);
    } else if constexpr (kVote == Vote::kAny) {
      result = ptx::any(mask, predicate) ? 1 : 0;
    } else {
      result = ptx::all(mask, predicate) ? 1 : 0;
    }
    ptx::store_global(output + lane, result);
  }
};

// input: [32] values, [32] the lane whose value each lane reads (in the mask), the mask, three
// unused
// output: [32] by lane; 0 outside of the mask
struct SyncWarp : WarpBody {
  static constexpr uint32_t kSharedBytes = 32 * 4;
  static constexpr int kInputWords = 68;
  static constexpr int kOutputWords = 32;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const uint32_t source = load_word(input, 32 + lane);
    const uint32_t mask = load_word(input, 64);
    if ((mask >> lane & 1u) == 0) return;
    ptx::store_shared(shared_base() + 4 * lane, load_word(input, lane));
    ptx::sync_warp(mask);
    ptx::store_global(output + lane, ptx::load_shared<uint32_t>(shared_base() + 4 * source));
  }
};

// input: [128] values, [128] the thread whose value each thread reads
// output: [128]
struct SyncThreads : WarpBody {
  static constexpr int kThreads = 128;
  static constexpr uint32_t kSharedBytes = kThreads * 4;
  static constexpr int kInputWords = 2 * kThreads;
  static constexpr int kOutputWords = kThreads;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t thread = threadIdx.x;
    const uint32_t source = load_word(input, kThreads + thread);
    ptx::store_shared(shared_base() + 4 * thread, load_word(input, thread));
    ptx::sync_threads();
    ptx::store_global(output + thread, ptx::load_shared<uint32_t>(shared_base() + 4 * source));
  }
};

// The two halves of a block meet at a barrier of their own.
// input: [128] values, [128] the thread of the same half whose value each thread reads, [2] the
// halves' barriers, two unused
// output: [128]
struct BarrierSync : WarpBody {
  static constexpr int kThreads = 128;
  static constexpr uint32_t kSharedBytes = kThreads * 4;
  static constexpr int kInputWords = 2 * kThreads + 4;
  static constexpr int kOutputWords = kThreads;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t thread = threadIdx.x;
    const uint32_t source = load_word(input, kThreads + thread);
    const uint32_t id = load_word(input, 2 * kThreads + thread / 64);
    ptx::store_shared(shared_base() + 4 * thread, load_word(input, thread));
    ptx::barrier_sync(static_cast<int>(id), 64);
    ptx::store_global(output + thread, ptx::load_shared<uint32_t>(shared_base() + 4 * source));
  }
};

// The first half of a block writes and arrives, the second waits and reads.
// input: [64] values, [64] the thread whose value each reads, the barrier, three unused
// output: [64]
struct BarrierArrive : WarpBody {
  static constexpr int kThreads = 128;
  static constexpr uint32_t kSharedBytes = 64 * 4;
  static constexpr int kInputWords = 132;
  static constexpr int kOutputWords = 64;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t thread = threadIdx.x % 64;
    const auto id = static_cast<int>(load_word(input, 128));
    if (threadIdx.x < 64) {
      ptx::store_shared(shared_base() + 4 * thread, load_word(input, thread));
      ptx::barrier_arrive(id, kThreads);
    } else {
      const uint32_t source = load_word(input, 64 + thread);
      ptx::barrier_sync(id, kThreads);
      ptx::store_global(output + thread, ptx::load_shared<uint32_t>(shared_base() + 4 * source));
    }
  }
};

// Launched without the attribute that lets grids overlap: both instructions let it pass. What comes
// to L2 ahead of the wait changes nothing, and no clock runs backwards.
// input: [32]; output: [32], the same
struct GridDependency : WarpBody {
  static constexpr int kInputWords = 32;
  static constexpr int kOutputWords = 32;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const int64_t begun = ptx::clock_cycles();
    ptx::prefetch_l2(input + threadIdx.x);
    ptx::grid_dependency_wait();
    const uint32_t value = load_word(input, threadIdx.x);
    ptx::grid_dependency_launch();
    const auto back = static_cast<uint32_t>(ptx::clock_cycles() < begun);
    ptx::store_global(output + threadIdx.x, value + back);
  }
};

}  // namespace

std::vector<Instruction> warp_instructions() {
  return {
      describe<Shuffle<Mode::kIndex>>("shuffle"),
      describe<Shuffle<Mode::kXor>>("shuffle_xor"),
      describe<Shuffle<Mode::kDown>>("shuffle_down"),
      describe<Shuffle<Mode::kUp>>("shuffle_up"),
      describe<Votes<Vote::kBallot>>("ballot"),
      describe<Votes<Vote::kAny>>("any"),
      describe<Votes<Vote::kAll>>("all"),
      describe<SyncWarp>("sync_warp"),
      describe<SyncThreads>("sync_threads"),
      describe<BarrierSync>("barrier_sync"),
      describe<BarrierArrive>("barrier_arrive"),
      describe<GridDependency>("grid_dependency"),
  };
}

}  // namespace resnet_fused::conformance
