// "depthwise": groups = channels, one input and one output channel a group. CUDA cores, float32
// sums of exact products.
//
// In u = o + pad an output u = s * q + r takes tap t = r + s * j from input q - j. A thread keeps
// the weights (weight gradient: the sums) of its channels and of one residue of axis 0 in
// registers and marches along axis 1, one input row a step. L1 serves what neighbouring threads
// share; only the input gradient with several taps along axis 0, which reads each output eight
// times in 3D, has rows of y come through shared memory. Lanes are neighbours in memory in either
// layout.
#ifndef JAXCONV_CUDA_DEPTHWISE_H_
#define JAXCONV_CUDA_DEPTHWISE_H_

#include <string>
#include <vector>

#include "cuda/divisor.h"
#include "cuda/table.h"

namespace jaxconv::cuda {

void AddDepthwise(std::vector<Row>& rows);

// Compile-time windows: taps of axis 0, stride and taps of axes 1 and 2. Of axis 0 the input
// gradient counts all taps, the others those of a residue, whatever the stride.
struct DepthwiseWindow {
  int t0, s1, k1, s2, k2;

  // Channels of a thread, channels last: their weights or sums fit into registers. (But one where
  // rows come through shared memory.)
  constexpr int channels() const { return 2 * t0 * k1 * k2 <= 64 ? 2 : 1; }
  // The parity of the padding for which rows are read and written in pairs, channels first: that of
  // the window's usual padding.
  constexpr int shift() const { return (k2 - s2 + 1) / 2 % 2; }
};
// clang-format off
#define JAXCONV_DEPTHWISE_WINDOWS(X)                                                 \
  X(4, 2, 4, 2, 4) X(3, 2, 3, 2, 3) X(2, 2, 4, 2, 4) X(2, 2, 3, 2, 3) X(2, 2, 2, 2, 2) \
  X(3, 1, 3, 1, 3) X(1, 2, 4, 2, 4) X(1, 2, 3, 2, 3) X(1, 2, 2, 2, 2) X(1, 1, 3, 1, 3) \
  X(1, 1, 7, 1, 7) X(1, 1, 1, 2, 4) X(1, 1, 1, 3, 6)
// clang-format on

// Which pass has which of them: each those with as many taps along axis 0 as along the others.
constexpr bool DepthwiseHas(Pass pass, const DepthwiseWindow& w) {
  const int residue_taps = (w.k1 + w.s1 - 1) / w.s1;
  return w.t0 == 1 || w.t0 == (pass == Pass::kInputGrad ? w.k1 : residue_taps);
}

inline constexpr int kDepthwiseThreads = 256;

// Input gradient with several taps along axis 0: stages of its ring of rows, and chunks of a row
// that a thread copies.
inline constexpr int kDepthwiseStages = 4, kDepthwiseChunks = 4;

// There a thread computes as many neighbours along axis 0, whose stride is that of axis 1.
inline constexpr int kDepthwiseInputs = 2;

// A row of the box of y that a block stages: digits of the index of a chunk, elements of a
// chunk, and between planes, channels and rows.
struct DepthwiseStage {
  SmallDivisor by_first, by_second;
  int count, each, plane, channel, elements;
};

struct DepthwiseArgs {
  const void* x;
  const void* w;
  const void* y;
  const void* bias;
  void* out;
  bool wide;  // float32 results of 16-bit inputs
  bool channels_last;
  int c;
  int isize[kAxes], osize[kAxes], k[kAxes], stride[kAxes], dilation[kAxes], pad[kAxes];
  int64_t xn, yn;  // strides of images, channels and positions, in elements
  int xc, yc, xs[kAxes], ys[kAxes];
  int64_t w_elements;
  // A block's threads are by_c.divisor channels (or vectors of them) x by2.divisor positions of
  // axis 2 x by0.divisor of axis 0, and march over `steps` positions of axis 1. Positions begin at
  // origin. Of axis 0 a thread keeps its residue by by_residue.
  SmallDivisor by_c, by2, by0, by_residue;
  DepthwiseStage stage;
  int steps, origin[kAxes], end[kAxes];
  int tiles2, tiles0, segments, tiles;  // tiles: of all images
  int parts;                            // blocks that share the tiles of the same channels
};

struct DepthwisePlan {
  std::string refusal;
  int window;    // index, or -1: any, by the generic kernels
  int channels;  // of a thread: 1 or 2
  int threads, channel_blocks, shared;
  bool pairs;  // neighbouring outputs of a row are read or written as one
  DepthwiseArgs args;
  int64_t workspace;
  double seconds;
};

DepthwisePlan PlanDepthwise(const Problem&, const Device&);

template <class In>
cudaError_t EnqueueDepthwise(Pass, const DepthwisePlan&, const DepthwiseArgs&, cudaStream_t);

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DEPTHWISE_H_
