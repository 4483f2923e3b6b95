// Runs the kernels of conformance.h over given words: on a GPU when built by nvcc, in the emulator
// otherwise. tools/conformance.py makes the words and compares the results.
//
//   conformance --list             one line an instruction: name, words of a case in and out, sm
//   conformance --folder FOLDER    for each FOLDER/<name>.in writes FOLDER/<name>.out
//
// Files hold 32-bit words in the machine's order. The exit status is 0, 1 for a failure on the
// device, 2 for a wrong call; messages go to standard error.
#include "conformance.h"

#include <cstddef>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "arguments.h"

namespace resnet_fused::conformance {
namespace {

using driver::Arguments;
using driver::UsageError;

std::vector<Instruction> instructions() {
  std::vector<Instruction> all;
  for (const auto& part :
       {matrix_instructions(), warp_instructions(), memory_instructions(), atomic_instructions(),
        copy_instructions(), cluster_instructions(), wgmma_instructions()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

#if defined(RF_EMULATED)

void check(int, const char*) {}  // what fails in the emulator throws

// Between bands that a planted fault may write to; beyond them the emulator stops it.
std::shared_ptr<void> allocate(size_t bytes) {
  constexpr size_t kBand = 1024;  // at least a warp's access of 16 bytes a lane
  const std::shared_ptr<std::byte[]> block(new std::byte[bytes + 2 * kBand]);
  emulator::Session& session = *emulator::current_session;
  if (session.checking_tensors) {
    session.register_tensor("words", block.get(), bytes + 2 * kBand, true);
  }
  return {block, block.get() + kBand};
}

void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

int device_sm() { return 90; }  // the newest that csrc/ptx has instructions of

// The options that choose a schedule, and the session that they ask for.
std::vector<driver::Option> device_options() {
  return {{"asynchrony", "eager", "when copies take effect: eager, lazy, random"},
          {"order", "forward", "of the threads: forward, reverse, shuffled"},
          {"rounding", "nearest", "of matrix products: nearest, zero"},
          {"seed", "0", "of random and shuffled"},
          {"plant", "", "fault to plant: FILE:LINE:INSTRUCTION:FAULT"},
          {"sites", "", "print each call reached and the faults it can be given", true}};
}

// "conformance_warp.cu:31:shfl.sync.idx:skip"
emulator::PlantedFault planted(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ':') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  if (parts.size() != 4) {
    throw UsageError("--plant is '" + text + "'; FILE:LINE:INSTRUCTION:FAULT is accepted");
  }
  return {parts[0], std::stoi(parts[1]), parts[2], emulator::fault_named(parts[3])};
}

void with_device(const Arguments& arguments, const std::function<void()>& run) {
  emulator::Session session;
  session.schedule = {
      static_cast<emulator::Asynchrony>(
          arguments.choice("asynchrony", {"eager", "lazy", "random"})),
      static_cast<emulator::Order>(arguments.choice("order", {"forward", "reverse", "shuffled"})),
      static_cast<emulator::Rounding>(arguments.choice("rounding", {"nearest", "zero"})),
      static_cast<uint64_t>(arguments.integer("seed", 0))};
  const std::string& plant = arguments.text("plant");
  if (!plant.empty()) {
    session.plant(planted(plant));
    session.checking_tensors = true;  // a faulty index may lead anywhere
  }
  run();
  if (!arguments.flag("sites")) return;
  for (const auto& site : session.report().sites) {
    for (const auto fault : site.possible) {
      std::printf("%s:%d:%s:%s\n", site.file.c_str(), site.line, site.instruction.c_str(),
                  emulator::name_of(fault));
    }
  }
}

#else

void check(int error, const char* what) {
  if (error == 0) return;
  throw std::runtime_error(std::string(what) + ": " +
                           cudaGetErrorString(static_cast<cudaError_t>(error)));
}

std::shared_ptr<void> allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return {memory, cudaFree};
}

void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}

int device_sm() {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDevice");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "cudaDevice");
  return 10 * major + minor;
}

std::vector<driver::Option> device_options() { return {}; }

void with_device(const Arguments&, const std::function<void()>& run) { run(); }

#endif

std::vector<uint32_t> read_words(const std::filesystem::path& path) {
  std::vector<uint32_t> words(std::filesystem::file_size(path) / sizeof(uint32_t));
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(words.size() * sizeof(uint32_t));
  if (!file.read(reinterpret_cast<char*>(words.data()), bytes)) {
    throw std::runtime_error(path.string() + " cannot be read");
  }
  return words;
}

void write_words(const std::filesystem::path& path, const std::vector<uint32_t>& words) {
  std::ofstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(words.size() * sizeof(uint32_t));
  if (!file.write(reinterpret_cast<const char*>(words.data()), bytes).flush()) {
    throw std::runtime_error(path.string() + " cannot be written");
  }
}

// All cases of one instruction, in one launch.
std::vector<uint32_t> run(const Instruction& instruction, const std::vector<uint32_t>& input) {
  if (input.empty() || input.size() % instruction.input_words != 0) {
    throw UsageError(std::string(instruction.name) + ": " + std::to_string(input.size()) +
                     " words; a multiple of " + std::to_string(instruction.input_words) +
                     " is accepted");
  }
  const auto cases = static_cast<int>(input.size() / instruction.input_words);
  std::vector<uint32_t> output(static_cast<size_t>(cases) * instruction.output_words);
  const size_t input_bytes = input.size() * sizeof(uint32_t);
  const size_t output_bytes = output.size() * sizeof(uint32_t);
  const auto device_input = allocate(input_bytes);
  const auto device_output = allocate(output_bytes);
  copy(device_input.get(), input.data(), input_bytes);
  copy(device_output.get(), output.data(), output_bytes);  // zeros
  const int error = instruction.launch(cases, static_cast<const uint32_t*>(device_input.get()),
                                       static_cast<uint32_t*>(device_output.get()));
  check(error, instruction.name);
  copy(output.data(), device_output.get(), output_bytes);  // waits for the kernel
  return output;
}

void run_folder(const std::filesystem::path& folder) {
  int found = 0;
  for (const Instruction& instruction : instructions()) {
    const auto input = folder / (std::string(instruction.name) + ".in");
    if (!std::filesystem::exists(input)) continue;
    ++found;
    if (!instruction.runs_on(device_sm())) continue;
    write_words(folder / (std::string(instruction.name) + ".out"),
                run(instruction, read_words(input)));
  }
  if (found == 0) {
    throw UsageError("--folder " + folder.string() + " holds no <name>.in; --list has the names");
  }
}

int main(int count, const char* const* words) {
  std::vector<driver::Option> options = {
      {"list", "", "print the instructions and stop", true},
      {"folder", "", "where <name>.in are and <name>.out go"},
      {"help", "", "print this and stop", true},
  };
  for (const driver::Option& option : device_options()) options.push_back(option);
  Arguments arguments(options);
  try {
    arguments.parse(count - 1, words + 1);
    if (arguments.flag("help")) {
      std::printf("Runs each PTX instruction of csrc/ptx over given words.\n%s",
                  arguments.help().c_str());
    } else if (arguments.flag("list")) {
      for (const Instruction& i : instructions()) {
        std::printf("%s %d %d %d\n", i.name, i.input_words, i.output_words, i.oldest_sm);
      }
    } else if (arguments.text("folder").empty()) {
      throw UsageError("give --folder or --list");
    } else {
      with_device(arguments, [&] { run_folder(arguments.text("folder")); });
    }
  } catch (const UsageError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace resnet_fused::conformance

int main(int count, char** words) { return resnet_fused::conformance::main(count, words); }
