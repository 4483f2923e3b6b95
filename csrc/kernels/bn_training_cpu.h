// BatchNorm of training on the CPU: statistics, forward, backward's mask and sums, its affine.
//
// A tile's sums are made in the arithmetic's type over at most 128 pixels a channel (2048 in 32
// lanes), and tiles are joined in double. Every other result is one rounding.
#pragma once

#include "bn_act_pool_cpu.h"
#include "bn_training_tiles_cpu.h"

RF_NAMESPACE_BEGIN

namespace cpu {

// Rows of `norm`.
template <class T>
const Compute<T>* norm_row(const BnTrainingCall& call, const void* norm, int row) {
  return static_cast<const Compute<T>*>(norm) + row * call.size[1];
}

// ---- statistics: two passes over the tile, which is in the cache for the second

template <class T, bool kInside>
void add_row(const T* y, int64_t n, Compute<T>* RF_RESTRICT sum) {
  RF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) sum[i] += widen(y[i]);
}

template <class T, bool kInside>
void add_spread(const T* y, int64_t n, Along<Compute<T>, kInside> mean, Compute<T>* RF_RESTRICT sum,
                Compute<T>* RF_RESTRICT square) {
  RF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> d = widen(y[i]) - mean[i];
    sum[i] += d;
    square[i] += d * d;
  }
}

// What a task knows of a channel: sums over its tiles around the first tile's mean. Those of the
// squares can't cancel: the first tile's own share of them is 1 / tiles at least.
struct ChannelStatistics {
  double pivot, offset, spread;

  void add(double n, double mean, double m2, bool first) {
    if (first) {
      pivot = __builtin_isfinite(mean) ? mean : 0.0;  // an infinite mean stays one
      offset = spread = 0;
    }
    const double distance = mean - pivot;
    offset += n * distance;
    spread += m2 + n * distance * distance;
  }
};

template <class T, bool kInside>
void tile_statistics(const BnTrainingCall& call, const Tile& tile, bool first, T* buffer,
                     ChannelStatistics* found) {
  using C = Compute<T>;
  const View<T> y = read_tile<T>(call, kRaw, tile, buffer);
  const double n = static_cast<double>(tile.elements());
  C mean[kLongestGroup];
  Partial<C, kInside> partial;
  for_each_run<kInside>(
      tile, partial, 1,
      [&](int64_t i, int64_t r, int64_t c, int64_t length) {
        add_row<T, kInside>(y(i, r) + c, length, partial.of[0]);
      },
      [&](int64_t channel, int64_t channels) {
        for (int64_t i = 0; i < channels; ++i) {
          mean[channel + i] = static_cast<C>(partial.sum(0, i) / n);
        }
      });
  for_each_run<kInside>(
      tile, partial, 2,
      [&](int64_t i, int64_t r, int64_t c, int64_t length) {
        add_spread<T, kInside>(y(i, r) + c, length, {mean, r}, partial.of[0], partial.of[1]);
      },
      [&](int64_t channel, int64_t channels) {
        for (int64_t i = 0; i < channels; ++i) {
          // What rounding the mean has left over; not a number where the mean is infinite.
          const double left = partial.sum(0, i);
          const double rest = __builtin_isfinite(left) ? left / n : 0.0;
          found[channel + i].add(n, mean[channel + i] + rest, partial.sum(1, i) - left * rest,
                                 first);
        }
      });
}

template <class T, bool kInside>
void statistics_task(const BnTrainingCall& call, int64_t chunk, int64_t group) {
  ChannelStatistics found[kLongestGroup];
  alignas(64) T buffer[kPackedTile];
  const int64_t begin = chunk * call.tiles.chunk;
  const int64_t end = smaller(call.tiles.blocks, begin + call.tiles.chunk);
  double n = 0;
  Tile tile{};
  for (int64_t block = begin; block < end; ++block) {
    tile = tile_at(call, block, group);
    n += static_cast<double>(tile.elements());
    tile_statistics<T, kInside>(call, tile, block == begin, buffer, found);
  }
  double* mean = call.workspace + 2 * chunk * call.size[1] + tile.channel;
  double* spread = mean + call.size[1];
  for (int64_t c = 0; c < tile.channels; ++c) {
    mean[c] = found[c].pivot + found[c].offset / n;
    spread[c] = found[c].spread - found[c].offset * (found[c].offset / n);
  }
}

// ---- forward: relu(fma(scale, y, shift) + shortcut)

enum class Shortcut { kNone, kPlain, kNormalised };

template <class T, bool kInside, Shortcut kShortcut>
void forward_row(const T* y, const T* residual, T* out, int64_t n, Along<Compute<T>, kInside> scale,
                 Along<Compute<T>, kInside> shift, Along<Compute<T>, kInside> residual_scale,
                 Along<Compute<T>, kInside> residual_shift, Compute<T> floor) {
  using C = Compute<T>;
  RF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    C z = multiply_add(scale[i], widen(y[i]), shift[i]);
    if constexpr (kShortcut == Shortcut::kPlain) z += widen(residual[i]);
    if constexpr (kShortcut == Shortcut::kNormalised) {
      z += multiply_add(residual_scale[i], widen(residual[i]), residual_shift[i]);
    }
    out[i] = narrow<T>(floor > z ? floor : z);  // a NaN fails the comparison and stays
  }
}

template <class T, bool kInside, Shortcut kShortcut>
void forward_tile(const BnTrainingCall& call, const Tile& tile, Buffers<T>& buffers) {
  using C = Compute<T>;
  if (tile.channels <= 0) return;
  const View<T> y = read_tile(call, kRaw, tile, buffers.of[kRaw]);
  View<T> residual{y.at, 0, 0};
  if (kShortcut != Shortcut::kNone) {
    residual = read_tile(call, kResidual, tile, buffers.of[kResidual]);
  }
  const View<T> out = result_tile(call, tile, buffers.of[kResult]);
  const C* scale = norm_row<T>(call, call.norm, 0) + tile.channel;
  const C* shift = norm_row<T>(call, call.norm, 1) + tile.channel;
  const C *residual_scale = scale, *residual_shift = shift;
  if (kShortcut == Shortcut::kNormalised) {
    residual_scale = norm_row<T>(call, call.residual_norm, 0) + tile.channel;
    residual_shift = norm_row<T>(call, call.residual_norm, 1) + tile.channel;
  }
  const C floor = call.relu ? C(0) : -C(__builtin_huge_val());
  const int64_t columns = kInside ? tile.channels : tile.pixels;
  for_each_row<kInside>(tile, [&](int64_t i, int64_t r) {
    forward_row<T, kInside, kShortcut>(y(i, r), residual(i, r), out(i, r), columns, {scale, r},
                                       {shift, r}, {residual_scale, r}, {residual_shift, r}, floor);
  });
  store_tile(call, tile, buffers.of[kResult]);
}

// Channels [begin, end) of a tile, those of them that it has.
inline Tile channels_of(Tile tile, int64_t begin, int64_t end) {
  end = smaller(end, tile.channel + tile.channels);
  tile.channel = larger(tile.channel, begin);
  tile.channels = end - tile.channel;
  return tile;
}

template <class T, bool kInside>
void forward_task(const BnTrainingCall& call, int64_t chunk, int64_t group) {
  Buffers<T> buffers;
  const int64_t begin = chunk * call.tiles.chunk;
  const int64_t end = smaller(call.tiles.blocks, begin + call.tiles.chunk);
  for (int64_t block = begin; block < end; ++block) {
    const Tile tile = tile_at(call, block, group);
    if (call.operand[kResidual].data == nullptr) {
      forward_tile<T, kInside, Shortcut::kNone>(call, tile, buffers);
      continue;
    }
    if (call.residual_norm != nullptr) {
      forward_tile<T, kInside, Shortcut::kNormalised>(call, tile, buffers);
      continue;
    }
    // The shortcut may have fewer channels; the others are left without.
    const int64_t first = call.residual_first, last = first + call.residual_channels;
    const Tile below = channels_of(tile, 0, first), above = channels_of(tile, last, call.size[1]);
    forward_tile<T, kInside, Shortcut::kNone>(call, below, buffers);
    forward_tile<T, kInside, Shortcut::kPlain>(call, channels_of(tile, first, last), buffers);
    forward_tile<T, kInside, Shortcut::kNone>(call, above, buffers);
  }
}

// ---- backward: dz = the gradient where the result passed the ReLU; sums of dz and dz (y - mean)

enum class Mask { kNone, kResult, kAgain };

template <class T, bool kInside, Mask kMask, bool kResidualSum>
void backward_run(const T* gradient, const T* passed, const T* y, const T* residual, T* dz,
                  int64_t n, Along<Compute<T>, kInside> scale, Along<Compute<T>, kInside> shift,
                  Along<Compute<T>, kInside> mean, Along<Compute<T>, kInside> residual_mean,
                  Compute<T>* RF_RESTRICT sum, Compute<T>* RF_RESTRICT product,
                  Compute<T>* RF_RESTRICT residual_product) {
  using C = Compute<T>;
  RF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const C raw = widen(y[i]);
    C d = widen(gradient[i]);
    // Not (result > 0): where it is NaN, the gradient passes. The mask is of the rounded result.
    if constexpr (kMask == Mask::kResult) d = widen(passed[i]) <= C(0) ? C(0) : d;
    if constexpr (kMask == Mask::kAgain) {
      const C z = widen(narrow<T>(multiply_add(scale[i], raw, shift[i])));
      d = z <= C(0) ? C(0) : d;
    }
    dz[i] = narrow<T>(d);  // exact
    sum[i] += d;
    product[i] += d * (raw - mean[i]);
    if constexpr (kResidualSum) {
      residual_product[i] += d * (widen(residual[i]) - residual_mean[i]);
    }
  }
}

template <class T, bool kInside, Mask kMask, bool kResidualSum>
void backward_tile(const BnTrainingCall& call, const Tile& tile, Buffers<T>& buffers,
                   double (*total)[kLongestGroup]) {
  using C = Compute<T>;
  constexpr int kSums = kResidualSum ? 3 : 2;
  const View<T> y = read_tile(call, kRaw, tile, buffers.of[kRaw]);
  View<T> passed{y.at, 0, 0}, residual{y.at, 0, 0};
  if (kMask == Mask::kResult) passed = read_tile(call, kPassed, tile, buffers.of[kPassed]);
  if (kResidualSum) residual = read_tile(call, kResidual, tile, buffers.of[kResidual]);
  View<T> gradient;
  if (call.op == BnTrainingOp::kPoolBackward) {
    gather_windows(call, tile, buffers.of[kGradient]);
    gradient = BufferStride(call, tile).view(buffers.of[kGradient]);
  } else {
    gradient = read_tile(call, kGradient, tile, buffers.of[kGradient]);
  }
  const View<T> dz = result_tile(call, tile, buffers.of[kResult]);
  const C* scale = norm_row<T>(call, call.norm, 0) + tile.channel;
  const C* shift = norm_row<T>(call, call.norm, 1) + tile.channel;
  const C* mean = norm_row<T>(call, call.norm, 2) + tile.channel;
  const C* residual_mean = mean;
  if (kResidualSum) residual_mean = norm_row<T>(call, call.residual_norm, 2) + tile.channel;
  Partial<C, kInside> partial;
  for_each_run<kInside>(
      tile, partial, kSums,
      [&](int64_t i, int64_t r, int64_t c, int64_t length) {
        backward_run<T, kInside, kMask, kResidualSum>(
            gradient(i, r) + c, passed(i, r) + c, y(i, r) + c, residual(i, r) + c, dz(i, r) + c,
            length, {scale, r}, {shift, r}, {mean, r}, {residual_mean, r}, partial.of[0],
            partial.of[1], partial.of[2]);
      },
      [&](int64_t channel, int64_t channels) {
        for (int s = 0; s < kSums; ++s) {
          for (int64_t i = 0; i < channels; ++i) {
            total[s][channel + i] += partial.sum(s, i);
          }
        }
      });
  store_tile(call, tile, buffers.of[kResult]);
}

template <class T, bool kInside, Mask kMask, bool kResidualSum>
void backward_task(const BnTrainingCall& call, int64_t chunk, int64_t group) {
  Buffers<T> buffers;
  double total[kMostSums][kLongestGroup] = {};
  const int64_t begin = chunk * call.tiles.chunk;
  const int64_t end = smaller(call.tiles.blocks, begin + call.tiles.chunk);
  Tile tile{};
  for (int64_t block = begin; block < end; ++block) {
    tile = tile_at(call, block, group);
    backward_tile<T, kInside, kMask, kResidualSum>(call, tile, buffers, total);
  }
  for (int s = 0; s < call.rows; ++s) {
    double* to = call.workspace + (chunk * call.rows + s) * call.size[1] + tile.channel;
    for (int64_t c = 0; c < tile.channels; ++c) to[c] = total[s][c];
  }
}

template <class T, bool kInside>
void backward_task(const BnTrainingCall& call, int64_t chunk, int64_t group) {
  const bool third = call.residual_norm != nullptr;
  if (!call.relu) {
    return third ? backward_task<T, kInside, Mask::kNone, true>(call, chunk, group)
                 : backward_task<T, kInside, Mask::kNone, false>(call, chunk, group);
  }
  if (call.operand[kPassed].data != nullptr) {
    return third ? backward_task<T, kInside, Mask::kResult, true>(call, chunk, group)
                 : backward_task<T, kInside, Mask::kResult, false>(call, chunk, group);
  }
  return third ? backward_task<T, kInside, Mask::kAgain, true>(call, chunk, group)
               : backward_task<T, kInside, Mask::kAgain, false>(call, chunk, group);
}

// ---- the affine of backward: fma(A, dz, fma(B, y, C))

template <class T, bool kInside>
void apply_row(const T* dz, const T* y, T* dy, int64_t n, Along<Compute<T>, kInside> a,
               Along<Compute<T>, kInside> b, Along<Compute<T>, kInside> c) {
  RF_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> rest = multiply_add(b[i], widen(y[i]), c[i]);
    dy[i] = narrow<T>(multiply_add(a[i], widen(dz[i]), rest));
  }
}

template <class T, bool kInside>
void apply_task(const BnTrainingCall& call, int64_t chunk, int64_t group) {
  Buffers<T> buffers;
  const int64_t begin = chunk * call.tiles.chunk;
  const int64_t end = smaller(call.tiles.blocks, begin + call.tiles.chunk);
  for (int64_t block = begin; block < end; ++block) {
    const Tile tile = tile_at(call, block, group);
    const View<T> dz = read_tile(call, kGradient, tile, buffers.of[kGradient]);
    const View<T> y = read_tile(call, kRaw, tile, buffers.of[kRaw]);
    const View<T> dy = result_tile(call, tile, buffers.of[kResult]);
    const Compute<T>* a = norm_row<T>(call, call.norm, 0) + tile.channel;
    const Compute<T>* b = norm_row<T>(call, call.norm, 1) + tile.channel;
    const Compute<T>* c = norm_row<T>(call, call.norm, 2) + tile.channel;
    const int64_t columns = kInside ? tile.channels : tile.pixels;
    for_each_row<kInside>(tile, [&](int64_t i, int64_t r) {
      apply_row<T, kInside>(dz(i, r), y(i, r), dy(i, r), columns, {a, r}, {b, r}, {c, r});
    });
    store_tile(call, tile, buffers.of[kResult]);
  }
}

// ----

template <class T, bool kInside>
void run_task(const BnTrainingCall& call, int64_t task) {
  if (call.op == BnTrainingOp::kPool) return pool_row<T, kInside>(call, task);
  const int64_t chunk = task / call.tiles.groups, group = task % call.tiles.groups;
  switch (call.op) {
    case BnTrainingOp::kStatistics:
      return statistics_task<T, kInside>(call, chunk, group);
    case BnTrainingOp::kForward:
      return forward_task<T, kInside>(call, chunk, group);
    case BnTrainingOp::kApply:
      return apply_task<T, kInside>(call, chunk, group);
    default:
      return backward_task<T, kInside>(call, chunk, group);
  }
}

template <class T>
void run_tasks(const BnTrainingCall& call, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    if (call.tiles.channels_inside) {
      run_task<T, true>(call, task);
    } else {
      run_task<T, false>(call, task);
    }
  }
}

// Tasks [begin, end); ranges may run on different threads.
inline void bn_training(const BnTrainingCall& call, int64_t begin, int64_t end) {
  switch (call.dtype) {
    case DataType::kFloat32:
      return run_tasks<float>(call, begin, end);
    case DataType::kFloat64:
      return run_tasks<double>(call, begin, end);
    case DataType::kFloat16:
      return run_tasks<Float16>(call, begin, end);
    case DataType::kBFloat16:
      return run_tasks<BFloat16>(call, begin, end);
  }
}

}  // namespace cpu

RF_NAMESPACE_END
