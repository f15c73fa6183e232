// The group matrix multiply of compute capability 9.0a for the weight gradient of "dense".
#ifndef JAXCONV_CUDA_DENSE_GRAD_WGMMA_CUH_
#define JAXCONV_CUDA_DENSE_GRAD_WGMMA_CUH_

#include "cuda/dense_wgmma.cuh"

namespace jaxconv::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// d += a * b, both in shared memory: `a` 64 rows, `b` NT tiles of eight columns. kAcross (16 bits):
// what is added up lies across the rows of memory, `a` and `b` along them.
template <class T, int NT, bool kAcross>
struct DenseGradMma : DenseMma<T, NT> {};

#define JAXCONV_ACC8(d, i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAXCONV_ACC32(d, i) \
  JAXCONV_ACC8(d, i), JAXCONV_ACC8(d, i + 8), JAXCONV_ACC8(d, i + 16), JAXCONV_ACC8(d, i + 24)
#define JAXCONV_MMA_8(types, d, a, b)                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
               "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 1, 1;"               \
               : JAXCONV_ACC32(d, 0)                                                              \
               : "l"(a), "l"(b))
#define JAXCONV_MMA_16(types, d, a, b)                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types                               \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
               "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41," \
               "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61," \
               "%62,%63}, %64, %65, 1, 1, 1, 1, 1;"                                               \
               : JAXCONV_ACC32(d, 0), JAXCONV_ACC32(d, 32)                                        \
               : "l"(a), "l"(b))
#define JAXCONV_ACROSS(T, NT, types)                                         \
  template <>                                                                \
  struct DenseGradMma<T, NT, true> {                                         \
    static __device__ void Run(float (&d)[4 * NT], uint64_t a, uint64_t b) { \
      JAXCONV_MMA_##NT(types, d, a, b);                                      \
    }                                                                        \
  };
JAXCONV_ACROSS(__nv_bfloat16, 8, "bf16.bf16")
JAXCONV_ACROSS(__nv_bfloat16, 16, "bf16.bf16")
JAXCONV_ACROSS(__half, 8, "f16.f16")
JAXCONV_ACROSS(__half, 16, "f16.f16")
#undef JAXCONV_ACROSS
#undef JAXCONV_MMA_16
#undef JAXCONV_MMA_8
#undef JAXCONV_ACC32
#undef JAXCONV_ACC8

#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_GRAD_WGMMA_CUH_
