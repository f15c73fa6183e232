// The kernels of "depthwise"; see depthwise.h. Instantiated by depthwise_*.cu.
#ifndef JAXCONV_CUDA_DEPTHWISE_CUH_
#define JAXCONV_CUDA_DEPTHWISE_CUH_

#include <type_traits>

#include "cuda/dependent_launch.cuh"
#include "cuda/depthwise.h"
#include "cuda/dtypes.cuh"
#include "cuda/shared_memory.h"

namespace jaxconv::cuda {
namespace {

constexpr int kThreads = kDepthwiseThreads;

// V neighbours in memory, as they are: what was asked for ahead waits in few registers.
template <class In, int V>
using Raw =
    std::conditional_t<V == 1, In, std::conditional_t<std::is_same_v<In, float>, float2, unsigned>>;

// Zeros where they are not inside.
template <int V, class In>
__device__ inline Raw<In, V> Ask(const In* from, bool inside) {
  static_assert(V <= 2);
  return inside ? __ldg(reinterpret_cast<const Raw<In, V>*>(from)) : Raw<In, V>{};
}

// Brings into L2 what is asked for kAhead steps (input gradient: rows) later, which needs no
// registers: a march meets new rows of device memory at every step.
constexpr int kAhead = 4;

__device__ inline void Announce(const void* from, bool inside) {
  if (inside) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

template <class In, int V>
__device__ inline void Unpack(float (&to)[V], Raw<In, V> raw) {
  if constexpr (V == 1) {
    to[0] = ToAccumulator(raw);
  } else if constexpr (std::is_same_v<In, float>) {
    to[0] = raw.x;
    to[1] = raw.y;
  } else if constexpr (std::is_same_v<In, __half>) {
    const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&raw));
    to[0] = v.x;
    to[1] = v.y;
  } else {
    to[0] = __uint_as_float(raw << 16);
    to[1] = __uint_as_float(raw & 0xffff0000u);
  }
}

template <int V, class Out>
__device__ inline void Store(Out* to, const float (&v)[V]) {
  static_assert(V <= 2);
  if constexpr (V == 1) {
    *to = FromAccumulator<Out>(v[0]);
  } else if constexpr (std::is_same_v<Out, float>) {
    *reinterpret_cast<float2*>(to) = float2{v[0], v[1]};
  } else if constexpr (std::is_same_v<Out, __half>) {
    *reinterpret_cast<__half2*>(to) = __floats2half2_rn(v[0], v[1]);
  } else {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(v[0], v[1]);
  }
}

// Element `at` of the result, of In or, of 16-bit inputs, of float.
template <class In, int V>
__device__ inline void StoreAt(const DepthwiseArgs& a, int64_t at, const float (&v)[V]) {
  if (std::is_same_v<In, float> || a.wide) {
    Store(static_cast<float*>(a.out) + at, v);
  } else {
    Store(static_cast<In*>(a.out) + at, v);
  }
}

// Copies 16 bytes if `wanted`. In straight lines: ptxas puts idle instructions before a row of
// copies.
__device__ inline void CopyAsync16(void* to, const void* from, bool wanted) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(
          static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}

// Copies 4 bytes, or zeros.
__device__ inline void CopyAsync4(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(inside ? 4 : 0)
               : "memory");
}

__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline bool Inside(int position, int size) {
  return static_cast<unsigned>(position) < static_cast<unsigned>(size);
}

constexpr int Max(int a, int b) { return a > b ? a : b; }
constexpr int Min(int a, int b) { return a < b ? a : b; }

// Rows of y on their way through shared memory: a ring of stages of kRows rows of axis 1, each
// the box of axes 0 and 2 and the channels that a block needs, zeros outside the tensor, but for
// rows of axis 1 outside, which are not copied:
//   channels last   [plane of axis 0][position of axis 2][kColumn channels]
//   channels first  [channel][plane of axis 0][position of axis 2, from a multiple of 16 bytes]
// kColumn: elements from a position of axis 2 to the next.
template <class In, int kColumn, int kRows>
struct Ring {
  static constexpr int kElements = 16 / static_cast<int>(sizeof(In)), kOutside = -1;
  const DepthwiseStage& s;
  In* shared;
  const In* base;  // position (first0, 0, first2) of the block's first channel
  int lead;        // positions before what was asked for
  int size[kAxes], stride[kAxes], channel_stride, first0, first2, channels;
  int from[kDepthwiseChunks];  // of the thread's chunks: offset from base, or kOutside
  int to[kDepthwiseChunks];    // and in a row

  __device__ Ring(const DepthwiseStage& stage, void* to) : s(stage), shared(static_cast<In*>(to)) {}

  // `tensor` is of an image and the block's first channel, of which there are channels_left.
  __device__ void Begin(const In* tensor, const int (&sizes)[kAxes], const int (&strides)[kAxes],
                        int of_channels, int at0, int at2, int channels_left) {
    lead = kColumn == 1 ? at2 & (kElements - 1) : 0;
    first0 = at0;
    first2 = at2 - lead;
    base = tensor + first0 * strides[0] + first2 * strides[2];
    channel_stride = of_channels;
    channels = channels_left;
    for (int i = 0; i < kAxes; ++i) {
      size[i] = sizes[i];
      stride[i] = strides[i];
    }
    __syncthreads();  // the tile before is read
#pragma unroll
    for (int k = 0; k < kDepthwiseChunks; ++k) {
      const int i = static_cast<int>(threadIdx.x + k * blockDim.x);
      const bool wanted = s.each == kElements && i < s.count;
      from[k] = Place(wanted ? i : 0, to[k]);
      if (wanted && from[k] == kOutside) {
        for (int row = 0; row < kDepthwiseStages * kRows; ++row) {
          *reinterpret_cast<uint4*>(shared + row * s.elements + to[k]) = uint4{};
        }
      }
      if (!wanted) from[k] = kOutside;
    }
  }

  // The offset from base of chunk i of a row, and its place in the row.
  __device__ int Place(int i, int& place) const {
    const int rest = Divide(i, s.by_first), d0 = (i - rest * s.by_first.divisor) * s.each;
    place = rest * (kColumn == 1 ? s.by_first.divisor * s.each : kColumn) + d0;
    const int d2 = Divide(rest, s.by_second), d1 = rest - d2 * s.by_second.divisor;
    const int c = kColumn == 1 ? d2 : d0, at0 = kColumn == 1 ? d1 : d2;
    const int at2 = kColumn == 1 ? d0 : d1;
    return Inside(first0 + at0, size[0]) && Inside(first2 + at2, size[2]) && c < channels
               ? c * channel_stride + at0 * stride[0] + at2 * stride[2]
               : kOutside;
  }

  // Asks for rows `row` and up.
  __device__ void Copy(int row, int slot) const {
    const In* source = base + row * stride[1];
    In* staged = shared + slot * kRows * s.elements;
    if (s.each == kElements) {
#pragma unroll
      for (int r = 0; r < kRows; ++r, source += stride[1], staged += s.elements) {
        const bool inside = Inside(row + r, size[1]);
#pragma unroll
        for (int k = 0; k < kDepthwiseChunks; ++k) {
          CopyAsync16(staged + to[k], source + from[k], inside && from[k] != kOutside);
        }
      }
      return;
    }
#pragma unroll 1
    for (int r = 0; r < kRows; ++r, source += stride[1], staged += s.elements) {
      if (!Inside(row + r, size[1])) continue;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < s.count; i += static_cast<int>(blockDim.x)) {
        int place;
        const int at = Place(i, place);
        if (s.each * sizeof(In) == 4) {
          CopyAsync4(staged + place, source + (at == kOutside ? 0 : at), at != kOutside);
        } else {
          staged[place] = at == kOutside ? FromAccumulator<In>(0) : source[at];
        }
      }
    }
  }

  __device__ const In* Row(int slot, int r) const {
    return shared + (slot * kRows + r) * s.elements;
  }
};

// Runs body(step, slot) for begin <= step < end, with what copy(step, slot) asked for; copies run
// kDepthwiseStages - 1 steps ahead. All threads of a block come here.
template <class Copy, class Body>
__device__ inline void March(int begin, int end, Copy copy, Body body) {
  constexpr int kLast = kDepthwiseStages - 1;
#pragma unroll 1
  for (int d = 0; d < kLast; ++d) {
    if (begin + d < end) copy(begin + d, d);
    CommitCopies();
  }
  int slot = 0;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    WaitForCopies<kLast - 1>();
    __syncthreads();
    if (step + kLast < end) copy(step + kLast, slot == 0 ? kLast : slot - 1);
    CommitCopies();
    body(step, slot);
    slot = slot == kLast ? 0 : slot + 1;
  }
}

// What a thread keeps all the time: its place among the positions of a tile, and its channels.
struct Lane {
  int c, at2, at0;
  int residue;  // of at0 by the stride
  bool busy;
};

template <int V>
__device__ inline Lane LaneOf(const DepthwiseArgs& a) {
  const int t = static_cast<int>(threadIdx.x);
  // The innermost two of three digits, by layout.
  const SmallDivisor& by = a.channels_last ? a.by_c : a.by2;
  const SmallDivisor& then_by = a.channels_last ? a.by2 : a.by0;
  const int rest = Divide(t, by), first = t - rest * by.divisor, third = Divide(rest, then_by);
  const int second = rest - third * then_by.divisor;
  Lane lane;
  lane.at2 = a.channels_last ? second : first;
  lane.at0 = a.channels_last ? third : second;
  const int c = a.channels_last ? first : third;
  lane.c = (static_cast<int>(blockIdx.x) * a.by_c.divisor + c) * V;
  lane.residue = lane.at0 - Divide(lane.at0, a.by_residue) * a.by_residue.divisor;
  lane.busy = lane.at0 < a.by0.divisor && c < a.by_c.divisor && lane.c < a.c;
  return lane;
}

// A thread's positions of axes 0 and 2, and its march, begin <= position < end, along axis 1.
struct Tile {
  int n, at0, at2, begin, end;
  bool inside;
};

// kQ: neighbouring positions of axis 0 of a thread.
template <int kQ = 1>
__device__ inline Tile TileOf(const DepthwiseArgs& a, const Lane& lane, int index) {
  Tile tile;
  tile.at2 = a.origin[2] + index % a.tiles2 * a.by2.divisor + lane.at2;
  index /= a.tiles2;
  tile.at0 = a.origin[0] + (index % a.tiles0 * a.by0.divisor + lane.at0) * kQ;
  index /= a.tiles0;
  tile.begin = a.origin[1] + index % a.segments * a.steps;
  tile.end = min(tile.begin + a.steps, a.end[1]);
  tile.n = index / a.segments;
  tile.inside = lane.busy && tile.at0 < a.end[0] && tile.at2 < a.end[2];
  return tile;
}

// y. Positions: u of axis 0 (from a multiple of its stride), q of axes 1 and 2. The sums of the K1
// rows that an input row reaches go round in registers. J0: taps of axis 0 for a residue. kShift:
// what u of axis 2 is more than a multiple of S2 at a position's first output: then pairs of
// outputs are aligned in memory.
template <class In, int V, bool kPairs, int kShift, int J0, int S1, int K1, int S2, int K2>
__global__ void __launch_bounds__(kThreads, 2) Forward(const __grid_constant__ DepthwiseArgs a) {
  constexpr int kJ1 = (K1 + S1 - 1) / S1, kJ2 = (K2 + S2 - 1) / S2;
  constexpr int kSources = kJ2 + (S2 - 1 + kShift) / S2, kRows = Max(K1, S1);
  const Lane lane = LaneOf<V>(a);
  if (!lane.busy) return;
  const int stride0 = a.stride[0], r0 = lane.residue, taps = a.k[0] * K1 * K2;
  const In* const w_c = static_cast<const In*>(a.w) + int64_t{lane.c} * taps;
  float w[J0][K1][K2][V], bias[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int j0 = 0; j0 < J0; ++j0) {
      const int t0 = r0 + j0 * stride0;
#pragma unroll
      for (int t = 0; t < K1 * K2; ++t) {
        w[j0][t / K2][t % K2][v] =
            t0 < a.k[0] ? ToAccumulator(w_c[v * taps + t0 * K1 * K2 + t]) : 0;
      }
    }
    if (a.bias != nullptr) bias[v] = ToAccumulator(static_cast<const In*>(a.bias)[lane.c + v]);
  }
  const int xs2 = kPairs ? 1 : a.xs[2];
  int hop[J0][kSources];  // of the sources
#pragma unroll
  for (int j0 = 0; j0 < J0; ++j0) {
#pragma unroll
    for (int m = 0; m < kSources; ++m) hop[j0][m] = m * xs2 - j0 * a.xs[0];
  }
  for (int index = blockIdx.y; index < a.tiles; index += a.parts) {
    const Tile tile = TileOf(a, lane, index);
    if (!tile.inside || tile.at0 < a.pad[0]) continue;
    const int q0 = (tile.at0 - r0) / stride0, i2 = tile.at2 - (kJ2 - 1);
    bool inside[J0][kSources];
#pragma unroll
    for (int j0 = 0; j0 < J0; ++j0) {
      const bool plane = r0 + j0 * stride0 < a.k[0] && Inside(q0 - j0, a.isize[0]);
#pragma unroll
      for (int m = 0; m < kSources; ++m) inside[j0][m] = plane && Inside(i2 + m, a.isize[2]);
    }
    int q1 = tile.begin - (kJ1 - 1);
    const In* const x_image = static_cast<const In*>(a.x) + tile.n * a.xn + int64_t{lane.c} * a.xc;
    const In* x = x_image + (q0 * a.xs[0] + i2 * xs2 + q1 * a.xs[1]);
    const int o2 = tile.at2 * S2 + kShift - a.pad[2];
    In* to = static_cast<In*>(a.out) + tile.n * a.yn + int64_t{lane.c} * a.yc +
             ((tile.at0 - a.pad[0]) * a.ys[0] + o2 * a.ys[2] + (q1 * S1 - a.pad[1]) * a.ys[1]);
    Raw<In, V> next[J0][kSources];
    float sum[kRows][S2][V];
    const auto ask = [&] {
      const bool row = Inside(q1, a.isize[1]) && q1 < tile.end;
#pragma unroll
      for (int j0 = 0; j0 < J0; ++j0) {
#pragma unroll
        for (int m = 0; m < kSources; ++m) {
          next[j0][m] = Ask<V>(x + hop[j0][m], row && inside[j0][m]);
        }
      }
      Announce(x + (hop[0][kSources - 1] + kAhead * a.xs[1]),
               inside[0][kSources - 1] && Inside(q1 + kAhead, a.isize[1]));
    };
    const auto begin_rows = [&](int first) {
#pragma unroll
      for (int t = first; t < kRows; ++t) {
#pragma unroll
        for (int e = 0; e < S2 * V; ++e) sum[t][e / V][e % V] = bias[e % V];
      }
    };
    ask();
    begin_rows(0);
#pragma unroll(K1 == 2 * S1 ? 2 : 1)
    for (; q1 < tile.end;) {
      float row[J0][kSources][V];
#pragma unroll
      for (int e = 0; e < J0 * kSources; ++e) {
        Unpack<In>(row[e / kSources][e % kSources], next[e / kSources][e % kSources]);
      }
      ++q1;
      x += a.xs[1];
      ask();
#pragma unroll
      for (int j0 = 0; j0 < J0; ++j0) {
#pragma unroll
        for (int t1 = 0; t1 < K1; ++t1) {
#pragma unroll
          for (int r = 0; r < S2; ++r) {
#pragma unroll
            for (int j2 = 0; j2 < kJ2; ++j2) {
              const int t2 = (r + kShift) % S2 + j2 * S2, m = kJ2 - 1 + (r + kShift) / S2 - j2;
              if (t2 >= K2) continue;
#pragma unroll
              for (int v = 0; v < V; ++v) sum[t1][r][v] += row[j0][m][v] * w[j0][t1][t2][v];
            }
          }
        }
      }
      if (q1 > tile.begin) {
#pragma unroll
        for (int r1 = 0; r1 < S1; ++r1) {
          if (!Inside((q1 - 1) * S1 + r1 - a.pad[1], a.osize[1])) continue;
          if constexpr (kPairs) {
            const float pair[2] = {sum[r1][0][0], sum[r1][1][0]};
            Store(to + r1 * a.ys[1], pair);  // all pairs of positions inside lie inside
          } else {
#pragma unroll
            for (int r = 0; r < S2; ++r) {
              if (Inside(o2 + r, a.osize[2])) Store(to + (r1 * a.ys[1] + r * a.ys[2]), sum[r1][r]);
            }
          }
        }
      }
      to += S1 * a.ys[1];
#pragma unroll
      for (int t = 0; t < kRows - S1; ++t) {
#pragma unroll
        for (int e = 0; e < S2 * V; ++e) sum[t][e / V][e % V] = sum[t + S1][e / V][e % V];
      }
      begin_rows(kRows - S1);
    }
  }
}

// dx, one tap along axis 0. Positions: inputs. The sums of the inputs that S1 rows of y reach go
// round in registers. kPairs, kShift: as in Forward.
template <class In, int V, bool kPairs, int kShift, int S1, int K1, int S2, int K2>
__global__ void __launch_bounds__(kThreads, 2) InputGrad(const __grid_constant__ DepthwiseArgs a) {
  constexpr int kJ1 = (K1 + S1 - 1) / S1, kRows = Min(S1, K1);
  // Load m of a row brings tap 2 * m - kShift and the next, or tap m.
  constexpr int kLoads = kPairs ? (K2 + kShift + 1) / 2 : K2, kEach = kPairs ? 2 : V;
  const auto tap = [](int m) { return kPairs ? 2 * m - kShift : m; };
  const Lane lane = LaneOf<V>(a);
  if (!lane.busy) return;
  const In* const w_c = static_cast<const In*>(a.w) + int64_t{lane.c} * K1 * K2;
  float w[K1][K2][V];
  int hop[kLoads];
#pragma unroll
  for (int e = 0; e < K1 * K2 * V; ++e) {
    w[e / V / K2][e / V % K2][e % V] = ToAccumulator(w_c[e % V * K1 * K2 + e / V]);
  }
#pragma unroll
  for (int m = 0; m < kLoads; ++m) hop[m] = kPairs ? tap(m) : m * a.ys[2];
  for (int index = blockIdx.y; index < a.tiles; index += a.parts) {
    const Tile tile = TileOf(a, lane, index);
    if (!tile.inside) continue;
    const int o0 = tile.at0 * a.stride[0] - a.pad[0], o2 = tile.at2 * S2 - a.pad[2];
    int o1 = tile.begin * S1 - a.pad[1];
    bool inside[kLoads];
#pragma unroll
    for (int m = 0; m < kLoads; ++m) {
      inside[m] = Inside(o0, a.osize[0]) && Inside(o2 + tap(m), a.osize[2]);
    }
    const In* y = static_cast<const In*>(a.y) + tile.n * a.yn + int64_t{lane.c} * a.yc +
                  (o0 * a.ys[0] + o2 * a.ys[2] + o1 * a.ys[1]);
    int64_t to = tile.n * a.xn + int64_t{lane.c} * a.xc + tile.at0 * a.xs[0] + tile.at2 * a.xs[2] +
                 (tile.begin - (kJ1 - 1)) * a.xs[1];
    Raw<In, kEach> next[kRows][kLoads];
    const auto ask = [&] {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool row = Inside(o1 + r, a.osize[1]), later = Inside(o1 + r + kAhead, a.osize[1]);
        const In* const from = y + r * a.ys[1];
#pragma unroll
        for (int m = 0; m < kLoads; ++m) {
          next[r][m] = Ask<kEach>(from + hop[m], row && inside[m]);
          // The first positions are the thread's own; neighbours of a row are in the same sector.
          if (m < (kPairs ? 1 : S2) && (m == 0 || a.channels_last)) {
            Announce(from + (hop[m] + kAhead * a.ys[1]), later && inside[m]);
          }
        }
      }
    };
    float sum[kJ1][V] = {};
    ask();
    for (int q1 = tile.begin; q1 < tile.end + kJ1 - 1; ++q1) {
      float value[kRows][K2][V];
#pragma unroll
      for (int e = 0; e < kRows * kLoads; ++e) {
        const int r = e / kLoads, m = e % kLoads;
        float each[kEach];
        Unpack<In>(each, next[r][m]);
#pragma unroll
        for (int v = 0; v < kEach; ++v) {
          const int t2 = tap(m) + (kPairs ? v : 0);
          if (t2 >= 0 && t2 < K2) value[r][t2][kPairs ? 0 : v] = each[v];
        }
      }
      o1 += S1;
      y += S1 * a.ys[1];
      ask();
#pragma unroll
      for (int t1 = 0; t1 < K1; ++t1) {
#pragma unroll
        for (int e = 0; e < K2 * V; ++e) {
          sum[t1 / S1][e % V] += value[t1 % S1][e / V][e % V] * w[t1][e / V][e % V];
        }
      }
      if (q1 - (kJ1 - 1) >= tile.begin) StoreAt<In>(a, to, sum[kJ1 - 1]);
      to += a.xs[1];
#pragma unroll
      for (int j = kJ1 - 1; j >= 0; --j) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[j][v] = j > 0 ? sum[j - 1][v] : 0;
      }
    }
  }
}

// dx, several taps along axis 0. Positions: inputs, kQ neighbours of axis 0 a thread. The sums of
// the inputs that S1 rows of y reach go round in registers, y comes through a ring of rows. kPairs:
// positions of axis 2 are read in pairs.
template <class In, int kColumn, bool kPairs, int kShift, int K0, int S1, int K1, int S2, int K2>
__global__ void __launch_bounds__(kThreads, 2)
    InputGradOfRows(const __grid_constant__ DepthwiseArgs a) {
  constexpr int kJ1 = (K1 + S1 - 1) / S1, kTaps = K0 * K1 * K2, kRows = Min(S1, K1);
  constexpr int kQ = kDepthwiseInputs, kPlanes = K0 + (kQ - 1) * S1;
  // Load m of a row brings tap 2 * m - kShift and the next, or tap m.
  constexpr int kLoads = kPairs ? (K2 + kShift + 1) / 2 : K2, kEach = kPairs ? 2 : 1;
  const auto tap = [](int m) { return kPairs ? 2 * m - kShift : m; };
  extern __shared__ uint4 shared[];
  const Lane lane = LaneOf<1>(a);
  const int c_first = static_cast<int>(blockIdx.x) * a.by_c.divisor;
  const In* const w_c = static_cast<const In*>(a.w) + int64_t{lane.busy ? lane.c : 0} * kTaps;
  float w[K0][K1][K2];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) w[t / (K1 * K2)][t / K2 % K1][t % K2] = ToAccumulator(w_c[t]);
  Ring<In, kColumn, kRows> ring(a.stage, shared);
  for (int index = blockIdx.y; index < a.tiles; index += a.parts) {
    const Tile tile = TileOf<kQ>(a, lane, index);
    ring.Begin(static_cast<const In*>(a.y) + tile.n * a.yn + int64_t{c_first} * a.yc, a.osize, a.ys,
               a.yc, (tile.at0 - lane.at0 * kQ) * a.stride[0] - a.pad[0],
               (tile.at2 - lane.at2) * S2 - a.pad[2], a.c - c_first);
    const int mine = (lane.c - c_first) * a.stage.channel +
                     lane.at0 * kQ * a.stride[0] * a.stage.plane + lane.at2 * S2 * kColumn +
                     ring.lead;
    int64_t to = tile.n * a.xn + int64_t{lane.c} * a.xc + tile.at0 * a.xs[0] + tile.at2 * a.xs[2] +
                 (tile.begin - (kJ1 - 1)) * a.xs[1];
    float sum[kQ][kJ1][1] = {};
    March(
        tile.begin, tile.end + kJ1 - 1,
        [&](int q1, int slot) { ring.Copy(q1 * S1 - a.pad[1], slot); },
        [&](int q1, int slot) {
          if (!tile.inside) return;
#pragma unroll
          for (int r1 = 0; r1 < kRows; ++r1) {
            if (!Inside(q1 * S1 + r1 - a.pad[1], a.osize[1])) continue;
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) {
              const In* const at = ring.Row(slot, r1) + mine + plane * a.stage.plane;
              float value[K2];
#pragma unroll
              for (int m = 0; m < kLoads; ++m) {
                float each[kEach];
                Unpack<In>(each, *reinterpret_cast<const Raw<In, kEach>*>(at + tap(m) * kColumn));
#pragma unroll
                for (int e = 0; e < kEach; ++e) {
                  if (tap(m) + e >= 0 && tap(m) + e < K2) value[tap(m) + e] = each[e];
                }
              }
#pragma unroll
              for (int q = 0; q < kQ; ++q) {
                const int t0 = plane - q * S1;
                if (t0 < 0 || t0 >= K0) continue;
#pragma unroll
                for (int t2 = 0; t2 < K2; ++t2) {
#pragma unroll
                  for (int j1 = 0; j1 < kJ1; ++j1) {
                    if (r1 + j1 * S1 < K1) sum[q][j1][0] += value[t2] * w[t0][r1 + j1 * S1][t2];
                  }
                }
              }
            }
          }
#pragma unroll
          for (int q = 0; q < kQ; ++q) {
            if (q1 - (kJ1 - 1) >= tile.begin && tile.at0 + q < a.end[0]) {
              StoreAt<In>(a, to + q * a.xs[0], sum[q][kJ1 - 1]);
            }
#pragma unroll
            for (int j = kJ1 - 1; j >= 0; --j) sum[q][j][0] = j > 0 ? sum[q][j - 1][0] : 0;
          }
          to += a.xs[1];
        });
  }
}

// Adds up the sums of the threads that share channels and the residue of axis 0, in a fixed order,
// and writes them to element place(channels of the block and before, residue, which), if it is not
// negative: `helpers` threads take every helpers-th thread's sum, and then add up as a tree.
template <class In, int kKept, class Place>
__device__ inline void AddUp(const DepthwiseArgs& a, const float* kept, int residues, Place place,
                             int part) {
  constexpr int kChunk = kKept < 16 ? kKept : 16;
  __shared__ float sums[kChunk][kThreads];
  const int members = a.by2.divisor * (a.by0.divisor / residues),
            groups = a.by_c.divisor * residues;
  const int c_first = static_cast<int>(blockIdx.x) * a.by_c.divisor;
  int helpers = 1;
  while (helpers < members && helpers < 32) helpers *= 2;
  const int helper = threadIdx.x % helpers;
#pragma unroll 1
  for (int begin = 0; begin < kKept; begin += kChunk) {
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kKept; ++e) {  // registers have no index at run time
      if (e / kChunk * kChunk == begin) sums[e % kChunk][threadIdx.x] = kept[e];
    }
    __syncthreads();
    const int count = min(kChunk, kKept - begin) * groups;
    // All lanes of a warp stay together for the tree.
    for (int base = 0; base < count; base += static_cast<int>(blockDim.x) / helpers) {
      const int item = base + threadIdx.x / helpers, group = item % groups;
      const int e = min(item / groups, kChunk - 1), c = group % a.by_c.divisor,
                r = group / a.by_c.divisor;
      float total = 0;
      for (int m = helper; m < members && item < count; m += helpers) {
        const int at2 = m % a.by2.divisor, at0 = m / a.by2.divisor * residues + r;
        total += sums[e][a.channels_last ? (at0 * a.by2.divisor + at2) * a.by_c.divisor + c
                                         : (c * a.by0.divisor + at0) * a.by2.divisor + at2];
      }
      for (int hop = helpers / 2; hop > 0; hop /= 2) {
        total += __shfl_down_sync(0xffffffffu, total, hop, helpers);
      }
      if (helper != 0 || item >= count) continue;
      const int64_t to = place(c_first + c, r, begin + e);
      if (to < 0) continue;
      if (a.parts > 1) {
        static_cast<float*>(a.out)[part * a.w_elements + to] = total;
      } else {
        const float one[1] = {total};
        StoreAt<In>(a, to, one);
      }
    }
  }
}

// A part of dw. Positions: u of axis 0, inputs of axis 1, q of axis 2. The K1 rows of y that an
// input row meets go round in registers.
template <class In, int V, bool kPairs, int kShift, int J0, int S1, int K1, int S2, int K2>
__global__ void __launch_bounds__(kThreads, 2) WeightGrad(const __grid_constant__ DepthwiseArgs a) {
  constexpr int kJ2 = (K2 + S2 - 1) / S2, kSources = kJ2 + (S2 - 1 + kShift) / S2;
  constexpr int kLoads = kPairs ? 1 : S2, kEach = kPairs ? 2 : V;  // of a row of y
  constexpr int kNew = Min(S1, K1);                                // rows that a step brings
  LetNextStart();                                                  // SumParts
  const Lane lane = LaneOf<V>(a);
  const int stride0 = a.stride[0], r0 = lane.residue;
  float w[J0][K1][K2][V] = {};
  const int xs2 = kPairs ? 1 : a.xs[2];
  int hop[J0][kSources];
#pragma unroll
  for (int j0 = 0; j0 < J0; ++j0) {
#pragma unroll
    for (int m = 0; m < kSources; ++m) hop[j0][m] = m * xs2 - j0 * a.xs[0];
  }
  for (int index = blockIdx.y; index < a.tiles; index += a.parts) {
    const Tile tile = TileOf(a, lane, index);
    if (!tile.inside || tile.at0 < a.pad[0]) continue;
    const int q0 = (tile.at0 - r0) / stride0, i2 = tile.at2 - (kJ2 - 1);
    const int o2 = tile.at2 * S2 + kShift - a.pad[2];
    bool inside_x[J0][kSources], inside_y[kLoads];
#pragma unroll
    for (int j0 = 0; j0 < J0; ++j0) {
      const bool plane = r0 + j0 * stride0 < a.k[0] && Inside(q0 - j0, a.isize[0]);
#pragma unroll
      for (int m = 0; m < kSources; ++m) inside_x[j0][m] = plane && Inside(i2 + m, a.isize[2]);
    }
#pragma unroll
    for (int m = 0; m < kLoads; ++m) inside_y[m] = Inside(o2 + m, a.osize[2]);
    const In* x = static_cast<const In*>(a.x) + tile.n * a.xn + int64_t{lane.c} * a.xc +
                  (q0 * a.xs[0] + tile.begin * a.xs[1] + i2 * xs2);
    int o1 = tile.begin * S1 - a.pad[1];
    const In* y = static_cast<const In*>(a.y) + tile.n * a.yn + int64_t{lane.c} * a.yc +
                  ((tile.at0 - a.pad[0]) * a.ys[0] + o1 * a.ys[1] + o2 * a.ys[2]);
    Raw<In, V> x_next[J0][kSources];
    Raw<In, kEach> y_next[kNew][kLoads];
    float ys[K1][S2][V];
    const auto ask_x = [&](bool row) {
#pragma unroll
      for (int j0 = 0; j0 < J0; ++j0) {
#pragma unroll
        for (int m = 0; m < kSources; ++m) {
          x_next[j0][m] = Ask<V>(x + hop[j0][m], row && inside_x[j0][m]);
        }
      }
    };
    const auto ask_y = [&](int t1, int m, bool row) {
      return Ask<kEach>(y + (t1 * a.ys[1] + m * a.ys[2]),
                        row && Inside(o1 + t1, a.osize[1]) && inside_y[m]);
    };
    const auto unpack_y = [&](int t1, int m, Raw<In, kEach> raw) {
      float each[kEach];
      Unpack<In>(each, raw);
#pragma unroll
      for (int v = 0; v < kEach; ++v) ys[t1][kPairs ? v : m][kPairs ? 0 : v] = each[v];
    };
    ask_x(true);
#pragma unroll
    for (int e = 0; e < K1 * kLoads; ++e) {
      unpack_y(e / kLoads, e % kLoads, ask_y(e / kLoads, e % kLoads, true));
    }
#pragma unroll(K1 == 2 * S1 ? 2 : 1)
    for (int i1 = tile.begin; i1 < tile.end; ++i1) {
      float row[J0][kSources][V];
#pragma unroll
      for (int e = 0; e < J0 * kSources; ++e) {
        Unpack<In>(row[e / kSources][e % kSources], x_next[e / kSources][e % kSources]);
      }
      x += a.xs[1];
      y += S1 * a.ys[1];
      o1 += S1;
      const bool more = i1 + 1 < tile.end, much_more = i1 + 1 + kAhead < tile.end;
#pragma unroll
      for (int e = 0; e < kNew * kLoads; ++e) {
        const int t1 = K1 - kNew + e / kLoads, m = e % kLoads, later = t1 + kAhead * S1;
        y_next[e / kLoads][m] = ask_y(t1, m, more);
        // Two channels leave no registers for it; neighbours of a row are in the same sector.
        if (V == 2 || (m > 0 && !a.channels_last)) continue;
        Announce(y + (later * a.ys[1] + m * a.ys[2]),
                 much_more && Inside(o1 + later, a.osize[1]) && inside_y[m]);
      }
      ask_x(more);
      Announce(x + (hop[0][kSources - 1] + kAhead * a.xs[1]),
               V == 1 && much_more && inside_x[0][kSources - 1]);
#pragma unroll
      for (int j0 = 0; j0 < J0; ++j0) {
#pragma unroll
        for (int t1 = 0; t1 < K1; ++t1) {
#pragma unroll
          for (int r = 0; r < S2; ++r) {
#pragma unroll
            for (int j2 = 0; j2 < kJ2; ++j2) {
              const int t2 = (r + kShift) % S2 + j2 * S2, m = kJ2 - 1 + (r + kShift) / S2 - j2;
              if (t2 >= K2) continue;
#pragma unroll
              for (int v = 0; v < V; ++v) w[j0][t1][t2][v] += row[j0][m][v] * ys[t1][r][v];
            }
          }
        }
      }
#pragma unroll
      for (int t1 = 0; t1 < K1 - kNew; ++t1) {
#pragma unroll
        for (int e = 0; e < S2 * V; ++e) ys[t1][e / V][e % V] = ys[t1 + kNew][e / V][e % V];
      }
#pragma unroll
      for (int e = 0; e < kNew * kLoads; ++e) {
        unpack_y(K1 - kNew + e / kLoads, e % kLoads, y_next[e / kLoads][e % kLoads]);
      }
    }
  }
  const int taps = a.k[0] * K1 * K2;
  AddUp<In, J0 * K1 * K2 * V>(
      a, &w[0][0][0][0], stride0,
      [&](int c, int residue, int kept) -> int64_t {
        const int channel = c * V + kept % V, t0 = residue + kept / V / (K1 * K2) * stride0;
        if (channel >= a.c || t0 >= a.k[0]) return -1;
        return int64_t{channel} * taps + t0 * K1 * K2 + kept / V % (K1 * K2);
      },
      static_cast<int>(blockIdx.y));
}

// Any window: y, one output at a time. Positions: outputs.
template <class In>
__global__ void __launch_bounds__(kThreads) AnyForward(const __grid_constant__ DepthwiseArgs a) {
  const Lane lane = LaneOf<1>(a);
  if (!lane.busy) return;
  const In* const w = static_cast<const In*>(a.w) + int64_t{lane.c} * a.k[0] * a.k[1] * a.k[2];
  float bias = 0;
  if (a.bias != nullptr) {
    bias = std::is_same_v<In, float> || a.wide
               ? static_cast<const float*>(a.bias)[lane.c]
               : ToAccumulator(static_cast<const In*>(a.bias)[lane.c]);
  }
  for (int index = blockIdx.y; index < a.tiles; index += a.parts) {
    const Tile tile = TileOf(a, lane, index);
    if (!tile.inside) continue;
    const In* const x = static_cast<const In*>(a.x) + tile.n * a.xn + int64_t{lane.c} * a.xc;
    // Calls body(tap, input) for the taps of an axis that reach output o from inside.
    const auto for_taps = [&](int axis, int o, auto body) {
      int u = o + a.pad[axis];
      for (int t = 0; t < a.k[axis]; ++t, u -= a.dilation[axis]) {
        const int i = u / a.stride[axis];
        if (i * a.stride[axis] == u && Inside(i, a.isize[axis])) body(t, i);
      }
    };
    for (int o1 = tile.begin; o1 < tile.end; ++o1) {
      float sum[1] = {bias};
      for_taps(0, tile.at0, [&](int t0, int i0) {
        for_taps(1, o1, [&](int t1, int i1) {
          for_taps(2, tile.at2, [&](int t2, int i2) {
            sum[0] += ToAccumulator(x[i0 * a.xs[0] + i1 * a.xs[1] + i2 * a.xs[2]]) *
                      ToAccumulator(w[(t0 * a.k[1] + t1) * a.k[2] + t2]);
          });
        });
      });
      const int at = tile.at0 * a.ys[0] + o1 * a.ys[1] + tile.at2 * a.ys[2];
      StoreAt<In>(a, tile.n * a.yn + int64_t{lane.c} * a.yc + at, sum);
    }
  }
}

// Any window: dx, one input at a time. Positions: inputs.
template <class In>
__global__ void __launch_bounds__(kThreads) AnyInputGrad(const __grid_constant__ DepthwiseArgs a) {
  const Lane lane = LaneOf<1>(a);
  if (!lane.busy) return;
  const In* const w = static_cast<const In*>(a.w) + int64_t{lane.c} * a.k[0] * a.k[1] * a.k[2];
  for (int index = blockIdx.y; index < a.tiles; index += a.parts) {
    const Tile tile = TileOf(a, lane, index);
    if (!tile.inside) continue;
    const In* const y = static_cast<const In*>(a.y) + tile.n * a.yn + int64_t{lane.c} * a.yc;
    const auto for_taps = [&](int axis, int i, auto body) {
      int o = i * a.stride[axis] - a.pad[axis];
      for (int t = 0; t < a.k[axis]; ++t, o += a.dilation[axis]) {
        if (Inside(o, a.osize[axis])) body(t, o);
      }
    };
    for (int i1 = tile.begin; i1 < tile.end; ++i1) {
      float sum[1] = {};
      for_taps(0, tile.at0, [&](int t0, int o0) {
        for_taps(1, i1, [&](int t1, int o1) {
          for_taps(2, tile.at2, [&](int t2, int o2) {
            sum[0] += ToAccumulator(y[o0 * a.ys[0] + o1 * a.ys[1] + o2 * a.ys[2]]) *
                      ToAccumulator(w[(t0 * a.k[1] + t1) * a.k[2] + t2]);
          });
        });
      });
      const int at = tile.at0 * a.xs[0] + i1 * a.xs[1] + tile.at2 * a.xs[2];
      StoreAt<In>(a, tile.n * a.xn + int64_t{lane.c} * a.xc + at, sum);
    }
  }
}

// Any window: a part of dw at the tap blockIdx.y. Positions: inputs.
template <class In>
__global__ void __launch_bounds__(kThreads) AnyWeightGrad(const __grid_constant__ DepthwiseArgs a) {
  LetNextStart();  // SumParts
  const Lane lane = LaneOf<1>(a);
  const int tap = blockIdx.z,
            t[kAxes] = {tap / a.k[2] / a.k[1], tap / a.k[2] % a.k[1], tap % a.k[2]};
  float sum = 0;
  for (int index = blockIdx.y; index < a.tiles; index += a.parts) {
    const Tile tile = TileOf(a, lane, index);
    const auto output = [&](int axis, int i) {
      return i * a.stride[axis] + t[axis] * a.dilation[axis] - a.pad[axis];
    };
    const int o0 = output(0, tile.at0), o2 = output(2, tile.at2);
    if (!tile.inside || !Inside(o0, a.osize[0]) || !Inside(o2, a.osize[2])) continue;
    const In* const x = static_cast<const In*>(a.x) + tile.n * a.xn + int64_t{lane.c} * a.xc +
                        (tile.at0 * a.xs[0] + tile.at2 * a.xs[2]);
    const In* const y = static_cast<const In*>(a.y) + tile.n * a.yn + int64_t{lane.c} * a.yc +
                        (o0 * a.ys[0] + o2 * a.ys[2]);
#pragma unroll 4
    for (int i1 = tile.begin; i1 < tile.end; ++i1) {
      const int o1 = output(1, i1);
      if (!Inside(o1, a.osize[1])) continue;
      sum += ToAccumulator(x[i1 * a.xs[1]]) * ToAccumulator(y[o1 * a.ys[1]]);
    }
  }
  const int taps = a.k[0] * a.k[1] * a.k[2];
  AddUp<In, 1>(
      a, &sum, 1, [&](int c, int, int) { return c < a.c ? int64_t{c} * taps + tap : int64_t{-1}; },
      static_cast<int>(blockIdx.y));
}

template <class Kernel>
cudaError_t Run(Kernel kernel, const DepthwisePlan& plan, const DepthwiseArgs& a, int taps,
                cudaStream_t stream) {
  constexpr int kDeclared = 24 << 10;  // at most, by a kernel itself; 48 KB need no leave
  if (plan.shared > kDeclared) {
    const cudaError_t status = AllowSharedMemory(kernel, kDeclared);
    if (status != cudaSuccess) return status;
  }
  const auto size = [](int n) { return static_cast<unsigned>(n); };
  kernel<<<dim3(size(plan.channel_blocks), size(a.parts), size(taps)), size(plan.threads),
           size(plan.shared), stream>>>(a);
  return cudaGetLastError();
}

// The kernels of a window; forward and weight gradient: of T0 taps of axis 0 a residue.
template <class In, int T0, int S1, int K1, int S2, int K2>
cudaError_t RunWindow(Pass pass, const DepthwisePlan& plan, const DepthwiseArgs& a,
                      cudaStream_t stream) {
  constexpr DepthwiseWindow kWindow{T0, S1, K1, S2, K2};
  constexpr int V = kWindow.channels(), kShift = kWindow.shift();
  if constexpr (T0 > 1 && DepthwiseHas(Pass::kInputGrad, kWindow)) {
    if (pass == Pass::kInputGrad) {
      if (a.channels_last) {
        return Run(InputGradOfRows<In, 32, false, 0, T0, S1, K1, S2, K2>, plan, a, 1, stream);
      }
      if constexpr (S2 != 2) {
        return Run(InputGradOfRows<In, 1, false, 0, T0, S1, K1, S2, K2>, plan, a, 1, stream);
      } else if (a.pad[2] % 2 == 0) {
        return Run(InputGradOfRows<In, 1, true, 0, T0, S1, K1, S2, K2>, plan, a, 1, stream);
      } else {
        return Run(InputGradOfRows<In, 1, true, 1, T0, S1, K1, S2, K2>, plan, a, 1, stream);
      }
    }
  }
  if constexpr (DepthwiseHas(Pass::kForward, kWindow)) {
    const auto run = [&](auto forward, auto weight_grad, auto input_grad) {
      return pass == Pass::kForward      ? Run(forward, plan, a, 1, stream)
             : pass == Pass::kWeightGrad ? Run(weight_grad, plan, a, 1, stream)
             : T0 == 1                   ? Run(input_grad, plan, a, 1, stream)
                                         : cudaErrorInvalidValue;  // never planned
    };
    if (a.channels_last) {
      return run(Forward<In, V, false, 0, T0, S1, K1, S2, K2>,
                 WeightGrad<In, V, false, 0, T0, S1, K1, S2, K2>,
                 InputGrad<In, V, false, 0, S1, K1, S2, K2>);
    }
    if constexpr (S2 == 2) {
      if (plan.pairs) {
        return run(Forward<In, 1, true, kShift, T0, S1, K1, S2, K2>,
                   WeightGrad<In, 1, true, kShift, T0, S1, K1, S2, K2>,
                   InputGrad<In, 1, true, kShift, S1, K1, S2, K2>);
      }
    }
    return run(Forward<In, 1, false, 0, T0, S1, K1, S2, K2>,
               WeightGrad<In, 1, false, 0, T0, S1, K1, S2, K2>,
               InputGrad<In, 1, false, 0, S1, K1, S2, K2>);
  }
  return cudaErrorInvalidValue;  // never planned
}

}  // namespace

template <class In>
cudaError_t EnqueueDepthwise(Pass pass, const DepthwisePlan& plan, const DepthwiseArgs& a,
                             cudaStream_t stream) {
  if (plan.window < 0) {
    if (pass == Pass::kForward) return Run(AnyForward<In>, plan, a, 1, stream);
    if (pass == Pass::kInputGrad) return Run(AnyInputGrad<In>, plan, a, 1, stream);
    return Run(AnyWeightGrad<In>, plan, a, a.k[0] * a.k[1] * a.k[2], stream);
  }
  int window = 0;
#define JAXCONV_CASE(T0, S1, K1, S2, K2) \
  if (plan.window == window++) return RunWindow<In, T0, S1, K1, S2, K2>(pass, plan, a, stream);
  JAXCONV_DEPTHWISE_WINDOWS(JAXCONV_CASE)
#undef JAXCONV_CASE
  return cudaErrorInvalidValue;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DEPTHWISE_CUH_
