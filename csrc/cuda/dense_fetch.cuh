// "dense": the warps that bring weights and pixels to shared memory, as wgmma reads them.
#ifndef JAXCONV_CUDA_DENSE_FETCH_CUH_
#define JAXCONV_CUDA_DENSE_FETCH_CUH_

#include "cuda/correlate.cuh"
#include "cuda/dense_pack.cuh"
#include "cuda/dense_walk.cuh"
#include "cuda/dependent_launch.cuh"

namespace jaxconv::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
template <class T>
__device__ inline void FetchWords(const DenseArgs& a, const DenseBarriers& barriers, uint32_t raw,
                                  int thread, int threads) {
  constexpr int kSize = sizeof(T), kWord = 4 / kSize;
  const int image = a.raw_plane * a.axis[0].length, words = a.raw_row / kWord;
  const int places = a.box_n * image / kWord, pitch = a.raw_channel * kSize;
  DenseCursor box;
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseItem item(a, walk.index);
    const DenseProgram& program = a.program[item.program];
    for (int s = 0; s < program.segments; s += a.members) {
      const DenseSegment& segment = a.segment[program.first_segment + s];
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int channel = item.group * a.cg + chunk * a.chunk_channels;
        const int channels = min(a.chunk_channels, a.cg - chunk * a.chunk_channels);
        const T* in = static_cast<const T*>(a.in) + item.n * a.in_n_step + channel * a.in_c_step;
        WaitFor(barriers.RawEmpty(box.at), box.parity ^ 1);
        for (int place = thread; place < places; place += threads) {
          const int row = Divide(place, a.by_raw_row), plane = Divide(row, a.by_length[1]);
          const int n = Divide(plane, a.by_length[0]);
          const int at[kAxes] = {plane - n * a.axis[0].length, row - plane * a.axis[1].length,
                                 (place - row * words) * kWord};
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
          const T* from = in + (inside ? offset : 0);
          const int64_t step = inside ? a.in_c_step : 0;
          uint32_t to =
              raw + box.at * a.raw_bytes + (place * kWord + n * (a.raw_box - image)) * kSize;
#pragma unroll 8
          for (int c = 0; c < channels; ++c) {
            CopyOrZero4(to, from, inside);
            from += step;
            to += pitch;
          }
        }
        ArriveAfterCopies(barriers.RawFull(box.at));
        box.Next(a.raws);
      }
    }
  }
}

// Turns them into what a bulk tensor copy of channels last leaves: of each residue along the last
// axis a stage, or one for all phases. `turn` gets the offsets of a box and of a stage, where in a
// row the pixels begin, and how many channels and steps there are.
template <class Turn>
__device__ inline void TurnBoxes(const DenseArgs& a, const DenseBarriers& barriers, Turn turn) {
  DenseCursor box, buffer;
  for (DenseWalk walk(a); walk.index < a.items; walk.Next()) {
    const DenseProgram& program = a.program[DenseItem(a, walk.index).program];
    for (int s = 0; s < program.segments; s += a.members) {
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        const int channels = a.cg - chunk * a.chunk_channels;
        const int steps = chunk + 1 < a.chunks ? a.full_steps : a.last_steps;
        WaitFor(barriers.RawFull(box.at), box.parity);
        for (int member = 0; member < (a.paired ? 1 : a.members); ++member) {
          const int lead = a.segment[program.first_segment + s + member].lead;
          WaitFor(barriers.InEmpty(buffer.at), buffer.parity ^ 1);
          turn(box.at * a.raw_bytes, buffer.at * a.stage_bytes, lead, channels, steps);
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

// Element by element: a thread has 32 bytes of channels of a pixel at once, of two pixels as a load
// takes as long as two. `sources` says where pixels lie.
template <class T>
__device__ inline void TurnPixels(const DenseArgs& a, const DenseBarriers& barriers, char* in,
                                  const char* raw, const int* sources, int thread, int threads) {
  constexpr int kC = 2 * kBlockChannels<T>;
  using Bits = std::conditional_t<sizeof(T) == 4, float, uint16_t>;
  const int pixels = a.pixels, row_bytes = a.row_bytes, raw_channel = a.raw_channel;
  TurnBoxes(a, barriers, [&](int box, int to, int lead, int channels, int steps) {
    const Bits* first = reinterpret_cast<const Bits*>(raw + box) + lead - a.raw_lead;
    char* stage = in + to;
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
            block = make_uint4(RoundTF32(c[0]), RoundTF32(c[1]), RoundTF32(c[2]), RoundTF32(c[3]));
          } else {
            const auto pair = [&](int i) { return c[i] | uint32_t{c[i + 1]} << 16; };
            block = make_uint4(pair(0), pair(2), pair(4), pair(6));
          }
          *reinterpret_cast<uint4*>(stage + place + (step * 32 + half * 16 ^ swizzled)) = block;
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
        p += threads;
        wrap();
      };
      wrap();
      int left = (pixels * steps - thread + threads - 1) / threads;
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
  });
}

// A row of a box (or a piece of one) of 16 bits: where it lies in the box, and where its first
// pixel goes in a stage, in bytes; and its first element.
struct alignas(16) DenseRawRow {
  int offset, place, element, unused;
  __device__ DenseRawRow(const DenseArgs& a, int index) {
    const int rows = a.axis[0].length * a.axis[1].length, n = index / rows, row = index - n * rows;
    const bool pieces = a.pieces > 1;  // of one row
    offset = pieces ? index * a.raw_piece : (n * a.raw_box + row * a.raw_row) * 2;
    place = pieces ? 0 : index * a.axis[2].length * a.row_bytes;
    element = pieces ? index * a.piece_length : 0;
  }
};

// Of 16 bits, where channels are far enough apart in banks: a warp transposes matrices of eight
// neighbouring elements of a row by eight channels on their way through registers, four at once.
// Elements that are no pixels of the stage go to `waste`. There is no stride along the row.
__device__ inline void TurnMatrices(const DenseArgs& a, const DenseBarriers& barriers, uint32_t in,
                                    uint32_t raw, const DenseRawRow* rows, uint32_t waste, int warp,
                                    int warps, int lane) {
  constexpr int kBatch = 4;
  const int matrix = lane / 8, own = lane % 8;
  // Of the four matrices so many have neighbouring channels, the others the elements beyond.
  const int beside = min(a.chunk_channels / 8, 4), hop = 4 / beside;
  const int octet0 = matrix & (beside - 1), eight0 = matrix / beside;
  const int elements = a.axis[2].length;
  const int eights = a.raw_row / 8, pitch = a.raw_channel * 2;
  const int place_hop = hop * 8 * a.row_bytes;
  waste += warp * kDenseWaste + own * 16;
  TurnBoxes(a, barriers, [&](int box, int to, int lead, int channels, int steps) {
    const int octets = 2 * steps, element0 = own + eight0 * 8 - lead;
    for (int first = 0; first < octets; first += beside) {
      const int octet = first + octet0, stage = static_cast<int>(in) + to;
      const uint32_t from0 = raw + box + (octet * 8 + own) * pitch + eight0 * 16;
      const bool read = octet < octets;
      const auto turn = [&](auto whole) {
        uint32_t mask[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int c = (first + (m & (beside - 1))) * 8 + lane % 4 * 2;
          mask[m] = c + 1 < channels ? ~0u : c < channels ? 0xffffu : 0u;
        }
#pragma unroll 1
        for (int r = warp; r < a.raw_rows; r += warps) {
          const DenseRawRow row = rows[r];
          uint32_t from = from0 + row.offset;
          int element = row.element + element0, left = eights - eight0;
          int place = row.place + element * a.row_bytes;
#pragma unroll 1
          for (int e = 0; e < eights; e += kBatch * hop) {
            uint32_t v[kBatch][4];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              if (e + i * hop < eights) LoadTransposed(v[i], from + i * hop * 16);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              if (e + i * hop >= eights) break;
              const bool pixel = read && left > 0 && static_cast<unsigned>(element) < elements;
              const int target = stage + place + (octet * 16 ^ (place >> 3 & a.swizzle));
              if constexpr (!decltype(whole)::value) {
#pragma unroll
                for (int m = 0; m < 4; ++m) v[i][m] &= mask[m];
              }
              StoreMatrices(pixel ? target : waste, v[i]);
              element += 8 * hop;
              place += place_hop;
              left -= hop;
            }
            from += kBatch * hop * 16;
          }
        }
      };
      if (octets * 8 <= channels) {
        turn(std::true_type{});
      } else {
        turn(std::false_type{});
      }
    }
  });
}

#endif

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_FETCH_CUH_
