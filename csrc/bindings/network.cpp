// network_out, network_plan, network_clusters: layers of conv_bn_act, one behind the other, in one
// launch.
#include "../launch/network.h"

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "conv.h"

namespace resnet_fused {
namespace {

using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using Maybes = std::vector<std::optional<Tensor>>;

// Of a layer in `geometry`: stride, padding and dilation, two of each, groups, and whether a ReLU
// comes last.
constexpr size_t kLayerIntegers = 8;

struct Operands {
  const Tensors& x;
  const Tensors& weight;
  const Tensors& scale;
  const Tensors& shift;
  const Maybes& residual;
  const Integers& geometry;
  const Tensors& out;
};

void check_count(const char* name, size_t got, size_t layers) {
  if (got != layers) fail(name, ": expected ", layers, ", as many as x has, got ", got);
}

// A layer's problem, its operands checked as those of conv_bn_act.
RfConvBnAct layer_of(const Operands& all, size_t i) {
  const Tensor& x = all.x[i];
  const Tensor& weight = all.weight[i];
  const Tensor& out = all.out[i];
  const std::optional<Tensor>& residual = all.residual[i];
  const auto numbers = [&](size_t from, size_t count) {
    const auto first = all.geometry.begin() + static_cast<int64_t>(i * kLayerIntegers + from);
    return Integers(first, first + static_cast<int64_t>(count));
  };
  const DataType dtype = conv_type("x", x);
  check_dtype("weight", weight, "x", x);
  check_dtype("out", out, "x", x);
  if (residual) check_dtype("residual", *residual, "x", x);
  check_device("x", x, "the first layer", all.x[0]);
  RfConvBnAct problem = conv_problem(x, weight, residual, numbers(0, 2), numbers(2, 2),
                                     numbers(4, 2), numbers(6, 1)[0], out);
  problem.dtype = static_cast<int32_t>(dtype);
  const bool relu = numbers(7, 1)[0] != 0;
  add_epilogue(problem, x, weight, all.scale[i], all.shift[i], residual, relu, {}, out);
  return problem;
}

std::vector<RfConvBnAct> layers_of(const Operands& all) {
  const size_t layers = all.x.size();
  if (layers == 0) fail("x: expected one tensor a layer, got none");
  check_count("weight", all.weight.size(), layers);
  check_count("scale", all.scale.size(), layers);
  check_count("shift", all.shift.size(), layers);
  check_count("residual", all.residual.size(), layers);
  check_count("out", all.out.size(), layers);
  if (all.geometry.size() != layers * kLayerIntegers) {
    fail("geometry: expected ", kLayerIntegers, " integers a layer, ", layers * kLayerIntegers,
         ", got ", all.geometry.size());
  }
  std::vector<RfConvBnAct> made;
  for (size_t i = 0; i < layers; ++i) {
    try {
      made.push_back(layer_of(all, i));
    } catch (const std::runtime_error& error) {
      fail("layer ", i, ": ", error.what());
    }
  }
  return made;
}

// What is asked for: blocks, a cluster of them, and of each layer the parts of its reductions and
// the pixels of its tiles. 0, or no list, leaves it to the plan.
struct Wish {
  int32_t blocks;
  int32_t cluster;
  std::vector<int32_t> splits;
  std::vector<int32_t> pixels;
};

std::vector<int32_t> wishes(const char* name, const Integers& given, size_t layers) {
  if (!given.empty()) check_count(name, given.size(), layers);
  for (const int64_t one : given) {
    if (one < 0 || one > 1 << 20) fail(name, ": expected 0 to ", 1 << 20, ", got ", one);
  }
  return {given.begin(), given.end()};
}

Wish wish_of(int64_t blocks, int64_t cluster, const Integers& splits, const Integers& pixels,
             size_t layers) {
  const auto small = [](const char* name, int64_t value) {
    if (value < 0 || value > 1 << 20) fail(name, ": expected 0 to ", 1 << 20, ", got ", value);
    return static_cast<int32_t>(value);
  };
  return {small("blocks", blocks), small("cluster", cluster), wishes("splits", splits, layers),
          wishes("pixels", pixels, layers)};
}

RfNetwork network_of(const std::vector<RfConvBnAct>& layers, const Wish& wish) {
  const auto list = [](const std::vector<int32_t>& all) {
    return all.empty() ? nullptr : all.data();
  };
  return {layers.data(), static_cast<int32_t>(layers.size()), list(wish.splits), list(wish.pixels),
          wish.cluster};
}

// Blocks, of which 0 means that the layers are refused; blocks of a cluster; launches; meetings of
// all blocks; bytes of the workspace, and of its counters; predicted cycles; of each layer its
// splits, pixels of its tiles, and whether the blocks meet before it; and why.
using NetworkResult = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double,
                                 Integers, Integers, Integers, std::string>;

NetworkResult network_plan(Tensors x, Tensors weight, Tensors scale, Tensors shift, Maybes residual,
                           Integers geometry, Tensors out, Integers gpu, int64_t blocks,
                           int64_t cluster, Integers splits, Integers pixels) {
  const auto layers = layers_of({x, weight, scale, shift, residual, geometry, out});
  const Wish wish = wish_of(blocks, cluster, splits, pixels, layers.size());
  const RfNetwork network = network_of(layers, wish);
  const RfGpu about = gpu_of(gpu);
  RfNetworkPlan plan{};
  char why[kWhyBytes] = "";
  if (rf_network_plan(&network, &about, wish.blocks, &plan, why, sizeof why) != 0) {
    return {0, 0, 0, 0, 0, 0, 0.0, {}, {}, {}, why};
  }
  Integers parts;
  Integers tiles;
  Integers meets;
  for (int32_t i = 0; i < network.count; ++i) {
    RfNetworkLayer layer{};
    rf_network_layer(&network, &plan, i, &layer);
    parts.push_back(layer.splits);
    tiles.push_back(layer.pixels);
    meets.push_back(layer.meets);
  }
  return {plan.blocks,
          plan.cluster,
          plan.launches,
          plan.meetings,
          plan.workspace_bytes,
          plan.counter_bytes,
          rf_network_cycles(&network, &plan),
          parts,
          tiles,
          meets,
          why};
}

void check_workspace(const Tensor& workspace, const Tensor& x) {
  check_device("workspace", workspace, "x", x);
  if (workspace.scalar_type() != ScalarType::Int || !workspace.is_contiguous()) {
    fail("workspace: expected contiguous int32, zeros where counters are, got ",
         name_of(workspace.scalar_type()), " of ", shape_of(workspace));
  }
  constexpr uintptr_t kAligned = 256;
  if (reinterpret_cast<uintptr_t>(workspace.const_data_ptr()) % kAligned != 0) {
    fail("workspace: expected an address that ", kAligned, " divides");
  }
}

void check_apart(const Tensor& workspace, const Operands& all) {
  const OutputMemory memory(workspace, "workspace");
  for (size_t i = 0; i < all.x.size(); ++i) {
    const std::string layer = " of layer " + std::to_string(i);
    const std::pair<const char*, std::optional<Tensor>> tensors[] = {
        {"x", all.x[i]},         {"weight", all.weight[i]},     {"scale", all.scale[i]},
        {"shift", all.shift[i]}, {"residual", all.residual[i]}, {"out", all.out[i]}};
    for (const auto& [name, one] : tensors) memory.apart_from((name + layer).c_str(), one);
  }
}

void network_out(Tensors x, Tensors weight, Tensors scale, Tensors shift, Maybes residual,
                 Integers geometry, Tensors out, Tensor workspace, int64_t blocks, int64_t cluster,
                 Integers splits, Integers pixels) {
  const auto layers = layers_of({x, weight, scale, shift, residual, geometry, out});
  check_workspace(workspace, x[0]);
  check_apart(workspace, {x, weight, scale, shift, residual, geometry, out});
  const Wish wish = wish_of(blocks, cluster, splits, pixels, layers.size());
  if (!out[0].is_cuda()) fail("network_out: expected CUDA tensors, got others");
  const int device = out[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const RfGpu about = gpu_of(device);
  const RfNetwork network = network_of(layers, wish);
  RfNetworkPlan plan{};
  char why[kWhyBytes] = "";
  if (rf_network_plan(&network, &about, wish.blocks, &plan, why, sizeof why) != 0) {
    fail("network_out: ", why);
  }
  const int64_t given = workspace.numel() * workspace.element_size();
  if (given < plan.workspace_bytes) {
    fail("workspace: expected ", plan.workspace_bytes, " bytes, got ", given);
  }
  const int error =
      rf_network_cuda(&network, &plan, workspace.mutable_data_ptr(), current_cuda_stream(device));
  if (error != 0) fail("network_out: the CUDA launch failed: ", rf_cuda_error(error));
}

// Clusters of so many blocks that the current device has room for at once; 0: it has no clusters.
int64_t network_clusters(int64_t cluster) {
  int32_t clusters = 0;
  const int error = rf_network_clusters(static_cast<int32_t>(cluster), &clusters);
  if (error != 0) fail("network_clusters: ", rf_cuda_error(error));
  return clusters;
}

int64_t network_configuration() { return rf_network_configuration(); }

}  // namespace

void define_network(torch::stable::detail::StableLibrary& library) {
  library.def(
      "network_out(Tensor[] x, Tensor[] weight, Tensor[] scale, Tensor[] shift, "
      "Tensor?[] residual, int[] geometry, Tensor(a!)[] out, Tensor(b!) workspace, int blocks, "
      "int cluster, int[] splits, int[] pixels) -> ()");
  library.def(
      "network_plan(Tensor[] x, Tensor[] weight, Tensor[] scale, Tensor[] shift, "
      "Tensor?[] residual, int[] geometry, Tensor[] out, int[] gpu, int blocks, int cluster, "
      "int[] splits, int[] pixels) -> (int blocks, int cluster, int launches, int meetings, "
      "int workspace_bytes, int counter_bytes, float cycles, int[] splits, int[] pixels, "
      "int[] meets, str why)");
  library.def("network_clusters(int cluster) -> int");
  library.def("network_configuration() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("network_out", TORCH_BOX(&network_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("network_out", TORCH_BOX(&network_out));
}

// A plan sees addresses, and reads nothing of what lies there: memory on any device will do.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("network_plan", TORCH_BOX(&network_plan));
  library.impl("network_clusters", TORCH_BOX(&network_clusters));
  library.impl("network_configuration", TORCH_BOX(&network_configuration));
}

}  // namespace resnet_fused
