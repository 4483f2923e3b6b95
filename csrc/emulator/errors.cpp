#include "errors.h"

#include <cstring>
#include <filesystem>

#include "sanitizers.h"

namespace resnet_fused::emulator {

thread_local Thread* running_thread __attribute__((tls_model("initial-exec"))) = nullptr;

const char* name_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kUsage:
      return "usage";
    case ErrorKind::kAddress:
      return "address";
    case ErrorKind::kState:
      return "state";
    case ErrorKind::kRace:
      return "race";
    case ErrorKind::kDivergence:
      return "divergence";
    case ErrorKind::kDeadlock:
      return "deadlock";
    case ErrorKind::kLimit:
      return "limit";
    case ErrorKind::kStopped:
      return "stopped";
  }
  return "unknown";
}

std::string normal_path(const char* file) {
  return std::filesystem::path(file).lexically_normal().generic_string();
}

std::string describe(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string hex(uint64_t value) {
  std::string digits;
  do {
    digits.insert(digits.begin(), "0123456789abcdef"[value & 15]);
    value >>= 4;
  } while (value != 0);
  return "0x" + digits;
}

static std::string triple(uint32_t x, uint32_t y, uint32_t z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string describe_thread(int linear, dim3 size) {
  const auto index = static_cast<uint32_t>(linear);
  return "thread " + std::to_string(linear) + " " +
         triple(index % size.x, index / size.x % size.y, index / (size.x * size.y));
}

void fail(ErrorKind kind, Site site, const char* instruction, const std::string& what) {
  const Quiet quiet;
  std::string message = describe(site) + ": " + instruction + ": " + what;
  uint3 block = {0, 0, 0};
  int thread = -1;
  if (in_kernel()) {
    const Thread& self = this_thread();
    block = self.block_index;
    thread = self.linear;
    message += " [block " + triple(block.x, block.y, block.z) + ", " +
               describe_thread(self.linear, self.block_size) + "]";
  }
  throw Error(kind, message, site, instruction, block, thread);
}

}  // namespace resnet_fused::emulator
