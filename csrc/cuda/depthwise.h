// "depthwise": groups = channels, one input and one output channel a group. CUDA cores, float32
// sums of exact products; bound by memory.
//
// A block stages the piece of its input that a box of input positions needs in shared memory, as
// float32 and channel by channel whatever the layout. Each thread then takes runs of neighbouring
// positions of the innermost axis, which share loads over the taps. Outputs go back through shared
// memory, so that both reads and writes of device memory are whole rows.
#ifndef JAXCONV_CUDA_DEPTHWISE_H_
#define JAXCONV_CUDA_DEPTHWISE_H_

#include <string>
#include <vector>

#include "cuda/small_divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddDepthwise(std::vector<Row>& rows);

// Compile-time choices: the stride and the taps of the innermost axis; 0, 0: any.
#define JAXCONV_DEPTHWISE_WINDOWS(X) X(0, 0) X(1, 3) X(1, 5) X(1, 7) X(2, 2) X(2, 3) X(2, 4)

inline constexpr int kDepthwiseThreads = 256;
inline constexpr int kDepthwiseTapRows = 4;  // of a thread, weight gradient

constexpr int DepthwiseRun(int stride) { return stride == 0 ? 1 : stride == 1 ? 8 : 4; }

// A staged row has a gap after as many positions: those of a run.
constexpr int DepthwiseRowRun(int stride, bool outputs) {
  return stride == 0 ? 32 : DepthwiseRun(stride) * (outputs ? stride : 1);
}

struct DepthwiseArgs {
  const void* x;
  const void* w;
  const void* y;
  const void* bias;
  void* out;
  int32_t in_dtype, out_dtype;  // DType
  bool channels_last;
  int n, c;
  int isize[kAxes], osize[kAxes], k[kAxes], stride[kAxes], dilation[kAxes], pad[kAxes];
  Strides xs, ys;
  int64_t w_elements;
  // A block takes `channels` channels and boxes of `box` input positions (forward: of outputs
  // stride * box, whose positions are counted from -pad).
  int channels, channels_log, channel_blocks;
  int box[kAxes], boxes[kAxes], origin[kAxes];
  int64_t boxes_total;  // of all images
  int parts;            // weight gradient: blocks that share the boxes of the same channels
  int x_extent[kAxes], y_extent[kAxes];                       // staged of x and of y
  int x_pitch, y_pitch;                                       // floats of a staged row
  int x_plane, y_plane;                                       // floats of a staged channel
  SmallDivisor by_x_rows, by_x_rows1, by_y_rows, by_y_rows1;  // rows of a staged channel, of axis 1
  int tap_step[kAxes], row_step[kAxes];  // taps of one output row: stride / gcd, dilation / gcd
  int shared;                            // bytes
};

struct DepthwisePlan {
  std::string refusal;
  int stride, taps;  // the window
  DepthwiseArgs args;
  int64_t blocks, workspace;
  double seconds;
};

DepthwisePlan PlanDepthwise(const Problem&, const Device&);

cudaError_t LaunchDepthwise(const Problem&, const Operands&, const Device&, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DEPTHWISE_H_
