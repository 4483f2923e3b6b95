// Launches: which blocks run when, and which of their threads runs next.
#include <algorithm>
#include <bit>
#include <memory>
#include <numeric>
#include <string>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {

thread_local Grid* running_grid __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr Site kLaunch = {"launch", 0};
constexpr int kMaxThreads = 1024;  // a block (CUDA Programming Guide, compute capabilities)
constexpr uint32_t kMaxGridYZ = 65535;
constexpr uint32_t kMaxGridX = 0x7FFFFFFF;
constexpr uint64_t kMaxResident = 30000;   // threads at once: each takes two of Linux's 65,530 maps
constexpr uint64_t kMaxBlocks = 1u << 26;  // of one launch, after the session's filter
// Warps of a plain launch whose accesses to global memory are held against each other: the record
// is as large as its square.
constexpr uint64_t kMostOrdered = 2048;
// Rounds of spinning in which nothing has changed, after which nothing will.
constexpr int kIdleRounds = 64;

uint3 index_in(uint64_t linear, dim3 size) {
  return {static_cast<uint32_t>(linear % size.x), static_cast<uint32_t>(linear / size.x % size.y),
          static_cast<uint32_t>(linear / (static_cast<uint64_t>(size.x) * size.y))};
}

void check_launch(const Session& session, dim3 grid, dim3 block, dim3 cluster,
                  uint32_t shared_bytes) {
  const auto refuse = [](const std::string& what) {
    fail(ErrorKind::kLimit, kLaunch, "launch", what);
  };
  if (in_kernel()) refuse("a kernel launches another one");
  if (block.count() < 1 || block.count() > kMaxThreads) {
    refuse(std::to_string(block.count()) + " threads a block: expected 1 to 1024");
  }
  if (block.z > 64) refuse("blockDim.z of " + std::to_string(block.z) + ": expected 1 to 64");
  if (grid.count() < 1) refuse("an empty grid");
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
           std::to_string(grid.z) + " blocks: expected at most 2147483647 x 65535 x 65535");
  }
  if (cluster.count() < 1 || cluster.count() > kMostBlocksOfACluster) {
    refuse(std::to_string(cluster.count()) + " blocks a cluster: expected 1 to " +
           std::to_string(kMostBlocksOfACluster));
  }
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    refuse("a grid that is no multiple of its clusters");
  }
  if (shared_bytes > session.shared_limit) {
    refuse(std::to_string(shared_bytes) + " bytes of dynamic shared memory: expected at most " +
           std::to_string(session.shared_limit));
  }
}

// What a fiber runs, but for the switch away at its end.
void run_thread(FiberThread& thread) {
  Grid& grid = *thread.block->grid;
  const std::function<void()>* kernel;
  {
    const Quiet quiet;
    running_thread = &thread;
    kernel = grid.kernel;
  }
  try {
    (*kernel)();
    const Quiet quiet;
    if (grid.early && !thread.waited) {
      fail(ErrorKind::kRace, kLaunch, "launch",
           "a thread leaves without griddepcontrol.wait, so that the end of this launch does not "
           "say that the one ahead has ended");
    }
    thread_left(thread);
  } catch (...) {
    const Quiet quiet;
    grid.error = std::current_exception();
  }
}

// The body of every fiber.
void fiber_main(void* argument) {
  Fiber::entered();
  auto& thread = *static_cast<FiberThread*>(argument);
  run_thread(thread);
  Fiber* next;
  {
    const Quiet quiet;
    next = &thread.block->grid->next_after_exit();
  }
  Fiber::switch_to(thread.fiber, *next, true);
}

// Epochs of new blocks come after all earlier ones, or start again before they overflow.
std::shared_ptr<Clocks> new_clocks(const Cluster& cluster, int warps) {
  uint32_t newest = 0;
  for (const Block* block : cluster.blocks) newest = std::max(newest, block->shared.newest());
  const auto all = static_cast<int>(cluster.blocks.size()) * warps;
  return std::make_shared<Clocks>(all, newest > 0xF0000000u ? 0 : newest);
}

void prepare_block(Grid& grid, Block& block, uint64_t linear, uint32_t shared_bytes,
                   const std::shared_ptr<Clocks>& clocks) {
  const auto threads = static_cast<int>(grid.block_size.count());
  const int warps = (threads + kWarpSize - 1) / kWarpSize;
  block.grid = &grid;
  block.linear = linear;
  block.alive = threads;
  block.barriers = {};
  block.warpgroups.clear();
  block.mbarriers.clear();
  block.shared.reset(shared_bytes, warps, clocks, static_cast<int>(block.rank) * warps);
  block.warps.resize(warps);
  while (static_cast<int>(block.threads.size()) < threads) {
    block.threads.push_back(std::make_unique<FiberThread>());
  }
  block.threads.resize(threads);
  for (int w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    const int lanes = std::min(kWarpSize, threads - w * kWarpSize);
    warp.exists = lanes == kWarpSize ? kFullMask : (1u << lanes) - 1;
    warp.ready = warp.exists;
    warp.done = 0;
    warp.at_barrier = 0;
    warp.meetings.clear();
  }
  for (int i = 0; i < threads; ++i) {
    FiberThread& thread = *block.threads[i];
    thread.thread_index = index_in(static_cast<uint64_t>(i), grid.block_size);
    thread.block_index = index_in(linear, grid.size);
    thread.block_size = grid.block_size;
    thread.grid_size = grid.size;
    thread.linear = i;
    thread.lane = i % kWarpSize;
    thread.warp = i / kWarpSize;
    thread.block = &block;
    thread.copies.clear();
    thread.group_sizes.clear();
    thread.uncommitted = 0;
    thread.polled = nullptr;
    thread.relaxed_loads.clear();
    thread.fenced = false;
    thread.known_at_fence.clear();
    thread.waited = false;
    thread.proxy_fences.clear();
    thread.init_fences.clear();
    thread.bulk_groups.clear();
    thread.bulk_open.clear();
    thread.async_known.clear();
    thread.cluster_arrived = false;
    thread.cluster_phase = 0;
    thread.fiber.prepare(fiber_main, &thread);
  }
}

// Makes the clusters of the blocks, which come cluster by cluster.
void prepare_clusters(Grid& grid, const std::vector<uint64_t>& linears, uint32_t shared_bytes) {
  const auto size = static_cast<size_t>(grid.cluster_size.count());
  const auto threads = static_cast<int>(grid.block_size.count());
  grid.clusters.clear();
  for (size_t first = 0; first < linears.size(); first += size) {
    Cluster& cluster = *grid.clusters.emplace_back(std::make_unique<Cluster>());
    cluster.alive = static_cast<int>(size) * threads;
    for (size_t rank = 0; rank < size; ++rank) {
      Block& block = *grid.blocks[first + rank];
      block.cluster = &cluster;
      block.rank = static_cast<uint32_t>(rank);
      cluster.blocks.push_back(&block);
    }
    const auto clocks = new_clocks(cluster, (threads + kWarpSize - 1) / kWarpSize);
    for (size_t rank = 0; rank < size; ++rank) {
      prepare_block(grid, *grid.blocks[first + rank], linears[first + rank], shared_bytes, clocks);
    }
  }
}

// Runs some blocks together until all of their threads have left.
void run_blocks(Grid& grid, const std::vector<uint64_t>& linears, uint32_t shared_bytes) {
  // ThreadSanitizer forgets what it knows of memory that is freed. In memory that blocks shared,
  // the accesses of one would race with the next one's, and the barriers of one would order it
  // before the next, as no fence of the kernel does.
  if (kThreadSanitizer) grid.blocks.clear();
  while (grid.blocks.size() < linears.size()) grid.blocks.push_back(std::make_unique<Block>());
  grid.blocks.resize(linears.size());
  grid.warps.clear();
  grid.lanes.clear();
  grid.alive = 0;
  grid.spinning.clear();
  grid.at_grid_barrier.clear();
  grid.effects.clear();
  prepare_clusters(grid, linears, shared_bytes);
  for (size_t i = 0; i < linears.size(); ++i) {
    Block& block = *grid.blocks[i];
    block.first_warp = static_cast<int>(grid.warps.size());
    grid.alive += block.alive;
    for (Warp& warp : block.warps) grid.warps.push_back(&warp);
    grid.lanes.resize(grid.warps.size() * kWarpSize, nullptr);
    for (const auto& thread : block.threads) {
      grid.lanes[static_cast<size_t>(block.first_warp) * kWarpSize + thread->linear] = thread.get();
    }
  }
  if (grid.order != nullptr) grid.order->begin_blocks(static_cast<int>(grid.warps.size()));
  grid.ready_warps.assign((grid.warps.size() + 63) / 64, 0);
  for (size_t w = 0; w < grid.warps.size(); ++w) grid.ready_warps[w / 64] |= uint64_t{1} << w % 64;
  grid.current_warp = -1;

  FiberThread* first = grid.pick();
  Fiber::switch_to(grid.main, first->fiber);
  running_thread = nullptr;
  // Stores that nobody has to wait for are there when the launch ends.
  while (!grid.error && !grid.effects.empty()) grid.effects.happen(0);
  for (const auto& block : grid.blocks) {
    for (Warp& warp : block->warps) warp.requests.flush();
    for (const auto& thread : block->threads) thread->fiber.release();
  }
  grid.session->blocks += linears.size();
  // Blocks learn nothing from each other by running one after another, so the host knows what they
  // did only when all have run, or one has failed.
  if (grid.error) {
    tell_acquire(&grid);
    std::rethrow_exception(grid.error);
  }
}

// The blocks of a cluster by rank: x first in the cluster, and the clusters x first in the grid.
std::vector<uint64_t> blocks_of_cluster(const Grid& grid, uint64_t cluster) {
  const dim3 size = grid.cluster_size;
  const dim3 clusters(grid.size.x / size.x, grid.size.y / size.y, grid.size.z / size.z);
  const uint3 at = index_in(cluster, clusters);
  std::vector<uint64_t> blocks;
  for (uint64_t rank = 0; rank < size.count(); ++rank) {
    const uint3 in = index_in(rank, size);
    const uint64_t x = uint64_t{at.x} * size.x + in.x;
    const uint64_t y = uint64_t{at.y} * size.y + in.y;
    const uint64_t z = uint64_t{at.z} * size.z + in.z;
    blocks.push_back((z * grid.size.y + y) * grid.size.x + x);
  }
  return blocks;
}

// The record of who has touched what global memory; null where nobody looks for races between
// blocks. A launch that is not cooperative is looked at where its blocks are interleaved.
std::unique_ptr<GlobalOrder> new_order(const Grid& grid, uint64_t blocks, bool interleaved) {
  const uint64_t warps = blocks * ((grid.block_size.count() + kWarpSize - 1) / kWarpSize);
  const bool looked_at = grid.cooperative || (interleaved && blocks > 1 && warps <= kMostOrdered);
  if (!looked_at || !grid.session->checking_races || kThreadSanitizer) return nullptr;
  return std::make_unique<GlobalOrder>(static_cast<int>(warps));
}

// The clusters to run, in the schedule's order. Without clusters each block is its own.
std::vector<uint64_t> cluster_order(Grid& grid, const Session& session) {
  const uint64_t size = grid.cluster_size.count();
  const uint64_t count = grid.size.count() / size;
  std::vector<uint64_t> order;
  if (size == 1) {
    const uint64_t first = std::min(session.first_block, count);
    const uint64_t last = std::min(session.last_block, count - 1);
    const uint64_t blocks = last >= first ? last - first + 1 : 0;
    if (blocks > kMaxBlocks) {
      fail(ErrorKind::kLimit, kLaunch, "launch",
           std::to_string(blocks) + " blocks to emulate: choose at most " +
               std::to_string(kMaxBlocks) + " by first_block and last_block");
    }
    order.resize(blocks);
    std::iota(order.begin(), order.end(), first);
  } else {
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t leader = blocks_of_cluster(grid, i).front();
      if (leader >= session.first_block && leader <= session.last_block) order.push_back(i);
    }
  }
  if (grid.schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (grid.schedule.order == Order::kShuffled) {
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[grid.random.below(static_cast<uint32_t>(i))]);
    }
  }
  return order;
}

// Which set bit comes next: the lowest, the highest or any.
int choose_bit(uint64_t bits, Grid& grid) {
  if (grid.schedule.order == Order::kForward) return std::countr_zero(bits);
  if (grid.schedule.order == Order::kReverse) return 63 - std::countl_zero(bits);
  for (uint32_t skip = grid.random.below(static_cast<uint32_t>(std::popcount(bits))); skip > 0;
       --skip) {
    bits &= bits - 1;
  }
  return std::countr_zero(bits);
}

}  // namespace

const Schedule& schedule() { return running_grid->schedule; }

void launch(dim3 size, dim3 block_size, uint32_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel, bool early) {
  launch_clusters(size, block_size, 1, shared_bytes, cooperative, kernel, early);
}

void launch_clusters(dim3 size, dim3 block_size, dim3 cluster_size, uint32_t shared_bytes,
                     bool cooperative, const std::function<void()>& kernel, bool early) {
  if (current_session == nullptr) {
    Session session;
    launch_clusters(size, block_size, cluster_size, shared_bytes, cooperative, kernel, early);
    return;
  }
  const Quiet quiet;
  Session& session = *current_session;
  check_launch(session, size, block_size, cluster_size, shared_bytes);
  Grid grid;
  grid.size = size;
  grid.block_size = block_size;
  grid.cluster_size = cluster_size;
  grid.cooperative = cooperative;
  grid.early = early;
  grid.kernel = &kernel;
  grid.session = &session;
  grid.schedule = session.schedule;
  // Launches of one session differ, and the n-th is always the same.
  grid.random = Random(session.schedule.seed + 0x9E3779B97F4A7C15ull * ++session.launches);
  const std::vector<uint64_t> order = cluster_order(grid, session);
  const uint64_t blocks = cluster_size.count();
  const uint64_t at_once =
      cooperative ? order.size() : std::max<uint64_t>(session.resident_blocks / blocks, 1);
  if (cooperative && size.count() > session.cooperative_blocks) {
    fail(ErrorKind::kLimit, kLaunch, "launch",
         std::to_string(size.count()) + " blocks that wait for one another: " +
             std::to_string(session.cooperative_blocks) + " fit on the GPU at one time");
  }
  if (std::min<uint64_t>(at_once, order.size()) * blocks * block_size.count() > kMaxResident) {
    fail(ErrorKind::kLimit, kLaunch, "launch",
         std::to_string(at_once * blocks) + " blocks of " + std::to_string(block_size.count()) +
             " threads at once: the emulator runs at most " + std::to_string(kMaxResident) +
             " threads");
  }
  running_grid = &grid;
  grid.order = new_order(grid, order.size() * blocks, at_once > 1);
  struct Reset {
    ~Reset() { running_grid = nullptr; }
  } reset;
  for (size_t i = 0; i < order.size(); i += at_once) {
    std::vector<uint64_t> linears;
    for (size_t k = i; k < std::min<size_t>(i + at_once, order.size()); ++k) {
      if (blocks == 1) {
        linears.push_back(order[k]);
      } else {
        for (const uint64_t linear : blocks_of_cluster(grid, order[k])) linears.push_back(linear);
      }
    }
    run_blocks(grid, linears, shared_bytes);
  }
  tell_acquire(&grid);
}

void Grid::make_ready(const Block& block, int warp, uint32_t lanes) {
  const auto w = static_cast<size_t>(block.first_warp + warp);
  warps[w]->ready |= lanes;
  ready_warps[w / 64] |= uint64_t{1} << w % 64;
}

FiberThread* Grid::pick() {
  if (current_warp < 0 || warps[current_warp]->ready == 0) {
    current_warp = pick_warp();
    if (current_warp < 0) return nullptr;
  }
  Warp& warp = *warps[current_warp];
  const int lane = choose_bit(warp.ready, *this);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps[current_warp / 64] &= ~(uint64_t{1} << current_warp % 64);
  FiberThread* thread = lanes[static_cast<size_t>(current_warp) * kWarpSize + lane];
  return thread;
}

int Grid::pick_warp() {
  const auto words = static_cast<int>(ready_warps.size());
  for (int attempt = 0; attempt < 2; ++attempt) {
    const int start = schedule.order == Order::kShuffled
                          ? static_cast<int>(random.below(static_cast<uint32_t>(words)))
                          : 0;
    for (int i = 0; i < words; ++i) {
      int word = (start + i) % words;
      if (schedule.order == Order::kReverse) word = words - 1 - word;
      if (ready_warps[word] != 0) return word * 64 + choose_bit(ready_warps[word], *this);
    }
    // What is under way happens when nobody can go on without it.
    if (!effects.empty()) {
      const auto pending = static_cast<uint32_t>(effects.pending());
      effects.happen(schedule.order == Order::kShuffled ? random.below(pending) : 0);
      return pick_warp();
    }
    // Nobody else can run: those who wait for a value in memory look again, unless they have looked
    // often enough at a memory that nobody changes.
    if (spinning.empty()) return -1;
    idle_rounds = progress == progress_seen ? idle_rounds + 1 : 0;
    progress_seen = progress;
    if (idle_rounds > kIdleRounds) return -1;
    for (const FiberThread* thread : spinning) {
      make_ready(*thread->block, thread->warp, 1u << thread->lane);
    }
    spinning.clear();
  }
  return -1;
}

void Grid::suspend(FiberThread& thread, Wait wait) {
  tell_release(this);  // to the host, should the thread never go on
  thread.wait = wait;
  settle_effects();
  FiberThread* next = pick();
  if (next == nullptr) {
    fail(ErrorKind::kDeadlock, wait.site, wait.instruction, "deadlock: " + who_waits());
  }
  if (next == &thread) return;
  Fiber::switch_to(thread.fiber, next->fiber);
  running_thread = &thread;
}

Fiber& Grid::next_after_exit() {
  tell_release(this);
  FiberThread* next = nullptr;
  try {
    if (!error && alive > 0) {
      next = pick();
      if (next == nullptr) {
        const Wait wait = first_wait();
        fail(ErrorKind::kDeadlock, wait.site, wait.instruction, "deadlock: " + who_waits());
      }
    }
  } catch (...) {
    error = std::current_exception();
    next = nullptr;
  }
  return next != nullptr ? next->fiber : main;
}

void yield(Site site, const char* why) {
  const Quiet quiet;
  FiberThread& thread = self();
  Grid& grid = *thread.block->grid;
  grid.spinning.push_back(&thread);
  grid.suspend(thread, {site, why, -1});
}

}  // namespace resnet_fused::emulator
