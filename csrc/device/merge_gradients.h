// The sums that tiles have left of the channels of a gradient become those of all its pixels.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_dgrad_geometry.h"
#include "merge_chunks.h"

namespace resnet_fused {

// Behind the sums of a tile, which those who merge (merge_chunks.h) have stored. `ring` and
// `scratch`: shared memory that nobody else uses any more, 16 bytes a thread and 4 bytes.
template <class Shape>
RF_DEVICE void merge_gradient_sums(const GradientReduction& reduction, const MeasuredColumn& where,
                                   int32_t row, ptx::SharedAddress ring, ptx::SharedAddress scratch,
                                   uint32_t thread) {
  const int64_t channels = reduction.channels;
  const auto column = static_cast<int32_t>(thread % Shape::kN);
  const bool known = column < where.columns;
  const bool writes = known && thread < Shape::kN;
  // Of a column that does not exist the first one's, for nobody.
  const int64_t channel = where.channel + (known ? column : 0);
  const auto add = [](ColumnSums& into, int32_t, const auto& part) {
    into.first += static_cast<double>(part.first);
    into.second += static_cast<double>(part.second);
  };
  merge_chunks<Shape>(
      reduction.arrivals + where.index * static_cast<uint32_t>(reduction.all.count() + 1),
      reduction.all, row, scratch, thread,
      [&](int32_t first, int32_t last) {
        return sum_parts<Shape>(
            first, last, ring, thread,
            [&](int32_t i) { return ptx::load_global(reduction.partial + i * channels + channel); },
            add);
      },
      [&](int32_t chunk, const ColumnSums& sums) {
        if (writes) ptx::store_global(reduction.merged + chunk * channels + channel, sums);
      },
      [&](int32_t count) {
        return sum_parts<Shape>(
            0, count, ring, thread,
            [&](int32_t i) { return ptx::load_global(reduction.merged + i * channels + channel); },
            add);
      },
      [&](const ColumnSums& sums) {
        if (!writes) return;
        ptx::store_global(reduction.sums + channel, static_cast<float>(sums.first));
        ptx::store_global(reduction.sums + channels + channel, static_cast<float>(sums.second));
      });
}

}  // namespace resnet_fused
