// Strides, memory and divisors of a chain's launch, and the launch of each part of the batch.
#include "conv_chain_arguments.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "conv_chain_tma.h"
#include "conv_chain_window.h"

namespace resnet_fused {

// tools/_cuda_early.py knows the pointers of a kernel's parameters by these places.
static_assert(offsetof(ConvChainArguments, x.data) == 0);
static_assert(offsetof(ConvChainArguments, residual.data) == 24);
static_assert(offsetof(ConvChainArguments, projected.data) == 48);
static_assert(offsetof(ConvChainArguments, weight.data) == 72);
static_assert(offsetof(ConvChainArguments, weight.scale) == 80);
static_assert(offsetof(ConvChainArguments, weight.shift) == 88);
static_assert(offsetof(ConvChainArguments, projection.data) == 128);
static_assert(offsetof(ConvChainArguments, projection.scale) == 136);
static_assert(offsetof(ConvChainArguments, projection.shift) == 144);
static_assert(offsetof(ConvChainArguments, next.data) == 184);
static_assert(offsetof(ConvChainArguments, next.scale) == 192);
static_assert(offsetof(ConvChainArguments, next.shift) == 200);
static_assert(offsetof(ConvChainArguments, front.data) == 240);
static_assert(offsetof(ConvChainArguments, front.scale) == 248);
static_assert(offsetof(ConvChainArguments, front.shift) == 256);
static_assert(offsetof(ConvChainArguments, out.data) == 296);
static_assert(offsetof(ConvChainArguments, following.data) == 320);

namespace {

constexpr int64_t kReach = (int64_t{1} << 31) - 1;

int64_t unit_of(const RfConvChain& problem) { return kChunkBytes / chain_bytes(problem); }

// A tensor of activations as it lies in memory. step: from one pixel of `out` to the next one.
struct Activation {
  const char* name;
  const void* data;
  bool there;
  int64_t size[4];
  Strides strides;
  int64_t step;
};

struct Activations {
  Activation x;
  Activation residual;
  Activation projected;
  Activation out;
  Activation following;

  std::array<const Activation*, 5> all() const {
    return {&x, &residual, &projected, &out, &following};
  }
};

Activation activation(const char* name, const void* data, bool there, const RfConvChain& problem,
                      int64_t channels, int64_t step, bool thinned, const int64_t (&stride)[4]) {
  const int64_t h = problem.x_size[2];
  const int64_t w = problem.x_size[3];
  Activation made{name, data, there, {problem.x_size[0], channels, 0, 0}, {}, step};
  made.size[2] = thinned ? divide_up(h, problem.out_stride) : (h - 1) * step + 1;
  made.size[3] = thinned ? divide_up(w, problem.out_stride) : (w - 1) * step + 1;
  made.strides = used(made.size, stride);
  return made;
}

Activations activations(const RfConvChain& p) {
  const bool projects = p.projects != 0;
  return {activation("x", p.x, true, p, p.x_size[1], 1, false, p.x_stride),
          activation("residual", p.residual, !projects, p, p.channels, 1, false, p.residual_stride),
          activation("projected", p.projected, projects, p, p.projected_channels,
                     p.projection_stride, false, p.projected_stride),
          activation("out", p.out, true, p, p.channels, 1, true, p.out_strides),
          activation("next", p.following, p.next_channels > 0, p, p.next_channels, 1, false,
                     p.following_stride)};
}

struct Filters {
  const char* name;
  const void* data;
  bool there;
  int64_t filters;
  int64_t channels;
  int64_t taps;  // along each side
  const int64_t (&stride)[4];

  Strides strides() const {
    const int64_t size[4] = {filters, channels, taps, taps};
    return used(size, stride);
  }
  int64_t dense(int64_t bytes) const {
    const int64_t size[4] = {filters, channels, taps, taps};
    return there ? dense_bytes(size, stride, bytes) : 0;
  }
};

// What the first 1x1 convolution reads.
int64_t inner_channels(const RfConvChain& p) {
  return p.front_channels > 0 ? p.front_channels : p.x_size[1];
}

std::array<Filters, 4> filters_of(const RfConvChain& p) {
  const bool projects = p.projects != 0;
  return {Filters{"weight", p.weight, true, p.channels, inner_channels(p), 1, p.weight_stride},
          Filters{"projection_weight", p.projection_weight, projects, p.channels,
                  p.projected_channels, 1, p.projection_weight_stride},
          Filters{"next_weight", p.next_weight, p.next_channels > 0, p.next_channels, p.channels, 1,
                  p.next_weight_stride},
          Filters{"front_weight", p.front_weight, p.front_channels > 0, p.front_channels,
                  p.x_size[1], kFrontTaps, p.front_weight_stride}};
}

WideStrides wide_strides(const Activation& t, int64_t unit) {
  return {narrowed(t.strides.n / unit), narrowed(t.strides.h / unit * t.step),
          narrowed(t.strides.w / unit * t.step)};
}

ChainImage image_of(const Activation& t, int64_t unit, int64_t offset_bytes) {
  if (!t.there) return {};
  return {moved(t.data, offset_bytes), wide_strides(t, unit), narrowed(t.size[1] / unit)};
}

ChainResult result_of(void* data, const Activation& t, int64_t unit, int64_t offset_bytes) {
  if (!t.there) return {};
  return {moved(data, offset_bytes), wide_strides(t, unit), narrowed(t.size[1] / unit)};
}

ChainFilters chain_filters(const Filters& from, const void* scale, const void* shift,
                           int64_t unit) {
  if (!from.there) return {};
  const Strides strides = from.strides();
  return {from.data,
          static_cast<const float*>(scale),
          static_cast<const float*>(shift),
          narrowed(strides.n / unit),
          narrowed(from.filters),
          narrowed(from.channels / unit),
          narrowed(strides.h / unit),
          narrowed(strides.w / unit),
          0};
}

int64_t slabs_of(const RfConvChain& problem, int64_t channels) {
  return divide_up(channels * chain_bytes(problem), kChainStepBytes);
}

}  // namespace

const char* not_wide(const RfConvChain& problem) {
  const int64_t bytes = chain_bytes(problem);
  const Activations tensors = activations(problem);
  for (const Activation* t : tensors.all()) {
    if (t->there && !is_wide(t->data, t->strides, t->size[1], bytes)) return t->name;
  }
  for (const Filters& one : filters_of(problem)) {
    if (one.there && !is_wide(one.data, one.strides(), one.channels, bytes)) {
      return one.name;
    }
  }
  return nullptr;
}

int64_t images_in_reach(const RfConvChain& problem) {
  const int64_t unit = unit_of(problem);
  const int64_t images = problem.x_size[0];
  for (const Filters& one : filters_of(problem)) {
    if (!one.there) continue;
    // A step of rows beyond the last filter, and of channels beyond its end, is worked out too.
    const Strides strides = one.strides();
    const int64_t taps = (one.taps - 1) * (strides.h + strides.w);
    if ((one.filters + 256) * (strides.n / unit) + (one.channels + taps) / unit + 256 > kReach) {
      return 0;
    }
  }
  int64_t reached = std::max<int64_t>(images, 1);
  const Activations tensors = activations(problem);
  for (const Activation* t : tensors.all()) {
    if (!t->there) continue;
    const int64_t beyond =
        (t->size[2] * t->strides.h + t->size[3] * t->strides.w + t->size[1]) / unit + 256;
    if (beyond > kReach) return 0;
    const int64_t step = t->strides.n / unit;
    if (step > 0) reached = std::min(reached, 1 + (kReach - beyond) / step);
  }
  return reached;
}

int64_t chain_images(const RfConvChain& problem) {
  const int64_t pixels = std::max<int64_t>(problem.x_size[2] * problem.x_size[3], 1);
  return std::min({problem.x_size[0], kMost / pixels, images_in_reach(problem)});
}

ChainSizes chain_sizes(const RfConvChain& problem) {
  const bool projects = problem.projects != 0;
  const bool front = problem.front_channels > 0;
  return {narrowed(slabs_of(problem, inner_channels(problem))),
          narrowed(projects ? slabs_of(problem, problem.projected_channels) : 0),
          narrowed(front ? slabs_of(problem, problem.x_size[1]) : 0), narrowed(problem.x_size[3]),
          !projects};
}

ChainMemory chain_memory(const RfConvChain& problem, int32_t configuration) {
  const RfConvConfiguration& tile = *rf_conv_chain_configuration(configuration);
  return ChainMemory::of(tile.m, tile.n, tile.stages, chain_front(configuration),
                         chain_sizes(problem));
}

ConvChainArguments conv_chain_arguments(const RfConvChain& problem, const RfConvPlan& plan,
                                        int64_t first, int64_t images) {
  const int64_t bytes = chain_bytes(problem);
  const int64_t unit = unit_of(problem);
  const Activations t = activations(problem);
  const auto skipped = [&](const Activation& one) { return first * one.strides.n * bytes; };
  const auto [weight, projection, next, front] = filters_of(problem);

  ConvChainArguments arguments{};
  arguments.x = image_of(t.x, unit, skipped(t.x));
  arguments.residual = image_of(t.residual, unit, skipped(t.residual));
  arguments.projected = image_of(t.projected, unit, skipped(t.projected));
  arguments.weight = chain_filters(weight, problem.scale, problem.shift, unit);
  arguments.projection =
      chain_filters(projection, problem.projection_scale, problem.projection_shift, unit);
  arguments.next = chain_filters(next, problem.next_scale, problem.next_shift, unit);
  arguments.front = chain_filters(front, problem.front_scale, problem.front_shift, unit);
  arguments.out = result_of(problem.out, t.out, unit, skipped(t.out));
  arguments.following = result_of(problem.following, t.following, unit, skipped(t.following));
  const int64_t pixels = images * problem.x_size[2] * problem.x_size[3];
  arguments.grid = {narrowed(pixels), make_divisor(narrowed(problem.x_size[3])),
                    make_divisor(narrowed(problem.x_size[2]))};
  arguments.memory = chain_memory(problem, plan.configuration);
  const ChainSizes sizes = chain_sizes(problem);
  arguments.x_slabs = sizes.x_slabs;
  arguments.projected_slabs = sizes.projected_slabs;
  arguments.front_slabs = sizes.front_slabs;
  arguments.steps = narrowed(slabs_of(problem, problem.channels));
  arguments.out_shift = problem.out_stride == 2 ? 1 : 0;
  arguments.reverse = problem.reverse != 0;
  arguments.dependent = problem.flow.dependent != 0;
  arguments.follows = problem.flow.follows != 0;
  if (arguments.follows && plan.at_once != 0) {
    arguments.weight.prefetch_bytes = weight.dense(bytes);
    arguments.projection.prefetch_bytes = projection.dense(bytes);
    arguments.next.prefetch_bytes = next.dense(bytes);
    arguments.front.prefetch_bytes = front.dense(bytes);
  }
  return arguments;
}

namespace {

int run_part(const RfConvChain& part, const RfConvPlan& plan, int64_t first, int64_t images,
             void* stream) {
  if (rf_conv_chain_configuration(plan.configuration)->tma != 0) {
    const auto run =
        plan.configuration < kFirstChainWindow ? run_conv_chain_tma : run_conv_chain_window;
    return run(part, plan, first, images, stream);
  }
  const auto arguments = conv_chain_arguments(part, plan, first, images);
  const bool bfloat16 = static_cast<DataType>(part.dtype) == DataType::kBFloat16;
  const auto launch = bfloat16 ? launch_conv_chain_bfloat16 : launch_conv_chain_float16;
  return launch(arguments, plan.configuration, stream);
}

}  // namespace
}  // namespace resnet_fused

extern "C" int rf_conv_chain_cuda(const RfConvChain* problem, const RfConvPlan* plan, void*,
                                  void* stream) {
  using namespace resnet_fused;
  const int64_t images = problem->x_size[0];
  if (images * problem->x_size[2] * problem->x_size[3] == 0) return 0;
  const int64_t parts = divide_up(images, plan->images_a_launch);
  RfConvChain part = *problem;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = (problem->reverse != 0 ? parts - 1 - i : i) * plan->images_a_launch;
    const int64_t together = std::min(plan->images_a_launch, images - first);
    const int error = run_part(part, *plan, first, together, stream);
    if (error != 0) return error;
    part.flow.follows = part.flow.dependent;
  }
  return 0;
}
