// conv_bn_grad1x1 on the GPU, for sm_90a: by wgmma, fed by TMA, what conv_bn_grad1x1_sm80.cuh says.
//
//     dx^T[c, m] = mask(sum over k of weight[k, c] dy[m, k] [+ addend[m, c]])
//     dweight^T[c, k] = sum over m of h[m, c] dy[m, k]
//
// Channels are the left side of both products. So h is turned in registers, from which the products
// take it; a thread has two channels of 64 with all that belongs to them, and sums of a channel
// stay where they are until the block ends. Both products read dy from shared memory, where it is
// turned in dz's place, once.
//
// One thread asks for steps of pixels; two warpgroups take every other step, so that one turns and
// finishes while the other one multiplies. Behind the last step they add up their sums, and a
// second kernel adds those of all parts, in fixed order (conv_bn_grad1x1_merge_sm80.cuh).
#pragma once

#include <cstdint>

#include "../device/bn_backward_operand.h"
#include "../device/boxed_chunks.h"
#include "../device/grad1x1_finish.h"
#include "../device/grad1x1_sums.h"
#include "../device/grad1x1_tma.h"
#include "../device/pipeline.h"
#include "../device/thinned_addend.h"
#include "../device/vector.h"
#include "../device/warpgroup_roles.h"
#include "../device/warpgroup_tile.h"
#include "../ptx/mbarrier.h"
#include "../ptx/tma.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// finish: what a step's end reads beside x and the addend.
template <class Shape, class Finish>
RF_DEVICE void produce_grad1x1(const Grad1x1TmaArguments& arguments,
                               const Ring<Shape::kStages>& ring, ptx::SharedAddress shared,
                               const Grad1x1Part<Shape>& part, const Finish& finish) {
  const ptx::SharedAddress weights = shared + Shape::kWeightBarrierAt;
  ptx::mbarrier_arrive_expect_tx(weights, Shape::kWeightBytes);
  for (int i = 0; i < Shape::kBlocks; ++i) {
    ptx::tma_load(shared + Shape::kWeightsAt + i * Shape::kWeightBoxBytes, &arguments.weight,
                  {part.channel + i * kStepElements, 0}, weights);
  }
  const bool affine = arguments.shared.coefficients != nullptr;
  const uint32_t bytes = Shape::kGradientBytes * (affine ? 2 : 1) +
                         Shape::kInputBytes * (arguments.maps_addend ? 2 : 1) + finish.bytes();
  RingPlace<Shape::kStages> at;
  for (int32_t first = part.begin; first < part.end; first += Shape::kPixels, at.next()) {
    ring.acquire(at, bytes);
    const ptx::SharedAddress stage = shared + at.stage * Shape::kStageBytes;
    const ptx::SharedAddress full = ring.full(at);
    for (int i = 0; i < Shape::kFilterBoxes; ++i) {
      const ptx::SharedAddress to = stage + i * Shape::kBoxBytes;
      const int32_t filter = i * kStepElements;
      ptx::tma_load(to + Shape::kGradientAt, &arguments.dz, {filter, first}, full);
      if (affine) ptx::tma_load(to + Shape::kMaskAt, &arguments.y, {filter, first}, full);
    }
    for (int i = 0; i < Shape::kBlocks; ++i) {
      const ptx::SharedAddress to = stage + i * Shape::kBoxBytes;
      const int32_t channel = part.channel + i * kStepElements;
      ptx::tma_load(to + Shape::kInputAt, &arguments.x, {channel, first}, full);
      if (arguments.maps_addend) {
        ptx::tma_load(to + Shape::kAddendAt, &arguments.addend, {channel, first}, full);
      }
      finish.ask(to, {channel, first}, full);
    }
  }
}

// Finish: what becomes of x and of dx, such as Grad1x1Finish.
template <class T, class Shape, class Finish>
class Grad1x1Consumer {
  static constexpr int kSlices = Shape::kPixels / 16;  // of the reduction over pixels
  using Gradients = BoxedChunks<T, Shape::kPixels, Shape::kFilters>;
  using Inputs = BoxedChunks<T, Shape::kPixels, Shape::kChannels>;
  static constexpr int kUnit = Gradients::kUnit;
  using Chunk = typename Gradients::Chunk;
  using Channels = typename Finish::Channels;
  // 64 channels by all filters, a box as the weights lie; 16 filters further are as many rows.
  static constexpr ptx::MatrixLayout kWeightLayout{ptx::Swizzle::k128Bytes, Shape::kWeightBoxBytes,
                                                   8 * kStepRowBytes};
  // dy as the right side of the weights' gradient: filters side by side, boxes of 64.
  static constexpr ptx::MatrixLayout kGradientLayout{ptx::Swizzle::k128Bytes, Shape::kBoxBytes,
                                                     8 * kStepRowBytes};
  static_assert(kWeightLayout.valid() && kGradientLayout.valid());
  static constexpr int kSliceBytes = 16 * kStepRowBytes;
  static constexpr int kBothBarrier = 1 + kConsumers;

 public:
  // thread: of the warpgroup.
  RF_DEVICE Grad1x1Consumer(const Grad1x1TmaArguments& arguments, const Ring<Shape::kStages>& ring,
                            ptx::SharedAddress shared, const Grad1x1Part<Shape>& part,
                            uint32_t consumer, uint32_t thread, const Finish& finish)
      : maps_(arguments),
        told_(arguments.shared),
        ring_(ring),
        shared_(shared),
        part_(part),
        staging_(shared + Shape::kStagingAt + consumer * Shape::kInputBytes),
        consumer_(consumer),
        thread_(thread),
        gradients_(thread),
        inputs_(thread),
        finish_(finish) {}

  RF_DEVICE void run() {
#pragma unroll
    for (int b = 0; b < Shape::kBlocks; ++b) clear(sums_.dweight[b]);
    RingPlace<Shape::kStages> at;
    for (uint32_t i = 0; i < consumer_; ++i) at.next();
    ptx::mbarrier_wait_parity(shared_ + Shape::kWeightBarrierAt, 0);
    const auto own = static_cast<int32_t>(consumer_) * Shape::kPixels;
    for (int32_t first = part_.begin + own; first < part_.end;
         first += kConsumers * Shape::kPixels) {
      step(at, first);
      for (int i = 0; i < kConsumers; ++i) at.next();
    }
    if (thread_ == 0) ptx::bulk_wait_group_read<0>();
    leave();
  }

 private:
  RF_DEVICE void meet() const {
    ptx::barrier_sync(static_cast<int>(1 + consumer_), kWarpgroupThreads);
  }

  // Of this thread's filters, zeros where there are none: then dy is zero, too.
  RF_DEVICE BackwardRows<kUnit> load_coefficients() const {
    BackwardRows<kUnit> found{};
    const auto filter = gradients_.column();
    if (told_.coefficients == nullptr || filter >= told_.filters) return found;
    float (*const rows[])[kUnit] = {&found.a, &found.b, &found.c};
#pragma unroll
    for (int row = 0; row < 3; ++row) {
#pragma unroll
      for (int i = 0; i < kUnit; i += kVectorLength<float>) {
        const auto part = load_vector(told_.coefficients + row * told_.filters + filter + i);
#pragma unroll
        for (int e = 0; e < kVectorLength<float>; ++e) (*rows[row])[i + e] = part.lane[e];
      }
    }
    return found;
  }

  // Asks for the addend where few pixels have one.
  RF_DEVICE void gather_addend(ptx::SharedAddress stage, int32_t first) const {
    const bool known = part_.channel + inputs_.column() < told_.channels;
#pragma unroll
    for (int i = 0; i < Inputs::kCount; ++i) {
      const T* const from = addend_of<T>(told_, first + inputs_.row(i), part_.end, part_.channel);
      const bool there = from != nullptr && known;
      ptx::cp_async<kChunkBytes>(inputs_.at(stage + Shape::kAddendAt, i),
                                 there ? from + inputs_.column() : told_.addend, there);
    }
    ptx::cp_async_commit_group();
  }

  // dy in dz's place: zeros behind the last pixel.
  RF_DEVICE void turn_gradients(ptx::SharedAddress stage, const BackwardRows<kUnit>& rows,
                                int32_t left) const {
#pragma unroll 4  // beside the sums there is no room for more loads under way
    for (int i = 0; i < Gradients::kCount; ++i) {
      const ptx::SharedAddress at = gradients_.at(stage + Shape::kGradientAt, i);
      auto chunk = ptx::load_shared<Chunk>(at);
      apply_backward(chunk, ptx::load_shared<Chunk>(gradients_.at(stage + Shape::kMaskAt, i)),
                     rows);
      if (gradients_.row(i) >= left) chunk = Chunk{};
      ptx::store_shared(at, chunk);
    }
    ptx::fence_proxy_async_shared();
  }

  RF_DEVICE void step(const RingPlace<Shape::kStages>& at, int32_t first) {
    const ptx::SharedAddress stage = shared_ + at.stage * Shape::kStageBytes;
    const int32_t left = part_.end - first;
    const bool gathers = told_.addend != nullptr && !maps_.maps_addend;
    if (gathers) gather_addend(stage, first);
    const BackwardRows<kUnit> rows = load_coefficients();  // while dz comes
    ring_.wait(at);
    if (told_.coefficients != nullptr) turn_gradients(stage, rows, left);
    if (gathers) ptx::cp_async_wait_group<0>();
    if (thread_ == 0) ptx::bulk_wait_group_read<0>();
    meet();  // dy and the addend are there, and the last store has read the staging
#pragma unroll
    for (int b = 0; b < Shape::kBlocks; ++b) multiply(b, stage, left);
    ptx::sync_warp();
    if (thread_ % 32 == 0) ring_.release(at);
    ptx::fence_proxy_async_shared();
    meet();
    if (thread_ == 0) {
      for (int b = 0; b < Shape::kBlocks; ++b) {
        const int32_t channel = part_.channel + b * kStepElements;
        if (channel >= told_.channels) break;
        ptx::tma_store(&maps_.dx, {channel, first}, staging_ + b * Shape::kBoxBytes);
      }
      ptx::bulk_commit_group();
    }
    ptx::sync_warp();
  }

  // Both products of 64 channels. dx is finished while the weights' run.
  RF_DEVICE void multiply(int b, ptx::SharedAddress stage, int32_t left) {
    const Channels channels = finish_.load(b);
    uint32_t h[kSlices][4];
    finish_.turn(h, b, stage, channels, left);
    float dx[Shape::kPixels / 2];
    clear(dx);
    ptx::wgmma_pin(dx);
    ptx::wgmma_pin(sums_.dweight[b]);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) ptx::wgmma_pin(h[i]);
    ptx::wgmma_fence();
    const auto weights = ptx::matrix_descriptor(
        shared_ + Shape::kWeightsAt + b * Shape::kWeightBoxBytes, kWeightLayout);
    const ptx::SharedAddress dy = stage + Shape::kGradientAt;
    const auto rows = ptx::matrix_descriptor(dy, kTileLayout<kStepRowBytes>);
#pragma unroll
    for (int k = 0; k < Shape::kFilters / 16; ++k) {
      ptx::wgmma<ProductType<T>, ptx::Major::kMn>(
          dx, weights + k * kSliceBytes,
          rows + (k / kProducts * Shape::kBoxBytes + k % kProducts * kProductBytes), k > 0);
    }
    ptx::wgmma_commit_group();
    const auto across = ptx::matrix_descriptor(dy, kGradientLayout);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      ptx::wgmma<ProductType<T>, ptx::Major::kMn>(sums_.dweight[b], h[i], across + i * kSliceBytes,
                                                  true);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_pin(dx);
    finish_.put(dx, sums_, b, stage, staging_, channels, left);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(sums_.dweight[b]);
  }

  // The second consumer's sums to the first one's, and these to the workspace.
  RF_DEVICE void leave() {
    ptx::barrier_sync(kBothBarrier, kConsumers * kWarpgroupThreads);  // no stage is read any more
    if (consumer_ == 1) sums_.hand_over(shared_, thread_, finish_.summed());
    ptx::barrier_sync(kBothBarrier, kConsumers * kWarpgroupThreads);
    if (consumer_ == 1) return;
    sums_.take(shared_, thread_, finish_.summed());
    sums_.leave(told_, part_.number, part_.channel, thread_, finish_.summed());
  }

  const Grad1x1TmaArguments& maps_;
  const Grad1x1Arguments& told_;
  const Ring<Shape::kStages>& ring_;
  ptx::SharedAddress shared_;
  const Grad1x1Part<Shape>& part_;
  ptx::SharedAddress staging_;
  uint32_t consumer_;
  uint32_t thread_;
  Gradients gradients_;
  Inputs inputs_;
  Finish finish_;
  Grad1x1Sums<Shape> sums_;
};

// A block. prefetch() asks for what maps the finish has of its own.
template <class T, class Shape, class Finish, class End>
RF_DEVICE void run_grad1x1(const Grad1x1TmaArguments& arguments, const End& end) {
  const ptx::SharedAddress shared = ptx::shared_address(ptx::dynamic_shared());
  const Ring<Shape::kStages> ring{shared + Shape::kRingAt};
  const Grad1x1Part<Shape> part(arguments.shared, blockIdx.x);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch(&arguments.weight);
    ptx::tma_prefetch(&arguments.dz);
    ptx::tma_prefetch(&arguments.x);
    ptx::tma_prefetch(&arguments.dx);
    if (arguments.shared.coefficients != nullptr) ptx::tma_prefetch(&arguments.y);
    if (arguments.maps_addend) ptx::tma_prefetch(&arguments.addend);
    Finish::prefetch(end);
    ring.init(kWarpgroupWarps);
    ptx::mbarrier_init(shared + Shape::kWeightBarrierAt, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  take_roles([&] { produce_grad1x1(arguments, ring, shared, part, Finish(end, part.channel, 0)); },
             [&](uint32_t consumer, uint32_t thread) {
               const Finish finish(end, part.channel, thread);
               Grad1x1Consumer<T, Shape, Finish>(arguments, ring, shared, part, consumer, thread,
                                                 finish)
                   .run();
             });
}

#endif

// For any other architecture it is empty, and no plan chooses it.
template <class T, class Shape>
__global__ void __launch_bounds__(kWarpgroupBlockThreads, 1)
    conv_bn_grad1x1_tma_kernel(const __grid_constant__ Grad1x1TmaArguments arguments) {
#if defined(RF_HAS_WGMMA)
  run_grad1x1<T, Shape, Grad1x1Finish<T, Shape>>(arguments, arguments.shared);
#endif
}

}  // namespace resnet_fused
