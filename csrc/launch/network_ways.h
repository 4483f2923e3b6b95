// The ways in which a network's kernel can merge the parts of a tile, and what each makes of a
// layer. Inside of this room.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "network.h"

namespace resnet_fused {

struct NetworkTile {
  int64_t pixels;
  int64_t channels;
  int64_t stages;
  int64_t stage_bytes;
};

struct NetworkWay {
  int32_t cluster;       // blocks; 1: parts meet in global memory
  int64_t shared_bytes;  // of a block
  int64_t beside;        // blocks that are to share a multiprocessor
  std::vector<NetworkTile> tiles;
};

// Through memory first, then by clusters, the larger ones first.
const std::vector<NetworkWay>& network_ways();

// Blocks of a way that a GPU has room for at once.
int64_t most_blocks(const NetworkWay& way, const RfGpu& gpu);

// What keeps a network from a way, with a wish of so many blocks; empty if nothing does.
std::string way_fault(const NetworkWay& way, const RfNetwork& network, const RfGpu& gpu,
                      int32_t blocks);

// How a layer is computed.
struct NetworkCut {
  int32_t tile;    // in the way's list
  int32_t splits;  // parts of each tile's reduction
  int64_t tiles;
  double cycles;  // predicted
};

// The tile and the parts that take the least predicted time, of those that the network leaves open.
NetworkCut cut_of(const NetworkWay& way, const RfNetwork& network, int32_t index, int32_t blocks);

// Predicted cycles from the last block's arrival at a meeting until the first pixels of the next
// phase have come.
double phase_cycles();

}  // namespace resnet_fused
