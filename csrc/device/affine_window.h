// Windows of dz that become windows of dy where they lie, once for all nine taps of a 3x3: by those
// who transform (transform_ring.h), with BatchNorm's backward.
//
// A window is there for products as a whole, but it comes and is turned in parts, each beside its
// part of y, which lies in a ring and is left behind. What lies beside the images comes as zeros,
// of which C would be made: it is put back to zeros by its place.
#pragma once

#include <cstdint>

#include "../ptx/mbarrier.h"
#include "../ptx/ptx.h"
#include "../ptx/wgmma.h"
#include "block_walk.h"
#include "bn_backward_operand.h"
#include "bn_dgrad_window.h"
#include "transform_ring.h"
#include "vector.h"
#include "window_load.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// Windows that come in parts, from those who transform to the warpgroups that multiply: `full` is
// theirs.
struct TurnedWindows : Ring<kConsumers> {
  RF_DEVICE void init() const {
    for (Place at; at.parity == 0; at.next()) {
      ptx::mbarrier_init(full(at), kTransformWarps);
      ptx::mbarrier_init(empty(at), kWarpgroupWarps);
    }
  }
  // The producer's: waits until the window has been read.
  RF_DEVICE void wait_until_read(const Place& at) const {
    ptx::mbarrier_wait_parity(empty(at), at.parity ^ 1);
  }
};

// Where a block's windows and parts lie, and who waits for them.
template <class Shape>
struct AffineWindows {
  using Part = RingPlace<Shape::kStages>;

  Ring<Shape::kStages> parts;
  TurnedWindows windows;
  ptx::SharedAddress windows_at;
  ptx::SharedAddress y_at;
  int32_t part_rows;
  int32_t count;  // parts of a window

  RF_DEVICE AffineWindows(const BnDgradWindowArguments& arguments, ptx::SharedAddress shared)
      : parts{shared + Shape::kPartsAt},
        windows{{shared + Shape::kWindowRingAt}},
        windows_at(shared + Shape::kStagingAt + kConsumers * arguments.ends * Shape::kStagingBytes),
        part_rows(arguments.window.part_rows),
        count(arguments.window.parts) {
    y_at = windows_at + kConsumers * count * part_bytes();
  }

  RF_DEVICE void init() const {
    parts.init(kTransformWarps);
    windows.init();
  }
  RF_DEVICE uint32_t part_bytes() const { return part_rows * kStepRowBytes; }
  RF_DEVICE ptx::SharedAddress window(const RingPlace<kConsumers>& at) const {
    return windows_at + at.stage * count * part_bytes();
  }
  RF_DEVICE ptx::SharedAddress y(const Part& at) const { return y_at + at.stage * part_bytes(); }
};

// The thread that asks for windows.
template <class Shape>
RF_DEVICE void produce_gradients(const BnDgradWindowArguments& arguments,
                                 const AffineWindows<Shape>& place, BlockWalk walk) {
  const PixelGrid& positions = arguments.window.walk;
  const bool affine = arguments.coefficients != nullptr;
  const uint32_t bytes = place.part_bytes();
  RingPlace<kConsumers> at;
  typename AffineWindows<Shape>::Part part;
  for (; !walk.done(); walk.next(), at.next()) {
    place.windows.wait_until_read(at);
    for (int32_t i = 0; i < place.count; ++i, part.next()) {
      const int32_t position = walk.index() * Shape::kPixels + i * place.part_rows;
      const ptx::SharedAddress full = place.parts.full(part);
      place.parts.acquire(part, affine ? 2 * bytes : bytes);
      load_part(place.window(at) + i * bytes, &arguments.window.x, positions, position, full);
      if (affine) load_part(place.y(part), &arguments.y, positions, position, full);
    }
  }
}

// BatchNorm's backward, of pairs of 16 bits as words, which no half is taken out of and put back
// into.
template <class T, int kCount>
RF_DEVICE void apply_backward_to_pairs(uint32_t (&dz)[kCount], const uint32_t (&y)[kCount],
                                       const BackwardRows<2 * kCount>& rows) {
  const auto dy = [&](uint32_t dz_pair, uint32_t y_pair, int i) {
    const int half = i % 2 * 16;
    const float rest =
        __builtin_fmaf(rows.b[i], widen(T{static_cast<uint16_t>(y_pair >> half)}), rows.c[i]);
    return __builtin_fmaf(rows.a[i], widen(T{static_cast<uint16_t>(dz_pair >> half)}), rest);
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    dz[i] = narrow_pair<T>(dy(dz[i], y[i], 2 * i), dy(dz[i], y[i], 2 * i + 1));
  }
}

// Those who transform.
template <class T, class Shape>
class WindowTurner {
  struct Pair {
    RowUnit dz;
    RowUnit y;
  };

 public:
  // thread: of those who transform.
  RF_DEVICE WindowTurner(const BnDgradWindowArguments& arguments, const AffineWindows<Shape>& place,
                         uint32_t thread)
      : arguments_(arguments), place_(place), units_(thread) {}

  // Windows of 64 channels.
  RF_DEVICE void run(BlockWalk walk) {
    fetch(0, kWindowChannels);
    for (; !walk.done(); walk.next()) turn_window(walk.index());
  }

  // Of more of them, in slices: a window each.
  RF_DEVICE void run(BlockWalk walk, int32_t slices) {
    for (; !walk.done(); walk.next()) {
      for (int32_t slice = 0; slice < slices; ++slice) {
        fetch(slice * kWindowChannels, slices * kWindowChannels);
        turn_window(walk.index());
      }
    }
  }

 private:
  // Coefficients of the thread's channels, of 64 from `first` on; channels: of all.
  RF_DEVICE void fetch(int32_t first, int32_t channels) {
    if (arguments_.coefficients == nullptr) return;
    const float* const from = arguments_.coefficients + first + units_.channel();
    load_channels(rows_.a, from);
    load_channels(rows_.b, from + channels);
    load_channels(rows_.c, from + 2 * channels);
  }

  RF_DEVICE void turn_window(int32_t tile) {
    for (int32_t i = 0; i < place_.count; ++i, part_.next()) {
      place_.parts.wait(part_);
      if (arguments_.coefficients != nullptr) {
        turn(place_.window(at_) + i * place_.part_bytes(), place_.y(part_),
             tile * Shape::kPixels + i * place_.part_rows);
      }
      ptx::sync_warp();
      if (threadIdx.x % 32 == 0) place_.parts.release(part_);
    }
    tell_transformed(place_.windows.full(at_));
    at_.next();
  }

  // position: of the input's walk, which begins with a zero before each row and each image.
  RF_DEVICE void turn(ptx::SharedAddress dz, ptx::SharedAddress y, int32_t position) const {
    units_.replace(
        dz, place_.part_rows,
        [&](ptx::SharedAddress at) {
          return Pair{ptx::load_shared<RowUnit>(at), ptx::load_shared<RowUnit>(y + (at - dz))};
        },
        [&](Pair of, ptx::SharedAddress at) {
          apply_backward_to_pairs<T>(of.dz.value, of.y.value, rows_);
          const auto row = static_cast<int32_t>((at - dz) / kStepRowBytes);
          const Pixel pixel = pixel_of(position + row, arguments_.window.walk);
          const uint32_t kept = pixel.p != 0 && pixel.q != 0 ? ~0u : 0u;
#pragma unroll
          for (uint32_t& pair : of.dz.value) pair &= kept;
          return of.dz;
        });
  }

  const BnDgradWindowArguments& arguments_;
  const AffineWindows<Shape>& place_;
  TransformUnits units_;
  RingPlace<kConsumers> at_;
  typename AffineWindows<Shape>::Part part_;
  BackwardRows<kUnitChannels> rows_{};
};

#endif

}  // namespace resnet_fused
