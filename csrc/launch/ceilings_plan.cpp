// What is measured, and what the plans' rates say of it ahead of any measurement.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "ceilings_arguments.h"
#include "conv_plan.h"
#include "tma_request.h"

namespace resnet_fused {
namespace {

constexpr int64_t kMega = int64_t{1} << 20;
constexpr int64_t kCached = 16 * kMega;   // what L2 holds, however it is divided
constexpr int64_t kBeyond = 512 * kMega;  // what it can't hold

struct Entry {
  std::string name;
  RfCeiling ceiling;  // but for the name
};

// together: neighbouring blocks; 0: all.
Entry reads(const std::string& name, RfCeilingWay way, int32_t together, int32_t sharing,
            int64_t bytes) {
  const bool memory = bytes == kBeyond;
  RfCeiling made{};
  made.kind = RF_CEILING_READS;
  made.way = way;
  made.together = together;
  made.sharing = sharing;
  made.set_bytes = bytes;
  made.constant = memory ? "kMemoryBytes" : together == 0 ? "kSameLines" : "kCacheBytes";
  const double rate = memory ? kMemoryBytes : together == 0 ? kSameLines : kCacheBytes;
  // What a cluster shares is asked for once and comes to each, through shared memory's width.
  made.predicted = std::min(rate * sharing, kSharedBytes);
  return {name, made};
}

// Cycles of a step of 64 by the plans' rates: at wgmma's, or as shared memory gives operands and
// takes traffic, or as L2 brings that.
Entry products(int32_t columns, bool registers, int32_t consumers, int32_t traffic) {
  RfCeiling made{};
  made.kind = RF_CEILING_PRODUCTS;
  made.sharing = 1;
  made.together = 0;
  made.set_bytes = kCached;
  made.columns = columns;
  made.consumers = consumers;
  made.left_in_registers = registers;
  made.traffic = traffic;
  const double step = double{kWarpgroupRows} * columns * kStepElements * consumers;
  const double rows = consumers * (columns + (registers ? 0 : kWarpgroupRows));
  const std::array<double, 3> cycles = {
      step / kWarpgroupUnit, (rows * kStepRowBytes + traffic) / kSharedBytes, traffic / kSameLines};
  const char* const names[] = {"kWarpgroupUnit", "kSharedBytes", "kSameLines"};
  const auto longest = std::max_element(cycles.begin(), cycles.end());
  made.constant = names[longest - cycles.begin()];
  made.predicted = step / *longest;
  const std::string beside = traffic == 0 ? "" : "_" + std::to_string(traffic / 1024) + "kb";
  return {"wgmma_n" + std::to_string(columns) + (registers ? "_registers_" : "_shared_") +
              std::to_string(consumers) + "w" + beside,
          made};
}

Entry meetings(const std::string& name, int32_t cluster) {
  RfCeiling made{};
  made.kind = RF_CEILING_MEETINGS;
  made.cluster = cluster;
  made.constant = cluster == 0 ? "kMeeting" : "kClusterMeeting";
  made.predicted = cluster == 0 ? kMeeting : kClusterMeeting;
  return {name, made};
}

// No plan counts with it: what a study of published measurements takes a graph's kernels to cost.
Entry launches(const std::string& name, bool early, double microseconds) {
  RfCeiling made{};
  made.kind = RF_CEILING_LAUNCHES;
  made.early = early;
  made.constant = "";
  made.predicted = microseconds;
  return {name, made};
}

std::vector<Entry> all_entries() {
  std::vector<Entry> all = {
      reads("l2_own_rows", RF_WAY_ROWS, 1, 1, kCached),
      reads("l2_own_piece", RF_WAY_PIECE, 1, 1, kCached),
      reads("l2_own_loads", RF_WAY_LOADS, 1, 1, kCached),
      reads("l2_pairs_rows", RF_WAY_ROWS, 2, 1, kCached),
      reads("l2_fours_rows", RF_WAY_ROWS, 4, 1, kCached),
      reads("l2_same_rows", RF_WAY_ROWS, 0, 1, kCached),
      reads("l2_same_piece", RF_WAY_PIECE, 0, 1, kCached),
      reads("l2_same_loads", RF_WAY_LOADS, 0, 1, kCached),
      reads("l2_cluster2_rows", RF_WAY_ROWS, 2, 2, kCached),
      reads("l2_cluster4_rows", RF_WAY_ROWS, 4, 4, kCached),
      reads("l2_same_cluster2_rows", RF_WAY_ROWS, 0, 2, kCached),
      reads("l2_same_cluster4_rows", RF_WAY_ROWS, 0, 4, kCached),
  };
  for (const int64_t mega : {8, 32, 40, 48, 64, 80}) {
    all.push_back(
        reads("set" + std::to_string(mega) + "mb_own_rows", RF_WAY_ROWS, 1, 1, mega * kMega));
  }
  all.push_back(reads("memory_rows", RF_WAY_ROWS, 1, 1, kBeyond));
  all.push_back(reads("memory_loads", RF_WAY_LOADS, 1, 1, kBeyond));
  constexpr int32_t kLittle = 2 * kTrafficBytes;
  for (const int32_t columns : {64, 128, 256}) {
    for (const bool registers : {false, true}) {
      for (const int32_t consumers : {1, 2}) {
        all.push_back(products(columns, registers, consumers, 0));
      }
      // What the tile of a convolution brings in a step, and a part of it.
      const int32_t tile = (kConsumers * kWarpgroupRows + columns) * kStepRowBytes;
      all.push_back(products(columns, registers, kConsumers, kLittle));
      all.push_back(products(columns, registers, kConsumers, tile));
    }
  }
  all.push_back(meetings("grid_meeting", 0));
  all.push_back(meetings("cluster2_meeting", 2));
  all.push_back(meetings("cluster4_meeting", 4));
  all.push_back(launches("graph_kernel", false, 1.3));
  all.push_back(launches("graph_kernel_early", true, 0.7));
  return all;
}

const std::vector<Entry>& entries() {
  static const std::vector<Entry> all = [] {
    std::vector<Entry> made = all_entries();
    for (Entry& entry : made) entry.ceiling.name = entry.name.c_str();
    return made;
  }();
  return all;
}

}  // namespace
}  // namespace resnet_fused

extern "C" {

int32_t rf_ceilings(void) {
  using namespace resnet_fused;
  return kBuiltForSm90a ? static_cast<int32_t>(entries().size()) : 0;
}

int32_t rf_ceiling(int32_t index, RfCeiling* ceiling) {
  if (index < 0 || index >= rf_ceilings()) return 1;
  *ceiling = resnet_fused::entries()[static_cast<size_t>(index)].ceiling;
  return 0;
}

int64_t rf_ceiling_out_bytes(const RfCeiling* ceiling, int32_t blocks) {
  using namespace resnet_fused;
  const int64_t each = blocks;
  switch (ceiling->kind) {
    case RF_CEILING_READS:
      return each * (ceiling->way == RF_WAY_LOADS ? kLoadThreads : kReaderThreads) * 4;
    case RF_CEILING_PRODUCTS:
      return each * ceiling->consumers * kWarpgroupRows * ceiling->columns * 4;
    case RF_CEILING_MEETINGS:
      return each * 4;
    default:
      return 0;
  }
}

int32_t rf_ceiling_blocks(const RfCeiling* ceiling, const RfGpu* gpu) {
  const int32_t cluster = std::max({ceiling->sharing, ceiling->cluster, 1});
  const auto blocks = static_cast<int32_t>(resnet_fused::cluster_multiprocessors(cluster, *gpu));
  return blocks - blocks % std::max(cluster, ceiling->together);
}

int32_t rf_ceiling_apart(const RfCeiling* ceiling, const RfCeilingRun* run) {
  return resnet_fused::apart_of(*ceiling, *run);
}

int rf_ceiling_cuda(const RfCeiling* ceiling, const RfCeilingRun* run, void* stream) {
  using namespace resnet_fused;
  switch (ceiling->kind) {
    case RF_CEILING_READS:
      return ceiling->way == RF_WAY_LOADS ? launch_ceiling_loads(*ceiling, *run, stream)
                                          : launch_ceiling_reads(*ceiling, *run, stream);
    case RF_CEILING_PRODUCTS:
      return launch_ceiling_products(*ceiling, *run, stream);
    case RF_CEILING_MEETINGS:
      return launch_ceiling_meetings(*ceiling, *run, stream);
    default:
      return rf_ceiling_launch_cuda(0, run->blocks, run->counters, stream);
  }
}

}  // extern "C"
