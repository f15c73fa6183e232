#include "cuda/weight_grad.cuh"

template cudaError_t jaxconv::cuda::LaunchWeightGradVariant<__half, true>(const WeightGradVariant&,
                                                                          const WeightGradArgs&,
                                                                          int64_t, cudaStream_t);
