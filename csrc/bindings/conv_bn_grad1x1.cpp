// conv_bn_grad1x1_out, conv_bn_grad1x1_plan, conv_bn_grad1x1_configurations: checks, then the plan,
// then the CUDA launch.
#include "../launch/conv_bn_grad1x1.h"

#include <optional>
#include <string>
#include <vector>

#include "conv.h"
#include "conv_gradients.h"

namespace resnet_fused {
namespace {

constexpr ConvKernel<RfConvBnGrad1x1> kConvBnGrad1x1 = {
    "conv_bn_grad1x1", rf_conv_bn_grad1x1_configurations, rf_conv_bn_grad1x1_configuration,
    rf_conv_bn_grad1x1_plan, rf_conv_bn_grad1x1_cuda};
constexpr int64_t kCoefficientRows = 3;  // A, B, C
constexpr int64_t kNormRows = 4;         // scale, shift, mean, invstd
constexpr int64_t kSumRows = 2;

// What is read, in the order of the schema.
struct Operands {
  const Tensor& dz;
  const std::optional<Tensor>& y;
  const std::optional<Tensor>& coefficients;
  const Tensor& x;
  const std::optional<Tensor>& norm;
  const Tensor& weight;
  const std::optional<Tensor>& addend;

  // visit(name, tensor) for each that there is, but dz.
  template <class Visit>
  void others(const Visit& visit) const {
    if (y) visit("y", *y);
    if (coefficients) visit("coefficients", *coefficients);
    visit("x", x);
    if (norm) visit("norm", *norm);
    visit("weight", weight);
    if (addend) visit("addend", *addend);
  }
};

// Everything but the sums, the weights' gradient and the devices, which no plan depends on.
RfConvBnGrad1x1 problem_of(const Operands& given, int64_t addend_stride, const Tensor& out) {
  const Tensor& dz = given.dz;
  RfConvBnGrad1x1 problem{};
  RfConvBnDgrad& image = problem.image;
  image.conv = gradient_problem({"dz", dz}, given.y, {"out", out}, {"weight", given.weight}, {1, 1},
                                {0, 0}, {1, 1}, 1, false);
  check_dtype("weight", given.weight, "dz", dz);
  const std::vector<int64_t> shape(out.sizes().begin(), out.sizes().end());
  check_dtype("x", given.x, "dz", dz);
  check_shape("x", given.x, "out's shape", shape);
  image.raw = given.x.const_data_ptr();
  copy_strides(given.x, image.raw_stride);
  if (given.y.has_value() != given.coefficients.has_value()) {
    fail(given.y ? "coefficients" : "y", ": expected beside ", given.y ? "y" : "coefficients",
         ", got none");
  }
  if (given.coefficients) {
    check_rows("coefficients", *given.coefficients, kCoefficientRows, dz.size(1));
    image.conv.scale = given.coefficients->const_data_ptr();
    image.affine = 1;
  }
  if (given.norm) {
    check_rows("norm", *given.norm, kNormRows, shape[1]);
    image.norm = given.norm->const_data_ptr();
    image.reduced = 1;
  }
  constexpr int64_t kMostStep = int64_t{1} << 30;
  if (addend_stride < 1 || addend_stride > kMostStep) {
    fail("addend_stride: expected 1 to ", kMostStep, ", got ", addend_stride);
  }
  image.addend_step = addend_stride;
  if (given.addend) {
    const auto each = [&](int d) { return (shape[d] + addend_stride - 1) / addend_stride; };
    check_dtype("addend", *given.addend, "dz", dz);
    check_shape("addend", *given.addend, "every addend_stride-th pixel of out",
                {shape[0], shape[1], each(2), each(3)});
    image.addend = given.addend->const_data_ptr();
    copy_strides(*given.addend, image.addend_stride);
    image.added = 1;
  }
  problem.dweight_dtype = image.conv.dtype;
  return problem;
}

PlanResult conv_bn_grad1x1_plan(Tensor dz, std::optional<Tensor> y,
                                std::optional<Tensor> coefficients, Tensor x,
                                std::optional<Tensor> norm, Tensor weight,
                                std::optional<Tensor> addend, int64_t addend_stride, Tensor out,
                                std::vector<int64_t> gpu, int64_t configuration, int64_t splits) {
  const RfConvBnGrad1x1 problem =
      problem_of({dz, y, coefficients, x, norm, weight, addend}, addend_stride, out);
  return plan_conv(kConvBnGrad1x1, problem, gpu_of(gpu), configuration, splits);
}

std::vector<std::string> conv_bn_grad1x1_configurations() {
  return configuration_names(kConvBnGrad1x1);
}

void conv_bn_grad1x1_out(Tensor dz, std::optional<Tensor> y, std::optional<Tensor> coefficients,
                         Tensor x, std::optional<Tensor> norm, Tensor weight,
                         std::optional<Tensor> addend, int64_t addend_stride, int64_t configuration,
                         int64_t splits, Tensor out, Tensor sums, Tensor dweight) {
  const Operands given{dz, y, coefficients, x, norm, weight, addend};
  RfConvBnGrad1x1 problem = problem_of(given, addend_stride, out);
  check_rows("sums", sums, norm ? kSumRows : 0, out.size(1));
  check_shape("dweight", dweight, "weight's shape", {weight.sizes().begin(), weight.sizes().end()});
  if (dweight.scalar_type() != ScalarType::Float) check_dtype("dweight", dweight, "dz", dz);
  problem.dweight_dtype = static_cast<int32_t>(data_type("dweight", dweight));
  copy_strides(dweight, problem.dweight_stride);
  const auto written = [&](const char* name, const Tensor& tensor) {
    check_device(name, tensor, "dz", dz);
    const OutputMemory memory(tensor, name);
    memory.apart_from("dz", dz);
    given.others([&](const char* read, const Tensor& other) { memory.apart_from(read, other); });
    return memory;
  };
  given.others([&](const char* name, const Tensor& one) { check_device(name, one, "dz", dz); });
  const OutputMemory memory = written("out", out);
  memory.apart_from("sums", sums);
  memory.apart_from("dweight", dweight);
  written("sums", sums).apart_from("dweight", dweight);
  written("dweight", dweight);
  if (out.is_cuda() && dz.numel() == 0 && out.numel() > 0) {
    fail("dz: it is empty, and there is no product to add up");
  }
  problem.image.sums = sums.mutable_data_ptr();
  problem.dweight = dweight.mutable_data_ptr();
  if (out.is_cuda() && out.numel() == 0) {
    torch::stable::zero_(sums);
    torch::stable::zero_(dweight);
  }
  run_conv(kConvBnGrad1x1, problem, configuration, splits, out);
}

}  // namespace

void define_conv_bn_grad1x1(torch::stable::detail::StableLibrary& library) {
  library.def(
      "conv_bn_grad1x1_out(Tensor dz, Tensor? y, Tensor? coefficients, Tensor x, Tensor? norm, "
      "Tensor weight, Tensor? addend, int addend_stride, int configuration, int splits, "
      "Tensor(a!) out, Tensor(b!) sums, Tensor(c!) dweight) -> ()");
  library.def(
      "conv_bn_grad1x1_plan(Tensor dz, Tensor? y, Tensor? coefficients, Tensor x, Tensor? norm, "
      "Tensor weight, Tensor? addend, int addend_stride, Tensor out, int[] gpu, "
      "int configuration, int splits) -> (int configuration, int splits, int workspace_bytes, "
      "float cycles, str why)");
  library.def("conv_bn_grad1x1_configurations() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, library) {
  library.impl("conv_bn_grad1x1_out", TORCH_BOX(&conv_bn_grad1x1_out));
}

// Refused behind the checks of the arguments, so that those are right or wrong without a GPU.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, library) {
  library.impl("conv_bn_grad1x1_out", TORCH_BOX(&conv_bn_grad1x1_out));
}

// Sizes, strides and alignment decide: any device will do, and meta tensors too.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, library) {
  library.impl("conv_bn_grad1x1_plan", TORCH_BOX(&conv_bn_grad1x1_plan));
  library.impl("conv_bn_grad1x1_configurations", TORCH_BOX(&conv_bn_grad1x1_configurations));
}

}  // namespace resnet_fused
