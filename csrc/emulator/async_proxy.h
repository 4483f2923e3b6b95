// Shared memory as the async proxy sees it: what TMA and wgmma read.
//
// The threads' own loads and stores go through another path, the generic proxy. What a thread has
// written is seen by asynchronous instructions once that thread has executed fence.proxy.async, and
// only by those whose issuers it is ordered before (PTX ISA, Memory Consistency Model, Proxies, and
// Asynchronous Operations). Reads of anything else are errors that name both lines; a session that
// does not check proxies gives old bytes instead, as the hardware may.
#pragma once

#include <cstdint>
#include <vector>

#include "effects.h"
#include "errors.h"
#include "shared_memory.h"

namespace resnet_fused::emulator {

struct Block;

// fence.proxy.async of the running thread: publishes what it has written so far, nobody else's.
void proxy_fence(Site site);

// A run of shared memory; both are multiples of 16.
struct AsyncPiece {
  uint32_t address;
  uint32_t bytes;
};

// A read of a block's shared memory in progress; a handle, to be copied freely.
class AsyncRead {
 public:
  AsyncRead() = default;

  uint32_t bytes() const;
  // Copies the pieces' bytes, one after another, as the async proxy sees them at this moment: at
  // any time from the issue to waited(), for example in an `effect`.
  void values(uint8_t* to) const;
  // The running thread has waited for the read. The first one to do so ends it; a later writer of
  // the bytes must be ordered behind one of those who have waited. A read must not be left without.
  void waited() const;

 private:
  friend AsyncRead async_read(Site, const char*, Issuers, std::vector<AsyncPiece>);
  Block* block_ = nullptr;
  Issuers issuers_ = {0, 0};
  std::vector<AsyncPiece> pieces_;
  uint32_t number_ = 0;
};

// Begins a read of the running block's shared memory. Checks bounds and alignment, that each byte
// has been written and has landed, that its writer has published it, and that this is ordered
// before every issuer. Until somebody has waited for the read, and before a writer is ordered
// behind that wait, a write to the pieces is an error. `issuers`: the threads of the block that
// issue it together ({thread, 1} for TMA, {first of the warpgroup, 128} for wgmma); reads of the
// same issuers end in the order in which they began.
AsyncRead async_read(Site site, const char* instruction, Issuers issuers,
                     std::vector<AsyncPiece> pieces);

}  // namespace resnet_fused::emulator
