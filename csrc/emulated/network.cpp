#include "../launch/network.h"

#include "convolution.h"

namespace resnet_fused::emulated {
namespace {

using Layers = std::vector<RfConvBnAct>;
using Numbers = std::vector<int32_t>;

// What is asked of a network, beside its blocks.
struct Wish {
  Numbers splits;
  Numbers pixels;
  int32_t cluster;
};

// The lists stay the caller's.
RfNetwork network_of(const Layers& layers, const Wish& wish) {
  const auto list = [&](const char* name, const Numbers& numbers) {
    if (!numbers.empty() && numbers.size() != layers.size()) {
      throw std::invalid_argument(std::string(name) + ": one for each layer, or none");
    }
    return numbers.empty() ? nullptr : numbers.data();
  };
  return {layers.data(), static_cast<int32_t>(layers.size()), list("splits", wish.splits),
          list("pixels", wish.pixels), wish.cluster};
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

py::dict described(const Layers& layers, const Gpu& gpu, const Numbers& wish, int32_t blocks,
                   const Numbers& tiles, int32_t cluster) {
  std::string why;
  const Wish asked{wish, tiles, cluster};
  const RfNetwork network = network_of(layers, asked);
  const RfNetworkPlan made = planned(network, gpu, blocks, &why);
  Numbers splits;
  Numbers pixels;
  std::vector<bool> meets;
  for (size_t i = 0; i < layers.size(); ++i) {
    RfNetworkLayer layer;
    rf_network_layer(&network, &made, static_cast<int32_t>(i), &layer);
    splits.push_back(layer.splits);
    pixels.push_back(layer.pixels);
    meets.push_back(layer.meets != 0);
  }
  py::dict result;
  result["blocks"] = made.blocks;
  result["cluster"] = made.cluster;
  result["launches"] = made.launches;
  result["meetings"] = made.meetings;
  result["workspace_bytes"] = made.workspace_bytes;
  result["counter_bytes"] = made.counter_bytes;
  result["splits"] = splits;
  result["pixels"] = pixels;
  result["meets"] = meets;
  result["why"] = why;
  return result;
}

}  // namespace

void define_network(py::module_& module) {
  module.def("network_plan", &described,
             "What would be launched for ConvBnAct layers; ValueError says why nothing can be.",
             py::arg("layers"), py::arg("gpu"), py::arg("splits") = Numbers{},
             py::arg("blocks") = 0, py::arg("pixels") = Numbers{}, py::arg("cluster") = 0);
  module.def(
      "network",
      [](const Settings& settings, const Layers& layers, const Gpu& gpu, const Numbers& splits,
         int32_t blocks, uintptr_t workspace, const Numbers& pixels, int32_t cluster) {
        const Wish asked{splits, pixels, cluster};
        const RfNetwork network = network_of(layers, asked);
        const RfNetworkPlan made = planned(network, gpu, blocks);
        return run(settings, [&] {
          return rf_network_cuda(&network, &made, pointer<void>(workspace), nullptr);
        });
      },
      "A network's convolutions in one launch; see csrc/launch/network.h.", py::arg("settings"),
      py::arg("layers"), py::arg("gpu"), py::arg("splits"), py::arg("blocks"), py::arg("workspace"),
      py::arg("pixels") = Numbers{}, py::arg("cluster") = 0);
}

}  // namespace resnet_fused::emulated
