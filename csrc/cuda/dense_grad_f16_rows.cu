#include "cuda/dense_grad.cuh"

template cudaError_t jaxconv::cuda::EnqueueDenseGrad<__half, jaxconv::cuda::DenseGradFrom::kRows>(
    const DenseGradPlan&, const DenseGradArgs&, const DenseGradMaps&, cudaStream_t);
