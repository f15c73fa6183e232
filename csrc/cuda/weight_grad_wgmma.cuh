// The group matrix multiply of compute capability 9.0a with its rows in registers, for the weight
// gradient: d[tap row][input channel] += a[tap row][pixel] * b[pixel][input channel].
#ifndef JAXCONV_CUDA_WEIGHT_GRAD_WGMMA_CUH_
#define JAXCONV_CUDA_WEIGHT_GRAD_WGMMA_CUH_

#include "cuda/correlate_wgmma.cuh"

namespace jaxconv::cuda {

// A warp's 16 rows are fragments as in mma.sync; `b` describes cores of 8 channels x 16 bytes of
// pixels in shared memory. kOctets: channels / 8.
template <class T, int kOctets>
struct RowMma {
  static __device__ void Run(float (&d)[kOctets][4], uint32_t a0, uint32_t a1, uint32_t a2,
                             uint32_t a3, uint64_t b);
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Moves registers from the warps that copy to those that multiply.
template <bool kMore>
__device__ inline void MoveRegisters() {
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
  }
}

#define JAXCONV_D(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define JAXCONV_ROW_MMA_32(T, SHAPE, TAIL)                                             \
  template <>                                                                          \
  __device__ inline void RowMma<T, 4>::Run(float (&d)[4][4], uint32_t a0, uint32_t a1, \
                                           uint32_t a2, uint32_t a3, uint64_t b) {     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32" SHAPE                           \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "          \
                 "{%16,%17,%18,%19}, %20, 1, 1, 1" TAIL ";"                            \
                 : JAXCONV_D(d[0]), JAXCONV_D(d[1]), JAXCONV_D(d[2]), JAXCONV_D(d[3])  \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                        \
  }
#define JAXCONV_ROW_MMA_64(T, SHAPE, TAIL)                                                  \
  template <>                                                                               \
  __device__ inline void RowMma<T, 8>::Run(float (&d)[8][4], uint32_t a0, uint32_t a1,      \
                                           uint32_t a2, uint32_t a3, uint64_t b) {          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64" SHAPE                                \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
                 "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "                       \
                 "{%32,%33,%34,%35}, %36, 1, 1, 1" TAIL ";"                                 \
                 : JAXCONV_D(d[0]), JAXCONV_D(d[1]), JAXCONV_D(d[2]), JAXCONV_D(d[3]),      \
                   JAXCONV_D(d[4]), JAXCONV_D(d[5]), JAXCONV_D(d[6]), JAXCONV_D(d[7])       \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                             \
  }
JAXCONV_ROW_MMA_32(float, "k8.f32.tf32.tf32", "")
JAXCONV_ROW_MMA_64(float, "k8.f32.tf32.tf32", "")
JAXCONV_ROW_MMA_32(__nv_bfloat16, "k16.f32.bf16.bf16", ", 0")
JAXCONV_ROW_MMA_64(__nv_bfloat16, "k16.f32.bf16.bf16", ", 0")
JAXCONV_ROW_MMA_32(__half, "k16.f32.f16.f16", ", 0")
JAXCONV_ROW_MMA_64(__half, "k16.f32.f16.f16", ", 0")
#undef JAXCONV_ROW_MMA_64
#undef JAXCONV_ROW_MMA_32
#undef JAXCONV_D
#else
template <bool kMore>
__device__ inline void MoveRegisters() {}
template <class T, int kOctets>
__device__ inline void RowMma<T, kOctets>::Run(float (&)[kOctets][4], uint32_t, uint32_t, uint32_t,
                                               uint32_t, uint64_t) {}  // never launched there
#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_WEIGHT_GRAD_WGMMA_CUH_
