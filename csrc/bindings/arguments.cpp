#include "arguments.h"

#include <algorithm>

namespace resnet_fused {

std::string shape_of(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
  text << ']';
  return text.str();
}

std::string shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return shape_of(std::vector<int64_t>(sizes.begin(), sizes.end()));
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    default:
      return "another dtype";
  }
}

DataType data_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DataType::kFloat32;
    case ScalarType::Double:
      return DataType::kFloat64;
    case ScalarType::Half:
      return DataType::kFloat16;
    case ScalarType::BFloat16:
      return DataType::kBFloat16;
    default:
      fail(name, ": expected float32, float64, float16 or bfloat16, got dtype number ",
           static_cast<int>(tensor.scalar_type()));
  }
}

Layout layout_of(const Tensor& tensor) {
  Layout layout{static_cast<const char*>(tensor.const_data_ptr()),
                static_cast<int64_t>(tensor.element_size()),
                {},
                {}};
  std::copy_n(tensor.sizes().begin(), 4, layout.size.begin());
  std::copy_n(tensor.strides().begin(), 4, layout.stride.begin());
  return layout;
}

void check_device(const char* name, const Tensor& tensor, const char* other_name,
                  const Tensor& other) {
  if (tensor.device() != other.device()) {
    fail(name, ": expected ", other_name, "'s device, got another one");
  }
}

void check_dtype(const char* name, const Tensor& tensor, const char* other_name,
                 const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    fail(name, ": expected ", other_name, "'s dtype ", name_of(other.scalar_type()), ", got ",
         name_of(tensor.scalar_type()));
  }
}

void check_shape(const char* name, const Tensor& tensor, const char* what,
                 const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    fail(name, ": expected ", what, " ", shape_of(shape), ", got ", shape_of(tensor));
  }
}

void check_four_dimensions(const char* name, const Tensor& tensor, const char* meaning) {
  if (tensor.dim() != 4) {
    fail(name, ": expected 4 dimensions ", meaning, ", got shape ", shape_of(tensor));
  }
}

void check_per_channel(const char* name, const Tensor& tensor, const char* x_name, const Tensor& x,
                       int64_t channels) {
  check_device(name, tensor, x_name, x);
  const ScalarType expected =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (tensor.scalar_type() != expected) {
    fail(name, ": expected ", name_of(expected), " (", x_name, " is ", name_of(x.scalar_type()),
         "), got ", name_of(tensor.scalar_type()));
  }
  if (tensor.dim() != 1 || tensor.size(0) != channels) {
    fail(name, ": expected shape [", channels, "], one value a channel, got ", shape_of(tensor));
  }
  if (!tensor.is_contiguous()) fail(name, ": expected a contiguous tensor");
}

void check_rows(const char* name, const Tensor& tensor, int64_t rows, int64_t channels) {
  if (tensor.scalar_type() != ScalarType::Float || tensor.dim() != 2 || tensor.size(0) != rows ||
      tensor.size(1) != channels || !tensor.is_contiguous()) {
    fail(name, ": expected contiguous float32 [", rows, ", ", channels, "], got ",
         name_of(tensor.scalar_type()), " of ", shape_of(tensor));
  }
}

namespace {

// Anything but activations is contiguous: one row of columns.
Layout memory_of(const Tensor& tensor) {
  if (tensor.dim() == 4) return layout_of(tensor);
  return Layout{static_cast<const char*>(tensor.const_data_ptr()),
                static_cast<int64_t>(tensor.element_size()),
                {1, 1, 1, tensor.numel()},
                {1, 1, 1, 1}};
}

}  // namespace

OutputMemory::OutputMemory(const Tensor& out, const char* name)
    : out_(memory_of(out)), name_(name) {
  if (overlaps_itself(out_)) {
    fail(name,
         ": its elements share memory (an expanded tensor?); give one with memory of its own");
  }
}

void OutputMemory::apart_from(const char* name, const Tensor& input) const {
  if (overlap(out_, memory_of(input))) {
    fail(name_, ": it shares memory with ", name, "; give a tensor with memory of its own");
  }
}

void OutputMemory::apart_from(const char* name, const std::optional<Tensor>& input) const {
  if (input) apart_from(name, *input);
}

void copy_pair(const char* name, const std::vector<int64_t>& pair, int64_t (&to)[2]) {
  if (pair.size() != 2) fail(name, ": expected 2 integers, got ", shape_of(pair));
  std::copy_n(pair.begin(), 2, to);
}

void copy_sizes(const Tensor& tensor, int64_t (&to)[4]) {
  std::copy_n(tensor.sizes().begin(), 4, to);
}

void copy_strides(const Tensor& tensor, int64_t (&to)[4]) {
  std::copy_n(tensor.strides().begin(), 4, to);
}

}  // namespace resnet_fused
