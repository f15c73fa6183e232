// What the plans of the correlations share: host code.
#ifndef JAXCONV_CUDA_TAPS_H_
#define JAXCONV_CUDA_TAPS_H_

#include <cstdint>
#include <vector>

#include "cuda/table.h"

namespace jaxconv::cuda {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the taps of one axis reach: tap t serves the outputs of phase[t] from the source
// q * si + source[t].
struct Taps {
  std::vector<int> phase;
  std::vector<int64_t> source;
};

inline Taps TapsOf(const Problem& p, int axis) {
  Taps taps;
  for (int64_t t = 0; t < p.k[axis]; ++t) {
    const int64_t shift = t * p.dilation[axis] - p.pad[axis], s = p.stride[axis];
    if (p.pass == Pass::kForward) {
      // Output q * s + r takes tap t from input i where i * s + shift = q * s + r.
      taps.phase.push_back(static_cast<int>(shift - FloorDiv(shift, s) * s));
      taps.source.push_back(-FloorDiv(shift, s));
    } else {
      taps.phase.push_back(0);
      taps.source.push_back(shift);
    }
  }
  return taps;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_TAPS_H_
