#include "cuda/correlate.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueCorrelate<__nv_bfloat16>(const CorrelatePlan&, const CorrelatePack&,
                                                     const CorrelateArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
