// Device part of the weight gradient of "dense"; docs/gpu_kernels.md tells the whole story.
//
// Eight warps load boxes of x and y and store them as cores: of each position, 8 channels by 16
// bytes of streams. Two groups of four warps multiply them.
#ifndef JAXCONV_CUDA_DENSE_GRAD_CUH_
#define JAXCONV_CUDA_DENSE_GRAD_CUH_

#include "cuda/bulk_tensors.cuh"
#include "cuda/dense_grad.h"
#include "cuda/dense_walk.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/shared_memory.h"

namespace jaxconv::cuda {

inline constexpr int kDenseGradThreads = 128 * (kDenseGradGroups + 2);
inline constexpr int kDenseGradLoaders = 256, kDenseGradTurners = 224;
inline constexpr int kDenseGradWarps = 4 * kDenseGradGroups;  // that multiply

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A staged position: the offset of its elements in memory and its coordinates, both from those of
// the tile.
struct DenseGradPosition {
  int offset, at[kAxes];
};

// The bits of a float32, rounded to TF32.
__device__ inline uint32_t RoundWord(uint32_t word) { return RoundTF32(__uint_as_float(word)); }

__device__ inline void StoreVector(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The row of a channel among those that are staged: a thread that loads four neighbours stores them
// into different cores, which keeps banks apart.
template <class T, DenseGradFrom kFrom>
__device__ inline int DenseGradRow(int channel, int channels) {
  constexpr bool kAcross = kFrom == DenseGradFrom::kCopies && sizeof(T) == 2;
  if (kFrom == DenseGradFrom::kRows || kAcross) return channel;
  return (channel % 4 * (channels / 32) + channel / 32) * 8 + channel / 4 % 8;
}

// What a block keeps, and its part of the tiles.
struct DenseGradBlock {
  int chunk, co, ci, group, part, rank, begin, end, first_tap, taps;
  __device__ DenseGradBlock(const DenseGradArgs& a, int columns) {
    rank = blockIdx.x % a.cluster;
    int rest = blockIdx.x / a.cluster;
    const auto take = [&](int count) {
      const int mine = rest % count;
      rest /= count;
      return mine;
    };
    chunk = take(a.chunks);
    co = take(a.co_tiles) * columns;
    ci = take(a.ci_tiles) * a.row_blocks * 64;
    group = take(a.groups);
    part = rest;
    const int64_t parts = int64_t{a.parts} * a.cluster, mine = part * a.cluster + rank;
    begin = static_cast<int>(a.tiles * mine / parts);
    end = static_cast<int>(a.tiles * (mine + 1) / parts);
    first_tap = chunk * a.chunk_taps;
    taps = min(a.chunk_taps, a.taps - first_tap);
  }
};

struct DenseGradBarriers {
  uint32_t base;
  __device__ uint32_t Full(int i) const { return base + i * 8; }
  __device__ uint32_t Empty(int i) const { return base + 8 * (kDenseGradStages + i); }
  __device__ uint32_t Turned(int i) const { return base + 8 * (2 * kDenseGradStages + i); }
};

// Stages an operand's positions, each of its streams by a load of its own. kBatch: words of a
// thread under way.
template <class T, bool kLast, int kBatch>
struct DenseGradLoader {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kStreams = 16 / sizeof(T);
  static constexpr uint32_t kAll = (1u << kStreams) - 1;
  // What a load brings: four channels, or one where positions are neighbours in memory.
  using Loaded = std::conditional_t<kLast, std::conditional_t<kHalf, uint2, uint4>,
                                    std::conditional_t<kHalf, uint16_t, uint32_t>>;
  static constexpr int kWords = (sizeof(Loaded) + 3) / 4;
  static constexpr int kBatches = kBatch / (kStreams * kWords);  // under way at once

  const DenseGradOperand& o;
  int start[kAxes];  // coordinates of the tile
  const T* base;     // at them, of the block's first channel
  int left;          // channels of the group from there
  const DenseGradPosition* table;
  int positions;
  uint32_t to;
  int warp, lane;

  // The streams whose element at the position is inside, and its offset.
  __device__ uint32_t Inside(int p, int& offset) const {
    const int4 entry = reinterpret_cast<const int4*>(table)[p];
    offset = entry.x;
    const int u0 = start[0] + entry.y, u1 = start[1] + entry.z, u2 = start[2] + entry.w;
    if (u0 >= o.limit || static_cast<unsigned>(u1) >= static_cast<unsigned>(o.size[1]) ||
        static_cast<unsigned>(u2) >= static_cast<unsigned>(o.size[2])) {
      return 0;
    }
    if (o.cuts == 1) {
      return static_cast<unsigned>(u0) < static_cast<unsigned>(o.size[0]) ? kAll : 0;
    }
    uint32_t mask = 0;
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      if (static_cast<unsigned>(u0 + o.along[s]) < static_cast<unsigned>(o.size[0]))
        mask |= 1u << s;
    }
    return mask;
  }

  __device__ void Load(Loaded (&v)[kStreams], uint32_t mask, const T* at) const {
    const char* from = reinterpret_cast<const char*>(at);
#pragma unroll
    for (int s = 0; s < kStreams; ++s) v[s] = {};
    if (mask == kAll) {
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        v[s] = __ldg(reinterpret_cast<const Loaded*>(from + o.delta[s]));
      }
    } else if (mask != 0) {
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (mask >> s & 1) v[s] = __ldg(reinterpret_cast<const Loaded*>(from + o.delta[s]));
      }
    }
  }

  __device__ static uint32_t Word(uint4 v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
  __device__ static uint32_t Word(uint2 v, int i) { return i == 0 ? v.x : v.y; }

  // Channel i of what was loaded.
  __device__ static void Store(uint32_t at, const Loaded (&v)[kStreams], int i) {
    if constexpr (kLast && kHalf) {
      const uint32_t pick = i % 2 == 0 ? 0x5410 : 0x7632;
      const auto pair = [&](int s) {
        return __byte_perm(Word(v[s], i / 2), Word(v[s + 1], i / 2), pick);
      };
      StoreVector(at, pair(0), pair(2), pair(4), pair(6));
    } else if constexpr (kLast) {
      StoreVector(at, RoundWord(Word(v[0], i)), RoundWord(Word(v[1], i)), RoundWord(Word(v[2], i)),
                  RoundWord(Word(v[3], i)));
    } else if constexpr (kHalf) {
      const auto pair = [&](int s) { return uint32_t{v[s]} | uint32_t{v[s + 1]} << 16; };
      StoreVector(at, pair(0), pair(2), pair(4), pair(6));
    } else {
      StoreVector(at, RoundWord(v[0]), RoundWord(v[1]), RoundWord(v[2]), RoundWord(v[3]));
    }
  }

  __device__ void Run() const {
    Loaded v[kBatches][kStreams];
    if constexpr (kLast) {
      // A warp takes 32 channels of 4 positions.
      const int of_channels = o.channels / 32, units = (positions + 3) / 4 * of_channels;
#pragma unroll 1
      for (int u = warp; u < units; u += 8 * kBatches) {
        uint32_t at[kBatches];
#pragma unroll
        for (int i = 0; i < kBatches; ++i) {
          const int unit = u + 8 * i, row = Divide(unit, o.by_units);
          const int p = row * 4 + lane / 8, q = unit - row * of_channels;
          const int c = q * 32 + lane % 8 * 4;
          at[i] = unit < units && p < positions ? to + p * o.pitch + q * 128 + lane % 8 * 16 : 0;
          int offset = 0;
          uint32_t mask = 0;
          if (at[i] != 0 && c < left) mask = Inside(p, offset);
          Load(v[i], mask, base + offset + c);
        }
#pragma unroll
        for (int i = 0; i < kBatches; ++i) {
          if (at[i] == 0) continue;
#pragma unroll
          for (int k = 0; k < 4; ++k) Store(at[i] + k * of_channels * 128, v[i], k);
        }
      }
    } else {
      // A warp takes 32 positions of every eighth channel.
#pragma unroll 1
      for (int p = lane; p - lane < positions; p += 32) {
        int offset = 0;
        const uint32_t inside = p < positions ? Inside(p, offset) : 0;
        uint32_t at = to + p * o.pitch + warp * 16;
        const T* from = base + offset + warp * o.c_step;
        const int64_t hop = 8 * o.c_step;
#pragma unroll 1
        for (int c = warp; c < o.channels; c += 8 * kBatches) {
#pragma unroll
          for (int i = 0; i < kBatches; ++i, from += hop) {
            Load(v[i], c + 8 * i < left ? inside : 0, from);
          }
#pragma unroll
          for (int i = 0; i < kBatches; ++i, at += 128) {
            if (p < positions && c + 8 * i < o.channels) Store(at, v[i], 0);
          }
        }
      }
    }
  }
};

template <class T, bool kLast, int kBatch>
__device__ inline void LoadDenseGrad(const DenseGradArgs& a, const DenseGradBlock& block,
                                     const DenseGradBarriers& barriers, const char* shared,
                                     int thread) {
  const auto* x_table = reinterpret_cast<const DenseGradPosition*>(shared + a.smem_x);
  const auto* y_table = reinterpret_cast<const DenseGradPosition*>(shared + a.smem_y);
  const int boxes = a.first_box[block.chunk + 1] - a.first_box[block.chunk];
  const uint32_t stages = SharedAddress(shared) + a.smem_stages;
  DenseCursor stage;
  for (int tile = block.begin; tile < block.end; ++tile) {
    int rest = tile, at[kAxes];
#pragma unroll
    for (int i = kAxes - 1; i >= 0; --i) {
      const int up = rest / a.tiles_of[i];
      at[i] = (rest - up * a.tiles_of[i]) * a.box[i];
      rest = up;
    }
    WaitFor(barriers.Empty(stage.at), stage.parity ^ 1);
#pragma unroll
    for (int operand = 0; operand < 2; ++operand) {
      const DenseGradOperand& o = operand == 0 ? a.x : a.y;
      const int channel = operand == 0 ? block.ci : block.co;
      const T* base = static_cast<const T*>(o.from) + int64_t{rest} * a.image_groups * o.n_step +
                      (block.group * o.group_channels + channel) * o.c_step;
      int start[kAxes];
#pragma unroll
      for (int i = 0; i < kAxes; ++i) {
        start[i] = operand == 0 ? at[i] : at[i] * a.stride[i];
        base += start[i] * o.step[i];
      }
      const DenseGradLoader<T, kLast, kBatch> loader{
          o,
          {start[0], start[1], start[2]},
          base,
          min(o.group_channels - channel, o.channels),
          operand == 0 ? x_table : y_table,
          operand == 0 ? a.positions : boxes * a.y_positions,
          stages + stage.at * a.stage_bytes + (operand == 0 ? 0 : a.y_offset),
          thread / 32,
          thread % 32};
      loader.Run();
    }
    ProxyFence();
    Arrive(barriers.Full(stage.at));
    stage.Next(a.stages);
  }
}

// Bulk tensor copies bring each position's streams, or pixels, as rows of channels. Of 16 bits that
// is what products across rows read: eight rows by 128 bytes of channels are what is swizzled.
__device__ inline void CopyDenseGrad(const DenseGradArgs& a, const DenseGradMaps& maps,
                                     const DenseGradBlock& block, const DenseGradBarriers& barriers,
                                     uint32_t stages) {
  const int first_box = a.first_box[block.chunk], boxes = a.first_box[block.chunk + 1] - first_box;
  const int bytes = a.positions * a.x.channels * 16 + boxes * a.y_box_bytes;
  // The images of a stream are neighbours; pixels have one image.
  const auto copy = [&](uint32_t to, const CUtensorMap* map, int c, int n, const int (&at)[kAxes],
                        uint32_t full) {
    if (a.unit == 1) {
      CopyBox(to, map, c, n, at[2], at[1], at[0], full);
    } else {
      CopyBox(to, map, c, at[2], at[1], at[0], n, full);
    }
  };
  DenseCursor stage;
  for (int tile = block.begin; tile < block.end; ++tile) {
    int rest = tile, at[kAxes];
#pragma unroll
    for (int i = kAxes - 1; i >= 0; --i) {
      const int up = rest / a.tiles_of[i];
      at[i] = (rest - up * a.tiles_of[i]) * a.box[i];
      rest = up;
    }
    const int n = rest * a.image_groups;
    const uint32_t x = stages + stage.at * a.stage_bytes, full = barriers.Full(stage.at);
    WaitFor(barriers.Empty(stage.at), stage.parity ^ 1);
    ArriveAndExpect(full, bytes);
    for (int i = 0; i < a.x.copies; ++i) {
      copy(x + i * a.x.copied, &maps.x, block.group * a.cig + block.ci + i * 64, n, at, full);
    }
    for (int box = 0; box < boxes; ++box) {
      const int16_t (&first)[kAxes] = a.box_first[first_box + box];
      const int y_at[kAxes] = {at[0] + first[0], at[1] + first[1], at[2] + first[2]};
      for (int i = 0; i < a.y.copies; ++i) {
        copy(x + a.y_offset + i * a.y.copied + box * a.y_positions * a.y.pitch,
             &maps.y[a.box_map[first_box + box]], block.group * a.cog + block.co + i * 64, n, y_at,
             full);
      }
    }
    stage.Next(a.stages);
  }
}

// Of float32, warps round what has arrived and turn it into cores where it lies: eight lanes take
// 32 channels of a position's four streams.
__device__ inline void TurnDenseGrad(const DenseGradArgs& a, const DenseGradBlock& block,
                                     const DenseGradBarriers& barriers, char* stages, int thread) {
  constexpr int kEights = kDenseGradTurners / 8, kBatch = 2;
  const int boxes = a.first_box[block.chunk + 1] - a.first_box[block.chunk];
  const int eight = thread / 8, lane = thread % 8;
  DenseCursor stage;
  for (int tile = block.begin; tile < block.end; ++tile) {
    WaitFor(barriers.Full(stage.at), stage.parity);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const DenseGradOperand& o = i == 0 ? a.x : a.y;
      const int count = (i == 0 ? a.positions : boxes * a.y_positions) << o.log_shares;
      char* from = stages + stage.at * a.stage_bytes + (i == 0 ? 0 : a.y_offset) + lane * 16;
      const int hop = o.channels * 4;
      for (int first = 0; first < count; first += kBatch * kEights) {
        uint4 v[kBatch][4];
        char* at[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int e = first + b * kEights + eight;
          at[b] = from + (e >> o.log_shares) * o.pitch + (e & ((1 << o.log_shares) - 1)) * 128;
          if (e >= count) at[b] = nullptr;
#pragma unroll
          for (int s = 0; s < 4; ++s) {
            if (at[b] != nullptr) v[b][s] = *reinterpret_cast<const uint4*>(at[b] + s * hop);
          }
        }
        __syncwarp();
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (at[b] == nullptr) continue;
          const uint32_t to = SharedAddress(at[b]);
          StoreVector(to, RoundWord(v[b][0].x), RoundWord(v[b][1].x), RoundWord(v[b][2].x),
                      RoundWord(v[b][3].x));
          StoreVector(to + hop, RoundWord(v[b][0].y), RoundWord(v[b][1].y), RoundWord(v[b][2].y),
                      RoundWord(v[b][3].y));
          StoreVector(to + 2 * hop, RoundWord(v[b][0].z), RoundWord(v[b][1].z),
                      RoundWord(v[b][2].z), RoundWord(v[b][3].z));
          StoreVector(to + 3 * hop, RoundWord(v[b][0].w), RoundWord(v[b][1].w),
                      RoundWord(v[b][2].w), RoundWord(v[b][3].w));
        }
      }
    }
    ProxyFence();
    __syncwarp();
    if (thread % 32 == 0) Arrive(barriers.Turned(stage.at));
    stage.Next(a.stages);
  }
}

template <class T, DenseGradFrom kFrom, int NT, int P>
__device__ inline void MultiplyDenseGrad(const DenseGradArgs& a, const DenseGradBlock& block,
                                         const DenseGradBarriers& barriers, char* shared, int group,
                                         int thread) {
  const int rows = group % a.row_blocks, first = group / a.row_blocks * P;  // of products
  const uint32_t stages = SharedAddress(shared) + a.smem_stages;
  const int2* pairs = reinterpret_cast<const int2*>(shared + a.smem_pairs);
  // Across rows, a descriptor has the distances to the next 64 channels and to the next eight rows.
  constexpr bool kCopies = kFrom == DenseGradFrom::kCopies, kAcross = kCopies && sizeof(T) == 2;
  const auto join = [](uint32_t high, uint32_t low) { return uint64_t{high} << 32 | low; };
  const uint64_t x0 =
      kAcross ? uint64_t{1} << 62 | Descriptor(stages + rows * a.x.copied, a.x.copied, a.x.pitch)
              : Descriptor(stages + rows * 1024, a.x.pitch, 128);
  using Mma = std::conditional_t<kAcross, GroupMmaAcross<T, NT>, GroupMma<T, NT>>;
  const uint32_t x_high = x0 >> 32, x_low = static_cast<uint32_t>(x0);
  uint32_t y_high = 0, y_low[P];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    // Products beyond the last repeat it; nothing is stored of them.
    const int tap = block.first_tap + min(first + p, block.taps - 1);
    const uint32_t from = stages + a.y_offset + a.shift[tap] * a.y.pitch;
    const uint64_t y0 = kAcross
                            ? uint64_t{1} << 62 | Descriptor(from, a.y.copied, a.y_pair * a.y.pitch)
                            : Descriptor(from, a.y_pair * a.y.pitch, 128);
    y_high = y0 >> 32;  // of all the same
    y_low[p] = static_cast<uint32_t>(y0);
  }
  float acc[P][4 * NT];
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int i = 0; i < 4 * NT; ++i) acc[p][i] = 0;
  }
  float* kept =
      a.kept + int64_t{blockIdx.x} * (P * NT * 4 * 128 * kDenseGradGroups) + group * 128 + thread;
  const auto each = [&](auto visit) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int i = 0; i < 4 * NT; ++i) {
        visit(acc[p][i], kept[(p * 4 * NT + i) * (128 * kDenseGradGroups)]);
      }
    }
  };
  DenseCursor stage;
  int used = -1, until_flush = a.flush;
  bool flushed = false;
  const uint32_t x_step = 4 * a.x.pitch / 16;
  int2 next = Uniform(pairs[0]);
  for (int tile = block.begin; tile < block.end; ++tile) {
    WaitFor(kCopies && !kAcross ? barriers.Turned(stage.at) : barriers.Full(stage.at),
            stage.parity);
    const uint32_t at = stage.at * (a.stage_bytes / 16);
    uint32_t x = at;
    const auto multiply = [&](int j) {  // two steps
      const int2 pair = next;
      next = Uniform(pairs[j + 1 < a.steps / 2 ? j + 1 : 0]);
      GroupFence();
      const auto step = [&](uint32_t x_at, uint32_t y_at) {
#pragma unroll
        for (int p = 0; p < P; ++p) {
          Mma::Run(acc[p], join(x_high, x_low + x_at), join(y_high, y_low[p] + y_at));
        }
      };
      step(x, at + pair.x);
      step(x + x_step / 2, at + pair.y);
      x += x_step;
    };
    multiply(0);
    GroupCommit();
    WaitForProducts<1>();  // those of the stage before
    if (used >= 0 && thread % 32 == 0) Arrive(barriers.Empty(used));
#pragma unroll 1
    for (int j = 1; j < a.steps / 2; ++j) multiply(j);
    GroupCommit();
    used = stage.at;
    stage.Next(a.stages);
    if (--until_flush == 0) {
      WaitForProducts<0>();
      if (flushed) {
        each([](float& sum, float& to) { to += sum; });
      } else {
        each([](float& sum, float& to) { to = sum; });
      }
      each([](float& sum, float&) { sum = 0; });
      flushed = true;
      until_flush = a.flush;
    }
  }
  WaitForProducts<0>();
  if (flushed) each([](float& sum, float& from) { sum += from; });
  // All products are done before results take the place of what they read.
  asm volatile("bar.sync 1, %0;" ::"n"(128 * kDenseGradGroups) : "memory");
  constexpr int kPitch = 8 * NT + 8;
  const int row = rows * 64 + thread / 32 * 16 + thread % 32 / 4;
  float* results = reinterpret_cast<float*>(shared + a.smem_stages) + row * kPitch + thread % 4 * 2;
#pragma unroll
  for (int p = 0; p < P; ++p) {
    float* to = results + (first + p) * a.tap_pitch;
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      *reinterpret_cast<float2*>(to + i * 8) = make_float2(acc[p][4 * i], acc[p][4 * i + 1]);
      *reinterpret_cast<float2*>(to + 8 * kPitch + i * 8) =
          make_float2(acc[p][4 * i + 2], acc[p][4 * i + 3]);
    }
  }
}

// The results of a cluster of blocks, added up; each block writes some of the rows, taps next to
// each other, so that sectors are whole where taps are neighbours.
template <class T, DenseGradFrom kFrom, class Out, int NT>
__device__ inline void StoreDenseGrad(const DenseGradArgs& a, const DenseGradBlock& block,
                                      const char* shared) {
  constexpr int kColumns = 8 * NT, kPitch = kColumns + 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int columns = min(kColumns, a.cog - block.co);
  // Rows of this block: every so manieth.
  const int rows =
      (min(64 * a.row_blocks, a.cig - block.ci) - block.rank + a.cluster - 1) / a.cluster;
  const auto staged_row = [&](int r) {
    return DenseGradRow<T, kFrom>(r * a.cluster + block.rank, 64 * a.row_blocks) * kPitch;
  };
  if (a.cluster > 1) {
    const uint32_t results = SharedAddress(shared) + a.smem_stages;
    const int count = rows * a.chunk_taps * (kColumns / 4);
    const auto place = [&](int i) -> uint32_t {
      const int up = i / (kColumns / 4), r = Divide(up, a.by_chunk_taps);
      const int t = up - r * a.chunk_taps;
      if (t >= block.taps) return 0;
      return results + 4 * (t * a.tap_pitch + staged_row(r)) + 16 * (i % (kColumns / 4));
    };
    AddUpInPlace(a.cluster, block.rank, count, threadIdx.x, kDenseGradThreads, place);
    MeetCluster();  // the sums are there, and none leaves while others read its results
  }
  const float* results = reinterpret_cast<const float*>(shared + a.smem_stages);
  Out* out = static_cast<Out*>(a.out) + block.part * a.w_elements;
  constexpr int kBatch = 4;  // of a lane
  const int elements = columns * a.chunk_taps;
  const int batches = (elements + 32 * kBatch - 1) / (32 * kBatch);
  for (int unit = warp; unit < rows * batches; unit += kDenseGradThreads / 32) {
    const int r = unit / batches, first = (unit - r * batches) * 32 * kBatch + lane;
    const int ci = block.ci + r * a.cluster + block.rank;
    const int64_t row = (int64_t{block.group} * a.cig + ci) * a.cog + block.co;
    const float* from = results + staged_row(r);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = first + 32 * i, c = Divide(e, a.by_chunk_taps), t = e - c * a.chunk_taps;
      if (e >= elements || t >= block.taps) continue;
      const float sum = from[t * a.tap_pitch + DenseGradRow<T, kFrom>(c, kColumns)];
      out[row * a.taps + c * a.taps + a.tap[block.first_tap + t]] = FromAccumulator<Out>(sum);
    }
  }
}

#endif

template <class T, DenseGradFrom kFrom, int NT, int P>
__global__ void __launch_bounds__(kDenseGradThreads, 1)
    DenseGrad(const __grid_constant__ DenseGradMaps maps, const __grid_constant__ DenseGradArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  LetNextStart();  // SumParts
  const DenseGradBlock block(a, 8 * NT);
  const DenseGradBarriers barriers{SharedAddress(shared)};
  constexpr bool kCopies = kFrom == DenseGradFrom::kCopies;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < a.stages; ++i) {
      InitBarrier(barriers.Full(i), kCopies ? 1 : kDenseGradLoaders);
      InitBarrier(barriers.Turned(i), kDenseGradTurners / 32);
      InitBarrier(barriers.Empty(i), kDenseGradWarps);
    }
    FenceBarriers();
    ProxyFence();
  }
  const auto locate = [](int p, const int (&box)[kAxes], int unit, int (&at)[kAxes]) {
    const int row = box[2] / unit, up = p / row;
    at[2] = (p - up * row) * unit;
    at[0] = up / box[1];
    at[1] = up - at[0] * box[1];
  };
  auto* x_table = reinterpret_cast<DenseGradPosition*>(shared + a.smem_x);
  for (int p = thread; p < a.positions; p += kDenseGradThreads) {
    DenseGradPosition e{0, {}};
    locate(p, a.box, a.unit, e.at);
    for (int i = 0; i < kAxes; ++i) e.offset += e.at[i] * static_cast<int>(a.x.step[i]);
    if (!kCopies) x_table[p] = e;
    if (p % 2 == 0) {
      reinterpret_cast<int*>(shared + a.smem_pairs)[p / 2] =
          ((e.at[0] * a.y_box[1] + e.at[1]) * a.y_box[2] + e.at[2]) * a.y.pitch / 16;
    }
  }
  auto* y_table = reinterpret_cast<DenseGradPosition*>(shared + a.smem_y);
  const int first_box = a.first_box[block.chunk];
  const int boxes = a.first_box[block.chunk + 1] - first_box;
  for (int p = thread; p < boxes * a.y_positions && !kCopies; p += kDenseGradThreads) {
    DenseGradPosition e{0, {}};
    const int box = p / a.y_positions;
    locate(p - box * a.y_positions, a.y_box, 1, e.at);
    for (int i = 0; i < kAxes; ++i) {
      e.at[i] = e.at[i] * a.stride[i] + a.box_first[first_box + box][i];
      e.offset += e.at[i] * static_cast<int>(a.y.step[i]);
    }
    y_table[p] = e;
  }
  __syncthreads();
  constexpr int kSums = P * NT * 4, kRegisters = kSums > 128 ? 192 : kSums > 64 ? 176 : 128;
  constexpr int kLoaderRegisters = 256 - kRegisters;
  const bool multiplies = thread >= kDenseGradLoaders;
  if (multiplies) {
    if (kRegisters > 128) TakeRegisters<kRegisters>();
    MultiplyDenseGrad<T, kFrom, NT, P>(a, block, barriers, shared, Uniform(thread / 128) - 2,
                                       thread % 128);
    if (kRegisters > 128) GiveRegisters<128>();
  } else {
    if (kRegisters > 128) GiveRegisters<kLoaderRegisters>();
    if constexpr (!kCopies) {
      LoadDenseGrad<T, kFrom == DenseGradFrom::kRuns, (kSums > 128 ? 16 : 32)>(a, block, barriers,
                                                                               shared, thread);
    } else if (thread == 0) {
      CopyDenseGrad(a, maps, block, barriers, SharedAddress(shared) + a.smem_stages);
    } else if (sizeof(T) == 4 && thread >= kDenseGradLoaders - kDenseGradTurners) {
      TurnDenseGrad(a, block, barriers, shared + a.smem_stages,
                    thread - (kDenseGradLoaders - kDenseGradTurners));
    }
    __syncwarp();
  }
  // All store the results. None may take back registers that those who multiply still wait for.
  __syncthreads();
  if (kRegisters > 128 && !multiplies) TakeRegisters<128>();
  MeetCluster();
  switch (static_cast<DType>(a.out_dtype)) {
    case DType::kBF16:
      StoreDenseGrad<T, kFrom, __nv_bfloat16, NT>(a, block, shared);
      break;
    case DType::kF16:
      StoreDenseGrad<T, kFrom, __half, NT>(a, block, shared);
      break;
    default:
      StoreDenseGrad<T, kFrom, float, NT>(a, block, shared);
  }
#endif
}

template <class T, DenseGradFrom kFrom, int NT, int P>
cudaError_t EnqueueDenseGradVariant(const DenseGradPlan& plan, const DenseGradArgs& args,
                                    const DenseGradMaps& maps, cudaStream_t stream) {
  const auto kernel = DenseGrad<T, kFrom, NT, P>;
  const cudaError_t status = AllowSharedMemory(kernel);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = args.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kDenseGradThreads);
  config.dynamicSmemBytes = args.smem;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, maps, args);
}

template <class T, DenseGradFrom kFrom>
cudaError_t EnqueueDenseGrad(const DenseGradPlan& plan, const DenseGradArgs& args,
                             const DenseGradMaps& maps, cudaStream_t stream) {
#define JAXCONV_CASE(NT, P)                                                    \
  if (plan.variant.tiles == NT && plan.variant.products == P) {                \
    return EnqueueDenseGradVariant<T, kFrom, NT, P>(plan, args, maps, stream); \
  }
  JAXCONV_DENSE_GRAD_VARIANTS(JAXCONV_CASE)
#undef JAXCONV_CASE
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_GRAD_CUH_
