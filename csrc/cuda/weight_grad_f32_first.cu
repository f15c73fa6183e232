#include "cuda/weight_grad.cuh"

template cudaError_t jaxconv::cuda::LaunchWeightGradVariant<float, false>(const WeightGradVariant&,
                                                                          const WeightGradArgs&,
                                                                          int64_t, cudaStream_t);
