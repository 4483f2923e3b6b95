#include "effects.h"

#include <iterator>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

// A warp's collective alone has 32 moments, so that one pace for all effects would be as good as
// eager.
constexpr uint32_t kPaces[] = {1, 16, 256, 0};

uint32_t draw_pace(Grid& grid) {
  if (grid.schedule.asynchrony != Asynchrony::kRandom) return 0;
  return kPaces[grid.random.below(std::size(kPaces))];
}

}  // namespace

uint64_t Effects::add(FiberThread& issuer, uint32_t queue, uint32_t pace,
                      std::function<void()> action) {
  pending_.push_back({++numbers_, queue, pace, &issuer, std::move(action)});
  return numbers_;
}

void Effects::happen(size_t i) {
  const uint64_t number = pending_[i].number;
  const uint32_t queue = pending_[i].queue;
  for (;;) {
    auto first = pending_.begin();
    while (first != pending_.end() && first->queue != queue) ++first;
    if (first == pending_.end() || first->number > number) return;
    const Pending effect = std::move(*first);
    pending_.erase(first);
    struct As {
      explicit As(Thread* issuer) : before(running_thread) { running_thread = issuer; }
      ~As() { running_thread = before; }
      Thread* before;
    } as(effect.issuer);
    ++effect.issuer->block->grid->progress;
    effect.action();
  }
}

void Effects::force(uint64_t number) {
  for (size_t i = 0; i < pending_.size(); ++i) {
    if (pending_[i].number == number) return happen(i);
  }
}

uint64_t effect(uint32_t queue, std::function<void()> action) {
  const Quiet quiet;
  FiberThread& thread = self();
  Grid& grid = *thread.block->grid;
  const uint64_t number = grid.effects.add(thread, queue, draw_pace(grid), std::move(action));
  if (grid.schedule.asynchrony == Asynchrony::kEager) grid.effects.force(number);
  grid.settle_effects();
  return number;
}

uint32_t new_effect_queue() { return self().block->grid->effects.new_queue(); }

void force_effect(uint64_t number) {
  const Quiet quiet;
  self().block->grid->effects.force(number);
}

void Grid::settle_effects() {
  if (schedule.asynchrony != Asynchrony::kRandom) return;
  for (size_t i = effects.pending(); i-- > 0;) {
    if (i >= effects.pending()) continue;  // went with a later one of its queue
    const uint32_t pace = effects.pace(i);
    if (pace != 0 && random.below(pace) == 0) effects.happen(i);
  }
}

}  // namespace resnet_fused::emulator
