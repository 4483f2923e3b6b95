#include "../launch/network.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

using Layers = std::vector<RfConvBnAct>;
using Splits = std::vector<int32_t>;

// The two lists stay the caller's.
RfNetwork network_of(const Layers& layers, const Splits& splits) {
  if (!splits.empty() && splits.size() != layers.size()) {
    throw std::invalid_argument("splits: one for each layer, or none");
  }
  return {layers.data(), static_cast<int32_t>(layers.size()),
          splits.empty() ? nullptr : splits.data()};
}

RfNetworkPlan planned(const RfNetwork& network, const Gpu& gpu, int32_t blocks,
                      std::string* reason = nullptr) {
  const RfGpu limits = limits_of(gpu);
  RfNetworkPlan made;
  char why[512] = "";
  if (rf_network_plan(&network, &limits, blocks, &made, why, sizeof why) != 0) {
    throw std::invalid_argument(why);
  }
  if (reason != nullptr) *reason = why;
  return made;
}

py::dict described(const Layers& layers, const Gpu& gpu, const Splits& wish, int32_t blocks) {
  std::string why;
  const RfNetwork network = network_of(layers, wish);
  const RfNetworkPlan made = planned(network, gpu, blocks, &why);
  Splits splits(layers.size());
  Splits meets(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    rf_network_layer(&network, &made, static_cast<int32_t>(i), &splits[i], &meets[i]);
  }
  py::dict result;
  result["blocks"] = made.blocks;
  result["launches"] = made.launches;
  result["meetings"] = made.meetings;
  result["workspace_bytes"] = made.workspace_bytes;
  result["counter_bytes"] = made.counter_bytes;
  result["splits"] = splits;
  result["meets"] = std::vector<bool>(meets.begin(), meets.end());
  result["why"] = why;
  return result;
}

}  // namespace

void define_network(py::module_& module) {
  module.def("network_plan", &described,
             "What would be launched for ConvBnAct layers; ValueError says why nothing can be.",
             py::arg("layers"), py::arg("gpu"), py::arg("splits") = Splits{},
             py::arg("blocks") = 0);
  module.def(
      "network",
      [](const Settings& settings, const Layers& layers, const Gpu& gpu, const Splits& splits,
         int32_t blocks, uintptr_t workspace) {
        const RfNetwork network = network_of(layers, splits);
        const RfNetworkPlan made = planned(network, gpu, blocks);
        return run(settings, [&] {
          return rf_network_cuda(&network, &made, pointer<void>(workspace), nullptr);
        });
      },
      "A network's convolutions in one launch; see csrc/launch/network.h.", py::arg("settings"),
      py::arg("layers"), py::arg("gpu"), py::arg("splits"), py::arg("blocks"),
      py::arg("workspace"));
}

}  // namespace resnet_fused::emulated
