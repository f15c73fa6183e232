// "dense": which warps do what, in which order blocks take their work, and the barriers at which
// warps meet.
#ifndef JAXCONV_CUDA_DENSE_WALK_CUH_
#define JAXCONV_CUDA_DENSE_WALK_CUH_

#include "cuda/bulk_tensors.cuh"
#include "cuda/dense.h"
#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

inline constexpr int kDenseGroups = 2, kDenseThreads = 128 * (kDenseGroups + 2);
inline constexpr int kDenseWarps = 4 * kDenseGroups;  // that multiply
inline constexpr int kDenseRounders = 192;            // threads that round to TF32

enum class DenseMode { kPlain, kRows, kPaired, kExact, kShare, kSplit, kFold, kGrouped };

// Results of a group of warps on their way out at once, by bulk copies. With groups beside each
// other a tile has many, and few products.
constexpr int DenseStores(DenseMode mode) { return mode == DenseMode::kGrouped ? 4 : 2; }

// Whether tensors have their channels first: known at compile time, but for kExact.
template <DenseMode kMode>
__device__ constexpr bool HasRows(const DenseArgs& a) {
  return kMode == DenseMode::kExact ? a.rows
                                    : kMode == DenseMode::kRows || kMode == DenseMode::kPaired;
}

// A block's place in its cluster.
struct DenseRank {
  int pair, split;
  int neighbours;  // the first of those that share its weights
  __device__ explicit DenseRank(const DenseArgs& a) {
    const int rank = blockIdx.x % a.cluster;
    pair = rank & (a.pair - 1);
    split = rank / a.pair;
    neighbours = rank - pair;
  }
};

// Packed coordinates of a pixel in a box: n, d, h, w.
inline constexpr int kDenseBitsW = 9, kDenseBitsH = 9, kDenseBitsD = 6;

__device__ inline int PackCoordinates(int n, int d, int h, int w) {
  return ((n << kDenseBitsD | d) << kDenseBitsH | h) << kDenseBitsW | w;
}
struct DenseCoordinates {
  int n, at[kAxes];
  __device__ explicit DenseCoordinates(int packed) {
    at[2] = packed & ((1 << kDenseBitsW) - 1);
    at[1] = packed >> kDenseBitsW & ((1 << kDenseBitsH) - 1);
    at[0] = packed >> (kDenseBitsW + kDenseBitsH) & ((1 << kDenseBitsD) - 1);
    n = packed >> (kDenseBitsW + kDenseBitsH + kDenseBitsD);
  }
};

// The groups of warps share a tile along one axis.
__device__ inline int PartStart(int part, int box, int group) {
  return part < box ? group * part : 0;
}

// The items of a cluster of blocks (or of a block).
struct DenseWalk {
  int index, hop;
  __device__ explicit DenseWalk(const DenseArgs& a)
      : index(blockIdx.x / a.cluster), hop(gridDim.x / a.cluster) {}
  __device__ void Next() { index += hop; }
};

// A tile of pixels, a program and a tile of columns.
struct DenseItem {
  int column_tile, program, group, n, q[kAxes];
  __device__ DenseItem(const DenseArgs& a, int index) {
    const int band = Divide(index, a.by_band_items), first = band * a.band;
    int rest = index - band * a.by_band_items.divisor;
    const auto take = [&](const Divisor& count) {
      const int up = Divide(rest, count), mine = rest - up * count.divisor;
      rest = up;
      return mine;
    };
    column_tile = take(a.by_column_tiles);
    const int tile = take(first + a.band <= a.tiles ? a.by_band : a.by_last_band);
    program = rest;
    rest = first + tile;
    group = take(a.by_groups);
    rest = rest * a.pair + DenseRank(a).pair;
#pragma unroll
    for (int i = kAxes - 1; i >= 0; --i) q[i] = take(a.by_q_tiles[i]) * a.axis[i].box;
    n = rest * a.box_n;
  }
};

// The stages of an item that are this block's.
struct DenseShare {
  int first, end;
  __device__ DenseShare(const DenseArgs& a, const DenseProgram& program) {
    const int stages = program.segments * a.chunks, rank = DenseRank(a).split;
    first = stages * rank / a.split;
    end = stages * (rank + 1) / a.split;
  }
};

// The quads of weights before a stage of a program.
__device__ inline int QuadsBefore(const DenseArgs& a, const DenseProgram& program, int stage) {
  const int segment = stage / a.chunks;
  if (segment == program.segments) return program.quads;
  const DenseSegment& s = a.segment[program.first_segment + segment];
  return (s.steps - program.steps) / kDenseQuad +
         stage % a.chunks * ((s.taps * a.full_steps + kDenseQuad - 1) / kDenseQuad);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Barriers: a full and an empty one for each stage of the inputs, each slot of the weights, and
// each box to be turned; and one more for stages that are also rounded.
struct DenseBarriers {
  static constexpr int kIn = 8 * DenseArgs::kMaxBuffers, kRing = 8 * DenseArgs::kMaxRing;
  uint32_t base;
  __device__ uint32_t InFull(int i) const { return base + i * 8; }
  __device__ uint32_t InRounded(int i) const { return base + kIn + i * 8; }
  __device__ uint32_t InEmpty(int i) const { return base + 2 * kIn + i * 8; }
  __device__ uint32_t RingFull(int i) const { return base + 3 * kIn + i * 8; }
  __device__ uint32_t RingEmpty(int i) const { return base + 3 * kIn + kRing + i * 8; }
  __device__ uint32_t RawFull(int i) const { return base + 3 * kIn + 2 * kRing + i * 8; }
  __device__ uint32_t RawEmpty(int i) const { return base + 4 * kIn + 2 * kRing + i * 8; }
};

// A place in a ring: which one, and which time round.
struct DenseCursor {
  int at = 0, parity = 0;
  __device__ void Next(int size) {
    if (++at == size) {
      at = 0;
      parity ^= 1;
    }
  }
};

#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_WALK_CUH_
