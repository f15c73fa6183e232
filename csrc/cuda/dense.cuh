// Device part of "dense"; docs/gpu_kernels.md tells the whole story.
//
// A block has two groups of four warps that multiply and four warps that fetch. A stage of the ring
// of inputs is a box of pixels by up to 128 bytes of channels, swizzled as bulk tensor copies leave
// it, so that the eight pixels of an ldmatrix row never share banks, wherever a tap shifts them to.
// Pixels pass through registers on their way to wgmma: there they are rounded to TF32, and need
// no alignment. A step is 32 bytes of channels of one tap, a quad of steps is what a warp loads
// ahead while its last quad is being multiplied, and one slot of the ring of weights.
#ifndef JAXCONV_CUDA_DENSE_CUH_
#define JAXCONV_CUDA_DENSE_CUH_

#include "cuda/correlate.cuh"
#include "cuda/dense.h"
#include "cuda/dense_wgmma.cuh"
#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

inline constexpr int kDenseGroups = 2, kDenseThreads = 128 * (kDenseGroups + 1);
inline constexpr int kDenseWarps = 4 * kDenseGroups;  // that multiply
inline constexpr int kDenseLoaders = 96;              // threads that stage rows
inline constexpr int kDenseQuad = 4;

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

// A tile of pixels, a program and a tile of columns.
struct DenseItem {
  int column_tile, program, group, n, q[kAxes];
  __device__ DenseItem(const DenseArgs& a, int index) {
    unsigned rest = index;
    const auto take = [&](int count) {
      const unsigned up = count == 1 ? rest : rest / count;
      const int mine = rest - up * count;
      rest = up;
      return mine;
    };
    column_tile = take(a.column_tiles);
    program = take(a.programs);
    group = take(a.groups);
#pragma unroll
    for (int i = kAxes - 1; i >= 0; --i) q[i] = take(a.axis[i].q_tiles) * a.axis[i].box;
    n = rest * a.box_n;
  }
};

// Weights as wgmma reads them: a core is eight columns by 16 bytes of channels. A block of threads
// packs one tile of eight columns, one step of channels and 32 taps.
template <class T>
__global__ void __launch_bounds__(kPackThreads) PackDense(const __grid_constant__ DensePack p) {
  constexpr int kC = 32 / sizeof(T);
  __shared__ T tile[kC * 8][kPackTaps + 1];
  const int ranges = (p.taps + kPackTaps - 1) / kPackTaps;
  const int tile_j = blockIdx.x, step = blockIdx.y, group = blockIdx.z / ranges;
  const int tap0 = blockIdx.z % ranges * kPackTaps, taps = min(kPackTaps, p.taps - tap0);
  const int channel_tiles = p.jg / 8;
  const int phase = p.fused ? tile_j / channel_tiles : 0;
  const int j0 = (tile_j - phase * channel_tiles) * 8;
  const int chunk = min(step / max(p.full_steps, 1), p.chunks - 1);
  const int steps = chunk == p.chunks - 1 ? p.last_steps : p.full_steps;
  const int k = step - chunk * p.full_steps;
  const int c0 = chunk * (128 / static_cast<int>(sizeof(T))) + k * kC;
  for (int i = threadIdx.x; i < kC * 8 * taps; i += kPackThreads) {
    const int t = i % taps, pair = i / taps, j = j0 + pair % 8, c = c0 + pair / 8;
    T v{};
    if (j < p.jg && c < p.cg) {
      v = static_cast<const T*>(
          p.w)[group * p.w_g_step + c * p.w_c_step + j * p.w_j_step + tap0 + t];
    }
    tile[pair / 8 * 8 + pair % 8][t] = v;
  }
  __syncthreads();
  const int column_tile = tile_j / p.tiles, column = tile_j % p.tiles;
  const int half = threadIdx.x / 32 % 2, lane = threadIdx.x % 32, n = lane / 4;
  for (int t = threadIdx.x / 64; t < taps; t += kPackThreads / 64) {
    const int tap = tap0 + t, segment = p.tap_segment[tap], of_segment = p.segment_taps[segment];
    // Columns beyond the last one hold what is at hand: nothing is stored of them.
    if (p.fused && p.tap_phase[tap] != phase % p.phases) continue;
    uint32_t word;
    if constexpr (sizeof(T) == 4) {
      word = __float_as_uint(tile[(half * 4 + lane % 4) * 8 + n][t]);
      asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(word) : "f"(__uint_as_float(word)));
    } else {
      const int c = half * 8 + lane % 4 * 2;
      word = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&tile[c * 8 + n][t])) |
             static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&tile[(c + 1) * 8 + n][t]))
                 << 16;
    }
    const auto padded = [&](int of_tap) {
      return (of_segment * of_tap + kDenseQuad - 1) / kDenseQuad * kDenseQuad;
    };
    const int64_t first = (int64_t{group} * p.column_tiles + column_tile) * p.total_steps +
                          p.steps[segment] + int64_t{chunk} * padded(p.full_steps);
    const auto put = [&](int64_t row, uint32_t v) {
      reinterpret_cast<uint32_t*>(p.weights)[((row * p.tiles + column) * 2 + half) * 32 + lane] = v;
    };
    const int position = p.tap_position[tap] * steps + k;
    put(first + position, word);
    if (position == of_segment * steps - 1) {
      for (int pad = position + 1; pad < padded(steps); ++pad) put(first + pad, 0);
    }
  }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Barriers: a full and an empty one for each stage of the inputs and each slot of the weights.
struct DenseBarriers {
  uint32_t base;
  __device__ uint32_t InFull(int i) const { return base + i * 8; }
  __device__ uint32_t InEmpty(int i) const { return base + (DenseArgs::kMaxBuffers + i) * 8; }
  __device__ uint32_t RingFull(int i) const { return base + (2 * DenseArgs::kMaxBuffers + i) * 8; }
  __device__ uint32_t RingEmpty(int i) const {
    return base + (2 * DenseArgs::kMaxBuffers + DenseArgs::kMaxRing + i) * 8;
  }
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

__device__ inline void FetchWeights(const DenseArgs& a, const DenseBarriers& barriers,
                                    uint32_t ring, int quad_bytes) {
  DenseCursor slot;
  for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
    const DenseItem item(a, index);
    const DenseProgram& program = a.program[item.program];
    const int64_t tile = int64_t{item.group} * a.column_tiles + item.column_tile;
    const char* from =
        a.weights + (tile * a.total_steps + program.steps) * (quad_bytes / kDenseQuad);
    for (int q = 0; q < program.quads; ++q, from += quad_bytes) {
      WaitForPhase(barriers.RingEmpty(slot.at), slot.parity ^ 1);
      ArriveAndExpect(barriers.RingFull(slot.at), quad_bytes);
      CopyBulk(ring + slot.at * quad_bytes, from, quad_bytes, barriers.RingFull(slot.at));
      slot.Next(a.ring);
    }
    if (a.resident) return;
  }
}

__device__ inline void FetchBoxes(const DenseArgs& a, const CUtensorMap* map,
                                  const DenseBarriers& barriers, uint32_t in) {
  DenseCursor buffer;
  for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
    const DenseItem item(a, index);
    const DenseProgram& program = a.program[item.program];
    for (int s = 0; s < program.segments; ++s) {
      const DenseSegment& segment = a.segment[program.first_segment + s];
      int source[kAxes];
#pragma unroll
      for (int i = 0; i < kAxes; ++i) source[i] = item.q[i] * a.axis[i].si + segment.first[i];
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        WaitForPhase(barriers.InEmpty(buffer.at), buffer.parity ^ 1);
        ArriveAndExpect(barriers.InFull(buffer.at), a.pixels * a.row_bytes);
        CopyBox(in + buffer.at * a.stage_bytes, map,
                item.group * a.cg + chunk * a.chunk_channels, source[2], source[1], source[0],
                item.n, barriers.InFull(buffer.at));
        buffer.Next(a.buffers);
      }
    }
  }
}

// Rows of pixels, channel by channel (channels first), turned into what a bulk tensor copy of
// channels last leaves.
template <class T>
__device__ inline void FetchRows(const DenseArgs& a, const DenseBarriers& barriers, uint32_t in,
                                 const int* sources, int thread) {
  constexpr int kC = kBlockChannels<T>, kBatch = sizeof(T) == 4 ? 4 : 2;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  DenseCursor buffer;
  for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
    const DenseItem item(a, index);
    const DenseProgram& program = a.program[item.program];
    for (int s = 0; s < program.segments; ++s) {
      const DenseSegment& segment = a.segment[program.first_segment + s];
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int c0 = chunk * a.chunk_channels;
        const int blocks = 2 * (chunk + 1 < a.chunks ? a.full_steps : a.last_steps);
        WaitForPhase(barriers.InEmpty(buffer.at), buffer.parity ^ 1);
        for (int p = thread; p < a.pixels; p += kDenseLoaders) {
          const DenseCoordinates at(sources[p]);
          bool inside = item.n + at.n < a.n;
          int64_t offset = (item.n + at.n) * a.in_n_step + (item.group * a.cg + c0) * a.in_c_step;
#pragma unroll
          for (int i = 0; i < kAxes; ++i) {
            const int source = (item.q[i] + at.at[i]) * a.axis[i].si + segment.first[i];
            inside = inside && static_cast<unsigned>(source) < a.axis[i].in_size;
            offset += source * a.axis[i].in_step;
          }
          const Bits* from = static_cast<const Bits*>(a.in) + (inside ? offset : 0);
          const uint32_t to = in + buffer.at * a.stage_bytes + p * a.row_bytes;
          const int channels = inside ? a.cg - c0 : 0;
          for (int b0 = 0; b0 < blocks; b0 += kBatch) {
            uint32_t v[kBatch * kC];
#pragma unroll
            for (int c = 0; c < kBatch * kC; ++c) {
              v[c] = b0 * kC + c < channels ? __ldg(from + (b0 * kC + c) * a.in_c_step) : 0;
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
              if (b0 + b >= blocks) break;
              uint4 block;
              const uint32_t* c = v + b * kC;
              if constexpr (sizeof(T) == 4) {
                block = make_uint4(c[0], c[1], c[2], c[3]);
              } else {
                block = make_uint4(c[0] | c[1] << 16, c[2] | c[3] << 16, c[4] | c[5] << 16,
                                   c[6] | c[7] << 16);
              }
              const uint32_t linear = to + (b0 + b) * 16;
              asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                               linear ^ (linear >> 3 & a.swizzle)),
                           "r"(block.x), "r"(block.y), "r"(block.z), "r"(block.w)
                           : "memory");
            }
          }
        }
        Arrive(barriers.InFull(buffer.at));
        buffer.Next(a.buffers);
      }
    }
  }
}

// Results leave by way of shared memory, `store_columns` at a time: channels last as boxes that the
// copy units write while the next tile is multiplied, channels first as rows of pixels.
template <class T, int MT, int NT>
__device__ inline void StoreDense(const DenseArgs& a, const DenseMaps& maps, const DenseItem& item,
                                  const int* pixels, char* stage, int group,
                                  const float (&acc)[MT][4 * NT], int& buffer, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const bool wide = sizeof(T) == 4 || a.out_f32;
  constexpr int kRuns = MT * 2;  // of 32 pixels
  int64_t offset[kRuns];         // of this thread's pixels of each run, in a phase of the output
  const auto locate = [&](int phase) {
    const int up = phase / a.axis[2].so;
    const int r[kAxes] = {up / a.axis[1].so, up % a.axis[1].so, phase % a.axis[2].so};
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int packed = pixels[i * 32 + lane];
      const DenseCoordinates at(packed);
      bool inside = packed >= 0 && item.n + at.n < a.n;
      offset[i] = (item.n + at.n) * a.out_n_step;
#pragma unroll
      for (int x = 0; x < kAxes; ++x) {
        const int o = (item.q[x] + at.at[x]) * a.axis[x].so + r[x];
        inside = inside && o < a.axis[x].out_size;
        offset[i] += o * a.axis[x].out_step;
      }
      if (!inside) offset[i] = -1;
    }
  };
  int phase = a.program[item.program].phase;
  if (a.rows && !a.fused) locate(phase);
  const int first = item.column_tile * NT * 8;
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    if (first + j * 8 >= a.columns) break;
    const int at = j * 8 % a.store_columns;  // of this tile of columns, in the stage
    const uint32_t to = SharedAddress(stage) + buffer * a.store_pitch;
    if (at == 0) {
      // The stage was last read two turns ago.
      if (!a.rows) {
        if (thread == 0) WaitForReads<1>();
        SyncGroup(group);
      }
    }
    int channel = first + j * 8, next_phase = phase;
    if (a.fused) {
      next_phase = channel / a.jg;
      channel -= next_phase * a.jg;
    }
    channel += item.group * a.jg;
    float bias[2] = {0, 0};
    if (a.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = channel + 2 * (lane % 4) + i;
        bias[i] = wide ? static_cast<const float*>(a.bias)[c]
                       : ToAccumulator(static_cast<const T*>(a.bias)[c]);
      }
    }
    const int column = at + 2 * (lane % 4);
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int pixel = mt * 64 + warp * 16 + h * 8 + lane / 4;
        const float v0 = acc[mt][4 * j + 2 * h] + bias[0];
        const float v1 = acc[mt][4 * j + 2 * h + 1] + bias[1];
        if (a.rows) {
          char* place = stage + buffer * a.store_pitch;
          const int pitch = MT * 64 + 16 / (wide ? 4 : 2);
          StoreValue<T>(place, column * pitch + pixel, v0, a.out_f32);
          StoreValue<T>(place, (column + 1) * pitch + pixel, v1, a.out_f32);
        } else if (wide) {
          const uint32_t linear = to + pixel * a.store_bytes + column * 4;
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(
                           linear ^ (linear >> 3 & a.store_swizzle)),
                       "f"(v0), "f"(v1)
                       : "memory");
        } else {
          const T pair[2] = {FromAccumulator<T>(v0), FromAccumulator<T>(v1)};
          const uint32_t linear = to + pixel * a.store_bytes + column * 2;
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(linear ^ (linear >> 3 & a.store_swizzle)),
                       "r"(*reinterpret_cast<const uint16_t*>(&pair[0]) |
                           static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&pair[1]))
                               << 16)
                       : "memory");
        }
      }
    }
    if (at + 8 < a.store_columns) continue;
    channel -= at;
    if (!a.rows) {
      ProxyFence();
      SyncGroup(group);
      if (thread == 0) {
        const int map = a.fused ? next_phase : item.program;
        int q[kAxes];
#pragma unroll
        for (int i = 0; i < kAxes; ++i) {
          q[i] = item.q[i] + PartStart(a.axis[i].part, a.axis[i].box, group);
        }
        StoreBox(&maps.out[map], to, channel, q[2], q[1], q[0],
                 item.n + PartStart(a.part_n, a.box_n, group));
      }
    } else {
      SyncGroup(group);
      if (a.fused && (next_phase != phase || j * 8 == at)) locate(next_phase);
      const char* place = stage + buffer * a.store_pitch;
      const int pitch = MT * 64 + 16 / (wide ? 4 : 2);
      for (int c = warp; c < a.store_columns; c += 4) {
        const int64_t up = (channel + c) * a.out_c_step;
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
          if (offset[i] < 0) continue;
          const int from = c * pitch + i * 32 + lane;
          if (wide) {
            static_cast<float*>(a.out)[offset[i] + up] = reinterpret_cast<const float*>(place)[from];
          } else {
            static_cast<T*>(a.out)[offset[i] + up] = reinterpret_cast<const T*>(place)[from];
          }
        }
      }
    }
    phase = next_phase;
    buffer ^= 1;
  }
}

// a = b, in a way that keeps the compiler from using the registers of `a` for anything else before:
// a product that is under way still reads them, which the compiler does not see.
__device__ inline void TakeOver(uint32_t& a, uint32_t b, uint32_t all_bytes) {
  asm volatile("prmt.b32 %0, %1, %0, %2;" : "+r"(a) : "r"(b), "r"(all_bytes));
}

template <class T, int MT, int NT>
__device__ inline void MultiplyDense(const DenseArgs& a, const DenseMaps& maps,
                                     const DenseBarriers& barriers, uint32_t in, uint32_t ring,
                                     const int* pixels, const int4* entries, char* stage, int group,
                                     int thread) {
  constexpr int kStepBytes = NT * 256, kQuadBytes = kDenseQuad * kStepBytes;
  const int warp = thread / 32, lane = thread % 32;
  uint32_t row[MT];  // where this lane's row of an ldmatrix begins, for a tap without a shift
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
    const DenseCoordinates at(max(pixels[mt * 64 + warp * 16 + lane % 16], 0));
    const int pixel = ((at.n * a.axis[0].length + at.at[0]) * a.axis[1].length + at.at[1]) *
                          a.axis[2].length +
                      at.at[2];
    row[mt] = in + pixel * a.row_bytes + lane / 16 * 16;
  }
  float acc[MT][4 * NT];
  uint32_t loaded[kDenseQuad][MT][4], used[kDenseQuad][MT][4] = {};
  DenseCursor buffer, slot;
  int stage_buffer = 0;
  const auto release = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) Arrive(barrier);
  };
  for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
    const DenseItem item(a, index);
    const DenseProgram& program = a.program[item.program];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int i = 0; i < 4 * NT; ++i) acc[mt][i] = 0;
    }
    if (a.resident) slot = {};
    int segment = program.first_segment, chunk = 0, left = 0, previous = -1;
    const int4* entry = entries;
    const auto enter = [&] {
      const DenseSegment& s = a.segment[segment];
      const bool last = chunk + 1 == a.chunks;
      left = s.taps * (last ? a.last_steps : a.full_steps);
      entry = entries + s.entries +
              (last ? (s.taps * a.full_steps + kDenseQuad - 1) / kDenseQuad : 0);
      WaitForPhase(barriers.InFull(buffer.at), buffer.parity);
    };
    const auto load = [&] {
      const int4 e = *entry++;
      const uint32_t stage = buffer.at * a.stage_bytes;
      const uint32_t shift[kDenseQuad] = {stage + e.x, stage + e.y, stage + e.z, stage + e.w};
#pragma unroll
      for (int k = 0; k < kDenseQuad; ++k) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          const uint32_t linear = row[mt] + shift[k];
          LoadMatrices(loaded[k][mt], linear ^ (linear >> 3 & a.swizzle));
        }
      }
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int k = 0; k < kDenseQuad; ++k) {
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              asm("cvt.rn.tf32.f32 %0, %1;"
                  : "=r"(loaded[k][mt][i])
                  : "f"(__uint_as_float(loaded[k][mt][i])));
            }
          }
        }
      }
    };
    if (program.quads > 0) {
      enter();
      load();
    }
    for (int quad = 0; quad < program.quads; ++quad) {
      WaitForPhase(barriers.RingFull(slot.at), slot.parity);
      GroupWait();  // the quad before: its pixels' registers and its weights are free
      if (previous >= 0) release(barriers.RingEmpty(previous));
      if (left < kDenseQuad) {
        // Steps that pad a stage: their weights are zeros, and nothing that is not finite may
        // meet them.
#pragma unroll
        for (int k = 1; k < kDenseQuad; ++k) {
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int i = 0; i < 4; ++i) loaded[k][mt][i] = k < left ? loaded[k][mt][i] : 0;
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kDenseQuad; ++k) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            TakeOver(used[k][mt][i], loaded[k][mt][i], a.all_bytes);
          }
        }
      }
      GroupFence();
      const uint64_t weights = Descriptor(ring + slot.at * kQuadBytes, 128, 256);
#pragma unroll
      for (int k = 0; k < kDenseQuad; ++k) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          DenseMma<T, NT>::Run(acc[mt], used[k][mt], weights + k * kStepBytes / 16);
        }
      }
      GroupCommit();
      if (!a.resident) previous = slot.at;
      slot.Next(a.ring);
      left -= kDenseQuad;
      if (left <= 0) {
        release(barriers.InEmpty(buffer.at));
        buffer.Next(a.buffers);
        if (++chunk == a.chunks) {
          chunk = 0;
          ++segment;
        }
        if (quad + 1 < program.quads) enter();
      }
      if (quad + 1 < program.quads) load();
    }
    GroupWait();
    if (previous >= 0) release(barriers.RingEmpty(previous));
    StoreDense<T, MT, NT>(a, maps, item, pixels, stage, group, acc, stage_buffer, thread);
  }
  if (thread == 0) WaitForStores();
}

#endif

template <class T, int MT, int NT>
__global__ void __launch_bounds__(kDenseThreads, 1)
    Dense(const __grid_constant__ DenseMaps maps, const __grid_constant__ DenseArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  int* pixels = reinterpret_cast<int*>(shared + a.smem_pixels);
  int* sources = reinterpret_cast<int*>(shared + a.smem_sources);
  int* entries = reinterpret_cast<int*>(shared + a.smem_entries);
  const DenseBarriers barriers{SharedAddress(shared)};
  const uint32_t in = SharedAddress(shared) + a.smem_in, ring = SharedAddress(shared) + a.smem_ring;
  if (thread == 0) {
    for (int i = 0; i < a.buffers; ++i) {
      InitBarrier(barriers.InFull(i), a.rows ? kDenseLoaders : 1);
      InitBarrier(barriers.InEmpty(i), kDenseWarps);
    }
    for (int i = 0; i < a.ring; ++i) {
      InitBarrier(barriers.RingFull(i), 1);
      InitBarrier(barriers.RingEmpty(i), kDenseWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    ProxyFence();
  }
  constexpr int kPixels = MT * 64;  // of a group of warps
  for (int p = thread; p < kDenseGroups * kPixels; p += kDenseThreads) {
    const int group = p / kPixels;
    const DenseAxis &d = a.axis[0], &h = a.axis[1], &w = a.axis[2];
    int rest = p % kPixels;
    const auto take = [&](int part, int box) {
      const int mine = rest % part + PartStart(part, box, group);
      rest /= part;
      return mine;
    };
    const int pw = take(w.part, w.box), ph = take(h.part, h.box), pd = take(d.part, d.box);
    const bool inside = rest < a.part_n;
    pixels[p] = inside ? PackCoordinates(take(a.part_n, a.box_n), pd, ph, pw) : -1;
  }
  if (a.rows) {
    const int d = a.axis[0].length, h = a.axis[1].length, w = a.axis[2].length;
    for (int p = thread; p < a.pixels; p += kDenseThreads) {
      sources[p] = PackCoordinates(p / w / h / d, p / w / h % d, p / w % h, p % w);
    }
  }
  for (int s = 0; s < a.segments; ++s) {
    const DenseSegment& segment = a.segment[s];
    int* to = entries + segment.entries * kDenseQuad;
    for (const int steps : {a.full_steps, a.last_steps}) {
      const int all = segment.taps * steps;
      const int padded = (all + kDenseQuad - 1) / kDenseQuad * kDenseQuad;
      for (int i = thread; i < padded; i += kDenseThreads) {
        const int tap = i / steps;
        to[i] = i < all ? a.shift[segment.first_shift + tap] * a.row_bytes + (i - tap * steps) * 32
                        : 0;
      }
      to += padded;
    }
  }
  __syncthreads();
  const int warp = thread / 32;
  if (warp < 4) {
    GiveRegisters<56>();
    if (warp == 0) {
      if (lane == 0) FetchWeights(a, barriers, ring, NT * 256 * kDenseQuad);
    } else if (a.rows) {
      FetchRows<T>(a, barriers, in, sources, thread - 32);
    } else if (warp == 1) {
      if (lane == 0) FetchBoxes(a, &maps.in, barriers, in);
    }
  } else {
    TakeRegisters<224>();
    const int group = warp / 4 - 1;
    MultiplyDense<T, MT, NT>(a, maps, barriers, in, ring, pixels + group * kPixels,
                             reinterpret_cast<const int4*>(entries),
                             shared + a.smem_out + group * 2 * a.store_pitch, group, thread % 128);
  }
#endif
}

template <class T, int MT, int NT>
cudaError_t EnqueueDenseTile(const DensePlan& plan, const DenseArgs& args, const DenseMaps& maps,
                             cudaStream_t stream) {
  const auto kernel = Dense<T, MT, NT>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem);
  if (status != cudaSuccess) return status;
  kernel<<<plan.grid, kDenseThreads, plan.smem, stream>>>(maps, args);
  return cudaGetLastError();
}

template <class T>
cudaError_t EnqueueDense(const DensePlan& plan, const DensePack& pack, const DenseArgs& args,
                         const DenseMaps& maps, cudaStream_t stream) {
  const int steps = (pack.chunks - 1) * pack.full_steps + pack.last_steps;
  const int ranges = (pack.taps + kPackTaps - 1) / kPackTaps;
  const dim3 grid(pack.column_tiles * pack.tiles, steps, pack.groups * ranges);
  PackDense<T><<<grid, kPackThreads, 0, stream>>>(pack);
  if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  switch (plan.mt * 1000 + plan.columns) {
    case 2032:
      return EnqueueDenseTile<T, 2, 4>(plan, args, maps, stream);
    case 2048:
      return EnqueueDenseTile<T, 2, 6>(plan, args, maps, stream);
    case 2064:
      return EnqueueDenseTile<T, 2, 8>(plan, args, maps, stream);
    case 2096:
      return EnqueueDenseTile<T, 2, 12>(plan, args, maps, stream);
    case 1128:
      return EnqueueDenseTile<T, 1, 16>(plan, args, maps, stream);
    case 2128:
      return EnqueueDenseTile<T, 2, 16>(plan, args, maps, stream);
    default:
      return cudaErrorInvalidConfiguration;
  }
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_CUH_
