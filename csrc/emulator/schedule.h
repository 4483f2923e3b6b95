// In which order threads run and when asynchronous instructions take effect.
#pragma once

#include <cstdint>

namespace resnet_fused::emulator {

enum class Asynchrony {
  kEager,   // cp.async writes its destination at once
  kLazy,    // as late as is legal: when its group is waited for; until then it is poisoned
  kRandom,  // at a moment between the two
};

// Which thread runs next, warp by warp: a warp goes on as far as it can before another one does.
enum class Order { kForward, kReverse, kShuffled };

// How sums inside of matrix instructions round.
enum class Rounding { kNearest, kTowardZero };

struct Schedule {
  Asynchrony asynchrony = Asynchrony::kEager;
  Order order = Order::kForward;
  Rounding rounding = Rounding::kNearest;
  uint64_t seed = 0;
};

// splitmix64: small, and the same on every platform, so a seed names one run.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }

 private:
  uint64_t state_;
};

}  // namespace resnet_fused::emulator
