// The C interface of conv_bn_act on the GPU: what the bindings, a driver or the tests call. Knows
// no framework.
//
//   RfConvPlan plan;
//   if (rf_conv_bn_act_plan(&problem, &gpu, -1, 0, &plan, why, sizeof why) != 0) { /* see why */ }
//   // workspace: plan.workspace_bytes on the device, in any state
//   int error = rf_conv_bn_act_cuda(&problem, &plan, workspace, stream);
#pragma once

#include <cstddef>
#include <cstdint>

#include "flow.h"
#include "gpu.h"

extern "C" {

// out = act(scale * conv(x, weight) + shift [+ residual]). Tensors of four dimensions, strides in
// elements and not negative; out has no two elements in one place and overlaps no input.
struct RfConvBnAct {
  const void* x;         // [N, C, H, W]
  const void* weight;    // [K, C / groups, R, S]
  const void* residual;  // [N, K, P, Q]; null: none
  void* out;             // [N, K, P, Q]
  const void* scale;     // [K] float
  const void* shift;     // [K] float
  int32_t dtype;         // resnet_fused::DataType of x, weight, residual and out: not kFloat64
  int32_t relu;
  int32_t allow_tf32;  // float products may be rounded to TF32; without it float is refused
  int32_t reverse;     // the batch is walked from its end
  int32_t groups;
  int64_t x_size[4];
  int64_t weight_size[4];
  int64_t x_stride[4];
  int64_t weight_stride[4];
  int64_t residual_stride[4];
  int64_t out_stride[4];
  int64_t stride[2];  // vertical, horizontal
  int64_t padding[2];
  int64_t dilation[2];
  RfFlow flow;
  // Zeros, and again zeros when the launch has ended: a counter for each tile of a plan with
  // splits. Null, or too few: those of the workspace, cleared ahead of the kernel, which then
  // cannot begin early.
  uint32_t* arrivals;
  int64_t arrivals_count;
};

// One configuration: a tile and the way operands are read. It serves every dtype that fits.
struct RfConvConfiguration {
  const char* name;  // "128x64_4w4s", "narrow_128x64_4w4s", "tma_p128x256_3s"
  int32_t wide;      // operands are read 16 bytes at a time
  int32_t m;         // pixels of a tile
  int32_t n;         // channels of a tile
  int32_t warps_m;
  int32_t warps_n;
  int32_t stages;
  int32_t blocks;        // that share a multiprocessor, as its registers are limited
  int32_t step_bytes;    // of a row's reduction in one stage
  int32_t shared_bytes;  // of a block
  int32_t float32;       // whether it serves float: its output tile must fit as well
  int32_t tma = 0;       // operands come by TMA, wgmma multiplies: capability 9.0 alone
  // Pixels of all nine taps come at once, in so much shared memory as their rows' width takes; 0:
  // they do not. By TMA 1, and shared_bytes are the most there may be. By mma.sync the number of
  // windows that a block keeps, and shared_bytes are those of all else.
  int32_t window = 0;
  int32_t cluster = 0;  // splits are blocks of a cluster, so many at most; 0: they are not
  int32_t image = 0;    // x is an image of a few channels, and comes by its rows
};

struct RfConvPlan {
  int32_t configuration;
  int32_t splits;  // parts of the reduction
  int64_t workspace_bytes;
  int64_t launches;         // of so many images at most:
  int64_t images_a_launch;  // a launch counts pixels in 31 bits
  int64_t blocks;           // of the first launch
  double cycles;            // predicted, of all launches; for comparisons alone
  int32_t at_once = 0;      // all blocks of a launch run at one time
};

int32_t rf_conv_bn_act_configurations(void);
// Null for an index that there is not.
const RfConvConfiguration* rf_conv_bn_act_configuration(int32_t index);

// Chooses configuration and splits; -1 and 0 leave the choice open. Pure: sizes, strides and the
// pointers' alignment decide, nothing is read. 0, and in `why` the reason of the choice; or 1, and
// in `why` what stands against the problem or the wish.
int32_t rf_conv_bn_act_plan(const RfConvBnAct* problem, const RfGpu* gpu, int32_t configuration,
                            int32_t splits, RfConvPlan* plan, char* why, size_t why_bytes);

// Runs it on the current device and the given cudaStream_t; 0, or a cudaError_t. The workspace is
// aligned to 256 bytes; no other call may use it meanwhile. Nothing is launched for an empty
// output.
int rf_conv_bn_act_cuda(const RfConvBnAct* problem, const RfConvPlan* plan, void* workspace,
                        void* stream);

}  // extern "C"
