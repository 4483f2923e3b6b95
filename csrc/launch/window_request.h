// Windows of a walk over images, as conv_window.h has them: how many parts they come in, and the
// tensor maps that walk. Inside of this room.
#pragma once

#include <cstdint>
#include <string>

#include "../device/conv_window.h"
#include "tma_request.h"

namespace resnet_fused {

// Positions of a walk over so many images, up to the last pixel.
inline int64_t walk_positions(int64_t images, int64_t height, int64_t width) {
  return images * (height + 1) * (width + 1) - (width + 1) - 1;
}

constexpr int64_t kMostBoxRows = 256;  // that one request brings

// The parts of a window for so many positions: whole patterns of the swizzle each, of so many rows
// at most, as few rows in all as possible.
struct WindowParts {
  int64_t rows;  // of each
  int64_t count;
};
inline WindowParts window_parts(int64_t positions, int64_t width,
                                int64_t most_rows = kMostBoxRows) {
  const int64_t rows = window_rows(positions, width);
  const int64_t least = divide_up(rows, most_rows);
  WindowParts best{};
  for (int64_t count = least; count <= least + 3; ++count) {
    const WindowParts parts{divide_up(divide_up(rows, count), 8) * 8, count};
    if (best.count == 0 || parts.rows * parts.count < best.rows * best.count) best = parts;
  }
  return best;
}

// That windows of rows of so many pixels take more shared memory than there is.
inline std::string window_width_fault(const char* name, int64_t width, int64_t bytes) {
  if (bytes <= kMostSharedBytes) return "";
  return std::string(name) + ": rows of " + std::to_string(width) + " pixels take " +
         std::to_string(bytes) + " bytes of shared memory; up to " +
         std::to_string(kMostSharedBytes) + " are there";
}

// Its pixels in the order of the input's walk, a zero before each row and a row of them before each
// image; a part of a window each time.
inline TensorMapRequest input_walk_request(TensorElement element, const void* at,
                                           const int64_t (&size)[4], const int64_t (&stride)[4],
                                           const WindowParts& parts) {
  TensorMapRequest request = images_request(element, at, size, stride, kWindowChannels);
  request.pixels = narrowed(parts.rows);
  request.lower = {-1, -1};
  return request;
}

// Likewise of the output's, behind each row and behind each image; so many positions.
inline TensorMapRequest output_walk_request(TensorElement element, const void* at,
                                            const int64_t (&size)[4], const int64_t (&stride)[4],
                                            int32_t positions) {
  TensorMapRequest request = images_request(element, at, size, stride, kWindowChannels);
  request.pixels = positions;
  request.upper = {1, 1};
  return request;
}

}  // namespace resnet_fused
