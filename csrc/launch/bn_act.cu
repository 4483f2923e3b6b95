// The table of configurations of bn_act, and its launches.
#include "bn_act.h"

#include "../kernels/bn_act_sm80.cuh"
#include "launch.h"

namespace resnet_fused {
namespace {

// Shapes of a block of kBnActThreads threads: columns x rows. A block as wide as the row wastes no
// thread on the columns of narrow tensors; 256 columns x 16 bytes already fill a DRAM page.
constexpr int kBlockColumns[] = {1, 2, 4, 8, 16, 32, 64, 128, 256};

int block_columns(int64_t columns) {
  for (const int candidate : kBlockColumns) {
    if (candidate >= columns) return candidate;
  }
  return kBnActThreads;
}

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Whether the loop is a matrix whose rows are made of whole aligned vectors, and which one.
bool as_matrix(const BnActLoop& loop, int length, BnActMatrix* matrix, ChannelAxis* axis) {
  constexpr int kLast = kLoopDims - 1;
  const auto unit = [&](const int64_t* stride) { return stride[kLast] == 1; };
  const bool residual = loop.residual != nullptr;
  if (!unit(loop.x_stride) || !unit(loop.out_stride)) return false;
  if (residual && !unit(loop.residual_stride)) return false;
  if (!aligned(loop.x) || !aligned(loop.out) || !aligned(loop.residual)) return false;
  if (!aligned(loop.scale) || !aligned(loop.shift)) return false;
  if (loop.size[kLast] % length != 0 || loop.size[0] != 1) return false;
  int64_t rows = loop.size[1] * loop.size[2];
  int from = kLast - 1;  // the loop whose strides are the rows'
  if (loop.size[1] != 1) {
    // [N, C, HW]: the two outer loops must step through memory as one.
    const auto joined = [&](const int64_t* stride) {
      return stride[1] == stride[2] * loop.size[2];
    };
    if (loop.channel_stride[2] != 1 || !joined(loop.x_stride) || !joined(loop.out_stride)) {
      return false;
    }
    if (residual && !joined(loop.residual_stride)) return false;
  }
  *axis = loop.channel_stride[kLast] == 1 ? ChannelAxis::kColumn : ChannelAxis::kRow;
  if (*axis == ChannelAxis::kRow && loop.channel_stride[2] == 0 && loop.channels != 1) return false;
  *matrix = BnActMatrix{rows,
                        loop.size[kLast] / length,
                        loop.x_stride[from],
                        loop.residual_stride[from],
                        loop.out_stride[from],
                        loop.channels};
  return matrix->x_row_stride % length == 0 && matrix->out_row_stride % length == 0 &&
         (!residual || matrix->residual_row_stride % length == 0);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned clamp_grid(int64_t blocks, int64_t limit) {
  return static_cast<unsigned>(blocks < limit ? blocks : limit);
}

template <class T, bool kResidual>
int launch_residual(const BnActLoop& loop, const RfFlow& flow, cudaStream_t stream) {
  BnActMatrix matrix;
  ChannelAxis axis;
  if (as_matrix(loop, kVectorLength<T>, &matrix, &axis)) {
    const int columns = block_columns(matrix.columns);
    const dim3 block(columns, kBnActThreads / columns);
    const dim3 grid(clamp_grid(divide_up(matrix.rows, block.y * kBnActRows), INT32_MAX),
                    clamp_grid(divide_up(matrix.columns, columns), 65535));
    const auto kernel = axis == ChannelAxis::kColumn
                            ? bn_act_vector_kernel<T, kResidual, ChannelAxis::kColumn>
                            : bn_act_vector_kernel<T, kResidual, ChannelAxis::kRow>;
    return RF_LAUNCH_EARLY(flow.follows != 0, kernel, grid, block, 0, stream, loop, matrix,
                           flow.dependent != 0);
  }
  const unsigned blocks = clamp_grid(divide_up(loop.elements, kBnActThreads), INT32_MAX);
  return RF_LAUNCH_EARLY(flow.follows != 0, (bn_act_strided_kernel<T, kResidual>), blocks,
                         kBnActThreads, 0, stream, loop, flow.dependent != 0);
}

template <class T>
int launch(const BnActLoop& loop, const RfFlow& flow, cudaStream_t stream) {
  return loop.residual != nullptr ? launch_residual<T, true>(loop, flow, stream)
                                  : launch_residual<T, false>(loop, flow, stream);
}

}  // namespace
}  // namespace resnet_fused

extern "C" int rf_bn_act_cuda(const resnet_fused::BnActLoop* loop, const RfFlow* flow,
                              void* stream) {
  using namespace resnet_fused;
  if (loop->elements == 0) return cudaSuccess;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (loop->dtype) {
    case DataType::kFloat32:
      return launch<float>(*loop, *flow, cuda_stream);
    case DataType::kFloat64:
      return launch<double>(*loop, *flow, cuda_stream);
    case DataType::kFloat16:
      return launch<Float16>(*loop, *flow, cuda_stream);
    case DataType::kBFloat16:
      return launch<BFloat16>(*loop, *flow, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

extern "C" const char* rf_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
