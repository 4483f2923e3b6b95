#include "tensor_map.h"

namespace resnet_fused {

int64_t element_bytes(TensorElement element) {
  switch (element) {
    case TensorElement::kUint8:
      return 1;
    case TensorElement::kFloat16:
    case TensorElement::kBfloat16:
      return 2;
    case TensorElement::kUint32:
    case TensorElement::kFloat32:
    case TensorElement::kTfloat32:
      return 4;
  }
  return 0;
}

namespace {

std::string outside(const std::string& what, int64_t given, int64_t low, int64_t high) {
  if (given >= low && given <= high) return "";
  return what + " is " + std::to_string(given) + "; " + std::to_string(low) + " to " +
         std::to_string(high) + " is accepted";
}

std::string no_multiple(const std::string& what, int64_t given, int64_t of) {
  if (given % of == 0) return "";
  return what + " is " + std::to_string(given) + "; a multiple of " + std::to_string(of) +
         " is accepted";
}

std::string nth(const char* name, int i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

std::string tensor_fault(const TensorMapRequest& r) {
  std::string found;
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(r.address));
  if (r.address == nullptr) return "address is null";
  if (!(found = no_multiple("address", address, 16)).empty()) return found;
  for (int d = 0; d < r.rank; ++d) {
    found = outside(nth("sizes", d), r.sizes[d], 1, int64_t{1} << 32);
    if (!found.empty()) return found;
  }
  for (int d = 0; d + 1 < r.rank; ++d) {
    found = outside(nth("strides", d), r.strides[d], 16, (int64_t{1} << 40) - 16);
    if (found.empty()) found = no_multiple(nth("strides", d), r.strides[d], 16);
    if (!found.empty()) return found;
  }
  return "";
}

std::string box_fault(const TensorMapRequest& r) {
  std::string found;
  const int dimensions = r.pixels != 0 ? 1 : r.rank;
  for (int d = 0; d < dimensions; ++d) {
    if (!(found = outside(nth("box", d), r.box[d], 1, 256)).empty()) return found;
  }
  for (int d = 1; d < r.rank; ++d) {  // TMA ignores the first
    if (!(found = outside(nth("steps", d), r.steps[d], 1, 8)).empty()) return found;
  }
  const int64_t row = r.box[0] * element_bytes(r.element);
  if (!(found = no_multiple("a box's row in bytes", row, 16)).empty()) return found;
  const auto span = static_cast<int64_t>(r.swizzle);
  if (span != 0 && row != span) {
    return "a box's row has " + std::to_string(row) + " bytes; " + std::to_string(span) +
           " is accepted with this swizzle";
  }
  return "";
}

std::string im2col_fault(const TensorMapRequest& r) {
  std::string found = outside("pixels", r.pixels, 1, 1024);
  if (!found.empty()) return found;
  if (!(found = outside("rank of an im2col map", r.rank, 3, 5)).empty()) return found;
  // 16, 8 or 5 bits for each of one, two or three dimensions.
  const int64_t limit = r.rank == 3 ? 1 << 15 : r.rank == 4 ? 1 << 7 : 1 << 4;
  for (int d = 0; d < r.rank - 2; ++d) {
    found = outside(nth("lower", d), r.lower[d], -limit, limit - 1);
    if (found.empty()) found = outside(nth("upper", d), r.upper[d], -limit, limit - 1);
    if (!found.empty()) return found;
    if (r.sizes[d + 1] + r.upper[d] - r.lower[d] < 1) {
      return "lower, upper: no pixel is left between " + nth("lower", d) + " " +
             std::to_string(r.lower[d]) + " and " + nth("upper", d) + " " +
             std::to_string(r.upper[d]) + " of a size of " + std::to_string(r.sizes[d + 1]);
    }
  }
  return "";
}

}  // namespace

int64_t box_bytes(const TensorMapRequest& r) {
  int64_t bytes = r.box[0] * element_bytes(r.element);
  if (r.pixels > 0) return bytes * r.pixels;
  for (int d = 1; d < r.rank; ++d) bytes *= (r.box[d] + r.steps[d] - 1) / r.steps[d];
  return bytes;
}

std::string tensor_map_fault(const TensorMapRequest& r) {
  std::string found = outside("rank", r.rank, 1, kMostDimensions);
  if (found.empty()) found = tensor_fault(r);
  if (found.empty()) found = box_fault(r);
  if (found.empty() && r.pixels != 0) found = im2col_fault(r);
  return found;
}

}  // namespace resnet_fused
