// The group matrix multiply of compute capability 9.0a, and the bulk tensor copies that feed it,
// for "dense".
#ifndef JAXCONV_CUDA_DENSE_WGMMA_CUH_
#define JAXCONV_CUDA_DENSE_WGMMA_CUH_

#include <cuda.h>

#include <cstdint>

#include "cuda/correlate_wgmma.cuh"
#include "cuda/mbarrier.cuh"

namespace jaxconv::cuda {

// A kernel that depends on the one before it in the stream may start, and waits for all of its
// writes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline void LetNextStart() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void WaitForPrevious() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ inline void LetNextStart() {}
__device__ inline void WaitForPrevious() {}
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// d = a * b (+ d, if `add`) over a step of 32 bytes of channels, both in shared memory: `a` 64
// pixels, `b` NT tiles of eight columns.
template <class T, int NT>
struct DenseMma;

#define JAXCONV_ACC8(d, i)                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAXCONV_ACC16(d, i) JAXCONV_ACC8(d, i), JAXCONV_ACC8(d, i + 8)
#define JAXCONV_ACC32(d, i) JAXCONV_ACC16(d, i), JAXCONV_ACC16(d, i + 16)
#define JAXCONV_OPERANDS_4 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, add, 1, 1"
#define JAXCONV_ADD_4 "%18"
#define JAXCONV_SUMS_4(d) JAXCONV_ACC16(d, 0)
#define JAXCONV_OPERANDS_6                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}, %" \
  "24, %25, add, 1, 1"
#define JAXCONV_ADD_6 "%26"
#define JAXCONV_SUMS_6(d) JAXCONV_ACC16(d, 0), JAXCONV_ACC8(d, 16)
#define JAXCONV_OPERANDS_8                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24" \
  ",%25,%26,%27,%28,%29,%30,%31}, %32, %33, add, 1, 1"
#define JAXCONV_ADD_8 "%34"
#define JAXCONV_SUMS_8(d) JAXCONV_ACC32(d, 0)
#define JAXCONV_OPERANDS_12                                                                    \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24" \
  ",%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%" \
  "47}, %48, %49, add, 1, 1"
#define JAXCONV_ADD_12 "%50"
#define JAXCONV_SUMS_12(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC16(d, 32)
#define JAXCONV_OPERANDS_16                                                                    \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24" \
  ",%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%" \
  "47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, add, 1, 1"
#define JAXCONV_ADD_16 "%66"
#define JAXCONV_SUMS_16(d) JAXCONV_ACC32(d, 0), JAXCONV_ACC32(d, 32)

#define JAXCONV_DENSE_MMA(T, nt, shape, types, transpose)                                      \
  template <>                                                                                  \
  struct DenseMma<T, nt> {                                                                     \
    static __device__ void Run(float (&d)[4 * nt], uint64_t a, uint64_t b, int add = 1) {      \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " JAXCONV_ADD_##nt                       \
                   ", 0;"                                                                      \
                   "wgmma.mma_async.sync.aligned." shape types JAXCONV_OPERANDS_##nt transpose \
                   ";}"                                                                        \
                   : JAXCONV_SUMS_##nt(d)                                                      \
                   : "l"(a), "l"(b), "r"(add));                                                \
    }                                                                                          \
  };
#define JAXCONV_DENSE_MMAS(nt, n)                                                    \
  JAXCONV_DENSE_MMA(float, nt, "m64n" #n "k8", ".f32.tf32.tf32 ", "")                \
  JAXCONV_DENSE_MMA(__nv_bfloat16, nt, "m64n" #n "k16", ".f32.bf16.bf16 ", ", 0, 0") \
  JAXCONV_DENSE_MMA(__half, nt, "m64n" #n "k16", ".f32.f16.f16 ", ", 0, 0")
JAXCONV_DENSE_MMAS(4, 32)
JAXCONV_DENSE_MMAS(6, 48)
JAXCONV_DENSE_MMAS(8, 64)
JAXCONV_DENSE_MMAS(12, 96)
JAXCONV_DENSE_MMAS(16, 128)
#undef JAXCONV_DENSE_MMAS
#undef JAXCONV_DENSE_MMA
#undef JAXCONV_SUMS_4
#undef JAXCONV_ADD_4
#undef JAXCONV_OPERANDS_4
#undef JAXCONV_SUMS_6
#undef JAXCONV_ADD_6
#undef JAXCONV_OPERANDS_6
#undef JAXCONV_SUMS_8
#undef JAXCONV_ADD_8
#undef JAXCONV_OPERANDS_8
#undef JAXCONV_SUMS_12
#undef JAXCONV_ADD_12
#undef JAXCONV_OPERANDS_12
#undef JAXCONV_SUMS_16
#undef JAXCONV_ADD_16
#undef JAXCONV_OPERANDS_16
#undef JAXCONV_ACC32
#undef JAXCONV_ACC16
#undef JAXCONV_ACC8

// Until all groups of products but the last `kPending` are done.
template <int kPending>
__device__ inline void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Of 64 pixels whose groups of eight are `along_rows` bytes apart, swizzled over rows of
// `row_bytes`. Swizzling goes by the bits of addresses, so that a tap's shift is an addition.
__device__ inline uint64_t PixelDescriptor(uint32_t address, uint32_t along_rows, int row_bytes) {
  const uint64_t swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return swizzle << 62 | Descriptor(address, 16, along_rows);
}

// Bulk copies into shared memory of a box of a tensor (zeros outside it).
__device__ inline void CopyBox(uint32_t to, const CUtensorMap* map, int c, int w, int h, int d,
                               int n, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3, %4, %5, %6}], [%7];" ::"r"(to),
      "l"(map), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "r"(barrier)
      : "memory");
}

// The way back: of a box, where it lies inside the tensor.
__device__ inline void StoreBox(const CUtensorMap* map, uint32_t from, int c, int w, int h, int d,
                                int n) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4, %5}], [%6];"
      "cp.async.bulk.commit_group;" ::"l"(map),
      "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "r"(from)
      : "memory");
}
// Until all boxes have been read from shared memory.
__device__ inline void WaitForReads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void WaitForStores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Among the 128 threads of a group of warps.
__device__ inline void SyncGroup(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Among those of both groups.
__device__ inline void SyncMultipliers() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

// Among the blocks of a cluster.
__device__ inline void MeetCluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Arrives at the barrier that a block of the cluster has at that place. It says that copies may
// overwrite what products have read; a release of writes to the cluster would wait for device
// memory.
__device__ inline void ArriveRemote(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// As CopyBulk, to the same place of all blocks of the cluster whose bit is set.
__device__ inline void CopyBulkToCluster(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                         int blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

__device__ inline void StoreShared(uint32_t to, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
}
// What another block of the cluster has at the same place.
__device__ inline float4 LoadRemote(uint32_t from, int rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(from), "r"(rank)
      : "memory");
  return v;
}

template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_WGMMA_CUH_
