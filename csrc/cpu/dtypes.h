// Element types on the CPU. 16-bit values are read into and rounded from float.
#ifndef JAXCONV_CPU_DTYPES_H_
#define JAXCONV_CPU_DTYPES_H_

#include <cstdint>
#include <cstring>

#include "problem.h"

namespace jaxconv::cpu {

inline float FloatOfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BF16 {
  uint16_t bits;

  BF16() = default;
  explicit BF16(float value) {
    const uint32_t u = BitsOfFloat(value);
    // A NaN keeps its sign and stays one; anything else rounds to nearest, ties to even.
    bits = static_cast<uint16_t>(
        (u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  explicit operator float() const { return FloatOfBits(uint32_t{bits} << 16); }
};

struct F16 {
  uint16_t bits;

  F16() = default;
  explicit F16(float value) {
    const uint32_t u = BitsOfFloat(value), magnitude = u & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;  // 65520 and above round to infinity
    } else if (magnitude >= 0x38800000) {
      // Normal: rebias the exponent from 127 to 15, round 23 bits of fraction to 10, ties to even.
      half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    } else {
      // Subnormal: in units of 2**-24, rounded by adding a float whose last bit is that unit.
      half = BitsOfFloat(FloatOfBits(magnitude) + 0.5f) - 0x3f000000;
    }
    bits = static_cast<uint16_t>(half | ((u >> 16) & 0x8000));
  }
  explicit operator float() const {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00) return FloatOfBits(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
    if (magnitude >= 0x400) return FloatOfBits(sign | ((magnitude << 13) + 0x38000000));
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
    return sign != 0 ? -subnormal : subnormal;
  }
};

// The type that sums of products of T are kept in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls body(In{}, Out{}) with the element types of the problem's operands and result.
template <class Body>
void WithTypes(const Problem& p, Body body) {
  switch (p.in_dtype) {
    case DType::kF32:
      return body(float{}, float{});
    case DType::kF64:
      return body(double{}, double{});
    case DType::kBF16:
      return p.out_dtype == DType::kF32 ? body(BF16{}, float{}) : body(BF16{}, BF16{});
    case DType::kF16:
      return p.out_dtype == DType::kF32 ? body(F16{}, float{}) : body(F16{}, F16{});
  }
}

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_DTYPES_H_
