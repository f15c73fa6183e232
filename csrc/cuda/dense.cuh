// Device part of "dense"; docs/gpu_kernels.md tells the whole story.
//
// A block has two groups of four warps that multiply and eight warps that fetch. A stage of the
// ring of inputs is a box of pixels by up to 128 bytes of channels, swizzled as bulk tensor copies
// leave it; wgmma reads it wherever a tap shifts it to. A step is 32 bytes of channels of one tap,
// a quad of steps is one slot of the ring of weights.
#ifndef JAXCONV_CUDA_DENSE_CUH_
#define JAXCONV_CUDA_DENSE_CUH_

#include "cuda/correlate.cuh"
#include "cuda/dense.h"
#include "cuda/dense_wgmma.cuh"
#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

inline constexpr int kDenseGroups = 2, kDenseThreads = 128 * (kDenseGroups + 2);
inline constexpr int kDenseWarps = 4 * kDenseGroups;  // that multiply
inline constexpr int kDenseLoaders = 224;             // threads that stage rows
inline constexpr int kDenseRounders = 192;            // threads that round to TF32
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

// Weights as wgmma reads them: a core is eight columns by 16 bytes of channels. A block of threads
// packs one tile of eight columns, one step of channels and 32 taps.
template <class T>
__global__ void __launch_bounds__(kPackThreads) PackDense(const __grid_constant__ DensePack p) {
  constexpr int kC = 32 / sizeof(T);
  __shared__ T tile[kC * 8][kPackTaps + 1];
  const int ranges = (p.taps + kPackTaps - 1) / kPackTaps;
  const int step = blockIdx.y, group = blockIdx.z / ranges, j0 = blockIdx.x * 8;
  const int tap0 = blockIdx.z % ranges * kPackTaps, taps = min(kPackTaps, p.taps - tap0);
  const int chunk = min(step / max(p.full_steps, 1), p.chunks - 1);
  const int steps = chunk == p.chunks - 1 ? p.last_steps : p.full_steps;
  const int k = step - chunk * p.full_steps;
  const int c0 = chunk * p.chunk_channels + k / p.terms * kC;
  [[maybe_unused]] const bool low = k % p.terms == 2;
  const T* w = static_cast<const T*>(p.w) + group * p.w_g_step + tap0;
  const bool by_channel = p.w_c_step < p.w_j_step;  // neighbours in memory are loaded together
#pragma unroll 8
  for (int i = threadIdx.x; i < kC * 8 * taps; i += kPackThreads) {
    const int t = i % taps, pair = i / taps;
    const int j = by_channel ? pair / kC : pair % 8, c = by_channel ? pair % kC : pair / 8;
    T v{};
    if (j0 + j < p.jg && c0 + c < p.cg) {
      v = __ldg(w + (c0 + c) * p.w_c_step + (j0 + j) * p.w_j_step + t);
    }
    tile[c * 8 + j][t] = v;
  }
  __syncthreads();
  const int half = threadIdx.x / 32 % 2, lane = threadIdx.x % 32, n = lane / 4;
  for (int t = threadIdx.x / 64; t < taps; t += kPackThreads / 64) {
    const int tap = tap0 + t, segment = p.tap_segment[tap];
    if (segment == DensePack::kUnused) continue;
    const int of_segment = p.segment_taps[segment];
    // Blocks beyond the channels put zeros into columns beyond the last one.
    const int channel_tiles = p.jg / 8, mine = blockIdx.x;
    if (mine >= channel_tiles && p.tap_phase[tap] != 0) continue;
    const int tile_j = mine < channel_tiles ? p.tap_phase[tap] * channel_tiles + mine
                                            : p.used_tiles + mine - channel_tiles;
    const int column_tile = tile_j / p.tiles, column = tile_j % p.tiles;
    uint32_t word;
    if constexpr (sizeof(T) == 4) {
      const SplitTF32 v(tile[(half * 4 + lane % 4) * 8 + n][t]);
      word = low ? v.Low() : v.high;
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

// Barriers: a full and an empty one for each stage of the inputs and each slot of the weights, and
// one more for stages that are also rounded.
struct DenseBarriers {
  static constexpr int kIn = 8 * DenseArgs::kMaxBuffers, kRing = 8 * DenseArgs::kMaxRing;
  uint32_t base;
  __device__ uint32_t InFull(int i) const { return base + i * 8; }
  __device__ uint32_t InRounded(int i) const { return base + kIn + i * 8; }
  __device__ uint32_t InEmpty(int i) const { return base + 2 * kIn + i * 8; }
  __device__ uint32_t RingFull(int i) const { return base + 3 * kIn + i * 8; }
  __device__ uint32_t RingEmpty(int i) const { return base + 3 * kIn + kRing + i * 8; }
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
      WaitFor(barriers.RingEmpty(slot.at), slot.parity ^ 1);
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
        WaitFor(barriers.InEmpty(buffer.at), buffer.parity ^ 1);
        ArriveAndExpect(barriers.InFull(buffer.at), a.pixels * a.row_bytes);
        for (int piece = 0; piece < a.pieces; ++piece) {
          const int w = piece * a.piece_length;
          CopyBox(in + buffer.at * a.stage_bytes + w * a.row_bytes, map,
                  item.group * a.cg + chunk * a.chunk_channels, source[2] + w * a.axis[2].si,
                  source[1], source[0], item.n, barriers.InFull(buffer.at));
        }
        buffer.Next(a.buffers);
      }
    }
  }
}

// Four channels of a pixel, into the high parts of a stage and, where operands are split, the low.
__device__ inline void StoreBlock(const DenseArgs& a, char* to, const SplitTF32 (&v)[4]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(v[0].high, v[1].high, v[2].high, v[3].high);
  if (a.terms > 1) {
    *reinterpret_cast<uint4*>(to + a.part_bytes) =
        make_uint4(v[0].Low(), v[1].Low(), v[2].Low(), v[3].Low());
  }
}

// Rounds (or splits) what has arrived in place, since wgmma would cut off the lower bits.
__device__ inline void RoundBoxes(const DenseArgs& a, const DenseBarriers& barriers, char* in,
                                  int thread) {
  DenseCursor buffer;
  const int blocks = a.pixels * a.row_bytes / 16;
  for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
    const int stages = a.program[DenseItem(a, index).program].segments * a.chunks;
    for (int s = 0; s < stages; ++s) {
      WaitFor(barriers.InFull(buffer.at), buffer.parity);
      char* stage = in + buffer.at * a.stage_bytes;
#pragma unroll 8
      for (int b = thread; b < blocks; b += kDenseRounders) {
        const float4 v = reinterpret_cast<const float4*>(stage)[b];
        const SplitTF32 c[4] = {SplitTF32(v.x), SplitTF32(v.y), SplitTF32(v.z), SplitTF32(v.w)};
        StoreBlock(a, stage + b * 16, c);
      }
      ProxyFence();
      Arrive(barriers.InRounded(buffer.at));
      buffer.Next(a.buffers);
    }
  }
}

// Rows of pixels, channel by channel (channels first), turned into what a bulk tensor copy of
// channels last leaves.
template <class T>
__device__ inline void FetchRows(const DenseArgs& a, const DenseBarriers& barriers, char* in,
                                 const int* sources, int thread) {
  constexpr int kC = kBlockChannels<T>, kBatch = sizeof(T) == 4 ? 8 : 4;
  using Bits = std::conditional_t<sizeof(T) == 4, float, uint16_t>;
  using Value = std::conditional_t<sizeof(T) == 4, float, uint32_t>;
  DenseCursor buffer;
  for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
    const DenseItem item(a, index);
    const DenseProgram& program = a.program[item.program];
    for (int s = 0; s < program.segments; ++s) {
      const DenseSegment& segment = a.segment[program.first_segment + s];
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int c0 = chunk * a.chunk_channels;
        const int blocks = 2 * (chunk + 1 < a.chunks ? a.full_steps : a.last_steps) / a.terms;
        WaitFor(barriers.InEmpty(buffer.at), buffer.parity ^ 1);
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
          const int place = p * a.row_bytes, swizzled = place >> 3 & a.swizzle;
          char* to = in + buffer.at * a.stage_bytes + place;
          const int channels = inside ? a.cg - c0 : 0;
          for (int b0 = 0; b0 < blocks; b0 += kBatch) {
            Value v[kBatch * kC];
#pragma unroll
            for (int c = 0; c < kBatch * kC; ++c) {
              v[c] = b0 * kC + c < channels ? __ldg(from + (b0 * kC + c) * a.in_c_step) : 0;
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
              if (b0 + b >= blocks) break;
              const Value* c = v + b * kC;
              char* block = to + ((b0 + b) * 16 ^ swizzled);
              if constexpr (sizeof(T) == 4) {
                const SplitTF32 split[4] = {SplitTF32(c[0]), SplitTF32(c[1]), SplitTF32(c[2]),
                                            SplitTF32(c[3])};
                StoreBlock(a, block, split);
              } else {
                *reinterpret_cast<uint4*>(block) = make_uint4(c[0] | c[1] << 16, c[2] | c[3] << 16,
                                                              c[4] | c[5] << 16, c[6] | c[7] << 16);
              }
            }
          }
        }
        ProxyFence();
        Arrive(barriers.InFull(buffer.at));
        buffer.Next(a.buffers);
      }
    }
  }
}

// The 64 pixels that a group of warps multiplies at once lie in groups of eight neighbours along
// the last axis: all of them along that axis, or each beyond the other along `patch_axis` (0 is n).
// A group of warps has MT of these patches, which make up its part of the tile.
struct DensePatch {
  int at[kAxes + 1];  // of the first pixel in the part: n, d, h, w
  __device__ DensePatch(const DenseArgs& a, int index) {
    const int part[kAxes + 1] = {a.part_n, a.axis[0].part, a.axis[1].part, a.axis[2].part};
    for (int i = kAxes; i >= 0; --i) {
      const int size = i == kAxes ? a.patch_w : i == a.patch_axis && a.patch_w == 8 ? 8 : 1;
      const int count = part[i] / size;
      at[i] = index % count * size;
      index /= count;
    }
  }
};

// Distances between neighbours along n, d, h, w.
struct DensePitch {
  int of[kAxes + 1];
  __device__ DensePitch(int d, int h, int w) : of{d * h * w, h * w, w, 1} {}
  __device__ int Place(const DensePatch& p) const {
    return p.at[0] * of[0] + p.at[1] * of[1] + p.at[2] * of[2] + p.at[3];
  }
};

// Results leave by way of shared memory, `store_columns` at a time: channels last as boxes that the
// copy units write while the next tile is multiplied, channels first as rows of pixels.
template <class T, class Out, int MT, int NT, bool kRows>
__device__ inline void StoreDense(const DenseArgs& a, const DenseMaps& maps, const DenseItem& item,
                                  const int* pixels, char* stage, const int (&place)[MT][2],
                                  int group, const float (&acc)[MT][4 * NT], int& buffer,
                                  int thread) {
  constexpr int kRuns = MT * 2;  // of 32 pixels
  // Channels first: pitch in elements of a column in the stage, free of bank conflicts.
  constexpr int kPitch = MT * 64 + 16 / static_cast<int>(sizeof(Out));
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  int64_t offset[kRuns];  // of this thread's pixels of each run, in a phase of the output
  const auto locate = [&](int phase) {
    const int up = phase / a.axis[2].so;
    const int r[kAxes] = {up / a.axis[1].so, up % a.axis[1].so, phase % a.axis[2].so};
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const DenseCoordinates at(pixels[i * 32 + lane]);
      bool inside = item.n + at.n < a.n;
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
  const int first = item.column_tile * NT * 8;
  int phase = a.program[item.program].phase, channel = item.group * a.jg + first;
  if (a.fused) {
    phase = first / a.jg;
    channel -= phase * a.jg;
  }
  if (kRows) locate(phase);
  const int swizzled = kRows ? 0 : lane / 4 * a.store_bytes >> 3 & a.store_swizzle;
  int columns = min(NT * 8, a.columns - first);  // left
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    if (columns <= 0) break;
    columns -= 8;
    const int at = j * 8 & (a.store_columns - 1);  // in the stage
    char* to = stage + buffer * a.store_pitch;
    float bias[2] = {0, 0};
    if (a.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bias[i] = ToAccumulator(static_cast<const Out*>(a.bias)[channel + at + 2 * quad + i]);
      }
    }
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Out v0 = FromAccumulator<Out>(acc[mt][4 * j + 2 * h] + bias[0]);
        const Out v1 = FromAccumulator<Out>(acc[mt][4 * j + 2 * h + 1] + bias[1]);
        if constexpr (kRows) {
          Out* row = reinterpret_cast<Out*>(to) + (at + 2 * quad) * kPitch + place[mt][h];
          row[0] = v0;
          row[kPitch] = v1;
        } else {
          const int bytes = (at + 2 * quad) * static_cast<int>(sizeof(Out));
          struct alignas(2 * sizeof(Out)) Pair {
            Out v[2];
          };
          *reinterpret_cast<Pair*>(to + place[mt][h] + (bytes ^ swizzled)) = {{v0, v1}};
        }
      }
    }
    if (at + 8 < a.store_columns) continue;
    if constexpr (kRows) {
      SyncGroup(group);
      const Out* from = reinterpret_cast<const Out*>(to);
      Out* out = static_cast<Out*>(a.out) + channel * a.out_c_step;
      for (int c = warp; c < a.store_columns; c += 4) {
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
          if (offset[i] >= 0) out[c * a.out_c_step + offset[i]] = from[c * kPitch + i * 32 + lane];
        }
      }
    } else {
      // Past the barrier all know that the copy units have read the other stage.
      if (thread == 0) WaitForReads();
      ProxyFence();
      SyncGroup(group);
      if (thread == 0) {
        int q[kAxes];
#pragma unroll
        for (int i = 0; i < kAxes; ++i) {
          q[i] = item.q[i] + PartStart(a.axis[i].part, a.axis[i].box, group);
        }
        StoreBox(&maps.out[a.fused ? phase : item.program], SharedAddress(to), channel, q[2], q[1],
                 q[0], item.n + PartStart(a.part_n, a.box_n, group));
      }
    }
    buffer ^= 1;
    channel += a.store_columns;
    if (a.fused && channel == (item.group + 1) * a.jg) {
      channel -= a.jg;
      ++phase;
      if (kRows && columns > 0) locate(phase);
    }
  }
}

// kExact: the tensor cores cut off what they add to, so each quad starts from zero and is added to
// the sums in float32.
template <class T, int MT, int NT, bool kExact>
__device__ inline void MultiplyDense(const DenseArgs& a, const DenseMaps& maps,
                                     const DenseBarriers& barriers, uint32_t in, uint32_t ring,
                                     const int* pixels, const int4* entries, char* stage, int group,
                                     int thread) {
  constexpr int kStepBytes = NT * 256, kQuadBytes = kDenseQuad * kStepBytes;
  const int warp = thread / 32, lane = thread % 32;
  const DensePitch staged(a.axis[0].length, a.axis[1].length, a.axis[2].length);
  const DensePitch stored(a.axis[0].part, a.axis[1].part, a.axis[2].part);
  const int eights = a.patch_w == 64 ? kAxes : a.patch_axis, stride = a.patch_w == 64 ? 8 : 1;
  uint64_t pixel[MT];  // descriptors for a tap without a shift
  int place[MT][2];    // of this lane's pixels in the stage for results
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
    DensePatch patch(a, mt);
    const int results = stored.Place(patch) + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      place[mt][h] =
          (results + (warp * 2 + h) * stride * stored.of[eights]) * (a.rows ? 1 : a.store_bytes);
    }
    patch.at[0] += PartStart(a.part_n, a.box_n, group);
#pragma unroll
    for (int i = 0; i < kAxes; ++i) {
      patch.at[i + 1] += PartStart(a.axis[i].part, a.axis[i].box, group);
    }
    pixel[mt] = PixelDescriptor(in + staged.Place(patch) * a.row_bytes,
                                stride * staged.of[eights] * a.row_bytes, a.row_bytes);
  }
  const bool round = sizeof(T) == 4 && !a.rows;
  float acc[MT][4 * NT], sum[kExact ? MT : 1][kExact ? 4 * NT : 1];
  DenseCursor buffer, slot;
  int stage_buffer = 0;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) Arrive(barrier);
  };
  for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
    const DenseItem item(a, index);
    const DenseProgram& program = a.program[item.program];
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int i = 0; i < 4 * NT; ++i) {
        if constexpr (kExact) {
          sum[mt][i] = 0;
        } else {
          acc[mt][i] = 0;
        }
      }
    }
    if (a.resident) slot = {};
    int segment = program.first_segment, chunk = 0, left = 0;
    int used_slot = -1, used_buffer = -1;  // free once the products under way are done
    const int4* entry = entries;
    int4 shift{};
    const auto free = [&] {
      __syncwarp();
      if (used_slot >= 0 && !a.resident) release(barriers.RingEmpty(used_slot));
      if (used_buffer >= 0) release(barriers.InEmpty(used_buffer));
    };
    for (int quad = 0; quad < program.quads; ++quad) {
      if (left <= 0) {
        const DenseSegment& s = a.segment[segment];
        const bool last = chunk + 1 == a.chunks;
        left = s.taps * (last ? a.last_steps : a.full_steps);
        entry = entries + s.entries +
                (last ? (s.taps * a.full_steps + kDenseQuad - 1) / kDenseQuad : 0);
        shift = *entry;
        if (++chunk == a.chunks) {
          chunk = 0;
          ++segment;
        }
        WaitFor(round ? barriers.InRounded(buffer.at) : barriers.InFull(buffer.at), buffer.parity);
      }
      WaitFor(barriers.RingFull(slot.at), slot.parity);
      uint64_t weights = Descriptor(ring + slot.at * kQuadBytes, 128, 256);
      const auto multiply = [&](int shift, bool first = false) {
        const int add = !(kExact && first);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          DenseMma<T, NT>::Run(acc[mt], pixel[mt] + static_cast<uint32_t>(shift), weights, add);
        }
        weights += kStepBytes / 16;
      };
      const int at = buffer.at * (a.stage_bytes / 16);
      if (left >= kDenseQuad) {
        GroupFence();
        multiply(at + shift.x, true);
        multiply(at + shift.y);
        multiply(at + shift.z);
        multiply(at + shift.w);
      } else {
        for (int k = 0; k < left; ++k) {
          GroupFence();
          multiply(at + shift.x, k == 0);
          shift.x = shift.y;
          shift.y = shift.z;
        }
      }
      GroupCommit();
      left -= kDenseQuad;
      shift = *++entry;
      if constexpr (!kExact) {
        WaitForProducts<1>();  // of the quad before
        free();
      }
      used_slot = slot.at;
      used_buffer = left <= 0 ? buffer.at : -1;
      if constexpr (kExact) {
        WaitForProducts<0>();
        free();
        used_slot = used_buffer = -1;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int i = 0; i < 4 * NT; ++i) {
            asm volatile("" : "+f"(acc[mt][i])::"memory");  // not before the wait
            sum[mt][i] += acc[mt][i];
          }
        }
      }
      slot.Next(a.ring);
      if (left <= 0) buffer.Next(a.buffers);
    }
    WaitForProducts<0>();
    free();
    const auto results = [&]() -> const float (&)[MT][4 * NT] {
      if constexpr (kExact) {
        return sum;
      } else {
        return acc;
      }
    };
    const auto store = [&](auto out, auto rows) {
      StoreDense<T, decltype(out), MT, NT, decltype(rows)::value>(
          a, maps, item, pixels, stage, place, group, results(), stage_buffer, thread);
    };
    const auto store_as = [&](auto out) {
      if (a.rows) {
        store(out, std::true_type{});
      } else {
        store(out, std::false_type{});
      }
    };
    if (sizeof(T) == 4 || a.out_f32) {
      store_as(float{});
    } else {
      store_as(T{});
    }
  }
  if (thread == 0) WaitForStores();
}

#endif

template <class T, int MT, int NT, bool kExact>
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
      InitBarrier(barriers.InRounded(i), kDenseRounders);
      InitBarrier(barriers.InEmpty(i), kDenseWarps);
    }
    for (int i = 0; i < a.ring; ++i) {
      InitBarrier(barriers.RingFull(i), 1);
      InitBarrier(barriers.RingEmpty(i), kDenseWarps);
    }
    FenceBarriers();
    ProxyFence();
  }
  constexpr int kPixels = MT * 64;  // of a group of warps
  if (a.rows) {
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
      pixels[p] = PackCoordinates(take(a.part_n, a.box_n), pd, ph, pw);
    }
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
        const int step = i - tap * steps, low = step % a.terms == 1 ? a.part_bytes : 0;
        to[i] =
            i < all
                ? (a.shift[segment.first_shift + tap] * a.row_bytes + step / a.terms * 32 + low) /
                      16
                : 0;
      }
      to += padded;
    }
  }
  __syncthreads();
  const int warp = thread / 32;
  if (warp < 8) {
    GiveRegisters<72>();
    if (warp == 0) {
      if (lane == 0) FetchWeights(a, barriers, ring, NT * 256 * kDenseQuad);
    } else if (a.rows) {
      FetchRows<T>(a, barriers, shared + a.smem_in, sources, thread - 32);
    } else if (warp == 1) {
      if (lane == 0) FetchBoxes(a, &maps.in, barriers, in);
    } else if (sizeof(T) == 4) {
      RoundBoxes(a, barriers, shared + a.smem_in, thread - 64);
    }
  } else {
    TakeRegisters<184>();
    const int group = warp / 4 - 2;
    MultiplyDense<T, MT, NT, kExact>(a, maps, barriers, in, ring, pixels + group * kPixels,
                                     reinterpret_cast<const int4*>(entries),
                                     shared + a.smem_out + group * 2 * a.store_pitch, group,
                                     thread % 128);
  }
#endif
}

template <class T, int MT, int NT, bool kExact>
cudaError_t EnqueueDenseTile(const DensePlan& plan, const DenseLaunch& launch,
                             cudaStream_t stream) {
  const auto kernel = Dense<T, MT, NT, kExact>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem);
  if (status != cudaSuccess) return status;
  kernel<<<plan.grid, kDenseThreads, plan.smem, stream>>>(launch.maps, launch.args);
  return cudaGetLastError();
}

template <class T>
cudaError_t EnqueueDense(const DensePlan& plan, const DenseLaunch& launch, bool packs,
                         cudaStream_t stream) {
  if (packs) {
    const DensePack& pack = launch.pack;
    const int steps = (pack.chunks - 1) * pack.full_steps + pack.last_steps;
    const int ranges = (pack.taps + kPackTaps - 1) / kPackTaps;
    const int unused = pack.column_tiles * pack.tiles - pack.used_tiles;
    const dim3 grid(pack.jg / 8 + unused, steps, pack.groups * ranges);
    PackDense<T><<<grid, kPackThreads, 0, stream>>>(pack);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  // Split operands have two sets of sums, which leaves no registers for large tiles.
  const auto enqueue = [&](auto exact) {
    switch (plan.mt * 1000 + plan.columns) {
      case 2032:
        return EnqueueDenseTile<T, 2, 4, exact>(plan, launch, stream);
      case 2048:
        return EnqueueDenseTile<T, 2, 6, exact>(plan, launch, stream);
      case 2064:
        return EnqueueDenseTile<T, 2, 8, exact>(plan, launch, stream);
      case 1128:
        return EnqueueDenseTile<T, 1, 16, exact>(plan, launch, stream);
      default:
        break;
    }
    if constexpr (!exact) {
      switch (plan.mt * 1000 + plan.columns) {
        case 2096:
          return EnqueueDenseTile<T, 2, 12, false>(plan, launch, stream);
        case 2128:
          return EnqueueDenseTile<T, 2, 16, false>(plan, launch, stream);
        case 4032:
          return EnqueueDenseTile<T, 4, 4, false>(plan, launch, stream);
        case 4064:
          return EnqueueDenseTile<T, 4, 8, false>(plan, launch, stream);
        default:
          break;
      }
    }
    return cudaErrorInvalidConfiguration;
  };
  if constexpr (sizeof(T) == 4) {
    if (launch.args.terms > 1) return enqueue(std::true_type{});
  }
  return enqueue(std::false_type{});
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_CUH_
