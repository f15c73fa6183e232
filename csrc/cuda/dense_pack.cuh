// How "dense" and its kin pack the weights; docs/gpu_kernels.md tells the whole story.
#ifndef JAXCONV_CUDA_DENSE_PACK_CUH_
#define JAXCONV_CUDA_DENSE_PACK_CUH_

#include "cuda/correlate.cuh"
#include "cuda/dense.h"
#include "cuda/dependent_launch.cuh"
#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

// The high part of a float32 value and what is left of it. With split operands ("highest") each
// step is three: high by high, low pixels by high weights, and high by low.
struct SplitTF32 {
  uint32_t high;
  float value;
  __device__ explicit SplitTF32(float v) : high(RoundTF32(v)), value(v) {}
  __device__ uint32_t Low() const {
    float rounded;
    asm("mov.b32 %0, %1;" : "=f"(rounded) : "r"(high));
    return RoundTF32(value - rounded);
  }
};

inline constexpr int kDensePackLoaders = 8, kDensePackWarps = kDensePackLoaders + 1;

// Eight columns by a step of channels of a tap: in the weights as wgmma reads them, two cores, each
// of 16 bytes of channels a column.
struct alignas(16) PackedTile {
  int64_t to;  // in words, or -1
  int from;    // in elements, of what a block has staged
  int zeros;   // steps of padding after it
};

// `mine`: which eight columns of a phase.
__device__ inline PackedTile PlaceTile(const DensePack& p, int group, int tap, int mine, int step) {
  const auto padded = [](int n) { return (n + kDenseQuad - 1) / kDenseQuad * kDenseQuad; };
  const int segment = p.tap_segment[tap], phase = p.tap_phase[tap], channel_tiles = p.jg / 8;
  if (segment == DensePack::kUnused || mine >= p.all_tiles || step >= p.channel_steps) {
    return {-1, 0, 0};
  }
  // Tiles beyond the channels put zeros into columns beyond the last one.
  if (mine >= channel_tiles && phase != 0) return {-1, 0, 0};
  const int beside = mine / p.phase_tiles, rest = mine - beside * p.phase_tiles;
  const int column = mine < channel_tiles ? beside * p.tiles + phase * p.phase_tiles + rest
                                          : p.used_tiles + mine - channel_tiles;
  const int column_tile = column / p.tiles, chunk = step >> p.log_chunk;
  const int steps = chunk == p.chunks - 1 ? p.last_steps : p.full_steps;
  const int all = p.segment_taps[segment] * steps;
  const int position = p.tap_position[tap] * steps + (step - (chunk << p.log_chunk)) * p.terms;
  const int first =
      chunk == p.chunks - 1 ? p.last[segment] : p.steps[segment] + chunk * p.hop[segment];
  const int64_t at =
      (int64_t{group} * p.column_tiles + column_tile) * p.total_steps + first + position;
  return {(at * p.tiles + column - column_tile * p.tiles) * 64, 0,
          position + p.terms == all ? padded(all) - all : 0};
}

// Weights as wgmma reads them: a core is eight columns by 16 bytes of channels. A block of threads
// packs a few tiles of eight columns or steps of channels, and up to 32 taps. Eight warps read rows
// as they lie in memory while one finds out where the tiles of each step of a tap go; then each
// warp writes tiles. V: elements of a load.
template <class T, int V>
__global__ void __launch_bounds__(32 * kDensePackWarps)
    PackDense(const __grid_constant__ DensePack p) {
  constexpr int kC = 32 / sizeof(T), kBatch = 4;
  constexpr int kStaged = kC * 8 * DensePack::kUnits + 128;  // those behind are not read
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  using Two = std::conditional_t<sizeof(T) == 4, uint2, uint32_t>;
  using Loaded = std::conditional_t<V == 2, Two, Bits>;
  __shared__ Bits staged[kStaged + 2];
  __shared__ PackedTile tiles[DensePack::kUnits];
  LetNextStart();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = blockIdx.z / p.ranges, tap0 = blockIdx.z % p.ranges * p.range;
  const int taps = min(p.range, p.taps - tap0), log_units = p.log_tiles + p.log_steps;
  const int tile0 = blockIdx.x << p.log_tiles, step0 = blockIdx.y << p.log_steps;
  if (warp < kDensePackLoaders) {
    // Either a row is a channel's weights and columns lie inside it, or the other way round.
    const bool inside_j = p.columns_inside;
    const int columns = 8 << p.log_tiles, channels = kC << p.log_steps;
    const int j_left = p.jg - tile0 * 8, c_left = p.cg - step0 * kC;
    const int rows = inside_j ? channels : columns, row = (inside_j ? columns : channels) * p.range;
    const int row_pitch = inside_j ? p.c_pitch : p.j_pitch;
    const int padding = (inside_j ? p.j_pitch : p.c_pitch) - p.range, gap = p.taps - p.range;
    const Bits* w = static_cast<const Bits*>(p.w) + group * p.w_g_step +
                    int64_t{step0} * kC * p.w_c_step + int64_t{tile0} * 8 * p.w_j_step + tap0;
    for (int r = warp; r < rows; r += kDensePackLoaders) {
      const int left = r < (inside_j ? c_left : j_left) ? inside_j ? j_left : c_left : 0;
      const Bits* from =
          left > 0 ? w + r * (inside_j ? p.w_c_step : p.w_j_step) : static_cast<const Bits*>(p.w);
      for (int first = 0; first < row; first += 32 * kBatch * V) {
        Loaded v[kBatch];
        int at[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int i = first + (lane + 32 * k) * V;
          const int inside = Divide(i, p.by_range), t = i - inside * p.range;
          const bool valid = i < row && inside < left && t < taps;
          const Bits* loaded = from + (valid ? i + inside * gap : 0);
          v[k] = __ldg(reinterpret_cast<const Loaded*>(loaded));  // no branches
          if (!valid) v[k] = Loaded{};
          at[k] = i < row ? r * row_pitch + i + inside * padding : kStaged;
        }
        __syncwarp();  // all loads are under way before the first store waits
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if constexpr (V == 1) {
            staged[at[k]] = v[k];
          } else if constexpr (sizeof(T) == 4) {
            staged[at[k]] = v[k].x;
            staged[at[k] + 1] = v[k].y;
          } else {
            staged[at[k]] = static_cast<Bits>(v[k]);
            staged[at[k] + 1] = static_cast<Bits>(v[k] >> 16);
          }
        }
      }
    }
  } else {
    for (int i = lane; i < taps << log_units; i += 32) {
      const int t = i >> log_units, unit = i & ((1 << log_units) - 1);
      const int my_tile = p.columns_inside ? unit : 0, my_step = p.columns_inside ? 0 : unit;
      tiles[i] = PlaceTile(p, group, tap0 + t, tile0 + my_tile, step0 + my_step);
      tiles[i].from = my_step * kC * p.c_pitch + my_tile * 8 * p.j_pitch + t;
    }
  }
  __syncthreads();
  const int step_words = p.tiles * 64;
  const Bits* mine = staged + lane / 4 * p.j_pitch + lane % 4 * (kC / 8) * p.c_pitch;
  for (int i = warp; i < taps << log_units; i += kDensePackWarps) {
    const PackedTile tile = tiles[i];
    if (tile.to < 0) continue;
    uint32_t* to = static_cast<uint32_t*>(p.weights) + tile.to + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half, to += 32) {
      const Bits* from = mine + tile.from + half * (kC / 2) * p.c_pitch;
      if constexpr (sizeof(T) == 4) {
        const SplitTF32 v(__uint_as_float(from[0]));
        to[0] = v.high;
        if (p.terms > 1) {
          to[step_words] = v.high;
          to[2 * step_words] = v.Low();
        }
      } else {
        to[0] = uint32_t{from[0]} | uint32_t{from[p.c_pitch]} << 16;
      }
#pragma unroll 1
      for (int z = 0; z < tile.zeros; ++z) to[(p.terms + z) * step_words] = 0;
    }
  }
}

// Where taps come in whole vectors: what a thread loads of a few channels is what it stores of a
// few taps, 16 bytes of channels each, and nothing goes through shared memory. Sixteen threads have
// the eight columns of a tile, and a core each eight.
inline constexpr int kPackUnits = 8;  // of so many threads, of a block

template <class T, int V>
__global__ void __launch_bounds__(16 * kPackUnits) PackTaps(const __grid_constant__ DensePack p) {
  constexpr int kC = 16 / sizeof(T), kWords = V * sizeof(T) / 4;
  static_assert(kPackUnits * V <= 16 * kPackUnits);
  using Vector = std::conditional_t<kWords == 4, uint4, uint2>;
  union Loaded {
    Vector vector;
    uint32_t word[kWords];
  };
  __shared__ PackedTile tiles[kPackUnits * V];
  LetNextStart();
  const int vectors = p.taps / V, step = blockIdx.y, group = blockIdx.z;
  const auto unit_of = [&](int unit, int& tile, int& tap) {
    const int index = blockIdx.x * kPackUnits + unit;
    tile = index / vectors;
    tap = (index - tile * vectors) * V;
  };
  int tile, tap;
  const int unit = threadIdx.x / 16, column = threadIdx.x % 8, core = threadIdx.x / 8 % 2;
  unit_of(unit, tile, tap);
  const int first = (step * 2 + core) * kC;
  const int channels = tile < p.jg / 8 ? p.cg - first : 0;
  const T* w = static_cast<const T*>(p.w);
  const T* from =
      w + group * p.w_g_step + first * p.w_c_step + (tile * 8 + column) * p.w_j_step + tap;
  Loaded v[kC];
#pragma unroll
  for (int c = 0; c < kC; ++c) {
    const T* loaded = c < channels ? from + c * p.w_c_step : w;  // no branches
    v[c].vector = __ldg(reinterpret_cast<const Vector*>(loaded));
    if (c >= channels) v[c].vector = {};
  }
  if (threadIdx.x < kPackUnits * V) {
    int its_tile, its_tap;
    unit_of(threadIdx.x / V, its_tile, its_tap);
    tiles[threadIdx.x] = PlaceTile(p, group, its_tap + threadIdx.x % V, its_tile, step);
  }
  __syncthreads();
  const int step_words = p.tiles * 64;
#pragma unroll
  for (int t = 0; t < V; ++t) {
    const PackedTile& mine = tiles[unit * V + t];
    if (mine.to < 0) continue;
    const auto store = [&](int to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
      uint32_t* words = static_cast<uint32_t*>(p.weights) + mine.to + core * 32 + column * 4;
      *reinterpret_cast<uint4*>(words + to * step_words) = make_uint4(a, b, c, d);
    };
    if constexpr (sizeof(T) == 4) {
      const SplitTF32 a(__uint_as_float(v[0].word[t])), b(__uint_as_float(v[1].word[t])),
          c(__uint_as_float(v[2].word[t])), d(__uint_as_float(v[3].word[t]));
      store(0, a.high, b.high, c.high, d.high);
      if (p.terms > 1) {
        store(1, a.high, b.high, c.high, d.high);
        store(2, a.Low(), b.Low(), c.Low(), d.Low());
      }
    } else {
      const auto pair = [&](int c) {
        return __byte_perm(v[c].word[t / 2], v[c + 1].word[t / 2], t % 2 == 0 ? 0x5410 : 0x7632);
      };
      store(0, pair(0), pair(2), pair(4), pair(6));
    }
#pragma unroll 1
    for (int z = 0; z < mine.zeros; ++z) store(p.terms + z, 0, 0, 0, 0);
  }
}

// Phases spread over the columns: the weights of a step, where a column's tap is that which reads
// the step's source, or zeros.
inline constexpr int kSpreadPackThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSpreadPackThreads)
    PackSpread(const __grid_constant__ SpreadPack p) {
  constexpr int kPer = 4 / sizeof(T);  // channels of a word
  LetNextStart();
  const SpreadPack::Step step = p.step[blockIdx.x];
  const bool beside = p.sets > 1;  // steps are of a group each, or of channels
  const int64_t group = beside ? int64_t{blockIdx.y} * p.sets + step.index : blockIdx.y;
  const T* w = static_cast<const T*>(p.w) + group * p.w_g_step;
  uint32_t* to = static_cast<uint32_t*>(p.weights) +
                 (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (p.columns * 8);
  for (int i = threadIdx.x; i < p.columns * 8; i += kSpreadPackThreads) {
    const int column = i / 64 * 8 + i / 4 % 8;
    const int channel = ((beside ? 0 : step.index * 8) + i / 32 % 2 * 4 + i % 4) * kPer;
    const int phase = column / p.jg, j = column - phase * p.jg;
    const int up = phase / p.so[2], r[kAxes] = {up / p.so[1], up % p.so[1], phase % p.so[2]};
    bool has = step.index != SpreadPack::kPadding && channel < p.cg;
    int tap = 0;
#pragma unroll
    for (int axis = 0; axis < kAxes; ++axis) {
      const int t = p.tap[axis][step.at[axis]][r[axis]];
      has = has && t >= 0;
      tap = tap * p.k[axis] + t;
    }
    const T* from = w + channel * p.w_c_step + j * p.w_j_step + tap;
    if constexpr (sizeof(T) == 4) {
      to[i] = has ? RoundTF32(__ldg(from)) : 0;
    } else {
      const T pair[2] = {has ? __ldg(from) : T{}, has ? __ldg(from + p.w_c_step) : T{}};
      memcpy(to + i, pair, 4);
    }
  }
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_PACK_CUH_
