#include "cuda/dependent_launch.cuh"
#include "cuda/dtypes.cuh"
#include "cuda/sum_parts.cuh"

namespace jaxconv::cuda {
namespace {

constexpr int kColumns = 32, kRows = 8;

// Thread row r adds parts r, r + 8, ..., then the rows add up.
template <class Out>
__global__ void __launch_bounds__(kColumns* kRows)
    Sum(const float* __restrict__ from, int parts, int64_t count, Out* __restrict__ out) {
  __shared__ double sums[kRows][kColumns];
  WaitForPrevious();
  const int64_t e = blockIdx.x * int64_t{kColumns} + threadIdx.x;
  double sum = 0;
  if (e < count) {
#pragma unroll 4
    for (int p = threadIdx.y; p < parts; p += kRows)
      sum += static_cast<double>(from[p * count + e]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && e < count) {
    for (int r = 1; r < kRows; ++r) sum += sums[r][threadIdx.x];
    out[e] = FromAccumulator<Out>(static_cast<float>(sum));
  }
}

template <class Out>
cudaError_t Launch(const float* from, int parts, int64_t count, void* out, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((count + kColumns - 1) / kColumns));
  config.blockDim = dim3(kColumns, kRows);
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, Sum<Out>, from, parts, count, static_cast<Out*>(out));
}

}  // namespace

cudaError_t SumParts(const float* from, int parts, int64_t count, DType out_dtype, void* out,
                     cudaStream_t stream) {
  switch (out_dtype) {
    case DType::kF32:
      return Launch<float>(from, parts, count, out, stream);
    case DType::kBF16:
      return Launch<__nv_bfloat16>(from, parts, count, out, stream);
    case DType::kF16:
      return Launch<__half>(from, parts, count, out, stream);
    case DType::kF64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxconv::cuda
