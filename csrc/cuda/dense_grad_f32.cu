#include "cuda/dense_grad.cuh"

template cudaError_t jaxconv::cuda::EnqueueDenseGrad<float>(const DenseGradPlan&,
                                                       const DenseGradArgs&, const DenseGradMaps&,
                                                       cudaStream_t);
