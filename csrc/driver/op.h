// The driver's ops: each reads its options, runs once, checks, and times where there is a GPU.
#pragma once

#include "../launch/flow.h"
#include "arguments.h"
#include "data.h"
#include "json.h"

namespace resnet_fused::driver {

// What all ops share.
struct Common {
  DataType dtype;
  Values values;
  Random random;
  int repeats;       // timed calls; 0: none
  bool toward_zero;  // sums of the matrix units are cut, not rounded: a wider bound
  RfFlow flow;       // of the ops that can begin early

  // Launches for the check: one that begins early has another one ahead of it.
  template <class F>
  void run(F launch) const {
    if (flow.follows != 0) launch();
    launch();
  }
};

// Throws UsageError where a shortcut is asked for, of an op that adds none.
inline void refuse_residual(const char* op, const Arguments& arguments) {
  if (arguments.flag("residual")) {
    throw UsageError("--residual: " + std::string(op) + " takes none");
  }
}

// Adds "elements", "wrong" and "worst" to the record; whether all is right.
inline bool report(const Verdict& verdict, Json& json) {
  json.add("elements", verdict.elements);
  json.add("wrong", verdict.wrong);
  json.add("worst", verdict.worst);
  return verdict.wrong == 0;
}

// Adds "milliseconds", the median, and "repeats" where there are times.
void report_times(std::vector<double> times, Json& json);
// Adds the median alone, in milliseconds, under a name of its own.
void report_median(const char* name, std::vector<double> times, Json& json);

// y = act(scale x + shift [+ residual]); reads n, c, h, w, residual, act, layout.
bool run_bn_act(const Arguments& arguments, Common& common, Json& json);
// y = act(scale conv(x, weight) + shift [+ residual]); float32 in TF32. Reads all shape options.
bool run_conv_bn_act(const Arguments& arguments, Common& common, Json& json);
// As that on e4m3 operands, with the result in --dtype or, --quantised, e4m3.
bool run_conv_bn_act_fp8(const Arguments& arguments, Common& common, Json& json);
// With dz = dy where not (y <= 0), else 0, or dy without act: dx = conv^T(round(scale * dz),
// weight) and dweight[k] = scale[k] * sum over pixels of dz[k] x. As conv_bn_act, but for residual.
bool run_conv_dgrad(const Arguments& arguments, Common& common, Json& json);
bool run_conv_wgrad(const Arguments& arguments, Common& common, Json& json);
// y = conv(x, weight), or of relu(scale x + shift) with --normed, and each channel's mean and M2.
// As conv_bn_act, but for residual and act.
bool run_conv_bn_stats(const Arguments& arguments, Common& common, Json& json);
// out = relu(scale x + shift + shortcut) and the same of a 1x1 convolution of out; the shortcut is
// always there, with --normed behind a BatchNorm of its own.
bool run_bn_add_act_conv_stats(const Arguments& arguments, Common& common, Json& json);
// With dy = dz, or round(A dz + (B y + C)) with --affine: the gradients of a convolution between
// two BatchNorms. As conv_bn_act, but for residual and act, and beside that: dx = conv^T(dy,
// weight), plus --addend's; with --normed masked, and summed
bool run_conv_bn_dgrad(const Arguments& arguments, Common& common, Json& json);
// dx masked by the output of a block, and summed with its raw output; residual: and a projection's
bool run_conv_bn_dgrad_end(const Arguments& arguments, Common& common, Json& json);
// dweight = sum over pixels of dy x, or of dy relu(scale x + shift) with --normed; float-weight
bool run_conv_bn_wgrad(const Arguments& arguments, Common& common, Json& json);
// Both, of a 1x1 convolution: what these two read, and what they judge.
bool run_conv_bn_grad1x1(const Arguments& arguments, Common& common, Json& json);
bool run_conv_bn_grad1x1_end(const Arguments& arguments, Common& common, Json& json);

// Training's passes over activations of n, c, h, w; see csrc/kernels. They read act, layout and,
// beside that:
// residual, normed (the shortcut has a BatchNorm of its own), part (it has so many channels)
bool run_bn_add_act(const Arguments& arguments, Common& common, Json& json);
// residual (the mask is read from the result, as a shortcut makes it), normed
bool run_bn_add_act_backward(const Arguments& arguments, Common& common, Json& json);
bool run_bn_backward_apply(const Arguments& arguments, Common& common, Json& json);
// r, s, stride, padding: the windows; both have a ReLU
bool run_bn_act_pool(const Arguments& arguments, Common& common, Json& json);
bool run_bn_act_pool_backward(const Arguments& arguments, Common& common, Json& json);
// Arithmetic on vectors of c values in float32 or float64, of n * h * w elements each; all read
// total (that number lies on the device) and, beside that:
bool run_bn_finalize(const Arguments& arguments, Common& common, Json& json);
// tracked, cumulative
bool run_bn_update_stats(const Arguments& arguments, Common& common, Json& json);
// frozen, residual (the shortcut's BatchNorm, whose sums have a row of their own)
bool run_bn_backward_finalize(const Arguments& arguments, Common& common, Json& json);
// out = maxpool(relu(scale conv(x, weight) + shift)), pooling 3x3 with stride 2 and padding 1;
// reads the convolution's shape options, of which the kernel takes r, s 7, stride 2.
bool run_stem(const Arguments& arguments, Common& common, Json& json);
// out = mean(x over h and w) weight^T + bias, of k classes; reads n, c, h, w, k, layout.
bool run_head(const Arguments& arguments, Common& common, Json& json);

// A chain of 1x1 convolutions: out[k] of x[c] with a shortcut, or a projection, and next of out.
// Reads n, c, h, w, k, next, projected, stride, out-stride, reverse, layout.
bool run_conv_chain(const Arguments& arguments, Common& common, Json& json);
// As that, of tensors in e4m3: --quantised is required.
bool run_conv_chain_fp8(const Arguments& arguments, Common& common, Json& json);
// A ResNet's convolutions from behind the stem in one launch: bottlenecks, --depths in each stage,
// of --k channels inside in the first. Reads n, c, h, w, k, depths, blocks, splits. Each layer has
// the bits of conv_bn_act in as many splits, whatever the data; small networks are held to the
// bound of float64 besides.
bool run_network(const Arguments& arguments, Common& common, Json& json);
// What a multiprocessor can do: bytes from L2 and memory, products by wgmma, meetings of blocks,
// launches; each beside what the plans count with. Reads ceiling. Adds "rates", an object of
// objects. Without repeats, and in the emulator, little is done and nothing timed.
bool run_ceilings(const Arguments& arguments, Common& common, Json& json);

}  // namespace resnet_fused::driver
