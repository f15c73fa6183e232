// Vectors of the instruction set that the including file is compiled for (JAXCONV_VECTOR_BYTES),
// in the compiler's own vector types. Everything is local to that file: see phase_plan.h.
#ifndef JAXCONV_CPU_VEC_H_
#define JAXCONV_CPU_VEC_H_

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace jaxconv::cpu {
namespace {

#define JAXCONV_INLINE inline __attribute__((always_inline))

constexpr int kBytes = JAXCONV_VECTOR_BYTES;

// As std::min and std::max, which could be linked in another file's variant.
JAXCONV_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
JAXCONV_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

// Asks for a line that is read or written later, into the second-level cache: what is worth asking
// for is mostly more than the first-level one holds, and would drive out what is in use.
JAXCONV_INLINE void AskFor(const void* line) { __builtin_prefetch(line, 0, 2); }
// Elements of a line.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

// The positions [begin, end) of `count` at which q * step + e lies in [0, size).
struct Valid {
  int64_t begin, end;
};
inline Valid ValidOf(int64_t e, int64_t step, int64_t size, int64_t count) {
  const int64_t begin = e >= 0 ? 0 : (-e + step - 1) / step;
  const int64_t end = e >= size ? 0 : (size - e + step - 1) / step;
  const int64_t b = Min(begin, count);
  return {b, Max(b, Min(end, count))};
}

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  using Int = int32_t;
  static constexpr int kLanes = kBytes / 4;
  typedef float type __attribute__((vector_size(kBytes)));
  typedef float loose __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef float lower __attribute__((vector_size(kBytes / 2), aligned(4), may_alias));
  typedef uint32_t bits __attribute__((vector_size(kBytes)));
  typedef int32_t ints __attribute__((vector_size(kBytes)));
  typedef uint16_t half __attribute__((vector_size(kBytes / 2)));
};
template <>
struct VecOf<double> {
  using Int = int64_t;
  static constexpr int kLanes = kBytes / 8;
  typedef int64_t ints __attribute__((vector_size(kBytes)));
  typedef double type __attribute__((vector_size(kBytes)));
  typedef double loose __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef double lower __attribute__((vector_size(kBytes / 2), aligned(8), may_alias));
};

template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = VecOf<T>::kLanes;

template <class T>
JAXCONV_INLINE Vec<T> Broadcast(T value) {
  return value - Vec<T>{};  // x - 0 is x for every x, -0 too
}

// 16-bit elements as they lie in memory.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

using F32 = VecOf<float>;

JAXCONV_INLINE F32::type FloatOfBits(F32::bits b) { return reinterpret_cast<F32::type>(b); }
JAXCONV_INLINE F32::bits BitsOfFloat(F32::type f) { return reinterpret_cast<F32::bits>(f); }

JAXCONV_INLINE F32::type Widen(F32::half h, Bf16) {
  return FloatOfBits(__builtin_convertvector(h, F32::bits) << 16);
}

JAXCONV_INLINE F32::type Widen(F32::half h, Fp16) {
  const F32::bits u = __builtin_convertvector(h, F32::bits);
  const F32::bits sign = (u & 0x8000) << 16, magnitude = u & 0x7fff;
  // Subnormal halves are multiples of 2**-24; the others change their exponent's bias.
  const F32::type small =
      __builtin_convertvector(reinterpret_cast<F32::ints>(magnitude), F32::type) * 0x1p-24f;
  const F32::bits normal = (magnitude << 13) + 0x38000000;
  const F32::bits special = (magnitude << 13) | 0x7f800000;
  F32::bits bits = magnitude < 0x400 ? BitsOfFloat(small) : normal;
  bits = magnitude >= 0x7c00 ? special : bits;
  return FloatOfBits(bits | sign);
}

// Rounds to nearest, ties to even. A NaN stays one.
JAXCONV_INLINE F32::half Narrow(F32::type f, Bf16) {
  const F32::bits u = BitsOfFloat(f);
  const F32::bits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = (u >> 16) | 0x40;
  return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? nan : rounded, F32::half);
}

JAXCONV_INLINE F32::half Narrow(F32::type f, Fp16) {
  const F32::bits u = BitsOfFloat(f), magnitude = u & 0x7fffffff;
  const F32::bits normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // In units of 2**-24, rounded by adding a float whose last bit is that unit.
  const F32::bits small = BitsOfFloat(FloatOfBits(magnitude) + 0.5f) - 0x3f000000;
  F32::bits half = magnitude >= 0x38800000 ? normal : small;
  half = magnitude >= 0x477ff000 ? F32::bits{} + 0x7c00 : half;  // from 65520 on: infinity
  half = magnitude > 0x7f800000 ? F32::bits{} + 0x7e00 : half;
  return __builtin_convertvector(half | ((u >> 16) & 0x8000), F32::half);
}

// A vector of sums' type T from elements of type E, anywhere in memory.
template <class T, class E>
JAXCONV_INLINE Vec<T> Load(const E* from) {
  if constexpr (sizeof(E) == sizeof(T)) {
    return *reinterpret_cast<const typename VecOf<T>::loose*>(from);
  } else {
    F32::half h;
    std::memcpy(&h, from, sizeof h);
    return Widen(h, E{});
  }
}

template <class T, class E>
JAXCONV_INLINE void Store(E* to, Vec<T> v) {
  if constexpr (sizeof(E) == sizeof(T)) {
    *reinterpret_cast<typename VecOf<T>::loose*>(to) = v;
  } else {
    const F32::half h = Narrow(v, E{});
    std::memcpy(to, &h, sizeof h);
  }
}

// A vector whose halves lie apart.
template <class T>
using Lower = typename VecOf<T>::lower;
template <class T, size_t... l>
JAXCONV_INLINE Vec<T> Join(Lower<T> low, Lower<T> high, std::index_sequence<l...>) {
  return __builtin_shufflevector(low, high, static_cast<int>(l)...);
}
template <class T>
JAXCONV_INLINE Vec<T> LoadHalves(const T* low, const T* high) {
  return Join<T>(*reinterpret_cast<const Lower<T>*>(low), *reinterpret_cast<const Lower<T>*>(high),
                 std::make_index_sequence<kLanes<T>>());
}
// Not by the vector's address, or it would be kept in memory.
template <class T, size_t... l>
JAXCONV_INLINE void Divide(Vec<T> v, T* low, T* high, std::index_sequence<l...>) {
  *reinterpret_cast<Lower<T>*>(low) = __builtin_shufflevector(v, v, static_cast<int>(l)...);
  *reinterpret_cast<Lower<T>*>(high) =
      __builtin_shufflevector(v, v, static_cast<int>(l + sizeof...(l))...);
}
template <class T>
JAXCONV_INLINE void StoreHalves(T* low, T* high, Vec<T> v) {
  Divide<T>(v, low, high, std::make_index_sequence<kLanes<T> / 2>());
}

// Calls body with a value of the element type that `type` names, where sums are of type T.
template <class T, class Body>
JAXCONV_INLINE void WithElement(DType type, Body body) {
  if constexpr (sizeof(T) == 8) {
    body(double{});
  } else {
    switch (type) {
      case DType::kBF16:
        return body(Bf16{});
      case DType::kF16:
        return body(Fp16{});
      default:
        return body(float{});
    }
  }
}

// The lanes whose bit is set; the others become zero.
template <class T>
JAXCONV_INLINE Vec<T> Masked(Vec<T> v, uint32_t mask) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));  // or the compiler makes a masked load of it, which is the slower
  if constexpr (sizeof(T) == 8) {
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(mask), v);
  } else {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), v);
  }
#else
  typename VecOf<T>::ints bit;
  for (int l = 0; l < kLanes<T>; ++l) bit[l] = 1 << l;
  const auto kept = (bit & static_cast<typename VecOf<T>::Int>(mask)) != 0;
  return reinterpret_cast<Vec<T>>(reinterpret_cast<typename VecOf<T>::ints>(v) & kept);
#endif
}

// The elements whose bit is set; the other lanes are zero, and not read. Slower than a whole load
// and Masked, with AVX-512's instruction as well as through the stack.
template <class T, class E>
JAXCONV_INLINE Vec<T> LoadMasked(const E* from, uint32_t mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 8) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), from);
  } else if constexpr (sizeof(E) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  } else {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
    return Widen(reinterpret_cast<F32::half>(h), E{});
  }
#else
  E some[kLanes<T>] = {};
  for (int l = 0; l < kLanes<T>; ++l) {
    if ((mask >> l & 1) != 0) some[l] = from[l];
  }
  return Load<T>(some);
#endif
}

// The bits of lanes from `begin` on and before `end`.
template <class T>
JAXCONV_INLINE uint32_t MaskOf(int64_t begin, int64_t end) {
  const int64_t b = begin < 0 ? 0 : begin, e = end < kLanes<T> ? end : kLanes<T>;
  return b < e ? (uint32_t{1} << e) - (uint32_t{1} << b) : 0;
}

// The first `count` elements, if there are not more lanes; the other lanes are zero.
template <class T, class E>
JAXCONV_INLINE Vec<T> LoadSome(const E* from, int64_t count) {
  if (count >= kLanes<T>) return Load<T>(from);
  return LoadMasked<T>(from, MaskOf<T>(0, count));
}

template <class T, class E>
JAXCONV_INLINE void StoreSome(E* to, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return Store<T>(to, v);
  if (count <= 0) return;
#if defined(__AVX512F__)
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(E) == 8) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), v);
  } else if constexpr (sizeof(E) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), v);
  } else {
    const F32::half h = Narrow(v, E{});
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), reinterpret_cast<__m256i>(h));
  }
#else
  E some[kLanes<T>];
  Store<T>(some, v);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
#endif
}

// Lane l of the result is lane Index::at(l) of a and b, one after the other.
template <class T, class Index, size_t... l>
JAXCONV_INLINE Vec<T> ShuffleBy(Vec<T> a, Vec<T> b, std::index_sequence<l...>) {
  return __builtin_shufflevector(a, b, Index::at(static_cast<int>(l))...);
}
template <class T, class Index>
JAXCONV_INLINE Vec<T> Shuffle(Vec<T> a, Vec<T> b) {
  return ShuffleBy<T, Index>(a, b, std::make_index_sequence<kLanes<T>>());
}

// a0 b0 a1 b1 ..., the first or the second half of it.
template <int lanes, bool second>
struct ZipIndex {
  static constexpr int at(int l) { return l / 2 + (second ? lanes / 2 : 0) + l % 2 * lanes; }
};
// The even or the odd elements of a and b.
template <int lanes, bool odd>
struct UnzipIndex {
  static constexpr int at(int l) { return 2 * l + (odd ? 1 : 0); }
};
// One of the two results of exchanging blocks of `step` lanes across the diagonal.
template <int lanes, int step, bool second>
struct TransposeIndex {
  static constexpr int at(int l) {
    if (second) return (l & step) == 0 ? l + step : l + lanes;
    return (l & step) == 0 ? l : l - step + lanes;
  }
};

template <class T, bool second>
JAXCONV_INLINE Vec<T> Zip(Vec<T> a, Vec<T> b) {
  return Shuffle<T, ZipIndex<kLanes<T>, second>>(a, b);
}
template <class T, bool odd>
JAXCONV_INLINE Vec<T> Unzip(Vec<T> a, Vec<T> b) {
  return Shuffle<T, UnzipIndex<kLanes<T>, odd>>(a, b);
}

// Element i * n + r of `out`, n vectors in a row, is element i of in[r].
template <class T, int n>
JAXCONV_INLINE void Interleave(const Vec<T>* in, Vec<T>* out) {
  if constexpr (n == 1) {
    out[0] = in[0];
  } else {
    Vec<T> even[n / 2], odd[n / 2], a[n / 2], b[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) even[i] = in[2 * i], odd[i] = in[2 * i + 1];
    Interleave<T, n / 2>(even, a);
    Interleave<T, n / 2>(odd, b);
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      out[2 * i] = Zip<T, false>(a[i], b[i]);
      out[2 * i + 1] = Zip<T, true>(a[i], b[i]);
    }
  }
}

// The inverse.
template <class T, int n>
JAXCONV_INLINE void Deinterleave(const Vec<T>* in, Vec<T>* out) {
  if constexpr (n == 1) {
    out[0] = in[0];
  } else {
    Vec<T> even[n / 2], odd[n / 2], a[n / 2], b[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      even[i] = Unzip<T, false>(in[2 * i], in[2 * i + 1]);
      odd[i] = Unzip<T, true>(in[2 * i], in[2 * i + 1]);
    }
    Deinterleave<T, n / 2>(even, a);
    Deinterleave<T, n / 2>(odd, b);
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) out[2 * i] = a[i], out[2 * i + 1] = b[i];
  }
}

// Transposes a square of vectors.
template <class T, int step = kLanes<T> / 2>
JAXCONV_INLINE void Transpose(Vec<T>* v) {
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if ((i & step) != 0) continue;
    const Vec<T> a = v[i], b = v[i + step];
    v[i] = Shuffle<T, TransposeIndex<lanes, step, false>>(a, b);
    v[i + step] = Shuffle<T, TransposeIndex<lanes, step, true>>(a, b);
  }
  if constexpr (step > 1) Transpose<T, step / 2>(v);
}

// Puts the sum of the lanes of v[i] into lane i of v[0], for `count` vectors, a power of two up to
// the number of lanes. Each step adds even lanes to odd lanes, and two vectors become one.
template <class T, int count, int width = kLanes<T>>
JAXCONV_INLINE void AddLanes(Vec<T>* v) {
  if constexpr (width > 1) {
#pragma GCC unroll 8
    for (int i = 0; i < (count + 1) / 2; ++i) {
      const Vec<T> a = v[2 * i % count], b = v[(2 * i + 1) % count];
      v[i] = Unzip<T, false>(a, b) + Unzip<T, true>(a, b);
    }
    AddLanes<T, (count + 1) / 2, width / 2>(v);
  }
}

}  // namespace
}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_VEC_H_
