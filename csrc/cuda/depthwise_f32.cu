#include "cuda/depthwise.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueDepthwise<float>(Pass, const DepthwisePlan&, const DepthwiseArgs&,
                                             cudaStream_t);

}  // namespace jaxconv::cuda
