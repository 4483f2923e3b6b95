// The loader of conv_bn_wgrad for an image of a few channels: dz and y by 16 bytes, the image
// element by element, each once a step and not once a tap.
#pragma once

#include <cstdint>

#include "../ptx/ptx.h"
#include "bn_backward_operand.h"
#include "gradient_geometry.h"
#include "image_chunk.h"
#include "image_shape.h"
#include "mn_major_loader.h"
#include "vector.h"

namespace resnet_fused {

template <class T, class Shape>
class ImageWgradLoader {
  using Left = MnMajorLoader<T, Shape, LoadWidth::kWide, Shape::kM>;
  using LeftUnit = Unit<T, Left::kUnit>;
  static constexpr int kMine = (kImageChunks + Shape::kThreads - 1) / Shape::kThreads;  // chunks

 public:
  // The first step begins at `first_pixel` of rows that are whole steps long.
  RF_DEVICE ImageWgradLoader(const ConvBnWgradArguments& arguments, const Tile& tile,
                             int32_t first_pixel, uint32_t thread)
      : arguments_(arguments),
        dz_(thread),
        y_(thread),
        thread_(thread),
        at_(column_of(first_pixel, arguments.product.pixels)),
        turned_(at_.c) {
    const ConvWgradArguments& product = arguments.product;
    filter_ = tile.m * Shape::kM + dz_.column();
    known_ = filter_ < product.channels_out;
    dz_channel_ = static_cast<const T*>(product.dy) + filter_ * product.dy_k;
    y_channel_ = static_cast<const T*>(product.y) + filter_ * product.y_k;
  }

  // Before the first step: the zeros.
  RF_DEVICE void begin(ptx::SharedAddress ring) const {
    if (thread_ >= kImageZeroBytes / kChunkBytes) return;
    ptx::store_shared(ring + Shape::kZerosAt + thread_ * kChunkBytes, Vector<uint32_t>{});
  }

  RF_DEVICE void issue(ptx::SharedAddress stage) {
    const ConvWgradArguments& product = arguments_.product;
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const Column at{at_.c + dz_.row() + i * Left::kRowStep, at_.s, at_.r};
      const bool known = known_ && at.c < arguments_.out_width;
      issue_channels(dz_, stage, i, dz_channel_, along<int32_t>(at, product.dy_pixels), known);
      if (product.y != nullptr) {
        issue_channels(y_, stage + Shape::kMaskOffset, i, y_channel_,
                       along<int32_t>(at, product.y_pixels), known);
      }
    }
    const int32_t left = arguments_.out_width - at_.c;
    count_ = left < kImagePixels ? left : kImagePixels;
#pragma unroll
    for (int i = 0; i < kMine; ++i) issue_chunk(i);
    at_ = advanced(at_, Column{kImagePixels, 0, 0}, product.pixels);
  }

  RF_DEVICE void land(ptx::SharedAddress stage) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const uint32_t chunk = chunk_of(i);
      if (chunk >= kImageChunks) continue;
      Vector<uint32_t> words = chunks_[i].words();
      const uint32_t at = chunk * kChunkBytes;
      if (at == kImageCountAt) words.lane[0] = static_cast<uint32_t>(count_);
      ptx::store_shared(stage + Shape::kRightAt + at, words);
    }
  }

  // dy in place of this thread's part of dz: zeros beside a row's end, and not c.
  RF_DEVICE void arrived(ptx::SharedAddress stage) {
    if (arguments_.coefficients != nullptr && known_) turn(stage);
    turned_ += kImagePixels;
    if (turned_ >= arguments_.product.pixels.channels) turned_ = 0;
  }

 private:
  static RF_DEVICE void issue_channels(Left& loader, ptx::SharedAddress tile, int i,
                                       const T* channel, int32_t offset, bool known) {
    const T* pixel = moved_by<T, LoadWidth::kWide>(channel, offset);
    loader.issue(tile, i, [&](int) { return Source<T>{pixel, known}; });
  }

  RF_DEVICE uint32_t chunk_of(int i) const {
    return thread_ + static_cast<uint32_t>(i) * Shape::kThreads;
  }

  RF_DEVICE void issue_chunk(int i) {
    const ConvWgradArguments& product = arguments_.product;
    const auto row = static_cast<int32_t>(chunk_of(i) / (kImageSpare + 1));
    const auto column = static_cast<int32_t>(chunk_of(i) % (kImageSpare + 1));
    const int32_t h = at_.s * product.stride_h + row * product.dilation_h - product.padding_h;
    const int32_t first = kImageStride * at_.c - product.padding_w + column * kImageChunkPixels;
    const bool in_rows = static_cast<uint32_t>(h) < static_cast<uint32_t>(product.height) &&
                         row < product.columns.taps_r && column != kImageSpare;
    const T* from = static_cast<const T*>(product.x) + at_.r * product.x_pixels.r +
                    h * product.x_taps.r + first * product.x_taps.s;
    const uint32_t known = image_elements(arguments_.channels, [&](int pixel) {
      return in_rows && static_cast<uint32_t>(first + pixel) < static_cast<uint32_t>(product.width);
    });
    chunks_[i].issue(from, {product.x_taps.s, product.x_taps.c}, known);
  }

  RF_DEVICE void turn(ptx::SharedAddress stage) const {
    BackwardRows<Left::kUnit> rows;
    const float* from = arguments_.coefficients + filter_;
    load_channels(rows.a, from);
    load_channels(rows.b, from + arguments_.filters);
    load_channels(rows.c, from + int64_t{2} * arguments_.filters);
#pragma unroll
    for (int i = 0; i < Left::kRows; ++i) {
      const ptx::SharedAddress at = dz_.address(stage, i);
      auto unit = ptx::load_shared<LeftUnit>(at);
      const auto y = ptx::load_shared<LeftUnit>(y_.address(stage + Shape::kMaskOffset, i));
      apply_backward(unit, y, rows);
      if (turned_ + dz_.row() + i * Left::kRowStep >= arguments_.out_width) unit = LeftUnit{};
      ptx::store_shared(at, unit);
    }
  }

  const ConvBnWgradArguments& arguments_;
  Left dz_;
  Left y_;
  uint32_t thread_;
  Column at_;          // output pixel (q, p, n) of the step that is asked for next
  int32_t turned_;     // q of the step that is turned next
  int32_t count_ = 0;  // output pixels of the step that has been asked for
  int32_t filter_;
  bool known_;  // whether there are filters for this thread
  const T* dz_channel_;
  const T* y_channel_;
  ImageChunk<T> chunks_[kMine];
};

// Fragments of a warp's columns, as MnMajorFragments has those of a right side: each matrix is 8
// output pixels by two taps.
template <class Shape>
class ImageFragments {
 public:
  // ring: at a multiple of a line of banks; first: the warp's first column within the tile.
  RF_DEVICE ImageFragments(ptx::SharedAddress ring, uint32_t first, uint32_t lane)
      : zeros_(ring + Shape::kZerosAt) {
    const uint32_t matrix = lane / 8;
    pixel_ = matrix % 2 * 8 + lane % 8;
    chunk_ = first / 8 + matrix / 2;
  }

  RF_DEVICE void load_block(uint32_t (&fragment)[4], ptx::SharedAddress rows, int slice,
                            int block) const {
    if (slice == 0 && block == 0) count_ = ptx::load_shared<uint32_t>(rows + kImageCountAt);
    const uint32_t pixel = pixel_ + static_cast<uint32_t>(slice) * (kSliceBytes / 2);
    const uint32_t chunk = chunk_ + 2 * static_cast<uint32_t>(block);
    const uint32_t at =
        chunk / kImageTapChunks * kImageRowBytes + (pixel + chunk % kImageTapChunks) * kChunkBytes;
    // Zeros times what the image has there may be NaN.
    ptx::ldmatrix_x4_trans(fragment, pixel < count_ ? rows + at : zeros_ + at % kImageZeroBytes);
  }

 private:
  ptx::SharedAddress zeros_;
  uint32_t pixel_;
  uint32_t chunk_;
  mutable uint32_t count_ = 0;  // output pixels of the step
};

}  // namespace resnet_fused
