// What the plans of the correlations share: host code.
#ifndef JAXCONV_CUDA_TAPS_H_
#define JAXCONV_CUDA_TAPS_H_

#include <algorithm>
#include <array>
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

// Of a forward or an input gradient, what does not depend on the tile.
struct PhasedShape {
  bool forward;
  int element, cg, jg, tiles_j, phases;
  Sizes in_size, out_size, q_size;
  std::array<int, kAxes> si, so;
  std::array<Taps, kAxes> taps;
  std::array<int64_t, kAxes> first, reach;  // sources of q = 0: the first, and how many
};

inline PhasedShape PhasedShapeOf(const Problem& p) {
  PhasedShape s;
  s.forward = p.pass == Pass::kForward;
  s.element = static_cast<int>(SizeOf(p.in_dtype));
  s.cg = static_cast<int>(s.forward ? p.cig() : p.cog());
  s.jg = static_cast<int>(s.forward ? p.cog() : p.cig());
  s.tiles_j = static_cast<int>(CeilDiv(s.jg, 8));
  s.in_size = s.forward ? p.isize : p.osize;
  s.out_size = s.forward ? p.osize : p.isize;
  s.phases = 1;
  for (int a = 0; a < kAxes; ++a) {
    s.si[a] = static_cast<int>(s.forward ? 1 : p.stride[a]);
    s.so[a] = static_cast<int>(s.forward ? p.stride[a] : 1);
    s.q_size[a] = CeilDiv(s.out_size[a], s.so[a]);
    s.phases *= s.so[a];
    s.taps[a] = TapsOf(p, a);
    const auto [low, high] = std::minmax_element(s.taps[a].source.begin(), s.taps[a].source.end());
    s.first[a] = *low;
    s.reach[a] = *high - *low + 1;
  }
  return s;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_TAPS_H_
