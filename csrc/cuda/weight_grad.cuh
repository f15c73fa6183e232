// Device code of weight_grad.h.
//
// A warp multiplies tiles of 16 x 8 (mma.sync): the 16 rows are two "halves" of 8 output channels
// at one tap each (or any 16 of the list of taps and output channels), the 8 columns input
// channels, and the contraction runs over pixels. Which pixel is which index of the contraction is
// free as long as x and y agree, so each of the four threads that share a channel takes its own run
// of neighbouring pixels. All taps of a window along the innermost axis then read the same few
// values of y from registers, whatever the stride.
#ifndef JAXCONV_CUDA_WEIGHT_GRAD_CUH_
#define JAXCONV_CUDA_WEIGHT_GRAD_CUH_

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/dependent_launch.cuh"
#include "cuda/dtypes.cuh"
#include "cuda/mbarrier.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/shared_memory.h"
#include "cuda/weight_grad.h"
#include "cuda/wgmma.cuh"

namespace jaxconv::cuda::weight_grad {

constexpr int kThreads = 32 * (kWeightGradWarps + kWeightGradCopyWarps);
constexpr int kCopyThreads = 32 * kWeightGradCopyWarps;

constexpr int Log2(int n) { return n <= 1 ? 0 : 1 + Log2(n / 2); }

// Copies `valid` bytes and fills up to 4 or 16 with zeros.
__device__ inline void CopyAsync4(uint32_t to, const void* from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid)
               : "memory");
}
__device__ inline void CopyAsync16(uint32_t to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid)
               : "memory");
}
// One or four words 128 bytes apart: those whose bit of `wanted` is set, zeros where that of
// `valid` is not.
#define JAXCONV_COPY(k, bit) \
  "and.b32 t, %2, " #bit     \
  "; setp.ne.b32 w, t, 0;"   \
  "and.b32 t, %3, " #bit     \
  "; setp.eq.b32 z, t, 0;"   \
  "@w cp.async.ca.shared.global [%0+" #k "], [%1+" #k "], 4, z;"
__device__ inline void CopyAsyncWord(uint32_t to, const void* from, uint32_t wanted,
                                     uint32_t valid) {
  asm volatile("{ .reg .pred w, z; .reg .b32 t;" JAXCONV_COPY(0, 1) "}" ::"r"(to), "l"(from),
               "r"(wanted), "r"(valid)
               : "memory");
}
__device__ inline void CopyAsyncWords(uint32_t to, const void* from, uint32_t wanted,
                                      uint32_t valid) {
  asm volatile("{ .reg .pred w, z; .reg .b32 t;" JAXCONV_COPY(0, 1) JAXCONV_COPY(128, 2)
                   JAXCONV_COPY(256, 4) JAXCONV_COPY(384, 8) "}" ::"r"(to),
               "l"(from), "r"(wanted), "r"(valid)
               : "memory");
}
#undef JAXCONV_COPY
// Four words 128 bytes apart, if `wanted`.
__device__ inline void CopyAsyncWords(uint32_t to, const void* from, bool wanted) {
  asm volatile(
      "{ .reg .pred w; setp.ne.b32 w, %2, 0;"
      "@w cp.async.ca.shared.global [%0], [%1], 4;"
      "@w cp.async.ca.shared.global [%0+128], [%1+128], 4;"
      "@w cp.async.ca.shared.global [%0+256], [%1+256], 4;"
      "@w cp.async.ca.shared.global [%0+384], [%1+384], 4; }" ::"r"(to),
      "l"(from), "r"(static_cast<int>(wanted))
      : "memory");
}
__device__ inline void SyncMultipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kWeightGradWarps) : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ inline void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A register of its own, filled here.
__device__ inline uint32_t Own(uint32_t v) {
  uint32_t own;
  asm volatile("mov.b32 %0, %1;" : "=r"(own) : "r"(v));
  return own;
}

template <class In>
__device__ inline void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<In, float>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same_v<In, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ inline uint32_t RoundTf32(uint32_t v) {
  uint32_t rounded;
#if __CUDA_ARCH__ >= 900  // one instruction there, where cvt.rna takes four
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(v)));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(v)));
#endif
  return rounded;
}
__device__ inline uint32_t LoadTf32(const char* shared) {
  return RoundTf32(*reinterpret_cast<const uint32_t*>(shared));
}

// Words of shared memory, by vectors of 16 bytes.
template <int kWords>
__device__ inline void LoadVectors(uint32_t (&to)[kWords], const char* shared) {
#pragma unroll
  for (int v = 0; v < (kWords + 3) / 4; ++v) {
    const uint4 four = reinterpret_cast<const uint4*>(shared)[v];
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4 && 4 * v + i < kWords; ++i) to[4 * v + i] = words[i];
  }
}

// The same from `shift` words (0 ... 3) after `shared`.
template <int kWords>
__device__ inline void LoadFrom(uint32_t (&to)[kWords], const char* shared, int shift) {
  uint32_t word[kWords + 3];
  LoadVectors(word, shared);
#pragma unroll
  for (int i = 0; i < kWords + 2; ++i) word[i] = shift & 1 ? word[i + 1] : word[i];
#pragma unroll
  for (int i = 0; i < kWords; ++i) to[i] = shift & 2 ? word[i + 2] : word[i];
}

// Words of two elements, from pairs of words that begin at an element before (`odd`) or there.
template <int kWords>
__device__ inline void Align(uint32_t (&to)[kWords], const uint32_t (&word)[kWords + 1], int odd) {
#pragma unroll
  for (int m = 0; m < kWords; ++m) to[m] = __funnelshift_r(word[m], word[m + 1], 16 * odd);
}

// A step of the walk: where it is, and in which slot of the ring its window of y rows begins.
struct Step {
  int n, depth, column, row;  // in images, depth rows, blocks of `pixels`, rows
  int slot;
  bool fresh;  // no row of its window is in the ring yet

  __device__ Step(const WeightGradArgs& a, int64_t index) : slot(0), fresh(true) {
    row = static_cast<int>(index % a.isize[1]);
    index /= a.isize[1];
    column = static_cast<int>(index % a.column_blocks);
    index /= a.column_blocks;
    depth = static_cast<int>(index % a.depth_blocks) * a.depth;
    n = static_cast<int>(index / a.depth_blocks) * a.images;
  }

  __device__ void Advance(const WeightGradArgs& a) {
    fresh = ++row == a.isize[1];
    if (fresh) {
      row = 0;
      if (++column == a.column_blocks) {
        column = 0;
        depth += a.depth;
        if (depth >= a.isize[0]) {
          depth = 0;
          n += a.images;
        }
      }
    }
    slot += fresh ? a.window : a.advance;
    if (slot >= a.slots) slot -= a.slots;
  }
};

// One staged operand of a block: rows of `pixels` positions of its channels. What a thread copies
// of a row does not depend on the row, only on the column of the walk.
// kLong: with code for long rows by units, for which threads of few registers have no room.
template <class In, bool kLast, bool kUnits, bool kLong>
struct Stager {
  static constexpr bool kHalf = sizeof(In) == 2;
  static constexpr int kSize = sizeof(In), kUnit = 16 / kSize;  // elements of a unit

  const In* from;  // the block's first channel
  int channels, pixels, size;
  int64_t channel_stride, pixel_stride;  // in memory
  int channel, pixel, run_pad;           // in shared memory, bytes
  int log_run;                           // of the positions of a run; channels last
  int vector, units;                     // copies of a pixel (kUnits: of a row)
  bool spread;                           // kUnits: channels 4 ... 7 of eight lie a unit further
  // The warps take rows `row`, `row` + `rows`, ... and share each; of a row the thread takes every
  // `step`-th position (word) from `at` of channels `stripe`, `stripe` + `stripes`, ... or,
  // channels last, of unit `stripe`.
  int row, rows, at, step, log_step, stripe, stripes, count;
  // Bit k, of the thread's k-th position (16 bits: word; for rows at an even and an odd element):
  // copied at all; its first and its last element inside [0, size).
  uint32_t copied, low[1 + kHalf], high[1 + kHalf];
  int easy[1 + kHalf],
      easy_end[1 + kHalf];  // the k, in fours, of which the warp copies all in full
  int first;

  // Divides the copying threads, of which this is number `id`, among `rows_of_step` rows.
  __device__ void Share(int id, int rows_of_step) {
    const int width = kLast && units > 1 ? 1 << (32 - __clz(units - 1)) : 1;
    rows = 1;
    while (rows < kWeightGradCopyWarps && 2 * rows <= rows_of_step &&
           2 * rows * width <= kCopyThreads) {
      rows *= 2;
    }
    row = id / 32 & (rows - 1);
    const int threads = kCopyThreads / rows;
    const int thread = id / 32 / rows * 32 + (id & 31);
    if constexpr (kLast) {
      stripe = thread % width;
      at = thread / width;
      step = threads / width;
      log_step = __ffs(step) - 1;
      count = stripe < units && at < pixels ? (pixels - at + step - 1) / step : 0;
    } else {
      // Eight channels (of every row's units four) to a warp, so that a thread's channels all begin
      // at the same element of a unit.
      const int words = kHalf ? pixels / 2 + 1 : pixels;
      const int log = kUnits ? 2 : words > 16 ? 5 : words > 8 ? 4 : 3;
      step = 1 << log;
      at = thread & (step - 1);
      stripe = thread >> log;
      stripes = threads >> log;
      count = (words + step - 1) >> log;
    }
  }

  // The rows to come start at position `f`.
  __device__ void Column(int f) {
    first = f;
    if constexpr (!kLast && !kUnits) {
      copied = 0;
      for (int odd = 0; odd <= kHalf; ++odd) low[odd] = high[odd] = 0;
      const int words = kHalf ? pixels / 2 + 1 : pixels;
      for (int k = 0; k < count; ++k) {
        const int p = at + k * step;
        if (p >= words) break;
        copied |= 1u << k;
        for (int odd = 0; odd <= kHalf; ++odd) {
          const int o = kHalf ? f - odd + 2 * p : f + p;
          if (static_cast<unsigned>(o) < static_cast<unsigned>(size)) low[odd] |= 1u << k;
          if (static_cast<unsigned>(o + kHalf) < static_cast<unsigned>(size)) high[odd] |= 1u << k;
        }
      }
      for (int odd = 0; odd <= kHalf; ++odd) {
        const uint32_t all = __reduce_and_sync(~0u, copied & low[odd] & high[odd]);
        const uint32_t fours = step < 32 ? 0 : all & all >> 1 & all >> 2 & all >> 3 & 0x11111111u;
        easy[odd] = fours == 0 ? 0 : __ffs(fours) - 1;
        easy_end[odd] = fours == 0 ? 0 : 32 - __clz(fours) + 3;
      }
    }
  }

  __device__ void RowOfUnits(uint32_t to, const char* row, bool inside) const;

  // Stages the row at `offset`, zeros outside [0, size), or all zeros.
  __device__ void Row(uint32_t to, int64_t offset, bool inside) const {
    if constexpr (kUnits) {
      RowOfUnits(to, reinterpret_cast<const char*>(from + offset + first), inside);
    } else if constexpr (kLast) {
      // Positions at + k * step inside the row are those with low <= k < high.
      const int begin = first + at, end = inside ? size : first;
      const int low = min(begin >= 0 ? 0 : (-begin + step - 1) >> log_step, count);
      const int high = max(min(end > begin ? (end - begin + step - 1) >> log_step : 0, count), low);
      const In* row =
          from + offset + begin * pixel_stride + stripe * (vector / static_cast<int>(sizeof(In)));
      int64_t hop = step * pixel_stride;
      int hop_shared = step * pixel;
      asm volatile("" : "+l"(hop), "+r"(hop_shared));  // or it is multiplied out for every copy
      uint32_t dst = to + stripe * vector + at * pixel;
      int p = at;
      const auto next = [&] { p += step, dst += hop_shared, row += hop; };
      const auto copy16 = [&](int bytes) {
        CopyAsync16(dst + (p >> log_run) * run_pad, row, bytes);
      };
      const auto copy = [&](int bytes) {
        if (vector == 16) {
          copy16(bytes);
        } else {
          CopyAsync4(dst + (p >> log_run) * run_pad, row, min(bytes, 4));
        }
      };
      int k = 0;
      if (vector == 16 && high - low < 8) {
#pragma unroll 4
        for (; k < count; ++k, next()) copy16(k >= low && k < high ? 16 : 0);
        return;
      }
#pragma unroll 1
      for (; k < low; ++k, next()) copy(0);
      if (vector == 16) {
#pragma unroll 4
        for (; k < high; ++k, next()) copy16(16);
      }
#pragma unroll 1
      for (; k < count; ++k, next()) copy(k < high ? 16 : 0);
    } else {
      const char* row =
          reinterpret_cast<const char*>(from + offset + first + stripe * channel_stride);
      to += stripe * channel + 4 * at;
      int64_t hop = stripes * channel_stride * static_cast<int>(sizeof(In));
      int hop_shared = stripes * channel;
      asm volatile("" : "+l"(hop), "+r"(hop_shared));  // or it is multiplied out for every row
#pragma unroll 1
      for (int c = stripe; c < channels; c += stripes) {
        int odd = 0;
        const char* word = row + 4 * at;
        if constexpr (kHalf) {  // words of two elements, aligned in memory: position p is at p +
                                // odd
          odd = static_cast<int>(reinterpret_cast<uintptr_t>(row) >> 1) & 1;
          word -= 2 * odd;
        }
        const uint32_t begins = !inside ? 0 : kHalf && odd ? low[kHalf] : low[0];
        const uint32_t ends = !kHalf ? begins : !inside ? 0 : odd ? high[kHalf] : high[0];
        const uint32_t edges = begins ^ ends, wanted = copied & ~edges;
        if (count == 1) {
          CopyAsyncWord(to, word, wanted, begins);
        } else {
          const int end = !inside ? 0 : kHalf && odd ? easy_end[kHalf] : easy_end[0];
          int k = kHalf && odd ? easy[kHalf] : easy[0];
          if (end == 0) k = 0;
#pragma unroll 1
          for (int e = 0; e < k; e += 4) {  // one four, unless a row begins far outside
            CopyAsyncWords(to + e * 128, word + e * 128, wanted >> e, begins >> e);
          }
          CopyAsyncWords(to + k * 128, word + k * 128, k < end);
          if (k < end) k += 4;
#pragma unroll 1
          for (; k < end; k += 4) CopyAsyncWords(to + k * 128, word + k * 128, true);
          if (k + 1 == count) {
            CopyAsyncWord(to + k * 128, word + k * 128, wanted >> k, begins >> k);
          } else {
#pragma unroll 1
            for (; k < count; k += 4) {
              CopyAsyncWords(to + k * 128, word + k * 128, wanted >> k, begins >> k);
            }
          }
        }
        if constexpr (kHalf) {
          for (uint32_t rest = edges; rest != 0; rest &= rest - 1) {
            const int e = __ffs(rest) - 1;
            const auto* pair = reinterpret_cast<const unsigned short*>(word) + e * 64;
            const uint32_t value = begins >> e & 1 ? pair[0] : static_cast<uint32_t>(pair[1]) << 16;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + e * 128), "r"(value) : "memory");
          }
        }
        row += hop;
        to += hop_shared;
      }
    }
  }
};

// The same by units, of which the first holds position `first`. Outside the row nothing is read but
// what shares a unit with its first element.
template <class In, bool kLast, bool kUnits, bool kLong>
__device__ void Stager<In, kLast, kUnits, kLong>::RowOfUnits(uint32_t to, const char* row,
                                                             bool inside) const {
  const int end = inside ? size : -kUnit;  // before every unit
  // The element of its unit that position `first` of the channel at `place` is.
  const auto shift_of = [](const char* place) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(place) / kSize) & (kUnit - 1);
  };
  const auto channel_at = [&](int c) { return to + c * channel + (spread ? (c & 4) * 4 : 0); };
  const char* const own = row + stripe * channel_stride * kSize;
  const int own_shift = shift_of(own);
  int64_t hop = stripes * channel_stride * kSize;
  int hop_shared = stripes * channel;
  asm volatile("" : "+l"(hop), "+r"(hop_shared));  // or it is multiplied out for every copy
  // A unit that begins before position 0 and ends after it is put together below, unless nobody
  // reads what is before 0.
  constexpr int kStep = 4, kBytes = kStep * 16;
  if (kLong && units >= 4 * kStep) {
    // The thread's units are at + 4 k; those inside the row have low <= k < high.
    const int start = first - own_shift + at * kUnit, count = (units - at + kStep - 1) / kStep;
    const int low = first >= 0 ? 0 : min((-start + kStep * kUnit - 1) / (kStep * kUnit), count);
    const int high = max(low, min((end - start - kUnit + kStep * kUnit) / (kStep * kUnit), count));
    const char* source = own + (at * 16 - own_shift * kSize);
    uint32_t unit = channel_at(stripe) + at * 16;
#pragma unroll 1
    for (int c = stripe; c < channels; c += stripes, source += hop, unit += hop_shared) {
      const char* from_unit = source + low * kBytes;
      uint32_t to_unit = unit + low * kBytes;
#pragma unroll 4
      for (int k = low; k < high; ++k, from_unit += kBytes, to_unit += kBytes) {
        CopyAsync16(to_unit, from_unit, 16);
      }
#pragma unroll 1
      for (int k = high; k < count; ++k, from_unit += kBytes, to_unit += kBytes) {
        CopyAsync16(to_unit, from_unit, min(max(end - start - k * kStep * kUnit, 0) * kSize, 16));
      }
#pragma unroll 1
      for (int k = 0; k < low; ++k) {
        if (start + k * kStep * kUnit > -kUnit) continue;
        CopyAsync16(unit + k * kBytes, source + k * kBytes, 0);
      }
    }
  } else {
    for (int u = at; u < units; u += kStep) {
      const int begin = first - own_shift + u * kUnit;  // the position of the unit's first element
      const bool whole = begin >= 0 || first >= 0;
      if (!whole && begin > -kUnit) continue;
      const int bytes = whole ? min(max(end - begin, 0) * kSize, 16) : 0;
      const char* source = own + (u * 16 - own_shift * kSize);
      uint32_t unit = channel_at(stripe) + u * 16;
#pragma unroll 4
      for (int c = stripe; c < channels; c += stripes, source += hop, unit += hop_shared) {
        CopyAsync16(unit, source, bytes);
      }
    }
  }
  if (first >= 0) return;
#pragma unroll 4
  for (int i = stripe * step + at; i < channels * kUnit; i += stripes * step) {
    const int c = i / kUnit, e = i % kUnit;
    const char* const start = row + c * channel_stride * kSize;
    const int shift = shift_of(start), zero = (shift - first) % kUnit;  // where position 0 lies
    const int u = (shift - first) / kUnit, position = e - zero;
    if (zero == 0 || u >= units) continue;
    const bool valid = position >= 0 && position < end;
    const char* const source = start + (position - first) * kSize;
    const uint32_t element = channel_at(c) + u * 16 + e * kSize;
    if constexpr (kHalf) {
      const unsigned short value =
          valid ? *reinterpret_cast<const unsigned short*>(source) : static_cast<unsigned short>(0);
      asm volatile("st.shared.b16 [%0], %1;" ::"r"(element), "h"(value) : "memory");
    } else {
      CopyAsync4(element, source, valid ? 4 : 0);
    }
  }
}

template <class Out>
__device__ inline void Store(void* out, int64_t at, float v) {
  static_cast<Out*>(out)[at] = FromAccumulator<Out>(v);
}

__device__ inline void StoreAs(int32_t dtype, void* out, int64_t at, float v) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBF16:
      return Store<__nv_bfloat16>(out, at, v);
    case DType::kF16:
      return Store<__half>(out, at, v);
    default:
      return Store<float>(out, at, v);
  }
}

template <class In, bool kLast, int kStride, int kTaps, int kOctets, bool kGroup>
__global__ void __launch_bounds__(kThreads, 1)
    WeightGradKernel(const __grid_constant__ WeightGradArgs a) {
  if constexpr (kGroup && !kHasGroups) return;
  LetNextStart();  // SumParts
  constexpr bool kHalf = sizeof(In) == 2;
  constexpr int kRun = WeightGradRun(kHalf, kStride);
  constexpr int kPairs = WeightGradPairs(kTaps, kOctets);
  constexpr int kWindow = kStride == 0 ? kRun : (kRun - 1) * kStride + kTaps;  // values of a half
  // 16 bits: words of two; channels last they come in twos.
  constexpr int kWords = kHalf ? ((kWindow + 1) / 2 + kLast) / (1 + kLast) * (1 + kLast) : kWindow;
  constexpr int kXWords = kHalf ? kRun / 2 : kRun;
  constexpr bool kUnits = WeightGradUnits(kLast, kStride);
  // Offsets of elements count modulo a unit (else, 16 bits: modulo a word).
  constexpr int kOffsets = (kUnits ? 16 / static_cast<int>(sizeof(In)) : 2) - 1;
  const int stride = kStride == 0 ? a.lattice_stride[2] : kStride;

  extern __shared__ __align__(16) char shared[];
  // A warp's number is the same in all its lanes, which the compiler has to see.
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0);
  const int row8 = lane >> 2, quad = lane & 3;  // the thread's channel of a half and its run

  // Which columns of dw, which part of the steps.
  int64_t block = blockIdx.x;
  const int pair_block = static_cast<int>(block % a.pair_blocks);
  block /= a.pair_blocks;
  const int co_block = static_cast<int>(block % a.co_blocks);
  block /= a.co_blocks;
  const int ci_block = static_cast<int>(block % a.ci_blocks);
  block /= a.ci_blocks;
  const int group0 = static_cast<int>(block % a.group_blocks) * a.groups_per_block;
  const int part = static_cast<int>(block / a.group_blocks);
  const int ci0 = ci_block * a.ci_slots * kOctets * 8, co0 = co_block * a.co_octets * 8;
  const int64_t step_begin = part * a.steps / a.parts, step_end = (part + 1) * a.steps / a.parts;

  const int tap_rows = a.co_rows * a.segments;  // rows of a tap of the two outer axes
  const int first_depth_tap = pair_block * a.pair_slots * a.slot_pairs * 16 / tap_rows / a.k[1];

  const uint32_t shared_address = SharedAddress(shared);
  for (int i = threadIdx.x * 16; i < a.shared; i += kThreads * 16) {
    *reinterpret_cast<uint4*>(shared + i) = uint4{0, 0, 0, 0};
  }
  __syncthreads();
  const uint32_t barrier = shared_address + a.barrier;
  if (threadIdx.x == 0) InitBarrier(barrier, kThreads);
  __syncthreads();
  int meetings = 0;  // of those who copy and those who multiply

  if (warp >= kWeightGradWarps) {
    if constexpr (kGroup) GiveRegisters<56>();
    Stager<In, kLast, kUnits, !kGroup> stage_x, stage_y;
    {
      const int groups = a.groups_per_block;
      stage_x.from = static_cast<const In*>(a.x) + (int64_t{group0} * a.cig + ci0) * a.xs.c;
      stage_y.from = static_cast<const In*>(a.y) + (int64_t{group0} * a.cog + co0) * a.ys.c;
      stage_x.channels = groups > 1 ? groups * a.cig : min(a.cig - ci0, a.ci_slots * kOctets * 8);
      stage_y.channels = groups > 1 ? groups * a.cog : min(a.cog - co0, a.co_octets * 8);
      stage_x.pixels = a.pixels;
      stage_y.pixels = a.y_pixels;
      stage_x.size = a.isize[2];
      stage_y.size = a.osize[2];
      stage_x.channel_stride = a.xs.c;
      stage_y.channel_stride = a.ys.c;
      stage_x.pixel_stride = a.xs.s[2];
      stage_y.pixel_stride = a.ys.s[2];
      stage_x.channel = a.x_channel;
      stage_y.channel = a.y_channel;
      stage_x.pixel = a.x_pixel;
      stage_y.pixel = a.y_pixel;
      stage_x.run_pad = a.x_run_pad;
      stage_y.run_pad = a.y_run_pad;
      stage_x.log_run = Log2(kRun);
      stage_y.log_run = Log2(kRun * (kStride == 0 ? 1 : kStride));  // any stride: rows without gaps
      const int per = a.vector / static_cast<int>(sizeof(In));
      stage_x.vector = stage_y.vector = a.vector;
      stage_x.units = kUnits ? a.x_units : stage_x.channels / per;
      stage_y.units = kUnits ? a.y_units : stage_y.channels / per;
      stage_x.spread = false;
      stage_y.spread = a.y_spread;
      const int id = threadIdx.x - 32 * kWeightGradWarps;
      stage_x.Share(id, a.images * a.depth);
      stage_y.Share(id, a.advance * a.images * a.y_depth);
    }

    // Starts the copies of a step's x rows and of the y rows that the ring does not hold yet.
    const auto issue = [&](const Step& s, int stage) {
      if (s.fresh) {
        stage_x.Column(s.column * a.pixels);
        stage_y.Column(s.column * a.pixels * stride - a.pad[2]);
      }
      for (int i = stage_x.row; i < a.images * a.depth; i += stage_x.rows) {
        const int image = Divide(i, a.by_depth), d = i - image * a.depth;
        const int n = s.n + image, i0 = s.depth + d;
        stage_x.Row(shared_address + a.x_base + stage * a.x_stage + i * a.x_row,
                    n * a.xs.n + i0 * a.xs.s[0] + s.row * a.xs.s[1], n < a.n && i0 < a.isize[0]);
      }
      const int planes = a.images * a.y_depth, r0 = s.fresh ? 0 : a.window - a.advance;
      const int first0 = (s.depth * a.lattice_stride[0] + first_depth_tap * a.lattice_step[0]);
      for (int i = stage_y.row; i < (a.window - r0) * planes; i += stage_y.rows) {
        const int below = Divide(i, a.by_planes), r = r0 + below, plane = i - below * planes;
        const int image = Divide(plane, a.by_y_depth), d = plane - image * a.y_depth;
        if (!(a.row_mask >> r & 1) || !(a.depth_mask >> d & 1)) continue;
        const int slot = s.slot + r < a.slots ? s.slot + r : s.slot + r - a.slots;
        const int n = s.n + image, o0 = (first0 + d) * a.gap[0] - a.pad[0];
        const int o1 = (s.row * a.lattice_stride[1] + r) * a.gap[1] - a.pad[1];
        stage_y.Row(shared_address + slot * a.y_slot + plane * a.y_row,
                    n * a.ys.n + o0 * a.ys.s[0] + o1 * a.ys.s[1],
                    n < a.n && static_cast<unsigned>(o0) < static_cast<unsigned>(a.osize[0]) &&
                        static_cast<unsigned>(o1) < static_cast<unsigned>(a.osize[1]));
      }
    };

    Step next(a, step_begin);
    int next_stage = 0;
    int64_t to_issue = step_end - step_begin;
    const auto issue_next = [&] {
      if (to_issue > 0) {
        issue(next, next_stage);
        next.Advance(a);
        --to_issue;
      }
      next_stage = next_stage == a.ahead ? 0 : next_stage + 1;
      CommitCopies();
    };
    for (int i = 0; i < a.ahead; ++i) issue_next();
    for (int64_t step = step_begin; step < step_end; ++step) {
      if (a.ahead == 1) {
        WaitCopies<0>();
      } else if (a.ahead == 2) {
        WaitCopies<1>();
      } else {
        WaitCopies<2>();
      }
      Meet(barrier, meetings);  // and the step before is multiplied
      issue_next();
    }
    return;
  }

  if constexpr (kGroup) TakeRegisters<224>();
  // A group's four warps differ in their pairs alone.
  int role = warp;
  const int inner_slots = kGroup ? a.pair_slots : a.pixel_slots;
  const int inner_slot = role % inner_slots;
  role /= inner_slots;
  const int outer_slots = kGroup ? a.pixel_slots : a.pair_slots, outer_slot = role % outer_slots;
  role /= outer_slots;
  const int pixel_slot = kGroup ? outer_slot : inner_slot;
  const int pair_slot = kGroup ? inner_slot : outer_slot;
  const int ci_slot = role % a.ci_slots, group_slot = role / a.ci_slots;

  const int first_pair = (pair_block * a.pair_slots + pair_slot) * a.slot_pairs;
  const int pairs = min(max((a.rows + 15) / 16 - first_pair, 0), a.slot_pairs);
  const int first_row = first_pair * 16;

  // Lane l keeps the offsets of the warp's half l, or (kList) of its rows l, l + 32, ...: the place
  // of a window in a slot of the ring, and how many lattice rows below the step's first it is.
  constexpr bool kList = WeightGradRowList(kHalf, kLast, kStride);
  constexpr int kKept = kList ? (kPairs + 1) / 2 : 1;
  int row_offset[kKept], row_line[kKept], row_odd[kKept];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int row = min(first_row + (kList ? 32 * i + lane : 8 * lane), a.rows - (kList ? 1 : 8));
    const int co = row % a.co_rows, segment = row / a.co_rows % a.segments;
    const int tap = row / tap_rows, t0 = tap / a.k[1] - first_depth_tap, t1 = tap % a.k[1];
    const int shift = segment * kTaps * a.lattice_step[2];
    row_line[i] = t1 * a.lattice_step[1];
    row_offset[i] =
        t0 * a.lattice_step[0] * a.y_row + co * a.y_channel + (kUnits ? 0 : shift * a.y_pixel);
    // Units, and 16 bits channels first: element offsets, since a staged row begins at the unit, or
    // the word, of its first.
    row_odd[i] =
        static_cast<int>((co * a.ys.c + int64_t{t0} * a.lattice_step[0] * a.gap[0] * a.ys.s[0] +
                          int64_t{t1} * a.lattice_step[1] * a.gap[1] * a.ys.s[1]) &
                         kOffsets);
    if (kUnits) row_odd[i] |= shift << 4;
  }

  float sums[kPairs][kTaps][kOctets][4] = {};

  // The thread's (channels last, 16 bits: the loading lane's) share of offsets.
  const bool by_matrix = kHalf && kLast;
  const int own_run = by_matrix ? (lane & 7) >> 1 : quad;
  const int x_own = a.x_base +
                    (group_slot * a.cig + (kGroup ? 0 : ci_slot * kOctets * 8)) * a.x_channel +
                    (by_matrix ? ((lane & 1) + 2 * (lane >> 3)) * a.x_pixel : row8 * a.x_channel);
  const int y_own =
      group_slot * a.cog * a.y_channel +
      (by_matrix ? ((lane & 1) + 2 * (lane >> 3 & 1)) * a.y_pixel * (kStride == 0 ? stride : 1)
       : kList   ? 0
                 : row8 * a.y_channel + (a.y_spread ? (group_slot * a.cog + row8 & 4) * 4 : 0));
  // Units, and 16 bits channels first: the element that the thread's row begins at.
  const auto offset = [&](int64_t elements) { return static_cast<int>(elements & kOffsets); };
  const int x_odd_image = offset(a.xs.n), y_odd_image = offset(a.ys.n);
  const int x_odd_depth = offset(a.xs.s[0]);
  const int y_odd_depth = offset(a.lattice_stride[0] * a.gap[0] * a.ys.s[0]);
  const int x_odd_own = offset(
      static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.x) / sizeof(In)) +
      ((group0 + group_slot) * int64_t{a.cig} + ci0 + ci_slot * kOctets * 8 + row8) * a.xs.c);
  const int y_odd_own =
      offset(static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.y) / sizeof(In)) +
             ((group0 + group_slot) * int64_t{a.cog} + co0 + (kList ? 0 : row8)) * a.ys.c +
             (int64_t{first_depth_tap} * a.lattice_step[0] * a.gap[0] - a.pad[0]) * a.ys.s[0] -
             a.pad[1] * a.ys.s[1] - a.pad[2]);
  const int runs_total = a.images * a.depth * a.runs, chunks = (runs_total + 3) / 4;

  // A thread's run of a chunk of four: where it is in shared memory, and the offsets of its rows.
  struct Run {
    const char *x, *y;
    int x_odd, y_odd;
  };
  // A group's instruction takes its four words of y from a row of registers, "quad". It depends on
  // where in the window its first value lies, so taps share quads.
  constexpr int kGroupApart = kXWords / 2,
                kWordElements = (kHalf ? 2 : 1) * (kStride ? kStride : 1);
  constexpr int kQuads = (kGroupApart - 1) * kWordElements + kTaps;

  const auto compute = [&](const Step& s, int stage) {
    int kept_offset[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int slot = s.slot + row_line[i];
      kept_offset[i] = (slot < a.slots ? slot : slot - a.slots) * a.y_slot + row_offset[i];
    }
    const int x_odd_step = x_odd_own + s.n * x_odd_image + s.depth * x_odd_depth +
                           s.row * static_cast<int>(a.xs.s[1]) + s.column * a.pixels;
    const int y_odd_step = y_odd_own + s.n * y_odd_image + s.depth * y_odd_depth +
                           s.row * a.lattice_stride[1] * a.gap[1] * static_cast<int>(a.ys.s[1]) +
                           s.column * a.pixels * stride;
    const auto run_of = [&](int chunk) {
      const int run = min(chunk * 4 + own_run, runs_total - 1);
      const int line = Divide(run, a.by_runs), along = run - line * a.runs;
      const int image = Divide(line, a.by_depth), d = line - image * a.depth;
      return Run{shared + stage * a.x_stage + x_own + line * a.x_row +
                     along * (kRun * a.x_pixel + a.x_run_pad),
                 shared + y_own + (image * a.y_depth + d * a.lattice_stride[0]) * a.y_row +
                     along * (kRun * stride * a.y_pixel + a.y_run_pad),
                 (x_odd_step + image * x_odd_image + d * x_odd_depth) & kOffsets,
                 y_odd_step + image * y_odd_image + d * y_odd_depth};
    };
    // Eight channels of x: each thread's is that of its row. Zeros after the last run.
    const auto load_x = [&](const Run& run, int chunk, int octet, uint32_t (&x)[kXWords]) {
      const char* const at = run.x + octet * 8 * a.x_channel;
      if (kUnits && a.x_aligned) {
        LoadVectors(x, at);
        if constexpr (!kHalf) {
#pragma unroll
          for (int l = 0; l < kXWords; ++l) x[l] = RoundTf32(x[l]);
        }
      } else if constexpr (!kHalf) {
#pragma unroll
        for (int l = 0; l < kXWords; ++l) {
          x[l] = LoadTf32(at + (kUnits ? 4 * run.x_odd : 0) + l * (kLast ? a.x_pixel : 4));
        }
      } else if constexpr (kLast) {
        if constexpr (kXWords >= 4) {
#pragma unroll
          for (int m = 0; m < kXWords; m += 4) {
            uint32_t word[4];
            LoadTransposed(word, SharedAddress(at + 2 * m * a.x_pixel));
#pragma unroll
            for (int i = 0; i < 4; ++i) x[m + i] = word[i];
          }
        } else {
          // Two words: the upper lanes' addresses repeat the lower ones'.
          uint32_t word[4];
          LoadTransposed(word, SharedAddress(at - (lane >= 16 ? 4 * a.x_pixel : 0)));
          x[0] = word[0];
          x[1] = word[1];
        }
      } else {
        uint32_t word[kXWords + 1];
#pragma unroll
        for (int m = 0; m <= kXWords; ++m) {
          word[m] = *reinterpret_cast<const uint32_t*>(at + (run.x_odd / 2 + m) * 4);
        }
        Align(x, word, run.x_odd & 1);
      }
      if (chunk * 4 + quad >= runs_total) {
#pragma unroll
        for (int m = 0; m < kXWords; ++m) x[m] = 0;
      }
    };
    // The windows of both halves of pair u.
    const auto load_y = [&](const Run& run, int u, uint32_t (&y)[2][kWords]) {
      if constexpr (kHalf && kLast) {
        // A matrix of 8 pixels x 8 channels a register: two words of each half at a time.
        const char* at = run.y + __shfl_sync(~0u, kept_offset[0], 2 * u + (lane >> 4));
#pragma unroll
        for (int m = 0; m < kWords; m += 2) {
          uint32_t word[4];
          if constexpr (kStride == 0) {
            LoadTransposed(word, SharedAddress(at + 2 * m * stride * a.y_pixel));
          } else {
            LoadTransposed(word, SharedAddress(at + 2 * m * a.y_pixel +
                                               2 * m / (kRun * kStride) * a.y_run_pad));
          }
          y[0][m] = word[0];
          y[0][m + 1] = word[1];
          y[1][m] = word[2];
          y[1][m + 1] = word[3];
        }
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int kept = kList ? u / 2 : 0;
          const int keeper = kList ? u % 2 * 16 + h * 8 + row8 : 2 * u + h;
          const char* at = run.y + __shfl_sync(~0u, kept_offset[kept], keeper);
          if constexpr (kUnits) {
            const int row = __shfl_sync(~0u, row_odd[0], keeper);
            const int element = ((run.y_odd + row) & kOffsets) + (row >> 4);
            if (a.y_spread) {
#pragma unroll
              for (int j = 0; j < kWords; ++j) {
                y[h][j] = *reinterpret_cast<const uint32_t*>(at + 4 * (element + j));
              }
            } else if (a.y_aligned) {
              LoadVectors(y[h], at);
            } else {
              const char* const unit = at + (element & ~kOffsets) * static_cast<int>(sizeof(In));
              const int words = (element & kOffsets) / (1 + kHalf);
              if constexpr (kHalf) {
                uint32_t word[kWords + 1];
                LoadFrom(word, unit, words);
                Align(y[h], word, element & 1);
              } else {
                LoadFrom(y[h], unit, words);
              }
            }
            if constexpr (!kHalf) {
#pragma unroll
              for (int j = 0; j < kWords; ++j) y[h][j] = RoundTf32(y[h][j]);
            }
          } else if constexpr (!kHalf) {
#pragma unroll
            for (int j = 0; j < kWindow; ++j) {
              if constexpr (kStride == 0) {
                y[h][j] = LoadTf32(at + j * stride * a.y_pixel);
              } else {
                y[h][j] = LoadTf32(at + j * a.y_pixel + j / (kRun * kStride) * a.y_run_pad);
              }
            }
          } else {
            const int odd = (run.y_odd + __shfl_sync(~0u, row_odd[kept], keeper)) & 1;
            const char* first = at + 2 * odd;  // elements one by one
#pragma unroll
            for (int m = 0; m < kWords; ++m) {
              const uint32_t low = *reinterpret_cast<const unsigned short*>(first + 4 * m * stride);
              const uint32_t high =
                  *reinterpret_cast<const unsigned short*>(first + (4 * m + 2) * stride);
              y[h][m] = low | high << 16;
            }
          }
        }
      }
    };
    // The pair of values (float32: value) that begins at element i of a half's window.
    const auto fragment = [&](const uint32_t (&y)[kWords], int i) -> uint32_t {
      if constexpr (kStride == 0 || !kHalf) {
        return y[i];
      } else if constexpr (kStride == 1) {
        return i % 2 == 0 ? y[i / 2] : __byte_perm(y[i / 2], y[i / 2 + 1], 0x5432);
      } else {
        return __byte_perm(y[i / 2], y[i / 2 + 1], i % 2 == 0 ? 0x5410 : 0x7632);
      }
    };
    // Where tap t's begins that word l of x multiplies.
    const auto element = [](int l, int t) {
      return kStride == 0 ? l : (kHalf ? 2 : 1) * l * kStride + t;
    };
    // The two words that an instruction takes of each operand are half a run apart (float32), so
    // that the registers of one operand seldom belong to another, too.
    constexpr int kApart = kHalf ? 1 : kXWords / 2;
    const auto first_word = [](int i) { return kHalf ? 2 * i : i; };

    if constexpr (kGroup) {
      // x as the group's second operand: cores of 8 channels x 16 bytes, those of one word of the
      // four runs beside each other.
      const int octets = a.ci_slots * kOctets, log_octets = __ffs(octets) - 1;
      for (int item = warp; item < chunks << log_octets; item += kWeightGradWarps) {
        const int chunk = item >> log_octets, octet = item & (octets - 1);
        uint32_t x[kXWords];
        load_x(run_of(chunk), chunk, octet, x);
        char* const to = shared + a.b_base + ((chunk * kXWords << log_octets) + octet) * 128;
#pragma unroll
        for (int l = 0; l < kXWords; ++l) {
          const int place = l % kGroupApart * 2 + l / kGroupApart;
          reinterpret_cast<uint32_t*>(to + (place << log_octets) * 128)[lane] = x[l];
        }
      }
      ProxyFence();
      SyncMultipliers();

      // While a pair of one chunk is being multiplied the next one's windows are loaded.
      constexpr int kBuffers =
          kPairs > 1 || WeightGradSums({kStride, kTaps, kOctets, true}) + 8 * kQuads > 140 ? 1 : 2;
      uint32_t quads[kBuffers][kQuads][4];
      const uint64_t columns =
          Descriptor(shared_address + a.b_base + ci_slot * kOctets * 128, octets * 128, 128);
      const auto multiply = [&](const Run& run, int chunk, int u, uint32_t (&quad)[kQuads][4]) {
        if (kBuffers == 1) WaitForProducts<0>();
        uint32_t y[2][kWords];
        load_y(run, u, y);
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            quad[q][h] = Own(fragment(y[h], q));
            quad[q][2 + h] = Own(fragment(y[h], q + element(kGroupApart, 0)));
          }
        }
        if (kBuffers == 2) WaitForProducts<0>();
        GroupFence();
#pragma unroll
        for (int l = 0; l < kGroupApart; ++l) {
          const uint64_t b =
              columns + static_cast<uint32_t>((chunk * kGroupApart + l) * octets * 16);
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            const uint32_t (&a4)[4] = quad[element(l, t)];
            GroupMmaRows<In, kOctets>::Run(&sums[u][t][0][0], a4[0], a4[1], a4[2], a4[3], b);
          }
        }
        GroupCommit();
      };
      for (int chunk = pixel_slot; chunk < chunks; chunk += kBuffers * a.pixel_slots) {
#pragma unroll
        for (int c = 0; c < kBuffers; ++c) {
          const int this_chunk = chunk + c * a.pixel_slots;
          const Run run = run_of(this_chunk);
#pragma unroll
          for (int u = 0; u < kPairs; ++u) {
            if (this_chunk < chunks && u < a.slot_pairs) {
              multiply(run, this_chunk, u, quads[(c * kPairs + u) % kBuffers]);
            } else if (kBuffers == 2) {
              WaitForProducts<0>();  // the registers of the one before the last are free
            }
          }
        }
      }
      WaitForProducts<0>();
    } else {
      for (int chunk = pixel_slot; chunk < chunks; chunk += a.pixel_slots) {
        const Run run = run_of(chunk);
        uint32_t x[kOctets][kXWords];
#pragma unroll
        for (int b = 0; b < kOctets; ++b) load_x(run, chunk, b, x[b]);
#pragma unroll
        for (int u = 0; u < kPairs; ++u) {
          if (u >= pairs) break;
          uint32_t y[2][kWords];
          load_y(run, u, y);
#pragma unroll
          for (int i = 0; i < kXWords / 2; ++i) {
            const int l = first_word(i), m = l + kApart;
#pragma unroll
            for (int t = 0; t < kTaps; ++t) {
#pragma unroll
              for (int b = 0; b < kOctets; ++b) {
                Mma<In>(sums[u][t][b], fragment(y[0], element(l, t)), fragment(y[1], element(l, t)),
                        fragment(y[0], element(m, t)), fragment(y[1], element(m, t)), x[b][l],
                        x[b][m]);
              }
            }
          }
        }
      }
    }
  };

  constexpr int kSums = WeightGradSums({kStride, kTaps, kOctets});
  float* all = &sums[0][0][0][0];
  const auto kept = [&] {
    return a.kept + (blockIdx.x * int64_t{kWeightGradWarps} + warp) * (kSums * 32) + lane;
  };

  Step now(a, step_begin);
  const int count = static_cast<int>(step_end - step_begin);
  int stage = 0;
  for (int i = 1, flush = a.flush; i <= count; ++i) {
    Meet(barrier, meetings);  // the step's copies are there
    compute(now, stage);
    now.Advance(a);
    stage = stage == a.ahead ? 0 : stage + 1;
    if (i == flush) {
      float* const to = kept();
      const bool first = flush == a.flush;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        to[s * 32] = first ? all[s] : to[s * 32] + all[s];
        all[s] = 0;
      }
      flush += a.flush;
    }
  }
  if (a.flush != 0 && count >= a.flush) {
    const float* const from = kept();
#pragma unroll
    for (int s = 0; s < kSums; ++s) all[s] += from[s * 32];
  }

  // Warps that shared the pixels add up in their order.
  const int owner = (group_slot * a.ci_slots + ci_slot) * a.pair_slots + pair_slot;
  SyncMultipliers();
  for (int from = 1; from < a.pixel_slots; ++from) {
    float* place = reinterpret_cast<float*>(shared) + owner * kSums * 32 + lane;
    if (pixel_slot == from) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) place[i * 32] = all[i];
    }
    SyncMultipliers();
    if (pixel_slot == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) all[i] += place[i * 32];
    }
    SyncMultipliers();
  }
  if (pixel_slot != 0) return;

  const int64_t part_offset = a.parts > 1 ? part * a.w_elements : 0;
  const int taps = a.k[0] * a.k[1] * a.k[2];
#pragma unroll
  for (int u = 0; u < kPairs; ++u) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 16 * u + 8 * h + row8;
      if (u >= pairs || row >= a.rows) continue;
      const int co = co0 + row % a.co_rows;
      const int tap2 = row / a.co_rows % a.segments * kTaps, tap01 = row / tap_rows;
      if (co >= a.cog) continue;
#pragma unroll
      for (int b = 0; b < kOctets; ++b) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int ci = ci0 + (ci_slot * kOctets + b) * 8 + 2 * quad + c;
          if (ci >= a.cig) continue;
          const int64_t place =
              ((int64_t{group0 + group_slot} * a.cig + ci) * a.cog + co) * taps + tap01 * a.k[2];
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            if (tap2 + t >= a.k[2]) continue;
            StoreAs(a.out_dtype, a.out, part_offset + place + tap2 + t, sums[u][t][b][2 * h + c]);
          }
        }
      }
    }
  }
}

template <class In, bool kLast, int kStride, int kTaps, int kOctets, bool kGroup>
cudaError_t Launch(const WeightGradArgs& args, int64_t blocks, cudaStream_t stream) {
  const auto kernel = WeightGradKernel<In, kLast, kStride, kTaps, kOctets, kGroup>;
  if (const cudaError_t status = AllowSharedMemory(kernel); status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks), kThreads, args.shared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace jaxconv::cuda::weight_grad

namespace jaxconv::cuda {

template <class In, bool kLast>
cudaError_t LaunchWeightGradVariant(const WeightGradVariant& v, const WeightGradArgs& args,
                                    int64_t blocks, cudaStream_t stream) {
#define JAXCONV_CASE(S, T, O, G)                                             \
  if (v.stride == S && v.taps == T && v.octets == O && v.group == G) {       \
    return weight_grad::Launch<In, kLast, S, T, O, G>(args, blocks, stream); \
  }
  JAXCONV_WEIGHT_GRAD_VARIANTS(JAXCONV_CASE)
#undef JAXCONV_CASE
  return cudaErrorInvalidValue;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_WEIGHT_GRAD_CUH_
