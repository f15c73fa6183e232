// "across", weight gradient: layers of few channels on Hopper, 16 bits, channels last.
//
//   dw[ci, co, t] = sum over n, i of x[n, i, ci] * y[n, i * stride + t * dilation - pad, co]
//
// as wgmma products whose contraction runs over pixels, that is across the rows of memory, which
// bulk tensor copies stage as they are. There 64 rows of a product, and up to 160 columns, are made
// of pieces of 16, 32 or 64 channels that lie a free distance apart in shared memory. So few
// channels fill a product with several shifts of the same staged pixels: x shifted by a times y
// shifted by b belongs to the tap that reads y at a place b - a further on than x.
#ifndef JAXCONV_CUDA_ACROSS_H_
#define JAXCONV_CUDA_ACROSS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/dense.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddAcross(std::vector<Row>& rows);

// A compile-time choice: columns / 8 of a product, and products of a group of four warps.
struct AcrossVariant {
  int tiles, products;
};
#define JAXCONV_ACROSS_VARIANTS(X) \
  X(4, 4)                          \
  X(6, 7) X(8, 3) X(8, 6) X(12, 2) X(12, 3) X(14, 3) X(16, 2) X(16, 3) X(20, 2)

inline constexpr int kAcrossGroups = 2;  // that multiply
inline constexpr int kAcrossStages = 6;  // at most
inline constexpr int kAcrossStep = 16;   // pixels of a product: neighbours of the last axis
inline constexpr int kAcrossMaps = 32;   // residues of y by the stride, at most

// A bulk copy of a stage.
struct AcrossBox {
  int offset;         // in the stage
  int16_t at[kAxes];  // from the tile's first position
  int16_t map;        // of y by residue, behind that of x
  int16_t channel;
};

// Where a product's operands begin in a stage, in units of 16 bytes.
struct AcrossProduct {
  uint16_t rows, columns;
};

// Where a row of a product begins in the staged results: those of the pieces of `piece` rows lie
// four floats further each, so that neighbouring taps are in different banks.
constexpr int AcrossRow(int row, int piece, int pitch) { return row * pitch + row / piece * 4; }

// Results that a block stores: a tap's, of one piece of the columns' channels.
struct AcrossEntry {
  int place;  // of the first in the staged results
  uint16_t tap, piece;
};

// An operand as products see it.
struct AcrossOperand {
  int channels;        // in all
  int group_channels;  // of a group: groups are merged
  uint32_t high, low;  // of a descriptor, but for the address
};

struct AcrossArgs {
  static constexpr int kMaxEntries = 256;
  AcrossOperand rows, columns;
  bool rows_x;  // rows are of x and columns of y, or the other way round
  void* out;    // dw, or the workspace if there are several parts
  float* kept;  // [block][sum][thread]
  int32_t out_dtype;
  int64_t w_elements;
  int cog, taps;
  // Blocks: chunks of products; parts of the pixels, of which `cluster` are added up by a cluster.
  int chunks, parts, cluster;
  int products, chunk_products;
  int split;                 // 2: groups of warps share the steps of a stage, 1: its products
  int row_piece, log_piece;  // channels of a piece: of the rows, of the columns (logarithm)
  int tiles;                 // boxes of positions
  int box[kAxes], tiles_of[kAxes], before[kAxes];  // of all tiles; positions in front of x's first
  int steps, flush;  // products of a stage; flushed after as many stages, or 0: never
  int x_box[kAxes], y_box[kAxes], x_row, y_row;  // as staged; bytes of a pixel
  int stages, stage_bytes, stage_y;
  int smem_steps, smem_stages, smem_entries, smem;
  uint16_t first_box[kMaxEntries + 1], first_entry[kMaxEntries + 1];  // of a chunk
  int box_bytes[2];                                                   // of x and y
  AcrossBox boxes[kMaxEntries];
  AcrossProduct product[kMaxEntries];
  AcrossEntry entry[kMaxEntries];
};

struct AcrossMaps {
  CUtensorMap map[1 + kAcrossMaps];
};

struct AcrossPlan {
  std::string refusal;
  AcrossVariant variant;
  AcrossArgs args;
  std::vector<DenseMap> maps;
  int blocks;
  int64_t workspace, kept_offset;
  double seconds;
  std::string name;  // of the cut, for those who compare
};

// The fastest plan of each of the `most` fastest cuts of the products, the fastest first.
std::vector<AcrossPlan> AcrossPlans(const Problem&, const Device&, int most);
const AcrossPlan& PlanAcross(const Problem&, const Device&);  // the fastest of all
cudaError_t RunAcross(const Problem&, const AcrossPlan&, const Operands&, cudaStream_t);
// Without the sum of the parts: `out` gets `plan.args.parts` of them.
cudaError_t RunAcrossParts(const Problem&, const AcrossPlan&, const Operands&, void* out,
                           DType out_dtype, cudaStream_t);

// Defined in one small file each, so that they compile in parallel.
template <class T>
cudaError_t EnqueueAcross(const AcrossPlan&, const AcrossArgs&, const AcrossMaps&, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_ACROSS_H_
