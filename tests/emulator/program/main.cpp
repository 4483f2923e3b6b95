// The probes under a sanitizer: `probes NAME [ORDER]` runs one with the emulator's own checks off,
// so that what is found is the sanitizer's finding. Exits with 2 for an error of the emulator.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../probes.h"

using namespace resnet_fused;

namespace {

// Out of bounds by a word, and behind that nothing: for AddressSanitizer.
void store_behind(const probes::Memory& memory) {
  const int at = probes::kWords - 31 + probes::thread();
  ptx::store_global(memory.out + at, 1u);  // <- store_behind
}

void copy_from_behind(const probes::Memory& memory) {
  const int at = probes::kWords - 31 + probes::thread();
  ptx::cp_async<4>(probes::base() + 4 * probes::thread(), memory.in + at, true);  // <- copy_behind
  ptx::cp_async_wait_all();
}

// Block 1 reads what block 0 wrote; an ordinary flag orders nothing.
void flag_without_order(const probes::Memory& memory) {
  if (blockIdx.x == 0) ptx::store_global(memory.out + 8, 5u);  // <- no order, the store
  const uint32_t turn = ptx::atomic_add(memory.out, 1);
  if (turn == gridDim.x - 1 && blockIdx.x != 0) {
    ptx::store_global(memory.out + 9, ptx::load_global(memory.out + 8));  // <- no order, the load
  }
}

void fenced_flag(const probes::Memory& memory) {
  if (blockIdx.x == 0) ptx::store_global(memory.out + 8, 5u);
  ptx::fence_acq_rel_gpu();
  const uint32_t turn = ptx::atomic_add(memory.out, 1);
  ptx::fence_acq_rel_gpu();
  if (turn == gridDim.x - 1 && blockIdx.x != 0) {
    ptx::store_global(memory.out + 9, ptx::load_global(memory.out + 8));
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: probes NAME [0 forward | 1 reverse | 2 shuffled]\n");
    return 1;
  }
  probes::Table table;
  probes::add_hazards(table);
  probes::add_costs(table);
  probes::add_copies(table);
  probes::add_clusters(table);
  probes::add_products(table);
  probes::add_grids(table);
  table["store_behind"] = {1, 32, 0, false, store_behind};
  table["copy_from_behind"] = {1, 32, 128, false, copy_from_behind};
  table["flag_without_order"] = {2, 1, 0, false, flag_without_order};
  table["fenced_flag"] = {2, 1, 0, false, fenced_flag};
  const auto found = table.find(arguments[1]);
  if (found == table.end()) {
    std::fprintf(stderr, "there is no probe '%s'\n", arguments[1]);
    return 1;
  }
  // On the heap, each between AddressSanitizer's redzones.
  constexpr size_t kBytes = sizeof(uint32_t) * probes::kWords;
  const std::unique_ptr<uint32_t, decltype(&std::free)> in(
      static_cast<uint32_t*>(std::aligned_alloc(128, kBytes)), &std::free);
  const std::unique_ptr<uint32_t, decltype(&std::free)> out(
      static_cast<uint32_t*>(std::aligned_alloc(128, kBytes)), &std::free);
  for (int i = 0; i < probes::kWords; ++i) in.get()[i] = static_cast<uint32_t>(i);
  std::memset(out.get(), 0, kBytes);
  const probes::Memory memory{in.get(), out.get()};

  emulator::Session session;
  session.schedule.asynchrony = emulator::Asynchrony::kLazy;
  session.schedule.order = static_cast<emulator::Order>(count > 2 ? std::atoi(arguments[2]) : 0);
  session.checking_races = false;
  session.checking_unwritten = false;
  const probes::Probe& probe = found->second;
  try {
    probes::launch(probe, memory);
  } catch (const emulator::Error& error) {
    std::fprintf(stderr, "%s: %s\n", emulator::name_of(error.kind), error.what());
    return 2;
  }
  return 0;
}
