// The "taps" kernels, compiled once for each instruction set. See tap_plan.h for what they compute
// and phase_plan.h for why nothing here may be shared with other files.
#include "cpu/tap_plan.h"
#include "cpu/vec.h"

namespace jaxconv::cpu {
namespace {

// Sums in registers: vectors of the weight by positions.
#if JAXCONV_REGISTERS == 32
constexpr int kRows = 4, kPositions = 6;
#else
constexpr int kRows = 2, kPositions = 5;
#endif

// Where the elements of a task's memory lie.
template <class T>
struct Scratch {
  T* sums;          // input gradient: [block / rows][positions][rows] vectors; forward: [block][n]
  T* weight;        // forward: [input channels][rows] vectors
  int64_t* vector;  // where a vector of taps lies in a plane, from that of the first tap
  int64_t* plane;   // where the first tap of a position lies, from plane 0 of the group
  int64_t* input;   // where a position lies in x, from channel 0 of the group
};

// A position of a chunk, counted over all images.
template <class T>
void FillTables(const TapPlan& p, int64_t first, int64_t count, int64_t image, Scratch<T>& s) {
  const Problem& q = p.problem;
  const int64_t inputs = Product(q.isize);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t i = (first + j) % inputs, n = (first + j) / inputs;
    const int64_t w = i % q.isize[2], h = i / q.isize[2] % q.isize[1],
                  d = i / q.isize[2] / q.isize[1];
    s.plane[j] =
        n * image + d * q.stride[0] * p.pitch[0] + h * q.stride[1] * p.pitch[1] + w * q.stride[2];
    s.input[j] = n * q.ci * inputs + i;
  }
  for (int64_t v = 0; v < p.vectors; ++v) {
    const int64_t t = v * kLanes<T>, h = t / q.k[2] % q.k[1], d = t / q.k[2] / q.k[1];
    s.vector[v] = d * q.dilation[0] * p.pitch[0] + h * q.dilation[1] * p.pitch[1] + t % q.k[2];
  }
}

template <class T>
Scratch<T> Divide(const TapPlan& p, void* memory, int64_t sums, int64_t weight) {
  Scratch<T> s;
  s.sums = static_cast<T*>(memory);
  s.weight = s.sums + sums;
  s.vector = reinterpret_cast<int64_t*>(s.weight + weight);
  s.plane = s.vector + p.vectors;
  s.input = s.plane + p.chunk;
  return s;
}

// ---------------------------------------------------------------------------------------------
// Input gradient

// Sums of kRows input channels by kPositions positions over some output channels and all taps. As
// much of a row of the weight is asked for.
template <class T>
void Dot(const TapPlan& p, const T* const (&w)[kRows], const T* const (&y)[kPositions],
         int64_t channels, const int64_t* vector, const T* ahead, T* sums) {
  Vec<T> acc[kPositions][kRows];
  for (int j = 0; j < kPositions; ++j) {
    for (int m = 0; m < kRows; ++m) acc[j][m] = Load<T>(sums + (j * kRows + m) * kLanes<T>);
  }
  int64_t at = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t plane = c * p.channel;
    for (int64_t v = 0; v < p.vectors; ++v, at += kLanes<T>) {
      const int64_t shift = plane + vector[v];
      AskFor(ahead + at);
      Vec<T> rows[kRows];
      for (int m = 0; m < kRows; ++m) rows[m] = Load<T>(w[m] + at);
      for (int j = 0; j < kPositions; ++j) {
        const Vec<T> value = Load<T>(y[j] + shift);
        for (int m = 0; m < kRows; ++m) acc[j][m] += rows[m] * value;
      }
    }
  }
  for (int j = 0; j < kPositions; ++j) {
    for (int m = 0; m < kRows; ++m) Store<T>(sums + (j * kRows + m) * kLanes<T>, acc[j][m]);
  }
}

template <class T>
void InputGrad(const TapPlan& p, const TapOperands& ops, int64_t task, void* memory) {
  // At a time: vectors of a row of the weight, and bytes of y, which all rows of the task read from
  // the second-level cache. Of fewer, sums would come and go too often.
  constexpr int64_t lanes = kLanes<T>, kNear = 256, kNearBytes = 512 << 10;
  const Problem& q = p.problem;
  const int64_t chunk = task % p.chunks, block = task / p.chunks % p.blocks,
                g = task / p.chunks / p.blocks;
  const int64_t first = chunk * p.chunk, count = Min(p.chunk, p.positions - first);
  const int64_t padded = (p.chunk + kPositions - 1) / kPositions * kPositions * kRows * lanes;
  const int64_t channels = Min(p.block, q.cig() - block * p.block);
  const int64_t pieces = (channels + kRows - 1) / kRows;  // of kRows channels
  Scratch<T> s = Divide<T>(p, memory, p.block / kRows * padded, 0);
  FillTables(p, first, count, q.co * p.channel, s);
  for (int64_t e = 0; e < pieces * padded; e += lanes) Store<T>(s.sums + e, Vec<T>{});
  const T* planes =
      static_cast<const T*>(p.in_place ? ops.y : ops.planes) + g * q.cog() * p.channel;
  const int64_t row = q.cog() * p.vectors * lanes;
  const T* weight = static_cast<const T*>(ops.w) + (g * q.cig() + block * p.block) * row;
  const int64_t near = kNearBytes / (p.channel * static_cast<int64_t>(sizeof(T)));
  const int64_t most = Max(1, Min(kNear / p.vectors, near)), parts = (q.cog() + most - 1) / most;
  const int64_t some = (q.cog() + parts - 1) / parts;
  for (int64_t c = 0; c < q.cog(); c += some) {
    const int64_t here = Min(some, q.cog() - c);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const T *w[kRows], *next[kRows];  // and the rows that come after these
      const int64_t next_piece = (piece + 1) % pieces, next_c = piece + 1 < pieces ? c : c + some;
      for (int64_t m = 0; m < kRows; ++m) {
        w[m] = weight + Min(piece * kRows + m, channels - 1) * row + c * p.vectors * lanes;
        next[m] = weight + (next_piece * kRows + m) * row + next_c * p.vectors * lanes;
      }
      for (int64_t j = 0; j < count; j += kPositions) {
        const T* y[kPositions];
        for (int64_t k = 0; k < kPositions; ++k) y[k] = planes + s.plane[Min(j + k, count - 1)];
        const T* ahead = next[j / kPositions % kRows];
        Dot<T>(p, w, y, here, s.vector, ahead, s.sums + piece * padded + j * kRows * lanes);
      }
    }
    planes += here * p.channel;
  }
  const int64_t inputs = Product(q.isize);
  T* out = static_cast<T*>(ops.out) + (g * q.cig() + block * p.block) * inputs;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t m = 0; m < channels; ++m) {
      const T* from = s.sums + m / kRows * padded + (j * kRows + m % kRows) * lanes;
      T sum = 0;
      for (int64_t l = 0; l < lanes; ++l) sum += from[l];
      out[s.input[j] + m * inputs] = sum;
    }
  }
}

// A channel of y with zeros around.
template <class T>
void PackPlane(const TapPlan& p, const TapOperands& ops, int64_t plane) {
  const Problem& q = p.problem;
  const T* from = static_cast<const T*>(ops.y) + plane * Product(q.osize);
  T* to = static_cast<T*>(ops.planes) + plane * p.channel;
  for (int64_t d = 0; d < p.plane[0]; ++d) {
    for (int64_t h = 0; h < p.plane[1]; ++h, to += p.pitch[1]) {
      const int64_t od = d - q.pad[0], oh = h - q.pad[1];
      const bool inside = od >= 0 && od < q.osize[0] && oh >= 0 && oh < q.osize[1];
      const int64_t begin = Min(Max(q.pad[2], 0), p.pitch[1]);
      const int64_t end = inside ? Max(begin, Min(q.osize[2] + q.pad[2], p.pitch[1])) : begin;
      const T* row = from + (od * q.osize[1] + oh) * q.osize[2] - q.pad[2];
      for (int64_t u = 0; u < begin; ++u) to[u] = 0;
      if (begin < end) std::memcpy(to + begin, row + begin, (end - begin) * sizeof(T));
      for (int64_t u = end; u < p.pitch[1]; ++u) to[u] = 0;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Forward

// The products of kRows vectors of the weight with kPositions inputs, over all input channels.
template <class T>
void Multiply(const T* weight, const T* const (&x)[kPositions], int64_t channels, int64_t inputs,
              T* sums) {
  Vec<T> acc[kPositions][kRows] = {};
  for (int64_t c = 0; c < channels; ++c, weight += kRows * kLanes<T>) {
    Vec<T> rows[kRows];
    for (int m = 0; m < kRows; ++m) rows[m] = Load<T>(weight + m * kLanes<T>);
    for (int j = 0; j < kPositions; ++j) {
      const Vec<T> value = Broadcast<T>(x[j][c * inputs]);
      for (int m = 0; m < kRows; ++m) acc[j][m] += rows[m] * value;
    }
  }
  for (int j = 0; j < kPositions; ++j) {
    for (int m = 0; m < kRows; ++m) Store<T>(sums + (j * kRows + m) * kLanes<T>, acc[j][m]);
  }
}

template <class T>
void Forward(const TapPlan& p, const TapOperands& ops, int64_t task, void* memory) {
  constexpr int64_t lanes = kLanes<T>;
  const Problem& q = p.problem;
  const int64_t block = task % p.blocks, g = task / p.blocks, inputs = Product(q.isize);
  const int64_t channels = Min(p.block, q.cog() - block * p.block), rows = channels * p.vectors;
  const int64_t planes = (p.block * q.n * p.channel + lanes - 1) / lanes * lanes;
  Scratch<T> s = Divide<T>(p, memory, planes, q.cig() * kRows * lanes);
  FillTables(p, 0, p.positions, p.channel, s);  // planes: [block][n]
  for (int64_t e = 0; e < planes; e += lanes) Store<T>(s.sums + e, Vec<T>{});
  const int64_t row = q.cog() * p.vectors * lanes;
  const T* w =
      static_cast<const T*>(ops.w) + g * q.cig() * row + block * p.block * p.vectors * lanes;
  const T* x = static_cast<const T*>(ops.x) + g * q.cig() * inputs;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t here = Min(kRows, rows - r);
    // Rows of input channels are far apart: near each other they are read once.
    for (int64_t c = 0; c < q.cig(); ++c) {
      const T* from = w + c * row + r * lanes;
      T* to = s.weight + c * kRows * lanes;
      for (int64_t m = 0; m < kRows; ++m) {
        AskFor(from + (kRows + m) * lanes);
        Store<T>(to + m * lanes, Load<T>(from + Min(m, here - 1) * lanes));
      }
    }
    for (int64_t j = 0; j < p.positions; j += kPositions) {
      const T* of[kPositions];
      for (int64_t k = 0; k < kPositions; ++k) of[k] = x + s.input[Min(j + k, p.positions - 1)];
      T sums[kPositions * kRows * lanes];
      Multiply<T>(s.weight, of, q.cig(), inputs, sums);
      for (int64_t m = 0; m < here; ++m) {
        const int64_t channel = (r + m) / p.vectors, v = (r + m) % p.vectors;
        T* to = s.sums + channel * q.n * p.channel + s.vector[v];
        for (int64_t k = 0; k < Min(kPositions, p.positions - j); ++k) {
          T* at = to + s.plane[j + k];
          Store<T>(at, Load<T>(at) + Load<T>(sums + (k * kRows + m) * lanes));
        }
      }
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t channel = g * q.cog() + block * p.block + c;
    const T bias = ops.bias == nullptr ? T{0} : static_cast<const T*>(ops.bias)[channel];
    for (int64_t n = 0; n < q.n; ++n) {
      const T* plane = s.sums + (c * q.n + n) * p.channel;
      T* out = static_cast<T*>(ops.out) + (n * q.co + channel) * Product(q.osize);
      for (int64_t d = 0; d < q.osize[0]; ++d) {
        for (int64_t h = 0; h < q.osize[1]; ++h, out += q.osize[2]) {
          const int64_t ud = d + q.pad[0], uh = h + q.pad[1];
          const bool inside = ud >= 0 && ud < p.plane[0] && uh >= 0 && uh < p.plane[1];
          const T* from = plane + ud * p.pitch[0] + uh * p.pitch[1] + q.pad[2];
          const int64_t begin = Min(Max(-q.pad[2], 0), q.osize[2]);
          const int64_t end = inside ? Max(begin, Min(p.plane[2] - q.pad[2], q.osize[2])) : begin;
          for (int64_t o = 0; o < begin; ++o) out[o] = bias;
          for (int64_t o = begin; o < end; ++o) out[o] = from[o] + bias;
          for (int64_t o = end; o < q.osize[2]; ++o) out[o] = bias;
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The types

void PackAny(const TapPlan& p, const TapOperands& ops, int64_t plane) {
  p.problem.in_dtype == DType::kF64 ? PackPlane<double>(p, ops, plane)
                                    : PackPlane<float>(p, ops, plane);
}
template <class T>
void CorrelateOf(const TapPlan& p, const TapOperands& ops, int64_t task, void* scratch) {
  p.problem.pass == Pass::kForward ? Forward<T>(p, ops, task, scratch)
                                   : InputGrad<T>(p, ops, task, scratch);
}
void CorrelateAny(const TapPlan& p, const TapOperands& ops, int64_t task, void* scratch) {
  p.problem.in_dtype == DType::kF64 ? CorrelateOf<double>(p, ops, task, scratch)
                                    : CorrelateOf<float>(p, ops, task, scratch);
}

}  // namespace

extern const TapKernels JAXCONV_TAPS = {kBytes, kRows, kPositions, PackAny, CorrelateAny};

}  // namespace jaxconv::cpu
