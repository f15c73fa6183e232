// The problem that a kernel solves, as plain data: no XLA and no CUDA header.
//
// One trilinear form, per spatial axis o = i * stride - pad + t * dilation,
//
//   T(x, w, y) = sum  x[n, ci, i] * w[ci, co, t] * y[n, co, o]      (co in the group of ci)
//
// has three partial derivatives, which are the three passes: the forward (by y), the input gradient
// (by x) and the weight gradient (by w). The letters are those of the Python side. What is
// constexpr here can be called in device code, too.
#ifndef JAXCONV_PROBLEM_H_
#define JAXCONV_PROBLEM_H_

#include <array>
#include <cstdint>

namespace jaxconv {

enum class Pass : int32_t { kForward, kInputGrad, kWeightGrad };
enum class DType : int32_t { kF32, kBF16, kF16, kF64 };
// How float32 products may be rounded: kDefault allows TF32 operands, kHighest asks for float32.
enum class Precision : int32_t { kDefault, kHighest };

inline constexpr int kAxes = 3;  // 1D and 2D problems have leading axes of size 1
using Sizes = std::array<int64_t, kAxes>;

constexpr int64_t Product(const Sizes& s) { return s[0] * s[1] * s[2]; }

// Distances, in elements, between neighbours along each axis of x or y.
struct Strides {
  int64_t n, c;
  Sizes s;
};

struct Problem {
  Pass pass;
  DType in_dtype;   // of both operands
  DType out_dtype;  // of the result, and of the bias: in_dtype, or kF32 where that is of 16 bits
  Precision precision;
  bool channels_last;
  bool bias;  // forward only: y starts from bias[co] instead of zero
  int64_t n, ci, co, groups;
  Sizes isize, osize, k, stride, dilation, pad;

  constexpr int64_t cig() const { return ci / groups; }  // input channels of a group
  constexpr int64_t cog() const { return co / groups; }  // output channels of a group

  constexpr int64_t XElements() const { return n * ci * Product(isize); }
  constexpr int64_t YElements() const { return n * co * Product(osize); }
  constexpr int64_t WElements() const { return ci * cog() * Product(k); }

  // Whether x, w or y has no element: then "direct" writes what there is to write.
  constexpr bool Empty() const { return XElements() == 0 || YElements() == 0 || WElements() == 0; }

  constexpr Strides XStrides() const { return StridesOf(ci, isize); }
  constexpr Strides YStrides() const { return StridesOf(co, osize); }

 private:
  constexpr Strides StridesOf(int64_t c, const Sizes& s) const {
    const int64_t pixel = channels_last ? c : 1;
    return {
        c * Product(s), channels_last ? 1 : Product(s), {s[1] * s[2] * pixel, s[2] * pixel, pixel}};
  }
};

// Pointers of one problem. The forward reads x and w, the input gradient y and w, the weight
// gradient x and y; `out` is the third of them.
//   x  [n, ci, *isize]   (channels first)   or   [n, *isize, ci]   (channels last)
//   y  [n, co, *osize]                      or   [n, *osize, co]
//   w  [ci, co / groups, *k]
struct Operands {
  const void* x;
  const void* w;
  const void* y;
  const void* bias;  // [co], or null
  void* out;
  void* workspace;  // as many bytes as the kernel's row asked for
};

// The inputs i of one axis that tap t carries to an output inside [0, osize): a half-open range.
struct Range {
  int64_t begin, end;
};

constexpr int64_t FloorDiv(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

constexpr Range InputRange(const Problem& p, int axis, int64_t t) {
  // 0 <= i * stride + shift < osize   <=>   ceil(-shift / stride) <= i < ceil((osize - shift) /
  // stride)
  const int64_t shift = t * p.dilation[axis] - p.pad[axis], stride = p.stride[axis];
  const int64_t begin = -FloorDiv(shift, stride);
  const int64_t end = -FloorDiv(shift - p.osize[axis], stride);
  return {begin > 0 ? begin : 0, end < p.isize[axis] ? end : p.isize[axis]};
}

constexpr int64_t SizeOf(DType t) { return t == DType::kF64 ? 8 : t == DType::kF32 ? 4 : 2; }

}  // namespace jaxconv

#endif  // JAXCONV_PROBLEM_H_
