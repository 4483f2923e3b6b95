// Products of warpgroups: who has issued and waited for which, and what may be touched meanwhile.
#include "warpgroup.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "matrix_operand.h"
#include "sanitizers.h"
#include "warpgroup_state.h"

namespace resnet_fused::emulator {
namespace {

constexpr uint8_t kPoison = 0xFF;  // a NaN

int index_in_group(const FiberThread& thread) { return thread.linear % kGroupThreads; }
int warp_in_group(const FiberThread& thread) { return thread.warp % kGroupWarps; }

std::string issued_at(const Product& product) { return "issued at " + describe(product.site); }

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  return first < second + b_bytes && second < first + a_bytes;
}

size_t bytes_of(const Sums& sums) { return static_cast<size_t>(sums.registers) * sizeof(float); }
float* values_of(Sums& sums, int thread) {
  return sums.values.data() + static_cast<size_t>(thread) * sums.registers;
}

// Nobody but the products has written to the thread's array since it was issued.
void check_untouched(Site site, const char* instruction, Sums& sums, int thread) {
  const Sums::Array& array = sums.arrays[thread];
  const auto* bytes = reinterpret_cast<const uint8_t*>(array.at);
  const bool same = array.hidden ? std::all_of(bytes, bytes + bytes_of(sums),
                                               [](uint8_t byte) { return byte == kPoison; })
                                 : std::memcmp(bytes, values_of(sums, thread), bytes_of(sums)) == 0;
  if (!same) {
    fail(ErrorKind::kState, site, instruction,
         "accumulators were written while a product was using them");
  }
}

void check_fragment(Site site, const char* instruction, const Product& product, int thread) {
  const Product::Fragment& a = product.a[thread];
  if (a.at == nullptr || std::memcmp(a.at, a.noted, sizeof(a.noted)) == 0) return;
  fail(ErrorKind::kState, site, instruction,
       "registers of a were written while the product " + issued_at(product) + " was using them");
}

void show(Sums& sums, int thread) {
  Sums::Array& array = sums.arrays[thread];
  std::memcpy(array.at, values_of(sums, thread), bytes_of(sums));
  array.hidden = false;
}

void hide(Sums& sums, int thread) {
  Sums::Array& array = sums.arrays[thread];
  std::memset(array.at, kPoison, bytes_of(sums));
  array.hidden = true;
}

// ---- Issue

// Registers that no product uses yet must have been pinned, and fenced behind that.
void check_ordered(Site site, const char* instruction, const GroupThread& thread, const void* at,
                   size_t bytes, const char* what) {
  const auto pin = std::find_if(thread.pins.begin(), thread.pins.end(), [&](const Pin& p) {
    return p.at == at && p.values.size() == bytes;
  });
  const std::string name = what;
  if (pin == thread.pins.end()) {
    fail(ErrorKind::kState, site, instruction,
         "no wgmma_pin and wgmma_fence have ordered the thread's accesses of " + name);
  }
  if (!pin->fenced) {
    fail(ErrorKind::kState, site, instruction,
         "no wgmma_fence since " + name + " were pinned at " + describe(pin->site));
  }
  if (std::memcmp(at, pin->values.data(), bytes) != 0) {
    fail(ErrorKind::kState, site, instruction,
         name + " were written after they were pinned at " + describe(pin->site));
  }
}

// The chain in flight whose accumulators the thread names; null where they are its own.
std::shared_ptr<Sums> chain_of(Site site, const char* instruction, const GroupThread& thread,
                               int index, const ProductOperands& operands) {
  const size_t bytes = static_cast<size_t>(operands.registers) * sizeof(float);
  for (const auto& sums : thread.flying) {
    const float* at = sums->arrays[index].at;
    if (!overlap(at, bytes_of(*sums), operands.d, bytes)) continue;
    if (at == operands.d && sums->registers == operands.registers) return sums;
    fail(ErrorKind::kState, site, instruction,
         "accumulators overlap those of another shape that a product is using");
  }
  return nullptr;
}

void check_same(Site site, const Product& product, const ProductType& type,
                const ProductOperands& operands) {
  const ProductOperands& first = product.operands;
  const bool alike =
      product.site.line == site.line && std::strcmp(product.site.file, site.file) == 0 &&
      std::strcmp(product.type.instruction, type.instruction) == 0 &&
      first.registers == operands.registers && (first.a == nullptr) == (operands.a == nullptr) &&
      first.a_descriptor == operands.a_descriptor && first.b_descriptor == operands.b_descriptor &&
      first.accumulate == operands.accumulate;
  if (alike) return;
  fail(ErrorKind::kDivergence, site, type.instruction,
       "not the product that another thread of the warpgroup issued at " + describe(product.site) +
           ": the site, the shape, the descriptors and `accumulate` must agree");
}

// One thread's registers become the product's.
void take_registers(Site site, Warpgroup& group, Product& product, uint64_t number, int index,
                    const ProductOperands& operands, bool hides) {
  const char* instruction = product.type.instruction;
  GroupThread& thread = group.threads[index];
  const std::shared_ptr<Sums> chain = chain_of(site, instruction, thread, index, operands);
  if (product.sums == nullptr) {
    product.sums = chain != nullptr ? chain : std::make_shared<Sums>();
    product.sums->registers = operands.registers;
    product.sums->values.resize(static_cast<size_t>(kGroupThreads) * operands.registers);
  }
  Sums& sums = *product.sums;
  if (chain != nullptr ? chain != product.sums : sums.arrays[index].at != nullptr) {
    fail(ErrorKind::kDivergence, site, instruction,
         "other accumulators than in the other threads of the warpgroup, or in another order");
  }
  if (chain != nullptr) {
    check_untouched(site, instruction, sums, index);
  } else {
    check_ordered(site, instruction, thread, operands.d, bytes_of(sums), "the accumulators");
    std::erase_if(thread.pins, [&](const Pin& pin) {
      return pin.at == reinterpret_cast<const uint8_t*>(operands.d);
    });
    std::memcpy(values_of(sums, index), operands.d, bytes_of(sums));
    sums.arrays[index].at = operands.d;
    thread.flying.push_back(product.sums);
  }
  if (hides) hide(sums, index);
  sums.arrays[index].product = number;
  sums.end = std::max(sums.end, number + 1);
  if (operands.a != nullptr) {
    Product::Fragment& a = product.a[index];
    check_ordered(site, instruction, thread, operands.a, sizeof(a.noted), "the registers of a");
    a.at = operands.a;
    std::memcpy(a.noted, operands.a, sizeof(a.noted));
  }
}

void count_reads(Site site, const char* instruction, const std::vector<AsyncPiece>& chunks) {
  Session& session = *self().block->grid->session;
  if (!session.counting) return;
  Counters& counters = session.record_of(site, instruction).counters;
  constexpr size_t kCore = 8;  // chunks that are read at once
  for (size_t i = 0; i < chunks.size(); i += kCore) {
    uint64_t addresses[kCore];
    for (size_t j = 0; j < kCore; ++j) addresses[j] = chunks[i + j].address;
    counters.shared_load_requests += 1;
    counters.shared_phases += 1;
    counters.shared_wavefronts += wavefronts(addresses, kCore, 16);
    counters.shared_bytes += 16 * kCore;
  }
}

// All four warps have issued it.
void begin(Warpgroup& group, const std::shared_ptr<Product>& product, uint64_t number) {
  const ProductOperands& operands = product->operands;
  const ProductType& type = product->type;
  std::vector<AsyncPiece> chunks;
  if (operands.a == nullptr) {
    chunks = chunks_of({operands.a_descriptor, type.a_mn_major, kProductRows, type.element_bytes});
  }
  const auto b = chunks_of(
      {operands.b_descriptor, type.b_mn_major, 2 * operands.registers, type.element_bytes});
  chunks.insert(chunks.end(), b.begin(), b.end());
  count_reads(product->site, type.instruction, chunks);
  product->read = async_read(product->site, type.instruction, {group.first_thread, kGroupThreads},
                             std::move(chunks));
  if (group.queue == 0) group.queue = new_effect_queue();
  const bool lazy = schedule().asynchrony == Asynchrony::kLazy;
  product->effect = effect(group.queue, [&group, product, number, lazy] {
    for (int i = 0; i < kGroupThreads; ++i) {
      check_fragment(product->site, product->type.instruction, *product, i);
      check_untouched(product->site, product->type.instruction, *product->sums, i);
    }
    multiply(*product);
    for (int i = 0; i < kGroupThreads && !lazy; ++i) {
      // Where the thread has issued another one into the same array, its sums are not to be seen.
      const Sums::Array& array = product->sums->arrays[i];
      if (!array.hidden || array.product == number) show(*product->sums, i);
    }
  });
  for (const FiberThread* thread : group.waiting) {
    thread->block->grid->make_ready(*thread->block, thread->warp, 1u << thread->lane);
  }
  group.waiting.clear();
}

// ---- Wait

// The running thread has waited for all products before `end`.
void land(Site site, const char* instruction, Warpgroup& group, uint64_t end) {
  const FiberThread& self_thread = self();
  const int index = index_in_group(self_thread);
  GroupThread& thread = group.threads[index];
  GroupWarp& warp = group.warps[warp_in_group(self_thread)];
  for (; warp.reads_waited < end; ++warp.reads_waited) {
    const Product& product = group.product(warp.reads_waited);
    force_effect(product.effect);
    product.read.waited();
  }
  for (const auto& sums : thread.flying) {
    if (sums->end > end) continue;
    check_untouched(site, instruction, *sums, index);
    if (sums->arrays[index].hidden) show(*sums, index);
    thread.results.push_back({sums->arrays[index].at, site});
  }
  std::erase_if(thread.flying, [end](const auto& sums) { return sums->end <= end; });
  for (; thread.landed < end; ++thread.landed) {
    Product& product = group.product(thread.landed);
    check_fragment(site, instruction, product, index);
    product.a[index].at = nullptr;
    ++product.landed;
  }
  while (!group.products.empty() && group.products.front()->landed == kGroupThreads) {
    group.products.pop_front();
    ++group.first;
  }
}

// All lanes of the warp call together; `run` once.
template <class F>
void of_warp(Site site, const char* instruction, F run) {
  collective(site, instruction, kFullMask, nullptr, [&run](void**) { run(); });
}

}  // namespace

Warpgroup& warpgroup_of(const FiberThread& thread) {
  Block& block = *thread.block;
  const size_t index = static_cast<size_t>(thread.linear) / kGroupThreads;
  if (block.warpgroups.size() <= index) block.warpgroups.resize(index + 1);
  auto& group = block.warpgroups[index];
  if (group == nullptr) {
    group = std::make_shared<Warpgroup>();
    group->first_thread = static_cast<int>(index) * kGroupThreads;
  }
  return *group;
}

void issue_product(Site site, const ProductType& type, const ProductOperands& operands) {
  const Quiet quiet;
  FiberThread& thread = self();
  Warpgroup& group = warpgroup_of(thread);
  if (group.first_thread + kGroupThreads > static_cast<int>(thread.block->threads.size())) {
    fail(site, type.instruction,
         "the last threads of the block are no whole warpgroup of 128 threads");
  }
  ProductOperands mine = operands;
  collective(site, type.instruction, kFullMask, &mine, [&](void** lanes) {
    GroupWarp& warp = group.warps[warp_in_group(thread)];
    const uint64_t number = warp.issued;
    const auto& first = *static_cast<const ProductOperands*>(lanes[0]);
    if (number == group.first + group.products.size()) {
      group.products.push_back(std::make_shared<Product>());
      Product& made = *group.products.back();
      made.site = site;
      made.type = type;
      made.operands = first;
    }
    const std::shared_ptr<Product> product = group.products[number - group.first];
    const bool hides = schedule().asynchrony != Asynchrony::kEager;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto& from = *static_cast<const ProductOperands*>(lanes[lane]);
      check_same(site, *product, type, from);
      take_registers(site, group, *product, number, warp_in_group(thread) * kWarpSize + lane, from,
                     hides);
    }
    ++warp.issued;
    if (++product->issued == kGroupWarps) begin(group, product, number);
  });
}

void pin_registers(Site site, const void* registers, size_t bytes) {
  const Quiet quiet;
  constexpr const char* kName = "wgmma_pin";
  const FiberThread& self_thread = self();
  const int index = index_in_group(self_thread);
  Warpgroup& group = warpgroup_of(self_thread);
  GroupThread& thread = group.threads[index];
  for (const auto& sums : thread.flying) {
    if (!overlap(sums->arrays[index].at, bytes_of(*sums), registers, bytes)) continue;
    fail(ErrorKind::kState, site, kName,
         "accumulators of a product that no wgmma_wait_group has waited for");
  }
  for (const auto& product : group.products) {
    const Product::Fragment& a = product->a[index];
    if (a.at == nullptr || !overlap(a.at, sizeof(a.noted), registers, bytes)) continue;
    fail(ErrorKind::kState, site, kName,
         "registers of a of the product " + issued_at(*product) +
             ", which no wgmma_wait_group has waited for");
  }
  const auto* at = static_cast<const uint8_t*>(registers);
  std::erase_if(thread.results, [&](const GroupThread::Result& result) {
    return overlap(result.at, sizeof(float), registers, bytes);
  });
  std::erase_if(thread.pins,
                [&](const Pin& pin) { return overlap(pin.at, pin.values.size(), at, bytes); });
  thread.pins.push_back({at, std::vector<uint8_t>(at, at + bytes), site, false});
}

void product_fence(Site site) {
  const Quiet quiet;
  const FiberThread& thread = self();
  for (Pin& pin : warpgroup_of(thread).threads[index_in_group(thread)].pins) pin.fenced = true;
  of_warp(site, "wgmma.fence", [] {});
}

void commit_products(Site site) {
  const Quiet quiet;
  FiberThread& thread = self();
  Warpgroup& group = warpgroup_of(thread);
  of_warp(site, "wgmma.commit_group", [&] {
    GroupWarp& warp = group.warps[warp_in_group(thread)];
    if (warp.commits == group.groups.size()) group.groups.push_back(warp.issued);
    if (group.groups[warp.commits] != warp.issued) {
      fail(ErrorKind::kDivergence, site, "wgmma.commit_group",
           "the warpgroup's group " + std::to_string(warp.commits) + " ends behind product " +
               std::to_string(group.groups[warp.commits]) + " in another warp, behind " +
               std::to_string(warp.issued) + " in this one");
    }
    ++warp.commits;
  });
}

void wait_products(Site site, int pending) {
  const Quiet quiet;
  constexpr const char* kName = "wgmma.wait_group";
  if (pending < 0) fail(site, kName, std::to_string(pending) + " groups: expected 0 or more");
  FiberThread& thread = self();
  Warpgroup& group = warpgroup_of(thread);
  of_warp(site, kName, [&] {
    GroupWarp& warp = group.warps[warp_in_group(thread)];
    const auto kept = std::min<uint64_t>(static_cast<uint64_t>(pending), warp.commits);
    warp.waited = std::max(warp.waited, warp.commits - kept);
  });
  const uint64_t waited = group.warps[warp_in_group(thread)].waited;
  if (waited == 0) return;
  const uint64_t end = group.groups[waited - 1];
  while (std::any_of(group.warps.begin(), group.warps.end(),
                     [end](const GroupWarp& warp) { return warp.issued < end; })) {
    group.waiting.push_back(&thread);
    thread.block->grid->suspend(thread, {site, kName, -1});
  }
  land(site, kName, group, end);
}

void limit_registers(Site site, const char* instruction, int registers, bool increase) {
  const Quiet quiet;
  constexpr int kRegistersOfBlock = 65536;
  FiberThread& thread = self();
  Block& block = *thread.block;
  of_warp(site, instruction, [&] {
    int& limit = warpgroup_of(thread).register_limits[warp_in_group(thread)];
    if (limit != 0 && (increase ? registers < limit : registers > limit)) {
      fail(site, instruction,
           std::to_string(registers) + " registers, from " + std::to_string(limit));
    }
    limit = registers;
    int total = 0;  // of the warps that have said how many they have
    for (const auto& group : block.warpgroups) {
      for (int i = 0; group != nullptr && i < kGroupWarps; ++i) total += group->register_limits[i];
    }
    if (total * kWarpSize > kRegistersOfBlock) {
      fail(ErrorKind::kLimit, site, instruction,
           std::to_string(total * kWarpSize) + " registers in the block: it has at most " +
               std::to_string(kRegistersOfBlock));
    }
  });
}

void products_left(const FiberThread& thread) {
  const auto& groups = thread.block->warpgroups;
  const size_t number = static_cast<size_t>(thread.linear) / kGroupThreads;
  if (number >= groups.size() || groups[number] == nullptr) return;
  const GroupThread& mine = groups[number]->threads[index_in_group(thread)];
  if (!mine.flying.empty()) {
    const auto& product = *groups[number]->products.back();
    fail(ErrorKind::kState, product.site, product.type.instruction,
         "the thread leaves the kernel and has not waited for it");
  }
  if (!mine.results.empty()) {
    fail(ErrorKind::kUsage, mine.results.front().site, "wgmma.wait_group",
         "the thread leaves the kernel and has not pinned the results (wgmma_pin)");
  }
}

}  // namespace resnet_fused::emulator
