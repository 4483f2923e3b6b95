// Where what conv_bn_stats' kernels for sm_90a leave of their walks lies in the workspace. Inside
// of this room.
#pragma once

#include <cstdint>

#include "../device/stats_geometry.h"
#include "../device/tile_chunks.h"
#include "../device/warpgroup_shape.h"
#include "conv_bn_stats.h"
#include "conv_strides.h"
#include "stats_norm.h"

namespace resnet_fused {

// In bytes, of so many parts of so many filters, which meet in columns of 64 of a group.
struct StatsParts {
  int64_t ended;    // a counter, the last of all
  int64_t columns;  // that count themselves there
  int64_t moments;  // behind the counters
  int64_t merged;
  int64_t bytes;
};
inline StatsParts stats_parts(int32_t parts, int64_t filters, int64_t groups) {
  const int64_t chunks = TileChunks{parts}.count();
  const int64_t columns = divide_up(filters / groups, kWarpgroupRows) * groups;
  const auto aligned = [](int64_t bytes) {
    return divide_up(bytes, kWorkspaceAlignment) * kWorkspaceAlignment;
  };
  StatsParts made{};
  const int64_t counters = columns * (chunks + 1);
  made.ended = counters * int64_t{sizeof(uint32_t)};
  made.columns = columns;
  made.moments = arrival_bytes(counters + 1);
  made.merged = made.moments + aligned(parts * filters * int64_t{sizeof(Moments)});
  made.bytes = made.merged + (chunks > 1 ? chunks * filters * int64_t{sizeof(WideMoments)} : 0);
  return made;
}

// Tells a kernel of them. Arguments: ConvStatsTmaArguments or ConvStatsWindowArguments.
template <class Arguments>
void place_parts(const StatsParts& parts, const RfConvBnStats& problem, void* workspace,
                 Arguments* made) {
  made->arrivals = static_cast<uint32_t*>(workspace);
  made->moments = static_cast<Moments*>(moved(workspace, parts.moments));
  made->merged = static_cast<WideMoments*>(moved(workspace, parts.merged));
  made->stats = static_cast<float*>(problem.stats);
  made->cleared_bytes = parts.moments;
  made->finalized = stats_norm(problem, moved(workspace, parts.ended), parts.columns);
}

}  // namespace resnet_fused
