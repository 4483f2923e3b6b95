// Compiled once per instruction set: RF_ISA names the one that this object is for.
#include "../kernels/bn_act_pool_cpu.h"
#include "../kernels/bn_training_cpu.h"
#include "../kernels/bn_training_tiles_cpu.h"

#define RF_JOIN2(a, b) a##b
#define RF_JOIN(a, b) RF_JOIN2(a, b)

extern "C" void RF_JOIN(rf_bn_training_cpu_, RF_ISA)(const resnet_fused::BnTrainingCall* call,
                                                     int64_t begin, int64_t end) {
  resnet_fused::RF_ISA::cpu::bn_training(*call, begin, end);
}
