// Gathers the lanes' accesses into warp requests and counts what they cost.
#pragma once

#include <cstdint>
#include <vector>

#include "faults.h"
#include "thread.h"

namespace resnet_fused::emulator {

enum class Space : uint8_t { kSharedLoad, kSharedStore, kGlobalLoad, kGlobalStore };

// How many wavefronts a phase of accesses to shared memory takes: the most distinct words that any
// bank has to serve.
int wavefronts(const uint64_t* addresses, int count, uint32_t bytes);

// The open requests of one warp. The n-th access of a lane at a site, since the whole warp last
// met, belongs to the warp's n-th request there.
class WarpRequests {
 public:
  void add(SiteRecord& record, Space space, int lane, uint64_t address, uint32_t bytes);
  // The whole warp has met, or the block ends: no open request can gain a lane.
  void flush();
  // Before another session, whose records have other addresses.
  void forget();

 private:
  struct Request {
    uint32_t lanes;
    uint32_t bytes;
    uint64_t address[kWarpSize];
  };
  struct Stream {  // of one site and space
    SiteRecord* record;
    Space space;
    uint32_t next[kWarpSize];
    std::vector<Request> requests;
  };
  static void count(const Request& request, Space space, Counters& counters);

  std::vector<uint16_t> stream_of_;  // [4 site + space] -> index + 1
  std::vector<Stream> streams_;
  std::vector<uint16_t> open_;
};

}  // namespace resnet_fused::emulator
