// How a call of training's CPU kernels is cut into tiles, and how the tiles' sums are joined.
#include <algorithm>
#include <cmath>
#include <vector>

#include "bn_training.h"

namespace {

using namespace resnet_fused;

constexpr int64_t kTask = 32768;    // elements, about: enough for a thread, ATen's grain
constexpr int64_t kRows = 128;      // pixels whose sums are added up in float32, at most
constexpr int64_t kColumns = 2048;  // likewise, by 32 lanes
constexpr int64_t kPlaneTile = 8192;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The distance of two neighbouring pixels where dimensions `first` to 3 (without the channels) are
// one loop over memory; -1 where they are not.
int64_t merged_stride(const BnTrainingCall& call, const int64_t (&stride)[4], int first) {
  int64_t found = -1, next = 0;
  for (int d = 3; d >= first; --d) {
    if (d == 1 || call.size[d] == 1) continue;
    if (found < 0) {
      found = stride[d];
    } else if (stride[d] != next) {
      return -1;
    }
    next = stride[d] * call.size[d];
  }
  return found < 0 ? 1 : found;
}

// Whether an operand's columns have stride 1, so that tiles may be read where they lie.
bool is_direct(const BnTrainingCall& call, const BnTrainingOperand& operand, bool inside,
               int64_t* pixel_stride) {
  const int64_t stride = merged_stride(call, operand.stride, inside ? 0 : 2);
  *pixel_stride = stride;
  return inside ? stride >= 0 && (operand.stride[1] == 1 || call.size[1] == 1) : stride == 1;
}

}  // namespace

extern "C" void rf_bn_training_plan(BnTrainingCall* call) {
  BnTrainingTiles& t = call->tiles;
  t = {};
  const int64_t images = call->size[0], channels = call->size[1];
  const int64_t plane = call->size[2] * call->size[3];
  t.channels_inside = call->operand[kRaw].stride[1] == 1 && channels > 1;
  if (call->op == BnTrainingOp::kPool) {
    // Its own loops know no buffers.
    t.channels_inside = t.channels_inside && call->operand[kResult].stride[1] == 1 &&
                        call->pool.taps_stride[1] == 1;
    return;
  }
  bool any_packed = false;
  const bool gathers = call->op == BnTrainingOp::kPoolBackward;
  for (int i = 0; i < kBnTrainingOperands; ++i) {
    // The gradient of a pooling is gathered into the buffer.
    const bool gathered = i == kGradient && gathers;
    const BnTrainingOperand& operand = call->operand[i];
    t.packed[i] = operand.data != nullptr &&
                  (gathered || !is_direct(*call, operand, t.channels_inside, &t.pixel_stride[i]));
    any_packed = any_packed || t.packed[i];
  }
  t.pixels = t.channels_inside ? images * plane : plane;
  t.images = 1;
  if (t.channels_inside) {
    const int64_t group = any_packed ? 128 : kLongestGroup;
    t.group = std::min(channels, group);
    t.length = any_packed ? std::min(kRows, kPackedTile / t.group) : kRows;
  } else {
    const int64_t tile = any_packed ? kPackedTile : kPlaneTile;
    const int64_t longest = any_packed ? tile / 8 : kColumns;
    t.length = std::max<int64_t>(1, std::min(plane, longest));
    // Small images side by side: a channel's own work is done once for all of them.
    if (!gathers) t.images = std::max<int64_t>(1, std::min(images, longest / t.length));
    t.group = std::min({channels, tile / (t.images * t.length), kLongestGroup});
    t.group = std::max<int64_t>(1, t.group);
  }
  const int64_t per_pixels = divide_up(t.pixels, t.length);
  t.blocks = t.channels_inside ? per_pixels : divide_up(images, t.images) * per_pixels;
  t.chunk = std::max<int64_t>(1, kTask / (t.group * t.images * t.length));
  t.chunks = divide_up(t.blocks, t.chunk);
  t.groups = divide_up(channels, t.group);
}

extern "C" int64_t rf_bn_training_tasks(const BnTrainingCall* call) {
  if (call->op == BnTrainingOp::kPool) {
    const int64_t rows = call->size[0] * call->pool.windows[0];
    return call->tiles.channels_inside ? rows : rows * call->size[1];
  }
  return call->tiles.chunks * call->tiles.groups;
}

extern "C" int64_t rf_bn_training_workspace(const BnTrainingCall* call) {
  return call->tiles.chunks * call->rows * call->size[1];
}

namespace {

// Pixels of one channel in a chunk.
int64_t chunk_pixels(const BnTrainingCall& call, int64_t chunk) {
  const BnTrainingTiles& t = call.tiles;
  const int64_t per_pixels = divide_up(t.pixels, t.length);
  // Every image's (or the only) range of blocks ends with a shorter one; so do the images.
  const int64_t most = t.channels_inside ? 1 : call.size[0];
  const auto up_to = [&](int64_t block) {
    const int64_t images = std::min(most, block / per_pixels * t.images);
    return images * t.pixels + std::min(t.pixels, block % per_pixels * t.length);
  };
  return up_to(std::min(t.blocks, (chunk + 1) * t.chunk)) - up_to(chunk * t.chunk);
}

// mean = p + sum n_i (mean_i - p) / N;  M2 = sum M2_i + sum n_i (mean_i - mean)^2.
template <class C>
void merge_statistics(const BnTrainingCall& call, C* sums) {
  const int64_t channels = call.size[1];
  const double* parts = call.workspace;
  std::vector<double> offset(channels), mean(channels), spread(channels);
  // An infinite pivot would make NaN of an infinite mean.
  const auto pivot = [&](int64_t k) { return std::isfinite(parts[k]) ? parts[k] : 0.0; };
  double n = 0;
  for (int64_t i = 0; i < call.tiles.chunks; ++i) {
    const double pixels = static_cast<double>(chunk_pixels(call, i));
    const double* means = parts + 2 * i * channels;
    n += pixels;
    for (int64_t k = 0; k < channels; ++k) offset[k] += pixels * (means[k] - pivot(k));
  }
  for (int64_t k = 0; k < channels; ++k) mean[k] = n > 0 ? pivot(k) + offset[k] / n : 0.0;
  for (int64_t i = 0; i < call.tiles.chunks; ++i) {
    const double pixels = static_cast<double>(chunk_pixels(call, i));
    const double* means = parts + 2 * i * channels;
    for (int64_t k = 0; k < channels; ++k) {
      const double distance = means[k] - mean[k];
      spread[k] += means[channels + k] + pixels * distance * distance;
    }
  }
  for (int64_t k = 0; k < channels; ++k) {
    sums[k] = static_cast<C>(mean[k]);
    sums[channels + k] = static_cast<C>(spread[k]);
  }
}

template <class C>
void merge_sums(const BnTrainingCall& call, C* sums) {
  const int64_t values = call.rows * call.size[1];
  std::vector<double> sum(values);
  for (int64_t i = 0; i < call.tiles.chunks; ++i) {
    for (int64_t k = 0; k < values; ++k) sum[k] += call.workspace[i * values + k];
  }
  for (int64_t k = 0; k < values; ++k) sums[k] = static_cast<C>(sum[k]);
}

template <class C>
void merge(const BnTrainingCall& call) {
  C* sums = static_cast<C*>(call.sums);
  if (call.op == BnTrainingOp::kStatistics) {
    merge_statistics(call, sums);
  } else {
    merge_sums(call, sums);
  }
}

}  // namespace

extern "C" void rf_bn_training_merge(const BnTrainingCall* call) {
  if (call->dtype == DataType::kFloat64) {
    merge<double>(*call);
  } else {
    merge<float>(*call);
  }
}
