// conv_bn_act for sm_90a on float32: products in TF32, and the epilogue of their sums: scale,
// shift, shortcut and ReLU in fp32, nothing rounded, and a store by TMA. Beside
// warpgroup_epilogue.h.
//
// wgmma ignores the low 13 bits of what it reads. x and weight are rounded to the others on their
// way into shared memory: TMA does so where a tensor map says TFLOAT32 (launch/tensor_map.h).
#pragma once

#include <cstdint>

#include "bn_act.h"
#include "conv_types.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

template <>
struct ProductOf<float> {
  using type = ptx::Tf32;
};

// 64 channels, the rows of the sums, by kColumns pixels as they lie in the staging: two boxes of 32
// channels, each a row of 128 bytes for every pixel, with the swizzle of 128 bytes.
template <int kColumns>
class StagedFloats {
 public:
  static constexpr int kBoxChannels = kStepRowBytes / 4;
  static constexpr int kBoxes = kWarpgroupRows / kBoxChannels;
  static constexpr int kBoxBytes = kColumns * kStepRowBytes;
  static constexpr int kBytes = kBoxes * kBoxBytes;
  static_assert(kColumns % 8 == 0 && kColumns <= 256, "whole patterns, of at most 256 pixels");

  // thread: of the warpgroup. With g = lane / 4 and t = lane % 4 it has the channels g and g + 8 of
  // a warp's 16, and the pixels 2 t and 2 t + 1 of each eight. What a warp stores at a time is
  // eight channels of four pixels two apart: of each pair of 16-byte units, which change places by
  // bits 1 and 2 of the pixel, another one, 32 banks.
  RF_DEVICE StagedFloats(ptx::SharedAddress start, uint32_t thread) : start_(start) {
    const uint32_t warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    const uint32_t unit = warp % 2 * 4 + g / 4;
    place_ = start + warp / 2 * kBoxBytes + 2 * t * kStepRowBytes + (unit ^ 2 * t) * 16 + g % 4 * 4;
  }

  RF_DEVICE ptx::SharedAddress box(int i) const { return start_ + i * kBoxBytes; }

  // Of the sum d[4 j + 2 side + next].
  RF_DEVICE ptx::SharedAddress at(int j, int side, int next) const {
    return (place_ ^ (side * 32 + next * 16)) + (8 * j + next) * kStepRowBytes;
  }

 private:
  ptx::SharedAddress start_;
  ptx::SharedAddress place_;
};

template <Orientation kOrientation, int kColumns>
class Tf32Epilogue : public StagedEpilogue<StagedFloats<kColumns>, kOrientation, kColumns> {
  using Staged = StagedFloats<kColumns>;
  using Base = StagedEpilogue<Staged, kOrientation, kColumns>;
  static_assert(kOrientation == Orientation::kChannelsLeft, "a row of sums is a channel");

 public:
  static constexpr int kStagingBytes = Staged::kBytes;
  using Base::Base;

  // As WarpgroupEpilogue's.
  RF_DEVICE void finish(const float (&d)[kColumns / 2], float floor, const ptx::TensorMap* out,
                        bool residual, const OutputPlace& place, int32_t channels) {
    this->wait_for_vectors();
    if (residual) {
      this->wait_for_residual();
      put_results<true>(d, floor);
    } else {
      put_results<false>(d, floor);
    }
    this->send(this->staged_, out, place, channels);
  }

 private:
  template <bool kResidual>
  RF_DEVICE void put_results(const float (&d)[kColumns / 2], float floor) const {
    const BnAct<float> op{floor};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const ptx::SharedAddress at = this->staged_.at(i / 4, i / 2 % 2, i % 2);
      const ChannelPair of = this->pair_of(i / 8, i / 2 % 2);
      if constexpr (kResidual) {
        ptx::store_shared(at, op(d[i], of.scale[0], of.shift[0], ptx::load_shared<float>(at)));
      } else {
        ptx::store_shared(at, op(d[i], of.scale[0], of.shift[0]));
      }
    }
  }
};

#endif

template <>
struct ConvTypes<float> {
  using Operand = float;
  using Result = float;
  static constexpr bool kInParts = false;

#if defined(RF_HAS_WGMMA)
  template <Orientation kOrientation, int kColumns>
  using Epilogue = Tf32Epilogue<kOrientation, kColumns>;

  template <class Arguments>
  static RF_DEVICE float act(const Arguments& arguments) {
    return arguments.floor;
  }
#endif
};

}  // namespace resnet_fused
