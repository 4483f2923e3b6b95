// bn_act on the CPU: a range of elements of a BnActLoop, row by row of its innermost loop.
//
// The innermost loop runs along memory wherever the tensors allow it, and the compiler vectorises
// it. This file is compiled once per instruction set (see launch/bn_act_cpu_body.cpp), so it calls
// nothing that is shared between them.
#pragma once

#include <cstdint>

#include "../device/bn_act.h"

RF_NAMESPACE_BEGIN

namespace cpu {

constexpr int kLast = kLoopDims - 1;

// The operands' addresses at one element.
template <class T>
struct Cursor {
  const T* x;
  const T* residual;
  T* out;
  const Compute<T>* scale;
  const Compute<T>* shift;
};

// A position in the loop nest, and its cursor.
template <class T>
class Walk {
 public:
  Walk(const BnActLoop& loop, int64_t position) : loop_(loop) {
    for (int d = kLast; d >= 0; --d) {
      index_[d] = position % loop.size[d];
      position /= loop.size[d];
    }
    place();
  }

  const Cursor<T>& cursor() const { return cursor_; }
  int64_t column() const { return index_[kLast]; }

  // The start of the next row. Divisions would cost more than a short row's arithmetic.
  void next_row() {
    index_[kLast] = 0;
    for (int d = kLast - 1; d >= 0; --d) {
      if (++index_[d] < loop_.size[d]) break;
      index_[d] = 0;
    }
    place();
  }

 private:
  void place() {
    cursor_ = {static_cast<const T*>(loop_.x), static_cast<const T*>(loop_.residual),
               static_cast<T*>(loop_.out), static_cast<const Compute<T>*>(loop_.scale),
               static_cast<const Compute<T>*>(loop_.shift)};
    for (int d = 0; d < kLoopDims; ++d) {
      cursor_.x += index_[d] * loop_.x_stride[d];
      cursor_.out += index_[d] * loop_.out_stride[d];
      cursor_.scale += index_[d] * loop_.channel_stride[d];
      cursor_.shift += index_[d] * loop_.channel_stride[d];
      if (loop_.residual != nullptr) cursor_.residual += index_[d] * loop_.residual_stride[d];
    }
  }

  const BnActLoop& loop_;
  int64_t index_[kLoopDims];
  Cursor<T> cursor_;
};

// Unit strides everywhere; kPerElement: the channel changes with every element.
template <class T, bool kResidual, bool kPerElement>
void run_contiguous(const T* RF_RESTRICT x, const T* RF_RESTRICT residual, T* RF_RESTRICT out,
                    const Compute<T>* RF_RESTRICT scale, const Compute<T>* RF_RESTRICT shift,
                    int64_t length, BnAct<Compute<T>> op) {
  const Compute<T> scale0 = *scale;
  const Compute<T> shift0 = *shift;
  for (int64_t i = 0; i < length; ++i) {
    const Compute<T> a = kPerElement ? scale[i] : scale0;
    const Compute<T> b = kPerElement ? shift[i] : shift0;
    if constexpr (kResidual) {
      out[i] = narrow<T>(op(widen(x[i]), a, b, widen(residual[i])));
    } else {
      out[i] = narrow<T>(op(widen(x[i]), a, b));
    }
  }
}

template <class T, bool kResidual>
void run_strided(const BnActLoop& loop, const Cursor<T>& at, int64_t length, BnAct<Compute<T>> op) {
  for (int64_t i = 0; i < length; ++i) {
    const Compute<T> a = at.scale[i * loop.channel_stride[kLast]];
    const Compute<T> b = at.shift[i * loop.channel_stride[kLast]];
    const Compute<T> x = widen(at.x[i * loop.x_stride[kLast]]);
    T& out = at.out[i * loop.out_stride[kLast]];
    if constexpr (kResidual) {
      out = narrow<T>(op(x, a, b, widen(at.residual[i * loop.residual_stride[kLast]])));
    } else {
      out = narrow<T>(op(x, a, b));
    }
  }
}

template <class T, bool kResidual>
void run_rows(const BnActLoop& loop, int64_t begin, int64_t end) {
  const BnAct<Compute<T>> op{loop.relu ? Compute<T>(0) : -Compute<T>(__builtin_huge_val())};
  const bool unit = loop.x_stride[kLast] == 1 && loop.out_stride[kLast] == 1 &&
                    (!kResidual || loop.residual_stride[kLast] == 1);
  const bool per_element = loop.channel_stride[kLast] == 1;
  Walk<T> walk(loop, begin);
  for (int64_t left = end - begin; left > 0; walk.next_row()) {
    const Cursor<T>& at = walk.cursor();
    const int64_t row = loop.size[kLast] - walk.column();
    const int64_t length = row < left ? row : left;
    left -= length;
    if (!unit) {
      run_strided<T, kResidual>(loop, at, length, op);
    } else if (per_element) {
      run_contiguous<T, kResidual, true>(at.x, at.residual, at.out, at.scale, at.shift, length, op);
    } else {
      run_contiguous<T, kResidual, false>(at.x, at.residual, at.out, at.scale, at.shift, length,
                                          op);
    }
  }
}

template <class T>
void run(const BnActLoop& loop, int64_t begin, int64_t end) {
  if (loop.residual != nullptr) {
    run_rows<T, true>(loop, begin, end);
  } else {
    run_rows<T, false>(loop, begin, end);
  }
}

// Elements [begin, end) in the loop's own order; ranges may run on different threads.
inline void bn_act(const BnActLoop& loop, int64_t begin, int64_t end) {
  switch (loop.dtype) {
    case DataType::kFloat32:
      return run<float>(loop, begin, end);
    case DataType::kFloat64:
      return run<double>(loop, begin, end);
    case DataType::kFloat16:
      return run<Float16>(loop, begin, end);
    case DataType::kBFloat16:
      return run<BFloat16>(loop, begin, end);
  }
}

}  // namespace cpu

RF_NAMESPACE_END
