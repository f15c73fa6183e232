#include <type_traits>

#include "cuda/depthwise.h"
#include "cuda/dtypes.cuh"
#include "cuda/sum_parts.cuh"

namespace jaxconv::cuda {
namespace {

constexpr int kThreads = kDepthwiseThreads;

__device__ inline float ReadAs(int32_t dtype, const void* p, int64_t at) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[at]);
    case DType::kF16:
      return __half2float(static_cast<const __half*>(p)[at]);
    default:
      return static_cast<const float*>(p)[at];
  }
}

__device__ inline void WriteAs(int32_t dtype, void* p, int64_t at, float v) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBF16:
      static_cast<__nv_bfloat16*>(p)[at] = __float2bfloat16_rn(v);
      return;
    case DType::kF16:
      static_cast<__half*>(p)[at] = __float2half_rn(v);
      return;
    default:
      static_cast<float*>(p)[at] = v;
  }
}

// A box of x or y in shared memory: [channel][row][position], where position p lies at
// p + p / 2^run_log: threads that take neighbouring runs then read different banks.
struct Box {
  float* at;
  int channels, channels_log;
  int rows;
  SmallDivisor by_rows, by_rows1;
  int length, pitch, plane, run_log;
  int begin[kAxes];  // of the box in the tensor
  const int* size;
  Strides strides;
  int64_t offset;  // of the image and the first channel
  bool last;

  // Calls body(places in shared memory, offset in the tensor, whether inside the tensor, channel)
  // for all elements: a warp a row, lanes along memory.
  template <class Body>
  __device__ void ForEach(Body body) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int lane_c = last ? lane & ((1 << channels_log) - 1) : 0;
    const int lane_p = last ? lane >> channels_log : lane, hop = last ? 32 >> channels_log : 32;
    const int64_t memory_hop = hop * strides.s[2];
    // Positions lane_p + k * hop inside the tensor are those with low <= k < high.
    const int first = begin[2] + lane_p;
    const int low = first >= 0 ? 0 : (-first + hop - 1) / hop;
    const int high = size[2] > first ? (size[2] - first + hop - 1) / hop : 0;
    const int count = lane_c < channels && lane_p < length ? (length - lane_p + hop - 1) / hop : 0;
    for (int i = warp; i < (last ? rows : rows * channels); i += kThreads / 32) {
      const int c = last ? lane_c : Divide(i, by_rows), r = last ? i : i - c * rows;
      const int r0 = Divide(r, by_rows1), i0 = begin[0] + r0;
      const int i1 = begin[1] + r - r0 * by_rows1.divisor;
      const bool inside = static_cast<unsigned>(i0) < static_cast<unsigned>(size[0]) &&
                          static_cast<unsigned>(i1) < static_cast<unsigned>(size[1]);
      int64_t memory =
          offset + c * strides.c + i0 * strides.s[0] + i1 * strides.s[1] + first * strides.s[2];
      float* const to = at + c * plane + r * pitch;
      const int upper = inside ? high : 0;
#pragma unroll 4
      for (int k = 0; k < count; ++k) {
        const int p = lane_p + k * hop;
        body(to + p + (p >> run_log), memory, k >= low && k < upper, c);
        memory += memory_hop;
      }
    }
  }

  template <class T>
  __device__ void LoadAs(const T* from) const {
    ForEach([&](float* to, int64_t source, bool inside, int) {
      if constexpr (std::is_same_v<T, float>) {
        const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address),
                     "l"(from + source), "r"(inside ? 4 : 0)
                     : "memory");
      } else {
        *to = inside ? ToAccumulator(from[source]) : 0;
      }
    });
  }

  __device__ void Load(int32_t dtype, const void* from) const {
    switch (static_cast<DType>(dtype)) {
      case DType::kBF16:
        return LoadAs(static_cast<const __nv_bfloat16*>(from));
      case DType::kF16:
        return LoadAs(static_cast<const __half*>(from));
      default:
        return LoadAs(static_cast<const float*>(from));
    }
  }
};

__device__ inline void FinishLoads() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

constexpr int Log2(int n) { return n <= 1 ? 0 : 1 + Log2(n / 2); }

struct Place {
  int n, c0, channels, begin[kAxes];
};

__device__ inline Place PlaceOf(const DepthwiseArgs& a, int64_t index, int channel_block) {
  Place at;
  for (int i = kAxes - 1; i >= 0; --i) {
    at.begin[i] = a.origin[i] + static_cast<int>(index % a.boxes[i]) * a.box[i];
    index /= a.boxes[i];
  }
  at.n = static_cast<int>(index);
  at.c0 = channel_block * a.channels;
  at.channels = min(a.channels, a.c - at.c0);
  return at;
}

template <int kRun, int kLength>
__device__ inline void LoadWindow(float (&to)[kLength], const float* from) {
#pragma unroll
  for (int j = 0; j < kLength; ++j) to[j] = from[j + j / kRun];
}

__device__ inline Box BoxOfX(const DepthwiseArgs& a, const Place& at, float* shared, int run_log) {
  Box box{shared,
          at.channels,
          a.channels_log,
          a.x_extent[0] * a.x_extent[1],
          a.by_x_rows,
          a.by_x_rows1,
          a.x_extent[2],
          a.x_pitch,
          a.x_plane,
          run_log,
          {at.begin[0], at.begin[1], at.begin[2]},
          a.isize,
          a.xs,
          at.n * a.xs.n + at.c0 * a.xs.c,
          a.channels_last};
  return box;
}

__device__ inline Box BoxOfY(const DepthwiseArgs& a, const Place& at, float* shared, int run_log) {
  Box box{shared,
          at.channels,
          a.channels_log,
          a.y_extent[0] * a.y_extent[1],
          a.by_y_rows,
          a.by_y_rows1,
          a.y_extent[2],
          a.y_pitch,
          a.y_plane,
          run_log,
          {},
          a.osize,
          a.ys,
          at.n * a.ys.n + at.c0 * a.ys.c,
          a.channels_last};
  for (int i = 0; i < kAxes; ++i) box.begin[i] = at.begin[i] * a.stride[i] - a.pad[i];
  return box;
}

__device__ inline void LoadWeights(const DepthwiseArgs& a, const Place& at, float* to, int taps) {
  for (int i = threadIdx.x; i < at.channels * taps; i += kThreads) {
    to[i] = ReadAs(a.in_dtype, a.w, int64_t{at.c0} * taps + i);
  }
}

// y of a box of outputs.
template <int kStride, int kTaps>
__global__ void __launch_bounds__(kThreads) Forward(const __grid_constant__ DepthwiseArgs a) {
  constexpr int kRun = DepthwiseRun(kStride);
  extern __shared__ float shared[];
  const int taps = a.k[0] * a.k[1] * a.k[2];
  const Place at =
      PlaceOf(a, blockIdx.x / a.channel_blocks, static_cast<int>(blockIdx.x % a.channel_blocks));
  float* const xs = shared;
  float* const ys = xs + a.channels * a.x_plane;
  float* const ws = ys + a.channels * a.y_plane;

  const int stride = kStride == 0 ? a.stride[2] : kStride;
  constexpr int y_run = DepthwiseRowRun(kStride, true), x_run = DepthwiseRowRun(kStride, false);
  Box x = BoxOfX(a, at, xs, Log2(x_run)), y = BoxOfY(a, at, ys, Log2(y_run));
  int margin[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    margin[i] = a.x_extent[i] - a.box[i];
    x.begin[i] -= margin[i];
  }
  x.Load(a.in_dtype, a.x);
  LoadWeights(a, at, ws, taps);
  FinishLoads();

  const int runs = kStride == 0 ? a.y_extent[2] : a.box[2] / kRun;
  const int rows = a.y_extent[0] * a.y_extent[1];
  for (int item = threadIdx.x; item < at.channels * rows * runs; item += kThreads) {
    const int run = item % runs, row = item / runs % rows, c = item / runs / rows;
    const int u0 = row / a.y_extent[1], u1 = row % a.y_extent[1];
    const float* const w_c = ws + c * taps;
    float* const to = ys + c * a.y_plane + row * a.y_pitch;
    float sum[kStride == 0 ? 1 : kRun * kStride] = {};
    // The taps that reach the row: every tap_step-th.
    const auto first_tap = [&](int u, int axis) {
      int t = 0;
      while ((u - t * a.dilation[axis]) % a.stride[axis] != 0 && t < a.tap_step[axis]) ++t;
      return t < a.tap_step[axis] ? t : a.k[axis];
    };
    const int first0 = first_tap(u0, 0), first1 = first_tap(u1, 1);
    for (int t0 = first0, v0 = (u0 - t0 * a.dilation[0]) / a.stride[0] + margin[0]; t0 < a.k[0];
         t0 += a.tap_step[0], v0 -= a.row_step[0]) {
      for (int t1 = first1, v1 = (u1 - t1 * a.dilation[1]) / a.stride[1] + margin[1]; t1 < a.k[1];
           t1 += a.tap_step[1], v1 -= a.row_step[1]) {
        const float* const w_row = w_c + (t0 * a.k[1] + t1) * a.k[2];
        const float* const x_row = xs + c * a.x_plane + (v0 * a.x_extent[1] + v1) * a.x_pitch;
        if constexpr (kStride == 0) {
          for (int t2 = 0; t2 < a.k[2]; ++t2) {
            const int v2 = run - t2 * a.dilation[2] + margin[2] * stride;
            if (v2 < 0 || v2 % stride != 0) continue;
            const int p = v2 / stride;
            sum[0] += x_row[p + p / x_run] * w_row[t2];
          }
        } else {
          constexpr int kMargin = (kTaps - 1) / kStride;
          float window[kRun + kMargin], tap[kTaps];
          LoadWindow<kRun>(window, x_row + run * (kRun + 1));
#pragma unroll
          for (int t = 0; t < kTaps; ++t) tap[t] = w_row[t];
#pragma unroll
          for (int l = 0; l < kRun; ++l) {
#pragma unroll
            for (int t = 0; t < kTaps; ++t) {
              sum[l * kStride + t % kStride] += window[l + kMargin - t / kStride] * tap[t];
            }
          }
        }
      }
    }
    if constexpr (kStride == 0) {
      to[run + run / y_run] = sum[0];
    } else {
#pragma unroll
      for (int e = 0; e < kRun * kStride; ++e) to[run * (kRun * kStride + 1) + e] = sum[e];
    }
  }
  __syncthreads();
  y.ForEach([&](const float* from, int64_t to, bool inside, int c) {
    if (!inside) return;
    float v = *from;
    if (a.bias != nullptr) v += ReadAs(a.out_dtype, a.bias, at.c0 + c);
    WriteAs(a.out_dtype, a.out, to, v);
  });
}

// dx of a box of inputs.
template <int kStride, int kTaps>
__global__ void __launch_bounds__(kThreads) InputGrad(const __grid_constant__ DepthwiseArgs a) {
  constexpr int kRun = DepthwiseRun(kStride);
  extern __shared__ float shared[];
  const int taps = a.k[0] * a.k[1] * a.k[2];
  const Place at =
      PlaceOf(a, blockIdx.x / a.channel_blocks, static_cast<int>(blockIdx.x % a.channel_blocks));
  float* const xs = shared;
  float* const ys = xs + a.channels * a.x_plane;
  float* const ws = ys + a.channels * a.y_plane;

  const int stride = kStride == 0 ? a.stride[2] : kStride;
  constexpr int y_run = DepthwiseRowRun(kStride, true), x_run = DepthwiseRowRun(kStride, false);
  const Box x = BoxOfX(a, at, xs, Log2(x_run)), y = BoxOfY(a, at, ys, Log2(y_run));
  y.Load(a.in_dtype, a.y);
  LoadWeights(a, at, ws, taps);
  FinishLoads();

  const int runs = a.box[2] / kRun, rows = a.box[0] * a.box[1];
  for (int item = threadIdx.x; item < at.channels * rows * runs; item += kThreads) {
    const int run = item % runs, row = item / runs % rows, c = item / runs / rows;
    const int q0 = row / a.box[1], q1 = row % a.box[1];
    const float* const w_c = ws + c * taps;
    const float* const y_c = ys + c * a.y_plane;
    float sum[kRun] = {};
    for (int t0 = 0; t0 < a.k[0]; ++t0) {
      for (int t1 = 0; t1 < a.k[1]; ++t1) {
        const float* const w_row = w_c + (t0 * a.k[1] + t1) * a.k[2];
        const float* const y_row = y_c + ((q0 * a.stride[0] + t0 * a.dilation[0]) * a.y_extent[1] +
                                          q1 * a.stride[1] + t1 * a.dilation[1]) *
                                             a.y_pitch;
        if constexpr (kStride == 0) {
          for (int t2 = 0; t2 < a.k[2]; ++t2) {
            const int p = run * stride + t2 * a.dilation[2];
            sum[0] += y_row[p + p / y_run] * w_row[t2];
          }
        } else {
          float window[(kRun - 1) * kStride + kTaps], tap[kTaps];
          LoadWindow<kRun * kStride>(window, y_row + run * (kRun * kStride + 1));
#pragma unroll
          for (int t = 0; t < kTaps; ++t) tap[t] = w_row[t];
#pragma unroll
          for (int l = 0; l < kRun; ++l) {
#pragma unroll
            for (int t = 0; t < kTaps; ++t) sum[l] += window[l * kStride + t] * tap[t];
          }
        }
      }
    }
    float* const to = xs + c * a.x_plane + row * a.x_pitch;
#pragma unroll
    for (int l = 0; l < kRun; ++l) {
      if constexpr (kStride == 0) {
        to[run + run / x_run] = sum[0];
      } else {
        to[run * (kRun + 1) + l] = sum[l];
      }
    }
  }
  __syncthreads();
  x.ForEach([&](const float* from, int64_t to, bool inside, int) {
    if (inside) WriteAs(a.out_dtype, a.out, to, *from);
  });
}

// A part of dw: the sum over every parts-th box. A thread keeps kDepthwiseTapRows rows of taps (any
// window: one tap) of one channel, and shares the runs with the threads that keep the same.
template <int kStride, int kTaps>
__global__ void __launch_bounds__(kThreads) WeightGrad(const __grid_constant__ DepthwiseArgs a) {
  constexpr int kRun = DepthwiseRun(kStride);
  constexpr int kRows = kStride == 0 ? 1 : kDepthwiseTapRows, kKept = kStride == 0 ? 1 : kTaps;
  extern __shared__ float shared[];
  const int taps = a.k[0] * a.k[1] * a.k[2], tap_rows = kStride == 0 ? taps : a.k[0] * a.k[1];
  const int channel_block = static_cast<int>(blockIdx.x % a.channel_blocks);
  const int64_t part = blockIdx.x / a.channel_blocks;
  float* const xs = shared;
  float* const ys = xs + a.channels * a.x_plane;
  const int stride = kStride == 0 ? a.stride[2] : kStride;
  constexpr int y_run = DepthwiseRowRun(kStride, true), x_run = DepthwiseRowRun(kStride, false);

  const int sets = (tap_rows + kRows - 1) / kRows * a.channels;  // of taps, over all channels
  const int helpers = max(kThreads / sets, 1);
  const int runs = a.box[2] / kRun, rows = a.box[0] * a.box[1];
  // More sets than threads are done in turns, each with its own pass over the boxes.
  for (int first = 0; first < sets; first += kThreads) {
    const int set = first + threadIdx.x / helpers, helper = threadIdx.x % helpers;
    const bool busy = set < sets;
    const int c = set % a.channels, row_first = set / a.channels * kRows;
    float sum[kRows][kKept] = {};
    int tap_offset[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int t = min(row_first + r, tap_rows - 1), row = kStride == 0 ? t / a.k[2] : t;
      tap_offset[r] =
          (row / a.k[1] * a.dilation[0] * a.y_extent[1] + row % a.k[1] * a.dilation[1]) * a.y_pitch;
    }
    const int tap2 = kStride == 0 ? min(row_first, taps - 1) % a.k[2] * a.dilation[2] : 0;
    for (int64_t index = part; index < a.boxes_total; index += a.parts) {
      const Place at = PlaceOf(a, index, channel_block);
      __syncthreads();
      BoxOfX(a, at, xs, Log2(x_run)).Load(a.in_dtype, a.x);
      BoxOfY(a, at, ys, Log2(y_run)).Load(a.in_dtype, a.y);
      FinishLoads();
      if (!busy || c >= at.channels) continue;
      for (int item = helper; item < rows * runs; item += helpers) {
        const int run = item % runs, row = item / runs;
        const int q0 = row / a.box[1], q1 = row % a.box[1];
        const float* const x_row = xs + c * a.x_plane + row * a.x_pitch;
        const float* const y_row =
            ys + c * a.y_plane + (q0 * a.stride[0] * a.y_extent[1] + q1 * a.stride[1]) * a.y_pitch;
        if constexpr (kStride == 0) {
          const int p = run * stride + tap2;
          sum[0][0] += x_row[run + run / x_run] * y_row[tap_offset[0] + p + p / y_run];
        } else {
          float x[kRun];
          LoadWindow<kRun>(x, x_row + run * (kRun + 1));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float window[(kRun - 1) * kStride + kTaps];
            LoadWindow<kRun * kStride>(window, y_row + tap_offset[r] + run * (kRun * kStride + 1));
#pragma unroll
            for (int l = 0; l < kRun; ++l) {
#pragma unroll
              for (int t = 0; t < kTaps; ++t) sum[r][t] += x[l] * window[l * kStride + t];
            }
          }
        }
      }
    }
    // The helpers of a set add up in order.
    float* const sums = shared;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int t = 0; t < kKept; ++t) sums[(r * kKept + t) * kThreads + threadIdx.x] = sum[r][t];
    }
    __syncthreads();
    const int channels = min(a.channels, a.c - channel_block * a.channels);
    const int here = min(sets - first, kThreads / helpers);
    for (int e = threadIdx.x; e < here * kRows * kKept; e += kThreads) {
      const int s = e / (kRows * kKept), v = e % (kRows * kKept);
      float total = 0;
      for (int h = 0; h < helpers; ++h) total += sums[v * kThreads + s * helpers + h];
      const int channel = (first + s) % a.channels;
      const int row = (first + s) / a.channels * kRows + v / kKept;
      if (channel >= channels || row >= tap_rows) continue;
      const int64_t to =
          int64_t{channel_block * a.channels + channel} * taps + row * kKept + v % kKept;
      if (a.parts > 1) {
        static_cast<float*>(a.out)[part * a.w_elements + to] = total;
      } else {
        WriteAs(a.out_dtype, a.out, to, total);
      }
    }
    __syncthreads();
  }
}

template <int kStride, int kTaps>
cudaError_t LaunchWindow(Pass pass, const DepthwisePlan& plan, const DepthwiseArgs& a,
                         cudaStream_t stream) {
  const auto kernel = pass == Pass::kForward     ? Forward<kStride, kTaps>
                      : pass == Pass::kInputGrad ? InputGrad<kStride, kTaps>
                                                 : WeightGrad<kStride, kTaps>;
  if (const cudaError_t status =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, a.shared);
      status != cudaSuccess) {
    return status;
  }
  kernel<<<static_cast<unsigned>(plan.blocks), kThreads, a.shared, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchDepthwise(const Problem& p, const Operands& ops, const Device& device,
                            cudaStream_t stream) {
  const DepthwisePlan plan = PlanDepthwise(p, device);
  if (!plan.refusal.empty()) return cudaErrorInvalidValue;
  if (plan.blocks == 0) {
    const int64_t elements = p.pass == Pass::kWeightGrad ? p.WElements() : 0;
    return elements == 0
               ? cudaSuccess
               : cudaMemsetAsync(ops.out, 0, static_cast<size_t>(elements * SizeOf(p.out_dtype)),
                                 stream);
  }
  DepthwiseArgs a = plan.args;
  a.x = ops.x;
  a.w = ops.w;
  a.y = ops.y;
  a.bias = ops.bias;
  a.out = a.parts > 1 ? ops.workspace : ops.out;
  cudaError_t status = cudaErrorInvalidValue;
#define JAXCONV_CASE(S, T) \
  if (plan.stride == S && plan.taps == T) status = LaunchWindow<S, T>(p.pass, plan, a, stream);
  JAXCONV_DEPTHWISE_WINDOWS(JAXCONV_CASE)
#undef JAXCONV_CASE
  if (status != cudaSuccess || a.parts == 1) return status;
  return SumParts(static_cast<const float*>(ops.workspace), a.parts, p.WElements(), p.out_dtype,
                  ops.out, stream);
}

}  // namespace jaxconv::cuda
