// Device part of "thin"; docs/gpu_kernels.md tells the whole story.
//
// Eight warps multiply, four copy and (forward) gather. All meet at one barrier a step: while step
// s is multiplied, step s + ahead is asked for and step s - 1 is gathered.
#ifndef JAXCONV_CUDA_THIN_CUH_
#define JAXCONV_CUDA_THIN_CUH_

#include "cuda/dtypes.cuh"
#include "cuda/mma_sync.cuh"
#include "cuda/thin.h"

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
  int up = rest / a.cuts[1];
  c.q_h = a.q_begin[1] + (rest - up * a.cuts[1]) * a.box[1];
  c.n = up / a.cuts[0];
  c.q_d = a.q_begin[0] + (up - c.n * a.cuts[0]) * a.box[0];
  // Sources before 0 are not there, but every output's row has its turn.
  c.d = c.d_begin = max(c.q_d - a.reach[0], min(c.q_d, 0));
  c.h = c.h_begin = max(c.q_h - a.reach[1], min(c.q_h, 0));
  c.d_end = min(c.q_d + a.box[0], a.q_end[0]);
  c.h_end = min(c.q_h + a.box[1], a.q_end[1]);
  return true;
}

// To the next step; false after the last one.
__device__ inline bool ThinNext(const ThinForwardArgs& a, ThinCursor& c) {
  c.h += a.rows;
  if (c.h < c.h_end) return true;
  c.h = c.h_begin;
  if (++c.d < c.d_end) return true;
  c.item += gridDim.x;
  return ThinEnter(a, c);
}

template <class T, bool kLast>
__device__ inline void ThinCopySources(const ThinForwardArgs& a, const ThinCursor& c, uint32_t to,
                                       int thread) {
  constexpr int kThreads = 32 * kThinCopiers;
  const T* x = static_cast<const T*>(a.x) + c.n * a.x_n;
  const int elements = a.unit / static_cast<int>(sizeof(T));
  const int start = c.run + a.first;
  const bool plane = static_cast<unsigned>(c.d) < static_cast<unsigned>(a.isize[0]);
  const int h_end = min(c.h_end, a.isize[1]);
  const int count = (kLast ? a.width : a.ci) * a.rows * a.by_units.divisor;
  const int base = c.d * a.x_d;
#pragma unroll 4
  for (int u = thread; u < count; u += kThreads) {
    const int row = Divide(u, a.by_units), unit = u - row * a.by_units.divisor;
    const int outer = Divide(row, a.by_rows), inner = row - outer * a.by_rows.divisor;
    // Channels first: outer is a channel, inner a row. Last: outer is a row, inner a pixel.
    const int h = c.h + (kLast ? outer : inner);
    const int w = start + (kLast ? inner : unit * elements);
    const bool valid =
        plane && h >= 0 && h < h_end && static_cast<unsigned>(w) < static_cast<unsigned>(a.isize[2]);
    const int from = kLast ? base + h * a.x_h + w * a.ci + unit * elements
                           : base + outer * a.x_c + h * a.x_h + w;
    const int place = kLast ? row * a.x_pitch + unit * a.unit
                            : outer * a.x_pitch +
                                  (inner * a.width + unit * elements) * static_cast<int>(sizeof(T));
    ThinCopy(to + place, x + (valid ? from : 0), a.unit, valid);
  }
}

// Eight pixels by two steps of channels.
template <class T, bool kLast>
__device__ inline void ThinLoad(uint32_t (&v)[4], uint32_t from, int pitch) {
  if constexpr (sizeof(T) == 4 && !kLast) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v[r]) : "r"(from + 4 * r * pitch));
    }
  } else if constexpr (kLast) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(from));
  }
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int r = 0; r < 4; ++r) v[r] = RoundTF32(__uint_as_float(v[r]));
  }
}

// Where a lane's part of the first tile lies.
template <class T, bool kLast>
__device__ inline int ThinLanePlace(int lane, int pitch) {
  if (kLast) return lane % 8 * pitch + lane / 8 * 16;
  return sizeof(T) == 4 ? lane % 4 * pitch + lane / 4 * 4 : lane * pitch;
}

template <class T, int MT, int KS, bool kLast, bool kWindow>
__global__ void __launch_bounds__(kThinThreads, 1)
    ThinForward(const __grid_constant__ ThinForwardArgs a) {
  constexpr int kNT = MT == 4 ? 3 : 4, kOutputs = kWindow ? 2 : 1;
  extern __shared__ __align__(128) char smem[];
  const int tid = threadIdx.x, lane = tid % 32;
  const int warp = __shfl_sync(~0u, tid / 32, 0);  // known to be the same in all lanes
  const bool multiplies = warp < kThinMultipliers;
  const int copier = tid - 32 * kThinMultipliers;
  const int stages = a.ahead + 1;
  float* p = reinterpret_cast<float*>(smem + a.smem_p);
  uint32_t* spots = reinterpret_cast<uint32_t*>(smem + a.smem_spots);
  const uint32_t sources = SharedAddress(smem + a.smem_x);

  // Channels that are not there and P's margins stay zero.
  for (int i = 16 * tid; i < a.smem; i += 16 * kThinThreads) {
    *reinterpret_cast<uint4*>(smem + i) = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();

  ThinCursor now;
  now.item = blockIdx.x;
  bool more = ThinEnter(a, now), more_ahead = more;
  ThinCursor ahead = now;
  uint32_t w[MT][KS][4];
  const int set = warp % a.sets, group = warp / a.sets, groups = kThinMultipliers / a.sets;
  if (multiplies) {
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
            return column < a.columns && ci < a.ci ? weights[ci * a.columns + column] : T{};
          };
          w[mt][k][r] = ThinWord<T>(weight(c), sizeof(T) == 4 ? T{} : weight(c + 1));
        }
      }
    }
  } else {
    for (int i = copier; i < a.spots; i += 32 * kThinCopiers) {
      int rest = i / a.stride[0];
      const int rd = i - rest * a.stride[0], rows = rest / a.stride[1];
      const int rh = rest - rows * a.stride[1], chunk = rows / a.rows;
      spots[i] = rd | rh << 8 | (rows - chunk * a.rows) << 16 | chunk << 24;
    }
    for (int i = 0; i < a.ahead; ++i) {
      if (more_ahead) {
        ThinCopySources<T, kLast>(a, ahead, sources + i * a.x_stage, copier);
        more_ahead = ThinNext(a, ahead);
      }
      ThinCommit();
    }
    ThinWait(a.ahead);
  }
  __syncthreads();

  // A step's product: P's rows of the step, for the warp's columns.
  const int tiles_of_row = a.width / 8, tiles = a.rows * tiles_of_row;
  const int lane_place = ThinLanePlace<T, kLast>(lane, a.x_pitch);
  const int tile_step = kLast ? 8 * a.x_pitch : 8 * static_cast<int>(sizeof(T));
  const int k_step = kLast ? 64 : (64 / static_cast<int>(sizeof(T))) * a.x_pitch;
  const auto multiply = [&](int stage, int base) {
    if (group >= groups) return;
    const uint32_t from = sources + stage * a.x_stage + lane_place;
    for (int first = group * kNT; first < tiles; first += groups * kNT) {
      float acc[MT][kNT][4] = {};
#pragma unroll
      for (int k = 0; k < KS; k += 2) {
        if (k >= a.ksteps) break;
#pragma unroll
        for (int t = 0; t < kNT; ++t) {
          uint32_t v[4];
          ThinLoad<T, kLast>(v, from + k / 2 * k_step + min(first + t, tiles - 1) * tile_step,
                             a.x_pitch);
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) Mma<T>::Whole(acc[mt][t], w[mt][k], v[0], v[1]);
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) Mma<T>::Whole(acc[mt][t], w[mt][k + 1], v[2], v[3]);
        }
      }
      float* to = p + (set * MT * 16 + lane / 4) * a.p_column + a.p_margin + lane % 4 * 2;
#pragma unroll
      for (int t = 0; t < kNT; ++t) {
        if (first + t >= tiles) break;
        const int row = Divide(first + t, a.by_tiles);
        int slot = base + row;
        if (slot >= a.p_rows) slot -= a.p_rows;
        float* at = to + slot * a.p_row + (first + t - row * tiles_of_row) * 8;
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          *reinterpret_cast<float2*>(at + mt * 16 * a.p_column) =
              make_float2(acc[mt][t][0], acc[mt][t][1]);
          *reinterpret_cast<float2*>(at + (mt * 16 + 8) * a.p_column) =
              make_float2(acc[mt][t][2], acc[mt][t][3]);
        }
      }
    }
  };

  // The outputs that a step completes, and what it adds to those of later planes.
  const ThinTaps &td = a.taps[0], &th = a.taps[1], &tw = a.taps[2];
  const int stage_step = kLast ? a.co : 1;
  float* out_stage =
      reinterpret_cast<float*>(smem + a.smem_stage) + (warp - kThinMultipliers) * 32 *
                                                          a.stride[2] * stage_step;
  float* sums = reinterpret_cast<float*>(smem + a.smem_sums);
  int window[4];  // of tap kw: from P's column of tap 0, and the place of its source
  bool swapped = false;
  if (kWindow) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      for (int e = tw.first[r]; e < tw.first[r + 1]; ++e) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          if (tw.tap[e].tap == t) window[t] = t * a.p_column + tw.tap[e].back;
        }
        if (tw.tap[e].tap == 0) swapped = r == 1;
      }
    }
  }
  const auto gather = [&](const ThinCursor& c, int base) {
    for (int i = warp - kThinMultipliers; i < a.spots; i += kThinCopiers) {
      const uint32_t spot = spots[i];
      const int rd = spot & 255, rh = spot >> 8 & 255, row = spot >> 16 & 255, chunk = spot >> 24;
      const int q = c.h + row, oh = q * a.stride[1] + rh - a.pad[1];
      if (q < c.q_h || q >= c.h_end || oh < 0 || oh >= a.osize[1]) continue;
      const int od = c.d * a.stride[0] + rd - a.pad[0];
      const bool completes = c.d >= c.q_d && od >= 0 && od < a.osize[0];
      const int j = 32 * chunk + lane;
      const float* from = p + a.p_margin + min(j, a.box[2] - 1) - a.first;
      const int tap_begin = td.first[rd], tap_end = td.first[rd + 1];
      const auto add = [&](int co, int kd, int rw, float(&v)[kOutputs]) {
        for (int e = th.first[rh]; e < th.first[rh + 1]; ++e) {
          const int back = th.tap[e].back;
          if (q - back < c.h_begin) break;  // the nearest come first
          int slot = base + row - back;
          slot += slot < 0 ? a.p_rows : slot >= a.p_rows ? -a.p_rows : 0;
          const float* at =
              from + (((co * a.k[0] + kd) * a.k[1] + th.tap[e].tap) * a.k[2]) * a.p_column +
              slot * a.p_row;
          if (kWindow) {
#pragma unroll
            for (int t = 0; t < 4; ++t) {
              if (t < a.k[2]) v[t % 2] += at[window[t]];
            }
          } else {
            for (int t = tw.first[rw]; t < tw.first[rw + 1]; ++t) {
              v[0] += at[tw.tap[t].tap * a.p_column + tw.tap[t].back];
            }
          }
        }
      };
      // The sums so far of output plane `plane`.
      const auto so_far = [&](int co, int plane, int rw) {
        const int slot = a.reach[0] == 1 ? 0 : (plane - a.q_begin[0]) % a.reach[0];
        const int outer = ((slot * a.stride[0] + rd) * a.co + co) * a.box[1] + q - c.q_h;
        return sums + ((outer * a.stride[1] + rh) * a.stride[2] + rw) * 32 * a.run_chunks + j;
      };
      const int so_far_step = 32 * a.run_chunks;
      for (int co = 0; co < a.co; ++co) {
        float bias = 0;
        if (a.bias != nullptr) {
          bias = sizeof(T) == 4 || a.out_f32 ? static_cast<const float*>(a.bias)[co]
                                             : ToAccumulator(static_cast<const T*>(a.bias)[co]);
        }
        for (int rw = 0; rw < a.stride[2]; rw += kOutputs) {
          int e = tap_begin;
          const bool now = e < tap_end && td.tap[e].back == 0;
          const int next = e + now;
          if (completes) {
            float v[kOutputs] = {};
            if (now) add(co, td.tap[e].tap, rw, v);
            if (next < tap_end && c.d - td.tap[next].back >= c.d_begin) {
              const float* before = so_far(co, c.d, rw);
#pragma unroll
              for (int o = 0; o < kOutputs; ++o) v[o] += before[o * so_far_step];
            }
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) {
              const int phase = kWindow && swapped ? 1 - o : o;
              out_stage[(lane * a.stride[2] + rw + phase) * stage_step + (kLast ? co : 0)] =
                  v[o] + bias;
            }
          }
          for (e = next; e < tap_end; ++e) {
            const int plane = c.d + td.tap[e].back;
            if (plane < c.q_d || plane >= c.d_end) continue;
            float v[kOutputs] = {};
            add(co, td.tap[e].tap, rw, v);
            float* before = so_far(co, plane, rw);
            if (e + 1 < tap_end && plane - td.tap[e + 1].back >= c.d_begin) {
#pragma unroll
              for (int o = 0; o < kOutputs; ++o) v[o] += before[o * so_far_step];
            }
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) before[o * so_far_step] = v[o];
          }
        }
        if (!completes || (kLast && co + 1 < a.co)) continue;
        __syncwarp();
        const int first = (c.run + 32 * chunk) * a.stride[2];
        const int runs = min(a.box[2] - 32 * chunk, 32);  // beyond, another item's
        const int count = min(runs * a.stride[2], a.osize[2] - first) * stage_step;
        const int64_t at = c.n * a.y_n + static_cast<int64_t>(od) * a.y_d +
                           static_cast<int64_t>(oh) * a.y_h +
                           (kLast ? first * a.co : co * static_cast<int64_t>(a.y_c) + first);
        if (sizeof(T) == 4 || a.out_f32) {
          for (int x = lane; x < count; x += 32) {
            static_cast<float*>(a.out)[at + x] = out_stage[x];
          }
        } else {
          for (int x = lane; x < count; x += 32) {
            static_cast<T*>(a.out)[at + x] = FromAccumulator<T>(out_stage[x]);
          }
        }
        __syncwarp();
      }
    }
  };

  ThinCursor before = now;
  int stage = 0, base = 0, base_before = 0;
  bool had = false;
  while (more || had) {
    if (multiplies) {
      if (more) multiply(stage, base);
    } else {
      if (more_ahead) {
        const int to = stage == 0 ? a.ahead : stage - 1;
        ThinCopySources<T, kLast>(a, ahead, sources + to * a.x_stage, copier);
        more_ahead = ThinNext(a, ahead);
      }
      ThinCommit();
      if (had) gather(before, base_before);
      ThinWait(a.ahead);
    }
    __syncthreads();
    had = more;
    before = now;
    base_before = base;
    if (more) more = ThinNext(a, now);
    if (++stage == stages) stage = 0;
    base += a.rows;
    if (base >= a.p_rows) base -= a.p_rows;
  }
}

// ---------------------------------------------------------------------------------------------
// Input gradient

struct ThinOrigin {
  int n, d, h, w;
};
__device__ inline ThinOrigin ThinOriginOf(const ThinInputGradArgs& a, int tile) {
  ThinOrigin at;
  int rest = tile / a.cuts[2];
  at.w = (tile - rest * a.cuts[2]) * a.width;
  int up = rest / a.cuts[1];
  at.h = (rest - up * a.cuts[1]) * a.rows;
  at.n = up / a.isize[0];
  at.d = up - at.n * a.isize[0];
  return at;
}

// The element of a row of y that is staged first: a multiple of a copy's elements; the one that the
// first pixel's first tap reads lies `ahead` of it.
struct ThinStart {
  int element, ahead;
};
template <bool kLast>
__device__ inline ThinStart ThinStartOf(const ThinInputGradArgs& a, const ThinOrigin& at) {
  const int wanted = (at.w * a.stride[2] - a.pad[2]) * (kLast ? a.co : 1);
  const int ahead = wanted & (a.unit_elements - 1);
  return {wanted - ahead, ahead};
}

template <class T, bool kLast>
__device__ inline void ThinCopyOutputs(const ThinInputGradArgs& a, const ThinOrigin& at,
                                       uint32_t to, int thread) {
  constexpr int kThreads = 32 * kThinCopiers;
  const T* y = static_cast<const T*>(a.y) + at.n * a.y_n;
  const ThinStart start = ThinStartOf<kLast>(a, at);
  const int length = a.osize[2] * (kLast ? a.co : 1);
  const int planes = (kLast ? 1 : a.co) * a.k[0];
  const int count = planes * a.staged_rows * a.by_units.divisor;
  const int d0 = at.d * a.stride[0] - a.pad[0], h0 = at.h * a.stride[1] - a.pad[1];
#pragma unroll 4
  for (int u = thread; u < count; u += kThreads) {
    const int row = Divide(u, a.by_units), unit = u - row * a.by_units.divisor;
    const int plane = Divide(row, a.by_staged_rows), lh = row - plane * a.staged_rows;
    const int co = kLast ? 0 : Divide(plane, a.by_planes);
    const int od = d0 + (plane - co * a.k[0]) * a.dilation[0], oh = h0 + lh;
    const int e = start.element + unit * a.unit_elements;
    const bool valid = static_cast<unsigned>(od) < static_cast<unsigned>(a.osize[0]) &&
                       static_cast<unsigned>(oh) < static_cast<unsigned>(a.osize[1]) &&
                       static_cast<unsigned>(e) < static_cast<unsigned>(length);
    const int from = co * a.y_c + od * a.y_d + oh * a.y_h + e;
    const int place = plane * a.plane_step + lh * a.row_step + unit * a.unit_elements;
    ThinCopy(to + place * static_cast<int>(sizeof(T)), y + (valid ? from : 0), a.unit, valid);
  }
}

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
  const int stages = a.ahead + 1;
  const uint32_t staged = SharedAddress(smem);
  int tile = blockIdx.x, tile_ahead = tile;

  uint32_t w[MT][KS][4];
  int place[KS][2][kPair];  // of the taps that this lane reads, from its pixel
  const int set = warp % a.sets, group = warp / a.sets, groups = kThinMultipliers / a.sets;
  const int channel0 = (blockIdx.y * a.sets + set) * 16 * MT;
  if (multiplies) {
    const T* weights = static_cast<const T*>(a.w);
    const int taps = a.k[0] * a.k[1] * a.k[2];
#pragma unroll
    for (int k = 0; k < KS; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int column[kPair];
#pragma unroll
        for (int i = 0; i < kPair; ++i) {
          column[i] = (k * 8 + half * 4 + lane % 4) * kPair + i;
          const int some = column[i] < a.columns ? column[i] : 0;  // times a weight of zero
          const int co = some / taps, tap = some - co * taps, kdh = tap / a.k[2];
          const int kd = kdh / a.k[1], kh = kdh - kd * a.k[1], kw = tap - kdh * a.k[2];
          place[k][half][i] =
              static_cast<int>(sizeof(T)) *
              (co * a.channel_step + kd * a.plane_step + kh * a.dilation[1] * a.row_step +
               kw * a.tap_step);
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
    for (int i = 0; i < a.ahead; ++i, tile_ahead += gridDim.x) {
      if (tile_ahead < a.tiles) {
        ThinCopyOutputs<T, kLast>(a, ThinOriginOf(a, tile_ahead), staged + i * a.y_stage, copier);
      }
      ThinCommit();
    }
    ThinWait(a.ahead);
  }
  __syncthreads();

  const auto multiply = [&](auto* out, int stage) {
    using Out = std::remove_reference_t<decltype(*out)>;
    const ThinOrigin at = ThinOriginOf(a, tile);
    const uint32_t from = staged + stage * a.y_stage +
                          ThinStartOf<kLast>(a, at).ahead * static_cast<int>(sizeof(T));
    const int tiles_of_row = a.width / 16, tiles = a.rows * tiles_of_row;
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
          pixel[t][half] = from + (row * a.stride[1] * a.row_step + (across + x) * a.pixel_step) *
                                      static_cast<int>(sizeof(T));
        }
      }
#pragma unroll
      for (int k = 0; k < KS; ++k) {
        if (k >= a.ksteps) break;
#pragma unroll
        for (int t = 0; t < kNT; ++t) {
          uint32_t v[2][2];  // half of the pixels, half of the taps
#pragma unroll
          for (int x = 0; x < 2; ++x) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if constexpr (sizeof(T) == 4) {
                float f;
                asm volatile("ld.shared.f32 %0, [%1];"
                             : "=f"(f)
                             : "r"(pixel[t][x] + place[k][half][0]));
                v[x][half] = RoundTF32(f);
              } else {
                uint16_t low, high;
                asm volatile("ld.shared.u16 %0, [%1];"
                             : "=h"(low)
                             : "r"(pixel[t][x] + place[k][half][0]));
                asm volatile("ld.shared.u16 %0, [%1];"
                             : "=h"(high)
                             : "r"(pixel[t][x] + place[k][half][kPair - 1]));
                v[x][half] = low | static_cast<uint32_t>(high) << 16;
              }
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
        if (h >= a.isize[1]) continue;
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
            if (x >= a.isize[2] || ci >= a.ci) continue;
            Out* element = to + (kLast ? x * a.ci + ci : static_cast<int64_t>(ci) * a.x_c + x);
            if (a.vector) {
              ThinStore4(element, v);
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                if ((kLast ? ci + i < a.ci : x + i < a.isize[2])) {
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
  for (; tile < a.tiles; tile += gridDim.x) {
    if (multiplies) {
      if (group < groups) {
        if (sizeof(T) == 4 || a.out_f32) {
          multiply(static_cast<float*>(a.out), stage);
        } else {
          multiply(static_cast<T*>(a.out), stage);
        }
      }
    } else {
      if (tile_ahead < a.tiles) {
        ThinCopyOutputs<T, kLast>(a, ThinOriginOf(a, tile_ahead),
                                  staged + (stage == 0 ? a.ahead : stage - 1) * a.y_stage, copier);
      }
      tile_ahead += gridDim.x;
      ThinCommit();
      ThinWait(a.ahead);
    }
    __syncthreads();
    if (++stage == stages) stage = 0;
  }
}

// ---------------------------------------------------------------------------------------------

template <class Kernel, class Args>
cudaError_t EnqueueThin(Kernel kernel, const ThinPlan& plan, const Args& args,
                        cudaStream_t stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, args.smem);
  if (status != cudaSuccess) return status;
  kernel<<<dim3(plan.grid_x, plan.grid_y), kThinThreads, args.smem, stream>>>(args);
  return cudaGetLastError();
}

template <class T, int MT, int KS, bool kLast>
cudaError_t EnqueueThinForwardTile(const ThinPlan& plan, const ThinForwardArgs& args,
                                   cudaStream_t stream) {
  return args.window ? EnqueueThin(ThinForward<T, MT, KS, kLast, true>, plan, args, stream)
                     : EnqueueThin(ThinForward<T, MT, KS, kLast, false>, plan, args, stream);
}

template <class T>
cudaError_t EnqueueThinForward(const ThinPlan& plan, const ThinForwardArgs& args, bool last,
                               cudaStream_t stream) {
  if (plan.mt == 2 && plan.ks == 8) {
    return last ? EnqueueThinForwardTile<T, 2, 8, true>(plan, args, stream)
                : EnqueueThinForwardTile<T, 2, 8, false>(plan, args, stream);
  }
  if (plan.mt == 4 && plan.ks == 4) {
    return last ? EnqueueThinForwardTile<T, 4, 4, true>(plan, args, stream)
                : EnqueueThinForwardTile<T, 4, 4, false>(plan, args, stream);
  }
  return cudaErrorInvalidConfiguration;
}

template <class T>
cudaError_t EnqueueThinInputGrad(const ThinPlan& plan, const ThinInputGradArgs& args, bool last,
                                 cudaStream_t stream) {
  if (plan.mt == 2 && plan.ks == 8) {
    return last ? EnqueueThin(ThinInputGrad<T, 2, 8, true>, plan, args, stream)
                : EnqueueThin(ThinInputGrad<T, 2, 8, false>, plan, args, stream);
  }
  if (plan.mt == 4 && plan.ks == 4) {
    return last ? EnqueueThin(ThinInputGrad<T, 4, 4, true>, plan, args, stream)
                : EnqueueThin(ThinInputGrad<T, 4, 4, false>, plan, args, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_THIN_CUH_
