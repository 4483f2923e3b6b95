// The pixels of a convolution's steps, as they lie in a ring, through the BatchNorm and ReLU of the
// layer before.
#pragma once

#include <cstdint>

#include "normed_operand.h"
#include "tap_steps.h"
#include "transform_ring.h"
#include "vector.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// The way of those who transform through the steps of their block's tiles, stage after stage.
template <class T, class Shape>
class NormedSteps : public TapSteps<T, Shape> {
  using Rows = TransformRows<Shape::kPixels>;
  static_assert(Rows::kPasses <= 32, "a bit for each of a thread's rows");

 public:
  // thread: of those who transform.
  RF_DEVICE NormedSteps(const ConvTmaArguments& arguments, const NormedImages& images,
                        const TileWalk& walk, uint32_t thread)
      : TapSteps<T, Shape>(arguments, walk), images_(images), rows_(thread) {}

  // Fetches the step's scale and shift, while it may still be on its way.
  RF_DEVICE void prepare() {
    const Column& at = this->column_;
    const int32_t c = at.c + rows_.channel();
    const bool known = c < this->arguments_->reduction.channels;
    load(scale_, images_.scale + this->channel_ + c, known);
    load(shift_, images_.shift + this->channel_ + c, known);
    if (at.c == 0 && padded()) inside_ = rows_inside();
  }

  // A step that has come.
  RF_DEVICE void transform(ptx::SharedAddress stage) const {
    uint32_t inside = inside_;
    rows_.each(stage + Shape::kPixelsAt, [&](RowUnit& unit) {
      // What lies beside an image is zero behind the ReLU.
      const uint32_t kept = (inside & 1) != 0 ? ~0u : 0u;
      inside >>= 1;
      normalise_pairs<T>(unit.value, scale_, shift_);
#pragma unroll
      for (uint32_t& pair : unit.value) pair &= kept;
    });
  }

 private:
  // Channels behind the last one stay zeros, whatever shift lies there.
  static RF_DEVICE void load(float (&values)[kUnitChannels], const float* from, bool known) {
#pragma unroll
    for (int i = 0; i < kUnitChannels; i += kVectorLength<float>) {
      const auto part = known ? load_vector(from + i) : Vector<float>{};
#pragma unroll
      for (int e = 0; e < kVectorLength<float>; ++e) values[i + e] = part.lane[e];
    }
  }

  // Without padding no tap of a pixel lies beside its image.
  RF_DEVICE bool padded() const {
    return this->arguments_->origin_h < 0 || this->arguments_->origin_w < 0;
  }

  // Which of the thread's rows the step's tap sees inside of their image, bit by bit. Rows behind
  // the last pixel may be either.
  RF_DEVICE uint32_t rows_inside() const {
    const ConvTmaArguments& told = *this->arguments_;
    const int32_t h = told.origin_h + this->column_.r * told.step_h;
    const int32_t w = told.origin_w + this->column_.s * told.step_w;
    const int32_t first = this->tile_.pixels * Shape::kPixels;
    uint32_t inside = 0;
#pragma unroll 1
    for (int i = 0; i < Rows::kPasses; ++i) {
      const Pixel pixel = pixel_of(first + rows_.row(i), told.grid);
      // As unsigned numbers those ahead of an image are beyond it.
      const auto row = static_cast<uint32_t>(pixel.p * told.stride_h + h);
      const auto column = static_cast<uint32_t>(pixel.q * told.stride_w + w);
      const bool known = row < static_cast<uint32_t>(images_.height) &&
                         column < static_cast<uint32_t>(images_.width);
      inside |= static_cast<uint32_t>(known) << i;
    }
    return inside;
  }

  const NormedImages& images_;
  Rows rows_;
  uint32_t inside_ = ~0u;
  float scale_[kUnitChannels];
  float shift_[kUnitChannels];
};

#endif

}  // namespace resnet_fused
