// Kernels whose cost is known by hand: bank conflicts, sectors and bytes; and those that show the
// schedule.
#include "probes.h"

namespace resnet_fused::probes {
namespace {

// One warp stores and loads one word a lane, `stride` words apart: gcd(stride, 32) lanes a bank.
template <int kStride>
void strided_words(const Memory& memory) {
  const auto at = base() + 4 * kStride * static_cast<uint32_t>(thread());
  ptx::store_shared<uint32_t>(at, 1);
  memory.out[thread()] = ptx::load_shared<uint32_t>(at);
}

// One warp moves 16 bytes a lane, rows of 64 bytes: lane l at row l / 4, chunk l % 4. Swizzled as
// chunk ^ (row / 2 % 4), each eight rows of one chunk lie in all banks.
void matrix_rows(const Memory& memory, bool swizzled) {
  const auto put = [&](int row, int chunk) {
    const int place = swizzled ? chunk ^ (row / 2 % 4) : chunk;
    return base() + 64 * static_cast<uint32_t>(row) + 16 * static_cast<uint32_t>(place);
  };
  ptx::cp_async<16>(put(thread() / 4, thread() % 4), memory.in + 4 * thread(), true);
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  ptx::sync_warp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, put(thread() % 8, thread() / 8));  // eight rows of one chunk a phase
  for (int i = 0; i < 4; ++i) ptx::store_global(memory.out + 4 * thread() + i, r[i]);
}

template <int kStride>
void global_words(const Memory& memory) {
  const auto value = ptx::load_global(memory.in + kStride * thread());
  ptx::store_global(memory.out + thread(), value);
}

// Lanes take 1 to 32 turns: the n-th turns of all lanes are one request.
void ragged(const Memory& memory) {
  for (int i = 0; i <= thread(); ++i) ptx::load_global(memory.in + 32 * i + thread());
  ptx::store_global(memory.out + thread(), 1u);
}

// Writes the order in which the threads came by.
void order_of_threads(const Memory& memory) {
  const uint32_t turn = ptx::atomic_add(memory.out, 1);
  ptx::store_global(memory.out + 1 + turn,
                    static_cast<uint32_t>(blockIdx.x) * 1000 + static_cast<uint32_t>(thread()));
}

// Reads shared memory by a pointer, behind the checks, to see when a copy takes effect.
void when_copies_land(const Memory& memory) {
  ptx::cp_async<4>(base() + 4 * thread(), memory.in + 100 + thread(), true);
  ptx::cp_async_commit_group();
  const auto* bytes = reinterpret_cast<const uint32_t*>(ptx::dynamic_shared());
  memory.out[thread()] = bytes[thread()];
  ptx::cp_async_wait_group<0>();
  memory.out[64 + thread()] = bytes[thread()];
}

void vector_store(const Memory& memory) {
  ptx::store_shared<uint4>(base() + 16 * thread(), uint4{1, 2, 3, 4});
  ptx::store_shared<uint2>(base() + 512 + 8 * thread(), uint2{1, 2});
  memory.out[0] = 1;
}

void tile(const Memory& memory) {
  if (thread() < 4) ptx::store_shared<float>(base() + 4 * thread(), 1.5f * thread());
  if (thread() == 0) ptx::cp_async<4>(base() + 16, memory.in, true);
  ptx::sync_threads();
  ptx::store_global(memory.out + thread(), 1u);  // <- tile
}

Probe warp(uint32_t shared_bytes, std::function<void(const Memory&)> kernel) {
  return {1, 32, shared_bytes, false, std::move(kernel)};
}

}  // namespace

void add_costs(Table& t) {
  t["stride_1"] = warp(4096, strided_words<1>);
  t["stride_2"] = warp(4096, strided_words<2>);
  t["stride_3"] = warp(4096, strided_words<3>);
  t["stride_8"] = warp(4096, strided_words<8>);
  t["stride_32"] = warp(4096, strided_words<32>);
  t["broadcast"] = warp(4, [](const Memory& m) {
    if (thread() == 0) ptx::store_shared<uint32_t>(base(), 1);
    ptx::sync_warp();
    m.out[thread()] = ptx::load_shared<uint32_t>(base());
  });
  t["vectors"] = warp(768, vector_store);
  t["rows"] = warp(512, [](const Memory& m) { matrix_rows(m, false); });
  t["rows_swizzled"] = warp(512, [](const Memory& m) { matrix_rows(m, true); });
  t["global_1"] = warp(0, global_words<1>);
  t["global_2"] = warp(0, global_words<2>);
  t["global_8"] = warp(0, global_words<8>);
  t["global_64"] = warp(0, global_words<64>);
  t["ragged"] = warp(0, ragged);
  t["order"] = {4, 96, 0, false, order_of_threads};
  t["landing"] = {1, 64, 256, false, when_copies_land};
  t["tile"] = {2, 64, 64, false, tile};
  t["read_only"] = warp(0, [](const Memory& m) {
    ptx::store_global(const_cast<uint32_t*>(m.in), 1u);  // <- read_only
  });
  t["beyond"] = warp(0, [](const Memory& m) {
    ptx::load_global(m.in + kWords + thread());  // <- beyond
  });
}

}  // namespace resnet_fused::probes
