// Compiled once per instruction set: RF_ISA names the one that this object is for.
#include "../kernels/bn_act_cpu.h"

#define RF_JOIN2(a, b) a##b
#define RF_JOIN(a, b) RF_JOIN2(a, b)

extern "C" void RF_JOIN(rf_bn_act_cpu_, RF_ISA)(const resnet_fused::BnActLoop* loop, int64_t begin,
                                                int64_t end) {
  resnet_fused::RF_ISA::cpu::bn_act(*loop, begin, end);
}
