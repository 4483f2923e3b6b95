#include "inspect.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "block.h"
#include "sanitizers.h"

namespace resnet_fused::emulator {
namespace {

float widen_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

float widen_bfloat16(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

std::string element_text(const std::string& element, const uint8_t* at) {
  uint16_t half = 0;
  uint32_t word = 0;
  const uint32_t bytes = element_bytes(element);
  if (bytes == 2) std::memcpy(&half, at, 2);
  if (bytes == 4) std::memcpy(&word, at, 4);
  char text[32];
  if (element == "bf16") {
    std::snprintf(text, sizeof text, "%.4g", widen_bfloat16(half));
  } else if (element == "f16") {
    std::snprintf(text, sizeof text, "%.4g", widen_half(half));
  } else if (element == "f32") {
    std::snprintf(text, sizeof text, "%.4g", __builtin_bit_cast(float, word));
  } else {
    std::snprintf(text, sizeof text, "%u", bytes == 1 ? *at : bytes == 2 ? half : word);
  }
  return text;
}

}  // namespace

uint32_t element_bytes(const std::string& element) {
  if (element == "u8") return 1;
  if (element == "bf16" || element == "f16" || element == "u16") return 2;
  if (element == "f32" || element == "u32") return 4;
  throw std::invalid_argument("unknown element '" + element +
                              "': expected one of bf16, f16, f32, u8, u16, u32");
}

std::string shared_tile(const Tile& tile) {
  const Quiet quiet;
  SharedMemory& shared = self().block->shared;
  const uint32_t bytes = element_bytes(tile.element);
  std::string text;
  for (uint32_t row = 0; row < tile.rows; ++row) {
    char head[32];
    std::snprintf(head, sizeof head, "%6u:", tile.offset + row * tile.row_bytes);
    text += head;
    for (uint32_t column = 0; column < tile.columns; ++column) {
      const uint32_t offset = tile.offset + row * tile.row_bytes + column * bytes;
      std::string entry;
      if (offset + bytes > shared.bytes()) {
        entry = "outside";
      } else if (!shared.is_written(offset)) {
        entry = "-";
      } else if (shared.is_in_flight(offset)) {
        entry = "~";
      } else {
        entry = element_text(tile.element, shared.data() + offset);
      }
      text += std::string(entry.size() < 8 ? 9 - entry.size() : 1, ' ') + entry;
    }
    text += "\n";
  }
  return text;
}

Fault fault_at_marked(SiteRecord& record) {
  const FiberThread& thread = self();
  Session& session = *thread.block->grid->session;
  if (session.stops(record, thread.block->linear, thread.linear)) {
    const Tile& tile = session.stop().tile;
    std::string what = "stopped here";
    if (tile.rows > 0) what += "; shared memory by byte offset:\n" + shared_tile(tile);
    fail(ErrorKind::kStopped, record.site, record.instruction, what);
  }
  // A planted fault that this instruction does not know would change nothing and look harmless.
  if (record.planted == Fault::kNone) return Fault::kNone;
  if ((record.possible >> static_cast<int>(record.planted) & 1) == 0) return Fault::kNone;
  ++record.hits;
  return record.planted;
}

}  // namespace resnet_fused::emulator
