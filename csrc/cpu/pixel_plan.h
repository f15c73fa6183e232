// The plan of a "pixels" kernel: channels last, where a pixel's channels are neighbours in memory;
// weight gradients of channels first, too.
//
// Forward and input gradient are one correlation, on each axis
//
//   destination q * dst_step + r  +=  source q * src_step + e      for the taps of phase r,
//
// with (dst_step, src_step) = (stride, 1), e = (r + pad - t * dilation) / stride in the forward and
// (1, stride), r = 0, e = t * dilation - pad in the input gradient. A vector holds neighbouring
// destination channels, a value of the source is multiplied with a vector of the weight, and the
// source is read where it lies: pointers to the pixels that some positions hear by a tap, or to
// zeros where there is none, make strides, phases, dilation and borders a matter of addresses.
//
// The weight gradient multiplies a value of x with a vector of y's channels, or a value of y with a
// vector of x's, and adds up along rows. Boxes of y, and mostly of x, are copied before, as pixels
// with zeros around, so that every tap joins every position.
//
// Depthwise layers (one channel a group on both sides) multiply vectors with vectors, and copy
// nothing.
#ifndef JAXCONV_CPU_PIXEL_PLAN_H_
#define JAXCONV_CPU_PIXEL_PLAN_H_

#include <cstdint>

#include "problem.h"

namespace jaxconv::cpu {

// A tap of one axis, and the source's offset e.
struct AxisTap {
  int64_t t, e;
};

// Where a tap of the weight is in the packed one: as `index` of the `count` taps of its phase,
// before which there are `first` of other phases.
struct PixelTap {
  int64_t first, count, index;
};

// Plain data, as it is read by code compiled for several instruction sets: see phase_plan.h.
struct PixelPlan {
  DType in_type, out_type;
  int64_t depthwise;
  int64_t n, groups;
  int64_t k, m;          // source and destination channels of a group; depthwise: 1 and all
  int64_t src_n, dst_n;  // elements between images, channels, pixels along each axis; and sizes
  int64_t src_c, dst_c;
  int64_t src_s[3], dst_s[3];
  int64_t src_size[3], dst_size[3];
  int64_t src_step[3], dst_step[3];
  int64_t kernel[3], ntaps;
  // The taps of phase r along axis a: axis_taps[a][phase_begin[a][r]] up to [r + 1].
  const AxisTap* axis_taps[3];
  const int64_t* phase_begin[3];
  const PixelTap* taps;        // of the weight, in its order
  const int64_t* phase_first;  // taps of all phases before (r0, r1, r2)
  int64_t phases;
  int64_t wg, wk, wm;   // strides of the weight along groups, source and destination channels
  int64_t mr, nblocks;  // channels of a block, filled up with zeros; blocks of a group
  int64_t grid[3];      // positions along each axis, of the phase that has most
  int64_t tile, tiles;  // positions of a task, tasks of an image
  int64_t phase_splits,
      block_splits;   // a task takes a part of the phases, and of all groups' blocks
  int64_t tap_chunk;  // taps whose weights stay near while a tile's positions pass
  int64_t zeros;      // elements: as many as a pixel of the source has, and a vector
  int64_t scratch;    // bytes of a task
  // Weight gradient: a task takes some x and y channels of a group and a part of all units. Units
  // are pieces of rows of x, each of `columns` positions, `pieces` at once; or boxes of x, if there
  // are any (`boxes`), of which y and, if x_panel is not 0, x are copied.
  int64_t x_chunk, y_chunk, x_chunks, y_chunks, parts, units, columns, pieces;
  int64_t box[3], boxes[3], y_step[3];  // y's rows and columns that are copied lie so far apart
  int64_t swapped;                      // values of y meet vectors of x
  int64_t x_pitch, y_pitch;             // from pixel to pixel of a copy
  int64_t x_panel, y_panel, sums;       // elements of a task's memory
};

struct PixelOperands {
  const void* src;    // weight gradient: y
  const void* other;  // bias; weight gradient: x
  void* dst;          // weight gradient: dw or the parts' sums
  void* weight;       // packed
};

// The code for one instruction set.
struct PixelKernels {
  int64_t vector_bytes;
  int64_t positions;    // computed together
  int64_t max_vectors;  // of a block
  // Rearranges part `task` of `tasks` of the weight: [group][phase][block][tap][k][mr].
  void (*pack_weight)(const PixelPlan&, const void* w, void* packed, int64_t task, int64_t tasks);
  void (*correlate)(const PixelPlan&, const PixelOperands&, int64_t task, void* scratch);
  void (*weight_grad)(const PixelPlan&, const PixelOperands&, int64_t task, void* scratch);
};

extern const PixelKernels kPixelsPortable;
#if defined(__x86_64__)
extern const PixelKernels kPixelsAvx2, kPixelsAvx512;
#endif

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_PIXEL_PLAN_H_
