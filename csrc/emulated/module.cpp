#include <filesystem>

#include "../launch/bn_act.h"
#include "conv_bn_grad1x1_end.h"
#include "emulated.h"

namespace resnet_fused::emulated {
namespace {

// The index of `given` among `accepted`.
int choice(const char* what, const std::string& given,
           std::initializer_list<const char*> accepted) {
  std::string list;
  int index = 0;
  for (const char* word : accepted) {
    if (given == word) return index;
    list += (index++ ? ", " : "") + std::string(word);
  }
  throw std::invalid_argument(std::string(what) + " is '" + given + "'; accepted are " + list);
}

void configure(emulator::Session& session, const Settings& settings) {
  session.schedule.asynchrony = static_cast<emulator::Asynchrony>(
      choice("asynchrony", settings.asynchrony, {"eager", "lazy", "random"}));
  session.schedule.order = static_cast<emulator::Order>(
      choice("order", settings.order, {"forward", "reverse", "shuffled"}));
  session.schedule.rounding = static_cast<emulator::Rounding>(
      choice("rounding", settings.rounding, {"nearest", "toward_zero"}));
  session.schedule.seed = settings.seed;
  session.resident_blocks = settings.resident_blocks;
  session.counting = settings.counting;
  session.checking_tensors = settings.checking_tensors;
  if (settings.shared_limit) session.shared_limit = *settings.shared_limit;
  if (settings.blocks) std::tie(session.first_block, session.last_block) = *settings.blocks;
  if (settings.fault) {
    const auto& [file, line, instruction, fault] = *settings.fault;
    session.plant({file, line, instruction, emulator::fault_named(fault)});
  }
  for (const auto& [name, address, bytes, writable] : settings.tensors) {
    session.register_tensor(name, pointer<const void>(address), bytes, writable,
                            settings.constants.contains(name));
  }
}

py::dict to_python(const emulator::Counters& counters) {
  py::dict result;
  result["shared_load_requests"] = counters.shared_load_requests;
  result["shared_store_requests"] = counters.shared_store_requests;
  result["shared_wavefronts"] = counters.shared_wavefronts;
  result["shared_bytes"] = counters.shared_bytes;
  result["bank_conflicts"] = counters.bank_conflicts();
  result["global_load_requests"] = counters.global_load_requests;
  result["global_load_sectors"] = counters.global_load_sectors;
  result["global_load_lines"] = counters.global_load_lines;
  result["global_load_bytes_asked"] = counters.global_load_bytes_asked;
  result["global_store_requests"] = counters.global_store_requests;
  result["global_store_sectors"] = counters.global_store_sectors;
  result["global_store_lines"] = counters.global_store_lines;
  result["global_store_bytes_asked"] = counters.global_store_bytes_asked;
  result["global_atomics"] = counters.global_atomics;
  return result;
}

py::dict to_python(const emulator::Report& report) {
  py::list sites;
  for (const auto& site : report.sites) {
    py::dict entry;
    entry["file"] = std::filesystem::path(site.file).lexically_normal().string();
    entry["line"] = site.line;
    entry["instruction"] = site.instruction;
    py::list faults;
    for (const emulator::Fault fault : site.possible) faults.append(emulator::name_of(fault));
    entry["faults"] = faults;
    entry["hits"] = site.hits;
    entry["counters"] = to_python(site.counters);
    sites.append(entry);
  }
  py::dict tensors;
  for (const auto& tensor : report.tensors) {
    py::dict entry;
    entry["unique_bytes_read"] = tensor.unique_bytes_read;
    entry["unique_bytes_written"] = tensor.unique_bytes_written;
    tensors[py::str(tensor.name)] = entry;
  }
  py::dict result;
  result["counters"] = to_python(report.counters);
  result["sites"] = sites;
  result["tensors"] = tensors;
  result["launches"] = report.launches;
  result["blocks"] = report.blocks;
  return result;
}

// Sets the attributes that name where a fault was noticed.
void raise(py::handle type, const emulator::Error& error) {
  py::object raised = py::reinterpret_borrow<py::object>(type)(error.what());
  raised.attr("kind") = emulator::name_of(error.kind);
  raised.attr("file") = std::filesystem::path(error.file).lexically_normal().string();
  raised.attr("line") = error.line;
  raised.attr("instruction") = error.instruction;
  raised.attr("block") =
      py::make_tuple(error.block_index.x, error.block_index.y, error.block_index.z);
  raised.attr("thread") = error.thread;
  PyErr_SetObject(type.ptr(), raised.ptr());
}

}  // namespace

py::dict run(const Settings& settings, const std::function<int()>& launch) {
  emulator::Report report;
  {
    const py::gil_scoped_release release;
    emulator::Session session;
    configure(session, settings);
    const int error = launch();
    if (error != 0) {
      throw std::runtime_error(std::string("the launch was refused: ") + rf_cuda_error(error));
    }
    report = session.report();
  }
  return to_python(report);
}

DataType data_type(const std::string& name) {
  return static_cast<DataType>(
      choice("dtype", name, {"float32", "float64", "float16", "bfloat16"}));
}

}  // namespace resnet_fused::emulated

PYBIND11_MODULE(_emulated, module) {
  using namespace resnet_fused;
  using emulated::Settings;
  namespace py = pybind11;
  module.doc() = "The CUDA kernels on the CPU: csrc/launch over csrc/emulator.";
  static py::handle error =
      py::exception<emulator::Error>(module, "Error", PyExc_RuntimeError).release();
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const emulator::Error& found) {
      emulated::raise(error, found);
    }
  });
  py::class_<Settings>(module, "Settings")
      .def(py::init())
      .def_readwrite("asynchrony", &Settings::asynchrony)
      .def_readwrite("order", &Settings::order)
      .def_readwrite("rounding", &Settings::rounding)
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("fault", &Settings::fault)
      .def_readwrite("blocks", &Settings::blocks)
      .def_readwrite("resident_blocks", &Settings::resident_blocks)
      .def_readwrite("shared_limit", &Settings::shared_limit)
      .def_readwrite("counting", &Settings::counting)
      .def_readwrite("checking_tensors", &Settings::checking_tensors)
      .def_readwrite("tensors", &Settings::tensors)
      .def_readwrite("constants", &Settings::constants);
  emulated::define_bn_act(module);
  emulated::define_bn_add_act_conv_stats(module);
  emulated::define_bn_finalize(module);
  emulated::define_bn_training(module);
  emulated::define_conv_bn_act(module);
  emulated::define_conv_bn_act_fp8(module);
  emulated::define_conv_bn_dgrad(module);
  emulated::define_conv_bn_dgrad_end(module);
  emulated::define_conv_bn_grad1x1(module);
  emulated::define_conv_bn_grad1x1_end(module);
  emulated::define_conv_bn_stats(module);
  emulated::define_conv_bn_wgrad(module);
  emulated::define_conv_gradients(module);
  emulated::define_conv_chain(module);
  emulated::define_conv_chain_fp8(module);
  emulated::define_stem(module);
  emulated::define_head(module);
  emulated::define_network(module);
}
