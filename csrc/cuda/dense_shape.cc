#include "cuda/dense_shape.h"

#include <algorithm>
#include <map>
#include <utility>

namespace jaxconv::cuda {

int Terms(const Problem& p) {
  return p.in_dtype == DType::kF32 && p.precision == Precision::kHighest ? 3 : 1;
}

namespace {

std::vector<DenseAxisGroup> GroupsOf(const Problem& p, int axis, bool forward) {
  std::vector<DenseAxisGroup> groups;
  std::map<std::pair<int64_t, int64_t>, size_t> index;
  const int64_t s = p.stride[axis];
  std::vector<std::vector<int64_t>> sources;
  for (int64_t t = 0; t < p.k[axis]; ++t) {
    // Forward: output q * s + r takes tap t from input i where i * s + shift = q * s + r.
    const int64_t shift = t * p.dilation[axis] - p.pad[axis], down = FloorDiv(shift, s);
    const int64_t residue = shift - down * s;
    const auto [at, added] = index.try_emplace({0, residue}, groups.size());
    if (added) {
      groups.push_back({forward ? static_cast<int>(residue) : 0, 0, 0, {}, {}});
      sources.emplace_back();
    }
    groups[at->second].taps.push_back(static_cast<int>(t));
    sources[at->second].push_back(forward ? -down : shift);
  }
  for (size_t g = 0; g < groups.size(); ++g) {
    groups[g].first = *std::min_element(sources[g].begin(), sources[g].end());
    for (int64_t source : sources[g]) {
      groups[g].places.push_back(static_cast<int>((source - groups[g].first) / (forward ? 1 : s)));
    }
  }
  return groups;
}

// Channels first: groups of the last axis are a family, whose sources are loaded together. Where
// they are two phases they read the same pixels, and their results leave as whole rows.
void MakeFamilies(DenseShape& s) {
  std::vector<DenseAxisGroup>& groups = s.groups[2];
  s.rows = true;
  s.fused = false;
  s.columns = s.jg;
  s.paired = s.so[2] == 2 && s.out_size[2] > 1 && s.terms == 1;
  s.programs = 1;
  for (int a = 0; a < (s.paired ? 2 : kAxes); ++a) {
    s.programs *= static_cast<int>(std::min<int64_t>(s.so[a], s.out_size[a]));
  }
  const auto less = [](const DenseAxisGroup& a, const DenseAxisGroup& b) {
    return a.first < b.first;
  };
  const int64_t first = std::min_element(groups.begin(), groups.end(), less)->first;
  for (DenseAxisGroup& g : groups) {
    if (s.paired) {
      for (int& place : g.places) {
        place += static_cast<int>(g.first - first);
        s.reach[2] = std::max(s.reach[2], place);
      }
      g.first = first;
    }
    // A copy begins at a multiple of 16 bytes; tiles have multiples of 8 pixels.
    const int64_t from = s.forward ? g.first : first;
    g.lead = FloorMod(from, 16 / s.element) + g.first - from;
  }
  const auto nearer = [](const DenseAxisGroup& a, const DenseAxisGroup& b) {
    return a.lead < b.lead;
  };
  const auto [least, most] = std::minmax_element(groups.begin(), groups.end(), nearer);
  s.least_lead = least->lead;
  s.most_lead = most->lead;
  std::stable_sort(
      groups.begin(), groups.end(),
      [](const DenseAxisGroup& a, const DenseAxisGroup& b) { return a.phase < b.phase; });
}

}  // namespace

DenseShape ShapeOf(const Problem& p, int row_bytes, bool folded) {
  DenseShape s;
  s.folded = folded;
  s.forward = p.pass == Pass::kForward;
  s.element = static_cast<int>(SizeOf(p.in_dtype));
  s.cg = static_cast<int>(s.forward ? p.cig() : p.cog());
  s.jg = static_cast<int>(s.forward ? p.cog() : p.cig());
  const int bytes = s.cg * s.element;
  s.row_bytes = row_bytes;
  s.chunks = static_cast<int>(CeilDiv(bytes, row_bytes));
  s.chunk_channels = row_bytes / s.element;
  s.terms = Terms(p);
  s.full_steps = s.terms * row_bytes / 32;
  s.last_steps = s.terms * static_cast<int>(CeilDiv(bytes - (s.chunks - 1) * row_bytes, 32));
  s.in_size = s.forward ? p.isize : p.osize;
  s.out_size = s.forward ? p.osize : p.isize;
  s.phases = 1;
  s.fused = true;
  for (int a = 0; a < kAxes; ++a) {
    s.si[a] = static_cast<int>(s.forward ? 1 : p.stride[a]);
    s.so[a] = static_cast<int>(s.forward ? p.stride[a] : 1);
    s.q_size[a] = CeilDiv(s.out_size[a], s.so[a]);
    s.phases *= s.so[a];
    s.groups[a] = GroupsOf(p, a, s.forward);
    s.reach[a] = 0;
    for (const DenseAxisGroup& g : s.groups[a]) {
      for (int place : g.places) s.reach[a] = std::max(s.reach[a], place);
      s.fused = s.fused && g.first == s.groups[a][0].first && g.places == s.groups[a][0].places;
    }
    s.fused = s.fused && static_cast<int>(s.groups[a].size()) == s.so[a];
    s.fused = s.fused && s.out_size[a] >= s.so[a];
  }
  s.fused = s.fused && s.phases > 1;
  s.programs = 1;
  for (int a = 0; a < kAxes && !s.fused; ++a) {
    s.programs *= static_cast<int>(std::min<int64_t>(s.so[a], s.out_size[a]));
  }
  s.columns = s.jg * (s.fused ? s.phases : 1);
  if (folded) {
    // Sources stay as they are, whatever the tap: the first one that exists is the first of all.
    s.fold = s.groups[2][0];
    s.groups[2] = {{0, std::max<int64_t>(s.fold.first, 0), 0, {0}, {0}}};
    s.columns *= static_cast<int>(s.fold.taps.size());
    s.fused = false;
  }
  if (!p.channels_last) MakeFamilies(s);
  return s;
}

DenseShape SpreadShapeOf(const Problem& p, int row_bytes, int sets,
                         const std::array<int, kAxes>& block) {
  DenseShape s = ShapeOf(p, row_bytes, false);
  s.spread = s.fused = true;
  s.columns = s.jg;
  if (sets > 1) {
    s.sets = sets;
    s.cg *= sets;
    s.jg *= sets;
    s.chunks = 1;
    s.full_steps = s.last_steps = sets;
  }
  s.phases = 1;
  s.programs = 1;
  for (int a = 0; a < kAxes; ++a) {
    s.so[a] *= block[a];
    s.si[a] *= block[a];
    s.q_size[a] = CeilDiv(s.out_size[a], s.so[a]);
    s.phases *= s.so[a];
    // Forward: output q * so + r takes tap t from source i where i * stride + t * d - p is it.
    std::vector<int64_t>& sources = s.sources[a];
    for (int r = 0; r < s.so[a]; ++r) {
      for (int64_t t = 0; t < p.k[a]; ++t) {
        const int64_t shift = t * p.dilation[a] - p.pad[a];
        if (s.forward && FloorMod(r - shift, p.stride[a]) != 0) continue;
        sources.push_back(s.forward ? (r - shift) / p.stride[a] : r * p.stride[a] + shift);
      }
    }
    std::sort(sources.begin(), sources.end());
    sources.erase(std::unique(sources.begin(), sources.end()), sources.end());
    std::map<int64_t, DenseAxisGroup> by_residue;
    s.reach[a] = 0;
    for (size_t i = 0; i < sources.size(); ++i) {
      DenseAxisGroup& g = by_residue[FloorMod(sources[i], s.si[a])];
      if (g.taps.empty()) g.first = sources[i];
      g.phase = 0;
      g.taps.push_back(static_cast<int>(i));
      g.places.push_back(static_cast<int>((sources[i] - g.first) / s.si[a]));
      s.reach[a] = std::max(s.reach[a], g.places.back());
    }
    s.groups[a].clear();
    for (const auto& [residue, g] : by_residue) s.groups[a].push_back(g);
  }
  s.columns *= s.phases;
  return s;
}

int TapOf(const Problem& p, const DenseShape& s, int axis, int64_t source, int64_t phase) {
  const int64_t stride = p.stride[axis], d = p.dilation[axis];
  const int64_t t = (s.forward ? phase - source * stride : source - phase * stride) + p.pad[axis];
  return FloorMod(t, d) == 0 && t >= 0 && t / d < p.k[axis] ? static_cast<int>(t / d) : -1;
}

Sizes PhaseOf(const DenseShape& s, int phase) {
  return {phase / s.so[2] / s.so[1], phase / s.so[2] % s.so[1], phase % s.so[2]};
}
namespace {

bool HasOutputs(const DenseShape& s, const Sizes& phase) {
  return phase[0] < s.out_size[0] && phase[1] < s.out_size[1] && phase[2] < s.out_size[2];
}

// The phases that programs are for, those with the most taps first, so that the last round of
// items is of short ones.
std::vector<int> PhasesByWork(const DenseShape& s) {
  if (s.fused) return {0};
  std::vector<int> phases;
  std::vector<int64_t> taps(static_cast<size_t>(s.phases), 1);
  for (int phase = 0; phase < s.phases; ++phase) {
    const Sizes r = PhaseOf(s, phase);
    if (HasOutputs(s, r) && !(s.paired && r[2] > 0)) phases.push_back(phase);
    for (int axis = 0; axis < kAxes; ++axis) {
      int64_t mine = 0;
      for (const DenseAxisGroup& g : s.groups[axis]) {
        if (g.phase == r[axis] || (s.paired && axis == 2)) {
          mine += static_cast<int64_t>(g.taps.size());
        }
      }
      taps[phase] *= mine;
    }
  }
  std::stable_sort(phases.begin(), phases.end(), [&](int a, int b) { return taps[a] > taps[b]; });
  return phases;
}

}  // namespace

std::string ListPrograms(const DenseShape& s, const Problem& p, DensePlan& plan) {
  DenseArgs& a = plan.args;
  DensePack& k = plan.pack;
  SpreadPack& spread = plan.spread;
  int shifts = 0, entries = 0, segments = 0;
  spread.steps = 0;
  plan.residues.clear();
  std::fill(std::begin(k.tap_segment), std::end(k.tap_segment), DensePack::kUnused);
  a.total_steps = 0;
  a.programs = 0;
  if (s.phases > DenseArgs::kMaxPhases) {
    return "takes at most " + std::to_string(DenseArgs::kMaxPhases) + " phases";
  }
  const auto of_phase = [&](int axis, int64_t phase) {
    std::vector<const DenseAxisGroup*> mine;
    for (const DenseAxisGroup& g : s.groups[axis]) {
      if (g.phase == phase || s.fused || (s.paired && axis == 2)) mine.push_back(&g);
      if (s.fused && !s.spread) break;
    }
    return mine;
  };
  // The weights lie in the order in which products take them: chunk by chunk of a family of
  // segments that share boxes, from `family` on.
  const auto place_weights = [&](int family) {
    int all_full = 0, full = 0, last = 0;
    const auto padded = [&](int i, int steps) { return PadToQuads(a.segment[i].taps * steps); };
    for (int i = family; i < segments; ++i) all_full += padded(i, s.full_steps);
    for (int i = family; i < segments; ++i) {
      k.steps[i] = a.segment[i].steps = a.total_steps + full;
      k.hop[i] = all_full;
      k.last[i] = a.total_steps + (s.chunks - 1) * all_full + last;
      full += padded(i, s.full_steps);
      last += padded(i, s.last_steps);
    }
    a.total_steps += (s.chunks - 1) * all_full + last;
  };
  a.members = 1;
  for (const int of : PhasesByWork(s)) {
    const Sizes phase = PhaseOf(s, of);
    DenseProgram& mine = a.program[a.programs++];
    mine.phase = static_cast<int16_t>(of);
    mine.first_segment = static_cast<int16_t>(segments);
    mine.steps = a.total_steps;
    for (const DenseAxisGroup* d : of_phase(0, phase[0])) {
      for (const DenseAxisGroup* h : of_phase(1, phase[1])) {
        int family = segments;
        for (const DenseAxisGroup* w : of_phase(2, phase[2])) {
          if (segments == DenseArgs::kMaxSegments) {
            return "takes at most " + std::to_string(DenseArgs::kMaxSegments) +
                   " residues of the sources by the stride";
          }
          DenseSegment& segment = a.segment[segments];
          const Sizes first{d->first, h->first, w->first};
          Sizes residue;
          bool sources = true;
          for (int i = 0; i < kAxes; ++i) {
            const int64_t down = FloorDiv(first[i], s.si[i]);
            residue[i] = first[i] - down * s.si[i];
            const bool mapped = p.channels_last || (a.boxes && i < 2);
            segment.first[i] = static_cast<int>(mapped ? down : first[i]);
            sources = sources && residue[i] < s.in_size[i];
          }
          if (!sources) continue;  // they are zeros
          if (s.rows) {
            residue[2] = 0;
            segment.lead = static_cast<int16_t>(w->lead);
            segment.sums = static_cast<int16_t>(s.paired ? w->phase : 0);
          } else {
            family = segments;
          }
          // Segments of one residue are the forward's, where the stride is of the outputs.
          const bool next = (!s.forward || s.spread) && family == segments;
          if (next || plan.residues.empty()) plan.residues.push_back(residue);
          segment.map = static_cast<int16_t>(plan.residues.size() - 1);
          segment.first_shift = static_cast<int16_t>(shifts);
          segment.taps = static_cast<int16_t>(d->taps.size() * h->taps.size() * w->taps.size());
          segment.entries = entries / kDenseQuad;
          for (size_t td = 0; td < d->taps.size(); ++td) {
            for (size_t th = 0; th < h->taps.size(); ++th) {
              for (size_t tw = 0; tw < w->taps.size(); ++tw, ++shifts) {
                if (shifts == DenseArgs::kMaxTaps) {
                  return "takes at most " + std::to_string(DenseArgs::kMaxTaps) + " places";
                }
                a.shift[shifts] = static_cast<uint16_t>(d->places[td] * a.in_pitch[1] +
                                                        h->places[th] * a.in_pitch[2] +
                                                        w->places[tw] * a.in_pitch[3]);
                if (s.spread) continue;
                const int row = d->taps[td] * static_cast<int>(p.k[1]) + h->taps[th];
                const std::vector<int> columns{w->taps[tw]};
                int phase = 0;
                for (int t : s.folded ? s.fold.taps : columns) {
                  const int64_t tap = row * p.k[2] + t;
                  k.tap_segment[tap] = static_cast<uint8_t>(segments);
                  k.tap_phase[tap] = static_cast<uint8_t>(phase++);
                  k.tap_position[tap] = static_cast<uint16_t>(shifts - segment.first_shift);
                }
              }
            }
          }
          k.segment_taps[segments] = segment.taps;
          entries += PadToQuads(int64_t{segment.taps} * s.full_steps) +
                     PadToQuads(int64_t{segment.taps} * s.last_steps);
          ++segments;
          if (!s.rows) place_weights(family);
          if (s.spread && a.total_steps > SpreadPack::kMaxSteps) {
            return "takes fewer places and channels";
          }
          for (int chunk = 0; chunk < s.chunks && s.spread; ++chunk) {
            const int steps = chunk == s.chunks - 1 ? s.last_steps : s.full_steps;
            for (const int td : d->taps) {
              for (const int th : h->taps) {
                for (const int tw : w->taps) {
                  for (int step = 0; step < steps; ++step) {
                    spread.step[spread.steps++] = {
                        {static_cast<uint8_t>(td), static_cast<uint8_t>(th),
                         static_cast<uint8_t>(tw)},
                        static_cast<uint16_t>(chunk * s.full_steps + step)};
                  }
                }
              }
            }
            while (spread.steps % kDenseQuad != 0) {
              spread.step[spread.steps++] = {{}, SpreadPack::kPadding};
            }
          }
        }
        if (s.rows && segments > family) {
          place_weights(family);
          a.members = segments - family;  // the same of all families
        }
      }
    }
    mine.segments = static_cast<int16_t>(segments - mine.first_segment);
    mine.quads = (a.total_steps - mine.steps) / kDenseQuad;
  }
  if (s.fused && !s.spread) {
    // Every phase has the taps of phase 0 in the same order.
    for (size_t d = 0; d < s.groups[0].size(); ++d) {
      for (size_t h = 0; h < s.groups[1].size(); ++h) {
        for (size_t w = 0; w < s.groups[2].size(); ++w) {
          const DenseAxisGroup &gd = s.groups[0][d], &gh = s.groups[1][h], &gw = s.groups[2][w];
          const int phase = (gd.phase * s.so[1] + gh.phase) * s.so[2] + gw.phase;
          int position = 0;
          for (int td : gd.taps) {
            for (int th : gh.taps) {
              for (int tw : gw.taps) {
                const int64_t tap = (td * p.k[1] + th) * p.k[2] + tw;
                k.tap_segment[tap] = 0;
                k.tap_phase[tap] = static_cast<uint8_t>(phase);
                k.tap_position[tap] = static_cast<uint16_t>(position++);
              }
            }
          }
        }
      }
    }
  }
  a.segments = segments;
  if (s.spread && segments + s.phases > DenseArgs::kMaxSegments + 1) {
    return "takes fewer residues and phases";
  }
  return "";
}

}  // namespace jaxconv::cuda
