// Device part of "planes"; docs/gpu_kernels.md tells the whole story.
//
// Some warps, the arrangers, load planes of the input and put them into shared memory as blocks of
// 16 bytes, neighbouring channels of a pixel, whatever the layout is; eight warps multiply. A warp
// owns MT tiles of 16 neighbouring pixels of a row and NC columns: a column is a tile of eight
// output channels of one output phase.
#ifndef JAXCONV_CUDA_PLANES_CUH_
#define JAXCONV_CUDA_PLANES_CUH_

#include <type_traits>

#include "cuda/dtypes.cuh"
#include "cuda/mbarrier.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/planes.h"
#include "cuda/shared_memory.h"

namespace jaxconv::cuda {

template <int MT, int NC>
inline constexpr int kPlanesThreads = (PlanesArgs::kWarps + Arrangers(MT, NC) + 1) * 32;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Of 16-byte multiples, between addresses that are multiples of 16.
__device__ inline void StoreBulk(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
// Until all of this thread's stores have read shared memory.
__device__ inline void WaitForStores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
#else
__device__ inline void StoreBulk(void*, uint32_t, int) {}
__device__ inline void WaitForStores() {}
#endif

// Of the eight warps that multiply.
__device__ inline void MeetPlanesWarps() {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"n"(PlanesArgs::kWarps * 32) : "memory");
}

// A group's eight channels: two blocks of 16 bytes in float32, one of 16-bit values, which takes
// the tensor cores' instruction of half the depth.
template <class T>
inline constexpr int kBlocks = 8 * sizeof(T) / 16;

// A pixel's place in its row, in blocks of 16 bytes. The gap after every eighth keeps the blocks
// that an arranger writes at once, every fourth or eighth pixel, in different banks.
__device__ inline int BlockOf(int pixel) { return pixel + (pixel >> 3); }
inline constexpr int kLead = 9;  // blocks before pixel 0, for what a vector brings before it

// Barriers, in bytes from the beginning of shared memory: planes that are full and that are empty,
// stages that are full and that are empty.
inline constexpr int kPlaneEmpty = PlanesArgs::kMaxSlots * 8, kStageFull = 2 * kPlaneEmpty,
                     kStageEmpty = kStageFull + 16;

// What a block marches through.
struct PlanesColumn {
  int n, begin, end, h, w;  // image, steps, first q of the other axes
};
__device__ inline PlanesColumn ColumnOf(const PlanesArgs& a, int column) {
  const unsigned across = a.axis[2].tiles, high = a.axis[1].tiles, deep = a.axis[0].tiles;
  unsigned rest = column;
  PlanesColumn at;
  at.w = (rest % across) * a.axis[2].box;
  rest /= across;
  at.h = (rest % high) * a.axis[1].box;
  rest /= high;
  at.begin = (rest % deep) * a.axis[0].box;
  at.end = min(at.begin + a.axis[0].box, a.axis[0].q_size);
  at.n = rest / deep;
  return at;
}

// All weights of the group, rounded, in the order of their use and of the fragments' lanes.
template <class T>
__device__ inline void KeepWeights(const PlanesArgs& a, int group, char* weights, int tid,
                                   int threads) {
  const int tile_sets = a.column_sets / a.phase_sets;
  const int all = tile_sets * a.taps * a.set_tiles * 32;
  const T* w = static_cast<const T*>(a.w) + group * a.w_g_step;
#pragma unroll 4
  for (int i = tid; i < all; i += threads) {
    const int lane = i % 32;
    int rest = i / 32;
    const int tile = rest % a.set_tiles;
    rest /= a.set_tiles;
    const PlanesTap tap = a.tap[rest % a.taps];
    const int tile_set = rest / a.taps;
    const int j = (tile_set * a.set_tiles + tile) * 8 + lane / 4, k = lane % 4;
    const auto weight = [&](int c) {
      return j < a.jg ? __ldg(w + c * a.w_c_step + j * a.w_j_step + tap.tap) : T{};
    };
    const int place = (tile_set * a.taps + a.first_tap[tap.set] + tap.first) * a.set_tiles +
                      tile * tap.count + tap.index;
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<uint2*>(weights)[place * 32 + lane] =
          make_uint2(RoundTF32(weight(k)), RoundTF32(weight(k + 4)));
    } else {
      const T pair[2] = {weight(2 * k), weight(2 * k + 1)};
      memcpy(reinterpret_cast<uint32_t*>(weights) + place * 32 + lane, pair, 4);
    }
  }
}

// Where each lane reads an entry's pixels in a ring whose first plane is the step's, for a unit at
// the corner: the lane's own pixel is that of the rows of 16 bytes that it points to.
template <class T, int MT>
__device__ inline void ListPlaces(const PlanesArgs& a, int* places, int tid, int threads) {
  for (int i = tid; i < a.first_entry[a.phase_sets] * 32; i += threads) {
    const PlanesEntry& entry = a.entry[i / 32];
    const int own = kBlocks<T> == 1 && MT > 1 ? i % 32 : i % 16;
    const int pixel = own * a.axis[2].si + entry.right;
    places[i] = entry.plane * a.plane + entry.row + BlockOf(pixel) * 16;
  }
}

// ---------------------------------------------------------------------------------------------
// Arrangers

template <class T>
__device__ inline void Round(uint4& v) {
  if constexpr (sizeof(T) == 4) {
    v.x = RoundTF32(__uint_as_float(v.x));
    v.y = RoundTF32(__uint_as_float(v.y));
    v.z = RoundTF32(__uint_as_float(v.z));
    v.w = RoundTF32(__uint_as_float(v.w));
  }
}

// The input lies at [begin, end) of a row of `length` pixels.
struct PlanesWindow {
  int begin, end, length;
};
inline constexpr int kPlanesBatch = 5;  // loads of a lane that are under way together

// A row, channels first: a lane loads 16 bytes of its channel, neighbouring pixels, and writes them
// into as many blocks. `from` is the lane's channel at the row's first pixel, `to` the place of
// that. A vector begins where memory has a multiple of 16 bytes, so up to kPer - 1 pixels early.
// What it brings from before or beyond the row ends in gaps.
template <class T>
__device__ inline void ArrangeRow(const T* from, const PlanesWindow& row, bool inside, char* to,
                                  int number) {
  constexpr int kPer = 16 / sizeof(T), kBatch = kPlanesBatch;
  const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(from) / sizeof(T)) & (kPer - 1);
  const int pixel = number * kPer - beyond;
  // The gaps before pixel + j number (pixel + j) >> 3: for the first ones, one less than for
  // others.
  const int early = kPer == 8 || number % 2 == 0 ? beyond : 0;
  from += pixel;
  to += (pixel + (kPer == 8 ? number : number / 2)) * 16;
  uint32_t places[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j) places[j] = SharedAddress(to) + (j < early ? j - 1 : j) * 16;
  const int reaches = (inside ? row.end : -32) - pixel;  // pixels from this lane's first to the end
  const int misses = row.begin - kPer - pixel;  // that many pixels on, vectors hold one of the row
  const int turns = (row.length + kPer - 1 + 31) / 32;  // 32 pixels of each channel at a time
  for (int turn = 0; turn < turns; turn += kBatch) {
    uint4 v[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      v[k] = make_uint4(0, 0, 0, 0);
      const int on = 32 * (turn + k);
      if (on > misses && on < reaches) v[k] = __ldg(reinterpret_cast<const uint4*>(from + 32 * k));
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (turn + k >= turns) break;
      Round<T>(v[k]);
      uint32_t words[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
      const int first = 32 * (turn + k);
      if (first < row.begin || first + 32 > row.end) {
        const int p = pixel + first;
        if (p >= row.length) continue;
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (p + j >= row.begin && p + j < row.end) continue;
          words[j * sizeof(T) / 4] &= sizeof(T) == 4 ? 0 : j % 2 == 0 ? 0xffff0000u : 0xffffu;
        }
      }
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const uint32_t place = places[j] + 36 * 16 * k;  // 32 pixels and their gaps
        if constexpr (sizeof(T) == 4) {
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(place), "r"(words[j]) : "memory");
        } else {
          asm volatile("st.shared.b16 [%0], %1;" ::"r"(place),
                       "h"(static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16)))
                       : "memory");
        }
      }
    }
    from += 32 * kBatch;
#pragma unroll
    for (int j = 0; j < kPer; ++j) places[j] += 36 * 16 * kBatch;
  }
}

// The same, an element at a time: rows at the input's end, of which no vector may be read.
template <class T>
__device__ inline void ArrangeSlowly(const T* from, int64_t in_c_step, const PlanesWindow& row,
                                     bool inside, char* to, int lane) {
  constexpr int kPer = 16 / sizeof(T);
  for (int p = lane / kPer; p < row.length; p += 32 / kPer) {
    const int channel = lane % kPer;
    const bool has = inside && p >= row.begin && p < row.end;
    uint4 v = make_uint4(0, 0, 0, 0);
    T value = has ? from[channel * in_c_step + p] : T{};
    memcpy(&v, &value, sizeof(T));
    Round<T>(v);
    memcpy(to + BlockOf(p) * 16 + channel * sizeof(T), &v, sizeof(T));
  }
}

// A row, channels last: a lane's 16 bytes are a block. `pixel` is the lane's first, `apart` what
// the lanes cover at once, a multiple of eight; `from` and `to` are those of that pixel.
template <class T>
__device__ inline void ArrangeRowLast(const T* from, int64_t step, const PlanesWindow& row,
                                      bool inside, char* to, int pixel, int apart) {
  constexpr int kBatch = kPlanesBatch;
  step *= apart;
  for (; pixel < row.length; pixel += apart * kBatch) {
    uint4 v[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int p = pixel + k * apart;
      v[k] = make_uint4(0, 0, 0, 0);
      if (inside && p >= row.begin && p < row.end)
        v[k] = __ldg(reinterpret_cast<const uint4*>(from));
      from += step;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      Round<T>(v[k]);
      if (pixel + k * apart < row.length) *reinterpret_cast<uint4*>(to) = v[k];
      to += apart * 18;
    }
  }
}

// Brings one plane, `source` along the axis of the march. `turn` says which warp takes the first
// row; rows go round over the warps.
template <class T>
__device__ inline void ArrangePlane(const PlanesArgs& a, const T* image, int source, int first_h,
                                    int first_w, char* plane, int turn, int warps, int lane) {
  constexpr int kPer = 16 / sizeof(T);
  const PlanesAxis& height = a.axis[1];
  const PlanesAxis& width = a.axis[2];
  const bool inside = static_cast<unsigned>(source) < static_cast<unsigned>(a.axis[0].in_size);
  const PlanesWindow window = {max(0, -first_w), min(width.length, width.in_size - first_w),
                               width.length};
  const T* corner = image + static_cast<int64_t>(source) * a.axis[0].in_step +
                    static_cast<int64_t>(first_h) * height.in_step +
                    static_cast<int64_t>(first_w) * width.in_step;
  plane += kLead * 16;
  for (int row = turn; row < a.rows; row += warps) {
    const int part = Divide(row, a.by_height), h = row - part * a.by_height.divisor;
    const bool in =
        inside && static_cast<unsigned>(first_h + h) < static_cast<unsigned>(height.in_size);
    const T* from = corner + h * height.in_step;
    char* to = plane + h * a.row_pitch;
    if (a.last) {
      const int block = part * a.blocks_beside + lane % a.blocks_beside;
      const int pixel = lane / a.blocks_beside;
      ArrangeRowLast<T>(from + block * kPer + static_cast<int64_t>(pixel) * width.in_step,
                        width.in_step, window, in, to + block * a.block_pitch + BlockOf(pixel) * 16,
                        pixel, 32 / a.blocks_beside);
      continue;
    }
    from += part * kPer * a.in_c_step;
    to += part * a.block_pitch;
    if (from + (kPer - 1) * a.in_c_step + window.end + kPer > static_cast<const T*>(a.in_end)) {
      ArrangeSlowly<T>(from, a.in_c_step, window, in, to, lane);
    } else {
      const int channel = lane % kPer;
      ArrangeRow<T>(from + channel * a.in_c_step, window, in,
                    to + channel * static_cast<int>(sizeof(T)), lane / kPer);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Multipliers

// Eight rows of 16 bytes from each of four (or two) addresses, which quarters of the lanes give.
// The compiler may move these: their addresses come from memory that is read after a plane is
// waited for, and what comes of them is written before it is given back.
__device__ inline void LoadFour(uint32_t (&x)[4], uint32_t address) {
  asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "r"(address));
}
__device__ inline void LoadTwo(uint32_t (&x)[2], uint32_t address) {
  asm("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
      : "=r"(x[0]), "=r"(x[1])
      : "r"(address));
}

// The pixels of a step: MT tiles, 16 * si pixels apart, of two blocks of channels; or of one, two
// tiles at once.
template <class T, int MT>
__device__ inline void LoadPixels(uint32_t (&x)[MT][2 * kBlocks<T>], uint32_t address,
                                  int tile_bytes) {
  if constexpr (kBlocks<T> == 2) {
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) LoadFour(x[mt], address + mt * tile_bytes);
  } else if constexpr (MT == 1) {
    LoadTwo(x[0], address);
  } else {
    static_assert(MT % 2 == 0);
#pragma unroll
    for (int mt = 0; mt < MT; mt += 2) {
      uint32_t both[4];
      LoadFour(both, address + mt * tile_bytes);
      x[mt][0] = both[0], x[mt][1] = both[1];
      x[mt + 1][0] = both[2], x[mt + 1][1] = both[3];
    }
  }
}

// The weights of a tap and a tile of output channels, as a lane holds them.
template <class T>
using Weight = std::conditional_t<kBlocks<T> == 2, uint2, uint32_t>;

template <class T>
__device__ inline void MultiplyTile(float (&acc)[4], const uint32_t (&x)[2 * kBlocks<T>],
                                    Weight<T> w) {
  if constexpr (kBlocks<T> == 1) {
    Mma<T>::Half(acc, x[0], x[1], w);
  } else {
    Mma<T>::Whole(acc, x, w.x, w.y);
  }
}

constexpr int CountBits(int mask) { return mask == 0 ? 0 : mask % 2 + CountBits(mask / 2); }

// One step for the columns of a mask that is known when compiled.
template <class T, int Mask, int MT, int NC>
__device__ inline void MultiplyColumns(float (&acc)[MT][NC][4],
                                       const uint32_t (&x)[MT][2 * kBlocks<T>],
                                       const Weight<T>* w) {
  int tap = 0;
#pragma unroll
  for (int j = 0; j < NC; ++j) {
    if (Mask >> j & 1) {
      const Weight<T> v = w[32 * tap++];
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) MultiplyTile<T>(acc[mt][j], x[mt], v);
    }
  }
}

// Entries [begin, end), which share a mask. Addresses come from `address_of`; `w` moves on.
template <class T, int Mask, int MT, int NC, class Address>
__device__ inline void MultiplyEntries(float (&acc)[MT][NC][4], const Address& address_of,
                                       int tile_bytes, const Weight<T>*& w, int begin, int end) {
#pragma unroll 1
  for (int e = begin; e < end; ++e, w += CountBits(Mask) * 32) {
    uint32_t x[MT][2 * kBlocks<T>];
    LoadPixels<T>(x, address_of(e), tile_bytes);
    MultiplyColumns<T, Mask>(acc, x, w);
  }
}

// Taps of axes with a stride of two reach products of one, the other or both of an axis's phases:
// those masks are compiled, as a predicated instruction costs as much as another.
template <class T, int MT, int NC, class Address>
__device__ inline void MultiplyMasked(float (&acc)[MT][NC][4], const Address& address_of,
                                      int tile_bytes, const Weight<T>*& w, int begin, int end,
                                      int mask) {
#define JAXCONV_PLANES_MASK(m) \
  case m:                      \
    return MultiplyEntries<T, (m) & ((1 << NC) - 1)>(acc, address_of, tile_bytes, w, begin, end);
#define JAXCONV_PLANES_MASKS(m) \
  JAXCONV_PLANES_MASK(m) JAXCONV_PLANES_MASK(16 * m) JAXCONV_PLANES_MASK(17 * m)
  if constexpr (NC == 8) {
    switch (mask) {
      JAXCONV_PLANES_MASKS(1)
      JAXCONV_PLANES_MASKS(2)
      JAXCONV_PLANES_MASKS(3)
      JAXCONV_PLANES_MASKS(4)
      JAXCONV_PLANES_MASKS(5)
      JAXCONV_PLANES_MASKS(8)
      JAXCONV_PLANES_MASKS(10)
      JAXCONV_PLANES_MASKS(12)
      JAXCONV_PLANES_MASKS(15)
    }
  } else {
    switch (mask) {
      JAXCONV_PLANES_MASK(1)
      JAXCONV_PLANES_MASK(2)
      JAXCONV_PLANES_MASK(3)
      JAXCONV_PLANES_MASK(4)
      JAXCONV_PLANES_MASK(5)
      JAXCONV_PLANES_MASK(8)
      JAXCONV_PLANES_MASK(10)
      JAXCONV_PLANES_MASK(12)
      JAXCONV_PLANES_MASK(15)
    }
  }
#undef JAXCONV_PLANES_MASKS
#undef JAXCONV_PLANES_MASK
#pragma unroll 1
  for (int e = begin; e < end; ++e) {
    uint32_t x[MT][2 * kBlocks<T>];
    LoadPixels<T>(x, address_of(e), tile_bytes);
#pragma unroll
    for (int j = 0; j < NC; ++j) {
      if (mask >> j & 1) {
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) MultiplyTile<T>(acc[mt][j], x[mt], *w);
        w += 32;
      }
    }
  }
}

// All entries of a pattern of masks that is known when compiled, without a loop.
template <class T, const auto& Pattern, int Entry = 0, int Before = 0, int MT, class Address>
__device__ inline void MultiplyPattern(float (&acc)[MT][8][4], const Address& address_of,
                                       int tile_bytes, const Weight<T>* w, int begin) {
  if constexpr (Entry < sizeof(Pattern) / sizeof(Pattern[0])) {
    uint32_t x[MT][2 * kBlocks<T>];
    LoadPixels<T>(x, address_of(begin + Entry), tile_bytes);
    MultiplyColumns<T, Pattern[Entry]>(acc, x, w + Before * 32);
    MultiplyPattern<T, Pattern, Entry + 1, Before + CountBits(Pattern[Entry])>(
        acc, address_of, tile_bytes, w, begin);
  }
}

template <class T>
__device__ inline float PlanesBias(const PlanesArgs& a, int group, int j) {
  if (j >= a.jg) return 0;
  j += group * a.jg;
  return sizeof(T) == 4 || a.out_f32 ? static_cast<const float*>(a.bias)[j]
                                     : ToAccumulator(static_cast<const T*>(a.bias)[j]);
}

// The step's runs of results leave the stage: what lies between multiples of 16 bytes by one bulk
// copy, the rest by single stores. A run is what is contiguous in device memory: the rows of a
// plane where they are whole (flat), or a piece of one row.
template <class Out>
__device__ inline void StoreRuns(const PlanesArgs& a, const PlanesColumn& at, int group, int step,
                                 const char* stage, int lane) {
  constexpr int kMask = 16 / sizeof(Out) - 1;
  const PlanesAxis& deep = a.axis[0];
  const PlanesAxis& high = a.axis[1];
  const PlanesAxis& wide = a.axis[2];
  const int per_channel = deep.so * a.run_rows, runs = a.jg * per_channel;
  Out* image = static_cast<Out*>(a.out) + at.n * a.out_n_step;
  for (int run = lane; run < runs; run += 32) {
    const int j = run / per_channel, in_channel = run - j * per_channel;
    const int rd = in_channel / a.run_rows, row = in_channel - rd * a.run_rows;
    const int od = step * deep.so + rd, oh = at.h * high.so + row, ow = at.w * wide.so;
    if (od >= deep.out_size || oh >= high.out_size || ow >= wide.out_size) continue;
    int length = min(wide.box * wide.so, wide.out_size - ow);
    if (a.flat) length *= min(high.box * high.so, high.out_size - oh);
    Out* to = image + (group * a.jg + j) * a.out_c_step + static_cast<int64_t>(od) * deep.out_step +
              static_cast<int64_t>(oh) * high.out_step + ow;
    const int turn = static_cast<int>(reinterpret_cast<uintptr_t>(to) / sizeof(Out)) & kMask;
    const Out* from =
        reinterpret_cast<const Out*>(stage + j * a.channel_pitch + in_channel * a.run_pitch) + turn;
    const int head = min(-turn & kMask, length), body = (length - head) & ~kMask;
    if (body > 0) {
      StoreBulk(to + head, SharedAddress(from + head), body * static_cast<int>(sizeof(Out)));
    }
    for (int i = 0; i < head; ++i) to[i] = from[i];
    for (int i = head + body; i < length; ++i) to[i] = from[i];
  }
}

// Channels last, the groups of a block together, so that sectors of device memory are written
// whole.
__device__ inline void StorePixels(const PlanesArgs& a, const PlanesColumn& at, int group, int step,
                                   const char* stage, int out_bytes, int warp, int lane) {
  const PlanesAxis& deep = a.axis[0];
  const PlanesAxis& high = a.axis[1];
  const PlanesAxis& wide = a.axis[2];
  const int rows = high.box * high.so, row_bytes = wide.box * wide.so * a.pixel_pitch;
  const int bytes = a.groups_beside * a.jg * out_bytes, ow = at.w * wide.so;
  const int pixels = min(wide.box * wide.so, wide.out_size - ow);
  for (int run = warp; run < deep.so * rows; run += PlanesArgs::kWarps) {
    const int rd = run / rows, row = run - rd * rows;
    const int od = step * deep.so + rd, oh = at.h * high.so + row;
    if (od >= deep.out_size || oh >= high.out_size) continue;
    char* to = static_cast<char*>(a.out) +
               (at.n * a.out_n_step + int64_t{od} * deep.out_step + int64_t{oh} * high.out_step +
                int64_t{ow} * wide.out_step + group * a.jg) *
                   out_bytes;
    const char* from = stage + run * row_bytes;
    for (int i = lane * 16; i < pixels * bytes; i += 32 * 16) {
      const int pixel = i / bytes, in_pixel = i - pixel * bytes;
      *reinterpret_cast<uint4*>(to + int64_t{pixel} * wide.out_step * out_bytes + in_pixel) =
          *reinterpret_cast<const uint4*>(from + pixel * a.pixel_pitch + in_pixel);
    }
  }
}

template <class T, int MT, int NC, int SO>
__device__ inline void MultiplyPlanes(const PlanesArgs& a, char* smem, int first_group, int warp,
                                      int lane) {
  const uint32_t barriers = SharedAddress(smem);
  const int wn = warp % a.wn, wm = warp / a.wn, workers = PlanesArgs::kWarps / a.wn;
  const int columns = a.set_phases * a.set_tiles;
  const PlanesAxis& deep = a.axis[0];
  const PlanesAxis& high = a.axis[1];
  const PlanesAxis& wide = a.axis[2];
  const int out_bytes = sizeof(T) == 4 || a.out_f32 ? 4 : 2;
  const int so = SO > 0 ? SO : wide.so;
  const int tile_bytes = 18 * wide.si * 16;  // 16 pixels and two gaps, times the stride
  // What this lane points to when fragments are loaded.
  const uint32_t lane_place =
      barriers + a.smem_ring + kLead * 16 + (kBlocks<T> == 1 ? 0 : lane / 16 * a.block_pitch);
  const uint32_t ring_end = barriers + a.smem_ring + a.slots * a.plane;
  const int* places = reinterpret_cast<const int*>(smem + a.smem_places) + lane;
  const int own = 2 * (lane % 4);  // the first of this lane's two channels of a tile
  int slot = 0, waited_slot = 0, waited_round = 0, stage_index = 0, stage_round = 0;
  for (int column = blockIdx.x; column < a.columns; column += gridDim.x) {
    const PlanesColumn at = ColumnOf(a, column);
    for (int q = at.begin; q < at.end; ++q) {
      for (int p = q == at.begin ? deep.length : a.fresh; p > 0; --p) {
        WaitFor(barriers + waited_slot * 8, waited_round & 1);
        if (++waited_slot == a.slots) waited_slot = 0, ++waited_round;
      }
      char* stage = smem + a.smem_stage + stage_index * a.stage;
      bool stage_free = a.last;
      const auto wait_for_stage = [&] {
        if (stage_free) return;
        if (stage_round > 0) {
          WaitFor(barriers + kStageEmpty + stage_index * 8, (stage_round - 1) & 1);
        }
        stage_free = true;
      };
      // Channels last, all take part in copying from the stage.
      if (a.last && a.staged) MeetPlanesWarps();
      for (int job = wm; job < a.units * a.groups_beside; job += workers) {
        __syncwarp();  // after waiting, lane by lane
        const int unit = a.groups_beside == 1 ? job : job / a.groups_beside;
        const int beside = job - unit * a.groups_beside, group = first_group + beside;
        const int unit_h = unit / a.across, unit_w = (unit - unit_h * a.across) * 16 * MT;
        const uint32_t place = lane_place + slot * a.plane + unit_h * high.si * a.row_pitch +
                               BlockOf(unit_w * wide.si) * 16 + beside * kBlocks<T> * a.block_pitch;
        for (int column_set = wn; column_set < a.column_sets; column_set += a.wn) {
          const int tile_set = a.phase_sets == 1 ? column_set : column_set / a.phase_sets;
          const int set = column_set - tile_set * a.phase_sets;
          const Weight<T>* w =
              reinterpret_cast<const Weight<T>*>(smem + a.smem_weights + beside * a.weights) +
              lane + (tile_set * a.taps + a.first_tap[set]) * a.set_tiles * 32;
          const auto address_of = [&](int e) {
            const uint32_t at = place + places[e * 32];
            return at >= ring_end ? at - a.slots * a.plane : at;
          };
          const int begin = a.first_entry[set], end = a.first_entry[set + 1];
          float acc[MT][NC][4] = {};
          if constexpr (NC == 1) {
            // With so little to do a step, several are under way at once, in two chains of sums.
            float other[MT][4] = {};
            const auto run = [&](float (&sum)[MT][4], int e) {
              uint32_t x[MT][2 * kBlocks<T>];
              LoadPixels<T>(x, address_of(e), tile_bytes);
              const Weight<T> v = w[(e - begin) * 32];
#pragma unroll
              for (int mt = 0; mt < MT; ++mt) MultiplyTile<T>(sum[mt], x[mt], v);
            };
            float sum[MT][4] = {};
            int e = begin;
#pragma unroll 1
            for (; e + 6 <= end; e += 6) {
#pragma unroll
              for (int k = 0; k < 6; ++k) run(k % 2 == 0 ? sum : other, e + k);
            }
#pragma unroll 1
            for (; e + 3 <= end; e += 3) {
#pragma unroll
              for (int k = 0; k < 3; ++k) run(k % 2 == 0 ? sum : other, e + k);
            }
#pragma unroll 1
            for (; e < end; ++e) run(sum, e);
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
              for (int r = 0; r < 4; ++r) acc[mt][0][r] += sum[mt][r] + other[mt][r];
            }
          } else {
            const auto all = [&] {
              for (int e = begin; e < end;) {
                const int mask = a.entry[e].columns, first = e;
                do ++e;
                while (e < end && a.entry[e].columns == mask);
                MultiplyMasked<T>(acc, address_of, tile_bytes, w, first, e, mask);
              }
            };
            if constexpr (NC == 8 && SO == 2) {
              if (a.pattern == PlanesArgs::k3x3x3) {
                MultiplyPattern<T, PlanesArgs::kMasks3x3x3>(acc, address_of, tile_bytes, w, begin);
              } else if (a.pattern == PlanesArgs::k3x5x7) {
                MultiplyPattern<T, PlanesArgs::kMasks3x5x7>(acc, address_of, tile_bytes, w, begin);
              } else {
                all();
              }
            } else {
              all();
            }
          }
          if (a.bias != nullptr) {
#pragma unroll
            for (int j = 0; j < NC; ++j) {
              const int to = (tile_set * a.set_tiles + j / a.set_phases) * 8 + own;
              const float even = PlanesBias<T>(a, group, to), odd = PlanesBias<T>(a, group, to + 1);
#pragma unroll
              for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
                for (int r = 0; r < 4; ++r) acc[mt][j][r] += r % 2 == 0 ? even : odd;
              }
            }
          }
          wait_for_stage();

          // Phases in the order of the columns, of one tile of channels after another; those of the
          // last axis, neighbours, share addresses.
          int rw0 = 0, rh0 = 0, rd0 = 0;
          if (set > 0) {
            const int first_phase = set * a.set_phases, up = first_phase / so;
            rw0 = first_phase - up * so;
            rd0 = up / high.so;
            rh0 = up - rd0 * high.so;
          }
          int rw = rw0, rh = rh0, rd = rd0, phases = a.set_phases, j0 = tile_set * a.set_tiles * 8;
          const int row_h = unit_h * high.so, first_w = (unit_w + lane / 4) * so;
          const int limit = wide.out_size - at.w * so;
          const bool whole = (unit_w + 16 * MT) * so <= limit;
          constexpr int kRow = SO > 0 ? SO : 1;  // columns of a row that are known when compiled
#pragma unroll
          for (int j = 0; j < NC; j += kRow) {
            if (j >= columns) break;
            const int od = q * deep.so + rd, oh = at.h * high.so + row_h + rh;
            const bool exists =
                j0 < a.jg && rd < deep.so && od < deep.out_size && oh < high.out_size;
            const auto those = [&](const auto& put, const auto& inside) {
#pragma unroll
              for (int i = 0; i < kRow; ++i) {
#pragma unroll
                for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
                  for (int half = 0; half < 2; ++half) {
                    const int w_at = (mt * 16 + half * 8) * so + (SO > 0 ? i : rw);
                    if (inside(w_at)) {
                      put(w_at, acc[mt][j + i][2 * half], acc[mt][j + i][2 * half + 1]);
                    }
                  }
                }
              }
            };
            const auto each = [&](const auto& put) {
              if (whole) {
                those(put, [](int) { return true; });
              } else {
                those(put, [&](int w_at) { return first_w + w_at < limit; });
              }
            };
            if (!exists) {
            } else if (a.last) {
              // Four lanes hold eight neighbours.
              char* to;
              int apart;  // bytes between pixels
              if (a.staged) {
                apart = a.pixel_pitch;
                to = stage +
                     ((rd * high.box * high.so + row_h + rh) * wide.box * so + first_w) * apart +
                     (beside * a.jg + j0 + own) * out_bytes;
              } else {
                apart = wide.out_step * out_bytes;
                to = static_cast<char*>(a.out) +
                     (at.n * a.out_n_step + int64_t{od} * deep.out_step +
                      int64_t{oh} * high.out_step + int64_t{at.w * so + first_w} * wide.out_step +
                      group * a.jg + j0 + own) *
                         out_bytes;
              }
              const bool two = j0 + own + 1 < a.jg, one = j0 + own < a.jg;
              const auto store = [&](auto* out, float u, float v) {
                using Out = std::remove_pointer_t<decltype(out)>;
                const Out pair[2] = {FromAccumulator<Out>(u), FromAccumulator<Out>(v)};
                if (a.pairs && two) {
                  using Pair = std::conditional_t<sizeof(Out) == 4, uint2, uint32_t>;
                  Pair bits;
                  memcpy(&bits, pair, sizeof(Pair));
                  *reinterpret_cast<Pair*>(out) = bits;
                } else {
                  if (one) out[0] = pair[0];
                  if (two) out[1] = pair[1];
                }
              };
              if (out_bytes == 4) {
                each([&](int w_at, float u, float v) {
                  store(reinterpret_cast<float*>(to + w_at * apart), u, v);
                });
              } else if constexpr (sizeof(T) == 2) {
                each([&](int w_at, float u, float v) {
                  store(reinterpret_cast<T*>(to + w_at * apart), u, v);
                });
              }
            } else {
              // A run lies as far from a multiple of 16 bytes as it does in device memory.
              const int mask = 16 / out_bytes - 1;
              const int row = a.flat ? 0 : row_h + rh;
              const auto c_step = static_cast<unsigned>(a.out_c_step);
              const unsigned start =
                  static_cast<unsigned>(at.n * a.out_n_step) + (group * a.jg + j0 + own) * c_step +
                  static_cast<unsigned>(od) * deep.out_step +
                  static_cast<unsigned>(at.h * high.so + row) * high.out_step + at.w * so;
              char* even = stage + (j0 + own) * a.channel_pitch +
                           (rd * a.run_rows + row) * a.run_pitch +
                           ((a.flat ? (row_h + rh) * wide.out_size : 0) + first_w) * out_bytes;
              char* odd = even + a.channel_pitch + ((start + c_step) & mask) * out_bytes;
              even += (start & mask) * out_bytes;
              if (out_bytes == 4) {
                each([&](int w_at, float u, float v) {
                  reinterpret_cast<float*>(even)[w_at] = u;
                  reinterpret_cast<float*>(odd)[w_at] = v;
                });
              } else if constexpr (sizeof(T) == 2) {
                each([&](int w_at, float u, float v) {
                  reinterpret_cast<T*>(even)[w_at] = FromAccumulator<T>(u);
                  reinterpret_cast<T*>(odd)[w_at] = FromAccumulator<T>(v);
                });
              }
            }
            // The next row.
            phases -= kRow;
            rw += kRow;
            if (rw == so) {
              rw = 0;
              if (++rh == high.so) {
                rh = 0;
                ++rd;
              }
            }
            if (phases == 0) {
              phases = a.set_phases;
              j0 += 8;
              rw = rw0, rh = rh0, rd = rd0;
            }
          }
        }
      }
      // Planes that the next step does not need.
      __syncwarp();
      for (int p = q + 1 == at.end ? deep.length : a.fresh; p > 0; --p) {
        Arrive(barriers + kPlaneEmpty + slot * 8);
        if (++slot == a.slots) slot = 0;
      }
      if (!a.staged) continue;
      wait_for_stage();
      if (a.last) {
        MeetPlanesWarps();
        StorePixels(a, at, first_group, q, stage, out_bytes, warp, lane);
        continue;
      }
      ProxyFence();
      Arrive(barriers + kStageFull + stage_index * 8);
      if (++stage_index == a.stages) stage_index = 0, ++stage_round;
    }
  }
}

// The warp that sends off what the others have put on the stage.
template <class T>
__device__ inline void StoreStages(const PlanesArgs& a, const char* smem, int group, int lane) {
  const uint32_t barriers = SharedAddress(smem);
  int index = 0, round = 0;
  for (int column = blockIdx.x; column < a.columns; column += gridDim.x) {
    const PlanesColumn at = ColumnOf(a, column);
    for (int q = at.begin; q < at.end; ++q) {
      const char* stage = smem + a.smem_stage + index * a.stage;
      WaitFor(barriers + kStageFull + index * 8, round & 1);
      if (sizeof(T) == 4 || a.out_f32) {
        StoreRuns<float>(a, at, group, q, stage, lane);
      } else {
        StoreRuns<T>(a, at, group, q, stage, lane);
      }
      WaitForStores();
      Arrive(barriers + kStageEmpty + index * 8);
      if (++index == a.stages) index = 0, ++round;
    }
  }
}

template <class T, int MT, int NC, int SO>
__global__ void __launch_bounds__(kPlanesThreads<MT, NC>, PlanesBlocks(MT, NC))
    Planes(const __grid_constant__ PlanesArgs a) {
  if constexpr (!kHasBulkCopies) return;
  constexpr int kArrangers = Arrangers(MT, NC);
  extern __shared__ __align__(128) char smem[];
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(~0u, tid / 32, 0);  // known to be the same in all lanes
  const int group = blockIdx.y * a.groups_beside;
  const uint32_t full = SharedAddress(smem), empty = full + kPlaneEmpty;
  if (tid == 0) {
    for (int slot = 0; slot < a.slots; ++slot) {
      InitBarrier(full + slot * 8, kArrangers * 32);
      InitBarrier(empty + slot * 8, PlanesArgs::kWarps * 32);
    }
    for (int i = 0; i < 2; ++i) {
      InitBarrier(full + kStageFull + i * 8, PlanesArgs::kWarps * 32);
      InitBarrier(full + kStageEmpty + i * 8, 32);
    }
  }
  __syncthreads();

  if (warp < PlanesArgs::kWarps) {
    constexpr int kThreads = PlanesArgs::kWarps * 32;
    for (int i = 0; i < a.groups_beside; ++i) {
      KeepWeights<T>(a, group + i, smem + a.smem_weights + i * a.weights, tid, kThreads);
    }
    ListPlaces<T, MT>(a, reinterpret_cast<int*>(smem + a.smem_places), tid, kThreads);
    MeetPlanesWarps();
    MultiplyPlanes<T, MT, NC, SO>(a, smem, group, warp, lane);
    return;
  }
  if (warp == PlanesArgs::kWarps + kArrangers) {
    if (!a.last) StoreStages<T>(a, smem, group, lane);
    return;
  }
  const PlanesAxis& deep = a.axis[0];
  int slot = 0, round = 0, turn = warp - PlanesArgs::kWarps;
  for (int column = blockIdx.x; column < a.columns; column += gridDim.x) {
    const PlanesColumn at = ColumnOf(a, column);
    const T* image =
        static_cast<const T*>(a.in) + at.n * a.in_n_step + int64_t{group} * 8 * a.in_c_step;
    for (int q = at.begin; q < at.end; ++q) {
      for (int p = q == at.begin ? 0 : deep.length - a.fresh; p < deep.length; ++p) {
        if (round > 0) WaitFor(empty + slot * 8, (round - 1) & 1);
        ArrangePlane<T>(a, image, q * deep.si + deep.first + p,
                        at.h * a.axis[1].si + a.axis[1].first,
                        at.w * a.axis[2].si + a.axis[2].first, smem + a.smem_ring + slot * a.plane,
                        turn, kArrangers, lane);
        turn = (turn + kArrangers - a.rows % kArrangers) % kArrangers;
        Arrive(full + slot * 8);
        if (++slot == a.slots) slot = 0, ++round;
      }
    }
  }
}

template <class T, int MT, int NC, int SO>
cudaError_t EnqueuePlanesTile(const PlanesPlan& plan, const PlanesArgs& args, cudaStream_t stream) {
  const auto kernel = Planes<T, MT, NC, SO>;
  const cudaError_t status = AllowSharedMemory(kernel);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(plan.grid_x, plan.grid_y), kPlanesThreads<MT, NC>, plan.smem, stream>>>(args);
  return cudaGetLastError();
}

template <class T>
cudaError_t EnqueuePlanes(const PlanesPlan& plan, const PlanesArgs& args, cudaStream_t stream) {
#define JAXCONV_PLANES(mt_, nc_, so_)                                           \
  if (plan.mt == mt_ && plan.nc == nc_ && (so_ == 0 || args.axis[2].so == so_)) \
    return EnqueuePlanesTile<T, mt_, nc_, so_>(plan, args, stream);
  JAXCONV_PLANES(1, 8, 2)
  JAXCONV_PLANES(2, 8, 2)
  JAXCONV_PLANES(2, 8, 0)
  JAXCONV_PLANES(2, 4, 2)
  JAXCONV_PLANES(4, 1, 1)
  JAXCONV_PLANES(2, 1, 1)
  JAXCONV_PLANES(1, 1, 1)
#undef JAXCONV_PLANES
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_PLANES_CUH_
