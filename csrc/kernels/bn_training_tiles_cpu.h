// Tiles of training's CPU kernels: where their operands lie, buffers for those that lie badly, and
// the per-channel values of a row.
//
// Compiled once per instruction set (see launch/bn_training_cpu_body.cpp): nothing here is shared
// between them, the standard library's templates included.
#pragma once

#include <cstdint>

#include "../device/bn_training.h"
#include "../device/portable.h"
#include "../device/scalar.h"

// The loop behind it reads and writes each element in its own iteration: in place is no obstacle.
#if defined(__clang__)
#define RF_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define RF_INDEPENDENT _Pragma("GCC ivdep")
#else
#define RF_INDEPENDENT
#endif

RF_NAMESPACE_BEGIN

namespace cpu {

RF_HOST_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
RF_HOST_DEVICE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A range of channels and a range of pixels, in each of `images`; with channels inside, these are
// one, and the pixels are those of all images.
struct Tile {
  int64_t image;
  int64_t images;
  int64_t pixel;
  int64_t pixels;
  int64_t channel;
  int64_t channels;

  int64_t elements() const { return images * pixels; }  // of a channel
};

inline Tile tile_at(const BnTrainingCall& call, int64_t block, int64_t group) {
  const BnTrainingTiles& t = call.tiles;
  const int64_t per_image = (t.pixels + t.length - 1) / t.length;
  Tile tile;
  tile.image = t.channels_inside ? 0 : block / per_image * t.images;
  tile.images = t.channels_inside ? 1 : smaller(t.images, call.size[0] - tile.image);
  tile.pixel = (t.channels_inside ? block : block % per_image) * t.length;
  tile.pixels = smaller(t.length, t.pixels - tile.pixel);
  tile.channel = group * t.group;
  tile.channels = smaller(t.group, call.size[1] - tile.channel);
  return tile;
}

// The image, row and column of a tile's pixels, one after the other.
class Pixels {
 public:
  Pixels(const BnTrainingCall& call, const Tile& tile) : call_(call) {
    const int64_t plane = call.size[2] * call.size[3];
    const int64_t inside = tile.pixel % plane;
    n = tile.image + tile.pixel / plane;
    p = inside / call.size[3];
    q = inside % call.size[3];
  }
  void next() {
    if (++q < call_.size[3]) return;
    q = 0;
    if (++p < call_.size[2]) return;
    p = 0;
    ++n;
  }
  int64_t offset(const int64_t (&stride)[4]) const {
    return n * stride[0] + p * stride[2] + q * stride[3];
  }

  int64_t n, p, q;

 private:
  const BnTrainingCall& call_;
};

// An operand's tile: image after image, row after row, columns side by side.
template <class T>
struct View {
  T* at;
  int64_t row;
  int64_t image;

  T* operator()(int64_t i, int64_t r) const { return at + i * image + r * row; }
};

// How far a buffer's pixels, channels and images are apart.
struct BufferStride {
  BufferStride(const BnTrainingCall& call, const Tile& tile)
      : pixel(call.tiles.channels_inside ? tile.channels : 1),
        channel(call.tiles.channels_inside ? 1 : tile.pixels),
        image(tile.channels * tile.pixels) {}

  template <class T>
  View<T> view(T* buffer) const {
    return {buffer, pixel == 1 ? channel : pixel, image};
  }

  int64_t pixel, channel, image;
};

// Copies a tile between an operand and a buffer. `first`: the tensor's channel 0.
template <bool kStore, class T>
void copy_tile(const BnTrainingCall& call, const BnTrainingOperand& operand, int64_t first,
               const Tile& tile, T* buffer) {
  const BufferStride to(call, tile);
  Pixels at(call, tile);
  for (int64_t i = 0; i < tile.elements(); ++i, at.next()) {
    T* there = static_cast<T*>(operand.data) + at.offset(operand.stride) +
               (tile.channel - first) * operand.stride[1];
    T* here = buffer + i / tile.pixels * to.image + i % tile.pixels * to.pixel;
    for (int64_t c = 0; c < tile.channels; ++c) {
      if constexpr (kStore) {
        there[c * operand.stride[1]] = here[c * to.channel];
      } else {
        here[c * to.channel] = there[c * operand.stride[1]];
      }
    }
  }
}

// The tile of an operand that is read: in place, or a copy in `buffer`.
template <class T>
View<T> read_tile(const BnTrainingCall& call, int index, const Tile& tile, T* buffer) {
  const BnTrainingOperand& operand = call.operand[index];
  if (operand.data == nullptr) return {nullptr, 0, 0};
  const int64_t first = index == kResidual ? call.residual_first : 0;
  const bool inside = call.tiles.channels_inside;
  if (call.tiles.packed[index]) {
    copy_tile<false>(call, operand, first, tile, buffer);
    return BufferStride(call, tile).view(buffer);
  }
  T* at = static_cast<T*>(operand.data) + (tile.channel - first) * operand.stride[1];
  if (inside) {
    const int64_t row = call.tiles.pixel_stride[index];
    return {at + tile.pixel * row, row, 0};
  }
  const int64_t image = operand.stride[0];
  return {at + tile.image * image + tile.pixel, operand.stride[1], image};
}

// The tile of the result: in place, or `buffer`, which store_tile copies.
template <class T>
View<T> result_tile(const BnTrainingCall& call, const Tile& tile, T* buffer) {
  if (call.tiles.packed[kResult]) return BufferStride(call, tile).view(buffer);
  return read_tile<T>(call, kResult, tile, nullptr);
}

template <class T>
void store_tile(const BnTrainingCall& call, const Tile& tile, T* buffer) {
  if (call.tiles.packed[kResult]) {
    copy_tile<true>(call, call.operand[kResult], 0, tile, buffer);
  }
}

// Buffers for a task's packed operands.
template <class T>
struct Buffers {
  alignas(64) T of[kBnTrainingOperands][kPackedTile];
};

// A per-channel value along a tile's row: one for each column, or one for the whole row.
template <class C, bool kInside>
struct Along {
  Along(const C* values, int64_t row) : at(values), one(kInside ? C(0) : values[row]) {}
  RF_HOST_DEVICE C operator[](int64_t column) const { return kInside ? at[column] : one; }

  const C* at;
  C one;
};

// Columns of a row are added up lane by lane, where the row is one channel's.
constexpr int64_t kLanes = 32;

// Partial sums of a tile's channels: the columns', or the current row's lanes.
//
// In two levels. One after the other, equal values are all rounded to the same side, and behind a
// ReLU many are equal: the error would grow with their number.
template <class C, bool kInside>
struct Partial {
  static constexpr int kRun = 16;  // values that are added up one after the other

  alignas(64) C of[kMostSums][kInside ? kLongestGroup : kLanes];
  alignas(64) C whole[kMostSums][kInside ? kLongestGroup : kLanes];
  int sums, added;
  int64_t used;

  void begin(int count, int64_t columns) {
    sums = count;
    used = kInside ? columns : kLanes;
    added = 0;
    for (int s = 0; s < sums; ++s) {
      for (int64_t c = 0; c < used; ++c) of[s][c] = whole[s][c] = C(0);
    }
  }
  // After each value of the columns or lanes.
  void next() {
    if (++added == kRun) fold();
  }
  void fold() {
    added = 0;
    for (int s = 0; s < sums; ++s) {
      C* RF_RESTRICT from = of[s];
      C* RF_RESTRICT to = whole[s];
      RF_INDEPENDENT
      for (int64_t c = 0; c < used; ++c) {
        to[c] += from[c];
        from[c] = C(0);
      }
    }
  }
  // Of column i, or of the row; behind the last fold.
  double sum(int s, int64_t i) const { return kInside ? double(whole[s][i]) : lanes(s); }

 private:
  double lanes(int s) const {
    // By halves, in a fixed order: one after the other, each addition would wait for the last.
    constexpr int kWidth = 8;
    double sum[kWidth] = {};
    for (int64_t c = 0; c < kLanes; c += kWidth) {
      for (int i = 0; i < kWidth; ++i) sum[i] += static_cast<double>(whole[s][c + i]);
    }
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    return sum[0];
  }
};

// Runs body(image, row, first column, columns) over a tile's rows such that a run's columns have a
// place in Partial each, and end(first channel, channels) when their `sums` sums are whole.
template <bool kInside, class C, class Body, class End>
RF_HOST_DEVICE void for_each_run(const Tile& tile, Partial<C, kInside>& partial, int sums,
                                 const Body& body, const End& end) {
  if constexpr (kInside) {
    partial.begin(sums, tile.channels);
    for (int64_t r = 0; r < tile.pixels; ++r, partial.next()) body(0, r, 0, tile.channels);
    partial.fold();
    end(0, tile.channels);
  } else {
    for (int64_t r = 0; r < tile.channels; ++r) {
      partial.begin(sums, 1);
      for (int64_t i = 0; i < tile.images; ++i) {
        int64_t c = 0;
        for (; c + kLanes <= tile.pixels; c += kLanes, partial.next()) body(i, r, c, kLanes);
        if (c < tile.pixels) {
          body(i, r, c, tile.pixels - c);
          partial.next();
        }
      }
      partial.fold();
      end(r, 1);
    }
  }
}

// Runs body(image, row) over a tile's rows.
template <bool kInside, class Body>
void for_each_row(const Tile& tile, const Body& body) {
  const int64_t rows = kInside ? tile.pixels : tile.channels;
  for (int64_t i = 0; i < tile.images; ++i) {
    for (int64_t r = 0; r < rows; ++r) body(i, r);
  }
}

}  // namespace cpu

RF_NAMESPACE_END
