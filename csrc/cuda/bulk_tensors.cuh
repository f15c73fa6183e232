// Bulk tensor copies and clusters of blocks, from compute capability 9.0 on: what surrounds the
// products of "dense".
#ifndef JAXCONV_CUDA_BULK_TENSORS_CUH_
#define JAXCONV_CUDA_BULK_TENSORS_CUH_

#include <cuda.h>

#include <cstdint>

#include "cuda/mbarrier.cuh"
#include "cuda/wgmma.cuh"

namespace jaxconv::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
// Until all boxes, but for so many, have been read from shared memory.
template <int kLeft>
__device__ inline void WaitForReads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}
__device__ inline void WaitForStores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// The way back of LoadMatrices and of LoadTransposed.
__device__ inline void StoreMatrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ inline void StoreTransposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

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

// Adds up what all blocks of a cluster have at `count` places, each four floats at place(i), or
// none if that is 0, and leaves the sums where this block has its own. No other may read those
// places. Blocks begin with what is their own: if all read one block's memory at once, that is what
// they wait for. So the order of a sum is that of the ranks from its block's on, in each run.
template <class Place>
__device__ inline void AddUpInPlace(int cluster, int rank, int count, int thread, int threads,
                                    Place place) {
  constexpr int kBatch = 4;  // places of a thread under way, of two blocks: others' memory is far
  const auto add = [](float4& sum, float4 v) {
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  };
  for (int first = thread; first < count; first += kBatch * threads) {
    uint32_t at[kBatch];
    float4 sum[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = first + i * threads;
      at[i] = e < count ? place(e) : 0;
      sum[i] = make_float4(0, 0, 0, 0);
    }
    for (int k = 0; k < cluster; k += 2) {
      const int v_rank = (rank + k) % cluster, w_rank = (rank + k + 1) % cluster;
      float4 v[kBatch], w[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        v[i] = at[i] != 0 ? LoadRemote(at[i], v_rank) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        w[i] = at[i] != 0 ? LoadRemote(at[i], w_rank) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        add(sum[i], v[i]);
        add(sum[i], w[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (at[i] != 0) StoreShared(at[i], sum[i]);
    }
  }
}

#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_BULK_TENSORS_CUH_
