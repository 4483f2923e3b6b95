// The epilogue of sums of e4m3 products: scale, shift, shortcut in e4m3, ReLU and the result's
// scale in fp32, one rounding to e4m3 or to 16 bits, and a store by TMA. Beside
// warpgroup_epilogue.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv_types.h"
#include "e4m3.h"
#include "pair.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

// The type of a kernel whose operands and shortcut are e4m3, and whose result is an Out.
template <class Out>
struct E4M3To;

#if defined(RF_HAS_WGMMA)

template <>
struct ProductOf<Float8E4M3> {
  using type = ptx::E4m3;
};

// y = max(fma(scale, x, shift) + residual_factor residual, floor) out_factor. A NaN stays.
struct ScaledBnAct {
  float floor;
  float residual_factor;
  float out_factor;

  RF_DEVICE float operator()(float x, float scale, float shift) const {
    return finished(__builtin_fmaf(scale, x, shift));
  }
  RF_DEVICE float operator()(float x, float scale, float shift, float residual) const {
    return finished(__builtin_fmaf(residual_factor, residual, __builtin_fmaf(scale, x, shift)));
  }

 private:
  RF_DEVICE float finished(float z) const { return (floor > z ? floor : z) * out_factor; }
};

// 64 rows by kColumns columns of sums as bytes in the staging: a box, of each pixel a row of its
// channels, with a swizzle as wide as the row.
template <Orientation kOrientation, int kColumns>
class StagedBytes {
  static constexpr bool kPixelsLeft = kOrientation == Orientation::kPixelsLeft;

 public:
  static constexpr int kPixels = kPixelsLeft ? kWarpgroupRows : kColumns;
  static constexpr int kBoxChannels = kPixelsLeft ? kColumns : kWarpgroupRows;
  static constexpr int kBoxes = 1;
  static constexpr int kBytes = kPixels * kBoxChannels;
  static_assert(kBoxChannels == (kPixelsLeft ? 128 : 64), "as places are computed here");

  // thread: of the warpgroup. With g = lane / 4 and t = lane % 4 it has the rows g and g + 8 of a
  // warp's 16, and the columns 2 t and 2 t + 1 of each eight.
  RF_DEVICE StagedBytes(ptx::SharedAddress start, uint32_t thread) : start_(start) {
    const uint32_t warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    if constexpr (kPixelsLeft) {
      // Chunks of 16 bytes change places by the row's number in eight.
      place_ = start + (16 * warp + g) * kBoxChannels + g * 16 + 2 * t;
    } else {
      // A warp's channels are a chunk; two rows are 128 bytes, and chunks change places by the
      // number of those in four: t, as rows come in eights.
      place_ = start + 2 * t * kBoxChannels + (warp ^ t) * 16 + g;
    }
  }

  RF_DEVICE ptx::SharedAddress box(int) const { return start_; }

  // The bytes of sums d[4 j + 2 side], in the lower half, and of the next one.
  RF_DEVICE uint32_t load(int j, int side) const {
    if constexpr (kPixelsLeft) {
      return ptx::load_shared<uint16_t>(at(j, side));
    } else {
      const uint32_t low = ptx::load_shared<uint8_t>(at(j, side));
      return low | static_cast<uint32_t>(ptx::load_shared<uint8_t>(next(j, side))) << 8;
    }
  }
  RF_DEVICE void store(int j, int side, uint32_t pair) const {
    if constexpr (kPixelsLeft) {
      ptx::store_shared(at(j, side), static_cast<uint16_t>(pair));
    } else {
      ptx::store_shared(at(j, side), static_cast<uint8_t>(pair));
      ptx::store_shared(next(j, side), static_cast<uint8_t>(pair >> 8));
    }
  }

 private:
  RF_DEVICE ptx::SharedAddress at(int j, int side) const {
    if constexpr (kPixelsLeft) {
      return (place_ ^ (j / 2 * 16)) + j % 2 * 8 + side * 8 * kBoxChannels;
    } else {
      return place_ + j * 8 * kBoxChannels + side * 8;
    }
  }
  // Of the next pixel.
  RF_DEVICE ptx::SharedAddress next(int j, int side) const { return at(j, side) + kBoxChannels; }

  ptx::SharedAddress start_;
  ptx::SharedAddress place_;
};

// Out: Float8E4M3, BFloat16 or Float16.
template <class Out, Orientation kOrientation, int kColumns>
class QuantisedEpilogue
    : public StagedEpilogue<StagedBytes<kOrientation, kColumns>, kOrientation, kColumns> {
  using Bytes = StagedBytes<kOrientation, kColumns>;
  using Base = StagedEpilogue<Bytes, kOrientation, kColumns>;
  static constexpr bool kPixelsLeft = kOrientation == Orientation::kPixelsLeft;
  // Results take the place of the shortcut that they were added to; wider ones lie across it.
  static constexpr bool kInPlace = std::is_same_v<Out, Float8E4M3>;
  using Stored = std::conditional_t<kInPlace, Bytes, StagedTile<kOrientation, kColumns>>;
  static constexpr int kPairs = kColumns / 4;  // of a thread's sums

 public:
  static constexpr int kStagingBytes = Stored::kBytes;

  RF_DEVICE QuantisedEpilogue(const typename Base::Own& own, uint32_t thread)
      : Base(own, thread), stored_(own.staging, thread) {}

  // As WarpgroupEpilogue's.
  RF_DEVICE void finish(const float (&d)[kColumns / 2], const ScaledBnAct& act,
                        const ptx::TensorMap* out, bool residual, const OutputPlace& place,
                        int32_t channels) {
    this->wait_for_vectors();
    if (residual) {
      this->wait_for_residual();
      put_results<true>(d, act);
    } else {
      put_results<false>(d, act);
    }
    this->send(stored_, out, place, channels);
  }

 protected:
  template <bool kResidual>
  RF_DEVICE void put_results(const float (&d)[kColumns / 2], const ScaledBnAct& act) const {
    uint32_t shortcut[kPairs / 2];  // two pairs a register
    if constexpr (kResidual && !kInPlace) {
#pragma unroll
      for (int pair = 0; pair < kPairs; pair += 2) {
        shortcut[pair / 2] = this->staged_.load(pair / 2, 0) | this->staged_.load(pair / 2, 1)
                                                                   << 16;
      }
      this->meet();  // all have theirs
    }
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      const ChannelPair pairs[2] = {this->pair_of(i, 0), this->pair_of(i, 1)};
      uint32_t words[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int j = 2 * i + m / 2, side = m % 2;
        const ChannelPair& of = pairs[kPixelsLeft ? m / 2 : m % 2];
        FloatPair y{d[8 * i + 2 * m], d[8 * i + 2 * m + 1]};
        if constexpr (kResidual) {
          const uint32_t bytes =
              kInPlace ? this->staged_.load(j, side) : shortcut[j] >> 16 * side & 0xFFFF;
          const FloatPair r = widen_e4m3_pair(bytes);
          y = {act(y.low, of.scale[0], of.shift[0], r.low),
               act(y.high, of.scale[1], of.shift[1], r.high)};
        } else {
          y = {act(y.low, of.scale[0], of.shift[0]), act(y.high, of.scale[1], of.shift[1])};
        }
        if constexpr (kInPlace) {
          stored_.store(j, side, narrow_e4m3_pair(y.low, y.high));
        } else {
          words[m] = narrow_pair<Out>(y.low, y.high);
        }
      }
      if constexpr (!kInPlace) stored_.store(i, words);
    }
  }

 private:
  Stored stored_;
};

#endif

// Sums of Hopper's e4m3 products are said to keep some 14 bits: as numerics' bound has it, 128
// products of a sum are left to the tensor cores, a step, and sums of those are fp32's.
template <class Out>
struct ConvTypes<E4M3To<Out>> {
  using Operand = Float8E4M3;
  using Result = Out;
  static constexpr bool kInParts = true;
  static_assert(kElementsOfStep<Operand> == 128);

#if defined(RF_HAS_WGMMA)
  template <Orientation kOrientation, int kColumns>
  using Epilogue = QuantisedEpilogue<Out, kOrientation, kColumns>;

  template <class Arguments>
  static RF_DEVICE ScaledBnAct act(const Arguments& arguments) {
    return {arguments.floor, arguments.residual_factor, arguments.out_factor};
  }
#endif
};

}  // namespace resnet_fused
