// The epilogue of conv_bn_dgrad and of conv_bn_dgrad_end: what comes through the shortcut is added,
// the gradient rounded once, masked by the ReLU below, stored, and summed as it was stored. The
// ReLU's sign is that of what BatchNorm makes of raw again, or that of a block's output.
//
// Sums are put together in shared memory in fp32, since what is added comes before the rounding. A
// thread then keeps to one unit of channels, 16 bytes of them or one, and goes down the rows: raw,
// addend and gradient move as rows, and a channel's vectors and sums stay in its registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../ptx/ptx.h"
#include "addend_pixel.h"
#include "bn_dgrad_geometry.h"
#include "conv_epilogue.h"
#include "dgrad_loader.h"
#include "gradient_mask.h"
#include "halo_shape.h"
#include "vector.h"

namespace resnet_fused {

// Of shared memory, at the ring's end: where a block learns whether it is the last one.
constexpr int kScratchBytes = 16;

// Where a tile's totals are put together: in the ring, or, where its stages hold filters alone,
// over the windows behind it, too.
template <class Shape>
struct RingAndWindows : Shape {
  static constexpr int kStages = 1;
  static constexpr int kStageBytes = Shape::kM * Shape::kN * static_cast<int>(sizeof(float));
};
template <class Shape>
using TotalsTile =
    OutputTile<float, std::conditional_t<(kWindowsOf<Shape> > 0), RingAndWindows<Shape>, Shape>>;

template <class T, class Shape, int kUnit, class Arguments = ConvBnDgradArguments>
class BnDgradEpilogue {
  static constexpr bool kEnd = std::is_same_v<Arguments, ConvBnDgradEndArguments>;
  static constexpr int kSums = kEnd ? 3 : 2;  // of a channel; the third one's need not be taken
  using Totals = TotalsTile<Shape>;
  using Stored = Unit<T, kUnit>;
  static constexpr int kUnits = Shape::kN / kUnit;         // of a row
  static constexpr int kLanes = Shape::kThreads / kUnits;  // threads of a unit's column
  static constexpr int kRows = Shape::kM / kLanes;         // of a thread
  // Rows under way: beside more blocks an end's have no registers for four.
  static constexpr int kMostAhead = kEnd && Shape::kBlocks > 2 ? 2 : 4;
  static constexpr int kAhead = kRows < kMostAhead ? kRows : kMostAhead;
  static constexpr int kPiece = kUnit < 4 ? kUnit : 4;  // floats that move together
  static constexpr int kPieces = kUnit / kPiece;
  static_assert(Shape::kThreads % kUnits == 0 && Shape::kM % kLanes == 0 && kRows % kAhead == 0);
  static_assert(kSums * Shape::kThreads * kUnit * 4 <= Shape::kRingBytes - kScratchBytes);

 public:
  // Neighbouring threads take neighbouring channels; of pixels that lie together, rows.
  RF_DEVICE BnDgradEpilogue(const Arguments& arguments, const DgradPlace& where, uint32_t thread)
      : arguments_(arguments),
        where_(where),
        swapped_(thread / 4 % 2 != 0),
        by_rows_(kUnit == 1 && arguments.conv.pixels_lie_together),
        lane_(by_rows_ ? thread % kLanes : thread / kUnits),
        unit_(by_rows_ ? thread / kLanes : thread % kUnits) {
    const int32_t column = where.n + static_cast<int32_t>(unit_) * kUnit;
    known_ = column < arguments.conv.channels_in;
    channel_ = where.group * arguments.conv.channels_in + (known_ ? column : 0);
  }

  RF_DEVICE void finish(const Totals& totals) {
    if (reduced()) load_vectors();
#pragma unroll 1
    for (int first = 0; first < kRows; first += kAhead) {
      Row rows[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) rows[i] = read(lane_ + (first + i) * kLanes);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) write(totals, lane_ + (first + i) * kLanes, rows[i]);
    }
  }

  // This thread's sums to `scratch`, where `sums_of_column` finds them behind a barrier.
  RF_DEVICE void put_sums(ptx::SharedAddress scratch) const {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      if (s == 2 && !projected()) break;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        Unit<float, kPiece> piece;
#pragma unroll
        for (int e = 0; e < kPiece; ++e) piece.value[e] = sum_[s][p * kPiece + e];
        ptx::store_shared(scratch + (place_of(s, lane_, p) * kUnits + unit_) * sizeof(piece),
                          piece);
      }
    }
  }

  // The column whose sums over the tile a thread < kN makes, in the order in which they lie.
  static RF_DEVICE int32_t column_of_thread(uint32_t thread) {
    const uint32_t piece = thread / (kUnits * kPiece);
    const uint32_t unit = thread / kPiece % kUnits;
    return static_cast<int32_t>(unit * kUnit + piece * kPiece + thread % kPiece);
  }
  static RF_DEVICE GradientSums sums_of_column(ptx::SharedAddress scratch, uint32_t thread) {
    return {sum_of_column(0, scratch, thread), sum_of_column(1, scratch, thread)};
  }
  static RF_DEVICE float sum_of_column(int sum, ptx::SharedAddress scratch, uint32_t thread) {
    double total = 0;
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t piece = place_of(sum, lane, thread / (kUnits * kPiece));
      const uint32_t at = piece * (kUnits * kPiece) + thread % (kUnits * kPiece);
      total += static_cast<double>(ptx::load_shared<float>(scratch + at * 4));
    }
    return static_cast<float>(total);
  }

 private:
  // Where a lane's pieces of a sum lie, one of each unit: those of neighbouring lanes in other
  // banks.
  static RF_DEVICE uint32_t place_of(int sum, uint32_t lane, uint32_t piece) {
    return (sum * kLanes + lane) * kPieces + (kPieces == 2 ? piece ^ lane % 2 : piece);
  }

  // What is known of a row before its gradient is finished.
  struct CommonRow {
    T* to;  // null: there is no such pixel
    bool added;
    Stored addend;
    Stored raw;
  };
  struct EndRow : CommonRow {
    Stored out;
    Stored residual;
  };
  using Row = std::conditional_t<kEnd, EndRow, CommonRow>;

  RF_DEVICE bool reduced() const { return kEnd || arguments_.raw != nullptr; }
  RF_DEVICE bool projected() const {
    if constexpr (kEnd) return arguments_.residual != nullptr;
    return false;
  }

  RF_DEVICE Row read(uint32_t row) const {
    const ConvDgradArguments& conv = arguments_.conv;
    Row found{};
    const int32_t m = where_.m + static_cast<int32_t>(row);
    if (!known_ || m >= conv.grid.pixels) return found;
    Pixel pixel = pixel_of(m, conv.grid);
    pixel.p = pixel.p * conv.h.stride + where_.h.index;
    pixel.q = pixel.q * conv.w.stride + where_.w.index;
    if (pixel.p >= conv.h.size || pixel.q >= conv.w.size) return found;
    found.to = static_cast<T*>(conv.dx) + element(pixel, conv.dx_strides);
    if (reduced()) {
      found.raw = load(static_cast<const T*>(arguments_.raw), pixel, arguments_.raw_strides);
    }
    if constexpr (kEnd) {
      found.out = load(static_cast<const T*>(arguments_.out), pixel, arguments_.out_strides);
      if (projected()) {
        found.residual =
            load(static_cast<const T*>(arguments_.residual), pixel, arguments_.residual_strides);
      }
    }
    if (arguments_.addend != nullptr) {
      found.added = to_addend(pixel, arguments_.addend_step);
      if (found.added) {
        found.addend =
            load(static_cast<const T*>(arguments_.addend), pixel, arguments_.addend_strides);
      }
    }
    return found;
  }

  RF_DEVICE void write(const Totals& totals, uint32_t row, const Row& found) {
    if (found.to == nullptr) return;
    float total[kUnit];
    load_totals(total, totals, row);
    Stored dx;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const float more = widen(found.addend.value[i]);
      dx.value[i] = narrow<T>(found.added ? total[i] + more : total[i]);
    }
    if (reduced()) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const float raw = widen(found.raw.value[i]);
        // Not (sign > 0): where it is NaN, the gradient passes.
        if (sign_of(found, i) <= 0.0f) dx.value[i] = T{};
        const float passed = widen(dx.value[i]);
        sum_[0][i] += passed;
        sum_[1][i] = __builtin_fmaf(passed, raw - mean_[i], sum_[1][i]);
      }
    }
    if constexpr (kEnd) {
      if (projected()) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          const float off = widen(found.residual.value[i]) - residual_mean_[i];
          sum_[2][i] = __builtin_fmaf(widen(dx.value[i]), off, sum_[2][i]);
        }
      }
    }
    ptx::store_global(reinterpret_cast<Stored*>(found.to), dx);
  }

  // What the ReLU below was given, or gave: a block's output, or what forward made of raw.
  RF_DEVICE float sign_of(const Row& found, int i) const {
    if constexpr (kEnd) {
      return widen(found.out.value[i]);
    } else {
      const float raw = widen(found.raw.value[i]);
      return widen(narrow<T>(__builtin_fmaf(scale_[i], raw, shift_[i])));
    }
  }

  RF_DEVICE int64_t element(const Pixel& pixel, const PixelStrides& strides) const {
    return offset_of(pixel, strides) + channel_ * strides.k;
  }
  RF_DEVICE Stored load(const T* from, const Pixel& pixel, const PixelStrides& strides) const {
    return ptx::load_global_read_only(
        reinterpret_cast<const Stored*>(from + element(pixel, strides)));
  }

  // Two pieces make a unit of 16-bit elements: every other four threads take the second one first,
  // so that eight threads meet in no bank.
  RF_DEVICE void load_totals(float (&total)[kUnit], const Totals& totals, uint32_t row) const {
    using Piece = Unit<float, kPiece>;
    Piece piece[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const uint32_t at = kPieces == 2 && swapped_ ? 1 - p : p;
      piece[p] = ptx::load_shared<Piece>(totals.element_at(row, unit_ * kUnit + at * kPiece));
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const int p = i / kPiece;
      total[i] = kPieces == 2 && swapped_ ? piece[kPieces - 1 - p].value[i % kPiece]
                                          : piece[p].value[i % kPiece];
    }
  }

  RF_DEVICE void load_vectors() {
    const int64_t channels = int64_t{arguments_.conv.channels_in} * arguments_.conv.tiles.groups;
    const auto load_row = [&](float (&values)[kUnit], const float* row) {
#pragma unroll
      for (int i = 0; i < kUnit; i += kPiece) {
        using Piece = Unit<float, kPiece>;
        const auto piece =
            ptx::load_global_read_only(reinterpret_cast<const Piece*>(row + channel_ + i));
#pragma unroll
        for (int e = 0; e < kPiece; ++e) values[i + e] = piece.value[e];
      }
    };
    if constexpr (kEnd) {
      if (projected()) load_row(residual_mean_, arguments_.residual_mean);
    } else {
      load_row(scale_, arguments_.norm);
      load_row(shift_, arguments_.norm + channels);
    }
    load_row(mean_, arguments_.norm + 2 * channels);
  }

  const Arguments& arguments_;
  const DgradPlace& where_;
  bool swapped_;
  bool by_rows_;
  uint32_t lane_;
  uint32_t unit_;
  bool known_;       // whether there are such channels
  int64_t channel_;  // the first one of the unit, over all groups
  // Of an end none but the means.
  float scale_[kUnit];
  float shift_[kUnit];
  float mean_[kUnit];
  float residual_mean_[kUnit];
  float sum_[kSums][kUnit] = {};
};

}  // namespace resnet_fused
