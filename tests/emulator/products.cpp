// Products of warpgroups: sound kernels and such with one mistake. Most multiply A [64, 16] by the
// transpose of B [16, 16], both bf16 without a swizzle: A[i][k] = (2 i + k) % 29, B[j][k] = (3 j
// + k) % 7.
#include <stdexcept>

#include "../../csrc/launch/tensor_map.h"
#include "../../csrc/ptx/mbarrier.h"
#include "../../csrc/ptx/proxy.h"
#include "../../csrc/ptx/registers.h"
#include "../../csrc/ptx/tma.h"
#include "../../csrc/ptx/wgmma.h"
#include "probes.h"

namespace resnet_fused::probes {
namespace {

using ptx::Bf16;
using ptx::Major;
using ptx::MatrixLayout;
using ptx::Swizzle;

constexpr int kRegisters = 8;  // 16 columns
constexpr uint32_t kBytesOfA = 64 * 32;
constexpr uint32_t kShared = kBytesOfA + 16 * 32;
constexpr MatrixLayout kLayoutA{Swizzle::kNone, 64 * 16, 128};
constexpr MatrixLayout kLayoutB{Swizzle::kNone, 16 * 16, 128};
static_assert(kLayoutA.valid() && kLayoutB.valid());

constexpr uint32_t bf16(int small) {
  return __builtin_bit_cast(uint32_t, static_cast<float>(small)) >> 16;
}

// One chunk of eight elements of a row: `first`, `first` + 1, ... modulo `period`.
uint4 chunk(int first, int period) {
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) {
    words[i] = bf16((first + 2 * i) % period) | bf16((first + 2 * i + 1) % period) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

ptx::MatrixDescriptor left() { return ptx::matrix_descriptor(base(), kLayoutA); }
ptx::MatrixDescriptor right() { return ptx::matrix_descriptor(base() + kBytesOfA, kLayoutB); }

void write_operands() {
  const int row = thread() % 64, half = thread() / 64;  // a chunk of A each
  ptx::store_shared(base() + half * 1024 + row * 16,
                    chunk(2 * row + 8 * half, 29));  // <- an operand
  if (thread() < 32) {
    const int column = thread() % 16, k = thread() / 16 * 8;
    ptx::store_shared(base() + kBytesOfA + k / 8 * 256 + column * 16, chunk(3 * column + k, 7));
  }
}

// Operands in shared memory, seen by products.
void prepare() {
  write_operands();
  ptx::fence_proxy_async_shared();
  ptx::sync_threads();
}

template <int kCount>
void clear(float (&d)[kCount]) {
  for (float& sum : d) sum = 0;
}

void order(float (&d)[kRegisters]) {
  clear(d);
  ptx::wgmma_pin(d);
  ptx::wgmma_fence();
}

template <int kCount>
void write_sums(const Memory& memory, const float (&d)[kCount]) {
  for (int i = 0; i < kCount; ++i) {
    ptx::store_global(memory.out + thread() * kCount + i, __builtin_bit_cast(uint32_t, d[i]));
  }
}

void finish(const Memory& memory, float (&d)[kRegisters]) {
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);  // <- finish
  write_sums(memory, d);
}

// ---- Sound

void product(const Memory& memory) {
  prepare();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);  // <- product
  finish(memory, d);
}

// The same twice over, and once more with a left side from registers: 0, 1 and 2 in turn.
void chain(const Memory& memory) {
  prepare();
  float d[kRegisters];
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = bf16((thread() + i) % 3) | bf16((thread() + i + 1) % 3) << 16;
  }
  ptx::wgmma_pin(a);
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);  // <- first of a chain
  ptx::wgmma<Bf16>(d, left(), right(), true);
  ptx::wgmma<Bf16>(d, a, right(), true);
  finish(memory, d);
}

// Two accumulators: the first is read while the second's product may be under way. Then the
// operands are written again, by threads that have waited: no barrier is needed.
void two_sums(const Memory& memory) {
  prepare();
  float d[2][kRegisters];
  clear(d[0]);
  ptx::wgmma_pin(d[0]);
  order(d[1]);
  ptx::wgmma<Bf16>(d[0], left(), right(), false);  // <- first sum
  ptx::wgmma_commit_group();
  ptx::wgmma<Bf16>(d[1], left(), right(), false);  // <- second sum
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<1>();
  ptx::wgmma_pin(d[0]);
  write_sums(memory, d[0]);
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d[1]);
  write_sums({memory.in, memory.out + 1024}, d[1]);
  if (thread() < 64) ptx::store_shared<uint32_t>(base() + 16 * thread(), 0);  // <- at last
}

// Two warpgroups, each with products of its own, at their own pace; the second has fewer registers.
void two_groups_of_warps(const Memory& memory) {
  if (thread() < 128) {
    write_operands();
    ptx::fence_proxy_async_shared();
    ptx::increase_registers<232>();
  } else {
    ptx::decrease_registers<40>();
  }
  ptx::sync_threads();
  for (int turn = 0; turn < (thread() < 128 ? 3 : 1); ++turn) {
    float d[kRegisters];
    order(d);
    ptx::wgmma<Bf16>(d, left(), right(), false);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(d);
    if (thread() < 128) write_sums(memory, d);
  }
}

// What the accumulators hold before the wait, behind every check.
void peek(const Memory& memory) {
  prepare();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);
  ptx::wgmma_commit_group();
  ptx::sync_threads();
  memory.out[1024 + thread()] = __builtin_bit_cast(uint32_t, d[0]);
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
  write_sums(memory, d);
}

// Likewise in front of the wait for a second product into the same accumulators, when the first may
// have come to its end.
void peek_behind_two(const Memory& memory) {
  prepare();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);
  ptx::wgmma_commit_group();
  ptx::sync_threads();
  ptx::wgmma<Bf16>(d, left(), right(), true);
  ptx::wgmma_commit_group();
  memory.out[1024 + thread()] = __builtin_bit_cast(uint32_t, d[0]);
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
  write_sums(memory, d);
}

enum class Ring { kSound, kEarlyRelease, kNoFullWait };

// What a kernel does: a warp copies tiles of 64 rows of 64 fp16 into two slots, a warpgroup
// multiplies each by its own first eight rows. `in` as fp16: words below 2048 are multiples of
// 2^-24 beside zeros. One thread gives a slot back for the whole warpgroup, behind its own wait.
void ring(const Memory& memory, Ring mistake) {
  constexpr int kTiles = 5;
  constexpr uint32_t kTileBytes = 64 * 128;
  constexpr MatrixLayout kLayout{Swizzle::k128Bytes, 0, 1024};
  TensorMapRequest request;
  request.element = TensorElement::kFloat16;
  request.rank = 2;
  request.address = const_cast<uint32_t*>(memory.in);
  request.sizes = {64, 512};
  request.strides = {128};
  request.box = {64, 64};
  request.swizzle = TensorSwizzle::k128;
  ptx::TensorMap map;
  if (encode_tensor_map(request, &map) != 0) throw std::logic_error(tensor_map_fault(request));
  const auto full = [](int slot) { return base() + 8 * static_cast<uint32_t>(slot); };
  const auto empty = [](int slot) { return base() + 16 + 8 * static_cast<uint32_t>(slot); };
  const auto tile_at = [](int slot) {
    return base() + 1024 + kTileBytes * static_cast<uint32_t>(slot);
  };
  if (thread() == 0) {
    for (int i = 0; i < 4; ++i) ptx::mbarrier_init(base() + 8 * i, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::sync_threads();
  for (int tile = 0; tile < kTiles; ++tile) {
    const int slot = tile % 2;
    const auto parity = static_cast<uint32_t>(tile / 2 % 2);
    if (thread() == 128) {
      ptx::mbarrier_wait_parity(empty(slot), parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full(slot), kTileBytes);
      ptx::tma_load(tile_at(slot), &map, {0, 4 * tile}, full(slot));  // <- a tile
    }
    if (thread() >= 128) continue;
    if (mistake != Ring::kNoFullWait) ptx::mbarrier_wait_parity(full(slot), parity);
    float d[4];
    clear(d);
    ptx::wgmma_pin(d);
    ptx::wgmma_fence();
    const auto operand = ptx::matrix_descriptor(tile_at(slot), kLayout);
    for (int k = 0; k < 4; ++k) {
      ptx::wgmma<ptx::F16>(d, operand + 32 * k, operand + 32 * k, k > 0);  // <- a tile's product
    }
    ptx::wgmma_commit_group();
    if (mistake == Ring::kEarlyRelease && thread() == 96) ptx::mbarrier_arrive(empty(slot));
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(d);
    if (mistake != Ring::kEarlyRelease && thread() == 96) ptx::mbarrier_arrive(empty(slot));
    write_sums({memory.in, memory.out + 512 * (tile % 4)}, d);
  }
}

// ---- Operands that are not ready, or not left alone

void operands(const Memory& memory, bool publish, bool meet) {
  write_operands();
  if (publish) ptx::fence_proxy_async_shared();
  if (meet) ptx::sync_threads();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);  // <- operands
  finish(memory, d);
}

void overwrite(const Memory& memory) {
  prepare();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);
  ptx::wgmma_commit_group();
  ptx::sync_threads();                                        // so that it is under way
  if (thread() == 5) ptx::store_shared<uint32_t>(base(), 0);  // <- overwritten
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
  write_sums(memory, d);
}

// Another warpgroup writes to the operands with no barrier behind the wait.
void overwritten_by_others(const Memory& memory, bool meet) {
  if (thread() < 128) write_operands();
  if (thread() < 128) ptx::fence_proxy_async_shared();
  ptx::sync_threads();
  if (thread() < 128) {
    float d[kRegisters];
    order(d);
    ptx::wgmma<Bf16>(d, left(), right(), false);  // <- their product
    finish(memory, d);
  }
  if (meet) ptx::sync_threads();
  if (thread() == 128) ptx::store_shared<uint32_t>(base(), 0);  // <- overwritten by others
}

void descriptors(const Memory& memory, uint32_t start, MatrixLayout layout) {
  prepare();
  float d[kRegisters];
  order(d);
  const auto a = ptx::matrix_descriptor(base() + start, layout);  // <- descriptor
  ptx::wgmma<Bf16>(d, a, right(), false);                         // <- descriptor's product
  finish(memory, d);
}

// ---- Registers that are not the product's, or not left alone

enum class Registers { kUnpinned, kUnfenced, kLate, kTouched, kOverlapping, kUnread };

void registers(const Memory& memory, Registers mistake) {
  prepare();
  float d[kRegisters + 4];
  clear(d);
  auto& sums = reinterpret_cast<float (&)[kRegisters]>(d);
  auto& others = reinterpret_cast<float (&)[kRegisters]>(d[4]);
  if (mistake != Registers::kUnpinned) ptx::wgmma_pin(sums);
  if (mistake == Registers::kOverlapping) ptx::wgmma_pin(others);
  if (mistake != Registers::kUnfenced) ptx::wgmma_fence();
  if (mistake == Registers::kLate) d[3] = 1;
  if (mistake == Registers::kOverlapping) ptx::wgmma_pin(sums);
  if (mistake == Registers::kOverlapping) ptx::wgmma_fence();
  ptx::wgmma<Bf16>(sums, left(), right(), false);  // <- registers
  if (mistake == Registers::kOverlapping) {
    ptx::wgmma<Bf16>(others, left(), right(), false);  // <- overlapping
  }
  if (mistake == Registers::kTouched) d[2] = 0.5f;
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();  // <- registers' wait
  if (mistake == Registers::kUnread) return;
  ptx::wgmma_pin(sums);
  write_sums(memory, sums);
}

void fragments(const Memory& memory, bool pin, bool touch) {
  prepare();
  float d[kRegisters];
  uint32_t a[4] = {1, 2, 3, 4};
  if (pin) ptx::wgmma_pin(a);
  order(d);
  ptx::wgmma<Bf16>(d, a, right(), false);  // <- fragments
  ptx::wgmma_commit_group();
  if (touch) a[1] = 0;
  ptx::wgmma_wait_group<0>();  // <- fragments' wait
  ptx::wgmma_pin(d);
  write_sums(memory, d);
}

// ---- Waits

void groups(const Memory& memory, bool commit, bool wait, int kept) {
  prepare();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);
  if (commit) ptx::wgmma_commit_group();
  if (wait && kept == 0) ptx::wgmma_wait_group<0>();
  if (wait && kept == 1) ptx::wgmma_wait_group<1>();
  ptx::wgmma_pin(d);  // <- groups
  write_sums(memory, d);
}

void leave(const Memory&) {
  prepare();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);  // <- leave
}

// ---- Warpgroups that do not act as one

void three_warps(const Memory& memory) {
  prepare();
  float d[kRegisters];
  order(d);
  if (thread() < 96) ptx::wgmma<Bf16>(d, left(), right(), false);
  ptx::wgmma_commit_group();  // <- three warps
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
  write_sums(memory, d);
}

void absent_warp(const Memory& memory) {
  prepare();
  if (thread() >= 96) return;
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();  // <- absent_warp
  ptx::wgmma_pin(d);
  write_sums(memory, d);
}

void unlike(const Memory& memory, int first, int last) {
  prepare();
  float d[kRegisters];
  order(d);
  const bool other = thread() >= first && thread() < last;
  ptx::wgmma<Bf16>(d, left() + (other ? 16 : 0), right(), false);  // <- unlike
  finish(memory, d);
}

void unlike_groups(const Memory& memory) {
  prepare();
  float d[kRegisters];
  order(d);
  ptx::wgmma<Bf16>(d, left(), right(), false);
  if (thread() < 32) ptx::wgmma_commit_group();  // <- unlike groups, one side
  ptx::wgmma<Bf16>(d, left(), right(), true);
  ptx::wgmma_commit_group();  // <- unlike groups, the other
  ptx::wgmma_wait_group<0>();
  ptx::wgmma_pin(d);
  write_sums(memory, d);
}

Probe group(std::function<void(const Memory&)> kernel, uint32_t threads = 128) {
  return {1, threads, kShared, false, std::move(kernel)};
}

void add_mistakes(Table& t) {
  const auto with = [&t](const char* name, Registers mistake) {
    t[name] = group([mistake](const Memory& m) { registers(m, mistake); });
  };
  with("sums_unpinned", Registers::kUnpinned);
  with("sums_unfenced", Registers::kUnfenced);
  with("sums_late", Registers::kLate);
  with("sums_touched", Registers::kTouched);
  with("sums_overlapping", Registers::kOverlapping);
  with("sums_unread", Registers::kUnread);
  t["fragments_unpinned"] = group([](const Memory& m) { fragments(m, false, false); });
  t["fragments_touched"] = group([](const Memory& m) { fragments(m, true, true); });
  t["no_commit"] = group([](const Memory& m) { groups(m, false, true, 0); });
  t["no_wait"] = group([](const Memory& m) { groups(m, true, false, 0); });
  t["wait_one_short"] = group([](const Memory& m) { groups(m, true, true, 1); });
  t["product_left"] = group(leave);
  t["three_warps"] = group(three_warps);
  t["absent_warp"] = group(absent_warp);
  t["no_warpgroup"] = group(product, 96);
  t["unlike_warps"] = group([](const Memory& m) { unlike(m, 64, 96); });
  t["unlike_lanes"] = group([](const Memory& m) { unlike(m, 70, 71); });
  t["unlike_groups"] = group(unlike_groups);
  t["too_many_registers"] = group(
      [](const Memory&) {
        ptx::increase_registers<240>();  // <- too_many_registers
      },
      384);
  t["fewer_registers_up"] = group([](const Memory&) {
    ptx::decrease_registers<40>();
    ptx::decrease_registers<48>();  // <- fewer_registers_up
  });
}

}  // namespace

void add_products(Table& t) {
  t["product"] = group(product);
  t["product_chain"] = group(chain);
  t["product_two_sums"] = group(two_sums);
  t["product_two_groups"] = group(two_groups_of_warps, 256);
  t["product_peek"] = group(peek);
  t["product_peek_behind_two"] = group(peek_behind_two);
  const std::pair<const char*, Ring> rings[] = {
      {"product_ring", Ring::kSound},
      {"product_ring_early_release", Ring::kEarlyRelease},
      {"product_ring_no_full_wait", Ring::kNoFullWait},
  };
  for (const auto& [name, mistake] : rings) {
    t[name] = {1, 160, 1024 + 2 * 8192, false, [mistake](const Memory& m) { ring(m, mistake); }};
  }
  t["operands_unpublished"] = group([](const Memory& m) { operands(m, false, true); });
  t["operands_unmet"] = group([](const Memory& m) { operands(m, true, false); });
  t["operands_overwritten"] = group(overwrite);
  t["others_overwrite"] = group([](const Memory& m) { overwritten_by_others(m, false); }, 160);
  t["others_overwrite_later"] = group([](const Memory& m) { overwritten_by_others(m, true); }, 160);
  t["operands_outside"] = group([](const Memory& m) { descriptors(m, kBytesOfA, kLayoutA); });
  t["operands_unwritten"] = {1, 128, kShared + 16, false, [](const Memory& m) {
                               descriptors(m, kShared + 16 - kBytesOfA, kLayoutA);
                             }};
  t["descriptor_misaligned"] = group([](const Memory& m) { descriptors(m, 8, kLayoutA); });
  t["descriptor_invalid"] =
      group([](const Memory& m) { descriptors(m, 0, {Swizzle::kNone, 1024, 136}); });
  add_mistakes(t);
}

}  // namespace resnet_fused::probes
