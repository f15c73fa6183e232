// What the plans of "rows" and "planes" share: host code.
#ifndef JAXCONV_CUDA_PHASE_SETS_H_
#define JAXCONV_CUDA_PHASE_SETS_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <vector>

#include "cuda/taps.h"

namespace jaxconv::cuda {

// How columns are grouped into sets of at most `nc`: the phases of the last axis make a row
// together. False where they do not fit.
struct Columns {
  int set_phases, set_tiles, phase_sets, column_sets;
};
inline bool GroupColumns(const PhasedShape& s, int nc, Columns& c) {
  const int unit = s.so[2];
  if (unit > nc) return false;
  const int most = std::max(1, std::min(s.tiles_j, nc / unit));
  c.set_tiles = static_cast<int>(CeilDiv(s.tiles_j, CeilDiv(s.tiles_j, most)));
  c.set_phases = unit * std::max(1, std::min(s.phases / unit, nc / (unit * c.set_tiles)));
  c.phase_sets = static_cast<int>(CeilDiv(s.phases, c.set_phases));
  c.column_sets = c.phase_sets * static_cast<int>(CeilDiv(s.tiles_j, c.set_tiles));
  return true;
}

// Of each phase set: distinct sources, and taps.
struct Load {
  int64_t entries = 0, taps = 0;
};
inline std::vector<Load> LoadsOf(const PhasedShape& s, const Columns& c) {
  std::vector<std::set<std::array<int64_t, kAxes>>> seen(c.phase_sets);
  std::vector<Load> loads(c.phase_sets);
  const auto& [td, th, tw] = s.taps;
  for (size_t d = 0; d < td.phase.size(); ++d) {
    for (size_t h = 0; h < th.phase.size(); ++h) {
      for (size_t w = 0; w < tw.phase.size(); ++w) {
        const int phase = (td.phase[d] * s.so[1] + th.phase[h]) * s.so[2] + tw.phase[w];
        const int set = phase / c.set_phases;
        loads[set].taps += 1;
        loads[set].entries += seen[set].insert({td.source[d], th.source[h], tw.source[w]}).second;
      }
    }
  }
  return loads;
}

// How much longer the busiest of the `wn` warps that share pixels works than they do on average.
inline double ImbalanceOf(const std::vector<Load>& loads, const Columns& c, int wn) {
  std::vector<double> work(wn, 0.0);
  double sum = 0, most = 0;
  for (int set = 0; set < c.column_sets; ++set) {
    const Load& load = loads[set % c.phase_sets];
    const auto steps = static_cast<double>(load.entries + load.taps) + 1;
    most = std::max(most, work[set % wn] += steps);
    sum += steps;
  }
  return most * wn / sum;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_PHASE_SETS_H_
