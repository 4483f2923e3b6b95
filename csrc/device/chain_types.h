// What a chain of convolutions on sm_90a multiplies on and stores, by the type of its tensors: here
// those of 16 bits. quantised_chain.h has another.
#pragma once

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/ptx.h"
#include "../ptx/tma.h"
#include "bn_act.h"
#include "pair.h"
#include "warpgroup_epilogue.h"
#include "warpgroup_shape.h"
#include "warpgroup_tile.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

constexpr int kBoxSums = kStepElements / 2;     // that a thread has of a box of 64 channels
constexpr int kBoxGroups = kStepElements / 16;  // of 16 channels, eight sums each
constexpr int kBoxVectors = kBoxSums * static_cast<int>(sizeof(ChannelPair));  // bytes of a box's

// Of 16 channels a thread has four pairs of neighbours, m: two rows of one pair of channels, half
// m / 2, then of another.
template <class T>
struct ChainTypes {
  using Box = StagedTile<Orientation::kPixelsLeft, kStepElements>;
  using Act = BnAct<float>;
  static constexpr int kRowBytes = kStepElements * static_cast<int>(sizeof(T));
  static constexpr int kWords = 4;  // of 16 channels
  using Words = uint32_t[kWords];
  using Operand = uint32_t[kRowBytes / kProductBytes][4];  // 64 channels, as wgmma takes them
  // Steps of 64 channels whose products are added up by themselves, and to the sums by the threads;
  // 0: there are no such parts.
  static constexpr int kStepsOfPart = 0;

  // Factors are of those that have scales.
  static RF_DEVICE Act act(float floor, float /*residual_factor*/, float /*out_factor*/) {
    return {floor};
  }
  static RF_DEVICE Act relu() { return {0.0f}; }
  static RF_DEVICE Act linear() { return {-__builtin_huge_valf()}; }

  // Pair m of group i of box `box` among a thread's sums of kRegisters; a half's channels among the
  // pairs of a box's. t: lane % 4.
  template <int kRegisters>
  static RF_DEVICE constexpr int sum_at(int box, int i, int m) {
    return box * kBoxSums + 8 * i + 2 * m;
  }
  static RF_DEVICE constexpr uint32_t pair_at(int i, int half, uint32_t t) {
    return 8 * i + 4 * half + t;
  }

  static RF_DEVICE FloatPair added(const Words& words, int m) {
    return {widen(T{static_cast<uint16_t>(words[m])}),
            widen(T{static_cast<uint16_t>(words[m] >> 16)})};
  }
  // Of increasing m.
  static RF_DEVICE void put(Words& words, int m, FloatPair y) {
    words[m] = narrow_pair<T>(y.low, y.high);
  }
  // A projection's pair as it is added: sums stay as they are.
  static RF_DEVICE FloatPair stored(FloatPair y) { return y; }

  // 64 channels, from `channel` on, of kFilters filters from `first` on. Of kSharing blocks each
  // brings its part of them to all.
  template <int kFilters, int kSharing>
  static RF_DEVICE void load_filters(ptx::SharedAddress to, const ptx::TensorMap* map,
                                     int32_t channel, int32_t first,
                                     ptx::SharedAddress barrier RF_SITE_PARAMETER) {
    if constexpr (kSharing > 1) {
      const uint32_t part = ptx::cluster_rank() * (kFilters / kSharing);
      ptx::tma_load_multicast(to + part * kRowBytes, map,
                              {channel, first + static_cast<int32_t>(part)}, barrier,
                              static_cast<uint16_t>((1 << kSharing) - 1) RF_SITE);
    } else {
      ptx::tma_load(to, map, {channel, first}, barrier RF_SITE);
    }
  }
};

// Where a chain's results are made.
using ChainBox = ChainTypes<BFloat16>::Box;

#endif

}  // namespace resnet_fused
