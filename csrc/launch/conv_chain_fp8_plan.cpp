// The table of conv_chain_fp8's configurations, the pure function that picks one, and the launch.
#include <algorithm>
#include <array>
#include <cstdio>
#include <string>

#include "conv_chain_arguments.h"
#include "conv_chain_fp8.h"
#include "conv_chain_fp8_tiles.h"
#include "conv_plan.h"

namespace resnet_fused {
namespace {

constexpr int kTiles = ConvChainFp8Tiles::kSize;

struct Entry {
  std::string name;
  RfConvConfiguration configuration;
};

ChainTmaFacts fp8_tile(int index) {
  return ConvChainFp8Tiles::with(index, []<class Shape>() { return chain_tma_facts<Shape>(); });
}

const std::array<Entry, kTiles>& table() {
  static const std::array<Entry, kTiles> made = [] {
    std::array<Entry, kTiles> entries;
    for (int i = 0; i < kTiles; ++i) {
      const ChainTmaFacts tile = fp8_tile(i);
      entries[i] = {
          chain_tma_name(tile),
          chain_tma_configuration(tile.next, tile.stages, tile.shared_bytes, kStepElements)};
    }
    return entries;
  }();
  return made;
}

int64_t pixels_of(const RfConvChain& chain, int64_t images) {
  return images * chain.x_size[2] * chain.x_size[3];
}

}  // namespace
}  // namespace resnet_fused

extern "C" int32_t rf_conv_chain_fp8_configurations(void) { return resnet_fused::kTiles; }

extern "C" const RfConvConfiguration* rf_conv_chain_fp8_configuration(int32_t index) {
  return resnet_fused::configuration_at<resnet_fused::table>(index);
}

extern "C" int32_t rf_conv_chain_fp8_plan(const RfConvChainFp8* problem, const RfGpu* gpu,
                                          int32_t configuration, int32_t splits, RfConvPlan* plan,
                                          char* why, size_t why_bytes) {
  using namespace resnet_fused;
  const Refusal refuse{why, why_bytes};
  const RfConvChain& chain = problem->chain;
  if (chain.dtype != kFloat8E4M3) return refuse("dtype: float8_e4m3fn is served");
  if (check_chain(chain, refuse) != 0 || check_wish(*gpu, configuration, kTiles, refuse) != 0) {
    return 1;
  }
  if (splits < 0 || splits > 1) return refuse("%d splits; a chain is not split", splits);
  const int64_t images = chain.x_size[0];
  *plan = RfConvPlan{std::max(configuration, 0), 1, 0, 0, std::max<int64_t>(images, 1), 0, 0};
  if (pixels_of(chain, images) == 0) {
    std::snprintf(why, why_bytes, "an empty output: nothing is launched");
    return 0;
  }
  if (const char* name = not_wide(chain); name != nullptr) {
    return refuse("%s cannot be moved 16 bytes at a time", name);
  }
  const int64_t together = chain_images(chain);
  if (together < 1) return refuse("one image is more than a launch can take");

  std::string against;
  bool found = false;
  for (int i = 0; i < kTiles; ++i) {
    if (configuration >= 0 && i != configuration) continue;
    const ChainTmaFacts tile = fp8_tile(i);
    const std::string fault = chain_tma_fault(chain, tile, together, *gpu);
    if (!fault.empty()) {
      against = fault;
      continue;
    }
    const int64_t pixels = pixels_of(chain, together);
    const double cycles = chain_tma_cost(chain, tile, pixels, *gpu);
    if (found && cycles >= plan->cycles) continue;
    found = true;
    const int64_t blocks = chain_tma_blocks(tile, pixels, *gpu);
    *plan = RfConvPlan{i, 1, 0, divide_up(images, together), together, blocks, cycles};
  }
  if (!found) {
    if (configuration < 0) return refuse("no configuration serves it: %s", against.c_str());
    return refuse("configuration %d (%s): %s", configuration,
                  rf_conv_chain_fp8_configuration(configuration)->name, against.c_str());
  }
  plan->at_once = 1;  // blocks stay for many tiles
  std::snprintf(why, why_bytes, "%s: %s, %lld blocks on %d multiprocessors",
                rf_conv_chain_fp8_configuration(plan->configuration)->name,
                configuration < 0 ? "least predicted time" : "as asked for",
                static_cast<Long>(plan->blocks), gpu->multiprocessors);
  return 0;
}

extern "C" int rf_conv_chain_fp8_cuda(const RfConvChainFp8* problem, const RfConvPlan* plan,
                                      void* /*workspace*/, void* stream) {
  using namespace resnet_fused;
#if defined(RF_EMULATED) || defined(RF_WITH_SM90A)
  RfConvChain part = problem->chain;
  const int64_t images = part.x_size[0];
  const ChainTmaFacts tile = fp8_tile(plan->configuration);
  for (int64_t i = 0; i < plan->launches; ++i) {
    const int64_t place = part.reverse != 0 ? plan->launches - 1 - i : i;
    const int64_t first = place * plan->images_a_launch;
    const int64_t count = std::min(plan->images_a_launch, images - first);
    ChainTmaArguments arguments;
    int error = chain_tma_arguments(part, tile, first, count, &arguments);
    if (error != 0) return error;
    arguments.factors = {problem->residual_factor, problem->projection_factor, problem->out_factor,
                         problem->next_factor};
    const int32_t blocks = std::min(arguments.tiles, narrowed(plan->blocks));
    error = launch_conv_chain_fp8(arguments, plan->configuration, blocks, stream);
    if (error != 0) return error;
    part.flow.follows = part.flow.dependent;
  }
  return 0;
#else
  constexpr int kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice; the plan comes first
  return static_cast<void>(problem), static_cast<void>(plan), static_cast<void>(stream),
         kNoKernelImage;
#endif
}
