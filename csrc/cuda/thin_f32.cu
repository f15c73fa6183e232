#include "cuda/thin.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueThinForward<float>(const ThinPlan&, const ThinForwardArgs&, bool,
                                            cudaStream_t);
template cudaError_t EnqueueThinInputGrad<float>(const ThinPlan&, const ThinInputGradArgs&, bool,
                                              cudaStream_t);

}  // namespace jaxconv::cuda
