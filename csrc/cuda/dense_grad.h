// "dense", weight gradient: layers with many channels on Hopper.
//
//   dw[ci, co, t] = sum over n, i of x[n, ci, i] * y[n, co, i * stride + t * dilation - pad]
//
// as products of 64 input channels by some output channels at one tap, whose contraction runs over
// pixels. wgmma wants neighbours of the contraction in 16 bytes of shared memory, and a tap's shift
// must keep them together. So they are not neighbours in space: the 4 pixels (8 of 16 bits) of 16
// bytes are the same position of as many images ("streams"; of few images an axis is cut into
// segments, each a stream of its own). A tap then shifts by whole positions, whatever the axis, the
// stride and the layout.
//
// Of 16 bits, products can also run across rows of channels, and then eight rows may be neighbours
// in space as well: of one residue by the stride, a tap shifts by rows.
#ifndef JAXCONV_CUDA_DENSE_GRAD_H_
#define JAXCONV_CUDA_DENSE_GRAD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/dense.h"
#include "cuda/divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddDenseGrad(std::vector<Row>& rows);

// Images, or pieces of them, that lie side by side in 16 bytes of shared memory: bulk copies take a
// multiple of so many.
inline int64_t Streams(const Problem& p) { return 16 / SizeOf(p.in_dtype); }

// Of those that have several positions.
inline int OutermostAxis(const Problem& p) {
  int axis = 0;
  while (axis < kAxes - 1 && p.isize[axis] == 1 && p.osize[axis] == 1) ++axis;
  return axis;
}

// A compile-time choice: output channels / 8 of a product, and products of a group of four warps.
struct DenseGradVariant {
  int tiles, products;
};
#define JAXCONV_DENSE_GRAD_VARIANTS(X) X(8, 2) X(8, 4) X(8, 5) X(16, 1) X(16, 2)

// How a block's operands arrive: pixel by pixel from rows of one channel; from runs of channels; or
// by bulk tensor copies of such runs.
enum class DenseGradFrom { kRows, kRuns, kCopies };

inline constexpr int kDenseGradGroups = 2;     // that multiply
inline constexpr int kDenseGradResidues = 32;  // at most, of bulk copies
inline constexpr int kDenseGradStages = 4;     // at most
inline constexpr int kDenseGradStreams = 8;    // at most: 16 bytes of them

// An operand as it is staged: positions of a box by channels.
struct DenseGradOperand {
  const void* from;
  int channels, group_channels;         // staged by a block; of a group in memory
  int pitch;                            // bytes between positions in shared memory
  int copies, copied;                   // bulk copies side by side, and the bytes between them
  int size[kAxes];                      // in memory
  int limit, cuts;                      // of axis 0: positions of a segment, segments
  int64_t n_step, c_step, step[kAxes];  // elements between neighbours
  // Of the streams of 16 bytes: bytes from the first, and positions of axis 0.
  int64_t delta[kDenseGradStreams];
  int along[kDenseGradStreams];
  SmallDivisor by_units;  // channels / 32
  int log_shares;         // of the same
};

// Axes 0, 1, 2 may be any order of depth, rows and columns: axis 0 is the one that is cut.
struct DenseGradArgs {
  static constexpr int kMaxTaps = 256;
  DenseGradOperand x, y;
  void* out;    // dw, or the workspace if there are several parts
  float* kept;  // [block][sum][thread]
  int32_t out_dtype;
  int64_t w_elements;
  int cig, cog, taps;
  // Blocks: chunks of taps, tiles of channels, groups; parts of the pixels, of which `cluster` are
  // added up by a cluster of blocks.
  int chunks, co_tiles, ci_tiles, groups, parts, cluster;
  int row_blocks;                   // 64 input channels each that a block keeps: 1 or 2
  int chunk_taps;                   // of a block
  int tiles, tile_groups;           // boxes of positions; of them, sets of streams
  int box[kAxes], tiles_of[kAxes];  // pixels of a box, boxes of an axis
  int stride[kAxes];
  int unit;                           // pixels of the last axis that are a position
  int y_box[kAxes], y_positions;      // of one box of y, in pixels
  int y_box_bytes;                    // of bulk copies
  int y_pair;                         // places from a position's to the next one's, of two
  int image_groups;                   // images of a set of streams
  int positions, steps;               // of a box of x; products of a stage
  int flush;                          // after as many stages; 0: never
  int stages, stage_bytes, y_offset;  // of the ring
  int smem_x, smem_y, smem_pairs, smem_stages, smem;
  int tap_pitch;  // floats between taps in the stage for results
  SmallDivisor by_chunk_taps;
  uint16_t tap[kMaxTaps], shift[kMaxTaps];  // index in dw; place in the boxes of a chunk
  uint16_t first_box[kMaxTaps + 1];         // of a chunk
  // The output at position 0 of a box for input 0; of bulk copies, its place in the box's map.
  int16_t box_first[kMaxTaps][kAxes];
  uint8_t box_map[kMaxTaps];
};

struct DenseGradPlan {
  std::string refusal;
  DenseGradVariant variant;
  DenseGradFrom from;
  DenseGradArgs args;
  DenseMap x;  // of bulk copies
  std::vector<DenseMap> y;
  int blocks;
  int64_t workspace, kept_offset;
  double seconds;
};

// Of y, one for each residue by the stride.
struct DenseGradMaps {
  CUtensorMap x, y[kDenseGradResidues];
};

// A plan with its pointers, for any number of launches.
struct DenseGradLaunch {
  DenseGradArgs args;
  DenseGradMaps maps;
};
cudaError_t PrepareDenseGrad(const Problem&, const Operands&, const DenseGradPlan&,
                             DenseGradLaunch&);
// Without the sum of the parts: what `launch.args.out` points to gets `launch.args.parts` of them.
cudaError_t RunDenseGrad(const Problem&, const DenseGradPlan&, const DenseGradLaunch&,
                         cudaStream_t);

// Describes a tensor to the copy units (dense.cc).
cudaError_t EncodeMap(DType, const DenseMap&, const void* data, CUtensorMap&);

const DenseGradPlan& PlanDenseGrad(const Problem&, const Device&);

// Defined in one small file each, so that they compile in parallel.
template <class T, DenseGradFrom>
cudaError_t EnqueueDenseGrad(const DenseGradPlan&, const DenseGradArgs&, const DenseGradMaps&,
                             cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DENSE_GRAD_H_
