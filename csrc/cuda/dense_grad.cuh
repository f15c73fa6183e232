// Device part of the weight gradient of "dense"; docs/gpu_kernels.md tells the whole story.
//
// Eight warps load boxes of x and y and store them as cores: of each position, 8 channels by 16
// bytes of streams. Two groups of four warps multiply them.
#ifndef JAXCONV_CUDA_DENSE_GRAD_CUH_
#define JAXCONV_CUDA_DENSE_GRAD_CUH_

#include "cuda/dense.cuh"
#include "cuda/dense_grad.h"
#include "cuda/dense_grad_wgmma.cuh"

namespace jaxconv::cuda {

inline constexpr int kDenseGradThreads = 128 * (kDenseGradGroups + 2);
inline constexpr int kDenseGradLoaders = 256, kDenseGradTurners = 224;
inline constexpr int kDenseGradWarps = 4 * kDenseGradGroups;  // that multiply

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A staged position: the offset of its elements in memory from those of the tile, and its
// coordinates from the lowest of the tile, ten bits each.
struct DenseGradPosition {
  int offset, at;
};

// The lowest output on an axis that a chunk of taps needs of the input at 0.
__device__ inline int DenseGradLow(const DenseGradArgs& a, int chunk, int axis) {
  int low = a.box_first[a.first_box[chunk]][axis];
  for (int box = a.first_box[chunk] + 1; box < a.first_box[chunk + 1]; ++box) {
    low = min(low, static_cast<int>(a.box_first[box][axis]));
  }
  return low;
}

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

// Loads what a block stages, unit by unit, each stream of a unit by a load of its own. Warps take
// units in turn, and of the next one, be it of the next stage, loads are under way while one is
// stored.
template <class T, bool kLast>
class DenseGradLoader {
 public:
  __device__ DenseGradLoader(const DenseGradArgs& args, const DenseGradBlock& block,
                             const DenseGradBarriers& barriers_, const char* shared_, int thread)
      : a(args),
        barriers(barriers_),
        shared(shared_),
        warp(thread / 32),
        lane(thread % 32),
        tile(block.begin),
        end(block.end),
        unit(0) {
    const int boxes = a.first_box[block.chunk + 1] - a.first_box[block.chunk];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const DenseGradOperand& o = i == 0 ? a.x : a.y;
      const int channel = i == 0 ? block.ci : block.co;
      positions[i] = i == 0 ? a.positions : boxes * a.y_positions;
      units[i] = (positions[i] + Rows(i) - 1) / Rows(i) << (kLast ? 0 : LogRounds(i));
      left[i] = o.group_channels - channel;
      first[i] = static_cast<const T*>(o.from) +
                 (int64_t{block.group} * o.group_channels + channel) * o.c_step;
    }
    low[0] = low[1] = low[2] = 0;
#pragma unroll
    for (int x = 0; x < kAxes; ++x) low[x] = DenseGradLow(a, block.chunk, x);
    units[1] += units[0];
    if (tile >= end) return;
    int rest = tile;
#pragma unroll
    for (int x = kAxes - 1; x >= 0; --x) {
      const int up = rest / a.tiles_of[x];
      at[x] = rest - up * a.tiles_of[x];
      rest = up;
    }
    set = rest;
    Locate();
  }

  __device__ void Run() {
    Batch one, other;
    bool more = Load(one);
    while (more) {
      more = Load(other);
      Store(one);
      if (!more) break;
      more = Load(one);
      Store(other);
    }
  }

 private:
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kStreams = 16 / sizeof(T), kWarps = kDenseGradLoaders / 32;
  static constexpr uint32_t kAll = (1u << kStreams) - 1;
  // A lane's loads bring neighbours in memory: four channels, of four positions a warp, or one
  // position each of several channels.
  using Loaded = std::conditional_t<kLast, std::conditional_t<kHalf, uint2, uint4>,
                                    std::conditional_t<kHalf, uint16_t, uint32_t>>;
  static constexpr int kLoads = kLast ? 1 : kHalf ? 2 : 4;

  struct Batch {
    Loaded v[kLoads][kStreams];
    uint32_t at;  // in shared memory, or 0
    int tags;     // of the unit, and above them the stage
  };
  // The warp's first and last unit of a stage; of y; when its ring is at an odd turn.
  enum Tag { kFirst = 1, kFinal = 2, kOfY = 4, kOdd = 8, kStage = 16 };

  __device__ const DenseGradOperand& Operand(int i) const { return i == 0 ? a.x : a.y; }
  // Positions that all warps take at a time. Channels last, warps share them by 32 channels;
  // channels first, in several rounds of eight warps.
  __device__ int Rows(int i) const { return kLast ? 4 * kWarps >> Operand(i).log_shares : 32; }
  __device__ int LogRounds(int i) const { return Operand(i).log_shares; }

  // The tile's first elements, and which of its positions are inside.
  __device__ void Locate() {
    same = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const DenseGradOperand& o = Operand(i);
      base[i] = first[i] + int64_t{set} * a.image_groups * o.n_step;
      inside_low[i] = 0;
      inside_high[i] = 0;
#pragma unroll
      for (int x = 0; x < kAxes; ++x) {
        const int start = at[x] * a.box[x] * (i == 0 ? 1 : a.stride[x]);
        base[i] += start * o.step[x];
        const int from = start + (i == 0 ? 0 : low[x]);
        int less = -from, most = o.size[x] - 1 - from;
        if (x == 0) {
          // Of all streams: the strictest.
          if (o.cuts > 1) same = same && less <= 0 && most - o.along[kStreams - 1] >= o.most;
          most = min(most, o.limit - 1 - from);
        }
        less = most < 0 ? 512 : min(max(less, 0), 512);
        inside_low[i] |= less << 10 * x;
        inside_high[i] |= (min(max(most, 0), 511) | 512) << 10 * x;
      }
    }
  }

  // The streams whose element at the position is inside, and its offset. Each axis has ten bits: a
  // coordinate, and a bit above it that stays where a difference is not negative.
  template <int i>
  __device__ uint32_t Inside(int p, int& offset) const {
    const DenseGradOperand& o = Operand(i);
    const int2 entry = reinterpret_cast<const int2*>(shared + (i == 0 ? a.smem_x : a.smem_y))[p];
    offset = entry.x;
    constexpr int kOver = 512 << 20 | 512 << 10 | 512;
    const int fits = ((entry.y | kOver) - inside_low[i]) & (inside_high[i] - entry.y) & kOver;
    if (same) return fits == kOver ? kAll : 0;
    if ((fits | 512) != kOver) return 0;
    const int start = at[0] * a.box[0] * (i == 0 ? 1 : a.stride[0]);
    const int u = (entry.y & 511) + start + (i == 0 ? 0 : low[0]);
    uint32_t mask = 0;
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      if (static_cast<unsigned>(u + o.along[s]) < static_cast<unsigned>(o.size[0])) mask |= 1u << s;
    }
    return u < o.limit ? mask : 0;
  }

  __device__ static void LoadStreams(const DenseGradOperand& o, Loaded (&v)[kStreams],
                                     uint32_t mask, const T* at) {
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

  // Channels first, neighbouring lanes take their channels in different orders, to store them into
  // different banks.
  __device__ int Turn(int load) const { return (load + lane) % kLoads; }

  template <int i>
  __device__ void LoadUnit(Batch& b, int u) const {
    const DenseGradOperand& o = Operand(i);
    int p, c;
    if constexpr (kLast) {
      const int share = warp & ((1 << o.log_shares) - 1);
      p = u * Rows(i) + (warp >> o.log_shares) * 4 + lane / 8;
      c = share * 32 + lane % 8 * 4;
      b.at = p * o.pitch + share * 128 + lane % 8 * 16;
    } else {
      const int round = u & ((1 << o.log_shares) - 1);
      p = (u >> o.log_shares) * 32 + lane;
      c = (round * kWarps + warp) * kLoads;
      b.at = p * o.pitch + c * 16;
    }
    if (p >= positions[i]) {
      b.at = 0;
      return;
    }
    b.at += SharedAddress(shared) + a.smem_stages + stage.at * a.stage_bytes +
            (i == 0 ? 0 : a.y_offset);
    int offset;
    const uint32_t mask = Inside<i>(p, offset);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int channel = kLast ? c : c + Turn(j);
      const int further = kLast ? c : channel * static_cast<int>(o.c_step);
      LoadStreams(o, b.v[j], channel < left[i] ? mask : 0, base[i] + (offset + further));
    }
  }

  // Loads the next unit; false if there is none.
  __device__ bool Load(Batch& b) {
    if (tile >= end) return false;
    b.tags = stage.at * kStage + (stage.parity ? kOdd : 0) + (unit == 0 ? kFirst : 0);
    if (unit < units[0]) {
      LoadUnit<0>(b, unit);
    } else {
      LoadUnit<1>(b, unit - units[0]);
      b.tags |= kOfY;
    }
    if (++unit == units[1]) {
      b.tags |= kFinal;
      unit = 0;
      stage.Next(a.stages);
      if (++tile < end) {
        if (++at[2] == a.tiles_of[2]) {
          at[2] = 0;
          if (++at[1] == a.tiles_of[1]) {
            at[1] = 0;
            if (++at[0] == a.tiles_of[0]) {
              at[0] = 0;
              ++set;
            }
          }
        }
        Locate();
      }
    }
    return true;
  }

  __device__ static uint32_t Word(uint4 v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
  __device__ static uint32_t Word(uint2 v, int i) { return i == 0 ? v.x : v.y; }

  __device__ void Store(const Batch& b) const {
    const int at_stage = b.tags / kStage;
    if (b.tags & kFirst) WaitForPhase(barriers.Empty(at_stage), b.tags & kOdd ? 0 : 1);
    if (b.at != 0) {
      constexpr int kVectors = kLast ? 4 : kLoads;
      const int hop = kLast ? (b.tags & kOfY ? a.y.channels : a.x.channels) * 4 : 0;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          if constexpr (kLast && kHalf) {
            words[w] = __byte_perm(Word(b.v[0][2 * w], i / 2), Word(b.v[0][2 * w + 1], i / 2),
                                   i % 2 == 0 ? 0x5410 : 0x7632);
          } else if constexpr (kLast) {
            words[w] = RoundToTF32(Word(b.v[0][w], i));
          } else if constexpr (kHalf) {
            words[w] = uint32_t{b.v[i][2 * w]} | uint32_t{b.v[i][2 * w + 1]} << 16;
          } else {
            words[w] = RoundToTF32(b.v[i][w]);
          }
        }
        StoreVector(b.at + (kLast ? i * hop : Turn(i) * 16), words[0], words[1], words[2], words[3]);
      }
    }
    if (b.tags & kFinal) {
      ProxyFence();
      __syncwarp();
      if (lane == 0) Arrive(barriers.Full(at_stage));
    }
  }

  const DenseGradArgs& a;
  const DenseGradBarriers& barriers;
  const char* const shared;
  const int warp, lane;
  int positions[2], left[2];  // of x and y; channels of the group
  int units[2];               // of x; of both
  const T* first[2];          // where the group's channels begin
  int low[kAxes];             // of the boxes of y
  // Where loads have come to.
  int tile, end, unit, at[kAxes], set;
  const T* base[2];
  int inside_low[2], inside_high[2];
  bool same;  // for all streams
  DenseCursor stage;
};

// Bulk tensor copies bring each position's streams as rows of channels. Of 16 bits that is what
// products across rows read: eight streams by 128 bytes of channels are what is swizzled.
__device__ inline void CopyDenseGrad(const DenseGradArgs& a, const DenseGradMaps& maps,
                                     const DenseGradBlock& block, const DenseGradBarriers& barriers,
                                     uint32_t stages) {
  const int first_box = a.first_box[block.chunk], boxes = a.first_box[block.chunk + 1] - first_box;
  const int bytes = (a.positions * a.x.channels + boxes * a.y_positions * a.y.channels) * 16;
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
    WaitForPhase(barriers.Empty(stage.at), stage.parity ^ 1);
    ArriveAndExpect(full, bytes);
    for (int i = 0; i < a.x.copies; ++i) {
      CopyBox(x + i * a.x.copied, &maps.x, block.group * a.cig + block.ci + i * 64, n, at[2], at[1],
              at[0], full);
    }
    for (int box = 0; box < boxes; ++box) {
      const int16_t(&first)[kAxes] = a.box_first[first_box + box];
      for (int i = 0; i < a.y.copies; ++i) {
        CopyBox(x + a.y_offset + i * a.y.copied + box * a.y_positions * a.y.pitch, &maps.y,
                block.group * a.cog + block.co + i * 64, n, at[2] * a.stride[2] + first[2],
                at[1] * a.stride[1] + first[1], at[0] * a.stride[0] + first[0], full);
      }
    }
    stage.Next(a.stages);
  }
}

// Of float32, warps round what has arrived and turn it into cores where it lies: eight lanes take 32
// channels of a position's four streams.
__device__ inline void TurnDenseGrad(const DenseGradArgs& a, const DenseGradBlock& block,
                                     const DenseGradBarriers& barriers, char* stages, int thread) {
  constexpr int kEights = kDenseGradTurners / 8, kBatch = 2;
  const int boxes = a.first_box[block.chunk + 1] - a.first_box[block.chunk];
  const int eight = thread / 8, lane = thread % 8;
  DenseCursor stage;
  for (int tile = block.begin; tile < block.end; ++tile) {
    WaitForPhase(barriers.Full(stage.at), stage.parity);
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
          StoreVector(to, RoundToTF32(v[b][0].x), RoundToTF32(v[b][1].x), RoundToTF32(v[b][2].x),
                      RoundToTF32(v[b][3].x));
          StoreVector(to + hop, RoundToTF32(v[b][0].y), RoundToTF32(v[b][1].y),
                      RoundToTF32(v[b][2].y), RoundToTF32(v[b][3].y));
          StoreVector(to + 2 * hop, RoundToTF32(v[b][0].z), RoundToTF32(v[b][1].z),
                      RoundToTF32(v[b][2].z), RoundToTF32(v[b][3].z));
          StoreVector(to + 3 * hop, RoundToTF32(v[b][0].w), RoundToTF32(v[b][1].w),
                      RoundToTF32(v[b][2].w), RoundToTF32(v[b][3].w));
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
                                         const DenseGradBarriers& barriers, char* shared,
                                         int group, int thread) {
  const int rows = group % a.row_blocks, first = group / a.row_blocks * P;  // of products
  const uint32_t stages = SharedAddress(shared) + a.smem_stages;
  const int2* pairs = reinterpret_cast<const int2*>(shared + a.smem_pairs);
  // Across rows, a descriptor has the distances to the next 64 channels and to the next eight rows.
  constexpr bool kCopies = kFrom == DenseGradFrom::kCopies, kAcross = kCopies && sizeof(T) == 2;
  const uint64_t x0 = kAcross
                          ? uint64_t{1} << 62 | Descriptor(stages + rows * a.x.copied, a.x.copied,
                                                           a.x.pitch)
                          : Descriptor(stages + rows * 1024, a.x.pitch, 128);
  using Mma = DenseGradMma<T, NT, kAcross>;
  uint64_t y0[P];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    // Products beyond the last repeat it; nothing is stored of them.
    const int tap = block.first_tap + min(first + p, block.taps - 1);
    const uint32_t from = stages + a.y_offset + a.shift[tap] * a.y.pitch;
    y0[p] = kAcross ? uint64_t{1} << 62 | Descriptor(from, a.y.copied, a.y_pair * a.y.pitch)
                    : Descriptor(from, a.y_pair * a.y.pitch, 128);
  }
  float acc[P][4 * NT];
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int i = 0; i < 4 * NT; ++i) acc[p][i] = 0;
  }
  float* kept = a.kept + int64_t{blockIdx.x} * (P * NT * 4 * 128 * kDenseGradGroups) +
                group * 128 + thread;
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
  for (int tile = block.begin; tile < block.end; ++tile) {
    WaitForPhase(kCopies && !kAcross ? barriers.Turned(stage.at) : barriers.Full(stage.at),
                 stage.parity);
    const uint32_t at = stage.at * (a.stage_bytes / 16);
    uint32_t x = at;
    const auto multiply = [&](int j) {  // two steps
      const int2 pair = pairs[j];
      GroupFence();
#pragma unroll
      for (int p = 0; p < P; ++p) Mma::Run(acc[p], x0 + x, y0[p] + (at + pair.x));
#pragma unroll
      for (int p = 0; p < P; ++p) {
        Mma::Run(acc[p], x0 + (x + x_step / 2), y0[p] + (at + pair.y));
      }
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
  float* results = reinterpret_cast<float*>(shared + a.smem_stages) + row * kPitch +
                   thread % 4 * 2;
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

__device__ inline void SyncCluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The results of a cluster of blocks, added up in order; each block writes some of the rows, taps
// next to each other, so that sectors are whole where taps are neighbours.
template <class T, DenseGradFrom kFrom, class Out, int NT>
__device__ inline void StoreDenseGrad(const DenseGradArgs& a, const DenseGradBlock& block,
                                      const char* shared) {
  constexpr int kColumns = 8 * NT, kPitch = kColumns + 8;
  const int lane = threadIdx.x % 32;
  const uint32_t results = SharedAddress(shared) + a.smem_stages;
  const int rows = min(64 * a.row_blocks, a.cig - block.ci);
  const int columns = min(kColumns, a.cog - block.co);
  Out* out = static_cast<Out*>(a.out) + block.part * a.w_elements;
  for (int r = threadIdx.x / 32 * a.cluster + block.rank; r < rows;
       r += kDenseGradThreads / 32 * a.cluster) {
    const int64_t row = (int64_t{block.group} * a.cig + block.ci + r) * a.cog + block.co;
    const int staged_row = DenseGradRow<T, kFrom>(r, 64 * a.row_blocks);
    for (int e = lane; e < columns * a.chunk_taps; e += 32) {
      const int c = Divide(e, a.by_chunk_taps), t = e - c * a.chunk_taps;
      if (t >= block.taps) continue;
      const uint32_t from = results + 4 * (t * a.tap_pitch + staged_row * kPitch +
                                           DenseGradRow<T, kFrom>(c, kColumns));
      float sum = 0;
      for (int rank = 0; rank < a.cluster; ++rank) {
        float v;
        uint32_t remote;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(from), "r"(rank));
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(remote) : "memory");
        sum += v;
      }
      out[(row + c) * a.taps + a.tap[block.first_tap + t]] = FromAccumulator<Out>(sum);
    }
  }
}

#endif

template <class T, DenseGradFrom kFrom, int NT, int P>
__global__ void __launch_bounds__(kDenseGradThreads, 1)
    DenseGrad(const __grid_constant__ DenseGradMaps maps, const __grid_constant__ DenseGradArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const DenseGradBlock block(a, 8 * NT);
  const DenseGradBarriers barriers{SharedAddress(shared)};
  constexpr bool kCopies = kFrom == DenseGradFrom::kCopies;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < a.stages; ++i) {
      InitBarrier(barriers.Full(i), kCopies ? 1 : kDenseGradLoaders / 32);
      InitBarrier(barriers.Turned(i), kDenseGradTurners / 32);
      InitBarrier(barriers.Empty(i), kDenseGradWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    ProxyFence();
  }
  const auto locate = [](int p, const int (&box)[kAxes], int (&at)[kAxes]) {
    const int up = p / box[2];
    at[2] = p - up * box[2];
    at[0] = up / box[1];
    at[1] = up - at[0] * box[1];
  };
  auto* x_table = reinterpret_cast<DenseGradPosition*>(shared + a.smem_x);
  for (int p = thread; p < a.positions; p += kDenseGradThreads) {
    int at[kAxes];
    locate(p, a.box, at);
    DenseGradPosition e{0, 0};
    for (int i = 0; i < kAxes; ++i) {
      e.offset += at[i] * static_cast<int>(a.x.step[i]);
      e.at |= at[i] << 10 * i;
    }
    x_table[p] = e;
    if (p % 2 == 0) {
      reinterpret_cast<int*>(shared + a.smem_pairs)[p / 2] =
          ((at[0] * a.y_box[1] + at[1]) * a.y_box[2] + at[2]) * a.y.pitch / 16;
    }
  }
  auto* y_table = reinterpret_cast<DenseGradPosition*>(shared + a.smem_y);
  const int first_box = a.first_box[block.chunk];
  const int boxes = a.first_box[block.chunk + 1] - first_box;
  const int low[kAxes] = {DenseGradLow(a, block.chunk, 0), DenseGradLow(a, block.chunk, 1),
                          DenseGradLow(a, block.chunk, 2)};
  for (int p = thread; p < boxes * a.y_positions; p += kDenseGradThreads) {
    const int box = p / a.y_positions;
    int at[kAxes];
    locate(p - box * a.y_positions, a.y_box, at);
    DenseGradPosition e{0, 0};
    for (int i = 0; i < kAxes; ++i) {
      at[i] = at[i] * a.stride[i] + a.box_first[first_box + box][i];
      e.offset += at[i] * static_cast<int>(a.y.step[i]);
      e.at |= (at[i] - low[i]) << 10 * i;
    }
    y_table[p] = e;
  }
  __syncthreads();
  constexpr int kSums = P * NT * 4, kRegisters = kSums > 128 ? 192 : kSums > 64 ? 176 : 128;
  if (thread < kDenseGradLoaders) {
    if (kRegisters > 128) GiveRegisters<256 - kRegisters>();
    if constexpr (!kCopies) {
      DenseGradLoader<T, kFrom == DenseGradFrom::kRuns>(a, block, barriers, shared, thread).Run();
    } else if (thread == 0) {
      CopyDenseGrad(a, maps, block, barriers, SharedAddress(shared) + a.smem_stages);
    } else if (sizeof(T) == 4 && thread >= kDenseGradLoaders - kDenseGradTurners) {
      TurnDenseGrad(a, block, barriers, shared + a.smem_stages,
                    thread - (kDenseGradLoaders - kDenseGradTurners));
    }
    __syncwarp();
    if (kRegisters > 128) TakeRegisters<128>();  // all store the results
  } else {
    if (kRegisters > 128) TakeRegisters<kRegisters>();
    MultiplyDenseGrad<T, kFrom, NT, P>(a, block, barriers, shared, thread / 128 - 2, thread % 128);
    if (kRegisters > 128) GiveRegisters<128>();
  }
  SyncCluster();
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
  SyncCluster();  // none leaves while others read its results
#endif
}

template <class T, DenseGradFrom kFrom, int NT, int P>
cudaError_t EnqueueDenseGradVariant(const DenseGradPlan& plan, const DenseGradArgs& args,
                                    const DenseGradMaps& maps, cudaStream_t stream) {
  const auto kernel = DenseGrad<T, kFrom, NT, P>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, args.smem);
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

template <class T>
cudaError_t EnqueueDenseGrad(const DenseGradPlan& plan, const DenseGradArgs& args,
                             const DenseGradMaps& maps, cudaStream_t stream) {
  using From = DenseGradFrom;
#define JAXCONV_CASE(NT, P)                                                                   \
  if (plan.variant.tiles == NT && plan.variant.products == P) {                               \
    return plan.from == From::kRows                                                           \
               ? EnqueueDenseGradVariant<T, From::kRows, NT, P>(plan, args, maps, stream)     \
           : plan.from == From::kRuns                                                         \
               ? EnqueueDenseGradVariant<T, From::kRuns, NT, P>(plan, args, maps, stream)     \
               : EnqueueDenseGradVariant<T, From::kCopies, NT, P>(plan, args, maps, stream);  \
  }
  JAXCONV_DENSE_GRAD_VARIANTS(JAXCONV_CASE)
#undef JAXCONV_CASE
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_GRAD_CUH_
