#include "effects.h"

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {

uint64_t Effects::add(FiberThread& issuer, uint32_t queue, std::function<void()> action) {
  pending_.push_back({++numbers_, queue, &issuer, std::move(action)});
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
  const uint64_t number = grid.effects.add(thread, queue, std::move(action));
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
  for (size_t tries = effects.pending(); tries > 0 && !effects.empty(); --tries) {
    if (random.below(4) != 0) continue;
    effects.happen(random.below(static_cast<uint32_t>(effects.pending())));
  }
}

}  // namespace resnet_fused::emulator
