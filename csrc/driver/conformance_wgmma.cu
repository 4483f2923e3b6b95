// wgmma of every width, its groups, and setmaxnreg.
#include "../ptx/proxy.h"
#include "../ptx/registers.h"
#include "../ptx/wgmma.h"
#include "conformance.h"

namespace resnet_fused::conformance {
namespace {

using ptx::Major;

constexpr int kThreads = 128;
// Shared memory: room for the larger operand's rows of 128 bytes and for ten rows before them.
constexpr int image_bytes(int columns) { return 128 * ((columns > 64 ? columns : 64) + 32); }

#if defined(RF_HAS_WGMMA)

// Words 0-5 of an operand: start (from the first byte), leading, stride, swizzle, base offset, and
// where it is: 0 K-major, 1 MN-major, 2 in registers.
RF_DEVICE ptx::MatrixDescriptor descriptor_of(const uint32_t* words) {
  return ptx::matrix_descriptor(shared_base() + load_word(words, 0),
                                {static_cast<ptx::Swizzle>(load_word(words, 3)),
                                 load_word(words, 1), load_word(words, 2), load_word(words, 4)});
}

// Words in global memory -> shared memory, seen by products.
RF_DEVICE void publish(const uint32_t* words, int bytes) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += kThreads) {
    ptx::store_shared(shared_base() + 16 * i,
                      ptx::load_global(reinterpret_cast<const uint4*>(words) + i));
  }
  ptx::fence_proxy_async_shared();
  ptx::sync_threads();
}

template <int kCount>
RF_DEVICE void load_floats(float (&d)[kCount], const uint32_t* words) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    d[i] = __builtin_bit_cast(float, load_word(words, threadIdx.x * kCount + i));
  }
}
template <int kCount>
RF_DEVICE void store_floats(uint32_t* words, const float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    ptx::store_global(words + threadIdx.x * kCount + i, __builtin_bit_cast(uint32_t, d[i]));
  }
}

#endif

// input: [6] operand a, [6] operand b, whether d counts, three unused; [128, 4] registers of a;
// [128, N / 2] d; image_bytes(N) of shared memory
// output: [128, N / 2] d
template <class T, int kColumns>
struct Product {
  static constexpr int kThreads = conformance::kThreads;
  static constexpr int kOldestSm = 90;
  static constexpr int kRegisters = kColumns / 2;
  static constexpr uint32_t kSharedBytes = image_bytes(kColumns);
  static constexpr int kD = 16 + kThreads * 4;
  static constexpr int kImage = kD + kThreads * kRegisters;
  static constexpr int kInputWords = kImage + kSharedBytes / 4;
  static constexpr int kOutputWords = kThreads * kRegisters;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
#if defined(RF_HAS_WGMMA)
    publish(input + kImage, kSharedBytes);
    const auto a = descriptor_of(input);
    const auto b = descriptor_of(input + 6);
    const bool counts = load_word(input, 12) != 0;
    uint32_t registers[4];
    for (int i = 0; i < 4; ++i) registers[i] = load_word(input, 16 + threadIdx.x * 4 + i);
    float d[kRegisters];
    load_floats(d, input + kD);
    ptx::wgmma_pin(registers);
    ptx::wgmma_pin(d);
    // The fence belongs into the product's own branch: the compiler would put another one there.
    const auto shared = [&]<Major kA, Major kB>() {
      ptx::wgmma_fence();
      ptx::wgmma<T, kA, kB>(d, a, b, counts);
    };
    const auto mixed = [&]<Major kB>() {
      ptx::wgmma_fence();
      ptx::wgmma<T, kB>(d, registers, b, counts);
    };
    const uint32_t where = load_word(input, 5) * 2 + load_word(input, 11);
    if (where == 0) shared.template operator()<Major::kK, Major::kK>();
    if (where == 4) mixed.template operator()<Major::kK>();
    if constexpr (std::is_same_v<T, ptx::Bf16> || std::is_same_v<T, ptx::F16>) {
      if (where == 1) shared.template operator()<Major::kK, Major::kMn>();
      if (where == 2) shared.template operator()<Major::kMn, Major::kK>();
      if (where == 3) shared.template operator()<Major::kMn, Major::kMn>();
      if (where == 5) mixed.template operator()<Major::kMn>();
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(d);
    store_floats(output, d);
#endif
  }
};

// Two chains of products in three groups, the first chain read while the second may be under way:
// d0 = a0 b0 + a1 b1, d1 = a1 b0 + a0 b1, of 8 columns; a0, a1, b0 and b1 start at byte 0, 8192,
// 16384 and 17408, with 128 bytes a row, swizzled.
// input: shared memory
// output: [128, 4] d0, [128, 4] d1
struct ProductGroups {
  static constexpr int kThreads = conformance::kThreads;
  static constexpr int kOldestSm = 90;
  static constexpr uint32_t kSharedBytes = 18432;
  static constexpr int kInputWords = kSharedBytes / 4;
  static constexpr int kOutputWords = kThreads * 8;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
#if defined(RF_HAS_WGMMA)
    constexpr ptx::MatrixLayout kLayout{ptx::Swizzle::k128Bytes, 0, 1024};
    static_assert(kLayout.valid());
    publish(input, kSharedBytes);
    const auto a = ptx::matrix_descriptor(shared_base(), kLayout);
    const auto b = ptx::matrix_descriptor(shared_base() + 16384, kLayout);
    float d0[4], d1[4];
    for (int i = 0; i < 4; ++i) d0[i] = d1[i] = 0;
    ptx::wgmma_pin(d0);
    ptx::wgmma_pin(d1);
    ptx::wgmma_fence();
    ptx::wgmma<ptx::F16>(d0, a, b, false);
    ptx::wgmma_commit_group();
    ptx::wgmma<ptx::F16>(d0, a + 8192, b + 1024, true);
    ptx::wgmma_commit_group();
    ptx::wgmma<ptx::F16>(d1, a + 8192, b, false);
    ptx::wgmma<ptx::F16>(d1, a, b + 1024, true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    ptx::wgmma_pin(d0);
    store_floats(output, d0);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(d1);
    store_floats(output + kThreads * 4, d1);
#endif
  }
};

// The first warpgroup gives registers back, the second takes them; both then pass their words on.
// input, output: [256]
struct RegisterLimits {
  static constexpr int kThreads = 256;
  static constexpr int kOldestSm = 90;
  static constexpr uint32_t kSharedBytes = 0;
  static constexpr int kInputWords = kThreads;
  static constexpr int kOutputWords = kThreads;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
#if defined(RF_HAS_REGISTER_LIMITS)
    if (threadIdx.x < 128) {
      ptx::decrease_registers<24>();
    } else {
      ptx::increase_registers<240>();
    }
    ptx::store_global(output + threadIdx.x, load_word(input, threadIdx.x));
#endif
  }
};

}  // namespace

std::vector<Instruction> wgmma_instructions() {
  std::vector<Instruction> all = {
      describe<Product<ptx::F16, 16>>("wgmma_f16_16"),
      describe<Product<ptx::F16, 128>>("wgmma_f16_128"),
      describe<Product<ptx::Tf32, 8>>("wgmma_tf32_8"),
      describe<Product<ptx::Tf32, 72>>("wgmma_tf32_72"),
      describe<Product<ptx::Tf32, 256>>("wgmma_tf32_256"),
      describe<Product<ptx::E4m3, 8>>("wgmma_e4m3_8"),
      describe<Product<ptx::E4m3, 176>>("wgmma_e4m3_176"),
      describe<ProductGroups>("wgmma_groups"),
      describe<RegisterLimits>("setmaxnreg"),
  };
#define RF_WIDTH(N, ...) all.push_back(describe<Product<ptx::Bf16, N>>("wgmma_bf16_" #N));
  RF_WGMMA_SHAPES(RF_WIDTH)
#undef RF_WIDTH
  for (Instruction& one : all) one.of_sm90a = true;
  return all;
}

}  // namespace resnet_fused::conformance
