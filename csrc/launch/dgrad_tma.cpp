// What keeps a gradient of an input from TMA, how long it is predicted to take there, and its way
// from a problem to tensor maps and arguments. None of the rates has been measured by this project
// on a GPU; only their proportions matter.
#include "dgrad_tma.h"

#include <algorithm>

#include "conv_gradient_arguments.h"
#include "conv_plan.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

int64_t tiles_of_phase(const RfConvGradient& problem, const TmaTileFacts& tile, int64_t images) {
  const PhaseSize size = phase_size(problem);
  return tma_tiles(convolution_of(problem), tile, images * size.rows * size.columns);
}

// Of so many clusters, in tiles as wide as theirs.
PhasedTiles phased_tiles(int64_t each, int64_t phases, int64_t of_pixels, int64_t clusters) {
  const int64_t run = std::min(each, divide_up(clusters, of_pixels) * of_pixels);
  const int64_t last = each % run;
  return {narrowed(each * phases), narrowed(each / run), make_divisor(narrowed(run * phases)),
          make_divisor(narrowed(run)), make_divisor(narrowed(last > 0 ? last : run))};
}

// Where a tensor's image `first` lies.
Placed from_image(const RfConvGradient& problem, const Placed& tensor, int64_t first) {
  return {
      image_at(element_of(problem.dtype), tensor.at, problem.x_size[0], tensor.stride[0], first),
      tensor.stride};
}

}  // namespace

RfConvBnAct convolution_of(const RfConvGradient& problem) {
  const OutputSize size = output_size(problem);
  const int64_t (&filters)[4] = problem.weight_size;
  const int64_t sizes[2][4] = {
      {problem.x_size[0], filters[0], size.p, size.q},
      {problem.x_size[1], filters[0] / problem.groups, filters[2], filters[3]}};
  const int64_t strides[4] = {problem.weight_stride[1], problem.weight_stride[0],
                              problem.weight_stride[2], problem.weight_stride[3]};
  RfConvBnAct made{};
  made.x = problem.dy;
  made.weight = problem.weight;
  made.out = problem.x;
  made.scale = problem.scale;
  made.dtype = problem.dtype;
  made.groups = problem.groups;
  std::copy_n(sizes[0], 4, made.x_size);
  std::copy_n(sizes[1], 4, made.weight_size);
  std::copy_n(problem.dy_stride, 4, made.x_stride);
  std::copy_n(strides, 4, made.weight_stride);
  std::copy_n(problem.x_stride, 4, made.out_stride);
  for (int d = 0; d < 2; ++d) {
    made.stride[d] = 1;
    made.dilation[d] = problem.dilation[d];
    made.padding[d] = (filters[2 + d] - 1) * problem.dilation[d] - problem.padding[d];
  }
  return made;
}

std::string dgrad_tma_output_fault(const char* name, const RfConvGradient& problem,
                                   const TmaTileFacts& tile, const Placed& tensor, int64_t images,
                                   int64_t step) {
  const TensorElement element = element_of(problem.dtype);
  if (!lies_apart(problem)) {
    return tma_output_fault(name, convolution_of(problem), element, tile, tensor.at, tensor.stride,
                            images);
  }
  if (problem.x_size[1] > 1 && tensor.stride[1] != 1) {
    return named(name, "its channels are not adjacent");
  }
  std::string found;
  for (const DgradPhaseFacts& phase : phases_of(problem)) {
    if (phase.h.index % step != 0 || phase.w.index % step != 0) continue;
    found = tensor_map_fault(phase_pixels_request(problem, phase, tile, tensor, images, step));
    if (!found.empty()) break;
  }
  return named(name, found);
}

int encode_dgrad_output(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                        const TmaTileFacts& tile, const Placed& tensor, int64_t first,
                        int64_t images, ptx::TensorMap* map, int64_t step) {
  if (!lies_apart(problem)) {
    return encode_tma_output(convolution_of(problem), element_of(problem.dtype), tile, tensor.at,
                             tensor.stride, first, images, map);
  }
  return encode_tensor_map(
      phase_pixels_request(problem, phase, tile, from_image(problem, tensor, first), images, step),
      map);
}

std::string dgrad_tma_fault(const RfConvGradient& problem, const TmaTileFacts& tile,
                            const DgradNames& names, bool reads_y, int64_t images) {
  if (problem.stride[0] > 2 || problem.stride[1] > 2) {
    return "stride: " + std::to_string(problem.stride[0]) + " x " +
           std::to_string(problem.stride[1]) + "; up to 2 x 2 is accepted";
  }
  const RfConvBnAct made = convolution_of(problem);
  std::string found = tma_shape_fault(made, tma_types(made));
  if (!found.empty()) return found;
  // A box of an im2col map does not end where its group does.
  const int64_t channels = problem.weight_size[1];
  if (lies_apart(problem) && problem.groups > 1 && channels % kStepElements != 0) {
    return "groups: " + std::to_string(channels) +
           " input channels of each; by a stride a multiple of " + std::to_string(kStepElements) +
           " is accepted";
  }
  const std::vector<DgradPhaseFacts> phases = phases_of(problem);
  const auto walk_fault = [&](const char* name, const Placed& tensor) -> std::string {
    if (problem.weight_size[0] > 1 && tensor.stride[1] != 1) {
      return named(name, "its channels are not adjacent");
    }
    for (const DgradPhaseFacts& phase : phases) {
      if (phase.taps() == 0) continue;
      const std::string fault =
          tensor_map_fault(phase_walk_request(problem, phase, tile, tensor, images));
      if (!fault.empty()) return named(name, fault);
    }
    return "";
  };
  const Placed dy{problem.dy, problem.dy_stride}, y{problem.y, problem.y_stride};
  found = walk_fault(names.dy, dy);
  if (found.empty()) found = tma_weight_fault(made, element_of(problem.dtype), tile);
  if (found.empty()) {
    found =
        dgrad_tma_output_fault(names.result, problem, tile, {problem.x, problem.x_stride}, images);
  }
  if (!found.empty()) return found;
  // Per-channel values come two at a time.
  if (made.weight_size[1] % 2 != 0) return "weight: an odd number of filters";
  if (reinterpret_cast<uintptr_t>(problem.scale) % (2 * sizeof(float)) != 0) {
    return named(names.vectors, "its address is no multiple of 8");
  }
  if (!reads_y) return "";
  found = walk_fault("y", y);
  if (!found.empty()) return found;
  for (const DgradPhaseFacts& phase : phases) {
    if (phase_is_dense(problem, phase, dy) != phase_is_dense(problem, phase, y)) {
      return "y: its pixels do not lie as " + std::string(names.dy) + "'s do";
    }
  }
  return "";
}

// Tiles of the phases ahead have most taps, so that the first block has most tiles of each number
// of taps, and is the last one to end. L2 is asked once for what blocks of a cluster share.
double dgrad_tma_cost(const RfConvGradient& problem, const TmaTileFacts& tile,
                      const DgradWork& work, int64_t images, const RfGpu& gpu) {
  const int64_t each = tiles_of_phase(problem, tile, images);
  const int64_t clusters = dgrad_tma_blocks(problem, tile, images, gpu) / tile.sharing;
  const double area = static_cast<double>(tile.pixels) * tile.channels;
  const double left = (work.reads_y ? 2.0 : 1.0) * tile.pixels * kStepRowBytes;
  const double right = static_cast<double>(tile.channels) * kStepRowBytes;
  const double asked = left / tile.pixel_sharing + right / tile.filter_sharing();
  const double matrix = area * kStepElements / kWarpgroupUnit;
  // What has come is read once, but filters by each of the warpgroups. A load of channels' values
  // takes a line of the first-level cache, whose way is shared memory's.
  const double shared = (2 * left + (1 + kConsumers) * right) / kSharedBytes +
                        kConsumers * kWarpgroupWarps * work.loads;
  const double turning = tile.pixels * kStepElements / 2 * work.turning / kInstructions;
  const double results = area / kResults + area * work.finishing / kInstructions;
  const double ends = area * work.ends * kTmaElementBytes / kMemoryBytes;
  const int64_t of_tap = divide_up(problem.weight_size[0] / problem.groups, kStepElements);
  double cycles = 0;
  int64_t ahead = 0;
  for (const DgradPhaseFacts& phase : phases_of(problem)) {
    const auto steps = static_cast<double>(of_tap * phase.taps());
    const double multiply = std::max(steps * std::max({matrix, shared, turning}), work.waits);
    const double load = (steps * asked + area * work.asked * kTmaElementBytes) / kCacheBytes;
    const int64_t tiles = divide_up(ahead + each, clusters) - divide_up(ahead, clusters);
    cycles += static_cast<double>(tiles) * std::max({multiply + results, load, ends});
    ahead += each;
  }
  const double meetings = tile.sharing > 1 ? 2 * kClusterMeeting : 0;
  return cycles + results + meetings + 2 * kLatency;
}

int64_t dgrad_tma_blocks(const RfConvGradient& problem, const TmaTileFacts& tile, int64_t images,
                         const RfGpu& gpu) {
  const auto phases = static_cast<int64_t>(phases_of(problem).size());
  const int64_t clusters =
      std::max<int64_t>(1, cluster_multiprocessors(tile.sharing, gpu) / tile.sharing);
  return tile.sharing * std::min(tiles_of_phase(problem, tile, images) * phases, clusters);
}

int dgrad_tma_arguments(const RfConvGradient& problem, const TmaTileFacts& tile, bool reads_y,
                        int64_t first, int64_t images, int64_t blocks,
                        ConvDgradTmaArguments* made) {
  const RfConvBnAct conv = convolution_of(problem);
  const std::vector<DgradPhaseFacts> phases = phases_of(problem);
  ConvTmaArguments common;
  int error = tma_common_arguments(conv, tma_types(conv), tile, &common);
  const Placed dy{problem.dy, problem.dy_stride}, y{problem.y, problem.y_stride};
  const auto encode_walk = [&](const DgradPhaseFacts& phase, const Placed& tensor,
                               ptx::TensorMap* map) {
    if (error != 0) return;
    const Placed from = from_image(problem, tensor, first);
    error = encode_tensor_map(phase_walk_request(problem, phase, tile, from, images), map);
  };
  made->count = narrowed(static_cast<int64_t>(phases.size()));
  made->masked = reads_y;
  made->apart = lies_apart(problem);
  for (int i = 0; i < made->count && error == 0; ++i) {
    const DgradPhaseFacts& facts = phases[i];
    DgradPhase& phase = made->phases[i];
    phase.conv = common;
    tma_set_pixels(conv, tile, images, facts.size(), &phase.conv);
    phase.conv.reduction.taps_s = facts.w.taps;
    phase.conv.reduction.taps_r = facts.h.taps;
    phase.conv.steps = narrowed(divide_up(conv.weight_size[1], kStepElements) * facts.taps());
    phase.conv.origin_h = facts.h.origin;
    phase.conv.origin_w = facts.w.origin;
    phase.conv.step_h = facts.h.step;
    phase.conv.step_w = facts.w.step;
    phase.conv.dense = phase_is_dense(problem, facts, dy);
    phase.taps_h = facts.h.filter;
    phase.taps_w = facts.w.filter;
    if (facts.taps() > 0) encode_walk(facts, dy, &phase.conv.x);
    if (facts.taps() > 0 && reads_y) encode_walk(facts, y, &phase.y);
    if (error == 0) {
      error = encode_dgrad_output(problem, facts, tile, {problem.x, problem.x_stride}, first,
                                  images, &phase.conv.out);
    }
  }
  made->tiles =
      phased_tiles(tiles_of_phase(problem, tile, images), made->count,
                   int64_t{made->phases[0].conv.tiles.of_pixels.value}, blocks / tile.sharing);
  return error;
}

}  // namespace resnet_fused
