// Memory and time on the device: a GPU's, or the host's own where the kernels are emulated.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(RF_EMULATED)
#include <cuda_runtime.h>
#endif

namespace resnet_fused::driver {

// Throws std::runtime_error with CUDA's own words if `error` is not 0.
void check(int error, const char* what);

// Bytes on the device, freed with the object. Emulated, each has a heap block of its own, so that
// AddressSanitizer sees an access beside it.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  void* data() const { return memory_.get(); }
  void copy_from(const void* host);
  void copy_to(void* host) const;
  // No launch writes it, so that one which begins early may read it before its wait. The emulator
  // lets it read nothing else.
  void mark_constant(const char* name) const;

 private:
  size_t bytes_;
  std::shared_ptr<void> memory_;
};

// Whether a launch may begin before the one ahead of it has ended.
bool can_begin_early();

// What runs the kernels, such as "NVIDIA H100 80GB HBM3" or "emulator".
std::string device_name();

// Milliseconds of each call of `run`, `repeats` of them after two unmeasured ones; between calls
// the L2 cache is overwritten, or with `warm` left as they leave it. Empty where the kernels are
// emulated: their time means nothing.
std::vector<double> time_calls(int repeats, const std::function<void()>& run, bool warm = false);

// Likewise of each replay of a CUDA graph of what `run` launches on the stream that it is given.
std::vector<double> time_graph(int repeats, const std::function<void(void* stream)>& run,
                               bool warm);

}  // namespace resnet_fused::driver
