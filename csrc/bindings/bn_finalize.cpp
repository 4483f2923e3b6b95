// BatchNorm's per-channel values on the CPU: from statistics to scale and shift, from sums to the
// coefficients of backward, and the running statistics.
#include "../launch/bn_finalize.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

namespace resnet_fused {
namespace {

// float32 or float64, dense, of the shape given.
ChannelVector values(const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  const ScalarType dtype = t.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(name, ": expected float32 or float64, got ", name_of(dtype));
  }
  check_shape(name, t, "shape", shape);
  if (!t.is_contiguous()) fail(name, ": expected a contiguous tensor");
  return {const_cast<void*>(t.const_data_ptr()), dtype == ScalarType::Double};
}

ChannelVector values(const char* name, const std::optional<Tensor>& t,
                     const std::vector<int64_t>& shape) {
  return t ? values(name, *t, shape) : ChannelVector{nullptr, false};
}

// Elements a channel, over all ranks where `total` is given.
double elements(const std::optional<Tensor>& total, int64_t count) {
  if (!total) return static_cast<double>(count);
  const ChannelVector one = values("total", *total, {1});
  if (!one.is_double) fail("total: expected float64, got float32");
  return one.get(0);
}

int64_t columns(const char* name, const Tensor& t) {
  if (t.dim() != 2) fail(name, ": expected 2 dimensions, got shape ", shape_of(t));
  return t.size(1);
}

void bn_finalize_out(Tensor stats, std::optional<Tensor> total, std::optional<Tensor> gamma,
                     std::optional<Tensor> beta, int64_t count, double eps, Tensor norm) {
  const int64_t channels = columns("stats", stats);
  check_dtype("norm", norm, "stats", stats);
  bn_finalize(values("stats", stats, {2, channels}), values("gamma", gamma, {channels}),
              values("beta", beta, {channels}), channels, std::max(1.0, elements(total, count)),
              eps, values("norm", norm, {4, channels}));
}

void bn_update_stats_out(Tensor stats, std::optional<Tensor> total, Tensor running_mean,
                         Tensor running_var, int64_t count, double factor) {
  const int64_t channels = columns("stats", stats);
  const double m = elements(total, count);
  const ChannelVector from = values("stats", stats, {2, channels});
  const ChannelVector mean = values("running_mean", running_mean, {channels});
  const ChannelVector variance = values("running_var", running_var, {channels});
  if (m > 0) bn_update_stats(from, channels, m, factor, mean, variance);
}

void bn_backward_finalize_out(Tensor sums, std::optional<Tensor> all_sums,
                              std::optional<Tensor> total, Tensor norm, int64_t count, int64_t row,
                              bool frozen, Tensor coefficients, Tensor dgamma, Tensor dbeta) {
  const int64_t channels = columns("sums", sums), rows = sums.size(0);
  if (row < 1 || row >= rows) fail("row: expected 1 to ", rows - 1, ", got ", row);
  for (const Tensor* result : {&coefficients, &dgamma, &dbeta}) {
    check_dtype("results", *result, "sums", sums);
  }
  const ChannelVector own = values("sums", sums, {rows, channels});
  bn_backward_finalize(own, all_sums ? values("all_sums", *all_sums, {rows, channels}) : own,
                       values("norm", norm, {4, channels}), channels,
                       std::max(1.0, elements(total, count)), row, frozen,
                       values("coefficients", coefficients, {3, channels}),
                       values("dgamma", dgamma, {channels}), values("dbeta", dbeta, {channels}));
}

}  // namespace

void define_bn_finalize(torch::stable::detail::StableLibrary& library) {
  library.def(
      "bn_finalize_out(Tensor stats, Tensor? total, Tensor? gamma, Tensor? beta, int count, "
      "float eps, Tensor(a!) norm) -> ()");
  library.def(
      "bn_update_stats_out(Tensor stats, Tensor? total, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, int count, float factor) -> ()");
  library.def(
      "bn_backward_finalize_out(Tensor sums, Tensor? all_sums, Tensor? total, Tensor norm, "
      "int count, int row, bool frozen, Tensor(a!) coefficients, Tensor(b!) dgamma, "
      "Tensor(c!) dbeta) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("bn_finalize_out", TORCH_BOX(&bn_finalize_out));
  library.impl("bn_update_stats_out", TORCH_BOX(&bn_update_stats_out));
  library.impl("bn_backward_finalize_out", TORCH_BOX(&bn_backward_finalize_out));
}

}  // namespace resnet_fused
