// Faults that a session can plant at one call of one instruction, and the record of every call site
// that a run has reached.
//
// A wrapper asks fault_at() what to do wrong and does it; the kernel holds no trace of it. The
// sites of a clean run, each with the faults that make sense there, are the list of mutations to
// try.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "counters.h"
#include "errors.h"

namespace resnet_fused::emulator {

enum class Fault : uint8_t {
  kNone,
  kSkip,              // the instruction is left out
  kWaitOneFewer,      // wait_group N + 1: one group more stays in flight
  kIgnorePredicate,   // the mask of a load or copy is left out
  kRowOff,            // the address is one row (the access's width times the warp) off
  kChunkOff,          // the address is 16 bytes off, or its swizzle is left out
  kTransposed,        // .trans where there is none, none where there is one
  kSwapOperands,      // registers of an operand in another order
  kStaleAccumulator,  // the sum starts again instead of going on
  kWrongLane,         // a shuffle from the neighbour's lane
  kNonAtomic,         // read, let others run, write
  kWrongCount,        // a named barrier that expects fewer threads
  kWrongBarrier,      // another named barrier
  kNoFence,           // the fence, or the ordering of an atomic, is left out
  kTruncate,          // narrowing cuts bits off instead of rounding
  kWrongParity,       // waits for the other phase of an mbarrier
  kWrongBytes,        // an mbarrier expects 16 bytes more than come
  kCoordinateOff,     // a copy begins one element further in a dimension
  kWrongSwizzle,      // another swizzle than the tensor map or the memory has
  kLeadOff,           // the leading distance of a matrix in shared memory is 16 bytes off
  kStrideOff,         // its stride is
};

constexpr int kFaults = static_cast<int>(Fault::kStrideOff) + 1;

const char* name_of(Fault fault);
// Throws std::invalid_argument, with the accepted names, for any other.
Fault fault_named(const std::string& name);

// A call of one instruction on one line, as a run has met it.
struct SiteRecord {
  Site site;
  const char* instruction;
  std::string file;       // of the site, normalised
  uint16_t id = 0;        // in the order in which the run has met them
  bool listed = false;    // `possible` is known
  uint32_t possible = 0;  // bit i: static_cast<Fault>(i)
  Fault planted = Fault::kNone;
  bool may_stop = false;  // the session asks to stop here, in some thread
  uint64_t hits = 0;      // how often the planted fault was handed out
  Counters counters;
};

}  // namespace resnet_fused::emulator
