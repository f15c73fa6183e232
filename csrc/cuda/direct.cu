#include <algorithm>

#include "cuda/direct.h"
#include "cuda/dtypes.cuh"

namespace jaxconv::cuda {
namespace {

constexpr int kThreads = 256;

// A position in x or y from its offset in memory: offsets that follow each other are neighbours in
// memory, so a warp's accesses are, too.
struct Position {
  int64_t n, c;
  int64_t s[kAxes];
};

__device__ Position PositionOf(int64_t offset, int64_t channels, const Sizes& s, bool last) {
  Position at;
  if (last) {
    at.c = offset % channels;
    offset /= channels;
  }
  for (int a = kAxes - 1; a >= 0; --a) {
    at.s[a] = offset % s[a];
    offset /= s[a];
  }
  if (!last) {
    at.c = offset % channels;
    offset /= channels;
  }
  at.n = offset;
  return at;
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    DirectForward(const Problem p, const In* __restrict__ x, const In* __restrict__ w,
                  const Out* __restrict__ bias, Out* __restrict__ y) {
  using Acc = Accumulator<In>;
  const int64_t count = p.YElements(), cig = p.cig(), cog = p.cog(), taps = Product(p.k);
  const Strides xs = p.XStrides();
  for (int64_t offset = blockIdx.x * int64_t{kThreads} + threadIdx.x; offset < count;
       offset += int64_t{gridDim.x} * kThreads) {
    const Position o = PositionOf(offset, p.co, p.osize, p.channels_last);
    const int64_t ci = o.c / cog * cig;
    Acc sum = bias != nullptr ? static_cast<Acc>(ToAccumulator(bias[o.c])) : Acc{0};
    for (int64_t t = 0; t < taps; ++t) {
      // Tap t reaches output o from the input i with i * stride = o + pad - t * dilation, if any.
      const int64_t tap[kAxes] = {t / p.k[2] / p.k[1], t / p.k[2] % p.k[1], t % p.k[2]};
      int64_t from = o.n * xs.n + ci * xs.c;
      bool reached = true;
      for (int a = 0; a < kAxes; ++a) {
        const int64_t at = o.s[a] + p.pad[a] - tap[a] * p.dilation[a], i = at / p.stride[a];
        reached = reached && at >= 0 && at % p.stride[a] == 0 && i < p.isize[a];
        from += i * xs.s[a];
      }
      if (!reached) continue;
      const In* to = w + (ci * cog + o.c % cog) * taps + t;
      for (int64_t c = 0; c < cig; ++c) {
        sum += ToAccumulator(x[from + c * xs.c]) * ToAccumulator(to[c * cog * taps]);
      }
    }
    y[offset] = FromAccumulator<Out>(sum);
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    DirectInputGrad(const Problem p, const In* __restrict__ y, const In* __restrict__ w,
                    Out* __restrict__ dx) {
  using Acc = Accumulator<In>;
  const int64_t count = p.XElements(), cig = p.cig(), cog = p.cog(), taps = Product(p.k);
  const Strides ys = p.YStrides();
  for (int64_t offset = blockIdx.x * int64_t{kThreads} + threadIdx.x; offset < count;
       offset += int64_t{gridDim.x} * kThreads) {
    const Position i = PositionOf(offset, p.ci, p.isize, p.channels_last);
    const int64_t co = i.c / cig * cog;
    Acc sum = 0;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t tap[kAxes] = {t / p.k[2] / p.k[1], t / p.k[2] % p.k[1], t % p.k[2]};
      int64_t from = i.n * ys.n + co * ys.c;
      bool inside = true;
      for (int a = 0; a < kAxes; ++a) {
        const int64_t o = i.s[a] * p.stride[a] + tap[a] * p.dilation[a] - p.pad[a];
        inside = inside && o >= 0 && o < p.osize[a];
        from += o * ys.s[a];
      }
      if (!inside) continue;
      const In* to = w + i.c * cog * taps + t;
      for (int64_t c = 0; c < cog; ++c) {
        sum += ToAccumulator(y[from + c * ys.c]) * ToAccumulator(to[c * taps]);
      }
    }
    dx[offset] = FromAccumulator<Out>(sum);
  }
}

// A block an element of dw. Each thread sums every kThreads-th pixel, the block adds the threads'
// sums as a tree: the same order in every run. Short sums are kept in the accumulator's type and
// added up in double, so the error does not grow with the volume.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    DirectWeightGrad(const Problem p, const In* __restrict__ x, const In* __restrict__ y,
                     Out* __restrict__ dw) {
  using Acc = Accumulator<In>;
  constexpr int kShortSum = 64;
  __shared__ double sums[kThreads];
  const int64_t count = p.WElements(), cig = p.cig(), cog = p.cog(), taps = Product(p.k);
  const Strides xs = p.XStrides(), ys = p.YStrides();
  for (int64_t element = blockIdx.x; element < count; element += gridDim.x) {
    const int64_t t = element % taps, ci = element / taps / cog;
    const int64_t co = ci / cig * cog + element / taps % cog;
    const int64_t tap[kAxes] = {t / p.k[2] / p.k[1], t / p.k[2] % p.k[1], t % p.k[2]};
    Sizes begin, size;
    for (int a = 0; a < kAxes; ++a) {
      const Range r = InputRange(p, a, tap[a]);
      begin[a] = r.begin;
      size[a] = r.end > r.begin ? r.end - r.begin : 0;
    }
    const int64_t pixels = p.n * Product(size);
    double sum = 0;
    Acc part = 0;
    int length = 0;
    for (int64_t pixel = threadIdx.x; pixel < pixels; pixel += kThreads) {
      const Position at = PositionOf(pixel, 1, size, true);
      int64_t from_x = at.n * xs.n + ci * xs.c, from_y = at.n * ys.n + co * ys.c;
      for (int a = 0; a < kAxes; ++a) {
        const int64_t i = begin[a] + at.s[a];
        from_x += i * xs.s[a];
        from_y += (i * p.stride[a] + tap[a] * p.dilation[a] - p.pad[a]) * ys.s[a];
      }
      part += ToAccumulator(x[from_x]) * ToAccumulator(y[from_y]);
      if (++length == kShortSum) {
        sum += static_cast<double>(part);
        part = 0;
        length = 0;
      }
    }
    sums[threadIdx.x] = sum + static_cast<double>(part);
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0)
      dw[element] = FromAccumulator<Out>(static_cast<Accumulator<Out>>(sums[0]));
    __syncthreads();
  }
}

// Grid-stride kernels: any count is right, this one is enough to fill the device.
unsigned BlocksFor(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>(count, int64_t{1} << 30));
}

}  // namespace

cudaError_t LaunchDirectForward(const Problem& p, const Operands& ops, const Device&,
                                cudaStream_t stream) {
  if (p.YElements() == 0) return cudaSuccess;
  return WithTypes(p, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    DirectForward<<<BlocksFor((p.YElements() + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        p, static_cast<const In*>(ops.x), static_cast<const In*>(ops.w),
        static_cast<const Out*>(ops.bias), static_cast<Out*>(ops.out));
    return cudaGetLastError();
  });
}

cudaError_t LaunchDirectInputGrad(const Problem& p, const Operands& ops, const Device&,
                                  cudaStream_t stream) {
  if (p.XElements() == 0) return cudaSuccess;
  return WithTypes(p, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    DirectInputGrad<<<BlocksFor((p.XElements() + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        p, static_cast<const In*>(ops.y), static_cast<const In*>(ops.w),
        static_cast<Out*>(ops.out));
    return cudaGetLastError();
  });
}

cudaError_t LaunchDirectWeightGrad(const Problem& p, const Operands& ops, const Device&,
                                   cudaStream_t stream) {
  if (p.WElements() == 0) return cudaSuccess;
  return WithTypes(p, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    DirectWeightGrad<<<BlocksFor(p.WElements()), kThreads, 0, stream>>>(
        p, static_cast<const In*>(ops.x), static_cast<const In*>(ops.y),
        static_cast<Out*>(ops.out));
    return cudaGetLastError();
  });
}

}  // namespace jaxconv::cuda
