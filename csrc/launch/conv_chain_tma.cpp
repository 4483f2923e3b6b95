// conv_chain for sm_90a: its configurations, how long they are predicted to take, and the tensor
// maps and arguments of its launch. None of the rates has been measured by this project on a GPU;
// only their proportions matter.
#include "conv_chain_tma.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>

#include "conv_chain_rates.h"
#include "conv_plan.h"
#include "tma_request.h"

namespace resnet_fused {

// tools/_cuda_early.py knows what a kernel's parameters point to by these places.
static_assert(offsetof(ChainTmaArguments, x) == 0);
static_assert(offsetof(ChainTmaArguments, shortcut) == 128);
static_assert(offsetof(ChainTmaArguments, weight) == 256);
static_assert(offsetof(ChainTmaArguments, projection) == 384);
static_assert(offsetof(ChainTmaArguments, next) == 512);
static_assert(offsetof(ChainTmaArguments, out) == 640);
static_assert(offsetof(ChainTmaArguments, following) == 768);
static_assert(offsetof(ChainTmaArguments, scale) == 896);
static_assert(offsetof(ChainTmaArguments, next_shift) == 936);
static_assert(offsetof(ChainTmaArguments, even.data) == 944);

namespace {

// A tensor of activations, all of whose pixels one map reaches.
struct Rows {
  const char* name;
  const void* data;
  int64_t channels;
  const int64_t (&stride)[4];
  int32_t box;         // pixels
  bool mapped = true;  // false: its pixels do not follow the tile's, or it has a map of its own
};

std::array<Rows, 4> rows_of(const RfConvChain& p, const ChainTmaFacts& tile) {
  const int32_t read = tile.own_rows ? kWarpgroupRows : kChainTmaPixels;
  return {Rows{"x", p.x, p.x_size[1], p.x_stride, read},
          p.projects != 0
              ? Rows{"projected", p.projected, p.projected_channels, p.projected_stride, read,
                     !tile.own_rows}
              : Rows{"residual", p.residual, p.channels, p.residual_stride, kChainTmaPixels},
          Rows{"out", p.out, p.channels, p.out_strides, kWarpgroupRows, p.out_stride == 1},
          Rows{"next", p.following, p.next_channels, p.following_stride, kWarpgroupRows}};
}

// The map of images [first, first + images); nothing where pixels do not lie one behind the other.
std::optional<TensorMapRequest> request_of(const RfConvChain& problem, const Rows& rows,
                                           int64_t first, int64_t images) {
  const int64_t size[4] = {problem.x_size[0], rows.channels, problem.x_size[2], problem.x_size[3]};
  const auto step = pixel_step(size, rows.stride, chain_bytes(problem));
  if (!step || (rows.channels > 1 && rows.stride[1] != 1)) return std::nullopt;
  const int64_t of_image = size[2] * size[3];
  const void* at = moved(rows.data, first * of_image * *step * chain_bytes(problem));
  return rows_request(element_of(problem.dtype), at, rows.channels, images * of_image, *step,
                      rows.box, kStepElements);
}

// The projection's pixels of a warpgroup, which the op's stride keeps apart.
TensorMapRequest strided_request(const RfConvChain& p, int64_t first, int64_t images) {
  const int64_t by = p.projection_stride;
  const int64_t size[4] = {images, p.projected_channels, (p.x_size[2] - 1) * by + 1,
                           (p.x_size[3] - 1) * by + 1};
  const TensorElement element = element_of(p.dtype);
  const void* from = image_at(element, p.projected, p.x_size[0], p.projected_stride[0], first);
  TensorMapRequest request = images_request(element, from, size, p.projected_stride);
  request.pixels = kWarpgroupRows;
  request.steps = {1, narrowed(by), narrowed(by), 1, 1};
  return request;
}

// Filters over `channels`, `stride` apart; boxes of 64 channels of those of a step, `box` of them,
// that one of `sharing` blocks asks for. Of e4m3 a box is every second pair of all, as
// quantised_chain.h says: {channels, 2, 2, filters / 4}.
TensorMapRequest filters_request(const RfConvChain& problem, const void* weight, int64_t channels,
                                 int64_t filters, int64_t stride, int32_t box, int32_t sharing) {
  const TensorElement element = element_of(problem.dtype);
  TensorMapRequest request =
      rows_request(element, weight, channels, filters, stride, box / sharing, kStepElements);
  if (problem.dtype == kFloat8E4M3) {
    const int64_t row = request.strides[0];
    request.rank = 4;
    request.sizes = {channels, 2, 2, divide_up(filters, 4)};
    request.strides = {row, 2 * row, 4 * row};
    request.box = {request.box[0], 2, 1, box / 4};
  }
  return request;
}

TensorMapRequest weight_request(const RfConvChain& problem, const ChainTmaFacts& tile) {
  return filters_request(problem, problem.weight, problem.x_size[1], problem.channels,
                         problem.weight_stride[0], kStepElements, tile.sharing);
}

TensorMapRequest next_weight_request(const RfConvChain& problem, const ChainTmaFacts& tile) {
  return filters_request(problem, problem.next_weight, problem.channels, problem.next_channels,
                         problem.next_weight_stride[0], tile.next, tile.sharing);
}

// What a tile can't do; the kernel for sm_80 serves it.
std::string shape_fault(const RfConvChain& problem, const ChainTmaFacts& tile) {
  if (problem.front_channels > 0) return "it takes no 3x3 convolution in front";
  std::string found = projection_fault(problem, tile.projected, tile.own_rows);
  if (!found.empty()) return found;
  if (problem.next_channels < 1) return "no next convolution; it takes chains of two";
  if (problem.x_size[1] > tile.inner) return too_many("x", problem.x_size[1], tile.inner);
  if (problem.next_channels > tile.next) return too_many("next", problem.next_channels, tile.next);
  if (problem.channels > kChainTmaMostChannels) {
    return too_many("out", problem.channels, kChainTmaMostChannels);
  }
  return "";
}

}  // namespace

TensorMapRequest projection_request(const RfConvChain& problem, int32_t sharing) {
  return filters_request(problem, problem.projection_weight, problem.projected_channels,
                         problem.channels, problem.projection_weight_stride[0], kStepElements,
                         sharing);
}

std::string projection_fault(const RfConvChain& problem, int32_t room, bool strided) {
  if ((problem.projects != 0) != (room > 0)) {
    return room > 0 ? "it is made for a projection" : "it takes no projection";
  }
  if (room == 0) return "";
  if (problem.projected_channels > room) {
    return too_many("the projection", problem.projected_channels, room);
  }
  if (!strided && problem.projection_stride != 1) {
    return "a projection of stride " + std::to_string(problem.projection_stride) +
           "; it reads every pixel";
  }
  return "";
}

ChainResult chain_out(const RfConvChain& p, int64_t first) {
  const int64_t size[4] = {p.x_size[0], p.channels, divide_up(p.x_size[2], p.out_stride),
                           divide_up(p.x_size[3], p.out_stride)};
  return chain_result(p.out, size, p.out_strides, first, chain_bytes(p));
}

ChainResult chain_result(void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
                         int64_t first, int64_t element) {
  const int64_t unit = kChunkBytes / element;
  const Strides strides = used(size, stride);
  return {moved(data, first * strides.n * element),
          {narrowed(strides.n / unit), narrowed(strides.h / unit), narrowed(strides.w / unit)},
          narrowed(size[1] / unit)};
}

std::string too_many(const char* what, int64_t given, int64_t most) {
  return std::to_string(given) + " channels of " + what + ", at most " + std::to_string(most) +
         " fit";
}

ChainTmaFacts chain_tma_tile(int index) {
  return ConvChainTmaTiles::with(index, []<class Shape>() { return chain_tma_facts<Shape>(); });
}

std::string chain_tma_name(const ChainTmaFacts& tile) {
  return "tma_" + std::to_string(kChainTmaPixels) + "x" + std::to_string(tile.next) + "_" +
         std::to_string(tile.stages) + "s_k" + std::to_string(tile.inner) +
         (tile.projected > 0 ? "_d" + std::to_string(tile.projected) : "") +
         (tile.sharing > 1 ? std::string("_") + std::to_string(tile.sharing) + "c" : "");
}

RfConvConfiguration chain_tma_configuration(int32_t next, int32_t stages, int32_t shared_bytes,
                                            int32_t row_bytes) {
  RfConvConfiguration made{};
  made.wide = 1;
  made.m = kChainTmaPixels;
  made.n = next;
  made.warps_m = kConsumers * kWarpgroupWarps;
  made.warps_n = 1;
  made.stages = stages;
  made.blocks = 1;
  made.step_bytes = row_bytes;
  made.shared_bytes = shared_bytes;
  made.tma = 1;
  return made;
}

std::string chain_tma_fault(const RfConvChain& problem, const ChainTmaFacts& tile, int64_t images,
                            const RfGpu& gpu) {
  if (gpu.capability != 90) return "TMA and wgmma are for GPUs of capability 9.0";
  if (!kBuiltForSm90a) return "this build holds no machine code for sm_90a";
  std::string found = shape_fault(problem, tile);
  if (!found.empty()) return found;
  for (const Rows& rows : rows_of(problem, tile)) {
    if (!rows.mapped) continue;
    const auto request = request_of(problem, rows, 0, images);
    if (!request) return named(rows.name, "its pixels do not lie one behind the other");
    if (found = tensor_map_fault(*request); !found.empty()) return named(rows.name, found);
  }
  if (found = tensor_map_fault(weight_request(problem, tile)); !found.empty()) {
    return named("weight", found);
  }
  if (tile.own_rows) {
    if (problem.projected_channels > 1 && problem.projected_stride[1] != 1) {
      return named("projected", "its channels are not adjacent");
    }
    found = tensor_map_fault(strided_request(problem, 0, images));
    if (!found.empty()) return named("projected", found);
  }
  if (problem.projects != 0) {
    found = tensor_map_fault(projection_request(problem, tile.sharing));
    if (!found.empty()) return named("projection_weight", found);
  }
  return named("next_weight", tensor_map_fault(next_weight_request(problem, tile)));
}

int64_t chain_tma_tiles(const ChainTmaFacts& tile, int64_t pixels) {
  return divide_up(pixels, tile.sharing * kChainTmaPixels) * tile.sharing;
}

int64_t chain_tma_blocks(const ChainTmaFacts& tile, int64_t pixels, const RfGpu& gpu) {
  const int64_t clusters = std::max(1, gpu.multiprocessors / tile.sharing);
  return std::min(chain_tma_tiles(tile, pixels), clusters * tile.sharing);
}

// The busiest block's tiles. A tile takes as long as its products, what passes through shared
// memory, through L2 or to and from memory, or as one of its warpgroups by itself, whichever is
// longest.
double chain_tma_cost(const RfConvChain& problem, const ChainTmaFacts& tile, int64_t pixels,
                      const RfGpu& gpu) {
  constexpr double m = kChainTmaPixels;
  const auto bytes = static_cast<double>(chain_bytes(problem));
  const double row = kStepElements * bytes;
  const int64_t tiles = chain_tma_tiles(tile, pixels);
  const auto each = static_cast<double>(divide_up(tiles, chain_tma_blocks(tile, pixels, gpu)));
  const auto steps = static_cast<double>(divide_up(problem.channels, kStepElements));
  const double inner = (tile.inner + tile.projected) / kStepElements;
  const double next = tile.next / kStepElements;
  const double area = m * kStepElements;
  // The same bytes take the same time in every type.
  const double matrix =
      steps * area * (tile.inner + tile.projected + tile.next) * bytes / 2 / kChainUnit;
  // Of a step: filters; what both warpgroups' products read, TMA writes and reads, and epilogues
  // exchange for what they make.
  const double filters = row * (inner * kStepElements + tile.next);
  const double read = inner * row * (m + kConsumers * kStepElements) + kConsumers * row * tile.next;
  const double passed = read + filters + 4 * m * row;
  const double ends = m * row * (inner + next);
  const double shared = (steps * passed + ends + 2 * next * m * row) / kSharedBytes;
  const double stored = 1.0 / static_cast<double>(problem.out_stride * problem.out_stride);
  const double moved = steps * (stored + (tile.projected > 0 ? 0 : 1)) * m * row + ends;
  const double cache = steps * filters / tile.sharing / kSameLines + moved / kCacheBytes;
  const double results = (steps + next) * area / kResults;
  // Of e4m3 threads add up sums in parts.
  const double adds = problem.dtype == kFloat8E4M3 ? steps / 2 * m * tile.next / kInstructions : 0;
  const double waits = steps + tile.rounds - 1;
  // Its rows come behind its own last products.
  const double rows = inner * m * row / kConsumers;
  const double behind = tile.own_rows ? kLatency + rows / kMemoryBytes : 0;
  const double alone = matrix / kConsumers + results + adds + waits * kStepWaits + behind;
  const double longest = std::max({matrix, shared, cache, alone, moved / kMemoryBytes});
  const double meetings = tile.sharing > 1 ? 2 * kClusterMeeting : 0;
  return each * longest + meetings + 2 * kLatency;
}

int chain_tma_arguments(const RfConvChain& problem, const ChainTmaFacts& tile, int64_t first,
                        int64_t images, ChainTmaArguments* to) {
  const int64_t pixels = images * problem.x_size[2] * problem.x_size[3];
  ChainTmaArguments& made = *to;
  made = {};
  const std::array<Rows, 4> rows = rows_of(problem, tile);
  ptx::TensorMap* const maps[] = {&made.x, &made.shortcut, &made.out, &made.following};
  int error = encode_tensor_map(weight_request(problem, tile), &made.weight);
  if (error == 0) error = encode_tensor_map(next_weight_request(problem, tile), &made.next);
  if (error == 0 && problem.projects != 0) {
    error = encode_tensor_map(projection_request(problem, tile.sharing), &made.projection);
  }
  for (size_t i = 0; i < rows.size() && error == 0; ++i) {
    if (!rows[i].mapped) continue;
    error = encode_tensor_map(*request_of(problem, rows[i], first, images), maps[i]);
  }
  if (error == 0 && tile.own_rows) {
    error = encode_tensor_map(strided_request(problem, first, images), &made.shortcut);
  }
  if (error != 0) return error;
  made.scale = static_cast<const float*>(problem.scale);
  made.shift = static_cast<const float*>(problem.shift);
  made.projection_scale = static_cast<const float*>(problem.projection_scale);
  made.projection_shift = static_cast<const float*>(problem.projection_shift);
  made.next_scale = static_cast<const float*>(problem.next_scale);
  made.next_shift = static_cast<const float*>(problem.next_shift);
  made.even = chain_out(problem, first);
  made.grid = {narrowed(pixels), make_divisor(narrowed(problem.x_size[3])),
               make_divisor(narrowed(problem.x_size[2]))};
  made.thinned = problem.out_stride != 1;
  made.channels = narrowed(problem.channels);
  made.next_channels = narrowed(problem.next_channels);
  made.stride = narrowed(problem.projection_stride);
  made.steps = narrowed(divide_up(problem.channels, kStepElements));
  made.tiles = narrowed(chain_tma_tiles(tile, pixels));
  made.reverse = problem.reverse != 0;
  made.dependent = problem.flow.dependent != 0;
  made.follows = problem.flow.follows != 0;
  return 0;
}

int run_conv_chain_tma(const RfConvChain& problem, const RfConvPlan& plan, int64_t first,
                       int64_t images, void* stream) {
  const int index = plan.configuration - kFirstChainTma;
  ChainTmaArguments made;
  const int error = chain_tma_arguments(problem, chain_tma_tile(index), first, images, &made);
  if (error != 0) return error;
  const auto blocks = static_cast<int32_t>(std::min<int64_t>(made.tiles, plan.blocks));
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  const bool half = static_cast<DataType>(problem.dtype) == DataType::kFloat16;
  const auto launch = half ? launch_conv_chain_tma_float16 : launch_conv_chain_tma_bfloat16;
  return launch(made, index, blocks, stream);
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(blocks), static_cast<void>(stream), kNoKernelImage;
#endif
}

}  // namespace resnet_fused
