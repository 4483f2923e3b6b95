// Picks the object that was compiled for the best instruction set of the CPU at hand.
#include "bn_training.h"

using resnet_fused::BnTrainingCall;
using Body = void (*)(const BnTrainingCall*, int64_t, int64_t);

extern "C" {
void rf_bn_training_cpu_baseline(const BnTrainingCall*, int64_t, int64_t);
#if defined(RF_X86_VARIANTS)
void rf_bn_training_cpu_avx2(const BnTrainingCall*, int64_t, int64_t);
void rf_bn_training_cpu_avx512(const BnTrainingCall*, int64_t, int64_t);
#endif
}

static Body pick() {
#if defined(RF_X86_VARIANTS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return rf_bn_training_cpu_avx512;
  }
  if (avx2) return rf_bn_training_cpu_avx2;
#endif
  return rf_bn_training_cpu_baseline;
}

extern "C" void rf_bn_training_cpu(const BnTrainingCall* call, int64_t begin, int64_t end) {
  static const Body body = pick();
  body(call, begin, end);
}
