// conv_bn_act on the GPU, for sm_90a and few pixels: a cluster of blocks shares the reduction of
// one tile, where tiles alone would leave most of the GPU idle.
//
// Each block takes its share of the steps, as conv_bn_act_sm90.cuh does those of a tile; then the
// blocks add up each other's sums through the cluster's shared memory (cluster_tile.h). No
// workspace, no atomics, no second kernel. A cluster has one tile and ends with it.
#pragma once

#include "../device/cluster_tile.h"
#include "../ptx/cluster.h"
#include "conv_bn_act_sm90.cuh"

namespace resnet_fused {

// A grid of kBlocks blocks a tile. For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape, int kBlocks>
__global__ void __launch_bounds__(kClusterThreads, kClusterResident)
    conv_bn_act_cluster_kernel(const __grid_constant__ ConvClusterArguments arguments) {
#if defined(RF_HAS_WGMMA)
  const ConvTmaArguments& conv = arguments.conv;
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const RingOf<Shape> ring{shared + Shape::kRingAt};
  const auto full_of = [&](const RingPlace<Shape::kStages>& at) { return ring.full(at); };
  const auto stage_of = [&](const RingPlace<Shape::kStages>& at) {
    return shared + at.stage * Shape::kStageBytes;
  };
  const bool multiplies = threadIdx.x < kWarpgroupThreads;
  const bool asks = threadIdx.x == kWarpgroupThreads;
  const StepShare share = share_of(conv.steps, static_cast<int32_t>(ptx::cluster_rank()), kBlocks);
  const TileWalk walk(conv.tiles, conv.reverse, static_cast<int32_t>(blockIdx.x / kBlocks),
                      static_cast<int32_t>(gridDim.x / kBlocks));
  ConvSteps<T, Shape> steps(conv, walk, share.first);
  RingPlace<Shape::kStages> at;
  int early = 0;  // steps whose filters have been asked for
  if (asks) {
    ptx::tma_prefetch(&conv.weight);
    ptx::tma_prefetch(&conv.x);
    ring.init(Shape::kReaders);
    ptx::fence_mbarrier_init();
    auto ahead = steps;
    auto place = at;
    for (; early < Shape::kStages && early < share.count; ++early) {
      ring.acquire(place, Shape::kStageBytes);
      ahead.load_filters(stage_of(place), full_of(place));
      ahead.next();
      place.next();
    }
  }
  ptx::sync_threads();
  wait_for_ahead(conv.dependent);
  ClusterEpilogue<T, Shape, kBlocks> epilogue(arguments, walk.tile(), shared, threadIdx.x);
  if (asks) {
    for (int step = 0; step < share.count; ++step, steps.next(), at.next()) {
      if (step >= early) {
        ring.acquire(at, Shape::kStageBytes);
        steps.load_filters(stage_of(at), full_of(at));
      }
      steps.load_pixels(stage_of(at), full_of(at));
    }
  }
  if (multiplies) {
    float d[Shape::kColumns / 2];
    clear(d);
    sum_tile<T, Shape>(
        d, ring, at, shared, share.count, threadIdx.x % 32 == 0, [&] { epilogue.begin(); }, [] {});
    // All four warps' products have read the stages that the sums are put over.
    ptx::barrier_sync(1, kWarpgroupThreads);
    epilogue.put(d);
  }
  ptx::cluster_sync();  // all blocks have put theirs
  if (multiplies) epilogue.add();
  ptx::cluster_arrive();  // this one has read the others'
  if (multiplies) epilogue.finish();
  ptx::cluster_wait();  // and they have read this one's, which ends with it
#endif
}

}  // namespace resnet_fused
