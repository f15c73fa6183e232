// Division of small numbers by a number that the host knows.
#ifndef JAXCONV_CUDA_SMALL_DIVISOR_H_
#define JAXCONV_CUDA_SMALL_DIVISOR_H_

#include <cstdint>

namespace jaxconv::cuda {

// An exact quotient of small numbers by multiplication: n / d for n, d < 2^15.
struct SmallDivisor {
  unsigned multiplier;
  int divisor;
};
constexpr SmallDivisor DivisorOf(int d) {
  return {static_cast<unsigned>((uint64_t{1} << 31) / static_cast<unsigned>(d) + 1), d};
}

// n / d, exactly, for 0 <= n < 2^15.
constexpr int Divide(int n, SmallDivisor d) {
  return static_cast<int>((static_cast<unsigned>(n) * static_cast<uint64_t>(d.multiplier)) >> 31);
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_SMALL_DIVISOR_H_
