// The C interface of training's CPU kernels: plan, tasks in any order on any thread, merge.
#pragma once

#include <cstdint>

#include "../device/bn_training.h"

extern "C" {

// Cuts the work into tiles; fills call->tiles. A pure function of sizes and strides.
void rf_bn_training_plan(resnet_fused::BnTrainingCall* call);

// How many tasks there are, and how many doubles they need as workspace.
int64_t rf_bn_training_tasks(const resnet_fused::BnTrainingCall* call);
int64_t rf_bn_training_workspace(const resnet_fused::BnTrainingCall* call);

// Tasks [begin, end) on this thread, in the best instruction set of this CPU.
void rf_bn_training_cpu(const resnet_fused::BnTrainingCall* call, int64_t begin, int64_t end);

// Behind all tasks: joins the workspace into sums, in a fixed order.
void rf_bn_training_merge(const resnet_fused::BnTrainingCall* call);

}  // extern "C"
