// mbarriers, bulk copies and the async proxy: kernels with one mistake each, beside the same kernel
// without it. Marks as in hazards.cpp.
#include "copies.h"

#include <tuple>

namespace resnet_fused::probes {
namespace {

// A ring of two slots: lane 0 of warp 0 copies 6 tiles, warps 1 and 2 write them out.
void ring(const Memory& memory, Mistake mistake) {
  constexpr int kTiles = 6;
  const ptx::TensorMap map = rows_of(memory.in);
  prepare(96, 1, 2, mistake);
  if (thread() == 0) {
    for (int tile = 0; tile < kTiles; ++tile) {
      const int slot = tile % 2;
      const auto round = static_cast<uint32_t>(tile / 2);
      if (mistake != Mistake::kNoEmptyWait) {
        ptx::mbarrier_wait_parity(barrier_at(2 + slot), (round & 1) ^ 1);  // <- empty
      }
      uint32_t bytes = kTileBytes;
      if (mistake == Mistake::kMoreBytes) bytes += 16;
      if (mistake == Mistake::kFewerBytes) bytes -= 16;
      ptx::mbarrier_arrive_expect_tx(barrier_at(slot), bytes);
      ptx::tma_load(tile_at(slot), &map, {0, kRows * tile}, barrier_at(slot));  // <- ring_tile
    }
  } else if (thread() >= 32) {
    for (int tile = 0; tile < kTiles; ++tile) {
      const int slot = tile % 2;
      uint32_t parity = static_cast<uint32_t>(tile / 2) & 1;
      if (mistake == Mistake::kWrongParity) parity ^= 1;
      if (mistake != Mistake::kNoFullWait) ptx::mbarrier_wait_parity(barrier_at(slot), parity);
      for (int i = thread() - 32; i < 32 * kRows; i += 64) {
        const auto value = ptx::load_shared<uint32_t>(tile_at(slot) + 4 * i);
        ptx::store_global(memory.out + 32 * kRows * tile + i, value);
      }
      ptx::sync_warp();
      const bool last = mistake == Mistake::kNoArrival && tile == 1;
      if (thread() % 32 == 0 && !last) ptx::mbarrier_arrive(barrier_at(2 + slot));
    }
  }
}

// All threads write a tile, one stores it; then they write the next into the same place.
void staged_store(const Memory& memory, Mistake mistake) {
  const ptx::TensorMap map = rows_of(memory.out);
  for (int tile = 0; tile < 2; ++tile) {
    for (int i = thread(); i < 32 * kRows; i += 64) {
      ptx::store_shared<uint32_t>(tile_at(0) + 4 * i, 1000 * tile + i);  // <- staged
    }
    const bool fences =
        mistake != Mistake::kNoFence && (mistake != Mistake::kOneFence || thread() == 0);
    if (fences) ptx::fence_proxy_async_shared();
    if (mistake != Mistake::kNoBarrier) ptx::sync_threads();
    if (thread() == 0) {
      ptx::tma_store(&map, {0, kRows * tile}, tile_at(0));  // <- the store
      ptx::bulk_commit_group();
      if (mistake == Mistake::kEarlyWrite) ptx::store_shared<uint32_t>(tile_at(0), 5);  // <- early
      if (mistake != Mistake::kNoWait) ptx::bulk_wait_group_read<0>();
    }
    if (mistake != Mistake::kUnorderedWrite) ptx::sync_threads();
  }
}

// The second of two stores in flight is not waited for.
void two_stores(const Memory& memory, bool enough) {
  const ptx::TensorMap map = rows_of(memory.out);
  for (int tile = 0; tile < 2; ++tile) {
    for (int i = thread(); i < 32 * kRows; i += 32) {
      ptx::store_shared<uint32_t>(tile_at(tile) + 4 * i, 7u);
    }
  }
  ptx::fence_proxy_async_shared();
  ptx::sync_warp();
  if (thread() == 0) {
    for (int tile = 0; tile < 2; ++tile) {
      ptx::tma_store(&map, {0, kRows * tile}, tile_at(tile));
      ptx::bulk_commit_group();
    }
    if (enough) {
      ptx::bulk_wait_group_read<0>();
    } else {
      ptx::bulk_wait_group_read<1>();
    }
    ptx::store_shared<uint32_t>(tile_at(1), 8u);  // <- two_stores
    ptx::bulk_wait_group<0>();
  }
}

// A store of a box of which the tensor has half, then a copy over all of the box.
void stored_in_part(const Memory& memory) {
  const ptx::TensorMap half = rows_of(memory.out, kRows / 2), all = rows_of(memory.in);
  for (int i = thread(); i < 32 * kRows; i += 32) ptx::store_shared(tile_at(0) + 4 * i, 7u);
  ptx::fence_proxy_async_shared();
  prepare(32, 1, 1, Mistake::kNone);
  if (thread() != 0) return;
  ptx::tma_store(&half, {0, 0}, tile_at(0));
  ptx::bulk_commit_group();
  ptx::bulk_wait_group_read<0>();
  ptx::mbarrier_arrive_expect_tx(barrier_at(0), kTileBytes);
  ptx::tma_load(tile_at(0), &all, {0, 0}, barrier_at(0));
  ptx::mbarrier_wait_parity(barrier_at(0), 0);
}

// A copy over bytes that a thread has written: through another proxy.
void copy_over(const Memory& memory, bool fence) {
  const ptx::TensorMap map = rows_of(memory.in);
  ptx::store_shared<uint32_t>(tile_at(0) + 4 * thread(), 0u);
  if (fence) ptx::fence_proxy_async_shared();
  prepare(32, 1, 1, Mistake::kNone);
  if (thread() == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier_at(0), kTileBytes);
    ptx::tma_load(tile_at(0), &map, {0, 0}, barrier_at(0));  // <- copy_over
  }
  ptx::mbarrier_wait_parity(barrier_at(0), 0);
  ptx::store_global(memory.out + thread(), ptx::load_shared<uint32_t>(tile_at(0) + 4 * thread()));
}

// Twice, a warp copies words one by one; another reads them behind an mbarrier, and stores them by
// a bulk copy. `increments`: one arrival of a thread beside those behind the copies.
void behind_copies(const Memory& memory, Mistake mistake, bool increments) {
  if (thread() == 0) ptx::mbarrier_init(barrier_at(0), increments ? 1 : 32);
  ptx::sync_threads();
  const auto lane = static_cast<uint32_t>(thread() % 32);
  for (uint32_t round = 0; round < 2; ++round) {
    const SharedAddress words = tile_at(static_cast<int>(round));
    if (thread() < 32) {
      ptx::cp_async<4>(words + 4 * lane, memory.in + 7 + 32 * round + lane, true);
      if (mistake != Mistake::kNoArrival && increments) {
        ptx::cp_async_mbarrier_arrive(barrier_at(0));
      } else if (mistake != Mistake::kNoArrival) {
        ptx::cp_async_mbarrier_arrive_noinc(barrier_at(0));
      }
      if (increments) ptx::sync_warp();
      if (increments && lane == 0) ptx::mbarrier_arrive(barrier_at(0));
    } else {
      if (mistake != Mistake::kNoFullWait) ptx::mbarrier_wait_parity(barrier_at(0), round);
      const auto value = ptx::load_shared<uint32_t>(words + 4 * lane);  // <- handed over
      ptx::store_global(memory.out + 64 * round + lane, value);
    }
    if (thread() == 32) {
      const bool fences =
          mistake != Mistake::kNoFence && (mistake != Mistake::kOneFence || round == 0);
      if (fences) ptx::fence_proxy_async_shared();
      ptx::bulk_store(memory.out + 64 * round + 32, words, 128);  // <- handed on
      ptx::bulk_commit_group();
      ptx::bulk_wait_group<0>();
    }
    ptx::sync_threads();
  }
}

// One thread copies a word of shared memory by bulk copies, there and back.
void round_trip(const Memory& memory, Mistake mistake) {
  prepare(32, 1, 1, mistake);
  if (thread() != 0) return;
  ptx::mbarrier_arrive_expect_tx(barrier_at(0), 64);
  ptx::bulk_load(tile_at(0), memory.in + 16, 64, barrier_at(0));
  if (mistake == Mistake::kLeaves) return;  // <- nobody waits
  if (mistake != Mistake::kNoWait) ptx::mbarrier_wait_parity(barrier_at(0), 0);
  ptx::bulk_store(memory.out, tile_at(0), 64);  // <- the copy back
  ptx::bulk_commit_group();
  ptx::bulk_wait_group<0>();
  ptx::store_global(memory.out + 16, ptx::load_global(memory.out + 3));
}

// An im2col copy with the taps of a 3x3 convolution of stride 2, two images of 5 x 6 pixels with 4
// words each; 8 pixels from the second output row on.
void im2col(const Memory& memory) {
  TensorMapRequest request;
  request.element = TensorElement::kUint32;
  request.rank = 4;
  request.address = const_cast<uint32_t*>(memory.in);
  request.sizes = {4, 6, 5, 2};
  request.strides = {16, 16 * 6, 16 * 6 * 5};
  request.box = {4};
  request.steps = {1, 2, 2, 1};
  request.pixels = 8;
  request.lower = {-1, -1};
  request.upper = {-1, -1};
  ptx::TensorMap map;
  if (encode_tensor_map(request, &map) != 0) throw std::logic_error(tensor_map_fault(request));
  prepare(32, 1, 1, Mistake::kNone);
  ptx::tma_prefetch(&map);
  for (uint32_t tap = 0; tap < 9; ++tap) {
    if (thread() == 0) {
      ptx::mbarrier_arrive_expect_tx(barrier_at(0), 128);
      ptx::tma_load_im2col(tile_at(0), &map, {0, -1, 1, 0},
                           {static_cast<uint16_t>(tap % 3), static_cast<uint16_t>(tap / 3)},
                           barrier_at(0));
    }
    ptx::mbarrier_wait_parity(barrier_at(0), tap & 1);
    ptx::store_global(memory.out + 32 * tap + thread(),
                      ptx::load_shared<uint32_t>(tile_at(0) + 4 * thread()));
    ptx::sync_warp();
  }
}

// A load or store in a launch that begins early, of what is no constant, before the wait.
void early(const Memory& memory, bool stores) {
  const ptx::TensorMap constant = rows_of(memory.in), other = rows_of(memory.out);
  prepare(32, 1, 1, Mistake::kNone);
  if (thread() == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier_at(0), 2 * kTileBytes);
    ptx::tma_load(tile_at(0), &constant, {0, 0}, barrier_at(0));
    if (stores) {
      ptx::mbarrier_complete_tx(barrier_at(0), kTileBytes);
      ptx::mbarrier_wait_parity(barrier_at(0), 0);
      ptx::tma_store(&other, {0, 0}, tile_at(0));  // <- early tma_store
      ptx::bulk_commit_group();
      ptx::bulk_wait_group<0>();
    } else {
      ptx::tma_load(tile_at(1), &other, {0, 0}, barrier_at(0));  // <- early tma_load
    }
  }
  ptx::mbarrier_wait_parity(barrier_at(0), 0);
  ptx::grid_dependency_wait();
}

void add_barriers(Table& t) {
  t["mbarrier_count_0"] = block(1, [](const Memory&) {
    ptx::mbarrier_init(barrier_at(0), 0);  // <- mbarrier_count_0
  });
  t["mbarrier_misaligned"] = block(1, [](const Memory&) {
    ptx::mbarrier_init(base() + 4, 1);  // <- mbarrier_misaligned
  });
  t["mbarrier_none"] = block(1, [](const Memory&) {
    ptx::mbarrier_arrive(barrier_at(0));  // <- mbarrier_none
  });
  t["mbarrier_twice"] = block(1, [](const Memory&) {
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::mbarrier_init(barrier_at(0), 1);  // <- mbarrier_twice
  });
  t["mbarrier_read"] = block(1, [](const Memory& m) {
    ptx::mbarrier_init(barrier_at(0), 1);
    m.out[0] = ptx::load_shared<uint32_t>(barrier_at(0) + 4);  // <- mbarrier_read
  });
  t["mbarrier_after_the_end"] = block(1, [](const Memory&) {
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::mbarrier_invalidate(barrier_at(0));
    ptx::mbarrier_arrive(barrier_at(0));  // <- mbarrier_after_the_end
  });
  t["mbarrier_too_many"] = block(1, [](const Memory&) {
    ptx::mbarrier_init(barrier_at(0), 2);
    ptx::mbarrier_arrive(barrier_at(0), 3);  // <- mbarrier_too_many
  });
  t["mbarrier_many_bytes"] = block(1, [](const Memory&) {
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::mbarrier_expect_tx(barrier_at(0), 1 << 20);  // <- mbarrier_many_bytes
  });
  t["mbarrier_old_state"] = block(1, [](const Memory&) {
    ptx::mbarrier_init(barrier_at(0), 1);
    const uint64_t state = ptx::mbarrier_arrive(barrier_at(0));
    ptx::mbarrier_arrive(barrier_at(0));
    ptx::mbarrier_try_wait(barrier_at(0), state);  // <- mbarrier_old_state
  });
  t["mbarrier_never"] = block(33, [](const Memory&) {
    if (thread() == 0) ptx::mbarrier_init(barrier_at(0), 3);
    ptx::sync_threads();
    if (thread() == 0) ptx::mbarrier_arrive_expect_tx(barrier_at(0), 48);
    if (thread() == 32) ptx::mbarrier_wait_parity(barrier_at(0), 0);  // <- mbarrier_never
  });
  t["mbarrier_phases"] = block(64, [](const Memory& m) {
    if (thread() == 0) ptx::mbarrier_init(barrier_at(0), 64);
    ptx::sync_threads();
    for (uint32_t phase = 0; phase < 5; ++phase) {
      ptx::store_shared<uint32_t>(tile_at(phase & 1) + 4 * thread(), 100 * phase + thread());
      const uint64_t state = ptx::mbarrier_arrive(barrier_at(0));
      if (phase % 2 == 0) {
        while (!ptx::mbarrier_try_wait(barrier_at(0), state)) {
        }
      } else {
        while (!ptx::mbarrier_test_wait_parity(barrier_at(0), phase & 1)) {
        }
      }
      const auto other = static_cast<uint32_t>(63 - thread());
      m.out[64 * phase + thread()] = ptx::load_shared<uint32_t>(tile_at(phase & 1) + 4 * other);
    }
    ptx::sync_threads();
    if (thread() == 0) ptx::mbarrier_invalidate(barrier_at(0));
  });
  t["mbarrier_late_expect"] = block(1, [](const Memory& m) {
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::mbarrier_complete_tx(barrier_at(0), 32);
    ptx::mbarrier_arrive(barrier_at(0));
    m.out[0] = ptx::mbarrier_test_wait_parity(barrier_at(0), 0);
    ptx::mbarrier_expect_tx(barrier_at(0), 32);
    m.out[1] = ptx::mbarrier_test_wait_parity(barrier_at(0), 0);
  });
  t["mbarrier_remade"] = block(64, [](const Memory&) {
    if (thread() == 0) ptx::mbarrier_init(barrier_at(0), 1);
    ptx::sync_threads();
    if (thread() == 0) {
      ptx::mbarrier_arrive(barrier_at(0));
      ptx::mbarrier_invalidate(barrier_at(0));
      ptx::mbarrier_init(barrier_at(0), 1);
      ptx::mbarrier_arrive(barrier_at(0));
    }
    if (thread() == 32) ptx::mbarrier_wait_parity(barrier_at(0), 0);  // <- mbarrier_remade
  });
  t["mbarrier_unordered"] = block(64, [](const Memory& m) {
    if (thread() == 0) ptx::mbarrier_init(barrier_at(0), 1);
    ptx::sync_threads();
    if (thread() == 0) {
      ptx::mbarrier_arrive(barrier_at(0));
      ptx::store_shared<uint32_t>(tile_at(0), 3);  // <- mbarrier_unordered
    }
    if (thread() == 32) {
      ptx::mbarrier_wait_parity(barrier_at(0), 0);
      m.out[0] = ptx::load_shared<uint32_t>(tile_at(0));  // <- mbarrier_unordered's reader
    }
  });
}

void add_ring(Table& t) {
  const std::pair<const char*, Mistake> rings[] = {
      {"ring", Mistake::kNone},
      {"ring_no_full_wait", Mistake::kNoFullWait},
      {"ring_no_empty_wait", Mistake::kNoEmptyWait},
      {"ring_wrong_parity", Mistake::kWrongParity},
      {"ring_no_init_fence", Mistake::kNoInitFence},
      {"ring_no_init_barrier", Mistake::kNoInitBarrier},
      {"ring_more_bytes", Mistake::kMoreBytes},
      {"ring_fewer_bytes", Mistake::kFewerBytes},
      {"ring_no_arrival", Mistake::kNoArrival},
  };
  for (const auto& [name, mistake] : rings) {
    t[name] = block(96, [mistake](const Memory& m) { ring(m, mistake); });
  }
}

void add_stores(Table& t) {
  const std::pair<const char*, Mistake> stores[] = {
      {"staged", Mistake::kNone},
      {"staged_no_fence", Mistake::kNoFence},
      {"staged_one_fence", Mistake::kOneFence},
      {"staged_no_barrier", Mistake::kNoBarrier},
      {"staged_no_wait", Mistake::kNoWait},
      {"staged_early_write", Mistake::kEarlyWrite},
      {"staged_unordered_write", Mistake::kUnorderedWrite},
  };
  for (const auto& [name, mistake] : stores) {
    t[name] = block(64, [mistake](const Memory& m) { staged_store(m, mistake); });
  }
  t["two_stores"] = block(32, [](const Memory& m) { two_stores(m, true); });
  t["two_stores_one_short"] = block(32, [](const Memory& m) { two_stores(m, false); });
  t["stored_in_part"] = block(32, stored_in_part);
  t["copy_over"] = block(32, [](const Memory& m) { copy_over(m, true); });
  t["copy_over_no_fence"] = block(32, [](const Memory& m) { copy_over(m, false); });
  t["round_trip"] = block(32, [](const Memory& m) { round_trip(m, Mistake::kNone); });
  t["round_trip_no_wait"] = block(32, [](const Memory& m) { round_trip(m, Mistake::kNoWait); });
  t["round_trip_leaves"] = block(32, [](const Memory& m) { round_trip(m, Mistake::kLeaves); });
  const std::tuple<const char*, Mistake, bool> behind[] = {
      {"behind_copies", Mistake::kNone, false},
      {"behind_copies_and_one", Mistake::kNone, true},
      {"behind_copies_no_wait", Mistake::kNoFullWait, false},
      {"behind_copies_no_fence", Mistake::kNoFence, false},
      {"behind_copies_one_fence", Mistake::kOneFence, false},
      {"behind_copies_no_arrival", Mistake::kNoArrival, false},
      {"behind_one_alone", Mistake::kNoArrival, true},
  };
  for (const auto& [name, mistake, increments] : behind) {
    t[name] = block(64, [=](const Memory& m) { behind_copies(m, mistake, increments); });
  }
  t["im2col"] = block(32, im2col);
  t["store_tail"] = block(32, [](const Memory& m) {
    const ptx::TensorMap map = rows_of(m.out, 11);  // the second tile has three rows
    for (int i = thread(); i < 3 * 32; i += 32) {
      ptx::store_shared<uint32_t>(tile_at(0) + 4 * i, 1 + i);
    }
    ptx::fence_proxy_async_shared();
    ptx::sync_warp();
    if (thread() == 0) {
      ptx::tma_store(&map, {0, 8}, tile_at(0));
      ptx::bulk_commit_group();
      ptx::bulk_wait_group<0>();
    }
  });
}

void add_maps(Table& t) {
  t["no_map"] = block(1, [](const Memory&) {
    const ptx::TensorMap map{};
    ptx::tma_store(&map, {0, 0}, tile_at(0));  // <- no_map
  });
  t["three_coordinates"] = block(1, [](const Memory& m) {
    const ptx::TensorMap map = rows_of(m.out);
    ptx::tma_store(&map, {0, 0, 0}, tile_at(0));  // <- three_coordinates
  });
  t["tiled_for_im2col"] = block(1, [](const Memory& m) {
    const ptx::TensorMap map = rows_of(m.in);
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::tma_load_im2col(tile_at(0), &map, {0, 0, 0}, {0}, barrier_at(0));  // <- tiled_for_im2col
  });
  t["box_misaligned"] = block(1, [](const Memory& m) {
    const ptx::TensorMap map = rows_of(m.in);
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::fence_mbarrier_init();
    ptx::tma_load(tile_at(0) + 64, &map, {0, 0}, barrier_at(0));  // <- box_misaligned
  });
  t["box_outside"] = block(1, [](const Memory& m) {
    const ptx::TensorMap map = rows_of(m.in);
    ptx::mbarrier_init(barrier_at(0), 1);
    ptx::fence_mbarrier_init();
    ptx::tma_load(tile_at(3) + 128, &map, {0, 0}, barrier_at(0));  // <- box_outside
  });
  t["bulk_null"] = block(1, [](const Memory&) {
    ptx::bulk_store(nullptr, tile_at(0), 16);  // <- bulk_null
  });
  for (const bool stores : {false, true}) {
    Probe probe = block(32, [stores](const Memory& m) { early(m, stores); });
    probe.early = true;
    t[stores ? "early_tma_store" : "early_tma_load"] = probe;
  }
  t["bulk_12_bytes"] = block(1, [](const Memory& m) {
    ptx::bulk_store(m.out, tile_at(0), 12);  // <- bulk_12_bytes
  });
}

}  // namespace

void add_copies(Table& table) {
  add_barriers(table);
  add_ring(table);
  add_stores(table);
  add_maps(table);
}

}  // namespace resnet_fused::probes
