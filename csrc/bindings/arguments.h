// What the bindings check of their arguments, and how a tensor becomes sizes, strides and pointers.
// Every check raises with a message that names the argument, what came and what is accepted.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "../device/bn_act.h"
#include "layout.h"
#include "stable.h"

namespace resnet_fused {

// "[2, 64, 56, 56]".
std::string shape_of(const Tensor& tensor);
std::string shape_of(const std::vector<int64_t>& sizes);

// "bfloat16", "int32"; "another dtype" for those that no op takes.
const char* name_of(ScalarType dtype);

// The dtype of the tensor called `name`, one of the four that the ops know.
DataType data_type(const char* name, const Tensor& tensor);

// A tensor of four dimensions.
Layout layout_of(const Tensor& tensor);

// What has another tensor's device or dtype.
void check_device(const char* name, const Tensor& tensor, const char* other_name,
                  const Tensor& other);
void check_dtype(const char* name, const Tensor& tensor, const char* other_name,
                 const Tensor& other);

// Exactly this shape; `what` says whose it is, such as "x's shape".
void check_shape(const char* name, const Tensor& tensor, const char* what,
                 const std::vector<int64_t>& shape);
void check_four_dimensions(const char* name, const Tensor& tensor, const char* meaning);

// On x's device, one contiguous value for each of `channels`: float64 for a float64 `x` and float32
// otherwise.
void check_per_channel(const char* name, const Tensor& tensor, const char* x_name, const Tensor& x,
                       int64_t channels);

// Contiguous float32 [rows, channels].
void check_rows(const char* name, const Tensor& tensor, int64_t rows, int64_t channels);

// An output has memory of its own: no element twice, none of an input's.
class OutputMemory {
 public:
  explicit OutputMemory(const Tensor& out, const char* name = "out");
  void apart_from(const char* name, const Tensor& input) const;
  void apart_from(const char* name, const std::optional<Tensor>& input) const;

 private:
  Layout out_;
  const char* name_;
};

// Two integers, as of a stride.
void copy_pair(const char* name, const std::vector<int64_t>& pair, int64_t (&to)[2]);
void copy_sizes(const Tensor& tensor, int64_t (&to)[4]);
void copy_strides(const Tensor& tensor, int64_t (&to)[4]);

}  // namespace resnet_fused
