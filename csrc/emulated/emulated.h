// The tests' Python module over csrc/launch: any kernel, configuration, schedule and fault, on
// memory that the caller owns. It takes addresses, sizes and strides, and knows no tensor.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "../device/bn_act.h"
#include "../emulator/session.h"

namespace resnet_fused::emulated {

namespace py = pybind11;

using Sizes = std::array<int64_t, 4>;  // or strides, in elements: N, C, H, W

// How a run is emulated: what Session takes, in Python's words.
struct Settings {
  std::string asynchrony = "eager";  // eager, lazy, random
  std::string order = "forward";     // forward, reverse, shuffled
  std::string rounding = "nearest";  // nearest, toward_zero
  uint64_t seed = 0;
  // End of the path, line, instruction, name of the fault.
  std::optional<std::tuple<std::string, int, std::string, std::string>> fault;
  std::optional<std::pair<uint64_t, uint64_t>> blocks;  // first and last, of the linear grid
  uint32_t resident_blocks = 1;                         // that run at once, interleaved
  std::optional<uint32_t> shared_limit;                 // bytes a block may ask for
  bool counting = false;
  bool checking_tensors = false;
  // Name, address, bytes, whether it may be written.
  std::vector<std::tuple<std::string, uintptr_t, size_t, bool>> tensors;
  // Names of those that no launch writes: they may be read before the one ahead has ended.
  std::set<std::string> constants;
};

// Runs `launch`, which returns 0 or a cudaError_t, without the GIL. Returns the report as a dict.
// Throws emulator::Error for a fault of the kernel, std::runtime_error for a refused launch and
// std::invalid_argument for a setting that there is not.
py::dict run(const Settings& settings, const std::function<int()>& launch);

// "float32", "float64", "float16" or "bfloat16"; throws std::invalid_argument for another.
DataType data_type(const std::string& name);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void define_bn_act(py::module_& module);
void define_bn_add_act_conv_stats(py::module_& module);
void define_bn_finalize(py::module_& module);
void define_bn_training(py::module_& module);
void define_conv_bn_act(py::module_& module);
void define_conv_bn_act_fp8(py::module_& module);
void define_conv_bn_dgrad(py::module_& module);
void define_conv_bn_dgrad_end(py::module_& module);
void define_conv_bn_grad1x1(py::module_& module);
void define_conv_bn_stats(py::module_& module);
void define_conv_bn_wgrad(py::module_& module);
void define_conv_gradients(py::module_& module);
void define_conv_chain(py::module_& module);
void define_conv_chain_fp8(py::module_& module);
void define_stem(py::module_& module);
void define_head(py::module_& module);
void define_network(py::module_& module);

}  // namespace resnet_fused::emulated
