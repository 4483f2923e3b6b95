#include "../launch/ceilings.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "../device/ceilings.h"
#include "conv.h"

namespace resnet_fused::driver {
namespace {

constexpr int64_t kBoxWords = kCeilingBoxBytes / 4;
constexpr const char* kUnits[] = {"bytes a cycle and multiprocessor",
                                  "products a cycle and multiprocessor", "cycles", "microseconds"};

// How much is done: little where nothing is timed, for the emulator and for sanitizers.
struct Amount {
  bool whole;
  RfGpu gpu;

  int32_t blocks(const RfCeiling& ceiling) const {
    constexpr int32_t kFew = 4;
    return whole ? rf_ceiling_blocks(&ceiling, &gpu) : kFew;
  }
  // Of the set; where little is done more than a ring's stages, and no multiple of them.
  int64_t boxes(const RfCeiling& ceiling) const {
    return whole ? ceiling.set_bytes / kCeilingBoxBytes : 21;
  }
  int32_t count(const RfCeiling& ceiling, int32_t apart) const {
    constexpr int32_t kBoxes = 1024, kSteps = 2048, kMeetings = 512;
    switch (ceiling.kind) {
      case RF_CEILING_READS:  // what lies in memory is read once
        if (!whole) return 20;
        return ceiling.set_bytes > (int64_t{1} << 28) ? apart / kLoadsAtOnce * kLoadsAtOnce
                                                      : kBoxes;
      case RF_CEILING_PRODUCTS:
        return whole ? kSteps : 5;
      default:
        return whole ? kMeetings : 5;
    }
  }
};

// A set of random words, and for each piece of 16 bytes the number that sums are made of.
class Set {
 public:
  Set(int64_t boxes, Random& random) : device_(static_cast<size_t>(boxes * kCeilingBoxBytes)) {
    std::vector<uint32_t> words(static_cast<size_t>(boxes * kBoxWords));
    for (size_t i = 0; i < words.size(); i += 2) {
      const uint64_t bits = random.bits();
      std::memcpy(&words[i], &bits, 8);
    }
    device_.copy_from(words.data());
    pieces_.resize(words.size() / 4);
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const uint32_t* w = &words[4 * i];
      pieces_[i] = 27 * w[0] + 9 * w[1] + 3 * w[2] + w[3];
    }
  }

  const void* data() const { return device_.data(); }

  // The sums of `threads` threads that share the pieces of `count` boxes of the first `boxes`, from
  // one on.
  std::vector<uint32_t> sums(int64_t first, int32_t count, int64_t boxes, size_t threads) const {
    std::vector<uint32_t> all(kCeilingPieces), shared(threads);
    for (int32_t i = 0; i < count; ++i) {
      const uint32_t* box = &pieces_[static_cast<size_t>((first + i) % boxes * kCeilingPieces)];
      for (size_t piece = 0; piece < all.size(); ++piece) all[piece] += box[piece];
    }
    for (size_t piece = 0; piece < all.size(); ++piece) shared[piece % threads] += all[piece];
    return shared;
  }

 private:
  Buffer device_;
  std::vector<uint32_t> pieces_;
};

class Ceilings {
 public:
  Ceilings(const std::vector<RfCeiling>& asked, const Amount& amount, Common& common)
      : asked_(asked),
        amount_(amount),
        common_(common),
        set_(most_boxes(asked, amount), common.random),
        operands_(kOperandRows * kStepElements, common.random, Values::kIntegers) {}

  bool run(Json& json) {
    Json all;
    Verdict total;
    for (const RfCeiling& ceiling : asked_) {
      Json one;
      const Verdict verdict = measure(ceiling, one);
      one.add("elements", verdict.elements);
      one.add("wrong", verdict.wrong);
      total.elements += verdict.elements;
      total.wrong += verdict.wrong;
      all.add(ceiling.name, one);
    }
    json.add("rates", all);
    return report(total, json);
  }

 private:
  static int64_t most_boxes(const std::vector<RfCeiling>& asked, const Amount& amount) {
    int64_t most = 1;
    for (const RfCeiling& ceiling : asked) most = std::max(most, amount.boxes(ceiling));
    return most;
  }

  Verdict measure(const RfCeiling& ceiling, Json& json) {
    json.add("unit", kUnits[ceiling.kind]);
    json.add("predicted", ceiling.predicted);
    if (ceiling.constant[0] != 0) json.add("constant", ceiling.constant);
    if (ceiling.kind == RF_CEILING_LAUNCHES) return launches(ceiling, json);
    RfCeilingRun run{};
    run.blocks = amount_.blocks(ceiling);
    run.set = set_.data();
    run.boxes = std::max<int64_t>(1, amount_.boxes(ceiling));
    run.operands = operands_.device.data();
    run.count = amount_.count(ceiling, rf_ceiling_apart(&ceiling, &run));
    const auto consumers = static_cast<size_t>(std::max(1, ceiling.consumers));
    std::vector<uint32_t> out(static_cast<size_t>(rf_ceiling_out_bytes(&ceiling, run.blocks)) / 4,
                              0xFFFFFFFF);  // as floats, NaN
    Buffer out_at(out.size() * 4);
    out_at.copy_from(out.data());
    std::vector<int64_t> cycles(static_cast<size_t>(run.blocks) * consumers, -1);
    Buffer cycles_at(cycles.size() * 8);
    cycles_at.copy_from(cycles.data());
    std::vector<uint32_t> counters(4);
    Buffer counters_at(16);
    counters_at.copy_from(counters.data());
    const Buffer words(static_cast<size_t>(run.blocks) * 8);
    run.out = out_at.data();
    run.cycles = static_cast<int64_t*>(cycles_at.data());
    run.counters = static_cast<uint32_t*>(counters_at.data());
    run.words = static_cast<uint32_t*>(words.data());
    const auto launch = [&] { check(rf_ceiling_cuda(&ceiling, &run, nullptr), ceiling.name); };
    run.judged = 1;
    launch();
    out_at.copy_to(out.data());
    counters_at.copy_to(counters.data());
    cycles_at.copy_to(cycles.data());
    Verdict verdict = judge(ceiling, run, out);
    for (const uint32_t one : counters) verdict.equal(one, 0);
    // Of every block, and where there is no time 0.
    for (const int64_t one : cycles) verdict.equal(one < 0, 0);
    run.judged = 0;
    std::vector<double> times = time_calls(common_.repeats, launch, true);
    if (times.empty()) return verdict;
    cycles_at.copy_to(cycles.data());
    rate(ceiling, run, cycles, std::move(times), json);
    return verdict;
  }

  // By the slowest block's cycles, and by all blocks' mean.
  void rate(const RfCeiling& ceiling, const RfCeilingRun& run, const std::vector<int64_t>& cycles,
            std::vector<double> times, Json& json) const {
    const auto longest = static_cast<double>(*std::max_element(cycles.begin(), cycles.end()));
    const double mean =
        std::accumulate(cycles.begin(), cycles.end(), 0.0) / static_cast<double>(cycles.size());
    double work = 1;
    if (ceiling.kind == RF_CEILING_READS) work = double{kCeilingBoxBytes} * run.count;
    if (ceiling.kind == RF_CEILING_PRODUCTS) {
      work =
          double{kWarpgroupRows} * ceiling.columns * kStepElements * ceiling.consumers * run.count;
    }
    if (ceiling.kind == RF_CEILING_MEETINGS) {
      json.add("rate", longest / run.count);
      json.add("mean_rate", mean / run.count);
    } else {
      json.add("rate", work / longest);
      json.add("mean_rate", work / mean);
    }
    if (ceiling.traffic != 0) {
      json.add("traffic", static_cast<double>(ceiling.traffic) * run.count / longest);
    }
    json.add("blocks", run.blocks);
    json.add("cycles", longest);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    const double milliseconds = times[times.size() / 2];
    json.add("milliseconds", milliseconds);
    json.add("sm_mhz", longest / milliseconds / 1e3);
  }

  Verdict judge(const RfCeiling& ceiling, const RfCeilingRun& run,
                const std::vector<uint32_t>& out) const {
    Verdict verdict;
    switch (ceiling.kind) {
      case RF_CEILING_READS:
        judge_reads(ceiling, run, out, verdict);
        break;
      case RF_CEILING_PRODUCTS:
        judge_products(ceiling, run, out, verdict);
        break;
      default:
        for (const uint32_t found : out) verdict.equal(found, run.count);
        break;
    }
    return verdict;
  }

  void judge_reads(const RfCeiling& ceiling, const RfCeilingRun& run,
                   const std::vector<uint32_t>& out, Verdict& verdict) const {
    const size_t threads = out.size() / static_cast<size_t>(run.blocks);
    const int32_t together = ceiling.together == 0 ? run.blocks : ceiling.together;
    const int64_t apart = rf_ceiling_apart(&ceiling, &run);
    std::vector<uint32_t> expected;
    for (int32_t block = 0; block < run.blocks; ++block) {
      if (block % together == 0) {
        const int64_t first = block / together * apart % run.boxes;
        expected = set_.sums(first, run.count, run.boxes, threads);
      }
      const uint32_t* found = &out[static_cast<size_t>(block) * threads];
      for (size_t thread = 0; thread < threads; ++thread) {
        verdict.equal(found[thread], expected[thread]);
      }
    }
  }

  // Exact: integers, of which the sums stay below 2^24.
  void judge_products(const RfCeiling& ceiling, const RfCeilingRun& run,
                      const std::vector<uint32_t>& out, Verdict& verdict) const {
    const int64_t columns = ceiling.columns;
    constexpr int64_t kLeft = kConsumers * kWarpgroupRows;
    std::vector<double> expected(static_cast<size_t>(ceiling.consumers * kWarpgroupRows * columns));
    for (size_t place = 0; place < expected.size(); ++place) {
      const int64_t row = static_cast<int64_t>(place) / columns;
      const int64_t column = kLeft + static_cast<int64_t>(place) % columns;
      for (int64_t k = 0; k < kStepElements; ++k) {
        expected[place] += operands_.at(row * kStepElements + k) *
                           operands_.at(column * kStepElements + k) * run.count;
      }
    }
    const int64_t each = columns / 2;  // of a thread
    for (size_t place = 0; place < out.size(); ++place) {
      const auto index = static_cast<int64_t>(place) % each;
      const auto thread = static_cast<int64_t>(place) / each % kWarpgroupThreads;
      const int64_t consumer =
          static_cast<int64_t>(place) / each / kWarpgroupThreads % ceiling.consumers;
      const int64_t row =
          consumer * kWarpgroupRows + thread / 32 * 16 + thread % 32 / 4 + 8 * (index % 4 / 2);
      const int64_t column = index / 4 * 8 + thread % 4 * 2 + index % 2;
      float found;
      std::memcpy(&found, &out[place], 4);
      verdict.equal(found, expected[static_cast<size_t>(row * columns + column)]);
    }
  }

  // A chain of kernels, that count; then in a graph, its length less that of one.
  Verdict launches(const RfCeiling& ceiling, Json& json) {
    constexpr int32_t kChain = 65;
    const int32_t blocks = amount_.whole ? amount_.gpu.multiprocessors : 4;
    const int32_t chain = amount_.whole ? kChain : 3;
    uint32_t count = 0;
    Buffer count_at(4);
    count_at.copy_from(&count);
    auto* const counted = static_cast<uint32_t*>(count_at.data());
    const auto run = [&](int32_t kernels, void* stream) {
      for (int32_t i = 0; i < kernels; ++i) {
        const int32_t follows = i > 0 ? ceiling.early : 0;
        check(rf_ceiling_launch_cuda(follows, blocks, counted, stream), ceiling.name);
      }
    };
    run(chain, nullptr);
    count_at.copy_to(&count);
    Verdict verdict;
    verdict.equal(count, chain);
    const auto median = [&](int32_t kernels) {
      std::vector<double> times =
          time_graph(common_.repeats, [&](void* stream) { run(kernels, stream); }, true);
      std::sort(times.begin(), times.end());
      return times.empty() ? 0.0 : times[times.size() / 2];
    };
    if (common_.repeats == 0) return verdict;
    const double many = median(kChain);
    if (many > 0) json.add("rate", 1e3 * (many - median(1)) / (kChain - 1));
    return verdict;
  }

  const std::vector<RfCeiling>& asked_;
  const Amount& amount_;
  Common& common_;
  Set set_;
  Operand<BFloat16> operands_;
};

std::vector<RfCeiling> asked_of(const std::string& begins) {
  std::vector<RfCeiling> asked;
  std::string names;
  RfCeiling ceiling;
  for (int32_t i = 0; rf_ceiling(i, &ceiling) == 0; ++i) {
    if (begins == "all" || std::string(ceiling.name).starts_with(begins)) asked.push_back(ceiling);
    names += (i ? ", " : "") + std::string(ceiling.name);
  }
  if (names.empty()) throw UsageError("ceilings: this build holds no machine code for sm_90a");
  if (asked.empty()) {
    throw UsageError("--ceiling is '" + begins + "'; accepted are all or how one begins of " +
                     names);
  }
  return asked;
}

}  // namespace

bool run_ceilings(const Arguments& arguments, Common& common, Json& json) {
  constexpr int32_t kCapability = 90;
  if (common.dtype != DataType::kBFloat16) {
    throw UsageError("--dtype is '" + arguments.text("dtype") + "'; ceilings measure bfloat16");
  }
  if (common.values != Values::kIntegers) {
    throw UsageError("--data is '" + arguments.text("data") + "'; ceilings are judged on integers");
  }
  const std::vector<RfCeiling> asked = asked_of(arguments.text("ceiling"));
#if defined(RF_EMULATED)
  const bool whole = false;
#else
  const bool whole = common.repeats > 0;
#endif
  const Amount amount{whole, this_gpu()};
  if (amount.gpu.capability != kCapability) {
    throw UsageError("ceilings: the GPU's compute capability is " +
                     std::to_string(amount.gpu.capability) + "; 90 is served");
  }
  json.add("multiprocessors", amount.gpu.multiprocessors);
  return Ceilings(asked, amount, common).run(json);
}

}  // namespace resnet_fused::driver
