// BatchNorm's per-channel values: from statistics to scale and shift, from sums to the coefficients
// of backward, and the running statistics; where their tensors are.
#include "../launch/bn_finalize.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../launch/bn_act.h"
#include "../launch/bn_finalize_cuda.h"
#include "arguments.h"
#include "channel_values.h"

namespace resnet_fused {
namespace {

// Elements a channel, over all ranks where `total` is given: on a GPU the kernel reads it.
ChannelCount elements(const std::optional<Tensor>& total, int64_t count) {
  if (!total) return {nullptr, static_cast<double>(count)};
  const ChannelVector one = values("total", *total, {1});
  if (!one.is_double) fail("total: expected float64, got float32");
  return {static_cast<const double*>(one.data), 0};
}

double on_the_host(const ChannelCount& elements) {
  return elements.total != nullptr ? *elements.total : elements.count;
}

#if defined(RF_WITH_CUDA)
// Runs `launch(stream)` on the device of a tensor.
template <class Launch>
void run_on_gpu(const char* op, const Tensor& like, const Launch& launch) {
  const int device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int error = launch(current_cuda_stream(device));
  if (error != 0) fail(op, ": the CUDA launch failed: ", rf_cuda_error(error));
}
#endif

// All on the device of the first.
void together(const char* name, const Tensor& first,
              std::initializer_list<std::pair<const char*, const std::optional<Tensor>>> others) {
  for (const auto& [other_name, other] : others) {
    if (other) check_device(other_name, *other, name, first);
  }
}

int64_t columns(const char* name, const Tensor& t) {
  if (t.dim() != 2) fail(name, ": expected 2 dimensions, got shape ", shape_of(t));
  return t.size(1);
}

void bn_finalize_out(Tensor stats, std::optional<Tensor> total, std::optional<Tensor> gamma,
                     std::optional<Tensor> beta, int64_t count, double eps, Tensor norm) {
  const int64_t channels = columns("stats", stats);
  together("stats", stats, {{"total", total}, {"gamma", gamma}, {"beta", beta}, {"norm", norm}});
  check_dtype("norm", norm, "stats", stats);
  const ChannelVector from = values("stats", stats, {2, channels});
  const ChannelVector a = values("gamma", gamma, {channels}), b = values("beta", beta, {channels});
  const ChannelVector to = values("norm", norm, {4, channels});
  const ChannelCount m = elements(total, count);
#if defined(RF_WITH_CUDA)
  if (stats.is_cuda()) {
    return run_on_gpu("bn_finalize", stats, [&](void* stream) {
      return rf_bn_finalize_cuda(&from, &a, &b, channels, &m, eps, &to, stream);
    });
  }
#endif
  bn_finalize(from, a, b, channels, std::max(1.0, on_the_host(m)), eps, to);
}

void bn_update_stats_out(Tensor stats, std::optional<Tensor> total, Tensor running_mean,
                         Tensor running_var, int64_t count, std::optional<double> factor,
                         std::optional<Tensor> tracked) {
  const int64_t channels = columns("stats", stats);
  together("stats", stats,
           {{"total", total},
            {"running_mean", running_mean},
            {"running_var", running_var},
            {"tracked", tracked}});
  if (!factor && !tracked) fail("factor: expected a number where there is no `tracked`, got None");
  const ChannelCount m = elements(total, count);
  const ChannelVector from = values("stats", stats, {2, channels});
  const ChannelVector mean = values("running_mean", running_mean, {channels});
  const ChannelVector variance = values("running_var", running_var, {channels});
#if defined(RF_WITH_CUDA)
  if (stats.is_cuda()) {
    const TrackedCount counted = tracked_count(tracked);
    return run_on_gpu("bn_update_stats", stats, [&](void* stream) {
      return rf_bn_update_stats_cuda(&from, channels, &m, factor ? &*factor : nullptr, &mean,
                                     &variance, counted.data, counted.is_long, stream);
    });
  }
#endif
  if (tracked) fail("tracked: counted on a GPU alone, got a tensor on the CPU");
  const double on_all = on_the_host(m);
  if (on_all > 0) bn_update_stats(from, channels, on_all, *factor, mean, variance);
}

void bn_backward_finalize_out(Tensor sums, std::optional<Tensor> all_sums,
                              std::optional<Tensor> total, Tensor norm, int64_t count, int64_t row,
                              bool frozen, Tensor coefficients, Tensor dgamma, Tensor dbeta) {
  const int64_t channels = columns("sums", sums), rows = sums.size(0);
  if (row < 1 || row >= rows) fail("row: expected 1 to ", rows - 1, ", got ", row);
  together("sums", sums,
           {{"all_sums", all_sums},
            {"total", total},
            {"norm", norm},
            {"coefficients", coefficients},
            {"dgamma", dgamma},
            {"dbeta", dbeta}});
  for (const Tensor* result : {&coefficients, &dgamma, &dbeta}) {
    check_dtype("results", *result, "sums", sums);
  }
  const ChannelVector own = values("sums", sums, {rows, channels});
  const ChannelVector all = all_sums ? values("all_sums", *all_sums, {rows, channels}) : own;
  const ChannelVector from = values("norm", norm, {4, channels});
  const ChannelVector results[3] = {values("coefficients", coefficients, {3, channels}),
                                    values("dgamma", dgamma, {channels}),
                                    values("dbeta", dbeta, {channels})};
  const ChannelCount m = elements(total, count);
#if defined(RF_WITH_CUDA)
  if (sums.is_cuda()) {
    return run_on_gpu("bn_backward_finalize", sums, [&](void* stream) {
      return rf_bn_backward_finalize_cuda(&own, &all, &from, channels, &m, row, frozen, &results,
                                          stream);
    });
  }
#endif
  bn_backward_finalize(own, all, from, channels, std::max(1.0, on_the_host(m)), row, frozen,
                       results[0], results[1], results[2]);
}

}  // namespace

void define_bn_finalize(torch::stable::detail::StableLibrary& library) {
  library.def(
      "bn_finalize_out(Tensor stats, Tensor? total, Tensor? gamma, Tensor? beta, int count, "
      "float eps, Tensor(a!) norm) -> ()");
  library.def(
      "bn_update_stats_out(Tensor stats, Tensor? total, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, int count, float? factor, Tensor(c!)? tracked=None) -> ()");
  library.def(
      "bn_backward_finalize_out(Tensor sums, Tensor? all_sums, Tensor? total, Tensor norm, "
      "int count, int row, bool frozen, Tensor(a!) coefficients, Tensor(b!) dgamma, "
      "Tensor(c!) dbeta) -> ()");
}

#if defined(RF_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("bn_finalize_out", TORCH_BOX(&bn_finalize_out));
  library.impl("bn_update_stats_out", TORCH_BOX(&bn_update_stats_out));
  library.impl("bn_backward_finalize_out", TORCH_BOX(&bn_backward_finalize_out));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("bn_finalize_out", TORCH_BOX(&bn_finalize_out));
  library.impl("bn_update_stats_out", TORCH_BOX(&bn_update_stats_out));
  library.impl("bn_backward_finalize_out", TORCH_BOX(&bn_backward_finalize_out));
}

}  // namespace resnet_fused
