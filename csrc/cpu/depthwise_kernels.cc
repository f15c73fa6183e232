// The "depthwise" kernels, compiled once for each instruction set. See depthwise_plan.h for what
// they compute and phase_plan.h for why nothing here may be shared with other files.
#include <type_traits>

#include "cpu/depthwise_plan.h"
#include "cpu/vec.h"

namespace jaxconv::cpu {
namespace {

using T = float;
constexpr int64_t lanes = kLanes<T>;
// Sums in registers: vectors of a row, or rows of fewer.
constexpr int kVectors = JAXCONV_REGISTERS == 32 ? 4 : 2;
constexpr uint32_t kWhole = (uint32_t{1} << lanes) - 1;  // a mask

// The masks of a vector's taps, [vector][tap]; a row's copy.
struct Scratch {
  uint32_t* masks;
  T* row;
};

// A block of rows of dx: (plane, i0, i1 ...), where a plane is an image or a channel of one.
struct Place {
  int64_t plane, i0, block;

  void Advance(const DepthwisePlan& p) {
    if (++block < p.blocks) return;
    block = 0;
    if (++i0 < p.problem.isize[0]) return;
    i0 = 0;
    ++plane;
  }
};

Place PlaceOf(const DepthwisePlan& p, int64_t step) {
  const int64_t planes = step / p.blocks;
  return {planes / p.problem.isize[0], planes % p.problem.isize[0], step % p.blocks};
}

// The rows of y that a block hears and the ones before it did not: of plane o0 for a tap t0, the
// first of them and one behind the last.
struct NewRows {
  int64_t begin, end, heard;

  NewRows(const DepthwisePlan& p, const Place& at) {
    const Problem& q = p.problem;
    const int64_t step = p.rows * q.stride[1];
    end =
        at.block * step + (p.rows - 1) * q.stride[1] + (q.k[1] - 1) * q.dilation[1] - q.pad[1] + 1;
    begin = Max(at.block == 0 ? 0 : end - step, 0);
    end = at.plane < p.planes ? Min(end, q.osize[1]) : begin;
    // Planes up to this one were heard by the inputs before.
    heard = p.keeps && at.i0 > 0
                ? (at.i0 - 1) * q.stride[0] + (q.k[0] - 1) * q.dilation[0] - q.pad[0]
                : -1;
  }

  // Calls ask(first element, elements) for each plane that has any.
  template <class Ask>
  void Each(const DepthwisePlan& p, const Place& at, Ask ask) const {
    const Problem& q = p.problem;
    const int64_t row = q.osize[2] * (q.channels_last ? q.ci : 1);
    for (int64_t t0 = 0; begin < end && t0 < q.k[0]; ++t0) {
      const int64_t o0 = at.i0 * q.stride[0] + t0 * q.dilation[0] - q.pad[0];
      if (o0 < 0 || o0 >= q.osize[0] || o0 <= heard) continue;
      ask(((at.plane * q.osize[0] + o0) * q.osize[1] + begin) * row, (end - begin) * row);
    }
  }
};

// ---------------------------------------------------------------------------------------------
// Channels first

// Vectors may reach beyond a row, but not beyond the array: a copy of one near its ends.
__attribute__((noinline, cold)) const T* CopyOf(const T* row, int64_t size, T* copy) {
  std::memcpy(copy, row, static_cast<size_t>(size) * sizeof(T));
  return copy;
}

// Some vectors of some rows of dx, from vector `first` on.
template <int stride, int taps, int vectors, int rows>
__attribute__((noinline)) void Sum(const DepthwisePlan& p, const Place& at, int64_t first,
                                   const T* y, const T* weight, const Scratch& scratch, T* dx) {
  const Problem& q = p.problem;
  const int64_t i1 = at.block * rows, o1 = i1 * q.stride[1] - q.pad[1], step = q.stride[1];
  const int64_t width = q.osize[2], from = first * lanes * stride - q.pad[2];
  const uint64_t height = static_cast<uint64_t>(q.osize[1]);
  const int64_t taps0 = q.k[0], taps1 = q.k[1], dilation = q.dilation[1];
  const uint32_t* masks = scratch.masks + first * taps;
  // Rows that are far enough from the ends of the array.
  const int64_t away = (p.margin + width - 1) / width;
  const uint64_t inside =
      static_cast<uint64_t>(Max(q.n * q.ci * q.osize[0] * q.osize[1] - 2 * away, 0));
  // Two sums each, as a sum waits for the one before.
  Vec<T> sums[rows][vectors][2] = {};
  for (int64_t t0 = 0; t0 < taps0; ++t0) {
    const int64_t o0 = at.i0 * q.stride[0] + t0 * q.dilation[0] - q.pad[0];
    if (o0 < 0 || o0 >= q.osize[0]) continue;
    const int64_t plane = (at.plane * q.osize[0] + o0) * q.osize[1];
    const T* w = weight + t0 * taps1 * taps;
    for (int64_t t1 = 0, o = o1; t1 < taps1; ++t1, o += dilation, w += taps) {
      Vec<T> ws[taps];
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) ws[t] = Broadcast(w[t]);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const int64_t mine = o + r * step;
        if (static_cast<uint64_t>(mine) >= height) continue;
        const T* row = y + (plane + mine) * width;
        if (__builtin_expect(static_cast<uint64_t>(plane + mine - away) >= inside, false)) {
          row = CopyOf(row, width, scratch.row);
        }
        row += from;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const uint32_t* mask = masks + v * taps;
#pragma GCC unroll 8
          for (int t = 0; t < taps; t += stride) {
            const T* x = row + v * lanes * stride + t;
            // Whole vectors without a mask, which would have to be moved to where masks are.
            if constexpr (stride == 1) {
              const Vec<T> a = Load<T>(x);
              sums[r][v][t % 2] += ws[t] * (mask[t] == kWhole ? a : Masked<T>(a, mask[t]));
            } else {
              const Vec<T> a = Load<T>(x), b = Load<T>(x + lanes);
              const Vec<T> even = Unzip<T, false>(a, b), odd = Unzip<T, true>(a, b);
              sums[r][v][0] += ws[t] * (mask[t] == kWhole ? even : Masked<T>(even, mask[t]));
              if (t + 1 < taps) {
                sums[r][v][1] +=
                    ws[t + 1] * (mask[t + 1] == kWhole ? odd : Masked<T>(odd, mask[t + 1]));
              }
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    if (i1 + r >= q.isize[1]) break;
    T* to = dx + ((at.plane * q.isize[0] + at.i0) * q.isize[1] + i1 + r) * q.isize[2];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int64_t i = (first + v) * lanes;
      StoreSome<T>(to + i, sums[r][v][0] + sums[r][v][1], q.isize[2] - i);
    }
  }
}

template <int stride, int taps>
void SumAll(const DepthwisePlan& p, const T* y, const T* w, T* dx, int64_t task, void* memory) {
  const Problem& q = p.problem;
  const Scratch scratch{
      static_cast<uint32_t*>(memory),
      reinterpret_cast<T*>(static_cast<uint32_t*>(memory) + p.vectors * taps) + p.margin};
  for (int t = 0; t < taps; ++t) {
    const Valid valid = ValidOf(t - q.pad[2], stride, q.osize[2], q.isize[2]);
    for (int64_t v = 0; v < p.vectors; ++v) {
      const int64_t i = v * lanes;
      // What lanes behind the row hear does not matter.
      scratch.masks[v * taps + t] =
          MaskOf<T>(valid.begin - i, valid.end - i) | (kWhole & ~MaskOf<T>(0, q.isize[2] - i));
    }
  }
  const int64_t begin = p.steps * task / p.tasks, end = p.steps * (task + 1) / p.tasks;
  constexpr int64_t kAhead = 2;
  Place at = PlaceOf(p, begin), ahead = PlaceOf(p, begin + kAhead);
  const int64_t window = q.k[0] * q.k[1] * taps;
  const int64_t runs = (p.vectors + kVectors - 1) / kVectors;
  for (int64_t step = begin; step < end; ++step) {
    if (p.asks) {
      NewRows(p, ahead).Each(p, ahead, [&](int64_t first, int64_t count) {
        for (int64_t e = 0; e < count; e += kLine<T>) AskFor(y + first + e);
      });
    }
    const T* weight = w + at.plane % q.ci * window;
    for (int64_t run = 0; run < runs; ++run) {  // of nearly equal length
      const int64_t v = p.vectors * run / runs;
      const auto sum = [&](auto kernel) { kernel(p, at, v, y, weight, scratch, dx); };
      switch (p.vectors * (run + 1) / runs - v) {
        case 1:
          p.rows == kVectors ? sum(Sum<stride, taps, 1, kVectors>) : sum(Sum<stride, taps, 1, 1>);
          break;
        case 2:
          p.rows == 2 ? sum(Sum<stride, taps, 2, kVectors / 2>) : sum(Sum<stride, taps, 2, 1>);
          break;
        case 3:
          if constexpr (kVectors == 4) sum(Sum<stride, taps, 3, 1>);
          break;
        case 4:
          if constexpr (kVectors == 4) sum(Sum<stride, taps, 4, 1>);
          break;
      }
    }
    at.Advance(p);
    ahead.Advance(p);
  }
}

// ---------------------------------------------------------------------------------------------
// Channels last

// Neighbouring inputs of a row, from input i2 on, of `some` channels from c on; `whole`: a vector.
template <int stride, int taps, int inputs, bool whole>
__attribute__((noinline)) void SumPixels(const DepthwisePlan& p, const Place& at, int64_t i1,
                                         int64_t i2, int64_t c, int64_t some, const T* y,
                                         const T* packed, T* dx) {
  const Problem& q = p.problem;
  const int64_t channels = q.ci, filled = p.vectors * lanes, first = i2 * stride - q.pad[2];
  const uint64_t width = static_cast<uint64_t>(q.osize[2]);
  const int64_t taps0 = q.k[0], taps1 = q.k[1], dilation = q.dilation[1];
  Vec<T> sums[inputs] = {};
  for (int64_t t0 = 0; t0 < taps0; ++t0) {
    const int64_t o0 = at.i0 * q.stride[0] + t0 * q.dilation[0] - q.pad[0];
    if (o0 < 0 || o0 >= q.osize[0]) continue;
    const int64_t plane = (at.plane * q.osize[0] + o0) * q.osize[1];
    int64_t o1 = i1 * q.stride[1] - q.pad[1];
    for (int64_t t1 = 0; t1 < taps1; ++t1, o1 += dilation) {
      if (o1 < 0 || o1 >= q.osize[1]) continue;
      const T* from = y + ((plane + o1) * q.osize[2] + first) * channels + c;
      const T* w = packed + (t0 * taps1 + t1) * taps * filled + c;
      Vec<T> ws[taps];
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) ws[t] = Load<T>(w + t * filled);
      // Each pixel once, for all of the inputs that hear it.
#pragma GCC unroll 32
      for (int e = 0; e < (inputs - 1) * stride + taps; ++e, from += channels) {
        if (static_cast<uint64_t>(first + e) >= width) continue;
        const Vec<T> v = whole ? Load<T>(from) : LoadSome<T>(from, some);
#pragma GCC unroll 8
        for (int i = 0; i < inputs; ++i) {
          const int t = e - i * stride;
          if (t >= 0 && t < taps) sums[i] += ws[t] * v;
        }
      }
    }
  }
  T* to =
      dx + c + (((at.plane * q.isize[0] + at.i0) * q.isize[1] + i1) * q.isize[2] + i2) * channels;
#pragma GCC unroll 8
  for (int i = 0; i < inputs; ++i) StoreSome<T>(to + i * channels, sums[i], some);
}

void Pack(const DepthwisePlan& p, const void* weight, void* packed) {
  const int64_t taps = Product(p.problem.k), filled = p.vectors * lanes, channels = p.problem.ci;
  const T* w = static_cast<const T*>(weight);
  T* to = static_cast<T*>(packed);
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < filled; ++c) to[t * filled + c] = c < channels ? w[c * taps + t] : 0;
  }
}

template <int stride, int taps>
void SumAllPixels(const DepthwisePlan& p, const T* y, const T* packed, T* dx, int64_t task) {
  constexpr int kInputs = 8, kFewer = 4;
  constexpr int64_t kMostPlanes = 8;
  const Problem& q = p.problem;
  const int64_t begin = p.steps * task / p.tasks, end = p.steps * (task + 1) / p.tasks;
  const int64_t sums =
      (q.isize[2] / kInputs + q.isize[2] % kInputs / kFewer + q.isize[2] % kFewer) * p.vectors;
  Place at = PlaceOf(p, begin), ahead = PlaceOf(p, begin + 1);
  for (int64_t step = begin; step < end; ++step) {
    // What the next row hears is asked for a little with each sum: memory goes on meanwhile.
    const T* from[kMostPlanes];
    int64_t left[kMostPlanes], planes = 0, lines = 0;
    if (p.asks) {
      NewRows(p, ahead).Each(p, ahead, [&](int64_t first, int64_t count) {
        if (planes == kMostPlanes) return;
        from[planes] = y + first;
        left[planes] = (count + kLine<T> - 1) / kLine<T>;
        lines += left[planes++];
      });
    }
    int64_t each = (lines + sums - 1) / sums;
    const auto ask = [&] {
      for (int64_t i = 0; i < each && planes > 0; ++i) {
        AskFor(from[planes - 1]);
        from[planes - 1] += kLine<T>;
        if (--left[planes - 1] == 0) --planes;
      }
    };
    const int64_t i1 = at.block / p.pieces, piece = at.block % p.pieces;
    const int64_t i_end = q.isize[2] * (piece + 1) / p.pieces;
    for (int64_t i = q.isize[2] * piece / p.pieces, inputs; i < i_end; i += inputs) {
      const int64_t rest = i_end - i;
      inputs = rest >= kInputs ? kInputs : rest >= kFewer ? kFewer : 1;
      if (q.osize[0] * q.osize[1] == 1) {  // of the row itself, what comes after these inputs
        const int64_t o = (i + inputs) * stride + taps - q.pad[2];
        from[0] = y + (at.plane * q.osize[2] + o) * q.ci;
        left[0] = (inputs * stride * q.ci + kLine<T> - 1) / kLine<T>;
        each = (left[0] + p.vectors - 1) / p.vectors;
        planes = 1;
      }
      for (int64_t c = 0; c < q.ci; c += lanes) {
        const int64_t some = Min(lanes, q.ci - c);
        ask();
        const auto sum = [&](auto kernel) { kernel(p, at, i1, i, c, some, y, packed, dx); };
        if (inputs == kInputs) {
          some == lanes ? sum(SumPixels<stride, taps, kInputs, true>)
                        : sum(SumPixels<stride, taps, kInputs, false>);
        } else if (inputs == kFewer) {
          sum(SumPixels<stride, taps, kFewer, false>);
        } else {
          sum(SumPixels<stride, taps, 1, false>);
        }
      }
    }
    at.Advance(p);
    ahead.Advance(p);
  }
}

// ---------------------------------------------------------------------------------------------
// Compiled strides and taps

// Calls body with the stride and the taps of a row as types.
template <class Body>
void WithRow(const DepthwisePlan& p, Body body) {
  const auto with_taps = [&](auto stride) {
    switch (p.problem.k[2]) {
      case 1:
        return body(stride, std::integral_constant<int, 1>{});
      case 2:
        return body(stride, std::integral_constant<int, 2>{});
      case 3:
        return body(stride, std::integral_constant<int, 3>{});
      case 4:
        return body(stride, std::integral_constant<int, 4>{});
      case 5:
        return body(stride, std::integral_constant<int, 5>{});
      case 6:
        return body(stride, std::integral_constant<int, 6>{});
      case kDepthwiseTaps:
        return body(stride, std::integral_constant<int, kDepthwiseTaps>{});
    }
  };
  if (p.problem.stride[2] == 1) {
    with_taps(std::integral_constant<int, 1>{});
  } else {
    with_taps(std::integral_constant<int, 2>{});
  }
}

void First(const DepthwisePlan& p, const void* y, const void* w, void* dx, int64_t task,
           void* scratch) {
  WithRow(p, [&](auto stride, auto taps) {
    SumAll<decltype(stride)::value, decltype(taps)::value>(
        p, static_cast<const T*>(y), static_cast<const T*>(w), static_cast<T*>(dx), task, scratch);
  });
}

void Last(const DepthwisePlan& p, const void* y, const void* packed, void* dx, int64_t task) {
  WithRow(p, [&](auto stride, auto taps) {
    SumAllPixels<decltype(stride)::value, decltype(taps)::value>(
        p, static_cast<const T*>(y), static_cast<const T*>(packed), static_cast<T*>(dx), task);
  });
}

}  // namespace

extern const DepthwiseKernels JAXCONV_DEPTHWISE = {kBytes, kVectors, First, Pack, Last};

}  // namespace jaxconv::cpu
