// ldmatrix, stmatrix, mma and the conversion to TF32.
#include "conformance.h"

namespace resnet_fused::conformance {
namespace {

constexpr int kRows = 32;     // of 16 bytes, in shared memory
constexpr int kRowWords = 4;  // 32 bits

// input: [32, 4] rows of shared memory, [32] the row whose address each lane passes
// output: [32, kMatrices] registers by lane
template <int kMatrices, bool kTransposed>
struct LoadMatrices : WarpBody {
  static constexpr uint32_t kSharedBytes = kRows * 16;
  static constexpr int kInputWords = kRows * kRowWords + 32;
  static constexpr int kOutputWords = 32 * kMatrices;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const ptx::SharedAddress base = shared_base();
    ptx::store_shared(base + 16 * lane,
                      ptx::load_global(reinterpret_cast<const uint4*>(input) + lane));
    ptx::sync_warp();
    const ptx::SharedAddress row = base + 16 * load_word(input, kRows * kRowWords + lane);
    uint32_t r[kMatrices];
    if constexpr (kMatrices == 4 && kTransposed) {
      ptx::ldmatrix_x4_trans(r, row);
    } else if constexpr (kMatrices == 4) {
      ptx::ldmatrix_x4(r, row);
    } else if constexpr (kTransposed) {
      ptx::ldmatrix_x2_trans(r, row);
    } else {
      ptx::ldmatrix_x2(r, row);
    }
    for (int m = 0; m < kMatrices; ++m) ptx::store_global(output + lane * kMatrices + m, r[m]);
  }
};

// input: [32, 4] registers by lane, [32] the row whose address each lane passes, each row once
// output: [32, 4] rows of shared memory
template <bool kTransposed>
struct StoreMatrices : WarpBody {
  static constexpr uint32_t kSharedBytes = kRows * 16;
  static constexpr int kInputWords = 32 * 4 + 32;
  static constexpr int kOutputWords = kRows * kRowWords;
  static constexpr int kOldestSm = 90;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
#if defined(RF_HAS_STMATRIX)
    const uint32_t lane = threadIdx.x;
    const ptx::SharedAddress base = shared_base();
    const ptx::SharedAddress row = base + 16 * load_word(input, 32 * 4 + lane);
    uint32_t r[4];
    for (int m = 0; m < 4; ++m) r[m] = load_word(input, lane * 4 + m);
    if constexpr (kTransposed) {
      ptx::stmatrix_x4_trans(row, r);
    } else {
      ptx::stmatrix_x4(row, r);
    }
    ptx::sync_warp();
    ptx::store_global(reinterpret_cast<uint4*>(output) + lane,
                      ptx::load_shared<uint4>(base + 16 * lane));
#endif
  }
};

struct Tf32 {};

// input: [32, 12] by lane: a[4], b[2], d[4], two unused
// output: [32, 4] d by lane
template <class T>
struct Multiply : WarpBody {
  static constexpr int kInputWords = 32 * 12;
  static constexpr int kOutputWords = 32 * 4;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = load_word(input, lane * 12 + i);
    for (int i = 0; i < 2; ++i) b[i] = load_word(input, lane * 12 + 4 + i);
    for (int i = 0; i < 4; ++i) {
      d[i] = __builtin_bit_cast(float, load_word(input, lane * 12 + 6 + i));
    }
    if constexpr (std::is_same_v<T, Tf32>) {
      ptx::mma_m16n8k8_tf32(d, a, b);
    } else {
      ptx::mma_m16n8k16<T>(d, a, b);
    }
    for (int i = 0; i < 4; ++i) {
      ptx::store_global(output + lane * 4 + i, __builtin_bit_cast(uint32_t, d[i]));
    }
  }
};

// input: [32] floats; output: [32] TF32
struct ToTf32 : WarpBody {
  static constexpr int kInputWords = 32;
  static constexpr int kOutputWords = 32;

  static RF_DEVICE void run(const uint32_t* input, uint32_t* output) {
    const uint32_t lane = threadIdx.x;
    const float value = __builtin_bit_cast(float, load_word(input, lane));
    ptx::store_global(output + lane, ptx::to_tf32(value));
  }
};

}  // namespace

std::vector<Instruction> matrix_instructions() {
  return {
      describe<LoadMatrices<4, false>>("ldmatrix_x4"),
      describe<LoadMatrices<4, true>>("ldmatrix_x4_trans"),
      describe<LoadMatrices<2, false>>("ldmatrix_x2"),
      describe<LoadMatrices<2, true>>("ldmatrix_x2_trans"),
      describe<StoreMatrices<false>>("stmatrix_x4"),
      describe<StoreMatrices<true>>("stmatrix_x4_trans"),
      describe<Multiply<ptx::Bf16>>("mma_m16n8k16_bf16"),
      describe<Multiply<ptx::F16>>("mma_m16n8k16_f16"),
      describe<Multiply<Tf32>>("mma_m16n8k8_tf32"),
      describe<ToTf32>("to_tf32"),
  };
}

}  // namespace resnet_fused::conformance
