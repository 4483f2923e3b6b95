// Kernels that begin before the launch ahead has ended. `in` is a constant here, `out` is not: the
// launch ahead may still read or write it.
#include "../../csrc/ptx/mbarrier.h"
#include "../../csrc/ptx/tma.h"
#include "probes.h"

namespace resnet_fused::probes {
namespace {

struct What {
  bool waits = true;
  bool reads = false;       // of what is no constant, before the wait
  bool copies = false;      // likewise, asynchronously
  bool prefetches = false;  // likewise
  bool writes = false;      // before the wait
  bool counts = false;      // likewise, by an atomic
  bool stale = false;       // reads what is no constant behind the wait, by the read-only path
  bool leaves = false;      // the upper half of the block, without having waited
};

void begins_early(const Memory& memory, What what) {
  const int i = thread();
  ptx::prefetch_l2(memory.in + 32 * i);
  ptx::cp_async<4>(base() + 4 * i, memory.in + i, true);
  ptx::cp_async_commit_group();
  uint32_t value = ptx::load_global_read_only(memory.in + i);
  if (what.reads) value += ptx::load_global(memory.out + i);                // <- early_load
  if (what.copies) ptx::cp_async<4>(base() + 4 * i, memory.out + i, true);  // <- early_copy
  if (what.prefetches) ptx::prefetch_l2(memory.out + i);                    // <- early_prefetch
  if (what.writes) ptx::store_global(memory.out + i, 0u);                   // <- early_store
  if (what.counts) ptx::atomic_add_acq_rel(memory.out, 1u);                 // <- early_count
  if (what.leaves && i >= 32) return;
  if (what.waits) {
    ptx::grid_dependency_wait();  // <- early_wait
    ptx::grid_dependency_launch();
  }
  if (what.stale) value += ptx::load_global_read_only(memory.out + i);  // <- early_stale
  ptx::cp_async_wait_all();
  if (what.waits) {
    value += ptx::load_shared<uint32_t>(base() + 4 * i);
    ptx::store_global(memory.out + i, value + ptx::load_global(memory.out + i));
  }
}

// A bulk copy before the wait, of `in` or of `out`.
void copies_early(const uint32_t* from) {
  if (thread() == 0) {
    ptx::mbarrier_init(base(), 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(base(), 64);
    ptx::bulk_load(base() + 128, from, 64, base());  // <- early_bulk
    ptx::mbarrier_wait_parity(base(), 0);
  }
  ptx::grid_dependency_wait();
}

Probe probe(What what, bool early = true) {
  return {2, 64,   1024, false, [what](const Memory& memory) { begins_early(memory, what); },
          1, early};
}

}  // namespace

void add_early(Table& table) {
  table["early"] = probe({});
  table["early_load"] = probe({.reads = true});
  table["early_copy"] = probe({.copies = true});
  table["early_prefetch"] = probe({.prefetches = true});
  table["early_store"] = probe({.writes = true});
  table["early_count"] = probe({.counts = true});
  table["early_stale"] = probe({.stale = true});
  const auto copying = [&table](const char* name, bool constant) {
    const auto kernel = [constant](const Memory& m) { copies_early(constant ? m.in : m.out); };
    table[name] = {1, 32, 1024, false, kernel, 1, true};
  };
  copying("early_bulk", false);
  copying("early_bulk_constant", true);
  table["early_leaves"] = probe({.leaves = true});
  table["early_no_wait"] = probe({.waits = false});
  // Behind a launch that has ended all of this is right.
  table["late"] = probe({.waits = false, .reads = true, .prefetches = true, .writes = true}, false);
}

}  // namespace resnet_fused::probes
