#include "cuda/dependent_launch.cuh"
#include "cuda/dtypes.cuh"
#include "cuda/sum_parts.cuh"

namespace jaxconv::cuda {
namespace {

constexpr int kColumns = 32, kRows = 8;
constexpr int64_t kMany = 1 << 16;  // elements

// Thread row r adds parts r, r + 8, ..., then the rows add up. V: elements of a thread.
template <class Out, int V>
__global__ void __launch_bounds__(kColumns* kRows)
    Sum(const float* __restrict__ from, int parts, int64_t count, Out* __restrict__ out) {
  struct alignas(V * sizeof(float)) Loaded {
    float v[V];
  };
  __shared__ double sums[kRows][V][kColumns];
  WaitForPrevious();
  const int64_t e = (blockIdx.x * int64_t{kColumns} + threadIdx.x) * V;
  double sum[V] = {};
  if (e < count) {
#pragma unroll 4
    for (int p = threadIdx.y; p < parts; p += kRows) {
      const Loaded part = *reinterpret_cast<const Loaded*>(from + p * count + e);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += static_cast<double>(part.v[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sums[threadIdx.y][i][threadIdx.x] = sum[i];
  __syncthreads();
  if (threadIdx.y == 0 && e < count) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      for (int r = 1; r < kRows; ++r) sum[i] += sums[r][i][threadIdx.x];
      out[e + i] = FromAccumulator<Out>(static_cast<float>(sum[i]));
    }
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
  // Four elements a thread, where that leaves enough threads to keep the memory busy.
  const bool fours = count % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  const int elements = fours && count >= kMany ? 4 : 1, block = kColumns * elements;
  config.gridDim = dim3(static_cast<unsigned>((count + block - 1) / block));
  config.blockDim = dim3(kColumns, kRows);
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, elements == 4 ? Sum<Out, 4> : Sum<Out, 1>, from, parts, count,
                            static_cast<Out*>(out));
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
