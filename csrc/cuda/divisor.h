// Division by numbers that the host knows.
#ifndef JAXCONV_CUDA_DIVISOR_H_
#define JAXCONV_CUDA_DIVISOR_H_

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

// The same for n < 2^31. The multiplier is the least from 2^(31 + l) / d on, where 2^l is the least
// power of two from d on; it is beyond by less than 1, so a quotient by less than n / 2^(31 + l),
// which is at most 1 / d.
struct Divisor {
  uint32_t multiplier;
  int shift;
  int divisor;
};
constexpr Divisor LargeDivisorOf(int d) {
  int log = 0;
  while (int64_t{1} << log < d) ++log;
  const uint64_t power = uint64_t{1} << (31 + log);
  return {static_cast<uint32_t>((power + d - 1) / d), 31 + log, d};
}
constexpr int Divide(int n, const Divisor& d) {
  return static_cast<int>((static_cast<uint64_t>(n) * d.multiplier) >> d.shift);
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DIVISOR_H_
