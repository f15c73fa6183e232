// Device part of "mma"; docs/gpu_kernels.md tells the whole story.
//
// Everything is made of 16-byte blocks of channels (4 float32 or 8 of 16 bits) of one pixel. Shared
// memory holds the input as [channel block][pixel], so that eight neighbouring pixels are 128
// contiguous bytes wherever a tap shifts them to: one ldmatrix row each, free of bank conflicts.
// Two blocks make a step: m16n8k8 in TF32, m16n8k16 in 16 bits. A column is a tile of eight output
// channels of one output phase. A warp owns MT tiles of 16 pixels and NC columns, and the columns'
// masks say which of them have a tap at a step's offsets, so that no zero is multiplied.
#ifndef JAXCONV_CUDA_CORRELATE_CUH_
#define JAXCONV_CUDA_CORRELATE_CUH_

#include <type_traits>

#include "cuda/correlate.h"
#include "cuda/dtypes.cuh"
#include "cuda/mbarrier.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/shared_memory.h"
#include "cuda/wgmma.cuh"

namespace jaxconv::cuda {

__device__ inline void CopyAsync16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
// The same, or zeros.
__device__ inline void CopyOrZero16(uint32_t to, const void* from, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(copy ? 16 : 0));
}
__device__ inline void CopyOrZero4(uint32_t to, const void* from, bool copy) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(copy ? 4 : 0));
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;"); }
__device__ inline void WaitForCopies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

template <class T>
inline constexpr int kBlockChannels = 16 / sizeof(T);

// A block of channels as it lies in device memory.
template <class T>
__device__ inline uint4 LoadBlock(const T* __restrict__ from, int offset, int channels,
                                  int64_t c_step, bool vector) {
  uint4 r = make_uint4(0, 0, 0, 0);
  if (channels <= 0) return r;
  if (vector) return __ldg(reinterpret_cast<const uint4*>(from + offset));
  constexpr int kC = kBlockChannels<T>;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  uint32_t v[kC];
  if (channels == kC) {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      v[c] = __ldg(reinterpret_cast<const Bits*>(from + c * c_step) + offset);
    }
  } else {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      v[c] = c < channels ? __ldg(reinterpret_cast<const Bits*>(from + c * c_step) + offset) : 0;
    }
  }
  if constexpr (sizeof(T) == 4)
    return make_uint4(v[0], v[1], v[2], v[3]);
  else
    return make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
}

template <class T>
__device__ inline void StoreBlock(char* to, uint4 v, int low_offset, bool split) {
  if constexpr (sizeof(T) == 4) {
    const float f[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z),
                        __uint_as_float(v.w)};
    v = make_uint4(RoundTF32(f[0]), RoundTF32(f[1]), RoundTF32(f[2]), RoundTF32(f[3]));
    if (split) {
      *reinterpret_cast<uint4*>(to + low_offset) = make_uint4(
          RoundTF32(f[0] - __uint_as_float(v.x)), RoundTF32(f[1] - __uint_as_float(v.y)),
          RoundTF32(f[2] - __uint_as_float(v.z)), RoundTF32(f[3] - __uint_as_float(v.w)));
    }
  }
  *reinterpret_cast<uint4*>(to) = v;
}

// Weights in the order in which ldmatrix and the tensor cores take them: a core is eight output
// channels by 16 bytes of contracted channels. A block of threads packs the cores of one tile of
// output channels, one channel block and 32 taps.
inline constexpr int kPackTaps = 32, kPackThreads = 128;

// The main kernel copies slabs of cores whole: those that no tap fills become zero.
__device__ inline void ZeroUnusedCores(const CorrelatePack& p, int variants) {
  const unsigned blocks_before = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned all = gridDim.x * gridDim.y * gridDim.z * kPackThreads;
  const unsigned cores =
      2u * p.groups * p.column_sets * p.chunks * p.steps_padded * p.nc;  // 128 bytes each
  for (unsigned i = blocks_before * kPackThreads + threadIdx.x; i < cores; i += all) {
    const unsigned column = i / 2 % p.nc, row = i / 2 / p.nc, step = row % p.steps_padded;
    const unsigned column_set = row / p.steps_padded / p.chunks % p.column_sets;
    const unsigned set = column_set % p.phase_sets, first = p.first_entry[set];
    const unsigned block = 2 * step + i % 2, entry = first + block / variants / p.chunk_blocks;
    const unsigned tile = column_set / p.phase_sets * p.set_tiles + column / p.set_phases;
    const bool used = entry < p.first_entry[set + 1] && (p.entry_mask[entry] >> column & 1) != 0 &&
                      tile < static_cast<unsigned>(p.tiles_j);
    if (used) continue;
    uint4* core = reinterpret_cast<uint4*>(p.weights) + int64_t{i} * 8;
#pragma unroll
    for (int v = 0; v < 8; ++v) core[v] = make_uint4(0, 0, 0, 0);
  }
}

template <class T>
__global__ void __launch_bounds__(kPackThreads)
    PackWeights(const __grid_constant__ CorrelatePack p) {
  constexpr int kC = kBlockChannels<T>;
  __shared__ T tile[kC * 8][kPackTaps + 1];
  const int ranges = (p.taps + kPackTaps - 1) / kPackTaps;
  const int tile_j = blockIdx.x, block = blockIdx.y;
  const int group = ranges > 0 ? blockIdx.z / ranges : 0;
  const int tap0 = ranges > 0 ? blockIdx.z % ranges * kPackTaps : 0;
  const int taps = min(kPackTaps, p.taps - tap0);
  const int variants = p.split ? 3 : 1;
  if (tile_j == 0 && block == 0 && blockIdx.z == 0) {
    for (int set = 0; set < p.phase_sets; ++set) {
      const int first = p.first_entry[set];
      const int blocks = (p.first_entry[set + 1] - first) * p.chunk_blocks * variants;
      for (int s = threadIdx.x; s < p.steps_padded; s += kPackThreads) {
        int offset[2] = {0, 0}, mask[2] = {0, 0};
        for (int h = 0; h < 2; ++h) {
          const int b = 2 * s + h;
          if (b >= blocks) continue;
          const int v = b % variants, plane = b / variants % p.chunk_blocks;
          const int entry = first + b / variants / p.chunk_blocks;
          offset[h] =
              ((plane + (v == 2 ? p.chunk_blocks : 0)) * p.plane + p.entry_offset[entry]) * 16;
          mask[h] = p.entry_mask[entry];
        }
        const int count = s == 0 ? (blocks + 1) / 2 : 0;
        p.steps[set * p.steps_padded + s] =
            make_int4(offset[0], offset[1], mask[0], mask[1] | count << 16);
      }
    }
  }
  for (int i = threadIdx.x; i < kC * 8 * taps; i += kPackThreads) {
    const int t = i % taps, pair = i / taps, j = tile_j * 8 + pair % 8, c = block * kC + pair / 8;
    T v{};
    if (j < p.jg && c < p.cg) {
      v = static_cast<const T*>(
          p.w)[group * p.w_g_step + c * p.w_c_step + j * p.w_j_step + tap0 + t];
    }
    tile[pair / 8 * 8 + pair % 8][t] = v;
  }
  __syncthreads();
  ZeroUnusedCores(p, variants);
  const int lane = threadIdx.x % 32, n = lane / 4, k = lane % 4;
  for (int t = threadIdx.x / 32; t < taps; t += kPackThreads / 32) {
    const int phase = p.tap_phase[tap0 + t], set = phase / p.set_phases;
    const int column_set = tile_j / p.set_tiles * p.phase_sets + set;
    const int column = tile_j % p.set_tiles * p.set_phases + phase % p.set_phases;
    const int chunk = block / p.chunk_blocks;
    const int position = p.tap_entry[tap0 + t] * p.chunk_blocks + block % p.chunk_blocks;
    for (int v = 0; v < variants; ++v) {
      uint32_t word;
      if constexpr (sizeof(T) == 4) {
        const float f = tile[k * 8 + n][t];
        word = RoundTF32(f);
        if (v == 1) word = RoundTF32(f - __uint_as_float(word));
      } else {
        word =
            static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&tile[2 * k * 8 + n][t])) |
            static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&tile[(2 * k + 1) * 8 + n][t]))
                << 16;
      }
      const int b = position * variants + v;
      const int64_t row =
          ((int64_t{group} * p.column_sets + column_set) * p.chunks + chunk) * p.steps_padded +
          b / 2;
      reinterpret_cast<uint32_t*>(p.weights)[((row * p.nc + column) * 2 + b % 2) * 32 + lane] =
          word;
    }
  }
}

// The phase and tile of output channels of a set's columns, one after another.
struct Column {
  int tile, phase_index, rd, rh, rw, rd0, rh0, rw0;

  __device__ Column(const CorrelateArgs& a, int column_set) {
    const unsigned tiles = static_cast<unsigned>(column_set) / a.phase_sets;
    unsigned phase = (column_set - tiles * a.phase_sets) * a.set_phases;
    tile = tiles * a.set_tiles;
    const unsigned up = phase / a.axis[2].so;
    rw = rw0 = phase - up * a.axis[2].so;
    rd = rd0 = up / a.axis[1].so;
    rh = rh0 = up - rd * a.axis[1].so;
    phase_index = 0;
  }
  __device__ void Next(const CorrelateArgs& a) {
    if (++phase_index == a.set_phases) {
      phase_index = 0;
      ++tile;
      rd = rd0, rh = rh0, rw = rw0;
    } else if (++rw == a.axis[2].so) {
      rw = 0;
      if (++rh == a.axis[1].so) {
        rh = 0;
        ++rd;
      }
    }
  }
};

// Where a block of threads works.
struct TileOrigin {
  int n, q[kAxes];
};

__device__ inline TileOrigin OriginOf(const CorrelateArgs& a, int tile) {
  TileOrigin at;
  unsigned rest = tile;
#pragma unroll
  for (int i = kAxes - 1; i >= 0; --i) {
    const unsigned tiles = a.axis[i].tiles, up = tiles == 1 ? rest : rest / tiles;
    at.q[i] = (rest - up * tiles) * a.axis[i].box;
    rest = up;
  }
  at.n = rest * a.box_n;
  return at;
}

// Every pixel staged, relative to the first one of its block: its distance in device memory, and
// its coordinates packed as n, d, h, w.
struct Staged {
  int distance;
  uint32_t at;
};
inline constexpr int kBitsW = 11, kBitsH = 9, kBitsD = 7;

__device__ inline void ListStaged(const CorrelateArgs& a, Staged* list, int tid, int threads) {
  for (int p = tid; p < a.halo; p += threads) {
    int rest = p, source[kAxes], distance = 0;
#pragma unroll
    for (int i = kAxes - 1; i >= 0; --i) {
      const CorrelateAxis& x = a.axis[i];
      const int size = x.slots * x.length, place = rest % size, slot = place / x.length;
      rest /= size;
      source[i] = (place - slot * x.length) * x.si + x.rho[slot];
      distance += source[i] * x.in_step;
    }
    list[p].distance = distance + rest * static_cast<int>(a.in_n_step);
    list[p].at = ((static_cast<uint32_t>(rest) << kBitsD | source[0]) << kBitsH | source[1])
                     << kBitsW |
                 source[2];
  }
}

// The offset in device memory of every pixel staged, or -1 where the input has none.
__device__ inline void FillTable(const CorrelateArgs& a, const TileOrigin& at, const Staged* list,
                                 int* table, int tid, int threads) {
  int first[kAxes], offset = 0;
#pragma unroll
  for (int i = 0; i < kAxes; ++i) {
    first[i] = a.axis[i].first + at.q[i] * a.axis[i].si;
    offset += first[i] * a.axis[i].in_step;
  }
  for (int p = tid; p < a.halo; p += threads) {
    const Staged s = list[p];
    const unsigned w = first[2] + (s.at & ((1u << kBitsW) - 1));
    const unsigned h = first[1] + (s.at >> kBitsW & ((1u << kBitsH) - 1));
    const unsigned d = first[0] + (s.at >> (kBitsW + kBitsH) & ((1u << kBitsD) - 1));
    const int n = at.n + static_cast<int>(s.at >> (kBitsW + kBitsH + kBitsD));
    const bool inside = w < static_cast<unsigned>(a.axis[2].in_size) &&
                        h < static_cast<unsigned>(a.axis[1].in_size) &&
                        d < static_cast<unsigned>(a.axis[0].in_size) && n < a.n;
    table[p] = inside ? offset + s.distance : -1;
  }
}

// Pixel m of a block.
struct Pixel {
  int n, q[kAxes];
};
__device__ inline Pixel PixelOf(const CorrelateArgs& a, int m) {
  Pixel p;
  for (int i = kAxes - 1; i >= 0; --i) {
    p.q[i] = m & (a.axis[i].box - 1);
    m >>= a.axis[i].log_box;
  }
  p.n = m;
  return p;
}

template <class T>
__device__ inline void Put(T* to, float v) {
  *to = FromAccumulator<T>(v);
}

template <class T>
__device__ inline void StoreValue(void* out, int64_t offset, float v, bool f32) {
  if (sizeof(T) == 4 || f32) {
    static_cast<float*>(out)[offset] = v;
  } else {
    static_cast<T*>(out)[offset] = FromAccumulator<T>(v);
  }
}

template <class T>
__device__ inline float BiasOf(const CorrelateArgs& a, int group, int j) {
  if (a.bias == nullptr || j >= a.jg) return 0;
  j += group * a.jg;
  return sizeof(T) == 4 || a.out_f32 ? static_cast<const float*>(a.bias)[j]
                                     : ToAccumulator(static_cast<const T*>(a.bias)[j]);
}

// Rows that run along the output: through the warp's own piece of shared memory, where the phases
// of the last axis interleave, so that whole rows of outputs leave at once.
template <class T, int kStep, int MT, int NC>
__device__ inline void StoreRows(const CorrelateArgs& a, const TileOrigin& at, int group,
                                 int first_m, int column_set, float (&acc)[MT][NC][4], float* stage,
                                 int lane) {
  const int sw = a.axis[2].so, total = MT * 16 * sw, pitch = total + 4;
  // Outputs of this lane in a row of the stage: their places in phase 0 of the other axes, and how
  // many phases of those lie inside, a byte each.
  constexpr int kPlaces = 4;
  int place[kPlaces], limit[kPlaces];
  const auto locate = [&](int x0) {
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int x = x0 + 32 * i + lane, m = sw == 1 ? x : sw == 2 ? x >> 1 : x / sw;
      limit[i] = 0;
      if (x >= total) continue;
      const Pixel p = PixelOf(a, first_m + m / 16 * kStep + m % 16);
      const int od = (at.q[0] + p.q[0]) * a.axis[0].so, oh = (at.q[1] + p.q[1]) * a.axis[1].so;
      const int ow = (at.q[2] + p.q[2]) * sw + x - m * sw;
      if (at.n + p.n < a.n && ow < a.axis[2].out_size) {
        limit[i] = min(max(a.axis[0].out_size - od, 0), 255) |
                   min(max(a.axis[1].out_size - oh, 0), 255) << 8;
      }
      place[i] = p.n * static_cast<int>(a.out_n_step) + od * a.axis[0].out_step +
                 oh * a.axis[1].out_step + ow * a.axis[2].out_step;
    }
  };
  if (total <= 32 * kPlaces) locate(0);
  Column column(a, column_set);
#pragma unroll
  for (int j = 0; j < NC; ++j, column.Next(a)) {
    if (j >= a.set_phases * a.set_tiles) break;
    const int tile = column.tile, rd = column.rd, rh = column.rh, rw = column.rw;
    if (tile >= a.tiles_j || rd >= a.axis[0].so) continue;
    const int channel = tile * 8 + 2 * (lane % 4);
    const float bias0 = BiasOf<T>(a, group, channel), bias1 = BiasOf<T>(a, group, channel + 1);
    float* to = stage + 2 * (lane % 4) * pitch + lane / 4 * sw + rw;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      to[mt * 16 * sw] = acc[mt][j][0] + bias0;
      to[mt * 16 * sw + pitch] = acc[mt][j][1] + bias1;
      to[(mt * 16 + 8) * sw] = acc[mt][j][2] + bias0;
      to[(mt * 16 + 8) * sw + pitch] = acc[mt][j][3] + bias1;
    }
    if (rw != sw - 1) continue;
    __syncwarp();
    const int channels = min(8, a.jg - tile * 8);
    const int64_t base = at.n * a.out_n_step + (group * a.jg + tile * 8) * a.out_c_step +
                         int64_t{rd} * a.axis[0].out_step + int64_t{rh} * a.axis[1].out_step;
    for (int x0 = 0; x0 < total; x0 += 32 * kPlaces) {
      if (total > 32 * kPlaces) locate(x0);
#pragma unroll
      for (int i = 0; i < kPlaces; ++i) {
        const int x = x0 + 32 * i + lane;
        if (x0 + 32 * i >= total) break;
        if (rd >= (limit[i] & 255) || rh >= limit[i] >> 8) continue;
        const auto store = [&](auto* to) {
          to += base + place[i];
          const float* from = stage + x;
          if (channels == 8) {
#pragma unroll
            for (int c = 0; c < 8; ++c, to += a.out_c_step, from += pitch) Put(to, *from);
          } else {
            for (int c = 0; c < channels; ++c, to += a.out_c_step, from += pitch) Put(to, *from);
          }
        };
        if (sizeof(T) == 4 || a.out_f32) {
          store(static_cast<float*>(a.out));
        } else {
          store(static_cast<T*>(a.out));
        }
      }
    }
    __syncwarp();
  }
}

// Straight from the accumulators: a quad of lanes holds eight neighbouring channels of a pixel.
template <class T, int kStep, int MT, int NC>
__device__ inline void StoreChannels(const CorrelateArgs& a, const TileOrigin& at, int group,
                                     int first_m, int column_set, float (&acc)[MT][NC][4],
                                     int lane) {
  Column column(a, column_set);
  int64_t place[MT][2];
  int limit[MT][2];  // how many phases of each axis lie inside, a byte each
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Pixel p = PixelOf(a, first_m + mt * kStep + h * 8 + lane / 4);
      place[mt][h] = (at.n + p.n) * a.out_n_step;
      limit[mt][h] = 0;
#pragma unroll
      for (int i = 0; i < kAxes; ++i) {
        const int o = (at.q[i] + p.q[i]) * a.axis[i].so;
        place[mt][h] += int64_t{o} * a.axis[i].out_step;
        const int left = at.n + p.n < a.n ? min(max(a.axis[i].out_size - o, 0), 255) : 0;
        limit[mt][h] |= left << (8 * i);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < NC; ++j, column.Next(a)) {
    if (j >= a.set_phases * a.set_tiles) break;
    const int tile = column.tile, rd = column.rd, rh = column.rh, rw = column.rw;
    const int channel = tile * 8 + 2 * (lane % 4);
    if (tile >= a.tiles_j || rd >= a.axis[0].so || channel >= a.jg) continue;
    const float bias0 = BiasOf<T>(a, group, channel), bias1 = BiasOf<T>(a, group, channel + 1);
    const int64_t base = (group * a.jg + channel) * a.out_c_step +
                         int64_t{rd} * a.axis[0].out_step + int64_t{rh} * a.axis[1].out_step +
                         int64_t{rw} * a.axis[2].out_step;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int l = limit[mt][h];
        if (rd >= (l & 255) || rh >= (l >> 8 & 255) || rw >= (l >> 16 & 255)) continue;
        const int64_t offset = base + place[mt][h];
        const float v0 = acc[mt][j][2 * h] + bias0, v1 = acc[mt][j][2 * h + 1] + bias1;
        if (a.vector_out) {
          if (sizeof(T) == 4 || a.out_f32) {
            *reinterpret_cast<float2*>(static_cast<float*>(a.out) + offset) = make_float2(v0, v1);
          } else {
            const T pair[2] = {FromAccumulator<T>(v0), FromAccumulator<T>(v1)};
            *reinterpret_cast<uint32_t*>(static_cast<T*>(a.out) + offset) =
                *reinterpret_cast<const uint16_t*>(&pair[0]) |
                static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&pair[1])) << 16;
          }
        } else {
          StoreValue<T>(a.out, offset, v0, a.out_f32);
          if (channel + 1 < a.jg) StoreValue<T>(a.out, offset + a.out_c_step, v1, a.out_f32);
        }
      }
    }
  }
}

// A step, known to be the same in all lanes: branches on it need no care for stragglers.
__device__ inline int4 UniformStep(int4 s) {
  return Uniform(make_int4(s.x, s.y, s.z, s.w & 0xffff));
}

// The columns of a step, with all of its weights on their way before the first product. Where both
// blocks serve every column no bit is asked for.
template <class T, int MT, int NC>
__device__ inline void MultiplyStep(float (&acc)[MT][NC][4], const uint32_t (&x)[MT][4],
                                    const uint32_t (&w)[NC / 2][4], const int4& step, int full,
                                    bool split) {
  const int both = step.z & step.w;
  if constexpr (sizeof(T) == 4) {
    if (split) {
      // The tensor cores cut what they add to; float32 additions round. So they start from zero.
#pragma unroll
      for (int j = 0; j < NC; ++j) {
        if (((step.z | step.w) >> j & 1) == 0) continue;
        const uint32_t w0 = step.z >> j & 1 ? w[j / 2][j % 2 * 2] : 0;
        const uint32_t w1 = step.w >> j & 1 ? w[j / 2][j % 2 * 2 + 1] : 0;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          float part[4] = {};
          Mma<T>::Whole(part, x[mt], w0, w1);
#pragma unroll
          for (int r = 0; r < 4; ++r) acc[mt][j][r] += part[r];
        }
      }
      return;
    }
  }
  if (both == full) {
#pragma unroll
    for (int j = 0; j < NC; ++j) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        Mma<T>::Whole(acc[mt][j], x[mt], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < NC; ++j) {
    const uint32_t w0 = w[j / 2][j % 2 * 2], w1 = w[j / 2][j % 2 * 2 + 1];
    if (both >> j & 1) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) Mma<T>::Whole(acc[mt][j], x[mt], w0, w1);
    } else if (step.z >> j & 1) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) Mma<T>::Half(acc[mt][j], x[mt][0], x[mt][1], w0);
    } else if (step.w >> j & 1) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) Mma<T>::Half(acc[mt][j], x[mt][2], x[mt][3], w1);
    }
  }
}

inline constexpr int kUnroll = 2;  // blocks of channels that a thread has in flight

constexpr int MaxThreads(int mt, int nc, bool group) {
  return group || mt * nc >= 32 ? 256 : mt * nc <= 4 ? 512 : 128;
}
constexpr int MinBlocks(int mt, int nc, bool group) {
  return mt * nc >= 32 || mt * nc <= 4 ? 1 : group ? 2 : 3;
}

// kGroup: wgmma, where a tile is 64 pixels of a group of four warps.
template <class T, int MT, int NC, bool kGroup>
__global__ void __launch_bounds__(MaxThreads(MT, NC, kGroup), MinBlocks(MT, NC, kGroup))
    Correlate(const __grid_constant__ CorrelateArgs a) {
  if constexpr (kGroup && !kHasGroups) return;
  extern __shared__ __align__(128) char smem[];
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid % 32;
  const int warp = __shfl_sync(~0u, tid / 32, 0);  // known to be the same in all lanes
  constexpr int kStep = kGroup ? 64 : 16;          // from one tile of a warp to the next
  const int worker = kGroup ? warp / 4 : warp, wn = worker % a.wn, wm = worker / a.wn;
  const int blocks_per_group = gridDim.y / a.groups;
  const int group = blockIdx.y / blocks_per_group;
  const int first_set = blockIdx.y % blocks_per_group * a.sets_per_block;
  Staged* list = reinterpret_cast<Staged*>(smem + a.smem_table);
  int* table = reinterpret_cast<int*>(list + a.halo);
  char* input = smem + a.smem_in;
  const int input_bytes = a.planes * a.plane * 16;
  const uint32_t ring = SharedAddress(smem + a.smem_ring);
  const int set_bytes = a.slab_steps * NC * 256, slab_bytes = set_bytes * a.wn;
  float* stage = reinterpret_cast<float*>(smem + a.smem_out) + warp * a.stage_words;

  // Staging: a thread keeps its channel block and walks over pixels.
  const int per_block = threads / a.chunk_blocks;
  const int my_block = a.vector_in ? tid % a.chunk_blocks : tid / per_block;
  const int my_pixel = a.vector_in ? tid / a.chunk_blocks : tid % per_block;
  const bool stages = a.vector_in ? my_pixel < per_block : my_block < a.chunk_blocks;
  const int my_end = stages ? a.halo : 0;

  // Pixels of this lane as rows of its tiles, or the first row of the group's.
  uint32_t row[MT];
  const int first_m = wm * MT * kStep + (kGroup ? warp % 4 * 16 : 0);
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
    const Pixel p = PixelOf(a, kGroup ? (wm * MT + mt) * kStep : first_m + mt * kStep + lane % 16);
    int place = p.n;
#pragma unroll
    for (int i = 0; i < kAxes; ++i) {
      place = place * (a.axis[i].slots * a.axis[i].length) + p.q[i];
    }
    row[mt] = SharedAddress(input) + place * 16;
    if (kGroup) row[mt] = __shfl_sync(~0u, row[mt], 0);
  }
  const int columns = a.set_phases * a.set_tiles, full = (1 << columns) - 1;

  // A round is one slab of weights: sets of columns, in them chunks, in them slabs.
  const int set_rounds = a.sets_per_block / a.wn;
  const int rounds = set_rounds * a.chunks * a.slabs;
  const bool resident = a.ring >= rounds;

  // Weights of the rounds of a tile, in order, into a slot each.
  const int64_t set_pitch = int64_t{a.chunks} * a.slabs * set_bytes;
  const char* first_weights = a.weights + (int64_t{group} * a.column_sets + first_set) * set_pitch;
  const char* next_weights = first_weights;
  int next_round = 0, next_in_set = 0, next_set = first_set;
  const auto load_slab = [&](int slot) {
    const uint32_t to = ring + slot * slab_bytes;
    for (int w = 0; w < a.wn; ++w) {
      // A set past the last one repeats the first: its products are not stored.
      const char* from =
          next_set + w < a.column_sets ? next_weights + w * set_pitch : first_weights;
      for (int i = tid * 16; i < set_bytes; i += threads * 16) {
        CopyAsync16(to + w * set_bytes + i, from + i);
      }
    }
    next_weights += set_bytes;
    if (++next_in_set == a.chunks * a.slabs) {
      next_in_set = 0;
      next_weights += (a.wn - 1) * set_pitch;
      next_set += a.wn;
    }
    if (++next_round == rounds) {
      next_round = 0;
      next_set = first_set;
      next_weights = first_weights;
    }
  };
  for (int r = 0; r < (resident ? rounds : 1); ++r) load_slab(r);
  CommitCopies();

  const T* source = nullptr;  // of the tile that is being staged
  const auto aim = [&](const TileOrigin& at) {
    source = static_cast<const T*>(a.in) + at.n * a.in_n_step +
             static_cast<int64_t>(group) * a.cg * a.in_c_step;
  };
  // Loads kUnroll of this thread's blocks of a chunk, from `pixel` on.
  const auto fetch = [&](uint4(&v)[kUnroll], const int* places, int chunk, int pixel) {
    const int c = (chunk * a.chunk_blocks + my_block) * kBlockChannels<T>;
    const int channels = min(a.cg - c, kBlockChannels<T>);
    const T* from = source + c * a.in_c_step;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int p = pixel + u * per_block;
      const int offset = p < my_end ? places[p] : -1;
      v[u] = LoadBlock(from, offset, offset < 0 ? 0 : channels, a.in_c_step, a.vector_in);
    }
  };
  const auto put = [&](const uint4(&v)[kUnroll], char* buffer, int pixel) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int p = pixel + u * per_block;
      if (p < my_end) {
        StoreBlock<T>(buffer + (my_block * a.plane + p) * 16, v[u], a.chunk_blocks * a.plane * 16,
                      a.split);
      }
    }
  };
  const int my_blocks = (a.halo + per_block - 1) / per_block;

  // Where the copy units can place a block (they cannot move single 16-bit values), a whole chunk
  // is on its way at once; the thread that asked for a block finishes it when it has arrived.
  const bool async = sizeof(T) == 4 || a.vector_in;
  const auto ask = [&](const int* places, int chunk, char* buffer) {
    const int c = (chunk * a.chunk_blocks + my_block) * kBlockChannels<T>;
    const int channels = a.cg - c;
    const T* from = source + (channels > 0 ? c : 0) * a.in_c_step;
    uint32_t to = SharedAddress(buffer) + (my_block * a.plane + my_pixel) * 16;
    if (a.vector_in) {
#pragma unroll 4
      for (int p = my_pixel; p < my_end; p += per_block, to += per_block * 16) {
        const int offset = places[p];
        const bool copy = offset >= 0 && channels > 0;
        CopyOrZero16(to, from + (copy ? offset : 0), copy);
      }
    } else if constexpr (sizeof(T) == 4) {
      const T* from1 = from + (channels > 1 ? a.in_c_step : 0);
      const T* from2 = from + (channels > 2 ? 2 * a.in_c_step : 0);
      const T* from3 = from + (channels > 3 ? 3 * a.in_c_step : 0);
#pragma unroll 2
      for (int p = my_pixel; p < my_end; p += per_block, to += per_block * 16) {
        const int offset = places[p], at = max(offset, 0);
        CopyOrZero4(to, from + at, offset >= 0 && channels > 0);
        CopyOrZero4(to + 4, from1 + at, offset >= 0 && channels > 1);
        CopyOrZero4(to + 8, from2 + at, offset >= 0 && channels > 2);
        CopyOrZero4(to + 12, from3 + at, offset >= 0 && channels > 3);
      }
    }
  };
  const auto finish = [&](char* buffer) {
    if constexpr (sizeof(T) == 4) {
      char* to = buffer + (my_block * a.plane + my_pixel) * 16;
#pragma unroll 2
      for (int p = my_pixel; p < my_end; p += per_block, to += per_block * 16) {
        StoreBlock<T>(to, *reinterpret_cast<const uint4*>(to), a.chunk_blocks * a.plane * 16,
                      a.split);
      }
    }
  };

  TileOrigin next_at = OriginOf(a, blockIdx.x);
  // The first tile's first chunk; every other one is fetched while the one before it is at work.
  {
    ListStaged(a, list, tid, threads);
    FillTable(a, next_at, list, table, tid, threads);  // a thread reads what it wrote
    __syncthreads();
    aim(next_at);
    if (async) {
      ask(table, 0, input);
      CommitCopies();
      WaitForCopies();
      finish(input);
    } else {
      for (int p = my_pixel; p < my_end; p += kUnroll * per_block) {
        uint4 v[kUnroll];
        fetch(v, table, 0, p);
        put(v, input, p);
      }
    }
  }
  int slot = 0, buffer = 0, parity = 0;
  bool first = true;
  for (int tile = blockIdx.x; tile < a.spatial_tiles; tile += gridDim.x, parity ^= 1) {
    const TileOrigin at = next_at;
    const bool last_tile = tile + gridDim.x >= a.spatial_tiles;
    if (!last_tile) next_at = OriginOf(a, tile + gridDim.x);
    const int* places = table + parity * a.halo;
    int* next_places = table + (parity ^ 1) * a.halo;
    if (!last_tile) FillTable(a, next_at, list, next_places, tid, threads);
    int round = 0;
    for (int set_round = 0; set_round < set_rounds; ++set_round) {
      const int column_set = first_set + set_round * a.wn + wn;
      const bool busy = column_set < a.column_sets;
      const int4* steps = a.steps + column_set % a.phase_sets * a.steps_padded;
      const int set_steps = kGroup ? __shfl_sync(~0u, __ldg(&steps[0].w) >> 16, 0) : 0;
      float acc[MT][NC][4] = {};
      int pixel = my_pixel;
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        // What comes next: a chunk of this tile or the next one's first. With one chunk a tile, all
        // rounds of the tile share the fetching, else those of the chunk.
        const bool last_chunk =
            a.chunks == 1 || (set_round + 1 == set_rounds && chunk + 1 == a.chunks);
        const bool more = !last_chunk || !last_tile;
        const int next_chunk = chunk + 1 < a.chunks ? chunk + 1 : 0;
        const int* next_table = last_chunk ? next_places : places;
        const int shares = kUnroll * (a.chunks == 1 ? rounds : a.slabs);
        const int batches = more && !async ? (my_blocks + shares - 1) / shares : 0;
        if (a.chunks > 1)
          pixel = my_pixel;
        else
          pixel = my_pixel + set_round * a.slabs * batches * kUnroll * per_block;
        if (more) aim(last_chunk ? next_at : at);
        char* next = input + (buffer ^ 1) * input_bytes;
        for (int slab = 0; slab < a.slabs; ++slab, ++round) {
          if (!resident || first || round == 0 || (a.chunks > 1 && slab == 0)) {
            WaitForCopies();
            if constexpr (kGroup) ProxyFence();
            __syncthreads();
            first = false;
            if (!resident && (round + 1 < rounds || !last_tile)) {
              load_slab(slot ^ 1);
              CommitCopies();
            }
          }
          if (async && more && (a.chunks > 1 ? slab == 0 : round == 0)) {
            ask(next_table, next_chunk, next);
            CommitCopies();
          }
          const bool arrive =
              async && more && (a.chunks > 1 ? slab + 1 == a.slabs : round + 1 == rounds);
          if constexpr (kGroup) {
            if (busy) {
              const uint32_t along_rows =
                  a.axis[2].box == 8 ? a.axis[2].slots * a.axis[2].length * 16 : 128;
              // The offsets add to the descriptors' addresses, which never overflow their bits.
              uint64_t pixels[MT];
#pragma unroll
              for (int mt = 0; mt < MT; ++mt) {
                pixels[mt] = Descriptor(row[mt] + buffer * input_bytes, a.plane * 16, along_rows);
              }
              uint64_t weights = Descriptor(ring + slot * slab_bytes + wn * set_bytes, 128, 256);
              const int4* s = steps + slab * a.slab_steps;
              const int count = min(a.slab_steps, set_steps - slab * a.slab_steps);
              int offset = __shfl_sync(~0u, __ldg(&s[0].x), 0),
                  next_offset = __ldg(&s[count > 1].x);
              GroupFence();
              for (int i = 0; i < count; ++i, weights += NC * 256 / 16) {
                const int later = __ldg(&s[min(i + 2, count - 1)].x);
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                  GroupMma<T, NC>::Add(&acc[mt][0][0], pixels[mt] + (offset >> 4), weights);
                }
                offset = __shfl_sync(~0u, next_offset, 0);
                next_offset = later;
              }
              GroupCommit();
            }
            // The products run while this thread stages.
            for (int b = 0; b < batches; ++b, pixel += kUnroll * per_block) {
              uint4 v[kUnroll];
              fetch(v, next_table, next_chunk, pixel);
              put(v, next, pixel);
            }
            if (arrive) {
              WaitForCopies();
              finish(next);
            }
            WaitForProducts<0>();
          } else {
            uint4 v[kUnroll];
            for (int b = 1; b < batches; ++b, pixel += kUnroll * per_block) {
              fetch(v, next_table, next_chunk, pixel);
              put(v, next, pixel);
            }
            if (batches > 0) fetch(v, next_table, next_chunk, pixel);
            if (busy) {
              const uint32_t shift = buffer * input_bytes;
              uint32_t weights = ring + slot * slab_bytes + wn * set_bytes + lane * 16;
              const int4* s = steps + slab * a.slab_steps;
              const bool second = lane >= 16;
              uint32_t x[2][MT][4];
              const auto load_pixels = [&](uint32_t (&to)[MT][4], const int4& at_step) {
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
                  LoadMatrices(to[mt], row[mt] + shift + (second ? at_step.y : at_step.x));
                }
              };
              // The descriptions run two steps ahead, the pixels one.
              const int last = a.slab_steps - 1;
              int4 step = UniformStep(__ldg(s)), next_step = __ldg(s + min(1, last));
              load_pixels(x[0], step);
              for (int i = 0; i <= last && (step.z | step.w) != 0; i += 2) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                  if (half == 1 && (i == last || (step.z | step.w) == 0)) break;
                  const int4 later = __ldg(s + min(i + half + 2, last));
                  uint32_t w[NC / 2][4];
#pragma unroll
                  for (int j = 0; j < NC; j += 2) LoadMatrices(w[j / 2], weights + j * 256);
                  next_step = UniformStep(next_step);
                  load_pixels(x[half ^ 1], next_step);
                  MultiplyStep<T>(acc, x[half], w, step, full, a.split);
                  step = next_step;
                  next_step = later;
                  weights += NC * 256;
                }
              }
            }
            if (batches > 0) {
              put(v, next, pixel);
              pixel += kUnroll * per_block;
            }
            if (arrive) {
              WaitForCopies();
              finish(next);
            }
          }
          slot = resident ? (slot + 1 == rounds ? 0 : slot + 1) : slot ^ 1;
        }
        if (a.chunks > 1) buffer ^= 1;
      }
      if (!busy) continue;
      if (a.stage_words > 0) {
        StoreRows<T, kStep>(a, at, group, first_m, column_set, acc, stage, lane);
      } else {
        StoreChannels<T, kStep>(a, at, group, first_m, column_set, acc, lane);
      }
    }
    if (a.chunks == 1) buffer ^= 1;
  }
}

template <class T, int MT, int NC, bool kGroup>
cudaError_t EnqueueTile(const CorrelatePlan& plan, const CorrelateArgs& args, cudaStream_t stream) {
  const auto kernel = Correlate<T, MT, NC, kGroup>;
  const cudaError_t status = AllowSharedMemory(kernel);
  if (status != cudaSuccess) return status;
  const dim3 grid(plan.grid_x, plan.grid_y);
  kernel<<<grid, plan.warps * 32, plan.smem, stream>>>(args);
  return cudaGetLastError();
}

template <class T>
cudaError_t EnqueueCorrelate(const CorrelatePlan& plan, const CorrelatePack& pack,
                             const CorrelateArgs& args, cudaStream_t stream) {
  const int ranges = (pack.taps + kPackTaps - 1) / kPackTaps;
  const dim3 grid(pack.tiles_j, pack.chunks * pack.chunk_blocks, std::max(1, args.groups * ranges));
  PackWeights<T><<<grid, kPackThreads, 0, stream>>>(pack);
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  if (plan.group) {
    if (plan.nc == 16) return EnqueueTile<T, 2, 16, true>(plan, args, stream);
    if (plan.nc == 8) return EnqueueTile<T, 2, 8, true>(plan, args, stream);
    if (plan.nc == 4) return EnqueueTile<T, 2, 4, true>(plan, args, stream);
  } else {
    if (plan.mt == 4 && plan.nc == 8) return EnqueueTile<T, 4, 8, false>(plan, args, stream);
    if (plan.mt == 2 && plan.nc == 8) return EnqueueTile<T, 2, 8, false>(plan, args, stream);
    if (plan.mt == 4 && plan.nc == 4) return EnqueueTile<T, 4, 4, false>(plan, args, stream);
    if (plan.mt == 4 && plan.nc == 2) return EnqueueTile<T, 4, 2, false>(plan, args, stream);
    if (plan.mt == 2 && plan.nc == 2) return EnqueueTile<T, 2, 2, false>(plan, args, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_CORRELATE_CUH_
