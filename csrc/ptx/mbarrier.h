// mbarriers: 8 bytes of shared memory, aligned to 8, that count arrivals and bytes in phases. PTX
// ISA, Parallel Synchronization and Communication Instructions, mbarrier; Data Movement and
// Conversion Instructions, cp.async.mbarrier.arrive. sm_90 and later.
//
// A phase is complete when as many arrivals have come as mbarrier_init says and as many bytes as
// were expected; the next one begins at once. Phase i has parity i & 1. What a thread did before it
// arrived is seen by those who have waited for the phase.
#pragma once

#include "common.h"

#if defined(RF_EMULATED)
#include "../emulator/mbarrier.h"
#endif

namespace resnet_fused::ptx {

#if defined(RF_EMULATED)
namespace detail {

using emulator::AwaitedPhase;
using emulator::Fault;

constexpr uint32_t kBytesOff = 16;  // of kWrongBytes

using emulator::Scope;

inline uint64_t arrive(emulator::Site site, const char* name, SharedAddress barrier, uint32_t count,
                       Scope scope = Scope::kBlock) {
  const Fault fault = emulator::fault_at(site, name, {Fault::kSkip, Fault::kWrongCount});
  if (fault == Fault::kSkip) return 0;
  if (fault == Fault::kWrongCount) ++count;
  return emulator::mbarrier_arrive(site, name, barrier, count, 0, scope);
}

inline uint64_t expect(emulator::Site site, const char* name, SharedAddress barrier, uint32_t count,
                       uint32_t bytes, Scope scope = Scope::kBlock) {
  const Fault fault = emulator::fault_at(site, name, {Fault::kSkip, Fault::kWrongBytes});
  if (fault == Fault::kSkip) return 0;
  if (fault == Fault::kWrongBytes) bytes += kBytesOff;
  return emulator::mbarrier_arrive(site, name, barrier, count, bytes, scope);
}

inline void arrive_behind_copies(emulator::Site site, const char* name, SharedAddress barrier,
                                 bool increments) {
  if (emulator::fault_at(site, name, {Fault::kSkip}) == Fault::kSkip) return;
  emulator::mbarrier_arrive_behind_copies(site, name, barrier, increments);
}

inline bool wait(emulator::Site site, const char* name, SharedAddress barrier, AwaitedPhase phase,
                 bool sleeps, Scope scope = Scope::kBlock) {
  const Fault fault = phase.by_parity
                          ? emulator::fault_at(site, name, {Fault::kSkip, Fault::kWrongParity})
                          : emulator::fault_at(site, name, {Fault::kSkip});
  if (fault == Fault::kSkip) return true;
  if (fault == Fault::kWrongParity) phase.value ^= 1;
  return emulator::mbarrier_wait(site, name, barrier, phase, sleeps, scope);
}

}  // namespace detail
#endif

// Makes the 8 bytes an mbarrier of `count` arrivals a phase, 1 to 2^20 - 1, in phase 0. Before
// anything asynchronous uses it: fence_mbarrier_init by the same thread; before other threads do:
// a barrier.
RF_DEVICE void mbarrier_init(SharedAddress barrier, uint32_t count RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "mbarrier.init",
                                        {emulator::Fault::kSkip, emulator::Fault::kWrongCount});
  if (fault == emulator::Fault::kSkip) return;
  emulator::mbarrier_init(site, barrier, fault == emulator::Fault::kWrongCount ? count + 1 : count);
#elif defined(RF_SM90)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#else
  detail::missing();
#endif
}

// The 8 bytes are ordinary memory again.
RF_DEVICE void mbarrier_invalidate(SharedAddress barrier RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "mbarrier.inval", {emulator::Fault::kSkip});
  if (fault != emulator::Fault::kSkip) emulator::mbarrier_invalidate(site, barrier);
#elif defined(RF_SM90)
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#else
  detail::missing();
#endif
}

// What this thread has initialised may be used by copies and by the cluster's other blocks, behind
// a barrier. PTX ISA, membar, fence: fence.mbarrier_init.
RF_DEVICE void fence_mbarrier_init(RF_SITE_ONLY) {
#if defined(RF_EMULATED)
  const auto fault = emulator::fault_at(site, "fence.mbarrier_init", {emulator::Fault::kNoFence});
  if (fault != emulator::Fault::kNoFence) emulator::mbarrier_init_fence(site);
#elif defined(RF_SM90)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  detail::missing();
#endif
}

// Arrives `count` times; the result names the phase, for mbarrier_try_wait.
RF_DEVICE uint64_t mbarrier_arrive(SharedAddress barrier, uint32_t count = 1 RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  return detail::arrive(site, "mbarrier.arrive", barrier, count);
#elif defined(RF_SM90)
  uint64_t state;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1], %2;"
               : "=l"(state)
               : "r"(barrier), "r"(count)
               : "memory");
  return state;
#else
  detail::missing();
  return 0;
#endif
}

// The phase waits for `bytes` more of copies; then arrives once.
RF_DEVICE uint64_t mbarrier_arrive_expect_tx(SharedAddress barrier,
                                             uint32_t bytes RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  return detail::expect(site, "mbarrier.arrive.expect_tx", barrier, 1, bytes);
#elif defined(RF_SM90)
  uint64_t state;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 %0, [%1], %2;"
               : "=l"(state)
               : "r"(barrier), "r"(bytes)
               : "memory");
  return state;
#else
  detail::missing();
  return 0;
#endif
}

// The phase waits for `bytes` more; no arrival.
RF_DEVICE void mbarrier_expect_tx(SharedAddress barrier, uint32_t bytes RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::expect(site, "mbarrier.expect_tx", barrier, 0, bytes);
#elif defined(RF_SM90)
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#else
  detail::missing();
#endif
}

// As if a copy of that many bytes had come to its end.
RF_DEVICE void mbarrier_complete_tx(SharedAddress barrier, uint32_t bytes RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  constexpr const char* kName = "mbarrier.complete_tx";
  const auto fault = emulator::fault_at(site, kName, {emulator::Fault::kSkip});
  if (fault == emulator::Fault::kSkip) return;
  emulator::mbarrier_complete_bytes(site, kName, barrier, bytes);
#elif defined(RF_SM90)
  asm volatile("mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
#else
  detail::missing();
#endif
}

// Arrives at an mbarrier of any block of the cluster, as cluster_address gives its address. What
// the thread did before is seen by another block's behind mbarrier_wait_parity_cluster.
RF_DEVICE void mbarrier_arrive_cluster(SharedAddress barrier,
                                       uint32_t count = 1 RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::arrive(site, "mbarrier.arrive.cluster", barrier, count, detail::Scope::kCluster);
#elif defined(RF_SM90)
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(count)
               : "memory");
#else
  detail::missing();
#endif
}

// Likewise, and orders nothing that the thread has read or written. What it had asynchronous
// instructions read, and has waited for, may be copied over by who waits for the phase: no fence is
// needed for that, and every step of a ring that a cluster shares would pay for one.
RF_DEVICE void mbarrier_arrive_relaxed_cluster(SharedAddress barrier,
                                               uint32_t count = 1 RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::arrive(site, "mbarrier.arrive.relaxed.cluster", barrier, count, detail::Scope::kNowhere);
#elif defined(RF_SM90)
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(count)
               : "memory");
#else
  detail::missing();
#endif
}

RF_DEVICE void mbarrier_arrive_expect_tx_cluster(SharedAddress barrier,
                                                 uint32_t bytes RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::expect(site, "mbarrier.arrive.expect_tx.cluster", barrier, 1, bytes,
                 detail::Scope::kCluster);
#elif defined(RF_SM90)
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier),
      "r"(bytes)
      : "memory");
#else
  detail::missing();
#endif
}

// When all cp.async of this thread up to here have come to their end, there is one arrival; whoever
// has waited for its phase sees what they have written, and no other store of this thread. The
// phase waits for this arrival beyond those that mbarrier_init says. The copies need no other wait.
RF_DEVICE void cp_async_mbarrier_arrive(SharedAddress barrier RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::arrive_behind_copies(site, "cp.async.mbarrier.arrive", barrier, true);
#elif defined(RF_SM90)
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#else
  detail::missing();
#endif
}

// The arrival is one of those that mbarrier_init says.
RF_DEVICE void cp_async_mbarrier_arrive_noinc(SharedAddress barrier RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  detail::arrive_behind_copies(site, "cp.async.mbarrier.arrive.noinc", barrier, false);
#elif defined(RF_SM90)
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#else
  detail::missing();
#endif
}

// Returns what the instruction says of the phase, a parity or a state.
#define RF_MBARRIER_WAIT(wait, phase)   \
  uint32_t done;                        \
  asm volatile(                         \
      "{\n.reg .pred p;\n"              \
      "mbarrier." wait                  \
      ".shared::cta.b64 p, [%1], %2;\n" \
      "selp.b32 %0, 1, 0, p;\n}\n"      \
      : "=r"(done)                      \
      : "r"(barrier), phase             \
      : "memory");                      \
  return done != 0

// Whether the phase of this parity is complete: the barrier is in it, or has just left it. Looks
// and returns. A barrier that is new counts as having left a phase of parity 1.
RF_DEVICE bool mbarrier_test_wait_parity(SharedAddress barrier, uint32_t parity RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  return detail::wait(site, "mbarrier.test_wait.parity", barrier, {true, parity}, false);
#elif defined(RF_SM90)
  RF_MBARRIER_WAIT("test_wait.parity", "r"(parity));
#else
  detail::missing();
  return true;
#endif
}

// The same; may sleep until it is complete, or give up after some time.
RF_DEVICE bool mbarrier_try_wait_parity(SharedAddress barrier, uint32_t parity RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  return detail::wait(site, "mbarrier.try_wait.parity", barrier, {true, parity}, true);
#elif defined(RF_SM90)
  RF_MBARRIER_WAIT("try_wait.parity", "r"(parity));
#else
  detail::missing();
  return true;
#endif
}

// The same for the phase that mbarrier_arrive has named: this one or the one before.
RF_DEVICE bool mbarrier_try_wait(SharedAddress barrier, uint64_t state RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  return detail::wait(site, "mbarrier.try_wait", barrier, {false, state}, true);
#elif defined(RF_SM90)
  RF_MBARRIER_WAIT("try_wait", "l"(state));
#else
  detail::missing();
  return true;
#endif
}

// The same, and what threads of the cluster's other blocks did before they arrived is seen.
RF_DEVICE bool mbarrier_try_wait_parity_cluster(SharedAddress barrier,
                                                uint32_t parity RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  return detail::wait(site, "mbarrier.try_wait.parity.cluster", barrier, {true, parity}, true,
                      detail::Scope::kCluster);
#elif defined(RF_SM90)
  RF_MBARRIER_WAIT("try_wait.parity.acquire.cluster", "r"(parity));
#else
  detail::missing();
  return true;
#endif
}

// The same, and nothing that others did is seen: for who asks for copies alone.
RF_DEVICE bool mbarrier_try_wait_parity_relaxed(SharedAddress barrier,
                                                uint32_t parity RF_SITE_PARAMETER) {
#if defined(RF_EMULATED)
  return detail::wait(site, "mbarrier.try_wait.parity.relaxed", barrier, {true, parity}, true,
                      detail::Scope::kNowhere);
#elif defined(RF_SM90)
  RF_MBARRIER_WAIT("try_wait.parity.relaxed.cluster", "r"(parity));
#else
  detail::missing();
  return true;
#endif
}

#undef RF_MBARRIER_WAIT

// Waits for the phase of this parity.
RF_DEVICE void mbarrier_wait_parity(SharedAddress barrier, uint32_t parity RF_SITE_PARAMETER) {
  while (!mbarrier_try_wait_parity(barrier, parity RF_SITE)) {
  }
}
RF_DEVICE void mbarrier_wait_parity_cluster(SharedAddress barrier,
                                            uint32_t parity RF_SITE_PARAMETER) {
  while (!mbarrier_try_wait_parity_cluster(barrier, parity RF_SITE)) {
  }
}
RF_DEVICE void mbarrier_wait_parity_relaxed(SharedAddress barrier,
                                            uint32_t parity RF_SITE_PARAMETER) {
  while (!mbarrier_try_wait_parity_relaxed(barrier, parity RF_SITE)) {
  }
}

}  // namespace resnet_fused::ptx
