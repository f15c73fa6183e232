// "thin": few output channels and many input channels in one group, such as the last layer of a
// network that makes images or sound. x is the large tensor; it is read (forward) or written (input
// gradient) once, and y stays in shared memory. docs/gpu_kernels.md explains the kernels.
#ifndef JAXCONV_CUDA_THIN_H_
#define JAXCONV_CUDA_THIN_H_

#include <string>
#include <vector>

#include "cuda/small_divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddThin(std::vector<Row>& rows);

inline constexpr int kThinMultipliers = 8, kThinCopiers = 4;  // warps
inline constexpr int kThinThreads = 32 * (kThinMultipliers + kThinCopiers);
inline constexpr int kThinMaxStride = 8, kThinMaxTaps = 64;  // of an axis
inline constexpr int kThinMostAhead = 3;

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

// Forward. P[co, tap; pixel] = the sum over ci of w[ci, co, tap] * x[ci, pixel] is a dense product;
// each output is the sum of its taps' values of P. A block's items are pieces of the output; it
// walks over an item's planes of sources, and in each over steps of `rows` rows of `width` sources.
struct ThinForwardArgs {
  const void* x;
  const void* w;
  const void* bias;
  void* out;
  bool out_f32;
  int ci, co, columns;  // columns: of P, co * taps
  int isize[kAxes], osize[kAxes], k[kAxes], stride[kAxes], pad[kAxes];
  int64_t x_n, y_n;        // elements between neighbours
  int x_c, x_d, x_h, y_d, y_h, y_c;
  ThinTaps taps[kAxes];
  // An item: outputs q of `box` on the outer axes, and runs j of the innermost one.
  int items, cuts[kAxes], box[kAxes];
  int q_begin[2], q_end[2], reach[2];  // reach: the largest `back`
  int runs;                            // of the innermost axis, all
  int rows, width, first;              // of a step; its sources begin at its item's first j + first
  int ahead;                           // steps that are under way
  // Warps: `sets` of 16 * MT columns, of as many pixels as there are warps for. Steps of 32 bytes
  // of channels.
  int sets, ksteps;
  bool window;                          // stride 2, no dilation and up to four taps, innermost
  int unit;                             // bytes of a copy
  SmallDivisor by_units, by_rows;       // of a row (a pixel, channels last), and rows (width)
  SmallDivisor by_tiles;                // of 8 pixels in a row
  // Shared memory, in bytes, but for P: floats.
  int x_pitch, x_stage;                       // of a channel (a pixel)
  int p_column, p_row, p_margin, p_rows;      // p_rows: of the ring
  int run_chunks, spots;                      // of 32 runs; rows of outputs a step
  int smem_p, smem_sums, smem_stage, smem_spots, smem_x, smem;
};

// Input gradient. A block walks over tiles of `rows` rows of `width` pixels, for which it stages
// the planes and rows of y that their taps reach.
struct ThinInputGradArgs {
  const void* y;
  const void* w;
  void* out;
  bool out_f32;
  int ci, co, columns;
  int isize[kAxes], osize[kAxes], k[kAxes], stride[kAxes], pad[kAxes], dilation[kAxes];
  int64_t x_n, y_n;
  int x_c, x_d, x_h, y_c, y_d, y_h;
  int tiles, cuts[kAxes];
  int rows, width;
  int ahead;
  int sets, ksteps;  // ksteps: of 8 columns (16 of 16 bits)
  int unit, unit_elements;
  bool vector;  // whether four neighbours of the output can be written at once
  int staged_rows, staged_length;  // of a plane; elements of a row
  SmallDivisor by_units, by_staged_rows, by_planes, by_width;
  int pixel_step, tap_step, channel_step, row_step, plane_step;  // elements of staged y
  int y_stage, smem;
};

struct ThinPlan {
  std::string refusal;
  bool forward;
  int mt, ks, grid_x, grid_y;
  double seconds;
  ThinForwardArgs f;
  ThinInputGradArgs g;
};

// A tile: 0 means that the cost model chooses.
struct ThinTile {
  int box_d = 0, box_h = 0, box_w = 0, rows = 0, ahead = 0;
};
ThinPlan PlanThin(const Problem&, const Device&, const ThinTile& = {});

cudaError_t LaunchThin(const Problem&, const Operands&, const ThinPlan&, cudaStream_t);

// Defined in one small file a dtype.
template <class T>
cudaError_t EnqueueThinForward(const ThinPlan&, const ThinForwardArgs&, bool last, cudaStream_t);
template <class T>
cudaError_t EnqueueThinInputGrad(const ThinPlan&, const ThinInputGradArgs&, bool last,
                                 cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_THIN_H_
