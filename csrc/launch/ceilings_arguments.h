// What the launches of the ceilings share. Inside of this room.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../device/ceilings.h"
#include "ceilings.h"
#include "tensor_map.h"

namespace resnet_fused {

inline int32_t together_of(const RfCeiling& ceiling, const RfCeilingRun& run) {
  return ceiling.together == 0 ? run.blocks : ceiling.together;
}

inline int32_t apart_of(const RfCeiling& ceiling, const RfCeilingRun& run) {
  const int32_t groups = std::max(1, run.blocks / together_of(ceiling, run));
  return static_cast<int32_t>(std::max<int64_t>(1, run.boxes / groups));
}

// `parts`: of a box that is a box here.
inline CeilingPath path_of(const RfCeiling& ceiling, const RfCeilingRun& run, int32_t parts) {
  return {static_cast<int32_t>(run.boxes) * parts, together_of(ceiling, run),
          apart_of(ceiling, run) * parts, run.count};
}

// The set as rows of 128 bytes, `box` of them at once.
inline TensorMapRequest set_request(const RfCeilingRun& run, int32_t box) {
  TensorMapRequest request;
  request.element = TensorElement::kUint32;
  request.rank = 2;
  request.address = const_cast<void*>(run.set);
  request.sizes = {kStepRowBytes / 4, run.boxes * kCeilingBoxRows};
  request.strides = {kStepRowBytes};
  request.box[0] = kStepRowBytes / 4;
  request.box[1] = box;
  return request;
}

int launch_ceiling_reads(const RfCeiling& ceiling, const RfCeilingRun& run, void* stream);
int launch_ceiling_loads(const RfCeiling& ceiling, const RfCeilingRun& run, void* stream);
int launch_ceiling_products(const RfCeiling& ceiling, const RfCeilingRun& run, void* stream);
int launch_ceiling_meetings(const RfCeiling& ceiling, const RfCeilingRun& run, void* stream);

}  // namespace resnet_fused
