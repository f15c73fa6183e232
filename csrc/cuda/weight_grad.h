// "mma", weight gradient: dw[ci, co, t] = sum over n, i of x[n, ci, i] * y[n, co, i*stride +
// t*dilation - pad] as a matrix product on the tensor cores, whose contraction runs over all
// pixels.
//
// The pixels are walked in steps of a few rows; blocks share the steps evenly (parts) and the
// columns (input channels) x (output channels, taps) of dw. Each block keeps its columns in
// registers over its steps (of many steps, now and then in the workspace) and writes them once: to
// dw if there is one part, else to the workspace, where a second kernel adds the parts in a fixed
// order.
#ifndef JAXCONV_CUDA_WEIGHT_GRAD_H_
#define JAXCONV_CUDA_WEIGHT_GRAD_H_

#include <string>
#include <vector>

#include "cuda/divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddWeightGrad(std::vector<Row>& rows);

// A compile-time choice: the stride of the innermost axis (0: any, at run time), taps of that axis
// that a warp reads with one sliding window (1 if stride is 0), input channels / 8 of a warp, and
// whether four warps multiply as a group (wgmma), with x in shared memory.
struct WeightGradVariant {
  int stride, taps, octets;
  bool group;
};

// Pixels of a run, which one thread loads and slides its window over. It makes the words that
// neighbouring threads load fall into different banks.
constexpr int WeightGradRun(bool half_words, int stride) {
  return (half_words ? 16 : 8) / (stride == 0 ? (half_words ? 4 : 2) : stride);
}

// Whether the rows of the product are any output channels at any taps: then few channels waste
// none. Otherwise they come in eights of channels.
constexpr bool WeightGradRowList(bool half_words, bool channels_last, int stride) {
  return stride == 0 && !(half_words && channels_last);
}

// Whether rows are staged in 16-byte units as they lie in memory, each at its own offset.
constexpr bool WeightGradUnits(bool channels_last, int stride) {
  return !channels_last && stride != 0;
}

// Pairs of 8-row tiles (a window of taps of 8 output channels each) that a warp accumulates.
constexpr int WeightGradPairs(int taps, int octets) {
  // Registers for sums / those of a pair. Few channels have few pairs to share x among.
  const int fit = (octets == 1 ? 72 : 96) / (4 * taps * octets);
  return fit < 1 ? 1 : fit > 8 ? 8 : fit;
}

// A thread's sums.
constexpr int WeightGradSums(const WeightGradVariant& v) {
  return WeightGradPairs(v.taps, v.octets) * v.taps * v.octets * 4;
}

// The compiled variants, by window.
// clang-format off
#define JAXCONV_WEIGHT_GRAD_VARIANTS(X) \
  X(0, 1, 1, false) X(0, 1, 2, false) X(0, 1, 4, true) X(0, 1, 8, true) \
  X(1, 3, 1, false) X(1, 3, 2, false) X(1, 3, 4, true) X(1, 3, 8, true) \
  X(1, 5, 1, false) X(1, 5, 2, false) X(1, 5, 4, true) \
  X(1, 7, 1, false) X(1, 7, 2, false) X(1, 7, 4, true) \
  X(2, 2, 1, false) X(2, 2, 2, false) X(2, 2, 4, true) X(2, 2, 8, true) \
  X(2, 3, 1, false) X(2, 3, 2, false) X(2, 3, 4, true) X(2, 3, 8, true) \
  X(2, 4, 1, false) X(2, 4, 2, false) X(2, 4, 4, true) \
  X(2, 5, 1, false) X(2, 5, 2, false) X(2, 5, 4, true) \
  X(2, 7, 1, false) X(2, 7, 2, false) X(2, 7, 4, true)
// clang-format on

// What the kernel is launched with. Axes 0, 1, 2 are depth, rows, and the innermost one. Along
// depth and rows, y is seen on the lattice u = (o + pad) / g = i * (stride / g) + t * (dilation /
// g), g = gcd(stride, dilation), which skips outputs that no tap reaches.
struct WeightGradArgs {
  const void* x;
  const void* y;
  void* out;          // dw, or the workspace if there are several parts
  int32_t out_dtype;  // DType of out
  // The problem.
  int n, cig, cog;
  int isize[kAxes], osize[kAxes], pad[kAxes];
  int k[kAxes], gap[kAxes];                        // gap = g; 1 on the innermost axis
  int lattice_stride[kAxes], lattice_step[kAxes];  // stride / g and dilation / g
  Strides xs, ys;
  int64_t w_elements;
  // The cut: columns of dw that a block keeps.
  int group_blocks, ci_blocks, co_blocks, pair_blocks;
  int groups_per_block;  // > 1 only if a block holds all channels of its groups
  int co_octets;         // output channels of a block (of each of its groups), in eights
  int ci_slots, pair_slots, pixel_slots;  // warps: groups_per_block x ci x pairs x pixels
  int slot_pairs;                         // pairs of rows of a warp, at most WeightGradPairs
  int segments;                           // windows of taps along the innermost axis
  int co_rows, rows;  // rows of the product at a window of taps; over all pair blocks
  // The walk: a step is `images` x `depth` rows of `pixels` inputs.
  int images, depth, runs, pixels, parts;
  int image_blocks, depth_blocks, column_blocks;
  int64_t steps;
  int flush;    // after as many steps a warp's sums are added up in `kept`; 0: never
  float* kept;  // [block][warp][sum][lane]
  SmallDivisor by_runs, by_depth, by_y_depth, by_planes;  // planes: images x y_depth
  // The staging: y rows go round in a ring, x has one buffer a stage.
  int ahead;                      // steps in flight
  int y_depth;                    // lattice rows along depth of a ring slot
  int window, advance, slots;     // lattice rows of a step, new rows of the next, slots in the ring
  uint64_t depth_mask, row_mask;  // lattice rows that some tap reads
  int y_pixels;                   // outputs of a staged row
  int x_channels, y_channels;     // staged channels of a whole block
  int vector;                     // bytes of a copy, channels last
  // Channels first, with a window: a staged row begins at the 16-byte unit of memory that holds its
  // first element. Units of a row; whether rows of y lie so that words do not need vector loads to
  // be free of bank conflicts; whether every row's first element begins a unit.
  int x_units, y_units;
  bool y_spread, x_aligned, y_aligned;
  // Bytes between neighbours in shared memory.
  int x_channel, x_pixel, x_run_pad, x_row, x_stage;
  int y_channel, y_pixel, y_run_pad, y_row, y_slot;
  int x_base, b_base, barrier, shared;  // b: x as the group's second operand
};

struct WeightGradPlan {
  std::string refusal;
  WeightGradVariant variant;
  WeightGradArgs args;
  int64_t blocks;
  int64_t workspace, kept_offset;  // bytes; where `kept` begins
  double seconds;
};

// Pure host functions.
WeightGradPlan PlanWeightGrad(const Problem&, const Device&);
inline constexpr int kWeightGradWarps = 8;      // that multiply
inline constexpr int kWeightGradCopyWarps = 4;  // that copy

// The tensor cores cut off what they add to a sum, so one is kept over no more than about this many
// products before it is added, rounded, to the sum so far.
inline constexpr int kWeightGradFlush = 1024;

// Launches the variant for one input type (defined in the instantiation files).
template <class In, bool kLast>
cudaError_t LaunchWeightGradVariant(const WeightGradVariant&, const WeightGradArgs&, int64_t blocks,
                                    cudaStream_t);

cudaError_t LaunchWeightGrad(const Problem&, const Operands&, const Device&, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_WEIGHT_GRAD_H_
