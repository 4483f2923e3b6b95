#include "../launch/bn_act.h"
#include "device.h"

#if defined(RF_EMULATED)
#include "../emulator/session.h"
#endif

namespace resnet_fused::driver {

void check(int error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string(what) + ": " + rf_cuda_error(error));
}

#if defined(RF_EMULATED)

Buffer::Buffer(size_t bytes)
    : bytes_(bytes), memory_(::operator new(bytes), [](void* p) { ::operator delete(p); }) {}

void Buffer::copy_from(const void* host) {
  if (bytes_ > 0) std::memcpy(data(), host, bytes_);  // an empty vector has no address
}

void Buffer::copy_to(void* host) const {
  if (bytes_ > 0) std::memcpy(host, data(), bytes_);
}

void Buffer::mark_constant(const char* name) const {
  if (bytes_ == 0) return;
  emulator::current_session->register_tensor(name, data(), bytes_, false, true);
}

bool can_begin_early() { return true; }

std::string device_name() { return "emulator"; }
std::vector<double> time_calls(int, const std::function<void()>&, bool) { return {}; }
std::vector<double> time_graph(int, const std::function<void(void*)>&, bool) { return {}; }

#else

namespace {

void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes), memory_(allocate(bytes), cudaFree) {}

void Buffer::copy_from(const void* host) {
  check(cudaMemcpy(data(), host, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
}

void Buffer::copy_to(void* host) const {
  check(cudaMemcpy(host, data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy to the host");
}

void Buffer::mark_constant(const char*) const {}

bool can_begin_early() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  return major >= 9;
}

std::string device_name() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  // Without a driver the error speaks of its version.
  if (error != cudaSuccess) check(error, "no CUDA device");
  if (count == 0) throw std::runtime_error("no CUDA device");
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}

std::vector<double> time_calls(int repeats, const std::function<void()>& run, bool warm) {
  constexpr int kWarm = 2;
  constexpr size_t kCacheBytes = size_t{256} << 20;  // more than the L2 of any GPU
  Buffer cache(kCacheBytes);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> times;
  for (int i = -kWarm; i < repeats; ++i) {
    // Either keeps the GPU busy while the host prepares what is timed.
    if (warm) {
      run();
    } else {
      check(cudaMemsetAsync(cache.data(), 0, kCacheBytes), "cudaMemset");
    }
    check(cudaEventRecord(begin), "cudaEventRecord");
    run();
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(milliseconds);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return times;
}

std::vector<double> time_graph(int repeats, const std::function<void(void*)>& run, bool warm) {
  if (repeats == 0) return {};
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t made;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of a capture");
  run(stream);
  check(cudaStreamEndCapture(stream, &graph), "end of a capture");
  check(cudaGraphInstantiate(&made, graph, 0), "cudaGraphInstantiate");
  const auto replay = [&] { check(cudaGraphLaunch(made, nullptr), "cudaGraphLaunch"); };
  std::vector<double> times = time_calls(repeats, replay, warm);
  cudaGraphExecDestroy(made);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return times;
}

#endif

}  // namespace resnet_fused::driver
