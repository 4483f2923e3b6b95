// What a run did to memory, counted as the hardware would: by warp requests.
//
// A warp's request is one execution of one load, store or copy by all lanes that take part. Shared
// memory serves it in wavefronts: 32 banks of 4 bytes; lanes of one phase that want different words
// of one bank take one wavefront each. A phase is the whole warp for accesses up to 4 bytes, half
// of it for 8 and a quarter for 16 (ldmatrix: eight rows). Global memory moves sectors of 32 bytes
// in lines of 128.
#pragma once

#include <cstdint>

namespace resnet_fused::emulator {

struct Counters {
  uint64_t shared_load_requests = 0;
  uint64_t shared_store_requests = 0;
  uint64_t shared_phases = 0;      // the wavefronts that the same accesses need without conflicts
  uint64_t shared_wavefronts = 0;  // what they take
  uint64_t shared_bytes = 0;

  uint64_t global_load_requests = 0;
  uint64_t global_load_sectors = 0;
  uint64_t global_load_lines = 0;
  uint64_t global_load_bytes_asked = 0;
  uint64_t global_store_requests = 0;
  uint64_t global_store_sectors = 0;
  uint64_t global_store_lines = 0;
  uint64_t global_store_bytes_asked = 0;
  uint64_t global_atomics = 0;  // by thread: they are served one at a time

  uint64_t bank_conflicts() const { return shared_wavefronts - shared_phases; }
  Counters& operator+=(const Counters& other);
};

}  // namespace resnet_fused::emulator
