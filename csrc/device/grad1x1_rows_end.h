// What conv_bn_grad1x1_end by mma.sync makes of a step's dx, in the place of what Grad1x1RowsFinish
// does.
//
// x is `out`, the end of the block before: the products read it where it has landed, and its sign
// is the mask. The sums are against that block's last raw output, and behind a projection against
// the projection's: a thread asks for its own pairs of these ahead of what a step waits for.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "grad1x1_rows.h"

namespace resnet_fused {

template <class T, class Shape>
class Grad1x1RowsEnd {
  using Rows = Grad1x1Rows<T, Shape>;

 public:
  using Arguments = Grad1x1EndArguments;
  static constexpr bool kInPlace = false;
  struct Beside {
    typename Rows::Pairs raw = {};
    typename Rows::Pairs residual = {};
  };

  static RF_DEVICE const Grad1x1Arguments& shared(const Arguments& told) { return told.shared; }

  RF_DEVICE Grad1x1RowsEnd(const Arguments& told, const Rows& rows, uint32_t /*thread*/,
                           int32_t first_channel, int32_t columns)
      : told_(told), rows_(rows), first_channel_(first_channel), columns_(columns) {}

  RF_DEVICE void load_means() {
    rows_.load_means(mean_, told_.mean + first_channel_, columns_);
    if (projected()) {
      rows_.load_means(other_mean_, told_.residual_mean + first_channel_, columns_);
    }
  }

  RF_DEVICE void ask(Beside& beside, int32_t first, int32_t end) const {
    load(beside.raw, told_.raw, told_.raw_pixel, first, end);
    if (projected()) load(beside.residual, told_.residual, told_.residual_pixel, first, end);
  }

  // Zeros behind the last pixel and channel have come with it.
  RF_DEVICE ptx::SharedAddress turn(ptx::SharedAddress out, ptx::SharedAddress /*to*/,
                                    int32_t /*first*/, int32_t /*end*/) const {
    return out;
  }

  RF_DEVICE void finish(Pair<T>& dx, int i, int j, bool known, ptx::SharedAddress out,
                        ptx::SharedAddress /*h*/, const Beside& beside) {
    mask_pair(dx, ptx::load_shared<Pair<T>>(out + rows_.offset(i, j)));
    if (!known) return;
    add_pair(sums_[0], j, dx);
    add_off_mean(sums_[1], j, dx, beside.raw[i][j], mean_);
    if (projected()) add_off_mean(sums_[2], j, dx, beside.residual[i][j], other_mean_);
  }

  RF_DEVICE void leave(ptx::SharedAddress shared, int32_t part) {
    const Grad1x1Arguments& of = told_.shared;
    rows_.leave(sums_, shared, columns_, of.sum_rows,
                of.partial_sums + int64_t{of.sum_rows} * part * of.channels + first_channel_,
                of.channels);
  }

 private:
  RF_DEVICE bool projected() const { return told_.residual != nullptr; }
  RF_DEVICE void load(typename Rows::Pairs& pairs, const void* tensor, int64_t pixel, int32_t first,
                      int32_t end) const {
    rows_.load(pairs, columns_, [&](int32_t row) -> const T* {
      const int32_t m = first + row;
      return m < end ? static_cast<const T*>(tensor) + m * pixel + first_channel_ : nullptr;
    });
  }

  const Arguments& told_;
  Rows rows_;
  int32_t first_channel_;
  int32_t columns_;
  typename Rows::Sums mean_ = {};
  typename Rows::Sums other_mean_ = {};
  typename Rows::Sums sums_[3] = {};
};

}  // namespace resnet_fused
