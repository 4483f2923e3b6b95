// What the emulated convolutions share: their C interface as Python sees it. Inside of this room.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../launch/conv_bn_act.h"
#include "emulated.h"

namespace resnet_fused::emulated {

using Pair = std::array<int64_t, 2>;
// Multiprocessors, shared memory a block and a multiprocessor may have, in bytes; 10 times its
// capability, and clusters of 4 and of 8 blocks that run at once, where those are known.
using Gpu = std::vector<int32_t>;

inline RfGpu limits_of(const Gpu& gpu) {
  if (gpu.size() != 3 && gpu.size() != 4 && gpu.size() != 6) {
    throw std::invalid_argument("gpu: 3, 4 or 6 integers");
  }
  const auto at = [&](size_t i) { return gpu.size() > i ? gpu[i] : 0; };
  return {gpu[0], gpu[1], gpu[2], at(3), at(4), at(5)};
}

template <class Source, size_t kCount>
void fill(int64_t (&to)[kCount], const Source& from) {
  std::copy(from.begin(), from.end(), to);
}

// The C interface of an op. Problem: RfConvBnAct or RfConvGradient.
template <class Problem>
struct Convolution {
  const char* name;
  const char* help;
  int32_t (*configurations)();
  const RfConvConfiguration* (*configuration)(int32_t index);
  int32_t (*plan)(const Problem*, const RfGpu*, int32_t configuration, int32_t splits, RfConvPlan*,
                  char* why, size_t why_bytes);
  int (*run)(const Problem*, const RfConvPlan*, void* workspace, void* stream);

  // What would be launched, and in `reason` why; throws std::invalid_argument where nothing can be.
  RfConvPlan planned(const Problem& problem, const Gpu& gpu, int32_t index, int32_t splits,
                     std::string* reason = nullptr) const {
    const RfGpu limits = limits_of(gpu);
    RfConvPlan made;
    char why[512] = "";
    if (plan(&problem, &limits, index, splits, &made, why, sizeof why) != 0) {
      throw std::invalid_argument(why);
    }
    if (reason != nullptr) *reason = why;
    return made;
  }

  py::dict described(const Problem& problem, const Gpu& gpu, int32_t index, int32_t splits) const {
    std::string why;
    const RfConvPlan made = planned(problem, gpu, index, splits, &why);
    py::dict result;
    result["configuration"] = made.configuration;
    result["splits"] = made.splits;
    result["workspace_bytes"] = made.workspace_bytes;
    result["launches"] = made.launches;
    result["blocks"] = made.blocks;
    result["cycles"] = made.cycles;
    result["why"] = why;
    return result;
  }

  py::list table() const {
    py::list all;
    for (int32_t i = 0; i < configurations(); ++i) {
      const RfConvConfiguration& one = *configuration(i);
      py::dict entry;
      entry["name"] = one.name;
      entry["wide"] = one.wide != 0;
      entry["m"] = one.m;
      entry["n"] = one.n;
      entry["warps"] = one.warps_m * one.warps_n;
      entry["stages"] = one.stages;
      entry["blocks"] = one.blocks;
      entry["step_bytes"] = one.step_bytes;
      entry["shared_bytes"] = one.shared_bytes;
      entry["float32"] = one.float32 != 0;
      entry["tma"] = one.tma != 0;
      entry["window"] = one.window != 0;
      entry["image"] = one.image != 0;
      entry["cluster"] = one.cluster;
      all.append(entry);
    }
    return all;
  }
};

// Defines <name>_configurations, <name>_plan and <name>; `op` is copied.
template <class Problem>
void define(py::module_& module, const Convolution<Problem>& op) {
  const std::string name = op.name;
  module.def((name + "_configurations").c_str(), [op] { return op.table(); });
  module.def(
      (name + "_plan").c_str(),
      [op](const Problem& problem, const Gpu& gpu, int32_t index, int32_t splits) {
        return op.described(problem, gpu, index, splits);
      },
      "What would be launched; ValueError says why nothing can be. A configuration of -1 and 0 "
      "splits leave the choice to the chooser.",
      py::arg("problem"), py::arg("gpu"), py::arg("configuration") = -1, py::arg("splits") = 0);
  module.def(
      name.c_str(),
      [op](const Settings& settings, const Problem& problem, const Gpu& gpu, int32_t index,
           int32_t splits, uintptr_t workspace) {
        const RfConvPlan made = op.planned(problem, gpu, index, splits);
        return run(settings,
                   [&] { return op.run(&problem, &made, pointer<void>(workspace), nullptr); });
      },
      op.help, py::arg("settings"), py::arg("problem"), py::arg("gpu"), py::arg("configuration"),
      py::arg("splits"), py::arg("workspace"));
}

// What every problem has beside its tensors.
template <class Problem>
void fill_geometry(Problem& made, const std::string& dtype, bool allow_tf32, const Sizes& x_size,
                   const Sizes& weight_size, const Pair& stride, const Pair& padding,
                   const Pair& dilation, int32_t groups) {
  made.dtype = static_cast<int32_t>(data_type(dtype));
  made.allow_tf32 = allow_tf32;
  made.groups = groups;
  fill(made.x_size, x_size);
  fill(made.weight_size, weight_size);
  fill(made.stride, stride);
  fill(made.padding, padding);
  fill(made.dilation, dilation);
}

}  // namespace resnet_fused::emulated
