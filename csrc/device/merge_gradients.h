// The sums that tiles have left of the channels of a gradient become those of all its pixels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ptx/ptx.h"
#include "bn_dgrad_geometry.h"
#include "merge_chunks.h"

namespace resnet_fused {

// In the place of ThirdSums, where none are ever taken.
struct NoThirdSums {
  static constexpr const float* partial = nullptr;
  static constexpr ColumnSums* merged = nullptr;
};

// Behind the sums of a tile, which those who merge (merge_chunks.h) have stored. `ring` and
// `scratch`: shared memory that nobody else uses any more, 16 bytes a thread and 4 bytes.
template <class Shape, class Third = NoThirdSums>
RF_DEVICE void merge_gradient_sums(const GradientReduction& reduction, const MeasuredColumn& where,
                                   int32_t row, ptx::SharedAddress ring, ptx::SharedAddress scratch,
                                   uint32_t thread, const Third& third = {}) {
  const int64_t channels = reduction.channels;
  const auto column = static_cast<int32_t>(thread % Shape::kN);
  const bool known = column < where.columns;
  const bool writes = known && thread < Shape::kN;
  // Of a column that does not exist the first one's, for nobody.
  const int64_t channel = where.channel + (known ? column : 0);
  // Of [parts][C] those from first to last.
  const auto sum = [&](const auto* parts, int32_t first, int32_t last) {
    return sum_parts<Shape>(
        first, last, ring, thread,
        [&](int32_t i) { return ptx::load_global(parts + i * channels + channel); },
        [](ColumnSums& into, int32_t, const auto& part) {
          if constexpr (std::is_same_v<std::decay_t<decltype(part)>, float>) {
            into.first += static_cast<double>(part);
          } else {
            into.first += static_cast<double>(part.first);
            into.second += static_cast<double>(part.second);
          }
        });
  };
  ColumnSums more{};  // of the third ones
  const auto sum_third = [&](const auto* parts, int32_t first, int32_t last) {
    if (third.partial == nullptr) return;
    more = sum(parts, first, last);
    meet<Shape>();  // `ring` has been read
  };
  merge_chunks<Shape>(
      reduction.arrivals + where.index * static_cast<uint32_t>(reduction.all.count() + 1),
      reduction.all, row, scratch, thread,
      [&](int32_t first, int32_t last) {
        sum_third(third.partial, first, last);
        return sum(reduction.partial, first, last);
      },
      [&](int32_t chunk, const ColumnSums& sums) {
        if (!writes) return;
        const int64_t at = chunk * channels + channel;
        ptx::store_global(reduction.merged + at, sums);
        if (third.partial != nullptr) ptx::store_global(third.merged + at, more);
      },
      [&](int32_t count) {
        sum_third(third.merged, 0, count);
        return sum(reduction.merged, 0, count);
      },
      [&](const ColumnSums& sums) {
        if (!writes) return;
        float* const to = reduction.sums + channel;
        ptx::store_global(to, static_cast<float>(sums.first));
        ptx::store_global(to + channels, static_cast<float>(sums.second));
        if (third.partial != nullptr) {
          ptx::store_global(to + 2 * channels, static_cast<float>(more.first));
        }
      });
}

}  // namespace resnet_fused
