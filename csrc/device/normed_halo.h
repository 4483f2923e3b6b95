// What conv_bn_stats multiplies by windows: pixels, read through the BatchNorm and ReLU of the
// layer before or as they are, and filters. See halo_loader.h.
#pragma once

#include <cstdint>

#include "conv_loader.h"
#include "halo_loader.h"
#include "normed_operand.h"
#include "stats_geometry.h"

namespace resnet_fused {

template <class T, class Shape>
class NormedHalo {
  using Right = RowLoader<T, Shape, LoadWidth::kWide, Shape::kN>;
  static constexpr int kUnit = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowStep = Shape::kThreads / kLoadLanes;

 public:
  RF_DEVICE NormedHalo(const ConvBnStatsArguments& arguments, const Tile& tile, uint32_t thread)
      : arguments_(arguments),
        right_(thread),
        lane_(static_cast<int32_t>(thread % kLoadLanes)),
        first_channel_(tile.group * arguments.operands.reduction.channels) {
    const ConvOperands& operands = arguments.operands;
    const int32_t n = tile.n * Shape::kN + static_cast<int32_t>(thread / kLoadLanes);
    filters_left_ = operands.filters - n;
    filter_ = static_cast<int32_t>((static_cast<int64_t>(tile.group) * operands.filters + n) *
                                   operands.filter_stride);
    x_ = static_cast<const T*>(operands.x) + tile.group * operands.image.group_stride;
  }

  RF_DEVICE const PixelGrid& grid() const { return arguments_.operands.grid; }
  RF_DEVICE int32_t height() const { return arguments_.operands.image.height; }
  RF_DEVICE int32_t width() const { return arguments_.operands.image.width; }
  RF_DEVICE int32_t channels() const { return arguments_.operands.reduction.channels; }

  RF_DEVICE void issue_filters(ptx::SharedAddress stage, int32_t first, int32_t r, int32_t s) {
    const ConvOperands& operands = arguments_.operands;
    const int32_t c = first + lane_ * kUnit;
    const int32_t column = c / kUnit + r * static_cast<int32_t>(operands.filter_columns.r) +
                           s * static_cast<int32_t>(operands.filter_columns.s);
    const bool known = c < channels();
    right_.issue(stage, 0, [&](int i, int) {
      const int32_t row = i * kRowStep * static_cast<int32_t>(operands.filter_stride);
      const auto* from =
          static_cast<const T*>(operands.weight) + (filter_ + row + column) * int64_t{kUnit};
      return Source<T>{from, known && i * kRowStep < filters_left_};
    });
  }

  RF_DEVICE void copy(ptx::SharedAddress at, ptx::SharedAddress, const Pixel& pixel, int32_t c,
                      bool known) const {
    const ImageGather& image = arguments_.operands.image;
    const int64_t offset =
        pixel.n * image.image_stride + pixel.p * image.row_stride + pixel.q * image.pixel_stride;
    ptx::cp_async<kChunkBytes>(at, x_ + offset * kUnit + c, known);
  }

  RF_DEVICE bool turns() const { return arguments_.scale != nullptr; }
  struct Coefficients {
    float scale[kUnit];
    float shift[kUnit];
  };
  RF_DEVICE Coefficients coefficients(int32_t c) const {
    Coefficients found;
    load_channels(found.scale, arguments_.scale + first_channel_ + c);
    load_channels(found.shift, arguments_.shift + first_channel_ + c);
    return found;
  }
  RF_DEVICE void turn(Unit<T, kUnit>& unit, ptx::SharedAddress,
                      const Coefficients& coefficients) const {
    normalise(unit, coefficients.scale, coefficients.shift);
  }

 private:
  const ConvBnStatsArguments& arguments_;
  Right right_;
  int32_t lane_;
  int32_t first_channel_;  // of the group
  const T* x_;             // the group's first channel of pixel (0, 0, 0)
  int32_t filter_;         // 16 bytes from the weights' first
  int32_t filters_left_;   // rows that exist from this thread's first one on
};

}  // namespace resnet_fused
