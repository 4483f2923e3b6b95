// The scheduler's side of a warpgroup: its products under way, and whose registers are whose.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "async_proxy.h"
#include "block.h"
#include "warpgroup.h"

namespace resnet_fused::emulator {

constexpr int kGroupWarps = 4;
constexpr int kGroupThreads = kGroupWarps * kWarpSize;
constexpr int kProductRows = 64;

// The accumulators of a chain of products, from the first one's issue until each thread has waited
// for the last one. The threads' arrays hold NaN from the issue until the sums are shown.
struct Sums {
  struct Array {
    float* at = nullptr;   // of a thread that has issued one of the products
    bool hidden = false;   // holds NaN
    uint64_t product = 0;  // the number of the latest one that it has issued
  };
  int registers;
  std::array<Array, kGroupThreads> arrays;
  std::vector<float> values;  // [threads, registers]: as the products so far have left them
  uint64_t end = 0;           // the number behind the chain's last product so far
};

struct Product {
  Site site;
  ProductType type;
  ProductOperands operands;  // those of the warp that came first
  std::shared_ptr<Sums> sums;
  struct Fragment {  // of a in registers
    const uint32_t* at = nullptr;
    uint32_t noted[4];  // at the issue
  };
  std::array<Fragment, kGroupThreads> a;
  int issued = 0;  // warps that have
  int landed = 0;  // threads that have waited for it
  AsyncRead read;
  uint64_t effect = 0;
};

// An array that its thread has pinned.
struct Pin {
  const uint8_t* at;
  std::vector<uint8_t> values;
  Site site;
  bool fenced;
};

struct GroupThread {
  std::vector<Pin> pins;
  std::vector<std::shared_ptr<Sums>> flying;
  struct Result {  // waited for, not pinned since
    const float* at;
    Site site;
  };
  std::vector<Result> results;
  uint64_t landed = 0;  // products that it has waited for
};

struct GroupWarp {
  uint64_t issued = 0;        // products
  uint64_t commits = 0;       // groups
  uint64_t waited = 0;        // groups
  uint64_t reads_waited = 0;  // products
};

// Products and groups are numbered from the block's start.
struct Warpgroup {
  int first_thread;
  std::array<GroupWarp, kGroupWarps> warps;
  std::array<GroupThread, kGroupThreads> threads;
  std::deque<std::shared_ptr<Product>> products;  // not yet waited for by all
  uint64_t first = 0;                             // number of the front one
  std::vector<uint64_t> groups;                   // the number behind each group's last product
  std::vector<FiberThread*> waiting;              // for others to issue
  uint32_t queue = 0;                             // of effects
  std::array<int, kGroupWarps> register_limits = {};

  Product& product(uint64_t number) { return *products[number - first]; }
};

// The running thread's warpgroup, made when first asked for.
Warpgroup& warpgroup_of(const FiberThread& thread);

// Works a product out: called when it takes effect.
void multiply(Product& product);

}  // namespace resnet_fused::emulator
