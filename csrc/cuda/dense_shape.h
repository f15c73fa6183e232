// "dense": what a plan is made of that does not depend on the tile: taps and sources by residues
// and phases, and the lists that the kernels walk.
#ifndef JAXCONV_CUDA_DENSE_SHAPE_H_
#define JAXCONV_CUDA_DENSE_SHAPE_H_

#include <array>
#include <string>
#include <vector>

#include "cuda/dense.h"

namespace jaxconv::cuda {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
constexpr int64_t FloorMod(int64_t a, int64_t b) { return a - FloorDiv(a, b) * b; }
constexpr int PadToQuads(int64_t steps) { return static_cast<int>(RoundUp(steps, kDenseQuad)); }

// Products of a step: float32 operands at the highest precision are split in two.
int Terms(const Problem&);

// Taps of one axis that serve one phase from sources of one residue by the input's stride.
struct DenseAxisGroup {
  int phase;
  int64_t first;  // source for q = 0 of the lowest tap
  int64_t lead;   // see DenseShape
  std::vector<int> taps, places;
};

// The part of a plan that does not depend on the tile.
struct DenseShape {
  bool forward, fused;
  int element, cg, jg, row_bytes, chunks, chunk_channels, terms, full_steps, last_steps;
  int phases, programs, columns;  // programs: phases that have outputs, or one for all of them
  Sizes in_size, out_size, q_size;
  std::array<int, kAxes> si, so, reach;  // reach: places of the farthest tap
  std::array<std::vector<DenseAxisGroup>, kAxes> groups;
  bool folded;
  DenseAxisGroup fold;  // of the last axis, whose taps are columns
  // Whether all phases are of one program whatever they read. Then `taps` of an axis are indices of
  // its sources, for q = 0.
  bool spread = false;
  std::array<std::vector<int64_t>, kAxes> sources;
  int sets = 1;  // groups beside each other
  // Channels first, and whether both phases of the last axis are of one program. The first source
  // of a group of that axis lies so far from the first one that is loaded.
  bool rows = false, paired = false;
  int64_t least_lead = 0, most_lead = 0;
};

// `folded`: the taps of the last axis are columns.
DenseShape ShapeOf(const Problem&, int row_bytes, bool folded);

// Phases spread over the columns. `block` neighbouring outputs of a phase (of an axis) become
// phases of their own, which is a correlation of so many times the strides.
DenseShape SpreadShapeOf(const Problem&, int row_bytes, int sets,
                         const std::array<int, kAxes>& block);

// Which tap of an axis reads a source, both for q = 0, for a phase; or -1.
int TapOf(const Problem&, const DenseShape&, int axis, int64_t source, int64_t phase);

Sizes PhaseOf(const DenseShape&, int phase);

// Lists programs, segments and shifts; a sentence's end where they are too many.
std::string ListPrograms(const DenseShape&, const Problem&, DensePlan&);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_SHAPE_H_
