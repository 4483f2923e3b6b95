// The judgement of a convolution with its epilogue, element by element against float64:
//
//     out = act(scale[k] * conv(x, weight)[k] + shift[k] [+ residual_factor residual]) out_factor
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "conv.h"
#include "float8.h"

namespace resnet_fused::driver {

// Of stored numbers; 1 where a number is worth itself.
struct Factors {
  double residual = 1;
  double out = 1;
};

// What a convolution reads, on the host too.
template <class T>
struct ConvInputs {
  const Operand<T>& x;
  const Operand<T>& weight;
  const Operand<T>* residual;  // null: none
  const Operand<float>& scale;
  const Operand<float>& shift;
  bool relu;
  Factors factors = {};
};

// Beyond `sum_error`, in parts of the products' magnitudes: Hopper is said to keep some 14 bits of
// a sum of e4m3 products, of which the kernel leaves it 128, four steps. See docs/fp8.md.
template <class T>
constexpr double kNarrowSums = 0;
#if !defined(RF_EMULATED)
template <>
inline constexpr double kNarrowSums<Float8> = 4 * 0x1p-13;
#endif

// Of each element of `out`, rounded once behind sums that may be off by their error times the
// magnitudes of the products and of the epilogue's terms. `tier`: kIntegers holds it bit for bit.
template <class In, class Out>
void judge(const Convolution& of, const Common& common, const ConvInputs<In>& in,
           const Operand<Out>& out, Values tier, Verdict& verdict) {
  const std::vector<Sum> sums = convolve(of, in.x, in.weight);
  const double error = sum_error<In>(common, of.c / of.groups * of.r * of.s);
  const int64_t step = of.out_at().stride[1];
  for (int64_t place = 0; place < static_cast<int64_t>(sums.size()); ++place) {
    const Sum& sum = sums[static_cast<size_t>(place)];
    const int64_t k = place / step % of.k;
    const double shortcut =
        in.residual != nullptr ? in.factors.residual * in.residual->at(place) : 0;
    const double products = std::fabs(in.scale.at(k)) * sum.magnitude;
    const double total = products + std::fabs(in.shift.at(k)) + std::fabs(shortcut);
    double expected = in.scale.at(k) * sum.value + in.shift.at(k) + shortcut;
    if (in.relu && expected < 0) expected = 0;
    verdict.rounded<Out>(out.at(place), expected * in.factors.out,
                         (error * total + kNarrowSums<In> * products) * in.factors.out, tier);
  }
}

}  // namespace resnet_fused::driver
