// Four strided tensors -> the shortest loop nest over them. A pure function of sizes and strides.
#include "bn_act.h"

namespace {

using resnet_fused::BnActLoop;
using resnet_fused::kLoopDims;

struct Dim {
  int64_t size;
  int64_t x;
  int64_t residual;
  int64_t out;
  int64_t channel;
};

// Whether `outer` goes on where `inner` ends, in every operand: then they are one loop.
bool merges(const Dim& outer, const Dim& inner) {
  return outer.x == inner.x * inner.size && outer.residual == inner.residual * inner.size &&
         outer.out == inner.out * inner.size && outer.channel == inner.channel * inner.size;
}

}  // namespace

extern "C" void rf_bn_act_plan(const RfBnActTensors* t, BnActLoop* loop) {
  Dim dims[kLoopDims];
  int count = 0;
  for (int d = 0; d < 4; ++d) {
    if (t->size[d] == 1) continue;
    const Dim dim{t->size[d], t->x_stride[d], t->residual ? t->residual_stride[d] : 0,
                  t->out_stride[d], d == 1 ? 1 : 0};
    // Insertion sort, stable, largest output stride first.
    int at = count++;
    for (; at > 0 && dims[at - 1].out < dim.out; --at) dims[at] = dims[at - 1];
    dims[at] = dim;
  }
  int kept = 0;
  for (int d = 0; d < count; ++d) {
    if (kept > 0 && merges(dims[kept - 1], dims[d])) {
      dims[d].size *= dims[kept - 1].size;
      dims[kept - 1] = dims[d];
    } else {
      dims[kept++] = dims[d];
    }
  }
  *loop = BnActLoop{t->x,         t->residual,
                    t->out,       t->scale,
                    t->shift,     static_cast<resnet_fused::DataType>(t->dtype),
                    t->relu != 0, t->size[0] * t->size[1] * t->size[2] * t->size[3],
                    t->size[1],   {},
                    {},           {},
                    {},           {}};
  for (int d = 0; d < kLoopDims; ++d) {
    const int from = d - (kLoopDims - kept);
    const Dim dim = from < 0 ? Dim{1, 0, 0, 0, 0} : dims[from];
    loop->size[d] = dim.size;
    loop->x_stride[d] = dim.x;
    loop->residual_stride[d] = dim.residual;
    loop->out_stride[d] = dim.out;
    loop->channel_stride[d] = dim.channel;
  }
  // A loop over a single element: any stride is right, and 1 takes the fast path.
  constexpr int kLast = kLoopDims - 1;
  if (kept == 0) {
    loop->x_stride[kLast] = loop->residual_stride[kLast] = loop->out_stride[kLast] = 1;
  }
}
