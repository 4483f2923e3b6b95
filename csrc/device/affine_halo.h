// What conv_bn_dgrad multiplies by windows: dy, made of dz and y where they have landed or dz
// itself, and filters. See halo_loader.h.
//
// A gradient's taps lie the other way: pixel m of the input meets filter (r, s) at output pixel
// m + (1 - r) Q + 1 - s, for which a window is entered at (2 - r, 2 - s). y waits in a window of
// its own: it is done with when dy is made, and the next slice's may land.
#pragma once

#include <cstdint>

#include "bn_backward_operand.h"
#include "dgrad_loader.h"
#include "halo_loader.h"
#include "mn_major_loader.h"

namespace resnet_fused {

template <class T, class Shape>
class AffineHalo {
  using Right = MnMajorLoader<T, Shape, LoadWidth::kWide, Shape::kN>;
  static constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));

 public:
  RF_DEVICE AffineHalo(const ConvDgradArguments& arguments, const DgradPlace& place,
                       uint32_t thread)
      : arguments_(arguments),
        filters_(thread),
        first_filter_(place.group * arguments.channels_out) {
    const int32_t n = place.n + filters_.column();
    known_ = n < arguments.channels_in;
    weight_ = static_cast<const T*>(arguments.weight) + first_filter_ * arguments.filter_taps.c + n;
  }

  RF_DEVICE const PixelGrid& grid() const { return arguments_.grid; }
  RF_DEVICE int32_t height() const { return arguments_.h.size; }
  RF_DEVICE int32_t width() const { return arguments_.w.size; }
  RF_DEVICE int32_t channels() const { return arguments_.channels_out; }

  RF_DEVICE void issue_filters(ptx::SharedAddress stage, int32_t first, int32_t r, int32_t s) {
    const Column tap{0, kHaloSide - 1 - s, kHaloSide - 1 - r};
    const int64_t at = offset_of(tap, arguments_.filter_taps);
#pragma unroll
    for (int i = 0; i < Right::kRows; ++i) {
      const int32_t k = first + filters_.row() + i * Right::kRowStep;
      filters_.issue(stage, i, [&](int) {
        return Source<T>{weight_ + at + k * arguments_.filter_taps.c, known_ && k < channels()};
      });
    }
  }

  RF_DEVICE void copy(ptx::SharedAddress at, ptx::SharedAddress beside, const Pixel& pixel,
                      int32_t c, bool known) const {
    const auto copy_of = [&](ptx::SharedAddress to, const void* from, const PixelStrides& strides) {
      const T* unit = static_cast<const T*>(from) + offset_of(pixel, strides) * kUnit;
      ptx::cp_async<kChunkBytes>(to, unit + first_filter_ + c, known);
    };
    copy_of(at, arguments_.dy, arguments_.dy_strides);
    if (turns()) copy_of(beside, arguments_.y, arguments_.y_strides);
  }

  RF_DEVICE bool turns() const { return arguments_.y != nullptr; }
  RF_DEVICE BackwardRows<kUnit> coefficients(int32_t c) const {
    const int32_t filters = arguments_.channels_out * arguments_.tiles.groups;
    const float* from = arguments_.scale + first_filter_ + c;
    BackwardRows<kUnit> rows;
    load_channels(rows.a, from);
    load_channels(rows.b, from + filters);
    load_channels(rows.c, from + int64_t{2} * filters);
    return rows;
  }
  RF_DEVICE void turn(Unit<T, kUnit>& unit, ptx::SharedAddress beside,
                      const BackwardRows<kUnit>& rows) const {
    apply_backward(unit, ptx::load_shared<Unit<T, kUnit>>(beside), rows);
  }

 private:
  const ConvDgradArguments& arguments_;
  Right filters_;
  int32_t first_filter_;  // of the group
  const T* weight_;       // the group's first filter's, of this thread's input channels
  bool known_;            // those exist
};

}  // namespace resnet_fused
