// The group matrix multiply of compute capability 9.0a for "mma".
#ifndef JAXCONV_CUDA_CORRELATE_WGMMA_CUH_
#define JAXCONV_CUDA_CORRELATE_WGMMA_CUH_

#include <cstdint>

#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

// Hopper's own: a group of four warps multiplies 64 pixels by NC columns, both straight from shared
// memory. A descriptor names the first core (8 rows of 16 bytes, contiguous) and the distances to
// the next one along the channels (low) and along the rows (high), all in units of 16 bytes; cores
// need no more alignment than that, so a tap's shift is an addition.
__device__ inline uint64_t Descriptor(uint32_t address, uint32_t along_k, uint32_t along_rows) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{along_k >> 4} << 16 |
         uint64_t{along_rows >> 4} << 32;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasGroups = true;
__device__ inline void GroupFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void GroupCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ inline void GroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ inline void ProxyFence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <class T, int NC>
struct GroupMma;
#define JAXCONV_ACC4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
template <>
struct GroupMma<float, 4> {
  static __device__ void Run(float (&d)[4][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<__nv_bfloat16, 4> {
  static __device__ void Run(float (&d)[4][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1, 0, 0;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<__half, 4> {
  static __device__ void Run(float (&d)[4][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1, 0, 0;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<float, 8> {
  static __device__ void Run(float (&d)[8][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"
        "24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3]),
          JAXCONV_ACC4(d[4]), JAXCONV_ACC4(d[5]), JAXCONV_ACC4(d[6]), JAXCONV_ACC4(d[7])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<__nv_bfloat16, 8> {
  static __device__ void Run(float (&d)[8][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"
        "24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3]),
          JAXCONV_ACC4(d[4]), JAXCONV_ACC4(d[5]), JAXCONV_ACC4(d[6]), JAXCONV_ACC4(d[7])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<__half, 8> {
  static __device__ void Run(float (&d)[8][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"
        "24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3]),
          JAXCONV_ACC4(d[4]), JAXCONV_ACC4(d[5]), JAXCONV_ACC4(d[6]), JAXCONV_ACC4(d[7])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<float, 16> {
  static __device__ void Run(float (&d)[16][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"
        "24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%"
        "46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, "
        "1;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3]),
          JAXCONV_ACC4(d[4]), JAXCONV_ACC4(d[5]), JAXCONV_ACC4(d[6]), JAXCONV_ACC4(d[7]),
          JAXCONV_ACC4(d[8]), JAXCONV_ACC4(d[9]), JAXCONV_ACC4(d[10]), JAXCONV_ACC4(d[11]),
          JAXCONV_ACC4(d[12]), JAXCONV_ACC4(d[13]), JAXCONV_ACC4(d[14]), JAXCONV_ACC4(d[15])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<__nv_bfloat16, 16> {
  static __device__ void Run(float (&d)[16][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"
        "24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%"
        "46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, "
        "1, 0, 0;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3]),
          JAXCONV_ACC4(d[4]), JAXCONV_ACC4(d[5]), JAXCONV_ACC4(d[6]), JAXCONV_ACC4(d[7]),
          JAXCONV_ACC4(d[8]), JAXCONV_ACC4(d[9]), JAXCONV_ACC4(d[10]), JAXCONV_ACC4(d[11]),
          JAXCONV_ACC4(d[12]), JAXCONV_ACC4(d[13]), JAXCONV_ACC4(d[14]), JAXCONV_ACC4(d[15])
        : "l"(a), "l"(b));
  }
};
template <>
struct GroupMma<__half, 16> {
  static __device__ void Run(float (&d)[16][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"
        "24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%"
        "46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, "
        "1, 0, 0;"
        : JAXCONV_ACC4(d[0]), JAXCONV_ACC4(d[1]), JAXCONV_ACC4(d[2]), JAXCONV_ACC4(d[3]),
          JAXCONV_ACC4(d[4]), JAXCONV_ACC4(d[5]), JAXCONV_ACC4(d[6]), JAXCONV_ACC4(d[7]),
          JAXCONV_ACC4(d[8]), JAXCONV_ACC4(d[9]), JAXCONV_ACC4(d[10]), JAXCONV_ACC4(d[11]),
          JAXCONV_ACC4(d[12]), JAXCONV_ACC4(d[13]), JAXCONV_ACC4(d[14]), JAXCONV_ACC4(d[15])
        : "l"(a), "l"(b));
  }
};
#undef JAXCONV_ACC4
#else
inline constexpr bool kHasGroups = false;
__device__ inline void GroupFence() {}
__device__ inline void GroupCommit() {}
__device__ inline void GroupWait() {}
__device__ inline void ProxyFence() {}
template <class T, int NC>
struct GroupMma {
  static __device__ void Run(float (&)[NC][4], uint64_t, uint64_t) {}  // never launched there
};
#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_CORRELATE_WGMMA_CUH_
