// How a launch stands among those around it in its stream. Knows no framework.
#pragma once

#include <cstdint>

extern "C" {

// Programmatic dependent launch, sm_90 and later: a kernel begins while the one ahead still runs.
// What orders the two is the second one's own wait, which lasts until the kernel ahead has ended
// and all that it wrote can be seen. The caller answers for three rules:
//
// - `follows` only where the kernel ahead waits itself, or began when all ahead of it had ended.
//   The wait says that the kernel ahead has ended, and no more: of the one before that it says
//   something only if that was waited for.
// - It needs no trigger: a kernel without one lets the next begin as its blocks end, when neither
//   its writes nor its reads are known to be over. So a kernel that follows touches nothing but
//   constants before its wait: no activation is read, since the kernel ahead may still write it,
//   and nothing is written, since the kernel ahead may still read what used that memory before.
// - Weights, scales and shifts are those constants: nothing between the beginning of the kernel
//   ahead and the end of this one writes them. Where they have just been copied, `follows` is 0.
//
// Kernels of other makers keep all of this by being followed by a launch that does not follow.
struct RfFlow {
  int32_t dependent;  // its kernels let the next one begin early
  int32_t follows;    // the first of them may begin before the kernel ahead has ended
};

}  // extern "C"
