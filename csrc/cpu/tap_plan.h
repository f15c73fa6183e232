// What the host and the code for each instruction set share of "taps": see taps.cc. Plain data, for
// the reason given in phase_plan.h.
#ifndef JAXCONV_CPU_TAP_PLAN_H_
#define JAXCONV_CPU_TAP_PLAN_H_

#include <cstdint>

#include "problem.h"

namespace jaxconv::cpu {

// Vectors hold neighbouring taps of the last axis, as the weight has them: it is read where it
// lies.
//
//   u = i * stride + t * dilation = o + pad        (along each axis)
//   input gradient  dx[ci, i] = sum over co, t of w[ci, co, t] * y[co, u]
//   forward         y[co, u] += x[ci, i] * w[ci, co, t]
//
// A `plane` holds a channel of y at all u, so that no tap of any input is outside of it.
struct TapPlan {
  Problem problem;
  int64_t vectors;       // of the taps of a pair of channels
  int64_t plane[kAxes];  // sizes
  int64_t pitch[kAxes];  // elements between neighbours in a plane
  int64_t channel;       // from plane to plane
  bool in_place;         // y itself is such planes (input gradient)
  int64_t positions;     // inputs i of all images
  int64_t block;         // forward: output channels of a task; input gradient: input channels
  int64_t blocks;        // of a group
  int64_t chunk;         // positions of a task
  int64_t chunks;
  int64_t scratch;  // bytes of a task

  constexpr int64_t Tasks() const { return problem.groups * blocks * chunks; }
  constexpr int64_t Planes() const { return problem.n * problem.co; }
};

struct TapOperands {
  const void *x, *w, *y, *bias;
  void* out;
  void* planes;  // input gradient: of y, if they are not in place
};

// The code for one instruction set.
struct TapKernels {
  int64_t vector_bytes;
  int64_t rows, positions;  // vectors of the weight, and positions, of a block of sums
  void (*pack_plane)(const TapPlan&, const TapOperands&, int64_t plane);
  void (*correlate)(const TapPlan&, const TapOperands&, int64_t task, void* scratch);
};

extern const TapKernels kTapsPortable;
#if defined(__x86_64__)
extern const TapKernels kTapsAvx2, kTapsAvx512;
#endif

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_TAP_PLAN_H_
