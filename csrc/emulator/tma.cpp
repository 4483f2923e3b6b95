#include "tma.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "block.h"
#include "sanitizers.h"
#include "tensor_map.h"

namespace resnet_fused::emulator {
namespace {

constexpr uint32_t kUnit = 16;              // bytes that move as one
constexpr uint32_t kTensorAlignment = 128;  // of a box in shared memory
constexpr uint8_t kPoison = 0xFF;

// A run of neighbouring elements in global memory, and its place in the box.
struct Row {
  uint32_t place;  // bytes from the box's beginning, before the swizzle
  uint32_t bytes;
  uint8_t* global;
};

struct Box {
  uint32_t bytes = 0;
  uint32_t swizzle = 0;
  bool rounds = false;
  std::vector<Row> rows;  // inside of the tensor
};

const TensorMapFields& fields_of(Site site, const char* instruction, const void* map) {
  const auto& fields = *static_cast<const TensorMapFields*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    fail(ErrorKind::kAddress, site, instruction, "a tensor map that is not aligned to 64 bytes");
  }
  if (fields.magic != TensorMapFields::kMagic) {
    fail(site, instruction, "what is no tensor map: encode_tensor_map makes them");
  }
  return fields;
}

// Adds what the tensor has of `count` elements of dimension 0 that begin at `first`.
void add_row(const TensorMapFields& map, Box& box, uint32_t place, int64_t first, int64_t count,
             int64_t offset) {
  const int64_t from = std::max<int64_t>(first, 0);
  const int64_t to = std::min(first + count, map.size(0));
  if (from >= to) return;
  box.rows.push_back({place + static_cast<uint32_t>(from - first) * map.element_bytes,
                      static_cast<uint32_t>(to - from) * map.element_bytes,
                      map.address + offset + from * map.element_bytes});
}

Box tiled_box(const TensorMapFields& map, std::span<const int32_t> at) {
  Box box;
  int64_t steps[kMostDimensions] = {1, 1, 1, 1, 1};
  int64_t rows = 1;
  for (int d = 1; d < map.rank; ++d) {
    steps[d] = (map.box[d] + map.element_strides[d] - 1) / map.element_strides[d];
    rows *= steps[d];
  }
  const uint32_t row_bytes = uint32_t{map.box[0]} * map.element_bytes;
  box.bytes = row_bytes * static_cast<uint32_t>(rows);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t rest = row;
    int64_t offset = 0;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t c = at[d] + rest % steps[d] * map.element_strides[d];
      rest /= steps[d];
      inside = inside && c >= 0 && c < map.size(d);
      offset += c * static_cast<int64_t>(map.strides[d - 1]);
    }
    if (inside)
      add_row(map, box, static_cast<uint32_t>(row) * row_bytes, at[0], map.box[0], offset);
  }
  return box;
}

// Walks over the pixels of the bounding box, W first, on to the next image behind the last row.
Box im2col_box(const TensorMapFields& map, std::span<const int32_t> at,
               std::span<const uint16_t> offsets) {
  Box box;
  const uint32_t row_bytes = uint32_t{map.box[0]} * map.element_bytes;
  box.bytes = row_bytes * map.box[1];
  const int spatial = map.rank - 2;
  int64_t c[kMostDimensions];
  for (int d = 0; d < map.rank; ++d) c[d] = at[d];
  for (uint32_t pixel = 0; pixel < map.box[1]; ++pixel) {
    int64_t offset = c[map.rank - 1] * static_cast<int64_t>(map.strides[map.rank - 2]);
    bool inside = c[map.rank - 1] >= 0 && c[map.rank - 1] < map.size(map.rank - 1);
    for (int d = 1; d <= spatial; ++d) {
      const int64_t x = c[d] + offsets[d - 1];
      inside = inside && x >= 0 && x < map.size(d);
      offset += x * static_cast<int64_t>(map.strides[d - 1]);
    }
    if (inside) add_row(map, box, pixel * row_bytes, c[0], map.box[0], offset);
    int d = 1;
    for (; d <= spatial; ++d) {
      c[d] += map.element_strides[d];
      if (c[d] <= map.size(d) - 1 + map.upper[d - 1]) break;
      c[d] = map.lower[d - 1];
    }
    if (d > spatial) ++c[map.rank - 1];
  }
  return box;
}

// 16-byte units of a span change places with the address of their row: bits 4 and up of the
// shared address, exclusive-or bits 7 and up.
uint32_t swizzled(uint32_t address, uint32_t span) {
  if (span == 0) return address;
  const uint32_t mask = span - kUnit;  // 16, 48, 112
  return address ^ (address >> 3 & mask);
}

Box box_of(Site site, const char* instruction, const TensorMapFields& map,
           std::span<const int32_t> at, std::span<const uint16_t> offsets, int swizzle) {
  if (at.size() != map.rank) {
    fail(site, instruction,
         std::to_string(at.size()) + " coordinates for a tensor map of " +
             std::to_string(map.rank) + " dimensions");
  }
  if (map.im2col != !offsets.empty()) {
    fail(site, instruction,
         map.im2col ? "a tiled copy with an im2col tensor map"
                    : "an im2col copy with a tiled tensor map");
  }
  // Each offset has 16, 8 or 5 bits.
  const uint32_t limit = map.rank == 3 ? 1u << 16 : map.rank == 4 ? 1u << 8 : 1u << 5;
  for (const uint16_t offset : offsets) {
    if (offset >= limit) {
      fail(site, instruction,
           "an offset of " + std::to_string(offset) + ": expected less than " +
               std::to_string(limit));
    }
  }
  Box box = map.im2col ? im2col_box(map, at, offsets) : tiled_box(map, at);
  box.swizzle = swizzle == kMappedSwizzle ? map.swizzle : static_cast<uint32_t>(swizzle);
  return box;
}

// Checks and counts what a copy does to global memory: one request, whole sectors of each row.
void touch(Site site, const char* instruction, const Box& box, bool write) {
  Grid& grid = *self().block->grid;
  Session& session = *grid.session;
  for (const Row& row : box.rows) {
    check_global(site, instruction, row.global, row.bytes, write ? Access::kWrite : Access::kRead);
    if (session.counting || session.checking_tensors) {
      session.touch_tensor(site, instruction, row.global, row.bytes, write);
    }
  }
  if (!session.counting) return;
  Counters& counters = session.record_of(site, instruction).counters;
  uint64_t sectors = 0, lines = 0, bytes = 0;
  for (const Row& row : box.rows) {
    const auto first = reinterpret_cast<uintptr_t>(row.global);
    const uintptr_t last = first + row.bytes - 1;
    sectors += last / 32 - first / 32 + 1;
    lines += last / 128 - first / 128 + 1;
    bytes += row.bytes;
  }
  (write ? counters.global_store_requests : counters.global_load_requests) += 1;
  (write ? counters.global_store_sectors : counters.global_load_sectors) += sectors;
  (write ? counters.global_store_lines : counters.global_load_lines) += lines;
  (write ? counters.global_store_bytes_asked : counters.global_load_bytes_asked) += bytes;
}

void round_to_tf32(std::vector<uint8_t>& values) {
  constexpr uint32_t kInfinity = 0x7F800000u;
  for (size_t at = 0; at < values.size(); at += sizeof(uint32_t)) {
    uint32_t bits;
    std::memcpy(&bits, values.data() + at, sizeof(bits));
    if ((bits & kInfinity) != kInfinity) {
      bits = (bits + 0xFFFu + (bits >> 13 & 1u)) & 0xFFFFE000u;
    }
    std::memcpy(values.data() + at, &bits, sizeof(bits));
  }
}

// One copy's share that lands at once, in one block.
void land_later(Block& owner, MBarrier& barrier, uint32_t to, uint32_t swizzle, uint32_t begin,
                uint32_t end, const std::shared_ptr<std::vector<uint8_t>>& values) {
  ++barrier.in_flight;
  Block* const block = &owner;
  MBarrier* const counts = &barrier;
  effect(new_effect_queue(), [=] {
    uint8_t* data = block->shared.data();
    for (uint32_t at = begin; at < end; at += kUnit) {
      std::memcpy(data + swizzled(to + at, swizzle) - kSharedBase, values->data() + at, kUnit);
    }
    // The rows of a swizzle stay within themselves, so the share's bytes are those of its places.
    block->shared.async_landed(to + begin - kSharedBase, end - begin, counts->column);
    --counts->in_flight;
    counts->landed_phase = counts->phase + 1;
    complete_bytes(*block, *counts, end - begin);
  });
}

void load(Site site, const char* instruction, const Box& box, bool fill_nan, CopyTarget target,
          uint32_t alignment) {
  FiberThread& thread = self();
  Block& own = *thread.block;
  Grid& grid = *own.grid;
  touch(site, instruction, box, false);
  const auto values = std::make_shared<std::vector<uint8_t>>(box.bytes, fill_nan ? kPoison : 0);
  for (const Row& row : box.rows) std::memcpy(values->data() + row.place, row.global, row.bytes);
  if (box.rounds) round_to_tf32(*values);

  const uint16_t site_id = grid.session->record_of(site, instruction).id;
  const auto blocks = static_cast<uint32_t>(own.cluster->blocks.size());
  const bool own_alone = target.block_mask == kOwnBlock;
  if (!own_alone && (target.block_mask == 0 || target.block_mask >> blocks != 0)) {
    fail(site, instruction,
         "a mask of " + hex(target.block_mask) + " for a cluster of " + std::to_string(blocks));
  }
  // Under the random schedule a copy lands in shares, of whole rows of a swizzle.
  const bool shares = grid.schedule.asynchrony == Asynchrony::kRandom;
  constexpr uint32_t kShare = 1024;
  for (uint32_t rank = 0; rank < blocks; ++rank) {
    if (own_alone ? rank != own.rank : (target.block_mask >> rank & 1) == 0) continue;
    Block& owner = *own.cluster->blocks[rank];
    if (owner.alive == 0) {
      fail(ErrorKind::kState, site, instruction,
           "shared memory of block " + std::to_string(rank) +
               " of the cluster, which has left the kernel");
    }
    MBarrier& barrier = find_copy_barrier(site, instruction, owner, target.barrier);
    owner.shared.check_bounds(site, instruction, target.to, box.bytes, alignment);
    const uint32_t offset = target.to - kSharedBase;
    owner.shared.async_write(site, instruction, owner, thread, offset, box.bytes, site_id,
                             barrier.column, barrier.offset);
    if (grid.schedule.asynchrony != Asynchrony::kEager) {
      std::memset(owner.shared.data() + offset, kPoison, box.bytes);
    }
    const uint32_t step = shares ? kShare : box.bytes;
    for (uint32_t begin = 0; begin < box.bytes; begin += step) {
      land_later(owner, barrier, target.to, box.swizzle, begin, std::min(begin + step, box.bytes),
                 values);
    }
  }
}

void store(Site site, const char* instruction, const Box& box, uint32_t from, uint32_t alignment) {
  FiberThread& thread = self();
  touch(site, instruction, box, true);
  thread.block->shared.check_bounds(site, instruction, from, box.bytes, alignment);
  // What lies outside of the tensor need not have been written.
  std::vector<AsyncPiece> pieces;
  struct Run {
    uint32_t unit;   // in `pieces`
    uint32_t first;  // byte of the unit
    uint32_t bytes;
    uint8_t* to;
  };
  const auto runs = std::make_shared<std::vector<Run>>();
  for (const Row& row : box.rows) {
    for (uint32_t done = 0; done < row.bytes;) {
      const uint32_t place = row.place + done;
      const uint32_t first = place % kUnit;
      const uint32_t bytes = std::min(kUnit - first, row.bytes - done);
      pieces.push_back({swizzled(from + place - first, box.swizzle), kUnit});
      runs->push_back({static_cast<uint32_t>(pieces.size() - 1), first, bytes, row.global + done});
      done += bytes;
    }
  }
  BulkStore made;
  made.read = async_read(site, instruction, {thread.linear, 1}, std::move(pieces));
  const auto values = std::make_shared<std::vector<uint8_t>>(made.read.bytes());
  const uint32_t queue = new_effect_queue();
  made.reads = effect(queue, [read = made.read, values] { read.values(values->data()); });
  made.writes = effect(queue, [runs, values] {
    for (const Run& run : *runs) {
      std::memcpy(run.to, values->data() + run.unit * kUnit + run.first, run.bytes);
    }
  });
  thread.bulk_open.push_back(made);
}

Box flat_box(Site site, const char* instruction, const void* global, uint32_t bytes) {
  if (bytes == 0 || bytes % kUnit != 0) {
    fail(site, instruction,
         std::to_string(bytes) + " bytes: expected a multiple of 16, at least 16");
  }
  const auto where = reinterpret_cast<uintptr_t>(global);
  if (where % kUnit != 0) {
    fail(ErrorKind::kAddress, site, instruction,
         "global address " + hex(where) + " is not a multiple of 16");
  }
  Box box;
  box.bytes = bytes;
  box.rows.push_back({0, bytes, static_cast<uint8_t*>(const_cast<void*>(global))});
  return box;
}

}  // namespace

void tensor_load(Site site, const char* instruction, const void* map,
                 std::span<const int32_t> coordinates, std::span<const uint16_t> offsets,
                 CopyTarget target, int swizzle, bool unrounded) {
  const Quiet quiet;
  const TensorMapFields& fields = fields_of(site, instruction, map);
  Box box = box_of(site, instruction, fields, coordinates, offsets, swizzle);
  box.rounds = fields.rounds && !unrounded;
  load(site, instruction, box, fields.fill_nan, target, kTensorAlignment);
}

void tensor_store(Site site, const char* instruction, const void* map,
                  std::span<const int32_t> coordinates, uint32_t from, bool im2col, int swizzle) {
  const Quiet quiet;
  const TensorMapFields& fields = fields_of(site, instruction, map);
  constexpr uint16_t kNone[kMostDimensions - 2] = {};
  const std::span<const uint16_t> offsets(kNone, im2col ? coordinates.size() - 2 : 0);
  if (fields.rounds) fail(site, instruction, "a store by a map that rounds to TF32");
  const Box box = box_of(site, instruction, fields, coordinates, offsets, swizzle);
  store(site, instruction, box, from, kTensorAlignment);
}

bool rounds_to_tf32(const void* map) {
  const auto& fields = *static_cast<const TensorMapFields*>(map);
  return fields.magic == TensorMapFields::kMagic && fields.rounds;
}

int other_swizzle(Site site, const char* instruction, const void* map) {
  return fields_of(site, instruction, map).swizzle == 0 ? 128 : 0;
}

void tensor_prefetch(Site site, const void* map) { fields_of(site, "prefetch.tensormap", map); }

void bulk_load(Site site, const char* instruction, const void* from, uint32_t bytes,
               CopyTarget target) {
  const Quiet quiet;
  load(site, instruction, flat_box(site, instruction, from, bytes), false, target, kUnit);
}

void bulk_store(Site site, const char* instruction, void* to, uint32_t from, uint32_t bytes) {
  const Quiet quiet;
  store(site, instruction, flat_box(site, instruction, to, bytes), from, kUnit);
}

void bulk_commit(Site) {
  const Quiet quiet;
  FiberThread& thread = self();
  thread.bulk_groups.push_back(std::move(thread.bulk_open));  // a group may be empty
  thread.bulk_open.clear();
}

void bulk_wait(Site site, int pending, bool reads) {
  const Quiet quiet;
  if (pending < 0) {
    fail(site, "cp.async.bulk.wait_group", std::to_string(pending) + " groups: expected 0 or more");
  }
  FiberThread& thread = self();
  while (thread.bulk_groups.size() > static_cast<size_t>(pending)) {
    size_t oldest = 0;
    if (reads) {  // groups whose reads are over stay until their writes are
      while (oldest + pending < thread.bulk_groups.size() &&
             (thread.bulk_groups[oldest].empty() || thread.bulk_groups[oldest].front().waited)) {
        ++oldest;
      }
      if (oldest + pending >= thread.bulk_groups.size()) return;
    }
    for (BulkStore& one : thread.bulk_groups[oldest]) {
      force_effect(reads ? one.reads : one.writes);
      if (!one.waited) one.read.waited();
      one.waited = true;
    }
    if (!reads) thread.bulk_groups.erase(thread.bulk_groups.begin());
  }
}

void check_block_end(Block& block) {
  if (!block.grid->session->checking_proxies) return;
  block.shared.check_readers_end(block);
  for (const auto& [offset, barrier] : block.mbarriers) {
    if (barrier.in_flight == 0 && barrier.landed_phase <= barrier.observed) continue;
    fail(ErrorKind::kState, block.shared.last_async_writer(block, barrier.column), "cp.async.bulk",
         "the block ends before anybody has waited for the copy that completes on the " +
             describe(barrier));
  }
}

}  // namespace resnet_fused::emulator
