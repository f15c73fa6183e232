// Element types on the GPU. 16-bit values are read into and rounded from float.
#ifndef JAXCONV_CUDA_DTYPES_CUH_
#define JAXCONV_CUDA_DTYPES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

namespace jaxconv::cuda {

// The type that sums of products of T are kept in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float ToAccumulator(float v) { return v; }
__device__ inline double ToAccumulator(double v) { return v; }
__device__ inline float ToAccumulator(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float ToAccumulator(__half v) { return __half2float(v); }

template <class T>
__device__ inline T FromAccumulator(Accumulator<T> v);
template <>
__device__ inline float FromAccumulator<float>(float v) {
  return v;
}
template <>
__device__ inline double FromAccumulator<double>(double v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 FromAccumulator<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half FromAccumulator<__half>(float v) {
  return __float2half_rn(v);
}

// Calls body(In{}, Out{}) with the element types of the problem's operands and result.
template <class Body>
cudaError_t WithTypes(const Problem& p, Body body) {
  switch (p.in_dtype) {
    case DType::kF32:
      return body(float{}, float{});
    case DType::kF64:
      return body(double{}, double{});
    case DType::kBF16:
      return p.out_dtype == DType::kF32 ? body(__nv_bfloat16{}, float{})
                                        : body(__nv_bfloat16{}, __nv_bfloat16{});
    case DType::kF16:
      return p.out_dtype == DType::kF32 ? body(__half{}, float{}) : body(__half{}, __half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxconv::cuda

#endif  // JAXCONV_CUDA_DTYPES_CUH_
