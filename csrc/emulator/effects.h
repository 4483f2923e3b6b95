// What asynchronous instructions do, at moments that the schedule chooses.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>

namespace resnet_fused::emulator {

struct FiberThread;

// Something that happens between its issue and the wait for it: eager at once, lazy when it is
// forced or nobody can go on without it, random in between while any threads run: each draws how
// soon it likes to happen, some at once and some as late as can be. Effects of one
// queue happen in order. The action runs as its issuer (self(), fail()), must not wait, and may
// have the issuer's block alone in mind. Returns a number for force_effect.
uint64_t effect(uint32_t queue, std::function<void()> action);
uint32_t new_effect_queue();  // numbers of the running launch
// Lets it happen now, if it has not yet, after those before it in its queue.
void force_effect(uint64_t number);

// The launch's side.
class Effects {
 public:
  // `pace`: at each moment of a random schedule one chance in so many; 0: none.
  uint64_t add(FiberThread& issuer, uint32_t queue, uint32_t pace, std::function<void()> action);
  uint32_t new_queue() { return ++queues_; }
  bool empty() const { return pending_.empty(); }
  void force(uint64_t number);
  // The i-th of the pending ones, with those before it in its queue.
  void happen(size_t i);
  size_t pending() const { return pending_.size(); }
  uint32_t pace(size_t i) const { return pending_[i].pace; }
  void clear() { pending_.clear(); }

 private:
  struct Pending {
    uint64_t number;
    uint32_t queue;
    uint32_t pace;
    FiberThread* issuer;
    std::function<void()> action;
  };

  uint64_t numbers_ = 0;
  uint32_t queues_ = 0;
  std::deque<Pending> pending_;  // by number
};

}  // namespace resnet_fused::emulator
