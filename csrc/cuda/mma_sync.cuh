// A warp's own matrix multiply, which every compute capability from 8.0 on has.
#ifndef JAXCONV_CUDA_MMA_SYNC_CUH_
#define JAXCONV_CUDA_MMA_SYNC_CUH_

#include <cstdint>

#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The nearest TF32 value. Hopper has an instruction for ties to even; before it, and for ties away
// from zero, it takes four.
__device__ inline uint32_t RoundTF32(float v) {
  uint32_t r;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
#endif
  return r;
}

// Eight rows of 16 bytes from each of four addresses, which eight lanes each give: a row's bytes go
// to the four lanes of a quad.
__device__ inline void LoadMatrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// The same of matrices of 8 x 8 elements of 16 bits, transposed: a quad has a column.
__device__ inline void LoadTransposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// d += a * b over two blocks (32 bytes a row) or over one.
template <class T>
struct Mma;

#define JAXCONV_MMA(T, whole, half)                                                          \
  template <>                                                                                \
  struct Mma<T> {                                                                            \
    static __device__ void Whole(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,         \
                                 uint32_t b1) {                                              \
      asm("mma.sync.aligned." whole " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                   \
    }                                                                                        \
    static __device__ void Half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {       \
      asm("mma.sync.aligned." half " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"           \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                   \
          : "r"(a0), "r"(a1), "r"(b));                                                       \
    }                                                                                        \
  };
JAXCONV_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32", "m16n8k4.row.col.f32.tf32.tf32.f32")
JAXCONV_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32",
            "m16n8k8.row.col.f32.bf16.bf16.f32")
JAXCONV_MMA(__half, "m16n8k16.row.col.f32.f16.f16.f32", "m16n8k8.row.col.f32.f16.f16.f32")
#undef JAXCONV_MMA

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_MMA_SYNC_CUH_
