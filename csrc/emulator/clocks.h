// Vector clocks: what each warp knows of the others' progress, and of the phases of mbarriers.
//
// Each warp of a block, or of all blocks of a cluster, has a column; each mbarrier has one more,
// whose epochs are its phases. A row says up to which epoch of each column a warp has been told.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace resnet_fused::emulator {

// What one thread has been told.
struct Seen {
  const uint32_t* known;
  int own_column;
  uint32_t own_epoch;

  // Whether what happened in that epoch comes before what the thread does now. Within the thread's
  // own warp only a barrier, which ends the epoch, orders two lanes.
  bool before(int column, uint32_t epoch) const {
    return column == own_column ? epoch < own_epoch : epoch <= known[column];
  }
};

class Clocks {
 public:
  // Epochs up to `base` belong to earlier blocks.
  Clocks(int warps, uint32_t base)
      : base_(base), epochs_(warps, base + 1), rows_(warps, std::vector<uint32_t>(warps, base)) {
    for (int warp = 0; warp < warps; ++warp) rows_[warp][warp] = base + 1;
  }

  uint32_t base() const { return base_; }
  int warps() const { return static_cast<int>(rows_.size()); }
  uint32_t newest() const { return *std::max_element(epochs_.begin(), epochs_.end()); }
  uint32_t epoch(int column) const { return epochs_[column]; }

  // A column of its own for an mbarrier; nobody knows anything of it yet.
  int add_column() {
    epochs_.push_back(base_ + 1);
    for (auto& row : rows_) row.resize(epochs_.size(), base_);
    return static_cast<int>(epochs_.size()) - 1;
  }
  void advance(int column) {
    ++epochs_[column];
    if (column < warps()) rows_[column][column] = epochs_[column];
  }

  const std::vector<uint32_t>& row(int warp) const { return rows_[warp]; }
  Seen seen(int warp) const { return {rows_[warp].data(), warp, epochs_[warp]}; }

  // Adds `row` to a clock that may be shorter; or what a clock holds to a warp's row.
  static void join(std::vector<uint32_t>& clock, const std::vector<uint32_t>& row) {
    if (clock.size() < row.size()) clock.resize(row.size(), 0);
    for (size_t i = 0; i < row.size(); ++i) clock[i] = std::max(clock[i], row[i]);
  }
  void learn(int warp, const std::vector<uint32_t>& clock) {
    join(rows_[warp], clock);
    rows_[warp][warp] = epochs_[warp];
  }
  void everybody_meets() {
    std::vector<uint32_t> all;
    for (const auto& row : rows_) join(all, row);
    for (int warp = 0; warp < warps(); ++warp) learn(warp, all);
    for (int warp = 0; warp < warps(); ++warp) advance(warp);
  }

 private:
  uint32_t base_;
  std::vector<uint32_t> epochs_;             // [columns]
  std::vector<std::vector<uint32_t>> rows_;  // [warps][columns]
};

}  // namespace resnet_fused::emulator
