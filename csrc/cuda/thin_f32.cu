#include "cuda/thin.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueThin<float>(const ThinPlan&, const ThinForwardArgs&, bool,
                                        cudaStream_t);
template cudaError_t EnqueueThin<float>(const ThinPlan&, const ThinInputGradArgs&, bool,
                                        cudaStream_t);
template cudaError_t EnqueueThin<float>(const ThinPlan&, const ThinWeightGradArgs&, bool,
                                        cudaStream_t);

}  // namespace jaxconv::cuda
