// The probes as a Python module: run(name, ...) gives the first words of `out` and the report, or
// raises what the emulator found.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../../csrc/launch/tensor_map.h"
#include "probes.h"

namespace py = pybind11;

namespace resnet_fused::probes {
namespace {

struct alignas(128) Buffers {
  uint32_t in[kWords];
  uint32_t between[64];  // so that what lies behind `in` is nobody's
  uint32_t out[kWords];
};

const Table& table() {
  static const Table probes = [] {
    Table made;
    add_hazards(made);
    add_costs(made);
    add_early(made);
    add_products(made);
    add_copies(made);
    add_clusters(made);
    add_grids(made);
    return made;
  }();
  return probes;
}

py::dict to_python(const emulator::Counters& c) {
  py::dict d;
  d["shared_requests"] = c.shared_load_requests + c.shared_store_requests;
  d["shared_wavefronts"] = c.shared_wavefronts;
  d["shared_bytes"] = c.shared_bytes;
  d["bank_conflicts"] = c.bank_conflicts();
  d["global_load_requests"] = c.global_load_requests;
  d["global_load_sectors"] = c.global_load_sectors;
  d["global_load_lines"] = c.global_load_lines;
  d["global_load_bytes_asked"] = c.global_load_bytes_asked;
  d["global_store_requests"] = c.global_store_requests;
  d["global_store_sectors"] = c.global_store_sectors;
  d["global_store_bytes_asked"] = c.global_store_bytes_asked;
  d["global_atomics"] = c.global_atomics;
  return d;
}

py::dict to_python(const emulator::Report& report) {
  py::dict result;
  result["counters"] = to_python(report.counters);
  py::list sites;
  for (const auto& site : report.sites) {
    py::dict d;
    d["file"] = site.file;
    d["line"] = site.line;
    d["instruction"] = site.instruction;
    py::list faults;
    for (const auto fault : site.possible) faults.append(emulator::name_of(fault));
    d["faults"] = faults;
    d["hits"] = site.hits;
    d["counters"] = to_python(site.counters);
    sites.append(d);
  }
  result["sites"] = sites;
  py::dict tensors;
  for (const auto& tensor : report.tensors) {
    tensors[py::str(tensor.name)] =
        py::make_tuple(tensor.unique_bytes_read, tensor.unique_bytes_written);
  }
  result["tensors"] = tensors;
  result["blocks"] = report.blocks;
  return result;
}

using Fault = std::tuple<std::string, int, std::string, std::string>;

py::dict run(const std::string& name, int asynchrony, int order, uint64_t seed, bool checking_races,
             bool checking_unwritten, bool checking_proxies, bool checking_tensors,
             uint32_t resident_blocks, uint64_t cooperative_blocks, uint64_t first_block,
             uint64_t last_block, std::optional<Fault> fault,
             std::optional<std::tuple<uint64_t, int, int, uint64_t>> stop) {
  const auto found = table().find(name);
  if (found == table().end()) throw std::invalid_argument("there is no probe '" + name + "'");
  const Probe& probe = found->second;
  const auto buffers = std::make_unique<Buffers>();
  for (int i = 0; i < kWords; ++i) buffers->in[i] = static_cast<uint32_t>(i);
  std::memset(buffers->out, 0, sizeof(buffers->out));
  const Memory memory{buffers->in, buffers->out};

  emulator::Session session;
  session.schedule = {static_cast<emulator::Asynchrony>(asynchrony),
                      static_cast<emulator::Order>(order), emulator::Rounding::kNearest, seed};
  session.counting = true;
  session.checking_races = checking_races;
  session.checking_unwritten = checking_unwritten;
  session.checking_proxies = checking_proxies;
  session.checking_tensors = checking_tensors;
  session.resident_blocks = resident_blocks;
  session.cooperative_blocks = cooperative_blocks;
  session.first_block = first_block;
  session.last_block = last_block;
  session.register_tensor("in", buffers->in, sizeof(buffers->in), false, true);
  session.register_tensor("out", buffers->out, sizeof(buffers->out), true);
  if (fault) {
    const auto& [file, line, instruction, kind] = *fault;
    session.plant({file, line, instruction, emulator::fault_named(kind)});
  }
  if (stop) {
    const auto& [block, thread, line, occurrence] = *stop;
    session.stop_at({block, thread, "costs.cpp", line, occurrence, {0, 2, 4, 16, "f32"}});
  }
  launch(probe, memory);
  py::dict result = to_python(session.report());
  result["out"] = std::vector<uint32_t>(buffers->out, buffers->out + 2048);
  return result;
}

// What tensor_map_fault says of a request of 16-bit elements, and what the encoder returns.
std::pair<std::string, int> tensor_map(uint64_t address, const std::vector<int64_t>& sizes,
                                       const std::vector<int64_t>& strides,
                                       const std::vector<int32_t>& box,
                                       const std::vector<int32_t>& steps, int swizzle, int pixels,
                                       const std::vector<int32_t>& lower,
                                       const std::vector<int32_t>& upper) {
  TensorMapRequest request;
  request.rank = static_cast<int>(sizes.size());
  request.address = reinterpret_cast<void*>(address);
  request.swizzle = static_cast<TensorSwizzle>(swizzle);
  request.pixels = pixels;
  std::copy_n(sizes.begin(), std::min<size_t>(sizes.size(), 5), request.sizes.begin());
  std::copy(strides.begin(), strides.end(), request.strides.begin());
  std::copy(box.begin(), box.end(), request.box.begin());
  std::copy(steps.begin(), steps.end(), request.steps.begin());
  std::copy(lower.begin(), lower.end(), request.lower.begin());
  std::copy(upper.begin(), upper.end(), request.upper.begin());
  ptx::TensorMap map;
  return {tensor_map_fault(request), encode_tensor_map(request, &map)};
}

// Nanoseconds that one lane spends in a collective of its warp.
double nanoseconds_of_a_collective() {
  constexpr int kTurns = 1000;
  const auto start = std::chrono::steady_clock::now();
  emulator::Session session;
  emulator::launch(1, 128, 0, false, [] {
    for (int i = 0; i < kTurns; ++i) ptx::ballot(emulator::kFullMask, true);
  });
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
  return spent.count() * 1e9 / (128.0 * kTurns);
}

}  // namespace
}  // namespace resnet_fused::probes

PYBIND11_MODULE(_probes, module) {
  using namespace resnet_fused;
  static py::handle error =
      py::exception<emulator::Error>(module, "Error", PyExc_RuntimeError).release();
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const emulator::Error& found) {
      py::object raised = py::reinterpret_borrow<py::object>(error)(found.what());
      raised.attr("kind") = emulator::name_of(found.kind);
      raised.attr("file") = found.file;
      raised.attr("line") = found.line;
      raised.attr("instruction") = found.instruction;
      raised.attr("block") =
          py::make_tuple(found.block_index.x, found.block_index.y, found.block_index.z);
      raised.attr("thread") = found.thread;
      PyErr_SetObject(error.ptr(), raised.ptr());
    }
  });
  module.def("run", &probes::run, py::arg("name"), py::kw_only(), py::arg("asynchrony") = 0,
             py::arg("order") = 0, py::arg("seed") = 0, py::arg("checking_races") = true,
             py::arg("checking_unwritten") = true, py::arg("checking_proxies") = true,
             py::arg("checking_tensors") = false, py::arg("resident_blocks") = 1,
             py::arg("cooperative_blocks") = ~uint64_t{0}, py::arg("first_block") = 0,
             py::arg("last_block") = ~uint64_t{0}, py::arg("fault") = std::nullopt,
             py::arg("stop") = std::nullopt);
  module.def("tensor_map", &probes::tensor_map, py::kw_only(), py::arg("address"), py::arg("sizes"),
             py::arg("strides"), py::arg("box"), py::arg("steps"), py::arg("swizzle"),
             py::arg("pixels"), py::arg("lower"), py::arg("upper"));
  module.def("names", [] {
    std::vector<std::string> names;
    for (const auto& [name, probe] : probes::table()) names.push_back(name);
    return names;
  });
  module.def("faults", [] {
    std::vector<std::string> names;
    for (int i = 0; i < emulator::kFaults; ++i) {
      names.emplace_back(emulator::name_of(static_cast<emulator::Fault>(i)));
    }
    return names;
  });
  module.def("nanoseconds_of_a_collective", &probes::nanoseconds_of_a_collective);
}
