#include <string>
#include <utility>

#include "../launch/bn_finalize_cuda.h"
#include "emulated.h"

namespace resnet_fused::emulated {
namespace {

// Address, and whether it is of doubles.
using Values = std::pair<uintptr_t, bool>;

ChannelVector vector(const Values& values) { return {pointer<void>(values.first), values.second}; }

ChannelCount count(uintptr_t total, double elements) {
  return {pointer<const double>(total), elements};
}

py::dict bn_finalize(const Settings& settings, const Values& stats, uintptr_t total,
                     const Values& gamma, const Values& beta, const Values& norm, int64_t channels,
                     double elements, double eps) {
  const ChannelVector from = vector(stats), to = vector(norm), a = vector(gamma), b = vector(beta);
  const ChannelCount m = count(total, elements);
  return run(settings,
             [&] { return rf_bn_finalize_cuda(&from, &a, &b, channels, &m, eps, &to, nullptr); });
}

py::dict bn_update_stats(const Settings& settings, const Values& stats, uintptr_t total,
                         const Values& mean, const Values& variance, uintptr_t tracked,
                         bool tracked_is_long, int64_t channels, double elements,
                         std::optional<double> factor) {
  const ChannelVector from = vector(stats), to = vector(mean), spread = vector(variance);
  const ChannelCount m = count(total, elements);
  return run(settings, [&] {
    return rf_bn_update_stats_cuda(&from, channels, &m, factor ? &*factor : nullptr, &to, &spread,
                                   pointer<void>(tracked), tracked_is_long, nullptr);
  });
}

py::dict bn_backward_finalize(const Settings& settings, const Values& sums, const Values& all_sums,
                              uintptr_t total, const Values& norm, const Values& coefficients,
                              const Values& dgamma, const Values& dbeta, int64_t channels,
                              double elements, int64_t row, bool frozen) {
  const ChannelVector own = vector(sums), all = vector(all_sums), values = vector(norm);
  const ChannelVector results[3] = {vector(coefficients), vector(dgamma), vector(dbeta)};
  const ChannelCount m = count(total, elements);
  return run(settings, [&] {
    return rf_bn_backward_finalize_cuda(&own, &all, &values, channels, &m, row, frozen, &results,
                                        nullptr);
  });
}

}  // namespace

void define_bn_finalize(py::module_& module) {
  module.def("bn_finalize", &bn_finalize, "See csrc/launch/bn_finalize_cuda.h.",
             py::arg("settings"), py::arg("stats"), py::arg("total"), py::arg("gamma"),
             py::arg("beta"), py::arg("norm"), py::arg("channels"), py::arg("elements"),
             py::arg("eps"));
  module.def("bn_update_stats", &bn_update_stats, "See csrc/launch/bn_finalize_cuda.h.",
             py::arg("settings"), py::arg("stats"), py::arg("total"), py::arg("running_mean"),
             py::arg("running_var"), py::arg("tracked"), py::arg("tracked_is_long"),
             py::arg("channels"), py::arg("elements"), py::arg("factor"));
  module.def("bn_backward_finalize", &bn_backward_finalize, "See csrc/launch/bn_finalize_cuda.h.",
             py::arg("settings"), py::arg("sums"), py::arg("all_sums"), py::arg("total"),
             py::arg("norm"), py::arg("coefficients"), py::arg("dgamma"), py::arg("dbeta"),
             py::arg("channels"), py::arg("elements"), py::arg("row"), py::arg("frozen"));
}

}  // namespace resnet_fused::emulated
