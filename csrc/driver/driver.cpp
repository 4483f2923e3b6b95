// resnet_fused_driver: one op on one shape, without a framework. It fills the operands from a seed,
// runs the kernel, holds the result to a float64 loop, times it where there is a GPU and prints one
// JSON object. A sanitizer or a profiler runs it; so does the emulator, from the same source.
//
// Exit status: 0 right, 1 wrong numbers, 2 a command line that is not accepted, 3 the launch or the
// kernel failed, or there is no GPU, 66 a sanitizer's finding.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <optional>

#include "op.h"

#if defined(RF_EMULATED)
#include "../emulator/session.h"
#endif

namespace resnet_fused::driver {
namespace {

enum Exit { kRight = 0, kWrong = 1, kUsage = 2, kFailed = 3 };

struct Op {
  const char* name;
  bool (*run)(const Arguments& arguments, Common& common, Json& json);
  bool early = true;       // takes an RfFlow
  bool quantises = false;  // writes e4m3 if asked to
};
constexpr Op kOps[] = {
    {"conv_bn_act", run_conv_bn_act},
    {"conv_bn_act_fp8", run_conv_bn_act_fp8, true, true},
    {"conv_dgrad", run_conv_dgrad, false},
    {"conv_wgrad", run_conv_wgrad, false},
    {"bn_act", run_bn_act},
    {"conv_chain", run_conv_chain},
    {"conv_chain_fp8", run_conv_chain_fp8, true, true},
    {"stem", run_stem, true, true},
    {"head", run_head},
    {"network", run_network, false},
    {"conv_bn_stats", run_conv_bn_stats, false},
    {"bn_add_act_conv_stats", run_bn_add_act_conv_stats, false},
    {"conv_bn_dgrad", run_conv_bn_dgrad, false},
    {"conv_bn_dgrad_end", run_conv_bn_dgrad_end, false},
    {"conv_bn_wgrad", run_conv_bn_wgrad, false},
    {"conv_bn_grad1x1", run_conv_bn_grad1x1, false},
    {"conv_bn_grad1x1_end", run_conv_bn_grad1x1_end, false},
    {"bn_add_act", run_bn_add_act, false},
    {"bn_add_act_backward", run_bn_add_act_backward, false},
    {"bn_backward_apply", run_bn_backward_apply, false},
    {"bn_act_pool", run_bn_act_pool, false},
    {"bn_act_pool_backward", run_bn_act_pool_backward, false},
    {"bn_finalize", run_bn_finalize, false},
    {"bn_update_stats", run_bn_update_stats, false},
    {"bn_backward_finalize", run_bn_backward_finalize, false},
    {"ceilings", run_ceilings, false},
};

// Of all ops, or of those that have a property.
std::vector<const char*> op_names(bool Op::* property = nullptr) {
  std::vector<const char*> names;
  for (const Op& op : kOps) {
    if (property == nullptr || op.*property) names.push_back(op.name);
  }
  return names;
}

std::string listed(const std::vector<const char*>& names) {
  std::string list;
  for (const char* name : names) list += (list.empty() ? "" : ", ") + std::string(name);
  return list;
}

std::vector<Option> options() {
  std::vector<Option> all = {
      {"help", "", "this text", true},
      {"op", kOps[0].name, "one of " + listed(op_names())},
      {"dtype", "bfloat16", "float32, float64, float16 or bfloat16"},
      {"data", "integers", "integers (in [-4, 4], checked bit for bit) or normals (a bound)"},
      {"seed", "1", "of the operands"},
      {"early", "", "begin before the launch ahead has ended; " + listed(op_names(&Op::early)),
       true},
      {"repeats", "0", "timed calls, each with a cold L2; only on a GPU"},
      {"n", "2", "images"},
      {"c", "32", "input channels"},
      {"h", "14", "input height"},
      {"w", "14", "input width"},
      {"k", "32", "output channels"},
      {"r", "3", "filter or window height"},
      {"s", "3", "filter or window width"},
      {"stride", "1", "of filter or window, in both directions"},
      {"padding", "1", "zeros on each side"},
      {"dilation", "1", "distance of two taps"},
      {"groups", "1", "of channels"},
      {"layout", "nhwc", "nhwc or nchw, of all activations"},
      {"configuration", "auto", "auto, or a tile's name"},
      {"splits", "0", "parts of the reduction; 0 leaves it to the chooser"},
      {"residual", "",
       "with a shortcut; conv_bn_act, conv_bn_act_fp8, bn_act, bn_add_act, conv_bn_dgrad_end, "
       "conv_bn_grad1x1_end",
       true},
      {"normed", "", "x of conv_bn_*, the shortcut of bn_add_act* is behind a BatchNorm", true},
      {"affine", "", "dz is read through BatchNorm's backward; gradients conv_bn_*", true},
      {"addend", "0",
       "the shortcut's gradient is of every so many-th pixel; conv_bn_dgrad*, grad1x1*"},
      {"float-weight", "", "the weights' gradient in float32; conv_bn_wgrad, conv_bn_grad1x1*",
       true},
      {"part", "0", "channels of the shortcut, 0: all; bn_add_act alone"},
      {"total", "", "elements a channel lie on the device; the ops on channels' values", true},
      {"finalize", "", "scale, shift and running statistics, too; conv_bn_stats alone", true},
      {"tracked", "none", "none, int32 or int64: who counts batches; bn_update_stats, --finalize"},
      {"cumulative", "", "average over the batches counted; likewise", true},
      {"frozen", "", "the statistics are constants; bn_backward_finalize alone", true},
      {"quantised", "", "the result in e4m3; " + listed(op_names(&Op::quantises)), true},
      {"next", "32", "channels of next; chains alone, 0: there is none"},
      {"projected", "0", "channels that the shortcut projects; chains alone, 0: a tensor"},
      {"out-stride", "1", "1, or 2 to store the even pixels of out alone; chains alone"},
      {"front", "0", "channels that a 3x3 convolution in front reads; chains alone"},
      {"reverse", "", "walk over the batch from its end; chains alone", true},
      {"depths", "1,1", "blocks of each stage; network alone"},
      {"blocks", "0", "of the launch; 0 leaves them to the plan; network alone"},
      {"pixels", "0", "of each tile; likewise"},
      {"cluster", "0", "blocks of a cluster, 1 for none; likewise"},
      {"ceiling", "all", "all, or how those begin that are measured; ceilings alone"},
      {"act", "relu", "relu or none; of gradients: whether a mask is applied"},
  };
#if defined(RF_EMULATED)
  const Option emulated[] = {
      {"asynchrony", "eager", "eager, lazy or random: when cp.async takes effect"},
      {"order", "forward", "forward, reverse or shuffled: of the threads"},
      {"rounding", "nearest", "nearest or toward_zero: sums of the matrix units"},
      {"schedule-seed", "0", "of random moments and shuffled threads"},
      {"resident-blocks", "1", "blocks that run at once, interleaved"},
      {"fault", "", "FILE:LINE:INSTRUCTION:FAULT, planted at that call"},
      {"sites", "", "list the calls that can be faulty instead of checking", true},
  };
  all.insert(all.end(), std::begin(emulated), std::end(emulated));
#endif
  return all;
}

Common common_of(const Arguments& arguments) {
  const auto early = static_cast<int32_t>(arguments.flag("early"));
  if (early != 0 && !can_begin_early()) {
    throw UsageError("--early: only GPUs of compute capability 9.0 and later begin early");
  }
  Common common{
      static_cast<DataType>(
          arguments.choice("dtype", {"float32", "float64", "float16", "bfloat16"})),
      static_cast<Values>(arguments.choice("data", {"integers", "normals"})),
      Random(static_cast<uint64_t>(arguments.integer("seed", 0))),
      static_cast<int>(arguments.integer("repeats", 0)),
      true,
      {early, early},
  };
#if defined(RF_EMULATED)
  common.toward_zero = arguments.choice("rounding", {"nearest", "toward_zero"}) == 1;
#endif
  return common;
}

#if defined(RF_EMULATED)

emulator::PlantedFault fault_of(const std::string& text) {
  // An instruction's name may hold colons, as ld.shared::cluster does.
  const size_t file = text.find(':'), fault = text.rfind(':');
  const size_t line = file == std::string::npos ? file : text.find(':', file + 1);
  std::vector<std::string> parts(4);
  if (line < fault) {
    parts = {text.substr(0, file), text.substr(file + 1, line - file - 1),
             text.substr(line + 1, fault - line - 1), text.substr(fault + 1)};
  }
  if (parts[1].empty() || parts[1].find_first_not_of("0123456789") != std::string::npos ||
      parts[1].size() > 6) {
    throw UsageError("--fault is '" + text + "'; FILE:LINE:INSTRUCTION:FAULT is accepted");
  }
  try {
    return {parts[0], std::stoi(parts[1]), parts[2], emulator::fault_named(parts[3])};
  } catch (const std::invalid_argument& error) {
    throw UsageError("--fault: " + std::string(error.what()));
  }
}

void configure(const Arguments& arguments, emulator::Session& session) {
  session.schedule = {
      static_cast<emulator::Asynchrony>(
          arguments.choice("asynchrony", {"eager", "lazy", "random"})),
      static_cast<emulator::Order>(arguments.choice("order", {"forward", "reverse", "shuffled"})),
      static_cast<emulator::Rounding>(arguments.choice("rounding", {"nearest", "toward_zero"})),
      static_cast<uint64_t>(arguments.integer("schedule-seed", 0))};
  session.resident_blocks = static_cast<uint32_t>(std::min<int64_t>(
      arguments.integer("resident-blocks", 1), std::numeric_limits<uint32_t>::max()));
  if (!arguments.text("fault").empty()) session.plant(fault_of(arguments.text("fault")));
}

// One line for each call and each fault that can be planted there, as --fault takes it.
void print_sites(const emulator::Report& report) {
  for (const auto& site : report.sites) {
    const std::string file = std::filesystem::path(site.file).lexically_normal();
    for (const emulator::Fault fault : site.possible) {
      std::printf("%s:%d:%s:%s\n", file.c_str(), site.line, site.instruction.c_str(),
                  emulator::name_of(fault));
    }
  }
}

#endif

int run(const Arguments& arguments) {
  Common common = common_of(arguments);
#if defined(RF_EMULATED)
  emulator::Session session;
  configure(arguments, session);
#endif
  const Op& op = kOps[arguments.choice("op", op_names())];
  if (arguments.flag("early") && !op.early) {
    throw UsageError("--early: " + std::string(op.name) + " does not begin early; " +
                     listed(op_names(&Op::early)) + " do");
  }
  if (arguments.flag("quantised") && !op.quantises) {
    throw UsageError("--quantised: " + std::string(op.name) + " writes no e4m3; " +
                     listed(op_names(&Op::quantises)) + " do");
  }
  Json json;
  json.add("op", op.name);
  json.add("device", device_name());
  json.add("dtype", arguments.text("dtype"));
  if (arguments.flag("quantised")) json.add("out", "float8_e4m3fn");
  json.add("data", arguments.text("data"));
  const bool right = op.run(arguments, common, json);
#if defined(RF_EMULATED)
  if (arguments.flag("sites")) {
    print_sites(session.report());
    return kRight;
  }
#endif
  std::printf("%s\n", json.text().c_str());
  return right ? kRight : kWrong;
}

}  // namespace

void report_median(const char* name, std::vector<double> times, Json& json) {
  if (times.empty()) return;
  std::sort(times.begin(), times.end());
  json.add(name, times[times.size() / 2]);
}

void report_times(std::vector<double> times, Json& json) {
  if (times.empty()) return;
  const auto count = static_cast<int64_t>(times.size());
  report_median("milliseconds", std::move(times), json);
  json.add("repeats", count);
}

}  // namespace resnet_fused::driver

#if defined(__SANITIZE_ADDRESS__)
// What AddressSanitizer ends with by itself is what wrong numbers end with; ThreadSanitizer's 66
// says the same of both.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "exitcode=66";
}
#endif

int main(int count, char** words) {
  using namespace resnet_fused::driver;
  try {
    Arguments arguments(options());
    arguments.parse(count - 1, words + 1);
    if (arguments.flag("help")) {
      std::printf(
          "Runs one op on one shape and checks it against float64; prints JSON.\n\n"
          "usage: %s [--name value ...]\n\n%s",
          words[0], arguments.help().c_str());
      return kRight;
    }
    return run(arguments);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return kUsage;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return kFailed;
  }
}
