// Barriers in shared memory, which count arrivals and, from 9.0 on, bytes of bulk copies; the
// copies themselves, and what orders them with other accesses.
#ifndef JAXCONV_CUDA_MBARRIER_CUH_
#define JAXCONV_CUDA_MBARRIER_CUH_

#include <cstdint>

namespace jaxconv::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kHasBulkCopies = true;
__device__ inline void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void FenceBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void ArriveAndExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void WaitFor(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Of 16-byte multiples, between addresses that are multiples of 16.
__device__ inline void CopyBulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// What this thread has written is seen by copies and group products that are asked for later.
__device__ inline void ProxyFence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
__device__ inline void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void Arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier)
               : "memory");
}
__device__ inline void WaitFor(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
inline constexpr bool kHasBulkCopies = false;  // what needs them is never launched there
__device__ inline void FenceBarriers() {}
__device__ inline void ArriveAndExpect(uint32_t, int) {}
__device__ inline void CopyBulk(uint32_t, const void*, int, uint32_t) {}
__device__ inline void ProxyFence() {}
#endif

// All threads that share the barrier, from several places in the code, for the `count`-th time.
// (Barriers of the whole block are for one place.) Each thread arrives itself: racecheck takes what
// the other lanes of an arriving lane wrote for unordered.
__device__ inline void Meet(uint32_t barrier, int& count) {
  Arrive(barrier);
  WaitFor(barrier, count++ & 1);
  __syncwarp();
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_MBARRIER_CUH_
