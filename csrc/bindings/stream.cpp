#include "stable.h"

#if defined(RF_WITH_CUDA)
#include <dlfcn.h>

#include <vector>

void* resnet_fused::current_cuda_stream(int device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get>(symbol);
  }();
  if (get == nullptr) fail("this PyTorch has no CUDA support");
  void* stream = nullptr;
  if (get(device, &stream) != 0) fail("cannot read the current CUDA stream of device ", device);
  return stream;
}

resnet_fused::Tensor resnet_fused::workspace_on(int device, int64_t bytes) {
  const std::vector<int64_t> size{bytes};
  return torch::stable::empty(size, ScalarType::Byte, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CUDA, device));
}
#endif
