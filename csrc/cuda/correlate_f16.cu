#include "cuda/correlate.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueueCorrelate<__half>(const CorrelatePlan&, const CorrelatePack&,
                                              const CorrelateArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
