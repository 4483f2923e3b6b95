// Windows of dz that become windows of dy, in slices of 64 channels beside a ring of filters:
// affine_window.h's and streamed_filters.h's.
#pragma once

#include <cstdint>

#include "affine_window.h"
#include "bn_dgrad_window.h"
#include "pipeline.h"
#include "streamed_filters.h"
#include "window_load.h"

namespace resnet_fused {

#if defined(RF_HAS_WGMMA)

// As StreamedRings.
template <class Shape>
struct AffineStream {
  static constexpr int kFilterStages = Shape::kFilterStages;
  using Filter = RingPlace<kFilterStages>;

  ptx::SharedAddress shared;
  AffineWindows<Shape> place;

  RF_DEVICE AffineStream(const BnDgradWindowArguments& arguments, ptx::SharedAddress at)
      : shared(at), place(arguments, at) {}

  RF_DEVICE const TurnedWindows& windows() const { return place.windows; }
  RF_DEVICE Ring<kFilterStages> filters() const { return {shared + Shape::kFiltersFullAt}; }
  RF_DEVICE ptx::SharedAddress window(const RingPlace<kConsumers>& at) const {
    return place.window(at);
  }
  RF_DEVICE ptx::SharedAddress filter(const Filter& at) const {
    return shared + at.stage * kWindowFilterBytes;
  }

  RF_DEVICE void init() const {
    place.init();
    filters().init(kWarpgroupWarps);
    Turns::init(shared + Shape::kTurnsAt);
  }
};

// Asks for windows part by part: a part comes when the one two ahead has been turned, and filters
// are asked for between them.
template <class Shape>
class WindowsInParts {
 public:
  RF_DEVICE WindowsInParts(const BnDgradWindowArguments& arguments,
                           const AffineWindows<Shape>& place, const BlockWalk& walk)
      : arguments_(arguments), place_(place), walk_(walk, arguments.slices) {}

  RF_DEVICE void next() {
    while (left_ > 0) more();
    if (walk_.done()) return;
    place_.windows.wait_until_read(at_);
    left_ = place_.count;
    more();
  }

  RF_DEVICE void more() {
    if (left_ == 0) return;
    const bool affine = arguments_.coefficients != nullptr;
    const PixelGrid& positions = arguments_.window.walk;
    const uint32_t bytes = place_.part_bytes();
    const int32_t i = place_.count - left_;
    const int32_t position = walk_.tile() * Shape::kPixels + i * place_.part_rows;
    const ptx::SharedAddress full = place_.parts.full(part_);
    place_.parts.acquire(part_, affine ? 2 * bytes : bytes);
    load_part(place_.window(at_) + i * bytes, &arguments_.window.x, positions, position, full,
              walk_.channel());
    if (affine)
      load_part(place_.y(part_), &arguments_.y, positions, position, full, walk_.channel());
    part_.next();
    if (--left_ > 0) return;
    at_.next();
    walk_.next();
  }

 private:
  const BnDgradWindowArguments& arguments_;
  const AffineWindows<Shape>& place_;
  SliceWalk<BlockWalk> walk_;
  RingPlace<kConsumers> at_;
  typename AffineWindows<Shape>::Part part_;
  int32_t left_ = 0;  // parts of the window that have not been asked for
};

#endif

}  // namespace resnet_fused
