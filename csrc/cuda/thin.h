// "thin": few output channels and many input channels in one group, such as the last layer of a
// network that makes images or sound. x is the large tensor; it is read (forward) or written (input
// gradient) once, and y stays in shared memory. docs/gpu_kernels.md explains the kernels.
#ifndef JAXCONV_CUDA_THIN_H_
#define JAXCONV_CUDA_THIN_H_

#include <string>
#include <vector>

#include "cuda/divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddThin(std::vector<Row>& rows);

// Warps: of the forward eight multiply and eight gather, of the gradients eight multiply and four
// copy.
inline constexpr int kThinMultipliers = 8, kThinGatherers = 8, kThinCopiers = 4;
inline constexpr int kThinForwardThreads = 32 * (kThinMultipliers + kThinGatherers);
inline constexpr int kThinThreads = 32 * (kThinMultipliers + kThinCopiers);
inline constexpr int kThinMaxStride = 8, kThinMaxTaps = 64;  // of an axis
inline constexpr int kThinMostAhead = 3;
inline constexpr int kThinOrigins = 128;  // bytes of shared memory: where the tiles begin

// Where the forward's taps reach. On the outer two axes outputs are counted from -pad: output
// q * stride + r - pad is reached by a tap of phase r from source q - back, so a source is needed
// by the outputs that follow it. On the innermost axis output j * stride + r takes a tap of phase r
// from source j + back (of either sign). Taps are listed by phase; the outer axes' nearest first.
struct ThinTap {
  int16_t tap, back;
};
struct ThinTaps {
  int16_t first[kThinMaxStride + 1];
  ThinTap tap[kThinMaxTaps];
};

// x as it is staged: steps of `rows` rows of `width` pixels, channel by channel (channels last:
// pixel by pixel). Steps are in elements.
struct ThinX {
  const void* x;
  int64_t n_step;
  int c_step, d_step, h_step;
  int ci, size[kAxes];
  int channels;  // of a block
  int rows, width;
  int unit;                        // bytes of a copy
  SmallDivisor by_units, by_rows;  // of a staged row (channels last: pixel), and how many follow it
  int pitch, stage;                // bytes of a channel (channels last: pixel), of a step
};

// y as it is staged: the planes and rows that the taps of a tile of x's pixels reach. Steps are in
// elements, those of the second line from tap to tap and from pixel to pixel, where it is staged.
struct ThinY {
  const void* y;
  int64_t n_step;
  int c_step, d_step, h_step;
  int co, size[kAxes], k[kAxes], stride[kAxes], pad[kAxes], dilation[kAxes];
  int unit, unit_elements;  // of a copy: bytes, elements
  int rows;                 // of a plane
  SmallDivisor by_units, by_rows, by_planes;
  int pixel_step, tap_step, channel_step, row_step, plane_step;
  int stage;  // bytes
};

// Forward. P[co, tap; pixel] = the sum over ci of w[ci, co, tap] * x[ci, pixel] is a dense product;
// each output is the sum of its taps' values of P. A block's items are pieces of the output; it
// walks over an item's planes of sources, and in each over steps.
struct ThinForwardArgs {
  ThinX x;
  const void* w;
  const void* bias;
  void* out;
  bool out_f32;
  int co, columns;  // columns: of P, co * taps
  int osize[kAxes], k[kAxes], stride[kAxes], pad[kAxes];
  int64_t y_n;
  int y_c, y_d, y_h;  // elements between neighbours
  ThinTaps taps[kAxes];
  // Taps of the innermost axis where its stride is 2, nothing is dilated and no phase has more than
  // two taps; else 0. Then the taps of its phase 0 are the even ones, or the odd ones.
  int window, first_parity;
  bool pairs;  // whether the innermost phases can be written together
  // An item: outputs q of `box` on the outer axes, and runs j of the innermost one.
  int items, cuts[kAxes], box[kAxes];
  int q_begin[2], q_end[2], reach[2];  // reach: the largest `back`
  int lead[2];                         // what the first item along an axis has beyond `box`
  int first;                           // the sources of an item begin at its first j + first
  int ahead;                           // steps that are under way
  int sets;                            // of 16 * mt columns
  SmallDivisor by_tiles;               // of 8 pixels in a row
  int run_chunks, spots;               // of 32 runs; rows of outputs a step
  // Shared memory: P is a ring of rows for each column (in floats), the rest are bytes.
  int p_column, p_row, p_margin, p_rows;
  int smem_p, smem_sums, smem_stage, smem_spots, smem_bias, smem_barrier, smem_rows, smem_x, smem;
};

// The two gradients walk over tiles: `rows` rows of `width` pixels of a plane.
struct ThinTiles {
  int tiles, cuts[kAxes];
  int rows, width;
  int ahead;
};

// Input gradient: for each pixel the product of w and of y's values at its taps.
struct ThinInputGradArgs {
  ThinTiles at;
  ThinY y;
  const void* w;
  void* out;
  bool out_f32;
  int ci, columns, size[kAxes];
  int64_t x_n;
  int x_c, x_d, x_h;
  int sets;               // of 16 * mt channels
  SmallDivisor by_width;  // of 16 pixels
  bool vector;            // whether four neighbours of the output can be written at once
  int smem;
};

// Weight gradient: the product of x and of y's values at the taps, over all pixels. A block adds up
// its tiles; what the blocks have is added by a second kernel.
struct ThinWeightGradArgs {
  ThinTiles at;
  ThinX x;
  ThinY y;
  float* out;  // [part][ci][co * taps]
  int64_t out_step;
  int columns;
  int channel_sets, column_sets;  // of 16 * mt channels and 32 columns, a warp each
  int steps_of_row;               // of the tensor cores: 32 bytes of pixels
  SmallDivisor by_steps;
  int flush;  // a warp adds its sums to those in shared memory after as many tiles
  int smem_x, smem_rows, smem_sums, smem;
};

struct ThinPlan {
  std::string refusal;
  int mt, ks, grid_x, grid_y;
  int64_t workspace;
  double seconds;
  ThinForwardArgs forward;
  ThinInputGradArgs input;
  ThinWeightGradArgs weight;
};

// A tile: 0 means that the cost model chooses.
struct ThinTile {
  int box_d = 0, box_h = 0, box_w = 0, rows = 0, ahead = 0;
};
ThinPlan PlanThin(const Problem&, const Device&, const ThinTile& = {});

cudaError_t LaunchThin(const Problem&, const Operands&, const ThinPlan&, cudaStream_t);

// Defined in one small file a dtype.
template <class T>
cudaError_t EnqueueThin(const ThinPlan&, const ThinForwardArgs&, bool last, cudaStream_t);
template <class T>
cudaError_t EnqueueThin(const ThinPlan&, const ThinInputGradArgs&, bool last, cudaStream_t);
template <class T>
cudaError_t EnqueueThin(const ThinPlan&, const ThinWeightGradArgs&, bool last, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_THIN_H_
