#include "cuda/dense_grad.cuh"

template cudaError_t jaxconv::cuda::EnqueueDenseGrad<__half, jaxconv::cuda::DenseGradFrom::kCopies>(
    const DenseGradPlan&, const DenseGradArgs&, const DenseGradMaps&, cudaStream_t);
