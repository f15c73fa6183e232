#include "cuda/block_diagonal.h"

namespace jaxconv::cuda {
namespace {

constexpr int kThreads = 256;

// Block row ci, elements of [merged][cog * taps].
template <class E>
__global__ void __launch_bounds__(kThreads)
    Expand(const E* __restrict__ w, int cig, int merged, int64_t block, E* __restrict__ expanded) {
  const int ci = blockIdx.y, mine = ci / cig % merged;
  const int64_t e = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (e >= block * merged) return;
  expanded[ci * block * merged + e] = e / block == mine ? w[ci * block + e % block] : E{};
}

}  // namespace

Problem MergeGroups(Problem p, int merged) {
  p.groups /= merged;
  return p;
}

cudaError_t ExpandWeights(const Problem& p, int merged, const void* w, void* expanded,
                          cudaStream_t stream) {
  const int64_t block = p.cog() * Product(p.k);
  const dim3 grid(static_cast<unsigned>((block * merged + kThreads - 1) / kThreads),
                  static_cast<unsigned>(p.ci));
  const int cig = static_cast<int>(p.cig());
  if (SizeOf(p.in_dtype) == 4) {
    Expand<<<grid, kThreads, 0, stream>>>(static_cast<const uint32_t*>(w), cig, merged, block,
                                          static_cast<uint32_t*>(expanded));
  } else {
    Expand<<<grid, kThreads, 0, stream>>>(static_cast<const uint16_t*>(w), cig, merged, block,
                                          static_cast<uint16_t*>(expanded));
  }
  return cudaGetLastError();
}

}  // namespace jaxconv::cuda
