// What the host and the code for each instruction set share of "depthwise": see depthwise.cc. Plain
// data, for the reason given in phase_plan.h.
#ifndef JAXCONV_CPU_DEPTHWISE_PLAN_H_
#define JAXCONV_CPU_DEPTHWISE_PLAN_H_

#include <cstdint>

#include "problem.h"

namespace jaxconv::cpu {

// Input gradient of one input and one output channel a group:
//
//   dx[i] = sum over t of w[t] * y[i * stride + t * dilation - pad]
//
// Channels first, vectors hold neighbouring inputs of the last axis. With a stride of 1 there, a
// tap of a vector is a vector of y; with 2, two neighbouring taps are the even and the odd elements
// of two vectors. So y is read where it lies. Lanes that would hear what is not of the row become
// zeros. Channels last, vectors hold neighbouring channels, and neighbouring inputs of a row share
// the pixels that they hear.
struct DepthwisePlan {
  Problem problem;
  int64_t planes;   // that lie apart: of images or, channels first, of their channels
  int64_t vectors;  // of a row of dx or, channels last, of a pixel
  int64_t rows;     // of a block: as many as fill the registers; channels last, one
  int64_t pieces;   // of a row; channels first, one
  int64_t blocks;   // of a plane
  int64_t steps;    // blocks of all planes
  int64_t tasks;    // equal shares of them
  int64_t margin;   // elements around a row that vectors may read
  bool asks;        // for the rows of y that come next
  bool keeps;       // the planes of y that neighbouring planes of dx hear stay in the cache
  int64_t scratch;  // bytes of a task
};

inline constexpr int64_t kDepthwiseTaps = 7;  // of a row, at most

// The code for one instruction set.
struct DepthwiseKernels {
  int64_t vector_bytes;
  int64_t vectors;  // of a block, at most
  void (*first)(const DepthwisePlan&, const void* y, const void* w, void* dx, int64_t task,
                void* scratch);
  // The weight as [tap][channel], channels filled up to whole vectors, and what takes it so.
  void (*pack)(const DepthwisePlan&, const void* w, void* packed);
  void (*last)(const DepthwisePlan&, const void* y, const void* packed, void* dx, int64_t task);
};

extern const DepthwiseKernels kDepthwisePortable;
#if defined(__x86_64__)
extern const DepthwiseKernels kDepthwiseAvx2, kDepthwiseAvx512;
#endif

}  // namespace jaxconv::cpu

#endif  // JAXCONV_CPU_DEPTHWISE_PLAN_H_
