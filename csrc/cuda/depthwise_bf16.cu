#include "cuda/depthwise.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueDepthwise<__nv_bfloat16>(Pass, const DepthwisePlan&,
                                                     const DepthwiseArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
