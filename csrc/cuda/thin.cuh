// Device part of "thin"; docs/gpu_kernels.md tells the whole story.
//
// Eight warps multiply, four copy (forward: gather, and all copy). All meet at one barrier a step:
// while step s is multiplied, step s + ahead is asked for and step s - 1 is gathered.
#ifndef JAXCONV_CUDA_THIN_CUH_
#define JAXCONV_CUDA_THIN_CUH_

#include <type_traits>

#include "cuda/dependent_launch.cuh"
#include "cuda/dtypes.cuh"
#include "cuda/mbarrier.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/shared_memory.h"
#include "cuda/thin.h"
#include "cuda/wgmma.cuh"

namespace jaxconv::cuda {

// Copies `bytes` (2, 4, 8 or 16) to shared memory, or writes zeros.
template <class T>
__device__ inline void ThinCopy(uint32_t to, const T* from, int bytes, bool valid) {
  if (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else if (bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 8 : 0)
                 : "memory");
  } else if (bytes == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 4 : 0)
                 : "memory");
  } else {
    const uint16_t v = valid ? *reinterpret_cast<const uint16_t*>(from) : uint16_t{0};
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v) : "memory");
  }
}
__device__ inline void ThinCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until no more than `ahead` - 1 groups are under way.
__device__ inline void ThinWait(int ahead) {
  if (ahead == 1) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if (ahead == 2) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  }
}

// A pair of 16-bit values, or a float32 rounded to TF32, as the tensor cores take them.
template <class T>
__device__ inline uint32_t ThinWord(T low, T high) {
  if constexpr (sizeof(T) == 4) {
    return RoundTF32(low);
  } else {
    return *reinterpret_cast<const uint16_t*>(&low) |
           static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&high)) << 16;
  }
}

// Where the rows of a step (channels last: pixels) lie, from its first: elements of x, and bytes in
// shared memory. A thread copies the same unit of every `step`th row.
struct ThinRows {
  const int2* table;
  int first, step, count, unit;
};
// Lists them, by all threads of the block; those of `threads` copy.
template <class T, bool kLast>
__device__ inline ThinRows ThinListRows(const ThinX& s, int2* table, int thread, int threads) {
  const int count = s.rows * (kLast ? s.width : s.channels), units = s.by_units.divisor;
  for (int row = threadIdx.x; row < count; row += blockDim.x) {
    const int outer = Divide(row, s.by_rows), inner = row - outer * s.by_rows.divisor;
    table[row] = kLast ? make_int2(outer * s.h_step + inner * s.ci, row * s.pitch)
                       : make_int2(outer * s.c_step + inner * s.h_step,
                                   outer * s.pitch + inner * s.width * static_cast<int>(sizeof(T)));
  }
  const int step = threads / units, first = thread / units;
  return {table, first < step ? first : count, step, count, thread - first * units};
}

// Rows [h, h_end) of plane d of x, pixels from w on, channels from channel0 on: zeros outside.
template <class T, bool kLast>
__device__ inline void ThinCopyX(const ThinX& s, const ThinRows& rows, int n, int channel0, int d,
                                 int h, int h_end, int w, uint32_t to, int thread, int threads) {
  constexpr int kSize = sizeof(T);
  const int elements = s.unit / kSize, channels = min(s.channels, s.ci - channel0);
  const bool plane = d >= 0 && d < s.size[0];
  const int end = plane ? min(h_end, s.size[1]) : 0;
  const T* x = static_cast<const T*>(s.x) + n * s.n_step;
  const int begin = d * s.d_step + channel0 * s.c_step + h * s.h_step + w * (kLast ? s.ci : 1);
  if (rows.step > 0 && s.unit == 16 && h >= 0 && h + s.rows <= end && w >= 0 &&
      w + s.width <= s.size[2] && channels == s.channels) {
    x += begin + rows.unit * elements;
    to += rows.unit * 16;
    for (int row = rows.first; row < rows.count; row += 4 * rows.step) {
      int2 place[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i * rows.step < rows.count) place[i] = rows.table[row + i * rows.step];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i * rows.step < rows.count) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + place[i].y),
                       "l"(x + place[i].x)
                       : "memory");
        }
      }
    }
    return;
  }
  const int count = (kLast ? s.width * s.rows : channels * s.rows) * s.by_units.divisor;
#pragma unroll 1
  for (int u = thread; u < count; u += threads) {
    const int row = Divide(u, s.by_units), unit = u - row * s.by_units.divisor;
    const int outer = Divide(row, s.by_rows), inner = row - outer * s.by_rows.divisor;
    // Channels first: outer is a channel, inner a row. Last: outer is a row, inner a pixel.
    const int down = kLast ? outer : inner, across = kLast ? inner : unit * elements;
    const bool valid = h + down >= 0 && h + down < end &&
                       static_cast<unsigned>(w + across) < static_cast<unsigned>(s.size[2]) &&
                       (!kLast || unit * elements < channels);
    const int2 place = rows.table[row];
    ThinCopy(to + place.y + unit * s.unit, x + (valid ? begin + place.x + unit * elements : 0),
             s.unit, valid);
  }
}

// Where a tile begins. The warps that copy tell the others, through shared memory.
struct __align__(16) ThinOrigin {
  int n, d, h, w;
};
__device__ inline ThinOrigin ThinOriginOf(const ThinTiles& a, int tile) {
  const int rest = tile / a.cuts[2], up = rest / a.cuts[1], n = up / a.cuts[0];
  return {n, up - n * a.cuts[0], (rest - up * a.cuts[1]) * a.rows,
          (tile - rest * a.cuts[2]) * a.width};
}

// The element of a row of y that is staged first: a multiple of a copy's elements; the one that the
// first pixel's first tap reads lies `ahead` of it.
struct ThinStart {
  int element, ahead;
};
template <bool kLast>
__device__ inline ThinStart ThinStartOf(const ThinY& s, int w) {
  const int wanted = (w * s.stride[2] - s.pad[2]) * (kLast ? s.co : 1);
  const int ahead = wanted & (s.unit_elements - 1);
  return {wanted - ahead, ahead};
}

template <class T, bool kLast, int kUnit>
__device__ inline void ThinCopyYBy(const ThinY& s, const ThinOrigin& at, uint32_t to, int thread,
                                   int threads) {
  const T* y = static_cast<const T*>(s.y) + at.n * s.n_step;
  const int bytes = kUnit > 0 ? kUnit : s.unit, elements = bytes / static_cast<int>(sizeof(T));
  const int start = ThinStartOf<kLast>(s, at.w).element;
  const int length = s.size[2] * (kLast ? s.co : 1);
  const int count = (kLast ? 1 : s.co) * s.k[0] * s.rows * s.by_units.divisor;
  const int d0 = at.d * s.stride[0] - s.pad[0], h0 = at.h * s.stride[1] - s.pad[1];
#pragma unroll 4
  for (int u = thread; u < count; u += threads) {
    const int row = Divide(u, s.by_units), unit = u - row * s.by_units.divisor;
    const int plane = Divide(row, s.by_rows), h = row - plane * s.rows;
    const int co = kLast ? 0 : Divide(plane, s.by_planes);
    const int od = d0 + (plane - co * s.k[0]) * s.dilation[0], oh = h0 + h;
    const int e = start + unit * elements;
    const bool valid = static_cast<unsigned>(od) < static_cast<unsigned>(s.size[0]) &&
                       static_cast<unsigned>(oh) < static_cast<unsigned>(s.size[1]) &&
                       static_cast<unsigned>(e) < static_cast<unsigned>(length);
    const int from = co * s.c_step + od * s.d_step + oh * s.h_step + e;
    const int place = plane * s.plane_step + h * s.row_step + unit * elements;
    ThinCopy(to + place * static_cast<int>(sizeof(T)), y + (valid ? from : 0), bytes, valid);
  }
}
template <class T, bool kLast>
__device__ inline void ThinCopyY(const ThinY& s, const ThinOrigin& at, uint32_t to, int thread,
                                 int threads) {
  if (s.unit == 16) {
    ThinCopyYBy<T, kLast, 16>(s, at, to, thread, threads);
  } else {
    ThinCopyYBy<T, kLast, 0>(s, at, to, thread, threads);
  }
}

// The place, in bytes, of column (co, tap) of staged y, from a pixel's.
template <class T>
__device__ inline int ThinPlaceOf(const ThinY& s, int column) {
  const int taps = s.k[0] * s.k[1] * s.k[2], co = column / taps, tap = column - co * taps;
  const int kdh = tap / s.k[2], kd = kdh / s.k[1], kh = kdh - kd * s.k[1], kw = tap - kdh * s.k[2];
  return static_cast<int>(sizeof(T)) * (co * s.channel_step + kd * s.plane_step +
                                        kh * s.dilation[1] * s.row_step + kw * s.tap_step);
}

// A word for the tensor cores: a float32, rounded to TF32, or two 16-bit values.
template <class T>
__device__ inline uint32_t ThinLoadWord(uint32_t low, uint32_t high) {
  if constexpr (sizeof(T) == 4) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(low));
    return RoundTF32(v);
  } else {
    uint16_t a, b;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(a) : "r"(low));
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(b) : "r"(high));
    return a | static_cast<uint32_t>(b) << 16;
  }
}

template <bool kTransposed>
__device__ inline void ThinLoadMatrices(uint32_t (&v)[4], uint32_t from) {
  if constexpr (kTransposed) {
    LoadTransposed(v, from);
  } else {
    LoadMatrices(v, from);
  }
}

// ---------------------------------------------------------------------------------------------
// Forward

struct ThinCursor {
  int item, n, d, h;
  int d_begin, d_end, h_begin, h_end;  // planes and rows of sources
  int q_d, q_h, run;                   // the item's first outputs
};

__device__ inline bool ThinEnter(const ThinForwardArgs& a, ThinCursor& c) {
  if (c.item >= a.items) return false;
  int rest = c.item / a.cuts[2];
  c.run = (c.item - rest * a.cuts[2]) * a.box[2];
  const int up = rest / a.cuts[1], h = rest - up * a.cuts[1];
  c.n = up / a.cuts[0];
  const int d = up - c.n * a.cuts[0];
  // The first item has no source before its first output, and `lead` outputs more instead.
  c.q_d = a.q_begin[0] + d * a.box[0] + (d > 0 ? a.lead[0] : 0);
  c.q_h = a.q_begin[1] + h * a.box[1] + (h > 0 ? a.lead[1] : 0);
  c.d = c.d_begin = max(c.q_d - a.reach[0], min(c.q_d, 0));
  c.h = c.h_begin = max(c.q_h - a.reach[1], min(c.q_h, 0));
  c.d_end = min(a.q_begin[0] + (d + 1) * a.box[0] + a.lead[0], a.q_end[0]);
  c.h_end = min(a.q_begin[1] + (h + 1) * a.box[1] + a.lead[1], a.q_end[1]);
  return true;
}

// To the next step; false after the last one.
__device__ inline bool ThinNext(const ThinForwardArgs& a, ThinCursor& c) {
  c.h += a.x.rows;
  if (c.h < c.h_end) return true;
  c.h = c.h_begin;
  if (++c.d < c.d_end) return true;
  c.item += gridDim.x;
  return ThinEnter(a, c);
}

// Eight pixels by two steps of channels.
template <class T, bool kLast>
__device__ inline void ThinLoad(uint32_t (&v)[4], uint32_t from, int pitch) {
  if constexpr (sizeof(T) == 4 && !kLast) {
#pragma unroll
    for (int r = 0; r < 4; ++r) v[r] = ThinLoadWord<T>(from + 4 * r * pitch, 0);
  } else {
    ThinLoadMatrices<!kLast>(v, from);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int r = 0; r < 4; ++r) v[r] = RoundTF32(__uint_as_float(v[r]));
    }
  }
}

__device__ inline float ThinRead(uint32_t from) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from));
  return v;
}
__device__ inline void ThinWrite(uint32_t to, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
__device__ inline void ThinStorePair(uint32_t to, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}

// Where a lane's part of the first tile lies.
template <class T, bool kLast>
__device__ inline int ThinLanePlace(int lane, int pitch) {
  if (kLast) return lane % 8 * pitch + lane / 8 * 16;
  return sizeof(T) == 4 ? lane % 4 * pitch + lane / 4 * 4 : lane * pitch;
}

template <class T>
__device__ inline float ThinBias(const ThinForwardArgs& a, int co) {
  if (a.bias == nullptr) return 0;
  return sizeof(T) == 4 || a.out_f32 ? static_cast<const float*>(a.bias)[co]
                                     : ToAccumulator(static_cast<const T*>(a.bias)[co]);
}

// What a step's gathering warps share.
struct ThinGather {
  uint32_t p,
      sums;      // sums of outputs of later planes: [ring of planes][phase][co][row][phases][run]
  float* stage;  // the warp's: outputs of 32 runs
  const uint32_t* spots;
  const float* bias;
  int warp, lane;
};

// The warp's staged row of outputs, from run `run` on, of which `count` elements are written.
template <class T>
__device__ inline void ThinWriteRow(const ThinForwardArgs& a, const float* stage, int64_t at,
                                    int count, int lane) {
  if (sizeof(T) == 4 || a.out_f32) {
    for (int x = lane; x < count; x += 32) static_cast<float*>(a.out)[at + x] = stage[x];
  } else {
    for (int x = lane; x < count; x += 32) {
      static_cast<T*>(a.out)[at + x] = FromAccumulator<T>(stage[x]);
    }
  }
}

// The outputs that a step completes, and what it adds to those of later planes. `base`: the ring's
// slot of the step's first row. A spot is a row of outputs: a row of sources, a phase of rows (and
// of planes, unless kWindow) and a chunk of 32 runs; a lane has a run.
template <class T, bool kLast>
__device__ inline void ThinGatherAny(const ThinForwardArgs& a, const ThinGather& g,
                                     const ThinCursor& c, int base) {
  const ThinTaps &td = a.taps[0], &th = a.taps[1], &tw = a.taps[2];
  const int staged_step = kLast ? a.co : 1;
  for (int i = g.warp; i < a.spots; i += kThinGatherers) {
    const uint32_t spot = g.spots[i];
    const int rd = spot & 255, rh = spot >> 8 & 255, row = spot >> 16 & 255, chunk = spot >> 24;
    const int q = c.h + row, oh = q * a.stride[1] + rh - a.pad[1];
    if (q < c.q_h || q >= c.h_end || oh < 0 || oh >= a.osize[1]) continue;
    const int od = c.d * a.stride[0] + rd - a.pad[0];
    const bool completes = c.d >= c.q_d && od >= 0 && od < a.osize[0];
    const int j = 32 * chunk + g.lane;
    const uint32_t from = g.p + 4 * (a.p_margin + min(j, a.box[2] - 1) - a.first);
    const int tap_end = td.first[rd + 1];
    const auto sum = [&](int co, int kd, int rw) {
      float v = 0;
      for (int e = th.first[rh]; e < th.first[rh + 1]; ++e) {
        const int back = th.tap[e].back;
        if (q - back < c.h_begin) break;  // the nearest come first
        int slot = base + row - back;
        slot += slot < 0 ? a.p_rows : slot >= a.p_rows ? -a.p_rows : 0;
        const int column = ((co * a.k[0] + kd) * a.k[1] + th.tap[e].tap) * a.k[2];
        const uint32_t at = from + 4 * (column * a.p_column + slot * a.p_row);
#pragma unroll 4
        for (int t = tw.first[rw]; t < tw.first[rw + 1]; ++t) {
          v += ThinRead(at + 4 * (tw.tap[t].tap * a.p_column + tw.tap[t].back));
        }
      }
      return v;
    };
    // The sums so far of outputs of plane `plane`.
    const auto so_far = [&](int co, int plane, int rw) {
      const int slot = a.reach[0] == 1 ? 0 : (plane - a.q_begin[0]) % a.reach[0];
      const int outer =
          ((slot * a.stride[0] + rd) * a.co + co) * (a.box[1] + a.lead[1]) + q - c.q_h;
      return g.sums + 4 * (((outer * a.stride[1] + rh) * a.stride[2] + rw) * 32 * a.run_chunks + j);
    };
    for (int co = 0; co < a.co; ++co) {
      for (int rw = 0; rw < a.stride[2]; ++rw) {
        int e = td.first[rd];
        const bool now = e < tap_end && td.tap[e].back == 0;
        const int next = e + now;
        if (completes) {
          float v = g.bias[co];
          if (now) v += sum(co, td.tap[e].tap, rw);
          if (next < tap_end && c.d - td.tap[next].back >= c.d_begin) {
            v += ThinRead(so_far(co, c.d, rw));
          }
          g.stage[(g.lane * a.stride[2] + rw) * staged_step + (kLast ? co : 0)] = v;
        }
        for (e = next; e < tap_end; ++e) {
          const int plane = c.d + td.tap[e].back;
          if (plane < c.q_d || plane >= c.d_end) continue;
          float v = sum(co, td.tap[e].tap, rw);
          const uint32_t before = so_far(co, plane, rw);
          if (e + 1 < tap_end && plane - td.tap[e + 1].back >= c.d_begin) v += ThinRead(before);
          ThinWrite(before, v);
        }
      }
      if (!completes || (kLast && co + 1 < a.co)) continue;
      __syncwarp();
      const int first = (c.run + 32 * chunk) * a.stride[2];
      const int runs = min(a.box[2] - 32 * chunk, 32);  // beyond, another item's
      ThinWriteRow<T>(a, g.stage,
                      c.n * a.y_n + static_cast<int64_t>(od) * a.y_d +
                          static_cast<int64_t>(oh) * a.y_h +
                          (kLast ? first * a.co : co * static_cast<int64_t>(a.y_c) + first),
                      min(runs * a.stride[2], a.osize[2] - first) * staged_step, g.lane);
      __syncwarp();
    }
  }
}

// The same where no phase has more than two taps, neighbours, and the innermost stride is 2.
// `window`: bytes from a plane's and row's first column to the source of tap kw.
template <class T, bool kLast, int KW>
__device__ inline void ThinGatherWindow(const ThinForwardArgs& a, const ThinGather& g,
                                        const ThinCursor& c, int base, const int (&window)[KW],
                                        bool swapped) {
  const int staged_step = kLast ? a.co : 1;
  const int row_columns = 4 * a.k[2] * a.p_column, plane_columns = a.k[1] * row_columns;
  const int sums_step = 4 * 32 * a.run_chunks;
  for (int i = g.warp; i < a.spots; i += kThinGatherers) {
    const uint32_t spot = g.spots[i];
    const int rh = spot >> 8 & 255, row = spot >> 16 & 255, chunk = spot >> 24;
    const int q = c.h + row, oh = q * a.stride[1] + rh - a.pad[1];
    if (q < c.q_h || q >= c.h_end || oh < 0 || oh >= a.osize[1]) continue;
    const int j = 32 * chunk + g.lane;
    const bool first_row = rh < a.k[1], second_row = rh + a.stride[1] < a.k[1] && q > c.h_begin;
    int slot = base + row;
    if (slot >= a.p_rows) slot -= a.p_rows;
    const uint32_t row0 =
        g.p + 4 * (a.p_margin + min(j, a.box[2] - 1) - a.first + slot * a.p_row) + rh * row_columns;
    const uint32_t row1 =
        row0 + a.stride[1] * row_columns + (slot == 0 ? a.p_rows - 1 : -1) * 4 * a.p_row;
    uint32_t at0[KW], at1[KW];
#pragma unroll
    for (int t = 0; t < KW; ++t) {
      at0[t] = row0 + window[t];
      at1[t] = row1 + window[t];
    }
    const auto read = [](const uint32_t (&at)[KW], int place, float (&v)[KW]) {
#pragma unroll
      for (int t = 0; t < KW; ++t) v[t] = ThinRead(at[t] + place);
    };
    const auto add = [](float (&sum)[2], const float (&v)[KW]) {
#pragma unroll
      for (int t = 0; t < KW; ++t) sum[t % 2] += v[t];
    };
    const int first = (c.run + 32 * chunk) * 2;
    const int count = min(min(a.box[2] - 32 * chunk, 32) * 2, a.osize[2] - first);
    uint32_t sums = g.sums + (((q - c.q_h) * a.stride[1] + rh) * 2) * sums_step + 4 * j;
    for (int rd = 0; rd < a.stride[0]; ++rd) {
      const int od = c.d * a.stride[0] + rd - a.pad[0];
      const bool completes = c.d >= c.q_d && od >= 0 && od < a.osize[0];
      const bool has_now = rd < a.k[0], has_later = rd + a.stride[0] < a.k[0];
      const int64_t out =
          c.n * a.y_n + static_cast<int64_t>(od) * a.y_d + static_cast<int64_t>(oh) * a.y_h;
      for (int co = 0; co < a.co; ++co) {
        const int place = (co * a.k[0] + rd) * plane_columns;
        const int place_later = place + a.stride[0] * plane_columns;
        float now[2] = {}, later[2] = {}, v[4][KW];
        if (first_row && second_row && has_now && has_later) {  // reads side by side
          read(at0, place, v[0]);
          read(at1, place, v[1]);
          read(at0, place_later, v[2]);
          read(at1, place_later, v[3]);
          add(now, v[0]);
          add(now, v[1]);
          add(later, v[2]);
          add(later, v[3]);
        } else {
          if (first_row && has_now) {
            read(at0, place, v[0]);
            add(now, v[0]);
          }
          if (second_row && has_now) {
            read(at1, place, v[1]);
            add(now, v[1]);
          }
          if (first_row && has_later) {
            read(at0, place_later, v[2]);
            add(later, v[2]);
          }
          if (second_row && has_later) {
            read(at1, place_later, v[3]);
            add(later, v[3]);
          }
        }
        if (has_later) {
          if (c.d > c.d_begin) {
            now[0] += ThinRead(sums);
            now[1] += ThinRead(sums + sums_step);
          }
          ThinWrite(sums, later[0]);
          ThinWrite(sums + sums_step, later[1]);
        }
        sums += (a.box[1] + a.lead[1]) * a.stride[1] * 2 * sums_step;
        if (!completes) continue;
        const float bias = g.bias[co];
        const float low = (swapped ? now[1] : now[0]) + bias;
        const float high = (swapped ? now[0] : now[1]) + bias;
        if (a.pairs) {
          if (2 * g.lane >= count) continue;
          const int64_t at = out + co * static_cast<int64_t>(a.y_c) + first + 2 * g.lane;
          if (sizeof(T) == 4 || a.out_f32) {
            *reinterpret_cast<float2*>(static_cast<float*>(a.out) + at) = make_float2(low, high);
          } else {
            *reinterpret_cast<uint32_t*>(static_cast<T*>(a.out) + at) =
                ThinWord<T>(FromAccumulator<T>(low), FromAccumulator<T>(high));
          }
          continue;
        }
        float* stage = g.stage + 2 * g.lane * staged_step + (kLast ? co : 0);
        stage[0] = low;
        stage[staged_step] = high;
        if (kLast && co + 1 < a.co) continue;
        __syncwarp();
        ThinWriteRow<T>(a, g.stage,
                        out + (kLast ? first * a.co : co * static_cast<int64_t>(a.y_c) + first),
                        count * staged_step, g.lane);
        __syncwarp();
      }
    }
  }
}

// KW: taps of the innermost axis where ThinGatherWindow takes the problem, or 0.
template <class T, int MT, int KS, bool kLast, int KW>
__global__ void __launch_bounds__(kThinForwardThreads, 1)
    ThinForward(const __grid_constant__ ThinForwardArgs a) {
  constexpr int kNT = MT == 4 ? 2 : 4;
  extern __shared__ __align__(128) char smem[];
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(~0u, tid / 32, 0);  // known to be the same in all lanes
  float* biases = reinterpret_cast<float*>(smem + a.smem_bias);
  uint32_t* spots = reinterpret_cast<uint32_t*>(smem + a.smem_spots);
  const uint32_t sources = SharedAddress(smem + a.smem_x);
  const uint32_t barrier = SharedAddress(smem + a.smem_barrier);

  // Channels that are not there and P's margins stay zero.
  for (int i = 16 * tid; i < a.smem; i += 16 * kThinForwardThreads) {
    *reinterpret_cast<uint4*>(smem + i) = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  int stage = 0, base = 0;  // of the step that is multiplied
  int meetings = 0;
  const auto next = [&] {
    Meet(barrier, meetings);
    if (stage++ == a.ahead) stage = 0;
    base += a.x.rows;
    if (base >= a.p_rows) base -= a.p_rows;
  };
  for (int i = tid; i < a.spots; i += kThinForwardThreads) {
    const int phases = KW > 0 ? 1 : a.stride[0];
    int rest = i / phases;
    const int rd = i - rest * phases, rows = rest / a.stride[1];
    const int rh = rest - rows * a.stride[1], chunk = rows / a.x.rows;
    spots[i] = rd | rh << 8 | (rows - chunk * a.x.rows) << 16 | chunk << 24;
  }
  if (tid < a.co) biases[tid] = ThinBias<T>(a, tid);
  if (tid == 0) InitBarrier(barrier, kThinForwardThreads);
  const ThinRows rows = ThinListRows<T, kLast>(a.x, reinterpret_cast<int2*>(smem + a.smem_rows),
                                               tid, 32 * kThinMultipliers);
  __syncthreads();

  if (warp >= kThinMultipliers) {
    GiveRegisters<88>();
    ThinGather g{SharedAddress(smem + a.smem_p),
                 SharedAddress(smem + a.smem_sums),
                 reinterpret_cast<float*>(smem + a.smem_stage) +
                     (warp - kThinMultipliers) * 32 * a.stride[2] * (kLast ? a.co : 1),
                 spots,
                 biases,
                 warp - kThinMultipliers,
                 lane};
    int window[KW > 0 ? KW : 1];
    bool swapped = false;
    if constexpr (KW > 0) {
      const ThinTaps& tw = a.taps[2];
#pragma unroll
      for (int t = 0; t < KW; ++t) {
        // Taps are listed by phase: the even ones together, and the odd ones.
        const int e = (t % 2 == a.first_parity ? 0 : tw.first[1]) + t / 2;
        window[t] = 4 * (t * a.p_column + tw.tap[e].back);
      }
      swapped = a.first_parity == 1;
    }
    ThinCursor c;
    c.item = blockIdx.x;
    bool more = ThinEnter(a, c);
    Meet(barrier, meetings);
    next();  // the first step has nothing before it
    while (more) {
      const int before = base - a.x.rows + (base < a.x.rows ? a.p_rows : 0);
      if constexpr (KW > 0) {
        ThinGatherWindow<T, kLast, KW>(a, g, c, before, window, swapped);
      } else {
        ThinGatherAny<T, kLast>(a, g, c, before);
      }
      more = ThinNext(a, c);
      next();
    }
    return;
  }
  TakeRegisters<168>();
  ThinCursor ahead;
  ahead.item = blockIdx.x;
  bool more_ahead = ThinEnter(a, ahead);
  int asked = 0;  // steps
  const auto copy = [&](int to) {
    if (more_ahead) {
      ThinCopyX<T, kLast>(a.x, rows, ahead.n, 0, ahead.d, ahead.h, ahead.h_end, ahead.run + a.first,
                          sources + to * a.x.stage, tid, 32 * kThinMultipliers);
      more_ahead = ThinNext(a, ahead);
      ++asked;
    }
    ThinCommit();
  };
  for (int i = 0; i < a.ahead; ++i) copy(i);

  uint32_t w[MT][KS][4];
  const int set = warp % a.sets, group = warp / a.sets, groups = kThinMultipliers / a.sets;
  const T* weights = static_cast<const T*>(a.w);
  constexpr int kStep = 32 / sizeof(T);
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
    for (int k = 0; k < KS; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int column = (set * MT + mt) * 16 + lane / 4 + r % 2 * 8;
        const int c = k * kStep + (lane % 4 + r / 2 * 4) * (kStep / 8);
        const auto weight = [&](int ci) {
          return column < a.columns && ci < a.x.ci ? weights[ci * a.columns + column] : T{};
        };
        w[mt][k][r] = ThinWord<T>(weight(c), sizeof(T) == 4 ? T{} : weight(c + 1));
      }
    }
  }
  const int tiles_of_row = a.x.width / 8, tiles = a.x.rows * tiles_of_row;
  const int lane_place = ThinLanePlace<T, kLast>(lane, a.x.pitch);
  const int tile_step = kLast ? 8 * a.x.pitch : 8 * static_cast<int>(sizeof(T));
  const int k_step = kLast ? 64 : 64 / static_cast<int>(sizeof(T)) * a.x.pitch;
  const uint32_t to = SharedAddress(smem + a.smem_p) +
                      4 * ((set * MT * 16 + lane / 4) * a.p_column + a.p_margin + lane % 4 * 2);
  ThinWait(a.ahead);
  Meet(barrier, meetings);
  for (int s = 0; s <= asked; ++s) {
    copy(stage == 0 ? a.ahead : stage - 1);
    const uint32_t from = sources + stage * a.x.stage + lane_place;
    const int end = s < asked && group < groups ? tiles : 0;
    for (int first = group * kNT; first < end; first += groups * kNT) {
      float acc[MT][kNT][4] = {};
#pragma unroll
      for (int k = 0; k < KS; k += 2) {
#pragma unroll
        for (int t = 0; t < kNT; ++t) {
          uint32_t v[4];
          ThinLoad<T, kLast>(v, from + k / 2 * k_step + min(first + t, tiles - 1) * tile_step,
                             a.x.pitch);
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) Mma<T>::Whole(acc[mt][t], w[mt][k], v[0], v[1]);
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) Mma<T>::Whole(acc[mt][t], w[mt][k + 1], v[2], v[3]);
        }
      }
#pragma unroll
      for (int t = 0; t < kNT; ++t) {
        if (first + t >= tiles) break;
        const int row = Divide(first + t, a.by_tiles);
        int slot = base + row;
        if (slot >= a.p_rows) slot -= a.p_rows;
        const uint32_t at = to + 4 * (slot * a.p_row + (first + t - row * tiles_of_row) * 8);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          const uint32_t cell = at + mt * 16 * 4 * a.p_column;
          ThinStorePair(cell, acc[mt][t][0], acc[mt][t][1]);
          ThinStorePair(cell + 8 * 4 * a.p_column, acc[mt][t][2], acc[mt][t][3]);
        }
      }
    }
    ThinWait(a.ahead);
    next();
  }
}

// ---------------------------------------------------------------------------------------------
// Input gradient

template <class Out>
__device__ inline void ThinStore4(Out* to, const float (&v)[4]) {
  if constexpr (sizeof(Out) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
  } else {
    const Out h[4] = {FromAccumulator<Out>(v[0]), FromAccumulator<Out>(v[1]),
                      FromAccumulator<Out>(v[2]), FromAccumulator<Out>(v[3])};
    *reinterpret_cast<uint2*>(to) =
        make_uint2(ThinWord<Out>(h[0], h[1]), ThinWord<Out>(h[2], h[3]));
  }
}

// Pixels and channels by 16 x 16. Channels first the rows of the product are channels and a lane
// has four neighbouring pixels of two of them; channels last the other way around. Either operand
// of the tensor cores is made of the same words.
template <class T, int MT, int KS, bool kLast>
__global__ void __launch_bounds__(kThinThreads, 1)
    ThinInputGrad(const __grid_constant__ ThinInputGradArgs a) {
  constexpr int kNT = 2, kPair = 4 / sizeof(T);
  extern __shared__ __align__(128) char smem[];
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(~0u, tid / 32, 0);
  const bool multiplies = warp < kThinMultipliers;
  const int copier = tid - 32 * kThinMultipliers;
  const int stages = a.at.ahead + 1;
  ThinOrigin* origins = reinterpret_cast<ThinOrigin*>(smem);
  const uint32_t staged = SharedAddress(smem + kThinOrigins);
  int tile = blockIdx.x, tile_ahead = tile;

  const auto copy = [&](int stage) {
    if (tile_ahead < a.at.tiles) {
      const ThinOrigin at = ThinOriginOf(a.at, tile_ahead);
      if (copier == 0) origins[stage] = at;
      ThinCopyY<T, kLast>(a.y, at, staged + stage * a.y.stage, copier, 32 * kThinCopiers);
    }
    tile_ahead += gridDim.x;
    ThinCommit();
  };
  uint32_t w[MT][KS][4];
  int place[KS][2][kPair];  // of the taps that this lane reads, from its pixel
  const int set = warp % a.sets, group = warp / a.sets, groups = kThinMultipliers / a.sets;
  const int channel0 = (blockIdx.y * a.sets + set) * 16 * MT;
  if (multiplies) {
    const T* weights = static_cast<const T*>(a.w);
#pragma unroll
    for (int k = 0; k < KS; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int column[kPair];
#pragma unroll
        for (int i = 0; i < kPair; ++i) {
          column[i] = (k * 8 + half * 4 + lane % 4) * kPair + i;
          // Beyond the last one: times a weight of zero.
          place[k][half][i] = ThinPlaceOf<T>(a.y, column[i] < a.columns ? column[i] : 0);
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            // Channels last a lane's columns of both halves are four neighbours.
            const int m = lane / 4;
            const int ci = channel0 + mt * 16 + (kLast ? m / 2 * 4 + 2 * r + m % 2 : m + 8 * r);
            const auto weight = [&](int c) {
              return c < a.columns && ci < a.ci ? weights[ci * a.columns + c] : T{};
            };
            w[mt][k][half * 2 + r] =
                ThinWord<T>(weight(column[0]), kPair == 1 ? T{} : weight(column[kPair - 1]));
          }
        }
      }
    }
  } else {
    for (int i = 0; i < a.at.ahead; ++i) copy(i);
    ThinWait(a.at.ahead);
  }
  __syncthreads();

  const auto multiply = [&](auto* out, int stage) {
    using Out = std::remove_reference_t<decltype(*out)>;
    const ThinOrigin at = origins[stage];
    const uint32_t from = staged + stage * a.y.stage +
                          ThinStartOf<kLast>(a.y, at.w).ahead * static_cast<int>(sizeof(T));
    const int tiles_of_row = a.at.width / 16, tiles = a.at.rows * tiles_of_row;
    out += at.n * a.x_n + static_cast<int64_t>(at.d) * a.x_d;
    for (int first = group * kNT; first < tiles; first += groups * kNT) {
      float acc[MT][kNT][2][4] = {};
      uint32_t pixel[kNT][2];
#pragma unroll
      for (int t = 0; t < kNT; ++t) {
        const int row = Divide(min(first + t, tiles - 1), a.by_width);
        const int across = (min(first + t, tiles - 1) - row * tiles_of_row) * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int m = lane / 4, x = kLast ? 8 * half + m : m / 2 * 4 + 2 * half + m % 2;
          pixel[t][half] =
              from + (row * a.y.stride[1] * a.y.row_step + (across + x) * a.y.pixel_step) *
                         static_cast<int>(sizeof(T));
        }
      }
#pragma unroll
      for (int k = 0; k < KS; ++k) {
#pragma unroll
        for (int t = 0; t < kNT; ++t) {
          uint32_t v[2][2];  // half of the pixels, half of the taps
#pragma unroll
          for (int x = 0; x < 2; ++x) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              v[x][half] = ThinLoadWord<T>(pixel[t][x] + place[k][half][0],
                                           pixel[t][x] + place[k][half][kPair - 1]);
            }
          }
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
            if constexpr (kLast) {
              const uint32_t pixels[4] = {v[0][0], v[1][0], v[0][1], v[1][1]};
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                Mma<T>::Whole(acc[mt][t][r], pixels, w[mt][k][r], w[mt][k][2 + r]);
              }
            } else {
#pragma unroll
              for (int x = 0; x < 2; ++x) {
                Mma<T>::Whole(acc[mt][t][x], w[mt][k], v[x][0], v[x][1]);
              }
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kNT; ++t) {
        if (first + t >= tiles) break;
        const int row = Divide(first + t, a.by_width);
        const int h = at.h + row, x0 = at.w + (first + t - row * tiles_of_row) * 16;
        if (h >= a.size[1]) continue;
        Out* to = out + static_cast<int64_t>(h) * a.x_h;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float v[4] = {acc[mt][t][0][2 * r], acc[mt][t][0][2 * r + 1],
                                acc[mt][t][1][2 * r], acc[mt][t][1][2 * r + 1]};
            // Channels first: a channel of four pixels; last: a pixel of four channels.
            const int x = x0 + (kLast ? lane / 4 + 8 * r : lane % 4 * 4);
            const int ci = channel0 + 16 * mt + (kLast ? lane % 4 * 4 : lane / 4 + 8 * r);
            if (x >= a.size[2] || ci >= a.ci) continue;
            Out* element = to + (kLast ? x * a.ci + ci : static_cast<int64_t>(ci) * a.x_c + x);
            if (a.vector) {
              ThinStore4(element, v);
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                if ((kLast ? ci + i < a.ci : x + i < a.size[2])) {
                  element[i] = FromAccumulator<Out>(v[i]);
                }
              }
            }
          }
        }
      }
    }
  };

  int stage = 0;
  for (; tile < a.at.tiles; tile += gridDim.x) {
    if (multiplies) {
      if (group < groups) {
        if (sizeof(T) == 4 || a.out_f32) {
          multiply(static_cast<float*>(a.out), stage);
        } else {
          multiply(static_cast<T*>(a.out), stage);
        }
      }
    } else {
      copy(stage == 0 ? a.at.ahead : stage - 1);
      ThinWait(a.at.ahead);
    }
    __syncthreads();
    if (++stage == stages) stage = 0;
  }
}

// ---------------------------------------------------------------------------------------------
// Weight gradient

// A warp has 16 * MT channels by 32 columns.
template <class T, int MT, bool kLast>
__global__ void __launch_bounds__(kThinThreads, 1)
    ThinWeightGrad(const __grid_constant__ ThinWeightGradArgs a) {
  LetNextStart();  // SumParts
  constexpr int kNT = 4, kSize = sizeof(T), kPixels = 32 / kSize;
  constexpr int kSums = MT * kNT * 4;
  extern __shared__ __align__(128) char smem[];
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(~0u, tid / 32, 0);
  const bool multiplies = warp < kThinMultipliers;
  const int copier = tid - 32 * kThinMultipliers;
  const int stages = a.at.ahead + 1;
  ThinOrigin* origins = reinterpret_cast<ThinOrigin*>(smem);
  const uint32_t staged_y = SharedAddress(smem + kThinOrigins),
                 staged_x = SharedAddress(smem + a.smem_x);
  float* sums = reinterpret_cast<float*>(smem + a.smem_sums);
  const int sets = a.channel_sets * a.column_sets, groups = kThinMultipliers / sets;
  const int set = warp % sets, group = warp / sets;
  const int channel_set = set / a.column_sets, column_set = set - channel_set * a.column_sets;
  const int channel0 = blockIdx.y * a.x.channels;
  int tile = blockIdx.x, tile_ahead = tile;

  // Channels that are not there stay zero, and so do the sums at first.
  for (int i = a.smem_x + 16 * tid; i < a.smem; i += 16 * kThinThreads) {
    *reinterpret_cast<uint4*>(smem + i) = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  const ThinRows rows = ThinListRows<T, kLast>(a.x, reinterpret_cast<int2*>(smem + a.smem_rows),
                                               copier, 32 * kThinCopiers);
  __syncthreads();

  const auto copy = [&](int stage) {
    if (tile_ahead < a.at.tiles) {
      const ThinOrigin at = ThinOriginOf(a.at, tile_ahead);
      if (copier == 0) origins[stage] = at;
      ThinCopyY<T, kLast>(a.y, at, staged_y + stage * a.y.stage, copier, 32 * kThinCopiers);
      ThinCopyX<T, kLast>(a.x, rows, at.n, channel0, at.d, at.h, at.h + a.x.rows, at.w,
                          staged_x + stage * a.x.stage, copier, 32 * kThinCopiers);
    }
    tile_ahead += gridDim.x;
    ThinCommit();
  };
  if (!multiplies) {
    for (int i = 0; i < a.at.ahead; ++i) copy(i);
    ThinWait(a.at.ahead);
  }
  int place[kNT];  // of this lane's column of y, from its pixel
  if (multiplies) {
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      const int column = (column_set * kNT + nt) * 8 + lane / 4;
      place[nt] = ThinPlaceOf<T>(a.y, column < a.columns ? column : 0);
    }
  }
  __syncthreads();

  float acc[MT][kNT][4] = {};
  const auto keep = [&] {
    float* to = sums + warp * kSums * 32 + lane;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float& sum = acc[i / (4 * kNT)][i / 4 % kNT][i % 4];
      to[i * 32] += sum;
      sum = 0;
    }
  };
  // A lane's words of x: rows are channels. Channels first, or of 16 bits, by matrices of eight
  // rows of 16 bytes.
  const bool matrices = !kLast || kSize == 2;
  const int matrix_row = lane % 8 + (kLast ? lane / 16 : lane / 8 % 2) * 8;
  const int matrix_half = kLast ? lane / 8 % 2 : lane / 16;
  int x_place, x_tile, x_step;  // of this lane, from tile to tile of channels, of pixels
  if (kLast) {
    x_step = kPixels * a.x.pitch;
    x_tile = 16 * kSize;
    x_place = matrices ? matrix_row * a.x.pitch + matrix_half * 16
                       : lane % 4 * a.x.pitch + lane / 4 * kSize;
  } else {
    x_step = 32;
    x_tile = 16 * a.x.pitch;
    x_place = matrix_row * a.x.pitch + matrix_half * 16;
  }
  const auto multiply = [&](int stage) {
    const ThinOrigin at = origins[stage];
    const uint32_t from_y =
        staged_y + stage * a.y.stage +
        (ThinStartOf<kLast>(a.y, at.w).ahead + lane % 4 * (4 / kSize) * a.y.pixel_step) * kSize;
    const uint32_t from_x = staged_x + stage * a.x.stage + x_place + channel_set * MT * x_tile;
    const int steps = a.at.rows * a.steps_of_row;
    const int half = kPixels / 2 * a.y.pixel_step * kSize, next = a.y.pixel_step * kSize;
    for (int step = group; step < steps; step += groups) {
      const int row = Divide(step, a.by_steps), across = (step - row * a.steps_of_row) * kPixels;
      const uint32_t y =
          from_y + (row * a.y.stride[1] * a.y.row_step + across * a.y.pixel_step) * kSize;
      uint32_t v[kNT][2];
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t word = y + place[nt] + r * half;
          v[nt][r] = ThinLoadWord<T>(word, word + next);
        }
      }
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        uint32_t u[4];
        const uint32_t x = from_x + step * x_step + mt * x_tile;
        if constexpr (kLast && kSize == 4) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            u[r] = ThinLoadWord<T>(x + r % 2 * 32 + r / 2 * 4 * a.x.pitch, 0);
          }
        } else {
          ThinLoadMatrices<kLast>(u, x);
          if constexpr (kSize == 4) {
#pragma unroll
            for (int r = 0; r < 4; ++r) u[r] = RoundTF32(__uint_as_float(u[r]));
          }
        }
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) Mma<T>::Whole(acc[mt][nt], u, v[nt][0], v[nt][1]);
      }
    }
  };

  int stage = 0, kept = 0;
  for (; tile < a.at.tiles; tile += gridDim.x) {
    if (multiplies) {
      if (group < groups) {
        multiply(stage);
        if (++kept == a.flush) {
          keep();
          kept = 0;
        }
      }
    } else {
      copy(stage == 0 ? a.at.ahead : stage - 1);
      ThinWait(a.at.ahead);
    }
    __syncthreads();
    if (++stage == stages) stage = 0;
  }
  if (multiplies) keep();
  __syncthreads();
  // The warps that shared pixels, in order.
  float* out = a.out + blockIdx.x * a.out_step;
  for (int i = tid; i < sets * kSums * 32; i += kThinThreads) {
    const int of = i / (kSums * 32), sum = i / 32 % kSums, from = i % 32;
    const int channel =
        (of / a.column_sets * MT + sum / (4 * kNT)) * 16 + from / 4 + sum / 2 % 2 * 8;
    const int column = (of % a.column_sets * kNT + sum / 4 % kNT) * 8 + from % 4 * 2 + sum % 2;
    if (channel >= a.x.channels || channel0 + channel >= a.x.ci || column >= a.columns) continue;
    float total = 0;
    for (int g = 0; g < groups; ++g) total += sums[(g * sets * kSums) * 32 + i];
    out[static_cast<int64_t>(channel0 + channel) * a.columns + column] = total;
  }
}

// ---------------------------------------------------------------------------------------------

template <class Args>
cudaError_t EnqueueThinKernel(void (*kernel)(Args), const ThinPlan& plan, const Args& args,
                              cudaStream_t stream) {
  constexpr int threads =
      std::is_same_v<Args, ThinForwardArgs> ? kThinForwardThreads : kThinThreads;
  const cudaError_t status = AllowSharedMemory(kernel);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(plan.grid_x, plan.grid_y), threads, args.smem, stream>>>(args);
  return cudaGetLastError();
}

template <class T, int MT, int KS, bool kLast>
void (*ThinForwardOf(int window))(ThinForwardArgs) {
  return window == 4   ? ThinForward<T, MT, KS, kLast, 4>
         : window == 3 ? ThinForward<T, MT, KS, kLast, 3>
                       : ThinForward<T, MT, KS, kLast, 0>;
}
template <class T, int MT, int KS>
void (*ThinForwardOf(bool last, int window))(ThinForwardArgs) {
  return last ? ThinForwardOf<T, MT, KS, true>(window) : ThinForwardOf<T, MT, KS, false>(window);
}

template <class T>
cudaError_t EnqueueThin(const ThinPlan& plan, const ThinForwardArgs& args, bool last,
                        cudaStream_t stream) {
  return EnqueueThinKernel(plan.mt == 1   ? ThinForwardOf<T, 1, 16>(last, args.window)
                           : plan.mt == 2 ? ThinForwardOf<T, 2, 8>(last, args.window)
                                          : ThinForwardOf<T, 4, 4>(last, args.window),
                           plan, args, stream);
}

template <class T>
cudaError_t EnqueueThin(const ThinPlan& plan, const ThinInputGradArgs& args, bool last,
                        cudaStream_t stream) {
  return EnqueueThinKernel(
      plan.mt == 1   ? (last ? ThinInputGrad<T, 1, 16, true> : ThinInputGrad<T, 1, 16, false>)
      : plan.mt == 2 ? (last ? ThinInputGrad<T, 2, 8, true> : ThinInputGrad<T, 2, 8, false>)
                     : (last ? ThinInputGrad<T, 4, 4, true> : ThinInputGrad<T, 4, 4, false>),
      plan, args, stream);
}

template <class T>
cudaError_t EnqueueThin(const ThinPlan& plan, const ThinWeightGradArgs& args, bool last,
                        cudaStream_t stream) {
  return EnqueueThinKernel(plan.mt == 1
                               ? (last ? ThinWeightGrad<T, 1, true> : ThinWeightGrad<T, 1, false>)
                               : (last ? ThinWeightGrad<T, 4, true> : ThinWeightGrad<T, 4, false>),
                           plan, args, stream);
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_THIN_CUH_
