// conv_bn_stats of an image on the GPU, for sm_90a: filters of 7x7 with stride 2 on wgmma, from the
// image's rows as stem_sm90.cuh has them. Here nothing is pooled: a row of y is rounded, stored by
// TMA and measured, as it lies in registers, while the next one's products run.
#pragma once

#include <cstdint>

#include "../device/stem_stats.h"
#include "../device/stem_worker.h"
#include "../device/walk_moments.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Where a row of a tile begins in y; see warpgroup_epilogue.h.
struct StemPlace {
  int32_t channel;
  int32_t column;
  int32_t row;
  int32_t image;
};
RF_DEVICE void store_box(const ptx::TensorMap* to, const StemPlace& place, int32_t channel,
                         ptx::SharedAddress from) {
  ptx::tma_store(to, {place.channel + channel, place.column, place.row, place.image}, from);
}

template <class T, class Shape>
RF_DEVICE void measure_stem_rows(const ConvStatsStemArguments& arguments,
                                 const StemWorker<Shape>& worker, ptx::SharedAddress shared) {
  using Moments = WalkMoments<T, Shape::kColumns>;
  const auto column = static_cast<int32_t>(blockIdx.y);
  const int32_t channel = column * kStemFilters;
  const int32_t filters = arguments.filters();
  const int32_t run = worker.of_all();
  Moments moments({shared + Shape::kStagingAt + worker.index * Shape::kStagedBytes, 0, 0,
                   static_cast<int>(1 + worker.index)},
                  worker.thread);
  StemProducts<T, Shape>(shared + Shape::kFiltersAt, worker.pairs, worker.ring, worker.thread % 32)
      .run(StemSteps(StemRunStrips(arguments.measured, run), 1, 0),
           [&](typename StemProducts<T, Shape>::Sums& sums, const StemRow& row) {
             moments.begin();
             moments.finish(sums, &arguments.y, StemPlace{channel, row.column, row.row, row.n},
                            filters, arguments.measured.filled(row.column));
           });
  if (run >= arguments.measured.count()) return;
  const int32_t left = filters - channel;
  moments.leave(arguments, {blockIdx.y, channel, left < kStemFilters ? left : kStemFilters}, run);
}

#endif

// Block (x, y): two workers, for the filters from 64 y on. For any other architecture it is empty,
// and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    conv_bn_stats_stem_rows_kernel(const __grid_constant__ ConvStatsStemArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const StemArguments& image = arguments.image;
  using Worker = StemWorker<Shape>;
  stem_stage_norm<Shape>(image, shared, threadIdx.x);
  run_stem_workers<T, Shape, false>(
      image, blockIdx.y * kStemFilters, shared,
      [&](const Worker& worker) {
        const StemSteps walk(StemRunStrips(arguments.measured, worker.of_all()), 2,
                             kStemPairsInUse - 1);
        StemProducer<T, T, Shape, StemSteps<StemRunStrips>>(
            image, worker.ring, worker.pairs, shared + 2 * Shape::kScaleBytes, walk, worker.thread)
            .run();
      },
      [&](const Worker& worker) { measure_stem_rows<T, Shape>(arguments, worker, shared); });
#endif
}

}  // namespace resnet_fused
