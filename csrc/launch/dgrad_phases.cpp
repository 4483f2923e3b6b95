#include "dgrad_phases.h"

#include <algorithm>

#include "conv_gradient_arguments.h"
#include "conv_strides.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

PhaseSide side_of(const RfConvGradient& problem, int dimension, int32_t index) {
  const PhasedAxis axis = phased_axis(problem, dimension);
  const Phase phase = phase_of(index, axis);
  const int32_t behind = phase.taps - 1;  // the first one
  PhaseSide side{divide_up(axis.size - index, axis.stride), index, phase.taps, {}, 0, 0};
  if (phase.taps == 0) return side;
  side.filter = {phase.first_tap + behind * axis.tap_step, axis.tap_step};
  side.origin = phase.origin - behind * axis.out_step;
  side.step = axis.out_step;
  return side;
}

}  // namespace

std::vector<DgradPhaseFacts> phases_of(const RfConvGradient& problem) {
  std::vector<DgradPhaseFacts> phases;
  for (int32_t i = 0; i < problem.stride[0]; ++i) {
    for (int32_t j = 0; j < problem.stride[1]; ++j) {
      const DgradPhaseFacts phase{side_of(problem, 0, i), side_of(problem, 1, j)};
      if (phase.h.size > 0 && phase.w.size > 0) phases.push_back(phase);
    }
  }
  std::stable_sort(phases.begin(), phases.end(),
                   [](const auto& a, const auto& b) { return a.taps() > b.taps(); });
  return phases;
}

bool phase_is_dense(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                    const Placed& tensor) {
  const OutputSize size = output_size(problem);
  const int64_t all[4] = {problem.x_size[0], problem.weight_size[0], size.p, size.q};
  return phase.taps() == 1 && phase.h.origin == 0 && phase.w.origin == 0 &&
         phase.h.size == size.p && phase.w.size == size.q &&
         pixel_step(all, tensor.stride).has_value();
}

TensorMapRequest phase_walk_request(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                                    const TmaTileFacts& tile, const Placed& tensor,
                                    int64_t images) {
  const TensorElement element = element_of(problem.dtype);
  const OutputSize size = output_size(problem);
  const int64_t all[4] = {images, problem.weight_size[0], size.p, size.q};
  if (phase_is_dense(problem, phase, tensor)) {
    const int64_t whole[4] = {problem.x_size[0], all[1], all[2], all[3]};
    const int64_t pixel = *pixel_step(whole, tensor.stride, element_bytes(element));
    return rows_request(element, tensor.at, all[1], images * size.p * size.q, pixel,
                        tile.pixels_asked());
  }
  TensorMapRequest request = images_request(element, tensor.at, all, tensor.stride);
  request.pixels = tile.pixels_asked();
  request.lower = {phase.w.origin, phase.h.origin};
  request.upper = {narrowed(phase.w.size - size.q + phase.w.origin),
                   narrowed(phase.h.size - size.p + phase.h.origin)};
  return request;
}

TensorMapRequest phase_pixels_request(const RfConvGradient& problem, const DgradPhaseFacts& phase,
                                      const TmaTileFacts& tile, const Placed& tensor,
                                      int64_t images, int64_t step) {
  const TensorElement element = element_of(problem.dtype);
  const int64_t apart[2] = {problem.stride[0] / step, problem.stride[1] / step};
  const int64_t first =
      phase.h.index / step * tensor.stride[2] + phase.w.index / step * tensor.stride[3];
  const void* at = tensor.at;
  if (at != nullptr) at = moved(at, first * element_bytes(element));
  const int64_t size[4] = {images, problem.x_size[1], phase.h.size, phase.w.size};
  const int64_t stride[4] = {tensor.stride[0], tensor.stride[1], tensor.stride[2] * apart[0],
                             tensor.stride[3] * apart[1]};
  TensorMapRequest request = images_request(element, at, size, stride, tile.stored_channels);
  request.pixels = tile.stored_pixels;
  return request;
}

}  // namespace resnet_fused
