// The group matrix multiply of compute capability 9.0a: four warps multiply 64 rows by NT tiles of
// eight columns over a step of 32 bytes of what is contracted. float32 sums stay in registers, the
// columns are in shared memory, the rows there or in registers.
#ifndef JAXCONV_CUDA_WGMMA_CUH_
#define JAXCONV_CUDA_WGMMA_CUH_

#include <cstdint>

#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

// A value that all lanes of a warp have, in a way that the compiler knows: addresses in descriptors
// are then computed once a warp, in the registers that the instruction reads them from. Otherwise
// each product waits for four moves into them (twelve instructions a product instead of three).
__device__ inline int Uniform(int v) { return __shfl_sync(~0u, v, 0); }
__device__ inline int2 Uniform(int2 v) { return make_int2(Uniform(v.x), Uniform(v.y)); }
__device__ inline int4 Uniform(int4 v) {
  return make_int4(Uniform(v.x), Uniform(v.y), Uniform(v.z), Uniform(v.w));
}

// Of an operand in shared memory: its first core (8 rows of 16 bytes, contiguous) and the distances
// to the next one along what is contracted and along the rows, in units of 16 bytes. Cores need no
// more alignment than that, so a tap's shift is an addition.
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
// Until all groups of products but the last `kPending` are done.
template <int kPending>
__device__ inline void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Moves registers from warps that copy to those that multiply.
template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Of NT tiles: the registers of the sums, and their numbers as operands; those after them.
#define JAXCONV_ACC4(d, i) "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3])
#define JAXCONV_ACC8(d, i) JAXCONV_ACC4(d, i), JAXCONV_ACC4(d, i + 4)
#define JAXCONV_ACC16(d, i) JAXCONV_ACC8(d, i), JAXCONV_ACC8(d, i + 8)
#define JAXCONV_ACC32(d, i) JAXCONV_ACC16(d, i), JAXCONV_ACC16(d, i + 16)
#define JAXCONV_SUMS_4(d) JAXCONV_ACC16(d, 0)
#define JAXCONV_LIST_4 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define JAXCONV_BOTH_4 "%16, %17"
#define JAXCONV_ADD_4 "%18"
#define JAXCONV_ROWS_4 "{%16,%17,%18,%19}, %20"
#define JAXCONV_SUMS_6(d) JAXCONV_ACC16(d, 0), JAXCONV_ACC8(d, 16)
#define JAXCONV_LIST_6                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
  "%20,%21,%22,%23}"
#define JAXCONV_BOTH_6 "%24, %25"
#define JAXCONV_ADD_6 "%26"
#define JAXCONV_SUMS_8(d) JAXCONV_ACC32(d, 0)
#define JAXCONV_LIST_8                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define JAXCONV_BOTH_8 "%32, %33"
#define JAXCONV_ADD_8 "%34"
#define JAXCONV_ROWS_8 "{%32,%33,%34,%35}, %36"
#define JAXCONV_SUMS_9(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC4(d, 32)
#define JAXCONV_LIST_9                                                  \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18," \
  "%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35}"
#define JAXCONV_BOTH_9 "%36, %37"
#define JAXCONV_ADD_9 "%38"
#define JAXCONV_SUMS_10(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC8(d, 32)
#define JAXCONV_LIST_10                                                  \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,"  \
  "%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35," \
  "%36,%37,%38,%39}"
#define JAXCONV_BOTH_10 "%40, %41"
#define JAXCONV_ADD_10 "%42"
#define JAXCONV_SUMS_12(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC16(d, 32)
#define JAXCONV_LIST_12                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"  \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37," \
  "%38,%39,%40,%41,%42,%43,%44,%45,%46,%47}"
#define JAXCONV_BOTH_12 "%48, %49"
#define JAXCONV_ADD_12 "%50"
#define JAXCONV_SUMS_14(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC16(d, 32), JAXCONV_ACC8(d, 48)
#define JAXCONV_LIST_14                                                  \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,"  \
  "%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35," \
  "%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55}"
#define JAXCONV_BOTH_14 "%56, %57"
#define JAXCONV_ADD_14 "%58"
#define JAXCONV_SUMS_16(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC32(d, 32)
#define JAXCONV_LIST_16                                                      \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"  \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37," \
  "%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
  "%56,%57,%58,%59,%60,%61,%62,%63}"
#define JAXCONV_BOTH_16 "%64, %65"
#define JAXCONV_ADD_16 "%66"
#define JAXCONV_SUMS_20(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC32(d, 32), JAXCONV_ACC16(d, 64)
#define JAXCONV_LIST_20                                                              \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"          \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
  "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79}"
#define JAXCONV_BOTH_20 "%80, %81"

// d = a * b (+ d, if `add`; or always), both in shared memory.
template <class T, int NT>
struct GroupMma;
#define JAXCONV_MMA(T, NT, shape, transpose)                                       \
  template <>                                                                      \
  struct GroupMma<T, NT> {                                                         \
    static __device__ void Run(float* d, uint64_t a, uint64_t b, int add = 1) {    \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " JAXCONV_ADD_##NT           \
                   ", 0;wgmma.mma_async.sync.aligned." shape " " JAXCONV_LIST_##NT \
                   ", " JAXCONV_BOTH_##NT ", add, 1, 1" transpose ";}"             \
                   : JAXCONV_SUMS_##NT(d)                                          \
                   : "l"(a), "l"(b), "r"(add));                                    \
    }                                                                              \
    static __device__ void Add(float* d, uint64_t a, uint64_t b) {                 \
      asm volatile("wgmma.mma_async.sync.aligned." shape " " JAXCONV_LIST_##NT     \
                   ", " JAXCONV_BOTH_##NT ", 1, 1, 1" transpose ";"                \
                   : JAXCONV_SUMS_##NT(d)                                          \
                   : "l"(a), "l"(b));                                              \
    }                                                                              \
  };
// d += a * b, where what is contracted lies across the rows of memory, and `a` and `b` along them.
template <class T, int NT>
struct GroupMmaAcross;
#define JAXCONV_MMA_ACROSS(T, NT, shape)                                       \
  template <>                                                                  \
  struct GroupMmaAcross<T, NT> {                                               \
    static __device__ void Run(float* d, uint64_t a, uint64_t b) {             \
      asm volatile("wgmma.mma_async.sync.aligned." shape " " JAXCONV_LIST_##NT \
                   ", " JAXCONV_BOTH_##NT ", 1, 1, 1, 1, 1;"                   \
                   : JAXCONV_SUMS_##NT(d)                                      \
                   : "l"(a), "l"(b));                                          \
    }                                                                          \
  };
// d += a * b with the rows in registers, as the fragments of mma.sync.
template <class T, int NT>
struct GroupMmaRows;
#define JAXCONV_MMA_ROWS(T, NT, shape, transpose)                                            \
  template <>                                                                                \
  struct GroupMmaRows<T, NT> {                                                               \
    static __device__ void Run(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                               uint64_t b) {                                                 \
      asm volatile("wgmma.mma_async.sync.aligned." shape " " JAXCONV_LIST_##NT               \
                   ", " JAXCONV_ROWS_##NT ", 1, 1, 1" transpose ";"                          \
                   : JAXCONV_SUMS_##NT(d)                                                    \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                            \
    }                                                                                        \
  };
#define JAXCONV_TF32(n) "m64n" #n "k8.f32.tf32.tf32"
#define JAXCONV_BF16(n) "m64n" #n "k16.f32.bf16.bf16"
#define JAXCONV_F16(n) "m64n" #n "k16.f32.f16.f16"
#define JAXCONV_MMAS(NT, n)                                 \
  JAXCONV_MMA(float, NT, JAXCONV_TF32(n), "")               \
  JAXCONV_MMA(__nv_bfloat16, NT, JAXCONV_BF16(n), ", 0, 0") \
  JAXCONV_MMA(__half, NT, JAXCONV_F16(n), ", 0, 0")
#define JAXCONV_MMAS_ACROSS(NT, n)                       \
  JAXCONV_MMA_ACROSS(__nv_bfloat16, NT, JAXCONV_BF16(n)) \
  JAXCONV_MMA_ACROSS(__half, NT, JAXCONV_F16(n))
#define JAXCONV_MMAS_ROWS(NT, n)                              \
  JAXCONV_MMA_ROWS(float, NT, JAXCONV_TF32(n), "")            \
  JAXCONV_MMA_ROWS(__nv_bfloat16, NT, JAXCONV_BF16(n), ", 0") \
  JAXCONV_MMA_ROWS(__half, NT, JAXCONV_F16(n), ", 0")
JAXCONV_MMAS(4, 32)
JAXCONV_MMAS(6, 48)
JAXCONV_MMAS(8, 64)
JAXCONV_MMAS(9, 72)
JAXCONV_MMAS(10, 80)
JAXCONV_MMAS(12, 96)
JAXCONV_MMAS(14, 112)
JAXCONV_MMAS(16, 128)
JAXCONV_MMAS_ACROSS(4, 32)
JAXCONV_MMAS_ACROSS(6, 48)
JAXCONV_MMAS_ACROSS(8, 64)
JAXCONV_MMAS_ACROSS(12, 96)
JAXCONV_MMAS_ACROSS(14, 112)
JAXCONV_MMAS_ACROSS(16, 128)
JAXCONV_MMAS_ACROSS(20, 160)
JAXCONV_MMAS_ROWS(4, 32)
JAXCONV_MMAS_ROWS(8, 64)
#undef JAXCONV_MMAS_ROWS
#undef JAXCONV_MMAS_ACROSS
#undef JAXCONV_MMAS
#undef JAXCONV_F16
#undef JAXCONV_BF16
#undef JAXCONV_TF32
#undef JAXCONV_MMA_ROWS
#undef JAXCONV_MMA_ACROSS
#undef JAXCONV_MMA
#undef JAXCONV_BOTH_20
#undef JAXCONV_LIST_20
#undef JAXCONV_SUMS_20
#undef JAXCONV_ADD_16
#undef JAXCONV_BOTH_16
#undef JAXCONV_LIST_16
#undef JAXCONV_SUMS_16
#undef JAXCONV_ADD_14
#undef JAXCONV_BOTH_14
#undef JAXCONV_LIST_14
#undef JAXCONV_SUMS_14
#undef JAXCONV_ADD_12
#undef JAXCONV_BOTH_12
#undef JAXCONV_LIST_12
#undef JAXCONV_SUMS_12
#undef JAXCONV_ADD_10
#undef JAXCONV_BOTH_10
#undef JAXCONV_LIST_10
#undef JAXCONV_SUMS_10
#undef JAXCONV_ADD_9
#undef JAXCONV_BOTH_9
#undef JAXCONV_LIST_9
#undef JAXCONV_SUMS_9
#undef JAXCONV_ROWS_8
#undef JAXCONV_ADD_8
#undef JAXCONV_BOTH_8
#undef JAXCONV_LIST_8
#undef JAXCONV_SUMS_8
#undef JAXCONV_ADD_6
#undef JAXCONV_BOTH_6
#undef JAXCONV_LIST_6
#undef JAXCONV_SUMS_6
#undef JAXCONV_ROWS_4
#undef JAXCONV_ADD_4
#undef JAXCONV_BOTH_4
#undef JAXCONV_LIST_4
#undef JAXCONV_SUMS_4
#undef JAXCONV_ACC32
#undef JAXCONV_ACC16
#undef JAXCONV_ACC8
#undef JAXCONV_ACC4
#else
// What needs them is never launched there.
inline constexpr bool kHasGroups = false;
__device__ inline void GroupFence() {}
__device__ inline void GroupCommit() {}
template <int>
__device__ inline void WaitForProducts() {}
template <int>
__device__ inline void TakeRegisters() {}
template <int>
__device__ inline void GiveRegisters() {}
template <class T, int NT>
struct GroupMma {
  static __device__ void Run(float*, uint64_t, uint64_t, int = 1) {}
  static __device__ void Add(float*, uint64_t, uint64_t) {}
};
template <class T, int NT>
struct GroupMmaRows {
  static __device__ void Run(float*, uint32_t, uint32_t, uint32_t, uint32_t, uint64_t) {}
};
#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_WGMMA_CUH_
