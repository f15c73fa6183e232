// Device part of "dense"; docs/gpu_kernels.md tells the whole story.
//
// A block has two groups of four warps that multiply and eight warps that fetch. A stage of the
// ring of inputs is a box of pixels by up to 128 bytes of channels, swizzled as bulk tensor copies
// leave it; wgmma reads it wherever a tap shifts it to. A step is 32 bytes of channels of one tap,
// a quad of steps is one slot of the ring of weights.
#ifndef JAXCONV_CUDA_DENSE_CUH_
#define JAXCONV_CUDA_DENSE_CUH_

#include "cuda/bulk_tensors.cuh"
#include "cuda/correlate.cuh"
#include "cuda/dense.h"
#include "cuda/dense_pack.cuh"
#include "cuda/dependent_launch.cuh"
#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {

inline constexpr int kDenseGroups = 2, kDenseThreads = 128 * (kDenseGroups + 2);
inline constexpr int kDenseWarps = 4 * kDenseGroups;           // that multiply
inline constexpr int kDenseLoaders = 224;                      // threads that stage rows
inline constexpr int kDenseRounders = 192;                     // threads that round to TF32
inline constexpr int kDenseTurners = 160, kDenseCopiers = 64;  // that turn boxes, and copy words

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

template <bool kShare>
__device__ inline void FetchWeights(const DenseArgs& a, const DenseBarriers& barriers,
                                    uint32_t ring, int quad_bytes) {
  DenseCursor slot;
  const DenseRank rank(a);
  const int blocks = ((1 << a.pair) - 1) << rank.neighbours;  // a bit each
  WaitForPrevious();
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
    const DenseShare share(a, program);
    const int first = QuadsBefore(a, program, share.first);
    const int end = QuadsBefore(a, program, share.end);
    const int64_t tile = int64_t{item.group} * a.column_tiles + item.column_tile;
    const char* from = a.weights +
                       (tile * a.total_steps + program.steps) * (quad_bytes / kDenseQuad) +
                       int64_t{first} * quad_bytes;
    for (int q = first; q < end; ++q, from += quad_bytes) {
      WaitFor(barriers.RingEmpty(slot.at), slot.parity ^ 1);
      ArriveAndExpect(barriers.RingFull(slot.at), quad_bytes);
      if constexpr (kShare) {
        const int bytes = quad_bytes / a.pair, at = rank.pair * bytes;
        CopyBulkToCluster(ring + slot.at * quad_bytes + at, from + at, bytes,
                          barriers.RingFull(slot.at), blocks);
      } else {
        CopyBulk(ring + slot.at * quad_bytes, from, quad_bytes, barriers.RingFull(slot.at));
      }
      slot.Next(a.ring);
    }
    if (a.resident) return;
  }
}

__device__ inline void FetchBoxes(const DenseArgs& a, const DenseMaps& maps,
                                  const DenseBarriers& barriers, uint32_t in) {
  DenseCursor buffer;
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
    const DenseShare share(a, program);
    int s = program.first_segment + share.first / a.chunks, chunk = share.first % a.chunks;
    for (int stage = share.first; stage < share.end; ++stage) {
      const DenseSegment& segment = a.segment[s];
      int source[kAxes];
#pragma unroll
      for (int i = 0; i < kAxes; ++i) source[i] = item.q[i] + segment.first[i];
      const CUtensorMap* map = &maps.map[segment.map];
      const int channel = item.group * a.cg + chunk * a.chunk_channels;
      const uint32_t to = in + buffer.at * a.stage_bytes, full = barriers.InFull(buffer.at);
      WaitFor(barriers.InEmpty(buffer.at), buffer.parity ^ 1);
      ArriveAndExpect(full, a.pixels * a.row_bytes);
      if (a.images) {
        CopyBox(to, map, channel, item.n, source[2], source[1], source[0], full);
      } else {
        for (int piece = 0; piece < a.pieces; ++piece) {
          const int w = piece * a.piece_length;
          CopyBox(to + w * a.row_bytes, map, channel, source[2] + w, source[1], source[0], item.n,
                  full);
        }
      }
      buffer.Next(a.buffers);
      if (++chunk == a.chunks) {
        chunk = 0;
        ++s;
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
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseShare share(a, a.program[DenseItem(a, walk.index).program]);
    for (int s = share.first; s < share.end; ++s) {
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
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
    // Of a family, chunk by chunk; of phases one is for all.
    const int stages = a.paired ? 1 : a.members;
    for (int s = 0; s < program.segments; s += a.members) {
      for (int i = 0; i < a.chunks * stages; ++i) {
        const int chunk = i / stages, c0 = chunk * a.chunk_channels;
        const DenseSegment& segment = a.segment[program.first_segment + s + i - chunk * stages];
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

// Boxes of channels first as they are, for TurnBoxes.
__device__ inline void FetchRaw(const DenseArgs& a, const DenseMaps& maps,
                                const DenseBarriers& barriers, uint32_t raw) {
  DenseCursor box;
  const int bytes = a.box_n * a.raw_box * (a.row_bytes / a.chunk_channels);
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
    for (int s = 0; s < program.segments; s += a.members) {
      const DenseSegment& segment = a.segment[program.first_segment + s];
      const CUtensorMap* map = &maps.map[segment.map];
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int channel = item.group * a.cg + chunk * a.chunk_channels;
        const uint32_t to = raw + box.at * a.raw_bytes, full = barriers.RawFull(box.at);
        WaitFor(barriers.RawEmpty(box.at), box.parity ^ 1);
        ArriveAndExpect(full, a.pieces * bytes);
        for (int piece = 0; piece < a.pieces; ++piece) {
          const int w =
              item.q[2] * a.axis[2].si + segment.first[2] - segment.lead + piece * a.piece_length;
          CopyBox(to + piece * a.raw_piece, map, w, item.q[1] + segment.first[1],
                  item.q[0] + segment.first[0], channel, item.n, full);
        }
        box.Next(a.raws);
      }
    }
  }
}

// Arrives at a barrier once all that this thread has asked for by cp.async is there.
__device__ inline void ArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// The same word by word, where rows do not begin at multiples of 16 bytes. A thread has a place of
// the box in all channels.
__device__ inline void FetchWords(const DenseArgs& a, const DenseBarriers& barriers, uint32_t raw,
                                  int thread) {
  DenseCursor box;
  const int places = a.box_n * a.raw_channel, c_step = static_cast<int>(a.in_c_step);
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
    for (int s = 0; s < program.segments; s += a.members) {
      const DenseSegment& segment = a.segment[program.first_segment + s];
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int channel = item.group * a.cg + chunk * a.chunk_channels;
        const int channels = min(a.chunk_channels, a.cg - chunk * a.chunk_channels);
        const float* in =
            static_cast<const float*>(a.in) + item.n * a.in_n_step + channel * a.in_c_step;
        WaitFor(barriers.RawEmpty(box.at), box.parity ^ 1);
        for (int place = thread; place < places; place += kDenseCopiers) {
          const int row = Divide(place, a.by_raw_row), plane = Divide(row, a.by_length[1]);
          const int n = Divide(plane, a.by_length[0]);
          const int at[kAxes] = {plane - n * a.axis[0].length, row - plane * a.axis[1].length,
                                 place - row * a.raw_row};
          bool inside = item.n + n < a.n;
          int offset = static_cast<int>(n * a.in_n_step);
#pragma unroll
          for (int i = 0; i < kAxes; ++i) {
            const int source =
                i == 2 ? item.q[2] * a.axis[2].si + segment.first[2] - segment.lead + at[2]
                       : (item.q[i] + at[i]) * a.axis[i].si + segment.first[i];
            inside = inside && static_cast<unsigned>(source) < a.axis[i].in_size;
            offset += static_cast<int>(source * a.axis[i].in_step);
          }
          const float* from = in + (inside ? offset : 0);
          uint32_t to = raw + box.at * a.raw_bytes +
                        (place + n * (a.raw_box - a.raw_channel)) * static_cast<int>(sizeof(float));
#pragma unroll 8
          for (int c = 0; c < channels; ++c) {
            CopyOrZero4(to + c * a.raw_channel * 4, from + (inside ? c * c_step : 0), inside);
          }
        }
        ArriveAfterCopies(barriers.RawFull(box.at));
        box.Next(a.raws);
      }
    }
  }
}

// Turns them into what a bulk tensor copy of channels last leaves: of each residue along the last
// axis a stage, or one for all phases. A thread has 32 bytes of channels of a pixel at once.
template <class T>
__device__ inline void TurnBoxes(const DenseArgs& a, const DenseBarriers& barriers, char* in,
                                 const char* raw, const int* sources, int thread) {
  constexpr int kC = 2 * kBlockChannels<T>;
  using Bits = std::conditional_t<sizeof(T) == 4, float, uint16_t>;
  const int pixels = a.pixels, row_bytes = a.row_bytes, raw_channel = a.raw_channel;
  DenseCursor box, buffer;
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseProgram& program = a.program[DenseItem(a, walk.index).program];
    for (int s = 0; s < program.segments; s += a.members) {
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int channels = a.cg - chunk * a.chunk_channels;
        const int steps = chunk + 1 < a.chunks ? a.full_steps : a.last_steps;
        WaitFor(barriers.RawFull(box.at), box.parity);
        for (int member = 0; member < (a.paired ? 1 : a.members); ++member) {
          const int lead = a.segment[program.first_segment + s + member].lead - a.raw_lead;
          const Bits* first = reinterpret_cast<const Bits*>(raw + box.at * a.raw_bytes) + lead;
          char* stage = in + buffer.at * a.stage_bytes;
          WaitFor(barriers.InEmpty(buffer.at), buffer.parity ^ 1);
          const auto turn = [&](auto whole) {
            const auto load = [&](int p, int step, Bits(&v)[kC]) {
              const Bits* from = first + sources[p] + step * kC * raw_channel;
#pragma unroll
              for (int c = 0; c < kC; ++c) {
                const bool has = decltype(whole)::value || step * kC + c < channels;
                v[c] = has ? from[c * raw_channel] : Bits{};
              }
            };
            const auto store = [&](int p, int step, const Bits(&v)[kC]) {
              const int place = p * row_bytes, swizzled = place >> 3 & a.swizzle;
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const Bits* c = v + half * kC / 2;
                uint4 block;
                if constexpr (sizeof(T) == 4) {
                  block = make_uint4(RoundTF32(c[0]), RoundTF32(c[1]), RoundTF32(c[2]),
                                     RoundTF32(c[3]));
                } else {
                  const auto pair = [&](int i) { return c[i] | uint32_t{c[i + 1]} << 16; };
                  block = make_uint4(pair(0), pair(2), pair(4), pair(6));
                }
                *reinterpret_cast<uint4*>(stage + place + (step * 32 + half * 16 ^ swizzled)) =
                    block;
              }
            };
            int p = thread, step = 0;
            const auto wrap = [&] {
#pragma unroll
              for (int i = 0; i < 2; ++i) {  // a tile has 128 pixels or more
                const bool up = p >= pixels;
                p -= up ? pixels : 0;
                step += up;
              }
            };
            const auto next = [&] {
              p += kDenseTurners;
              wrap();
            };
            wrap();
            // Two pixels at once, as a load takes as long as two.
            int left = (pixels * steps - thread + kDenseTurners - 1) / kDenseTurners;
            for (; left > 1; left -= 2) {
              Bits v[2][kC];
              const int p0 = p, step0 = step;
              load(p, step, v[0]);
              next();
              load(p, step, v[1]);
              store(p0, step0, v[0]);
              store(p, step, v[1]);
              next();
            }
            if (left > 0) {
              Bits v[kC];
              load(p, step, v);
              store(p, step, v);
            }
          };
          if (steps * kC <= channels) {
            turn(std::true_type{});
          } else {
            turn(std::false_type{});
          }
          ProxyFence();
          Arrive(barriers.InFull(buffer.at));
          buffer.Next(a.buffers);
        }
        Arrive(barriers.RawEmpty(box.at));
        box.Next(a.raws);
      }
    }
  }
}

// The 64 pixels that a group of warps multiplies at once lie in groups of eight neighbours along
// the last axis, or of eight images at a position: all of them go on along that axis, or each lies
// beyond the other along another one. A group of warps has MT of these patches, which make up its
// part of the tile.
struct DensePatch {
  int at[kAxes + 1];  // of the first pixel in the part: n, d, h, w
  __device__ DensePatch(const DenseArgs& a, int index) {
    const int part[kAxes + 1] = {a.part_n, a.axis[0].part, a.axis[1].part, a.axis[2].part};
    for (int i = kAxes; i >= 0; --i) {
      const int count = part[i] / a.patch[i];
      at[i] = index % count * a.patch[i];
      index /= count;
    }
  }
  __device__ int Place(const int (&pitch)[kAxes + 1]) const {
    return at[0] * pitch[0] + at[1] * pitch[1] + at[2] * pitch[2] + at[3] * pitch[3];
  }
};

// Blocks that share an item each add up and store some of its columns: whole stores of them, and
// whole fours of tiles.
__device__ inline bool StoresTile(const DenseArgs& a, const DenseRank& rank, int tile) {
  return tile / 4 * 32 / max(a.store_columns, 32) % a.split == rank.split;
}

// The sums of blocks that share an item, added up in the order of their ranks from the block's own
// on, so that not all read the same block's: of a block's own columns. All blocks put theirs at
// `sums` first, sixteen bytes a thread and tile.
template <int MT, int NT>
__device__ inline void AddUp(const DenseArgs& a, const DenseRank& mine, uint32_t sums,
                             float (&acc)[MT][4 * NT]) {
  constexpr int kHop = 128 * kDenseGroups * 16, kTiles = 4 / MT;
#pragma unroll
  for (int j = 0; j < NT; ++j) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      const float* v = acc[mt] + 4 * j;
      StoreShared(sums + (j * MT + mt) * kHop, make_float4(v[0], v[1], v[2], v[3]));
    }
  }
  MeetCluster();
#pragma unroll
  for (int first = 0; first < NT; first += kTiles) {
    if (!StoresTile(a, mine, first)) continue;
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) acc[mt][4 * first + i] = 0;
    }
    for (int i = 0; i < a.split; ++i) {
      const int rank = mine.pair + (mine.split + i) % a.split * a.pair;
      float4 v[kTiles][MT];  // under way at once
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          v[j][mt] = LoadRemote(sums + ((first + j) * MT + mt) * kHop, rank);
        }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          float* to = acc[mt] + 4 * (first + j);
          to[0] += v[j][mt].x;
          to[1] += v[j][mt].y;
          to[2] += v[j][mt].z;
          to[3] += v[j][mt].w;
        }
      }
    }
  }
}

// Calls body with `index` as a constant, since registers have no index: by a table of branches.
template <int kCount, class Body>
__device__ inline void WithConstant(int index, Body body) {
  static_assert(kCount <= 16);
  const auto run = [&](auto number) {
    if constexpr (kCount > decltype(number)::value) body(number);
  };
#define JAXCONV_CASE(number) \
  case number:               \
    return run(std::integral_constant<int, number>{})
#define JAXCONV_FOUR_CASES(number) \
  JAXCONV_CASE(number);            \
  JAXCONV_CASE(number + 1);        \
  JAXCONV_CASE(number + 2);        \
  JAXCONV_CASE(number + 3)
  switch (index) {
    JAXCONV_FOUR_CASES(0);
    JAXCONV_FOUR_CASES(4);
    JAXCONV_FOUR_CASES(8);
    JAXCONV_FOUR_CASES(12);
  }
#undef JAXCONV_FOUR_CASES
#undef JAXCONV_CASE
}

// A bulk copy takes a group's part of the results from one of kStores stages, in turn. Past the
// barrier all know that what left the next one has been read.
template <int kStores>
__device__ inline void SendBox(const DenseArgs& a, const CUtensorMap* map, const DenseItem& item,
                               const char* stage, int channel, int group, int thread) {
  if (thread == 0) WaitForReads<kStores - 2>();
  ProxyFence();
  SyncGroup(group);
  if (thread != 0) return;
  int q[kAxes];
#pragma unroll
  for (int i = 0; i < kAxes; ++i) {
    q[i] = item.q[i] + PartStart(a.axis[i].part, a.axis[i].box, group);
  }
  const int n = item.n + PartStart(a.part_n, a.box_n, group);
  if (a.images) {
    StoreBox(map, SharedAddress(stage), channel, n, q[2], q[1], q[0]);
  } else {
    StoreBox(map, SharedAddress(stage), channel, q[2], q[1], q[0], n);
  }
}

// Results leave by way of shared memory, `store_columns` at a time: channels last as boxes that the
// copy units write while the next tile is multiplied.
template <class T, class Out, int MT, int NT, bool kSplit>
__device__ inline void StoreDense(const DenseArgs& a, const DenseMaps& maps, const DenseRank& rank,
                                  const DenseItem& item, char* stage, const int (&place)[MT][2],
                                  int group, const float (&acc)[MT][4 * NT], int& buffer,
                                  int thread) {
  const int lane = thread % 32, quad = lane % 4;
  const int first = item.column_tile * NT * 8;
  int phase = a.program[item.program].phase, channel = item.group * a.jg + first;
  if (a.fused) {
    phase = first / a.jg;
    channel -= phase * a.jg;
  }
  const int swizzled = lane / 4 * a.store_bytes >> 3 & a.store_swizzle;
  const int columns = min(NT * 8, a.columns - first);
  // Unrolled over some tiles alone, for the sake of the instruction cache: a block runs this a few
  // times, and with the stores in every tile it waited for instructions as long as it stored.
  const auto store = [&](auto unrolled) {
    constexpr int kTiles = decltype(unrolled)::value;
#pragma unroll 1
    for (int j = 0; j * 8 < columns; j += kTiles) {
      const int at = j * 8 & (a.store_columns - 1);  // in the stage
      const bool mine = !kSplit || StoresTile(a, rank, j);
      char* to = stage + buffer * a.store_pitch;
      const auto put = [&](auto index) {
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          constexpr int kFirst = decltype(index)::value * kTiles;
          const int column = at + k * 8 + 2 * quad;
          float bias[2] = {0, 0};
          if (a.bias != nullptr) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              bias[i] = ToAccumulator(static_cast<const Out*>(a.bias)[channel + column + i]);
            }
          }
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float* v = acc[mt] + 4 * (kFirst + k) + 2 * h;
              const int bytes = column * static_cast<int>(sizeof(Out));
              struct alignas(2 * sizeof(Out)) Pair {
                Out v[2];
              };
              *reinterpret_cast<Pair*>(to + place[mt][h] + (bytes ^ swizzled)) = {
                  {FromAccumulator<Out>(v[0] + bias[0]), FromAccumulator<Out>(v[1] + bias[1])}};
            }
          }
        }
      };
      if (mine) WithConstant<NT / kTiles>(j / kTiles, put);
      if (at + kTiles * 8 < a.store_columns) continue;
      if (mine) {
        SendBox<2>(a, &maps.map[a.in_maps + (a.fused ? phase : item.program)], item, to, channel,
                   group, thread);
      }
      if (mine) buffer ^= 1;
      channel += a.store_columns;
      if (a.fused && channel == (item.group + 1) * a.jg) {
        channel -= a.jg;
        ++phase;
      }
    }
  };
  constexpr int kWide = 64 / static_cast<int>(sizeof(Out)) / 8;
  if constexpr (NT % kWide == 0) {
    if (a.store_columns >= kWide * 8) return store(std::integral_constant<int, kWide>{});
  }
  store(std::integral_constant<int, 1>{});
}

// A store without a branch, which takes longer than a store.
template <class Out>
__device__ inline void StoreIf(bool condition, Out* to, Out v) {
  if constexpr (sizeof(Out) == 4) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.f32 [%0], %1;}" ::"l"(to),
                 "f"(v), "r"(int{condition})
                 : "memory");
  } else {
    uint16_t bits;
    memcpy(&bits, &v, 2);
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b16 [%0], %1;}" ::"l"(to),
                 "h"(bits), "r"(int{condition})
                 : "memory");
  }
}

// Channels first: the pixels of `store_columns` channels at a time, with both phases of the last
// axis beside each other where a program has both. They leave by bulk copies, or by rows. Lanes'
// channels are whole rows of banks apart, so half of the lanes store the other eight pixels first.
template <class Out, int MT, int NT, int Phases>
__device__ inline void StoreRows(const DenseArgs& a, const DenseMaps& maps, const DenseItem& item,
                                 char* stages, const int (&place)[MT][2], int group,
                                 const float (&acc)[Phases * MT][4 * NT], int& buffer, int thread) {
  constexpr int kRuns = 2 * MT * Phases;  // of 32 pixels
  const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
  const bool turn = quad & 1;
  const int first = item.column_tile * NT * 8, columns = min(NT * 8, a.columns - first);
  int channel = item.group * a.jg + first;
  int q[kAxes];  // of the part
#pragma unroll
  for (int i = 0; i < kAxes; ++i) {
    q[i] = item.q[i] + PartStart(a.axis[i].part, a.axis[i].box, group);
  }
  const int n = item.n + PartStart(a.part_n, a.box_n, group);
  // Of this thread's pixels of each run, in the output, from the part's first; -1: outside.
  int offset[kRuns];
  const int pixels = a.axis[0].part * a.axis[1].part * a.axis[2].part * Phases;  // of an image
  const int log_pixels = 31 - __clz(pixels);
  Out* out = static_cast<Out*>(a.out) + n * a.out_n_step + channel * a.out_c_step;
  if (!a.sends) {
    const int phase = a.program[item.program].phase, up = phase / a.axis[2].so;
    const int r[kAxes] = {up / a.axis[1].so, up % a.axis[1].so, phase % a.axis[2].so};
    int o[kAxes];
#pragma unroll
    for (int x = 0; x < kAxes; ++x) {
      o[x] = q[x] * a.axis[x].so + r[x];
      out += o[x] * a.axis[x].out_step;
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      int rest = i * 32 + lane, at[kAxes];
      const auto take = [&](int size) {
        const int mine = rest & (size - 1);
        rest >>= 31 - __clz(size);  // a power of two
        return mine;
      };
      at[2] = take(a.axis[2].part * Phases);
      at[1] = take(a.axis[1].part);
      at[0] = take(a.axis[0].part);
      offset[i] = static_cast<int>(rest * a.out_n_step);
      bool inside = n + rest < a.n;
#pragma unroll
      for (int x = 0; x < kAxes; ++x) {
        const int step = x == 2 && Phases > 1 ? at[x] : at[x] * a.axis[x].so;
        inside = inside && o[x] + step < a.axis[x].out_size;
        offset[i] += static_cast<int>(step * a.axis[x].out_step);
      }
      if (!inside) offset[i] = -1;
    }
  }
#pragma unroll 1
  for (int j = 0; j * 8 < columns; ++j) {
    char* stage = stages + buffer * a.store_pitch;
    Out* to = reinterpret_cast<Out*>(stage) +
              ((j * 8 & (a.store_columns - 1)) + 2 * quad) * a.out_channel;
    float bias[2] = {0, 0};
    if (a.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bias[i] = ToAccumulator(
            static_cast<const Out*>(a.bias)[item.group * a.jg + first + j * 8 + 2 * quad + i]);
      }
    }
    WithConstant<NT>(j, [&](auto index) {
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            struct alignas(Phases * sizeof(Out)) Neighbours {
              Out v[Phases];
            } both;
#pragma unroll
            for (int phase = 0; phase < Phases; ++phase) {
              const float* v = acc[phase * MT + mt] + 4 * decltype(index)::value + i;
              both.v[phase] = FromAccumulator<Out>((turn ? v[2 - 2 * h] : v[2 * h]) + bias[i]);
            }
            const int pixel = (turn ? place[mt][1 - h] : place[mt][h]) * Phases;
            *reinterpret_cast<Neighbours*>(to + i * a.out_channel + pixel) = both;
          }
        }
      }
    });
    if (((j + 1) * 8 & (a.store_columns - 1)) != 0) continue;
    if (a.sends) {
      if (thread == 0) WaitForReads<0>();  // of the other stage
      ProxyFence();
      SyncGroup(group);
      if (thread == 0) {
        StoreBox(&maps.map[a.in_maps + item.program], SharedAddress(stage), q[2] * Phases, q[1],
                 q[0], channel, n);
      }
    } else {
      SyncGroup(group);
#pragma unroll 1
      for (int c = warp; c < a.store_columns; c += 4) {
        const Out* mine = reinterpret_cast<const Out*>(stage) + c * a.out_channel;
        constexpr int kBatch = kRuns < 4 ? kRuns : 4;  // under way before the first is stored
#pragma unroll
        for (int first = 0; first < kRuns; first += kBatch) {
          Out v[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            const int at = (first + i) * 32 + lane;
            v[i] = mine[(at >> log_pixels) * a.out_image + (at & (pixels - 1))];
          }
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            StoreIf(offset[first + i] >= 0, out + c * a.out_c_step + offset[first + i], v[i]);
          }
        }
      }
      out += a.store_columns * a.out_c_step;
    }
    buffer ^= 1;
    channel += a.store_columns;
  }
}

// Where the taps of the last axis are columns: a group's rows of 64 sources go to shared memory one
// after the other, [source][tap][channel], and an output adds up what each tap has at its source.
// A tile's outputs are those whose sources are all in it, or outside of the tensor.
template <class Out, int MT, int NT>
__device__ inline void StoreFolded(const DenseArgs& a, const DenseItem& item, float* products,
                                   int group, const float (&acc)[MT][4 * NT], int thread) {
  constexpr int kSources = 64;
  constexpr int kPitch = NT * 8 + 8;  // keeps stores of accumulators free of bank conflicts
  const int warp = thread / 32, lane = thread % 32;
  float* to = products + (warp * 16 + lane / 4) * kPitch + lane % 4 * 2;
  const DenseAxis& w = a.axis[2];
  // A thread adds up four channels of every so manieth output of a row.
  const int fours = a.fold_channels / 4, hop = 128 / fours;
  const int mine = thread / fours, four = thread - mine * fours;
  const int channel = item.group * a.jg + item.column_tile * a.fold_channels + four * 4;
  float bias[4] = {};
  if (a.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bias[i] = ToAccumulator(static_cast<const Out*>(a.bias)[channel + i]);
  }
  const int origin = item.q[2] + a.fold_lead;  // the output whose lowest source is the first
  const int begin = item.q[2] == 0 ? 0 : origin;
  const int end = item.q[2] / w.box + 1 == w.q_tiles ? w.out_size : min(origin + w.box, w.out_size);
  const int phase = a.program[item.program].phase / w.so, up = phase / a.axis[1].so;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
    for (int j = 0; j < NT; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(to + h * 8 * kPitch + j * 8) =
            make_float2(acc[mt][4 * j + 2 * h], acc[mt][4 * j + 2 * h + 1]);
      }
    }
    SyncGroup(group);
    const DensePatch patch(a, mt);
    const int n = item.n + patch.at[0] + PartStart(a.part_n, a.box_n, group);
    int o[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const DenseAxis& x = a.axis[i];
      o[i] = (item.q[i] + patch.at[i + 1] + PartStart(x.part, x.box, group)) * x.so +
             (i == 0 ? up : phase - up * a.axis[1].so);
    }
    const bool inside = n < a.n && o[0] < a.axis[0].out_size && o[1] < a.axis[1].out_size;
    Out* out = static_cast<Out*>(a.out) + n * a.out_n_step + o[0] * a.axis[0].out_step +
               o[1] * a.axis[1].out_step + channel;
    for (int q = begin + mine; inside && mine < hop && q < end; q += hop) {
      float sum[4] = {bias[0], bias[1], bias[2], bias[3]};
      int source = q - origin + a.fold_first;
      const float* from = products + source * kPitch + four * 4;
#pragma unroll 4
      for (int t = 0; t < a.fold_taps; ++t) {
        if (static_cast<unsigned>(source) < kSources) {
          const float4 v = *reinterpret_cast<const float4*>(from);
          sum[0] += v.x;
          sum[1] += v.y;
          sum[2] += v.z;
          sum[3] += v.w;
        }
        source += a.fold_step;
        from += a.fold_step * kPitch + a.fold_channels;
      }
      struct alignas(4 * sizeof(Out)) Four {
        Out v[4];
      };
      *reinterpret_cast<Four*>(out + q * w.out_step) = {
          {FromAccumulator<Out>(sum[0]), FromAccumulator<Out>(sum[1]), FromAccumulator<Out>(sum[2]),
           FromAccumulator<Out>(sum[3])}};
    }
    SyncGroup(group);
  }
}

// Groups beside each other: each has all phases as columns, and a phase's pixels have the channels
// of all groups.
template <class Out, int Sets, int NT>
__device__ inline void StoreGrouped(const DenseArgs& a, const DenseMaps& maps,
                                    const DenseItem& item, char* stages, const int (&place)[2],
                                    int group, const float (&acc)[Sets][4 * NT], int& buffer,
                                    int thread) {
  constexpr int kStores = DenseStores(DenseMode::kGrouped);
  const int lane = thread % 32, own = lane % 4 * 2, channels = a.jg / Sets;
  const int swizzled = lane / 4 * a.store_bytes >> 3 & a.store_swizzle;
  int phase = 0, first = 0;  // of a group's channels
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    char* to = stages + buffer * a.store_pitch;
#pragma unroll
    for (int set = 0; set < Sets; ++set) {
      const int channel = set * channels + first + own;
      float bias[2] = {0, 0};
      if (a.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bias[i] = ToAccumulator(static_cast<const Out*>(a.bias)[item.group * a.jg + channel + i]);
        }
      }
      const int bytes = channel * static_cast<int>(sizeof(Out)) ^ swizzled;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* v = acc[set] + 4 * j + 2 * h;
        struct alignas(2 * sizeof(Out)) Pair {
          Out v[2];
        };
        *reinterpret_cast<Pair*>(to + place[h] + bytes) = {
            {FromAccumulator<Out>(v[0] + bias[0]), FromAccumulator<Out>(v[1] + bias[1])}};
      }
    }
    first += 8;
    if (first < channels) continue;
    SendBox<kStores>(a, &maps.map[a.in_maps + phase], item, to, item.group * a.jg, group, thread);
    buffer = (buffer + 1) % kStores;
    first = 0;
    ++phase;
  }
}

// kExact: the tensor cores cut off what they add to, so each quad starts from zero and is added to
// the sums in float32. kGrouped: MT is not of pixels, but of groups beside each other in a pixel,
// and each step is of one of them. kShare: neighbours fetch weights for each other. kSplit:
// besides, blocks of a cluster share each item's stages; a block has but one item, since sums take
// the place of what it fetched. kPaired: both phases of the last axis have sums of their own, which
// are multiplied in turn from the same stages.
template <class T, int MT, int NT, DenseMode kMode>
__device__ inline void MultiplyDense(const DenseArgs& a, const DenseMaps& maps,
                                     const DenseBarriers& barriers, uint32_t in, uint32_t ring,
                                     const int4* entries, char* stage, int group, int thread) {
  constexpr int kStepBytes = NT * 256, kQuadBytes = kDenseQuad * kStepBytes;
  constexpr bool kExact = kMode == DenseMode::kExact, kSplit = kMode == DenseMode::kSplit;
  constexpr bool kShare = kSplit || kMode == DenseMode::kShare;
  constexpr bool kGrouped = kMode == DenseMode::kGrouped, kPaired = kMode == DenseMode::kPaired;
  constexpr int kPatches = kGrouped ? 1 : MT, kPhases = kPaired ? 2 : 1;
  const int warp = thread / 32, lane = thread % 32;
  // Descriptors of a tap without a shift: what they have in common, and the addresses.
  const uint32_t pixel_high = PixelDescriptor(0, a.in_eights * a.row_bytes, a.row_bytes) >> 32;
  uint32_t pixel[kPatches];
  int place[kPatches][2];  // of this lane's pixels in the stage for results
#pragma unroll
  for (int mt = 0; mt < kPatches; ++mt) {
    DensePatch patch(a, mt);
    const int results = patch.Place(a.out_pitch) + lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      place[mt][h] =
          (results + (warp * 2 + h) * a.out_eights) * (HasRows<kMode>(a) ? 1 : a.store_bytes);
    }
    patch.at[0] += PartStart(a.part_n, a.box_n, group);
#pragma unroll
    for (int i = 0; i < kAxes; ++i) {
      patch.at[i + 1] += PartStart(a.axis[i].part, a.axis[i].box, group);
    }
    pixel[mt] = static_cast<uint32_t>(
        PixelDescriptor(in + patch.Place(a.in_pitch) * a.row_bytes, 0, a.row_bytes));
  }
  const bool round = sizeof(T) == 4 && !HasRows<kMode>(a);
  float acc[MT * kPhases][4 * NT], sum[kExact ? MT : 1][kExact ? 4 * NT : 1];
  DenseCursor buffer, slot;
  int stage_buffer = 0;
  const DenseRank rank(a);
  const auto release_slot = [&](int i) {
    if constexpr (kShare) {
      if (lane < a.pair) ArriveRemote(barriers.RingEmpty(i), rank.neighbours + lane);
    } else {
      if (lane == 0) Arrive(barriers.RingEmpty(i));
    }
  };
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
#pragma unroll
    for (int mt = 0; mt < MT * kPhases; ++mt) {
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
    int segment = program.first_segment, chunk = 0, left = 0, quads = program.quads;
    if constexpr (kSplit) {
      const DenseShare share(a, program);
      segment += share.first / a.chunks;
      chunk = share.first % a.chunks;
      quads = QuadsBefore(a, program, share.end) - QuadsBefore(a, program, share.first);
    }
    int member = 0, phase = 0;             // the next segment of a family; where sums go
    int used_slot = -1, used_buffer = -1;  // free once the products under way are done
    const int4* entry = entries;
    int4 shift{};
    const auto free = [&] {
      __syncwarp();
      if (used_slot >= 0 && !a.resident) release_slot(used_slot);
      if (used_buffer >= 0 && lane == 0) Arrive(barriers.InEmpty(used_buffer));
    };
    for (int quad = 0; quad < quads; ++quad) {
      if (left <= 0) {
        const DenseSegment& s = a.segment[segment + member];
        const bool last = chunk + 1 == a.chunks;
        left = s.taps * (last ? a.last_steps : a.full_steps);
        entry = entries + s.entries +
                (last ? (s.taps * a.full_steps + kDenseQuad - 1) / kDenseQuad : 0);
        shift = Uniform(*entry);
        const bool waits = !kPaired || member == 0;
        if constexpr (kPaired) phase = s.sums;
        if (!HasRows<kMode>(a) || ++member == a.members) {
          member = 0;
          if (++chunk == a.chunks) {
            chunk = 0;
            segment += HasRows<kMode>(a) ? a.members : 1;
          }
        }
        if (waits)
          WaitFor(round ? barriers.InRounded(buffer.at) : barriers.InFull(buffer.at),
                  buffer.parity);
      }
      WaitFor(barriers.RingFull(slot.at), slot.parity);
      const uint64_t first_weights = Descriptor(ring, 128, 256);
      const uint32_t weights_high = first_weights >> 32;
      uint32_t weights = static_cast<uint32_t>(first_weights) + slot.at * (kQuadBytes / 16);
      const auto multiply = [&](auto phase, int step, int shift, bool first = false) {
        const int add = !(kExact && first);
        const auto run = [&](float* sums, uint32_t at_shift) {
          GroupMma<T, NT>::Run(sums, uint64_t{pixel_high} << 32 | at_shift,
                               uint64_t{weights_high} << 32 | weights, add);
        };
        if constexpr (kGrouped) {
          run(acc[step % MT], pixel[0] + shift);
        } else {
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
            run(acc[decltype(phase)::value * MT + mt], pixel[mt] + shift);
          }
        }
        weights += kStepBytes / 16;
      };
      const int at = buffer.at * (a.stage_bytes / 16);
      const auto multiply_quad = [&](auto phase) {
        if (left >= kDenseQuad) {
          GroupFence();
          multiply(phase, 0, at + shift.x, true);
          multiply(phase, 1, at + shift.y);
          multiply(phase, 2, at + shift.z);
          multiply(phase, 3, at + shift.w);
        } else if constexpr (kGrouped) {
          GroupFence();  // a tap has four steps, or two
          multiply(phase, 0, at + shift.x);
          multiply(phase, 1, at + shift.y);
        } else {
          for (int k = 0; k < left; ++k) {
            GroupFence();
            multiply(phase, k, at + shift.x, k == 0);
            shift.x = shift.y;
            shift.y = shift.z;
          }
        }
        GroupCommit();
      };
      if (kPaired && phase == 1) {
        multiply_quad(std::integral_constant<int, kPhases - 1>{});
      } else {
        multiply_quad(std::integral_constant<int, 0>{});
      }
      left -= kDenseQuad;
      shift = Uniform(*++entry);
      if constexpr (!kExact) {
        WaitForProducts<1>();  // of the quad before
        free();
      }
      used_slot = slot.at;
      const bool read = left <= 0 && (!kPaired || member == 0);  // all of the stage
      used_buffer = read ? buffer.at : -1;
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
      if (read) buffer.Next(a.buffers);
    }
    WaitForProducts<0>();
    free();
    if constexpr (kSplit) {
      SyncMultipliers();  // all products are done
      AddUp<MT, NT>(a, rank, in + (group * 128 + thread) * 16, acc);
    }
    const auto results = [&]() -> const float (&)[MT * kPhases][4 * NT] {
      if constexpr (kExact) {
        return sum;
      } else {
        return acc;
      }
    };
    const auto store = [&](auto out, auto rows) {
      if constexpr (decltype(rows)::value) {
        StoreRows<decltype(out), MT, NT, kPhases>(a, maps, item, stage, place, group, results(),
                                                  stage_buffer, thread);
      } else if constexpr (kGrouped) {
        StoreGrouped<decltype(out), MT, NT>(a, maps, item, stage, place[0], group, acc,
                                            stage_buffer, thread);
      } else if constexpr (kMode == DenseMode::kFold) {
        StoreFolded<decltype(out), MT, NT>(a, item, reinterpret_cast<float*>(stage), group, acc,
                                           thread);
      } else {
        StoreDense<T, decltype(out), MT, NT, kSplit>(a, maps, rank, item, stage, place, group,
                                                     results(), stage_buffer, thread);
      }
    };
    const auto store_as = [&](auto out) {
      if constexpr (kMode == DenseMode::kExact) {
        if (a.rows) return store(out, std::true_type{});
      }
      store(out, std::bool_constant < kMode == DenseMode::kRows || kPaired > {});
    };
    if (sizeof(T) == 4 || a.out_f32) {
      store_as(float{});
    } else {
      store_as(T{});
    }
    if constexpr (kSplit) break;
  }
  if constexpr (kShare) MeetCluster();  // none leaves while others use its barriers or sums
  if (thread == 0) WaitForStores();
}

#endif

template <class T, int MT, int NT, DenseMode kMode>
__global__ void __launch_bounds__(kDenseThreads, 1)
    Dense(const __grid_constant__ DenseMaps maps, const __grid_constant__ DenseArgs a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  const int thread = threadIdx.x, lane = thread % 32;
  int* sources = reinterpret_cast<int*>(shared + a.smem_sources);
  int* entries = reinterpret_cast<int*>(shared + a.smem_entries);
  const DenseBarriers barriers{SharedAddress(shared)};
  const uint32_t in = SharedAddress(shared) + a.smem_in, ring = SharedAddress(shared) + a.smem_ring;
  if (thread == 0) {
    for (int i = 0; i < a.buffers; ++i) {
      InitBarrier(barriers.InFull(i), !HasRows<kMode>(a) ? 1
                                      : a.raws > 0       ? kDenseTurners
                                                         : kDenseLoaders);
      InitBarrier(barriers.InRounded(i), kDenseRounders);
      InitBarrier(barriers.InEmpty(i), kDenseWarps);
    }
    for (int i = 0; i < a.ring; ++i) {
      InitBarrier(barriers.RingFull(i), 1);
      InitBarrier(barriers.RingEmpty(i), kDenseWarps * a.pair);
    }
    for (int i = 0; HasRows<kMode>(a) && i < a.raws; ++i) {
      InitBarrier(barriers.RawFull(i), a.boxes ? 1 : kDenseCopiers);
      InitBarrier(barriers.RawEmpty(i), kDenseTurners);
    }
    FenceBarriers();
    ProxyFence();
  }
  if (HasRows<kMode>(a)) {
    const int d = a.axis[0].length, h = a.axis[1].length, w = a.axis[2].length;
    const int piece_elements = a.raw_piece * a.chunk_channels / a.row_bytes;
    for (int p = thread; p < a.pixels; p += kDenseThreads) {
      const int row = p / w, plane = row / h, n = plane / d,
                at[kAxes] = {plane % d, row % h, p % w};
      if (a.raws > 0) {
        const int element = at[2] * a.axis[2].si + a.raw_lead, piece = element / a.piece_length;
        sources[p] = n * a.raw_box + at[0] * a.raw_plane + at[1] * a.raw_row +
                     piece * piece_elements + element - piece * a.piece_length;
      } else {
        sources[p] = PackCoordinates(n, at[0], at[1], at[2]);
      }
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
  constexpr bool kShare = kMode == DenseMode::kShare || kMode == DenseMode::kSplit;
  constexpr bool kPaired = kMode == DenseMode::kPaired;
  if (kShare && a.pair > 1) {
    MeetCluster();  // before others use its barriers
  } else {
    __syncthreads();
  }
  const int warp = Uniform(thread / 32);
  if (warp < 8) {
    GiveRegisters<kPaired ? 56 : 72>();
    if (warp == 0) {
      if (lane == 0) FetchWeights<kShare>(a, barriers, ring, NT * 256 * kDenseQuad);
    } else if (HasRows<kMode>(a) && a.raws == 0) {
      FetchRows<T>(a, barriers, shared + a.smem_in, sources, thread - 32);
    } else if (HasRows<kMode>(a)) {
      const uint32_t raw = SharedAddress(shared) + a.smem_raw;
      if (warp > 2) {
        TurnBoxes<T>(a, barriers, shared + a.smem_in, shared + a.smem_raw, sources, thread - 96);
      } else if (sizeof(T) == 4 && !a.boxes) {
        FetchWords(a, barriers, raw, thread - 32);
      } else if (thread == 32) {
        FetchRaw(a, maps, barriers, raw);
      }
    } else if (warp == 1) {
      if (lane == 0) FetchBoxes(a, maps, barriers, in);
    } else if (sizeof(T) == 4) {
      RoundBoxes(a, barriers, shared + a.smem_in, thread - 64);
    }
  } else {
    TakeRegisters<kPaired ? 200 : 184>();
    const int group = warp / 4 - 2;
    MultiplyDense<T, MT, NT, kMode>(
        a, maps, barriers, in, ring, reinterpret_cast<const int4*>(entries),
        shared + a.smem_out + group * DenseStores(kMode) * a.store_pitch, group, thread % 128);
  }
#endif
}

// The main kernel may start while the weights are still packed: it waits before it fetches them.
// What it reads otherwise was there before they were. Where nothing is packed, that is not known.
template <class T, int MT, int NT, DenseMode kMode>
cudaError_t EnqueueDenseTile(const DensePlan& plan, const DenseLaunch& launch, bool packs,
                             cudaStream_t stream) {
  const auto kernel = Dense<T, MT, NT, kMode>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = packs;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = launch.args.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid);
  config.blockDim = dim3(kDenseThreads);
  config.dynamicSmemBytes = plan.smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = launch.args.cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, launch.maps, launch.args);
}

template <class T>
cudaError_t EnqueueDense(const DensePlan& plan, const DenseLaunch& launch, bool packs,
                         cudaStream_t stream) {
  if (packs && launch.spread.steps > 0) {
    const SpreadPack& pack = launch.spread;
    PackSpread<T><<<dim3(pack.steps, launch.args.groups), kSpreadPackThreads, 0, stream>>>(pack);
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  } else if (packs) {
    const DensePack& pack = launch.pack;
    // Taps in twos stay together, in memory and in what a block packs.
    const auto in = [&](int v) {
      return pack.taps % v == 0 && reinterpret_cast<uintptr_t>(pack.w) % (v * sizeof(T)) == 0;
    };
    const auto by_vectors = [&](auto v) {
      constexpr int kV = decltype(v)::value;
      const int units = pack.all_tiles * (pack.taps / kV);
      const dim3 grid((units + kPackUnits - 1) / kPackUnits, pack.channel_steps, pack.groups);
      PackTaps<T, kV><<<grid, 16 * kPackUnits, 0, stream>>>(pack);
    };
    constexpr int kMost = 16 / sizeof(T);
    if (in(kMost)) {
      by_vectors(std::integral_constant<int, kMost>{});
    } else if (in(4)) {
      by_vectors(std::integral_constant<int, 4>{});
    } else {
      const auto kernel = in(2) && pack.range % 2 == 0 ? PackDense<T, 2> : PackDense<T, 1>;
      const dim3 grid(plan.pack_grid[0], plan.pack_grid[1], plan.pack_grid[2]);
      kernel<<<grid, 32 * kDensePackWarps, 0, stream>>>(pack);
    }
    if (const cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  }
  const int tile = plan.mt * 1000 + plan.columns;
#define JAXCONV_TILE(MT, NT, kMode) \
  if (tile == MT * 1000 + NT * 8)   \
  return EnqueueDenseTile<T, MT, NT, kMode>(plan, launch, packs, stream)
  const DenseArgs& args = launch.args;
  if (args.split > 1) {
    constexpr auto kMode = DenseMode::kSplit;
    JAXCONV_TILE(2, 4, kMode);
    JAXCONV_TILE(2, 8, kMode);
    JAXCONV_TILE(1, 16, kMode);
    JAXCONV_TILE(2, 16, kMode);
  } else if (args.cluster > 1) {
    if constexpr (sizeof(T) == 4) {
      constexpr auto kMode = DenseMode::kShare;
      JAXCONV_TILE(1, 16, kMode);
      JAXCONV_TILE(2, 16, kMode);
    }
  } else if (args.terms > 1) {
    // Split operands have two sets of sums, which leaves no registers for large tiles.
    if constexpr (sizeof(T) == 4) {
      constexpr auto kMode = DenseMode::kExact;
      JAXCONV_TILE(2, 4, kMode);
      JAXCONV_TILE(2, 6, kMode);
      JAXCONV_TILE(2, 8, kMode);
      JAXCONV_TILE(1, 16, kMode);
    }
#define JAXCONV_TILES(kMode)  \
  JAXCONV_TILE(2, 4, kMode);  \
  JAXCONV_TILE(2, 6, kMode);  \
  JAXCONV_TILE(2, 8, kMode);  \
  JAXCONV_TILE(2, 12, kMode); \
  JAXCONV_TILE(1, 16, kMode); \
  JAXCONV_TILE(2, 16, kMode); \
  JAXCONV_TILE(4, 4, kMode);  \
  JAXCONV_TILE(4, 8, kMode)
  } else if (args.fold_taps > 0) {
    constexpr auto kMode = DenseMode::kFold;
    JAXCONV_TILE(2, 6, kMode);
    JAXCONV_TILE(2, 9, kMode);
    JAXCONV_TILE(2, 10, kMode);
    JAXCONV_TILE(2, 12, kMode);
    JAXCONV_TILE(2, 14, kMode);
  } else if (args.sets > 1) {
    constexpr auto kMode = DenseMode::kGrouped;
    JAXCONV_TILE(2, 4, kMode);
    JAXCONV_TILE(2, 8, kMode);
    JAXCONV_TILE(2, 12, kMode);
    JAXCONV_TILE(2, 16, kMode);
    JAXCONV_TILE(4, 4, kMode);
    JAXCONV_TILE(4, 8, kMode);
  } else if (args.paired) {
    constexpr auto kMode = DenseMode::kPaired;
    JAXCONV_TILE(2, 4, kMode);
    JAXCONV_TILE(2, 6, kMode);
    JAXCONV_TILE(2, 8, kMode);
    JAXCONV_TILE(1, 16, kMode);
  } else if (args.rows) {
    JAXCONV_TILES(DenseMode::kRows);
  } else {
    JAXCONV_TILES(DenseMode::kPlain);
  }
#undef JAXCONV_TILES
#undef JAXCONV_TILE
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_CUH_
