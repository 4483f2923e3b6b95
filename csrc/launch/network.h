// The C interface of a network's convolutions in one launch. Knows no framework.
//
//   RfNetworkPlan plan;
//   if (rf_network_plan(&network, &gpu, 0, &plan, why, sizeof why) != 0) { /* see why */ }
//   // workspace: plan.workspace_bytes on the device, the first plan.counter_bytes zeros
//   int error = rf_network_cuda(&network, &plan, workspace, stream);
//
// The frozen engine takes it where its user asks, or where it is predicted to win: whether it is
// faster than a graph of single kernels nobody has measured.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv_bn_act.h"
#include "gpu.h"

extern "C" {

// Convolutions in the order in which one stream would run them. What reads another one's output
// names its memory: from the addresses the plan sees which may run side by side. Weights, scales
// and shifts are constants: no layer writes them.
struct RfNetwork {
  const RfConvBnAct* layers;  // [count], of one dtype of 16 bits, all read 16 bytes at a time
  int32_t count;
  const int32_t* splits;  // [count], of each reduction; null, or 0 for one: the plan's choice
  const int32_t* pixels;  // [count], of each layer's tiles; likewise
  int32_t cluster;        // blocks of a cluster; 1: none, 0: the plan's choice
};

struct RfNetworkPlan {
  int32_t blocks;           // of every launch; all are on the GPU at once
  int32_t cluster;          // of them, that merge in shared memory; 1: they do in global memory
  int32_t launches;         // of 64 layers at most
  int32_t meetings;         // of all blocks, in all launches
  int64_t workspace_bytes;  // aligned to 256 bytes
  int64_t counter_bytes;    // in front of it: zeros before a run, and again behind it
};

// blocks: 0 leaves the choice open. Pure, as rf_conv_bn_act_plan. 0; or 1, and in `why` what stands
// against a layer or the wish.
int32_t rf_network_plan(const RfNetwork* network, const RfGpu* gpu, int32_t blocks,
                        RfNetworkPlan* plan, char* why, size_t why_bytes);

// What the plan makes of one layer.
struct RfNetworkLayer {
  int32_t splits;  // parts of its reduction
  int32_t pixels;  // of its tiles, which have 64 channels
  int32_t meets;   // whether all blocks meet before it
};
void rf_network_layer(const RfNetwork* network, const RfNetworkPlan* plan, int32_t index,
                      RfNetworkLayer* layer);

// Predicted, from the first block's start to the last one's end; good for comparisons alone.
double rf_network_cycles(const RfNetwork* network, const RfNetworkPlan* plan);

// Of conv_bn_act's configurations, the one that with as many splits gives the same bits.
int32_t rf_network_configuration(void);

// Runs it on the current device and the given cudaStream_t; 0, or a cudaError_t. No other call may
// use the workspace meanwhile.
int rf_network_cuda(const RfNetwork* network, const RfNetworkPlan* plan, void* workspace,
                    void* stream);

// Clusters of so many blocks that the current device has room for at once; 0, or a cudaError_t. The
// plan counts with GPCs of 16 multiprocessors, which a GPU may have fewer of. None where the kernel
// is not built for sm_90a; absent where kernels are emulated.
int rf_network_clusters(int32_t cluster, int32_t* clusters);

}  // extern "C"
